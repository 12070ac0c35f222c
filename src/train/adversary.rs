//! A discriminator in training.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor, backprop::GradStore};

use super::{
    losses::hinge_discriminator,
    optim::{AdamW, Parameter, found},
};
use crate::nn::layers::is_parameter;

/// A discriminator that judges the features of a frozen teacher.
pub trait Judge: Sized {
    /// The logits of each head for `features` at the times `t`. A loss is a mean over each head, then over the heads.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn heads(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>>;

    /// One power iteration of every spectral norm.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn power_iteration(&self) -> Result<()>;

    /// The same discriminator, which a gradient flows through and not into.
    fn frozen(&self) -> Self;
}

/// The mean of `loss` over a discriminator's heads.
///
/// # Errors
/// Those of `loss`.
pub fn mean_of_heads(heads: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let heads: Vec<Tensor> = heads.collect::<Result<_>>()?;
    Tensor::stack(&heads, 0)?.mean_all()
}

/// A teacher's features of real latents and of a student's, both perturbed to the same times.
pub struct Judged {
    pub real: Vec<Tensor>,
    /// Must carry no gradient.
    pub fake: Vec<Tensor>,
    /// The time of each sample.
    pub t: Vec<usize>,
}

/// A discriminator, its optimiser and the state of both.
pub struct Adversary<J> {
    judge: J,
    /// All variables, the spectral norms' vectors among them.
    variables: Vec<Parameter>,
    adam: AdamW,
}

impl<J: Judge> Adversary<J> {
    /// A discriminator whose tensors are `variables`.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn new((judge, variables): (J, Vec<Parameter>)) -> Result<Self> {
        let name = |(name, var)| (format!("discriminator.{name}"), var);
        let variables: Vec<_> = variables.into_iter().map(name).collect();
        let trained = variables.iter().filter(|(name, _)| is_parameter(name));
        let mut adam = AdamW::new(trained.cloned().collect())?;
        adam.beta2 = 0.999;
        Ok(Self {
            judge,
            variables,
            adam,
        })
    }

    /// The hinge loss, a mean over `batches` batches that `judged` makes one after the other, and its gradients. Takes
    /// one power iteration of the spectral norms first.
    ///
    /// # Errors
    /// Those of `judged`, or when a shape does not fit.
    pub fn loss(
        &self,
        batches: usize,
        mut judged: impl FnMut(usize) -> Result<Judged>,
    ) -> Result<(f64, GradStore)> {
        self.judge.power_iteration()?;
        let (mut sum, mut grads) = (0.0, GradStore::default());
        for i in 0..batches {
            let Judged { real, fake, t } = judged(i)?;
            let real = self.judge.heads(&real, &t)?;
            let fake = self.judge.heads(&fake, &t)?;
            let heads = real.iter().zip(&fake);
            let loss = mean_of_heads(heads.map(|(real, fake)| hinge_discriminator(real, fake)))?;
            let loss = (loss / batches as f64)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            grads.extend(loss.backward()?)?;
        }
        Ok((sum, grads))
    }

    /// Takes a step of learning rate `rate` along the gradients of [`Self::loss`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn update(&mut self, grads: &GradStore, rate: f64) -> Result<()> {
        self.adam.step(grads, rate)
    }

    /// The discriminator as the generator's loss needs it: after one power iteration on the weights as they are now, and
    /// without gradients of its own.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn judge(&self) -> Result<J> {
        self.judge.power_iteration()?;
        Ok(self.judge.frozen())
    }

    /// The variables (`weights.discriminator.*`) and the moments by name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let variables = self.variables.iter();
        let mut all: Vec<_> = variables
            .map(|(name, var)| (format!("weights.{name}"), var.as_tensor().clone()))
            .collect();
        all.extend(self.adam.state());
        all
    }

    /// Takes back what [`Self::state`] gave after `step` updates.
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
    use crate::{nn::resshift::DiscriminatorConfig, train::resshift::init};

    #[test]
    fn it_learns_to_tell_two_kinds_of_features_apart() {
        let config = DiscriminatorConfig::new(vec![32], 8);
        let mut adversary =
            Adversary::new(init::discriminator(&config, 1, &Device::Cpu).unwrap()).unwrap();
        // Both are noise on a slope; the real one rises and the fake one falls.
        let slope = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap();
        let slope = slope.reshape((1, 1, 6, 1)).unwrap();
        let judged = |_| {
            let noise = || Tensor::randn(0f32, 1.0, (2, 6, 6, 32), &Device::Cpu);
            Ok(Judged {
                real: vec![noise()?.broadcast_add(&slope)?],
                fake: vec![noise()?.broadcast_sub(&slope)?],
                t: vec![3, 5],
            })
        };
        let (before, _) = adversary.loss(1, judged).unwrap();
        assert!((before - 2.0).abs() < 0.5, "{before}");
        for _ in 0..30 {
            let (_, grads) = adversary.loss(2, judged).unwrap();
            adversary.update(&grads, 3e-3).unwrap();
        }
        let (after, _) = adversary.loss(4, judged).unwrap();
        assert!(after < 0.7 * before, "{before}, then {after}");
    }
}
