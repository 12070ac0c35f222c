//! Memory for large results, and pointers into them.

use std::{
    fmt,
    marker::PhantomData,
    mem::{MaybeUninit, size_of_val},
};

/// A cache line. In memory of lines, a vector that begins at a multiple of its size lies in one
/// line. The load of a vector from two lines takes twice as long.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
pub struct Line(#[expect(dead_code, reason = "only memory")] [f32; 16]);

/// A copy of numbers that begins with a cache line.
#[derive(Clone)]
pub(in crate::kernels) struct AlignedCopy<T> {
    lines: Vec<Line>,
    numbers: PhantomData<T>,
}

impl<T: Copy> AlignedCopy<T> {
    pub fn new(numbers: &[T]) -> Self {
        let mut lines = vec![Line::default(); size_of_val(numbers).div_ceil(size_of::<Line>())];
        // SAFETY: the lines are at least as long as the numbers.
        unsafe {
            lines
                .as_mut_ptr()
                .cast::<T>()
                .copy_from_nonoverlapping(numbers.as_ptr(), numbers.len());
        }
        Self {
            lines,
            numbers: PhantomData,
        }
    }

    /// Returns the address of the first number.
    pub fn as_ptr(&self) -> *const T {
        self.lines.as_ptr().cast()
    }
}

impl<T> fmt::Debug for AlignedCopy<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} cache lines", self.lines.len())
    }
}

/// Returns the part of `scratch` that begins with a cache line and has `len` floats, and lengthens
/// `scratch` if necessary.
pub(in crate::kernels) fn aligned(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    const FLOATS: usize = size_of::<Line>() / size_of::<f32>();
    if scratch.len() < len + FLOATS {
        scratch.resize(len + FLOATS, 0.0);
    }
    let start = scratch.as_ptr().align_offset(size_of::<Line>()).min(FLOATS);
    &mut scratch[start..start + len]
}

/// A pointer that threads share; they write disjoint parts.
pub(in crate::kernels) struct SendPtr(pub *mut f32);
// SAFETY: by the promise of the type.
unsafe impl Sync for SendPtr {}

/// Returns `len` values that `fill` writes: as [`zeros`], without the pass that zeroes memory which
/// the allocator reuses.
///
/// # Safety
/// `fill` writes every value.
pub(in crate::kernels) unsafe fn filled(
    len: usize,
    fill: impl FnOnce(&mut [MaybeUninit<f32>]),
) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    let room = &mut values.spare_capacity_mut()[..len];
    advise_large_pages(room);
    fill(room);
    // SAFETY: there is room for as many, and by the caller's promise they are written.
    unsafe { values.set_len(len) };
    values
}

/// Returns `len` zeros in memory that the operating system may back with large pages.
///
/// The first write to a fresh page of 4 KiB is a fault of about 0.4 us: a map of 256x256 pixels and
/// 128 channels (34 MB) costs 15 ms, four times as long as filling it. Pages of 2 MiB reduce that
/// to 4 ms.
pub fn zeros(len: usize) -> Vec<f32> {
    let mut zeros = vec![0.0; len];
    advise_large_pages(&mut zeros);
    zeros
}

#[cfg(target_os = "linux")]
fn advise_large_pages<T>(values: &mut [T]) {
    const LARGE: usize = 2 << 20;
    const MADV_HUGEPAGE: std::ffi::c_int = 14;
    unsafe extern "C" {
        fn madvise(
            addr: *mut std::ffi::c_void,
            len: usize,
            advice: std::ffi::c_int,
        ) -> std::ffi::c_int;
    }
    let bytes = std::mem::size_of_val(values);
    // Smaller blocks come from the heap, which stays mapped.
    if bytes < 4 * LARGE {
        return;
    }
    let first = values.as_mut_ptr().cast::<std::ffi::c_void>();
    let skip = first.align_offset(LARGE).min(bytes);
    let len = (bytes - skip) / LARGE * LARGE;
    // SAFETY: the range lies within the slice; the advice changes no contents, and a system that
    // does not know it ignores it.
    unsafe { madvise(first.byte_add(skip), len, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages<T>(_: &mut [T]) {}

#[cfg(test)]
mod tests {
    #[test]
    fn zeros_of_every_size_are_zeros() {
        for len in [0, 1, 1000, 3 << 20, (5 << 20) + 7] {
            let zeros = super::zeros(len);
            assert!(zeros.len() == len && zeros.iter().all(|&v| v == 0.0));
        }
    }
}
