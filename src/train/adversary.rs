//! Training of a discriminator on the features of a teacher.

use std::{collections::HashMap, slice::from_mut};

use candle_core::{Device, Result, Tensor, backprop::GradStore};

use super::{
    losses::hinge_discriminator,
    optim::{AdamW, Parameter, found},
    ranks::Ranks,
};
use crate::nn::layers::is_parameter;

/// Discriminator on the features of a frozen teacher.
pub trait FeatureDiscriminator: Sized {
    /// Returns the logits of each head for `features` at the times `t`. A loss is a mean over each
    /// head, then over the heads.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn heads(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>>;

    /// Takes one power iteration of every spectral norm.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn power_iteration(&self) -> Result<()>;

    /// Returns the discriminator with constant weights: gradients pass through it only.
    fn frozen(&self) -> Self;
}

/// Returns the mean of `loss` over the heads of a discriminator.
///
/// # Errors
/// Those of `loss`.
pub fn mean_of_heads(heads: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let heads: Vec<Tensor> = heads.collect::<Result<_>>()?;
    Tensor::stack(&heads, 0)?.mean_all()
}

/// Features of a teacher for real latents and for results of a student, perturbed to the same
/// times.
pub struct FeaturePair {
    pub real: Vec<Tensor>,
    /// Features of the student's results, without gradients.
    pub fake: Vec<Tensor>,
    /// Time of each sample.
    pub t: Vec<usize>,
}

/// Discriminator and its optimiser.
pub struct DiscriminatorTrainer<D> {
    discriminator: D,
    /// All variables, including the vectors of the spectral norms.
    variables: Vec<Parameter>,
    adam: AdamW,
}

impl<D: FeatureDiscriminator> DiscriminatorTrainer<D> {
    /// Creates the optimiser of a discriminator and its `variables`.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn new((discriminator, variables): (D, Vec<Parameter>)) -> Result<Self> {
        let name = |(name, var)| (format!("discriminator.{name}"), var);
        let variables: Vec<_> = variables.into_iter().map(name).collect();
        let trained = variables.iter().filter(|(name, _)| is_parameter(name));
        let mut adam = AdamW::new(trained.cloned().collect())?;
        adam.beta2 = 0.999;
        Ok(Self {
            discriminator,
            variables,
            adam,
        })
    }

    /// Returns the hinge loss, a mean over `batches` batches from `batch` on each rank, and its
    /// gradients. Takes one power iteration of the spectral norms first.
    ///
    /// # Errors
    /// Those of `batch`, or when a shape does not fit.
    pub fn loss(
        &self,
        ranks: &dyn Ranks,
        batches: usize,
        mut batch: impl FnMut(usize) -> Result<FeaturePair>,
    ) -> crate::Result<(f64, GradStore)> {
        self.discriminator.power_iteration()?;
        let all = (batches * ranks.count()) as f64;
        let (mut sum, mut grads) = (0.0, GradStore::default());
        for i in 0..batches {
            let FeaturePair { real, fake, t } = batch(i)?;
            let real = self.discriminator.heads(&real, &t)?;
            let fake = self.discriminator.heads(&fake, &t)?;
            let heads = real.iter().zip(&fake);
            let loss = mean_of_heads(heads.map(|(real, fake)| hinge_discriminator(real, fake)))?;
            let loss = (loss / all)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            grads.extend(loss.backward()?)?;
        }
        ranks.sum_gradients(&mut grads, self.adam.parameters(), from_mut(&mut sum))?;
        Ok((sum, grads))
    }

    /// Takes a step of learning rate `rate` with the gradients of [`Self::loss`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn update(&mut self, grads: &GradStore, rate: f64) -> Result<()> {
        self.adam.step(grads, rate)
    }

    /// Returns the discriminator for the generator's loss: with constant weights, after a power
    /// iteration.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn discriminator(&self) -> Result<D> {
        self.discriminator.power_iteration()?;
        Ok(self.discriminator.frozen())
    }

    /// Returns variables (`weights.discriminator.*`) and moments by name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let variables = self.variables.iter();
        let mut all: Vec<_> = variables
            .map(|(name, var)| (format!("weights.{name}"), var.as_tensor().clone()))
            .collect();
        all.extend(self.adam.state());
        all
    }

    /// Restores the [`Self::state`] after `step` updates.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn restore(&mut self, step: u64, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let first = self.variables.first();
        let device = first.map_or(Device::Cpu, |(_, var)| var.device().clone());
        let get = |name: &str| found(tensors, name, &device);
        for (name, var) in &self.variables {
            var.set(&get(&format!("weights.{name}"))?)?;
        }
        self.adam.restore(step, get)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        nn::resshift::DiscriminatorConfig,
        testing::normal,
        train::{ranks::Alone, resshift::init},
    };

    #[test]
    fn a_discriminator_learns_to_separate_two_kinds_of_features() {
        let config = DiscriminatorConfig::new(vec![32], 8);
        let mut adversary =
            DiscriminatorTrainer::new(init::discriminator(&config, 1, &Device::Cpu).unwrap())
                .unwrap();
        // Both are noise on a slope: the real one rises, the fake one falls.
        let slope = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap();
        let slope = slope.reshape((1, 1, 6, 1)).unwrap();
        let batch = |_| {
            let noise = || normal(0.0, 1.0, (2, 6, 6, 32));
            Ok(FeaturePair {
                real: vec![noise().broadcast_add(&slope)?],
                fake: vec![noise().broadcast_sub(&slope)?],
                t: vec![3, 5],
            })
        };
        let (before, _) = adversary.loss(&Alone, 1, batch).unwrap();
        assert!((before - 2.0).abs() < 0.5, "{before}");
        for _ in 0..30 {
            let (_, grads) = adversary.loss(&Alone, 2, batch).unwrap();
            adversary.update(&grads, 3e-3).unwrap();
        }
        let (after, _) = adversary.loss(&Alone, 4, batch).unwrap();
        assert!(after < 0.7 * before, "{before}, then {after}");
    }
}
