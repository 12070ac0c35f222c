//! One-step students of 3x3 convolutions and leaky ReLUs.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::{
    condition::{Condition, Conditioning, Input},
    latent::LatentKind,
};
use crate::ops::{Activation, conv2d};

/// Slope of the leaky ReLU. Plain ReLUs in chains of this size can die in training.
pub const LEAKY_SLOPE: f32 = 0.1;

/// Connection of the layers between head and tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// `depth` convolutions in a chain.
    Plain,
    /// `depth` pairs `x + conv(act(conv(x)))`.
    Residual,
}

/// Architecture of a student, which determines its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StudentConfig {
    pub architecture: Architecture,
    /// Planes that the network improves.
    pub latent: LatentKind,
    /// Side of a grid cell in output pixels, 1 to 8.
    pub r: usize,
    /// Channels between head and tail, 1 to 16 for each of the `r * r` pixels of a cell, so that
    /// feature maps take at most 64 bytes for each output pixel.
    pub channels: usize,
    /// Convolutions (plain) or pairs of them (residual) between head and tail, 0 to 64.
    pub depth: usize,
    /// Inputs of the weights besides the scale.
    #[serde(default, skip_serializing_if = "Conditioning::is_none")]
    pub conditioning: Conditioning,
}

/// Activation of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activated {
    Leaky,
    No,
}

/// Position of a layer in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its output is the input of the next layer.
    Chain,
    /// First of a pair: its input is the skip of the second.
    PairFirst,
    /// Second of a pair: the skip is added to its output.
    PairSecond,
}

/// One 3x3 convolution with stride 1 and padding 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Prefix of its tensors `.weight` `[co, ci, 3, 3]`, `.bias` `[co]` and those of
    /// [`Self::conditions`].
    pub name: String,
    pub ci: usize,
    pub co: usize,
    pub activated: Activated,
    pub role: Role,
}

/// Names and shapes of the tensors by which a layer depends on one input of `n` features.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConditionSpec {
    pub input: Input,
    /// `[co, n]`, added to the bias.
    pub shift: (String, [usize; 2]),
    /// `[co, n]`, relative change of the kernel of an output channel.
    pub gain: Option<(String, [usize; 2])>,
    /// `[n, co, ci, 3, 3]`, added to the kernel, for [`Input::Detail`] only.
    pub kernels: Option<(String, [usize; 5])>,
}

impl ConditionSpec {
    /// Returns names and shapes of its tensors: shift, gain and kernels, if it has them.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let shift = (self.shift.0.as_str(), &self.shift.1[..]);
        let gain = self
            .gain
            .as_ref()
            .map(|(name, shape)| (name.as_str(), &shape[..]));
        let kernels = self.kernels.as_ref();
        let kernels = kernels.map(|(name, shape)| (name.as_str(), &shape[..]));
        [Some(shift), gain, kernels].into_iter().flatten()
    }
}

impl LayerSpec {
    /// Returns the tensors for each input. The scale is the first.
    pub fn conditions(&self, conditioning: &Conditioning) -> Vec<ConditionSpec> {
        let spec = |input: Input| {
            let (name, n) = (format!("{}.{}", self.name, input.name()), input.count());
            let full = !conditioning.is_none();
            let kernels = [n, self.co, self.ci, 3, 3];
            ConditionSpec {
                input,
                shift: match input {
                    Input::Scale => (name.clone(), [self.co, n]),
                    _ => (format!("{name}.shift"), [self.co, n]),
                },
                gain: full.then(|| (format!("{name}.gain"), [self.co, n])),
                kernels: (input == Input::Detail).then(|| (format!("{name}.kernels"), kernels)),
            }
        };
        conditioning.inputs().map(spec).collect()
    }
}

impl StudentConfig {
    /// Returns `tiny`: luma, for CPUs. 16 channels at r = 2 (10 k parameters), 32 at r = 4 (46 k).
    pub fn tiny(r: usize) -> Self {
        Self {
            architecture: Architecture::Plain,
            latent: LatentKind::Luma,
            r,
            channels: if r <= 2 { 16 } else { 32 },
            depth: 4,
            conditioning: Conditioning::default(),
        }
    }

    /// Returns `small`: luma, for fast CPUs. 32 channels at r = 2 (76 k parameters), 48 at r = 4
    /// (159 k).
    pub fn small(r: usize) -> Self {
        Self {
            channels: if r <= 2 { 32 } else { 48 },
            depth: if r <= 2 { 8 } else { 7 },
            ..Self::tiny(r)
        }
    }

    /// Returns `base`: luma, for GPUs and large CPUs. Five pairs of 64 channels, 0.4 M parameters.
    pub fn base(r: usize) -> Self {
        Self {
            architecture: Architecture::Residual,
            channels: 64,
            depth: 5,
            ..Self::tiny(r)
        }
    }

    /// Returns luma and chroma at r = 4: four pairs of 64 channels, 0.33 M parameters.
    pub fn chroma() -> Self {
        Self {
            architecture: Architecture::Residual,
            latent: LatentKind::Yuv,
            r: 4,
            channels: 64,
            depth: 4,
            conditioning: Conditioning::default(),
        }
    }

    /// Checks the range of every field.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> std::result::Result<(), String> {
        let even = self.latent == LatentKind::Luma || self.r.is_multiple_of(2);
        if !(1..=8).contains(&self.r) || !even {
            return Err(format!("r = {}: 1 to 8, even for a yuv latent", self.r));
        }
        let max = 16 * self.r * self.r;
        if !(1..=max).contains(&self.channels) {
            return Err(format!(
                "{} channels: 1 to {max} for r = {}",
                self.channels, self.r
            ));
        }
        if self.depth > 64 {
            return Err(format!("depth {}: 0 to 64", self.depth));
        }
        Ok(())
    }

    /// Returns the layers in order of execution.
    pub fn layers(&self) -> Vec<LayerSpec> {
        let (z, c) = (self.latent.channels(self.r), self.channels);
        let layer = |name: String, ci, co, activated, role| LayerSpec {
            name,
            ci,
            co,
            activated,
            role,
        };
        let mut layers = vec![layer("head".into(), z, c, Activated::Leaky, Role::Chain)];
        for i in 0..self.depth {
            match self.architecture {
                Architecture::Plain => {
                    layers.push(layer(
                        format!("body.{i}"),
                        c,
                        c,
                        Activated::Leaky,
                        Role::Chain,
                    ));
                }
                Architecture::Residual => {
                    let name = |j| format!("body.{i}.{j}");
                    layers.push(layer(name(0), c, c, Activated::Leaky, Role::PairFirst));
                    layers.push(layer(name(1), c, c, Activated::No, Role::PairSecond));
                }
            }
        }
        layers.push(layer("tail".into(), c, z, Activated::No, Role::Chain));
        layers
    }

    /// Returns the number of parameters, including those of conditioning.
    pub fn parameters(&self) -> usize {
        let conditions = |l: &LayerSpec| -> usize {
            let all = l.conditions(&self.conditioning);
            let values = |c: &ConditionSpec| -> usize {
                c.tensors()
                    .map(|(_, shape)| shape.iter().product::<usize>())
                    .sum()
            };
            all.iter().map(values).sum()
        };
        let layers = self.layers();
        let count = |l: &LayerSpec| l.co * (9 * l.ci + 1) + conditions(l);
        layers.iter().map(count).sum()
    }
}

struct Layer {
    spec: LayerSpec,
    weight: Weight,
    bias: Tensor,
    conditions: Vec<LayerCondition>,
}

/// The tensors of a [`ConditionSpec`].
struct LayerCondition {
    spec: ConditionSpec,
    shift: Tensor,
    gain: Option<Tensor>,
    kernels: Option<Tensor>,
}

impl Layer {
    /// Returns kernel `[co, ci, 3, 3]` and bias `[co]` at `at` for a grid cell of side `r`.
    fn fold(&self, at: &Condition, r: usize) -> Result<(Tensor, Tensor)> {
        let (mut kernel, mut bias) = (self.weight.fold()?, self.bias.clone());
        let mut factor: Option<Tensor> = None;
        for condition in &self.conditions {
            let features = condition.spec.input.features(at, r);
            let features = Tensor::new(features.as_slice(), bias.device())?;
            let column = features.reshape(((), 1))?;
            bias = (bias + condition.shift.matmul(&column)?.squeeze(1)?)?;
            if let Some(gain) = &condition.gain {
                let gain = gain.matmul(&column)?;
                factor = Some(match factor {
                    Some(factor) => (factor + gain)?,
                    None => (gain + 1.0)?,
                });
            }
            if let Some(kernels) = &condition.kernels {
                let flat = kernels.reshape((features.elem_count(), ()))?;
                let sum = features.reshape((1, ()))?.matmul(&flat)?;
                kernel = (&kernel + sum.reshape(kernel.shape())?)?;
            }
        }
        if let Some(factor) = factor {
            kernel = kernel.broadcast_mul(&factor.reshape(((), 1, 1, 1))?)?;
        }
        Ok((kernel, bias))
    }
}

/// A kernel `[co, ci, 3, 3]`.
enum Weight {
    Plain(Tensor),
    /// The product of `squeeze` `[co, width]` and `expand` `[width, ci, 3, 3]`, which is a wide 3x3
    /// convolution followed by a 1x1 convolution. It represents the same kernels, but gradient
    /// descent finds better ones.
    Expanded {
        squeeze: Tensor,
        expand: Tensor,
    },
}

impl Weight {
    fn fold(&self) -> Result<Tensor> {
        match self {
            Self::Plain(weight) => Ok(weight.clone()),
            Self::Expanded { squeeze, expand } => {
                let (width, ci, kh, kw) = expand.dims4()?;
                let flat = squeeze.matmul(&expand.reshape((width, ci * kh * kw))?)?;
                flat.reshape((squeeze.dim(0)?, ci, kh, kw))
            }
        }
    }
}

/// A student as a differentiable network.
pub struct Student {
    config: StudentConfig,
    layers: Vec<Layer>,
    dtype: DType,
}

impl Student {
    /// Builds the network from the tensors of `vb`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(config: StudentConfig, vb: VarBuilder) -> Result<Self> {
        Self::build(config, None, vb)
    }

    /// Builds the network for training. Each kernel is a product over `width` channels (collapsible
    /// linear blocks, Bhardwaj et al., arXiv 2103.09404) of the tensors `.expand` `[width, ci, 3,
    /// 3]` and `.squeeze` `[co, width]` instead of `.weight`. A `VarMap` gets the tensors that it
    /// lacks.
    ///
    /// # Errors
    /// If a tensor has another shape.
    pub fn expanded(config: StudentConfig, width: usize, vb: VarBuilder) -> Result<Self> {
        Self::build(config, Some(width), vb)
    }

    /// Returns the tensors of [`Self::new`] by name. Products of kernels are multiplied out.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn folded(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        for layer in &self.layers {
            let name = &layer.spec.name;
            tensors.insert(format!("{name}.weight"), layer.weight.fold()?);
            tensors.insert(format!("{name}.bias"), layer.bias.clone());
            for c in &layer.conditions {
                let values = [Some(&c.shift), c.gain.as_ref(), c.kernels.as_ref()];
                let named = c.spec.tensors().zip(values.into_iter().flatten());
                tensors.extend(named.map(|((name, _), t)| (name.to_string(), t.clone())));
            }
        }
        Ok(tensors)
    }

    fn build(config: StudentConfig, width: Option<usize>, vb: VarBuilder) -> Result<Self> {
        let condition = |spec: ConditionSpec| -> Result<LayerCondition> {
            let gain = spec.gain.as_ref();
            let kernels = spec.kernels.as_ref();
            Ok(LayerCondition {
                shift: vb.get(spec.shift.1.as_slice(), &spec.shift.0)?,
                gain: gain
                    .map(|(name, shape)| vb.get(shape.as_slice(), name))
                    .transpose()?,
                kernels: kernels
                    .map(|(name, shape)| vb.get(shape.as_slice(), name))
                    .transpose()?,
                spec,
            })
        };
        let layer = |spec: LayerSpec| -> Result<Layer> {
            let conditions = spec.conditions(&config.conditioning);
            let vb = vb.pp(&spec.name);
            Ok(Layer {
                weight: match width {
                    None => Weight::Plain(vb.get((spec.co, spec.ci, 3, 3), "weight")?),
                    Some(width) => Weight::Expanded {
                        squeeze: vb.get((spec.co, width), "squeeze")?,
                        expand: vb.get((width, spec.ci, 3, 3), "expand")?,
                    },
                },
                bias: vb.get(spec.co, "bias")?,
                conditions: conditions
                    .into_iter()
                    .map(condition)
                    .collect::<Result<_>>()?,
                spec,
            })
        };
        Ok(Self {
            config,
            layers: config
                .layers()
                .into_iter()
                .map(layer)
                .collect::<Result<_>>()?,
            dtype: DType::F32,
        })
    }

    /// Sets the type of the feature maps, by default f32. Inputs and outputs are always f32.
    pub fn set_dtype(&mut self, dtype: DType) {
        self.dtype = dtype;
    }

    /// Predicts the whitened residual `[n, h, w, c]` from the whitened latent of the base, of the
    /// same shape, at `at`.
    pub fn forward(&self, z: &Tensor, at: &Condition) -> Result<Tensor> {
        let (mut x, mut skip) = (z.to_dtype(self.dtype)?, None);
        for layer in &self.layers {
            let (kernel, bias) = layer.fold(at, self.config.r)?;
            let activation = match layer.spec.activated {
                Activated::Leaky => Activation::LeakyRelu(LEAKY_SLOPE),
                Activated::No => Activation::None,
            };
            let y = conv2d(&x, &kernel, &bias, 1, 1, activation)?;
            x = match layer.spec.role {
                Role::Chain => y,
                Role::PairFirst => {
                    skip = Some(x);
                    y
                }
                Role::PairSecond => match skip.take() {
                    Some(skip) => (skip + y)?,
                    None => y,
                },
            };
        }
        x.to_dtype(DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_nn::VarMap;

    #[test]
    fn sizes_have_their_documented_parameters() {
        let weights =
            |c: StudentConfig| -> usize { c.layers().iter().map(|l| l.co * (9 * l.ci + 1)).sum() };
        assert_eq!(weights(StudentConfig::tiny(2)), 10_452);
        assert_eq!(weights(StudentConfig::tiny(4)), 46_256);
        assert_eq!(weights(StudentConfig::chroma()), 323_160);
    }

    #[test]
    fn a_folded_network_computes_the_same_as_the_expanded_one() {
        let conditioning = Conditioning {
            denoise: true,
            detail: true,
        };
        let at = Condition {
            scale: 1.7,
            denoise: 0.3,
            detail: 0.6,
        };
        for config in [
            StudentConfig::tiny(2),
            StudentConfig::chroma(),
            StudentConfig {
                conditioning,
                ..StudentConfig::tiny(2)
            },
        ] {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
            let wide = Student::expanded(config, 40, vb).unwrap();
            for var in vars.all_vars() {
                var.set(&Tensor::randn(0f32, 0.1, var.shape(), &Device::Cpu).unwrap())
                    .unwrap();
            }
            let vb = VarBuilder::from_tensors(wide.folded().unwrap(), DType::F32, &Device::Cpu);
            let folded = Student::new(config, vb).unwrap();
            let z = (1, 6, 7, config.latent.channels(config.r));
            let z = Tensor::randn(0f32, 1.0, z, &Device::Cpu).unwrap();
            let [a, b] = [&wide, &folded].map(|s| {
                s.forward(&z, &at)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
            });
            assert!(a.iter().any(|v| v.abs() > 1e-3));
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{a}, not {b}");
            }
        }
    }
}
