//! Students for real time, compiled to a plan for frames of one kind.

mod chroma;
pub mod cpu;
pub mod cuda;
