//! 3x3 convolution of bands of rows by Winograd's F(4x4, 3x3) in 16-bit integers, summed in 32
//! bits.
//!
//! The values of a channel are codes from -255 to 255 (see [`Coding`]). The transform of the inputs
//! is exact: its largest value is 100 times the largest code, and fits in 16 bits. The transformed
//! weights are rounded to integers with a factor for each output channel, chosen so that no sum
//! exceeds 32 bits; the steps of the input channels are multiplied into them. The sums are exact in
//! any order. They are transformed in f32 with factors that are powers of two, and the rest uses
//! fused multiply-adds on every instruction set, so that all variants give the same bits.
//!
//! Rows are NHWC with the channels padded to a multiple of 16.

mod coding;
mod layer;
mod loops;
mod portable;
mod sizes;
#[cfg(test)]
mod tests;
mod variant;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use coding::Coding;
pub use layer::{Ends, Int16};
pub use variant::Variant;
