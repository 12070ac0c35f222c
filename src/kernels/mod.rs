//! Fast loops on plain slices. They know neither tensors nor video.
//!
//! [`cpu`] says which instruction-set extensions the CPU has. [`simd::Isa`] and the `Variant` of a
//! kernel are values that exist only where the CPU can run their code. Every kernel has a plain
//! reference; [`registry`] lists all of them for tests and benchmarks.

pub mod attention;
pub mod conv;
pub mod cpu;
pub mod elementwise;
pub mod int16;
pub mod int8;
mod math;
mod matmul;
mod memory;
pub mod motion;
pub mod norm;
pub mod registry;
pub(crate) mod resample;
pub mod shuffle;
pub mod simd;
pub(crate) mod temporal;
pub mod tracker;
pub mod upsample;
pub mod winograd;

pub use memory::{Line, zeros};
