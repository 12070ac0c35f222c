//! 3x3 convolution of bands of rows by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications.
//!
//! A tile of 4x4 outputs is `A^T [(G g G^T) . (B^T d B)] A` with the kernel g, the 6x6 inputs d and the matrices of
//! A. Lavin and S. Gray, "Fast algorithms for convolutional neural networks" (2015), section 4.2. Of the channels of a
//! pixel a vector each is transformed at once; the 36 products are matrices, tiles by input channels by output
//! channels. In f32 the result is within about 1e-5 of the direct sum, measured in the largest output.
//!
//! With [`Products::Bf16`] the transformed inputs and weights are rounded to bfloat16 before they are multiplied, two
//! channels at a time where the CPU has AVX-512 BF16; the transforms and the sums stay in f32. The transform magnifies
//! that rounding: the result is within about 2 % of the direct sum, measured in the largest output.
//!
//! Rows are NHWC with the channels padded to whole vectors. A band is four rows of outputs; which pixels share a tile
//! is up to the caller, and so are the last bits.

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512, Quad};
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::{
    Isa, SendPtr,
    conv::Source,
    lanes::{Lanes, Portable},
};

pub mod images;
mod weights;

/// Rows and columns of outputs in a tile.
pub const TILE: usize = 4;

/// Tiles in a band, at most: products of lengths stay far from overflowing.
pub(super) const MOST_TILES: usize = 1 << 24;

/// Rows and columns of inputs that a tile reads, and points of the transform a side.
const SIDE: usize = TILE + 2;
const POINTS: usize = SIDE * SIDE;

/// Channels that a short vector holds.
const FEW: usize = 4;

/// The kernel's transform G (6x3).
const G: [[f64; 3]; SIDE] = [
    [1.0 / 4.0, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// What the products are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    F32,
    /// The padding of the input's channels must be finite.
    Bf16,
}

/// Whether this CPU multiplies bfloat16.
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        Isa::best() == Isa::Avx512
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vl")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A convolution ready for bands: transformed weights, bias and leaky ReLU.
#[derive(Clone, Debug)]
pub struct Winograd {
    isa: Isa,
    products: Products,
    /// Two channels share a lane of the products.
    pairs: bool,
    ci: usize,
    co: usize,
    /// Vectors in each block of output channels.
    blocks: Vec<usize>,
    /// By block, point, input channel (or pair of them): the block's output channels.
    weights: Vec<f32>,
    bias: Vec<f32>,
    slope: f32,
}

/// The rows of a band: slices that begin at its first tile.
pub struct Band<'a> {
    /// The input rows from one above the band to one below, from one column left of it: `TILE * tiles + 2` pixels of
    /// [`Winograd::input_step`] floats.
    pub input: [&'a [f32]; SIDE],
    /// Rows that are added to the output after the activation: `TILE * tiles` pixels of [`Winograd::output_step`]
    /// floats.
    pub skip: Option<[&'a [f32]; TILE]>,
    /// `TILE * tiles` pixels.
    pub output: [&'a mut [f32]; TILE],
    /// Floats from one output pixel to the next: [`Winograd::output_step`], whose padding is then written too, or as
    /// few as the layer has output channels.
    pub out_step: usize,
    /// Tiles in the band.
    pub tiles: usize,
}

impl Winograd {
    /// Of `weights`, `[co, ci, 3, 3]`, `bias`, `[co]`, and the leaky ReLU `max(x, slope * x)`; 1 is none.
    ///
    /// # Panics
    /// When a slice's length does not fit the channels, or the CPU lacks `isa`.
    pub fn new(
        [co, ci]: [usize; 2],
        weights: &[f32],
        bias: &[f32],
        slope: f32,
        products: Products,
        isa: Isa,
    ) -> Self {
        assert_eq!(
            weights.len(),
            super::conv::product([co, ci, 3, 3]),
            "weights {ci} to {co}"
        );
        let from = Source {
            weights,
            output: ci * 9,
            input: 9,
            flip: false,
        };
        Self::pack([co, ci], &from, bias, slope, products, isa)
    }

    fn pack(
        [co, ci]: [usize; 2],
        from: &Source,
        bias: &[f32],
        slope: f32,
        products: Products,
        isa: Isa,
    ) -> Self {
        assert!(Isa::available().contains(&isa), "this CPU has no {isa:?}");
        assert_eq!(bias.len(), co, "bias of {co} channels");
        let lanes = lanes(isa);
        let blocks = super::conv::blocks(co.div_ceil(lanes), most_vectors(isa));
        let mut padded = bias.to_vec();
        padded.resize(co.next_multiple_of(lanes), 0.0);
        let mut packed = pack(co, ci, from, &blocks, isa);
        let pairs = products == Products::Bf16 && isa == Isa::best() && has_bf16();
        if products == Products::Bf16 {
            packed
                .iter_mut()
                .for_each(|w| *w = bf16::from_f32(*w).to_f32());
        }
        if pairs {
            packed = paired(&packed, ci, &blocks, lanes);
        }
        Self {
            isa,
            products,
            pairs,
            ci,
            co,
            weights: packed,
            blocks,
            bias: padded,
            slope,
        }
    }

    /// Floats from one input pixel to the next.
    pub fn input_step(&self) -> usize {
        pixel_step(self.ci, self.isa)
    }

    /// Floats of an output pixel with its padding.
    pub fn output_step(&self) -> usize {
        pixel_step(self.co, self.isa)
    }

    /// Floats of a point's products: the output channels padded to whole vectors.
    fn product_step(&self) -> usize {
        self.bias.len()
    }

    /// Whether products take the place of the transformed inputs that they are made of: what is read and written then
    /// fits in the first level cache better.
    fn in_place(&self) -> bool {
        self.blocks.len() == 1 && self.product_step() <= self.input_step()
    }

    /// Convolves a band. `scratch` is kept from call to call.
    ///
    /// # Panics
    /// When a row is too short or the step of the output is neither of the two.
    pub fn run(&self, band: Band, scratch: &mut Vec<f32>) {
        assert!(band.tiles <= MOST_TILES, "{} tiles", band.tiles);
        let columns = TILE * band.tiles;
        let (step, out_step) = (self.input_step(), band.out_step);
        assert!(
            out_step == self.output_step() || out_step == self.co,
            "{out_step} floats a pixel"
        );
        let long = |rows: &[&[f32]], len: usize| rows.iter().all(|r| r.len() >= len);
        assert!(long(&band.input, (columns + 2) * step), "input rows");
        if let Some(skip) = &band.skip {
            assert!(long(skip, columns * self.output_step()), "rows to add");
        }
        let row = columns * out_step;
        assert!(band.output.iter().all(|r| r.len() >= row), "output rows");
        let input = Input {
            rows: band.input.map(<[f32]>::as_ptr),
            step,
            tiles: band.tiles,
        };
        let output = Output {
            skip: band.skip.map(|rows| rows.map(<[f32]>::as_ptr)),
            rows: band.output.map(<[f32]>::as_mut_ptr),
            step: out_step,
            tiles: band.tiles,
        };
        // SAFETY: the rows are as long as the tiles need, as just checked.
        unsafe { self.run_all(&[input], &[output], scratch) }
    }

    /// Convolves as many tiles as there are of inputs and, which need not be cut in the same places, of outputs.
    ///
    /// # Safety
    /// The rows are as long as the tiles need: of inputs `TILE * tiles + 2` pixels, in which whole vectors of the channels
    /// are read, of outputs `TILE * tiles`.
    unsafe fn run_all(&self, inputs: &[Input<SIDE>], outputs: &[Output], scratch: &mut Vec<f32>) {
        let len = self.tiles_at_once() * POINTS * (self.input_step() + self.product_step());
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        // SAFETY: by the caller's promise; the scratch holds both transforms; the CPU has the instruction set, as
        // checked by `new`.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 if self.pairs => run_avx512_bf16(self, inputs, outputs, scratch),
                _ => match self.products {
                    Products::F32 => run_isa::<Floats>(self, inputs, outputs, scratch),
                    Products::Bf16 => run_isa::<Rounded>(self, inputs, outputs, scratch),
                },
            }
        }
    }

    /// Tiles that are transformed before they are multiplied: few for narrow layers, so that they stay in the first
    /// level cache; many for wide ones, so that the weights are read less often.
    fn tiles_at_once(&self) -> usize {
        if self.ci <= 32 { 8 } else { 24 }
    }
}

/// Rows of inputs of neighbouring tiles, each from its first pixel that is read.
#[derive(Clone, Copy)]
struct Input<const ROWS: usize> {
    rows: [*const f32; ROWS],
    /// Floats from one pixel to the next.
    step: usize,
    tiles: usize,
}

/// Rows of outputs of neighbouring tiles, and what is added to them.
#[derive(Clone, Copy)]
struct Output {
    rows: [*mut f32; TILE],
    skip: Option<[*const f32; TILE]>,
    /// Floats from one pixel to the next.
    step: usize,
    tiles: usize,
}

/// What has tiles.
trait Tiles {
    fn tiles(&self) -> usize;
}

impl<const ROWS: usize> Tiles for Input<ROWS> {
    fn tiles(&self) -> usize {
        self.tiles
    }
}

impl Tiles for Output {
    fn tiles(&self) -> usize {
        self.tiles
    }
}

/// A way through all tiles of a list.
#[derive(Clone, Copy)]
struct Walk<'a, T> {
    list: &'a [T],
    /// Tiles of the first that are behind.
    done: usize,
}

impl<'a, T: Tiles> Walk<'a, T> {
    fn new(list: &'a [T]) -> Self {
        Self { list, done: 0 }
    }

    /// The next tiles of one of the list, at most `most`; none at the end, or of none.
    #[inline(always)]
    fn next(&mut self, most: usize) -> Option<(&'a T, Range<usize>)> {
        while self.list.first()?.tiles() == self.done {
            (self.list, self.done) = (&self.list[1..], 0);
        }
        let first = &self.list[0];
        let tiles = self.done..first.tiles().min(self.done + most);
        self.done = tiles.end;
        (!tiles.is_empty()).then_some((first, tiles))
    }
}

/// The weights' transform `G g G^T`, ordered for the products.
fn pack(co: usize, ci: usize, from: &Source, blocks: &[usize], isa: Isa) -> Vec<f32> {
    let width = |vectors: &usize| vectors * lanes(isa);
    let mut packed = super::zeros(blocks.iter().map(width).sum::<usize>() * POINTS * ci);
    let (mut first, mut rest) = (0, &mut packed[..]);
    for width in blocks.iter().map(width) {
        let (block, others) = rest.split_at_mut(width * POINTS * ci);
        let block = SendPtr(block.as_mut_ptr());
        let outputs = first..(first + width).min(co);
        (0..ci).into_par_iter().with_min_len(8).for_each(|i| {
            let block = &block;
            let mut kernels = [[0.0; MOST_WIDTH]; 9];
            for (lane, o) in outputs.clone().enumerate() {
                let kernel = &from.weights[o * from.output + i * from.input..][..9];
                for (k, &weight) in kernel.iter().enumerate() {
                    let k = if from.flip { 8 - k } else { k };
                    kernels[k][lane] = f64::from(weight);
                }
            }
            let mut points = [[0.0; MOST_WIDTH]; POINTS];
            transform_kernels(isa, &kernels, &mut points);
            for (point, values) in points.iter().enumerate() {
                // SAFETY: inside the block; each `i` has other places.
                let to = unsafe { block.0.add((point * ci + i) * width) };
                for (lane, &value) in values[..width].iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { *to.add(lane) = value };
                }
            }
        });
        (first, rest) = (first + width, others);
    }
    packed
}

/// Output channels in a block, at most.
const MOST_WIDTH: usize = 64;

dispatch!(transform_kernels, transform_kernels_body, (kernels: &[[f64; MOST_WIDTH]; 9], points: &mut [[f32; MOST_WIDTH]; POINTS]));

/// `G g G^T` of some kernels side by side; in f64, rounded once.
#[inline(always)]
fn transform_kernels_body<const FMA: bool>(
    kernels: &[[f64; MOST_WIDTH]; 9],
    points: &mut [[f32; MOST_WIDTH]; POINTS],
) {
    for (x, gx) in G.iter().enumerate() {
        let mut half = [[0.0; MOST_WIDTH]; 3];
        for (half, row) in half.iter_mut().zip(kernels.as_chunks::<3>().0) {
            for (lane, half) in half.iter_mut().enumerate() {
                *half = gx[0] * row[0][lane] + gx[1] * row[1][lane] + gx[2] * row[2][lane];
            }
        }
        for (y, gy) in G.iter().enumerate() {
            for (lane, point) in points[y * SIDE + x].iter_mut().enumerate() {
                let sum = gy[0] * half[0][lane] + gy[1] * half[1][lane] + gy[2] * half[2][lane];
                *point = sum as f32;
            }
        }
    }
}

/// Packed weights with neighbouring input channels as two bfloat16 in one float's bits, the first in the lower half.
fn paired(packed: &[f32], ci: usize, blocks: &[usize], lanes: usize) -> Vec<f32> {
    let half = |w: f32| u32::from(bf16::from_f32(w).to_bits());
    let (mut paired, mut rest) = (Vec::new(), packed);
    for width in blocks.iter().map(|vectors| vectors * lanes) {
        let (block, after) = rest.split_at(POINTS * ci * width);
        for channels in block
            .chunks_exact(ci * width)
            .flat_map(|p| p.chunks(2 * width))
        {
            let (even, odd) = channels.split_at(width);
            let odd = odd.iter().copied().chain(std::iter::repeat(0.0));
            paired.extend(
                even.iter()
                    .zip(odd)
                    .map(|(&a, b)| f32::from_bits(half(a) | half(b) << 16)),
            );
        }
        rest = after;
    }
    paired
}

fn lanes(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Avx512::N,
        _ => Portable::<8>::N,
    }
}

/// Floats from one pixel to the next: the channels padded to whole vectors. Layers at the ends of a network have few.
fn pixel_step(channels: usize, isa: Isa) -> usize {
    if channels <= FEW {
        FEW
    } else {
        channels.next_multiple_of(lanes(isa))
    }
}

/// Vectors of output channels in a block, at most: with the tiles of `run` they fill the registers.
fn most_vectors(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => 4,
        _ => 2,
    }
}

/// # Safety
/// As [`run`]; the CPU has AVX-512 F, VL and BF16, and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bf16,fma")]
unsafe fn run_avx512_bf16(
    w: &Winograd,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Pairs, Avx512, Quad, 8, 8, 8, 6>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`run`]; the CPU has the instruction set of `w`.
unsafe fn run_isa<K: Kept>(
    w: &Winograd,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match w.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => run_avx512::<K>(w, inputs, outputs, scratch),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => run_avx2::<K>(w, inputs, outputs, scratch),
            _ => run::<K, Portable<8>, Portable<4>, 6, 3, 2, 1>(w, inputs, outputs, scratch),
        }
    }
}

/// # Safety
/// As [`run`]; the CPU has AVX-512 F and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,fma")]
unsafe fn run_avx512<K: Kept>(
    w: &Winograd,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<K, Avx512, Quad, 8, 8, 8, 6>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`run`]; the CPU has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn run_avx2<K: Kept>(
    w: &Winograd,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<K, Avx2, Quad, 8, 6, 4, 3>(w, inputs, outputs, scratch) }
}

/// How transformed inputs are kept and multiplied.
///
/// # Safety
/// As of [`Lanes`].
trait Kept {
    /// Input channels in a float's bits.
    const CHANNELS: usize;
    /// Stores the channels `channel` to `channel + L::N` of the point at `p`.
    unsafe fn keep<L: Lanes>(v: L, p: *mut f32, channel: usize);
    /// `sum + x * w`.
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L;
}

/// As they are, one by one.
struct Floats;

impl Kept for Floats {
    const CHANNELS: usize = 1;

    #[inline(always)]
    unsafe fn keep<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { v.store(p.add(channel)) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { x.mul_add(w, sum) }
    }
}

/// Rounded to bfloat16, one by one.
struct Rounded;

impl Kept for Rounded {
    const CHANNELS: usize = 1;

    #[inline(always)]
    unsafe fn keep<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { Floats::keep(v.round_bf16(), p, channel) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { Floats::dot(sum, x, w) }
    }
}

/// As bfloat16, in the lower half of the room that floats would take, two by two.
#[cfg(target_arch = "x86_64")]
struct Pairs;

#[cfg(target_arch = "x86_64")]
impl Kept for Pairs {
    const CHANNELS: usize = 2;

    #[inline(always)]
    unsafe fn keep<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { v.store_bf16(p.cast::<u16>().add(channel)) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { sum.dot_bf16(x, w) }
    }
}

/// The band, with products of `T1` to `T4` tiles by 1 to 4 vectors of output channels, and transforms of vectors `S` of
/// `FEW` lanes for as few channels.
///
/// # Safety
/// What `Winograd::run` checks holds; the instruction set of `K`, `L` and `S` is enabled.
#[inline(always)]
unsafe fn run<
    K: Kept,
    L: Lanes,
    S: Lanes,
    const T1: usize,
    const T2: usize,
    const T3: usize,
    const T4: usize,
>(
    w: &Winograd,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    let (step, most) = (w.input_step(), w.tiles_at_once());
    let transformed = scratch.as_mut_ptr();
    let (mut inputs, mut outputs) = (Walk::new(inputs), Walk::new(outputs));
    // SAFETY: by the caller's promise; a tile begins `TILE` pixels after its neighbour.
    unsafe {
        let (products, out_step) = match w.in_place() {
            true => (transformed, step),
            false => (transformed.add(most * POINTS * step), w.product_step()),
        };
        loop {
            let mut tiles = 0;
            while let Some((input, range)) = inputs.next(most - tiles) {
                let to = transformed.add(tiles * POINTS * step);
                tiles += range.len();
                match w.ci <= FEW {
                    true => input_transforms::<K, S>(w, input, range, to),
                    false => input_transforms::<K, L>(w, input, range, to),
                }
            }
            if tiles == 0 {
                return;
            }
            let from = (transformed.cast_const(), step, w.ci.div_ceil(K::CHANNELS));
            let (mut weights, mut channel) = (w.weights.as_ptr(), 0);
            for &vectors in &w.blocks {
                let to = (products.add(channel), out_step);
                match vectors {
                    1 => products_of::<K, L, T1, 1>(tiles, from, weights, to),
                    2 => products_of::<K, L, T2, 2>(tiles, from, weights, to),
                    3 => products_of::<K, L, T3, 3>(tiles, from, weights, to),
                    _ => products_of::<K, L, T4, 4>(tiles, from, weights, to),
                }
                weights = weights.add(POINTS * from.2 * vectors * L::N);
                channel += vectors * L::N;
            }
            let mut done = 0;
            while let Some((output, range)) = outputs.next(tiles - done) {
                for tile in range {
                    let products = products.add(done * POINTS * out_step).cast_const();
                    done += 1;
                    match w.co <= FEW {
                        true => output_transform::<S>(w, output, tile, (products, out_step)),
                        false => output_transform::<L>(w, output, tile, (products, out_step)),
                    }
                }
            }
        }
    }
}

/// `B^T d` in one direction.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn transform_inputs<L: Lanes>(d: [L; SIDE]) -> [L; SIDE] {
    // SAFETY: by the caller's promise.
    unsafe {
        let (two, four) = (L::splat(2.0), L::splat(4.0));
        let (even, odd) = (d[2].neg_mul_add(four, d[4]), d[1].neg_mul_add(four, d[3]));
        let (even2, odd2) = (d[4].sub(d[2]), d[3].sub(d[1]));
        [
            first_input(d[0], d[2], d[4]),
            even.add(odd),
            even.sub(odd),
            odd2.mul_add(two, even2),
            odd2.neg_mul_add(two, even2),
            first_input(d[1], d[3], d[5]),
        ]
    }
}

/// `4 a - 5 b + c`: the transform's first row of inputs 0, 2, 4, and its last of 1, 3, 5.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn first_input<L: Lanes>(a: L, b: L, c: L) -> L {
    // SAFETY: by the caller's promise.
    unsafe { a.mul_add(L::splat(4.0), b.neg_mul_add(L::splat(5.0), c)) }
}

/// `A^T m` in one direction.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn transform_products<L: Lanes>(m: [L; SIDE]) -> [L; TILE] {
    // SAFETY: by the caller's promise.
    unsafe {
        let (sum, difference) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum2, difference2) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(sum).add(sum2),
            difference2.mul_add(L::splat(2.0), difference),
            sum2.mul_add(L::splat(4.0), sum),
            difference2.mul_add(L::splat(8.0), difference).add(m[5]),
        ]
    }
}

/// Rows of the transform that are made together, because all six do not fit in the registers.
const PAIRS: [[usize; 2]; 3] = [[0, 5], [1, 2], [3, 4]];

/// Writes `B^T d B` of tiles `tiles`: for each tile and point the input channels.
///
/// # Safety
/// The tiles lie in the input, `out` holds `POINTS * step` floats for each, the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn input_transforms<K: Kept, L: Lanes>(
    w: &Winograd,
    input: &Input<SIDE>,
    tiles: Range<usize>,
    out: *mut f32,
) {
    let step = w.input_step();
    // SAFETY: by the caller's promise.
    unsafe {
        for channel in (0..step).step_by(L::N) {
            for (pair, rows) in PAIRS.iter().enumerate() {
                let out = rows.map(|row| out.add(row * SIDE * step));
                let steps = [POINTS * step, step];
                input_transform::<K, L>(input, tiles.clone(), pair, channel, out, steps);
            }
        }
    }
}

/// Writes two rows of `B^T d B` of tiles `tiles` for a vector of channels: the first to `out[0]`, the second to `out[1]`,
/// `steps[0]` floats from one tile to the next and `steps[1]` from one point to the next. A tile takes over the two
/// columns that it shares with the one before.
///
/// # Safety
/// The tiles lie in the input, `out` holds the points of each, the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn input_transform<K: Kept, L: Lanes>(
    input: &Input<SIDE>,
    tiles: Range<usize>,
    pair: usize,
    channel: usize,
    out: [*mut f32; 2],
    [tile_step, point_step]: [usize; 2],
) {
    let step = input.step;
    // SAFETY: by the caller's promise.
    unsafe {
        let mut at = tiles.start * TILE * step + channel;
        let zero = L::splat(0.0);
        let (mut a, mut b) = ([zero; SIDE], [zero; SIDE]);
        for x in TILE..SIDE {
            (a[x], b[x]) = vertical(&input.rows, pair, at + (x - TILE) * step);
        }
        let [mut to_a, mut to_b] = out;
        for _ in tiles {
            (a[0], a[1], b[0], b[1]) = (a[4], a[5], b[4], b[5]);
            for x in 2..SIDE {
                (a[x], b[x]) = vertical(&input.rows, pair, at + x * step);
            }
            let (ta, tb) = (transform_inputs(a), transform_inputs(b));
            for x in 0..SIDE {
                K::keep(ta[x], to_a.add(x * point_step), channel);
                K::keep(tb[x], to_b.add(x * point_step), channel);
            }
            (to_a, to_b) = (to_a.add(tile_step), to_b.add(tile_step));
            at += TILE * step;
        }
    }
}

/// Two rows of `B^T d` in the column that begins at float `at` of each row: the first and the last for `pair` 0, the
/// second and the third for 1, the others for 2.
///
/// # Safety
/// The column lies in the rows; the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn vertical<L: Lanes>(rows: &[*const f32; SIDE], pair: usize, at: usize) -> (L, L) {
    // SAFETY: by the caller's promise.
    unsafe {
        let d1 = L::load(rows[1].add(at));
        let d2 = L::load(rows[2].add(at));
        let d3 = L::load(rows[3].add(at));
        let d4 = L::load(rows[4].add(at));
        let (two, four) = (L::splat(2.0), L::splat(4.0));
        match pair {
            0 => (
                first_input(L::load(rows[0].add(at)), d2, d4),
                first_input(d1, d3, L::load(rows[5].add(at))),
            ),
            1 => {
                let (even, odd) = (d2.neg_mul_add(four, d4), d1.neg_mul_add(four, d3));
                (even.add(odd), even.sub(odd))
            }
            _ => {
                let (even, odd) = (d4.sub(d2), d3.sub(d1));
                (odd.mul_add(two, even), odd.neg_mul_add(two, even))
            }
        }
    }
}

/// Multiplies the transformed inputs of `tiles` tiles, `T` at a time, with a block's weights.
///
/// # Safety
/// Of the inputs (pointer, floats a point, input channels or pairs of them) and the results (pointer to the block's channels, floats a
/// point) there are `tiles` times `POINTS`, of the weights `POINTS` matrices; the instruction set of `L` is enabled.
#[inline(always)]
unsafe fn products_of<K: Kept, L: Lanes, const T: usize, const V: usize>(
    tiles: usize,
    (inputs, in_step, ci): (*const f32, usize, usize),
    weights: *const f32,
    (out, out_step): (*mut f32, usize),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        for point in 0..POINTS {
            let weights = weights.add(point * ci * V * L::N);
            let (inputs, out) = (inputs.add(point * in_step), out.add(point * out_step));
            let (in_tile, out_tile) = (POINTS * in_step, POINTS * out_step);
            let mut tile = 0;
            macro_rules! by {
                ($t:expr) => {
                    while tiles - tile >= $t {
                        let from = (inputs.add(tile * in_tile), in_tile, ci);
                        product::<K, L, { $t }, V>(
                            from,
                            weights,
                            (out.add(tile * out_tile), out_tile),
                        );
                        tile += $t;
                    }
                };
            }
            by!(T);
            by!(4);
            by!(2);
            by!(1);
        }
    }
}

/// `T` tiles by `V` vectors of output channels at one point.
///
/// # Safety
/// As [`products_of`], with the distances from tile to tile instead of from point to point.
#[inline(always)]
unsafe fn product<K: Kept, L: Lanes, const T: usize, const V: usize>(
    (inputs, in_tile, ci): (*const f32, usize, usize),
    weights: *const f32,
    (out, out_tile): (*mut f32, usize),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; T];
        for i in 0..ci {
            let mut w = [L::splat(0.0); V];
            for (v, w) in w.iter_mut().enumerate() {
                *w = L::load(weights.add((i * V + v) * L::N));
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*inputs.add(t * in_tile + i));
                for v in 0..V {
                    sums[v] = K::dot(sums[v], x, w[v]);
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(out.add(t * out_tile + v * L::N));
            }
        }
    }
}

/// Writes the outputs of tile `tile`: `A^T m A`, bias, activation, what is added after it.
///
/// # Safety
/// The tile lies in the output, of `products` (pointer, floats from one to the next) there are `POINTS`, the instruction
/// set of `L` is enabled.
#[inline(always)]
unsafe fn output_transform<L: Lanes>(
    w: &Winograd,
    output: &Output,
    tile: usize,
    (products, product_step): (*const f32, usize),
) {
    let (step, out_step) = (w.output_step(), output.step);
    // SAFETY: by the caller's promise.
    unsafe {
        let slope = L::splat(w.slope);
        for channel in (0..step).step_by(L::N) {
            let bias = L::load(w.bias.as_ptr().add(channel));
            let mut half = [[bias; TILE]; SIDE];
            for (y, half) in half.iter_mut().enumerate() {
                let mut m = [bias; SIDE];
                for (x, m) in m.iter_mut().enumerate() {
                    *m = L::load(products.add((y * SIDE + x) * product_step + channel));
                }
                *half = transform_products(m);
            }
            let stored = L::N.min(out_step - channel);
            for x in 0..TILE {
                let mut m = [bias; SIDE];
                for (m, half) in m.iter_mut().zip(&half) {
                    *m = half[x];
                }
                let column = tile * TILE + x;
                for (y, sum) in transform_products(m).into_iter().enumerate() {
                    let sum = sum.add(bias);
                    let mut value = sum.max(sum.mul(slope));
                    if let Some(skip) = &output.skip {
                        value = value.add(L::load(skip[y].add(column * step + channel)));
                    }
                    let out = output.rows[y].add(column * out_step + channel);
                    if stored == L::N {
                        value.store(out);
                    } else {
                        value.store_first(out, stored);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        Activation,
        cpu::conv::{ConvShape, reference},
    };
    use proptest::prelude::*;

    pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Rows of pixels of `c` channels as rows of pixels of `step` floats.
    fn padded(x: &[f32], width: usize, c: usize, step: usize, padding: f32) -> Vec<Vec<f32>> {
        let pixel = |p: &[f32]| {
            let mut pixel = p.to_vec();
            pixel.resize(step, padding);
            pixel
        };
        let row = |row: &[f32]| row.chunks_exact(c).flat_map(pixel).collect();
        x.chunks_exact(width * c).map(row).collect()
    }

    fn all<const N: usize>(rows: &[Vec<f32>]) -> [&[f32]; N] {
        std::array::from_fn(|y| &rows[y][..])
    }

    fn all_mut(rows: &mut [Vec<f32>]) -> [&mut [f32]; TILE] {
        let [a, b, c, d] = rows else {
            unreachable!("four rows")
        };
        [a, b, c, d].map(|r| &mut r[..])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_instruction_set_agrees_with_the_formula(
            ci in 1usize..70, co in 1usize..90, tiles in 0usize..30, add: bool, dense: bool,
            slope in prop::sample::select(vec![0.0f32, 0.1, 1.0]), bf16: bool, seed: u32,
        ) {
            let products = if bf16 { Products::Bf16 } else { Products::F32 };
            let (w, h) = (TILE * tiles + 2, SIDE);
            let s = ConvShape { n: 1, h, w, ci, co, kh: 3, kw: 3, stride: 1, pad: 0 };
            let x = values(h * w * ci, seed);
            let size = (1.0 / ci as f32).sqrt();
            let weights: Vec<_> = values(co * ci * 9, seed ^ 1).iter().map(|v| v * size).collect();
            let bias = values(co, seed ^ 2);
            let skip = values(TILE * TILE * tiles * co, seed ^ 3);
            let mut expected = reference(&s, &x, &weights, Some(&bias), Activation::LeakyRelu(slope));
            if add {
                expected.iter_mut().zip(&skip).for_each(|(y, s)| *y += s);
            }
            for &isa in Isa::available() {
                let conv = Winograd::new([co, ci], &weights, &bias, slope, products, isa);
                let padding = if bf16 { 1e3 } else { f32::NAN };
                let input = padded(&x, w, ci, conv.input_step(), padding);
                let skip = padded(&skip, TILE * tiles.max(1), co, conv.output_step(), f32::NAN);
                let out_step = if dense { co } else { conv.output_step() };
                let row = TILE * tiles * out_step;
                // One float more than the row has, to see that it is left alone.
                let mut output = vec![vec![f32::NAN; row + 1]; TILE];
                let band = Band {
                    input: all(&input),
                    skip: (add && tiles > 0).then(|| all(&skip)),
                    output: all_mut(&mut output),
                    out_step,
                    tiles,
                };
                conv.run(band, &mut Vec::new());
                let (mut error, mut size) = (0.0, 0.0);
                for (i, want) in expected.iter().enumerate() {
                    let (pixel, channel) = (i / co, i % co);
                    let (y, x) = (pixel / (TILE * tiles), pixel % (TILE * tiles));
                    let got = output[y][x * out_step + channel];
                    prop_assert!(
                        (got - want).abs() <= if bf16 { 0.6 } else { 1e-4 } * (1.0 + want.abs()),
                        "{isa:?} at {y},{x},{channel}: {got}, not {want}"
                    );
                    error += f64::from((got - want) * (got - want));
                    size += f64::from(want * want);
                }
                prop_assert!(error.sqrt() <= 0.05 * size.sqrt(), "{isa:?}: {error} of {size}");
                prop_assert!(output.iter().all(|r| r[row].is_nan()), "{isa:?} writes beyond its rows");
            }
        }
    }

    /// The transform multiplies an input in a corner that an output does not see with zeros only.
    #[test]
    fn a_column_beside_the_window_changes_no_bit() {
        let (w, h) = (TILE + 2, SIDE);
        let (weights, bias) = (values(54, 1), values(3, 2));
        let conv = Winograd::new([3, 2], &weights, &bias, 0.1, Products::F32, Isa::best());
        let run = |left: f32, right: f32| {
            let mut x = values(w * h * 2, 3);
            for row in x.chunks_exact_mut(w * 2) {
                row[..2].fill(left);
                row[w * 2 - 2..].fill(right);
            }
            let input = padded(&x, w, 2, conv.input_step(), f32::NAN);
            let mut output = vec![vec![0.0; 12]; TILE];
            let band = Band {
                input: all(&input),
                skip: None,
                output: all_mut(&mut output),
                out_step: 3,
                tiles: 1,
            };
            conv.run(band, &mut Vec::new());
            output.concat()
        };
        let (a, b) = (run(0.0, 0.0), run(1e3, -1e6));
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let inside = (1..=2).contains(&(i / 3 % TILE));
            assert_eq!(a == b, inside, "column {}", i / 3 % TILE);
        }
    }
}
