//! Integer sums of AVX-512 VNNI, AVX-VNNI and AVX2.

use std::arch::x86_64::*;

use super::{
    narrow::{self, PixelSums},
    sizes::GROUP,
    sums::{Packed, Rows, Sums, run},
};
use crate::kernels::simd::{F32x8, F32x16};

/// # Safety
/// As [`run`]; the CPU has AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
pub unsafe fn run_avx512_vnni(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe {
        match layer.input_step {
            4 => run::<Vnni512, 16, 12, 4>(layer, rows),
            16 => run::<Vnni512, 16, 12, 16>(layer, rows),
            32 => run::<Vnni512, 16, 12, 32>(layer, rows),
            64 => run::<Vnni512, 16, 12, 64>(layer, rows),
            _ => run::<Vnni512, 16, 12, 0>(layer, rows),
        }
    }
}

/// # Safety
/// As [`run`]; the CPU has AVX-512 F, VL and VNNI.
#[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512vnni")]
pub unsafe fn run_avx512_vnni_short(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Vnni256<false>, 8, 4, 0>(layer, rows) }
}

/// # Safety
/// As [`run`]; the CPU has AVX2, FMA and AVX-VNNI.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub unsafe fn run_avx_vnni(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Vnni256<true>, 8, 4, 0>(layer, rows) }
}

/// # Safety
/// As [`narrow::run`]; the CPU has AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma")]
pub unsafe fn run_avx512_vnni_narrow(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { narrow::run::<Vnni512, 6>(layer, rows) }
}

/// # Safety
/// As [`narrow::run`]; the CPU has AVX-512 F, VL and VNNI.
#[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512vnni")]
pub unsafe fn run_avx512_vnni_short_narrow(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { narrow::run::<Vnni256<false>, 2>(layer, rows) }
}

/// # Safety
/// As [`narrow::run`]; the CPU has AVX2, FMA and AVX-VNNI.
#[target_feature(enable = "avx2,fma,avxvnni")]
pub unsafe fn run_avx_vnni_narrow(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { narrow::run::<Vnni256<true>, 2>(layer, rows) }
}

/// # Safety
/// As [`run`]; the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn run_avx2(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Words, 8, 4, 0>(layer, rows) }
}

#[derive(Clone, Copy)]
struct Vnni512(__m512i);

impl Sums for Vnni512 {
    const N: usize = 16;
    const WEIGHTS: usize = 16 * GROUP;
    type Inputs = __m512i;
    type Weights = __m512i;
    type Floats = F32x16;

    #[inline(always)]
    unsafe fn start(_: *const i32) -> Self {
        // SAFETY: by the caller's promise, as in all of this file.
        Self(unsafe { _mm512_setzero_si512() })
    }
    #[inline(always)]
    unsafe fn inputs(p: *const u8) -> __m512i {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> __m512i {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn dot(self, x: __m512i, w: __m512i) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { _mm512_dpbusd_epi32(self.0, x, w) })
    }
    #[inline(always)]
    unsafe fn floats(self) -> F32x16 {
        // SAFETY: by the caller's promise.
        F32x16(unsafe { _mm512_cvtepi32_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> F32x16 {
        // SAFETY: by the caller's promise.
        F32x16(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn store(values: [F32x16; 4], to: *mut u8, offsets: [usize; 4]) {
        // SAFETY: by the caller's promise.
        unsafe {
            // Floats beyond the integers would become the smallest one.
            let max = _mm512_set1_ps(255.0);
            let [a, b, c, d] = values.map(|v| _mm512_cvtps_epi32(_mm512_min_ps(v.0, max)));
            // Packing leaves a quarter of each vector in every 128 bits.
            let mixed = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let codes = _mm512_permutexvar_epi32(order, mixed);
            if offsets[3] == offsets[0] + 48 {
                return _mm512_storeu_si512(to.add(offsets[0]).cast(), codes);
            }
            _mm_storeu_si128(
                to.add(offsets[0]).cast(),
                _mm512_extracti32x4_epi32::<0>(codes),
            );
            _mm_storeu_si128(
                to.add(offsets[1]).cast(),
                _mm512_extracti32x4_epi32::<1>(codes),
            );
            _mm_storeu_si128(
                to.add(offsets[2]).cast(),
                _mm512_extracti32x4_epi32::<2>(codes),
            );
            _mm_storeu_si128(
                to.add(offsets[3]).cast(),
                _mm512_extracti32x4_epi32::<3>(codes),
            );
        }
    }
}

/// Defines the methods that vectors of eight sums share.
macro_rules! eight_sums {
    () => {
        const N: usize = 8;
        type Floats = F32x8;

        #[inline(always)]
        unsafe fn start(_: *const i32) -> Self {
            // SAFETY: by the caller's promise.
            Self(unsafe { _mm256_setzero_si256() })
        }
        #[inline(always)]
        unsafe fn floats(self) -> F32x8 {
            // SAFETY: by the caller's promise.
            F32x8(unsafe { _mm256_cvtepi32_ps(self.0) })
        }
        #[inline(always)]
        unsafe fn load(p: *const u8) -> F32x8 {
            // SAFETY: by the caller's promise.
            F32x8(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) })
        }
        #[inline(always)]
        unsafe fn store(values: [F32x8; 4], to: *mut u8, offsets: [usize; 4]) {
            for (values, offset) in values.into_iter().zip(offsets) {
                // SAFETY: by the caller's promise.
                unsafe {
                    // Floats beyond the integers would become the smallest one.
                    let values = _mm256_min_ps(values.0, _mm256_set1_ps(255.0));
                    let codes = _mm256_cvtps_epi32(values);
                    let high = _mm256_extracti128_si256::<1>(codes);
                    let words = _mm_packs_epi32(_mm256_castsi256_si128(codes), high);
                    _mm_storel_epi64(to.add(offset).cast(), _mm_packus_epi16(words, words));
                }
            }
        }
    };
}

/// With the instruction of AVX-VNNI, or with that of AVX-512 VNNI.
#[derive(Clone, Copy)]
struct Vnni256<const AVX: bool>(__m256i);

impl<const AVX: bool> Sums for Vnni256<AVX> {
    eight_sums!();
    const WEIGHTS: usize = 8 * GROUP;
    type Inputs = __m256i;
    type Weights = __m256i;

    #[inline(always)]
    unsafe fn inputs(p: *const u8) -> __m256i {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> __m256i {
        // SAFETY: by the caller's promise.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn dot(self, x: __m256i, w: __m256i) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe {
            match AVX {
                true => _mm256_dpbusd_avx_epi32(self.0, x, w),
                false => _mm256_dpbusd_epi32(self.0, x, w),
            }
        })
    }
}

impl PixelSums for Vnni512 {
    #[inline(always)]
    unsafe fn total(channels: [Self; 4]) -> Self {
        let [a, b, c, d] = channels.map(|sums| sums.0);
        // SAFETY: by the caller's promise.
        unsafe {
            let low = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let high = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            Self(_mm512_add_epi32(
                _mm512_unpacklo_epi64(low, high),
                _mm512_unpackhi_epi64(low, high),
            ))
        }
    }
}

impl<const AVX: bool> PixelSums for Vnni256<AVX> {
    #[inline(always)]
    unsafe fn total(channels: [Self; 4]) -> Self {
        let [a, b, c, d] = channels.map(|sums| sums.0);
        // SAFETY: by the caller's promise.
        unsafe {
            let low = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let high = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            Self(_mm256_add_epi32(
                _mm256_unpacklo_epi64(low, high),
                _mm256_unpackhi_epi64(low, high),
            ))
        }
    }
}

/// Sums of products of 16-bit integers: those of 8 bits would saturate.
#[derive(Clone, Copy)]
struct Words(__m256i);

impl Sums for Words {
    eight_sums!();
    const WEIGHTS: usize = 8 * GROUP * 2;
    /// Channels 0 and 1, channels 2 and 3.
    type Inputs = [__m256i; 2];
    type Weights = [__m256i; 2];

    #[inline(always)]
    unsafe fn inputs(p: *const u8) -> [__m256i; 2] {
        // SAFETY: by the caller's promise.
        unsafe {
            let codes = _mm_set1_epi32(p.cast::<i32>().read_unaligned());
            let words = _mm256_cvtepu8_epi16(codes);
            [
                _mm256_shuffle_epi32::<0b00_00_00_00>(words),
                _mm256_shuffle_epi32::<0b01_01_01_01>(words),
            ]
        }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> [__m256i; 2] {
        // SAFETY: by the caller's promise.
        unsafe {
            [
                _mm256_loadu_si256(p.cast()),
                _mm256_loadu_si256(p.add(32).cast()),
            ]
        }
    }
    #[inline(always)]
    unsafe fn dot(self, x: [__m256i; 2], w: [__m256i; 2]) -> Self {
        // SAFETY: by the caller's promise.
        unsafe {
            let sums = _mm256_add_epi32(self.0, _mm256_madd_epi16(x[0], w[0]));
            Self(_mm256_add_epi32(sums, _mm256_madd_epi16(x[1], w[1])))
        }
    }
}
