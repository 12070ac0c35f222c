//! Operators with fast kernels, forward and backward, as candle custom operators.
//!
//! Feature maps are NHWC ("channels last") throughout: a pixel's channels are contiguous, which is what the
//! convolution kernels, norms over channels and attention want. Convolution weights keep the checkpoints' layout
//! `[co, ci, kh, kw]`.

mod conv2d;
pub mod cpu;
mod silu;

pub use conv2d::conv2d;
pub use cpu::conv::Activation;
pub use silu::silu;
