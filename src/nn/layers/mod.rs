//! Layers that the families share.

pub(super) mod embedding;
pub(super) mod spectral;

pub use spectral::is_parameter;
