//! The vector-quantised autoencoder of the latent (Esser et al., "Taming Transformers", arXiv
//! 2012.09841).

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::{AutoencoderConfig, config::GROUPS};
use crate::{
    nn::layers::{Conv, Norm, record},
    ops::{self, Activation},
};

/// Added to the variance in the group norms.
const EPS: f64 = 1e-6;

/// Maximum number of distances between pixels and codes in memory at a time.
const DISTANCES: usize = 1 << 20;

/// The autoencoder of the published checkpoints.
pub struct Autoencoder {
    config: AutoencoderConfig,
    encoder: Encoder,
    quant_conv: Conv,
    /// `[n_embed, embed_dim]`
    codes: Tensor,
    post_quant_conv: Conv,
    decoder: Decoder,
    dtype: DType,
}

impl AutoencoderConfig {
    /// Returns name and shape of every tensor. Empty for a configuration that fails
    /// [`Self::check`].
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        record(|vb| {
            let _ = Autoencoder::new(self, vb);
        })
    }
}

impl Autoencoder {
    /// Builds the network from the tensors of `vb`, named as in the published checkpoints.
    ///
    /// # Errors
    /// If the configuration fails [`AutoencoderConfig::check`], or a tensor is missing or has
    /// another shape.
    pub fn new(config: &AutoencoderConfig, vb: VarBuilder) -> Result<Self> {
        if let Err(reason) = config.check() {
            bail!("autoencoder: {reason}");
        }
        let (z, embed) = (config.z_channels, config.embed_dim);
        Ok(Self {
            encoder: Encoder::new(config, vb.pp("encoder"))?,
            quant_conv: Conv::new(z, embed, 1, vb.pp("quant_conv"))?,
            codes: vb.get((config.n_embed, embed), "quantize.embedding.weight")?,
            post_quant_conv: Conv::new(embed, z, 1, vb.pp("post_quant_conv"))?,
            decoder: Decoder::new(config, vb.pp("decoder"))?,
            config: config.clone(),
            dtype: DType::F32,
        })
    }

    pub fn config(&self) -> &AutoencoderConfig {
        &self.config
    }

    /// Sets the type of the feature maps, as [`Unet::set_dtype`](super::Unet::set_dtype).
    pub fn set_dtype(&mut self, dtype: DType) {
        self.dtype = dtype;
    }

    /// Packs the weights of all convolutions for inference, which is then faster and has no
    /// gradients. Weights without other owners are freed one by one.
    ///
    /// # Errors
    /// If a weight is not in CPU memory.
    pub fn pack(&mut self) -> Result<()> {
        let (encoder, decoder) = (&mut self.encoder, &mut self.decoder);
        for (blocks, conv) in encoder.levels.iter_mut().chain(&mut decoder.levels) {
            blocks.iter_mut().try_for_each(ResBlock::pack)?;
            conv.as_mut().map_or(Ok(()), Conv::pack)?;
        }
        encoder.middle.pack()?;
        decoder.middle.pack()?;
        let ends = [
            &mut encoder.conv_in,
            &mut encoder.out.1,
            &mut decoder.conv_in,
            &mut decoder.out.1,
        ];
        let quantiser = [&mut self.quant_conv, &mut self.post_quant_conv];
        ends.into_iter().chain(quantiser).try_for_each(Conv::pack)
    }

    /// Returns the latent `[n, h / f, w / f, embed_dim]` of images `[n, h, w, in_channels]` in
    /// -1 .. 1, without quantisation. `f`, the [`factor`](AutoencoderConfig::factor), should divide
    /// `h` and `w`.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn encode(&self, image: &Tensor) -> Result<Tensor> {
        let z = self.encoder.forward(&image.to_dtype(self.dtype)?)?;
        self.quant_conv.forward(&z)?.to_dtype(DType::F32)
    }

    /// Replaces every pixel of the latent `[n, h, w, embed_dim]` by its nearest code, the first of
    /// equally near ones. Also returns the indices of the codes, `[n, h, w]` (u32).
    ///
    /// The gradient of the codes is passed to the latent, as in the training of the autoencoder.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn quantize(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let (n, h, w, c) = z.dims4()?;
        let pixels = z.detach().reshape((n * h * w, c))?;
        let indices = nearest(&pixels, &self.codes.detach())?;
        let codes = self.codes.index_select(&indices, 0)?;
        let codes = codes.reshape((n, h, w, c))?;
        let quantized = if z.track_op() {
            (z + (codes - z)?.detach())?
        } else {
            codes
        };
        Ok((quantized, indices.reshape((n, h, w))?))
    }

    /// Returns the image `[n, h f, w f, out_channels]`, about -1 .. 1, of the latent
    /// `[n, h, w, embed_dim]`. If `quantize` is set, every pixel of the latent is first replaced by
    /// its nearest code, as in ResShift models.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn decode(&self, z: &Tensor, quantize: bool) -> Result<Tensor> {
        let z = if quantize {
            self.quantize(z)?.0
        } else {
            z.clone()
        };
        let z = self.post_quant_conv.forward(&z.to_dtype(self.dtype)?)?;
        self.decoder.forward(&z)?.to_dtype(DType::F32)
    }
}

/// Returns the index of the row of `codes` `[k, c]` nearest to each row of `pixels` `[p, c]`, the
/// first of equally near ones, as `[p]` (u32).
fn nearest(pixels: &Tensor, codes: &Tensor) -> Result<Tensor> {
    // |p - c|^2 without |p|^2, which is the same for all codes.
    let lengths = codes.sqr()?.sum(1)?;
    let codes = (codes.t()? * -2.0)?.contiguous()?;
    let (count, block) = (pixels.dim(0)?, (DISTANCES / lengths.dim(0)?).max(1));
    let indices: Vec<Tensor> = (0..count)
        .step_by(block)
        .map(|first| {
            let pixels = pixels.narrow(0, first, block.min(count - first))?;
            let distances = pixels.matmul(&codes)?.broadcast_add(&lengths)?;
            distances.argmin(1)
        })
        .collect::<Result<_>>()?;
    Tensor::cat(&indices, 0)
}

struct Encoder {
    conv_in: Conv,
    levels: Vec<(Vec<ResBlock>, Option<Conv>)>,
    middle: Middle,
    out: (Norm, Conv),
}

impl Encoder {
    fn new(config: &AutoencoderConfig, vb: VarBuilder) -> Result<Self> {
        let mut c = config.ch;
        let conv_in = Conv::new(config.in_channels, c, 3, vb.pp("conv_in"))?;
        let mut levels = Vec::with_capacity(config.ch_mult.len());
        for (i, mult) in config.ch_mult.iter().enumerate() {
            let vb = vb.pp("down").pp(i);
            let co = config.ch * mult;
            let blocks = res_blocks(config.num_res_blocks[i], c, co, vb.pp("block"))?;
            c = co;
            let down = (i + 1 < config.ch_mult.len())
                .then(|| Conv::new(c, c, 3, vb.pp("downsample.conv")))
                .transpose()?;
            levels.push((blocks, down.map(|conv| conv.halving([0, 1]))));
        }
        Ok(Self {
            conv_in,
            levels,
            middle: Middle::new(c, vb.pp("mid"))?,
            out: (
                Norm::new(c, GROUPS, EPS, vb.pp("norm_out"))?,
                Conv::new(c, config.z_channels, 3, vb.pp("conv_out"))?,
            ),
        })
    }

    fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(image)?;
        for (blocks, down) in &self.levels {
            for block in blocks {
                h = block.forward(h)?;
            }
            if let Some(down) = down {
                h = down.forward(&h)?;
            }
        }
        h = self.middle.forward(h)?;
        finish(&self.out, h)
    }
}

struct Decoder {
    conv_in: Conv,
    middle: Middle,
    /// In order from the deepest level.
    levels: Vec<(Vec<ResBlock>, Option<Conv>)>,
    out: (Norm, Conv),
}

impl Decoder {
    fn new(config: &AutoencoderConfig, vb: VarBuilder) -> Result<Self> {
        let level_channels = |i: usize| config.ch * config.ch_mult[i];
        let deepest = config.ch_mult.len() - 1;
        let mut c = level_channels(deepest);
        let conv_in = Conv::new(config.z_channels, c, 3, vb.pp("conv_in"))?;
        let middle = Middle::new(c, vb.pp("mid"))?;
        let mut levels = Vec::with_capacity(deepest + 1);
        for i in (0..=deepest).rev() {
            let vb = vb.pp("up").pp(i);
            let co = level_channels(i);
            let blocks = res_blocks(config.num_res_blocks[i] + 1, c, co, vb.pp("block"))?;
            c = co;
            let up = (i > 0)
                .then(|| Conv::new(c, c, 3, vb.pp("upsample.conv")))
                .transpose()?;
            levels.push((blocks, up.map(Conv::upsampling)));
        }
        Ok(Self {
            conv_in,
            middle,
            levels,
            out: (
                Norm::new(c, GROUPS, EPS, vb.pp("norm_out"))?,
                Conv::new(c, config.out_channels, 3, vb.pp("conv_out"))?,
            ),
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(z)?;
        h = self.middle.forward(h)?;
        for (blocks, up) in &self.levels {
            for block in blocks {
                h = block.forward(h)?;
            }
            if let Some(up) = up {
                h = up.forward(&h)?;
            }
        }
        finish(&self.out, h)
    }
}

fn finish((norm, conv): &(Norm, Conv), mut h: Tensor) -> Result<Tensor> {
    h = norm.forward(&h, Activation::Silu)?;
    conv.forward(&h)
}

/// Builds `count` blocks. The first has `ci` input channels, all else is `co`.
fn res_blocks(count: usize, ci: usize, co: usize, vb: VarBuilder) -> Result<Vec<ResBlock>> {
    (0..count)
        .map(|i| ResBlock::new(if i == 0 { ci } else { co }, co, vb.pp(i)))
        .collect()
}

struct Middle {
    block_1: ResBlock,
    attention: Attention,
    block_2: ResBlock,
}

impl Middle {
    fn new(c: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            block_1: ResBlock::new(c, c, vb.pp("block_1"))?,
            attention: Attention::new(c, vb.pp("attn_1"))?,
            block_2: ResBlock::new(c, c, vb.pp("block_2"))?,
        })
    }

    fn forward(&self, mut x: Tensor) -> Result<Tensor> {
        x = self.block_1.forward(x)?;
        x = self.attention.forward(x)?;
        self.block_2.forward(x)
    }

    fn pack(&mut self) -> Result<()> {
        self.block_1.pack()?;
        self.attention.pack()?;
        self.block_2.pack()
    }
}

struct ResBlock {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    skip: Option<Conv>,
}

impl ResBlock {
    fn new(ci: usize, co: usize, vb: VarBuilder) -> Result<Self> {
        let skip = (ci != co).then(|| Conv::new(ci, co, 1, vb.pp("nin_shortcut")));
        Ok(Self {
            norm1: Norm::new(ci, GROUPS, EPS, vb.pp("norm1"))?,
            conv1: Conv::new(ci, co, 3, vb.pp("conv1"))?,
            norm2: Norm::new(co, GROUPS, EPS, vb.pp("norm2"))?,
            conv2: Conv::new(co, co, 3, vb.pp("conv2"))?,
            skip: skip.transpose()?,
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut h = self.norm1.forward(&x, Activation::Silu)?;
        h = self.conv1.forward(&h)?;
        h = self.norm2.forward(&h, Activation::Silu)?;
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

/// Attention of every pixel to all pixels, with one head.
struct Attention {
    norm: Norm,
    /// Three convolutions, or one if packed.
    qkv: Vec<Conv>,
    proj_out: Conv,
}

impl Attention {
    fn new(c: usize, vb: VarBuilder) -> Result<Self> {
        let conv = |name: &str| Conv::new(c, c, 1, vb.pp(name));
        Ok(Self {
            norm: Norm::new(c, GROUPS, EPS, vb.pp("norm"))?,
            qkv: vec![conv("q")?, conv("k")?, conv("v")?],
            proj_out: conv("proj_out")?,
        })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        let mut h = self.norm.forward(&x, Activation::None)?;
        h = match &self.qkv[..] {
            [one] => one.forward(&h)?,
            three => Conv::joined(three)?.forward(&h)?,
        };
        h = ops::attention(&h, None, 1, [height, width], 0)?;
        self.proj_out.forward_onto(&x, &h)
    }

    fn pack(&mut self) -> Result<()> {
        if self.qkv.len() > 1 {
            let mut joined = Conv::joined(&self.qkv)?;
            joined.pack()?;
            self.qkv = vec![joined];
        }
        self.proj_out.pack()
    }
}
