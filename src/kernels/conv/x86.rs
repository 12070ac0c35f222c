//! Register tiles of AVX-512 and AVX2.
//!
//! Accumulators are named registers, an array for each pixel with constant indices only: an array
//! that is indexed in a loop stays on the stack, which costs two thirds of the speed.

use std::arch::x86_64::*;

use super::tile::{GradTile, Tile, Tiles};
use crate::kernels::math::TAYLOR;

pub(super) static AVX512: Tiles = Tiles {
    lanes: 16,
    forward: &[
        &[
            (16, tile512_16::<1, false>, tile512_16::<1, true>),
            (4, tile512_4::<1, false>, tile512_4::<1, true>),
        ],
        &[
            (12, tile512_12::<2, false>, tile512_12::<2, true>),
            (4, tile512_4::<2, false>, tile512_4::<2, true>),
        ],
        &[
            (8, tile512_8::<3, false>, tile512_8::<3, true>),
            (4, tile512_4::<3, false>, tile512_4::<3, true>),
        ],
        &[
            (6, tile512_6::<4, false>, tile512_6::<4, true>),
            (4, tile512_4::<4, false>, tile512_4::<4, true>),
        ],
    ],
    grads: &[
        &[
            (8, grad512_8::<1>),
            (4, grad512_4::<1>),
            (1, grad512_1::<1>),
        ],
        &[
            (8, grad512_8::<2>),
            (4, grad512_4::<2>),
            (1, grad512_1::<2>),
        ],
        &[
            (8, grad512_8::<3>),
            (4, grad512_4::<3>),
            (1, grad512_1::<3>),
        ],
    ],
};

pub(super) static AVX2: Tiles = Tiles {
    lanes: 8,
    forward: &[
        &[
            (8, tile256_8::<1, false>, tile256_8::<1, true>),
            (4, tile256_4::<1, false>, tile256_4::<1, true>),
        ],
        &[
            (6, tile256_6::<2, false>, tile256_6::<2, true>),
            (4, tile256_4::<2, false>, tile256_4::<2, true>),
        ],
    ],
    grads: &[
        &[
            (8, grad256_8::<1>),
            (4, grad256_4::<1>),
            (1, grad256_1::<1>),
        ],
        &[(4, grad256_4::<2>), (1, grad256_1::<2>)],
    ],
};

/// Defines a forward tile of as many pixels as there are pairs `$q $a`: index and accumulators.
macro_rules! tile {
    ($name:ident, $isa:ident, $features:literal, $($q:literal $a:ident),+) => {
        /// # Safety
        /// The CPU has the features; the pointers of the tile are valid for its pixels and `NV`
        /// vectors of channels.
        #[target_feature(enable = $features)]
        unsafe fn $name<const NV: usize, const SILU: bool>(t: &Tile) {
            // SAFETY: by the caller's promise.
            unsafe {
                let zero = $isa::zero();
                let bias = [
                    $isa::load(t.bias),
                    if NV > 1 { $isa::load(t.bias.add($isa::LANES)) } else { zero },
                    if NV > 2 { $isa::load(t.bias.add(2 * $isa::LANES)) } else { zero },
                    if NV > 3 { $isa::load(t.bias.add(3 * $isa::LANES)) } else { zero },
                ];
                $(let mut $a = bias;)+
                let mut w = t.w;
                for r in 0..t.rows {
                    let mut x = t.x.add(r * t.row_stride);
                    for _ in 0..t.len {
                        let w0 = $isa::load(w);
                        let w1 = if NV > 1 { $isa::load(w.add($isa::LANES)) } else { zero };
                        let w2 = if NV > 2 { $isa::load(w.add(2 * $isa::LANES)) } else { zero };
                        let w3 = if NV > 3 { $isa::load(w.add(3 * $isa::LANES)) } else { zero };
                        $(
                            let value = $isa::splat(*x.add($q * t.px_step));
                            $a[0] = $isa::fma(value, w0, $a[0]);
                            if NV > 1 { $a[1] = $isa::fma(value, w1, $a[1]); }
                            if NV > 2 { $a[2] = $isa::fma(value, w2, $a[2]); }
                            if NV > 3 { $a[3] = $isa::fma(value, w3, $a[3]); }
                        )+
                        x = x.add(1);
                        w = w.add(NV * $isa::LANES);
                    }
                }
                let slope = $isa::splat(t.slope);
                let mask = $isa::mask(t.tail);
                $(
                    let y = t.y.add($q * t.y_step);
                    if NV > 1 { $isa::store(y, $isa::activate::<SILU>($a[0], slope)); }
                    if NV > 2 { $isa::store(y.add($isa::LANES), $isa::activate::<SILU>($a[1], slope)); }
                    if NV > 3 { $isa::store(y.add(2 * $isa::LANES), $isa::activate::<SILU>($a[2], slope)); }
                    let last = $isa::activate::<SILU>($a[NV - 1], slope);
                    $isa::store_masked(y.add((NV - 1) * $isa::LANES), mask, last);
                )+
            }
        }
    };
}

/// Defines a tile of the weight gradient, with rows of the gradient in the place of pixels.
macro_rules! grad {
    ($name:ident, $isa:ident, $features:literal, $($q:literal $a:ident),+) => {
        /// # Safety
        /// The CPU has the features; the pointers of the tile are valid for its rows and `NV`
        /// vectors of channels.
        #[target_feature(enable = $features)]
        unsafe fn $name<const NV: usize>(t: &GradTile) {
            // SAFETY: by the caller's promise.
            unsafe {
                let zero = $isa::zero();
                let mask = $isa::mask(t.tail);
                $(let mut $a = [zero; 3];)+
                let (mut pa, mut pb) = (t.a, t.b);
                for _ in 0..t.pixels {
                    let last = $isa::load_masked(pb.add((NV - 1) * $isa::LANES), mask);
                    let b0 = if NV > 1 { $isa::load(pb) } else { last };
                    let b1 = if NV > 2 { $isa::load(pb.add($isa::LANES)) } else { last };
                    $(
                        let value = $isa::splat(*pa.add($q));
                        $a[0] = $isa::fma(value, b0, $a[0]);
                        if NV > 1 { $a[1] = $isa::fma(value, b1, $a[1]); }
                        if NV > 2 { $a[2] = $isa::fma(value, last, $a[2]); }
                    )+
                    pa = pa.add(t.a_step);
                    pb = pb.add(t.b_step);
                }
                $(
                    let out = t.out.add($q * t.out_step);
                    $isa::add_to(out, $a[0]);
                    if NV > 1 { $isa::add_to(out.add($isa::LANES), $a[1]); }
                    if NV > 2 { $isa::add_to(out.add(2 * $isa::LANES), $a[2]); }
                )+
            }
        }
    };
}

tile!(tile512_16, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5, 6 a6, 7 a7, 8 a8, 9 a9, 10 a10, 11 a11, 12 a12, 13 a13, 14 a14, 15 a15);
tile!(tile512_12, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5, 6 a6, 7 a7, 8 a8, 9 a9, 10 a10, 11 a11);
tile!(tile512_8, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5, 6 a6, 7 a7);
tile!(tile512_6, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5);
tile!(tile512_4, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3);
tile!(tile256_8, v256, "avx2,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5, 6 a6, 7 a7);
tile!(tile256_6, v256, "avx2,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5);
tile!(tile256_4, v256, "avx2,fma", 0 a0, 1 a1, 2 a2, 3 a3);
grad!(grad512_8, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5, 6 a6, 7 a7);
grad!(grad512_4, v512, "avx512f,fma", 0 a0, 1 a1, 2 a2, 3 a3);
grad!(grad512_1, v512, "avx512f,fma", 0 a0);
grad!(grad256_8, v256, "avx2,fma", 0 a0, 1 a1, 2 a2, 3 a3, 4 a4, 5 a5, 6 a6, 7 a7);
grad!(grad256_4, v256, "avx2,fma", 0 a0, 1 a1, 2 a2, 3 a3);
grad!(grad256_1, v256, "avx2,fma", 0 a0);

/// The vector operations of the tiles, on 16 lanes.
mod v512 {
    use super::*;

    pub const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn zero() -> __m512 {
        _mm512_setzero_ps()
    }

    /// # Safety
    /// 16 floats can be read at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_loadu_ps(p) }
    }

    /// # Safety
    /// The lanes of `mask` can be read at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn load_masked(p: *const f32, mask: __mmask16) -> __m512 {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, p) }
    }

    /// # Safety
    /// 16 floats can be written at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    /// # Safety
    /// The lanes of `mask` can be written at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn store_masked(p: *mut f32, mask: __mmask16, v: __m512) {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_mask_storeu_ps(p, mask, v) }
    }

    /// # Safety
    /// 16 floats can be read and written at `p`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn add_to(p: *mut f32, v: __m512) {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), v)) }
    }

    /// Returns the mask of the first `lanes` lanes.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn mask(lanes: usize) -> __mmask16 {
        ((1u32 << lanes) - 1) as __mmask16
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn activate<const SILU: bool>(x: __m512, slope: __m512) -> __m512 {
        if SILU {
            silu(x)
        } else {
            _mm512_max_ps(x, _mm512_mul_ps(x, slope))
        }
    }

    /// Returns `x / (1 + exp(-x))`; relative error below 1e-6. `exp(-x) = 2^n 2^f` with |f| <= 0.5,
    /// `2^f` by the Taylor polynomial of degree 7 of `exp(f ln 2)`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn silu(x: __m512) -> __m512 {
        let t = _mm512_mul_ps(x, splat(-std::f32::consts::LOG2_E));
        let t = _mm512_max_ps(_mm512_min_ps(t, splat(126.0)), splat(-126.0));
        let n = _mm512_roundscale_ps::<0>(t);
        let f = _mm512_mul_ps(_mm512_sub_ps(t, n), splat(std::f32::consts::LN_2));
        let mut e = splat(TAYLOR[0]);
        for &c in &TAYLOR[1..] {
            e = fma(e, f, splat(c));
        }
        let e = _mm512_scalef_ps(e, n);
        _mm512_div_ps(x, _mm512_add_ps(e, splat(1.0)))
    }
}

/// The same operations on 8 lanes.
mod v256 {
    use super::*;

    pub const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn zero() -> __m256 {
        _mm256_setzero_ps()
    }

    /// # Safety
    /// 8 floats can be read at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_loadu_ps(p) }
    }

    /// # Safety
    /// The lanes of `mask` can be read at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn load_masked(p: *const f32, mask: __m256i) -> __m256 {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_maskload_ps(p, mask) }
    }

    /// # Safety
    /// 8 floats can be written at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    /// # Safety
    /// The lanes of `mask` can be written at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn store_masked(p: *mut f32, mask: __m256i, v: __m256) {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_maskstore_ps(p, mask, v) }
    }

    /// # Safety
    /// 8 floats can be read and written at `p`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn add_to(p: *mut f32, v: __m256) {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), v)) }
    }

    /// Returns the mask of the first `lanes` lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn mask(lanes: usize) -> __m256i {
        let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), index)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn activate<const SILU: bool>(x: __m256, slope: __m256) -> __m256 {
        if SILU {
            silu(x)
        } else {
            _mm256_max_ps(x, _mm256_mul_ps(x, slope))
        }
    }

    /// Returns the SiLU as on 16 lanes; the power of two is made of its exponent bits.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn silu(x: __m256) -> __m256 {
        let t = _mm256_mul_ps(x, splat(-std::f32::consts::LOG2_E));
        let t = _mm256_max_ps(_mm256_min_ps(t, splat(126.0)), splat(-126.0));
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(t);
        let f = _mm256_mul_ps(_mm256_sub_ps(t, n), splat(std::f32::consts::LN_2));
        let mut e = splat(TAYLOR[0]);
        for &c in &TAYLOR[1..] {
            e = fma(e, f, splat(c));
        }
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
        let e = _mm256_mul_ps(e, power);
        _mm256_div_ps(x, _mm256_add_ps(e, splat(1.0)))
    }
}
