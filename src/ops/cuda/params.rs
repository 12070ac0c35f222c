//! Parameter structures of kernels. Their fields are those in `kernels/layers.cu`.

/// A parameter structure of a kernel.
///
/// # Safety
/// The type is `repr(C)`, holds only numbers, has no padding, and its size is a multiple of 8
/// bytes.
pub unsafe trait Params: Copy {
    /// Returns the structure as words, with the alignment of kernel parameters.
    fn words(&self) -> Vec<u64> {
        let mut words = vec![0; size_of::<Self>() / 8];
        // SAFETY: the length is that of the structure, which has no padding.
        unsafe {
            std::ptr::copy_nonoverlapping(
                std::ptr::from_ref(self).cast::<u8>(),
                words.as_mut_ptr().cast(),
                size_of::<Self>(),
            );
        }
        words
    }

    /// Returns the structure of the words of [`Self::words`].
    ///
    /// # Panics
    /// If the number of words is wrong.
    #[cfg(any(test, feature = "emulator"))]
    fn from_words(words: &[u64]) -> Self {
        assert_eq!(words.len() * 8, size_of::<Self>());
        // SAFETY: the length is that of the structure, and all bit patterns are valid.
        unsafe { words.as_ptr().cast::<Self>().read() }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    pub n: u32,
    pub h: u32,
    pub w: u32,
    pub ci: u32,
    pub oh: u32,
    pub ow: u32,
    pub co: u32,
    pub kh: u32,
    pub kw: u32,
    pub stride: u32,
    pub pad: u32,
    pub up: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Conv {
    pub x: u64,
    pub weight: u64,
    pub bias: u64,
    pub residual: u64,
    pub y: u64,
    pub shape: Shape,
    pub activation: u32,
    pub slope: f32,
    pub reversed: u32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct WeightGrad {
    pub x: u64,
    pub dy: u64,
    pub partials: u64,
    pub shape: Shape,
    pub step: u32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Norm {
    pub x: u64,
    pub weight: u64,
    pub bias: u64,
    pub partials: u64,
    pub y: u64,
    pub n: u32,
    pub pixels: u32,
    pub c: u32,
    pub groups: u32,
    pub chunks: u32,
    pub affine: u32,
    pub activation: u32,
    pub eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attention {
    pub qkv: u64,
    pub bias: u64,
    pub y: u64,
    pub n: u32,
    pub h: u32,
    pub w: u32,
    pub heads: u32,
    pub window_h: u32,
    pub window_w: u32,
    pub shift: u32,
    pub scale: f32,
}

// SAFETY: all fields are numbers, and the sizes below are the sums of the fields' sizes.
unsafe impl Params for Conv {}
// SAFETY: as above.
unsafe impl Params for WeightGrad {}
// SAFETY: as above.
unsafe impl Params for Norm {}
// SAFETY: as above.
unsafe impl Params for Attention {}

// The kernels' source asserts the same sizes.
const _: () = assert!(
    size_of::<Conv>() == 104
        && size_of::<WeightGrad>() == 80
        && size_of::<Norm>() == 72
        && size_of::<Attention>() == 56
);
