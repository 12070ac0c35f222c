//! Register tiles of NEON. The sums take at most 24 of the 32 registers.

use super::tile::{GradTile, Tile, Tiles};
use crate::kernels::{
    math::silu,
    simd::{F32x8, Lanes},
};

const LANES: usize = F32x8::N;

pub(super) static NEON: Tiles = Tiles {
    lanes: LANES,
    forward: &[
        &[
            (8, tile::<8, 1, false>, tile::<8, 1, true>),
            (4, tile::<4, 1, false>, tile::<4, 1, true>),
        ],
        &[
            (6, tile::<6, 2, false>, tile::<6, 2, true>),
            (4, tile::<4, 2, false>, tile::<4, 2, true>),
        ],
    ],
    grads: &[
        &[(8, grad::<8, 1>), (4, grad::<4, 1>), (1, grad::<1, 1>)],
        &[(4, grad::<4, 2>), (1, grad::<1, 2>)],
    ],
};

/// # Safety
/// The CPU has NEON; the pointers of the tile are valid for `PX` pixels and `NV` vectors of
/// channels.
#[target_feature(enable = "neon")]
unsafe fn tile<const PX: usize, const NV: usize, const SILU: bool>(t: &Tile) {
    // SAFETY: by the caller's promise, here and below.
    unsafe {
        let mut sums = [vectors::<NV>(t.bias); PX];
        let mut w = t.w;
        for r in 0..t.rows {
            let x = t.x.add(r * t.row_stride);
            for c in 0..t.len {
                let weights = vectors::<NV>(w);
                for (q, sums) in sums.iter_mut().enumerate() {
                    let value = F32x8::splat(*x.add(q * t.px_step + c));
                    for (sum, w) in sums.iter_mut().zip(weights) {
                        *sum = value.mul_add(w, *sum);
                    }
                }
                w = w.add(NV * LANES);
            }
        }
        for (q, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let y = t.y.add(q * t.y_step + v * LANES);
                let stored = if v + 1 < NV { LANES } else { t.tail };
                activate::<SILU>(sum, t.slope).store_first(y, stored);
            }
        }
    }
}

/// # Safety
/// The CPU has NEON; the pointers of the tile are valid for `Q` rows and `NV` vectors of channels.
#[target_feature(enable = "neon")]
unsafe fn grad<const Q: usize, const NV: usize>(t: &GradTile) {
    // SAFETY: by the caller's promise, here and below.
    unsafe {
        let mut sums = [[F32x8::splat(0.0); NV]; Q];
        let mut padded = [0.0f32; LANES];
        for p in 0..t.pixels {
            let b = t.b.add(p * t.b_step);
            let mut values = [F32x8::splat(0.0); NV];
            for (v, value) in values.iter_mut().enumerate() {
                let b = b.add(v * LANES);
                *value = if v + 1 < NV || t.tail == LANES {
                    F32x8::load(b)
                } else {
                    padded.as_mut_ptr().copy_from_nonoverlapping(b, t.tail);
                    F32x8::load(padded.as_ptr())
                };
            }
            for (q, sums) in sums.iter_mut().enumerate() {
                let a = F32x8::splat(*t.a.add(p * t.a_step + q));
                for (sum, b) in sums.iter_mut().zip(values) {
                    *sum = a.mul_add(b, *sum);
                }
            }
        }
        for (q, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let out = t.out.add(q * t.out_step + v * LANES);
                F32x8::load(out).add(sum).store(out);
            }
        }
    }
}

/// Loads `NV` vectors.
///
/// # Safety
/// The CPU has NEON; as many floats can be read at `p`.
#[inline(always)]
unsafe fn vectors<const NV: usize>(p: *const f32) -> [F32x8; NV] {
    // SAFETY: by the caller's promise.
    std::array::from_fn(|v| unsafe { F32x8::load(p.add(v * LANES)) })
}

/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn activate<const SILU: bool>(x: F32x8, slope: f32) -> F32x8 {
    // SAFETY: by the caller's promise; the array holds a vector.
    unsafe {
        if SILU {
            let mut lanes = [0.0; LANES];
            x.store(lanes.as_mut_ptr());
            F32x8::load(lanes.map(silu::<true>).as_ptr())
        } else {
            x.max(x.mul(F32x8::splat(slope)))
        }
    }
}
