//! Vectors of AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Four lanes of AVX2 with FMA.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct F32x4(__m128);

/// Eight lanes of AVX2 with FMA.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct F32x8(pub(in crate::kernels) __m256);

/// Sixteen lanes of AVX-512 F.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct F32x16(pub(in crate::kernels) __m512);

/// Implements [`Lanes`] by intrinsics whose names differ by a prefix.
macro_rules! lanes {
    ($name:ident, $n:literal, $set1:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident, $max:ident,
     $fmadd:ident, $fnmadd:ident, $store_first:expr, $round:expr, {$($more:item)*}) => {
        impl Lanes for $name {
            const N: usize = $n;

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $set1(x) })
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $load(p) })
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut f32) {
                // SAFETY: by the caller's promise.
                unsafe { $store(p, self.0) }
            }
            #[inline(always)]
            unsafe fn store_first(self, p: *mut f32, n: usize) {
                // SAFETY: by the caller's promise.
                unsafe { $store_first(p, self.0, n) }
            }
            #[inline(always)]
            unsafe fn add(self, b: Self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $add(self.0, b.0) })
            }
            #[inline(always)]
            unsafe fn sub(self, b: Self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $sub(self.0, b.0) })
            }
            #[inline(always)]
            unsafe fn mul(self, b: Self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $mul(self.0, b.0) })
            }
            #[inline(always)]
            unsafe fn max(self, b: Self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $max(self.0, b.0) })
            }
            #[inline(always)]
            unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $fmadd(self.0, b.0, c.0) })
            }
            #[inline(always)]
            unsafe fn neg_mul_add(self, b: Self, c: Self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $fnmadd(self.0, b.0, c.0) })
            }
            #[inline(always)]
            unsafe fn round_bf16(self) -> Self {
                // SAFETY: by the caller's promise.
                Self(unsafe { $round(self.0) })
            }
            $($more)*
        }
    };
}

lanes!(
    F32x16,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_sub_ps,
    _mm512_mul_ps,
    _mm512_max_ps,
    _mm512_fmadd_ps,
    _mm512_fnmadd_ps,
    |p, v, n: usize| _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as __mmask16, v),
    |v| {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(!0xffff)))
    },
    {
        #[inline(always)]
        unsafe fn store_bf16(self, p: *mut u16) {
            // SAFETY: by the caller's promise; the types differ in name only.
            unsafe {
                let v: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(self.0));
                _mm256_storeu_si256(p.cast(), v);
            }
        }
        #[inline(always)]
        unsafe fn dot_bf16(self, a: Self, b: Self) -> Self {
            // SAFETY: by the caller's promise; the types differ in name only.
            unsafe {
                let (a, b) = (
                    std::mem::transmute::<__m512, __m512bh>(a.0),
                    std::mem::transmute::<__m512, __m512bh>(b.0),
                );
                Self(_mm512_dpbf16_ps(self.0, a, b))
            }
        }
    }
);

lanes!(
    F32x8,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_sub_ps,
    _mm256_mul_ps,
    _mm256_max_ps,
    _mm256_fmadd_ps,
    _mm256_fnmadd_ps,
    |p, v, n: usize| {
        let index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), index), v)
    },
    |v| {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(!0xffff)))
    },
    {}
);

lanes!(
    F32x4,
    4,
    _mm_set1_ps,
    _mm_loadu_ps,
    _mm_storeu_ps,
    _mm_add_ps,
    _mm_sub_ps,
    _mm_mul_ps,
    _mm_max_ps,
    _mm_fmadd_ps,
    _mm_fnmadd_ps,
    |p, v, n: usize| {
        let index = _mm_setr_epi32(0, 1, 2, 3);
        _mm_maskstore_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32(n as i32), index), v)
    },
    |v| {
        let bits = _mm_castps_si128(v);
        let odd = _mm_and_si128(_mm_srli_epi32::<16>(bits), _mm_set1_epi32(1));
        let up = _mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
        _mm_castsi128_ps(_mm_and_si128(up, _mm_set1_epi32(!0xffff)))
    },
    {
        #[inline(always)]
        unsafe fn store_bf16(self, p: *mut u16) {
            // SAFETY: by the caller's promise; the types differ in name only.
            unsafe {
                let v: __m128i = std::mem::transmute(_mm_cvtneps_pbh(self.0));
                _mm_storel_epi64(p.cast(), v);
            }
        }
    }
);
