//! The published networks (ResShift, SinSR, TAD-SR) on a frame.

mod noise;
mod options;

pub use noise::NoiseField;
pub use options::{ColorFix, Options, Progress, Tile};
