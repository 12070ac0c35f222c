//! Separable resampling of f32 planes.
//!
//! Output sample j of an axis reads the source around position (j + c) * ratio - c, where ratio is
//! source samples per output sample and c is the position where the grids meet: 0.5 if both cover
//! the same length with centred samples, 0.25 for chroma that is cosited with every second luma
//! sample (chroma sample i lies at luma position 2i, so the luma grids meet at c = 0.5 and the
//! chroma grids at half of that), 0 if the first samples coincide.
//!
//! The result does not depend on the number of threads or on the processor: every output is the
//! same sum in the same order.

mod axis;
mod kernel;
mod resampler;
mod rows;
mod stream;
#[cfg(test)]
mod tests;

pub use axis::{Axis, Options};
pub use kernel::Kernel;
pub use resampler::Resampler;
pub(crate) use stream::Stream;
