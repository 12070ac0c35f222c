//! Operators with fast kernels, forward and backward, as candle custom operators.
//!
//! Feature maps are NHWC ("channels last") throughout: a pixel's channels are contiguous, which is what the
//! convolution kernels, norms over channels and attention want. Convolution weights keep the checkpoints' layout
//! `[co, ci, kh, kw]`. The kernels are for the CPU; on other devices what training needs is composed of candle's own
//! operators.

mod add;
mod attention;
mod composed;
mod conv2d;
pub mod cpu;
mod gelu;
mod group_norm;
mod packed;
mod silu;
mod upsample;

pub use add::add;
pub use attention::attention;
pub use conv2d::conv2d;
pub use cpu::conv::Activation;
pub use gelu::gelu;
pub use group_norm::group_norm;
pub use packed::PackedConv2d;
pub use silu::silu;
pub use upsample::{upsample2x, upsample2x_conv2d};
