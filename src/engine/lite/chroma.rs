//! Resampling of chroma planes between frames and latents. Chroma of a latent has half the width
//! and height of its luma.

use crate::frame::{
    Component::U,
    FrameInfo,
    resample::{Axis, Kernel, Options},
};

/// Returns width and height of a latent's chroma planes for frames `dst`.
pub(super) fn half(dst: &FrameInfo) -> (usize, usize) {
    (dst.width.div_ceil(2), dst.height.div_ceil(2))
}

/// Returns the horizontal and vertical axis that shrink the chroma of frames `dst` to the size
/// [`half`], and the two axes that enlarge it again. Returns `None` if chroma already has that
/// size.
///
/// RGB frames are converted to luma and chroma of the size of the frame.
pub(super) fn axes(dst: &FrameInfo) -> Option<[[Axis; 2]; 2]> {
    let (width, height) = match dst.format.component(U) {
        Some(_) => dst.format.component_size(U, dst.width, dst.height),
        None => (dst.width, dst.height),
    };
    let half = half(dst);
    let axis = |from, to, kernel, antialias| {
        let options = Options {
            antialias,
            ..Options::default()
        };
        Axis::new(from, to, kernel, options)
    };
    let shrink = |from, to| axis(from, to, Kernel::Area, true);
    let grow = |from, to| axis(from, to, Kernel::Bilinear, false);
    (half != (width, height)).then(|| {
        [
            [shrink(width, half.0), shrink(height, half.1)],
            [grow(half.0, width), grow(half.1, height)],
        ]
    })
}
