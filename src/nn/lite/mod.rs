//! The real-time family: a whitened latent on an unshuffled grid, small convolutional students, and
//! their teacher, a U-Net.

mod condition;
mod discriminator;
mod estimator;
mod image_discriminator;
pub mod latent;
pub mod memory;
mod student;
mod teacher;

pub use condition::{Condition, Conditioning, Input, denoise_of, scale_features};
pub use discriminator::{Discriminator, DiscriminatorConfig};
pub use estimator::{Estimator, EstimatorConfig};
pub use image_discriminator::ImageDiscriminator;
pub use latent::{LatentKind, LatentStats};
pub use student::{
    Activated, Architecture, ConditionSpec, LEAKY_SLOPE, LayerSpec, Role, Student, StudentConfig,
};
pub use teacher::{Teacher, TeacherConfig};
