//! The Swin layer of the U-Net (Liu et al., "Swin Transformer", arXiv 2103.14030) with group norms.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{
    UnetConfig,
    config::{GROUPS, UNET_NORM_EPS},
};
use crate::{
    nn::layers::{Conv, Norm},
    ops::{self, Activation},
};

/// Blocks of windowed attention between two 1x1 convolutions.
pub(super) struct SwinLayer {
    embed: Conv,
    blocks: Vec<Block>,
    unembed: Conv,
}

impl SwinLayer {
    /// Builds the layer of `level` for maps of `channels`.
    pub fn new(config: &UnetConfig, level: usize, channels: usize, vb: VarBuilder) -> Result<Self> {
        let dim = config.swin_embed_dim;
        let (window, shift) = config.window(level);
        let block = |i: usize| {
            let shift = if i % 2 == 1 { shift } else { 0 };
            Block::new(config, window, shift, vb.pp("blocks").pp(i))
        };
        Ok(Self {
            embed: Conv::new(channels, dim, 1, vb.pp("patch_embed.proj"))?,
            blocks: (0..config.swin_depth).map(block).collect::<Result<_>>()?,
            unembed: Conv::new(dim, channels, 1, vb.pp("patch_unembed.proj"))?,
        })
    }

    pub fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut h = self.embed.forward(&x)?;
        drop(x);
        for block in &self.blocks {
            h = block.attend(h)?;
            h = block.mix(h)?;
        }
        self.unembed.forward(&h)
    }

    /// Packs all convolutions, see [`Conv::pack`].
    pub fn pack(&mut self) -> Result<()> {
        for block in &mut self.blocks {
            let attention = [&mut block.attention.qkv, &mut block.attention.proj];
            for conv in attention
                .into_iter()
                .chain([&mut block.fc1, &mut block.fc2])
            {
                conv.pack()?;
            }
        }
        self.embed.pack()?;
        self.unembed.pack()
    }
}

struct Block {
    norm1: Norm,
    attention: WindowAttention,
    norm2: Norm,
    fc1: Conv,
    fc2: Conv,
}

impl Block {
    fn new(config: &UnetConfig, window: usize, shift: usize, vb: VarBuilder) -> Result<Self> {
        let dim = config.swin_embed_dim;
        let hidden = dim * config.mlp_ratio;
        Ok(Self {
            norm1: Norm::new(dim, GROUPS, UNET_NORM_EPS, vb.pp("norm1"))?,
            attention: WindowAttention::new(dim, config.heads(), window, shift, vb.pp("attn"))?,
            norm2: Norm::new(dim, GROUPS, UNET_NORM_EPS, vb.pp("norm2"))?,
            fc1: Conv::new(dim, hidden, 1, vb.pp("mlp.fc1"))?,
            fc2: Conv::new(hidden, dim, 1, vb.pp("mlp.fc2"))?,
        })
    }

    fn attend(&self, x: Tensor) -> Result<Tensor> {
        let h = self.norm1.forward(&x, Activation::None)?;
        self.attention.forward_onto(&x, h)
    }

    fn mix(&self, x: Tensor) -> Result<Tensor> {
        let mut h = self.norm2.forward(&x, Activation::None)?;
        h = self.fc1.forward(&h)?;
        h = ops::gelu(&h)?;
        self.fc2.forward_onto(&x, &h)
    }
}

struct WindowAttention {
    qkv: Conv,
    proj: Conv,
    /// `[(2 window - 1)^2, heads]`
    table: Tensor,
    /// Row of the table for every pair of pixels in a window, `[window^4]`.
    index: Tensor,
    heads: usize,
    window: usize,
    shift: usize,
}

impl WindowAttention {
    fn new(dim: usize, heads: usize, window: usize, shift: usize, vb: VarBuilder) -> Result<Self> {
        let side = 2 * window - 1;
        let index = relative_positions(window);
        Ok(Self {
            table: vb.get((side * side, heads), "relative_position_bias_table")?,
            index: Tensor::from_vec(index, window.pow(4), vb.device())?,
            qkv: Conv::linear(dim, 3 * dim, vb.pp("qkv"))?,
            proj: Conv::linear(dim, dim, vb.pp("proj"))?,
            heads,
            window,
            shift,
        })
    }

    /// Returns `residual` plus the attention within `x`.
    fn forward_onto(&self, residual: &Tensor, x: Tensor) -> Result<Tensor> {
        let mut h = self.qkv.forward(&x)?;
        drop(x);
        let (bias, window) = (self.bias()?, [self.window; 2]);
        h = ops::attention(&h, Some(&bias), self.heads, window, self.shift)?;
        self.proj.forward_onto(residual, &h)
    }

    /// Returns the bias of every pair of pixels, `[heads, window^2, window^2]`.
    fn bias(&self) -> Result<Tensor> {
        let pixels = self.window * self.window;
        self.table
            .index_select(&self.index, 0)?
            .t()?
            .contiguous()?
            .reshape((self.heads, pixels, pixels))
    }
}

/// Returns the index of the offset of every pair of pixels in a window, in row order.
fn relative_positions(window: usize) -> Vec<u32> {
    let (pixels, side) = (window * window, 2 * window - 1);
    let distance = |a: usize, b: usize| a + window - 1 - b;
    (0..pixels * pixels)
        .map(|i| (i / pixels, i % pixels))
        .map(|(a, b)| {
            let dy = distance(a / window, b / window);
            (dy * side + distance(a % window, b % window)) as u32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_positions_number_the_offsets_row_by_row() {
        // Pixels (0,0) (0,1) (1,0) (1,1). Offset (dy, dx) has index 3 (dy + 1) + dx + 1.
        #[rustfmt::skip]
        assert_eq!(
            relative_positions(2),
            [4, 3, 1, 0,  5, 4, 2, 1,  7, 6, 4, 3,  8, 7, 5, 4]
        );
        assert_eq!(relative_positions(1), [0]);
    }
}
