//! The loops over a band, generic over vectors of integer sums.

use super::sizes::{GROUP, READ};
use crate::kernels::{memory::AlignedCopy, simd::Lanes, winograd::TILE};

/// Weights and constants of a layer, arranged for the sums of one instruction set.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    pub co: usize,
    /// Bytes from one input pixel to the next.
    pub input_step: usize,
    /// Groups of input channels.
    pub groups: usize,
    /// Vectors in each block of output channels.
    pub blocks: Vec<usize>,
    /// Weights by block, row of the kernel, group, column: for each output channel of the block those
    /// of the channels of a group, as i8 or, where 16-bit integers are multiplied, as i16.
    pub weights: AlignedCopy<u8>,
    /// Number that the sum of each output channel begins with, padded: 128 times the weights if the
    /// variant subtracts 128 from the codes of inputs, else 0.
    pub start: Vec<i32>,
    /// Constants of each output channel, padded: factor of a sum, what is then added to it, factor
    /// of an added code, and what is added last.
    pub factor: Vec<f32>,
    pub bias: Vec<f32>,
    pub skip: Vec<f32>,
    pub offset: Vec<f32>,
    pub slope: f32,
}

impl Packed {
    /// Bytes of an output pixel with its padding.
    #[inline(always)]
    pub fn output_step(&self) -> usize {
        self.factor.len()
    }
}

/// The rows of a band.
pub(super) struct Rows {
    pub input: [*const u8; READ],
    pub skip: Option<[*const u8; TILE]>,
    pub output: Output,
    pub columns: usize,
}

pub(super) enum Output {
    Codes([*mut u8; TILE]),
    Values([*mut f32; TILE]),
}

/// A vector of sums.
///
/// # Safety
/// For every method: the CPU has the instruction set. For methods with a pointer: the memory that
/// is read or written lies in the allocation that the pointer comes from.
pub(super) trait Sums: Copy {
    /// Output channels in a vector.
    const N: usize;
    /// Bytes of a vector of weights.
    const WEIGHTS: usize;
    /// Four input channels, for every output channel.
    type Inputs: Copy;
    type Weights: Copy;
    type Floats: Lanes;
    /// Returns the sums at `p`, or zeros if the variant does not subtract from codes.
    unsafe fn start(p: *const i32) -> Self;
    unsafe fn inputs(p: *const u8) -> Self::Inputs;
    unsafe fn weights(p: *const u8) -> Self::Weights;
    /// Adds the products.
    unsafe fn dot(self, x: Self::Inputs, w: Self::Weights) -> Self;
    unsafe fn floats(self) -> Self::Floats;
    /// `a * b + c`, rounded once.
    #[inline(always)]
    unsafe fn fused(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: by the caller's promise.
        unsafe { a.mul_add(b, c) }
    }
    /// Loads `N` codes.
    unsafe fn load(p: *const u8) -> Self::Floats;
    /// Rounds to the nearest code, ties to even, and stores the `N` codes of each vector at `to`
    /// plus its offset.
    unsafe fn store(values: [Self::Floats; 4], to: *mut u8, offsets: [usize; 4]);
}

/// Convolves a band with sums of `T1` columns by one vector of output channels, or of `T2` by two.
/// Input pixels have `STEP` bytes, which saves address calculations, or any number if it is 0.
///
/// # Safety
/// The rows have the columns, in pixels of the steps of the layer; the instruction set of `D` is
/// enabled. `T1` and `T2` are multiples of `TILE`, `STEP` is 0 or the input step of the layer.
#[inline(always)]
pub(super) unsafe fn run<D: Sums, const T1: usize, const T2: usize, const STEP: usize>(
    layer: &Packed,
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

/// Convolves one row of a block, `T` columns at a time.
///
/// # Safety
/// As [`run`]; `weights` are those of the block.
#[inline(always)]
unsafe fn row<D: Sums, const T: usize, const V: usize, const STEP: usize>(
    layer: &Packed,
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

/// Returns the sums of `T` columns by `V` vectors.
///
/// # Safety
/// As [`row`].
#[inline(always)]
unsafe fn sums<D: Sums, const T: usize, const V: usize, const STEP: usize>(
    layer: &Packed,
    rows: &Rows,
    at: Place,
    mut weights: *const u8,
) -> [[D; V]; T] {
    let step = if STEP > 0 { STEP } else { layer.input_step };
    // SAFETY: by the caller's promise.
    unsafe {
        let mut start = [D::start(layer.start.as_ptr().add(at.channel)); V];
        for (v, start) in start.iter_mut().enumerate().skip(1) {
            *start = D::start(layer.start.as_ptr().add(at.channel + v * D::N));
        }
        let mut sums = [start; T];
        for row in &rows.input[at.y..at.y + 3] {
            let pixel = row.add(at.x * step);
            for group in 0..layer.groups {
                let pixel = pixel.add(group * GROUP);
                let mut w = [[D::weights(weights); V]; 3];
                for (i, w) in w.as_flattened_mut().iter_mut().enumerate().skip(1) {
                    *w = D::weights(weights.add(i * D::WEIGHTS));
                }
                weights = weights.add(3 * V * D::WEIGHTS);
                // A pixel is loaded once for the three columns that it contributes to. The compiler
                // does not unroll such a loop, and the sums would be in memory.
                macro_rules! pixels {
                    ($($t:literal)*) => { $(if $t < T + 2 {
                        let x = D::inputs(pixel.add($t * step));
                        for (k, w) in w.iter().enumerate() {
                            if $t >= k && $t < T + k {
                                let sums = &mut sums[$t - k];
                                for v in 0..V {
                                    sums[v] = sums[v].dot(x, w[v]);
                                }
                            }
                        }
                    })* };
                }
                pixels!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17);
            }
        }
        sums
    }
}

/// Turns sums into outputs.
///
/// # Safety
/// As [`row`].
#[inline(always)]
unsafe fn finish<D: Sums, const T: usize, const V: usize>(
    layer: &Packed,
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
