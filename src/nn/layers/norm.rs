//! Group norms.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::ops::{self, Activation};

/// A group norm over NHWC maps: `weight` and `bias` `[channels]`.
#[derive(Clone, Debug)]
pub struct Norm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl Norm {
    pub fn new(channels: usize, groups: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get(channels, "weight")?,
            bias: vb.get(channels, "bias")?,
            groups,
            eps,
        })
    }

    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        ops::group_norm(
            x,
            self.groups,
            &self.weight,
            &self.bias,
            self.eps,
            activation,
        )
    }

    /// Modulates the normalised map by a condition (FiLM) and applies a SiLU. `modulation`
    /// `[n, 2 channels]` is the scale minus 1, then the shift.
    pub fn modulated(&self, x: &Tensor, modulation: &Tensor) -> Result<Tensor> {
        let channels = self.weight.dim(0)?;
        let scale = (modulation.narrow(1, 0, channels)? + 1.0)?;
        let shift = modulation.narrow(1, channels, channels)?;
        // The affine map of the norm and the modulation are combined to one for each sample.
        let weight = scale.broadcast_mul(&self.weight)?;
        let bias = (scale.broadcast_mul(&self.bias)? + shift)?;
        ops::group_norm(x, self.groups, &weight, &bias, self.eps, Activation::Silu)
    }

    /// Returns the norm with weights that get no gradient.
    pub fn frozen(&self) -> Self {
        Self {
            weight: self.weight.detach(),
            bias: self.bias.detach(),
            ..*self
        }
    }
}
