//! Operators with fast kernels, forward and backward, as candle custom operators.
//!
//! Feature maps are NHWC ("channels last") throughout: a pixel's channels are contiguous, which is what the
//! convolution kernels, norms over channels and attention want. Convolution weights keep the checkpoints' layout
//! `[co, ci, kh, kw]`.

mod attention;
mod conv2d;
pub mod cpu;
mod gelu;
mod group_norm;
mod silu;
mod upsample;

pub use attention::attention;
pub use conv2d::conv2d;
pub use cpu::conv::Activation;
pub use gelu::gelu;
pub use group_norm::group_norm;
pub use silu::silu;
pub use upsample::upsample2x;
