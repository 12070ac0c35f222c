//! Vectors of AVX2.

use std::arch::x86_64::*;

use super::{
    loops::{Packed, Rows, Sums, Words, run},
    sizes::LARGEST,
};
use crate::kernels::simd::F32x8;

/// # Safety
/// As [`run`]; the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run_avx2(layer: &Packed, rows: &Rows, scratch: &mut [f32]) {
    // SAFETY: by the caller's promise.
    unsafe {
        match [layer.input_step(), layer.output_step()] {
            [16, 16] => run::<Shorts, Integers, 12, 6, 16>(layer, rows, scratch),
            [32, 32] => run::<Shorts, Integers, 12, 6, 32>(layer, rows, scratch),
            [64, 64] => run::<Shorts, Integers, 12, 6, 64>(layer, rows, scratch),
            _ => run::<Shorts, Integers, 12, 6, 0>(layer, rows, scratch),
        }
    }
}

#[derive(Clone, Copy)]
struct Shorts(__m256i);

impl Words for Shorts {
    #[inline(always)]
    unsafe fn load(p: *const i16) -> Self {
        // SAFETY: by the caller's promise, as in all of this file.
        Self(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i16) {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_storeu_si256(p.cast(), self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_add_epi16(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_sub_epi16(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn twice(self) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_add_epi16(self.0, self.0) })
    }
    #[inline(always)]
    unsafe fn four_times(self) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_slli_epi16::<2>(self.0) })
    }
}

#[derive(Clone, Copy)]
struct Integers(__m256i);

impl Sums for Integers {
    type Floats = F32x8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_setzero_si256() })
    }
    #[inline(always)]
    unsafe fn splat(p: *const i16) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) })
    }
    #[inline(always)]
    unsafe fn load(p: *const i16) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i32) {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_storeu_si256(p.cast(), self.0) }
    }
    #[inline(always)]
    unsafe fn dot(self, x: Self, w: Self) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm256_add_epi32(self.0, _mm256_madd_epi16(x.0, w.0)) })
    }
    #[inline(always)]
    unsafe fn floats(p: *const i32) -> F32x8 {
        // SAFETY: by the caller's promise.
        F32x8(unsafe { _mm256_cvtepi32_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn codes(p: *const i16) -> F32x8 {
        // SAFETY: by the caller's promise.
        F32x8(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn store_codes(values: F32x8, p: *mut i16) {
        // SAFETY: by the caller's promise.
        unsafe {
            // Floats beyond the integers would become the smallest one.
            let most = _mm256_set1_ps(f32::from(LARGEST));
            let codes = _mm256_cvtps_epi32(_mm256_min_ps(values.0, most));
            let high = _mm256_extracti128_si256::<1>(codes);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(codes), high);
            let codes = _mm_max_epi16(words, _mm_set1_epi16(-LARGEST));
            _mm_storeu_si128(p.cast(), codes);
        }
    }
}
