//! A layer: quantised weights, and bands of rows through them.

#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    coding::Coding,
    narrow,
    sizes::{GROUP, MAX_VECTORS, PADDED, READ},
    sums::{Output, Packed, Rows, run},
    variant::Variant,
};
use crate::kernels::{
    conv::blocks,
    memory::AlignedCopy,
    winograd::{MAX_TILES, TILE},
};

/// Codings at the input and output of a layer.
pub struct Ends<'a> {
    /// Coding of the input channels.
    pub input: &'a Coding,
    /// Coding of the output channels; without it the output is floats.
    pub output: Option<&'a Coding>,
    /// Coding of the channels that are added to the output after the activation.
    pub skip: Option<&'a Coding>,
    /// The layer is the first of a network.
    pub first: bool,
}

/// A convolution ready for bands.
#[derive(Clone, Debug)]
pub struct Int8 {
    packed: Packed,
    kernel: BandKernel,
    /// The output is codes, not floats.
    codes: bool,
}

/// Rows of a band of codes `T`: slices that begin at its first tile.
pub struct IntBand<'a, T> {
    /// Input rows from one above the band to one below, from one column left of it:
    /// `TILE * tiles + 2` pixels of the layer's `input_step` codes.
    pub input: [&'a [T]; READ],
    /// Rows that are added to the output, pixels of the layer's `output_step` codes.
    pub skip: Option<[&'a [T]; TILE]>,
    pub output: IntOutput<'a, T>,
    /// Tiles in the band.
    pub tiles: usize,
}

/// Output of the `TILE * tiles` columns of a band.
pub enum IntOutput<'a, T> {
    /// Codes, the layer's `output_step` in a pixel.
    Codes([&'a mut [T]; TILE]),
    /// Floats, as many in a pixel as the layer has output channels.
    Values([&'a mut [f32]; TILE]),
}

impl Int8 {
    /// Creates a layer of `weights` `[co, ci, 3, 3]`, `bias` `[co]` and the leaky ReLU
    /// `max(x, slope * x)`; a slope of 1 is no activation.
    ///
    /// # Panics
    /// If a length does not fit the channels.
    pub fn new(
        [co, ci]: [usize; 2],
        weights: &[f32],
        bias: &[f32],
        slope: f32,
        ends: Ends,
        variant: Variant,
    ) -> Self {
        assert_eq!(weights.len(), co * ci * 9, "weights {ci} to {co}");
        assert_eq!((bias.len(), ends.input.low.len()), (co, ci), "channels");
        let padded = co.next_multiple_of(PADDED);
        let mut packed = Packed {
            co,
            input_step: ci.next_multiple_of(if ends.first { GROUP } else { PADDED }),
            groups: ci.div_ceil(GROUP),
            blocks: blocks(padded / variant.lanes(), MAX_VECTORS),
            weights: AlignedCopy::new(&[]),
            start: vec![0; padded],
            factor: vec![0.0; padded],
            bias: vec![0.0; padded],
            skip: vec![0.0; padded],
            offset: vec![0.0; padded],
            slope,
        };
        let mut codes = Vec::with_capacity(weights.len());
        for (o, kernels) in weights.chunks_exact(ci * 9).enumerate() {
            let (factor, sum) = quantize(kernels, ends.input, &mut codes);
            if variant.moves_codes() {
                let codes = codes[o * ci * 9..].iter();
                packed.start[o] = 128 * codes.map(|&code| i32::from(code)).sum::<i32>();
            }
            let (step, low) = match ends.output {
                Some(to) => (f64::from(to.step[o]), f64::from(to.low[o])),
                None => (1.0, 0.0),
            };
            packed.factor[o] = (factor / step) as f32;
            packed.bias[o] = ((f64::from(bias[o]) + sum) / step) as f32;
            let mut offset = -low;
            if let Some(skip) = ends.skip {
                packed.skip[o] = (f64::from(skip.step[o]) / step) as f32;
                offset += f64::from(skip.low[o]);
            }
            packed.offset[o] = (offset / step) as f32;
        }
        let is_narrow =
            variant.is_fast() && ends.output.is_none() && narrow::suits(co, packed.input_step);
        let weights = if is_narrow {
            narrow::pack(&mut packed, &codes, ci, variant.lanes())
        } else {
            pack(&packed, &codes, ci, variant)
        };
        packed.weights = AlignedCopy::new(&weights);
        Self {
            packed,
            kernel: kernel(variant, is_narrow),
            codes: ends.output.is_some(),
        }
    }

    /// Bytes from one input pixel to the next.
    pub fn input_step(&self) -> usize {
        self.packed.input_step
    }

    /// Bytes of an output pixel with its padding.
    pub fn output_step(&self) -> usize {
        self.packed.output_step()
    }

    /// Convolves a band.
    ///
    /// # Panics
    /// If a row is too short, or the layer was made for the other kind of output.
    pub fn run(&self, band: IntBand<u8>) {
        let codes = matches!(band.output, IntOutput::Codes(_));
        assert!(codes == self.codes, "the other kind of output");
        assert!(band.tiles <= MAX_TILES, "{} tiles", band.tiles);
        let columns = TILE * band.tiles;
        let long = |rows: &[&[u8]], len: usize| rows.iter().all(|r| r.len() >= len);
        assert!(
            long(&band.input, (columns + 2) * self.input_step()),
            "input rows"
        );
        let codes = columns * self.output_step();
        if let Some(skip) = &band.skip {
            assert!(long(skip, codes), "rows to add");
        }
        let output = match band.output {
            IntOutput::Codes(rows) => {
                assert!(rows.iter().all(|r| r.len() >= codes), "output rows");
                Output::Codes(rows.map(<[u8]>::as_mut_ptr))
            }
            IntOutput::Values(rows) => {
                let len = columns * self.packed.co;
                assert!(rows.iter().all(|r| r.len() >= len), "output rows");
                Output::Values(rows.map(<[f32]>::as_mut_ptr))
            }
        };
        let rows = Rows {
            input: band.input.map(<[u8]>::as_ptr),
            skip: band.skip.map(|rows| rows.map(<[u8]>::as_ptr)),
            output,
            columns,
        };
        // SAFETY: the rows are as long as the columns need, as just checked; the layer was packed
        // for this kernel, whose variant proves the instruction set.
        unsafe { (self.kernel)(&self.packed, &rows) }
    }
}

/// Convolves a band, as [`run`].
type BandKernel = unsafe fn(&Packed, &Rows);

/// Returns the kernel of `variant`, if `is_narrow` that of [`narrow`].
fn kernel(variant: Variant, is_narrow: bool) -> BandKernel {
    match (variant, is_narrow) {
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Vnni(_), false) => x86::run_avx512_vnni,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512Vnni(_), true) => x86::run_avx512_vnni_narrow,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512VnniShort(_), false) => x86::run_avx512_vnni_short,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx512VnniShort(_), true) => x86::run_avx512_vnni_short_narrow,
        #[cfg(target_arch = "x86_64")]
        (Variant::AvxVnni(_), false) => x86::run_avx_vnni,
        #[cfg(target_arch = "x86_64")]
        (Variant::AvxVnni(_), true) => x86::run_avx_vnni_narrow,
        #[cfg(target_arch = "x86_64")]
        (Variant::Avx2(_), _) => x86::run_avx2,
        #[cfg(target_arch = "aarch64")]
        (Variant::NeonI8mm(_), _) => neon::run_i8mm,
        #[cfg(target_arch = "aarch64")]
        (Variant::NeonDot(_), _) => neon::run_dot,
        #[cfg(target_arch = "aarch64")]
        (Variant::Neon(_), _) => neon::run_neon,
        _ => run::<[i32; 8], 4, 4, 0>,
    }
}

impl Int8 {
    /// Returns the output of a band by its formula, before codes are rounded: four rows of pixels
    /// of `co` values. `weights` and `input` are those of [`Self::new`]; `x` are six rows of
    /// `width` pixels of as many codes as there are input channels; `skip` are four rows of pixels
    /// of [`Self::output_step`] codes.
    pub fn reference(
        &self,
        weights: &[f32],
        input: &Coding,
        x: &[u8],
        width: usize,
        skip: Option<&[u8]>,
    ) -> Vec<f32> {
        let (p, columns) = (&self.packed, width - 2);
        let ci = weights.len() / (9 * p.co);
        let mut codes = Vec::new();
        for kernels in weights.chunks_exact(ci * 9) {
            quantize(kernels, input, &mut codes);
        }
        let mut out = Vec::new();
        for (y, x0) in (0..TILE).flat_map(|y| (0..columns).map(move |x| (y, x))) {
            for o in 0..p.co {
                let mut sum = 0;
                for (k, i) in (0..9).flat_map(|k| (0..ci).map(move |i| (k, i))) {
                    let pixel = (y + k / 3) * width + x0 + k % 3;
                    let weight = i32::from(codes[(o * ci + i) * 9 + k]);
                    sum += weight * i32::from(x[pixel * ci + i]);
                }
                let value = (sum as f32).mul_add(p.factor[o], p.bias[o]);
                let mut value = value.max(value * p.slope);
                if let Some(skip) = skip {
                    let code = skip[(y * columns + x0) * p.output_step() + o];
                    value = f32::from(code).mul_add(p.skip[o], value);
                }
                out.push(value + p.offset[o]);
            }
        }
        out
    }
}

/// Appends the codes of the weights `[ci, 3, 3]` of an output channel. Rounding errors are carried
/// on within a kernel, so that its sum, which flat areas see, is as exact as one weight. Returns
/// the factor of the sums and the constant that makes up for the lows of the inputs and for the
/// rounding errors at their means.
fn quantize(kernels: &[f32], input: &Coding, codes: &mut Vec<i8>) -> (f64, f64) {
    let folded = |(i, w): (usize, &f32)| f64::from(*w) * f64::from(input.step[i / 9]);
    let folded: Vec<f64> = kernels.iter().enumerate().map(folded).collect();
    let largest = folded.iter().fold(0.0f64, |m, w| m.max(w.abs()));
    let factor = if largest > 0.0 { largest / 127.0 } else { 1.0 };
    let (mut sum, mut carried) = (0.0, 0.0);
    for (i, (w, folded)) in kernels.iter().zip(folded).enumerate() {
        if i % 9 == 0 {
            carried = 0.0;
        }
        let exact = folded / factor;
        let code = (exact + carried).round().clamp(-127.0, 127.0);
        carried += exact - code;
        codes.push(code as i8);
        sum += f64::from(*w) * f64::from(input.low[i / 9]);
        sum += factor * (exact - code) * f64::from(input.mean[i / 9]);
    }
    (factor, sum)
}

/// Returns the codes `[co, ci, 3, 3]` of the weights in the order of the kernel.
fn pack(packed: &Packed, codes: &[i8], ci: usize, variant: Variant) -> Vec<u8> {
    let mut weights = Vec::new();
    let (lanes, wide) = (variant.lanes(), variant.multiplies_16_bits());
    let part = variant.channels();
    let mut first = 0;
    for width in packed.blocks.iter().map(|vectors| vectors * lanes) {
        let row =
            |y: usize| (0..packed.groups).flat_map(move |g| (0..3).map(move |x| (3 * y + x, g)));
        for (k, g) in (0..3).flat_map(row) {
            for vector in (first..first + width).step_by(lanes) {
                let inputs = (g * GROUP..(g + 1) * GROUP).step_by(part);
                let outputs = inputs.flat_map(|i| (0..lanes).map(move |o| (i, vector + o)));
                for (i, o) in outputs.flat_map(|(i, o)| (i..i + part).map(move |i| (i, o))) {
                    let inside = o < packed.co && i < ci;
                    let code = if inside {
                        codes[(o * ci + i) * 9 + k]
                    } else {
                        0
                    };
                    if wide {
                        weights.extend(i16::from(code).to_le_bytes());
                    } else {
                        weights.extend(code.to_le_bytes());
                    }
                }
            }
        }
        first += width;
    }
    weights
}
