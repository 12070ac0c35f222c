//! Vectors of plain Rust.

use super::lanes::Lanes;

/// Lanes that the compiler vectorises for the baseline of the target.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Array<const N: usize>(pub(in crate::kernels) [f32; N]);

impl<const N: usize> Array<N> {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self.0;
        for (a, b) in out.iter_mut().zip(b.0) {
            *a = f(*a, b);
        }
        Self(out)
    }
}

impl<const M: usize> Lanes for Array<M> {
    const N: usize = M;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; M])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by the caller's promise, as in all of this file.
        Self(unsafe { p.cast::<[f32; M]>().read() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: by the caller's promise.
        unsafe { p.cast::<[f32; M]>().write(self.0) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        for (i, v) in self.0.into_iter().enumerate().take(n) {
            // SAFETY: by the caller's promise.
            unsafe { p.add(i).write(v) }
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        self.zip(b, |a, b| a * b).zip(c, |a, c| a + c)
    }
    #[inline(always)]
    unsafe fn neg_mul_add(self, b: Self, c: Self) -> Self {
        self.zip(b, |a, b| a * b).zip(c, |a, c| c - a)
    }
    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        Self(self.0.map(|v| {
            let bits = v.to_bits();
            f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
        }))
    }
}
