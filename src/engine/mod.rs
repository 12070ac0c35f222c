//! A trained model at work: from the planes of a frame to the planes of a larger one.

mod chroma;
pub mod cpu;
pub mod cuda;
pub mod official;
