//! The loops, compiled for NEON.

use super::{
    gradient_loops::{Images, Sums, gradients},
    loops::{Format, Pairs, run},
    pack::Packed,
    sizes::SIDE,
    tiles::{Input, Output},
};
use crate::kernels::simd::{F32x4, F32x8};

/// # Safety
/// As [`run`]; the CPU has NEON and BF16.
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn run_bf16(
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Pairs, F32x8, F32x4, 8, 6, 1, 1>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`run`]; the CPU has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run_neon<K: Format>(
    w: &Packed,
    inputs: &[Input<SIDE>],
    outputs: &[Output],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { run::<K, F32x8, F32x4, 8, 6, 1, 1>(w, inputs, outputs, scratch) }
}

/// # Safety
/// As [`gradients`]; the CPU has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn gradients_neon(
    images: &Images,
    sums: &mut Sums,
    vectors: &[usize],
    scratch: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { gradients::<F32x8, 8, 6, 1, 1>(images, sums, vectors, scratch) }
}
