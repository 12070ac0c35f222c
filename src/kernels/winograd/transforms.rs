//! Transforms of inputs and products, and the number formats of what they store.

use std::ops::Range;

use super::{
    sizes::{SIDE, TILE},
    tiles::Input,
};
use crate::kernels::simd::Lanes;

/// Number format in which transformed inputs are stored and multiplied.
///
/// # Safety
/// As [`Lanes`].
pub(super) trait Format {
    /// Input channels in a float's bits.
    const CHANNELS: usize;
    /// Stores the channels `channel` to `channel + L::N` of the point at `p`.
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize);
    /// Returns `sum + x * w`.
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L;
}

/// f32.
pub(super) struct Floats;

impl Format for Floats {
    const CHANNELS: usize = 1;

    #[inline(always)]
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { v.store(p.add(channel)) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { x.mul_add(w, sum) }
    }
}

/// f32, rounded to bfloat16.
pub(super) struct Rounded;

impl Format for Rounded {
    const CHANNELS: usize = 1;

    #[inline(always)]
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { Floats::store(v.round_bf16(), p, channel) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { Floats::dot(sum, x, w) }
    }
}

/// bfloat16 in the lower half of the memory that floats would take, multiplied in pairs.
#[cfg(target_arch = "x86_64")]
pub(super) struct Pairs;

#[cfg(target_arch = "x86_64")]
impl Format for Pairs {
    const CHANNELS: usize = 2;

    #[inline(always)]
    unsafe fn store<L: Lanes>(v: L, p: *mut f32, channel: usize) {
        // SAFETY: by the caller's promise.
        unsafe { v.store_bf16(p.cast::<u16>().add(channel)) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(sum: L, x: L, w: L) -> L {
        // SAFETY: by the caller's promise.
        unsafe { sum.dot_bf16(x, w) }
    }
}

/// Returns `B^T d` in one direction.
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

/// Returns `4 a - 5 b + c`: the first row of the transform from inputs 0, 2, 4, the last from 1, 3,
/// 5.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn first_input<L: Lanes>(a: L, b: L, c: L) -> L {
    // SAFETY: by the caller's promise.
    unsafe { a.mul_add(L::splat(4.0), b.neg_mul_add(L::splat(5.0), c)) }
}

/// Returns `A^T m` in one direction.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
pub(super) unsafe fn transform_products<L: Lanes>(m: [L; SIDE]) -> [L; TILE] {
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

/// Writes two rows of `B^T d B` of tiles `tiles` for a vector of channels: the first to `out[0]`,
/// the second to `out[1]`, with `tile_step` floats from one tile to the next and `point_step` from
/// one point to the next. A tile takes over the two columns that it shares with the one before.
///
/// # Safety
/// The tiles lie in the input, `out` holds the points of each, the instruction set of `L` is
/// enabled.
#[inline(always)]
pub(super) unsafe fn input_transform<K: Format, L: Lanes>(
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
                K::store(ta[x], to_a.add(x * point_step), channel);
                K::store(tb[x], to_b.add(x * point_step), channel);
            }
            (to_a, to_b) = (to_a.add(tile_step), to_b.add(tile_step));
            at += TILE * step;
        }
    }
}

/// Returns two rows of `B^T d` in the column that begins at float `at` of each row: the first and
/// the last for `pair` 0, the second and the third for 1, the others for 2.
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
