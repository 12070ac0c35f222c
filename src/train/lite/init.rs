//! Initial weights of the lite family, and its discriminator in training.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::{
    nn::lite::{Discriminator, DiscriminatorConfig, Teacher, TeacherConfig},
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
) -> Result<(Discriminator, Variables)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Discriminator::new(config.clone(), vb)?;
    let variables = sorted(&vars)?;
    set_random(&variables, seed, |_| false)?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((made, variables))
}

impl FeatureDiscriminator for Discriminator {
    fn heads(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>> {
        self.forward(features, t)
    }

    fn power_iteration(&self) -> Result<()> {
        Self::power_iteration(self)
    }

    fn frozen(&self) -> Self {
        Self::frozen(self)
    }
}
