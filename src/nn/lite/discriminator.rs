//! The discriminator of the adversarial loss in the lite family. It classifies residuals by the
//! features of a frozen teacher at a noise level `t` (TAD-SR, arXiv 2408.07476). Its heads are
//! two-dimensional, unlike the published ones, because the maps are small and texture has two
//! dimensions.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::{
    nn::layers::{Linear, Norm, SpectralWeight, sinusoids},
    ops::{Activation, conv2d, silu},
};

/// Channels of a normalisation group, as in the teacher.
const GROUP: usize = 16;
const NORM_EPS: f64 = 1e-5;
pub(super) const SLOPE: f32 = 0.2;

/// Architecture of a discriminator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscriminatorConfig {
    /// Channels of each feature map, multiples of 16.
    pub channels: Vec<usize>,
    /// Channels inside a head.
    pub width: usize,
    /// Channels of the sinusoidal embedding of `t`, an even number.
    pub time_channels: usize,
}

/// A discriminator with one head for each feature map: norm and modulation by `t`, two spectrally
/// normalised 3x3 convolutions, and a 1x1 convolution to one logit at each position.
#[derive(Clone, Debug)]
pub struct Discriminator {
    config: DiscriminatorConfig,
    heads: Vec<Head>,
}

#[derive(Clone, Debug)]
struct Head {
    /// `[2c, e]`, scale and shift from the time embedding.
    time: Linear,
    norm: Norm,
    convs: [Conv; 3],
}

/// A spectrally normalised convolution.
#[derive(Clone, Debug)]
pub(super) struct Conv {
    weight: SpectralWeight,
    bias: Tensor,
    stride: usize,
}

impl Discriminator {
    /// Builds the network from the tensors `HEAD.{time,norm}.{weight,bias}` and `HEAD.{0,1,2}.*` of
    /// `vb`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, or channels are not multiples of 16.
    pub fn new(config: DiscriminatorConfig, vb: VarBuilder) -> Result<Self> {
        let head = |(i, &c): (usize, &usize)| {
            if c == 0 || c % GROUP != 0 {
                bail!("discriminator: a feature map of {c} channels, not a multiple of {GROUP}");
            }
            Head::new(c, &config, &vb.pp(i))
        };
        let heads = config.channels.iter().enumerate().map(head);
        Ok(Self {
            heads: heads.collect::<Result<_>>()?,
            config,
        })
    }

    /// Returns the logits `[n, h, w, 1]` of each head, f32, for its feature map `[n, h, w, c]` at
    /// the noise level `t` `[n]`.
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn forward(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>> {
        if features.len() != self.heads.len() {
            let (got, want) = (features.len(), self.heads.len());
            bail!("discriminator: {got} feature maps instead of {want}");
        }
        let Some(first) = features.first() else {
            return Ok(Vec::new());
        };
        let time = silu(&sinusoids(t, self.config.time_channels, first.device())?)?;
        let pairs = self.heads.iter().zip(features);
        pairs.map(|(head, f)| head.forward(f, &time)).collect()
    }

    /// Runs one power iteration of every spectral norm. Required before each use in training.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn power_iteration(&self) -> Result<()> {
        let convs = self.heads.iter().flat_map(|head| &head.convs);
        convs.into_iter().try_for_each(Conv::power_iteration)
    }

    /// Returns the discriminator with weights that get no gradient, for the student's loss.
    pub fn frozen(&self) -> Self {
        Self {
            config: self.config.clone(),
            heads: self.heads.iter().map(Head::frozen).collect(),
        }
    }
}

impl Head {
    fn new(c: usize, config: &DiscriminatorConfig, vb: &VarBuilder) -> Result<Self> {
        let (w, e) = (config.width, config.time_channels);
        Ok(Self {
            time: Linear::new(e, 2 * c, vb.pp("time"))?,
            norm: Norm::new(c, c / GROUP, NORM_EPS, vb.pp("norm"))?,
            convs: [
                Conv::new([w, c, 3, 3], 1, &vb.pp(0))?,
                Conv::new([w, w, 3, 3], 1, &vb.pp(1))?,
                Conv::new([1, w, 1, 1], 1, &vb.pp(2))?,
            ],
        })
    }

    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let x = self.norm.modulated(x, &self.time.forward(time)?)?;
        let [first, second, last] = &self.convs;
        let x = first.forward(&x, Activation::LeakyRelu(SLOPE))?;
        let x = second.forward(&x, Activation::LeakyRelu(SLOPE))?;
        last.forward(&x, Activation::None)?.to_dtype(DType::F32)
    }

    fn frozen(&self) -> Self {
        Self {
            time: self.time.frozen(),
            norm: self.norm.frozen(),
            convs: self.convs.clone().map(Conv::frozen),
        }
    }
}

impl Conv {
    pub(super) fn new(shape: [usize; 4], stride: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: SpectralWeight::new(&shape, vb)?,
            bias: vb.get(shape[0], "bias")?,
            stride,
        })
    }

    /// Returns the map, divided by the stride in both directions.
    pub(super) fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let pad = (self.weight.dims()[2] - 1) / 2;
        let weight = self.weight.normalised()?;
        conv2d(x, &weight, &self.bias, self.stride, pad, activation)
    }

    pub(super) fn power_iteration(&self) -> Result<()> {
        self.weight.power_iteration()
    }

    pub(super) fn frozen(self) -> Self {
        Self {
            weight: self.weight.frozen(),
            bias: self.bias.detach(),
            stride: self.stride,
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::VarMap;

    use super::*;
    use crate::nn::layers::is_parameter;
    use crate::testing::normal;

    fn config() -> DiscriminatorConfig {
        DiscriminatorConfig {
            channels: vec![16, 32],
            width: 8,
            time_channels: 16,
        }
    }

    fn map(h: usize, w: usize, c: usize) -> Tensor {
        normal(0.0, 1.0, (2, h, w, c))
    }

    /// Returns a discriminator with random weights, and its variables.
    fn random() -> (Discriminator, VarMap) {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let discriminator = Discriminator::new(config(), vb).unwrap();
        for var in vars.all_vars() {
            let value = normal(0.0, 1.0, var.shape());
            var.set(&value).unwrap();
        }
        discriminator.power_iteration().unwrap();
        (discriminator, vars)
    }

    #[test]
    fn each_head_has_a_logit_for_each_position_that_depends_on_the_time() {
        let (d, _) = random();
        let maps = [map(6, 7, 16), map(3, 4, 32)];
        let logits = d.forward(&maps, &[1, 5]).unwrap();
        assert_eq!(logits[0].dims(), [2, 6, 7, 1]);
        assert_eq!(logits[1].dims(), [2, 3, 4, 1]);
        let other = d.forward(&maps, &[1, 6]).unwrap();
        let apart = (&logits[1] - &other[1]).unwrap().abs().unwrap();
        let apart: Vec<f32> = apart.flatten_all().unwrap().to_vec1().unwrap();
        assert!(apart[..12].iter().all(|v| *v == 0.0));
        assert!(apart[12..].iter().all(|v| *v > 0.0));
    }

    #[test]
    fn gradients_reach_all_parameters_and_none_when_frozen() {
        let (d, vars) = random();
        let maps = [map(6, 7, 16), map(3, 4, 32)];
        let gradients = |d: &Discriminator| {
            let sums = d.forward(&maps, &[1, 5]).unwrap();
            let sums = sums.iter().map(|l| l.sqr().unwrap().sum_all().unwrap());
            let total = sums.reduce(|a, b| (a + b).unwrap()).unwrap();
            total.backward().unwrap()
        };
        let (grads, none) = (gradients(&d), gradients(&d.frozen()));
        for (name, var) in vars.data().lock().unwrap().iter() {
            assert_eq!(grads.get(var).is_some(), is_parameter(name), "{name}");
            assert!(none.get(var).is_none(), "{name}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (d, _) = random();
        assert!(d.forward(&[map(6, 7, 16)], &[1, 5]).is_err());
        assert!(d.forward(&[map(6, 7, 16), map(3, 4, 16)], &[1, 5]).is_err());
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let odd = DiscriminatorConfig {
            channels: vec![24],
            ..config()
        };
        assert!(Discriminator::new(odd, vb).is_err());
    }
}
