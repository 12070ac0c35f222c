//! Direct 2-d convolution, NHWC f32, forward and both gradients.
//!
//! In NHWC the window of one output pixel is, for every kernel row, one run of `kw * ci` contiguous floats, at any
//! stride. A tile of neighbouring output pixels times a few vectors of output channels lives in registers; the
//! inner loop broadcasts one input value per pixel against the packed weights. Nothing is rearranged in memory but
//! the weights and, at the left and right borders, the few input columns of one tile (to pad them with zeros).
//!
//! The weight gradient is the same product with other roles: input channels take the place of pixels, and the
//! sum runs over pixels. The data gradient is a forward convolution with flipped weights.
//!
//! Results do not depend on the number of threads: the order of every sum is fixed.

use rayon::prelude::*;

use super::{Isa, SendPtr, conv_portable};

/// Shape of a 2-d convolution on NHWC tensors with the same padding and stride in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Images in the batch.
    pub n: usize,
    /// Input height and width, in pixels.
    pub h: usize,
    pub w: usize,
    /// Input and output channels.
    pub ci: usize,
    pub co: usize,
    /// Kernel height and width.
    pub kh: usize,
    pub kw: usize,
    /// Distance of output pixels on the input grid.
    pub stride: usize,
    /// Rows and columns of zeros around the input.
    pub pad: usize,
}

/// What happens to an output value before it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    #[default]
    None,
    /// `max(x, slope * x)`, 0 <= slope <= 1 (0 is the ReLU).
    LeakyRelu(f32),
    /// `x / (1 + exp(-x))`.
    Silu,
}

impl Activation {
    /// The slope below 0 of the leaky ReLU that it is, if it is one; 1 for none.
    pub fn slope(self) -> Option<f32> {
        match self {
            Self::None => Some(1.0),
            Self::LeakyRelu(slope) => Some(slope),
            Self::Silu => None,
        }
    }

    /// The value of the activation at `x`.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            Self::LeakyRelu(slope) => x.max(slope * x),
            Self::Silu => x / (1.0 + (-x).exp()),
        }
    }
}

impl ConvShape {
    /// Output (height, width); (0, 0) when the kernel is larger than the padded input.
    pub fn output(&self) -> (usize, usize) {
        self.output_with(0)
    }

    /// As [`Self::output`] with `more` zeros below and to the right beside the padding.
    pub fn output_with(&self, more: usize) -> (usize, usize) {
        let side = |len: usize, k: usize| {
            (len + 2 * self.pad + more)
                .checked_sub(k)
                .map_or(0, |d| d / self.stride + 1)
        };
        (side(self.h, self.kh), side(self.w, self.kw))
    }

    fn input_len(&self) -> usize {
        product([self.n, self.h, self.w, self.ci])
    }

    fn output_len(&self) -> usize {
        let (oh, ow) = self.output();
        product([self.n, oh, ow, self.co])
    }

    fn weight_len(&self) -> usize {
        product([self.co, self.ci, self.kh, self.kw])
    }
}

/// The number of elements of a tensor. The kernels' pointers rely on it, so it must not wrap around.
///
/// # Panics
/// When it does not fit in a `usize`.
pub(super) fn product(sides: [usize; 4]) -> usize {
    let checked = sides.into_iter().try_fold(1usize, usize::checked_mul);
    checked.unwrap_or_else(|| panic!("a tensor of {sides:?} has no size"))
}

/// One register tile of the forward product; pointers are valid for what the counts say.
pub(super) struct Tile {
    /// First input value of the first pixel's window.
    pub x: *const f32,
    /// Floats from one kernel row's run to the next.
    pub row_stride: usize,
    /// Floats from one pixel's window to the next pixel's.
    pub px_step: usize,
    /// Kernel rows, each a run of `len` floats.
    pub rows: usize,
    pub len: usize,
    /// Packed weights: `rows * len` groups of one block of output channels.
    pub w: *const f32,
    /// One block of biases.
    pub bias: *const f32,
    pub y: *mut f32,
    /// Floats from one output pixel to the next.
    pub y_step: usize,
    /// Output channels stored from the block's last vector, 1 to the number of lanes.
    pub tail: usize,
    /// Slope of the leaky ReLU (1 for no activation).
    pub slope: f32,
}

/// One register tile of the weight gradient: `out[q][..] += sum over p of a[p * a_step + q] * b[p * b_step ..]`.
pub(super) struct GradTile {
    pub a: *const f32,
    pub a_step: usize,
    pub b: *const f32,
    pub b_step: usize,
    /// Pixels to sum over.
    pub pixels: usize,
    pub out: *mut f32,
    /// Floats from one row of `out` to the next.
    pub out_step: usize,
    /// Channels of `b` that may be read for the block's last vector.
    pub tail: usize,
}

pub(super) type TileFn = unsafe fn(&Tile);
pub(super) type GradFn = unsafe fn(&GradTile);

/// The kernels of one instruction set.
pub(super) struct Kernels {
    /// f32 values in a vector.
    pub lanes: usize,
    /// By (vectors in a block - 1): tiles from wide to narrow as (pixels, without SiLU, with SiLU).
    pub tiles: &'static [&'static [(usize, TileFn, TileFn)]],
    /// By (vectors in a block - 1): tiles from tall to low as (rows of `out`, kernel). The last has one row.
    pub grads: &'static [&'static [(usize, GradFn)]],
}

pub(super) fn kernels(isa: Isa) -> &'static Kernels {
    match isa.checked() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &super::conv_x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &super::conv_x86::AVX2,
        _ => &conv_portable::PORTABLE,
    }
}

/// Splits `vectors` into blocks of at most `most` vectors, as even as they come.
pub(super) fn blocks(vectors: usize, most: usize) -> Vec<usize> {
    let count = vectors.div_ceil(most);
    (0..count)
        .map(|i| vectors / count + usize::from(i < vectors % count))
        .collect()
}

/// Weights to pack: that of output channel `o`, input channel `i` and kernel position `k` is at
/// `o * output + i * input + k`, or with the kernel flipped where `k` counts from the end.
pub(super) struct Source<'a> {
    pub weights: &'a [f32],
    pub output: usize,
    pub input: usize,
    pub flip: bool,
}

impl Source<'_> {
    /// Writes the weights of some output channels to a block of `width`: by kernel position, input channel, output channel.
    fn fill(
        &self,
        outputs: std::ops::Range<usize>,
        [ci, taps]: [usize; 2],
        width: usize,
        block: &mut [f32],
    ) {
        // Input channels that one task takes: what it writes stays in the first-level cache.
        const INPUTS: usize = 16;
        assert_eq!(block.len(), ci * taps * width, "block of weights");
        assert!(outputs.len() <= width, "channels of a block");
        let block = SendPtr(block.as_mut_ptr());
        (0..ci).into_par_iter().step_by(INPUTS).for_each(|from| {
            let block = &block;
            for (lane, o) in outputs.clone().enumerate() {
                for i in from..(from + INPUTS).min(ci) {
                    let source = &self.weights[o * self.output + i * self.input..][..taps];
                    for (k, &weight) in source.iter().enumerate() {
                        let k = if self.flip { taps - 1 - k } else { k };
                        // SAFETY: inside the block, whose length is asserted above; each task has other `i`.
                        unsafe { *block.0.add((k * ci + i) * width + lane) = weight };
                    }
                }
            }
        });
    }
}

/// Weights and bias rearranged for the forward kernels of one instruction set.
#[derive(Clone, Debug)]
pub struct PackedConv {
    isa: Isa,
    co: usize,
    ci: usize,
    kh: usize,
    kw: usize,
    /// Vectors in each block of output channels.
    blocks: Vec<usize>,
    weights: Vec<f32>,
    bias: Vec<f32>,
}

impl PackedConv {
    /// Packs `weights`, laid out `[co, ci, kh, kw]`, and `bias`, `[co]` (zero if none).
    ///
    /// # Panics
    /// When a slice's length does not fit the shape.
    pub fn new(shape: &ConvShape, weights: &[f32], bias: Option<&[f32]>, isa: Isa) -> Self {
        assert_eq!(weights.len(), shape.weight_len(), "weights of {shape:?}");
        let (ci, taps) = (shape.ci, shape.kh * shape.kw);
        let from = Source {
            weights,
            output: ci * taps,
            input: taps,
            flip: false,
        };
        Self::pack(shape.co, ci, shape.kh, shape.kw, bias, isa, &from)
    }

    /// The packed weights of the data gradient: the roles of the channels exchanged, the kernel flipped.
    fn transposed(shape: &ConvShape, weights: &[f32], isa: Isa) -> Self {
        assert_eq!(weights.len(), shape.weight_len(), "weights of {shape:?}");
        let taps = shape.kh * shape.kw;
        let from = Source {
            weights,
            output: taps,
            input: shape.ci * taps,
            flip: true,
        };
        Self::pack(shape.ci, shape.co, shape.kh, shape.kw, None, isa, &from)
    }

    fn pack(
        co: usize,
        ci: usize,
        kh: usize,
        kw: usize,
        bias: Option<&[f32]>,
        isa: Isa,
        from: &Source,
    ) -> Self {
        let k = kernels(isa);
        let vectors = co.div_ceil(k.lanes);
        let blocks = blocks(vectors, k.tiles.len());
        let mut packed_bias = vec![0.0; vectors * k.lanes];
        if let Some(bias) = bias {
            assert_eq!(bias.len(), co, "bias of {co} channels");
            packed_bias[..co].copy_from_slice(bias);
        }
        let mut weights = super::zeros(vectors * k.lanes * kh * kw * ci);
        let (mut first, mut rest) = (0, &mut weights[..]);
        for &nv in &blocks {
            let width = nv * k.lanes;
            let (block, others) = rest.split_at_mut(width * kh * kw * ci);
            from.fill(first..(first + width).min(co), [ci, kh * kw], width, block);
            (first, rest) = (first + width, others);
        }
        Self {
            isa,
            co,
            ci,
            kh,
            kw,
            blocks,
            weights,
            bias: packed_bias,
        }
    }

    /// Convolves `x` `[n, h, w, ci]` into `y` `[n, oh, ow, co]`, spread over the current rayon pool.
    ///
    /// # Panics
    /// When a slice's length or the packed weights do not fit the shape.
    pub fn forward(&self, shape: &ConvShape, x: &[f32], activation: Activation, y: &mut [f32]) {
        self.forward_onto(shape, 0, x, None, activation, y);
    }

    /// As [`Self::forward`], with `more` zeros below and to the right beside the shape's padding, and `residual` added to
    /// the result.
    ///
    /// # Panics
    /// When a slice's length or the packed weights do not fit the shape.
    pub fn forward_onto(
        &self,
        shape: &ConvShape,
        more: usize,
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        y: &mut [f32],
    ) {
        let (oh, ow) = shape.output_with(more);
        self.check(shape, x);
        let len = product([shape.n, oh, ow, shape.co]);
        assert_eq!(y.len(), len, "output of {shape:?}");
        if let Some(residual) = residual {
            assert_eq!(residual.len(), len, "residual of {shape:?}");
        }
        let placed = Placed {
            shape,
            oh,
            ow,
            top: shape.pad,
            left: shape.pad,
            step: 1,
        };
        self.run(&placed, x, residual, activation, y);
    }

    fn check(&self, shape: &ConvShape, x: &[f32]) {
        assert_eq!(
            (self.co, self.ci, self.kh, self.kw),
            (shape.co, shape.ci, shape.kh, shape.kw),
            "packed weights of another shape than {shape:?}"
        );
        assert_eq!(x.len(), shape.input_len(), "input of {shape:?}");
    }

    fn run(
        &self,
        p: &Placed,
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        y: &mut [f32],
    ) {
        if p.oh == 0 || p.ow == 0 {
            return;
        }
        let row = p.ow * self.co;
        let band = p.band();
        y.par_chunks_mut(band * row)
            .enumerate()
            .for_each_init(Vec::new, |scratch, (i, out)| {
                self.band(p, x, activation, i * band, out, scratch);
                if let Some(residual) = residual {
                    add(out, &residual[i * band * row..]);
                }
            });
    }

    /// Computes the output rows from `first` (counted through the batch) into `out`, which begins with the first row's
    /// first pixel and may end with the last row's last.
    fn band(
        &self,
        p: &Placed,
        x: &[f32],
        activation: Activation,
        first: usize,
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let k = kernels(self.isa);
        let (mut weights, mut channel) = (0, 0);
        for &nv in &self.blocks {
            let width = nv * k.lanes;
            let block = Block {
                weights: &self.weights[weights..][..width * self.kh * self.kw * self.ci],
                bias: &self.bias[channel..channel + width],
                channel,
                width,
                tail: (self.co - channel).min(width) - (width - k.lanes),
                tiles: k.tiles[nv - 1],
                activation,
            };
            let row = p.step * p.step * p.ow * self.co;
            for (r, out) in out.chunks_mut(row).enumerate() {
                block.row(p, x, first + r, out, scratch);
            }
            weights += block.weights.len();
            channel += width;
        }
    }
}

/// The weights of a 3x3 convolution with padding 1 of a map upsampled twofold to the nearest pixel: four 2x2
/// convolutions of the map itself, one for each of the four pixels that one becomes, in 16 of 36 multiplications.
///
/// Of the three rows of the kernel, two fall on one row of the map: the last two for an upper pixel, the first two for a
/// lower one; so for columns.
#[derive(Clone, Debug)]
pub struct PackedUpConv {
    phases: [PackedConv; 4],
}

impl PackedUpConv {
    /// Packs `weights`, laid out `[co, ci, 3, 3]`, and `bias`, `[co]`.
    ///
    /// # Panics
    /// When a slice's length does not fit.
    pub fn new(ci: usize, co: usize, weights: &[f32], bias: &[f32], isa: Isa) -> Self {
        assert_eq!(weights.len(), product([co, ci, 3, 3]), "weights");
        let phase = |phase: usize| {
            let at = |side: usize, low: bool| match (side, low) {
                (0, false) => 0..1,
                (1, false) => 1..3,
                (0, true) => 0..2,
                _ => 2..3,
            };
            let mut sums = vec![0.0; co * ci * 4];
            let kernels = sums.chunks_exact_mut(4).zip(weights.chunks_exact(9));
            kernels.for_each(|(sums, kernel)| {
                for (k, sum) in sums.iter_mut().enumerate() {
                    let (ys, xs) = (at(k / 2, phase / 2 == 1), at(k % 2, phase % 2 == 1));
                    *sum = ys
                        .flat_map(|y| xs.clone().map(move |x| kernel[3 * y + x]))
                        .sum();
                }
            });
            let shape = Self::shape([1, 1, 1], ci, co);
            PackedConv::new(&shape, &sums, Some(bias), isa)
        };
        Self {
            phases: [0, 1, 2, 3].map(phase),
        }
    }

    fn shape([n, h, w]: [usize; 3], ci: usize, co: usize) -> ConvShape {
        ConvShape {
            n,
            h,
            w,
            ci,
            co,
            kh: 2,
            kw: 2,
            stride: 1,
            pad: 1,
        }
    }

    /// From `x` `[n, h, w, ci]` to `y` `[n, 2h, 2w, co]`, to which `residual` is added; spread over the current rayon
    /// pool.
    ///
    /// # Panics
    /// When a slice's length does not fit.
    pub fn forward(
        &self,
        [n, h, w]: [usize; 3],
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        y: &mut [f32],
    ) {
        let (ci, co) = (self.phases[0].ci, self.phases[0].co);
        let shape = Self::shape([n, h, w], ci, co);
        self.phases[0].check(&shape, x);
        assert_eq!(y.len(), product([n, 2 * h, 2 * w, co]), "output");
        if let Some(residual) = residual {
            assert_eq!(residual.len(), y.len(), "residual");
        }
        if y.is_empty() {
            return;
        }
        let place = |phase: usize| Placed {
            shape: &shape,
            oh: h,
            ow: w,
            top: 1 - phase / 2,
            left: 1 - phase % 2,
            step: 2,
        };
        let band = place(0).band();
        let rows = band * 4 * w * co;
        y.par_chunks_mut(rows)
            .enumerate()
            .for_each_init(Vec::new, |scratch, (i, out)| {
                for (phase, packed) in self.phases.iter().enumerate() {
                    let out = &mut out[(phase / 2 * 2 * w + phase % 2) * co..];
                    packed.band(&place(phase), x, activation, i * band, out, scratch);
                }
                if let Some(residual) = residual {
                    add(out, &residual[i * rows..]);
                }
            });
    }
}

/// A convolution whose output size and upper left padding are given, so that the data gradient fits too.
struct Placed<'a> {
    shape: &'a ConvShape,
    oh: usize,
    ow: usize,
    top: usize,
    left: usize,
    /// Distance of output pixels in the output map, across and down.
    step: usize,
}

impl Placed<'_> {
    /// Rows that one task takes: few enough tasks to be cheap, enough of them to even out the threads.
    fn band(&self) -> usize {
        (self.shape.n * self.oh / (rayon::current_num_threads() * 8)).clamp(1, 16)
    }
}

/// A block of output channels.
struct Block<'a> {
    weights: &'a [f32],
    bias: &'a [f32],
    /// First output channel.
    channel: usize,
    /// Channels in the block, padded to whole vectors.
    width: usize,
    tail: usize,
    tiles: &'static [(usize, TileFn, TileFn)],
    activation: Activation,
}

impl Block<'_> {
    /// Computes this block's channels of output row `r` (counted through the batch) into `out`.
    fn row(&self, p: &Placed, x: &[f32], r: usize, out: &mut [f32], scratch: &mut Vec<f32>) {
        let s = p.shape;
        let (image, oy) = (r / p.oh, r % p.oh);
        // Kernel rows inside the input.
        let y0 = (oy * s.stride) as isize - p.top as isize;
        let k0 = (-y0).clamp(0, s.kh as isize) as usize;
        let k1 = (s.h as isize - y0).clamp(k0 as isize, s.kh as isize) as usize;
        let (len, y_step) = (s.kw * s.ci, p.step * s.co);
        let first_row = image * s.h + (y0 + k0 as isize).max(0) as usize;
        let mut tile = Tile {
            x: x.as_ptr(),
            row_stride: s.w * s.ci,
            px_step: s.stride * s.ci,
            rows: k1 - k0,
            len,
            w: self.weights[k0 * len * self.width..].as_ptr(),
            bias: self.bias.as_ptr(),
            y: out.as_mut_ptr(),
            y_step,
            tail: self.tail,
            slope: self.activation.slope().unwrap_or(1.0),
        };
        let input = &x[(first_row * s.w * s.ci).min(x.len())..];
        let mut col = 0;
        while col < p.ow {
            let left = p.ow - col;
            // The widest tile that fits, or the narrowest that covers the rest.
            let &(px, plain, silu) = self
                .tiles
                .iter()
                .find(|t| t.0 <= left)
                .or(self.tiles.iter().rfind(|t| t.0 >= left))
                .expect("the tables are not empty");
            let kernel = if self.activation == Activation::Silu {
                silu
            } else {
                plain
            };
            let x0 = (col * s.stride) as isize - p.left as isize;
            let columns = (px - 1) * s.stride + s.kw;
            let inside = tile.rows > 0 && x0 >= 0 && x0 as usize + columns <= s.w;
            if inside {
                tile.x = input[x0 as usize * s.ci..].as_ptr();
                tile.row_stride = s.w * s.ci;
            } else {
                let patch = patch(s, input, tile.rows, x0, columns, scratch);
                tile.x = patch.as_ptr();
                tile.row_stride = columns * s.ci;
            }
            if px <= left {
                tile.y = out[col * y_step + self.channel..].as_mut_ptr();
                tile.y_step = y_step;
                // SAFETY: the input rows (or the patch) hold `rows` runs for `px` pixels, the packed weights
                // `rows * len` groups, the output `px` pixels of which the block's channels are written.
                unsafe { kernel(&tile) };
            } else {
                self.overhang(kernel, px, left, &mut tile, &mut out[col * y_step..], s.co);
            }
            col += px;
        }
    }

    /// Runs a tile of `px` pixels of which only `keep` exist.
    fn overhang(
        &self,
        kernel: TileFn,
        px: usize,
        keep: usize,
        tile: &mut Tile,
        out: &mut [f32],
        co: usize,
    ) {
        let y_step = tile.y_step;
        let mut buffer = vec![0.0f32; px * self.width];
        tile.y = buffer.as_mut_ptr();
        tile.y_step = self.width;
        // SAFETY: as in `row`; the buffer holds `px` pixels of the block.
        unsafe { kernel(tile) };
        let channels = (co - self.channel).min(self.width);
        for (to, from) in out
            .chunks_mut(y_step)
            .zip(buffer.chunks_exact(self.width))
            .take(keep)
        {
            to[self.channel..self.channel + channels].copy_from_slice(&from[..channels]);
        }
    }
}

fn add(y: &mut [f32], residual: &[f32]) {
    y.iter_mut().zip(residual).for_each(|(y, r)| *y += r);
}

/// Copies `columns` input columns from `x0` of `rows` rows, zeros where the input ends.
fn patch<'s>(
    s: &ConvShape,
    input: &[f32],
    rows: usize,
    x0: isize,
    columns: usize,
    scratch: &'s mut Vec<f32>,
) -> &'s [f32] {
    let row = columns * s.ci;
    scratch.clear();
    scratch.resize(rows * row, 0.0);
    let from = x0.clamp(0, s.w as isize) as usize;
    let to = (x0 + columns as isize).clamp(from as isize, s.w as isize) as usize;
    if to > from {
        let skip = (from as isize - x0) as usize * s.ci;
        for (r, line) in scratch.chunks_exact_mut(row).enumerate() {
            let source = &input[(r * s.w + from) * s.ci..(r * s.w + to) * s.ci];
            line[skip..skip + source.len()].copy_from_slice(source);
        }
    }
    scratch
}

/// Gradient with respect to the input: `gy` `[n, oh, ow, co]` and weights `[co, ci, kh, kw]` give `gx`
/// `[n, h, w, ci]`.
///
/// # Panics
/// When a slice's length does not fit the shape or the padding is as large as the kernel.
pub fn grad_input(shape: &ConvShape, gy: &[f32], weights: &[f32], isa: Isa, gx: &mut [f32]) {
    assert!(shape.pad < shape.kh.min(shape.kw), "padding of {shape:?}");
    assert_eq!(gy.len(), shape.output_len(), "output gradient of {shape:?}");
    assert_eq!(gx.len(), shape.input_len(), "input gradient of {shape:?}");
    let (oh, ow) = shape.output();
    let spread;
    let (gy, h, w) = if shape.stride == 1 {
        (gy, oh, ow)
    } else {
        spread = insert_zeros(shape, gy);
        let side = |o: usize| (o.max(1) - 1) * shape.stride + 1;
        (&spread[..], side(oh), side(ow))
    };
    let back = ConvShape {
        h,
        w,
        ci: shape.co,
        co: shape.ci,
        stride: 1,
        pad: 0,
        ..*shape
    };
    let placed = Placed {
        shape: &back,
        oh: shape.h,
        ow: shape.w,
        top: shape.kh - 1 - shape.pad,
        left: shape.kw - 1 - shape.pad,
        step: 1,
    };
    PackedConv::transposed(shape, weights, isa).run(&placed, gy, None, Activation::None, gx);
}

/// `gy` with `stride - 1` zeros between neighbours, so that a strided convolution's data gradient is a plain one.
fn insert_zeros(shape: &ConvShape, gy: &[f32]) -> Vec<f32> {
    let (oh, ow) = shape.output();
    let side = |o: usize| (o.max(1) - 1) * shape.stride + 1;
    let (h, w, c) = (side(oh), side(ow), shape.co);
    let mut out = vec![0.0; shape.n * h * w * c];
    // Rows of which one in `stride` has values; the last of an image has no rows of zeros behind it.
    let rows = out.par_chunks_mut((w * c).max(1)).enumerate();
    rows.for_each(|(row, out)| {
        let (n, y) = (row / h, row % h);
        if y.is_multiple_of(shape.stride) {
            let from = &gy[(n * oh + y / shape.stride) * ow * c..][..ow * c];
            let cells = out.chunks_mut(shape.stride * c);
            for (cell, pixel) in cells.zip(from.chunks_exact(c)) {
                cell[..c].copy_from_slice(pixel);
            }
        }
    });
    out
}

/// Gradient with respect to the weights: `x` `[n, h, w, ci]` and `gy` `[n, oh, ow, co]` give `gw`
/// `[co, ci, kh, kw]`.
///
/// # Panics
/// When a slice's length does not fit the shape.
pub fn grad_weight(shape: &ConvShape, x: &[f32], gy: &[f32], isa: Isa, gw: &mut [f32]) {
    assert_eq!(x.len(), shape.input_len(), "input of {shape:?}");
    assert_eq!(gy.len(), shape.output_len(), "output gradient of {shape:?}");
    assert_eq!(gw.len(), shape.weight_len(), "weight gradient of {shape:?}");
    let lanes = kernels(isa).lanes;
    // The channels that fill vectors better take the vector's side.
    let fill = |c: usize| c as f64 / c.next_multiple_of(lanes) as f64;
    let swapped = fill(shape.ci) > fill(shape.co);
    let (rows, cols) = if swapped {
        (shape.co, shape.ci)
    } else {
        (shape.ci, shape.co)
    };
    let padded = cols.next_multiple_of(lanes);
    let mut sums = vec![0.0f32; shape.kh * shape.kw * rows * padded];
    WeightGrad {
        shape,
        isa,
        swapped,
        rows,
        cols,
    }
    .run(x, gy, &mut sums);
    for (k, sums) in sums.chunks_exact(rows * padded).enumerate() {
        for (r, line) in sums.chunks_exact(padded).enumerate() {
            for (c, &sum) in line[..cols].iter().enumerate() {
                let (o, i) = if swapped { (r, c) } else { (c, r) };
                gw[(o * shape.ci + i) * shape.kh * shape.kw + k] = sum;
            }
        }
    }
}

/// The weight gradient as a product of a matrix of `rows` channels with one of `cols`, summed over pixels.
struct WeightGrad<'a> {
    shape: &'a ConvShape,
    isa: Isa,
    /// Whether rows are output channels (and columns input channels).
    swapped: bool,
    rows: usize,
    cols: usize,
}

/// One tile of the weight gradient: a kernel position, some rows, a block of columns.
#[derive(Clone, Copy)]
struct GradPlace {
    ky: usize,
    kx: usize,
    row: usize,
    col: usize,
    tail: usize,
    kernel: GradFn,
    out: usize,
}

impl WeightGrad<'_> {
    fn run(&self, x: &[f32], gy: &[f32], sums: &mut [f32]) {
        let (oh, _) = self.shape.output();
        let tiles = self.tiles();
        let out = SendPtr(sums.as_mut_ptr());
        // Every thread takes some tiles through all bands; a band of rows stays in the second-level cache while
        // the tiles pass over it.
        let share = tiles.len().div_ceil(rayon::current_num_threads()).max(1);
        let row_bytes = 4 * (self.shape.w * self.shape.ci + self.shape.w * self.shape.co);
        let band = (384 * 1024 / row_bytes.max(1)).max(1);
        tiles.par_chunks(share).for_each(|tiles| {
            let out = &out;
            for n in 0..self.shape.n {
                for first in (0..oh).step_by(band) {
                    for tile in tiles {
                        for oy in first..(first + band).min(oh) {
                            self.tile_row(tile, n, oy, x, gy, out);
                        }
                    }
                }
            }
        });
    }

    /// All tiles; they write disjoint parts of the sums.
    fn tiles(&self) -> Vec<GradPlace> {
        let k = kernels(self.isa);
        let padded = self.cols.next_multiple_of(k.lanes);
        let mut tiles = Vec::new();
        for (ky, kx) in (0..self.shape.kh).flat_map(|y| (0..self.shape.kw).map(move |x| (y, x))) {
            let mut col = 0;
            for nv in blocks(padded / k.lanes, k.grads.len()) {
                let width = nv * k.lanes;
                let mut row = 0;
                while row < self.rows {
                    let &(height, kernel) = k.grads[nv - 1]
                        .iter()
                        .find(|t| t.0 <= self.rows - row)
                        .expect("the last kernel has one row");
                    tiles.push(GradPlace {
                        ky,
                        kx,
                        row,
                        col,
                        tail: (self.cols - col).min(width) - (width - k.lanes),
                        kernel,
                        out: ((ky * self.shape.kw + kx) * self.rows + row) * padded + col,
                    });
                    row += height;
                }
                col += width;
            }
        }
        tiles
    }

    /// Adds output row `oy` of image `n` to a tile.
    fn tile_row(&self, t: &GradPlace, n: usize, oy: usize, x: &[f32], gy: &[f32], out: &SendPtr) {
        let s = self.shape;
        let (oh, ow) = s.output();
        let Some(iy) = (oy * s.stride + t.ky)
            .checked_sub(s.pad)
            .filter(|&y| y < s.h)
        else {
            return;
        };
        // Output columns whose input column `ox * stride + kx - pad` exists.
        let lo = s.pad.saturating_sub(t.kx).div_ceil(s.stride);
        let hi = ow.min((s.w + s.pad).saturating_sub(t.kx).div_ceil(s.stride));
        if lo >= hi {
            return;
        }
        let xs = &x[((n * s.h + iy) * s.w + lo * s.stride + t.kx - s.pad) * s.ci..];
        let gs = &gy[((n * oh + oy) * ow + lo) * s.co..];
        let (a, a_step, b, b_step) = if self.swapped {
            (gs, s.co, xs, s.stride * s.ci)
        } else {
            (xs, s.stride * s.ci, gs, s.co)
        };
        let tile = GradTile {
            a: a[t.row..].as_ptr(),
            a_step,
            b: b[t.col..].as_ptr(),
            b_step,
            pixels: hi - lo,
            // SAFETY: the offset lies inside the sums.
            out: unsafe { out.0.add(t.out) },
            out_step: self.cols.next_multiple_of(kernels(self.isa).lanes),
            tail: t.tail,
        };
        // SAFETY: for each of the pixels the slices hold the tile's rows of `a` and its columns of `b` (the last
        // vector masked to `tail`); tiles write disjoint parts of the sums.
        unsafe { (t.kernel)(&tile) };
    }
}

/// Gradient with respect to the bias: `gy` `[.., co]` summed over all pixels: f32 within a band of 256 pixels,
/// f64 from band to band.
pub fn grad_bias(co: usize, gy: &[f32]) -> Vec<f32> {
    let band = |pixels: &[f32]| {
        let mut sums = vec![0.0f32; co];
        for pixel in pixels.chunks_exact(co) {
            for (sum, g) in sums.iter_mut().zip(pixel) {
                *sum += g;
            }
        }
        sums
    };
    let bands: Vec<Vec<f32>> = gy.par_chunks(co * 256).map(band).collect();
    let mut total = vec![0.0f64; co];
    for sums in &bands {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += f64::from(*sum);
        }
    }
    total.into_iter().map(|s| s as f32).collect()
}

/// The convolution as its formula says it, for tests: `x` `[n, h, w, ci]`, `weights` `[co, ci, kh, kw]`.
pub fn reference(
    s: &ConvShape,
    x: &[f32],
    weights: &[f32],
    bias: Option<&[f32]>,
    activation: Activation,
) -> Vec<f32> {
    let (oh, ow) = s.output();
    let mut y = Vec::with_capacity(s.output_len());
    for i in 0..s.n * oh * ow {
        let (n, oy, ox) = (i / (oh * ow), i / ow % oh, i % ow);
        for o in 0..s.co {
            let mut sum = bias.map_or(0.0, |b| f64::from(b[o]));
            for (ky, kx) in (0..s.kh).flat_map(|ky| (0..s.kw).map(move |kx| (ky, kx))) {
                let iy = (oy * s.stride + ky).wrapping_sub(s.pad);
                let ix = (ox * s.stride + kx).wrapping_sub(s.pad);
                if iy >= s.h || ix >= s.w {
                    continue;
                }
                for c in 0..s.ci {
                    let value = x[((n * s.h + iy) * s.w + ix) * s.ci + c];
                    let weight = weights[((o * s.ci + c) * s.kh + ky) * s.kw + kx];
                    sum += f64::from(value) * f64::from(weight);
                }
            }
            y.push(activation.apply(sum as f32));
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| f64::from(a) * f64::from(b))
            .sum()
    }

    fn norm(a: &[f32]) -> f64 {
        dot(a, a).sqrt()
    }

    prop_compose! {
        fn shapes()(
            n in 1usize..3, h in 1usize..12, w in 1usize..40, ci in 1usize..20, co in 1usize..70,
            kh in 1usize..6, kw in 1usize..6, stride in 1usize..3, pad in 0usize..3,
        ) -> ConvShape {
            let pad = pad.min(kh - 1).min(kw - 1);
            ConvShape { n, h: h.max(kh), w: w.max(kw), ci, co, kh, kw, stride, pad }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        #[test]
        fn every_kernel_agrees_with_the_formula(s in shapes(), seed: u32) {
            let (x, w) = (values(s.input_len(), seed), values(s.weight_len(), seed ^ 1));
            let bias = values(s.co, seed ^ 2);
            for activation in [Activation::None, Activation::LeakyRelu(0.1), Activation::Silu] {
                let expected = reference(&s, &x, &w, Some(&bias), activation);
                for &isa in Isa::available() {
                    let mut y = vec![f32::NAN; expected.len()];
                    PackedConv::new(&s, &w, Some(&bias), isa).forward(&s, &x, activation, &mut y);
                    for (i, (got, want)) in y.iter().zip(&expected).enumerate() {
                        prop_assert!(
                            (got - want).abs() <= 1e-4 * (1.0 + want.abs()),
                            "{isa:?} {activation:?} {s:?} at {i}: {got}, not {want}"
                        );
                    }
                }
            }
        }

        // The convolution is linear in input and weights, so its gradients are its adjoints:
        // <conv(x, w), g> = <x, grad_input(g, w)> = <w, grad_weight(x, g)> for any x, w, g.
        #[test]
        fn gradients_are_the_adjoints(s in shapes(), seed: u32) {
            let (x, w) = (values(s.input_len(), seed), values(s.weight_len(), seed ^ 1));
            let g = values(s.output_len(), seed ^ 2);
            let y = reference(&s, &x, &w, None, Activation::None);
            let product = dot(&y, &g);
            let tolerance = 1e-5 * norm(&y) * norm(&g) + 1e-5;
            for &isa in Isa::available() {
                let mut gx = vec![f32::NAN; x.len()];
                grad_input(&s, &g, &w, isa, &mut gx);
                prop_assert!((dot(&x, &gx) - product).abs() < tolerance, "{isa:?} input of {s:?}");
                let mut gw = vec![f32::NAN; w.len()];
                grad_weight(&s, &x, &g, isa, &mut gw);
                prop_assert!((dot(&w, &gw) - product).abs() < tolerance, "{isa:?} weights of {s:?}");
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let s = ConvShape {
            n: 2,
            h: 37,
            w: 53,
            ci: 5,
            co: 19,
            kh: 3,
            kw: 3,
            stride: 1,
            pad: 1,
        };
        let (x, w) = (values(s.input_len(), 1), values(s.weight_len(), 2));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut y = vec![0.0; s.output_len()];
                PackedConv::new(&s, &w, None, Isa::best()).forward(
                    &s,
                    &x,
                    Activation::Silu,
                    &mut y,
                );
                let (mut gx, mut gw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
                grad_input(&s, &y, &w, Isa::best(), &mut gx);
                grad_weight(&s, &x, &y, Isa::best(), &mut gw);
                [y, gx, gw]
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }

    #[test]
    fn the_bias_gradient_is_the_sum_over_pixels() {
        let g = values(3 * 1000, 7);
        let sums = grad_bias(3, &g);
        for (c, sum) in sums.iter().enumerate() {
            let want: f64 = g.iter().skip(c).step_by(3).map(|&v| f64::from(v)).sum();
            assert!((f64::from(*sum) - want).abs() < 1e-3, "{sum}, not {want}");
        }
    }
}
