//! One-step students: 3x3 convolutions and leaky ReLUs, nothing else.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::latent::LatentKind;
use crate::ops::{Activation, conv2d};

/// Slope of the students' leaky ReLU. Plain ReLU chains of this size can die in training.
pub const LEAKY_SLOPE: f32 = 0.1;

/// How the layers between head and tail are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// `depth` convolutions in a chain.
    Plain,
    /// `depth` pairs `x + conv(act(conv(x)))`.
    Residual,
}

/// A student's shape; everything about its tensors follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StudentConfig {
    pub architecture: Architecture,
    /// Which planes it improves.
    pub latent: LatentKind,
    /// Output pixels a side in a grid cell, 1 to 8.
    pub r: usize,
    /// Channels between head and tail, 1 to 16 for each of the `r * r` pixels in a cell: feature maps then take at most
    /// 64 bytes an output pixel.
    pub channels: usize,
    /// Convolutions (plain) or pairs of them (residual) between head and tail, 0 to 64.
    pub depth: usize,
}

/// What a layer's output goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activated {
    Leaky,
    No,
}

/// A layer's place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its output is the next layer's input.
    Chain,
    /// First of a pair: its input is kept for the second.
    PairFirst,
    /// Second of a pair: the kept input is added to its output.
    PairSecond,
}

/// One convolution, 3x3, stride 1, padding 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Prefix of its tensors: `.weight` `[co, ci, 3, 3]`, `.bias` `[co]`, `.scale` `[co, 2]`.
    pub name: String,
    pub ci: usize,
    pub co: usize,
    pub activated: Activated,
    pub role: Role,
}

impl StudentConfig {
    /// `tiny`: luma, for CPUs. 16 channels at r = 2 (10 k parameters), 32 at r = 4 (46 k).
    pub fn tiny(r: usize) -> Self {
        Self {
            architecture: Architecture::Plain,
            latent: LatentKind::Luma,
            r,
            channels: if r <= 2 { 16 } else { 32 },
            depth: 4,
        }
    }

    /// `small`: luma and chroma at r = 4, 0.33 M parameters.
    pub fn small() -> Self {
        Self {
            architecture: Architecture::Residual,
            latent: LatentKind::Yuv,
            r: 4,
            channels: 64,
            depth: 4,
        }
    }

    /// Whether every field is in its range.
    ///
    /// # Errors
    /// The field at fault, in words.
    pub fn check(&self) -> std::result::Result<(), String> {
        let even = self.latent == LatentKind::Luma || self.r.is_multiple_of(2);
        if !(1..=8).contains(&self.r) || !even {
            return Err(format!("r = {}: 1 to 8, even for a yuv latent", self.r));
        }
        let most = 16 * self.r * self.r;
        if !(1..=most).contains(&self.channels) {
            return Err(format!(
                "{} channels: 1 to {most} for r = {}",
                self.channels, self.r
            ));
        }
        if self.depth > 64 {
            return Err(format!("depth {}: 0 to 64", self.depth));
        }
        Ok(())
    }

    /// The layers in the order in which they run.
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

    /// Number of parameters, the conditioning on the scale included.
    pub fn parameters(&self) -> usize {
        self.layers().iter().map(|l| l.co * (9 * l.ci + 3)).sum()
    }
}

/// What a layer's bias sees of the scale `s`: `[u, u^2]` with `u = log2(s / r)`; zero at the model's own scale `r`.
pub fn scale_features(scale: f64, r: usize) -> [f32; 2] {
    let u = (scale / r as f64).log2() as f32;
    [u, u * u]
}

struct Layer {
    spec: LayerSpec,
    weight: Weight,
    bias: Tensor,
    scale: Tensor,
}

/// A kernel `[co, ci, 3, 3]`.
enum Weight {
    Plain(Tensor),
    /// The product of `squeeze` `[co, width]` and `expand` `[width, ci, 3, 3]`: a wide 3x3 convolution followed by
    /// a 1x1 one, multiplied out. It has the same values to choose from, but gradient descent finds better ones.
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
    /// When a tensor is missing or has another shape.
    pub fn new(config: StudentConfig, vb: VarBuilder) -> Result<Self> {
        Self::build(config, None, vb)
    }

    /// Builds the network for training, each kernel a product of two over `width` channels (collapsible linear blocks,
    /// Bhardwaj et al., arXiv 2103.09404). Makes the tensors that a `VarMap` lacks: `.expand`
    /// `[width, ci, 3, 3]` and `.squeeze` `[co, width]` in the place of `.weight`.
    ///
    /// # Errors
    /// When a tensor has another shape.
    pub fn expanded(config: StudentConfig, width: usize, vb: VarBuilder) -> Result<Self> {
        Self::build(config, Some(width), vb)
    }

    /// The tensors by name, kernels multiplied out: those that [`Self::new`] takes.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn folded(&self) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        for layer in &self.layers {
            let name = &layer.spec.name;
            tensors.insert(format!("{name}.weight"), layer.weight.fold()?);
            tensors.insert(format!("{name}.bias"), layer.bias.clone());
            tensors.insert(format!("{name}.scale"), layer.scale.clone());
        }
        Ok(tensors)
    }

    fn build(config: StudentConfig, width: Option<usize>, vb: VarBuilder) -> Result<Self> {
        let layer = |spec: LayerSpec| -> Result<Layer> {
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
                scale: vb.get((spec.co, 2), "scale")?,
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

    /// Sets the type of its feature maps, f32 at first; what comes in and goes out is f32 all the same.
    pub fn set_dtype(&mut self, dtype: DType) {
        self.dtype = dtype;
    }

    /// Predicts the whitened residual `[n, h, w, c]` from the whitened latent of the base, same shape, at `scale`.
    pub fn forward(&self, z: &Tensor, scale: f64) -> Result<Tensor> {
        let features = Tensor::new(&scale_features(scale, self.config.r), z.device())?;
        let features = features.reshape((2, 1))?;
        let (mut x, mut kept) = (z.to_dtype(self.dtype)?, None);
        for layer in &self.layers {
            let bias = (&layer.bias + layer.scale.matmul(&features)?.squeeze(1)?)?;
            let activation = match layer.spec.activated {
                Activated::Leaky => Activation::LeakyRelu(LEAKY_SLOPE),
                Activated::No => Activation::None,
            };
            let y = conv2d(&x, &layer.weight.fold()?, &bias, 1, 1, activation)?;
            x = match layer.spec.role {
                Role::Chain => y,
                Role::PairFirst => {
                    kept = Some(x);
                    y
                }
                Role::PairSecond => match kept.take() {
                    Some(kept) => (kept + y)?,
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
    fn sizes_have_the_parameters_they_promise() {
        let weights =
            |c: StudentConfig| -> usize { c.layers().iter().map(|l| l.co * (9 * l.ci + 1)).sum() };
        assert_eq!(weights(StudentConfig::tiny(2)), 10_452);
        assert_eq!(weights(StudentConfig::tiny(4)), 46_256);
        assert_eq!(weights(StudentConfig::small()), 323_160);
    }

    #[test]
    fn a_folded_network_computes_what_the_expanded_one_does() {
        for config in [StudentConfig::tiny(2), StudentConfig::small()] {
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
                s.forward(&z, 1.7)
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

    #[test]
    fn the_scale_features_vanish_at_the_models_own_scale() {
        assert_eq!(scale_features(4.0, 4), [0.0, 0.0]);
        assert_eq!(scale_features(1.0, 2), [-1.0, 1.0]);
    }
}
