//! Initial weights of the lite family, and its discriminator in training.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::{
    nn::lite::{Discriminator, DiscriminatorConfig, ImageDiscriminator, Teacher, TeacherConfig},
    train::{
        adversary::FeatureDiscriminator,
        init::{POWER_ITERATIONS, Variables, set_random, sorted},
    },
};

/// Creates a teacher and its variables. The second convolution of each block and the last
/// convolution are zero, so at first it predicts no residual.
///
/// # Errors
/// As [`Teacher::new`].
pub fn teacher(config: &TeacherConfig, seed: u64, device: &Device) -> Result<(Teacher, Variables)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Teacher::new(config.clone(), vb)?;
    let variables = sorted(&vars)?;
    set_random(&variables, seed, |name| {
        name.ends_with("conv2.weight") || name.starts_with("tail.")
    })?;
    Ok((made, variables))
}

/// Creates a discriminator for a teacher and its variables, including the vectors of the spectral
/// norms.
///
/// # Errors
/// As [`Discriminator::new`].
pub fn discriminator(
    config: &DiscriminatorConfig,
    seed: u64,
    device: &Device,
) -> Result<(Judge, Variables)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Discriminator::new(config.clone(), vb)?;
    let variables = sorted(&vars)?;
    set_random(&variables, seed, |_| false)?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((Judge::Features(made), variables))
}

/// As [`discriminator`], for a discriminator on images of `width` channels.
///
/// # Errors
/// As [`ImageDiscriminator::new`].
pub fn image_discriminator(width: usize, seed: u64, device: &Device) -> Result<(Judge, Variables)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = ImageDiscriminator::new(width, vb)?;
    let variables = sorted(&vars)?;
    set_random(&variables, seed, |_| false)?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((Judge::Images(made), variables))
}

/// Discriminator of a student.
#[derive(Clone)]
pub enum Judge {
    /// On the features of a teacher, at the time of each sample.
    Features(Discriminator),
    /// On luma images.
    Images(ImageDiscriminator),
}

impl FeatureDiscriminator for Judge {
    fn heads(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>> {
        match self {
            Self::Features(discriminator) => discriminator.forward(features, t),
            Self::Images(discriminator) => {
                let logits = features.iter().map(|image| discriminator.forward(image));
                logits.collect()
            }
        }
    }

    fn power_iteration(&self) -> Result<()> {
        match self {
            Self::Features(discriminator) => discriminator.power_iteration(),
            Self::Images(discriminator) => discriminator.power_iteration(),
        }
    }

    fn frozen(&self) -> Self {
        match self {
            Self::Features(discriminator) => Self::Features(discriminator.frozen()),
            Self::Images(discriminator) => Self::Images(discriminator.frozen()),
        }
    }
}
