//! 3x3 convolution of bands of rows in 8-bit integers, summed in 32 bits.
//!
//! A channel's values are codes from 0 to 255 (see [`Coding`]); weights are integers from -127 to 127 with a factor for
//! each output channel, after the input channels' steps are multiplied into them. So the sum over the window is one of
//! integers, exact in any order, and everything else is folded into a factor and an offset for each output channel.
//! Those, the leaky ReLU and the rounding are done in f32 with fused multiply-adds on every instruction set, so that
//! all of them give the same bits.
//!
//! Rows are NHWC with the channels padded: to a multiple of four in the input of a network, to one of 16 elsewhere.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::{
    Isa,
    lanes::{Lanes, Portable},
    winograd::{MOST_TILES, TILE},
};

/// Input rows that a band reads.
const READ: usize = TILE + 2;

/// Input channels that are multiplied at once.
const GROUP: usize = 4;

/// Output channels are padded to a multiple of this.
const PADDED: usize = 16;

/// Vectors of output channels in a block, at most: few, so that a block's weights stay in the first level cache.
const MOST_VECTORS: usize = 2;

/// An instruction set that the kernel is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IntIsa {
    /// x86-64 with AVX-512 VNNI.
    Avx512Vnni,
    /// The same on vectors of half the size: what [`Self::AvxVnni`] does, with its instruction in another encoding, so that
    /// machines without it can test it.
    Avx512VnniShort,
    /// x86-64 with AVX-VNNI, on vectors of half the size.
    AvxVnni,
    /// x86-64 with AVX2 and FMA: multiplies 16-bit integers.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl IntIsa {
    /// The instruction sets that this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut isas = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx512 = has!("avx512f") && has!("avx512bw") && has!("fma");
            if avx512 && has!("avx512vnni") {
                isas.push(Self::Avx512Vnni);
                if has!("avx512vl") {
                    isas.push(Self::Avx512VnniShort);
                }
            }
            if has!("avx2") && has!("fma") {
                if has!("avxvnni") {
                    isas.push(Self::AvxVnni);
                }
                isas.push(Self::Avx2);
            }
        }
        isas.push(Self::Portable);
        isas
    }

    /// The best instruction set that this CPU has.
    pub fn best() -> Self {
        let found = Self::available().into_iter().next();
        found.unwrap_or(Self::Portable)
    }

    /// Whether integers are multiplied so much faster here than floats that it pays.
    pub fn is_fast(self) -> bool {
        matches!(
            self,
            Self::Avx512Vnni | Self::Avx512VnniShort | Self::AvxVnni
        )
    }
}

/// What the codes of some channels mean: `value = low + step * code` for codes 0 to 255.
#[derive(Clone, Debug, PartialEq)]
pub struct Coding {
    low: Vec<f32>,
    step: Vec<f32>,
    /// The mean of the codes that are expected.
    mean: Vec<f32>,
    /// Of some pixels with their padding, as many as fill vectors: what a value is multiplied with, and what is added
    /// to it then.
    pattern: [Vec<f32>; 2],
}

impl Coding {
    /// For channels with values from `low` to `high` and of the mean `mean`: `[low, high, mean]` each. What is beyond
    /// the range is clamped.
    pub fn new(ranges: &[[f32; 3]]) -> Self {
        let widest = ranges.iter().map(|r| r[1] - r[0]).fold(0.0, f32::max);
        // A channel that does not change must not make a step of nothing.
        let least = (widest * 1e-3).max(1e-6);
        let step = |r: &[f32; 3]| (r[1] - r[0]).max(least) / 255.0;
        let mean = |r: &[f32; 3]| ((r[2] - r[0]) / step(r)).clamp(0.0, 255.0);
        let pixel = ranges.len().next_multiple_of(GROUP);
        let pixels = (PADDED / pixel).max(1);
        let pattern = |f: &dyn Fn(&[f32; 3]) -> f32| -> Vec<f32> {
            let of = |i: usize| ranges.get(i % pixel).map_or(0.0, f);
            (0..pixels * pixel).map(of).collect()
        };
        Self {
            pattern: [pattern(&|r| 1.0 / step(r)), pattern(&|r| -r[0] / step(r))],
            low: ranges.iter().map(|r| r[0]).collect(),
            step: ranges.iter().map(step).collect(),
            mean: ranges.iter().map(mean).collect(),
        }
    }

    /// Codes `values`, pixels of as many floats as there are channels, padded to whole groups; so are the codes.
    ///
    /// # Panics
    /// When they differ in length.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) {
        assert_eq!(values.len(), codes.len(), "a code for each value");
        let [scale, offset] = &self.pattern;
        encode_on(Isa::best(), scale, offset, values, codes);
    }
}

dispatch!(encode_on, encode_body, (scale: &[f32], offset: &[f32], values: &[f32], codes: &mut [u8]));

/// `scale` and `offset` repeat along the values.
#[inline(always)]
fn encode_body<const FMA: bool>(scale: &[f32], offset: &[f32], values: &[f32], codes: &mut [u8]) {
    /// Adding this rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let rows = values
        .chunks(scale.len())
        .zip(codes.chunks_mut(scale.len()));
    for (values, codes) in rows {
        let constants = scale.iter().zip(offset);
        for ((v, code), (s, o)) in values.iter().zip(codes).zip(constants) {
            let z = (v * s + o).clamp(0.0, 255.0);
            *code = (z + ROUND).to_bits() as u8;
        }
    }
}

/// What a layer does to its sums, apart from its weights.
pub struct Ends<'a> {
    /// Of the input channels.
    pub input: &'a Coding,
    /// Of the output channels; without it the output is floats.
    pub output: Option<&'a Coding>,
    /// Of the channels that are added to the output after the activation.
    pub skip: Option<&'a Coding>,
    /// The layer is the first of a network.
    pub first: bool,
}

/// A convolution ready for bands.
#[derive(Clone, Debug)]
pub struct Int8 {
    isa: IntIsa,
    co: usize,
    input_step: usize,
    /// Groups of input channels.
    groups: usize,
    /// Vectors in each block of output channels.
    blocks: Vec<usize>,
    /// By block, kernel position, group: for each output channel of the block the weights of a group's channels, as
    /// i8 or, where the kernel multiplies 16-bit integers, as i16.
    weights: Vec<u8>,
    /// Of each output channel, padded: what a sum is multiplied with, what is added to it then, what an added code is
    /// multiplied with, and what is added last.
    factor: Vec<f32>,
    bias: Vec<f32>,
    skip: Vec<f32>,
    offset: Vec<f32>,
    slope: f32,
    /// Whether the output is codes.
    codes: bool,
}

/// The rows of a band: slices that begin at its first tile.
pub struct IntBand<'a> {
    /// The input rows from one above the band to one below, from one column left of it: `TILE * tiles + 2` pixels.
    pub input: [&'a [u8]; READ],
    /// Rows that are added to the output, pixels of [`Int8::output_step`] bytes.
    pub skip: Option<[&'a [u8]; TILE]>,
    pub output: IntOutput<'a>,
    /// Tiles in the band.
    pub tiles: usize,
}

/// Where a band's `TILE * tiles` columns go.
pub enum IntOutput<'a> {
    /// Codes, [`Int8::output_step`] bytes a pixel.
    Codes([&'a mut [u8]; TILE]),
    /// Floats, as many a pixel as the layer has output channels.
    Values([&'a mut [f32]; TILE]),
}

impl Int8 {
    /// Of `weights`, `[co, ci, 3, 3]`, `bias`, `[co]`, and the leaky ReLU `max(x, slope * x)`; 1 is none.
    ///
    /// # Panics
    /// When a length does not fit the channels, or the CPU lacks `isa`.
    pub fn new(
        [co, ci]: [usize; 2],
        weights: &[f32],
        bias: &[f32],
        slope: f32,
        ends: Ends,
        isa: IntIsa,
    ) -> Self {
        assert!(
            IntIsa::available().contains(&isa),
            "this CPU has no {isa:?}"
        );
        assert_eq!(weights.len(), co * ci * 9, "weights {ci} to {co}");
        assert_eq!((bias.len(), ends.input.low.len()), (co, ci), "channels");
        let padded = co.next_multiple_of(PADDED);
        let mut layer = Self {
            isa,
            co,
            input_step: ci.next_multiple_of(if ends.first { GROUP } else { PADDED }),
            groups: ci.div_ceil(GROUP),
            blocks: super::conv::blocks(padded / lanes(isa), MOST_VECTORS),
            weights: Vec::new(),
            factor: vec![0.0; padded],
            bias: vec![0.0; padded],
            skip: vec![0.0; padded],
            offset: vec![0.0; padded],
            slope,
            codes: ends.output.is_some(),
        };
        let mut codes = Vec::with_capacity(weights.len());
        for (o, kernels) in weights.chunks_exact(ci * 9).enumerate() {
            let (factor, sum) = quantize(kernels, ends.input, &mut codes);
            let (step, low) = match ends.output {
                Some(to) => (f64::from(to.step[o]), f64::from(to.low[o])),
                None => (1.0, 0.0),
            };
            layer.factor[o] = (factor / step) as f32;
            layer.bias[o] = ((f64::from(bias[o]) + sum) / step) as f32;
            let mut offset = -low;
            if let Some(skip) = ends.skip {
                layer.skip[o] = (f64::from(skip.step[o]) / step) as f32;
                offset += f64::from(skip.low[o]);
            }
            layer.offset[o] = (offset / step) as f32;
        }
        layer.pack(&codes, ci);
        layer
    }

    /// Bytes from one input pixel to the next.
    pub fn input_step(&self) -> usize {
        self.input_step
    }

    /// Bytes of an output pixel with its padding.
    pub fn output_step(&self) -> usize {
        self.factor.len()
    }

    /// Orders the weights' codes `[co, ci, 3, 3]` for the kernel.
    fn pack(&mut self, codes: &[i8], ci: usize) {
        let (lanes, wide) = (lanes(self.isa), multiplies_16_bits(self.isa));
        // 16-bit integers are multiplied two channels at a time.
        let part = if wide { GROUP / 2 } else { GROUP };
        let mut first = 0;
        for width in self.blocks.iter().map(|vectors| vectors * lanes) {
            for (k, g) in (0..9).flat_map(|k| (0..self.groups).map(move |g| (k, g))) {
                for vector in (first..first + width).step_by(lanes) {
                    let inputs = (g * GROUP..(g + 1) * GROUP).step_by(part);
                    let outputs = inputs.flat_map(|i| (0..lanes).map(move |o| (i, vector + o)));
                    for (i, o) in outputs.flat_map(|(i, o)| (i..i + part).map(move |i| (i, o))) {
                        let inside = o < self.co && i < ci;
                        let code = if inside {
                            codes[(o * ci + i) * 9 + k]
                        } else {
                            0
                        };
                        match wide {
                            true => self.weights.extend(i16::from(code).to_le_bytes()),
                            false => self.weights.extend(code.to_le_bytes()),
                        }
                    }
                }
            }
            first += width;
        }
    }

    /// Convolves a band.
    ///
    /// # Panics
    /// When a row is too short, or the layer was made for the other kind of output.
    pub fn run(&self, band: IntBand) {
        let codes = matches!(band.output, IntOutput::Codes(_));
        assert!(codes == self.codes, "the other kind of output");
        assert!(band.tiles <= MOST_TILES, "{} tiles", band.tiles);
        let columns = TILE * band.tiles;
        let long = |rows: &[&[u8]], len: usize| rows.iter().all(|r| r.len() >= len);
        assert!(
            long(&band.input, (columns + 2) * self.input_step),
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
                let len = columns * self.co;
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
        // SAFETY: the rows are as long as the columns need, as just checked; the CPU has the instruction set, as
        // checked by `new`.
        unsafe {
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                IntIsa::Avx512Vnni => x86::run_avx512_vnni(self, &rows),
                #[cfg(target_arch = "x86_64")]
                IntIsa::Avx512VnniShort => x86::run_avx512_vnni_short(self, &rows),
                #[cfg(target_arch = "x86_64")]
                IntIsa::AvxVnni => x86::run_avx_vnni(self, &rows),
                #[cfg(target_arch = "x86_64")]
                IntIsa::Avx2 => x86::run_avx2(self, &rows),
                _ => run::<[i32; 8], 4, 4, 0>(self, &rows),
            }
        }
    }
}

/// Appends the codes of an output channel's weights, `[ci, 3, 3]`, whose rounding errors are carried on within a kernel,
/// so that its sum, which flat areas see, is as exact as one weight; what their sums are multiplied with, and what is
/// added to make up for the inputs' lows and, so that the rounding does not shift the mean, for its error at the
/// inputs' means.
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

fn lanes(isa: IntIsa) -> usize {
    match isa {
        IntIsa::Avx512Vnni => 16,
        _ => 8,
    }
}

fn multiplies_16_bits(isa: IntIsa) -> bool {
    isa == IntIsa::Avx2
}

/// An [`IntBand`] as pointers.
struct Rows {
    input: [*const u8; READ],
    skip: Option<[*const u8; TILE]>,
    output: Output,
    columns: usize,
}

enum Output {
    Codes([*mut u8; TILE]),
    Values([*mut f32; TILE]),
}

/// A vector of sums.
///
/// # Safety
/// Of every method: the CPU has the instruction set. Of those with a pointer: what is read or written lies in the
/// allocation that the pointer comes from.
trait Sums: Copy {
    /// Output channels in a vector.
    const N: usize;
    /// Bytes of a vector of weights.
    const WEIGHTS: usize;
    /// Four input channels, for every output channel.
    type Inputs: Copy;
    type Weights: Copy;
    type Floats: Lanes;
    unsafe fn zero() -> Self;
    unsafe fn inputs(p: *const u8) -> Self::Inputs;
    unsafe fn weights(p: *const u8) -> Self::Weights;
    /// Adds the products.
    unsafe fn dot(self, x: Self::Inputs, w: Self::Weights) -> Self;
    unsafe fn floats(self) -> Self::Floats;
    /// `a * b + c` in one rounding.
    #[inline(always)]
    unsafe fn fused(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: by the caller's promise.
        unsafe { a.mul_add(b, c) }
    }
    /// `N` codes.
    unsafe fn load(p: *const u8) -> Self::Floats;
    /// Rounds to the nearest code, at a tie to the even one, and stores `N` of each vector at `to` and the offset.
    unsafe fn store(values: [Self::Floats; 4], to: *mut u8, offsets: [usize; 4]);
}

impl Sums for [i32; 8] {
    const N: usize = 8;
    const WEIGHTS: usize = 8 * GROUP;
    type Inputs = [u8; GROUP];
    type Weights = [[i8; GROUP]; 8];
    type Floats = Portable<8>;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn inputs(p: *const u8) -> [u8; GROUP] {
        // SAFETY: by the caller's promise, as in all of this trait.
        unsafe { p.cast::<[u8; GROUP]>().read() }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> Self::Weights {
        // SAFETY: by the caller's promise.
        unsafe { p.cast::<Self::Weights>().read() }
    }
    #[inline(always)]
    unsafe fn dot(mut self, x: [u8; GROUP], w: Self::Weights) -> Self {
        for (sum, w) in self.iter_mut().zip(w) {
            *sum += (0..GROUP)
                .map(|i| i32::from(x[i]) * i32::from(w[i]))
                .sum::<i32>();
        }
        self
    }
    #[inline(always)]
    unsafe fn floats(self) -> Portable<8> {
        Portable(self.map(|v| v as f32))
    }
    #[inline(always)]
    unsafe fn fused(a: Portable<8>, b: Portable<8>, c: Portable<8>) -> Portable<8> {
        Portable(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Portable<8> {
        // SAFETY: by the caller's promise.
        Portable(unsafe { p.cast::<[u8; 8]>().read() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn store(values: [Portable<8>; 4], to: *mut u8, offsets: [usize; 4]) {
        for (values, offset) in values.into_iter().zip(offsets) {
            let codes = values
                .0
                .map(|v| v.round_ties_even().clamp(0.0, 255.0) as u8);
            // SAFETY: by the caller's promise.
            unsafe { to.add(offset).cast::<[u8; 8]>().write(codes) }
        }
    }
}

/// The band, with sums of `T1` columns by one vector of output channels or of `T2` by two, for input pixels of `STEP`
/// bytes, or of any number for 0: pixels whose distance the compiler knows it addresses without calculating.
///
/// # Safety
/// What `Int8::run` checks holds; the instruction set of `D` is enabled. `T1` and `T2` are multiples of `TILE`, `STEP`
/// is 0 or what the layer has.
#[inline(always)]
unsafe fn run<D: Sums, const T1: usize, const T2: usize, const STEP: usize>(
    layer: &Int8,
    rows: &Rows,
) {
    let (mut weights, mut channel) = (layer.weights.as_ptr(), 0);
    for &vectors in &layer.blocks {
        for y in 0..TILE {
            let at = Place { y, x: 0, channel };
            // SAFETY: by the caller's promise.
            unsafe {
                match vectors {
                    1 => row::<D, T1, 1, STEP>(layer, rows, at, weights),
                    _ => row::<D, T2, 2, STEP>(layer, rows, at, weights),
                }
            }
        }
        // SAFETY: the weights of the block.
        weights = unsafe { weights.add(9 * layer.groups * vectors * D::WEIGHTS) };
        channel += vectors * D::N;
    }
}

/// An output pixel of a band and its first channel.
#[derive(Clone, Copy)]
struct Place {
    y: usize,
    x: usize,
    channel: usize,
}

/// One row of a block, `T` columns at a time.
///
/// # Safety
/// As of [`run`]; `weights` are the block's.
#[inline(always)]
unsafe fn row<D: Sums, const T: usize, const V: usize, const STEP: usize>(
    layer: &Int8,
    rows: &Rows,
    mut at: Place,
    weights: *const u8,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        while at.x + T <= rows.columns {
            finish::<D, T, V>(
                layer,
                rows,
                at,
                sums::<D, T, V, STEP>(layer, rows, at, weights),
            );
            at.x += T;
        }
        while at.x < rows.columns {
            let sums = sums::<D, TILE, V, STEP>(layer, rows, at, weights);
            finish::<D, TILE, V>(layer, rows, at, sums);
            at.x += TILE;
        }
    }
}

/// The sums of `T` columns by `V` vectors.
///
/// # Safety
/// As of [`row`].
#[inline(always)]
unsafe fn sums<D: Sums, const T: usize, const V: usize, const STEP: usize>(
    layer: &Int8,
    rows: &Rows,
    at: Place,
    mut weights: *const u8,
) -> [[D; V]; T] {
    let step = if STEP > 0 { STEP } else { layer.input_step };
    // SAFETY: by the caller's promise.
    unsafe {
        let mut sums = [[D::zero(); V]; T];
        for row in &rows.input[at.y..at.y + 3] {
            for x in at.x..at.x + 3 {
                let pixel = row.add(x * step);
                for group in 0..layer.groups {
                    let mut w = [D::weights(weights); V];
                    for (v, w) in w.iter_mut().enumerate().skip(1) {
                        *w = D::weights(weights.add(v * D::WEIGHTS));
                    }
                    weights = weights.add(V * D::WEIGHTS);
                    let pixel = pixel.add(group * GROUP);
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x = D::inputs(pixel.add(t * step));
                        for v in 0..V {
                            sums[v] = sums[v].dot(x, w[v]);
                        }
                    }
                }
            }
        }
        sums
    }
}

/// Makes outputs of sums.
///
/// # Safety
/// As of [`row`].
#[inline(always)]
unsafe fn finish<D: Sums, const T: usize, const V: usize>(
    layer: &Int8,
    rows: &Rows,
    at: Place,
    sums: [[D; V]; T],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let constant =
            |of: &[f32], v: usize| D::Floats::load(of.as_ptr().add(at.channel + v * D::N));
        let slope = D::Floats::splat(layer.slope);
        let value = |t: usize, v: usize| {
            let sum = sums[t][v].floats();
            let sum = D::fused(sum, constant(&layer.factor, v), constant(&layer.bias, v));
            sum.max(sum.mul(slope))
        };
        let step = layer.output_step();
        match &rows.output {
            Output::Codes(output) => {
                let first = at.x * step + at.channel;
                let place = |i: usize| i / V * step + i % V * D::N;
                for i in (0..T * V).step_by(4) {
                    let mut values = [slope; 4];
                    for (j, code) in values.iter_mut().enumerate() {
                        let (t, v) = ((i + j) / V, (i + j) % V);
                        let mut value = value(t, v);
                        if let Some(skip) = &rows.skip {
                            let skip = D::load(skip[at.y].add(first + place(i + j)));
                            value = D::fused(skip, constant(&layer.skip, v), value);
                        }
                        *code = value.add(constant(&layer.offset, v));
                    }
                    let offsets = std::array::from_fn(|j| place(i + j));
                    D::store(values, output[at.y].add(first), offsets);
                }
            }
            Output::Values(output) => {
                for (t, v) in (0..T).flat_map(|t| (0..V).map(move |v| (t, v))) {
                    let channel = at.channel + v * D::N;
                    let stored = layer.co.saturating_sub(channel).min(D::N);
                    let to = output[at.y].add((at.x + t) * layer.co + channel.min(layer.co));
                    value(t, v)
                        .add(constant(&layer.offset, v))
                        .store_first(to, stored);
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

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn codes(len: usize, seed: u32) -> Vec<u8> {
        let code = |v: f32| (128.0 + 127.0 * v) as u8;
        values(len, seed).into_iter().map(code).collect()
    }

    /// Ranges of different widths and middles.
    fn coding(channels: usize, seed: u32) -> Coding {
        let v = values(3 * channels, seed);
        let range = |c: usize| {
            let (low, width) = (v[3 * c], 1.2 + v[3 * c + 1]);
            [low, low + width, low + width * (0.5 + 0.4 * v[3 * c + 2])]
        };
        Coding::new(&(0..channels).map(range).collect::<Vec<_>>())
    }

    fn decoded(codes: &[u8], step: usize, coding: &Coding) -> Vec<f32> {
        let pixel = |pixel: &[u8]| {
            let channels = coding.low.iter().zip(&coding.step).zip(pixel);
            channels
                .map(|((low, step), &code)| low + step * f32::from(code))
                .collect::<Vec<_>>()
        };
        codes.chunks_exact(step).flat_map(pixel).collect()
    }

    fn all<const N: usize>(rows: &[u8]) -> [&[u8]; N] {
        let row = rows.len() / N;
        std::array::from_fn(|y| &rows[y * row..][..row])
    }

    fn all_mut<T>(rows: &mut [Vec<T>]) -> [&mut [T]; TILE] {
        let [a, b, c, d] = rows else {
            unreachable!("four rows")
        };
        [a, b, c, d].map(|r| &mut r[..])
    }

    /// A layer and a band for it.
    #[derive(Debug, Clone)]
    struct Case {
        ci: usize,
        co: usize,
        tiles: usize,
        weights: Vec<f32>,
        bias: Vec<f32>,
        slope: f32,
        input: Coding,
        first: bool,
        output: Coding,
        x: Vec<u8>,
        skip: Option<(Coding, Vec<u8>)>,
    }

    impl Case {
        fn layer(&self, codes: bool, isa: IntIsa) -> Int8 {
            let ends = Ends {
                input: &self.input,
                output: codes.then_some(&self.output),
                skip: self.skip.as_ref().map(|s| &s.0),
                first: self.first,
            };
            Int8::new(
                [self.co, self.ci],
                &self.weights,
                &self.bias,
                self.slope,
                ends,
                isa,
            )
        }

        fn codes(&self, isa: IntIsa) -> Vec<Vec<u8>> {
            let layer = self.layer(true, isa);
            // One more than the row has, to see that it is left alone.
            let mut rows = vec![vec![77; TILE * self.tiles * layer.output_step() + 1]; TILE];
            self.run(&layer, IntOutput::Codes(all_mut(&mut rows)));
            rows
        }

        fn values(&self, isa: IntIsa) -> Vec<Vec<f32>> {
            let layer = self.layer(false, isa);
            let mut rows = vec![vec![77.0; TILE * self.tiles * self.co + 1]; TILE];
            self.run(&layer, IntOutput::Values(all_mut(&mut rows)));
            rows
        }

        fn run(&self, layer: &Int8, output: IntOutput) {
            layer.run(IntBand {
                input: all(&self.x),
                skip: self.skip.as_ref().map(|s| all(&s.1)),
                output,
                tiles: self.tiles,
            });
        }

        /// The layer's output in floats: with the codes of the weights, one sum after the other.
        fn by_the_formula(&self, codes: bool) -> Vec<f32> {
            let layer = self.layer(codes, IntIsa::Portable);
            let mut weights = Vec::new();
            for kernels in self.weights.chunks_exact(self.ci * 9) {
                quantize(kernels, &self.input, &mut weights);
            }
            let width = TILE * self.tiles;
            let mut out = Vec::new();
            for (y, x) in (0..TILE).flat_map(|y| (0..width).map(move |x| (y, x))) {
                for o in 0..self.co {
                    let mut sum = 0;
                    for (k, i) in (0..9).flat_map(|k| (0..self.ci).map(move |i| (k, i))) {
                        let pixel = (y + k / 3) * (width + 2) + x + k % 3;
                        let code = self.x[pixel * layer.input_step + i];
                        sum += i32::from(weights[(o * self.ci + i) * 9 + k]) * i32::from(code);
                    }
                    let value = (sum as f32).mul_add(layer.factor[o], layer.bias[o]);
                    let mut value = value.max(value * self.slope);
                    if let (Some((_, skip)), true) = (&self.skip, codes) {
                        let code = skip[(y * width + x) * layer.output_step() + o];
                        value = f32::from(code).mul_add(layer.skip[o], value);
                    }
                    out.push(value + layer.offset[o]);
                }
            }
            out
        }
    }

    prop_compose! {
        fn cases()(
            ci in 1usize..70, co in 1usize..70, tiles in 1usize..14, first: bool, add: bool,
            slope in prop::sample::select(vec![0.0f32, 0.1, 1.0]), seed: u32,
        ) -> Case {
            let input_step = ci.next_multiple_of(if first { GROUP } else { PADDED });
            let width = TILE * tiles;
            let size = (2.0 / ci as f32).sqrt();
            let output_step = co.next_multiple_of(PADDED);
            Case {
                ci, co, tiles, slope, first,
                weights: values(co * ci * 9, seed ^ 1).iter().map(|v| v * size).collect(),
                bias: values(co, seed ^ 2),
                input: coding(ci, seed ^ 3),
                output: Coding::new(&vec![[-4.0, 5.0, 0.0]; co]),
                x: codes(READ * (width + 2) * input_step, seed),
                skip: add.then(|| (coding(co, seed ^ 4), codes(TILE * width * output_step, seed ^ 5))),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_instruction_set_gives_the_bits_of_the_formula(case in cases()) {
            let step = case.layer(true, IntIsa::Portable).output_step();
            let plain = Case { skip: None, ..case.clone() };
            let (want, floats) = (case.by_the_formula(true), plain.by_the_formula(false));
            let width = TILE * case.tiles;
            for isa in IntIsa::available() {
                let rows = case.codes(isa);
                for (i, want) in want.iter().enumerate() {
                    let (y, x, c) = (i / case.co / width, i / case.co % width, i % case.co);
                    let want = want.round_ties_even().clamp(0.0, 255.0) as u8;
                    prop_assert_eq!(rows[y][x * step + c], want, "{:?} at {},{},{}", isa, y, x, c);
                }
                prop_assert!(rows.iter().all(|r| r.last() == Some(&77)), "{isa:?} writes beyond its rows");
                let rows = plain.values(isa);
                for (row, want) in rows.iter().zip(floats.chunks_exact(width * case.co)) {
                    prop_assert_eq!(&row[..want.len()], want, "{:?}", isa);
                    prop_assert_eq!(row.last(), Some(&77.0), "{:?} writes beyond its rows", isa);
                }
            }
        }

        /// A sum's error is that of the weights, half a step each, and where it becomes a code half a step of those.
        #[test]
        fn codes_are_close_to_what_floats_would_give(case in cases()) {
            let layer = case.layer(true, IntIsa::best());
            let (width, step) = (TILE * case.tiles, layer.output_step());
            let s = ConvShape { n: 1, h: READ, w: width + 2, ci: case.ci, co: case.co, kh: 3, kw: 3, stride: 1, pad: 0 };
            let x = decoded(&case.x, layer.input_step(), &case.input);
            let activation = Activation::LeakyRelu(case.slope);
            let mut want = reference(&s, &x, &case.weights, Some(&case.bias), activation);
            if let Some((coding, skip)) = &case.skip {
                let skip = decoded(skip, step, coding);
                want.iter_mut().zip(skip).for_each(|(y, s)| *y += s);
            }
            let rows = case.codes(IntIsa::best());
            let got = rows.iter().flat_map(|r| decoded(&r[..width * step], step, &case.output));
            let (mut error, mut most) = (0.0, 0.0f32);
            let count = want.len() as f64;
            for (got, want) in got.zip(&want) {
                let difference = got - want.clamp(-4.0, 5.0);
                error += f64::from(difference * difference);
                most = most.max(difference.abs());
            }
            // Codes of -4 to 5 have steps of 0.035.
            let error = (error / count).sqrt();
            prop_assert!(error < 0.03 && most < 0.2, "{error} on average, at most {most}");
        }

        #[test]
        fn values_become_the_nearest_code(channels in 1usize..40, pixels in 0usize..40, seed: u32) {
            let coding = coding(channels, seed);
            let step = channels.next_multiple_of(GROUP);
            let values = values(pixels * step, seed ^ 1);
            let mut codes = vec![0; values.len()];
            coding.encode(&values, &mut codes);
            for (values, codes) in values.chunks_exact(step).zip(codes.chunks_exact(step)) {
                for c in 0..channels {
                    let (low, step) = (coding.low[c], coding.step[c]);
                    let inside = values[c].clamp(low, low + 255.0 * step);
                    let error = (low + step * f32::from(codes[c]) - inside).abs();
                    prop_assert!(error < 0.5001 * step, "{} became {}", values[c], codes[c]);
                }
            }
        }
    }
}
