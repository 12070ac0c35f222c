//! Layers that several families use.

mod conv;
mod embedding;
mod linear;
mod norm;
mod record;
mod spectral;

pub(super) use conv::Conv;
pub(super) use embedding::sinusoids;
pub(super) use linear::Linear;
pub(super) use norm::Norm;
pub(super) use record::record;
pub(super) use spectral::SpectralWeight;
pub use spectral::is_parameter;
