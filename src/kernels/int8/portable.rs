//! Integer sums in plain Rust.

use super::{sizes::GROUP, sums::Sums};
use crate::kernels::simd::Array;

impl Sums for [i32; 8] {
    const N: usize = 8;
    const WEIGHTS: usize = 8 * GROUP;
    type Inputs = [u8; GROUP];
    type Weights = [[i8; GROUP]; 8];
    type Floats = Array<8>;

    #[inline(always)]
    unsafe fn start(_: *const i32) -> Self {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn inputs(p: *const u8) -> [u8; GROUP] {
        // SAFETY: by the caller's promise, here and below.
        unsafe { p.cast::<[u8; GROUP]>().read() }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> Self::Weights {
        // SAFETY: by the caller's promise.
        unsafe { p.cast::<Self::Weights>().read() }
    }
    #[inline(always)]
    unsafe fn dot(mut self, x: [u8; GROUP], w: Self::Weights) -> Self {
        for (sum, w) in self.iter_mut().zip(w) {
            *sum += (0..GROUP)
                .map(|i| i32::from(x[i]) * i32::from(w[i]))
                .sum::<i32>();
        }
        self
    }
    #[inline(always)]
    unsafe fn floats(self) -> Array<8> {
        Array(self.map(|v| v as f32))
    }
    #[inline(always)]
    unsafe fn fused(a: Array<8>, b: Array<8>, c: Array<8>) -> Array<8> {
        Array(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Array<8> {
        // SAFETY: by the caller's promise.
        Array(unsafe { p.cast::<[u8; 8]>().read() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn store(values: [Array<8>; 4], to: *mut u8, offsets: [usize; 4]) {
        for (values, offset) in values.into_iter().zip(offsets) {
            let codes = values
                .0
                .map(|v| v.round_ties_even().clamp(0.0, 255.0) as u8);
            // SAFETY: by the caller's promise.
            unsafe { to.add(offset).cast::<[u8; 8]>().write(codes) }
        }
    }
}
