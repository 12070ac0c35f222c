//! Vectors of NEON.

use std::arch::{aarch64::*, asm};

use super::lanes::Lanes;

/// Four lanes.
pub(in crate::kernels) type F32x4 = Registers<1>;

/// Eight lanes in two registers: kernels for 8 lanes then have the sizes of those of AVX2.
pub(in crate::kernels) type F32x8 = Registers<2>;

/// Registers of four lanes each.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Registers<const R: usize>(pub(in crate::kernels) [float32x4_t; R]);

impl<const R: usize> Registers<R> {
    #[inline(always)]
    fn zip(mut self, b: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        for (a, b) in self.0.iter_mut().zip(b.0) {
            *a = f(*a, b);
        }
        self
    }

    #[inline(always)]
    fn zip3(
        mut self,
        b: Self,
        c: Self,
        f: impl Fn(float32x4_t, float32x4_t, float32x4_t) -> float32x4_t,
    ) -> Self {
        for ((a, b), c) in self.0.iter_mut().zip(b.0).zip(c.0) {
            *a = f(*a, b, c);
        }
        self
    }
}

impl<const R: usize> Lanes for Registers<R> {
    const N: usize = 4 * R;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: by the caller's promise, as in all of this file.
        Self([unsafe { vdupq_n_f32(x) }; R])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: by the caller's promise.
        Self(std::array::from_fn(|i| unsafe { vld1q_f32(p.add(4 * i)) }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for (i, v) in self.0.into_iter().enumerate() {
            // SAFETY: by the caller's promise.
            unsafe { vst1q_f32(p.add(4 * i), v) }
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize) {
        let mut lanes = [[0.0f32; 4]; R];
        // SAFETY: by the caller's promise.
        unsafe {
            if n == Self::N {
                return self.store(p);
            }
            self.store(lanes.as_mut_ptr().cast());
            p.copy_from_nonoverlapping(lanes.as_ptr().cast(), n);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: by the caller's promise.
        self.zip(b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: by the caller's promise.
        self.zip(b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: by the caller's promise.
        self.zip(b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: by the caller's promise.
        self.zip(b, |a, b| unsafe { vmaxq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: by the caller's promise.
        self.zip3(b, c, |a, b, c| unsafe { vfmaq_f32(c, a, b) })
    }
    #[inline(always)]
    unsafe fn neg_mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: by the caller's promise.
        self.zip3(b, c, |a, b, c| unsafe { vfmsq_f32(c, a, b) })
    }
    #[inline(always)]
    unsafe fn round_bf16(self) -> Self {
        // SAFETY: by the caller's promise.
        Self(self.0.map(|v| unsafe {
            let bits = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            vreinterpretq_f32_u32(vandq_u32(up, vdupq_n_u32(!0xffff)))
        }))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        for (i, v) in self.0.into_iter().enumerate() {
            // SAFETY: by the caller's promise. The intrinsic is not stable.
            unsafe {
                let out: uint16x4_t;
                asm!(
                    "bfcvtn {out:v}.4h, {v:v}.4s",
                    out = lateout(vreg) out, v = in(vreg) v,
                    options(pure, nomem, nostack, preserves_flags),
                );
                vst1_u16(p.add(4 * i), out);
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16(self, a: Self, b: Self) -> Self {
        // SAFETY: by the caller's promise. The intrinsic is not stable.
        self.zip3(a, b, |mut sum, a, b| unsafe {
            asm!(
                "bfdot {sum:v}.4s, {a:v}.8h, {b:v}.8h",
                sum = inlateout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
            sum
        })
    }
}
