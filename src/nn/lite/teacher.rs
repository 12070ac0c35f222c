//! The teacher of the lite family: a U-Net that denoises the whitened residual.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::condition::scale_features;
use crate::{
    nn::layers::{Conv, Linear, Norm, sinusoids},
    ops::{Activation, silu, upsample2x},
};

/// Channels of a normalisation group.
const GROUP: usize = 16;

/// Factor of a cell's details, about the standard deviation of photographs over that of their
/// residuals.
const DETAIL: f32 = 6.0;

/// Architecture of a teacher, which determines its tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TeacherConfig {
    /// Channels of the latent.
    pub latent: usize,
    /// Side of a grid cell in output pixels.
    pub r: usize,
    /// Channels of each level, multiples of 16. Each level but the last halves the grid.
    pub widths: Vec<usize>,
    /// ResBlocks of each level, in the encoder and in the decoder.
    pub blocks: usize,
}

impl TeacherConfig {
    /// Returns widths 64, 128, 192 with 8.4 M parameters, for GPUs.
    pub fn full(latent: usize, r: usize) -> Self {
        Self {
            latent,
            r,
            widths: vec![64, 128, 192],
            blocks: 2,
        }
    }

    /// Returns widths 16, 32, 48 with 0.5 M parameters, for training on a CPU.
    pub fn micro(latent: usize, r: usize) -> Self {
        Self {
            widths: vec![16, 32, 48],
            ..Self::full(latent, r)
        }
    }

    /// Returns the number of which both sides of the grid must be multiples.
    pub fn multiple(&self) -> usize {
        1 << (self.widths.len() - 1)
    }

    /// Checks the range of every field.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> std::result::Result<(), String> {
        if !(1..=96).contains(&self.latent) || !(1..=8).contains(&self.r) {
            return Err(format!(
                "latent {} at r = {}: 1 to 96, 1 to 8",
                self.latent, self.r
            ));
        }
        if !(1..=5).contains(&self.widths.len()) || !(1..=8).contains(&self.blocks) {
            return Err("a teacher has 1 to 5 levels of 1 to 8 blocks".into());
        }
        match self
            .widths
            .iter()
            .find(|w| **w == 0 || *w % GROUP != 0 || **w > 1024)
        {
            Some(w) => Err(format!("width {w}: a multiple of {GROUP} up to 1024")),
            None => Ok(()),
        }
    }
}

/// A U-Net on the noisy residual at a time of the diffusion and the base. `train::lite::Guided`
/// converts its output to the clean residual.
pub struct Teacher {
    config: TeacherConfig,
    /// Matrix `[z, z]` from the latent of the base to the details of its cells.
    details: Tensor,
    embedding: [Linear; 2],
    head: Conv,
    down: Vec<Level>,
    middle: [Block; 2],
    up: Vec<Level>,
    norm: Norm,
    tail: Conv,
    dtype: DType,
}

/// The blocks of a resolution and the convolution to the next one, which the last level lacks.
struct Level {
    blocks: Vec<Block>,
    step: Option<Conv>,
}

impl Teacher {
    /// Builds the network from the tensors of `vb`. A `VarMap` gets the tensors that it lacks.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(config: TeacherConfig, vb: VarBuilder) -> Result<Self> {
        let (z, e) = (config.latent, Self::embedding_width(&config));
        let widths = &config.widths;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let level = |part: &str, l: usize, inputs: &[usize], co: usize, step: Option<usize>| {
            let vb = vb.pp(part).pp(l);
            let block = |(i, ci): (usize, &usize)| Block::new(*ci, co, e, vb.pp(i));
            Ok::<_, candle_core::Error>(Level {
                blocks: inputs
                    .iter()
                    .enumerate()
                    .map(block)
                    .collect::<Result<_>>()?,
                step: step
                    .map(|to| Conv::new(co, to, 3, vb.pp("step")))
                    .transpose()?,
            })
        };
        let mut down = Vec::new();
        let mut up = Vec::new();
        for (l, &w) in widths.iter().enumerate() {
            let inputs = vec![w; config.blocks];
            let mut lower = level("down", l, &inputs, w, widths.get(l + 1).copied())?;
            lower.step = lower.step.map(|step| step.halving([1, 0]));
            down.push(lower);
            // Each block of the decoder also takes the output of a block of the encoder.
            let step = (l > 0).then(|| widths[l - 1]);
            up.push(level("up", l, &vec![2 * w; config.blocks], w, step)?);
        }
        Ok(Self {
            embedding: [
                Linear::new(first + 2, e, vb.pp("embedding.0"))?,
                Linear::new(e, e, vb.pp("embedding.1"))?,
            ],
            details: details(&config, vb.device())?,
            head: Conv::new(3 * z, first, 3, vb.pp("head"))?,
            down,
            middle: [
                Block::new(last, last, e, vb.pp("middle.0"))?,
                Block::new(last, last, e, vb.pp("middle.1"))?,
            ],
            up,
            norm: norm(first, vb.pp("norm"))?,
            tail: Conv::new(first, z, 3, vb.pp("tail"))?,
            dtype: DType::F32,
            config,
        })
    }

    /// Sets the type of the feature maps, by default f32. Inputs and the result of
    /// [`Self::forward`] are always f32.
    pub fn set_dtype(&mut self, dtype: DType) {
        self.dtype = dtype;
    }

    pub fn config(&self) -> &TeacherConfig {
        &self.config
    }

    /// Returns the network's output `[n, h, w, z]`. `r_t` is the noisy whitened residual, scaled to
    /// about unit variance, and `base` is the whitened latent of the base, both of this shape. `t`
    /// has the time of each sample, `scale` is that of the batch. `h` and `w` are multiples of
    /// [`TeacherConfig::multiple`].
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn forward(&self, r_t: &Tensor, base: &Tensor, t: &[usize], scale: f64) -> Result<Tensor> {
        let embedding = self.embed(t, scale, r_t)?;
        let (mut x, mut skips) = self.encode(r_t, base, &embedding, &mut |_| ())?;
        for level in self.up.iter().rev() {
            for block in &level.blocks {
                let side = skips
                    .pop()
                    .ok_or_else(|| candle_core::Error::msg("no skip is left"))?;
                x = block.forward(&Tensor::cat(&[x, side], D::Minus1)?, &embedding)?;
            }
            if let Some(step) = &level.step {
                x = step.forward(&upsample2x(&x)?)?;
            }
        }
        let x = self.norm.forward(&x, Activation::Silu)?;
        self.tail.forward(&x)?.to_dtype(DType::F32)
    }

    /// Returns the features for a discriminator, in the type of the maps: the output of each level
    /// of the encoder and of the middle.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn features(
        &self,
        r_t: &Tensor,
        base: &Tensor,
        t: &[usize],
        scale: f64,
    ) -> Result<Vec<Tensor>> {
        let embedding = self.embed(t, scale, r_t)?;
        let mut features = Vec::new();
        let (middle, _) = self.encode(r_t, base, &embedding, &mut |x| features.push(x.clone()))?;
        features.push(middle);
        Ok(features)
    }

    /// Returns the channels of each of [`Self::features`].
    pub fn feature_channels(&self) -> Vec<usize> {
        let widths = self.config.widths.iter().copied();
        widths.chain(self.config.widths.last().copied()).collect()
    }

    /// Runs the encoder and the middle. The outputs of all blocks of the encoder are the skips of
    /// the decoder, the latest last.
    fn encode(
        &self,
        r_t: &Tensor,
        base: &Tensor,
        embedding: &Tensor,
        level_done: &mut dyn FnMut(&Tensor),
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let details = base.flatten_to(2)?.matmul(&self.details)?;
        let details = details.reshape(base.shape())?;
        let x = Tensor::cat(&[r_t, base, &details], D::Minus1)?;
        let mut x = self.head.forward(&x.to_dtype(self.dtype)?)?;
        let mut skips = Vec::new();
        for level in &self.down {
            for block in &level.blocks {
                x = block.forward(&x, embedding)?;
                skips.push(x.clone());
            }
            level_done(&x);
            if let Some(step) = &level.step {
                x = step.forward(&x)?;
            }
        }
        for block in &self.middle {
            x = block.forward(&x, embedding)?;
        }
        Ok((x, skips))
    }

    /// Returns the embedding `[n, e]` after a SiLU, from which each block computes its modulation.
    fn embed(&self, t: &[usize], scale: f64, like: &Tensor) -> Result<Tensor> {
        let time = sinusoids(t, self.config.widths[0], like.device())?;
        let scale = Tensor::new(&scale_features(scale, self.config.r), like.device())?;
        let x = Tensor::cat(&[time, scale.broadcast_as((t.len(), 2))?], 1)?;
        let [first, second] = &self.embedding;
        silu(&second.forward(&silu(&first.forward(&x)?)?)?)
    }

    fn embedding_width(config: &TeacherConfig) -> usize {
        4 * config.widths[0]
    }
}

/// Returns the matrix from a latent's channels to their differences from the mean of their plane in
/// the cell, times [`DETAIL`]. The channels of a plane are almost equal, so without it a network
/// must learn large weights before it sees their differences.
fn details(config: &TeacherConfig, device: &Device) -> Result<Tensor> {
    let (z, luma) = (config.latent, (config.r * config.r).min(config.latent));
    let chroma = (z - luma) / 2;
    let plane = |c: usize| match c.checked_sub(luma) {
        None => (0, luma),
        Some(above) => (1 + above / chroma.max(1), chroma.max(1)),
    };
    let entry = |from: usize, to: usize| {
        let (plane_to, count) = plane(to);
        let mean = if plane(from).0 == plane_to {
            1.0 / count as f32
        } else {
            0.0
        };
        DETAIL * (f32::from(u8::from(from == to)) - mean)
    };
    let values = (0..z).flat_map(|from| (0..z).map(move |to| entry(from, to)));
    Tensor::from_vec(values.collect::<Vec<f32>>(), (z, z), device)
}

/// The block `x + conv(silu(modulated norm(conv(silu(norm(x))))))`.
struct Block {
    norm1: Norm,
    conv1: Conv,
    modulation: Linear,
    norm2: Norm,
    conv2: Conv,
    skip: Option<Conv>,
}

impl Block {
    fn new(ci: usize, co: usize, embedding: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm1: norm(ci, vb.pp("norm1"))?,
            conv1: Conv::new(ci, co, 3, vb.pp("conv1"))?,
            modulation: Linear::new(embedding, 2 * co, vb.pp("modulation"))?,
            norm2: norm(co, vb.pp("norm2"))?,
            conv2: Conv::new(co, co, 3, vb.pp("conv2"))?,
            skip: (ci != co)
                .then(|| Conv::new(ci, co, 1, vb.pp("skip")))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor, embedding: &Tensor) -> Result<Tensor> {
        let y = self
            .conv1
            .forward(&self.norm1.forward(x, Activation::Silu)?)?;
        let modulation = self.modulation.forward(embedding)?;
        let y = self.norm2.modulated(&y, &modulation)?;
        let y = self.conv2.forward(&y)?;
        match &self.skip {
            Some(skip) => skip.forward(x)? + y,
            None => x + y,
        }
    }
}

/// Returns a group norm with groups of [`GROUP`] channels.
fn norm(channels: usize, vb: VarBuilder) -> Result<Norm> {
    Norm::new(channels, channels / GROUP, 1e-5, vb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, variable};
    use candle_core::Var;
    use candle_nn::VarMap;

    fn random(shape: impl Into<candle_core::Shape>) -> Var {
        variable(0.0, 1.0, shape)
    }

    fn teacher(config: TeacherConfig) -> (Teacher, VarMap) {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let teacher = Teacher::new(config, vb).unwrap();
        for var in vars.all_vars() {
            let fan: usize = var.dims().iter().skip(1).product();
            let std = (1.0 / fan.max(1) as f32).sqrt();
            var.set(&normal(0.0, std, var.shape())).unwrap();
        }
        (teacher, vars)
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn sizes_have_about_their_documented_parameters() {
        let count = |config| {
            let all = teacher(config).1.all_vars();
            all.iter().map(|v| v.elem_count()).sum::<usize>()
        };
        let (full, micro) = (
            count(TeacherConfig::full(24, 4)),
            count(TeacherConfig::micro(16, 4)),
        );
        assert!((8_000_000..9_000_000).contains(&full), "{full}");
        assert!((500_000..1_100_000).contains(&micro), "{micro}");
    }

    #[test]
    fn every_parameter_and_both_inputs_matter() {
        let (teacher, vars) = teacher(TeacherConfig::micro(4, 2));
        let (r_t, base) = (random((2, 8, 12, 4)), random((2, 8, 12, 4)));
        let y = teacher.forward(&r_t, &base, &[0, 5], 1.5).unwrap();
        assert_eq!(y.dims(), [2, 8, 12, 4]);
        let target = random((2, 8, 12, 4));
        let loss = (y - target.as_tensor()).unwrap().sqr().unwrap().sum_all();
        let grads = loss.unwrap().backward().unwrap();
        for var in vars.all_vars().iter().chain([&r_t, &base]) {
            let grad = grads.get(var).expect("a gradient");
            assert!(values(grad).iter().any(|g| *g != 0.0), "{:?}", var.shape());
        }
    }

    #[test]
    fn time_and_scale_change_only_the_result_of_their_sample() {
        let (teacher, _) = teacher(TeacherConfig::micro(4, 2));
        let x = random((1, 4, 4, 4));
        let two = Tensor::cat(&[x.as_tensor(), x.as_tensor()], 0).unwrap();
        let at = |t: &[usize], scale| {
            let all = values(&teacher.forward(&two, &two, t, scale).unwrap());
            let (a, b) = all.split_at(64);
            (a.to_vec(), b.to_vec())
        };
        let (same, other) = at(&[3, 7], 2.0);
        assert_ne!(same, other);
        assert_eq!(at(&[3, 3], 2.0), (same.clone(), same.clone()));
        assert_ne!(at(&[3, 3], 1.5).0, same);
    }

    #[test]
    fn the_features_are_those_of_the_encoder_and_the_middle() {
        let (teacher, _) = teacher(TeacherConfig::micro(4, 2));
        let x = random((1, 8, 8, 4));
        let features = teacher.features(&x, &x, &[1], 2.0).unwrap();
        let shapes: Vec<_> = features.iter().map(|f| f.dims().to_vec()).collect();
        let want = [[1, 8, 8, 16], [1, 4, 4, 32], [1, 2, 2, 48], [1, 2, 2, 48]];
        assert_eq!(shapes, want);
        assert_eq!(teacher.feature_channels(), [16, 32, 48, 48]);
    }
}
