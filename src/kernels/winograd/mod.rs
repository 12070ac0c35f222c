//! 3x3 convolution of bands of rows by Winograd's minimal filtering F(4x4, 3x3), with a quarter of
//! the multiplications.
//!
//! A tile of 4x4 outputs is `A^T [(G g G^T) . (B^T d B)] A` with the kernel g, the 6x6 inputs d and
//! the matrices of A. Lavin and S. Gray, "Fast algorithms for convolutional neural networks"
//! (2015), section 4.2. A vector of the channels of a pixel is transformed at once; the 36 products
//! are matrices, tiles by input channels by output channels. In f32 the result is within about 1e-5
//! of the direct sum, relative to the largest output.
//!
//! The bf16 variants round the transformed inputs and weights to bfloat16 before they are
//! multiplied; the transforms and the sums stay in f32. The transform magnifies that rounding: the
//! result is within about 2 % of the direct sum, relative to the largest output.
//!
//! Rows are NHWC with the channels padded to whole vectors. A band is four rows of outputs. The
//! caller chooses the pixels that share a tile, and with them the last bits.

mod gradient_loops;
pub mod images;
mod layer;
mod loops;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod sizes;
#[cfg(test)]
mod tests;
mod tiles;
mod variant;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use layer::{Band, Winograd};
pub use sizes::TILE;
pub(super) use sizes::{G, MAX_TILES};
pub use variant::Variant;
