//! One-step students of 3x3 convolutions and leaky ReLUs.

use std::{collections::HashMap, iter};

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::{
    condition::{Condition, Conditioning, Input, is_zero},
    latent::LatentKind,
    memory::Clips,
};
use crate::ops::{Activation, conv2d};

/// Slope of the leaky ReLU. Plain ReLUs in chains of this size can die in training.
pub const LEAKY_SLOPE: f32 = 0.1;

/// Maximum number of channels of the state of a network with memory.
const MAX_MEMORY: usize = 64;

/// Maximum rank of the kernels of a dial.
const MAX_RANK: usize = 64;

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
    /// Channels of the state that the network passes to the next frame, besides its result, see
    /// [`super::memory`]; 0 for a network without memory.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub memory: usize,
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
    /// `[n, co, ci, 3, 3]`, added to the kernel, or its factors `[co, rank]` and `[rank, ci, 3,
    /// 3]`. For [`Input::Detail`] only, else empty.
    pub kernels: Vec<(String, Vec<usize>)>,
}

impl ConditionSpec {
    /// Returns names and shapes of its tensors: shift, gain and kernels, if it has them.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        let shift = (self.shift.0.as_str(), &self.shift.1[..]);
        let gain = self
            .gain
            .as_ref()
            .map(|(name, shape)| (name.as_str(), &shape[..]));
        let kernels = self.kernels.iter();
        let kernels = kernels.map(|(name, shape)| (name.as_str(), &shape[..]));
        iter::once(shift).chain(gain).chain(kernels)
    }
}

impl LayerSpec {
    /// Returns the tensors for each input. The scale is the first.
    pub fn conditions(&self, conditioning: &Conditioning) -> Vec<ConditionSpec> {
        let spec = |input: Input| {
            let (name, n) = (format!("{}.{}", self.name, input.name()), input.count());
            let full = !conditioning.is_none();
            let rank = conditioning.detail_rank;
            let kernels = match (input, rank) {
                (Input::Detail, 0) => {
                    vec![(format!("{name}.kernels"), vec![n, self.co, self.ci, 3, 3])]
                }
                (Input::Detail, _) => vec![
                    (format!("{name}.up"), vec![self.co, rank]),
                    (format!("{name}.down"), vec![rank, self.ci, 3, 3]),
                ],
                _ => Vec::new(),
            };
            ConditionSpec {
                input,
                shift: match input {
                    Input::Scale => (name.clone(), [self.co, n]),
                    _ => (format!("{name}.shift"), [self.co, n]),
                },
                gain: full.then(|| (format!("{name}.gain"), [self.co, n])),
                kernels,
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
            memory: 0,
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
            memory: 0,
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
        if self.memory > MAX_MEMORY {
            return Err(format!("memory {}: 0 to {MAX_MEMORY}", self.memory));
        }
        if self.memory > 0 && (self.latent != LatentKind::Luma || !self.r.is_multiple_of(2)) {
            return Err("memory: for a luma latent and even r".into());
        }
        let Conditioning {
            detail,
            detail_rank,
            ..
        } = self.conditioning;
        if detail_rank > if detail { MAX_RANK } else { 0 } {
            return Err(format!(
                "detail_rank {detail_rank}: 0 to {MAX_RANK}, and 0 without the dial detail"
            ));
        }
        Ok(())
    }

    /// Returns the channels of the input: the latent, and with memory what [`super::memory`]
    /// lists.
    pub fn inputs(&self) -> usize {
        let z = self.latent.channels(self.r);
        match self.memory {
            0 => z,
            memory => 2 * z + memory + 1,
        }
    }

    /// Returns the channels of the output: the residual, and with memory what [`super::memory`]
    /// lists.
    pub fn outputs(&self) -> usize {
        let z = self.latent.channels(self.r);
        match self.memory {
            0 => z,
            memory => 2 * z + memory,
        }
    }

    /// Returns the layers in order of execution.
    pub fn layers(&self) -> Vec<LayerSpec> {
        let c = self.channels;
        let layer = |name: String, ci, co, activated, role| LayerSpec {
            name,
            ci,
            co,
            activated,
            role,
        };
        let mut layers = vec![layer(
            "head".into(),
            self.inputs(),
            c,
            Activated::Leaky,
            Role::Chain,
        )];
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
        layers.push(layer(
            "tail".into(),
            c,
            self.outputs(),
            Activated::No,
            Role::Chain,
        ));
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
    kernels: Vec<Tensor>,
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
            let added = match condition.kernels.as_slice() {
                [all] => all.reshape((features.elem_count(), ()))?,
                [up, down] => multiply(up, down)?.reshape((1, ()))?,
                _ => continue,
            };
            let sum = features.reshape((1, ()))?.matmul(&added)?;
            kernel = (&kernel + sum.reshape(kernel.shape())?)?;
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
            Self::Expanded { squeeze, expand } => multiply(squeeze, expand),
        }
    }
}

/// Returns the product `[co, ci, 3, 3]` of `[co, width]` and `[width, ci, 3, 3]`.
fn multiply(squeeze: &Tensor, expand: &Tensor) -> Result<Tensor> {
    let (width, ci, kh, kw) = expand.dims4()?;
    let flat = squeeze.matmul(&expand.reshape((width, ci * kh * kw))?)?;
    flat.reshape((squeeze.dim(0)?, ci, kh, kw))
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
                let values = iter::once(&c.shift).chain(&c.gain).chain(&c.kernels);
                let named = c.spec.tensors().zip(values);
                tensors.extend(named.map(|((name, _), t)| (name.to_string(), t.clone())));
            }
        }
        Ok(tensors)
    }

    fn build(config: StudentConfig, width: Option<usize>, vb: VarBuilder) -> Result<Self> {
        let condition = |spec: ConditionSpec| -> Result<LayerCondition> {
            let gain = spec.gain.as_ref();
            let kernels = spec.kernels.iter();
            Ok(LayerCondition {
                shift: vb.get(spec.shift.1.as_slice(), &spec.shift.0)?,
                gain: gain
                    .map(|(name, shape)| vb.get(shape.as_slice(), name))
                    .transpose()?,
                kernels: kernels
                    .map(|(name, shape)| vb.get(shape.as_slice(), name))
                    .collect::<Result<_>>()?,
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
    /// same shape, at `at`. A network with memory gets none.
    pub fn forward(&self, z: &Tensor, at: &Condition) -> Result<Tensor> {
        let folded = self.fold(at)?;
        self.first(&folded, z)
    }

    /// Predicts the residuals of the frames of `clips` as [`Self::forward`], each with the memory
    /// of those before it. `z` and the result are `[frames * n, h, w, c]`, frame by frame.
    pub fn forward_clips(&self, z: &Tensor, at: &Condition, clips: &Clips) -> Result<Tensor> {
        self.clips(z, at, clips, |_| {})
    }

    /// Returns the inputs of the first layer in [`Self::forward_clips`], `[frames * n, h, w,
    /// inputs]`.
    pub fn clip_inputs(&self, z: &Tensor, at: &Condition, clips: &Clips) -> Result<Tensor> {
        let mut inputs = Vec::new();
        self.clips(z, at, clips, |input| inputs.push(input.clone()))?;
        Tensor::cat(&inputs, 0)
    }

    fn clips(
        &self,
        z: &Tensor,
        at: &Condition,
        clips: &Clips,
        mut seen: impl FnMut(&Tensor),
    ) -> Result<Tensor> {
        let (folded, channels) = (self.fold(at)?, z.dim(3)?);
        let memory = self.config.memory;
        let n = z.dim(0)? / clips.frames;
        let per_channel = |values: &[f32]| Tensor::new(values, z.device());
        let (mean, std) = (
            per_channel(&clips.stats.input_mean)?,
            per_channel(&clips.stats.input_std)?,
        );
        let residual_std = per_channel(&clips.stats.residual_std)?;
        let mut last: Option<(Tensor, Tensor)> = None;
        let mut results = Vec::new();
        for t in 0..clips.frames {
            let z = z.narrow(0, t * n, n)?;
            let base = z.broadcast_mul(&std)?.broadcast_add(&mean)?;
            let (_, h, w, _) = z.dims4()?;
            let (confidence, change, state) = match &last {
                Some((result, state)) => {
                    let at = |all: &Tensor| all.get(t - 1);
                    let confidence = at(&clips.confidence)?.reshape((n, h, w, 1))?;
                    let moved = result.flatten_all()?;
                    let moved = moved.index_select(&at(&clips.samples)?, 0)?;
                    let change = (moved.reshape(z.shape())? - &base)?;
                    let change = change.broadcast_div(&residual_std)?;
                    let state = state.reshape((n * h * w, memory))?;
                    let state = state.index_select(&at(&clips.cells)?, 0)?;
                    (confidence, change, state.reshape((n, h, w, memory))?)
                }
                None => {
                    let zeros = |c: usize| Tensor::zeros((n, h, w, c), DType::F32, z.device());
                    (zeros(1)?, zeros(channels)?, zeros(memory)?)
                }
            };
            let trusted = |x: &Tensor| x.broadcast_mul(&confidence);
            let input = [&z, &trusted(&change)?, &trusted(&state)?, &confidence];
            let input = Tensor::cat(&input, 3)?;
            seen(&input);
            let y = self.run(&folded, &input)?;
            let residual = y.narrow(3, 0, channels)?;
            let gate = y.narrow(3, channels, channels)?;
            let gate = ((gate / 6.0)? + 0.5)?.clamp(0f32, 1f32)?;
            let share = trusted(&gate)?;
            let residual = (&residual + (share * (change - &residual)?)?)?;
            let state = y.narrow(3, 2 * channels, memory)?.clamp(-1f32, 1f32)?;
            let result = (base + residual.broadcast_mul(&residual_std)?)?;
            last = Some((result, state));
            results.push(residual);
        }
        Tensor::cat(&results, 0)
    }

    /// Returns kernel and bias of each layer at `at`.
    fn fold(&self, at: &Condition) -> Result<Vec<(Tensor, Tensor)>> {
        let fold = |layer: &Layer| layer.fold(at, self.config.r);
        self.layers.iter().map(fold).collect()
    }

    /// Runs the network without memory: with the parts of the first and the last kernel that see
    /// the latent and make the residual.
    fn first(&self, folded: &[(Tensor, Tensor)], z: &Tensor) -> Result<Tensor> {
        if self.config.memory == 0 {
            return self.run(folded, z);
        }
        let (channels, mut folded) = (z.dim(3)?, folded.to_vec());
        if let Some((kernel, _)) = folded.first_mut() {
            *kernel = kernel.narrow(1, 0, channels)?.contiguous()?;
        }
        if let Some((kernel, bias)) = folded.last_mut() {
            *kernel = kernel.narrow(0, 0, channels)?.contiguous()?;
            *bias = bias.narrow(0, 0, channels)?.contiguous()?;
        }
        self.run(&folded, z)
    }

    fn run(&self, folded: &[(Tensor, Tensor)], input: &Tensor) -> Result<Tensor> {
        let (mut x, mut skip) = (input.to_dtype(self.dtype)?, None);
        for (layer, (kernel, bias)) in self.layers.iter().zip(folded) {
            let activation = match layer.spec.activated {
                Activated::Leaky => Activation::LeakyRelu(LEAKY_SLOPE),
                Activated::No => Activation::None,
            };
            let y = conv2d(&x, kernel, bias, 1, 1, activation)?;
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
    use crate::testing::normal;
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
        let with_rank = |detail_rank| StudentConfig {
            conditioning: Conditioning {
                denoise: true,
                detail: true,
                detail_rank,
            },
            ..StudentConfig::tiny(2)
        };
        let at = Condition {
            scale: 1.7,
            denoise: 0.3,
            detail: 0.6,
        };
        for config in [
            StudentConfig::tiny(2),
            StudentConfig::chroma(),
            with_rank(0),
            with_rank(3),
        ] {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
            let wide = Student::expanded(config, 40, vb).unwrap();
            for var in vars.all_vars() {
                var.set(&normal(0.0, 0.1, var.shape())).unwrap();
            }
            let vb = VarBuilder::from_tensors(wide.folded().unwrap(), DType::F32, &Device::Cpu);
            let folded = Student::new(config, vb).unwrap();
            let z = (1, 6, 7, config.latent.channels(config.r));
            let z = normal(0.0, 1.0, z);
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
