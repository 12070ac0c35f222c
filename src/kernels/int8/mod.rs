//! 3x3 convolution of bands of rows in 8-bit integers, summed in 32 bits.
//!
//! The values of a channel are codes from 0 to 255 (see [`Coding`]). Weights are integers from -127
//! to 127 with a factor for each output channel; the steps of the input channels are multiplied
//! into them. The sum over the window is therefore one of integers, exact in any order; all else is
//! a factor and an offset for each output channel. Those, the leaky ReLU and the rounding are
//! computed in f32 with fused multiply-adds on every instruction set, so that all variants give the
//! same bits.
//!
//! Rows are NHWC with padded channels: to a multiple of 4 in the input of a network, else of 16.

mod coding;
mod layer;
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod sizes;
mod sums;
#[cfg(test)]
mod tests;
mod variant;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use coding::Coding;
pub use layer::{Ends, Int8, IntBand, IntOutput};
pub use variant::Variant;
