//! Vectors of f32, and instruction sets for which kernels are compiled.

mod isa;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use isa::Isa;
pub(crate) use isa::dispatch;
pub(super) use lanes::Lanes;
#[cfg(target_arch = "aarch64")]
pub(super) use neon::{F32x4, F32x8, Registers};
pub(super) use portable::Array;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{F32x4, F32x8, F32x16};
