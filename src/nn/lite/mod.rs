//! The real-time family: a whitened-residual latent on an unshuffled grid and small convolutional students,
//! and the U-Net that teaches them.

mod discriminator;
pub mod latent;
mod student;
mod teacher;

pub use discriminator::{Discriminator, DiscriminatorConfig};
pub use latent::{LatentKind, LatentStats};
pub use student::{
    Activated, Architecture, LEAKY_SLOPE, LayerSpec, Role, Student, StudentConfig, scale_features,
};
pub use teacher::{Teacher, TeacherConfig};
