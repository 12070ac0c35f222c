//! The loops, compiled for AVX-512 and AVX2.

use super::{
    gradient_loops::{Images, Sums, gradients},
    loops::{Format, Pairs, run},
    pack::Packed,
    sizes::SIDE,
    tiles::{Input, Output},
};
use crate::kernels::simd::{F32x4, F32x8, F32x16};

/// # Safety
/// As [`run`]; the CPU has AVX-512 F, VL and BF16, and FMA.
#[target_feature(enable = "avx512f,avx512vl,avx512bf16,fma")]
pub(super) unsafe fn run_avx512_bf16(
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Pairs, F32x16, F32x4, 8, 8, 8, 6>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`run`]; the CPU has AVX-512 F and FMA.
#[target_feature(enable = "avx512f,fma")]
pub(super) unsafe fn run_avx512<K: Format>(
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<K, F32x16, F32x4, 8, 8, 8, 6>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`run`]; the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run_avx2<K: Format>(
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<K, F32x8, F32x4, 8, 6, 4, 3>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`gradients`]; the CPU has AVX-512 F and FMA.
#[target_feature(enable = "avx512f,fma")]
pub(super) unsafe fn gradients_avx512(
    images: &Images,
    sums: &mut Sums,
    vectors: &[usize],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { gradients::<F32x16, 16, 12, 8, 6>(images, sums, vectors, scratch) }
}

/// # Safety
/// As [`gradients`]; the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn gradients_avx2(
    images: &Images,
    sums: &mut Sums,
    vectors: &[usize],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { gradients::<F32x8, 8, 6, 1, 1>(images, sums, vectors, scratch) }
}
