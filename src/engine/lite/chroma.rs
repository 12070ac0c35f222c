//! Conversion between the chroma planes of frames and of latents, which have half the luma's size.

use crate::frame::{
    Component::U,
    FrameInfo,
    resample::{Axis, Kernel, Options},
};

/// Returns width and height of a latent's chroma planes for frames `dst`.
pub(super) fn half(dst: &FrameInfo) -> (usize, usize) {
    (dst.width.div_ceil(2), dst.height.div_ceil(2))
}

/// Returns the horizontal and vertical axis from the chroma of frames `dst` to the size [`half`],
/// and the two axes back. Chroma of RGB has the size of the frame. `None` if the sizes are equal.
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
