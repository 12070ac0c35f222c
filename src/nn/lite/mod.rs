//! The real-time family: a whitened-residual latent on an unshuffled grid and small convolutional students.

pub mod latent;
mod student;

pub use latent::{LatentKind, LatentStats};
pub use student::{
    Activated, Architecture, LEAKY_SLOPE, LayerSpec, Role, Student, StudentConfig, scale_features,
};
