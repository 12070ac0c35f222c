//! The U-Net with Swin layers that predicts the clean latent.

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::{
    UnetConfig,
    config::{GROUPS, LQ_CHANNELS, UNET_NORM_EPS},
    swin::SwinLayer,
};
use crate::{
    nn::layers::{Conv, Linear, Norm, record, sinusoids},
    ops::{self, Activation},
};

/// The U-Net of the published checkpoints.
pub struct Unet {
    config: UnetConfig,
    time_embed: [Linear; 2],
    lq_stages: Vec<[Conv; 2]>,
    input_blocks: Vec<InputBlock>,
    middle: (ResBlock, SwinLayer, ResBlock),
    output_blocks: Vec<OutputBlock>,
    out: (Norm, Conv),
    dtype: DType,
}

enum InputBlock {
    First(Conv),
    Level(Box<(ResBlock, Option<SwinLayer>)>),
    Down(Conv),
}

struct OutputBlock {
    res: ResBlock,
    swin: Option<SwinLayer>,
    up: Option<Conv>,
}

/// Results of the encoder for the decoder.
struct Encoded {
    /// Output of the middle block.
    middle: Tensor,
    /// Output of every input block.
    skips: Vec<Tensor>,
    /// The embedded time for the ResBlocks.
    time: Tensor,
}

impl UnetConfig {
    /// Returns name and shape of every tensor. Empty for a configuration that fails
    /// [`Self::check`].
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        record(|vb| {
            let _ = Unet::new(self, vb);
        })
    }
}

impl Unet {
    /// Builds the network from the tensors of `vb`, named as in the published checkpoints.
    ///
    /// # Errors
    /// If the configuration fails [`UnetConfig::check`], or a tensor is missing or has another
    /// shape.
    pub fn new(config: &UnetConfig, vb: VarBuilder) -> Result<Self> {
        if let Err(reason) = config.check() {
            bail!("U-Net: {reason}");
        }
        let c = config.model_channels;
        let (input_blocks, skips) = input_blocks(config, vb.pp("input_blocks"))?;
        Ok(Self {
            time_embed: [
                Linear::new(c, 4 * c, vb.pp("time_embed.0"))?,
                Linear::new(4 * c, 4 * c, vb.pp("time_embed.2"))?,
            ],
            lq_stages: lq_stages(config, vb.pp("feature_extractor"))?,
            input_blocks,
            middle: middle(config, vb.pp("middle_block"))?,
            output_blocks: output_blocks(config, skips, vb.pp("output_blocks"))?,
            out: (
                Norm::new(config.channels(0), GROUPS, UNET_NORM_EPS, vb.pp("out.0"))?,
                Conv::new(config.channels(0), config.out_channels, 3, vb.pp("out.2"))?,
            ),
            config: config.clone(),
            dtype: DType::F32,
        })
    }

    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// Returns the device of its tensors.
    pub fn device(&self) -> &Device {
        self.time_embed[0].device()
    }

    /// Returns the type of the feature maps.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sets the type of the feature maps, by default f32. Inputs and outputs are always f32.
    /// [Packed](Self::pack) networks support only f32.
    pub fn set_dtype(&mut self, dtype: DType) {
        self.dtype = dtype;
    }

    /// Packs the weights of all convolutions for inference, which is then faster and has no
    /// gradients. Weights without other owners are freed one by one.
    ///
    /// # Errors
    /// If a weight is not in CPU memory.
    pub fn pack(&mut self) -> Result<()> {
        for conv in self.lq_stages.iter_mut().flatten() {
            conv.pack()?;
        }
        for block in &mut self.input_blocks {
            match block {
                InputBlock::First(conv) | InputBlock::Down(conv) => conv.pack()?,
                InputBlock::Level(block) => {
                    let (res, swin) = &mut **block;
                    res.pack()?;
                    swin.as_mut().map_or(Ok(()), SwinLayer::pack)?;
                }
            }
        }
        let (first, swin, second) = &mut self.middle;
        first.pack()?;
        swin.pack()?;
        second.pack()?;
        for block in &mut self.output_blocks {
            block.res.pack()?;
            block.swin.as_mut().map_or(Ok(()), SwinLayer::pack)?;
            block.up.as_mut().map_or(Ok(()), Conv::pack)?;
        }
        self.out.1.pack()
    }

    /// Predicts the clean latent `[n, h, w, out_channels]`.
    ///
    /// `x` `[n, h, w, in_channels]` is the noisy latent, scaled by
    /// [`Schedule::input_scale`](crate::diffusion::Schedule::input_scale). `t` has the time of each
    /// sample. `lq` is the low-resolution image in -1 .. 1, `[n, h r, w r, 3]` with `r` the
    /// [`lq_ratio`](UnetConfig::lq_ratio), for a network with [`UnetConfig::cond_lq`]. `h` and `w`
    /// are multiples of [`UnetConfig::latent_multiple`].
    ///
    /// # Errors
    /// If a shape does not fit, or `lq` is missing or not an input of this network.
    pub fn forward(&self, x: &Tensor, t: &[usize], lq: Option<&Tensor>) -> Result<Tensor> {
        let Encoded {
            middle: mut h,
            mut skips,
            time,
        } = self.encode(x, t, lq)?;
        for block in &self.output_blocks {
            if let Some(skip) = skips.pop() {
                h = Tensor::cat(&[h, skip], 3)?;
            }
            h = block.res.forward(h, &time)?;
            if let Some(swin) = &block.swin {
                h = swin.forward(h)?;
            }
            if let Some(up) = &block.up {
                h = up.forward(&h)?;
            }
        }
        let (norm, conv) = &self.out;
        h = norm.forward(&h, Activation::Silu)?;
        conv.forward(&h)?.to_dtype(DType::F32)
    }

    /// Returns features of the encoder: the outputs of every downsampling block, of the last input
    /// block and of the middle block, in this order. Arguments are those of [`Self::forward`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn features(&self, x: &Tensor, t: &[usize], lq: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let Encoded { middle, skips, .. } = self.encode(x, t, lq)?;
        let last = skips.len() - 1;
        let mut features: Vec<Tensor> = skips
            .into_iter()
            .zip(&self.input_blocks)
            .enumerate()
            .filter(|(i, (_, block))| *i == last || matches!(block, InputBlock::Down(_)))
            .map(|(_, (skip, _))| skip)
            .collect();
        features.push(middle);
        features.iter().map(|f| f.to_dtype(DType::F32)).collect()
    }

    /// Returns the channels of each of [`Self::features`].
    pub fn feature_channels(&self) -> Vec<usize> {
        let levels = self.config.channel_mult.len();
        let last = self.config.channels(levels - 1);
        let downs = (0..levels - 1).map(|level| self.config.channels(level));
        downs.chain([last, last]).collect()
    }

    /// Returns the embedding of the time, `[n, 4 model_channels]`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn embed_time(&self, t: &[usize]) -> Result<Tensor> {
        let c = self.config.model_channels;
        let x = sinusoids(t, c, self.time_embed[0].device())?;
        let h = ops::silu(&self.time_embed[0].forward(&x)?)?;
        self.time_embed[1].forward(&h)
    }

    fn encode(&self, x: &Tensor, t: &[usize], lq: Option<&Tensor>) -> Result<Encoded> {
        let (n, h, w, _) = x.dims4()?;
        let multiple = self.config.latent_multiple();
        if t.len() != n {
            bail!("U-Net: {n} latents and {} times", t.len());
        }
        if h == 0 || w == 0 || h % multiple != 0 || w % multiple != 0 {
            bail!("U-Net: the sides of a {h}x{w} latent are not multiples of {multiple}");
        }
        let time = ops::silu(&self.embed_time(t)?)?;
        let lq = lq.map(|lq| lq.to_dtype(self.dtype)).transpose()?;
        let mut h = self.join(&x.to_dtype(self.dtype)?, lq.as_ref())?;
        let mut skips = Vec::with_capacity(self.input_blocks.len());
        for block in &self.input_blocks {
            h = match block {
                InputBlock::First(conv) | InputBlock::Down(conv) => conv.forward(&h)?,
                InputBlock::Level(block) => {
                    let (res, swin) = &**block;
                    let h = res.forward(h, &time)?;
                    match swin {
                        Some(swin) => swin.forward(h)?,
                        None => h,
                    }
                }
            };
            skips.push(h.clone());
        }
        let (first, swin, second) = &self.middle;
        h = first.forward(h, &time)?;
        h = swin.forward(h)?;
        h = second.forward(h, &time)?;
        Ok(Encoded {
            middle: h,
            skips,
            time,
        })
    }

    /// Concatenates the latent and the features of the low-resolution image.
    fn join(&self, x: &Tensor, lq: Option<&Tensor>) -> Result<Tensor> {
        let mut lq = match (lq, self.config.cond_lq) {
            (Some(lq), true) => lq.clone(),
            (None, false) => return Ok(x.clone()),
            (None, true) => bail!("U-Net: the low-resolution image is missing"),
            (Some(_), false) => bail!("U-Net: this network has no low-resolution image as input"),
        };
        let (n, h, w, _) = x.dims4()?;
        let ratio = self.config.lq_ratio();
        let wanted = (n, h * ratio, w * ratio, LQ_CHANNELS);
        if lq.dims4()? != wanted {
            bail!(
                "U-Net: a low-resolution image {:?}, not {wanted:?} for a latent {:?}",
                lq.shape(),
                x.shape()
            );
        }
        for [widen, halve] in &self.lq_stages {
            lq = widen.forward(&lq)?;
            lq = ops::silu(&lq)?;
            lq = halve.forward(&lq)?;
        }
        Tensor::cat(&[x, &lq], 3)
    }
}

/// Returns the channels of the features of the low-resolution image.
fn lq_channels(config: &UnetConfig) -> usize {
    match (config.cond_lq, config.lq_ratio()) {
        (false, _) => 0,
        (true, 1) => LQ_CHANNELS,
        (true, ratio) => 16 * ratio,
    }
}

/// Builds a stage for each halving. The first widens the image to 16 channels, each halving doubles
/// them.
fn lq_stages(config: &UnetConfig, vb: VarBuilder) -> Result<Vec<[Conv; 2]>> {
    let halvings = if config.cond_lq {
        config.lq_ratio().ilog2() as usize
    } else {
        0
    };
    (0..halvings)
        .map(|i| {
            let c = 16 << i;
            let ci = if i == 0 { LQ_CHANNELS } else { c };
            Ok([
                Conv::new(ci, c, 3, vb.pp(3 * i))?,
                Conv::new(c, 2 * c, 3, vb.pp(3 * i + 2).pp("op"))?.halving([1, 0]),
            ])
        })
        .collect()
}

/// Builds the blocks of the encoder. Also returns the output channels of each.
fn input_blocks(config: &UnetConfig, vb: VarBuilder) -> Result<(Vec<InputBlock>, Vec<usize>)> {
    let mut c = config.channels(0);
    let ci = config.in_channels + lq_channels(config);
    let first = Conv::new(ci, c, 3, vb.pp("0.0"))?;
    let (mut blocks, mut skips) = (vec![InputBlock::First(first)], vec![c]);
    let levels = config.channel_mult.len();
    for level in 0..levels {
        for i in 0..config.num_res_blocks[level] {
            let vb = vb.pp(blocks.len());
            let co = config.channels(level);
            let res = ResBlock::new(config, c, co, vb.pp(0))?;
            let swin = (i == 0 && config.has_swin(level))
                .then(|| SwinLayer::new(config, level, co, vb.pp(1)))
                .transpose()?;
            blocks.push(InputBlock::Level(Box::new((res, swin))));
            c = co;
            skips.push(c);
        }
        if level + 1 < levels {
            let down = Conv::new(c, c, 3, vb.pp(blocks.len()).pp("0.op"))?.halving([1, 0]);
            blocks.push(InputBlock::Down(down));
            skips.push(c);
        }
    }
    Ok((blocks, skips))
}

fn middle(config: &UnetConfig, vb: VarBuilder) -> Result<(ResBlock, SwinLayer, ResBlock)> {
    let level = config.channel_mult.len() - 1;
    let c = config.channels(level);
    Ok((
        ResBlock::new(config, c, c, vb.pp(0))?,
        SwinLayer::new(config, level, c, vb.pp(1))?,
        ResBlock::new(config, c, c, vb.pp(2))?,
    ))
}

/// Builds the blocks of the decoder. Each takes the last remaining one of `skips`.
fn output_blocks(
    config: &UnetConfig,
    mut skips: Vec<usize>,
    vb: VarBuilder,
) -> Result<Vec<OutputBlock>> {
    let levels = config.channel_mult.len();
    let mut c = config.channels(levels - 1);
    let mut blocks = Vec::with_capacity(skips.len());
    for level in (0..levels).rev() {
        let co = config.channels(level);
        let last = config.num_res_blocks[level];
        for i in 0..=last {
            let vb = vb.pp(blocks.len());
            let ci = c + skips.pop().unwrap_or(0);
            let has_swin = i == 0 && config.has_swin(level);
            let swin = has_swin
                .then(|| SwinLayer::new(config, level, co, vb.pp(1)))
                .transpose()?;
            let up = (level > 0 && i == last)
                .then(|| Conv::new(co, co, 3, vb.pp(1 + usize::from(has_swin)).pp("conv")))
                .transpose()?
                .map(Conv::upsampling);
            let res = ResBlock::new(config, ci, co, vb.pp(0))?;
            blocks.push(OutputBlock { res, swin, up });
            c = co;
        }
    }
    Ok(blocks)
}

/// Two convolutions with a skip. The time modulates the second norm.
struct ResBlock {
    norm1: Norm,
    conv1: Conv,
    time: Linear,
    norm2: Norm,
    conv2: Conv,
    skip: Option<Conv>,
}

impl ResBlock {
    fn new(config: &UnetConfig, ci: usize, co: usize, vb: VarBuilder) -> Result<Self> {
        let skip = (ci != co).then(|| Conv::new(ci, co, 1, vb.pp("skip_connection")));
        Ok(Self {
            norm1: Norm::new(ci, GROUPS, UNET_NORM_EPS, vb.pp("in_layers.0"))?,
            conv1: Conv::new(ci, co, 3, vb.pp("in_layers.2"))?,
            time: Linear::new(4 * config.model_channels, 2 * co, vb.pp("emb_layers.1"))?,
            norm2: Norm::new(co, GROUPS, UNET_NORM_EPS, vb.pp("out_layers.0"))?,
            conv2: Conv::new(co, co, 3, vb.pp("out_layers.3"))?,
            skip: skip.transpose()?,
        })
    }

    /// `time` `[n, 4 model_channels]` is the embedded time after a SiLU.
    fn forward(&self, x: Tensor, time: &Tensor) -> Result<Tensor> {
        let mut h = self.norm1.forward(&x, Activation::Silu)?;
        h = self.conv1.forward(&h)?;
        h = self.norm2.modulated(&h, &self.time.forward(time)?)?;
        let x = match &self.skip {
            Some(skip) => skip.forward(&x)?,
            None => x,
        };
        self.conv2.forward_onto(&x, &h)
    }

    fn pack(&mut self) -> Result<()> {
        let convs = [&mut self.conv1, &mut self.conv2];
        for conv in convs.into_iter().chain(&mut self.skip) {
            conv.pack()?;
        }
        Ok(())
    }
}
