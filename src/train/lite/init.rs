//! Weights of the lite family's networks before training, and its discriminator in training.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::{
    nn::lite::{Discriminator, DiscriminatorConfig, Teacher, TeacherConfig},
    train::{
        adversary::Judge,
        init::{POWER_ITERATIONS, Variables, draw, sorted},
    },
};

/// A new teacher of the lite family and its variables. The second convolution of each block and the last of all are zero:
/// at first it predicts no residual.
///
/// # Errors
/// As [`Teacher::new`].
pub fn teacher(config: &TeacherConfig, seed: u64, device: &Device) -> Result<(Teacher, Variables)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Teacher::new(config.clone(), vb)?;
    let variables = sorted(&vars)?;
    draw(&variables, seed, |name| {
        name.ends_with("conv2.weight") || name.starts_with("tail.")
    })?;
    Ok((made, variables))
}

/// A new discriminator for the lite family's teacher and its variables, the spectral norms' vectors among them.
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
    draw(&variables, seed, |_| false)?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((made, variables))
}

impl Judge for Discriminator {
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
