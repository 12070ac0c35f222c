//! The discriminator of the time-aware adversarial loss. It classifies latents by the features of a
//! frozen teacher at a noise level `t` (TAD-SR, arXiv 2408.07476). Its heads are those of
//! StyleGAN-T (arXiv 2301.09515).
//!
//! Features are tensors, so it is independent of the teacher.

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::{
    nn::layers::{Linear, Norm, SpectralWeight, sinusoids},
    ops::{Activation, conv2d, silu},
};

/// Groups of the norm of a feature map.
const FEATURE_GROUPS: usize = 32;
/// Groups of the norms in a head.
const HEAD_GROUPS: usize = 4;
/// Taps of the second convolution of a head along the flattened map.
const TAPS: usize = 9;
const NORM_EPS: f64 = 1e-5;
const LEAKY_SLOPE: f64 = 0.2;

/// Architecture of a discriminator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiscriminatorConfig {
    /// Channels of each feature map, multiples of 32.
    pub channels: Vec<usize>,
    /// Channels of the sinusoidal embedding of `t`, an even number.
    pub time_channels: usize,
    /// Logits at each position of a map.
    pub logits: usize,
}

impl DiscriminatorConfig {
    /// Returns the published architecture with 64 logits at each position, for maps of `channels`
    /// and the time embedding of a teacher with `time_channels` channels at its first level.
    pub fn new(channels: Vec<usize>, time_channels: usize) -> Self {
        Self {
            channels,
            time_channels,
            logits: 64,
        }
    }
}

/// A discriminator with one branch for each feature map: norm and modulation by `t`, a 3x3
/// convolution, and a head of spectrally normalised 1-d convolutions over the flattened map.
#[derive(Clone, Debug)]
pub struct Discriminator {
    config: DiscriminatorConfig,
    branches: Vec<Branch>,
}

impl Discriminator {
    /// Builds the network from the tensors `time.I.{weight,bias}`, `norm.I.*`, `conv.I.*` and
    /// `head.I.{b0,b1,cls}.*` of `vb`. Spectral norms have `weight_orig`, `weight_u` and
    /// `weight_v`, as in PyTorch.
    ///
    /// The vectors `weight_u` and `weight_v` are not trained (see
    /// [`crate::nn::layers::is_parameter`]) but are part of checkpoints.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, or channels are not multiples of the groups.
    pub fn new(config: &DiscriminatorConfig, vb: VarBuilder) -> Result<Self> {
        if !config.time_channels.is_multiple_of(2) || config.time_channels == 0 {
            bail!(
                "discriminator: {} time channels, not an even number",
                config.time_channels
            );
        }
        let branch = |(i, &c): (usize, &usize)| {
            if c == 0 || c % FEATURE_GROUPS != 0 {
                bail!("discriminator: a feature map of {c} channels, not a multiple of 32");
            }
            Branch::new(c, config, i, &vb)
        };
        let branches = config.channels.iter().enumerate().map(branch);
        Ok(Self {
            branches: branches.collect::<Result<_>>()?,
            config: config.clone(),
        })
    }

    /// Returns the logits `[n, logits, h w]` of every branch for its feature map `[n, h, w, c]` at
    /// the noise level `t` `[n]`. Spectral norms do not update their vectors (evaluation mode).
    ///
    /// # Errors
    /// If a shape does not fit, or a map has fewer than 4 pixels, the width of the circular
    /// padding.
    pub fn heads(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>> {
        if features.len() != self.branches.len() {
            bail!(
                "discriminator: {} feature maps instead of {}",
                features.len(),
                self.branches.len()
            );
        }
        let Some(first) = features.first() else {
            return Ok(Vec::new());
        };
        if first.dim(0)? != t.len() {
            bail!("discriminator: {} times for maps {first:?}", t.len());
        }
        let time = silu(&sinusoids(t, self.config.time_channels, first.device())?)?;
        let pairs = self.branches.iter().zip(features);
        pairs.map(|(branch, f)| branch.forward(f, &time)).collect()
    }

    /// Returns the concatenation of [`Self::heads`], `[n, logits (h0 w0 + h1 w1 + ..)]`.
    ///
    /// # Errors
    /// As [`Self::heads`].
    pub fn forward(&self, features: &[Tensor], t: &[usize]) -> Result<Tensor> {
        let heads = self.heads(features, t)?;
        let flat: Result<Vec<_>> = heads.iter().map(|h| h.flatten_from(1)).collect();
        Tensor::cat(&flat?, 1)
    }

    /// Runs one power iteration of every spectral norm. Required before each forward pass in
    /// training. The vectors get no gradient.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn power_iteration(&self) -> Result<()> {
        for branch in &self.branches {
            for conv in branch.spectral() {
                conv.weight.power_iteration()?;
            }
        }
        Ok(())
    }

    /// Returns the discriminator with weights that get no gradient, for the generator's loss. It
    /// shares the memory of the weights.
    pub fn frozen(&self) -> Self {
        Self {
            config: self.config.clone(),
            branches: self.branches.iter().map(Branch::frozen).collect(),
        }
    }
}

fn leaky_relu(x: &Tensor) -> Result<Tensor> {
    x.maximum(&(x * LEAKY_SLOPE)?)
}

#[derive(Clone, Debug)]
struct Branch {
    /// `[2c, e]`, scale and shift from the time embedding.
    time: Linear,
    norm: Norm,
    /// Weight `[c, c, 3, 3]` and bias `[c]`.
    conv: [Tensor; 2],
    b0: (SpectralConv, Norm),
    b1: (SpectralConv, Norm),
    cls: SpectralConv,
}

impl Branch {
    fn new(c: usize, config: &DiscriminatorConfig, index: usize, vb: &VarBuilder) -> Result<Self> {
        let at = |name: &str| vb.pp(name).pp(index);
        let head = at("head");
        let block = |name: &str, taps| -> Result<_> {
            let vb = head.pp(name);
            let conv = SpectralConv::new(c, c, taps, &vb.pp("0"))?;
            Ok((conv, Norm::new(c, HEAD_GROUPS, NORM_EPS, vb.pp("1"))?))
        };
        let conv = at("conv");
        Ok(Self {
            time: Linear::new(config.time_channels, 2 * c, at("time"))?,
            norm: Norm::new(c, FEATURE_GROUPS, NORM_EPS, at("norm"))?,
            conv: [conv.get((c, c, 3, 3), "weight")?, conv.get(c, "bias")?],
            b0: block("b0", 1)?,
            b1: block("b1", TAPS)?,
            cls: SpectralConv::new(c, config.logits, 1, &head.pp("cls"))?,
        })
    }

    /// `[n, logits, h w]`
    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let (n, h, w, c) = x.dims4()?;
        let x = self.norm.modulated(x, &self.time.forward(time)?)?;
        let [weight, bias] = &self.conv;
        let x = conv2d(&x, weight, bias, 1, 1, Activation::None)?;
        let x = block(&self.b0, &x.reshape((n, 1, h * w, c))?)?;
        let x = ((&x + block(&self.b1, &x)?)? * 0.5f64.sqrt())?;
        self.cls.forward(&x)?.squeeze(1)?.transpose(1, 2)
    }

    fn spectral(&self) -> [&SpectralConv; 3] {
        [&self.b0.0, &self.b1.0, &self.cls]
    }

    fn frozen(&self) -> Self {
        let block = |(conv, norm): &(SpectralConv, Norm)| (conv.frozen(), norm.frozen());
        Self {
            time: self.time.frozen(),
            norm: self.norm.frozen(),
            conv: self.conv.each_ref().map(Tensor::detach),
            b0: block(&self.b0),
            b1: block(&self.b1),
            cls: self.cls.frozen(),
        }
    }
}

/// Applies convolution, norm and leaky ReLU to `[n, 1, l, c]`.
fn block((conv, norm): &(SpectralConv, Norm), x: &Tensor) -> Result<Tensor> {
    leaky_relu(&norm.forward(&conv.forward(x)?, Activation::None)?)
}

/// A 1-d convolution with circular padding and a spectrally normalised kernel `[co, ci, taps]`.
#[derive(Clone, Debug)]
struct SpectralConv {
    weight: SpectralWeight,
    bias: Tensor,
}

impl SpectralConv {
    fn new(ci: usize, co: usize, taps: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: SpectralWeight::new(&[co, ci, taps], vb)?,
            bias: vb.get(co, "bias")?,
        })
    }

    /// Maps `[n, 1, l, ci]` to `[n, 1, l, co]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (length, reach) = (x.dim(2)?, self.weight.dims()[2] / 2);
        if length < reach {
            bail!("discriminator: a feature map of {length} pixels, fewer than {reach}");
        }
        let padded = match reach {
            0 => x.clone(),
            _ => {
                let (end, start) = (x.narrow(2, length - reach, reach)?, x.narrow(2, 0, reach)?);
                Tensor::cat(&[&end, x, &start], 2)?
            }
        };
        let kernel = self.weight.normalised()?.unsqueeze(2)?;
        conv2d(&padded, &kernel, &self.bias, 1, 0, Activation::None)
    }

    fn frozen(&self) -> Self {
        Self {
            weight: self.weight.frozen(),
            bias: self.bias.detach(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device, Shape, Var};
    use candle_nn::VarMap;

    use super::*;
    use crate::nn::layers::is_parameter;
    use crate::testing::normal;

    fn random(shape: impl Into<Shape>) -> Tensor {
        normal(0.0, 1.0, shape)
    }

    /// Returns a discriminator of one map of 32 channels with random weights, and its variables.
    fn discriminator() -> (Discriminator, HashMap<String, Var>) {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let discriminator = Discriminator::new(&DiscriminatorConfig::new(vec![32], 8), vb).unwrap();
        let vars = vars.data().lock().unwrap().clone();
        for var in vars.values() {
            var.set(&random(var.shape())).unwrap();
        }
        (discriminator, vars)
    }

    #[test]
    fn power_iterations_bring_the_largest_singular_value_to_one() {
        let (d, vars) = discriminator();
        for _ in 0..200 {
            d.power_iteration().unwrap();
        }
        for conv in d.branches[0].spectral() {
            let matrix = conv.weight.normalised().unwrap().flatten_from(1).unwrap();
            let gain = |v: &Tensor| {
                let length = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>();
                (length(&matrix.matmul(v).unwrap()).unwrap() / length(v).unwrap()).sqrt()
            };
            let columns = matrix.dim(1).unwrap();
            let largest = gain(&conv.weight.right().unsqueeze(1).unwrap());
            assert!((largest - 1.0).abs() < 1e-3, "{largest}");
            for _ in 0..20 {
                let any = gain(&random((columns, 1)));
                assert!(any < 1.001, "{any}");
            }
        }
        // The vectors are in the variables, so checkpoints have them.
        let length = vars["head.0.b1.0.weight_u"].sqr().unwrap().sum_all();
        assert!((length.unwrap().to_scalar::<f32>().unwrap() - 1.0).abs() < 1e-4);
    }

    #[test]
    fn gradients_reach_all_parameters_but_not_the_vectors_and_none_when_frozen() {
        let (d, vars) = discriminator();
        let features = Var::from_tensor(&random((2, 4, 5, 32))).unwrap();
        let gradients = |d: &Discriminator| {
            let logits = d.forward(&[features.as_tensor().clone()], &[3, 9]).unwrap();
            assert_eq!(logits.dims(), [2, 64 * 20]);
            logits.sqr().unwrap().sum_all().unwrap().backward().unwrap()
        };
        let grads = gradients(&d);
        for (name, var) in &vars {
            assert_eq!(grads.get(var).is_some(), is_parameter(name), "{name}");
        }
        let from_all = grads.get(&features).unwrap();
        let grads = gradients(&d.frozen());
        assert!(vars.values().all(|var| grads.get(var).is_none()));
        let apart = (grads.get(&features).unwrap() - from_all).unwrap();
        let apart = apart.abs().unwrap().max_all().unwrap();
        assert!(apart.to_scalar::<f32>().unwrap() < 1e-4);
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let vb = || VarBuilder::zeros(DType::F32, &Device::Cpu);
        for (channels, time) in [(48, 8), (0, 8), (32, 7), (32, 0)] {
            let config = DiscriminatorConfig::new(vec![channels], time);
            assert!(Discriminator::new(&config, vb()).is_err());
        }
        let (d, _) = discriminator();
        let map = random((1, 1, 3, 32));
        assert!(d.heads(&[map.clone(), map.clone()], &[0]).is_err());
        assert!(d.heads(&[map], &[0]).is_err(), "narrower than the padding");
        assert!(
            d.heads(&[random((2, 4, 4, 32))], &[0]).is_err(),
            "one time for two samples"
        );
    }
}
