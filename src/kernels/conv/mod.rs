//! Direct 2-d convolution, NHWC f32, forward and both gradients.
//!
//! In NHWC the window of an output pixel is, for every kernel row, one run of `kw * ci` contiguous
//! floats, at any stride. A tile of neighbouring output pixels times a few vectors of output
//! channels lives in registers; the inner loop broadcasts one input value per pixel against the
//! packed weights. Nothing is rearranged in memory but the weights and, at the left and right
//! borders, the few input columns of one tile, to pad them with zeros.
//!
//! The weight gradient is the same product with other roles: input channels take the place of
//! pixels, and the sum runs over pixels. The data gradient is a forward convolution with flipped
//! weights.
//!
//! Results do not depend on the number of threads: the order of every sum is fixed.
//!
//! `tile` is the interface to the code of an architecture, `select` lists the architectures.

mod direct;
mod gradients;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
mod portable;
mod reference;
mod select;
mod shape;
#[cfg(test)]
mod tests;
mod tile;
mod upsampled;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use gradients::{grad_bias, grad_input, grad_weight};
pub use packed::PackedConv;
pub(super) use packed::Source;
pub use reference::{reference, reference_gradients};
pub(super) use select::tiles;
pub(super) use shape::product;
pub use shape::{Activation, ConvShape};
pub(super) use tile::{GradTile, Tile, blocks};
pub use upsampled::PackedUpConv;
