//! Integer sums of NEON, with and without its dot products.
//!
//! Except for those of i8mm they multiply signed integers. Codes are therefore moved to -128 to
//! 127, and the sums begin with 128 times the weights ([`Packed::start`]).

use std::arch::{aarch64::*, asm};

use super::{
    sizes::GROUP,
    sums::{Packed, Rows, Sums, run},
};
use crate::kernels::simd::{F32x8, Registers};

/// # Safety
/// As [`run`]; the CPU has NEON and its dot products of unsigned and signed integers.
#[target_feature(enable = "neon,i8mm")]
pub unsafe fn run_i8mm(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Sums8<MIXED_DOT>, 8, 4, 0>(layer, rows) }
}

/// # Safety
/// As [`run`]; the CPU has NEON and its dot products.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn run_dot(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Sums8<SIGNED_DOT>, 8, 4, 0>(layer, rows) }
}

/// # Safety
/// As [`run`]; the CPU has NEON.
#[target_feature(enable = "neon")]
pub unsafe fn run_neon(layer: &Packed, rows: &Rows) {
    // SAFETY: by the caller's promise.
    unsafe { run::<Sums8<PRODUCTS>, 8, 4, 0>(layer, rows) }
}

/// Ways to multiply: single products, dot products of signed integers, and dot products of unsigned
/// and signed ones.
const PRODUCTS: u8 = 0;
const SIGNED_DOT: u8 = 1;
const MIXED_DOT: u8 = 2;

/// Eight sums. For dot products a register of weights has four channels of four outputs, otherwise
/// two channels of all outputs.
#[derive(Clone, Copy)]
struct Sums8<const WAY: u8>([int32x4_t; 2]);

impl<const WAY: u8> Sums for Sums8<WAY> {
    const N: usize = 8;
    const WEIGHTS: usize = 8 * GROUP;
    type Inputs = [int8x16_t; 2];
    type Weights = [int8x16_t; 2];
    type Floats = F32x8;

    #[inline(always)]
    unsafe fn start(p: *const i32) -> Self {
        // SAFETY: by the caller's promise, as in all of this file.
        Self(unsafe { [vld1q_s32(p), vld1q_s32(p.add(4))] })
    }
    #[inline(always)]
    unsafe fn inputs(p: *const u8) -> Self::Inputs {
        // SAFETY: by the caller's promise.
        unsafe {
            let codes = vdupq_n_u32(p.cast::<u32>().read_unaligned());
            if WAY == MIXED_DOT {
                return [vreinterpretq_s8_u32(codes); 2];
            }
            let moved = vreinterpretq_s16_u32(veorq_u32(codes, vdupq_n_u32(0x8080_8080)));
            if WAY == SIGNED_DOT {
                return [vreinterpretq_s8_s16(moved); 2];
            }
            let (even, odd) = (vtrn1q_s16(moved, moved), vtrn2q_s16(moved, moved));
            [even, odd].map(|pair| vreinterpretq_s8_s16(pair))
        }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> Self::Weights {
        // SAFETY: by the caller's promise.
        unsafe { [vld1q_s8(p.cast()), vld1q_s8(p.add(16).cast())] }
    }
    #[inline(always)]
    unsafe fn dot(self, x: Self::Inputs, w: Self::Weights) -> Self {
        let [a, b] = self.0;
        // SAFETY: by the caller's promise.
        unsafe {
            match WAY {
                MIXED_DOT => return Self([usdot(a, x[0], w[0]), usdot(b, x[1], w[1])]),
                SIGNED_DOT => return Self([sdot(a, x[0], w[0]), sdot(b, x[1], w[1])]),
                _ => {}
            }
            // Two products of at most 128 times 127 fit in 16 bits.
            let low = vmull_s8(vget_low_s8(x[0]), vget_low_s8(w[0]));
            let low = vmlal_s8(low, vget_low_s8(x[1]), vget_low_s8(w[1]));
            let high = vmlal_high_s8(vmull_high_s8(x[0], w[0]), x[1], w[1]);
            Self([vpadalq_s16(a, low), vpadalq_s16(b, high)])
        }
    }
    #[inline(always)]
    unsafe fn floats(self) -> F32x8 {
        // SAFETY: by the caller's promise.
        Registers(self.0.map(|v| unsafe { vcvtq_f32_s32(v) }))
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> F32x8 {
        // SAFETY: by the caller's promise.
        unsafe {
            let words = vmovl_u8(vld1_u8(p));
            let (low, high) = (vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words));
            Registers([vcvtq_f32_u32(low), vcvtq_f32_u32(high)])
        }
    }
    #[inline(always)]
    unsafe fn store(values: [F32x8; 4], to: *mut u8, offsets: [usize; 4]) {
        for (values, offset) in values.into_iter().zip(offsets) {
            // SAFETY: by the caller's promise. Every conversion saturates.
            unsafe {
                let [low, high] = values.0.map(|v| vqmovn_s32(vcvtnq_s32_f32(v)));
                vst1_u8(to.add(offset), vqmovun_s16(vcombine_s16(low, high)));
            }
        }
    }
}

/// Adds to each lane the products of its four bytes. The intrinsic is not stable.
///
/// # Safety
/// The CPU has the dot products of NEON.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {x:v}.16b, {w:v}.16b",
            sum = inlateout(vreg) sum, x = in(vreg) x, w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// As [`sdot`], with unsigned bytes in `x`.
///
/// # Safety
/// The CPU has i8mm.
#[inline(always)]
unsafe fn usdot(mut sum: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "usdot {sum:v}.4s, {x:v}.16b, {w:v}.16b",
            sum = inlateout(vreg) sum, x = in(vreg) x, w = in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
