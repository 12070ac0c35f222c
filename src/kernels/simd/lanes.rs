//! The interface of vectors of f32: a kernel is written once and compiled for each instruction set.
//!
//! Kernels are generic over [`Lanes`] and always inlined into a function that enables the
//! instruction set.

/// A vector of `N` f32 lanes.
///
/// # Safety
/// For every method: the CPU has the instruction set. For methods with a pointer: the lanes that
/// are read or written lie in the allocation that the pointer comes from.
pub(in crate::kernels) trait Lanes: Copy {
    /// Number of lanes, at most 16.
    const N: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// Stores the first `n` lanes, 0 to `N`.
    unsafe fn store_first(self, p: *mut f32, n: usize);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn max(self, b: Self) -> Self;
    /// `self * b + c`, rounded once where the instruction set can.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded as in [`Self::mul_add`].
    unsafe fn neg_mul_add(self, b: Self, c: Self) -> Self;
    /// Rounds numbers to the nearest bfloat16, ties to even. NaNs are not handled.
    unsafe fn round_bf16(self) -> Self;
    /// Stores the lanes as bfloat16; needs [`Avx512Bf16`](crate::kernels::cpu::proof::Avx512Bf16)
    /// or [`NeonBf16`](crate::kernels::cpu::proof::NeonBf16).
    unsafe fn store_bf16(self, p: *mut u16) {
        let _ = p;
        unreachable!("vectors with instructions for bfloat16 only");
    }
    /// Adds to each lane the products of the two bfloat16 in its bits, on the CPUs of
    /// [`Self::store_bf16`].
    unsafe fn dot_bf16(self, a: Self, b: Self) -> Self {
        let _ = (a, b);
        unreachable!("vectors with instructions for bfloat16 only");
    }
}
