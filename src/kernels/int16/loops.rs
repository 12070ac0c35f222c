//! The loops over tiles, generic over vectors: transforms of inputs and sums, and the products
//! between them.

use std::ptr::null;

use super::sizes::{PADDED, POINTS, SIDE, SUMS, TILES};
use crate::kernels::{memory::AlignedCopy, simd::Lanes, winograd::TILE};

/// Weights and constants of a layer, arranged for the loops.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    pub ci: usize,
    pub co: usize,
    /// Vectors of sums in each block of output channels.
    pub blocks: Vec<usize>,
    /// Transformed weights by point, block, pair of input channels: those of the pair for each
    /// output channel of the block.
    pub weights: AlignedCopy<i16>,
    /// Constants of each output channel, padded: factor of a sum and what is then added to it, what
    /// is added to `slope` times that for negative results, and factor of an added code.
    pub factor: Vec<f32>,
    pub bias: Vec<f32>,
    pub negative: Vec<f32>,
    pub skip: Vec<f32>,
    pub slope: f32,
}

impl Packed {
    /// Channels of an input pixel with its padding.
    #[inline(always)]
    pub fn input_step(&self) -> usize {
        self.ci.next_multiple_of(PADDED)
    }

    /// Output channels with their padding.
    #[inline(always)]
    pub fn output_step(&self) -> usize {
        self.factor.len()
    }

    /// Pairs of input channels.
    #[inline(always)]
    pub fn pairs(&self) -> usize {
        self.ci.div_ceil(2)
    }

    /// Floats of scratch memory for both transforms.
    pub fn scratch(&self) -> usize {
        TILES * POINTS * (self.input_step() / 2 + self.output_step())
    }
}

/// The rows of a band.
pub(super) struct Rows {
    pub input: [*const i16; SIDE],
    pub output: Output,
    pub tiles: usize,
}

pub(super) enum Output {
    /// Codes, and rows that are added to them.
    Codes {
        output: [*mut i16; TILE],
        skip: Option<[*const i16; TILE]>,
    },
    Values([*mut f32; TILE]),
}

/// A vector of `PADDED` 16-bit integers.
///
/// # Safety
/// For every method: the CPU has the instruction set. For methods with a pointer: the memory that
/// is read or written lies in the allocation that the pointer comes from.
pub(super) trait Words: Copy {
    unsafe fn load(p: *const i16) -> Self;
    unsafe fn store(self, p: *mut i16);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    /// Twice the integers.
    unsafe fn twice(self) -> Self;
    /// Four times the integers.
    unsafe fn four_times(self) -> Self;
}

/// A vector of `SUMS` 32-bit integers, or of as many pairs of 16-bit ones.
///
/// # Safety
/// As [`Words`].
pub(super) trait Sums: Copy {
    type Floats: Lanes;
    unsafe fn zero() -> Self;
    /// Returns the pair at `p` in all lanes.
    unsafe fn splat(p: *const i16) -> Self;
    /// Loads a vector of pairs.
    unsafe fn load(p: *const i16) -> Self;
    unsafe fn store(self, p: *mut i32);
    /// Adds the products of pairs.
    unsafe fn dot(self, x: Self, w: Self) -> Self;
    /// Loads sums.
    unsafe fn floats(p: *const i32) -> Self::Floats;
    /// Loads codes.
    unsafe fn codes(p: *const i16) -> Self::Floats;
    /// Rounds to the nearest code, ties to even, and stores the codes.
    unsafe fn store_codes(values: Self::Floats, p: *mut i16);
    /// `a * b + c`, rounded once.
    #[inline(always)]
    unsafe fn fused(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: by the caller's promise.
        unsafe { a.mul_add(b, c) }
    }
}

/// Convolves a band, with products of `T1` tiles by one vector of output channels, or of `T2` by
/// two. Input and output pixels have `STEP` channels with their padding, which saves address
/// calculations, or any number if it is 0.
///
/// # Safety
/// The rows have the tiles, in pixels of the steps of the layer; `scratch` holds
/// [`Packed::scratch`] floats and begins with a cache line; the instruction set of `W` and `S` is
/// enabled.
#[inline(always)]
pub(super) unsafe fn run<W: Words, S: Sums, const T1: usize, const T2: usize, const STEP: usize>(
    layer: &Packed,
    rows: &Rows,
    scratch: &mut [f32],
) {
    let [in_step, out_step] = match STEP {
        0 => [layer.input_step(), layer.output_step()],
        _ => [STEP; 2],
    };
    let pairs = layer.pairs();
    let transformed = scratch.as_mut_ptr().cast::<i16>();
    // SAFETY: by the caller's promise.
    unsafe {
        let sums = transformed.add(TILES * POINTS * in_step).cast::<i32>();
        for first in (0..rows.tiles).step_by(TILES) {
            let tiles = TILES.min(rows.tiles - first);
            for channel in (0..in_step).step_by(PADDED) {
                let at = first * TILE * in_step + channel;
                let input = rows.input.map(|row| row.add(at));
                let out = transformed.add(channel);
                input_transform::<W, 0>(input, tiles, in_step, out);
                input_transform::<W, 1>(input, tiles, in_step, out);
                input_transform::<W, 2>(input, tiles, in_step, out);
            }
            let mut weights = layer.weights.as_ptr();
            for point in 0..POINTS {
                let from = (
                    transformed.add(point * in_step).cast_const(),
                    in_step,
                    pairs,
                );
                let mut to = (sums.add(point * out_step), out_step);
                for &vectors in &layer.blocks {
                    match vectors {
                        1 => products::<S, T1, 1>(tiles, from, weights, to),
                        _ => products::<S, T2, 2>(tiles, from, weights, to),
                    }
                    weights = weights.add(pairs * vectors * 2 * SUMS);
                    to.0 = to.0.add(vectors * SUMS);
                }
            }
            let from = (sums.cast_const(), out_step);
            match rows.output {
                Output::Codes { output, skip } => {
                    let at = first * TILE * out_step;
                    let output = output.map(|row| row.add(at));
                    match skip {
                        None => codes::<S, false>(layer, tiles, from, output, [null(); TILE]),
                        Some(skip) => {
                            let skip = skip.map(|row| row.add(at));
                            codes::<S, true>(layer, tiles, from, output, skip);
                        }
                    }
                }
                Output::Values(output) => {
                    let output = output.map(|row| row.add(first * TILE * layer.co));
                    values::<S>(layer, tiles, from, output);
                }
            }
        }
    }
}

/// Returns `4 a - 5 b + c`.
///
/// # Safety
/// The instruction set of `W` is enabled.
#[inline(always)]
unsafe fn outer<W: Words>(a: W, b: W, c: W) -> W {
    // SAFETY: by the caller's promise.
    unsafe { a.sub(b).four_times().sub(b).add(c) }
}

/// Returns `B^T d` in one direction: its first and last value for `PAIR` 0, the second and third
/// for 1, the others for 2.
///
/// # Safety
/// The instruction set of `W` is enabled.
#[inline(always)]
unsafe fn transform_inputs<W: Words, const PAIR: usize>(d: [W; SIDE]) -> (W, W) {
    // SAFETY: by the caller's promise.
    unsafe {
        match PAIR {
            0 => (outer(d[0], d[2], d[4]), outer(d[1], d[3], d[5])),
            1 => {
                let (even, odd) = (d[4].sub(d[2].four_times()), d[3].sub(d[1].four_times()));
                (even.add(odd), even.sub(odd))
            }
            _ => {
                let (even, odd) = (d[4].sub(d[2]), d[3].sub(d[1]).twice());
                (even.add(odd), even.sub(odd))
            }
        }
    }
}

/// Writes two rows of `B^T d B` of tiles for a vector of channels, those of `PAIR`. A tile takes
/// over the two columns that it shares with the one before.
///
/// # Safety
/// The tiles lie in the input, `out` holds `POINTS * step` values for each; the instruction set of
/// `W` is enabled.
#[inline(always)]
unsafe fn input_transform<W: Words, const PAIR: usize>(
    input: [*const i16; SIDE],
    tiles: usize,
    step: usize,
    out: *mut i16,
) {
    let [upper, lower] = [[0, 5], [1, 2], [3, 4]][PAIR];
    // SAFETY: by the caller's promise.
    unsafe {
        let (a0, b0) = vertical::<W, PAIR>(&input, 0);
        let (mut a, mut b) = ([a0; SIDE], [b0; SIDE]);
        (a[5], b[5]) = vertical::<W, PAIR>(&input, step);
        for tile in 0..tiles {
            (a[0], b[0], a[1], b[1]) = (a[4], b[4], a[5], b[5]);
            for x in 2..SIDE {
                (a[x], b[x]) = vertical::<W, PAIR>(&input, (tile * TILE + x) * step);
            }
            let out = out.add(tile * POINTS * step);
            for (row, values) in [(upper, a), (lower, b)] {
                let out = out.add(row * SIDE * step);
                let outer = transform_inputs::<W, 0>(values);
                let inner = transform_inputs::<W, 1>(values);
                let double = transform_inputs::<W, 2>(values);
                let all = [outer.0, inner.0, inner.1, double.0, double.1, outer.1];
                for (x, value) in all.into_iter().enumerate() {
                    value.store(out.add(x * step));
                }
            }
        }
    }
}

/// Returns two rows of `B^T d`, those of `PAIR`, in the column that begins at code `at` of each
/// row.
///
/// # Safety
/// The column lies in the rows; the instruction set of `W` is enabled.
#[inline(always)]
unsafe fn vertical<W: Words, const PAIR: usize>(input: &[*const i16; SIDE], at: usize) -> (W, W) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut d = [W::load(input[1].add(at)); SIDE];
        for (y, d) in d.iter_mut().enumerate() {
            // The other pairs do not use the outer rows.
            if PAIR == 0 || (1..5).contains(&y) {
                *d = W::load(input[y].add(at));
            }
        }
        transform_inputs::<W, PAIR>(d)
    }
}

/// Multiplies the transformed inputs of `tiles` tiles at one point, `T` at a time, with the weights
/// of a block.
///
/// # Safety
/// There are `tiles` inputs (pointer to the point in the first, values of a point, pairs of
/// channels) and sums (pointer to the channels of the block at the point, sums of a point), and
/// weights for each pair; the instruction set of `S` is enabled.
#[inline(always)]
unsafe fn products<S: Sums, const T: usize, const V: usize>(
    tiles: usize,
    (inputs, in_step, pairs): (*const i16, usize, usize),
    weights: *const i16,
    (out, out_step): (*mut i32, usize),
) {
    let (in_tile, out_tile) = (POINTS * in_step, POINTS * out_step);
    let mut tile = 0;
    // SAFETY: by the caller's promise.
    unsafe {
        macro_rules! by {
            ($t:expr) => {
                while tiles - tile >= $t {
                    let from = (inputs.add(tile * in_tile), in_tile, pairs);
                    let to = (out.add(tile * out_tile), out_tile);
                    product::<S, { $t }, V>(from, weights, to);
                    tile += $t;
                }
            };
        }
        by!(T);
        by!(2);
        by!(1);
    }
}

/// Multiplies `T` tiles by `V` vectors of output channels at one point.
///
/// # Safety
/// As [`products`], with the distances from tile to tile instead of from point to point.
#[inline(always)]
unsafe fn product<S: Sums, const T: usize, const V: usize>(
    (inputs, in_tile, pairs): (*const i16, usize, usize),
    weights: *const i16,
    (out, out_tile): (*mut i32, usize),
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut sums = [[S::zero(); V]; T];
        for pair in 0..pairs {
            let mut w = [S::zero(); V];
            for (v, w) in w.iter_mut().enumerate() {
                *w = S::load(weights.add((pair * V + v) * 2 * SUMS));
            }
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = S::splat(inputs.add(t * in_tile + 2 * pair));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = sum.dot(x, w);
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(out.add(t * out_tile + v * SUMS));
            }
        }
    }
}

/// Returns `A^T m` in one direction. The weights at the last point are a quarter of those of the
/// transform, which is made up for here.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn transform_sums<L: Lanes>(m: [L; SIDE]) -> [L; TILE] {
    // SAFETY: by the caller's promise.
    unsafe {
        let (sum, difference) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (sum2, difference2) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(sum).add(sum2),
            difference2.mul_add(L::splat(2.0), difference),
            sum2.mul_add(L::splat(4.0), sum),
            m[5].mul_add(
                L::splat(4.0),
                difference2.mul_add(L::splat(8.0), difference),
            ),
        ]
    }
}

/// Constants of a vector of output channels.
struct Constants<F> {
    factor: F,
    bias: F,
    slope: F,
    negative: F,
    skip: F,
}

impl<F: Lanes> Constants<F> {
    /// Loads those from output channel `channel` on.
    ///
    /// # Safety
    /// The layer has the channels; the instruction set of `F` is enabled.
    #[inline(always)]
    unsafe fn load(layer: &Packed, channel: usize) -> Self {
        // SAFETY: by the caller's promise.
        unsafe {
            Self {
                factor: F::load(layer.factor.as_ptr().add(channel)),
                bias: F::load(layer.bias.as_ptr().add(channel)),
                slope: F::splat(layer.slope),
                negative: F::load(layer.negative.as_ptr().add(channel)),
                skip: F::load(layer.skip.as_ptr().add(channel)),
            }
        }
    }
}

/// Returns a sum with factor, bias and activation.
///
/// # Safety
/// The instruction set of `S` is enabled.
#[inline(always)]
unsafe fn activated<S: Sums>(sum: S::Floats, c: &Constants<S::Floats>) -> S::Floats {
    // SAFETY: by the caller's promise.
    unsafe {
        let value = S::fused(sum, c.factor, c.bias);
        value.max(S::fused(value, c.slope, c.negative))
    }
}

/// Returns the rows of `m A` of a vector of channels.
///
/// # Safety
/// There are `POINTS` sums, one every `step`; the instruction set of `S` is enabled.
#[inline(always)]
unsafe fn sums_by_rows<S: Sums>(sums: *const i32, step: usize) -> [[S::Floats; TILE]; SIDE] {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut half = [[S::Floats::splat(0.0); TILE]; SIDE];
        for (y, half) in half.iter_mut().enumerate() {
            let mut m = [S::Floats::splat(0.0); SIDE];
            for (x, m) in m.iter_mut().enumerate() {
                *m = S::floats(sums.add((y * SIDE + x) * step));
            }
            *half = transform_sums(m);
        }
        half
    }
}

/// Returns column `x` of `A^T m A`.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn column<L: Lanes>(half: &[[L; TILE]; SIDE], x: usize) -> [L; TILE] {
    let mut m = [half[0][x]; SIDE];
    for (m, half) in m.iter_mut().zip(half) {
        *m = half[x];
    }
    // SAFETY: by the caller's promise.
    unsafe { transform_sums(m) }
}

/// Writes tiles of codes. Adds the rows `skip` if `SKIP`.
///
/// # Safety
/// There are `POINTS` sums for each tile (pointer, sums from one to the next, which is also the
/// step of codes); the tiles lie in the rows; the instruction set of `S` is enabled.
#[inline(always)]
unsafe fn codes<S: Sums, const SKIP: bool>(
    layer: &Packed,
    tiles: usize,
    (sums, step): (*const i32, usize),
    output: [*mut i16; TILE],
    skip: [*const i16; TILE],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        for channel in (0..step).step_by(SUMS) {
            let constants = Constants::load(layer, channel);
            for tile in 0..tiles {
                let half = sums_by_rows::<S>(sums.add(tile * POINTS * step + channel), step);
                for x in 0..TILE {
                    let at = (tile * TILE + x) * step + channel;
                    for (y, sum) in column(&half, x).into_iter().enumerate() {
                        let mut value = activated::<S>(sum, &constants);
                        if SKIP {
                            value = S::fused(S::codes(skip[y].add(at)), constants.skip, value);
                        }
                        S::store_codes(value, output[y].add(at));
                    }
                }
            }
        }
    }
}

/// Writes tiles of floats.
///
/// # Safety
/// As [`codes`], with pixels of the output channels.
#[inline(always)]
unsafe fn values<S: Sums>(
    layer: &Packed,
    tiles: usize,
    (sums, step): (*const i32, usize),
    output: [*mut f32; TILE],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        for channel in (0..layer.co).step_by(SUMS) {
            let constants = Constants::load(layer, channel);
            let stored = SUMS.min(layer.co - channel);
            for tile in 0..tiles {
                let half = sums_by_rows::<S>(sums.add(tile * POINTS * step + channel), step);
                for x in 0..TILE {
                    let at = (tile * TILE + x) * layer.co + channel;
                    for (y, sum) in column(&half, x).into_iter().enumerate() {
                        activated::<S>(sum, &constants).store_first(output[y].add(at), stored);
                    }
                }
            }
        }
    }
}
