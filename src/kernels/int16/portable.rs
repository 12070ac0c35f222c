//! Vectors in plain Rust.

use super::{
    loops::{Sums, Words},
    sizes::{LARGEST, PADDED, SUMS},
};
use crate::kernels::simd::Array;

impl Words for [i16; PADDED] {
    #[inline(always)]
    unsafe fn load(p: *const i16) -> Self {
        // SAFETY: by the caller's promise, here and below.
        unsafe { p.cast::<Self>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i16) {
        // SAFETY: by the caller's promise.
        unsafe { p.cast::<Self>().write(self) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        std::array::from_fn(|i| self[i] - b[i])
    }
    #[inline(always)]
    unsafe fn twice(self) -> Self {
        self.map(|v| 2 * v)
    }
    #[inline(always)]
    unsafe fn four_times(self) -> Self {
        self.map(|v| 4 * v)
    }
}

/// Sums, or pairs in their halves.
#[derive(Clone, Copy)]
pub(super) struct Integers([i32; SUMS]);

impl Sums for Integers {
    type Floats = Array<SUMS>;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0; SUMS])
    }
    #[inline(always)]
    unsafe fn splat(p: *const i16) -> Self {
        // SAFETY: by the caller's promise.
        Self([unsafe { p.cast::<i32>().read_unaligned() }; SUMS])
    }
    #[inline(always)]
    unsafe fn load(p: *const i16) -> Self {
        // SAFETY: by the caller's promise.
        Self(unsafe { p.cast::<[i32; SUMS]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i32) {
        // SAFETY: by the caller's promise.
        unsafe { p.cast::<[i32; SUMS]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn dot(self, x: Self, w: Self) -> Self {
        let low = |v: i32| i32::from(v as i16);
        Self(std::array::from_fn(|i| {
            let (x, w) = (x.0[i], w.0[i]);
            self.0[i] + low(x) * low(w) + (x >> 16) * (w >> 16)
        }))
    }
    #[inline(always)]
    unsafe fn floats(p: *const i32) -> Array<SUMS> {
        // SAFETY: by the caller's promise.
        Array(unsafe { p.cast::<[i32; SUMS]>().read() }.map(|v| v as f32))
    }
    #[inline(always)]
    unsafe fn codes(p: *const i16) -> Array<SUMS> {
        // SAFETY: by the caller's promise.
        Array(unsafe { p.cast::<[i16; SUMS]>().read() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn store_codes(values: Array<SUMS>, p: *mut i16) {
        let most = f32::from(LARGEST);
        let code = |v: f32| v.round_ties_even().clamp(-most, most) as i16;
        // SAFETY: by the caller's promise.
        unsafe { p.cast::<[i16; SUMS]>().write(values.0.map(code)) }
    }
    #[inline(always)]
    unsafe fn fused(a: Array<SUMS>, b: Array<SUMS>, c: Array<SUMS>) -> Array<SUMS> {
        Array(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
    }
}
