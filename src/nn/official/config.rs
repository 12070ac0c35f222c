//! What distinguishes one published model from another.

use serde::{Deserialize, Serialize};

/// The U-Net with Swin layers (`UNetModelSwin` in the published code).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnetConfig {
    /// Side of the latent that the network was built for. It decides which levels have Swin layers and which windows
    /// are shifted; the latent that comes may have another size.
    pub image_size: usize,
    /// Channels of the latent, in and out.
    pub in_channels: usize,
    pub out_channels: usize,
    /// Channels at the first level; those of level `i` are this times `channel_mult[i]`.
    pub model_channels: usize,
    pub channel_mult: Vec<usize>,
    /// ResBlocks of each level on the way down; one more on the way up.
    pub num_res_blocks: Vec<usize>,
    /// Sides of the latent, counted from `image_size`, at which a level has a Swin layer.
    pub attention_resolutions: Vec<usize>,
    /// Channels of an attention head.
    pub num_head_channels: usize,
    /// Swin blocks in a Swin layer.
    pub swin_depth: usize,
    /// Channels inside a Swin layer.
    pub swin_embed_dim: usize,
    /// Side of a window in pixels.
    pub window_size: usize,
    /// Width of the blocks' MLP as a multiple of `swin_embed_dim`.
    pub mlp_ratio: usize,
    /// Whether the network sees the low-resolution image beside the latent.
    pub cond_lq: bool,
    /// Side of the low-resolution image that the network was built for: `image_size` times a power of two.
    pub lq_size: usize,
}

/// The vector-quantised autoencoder (`VQModelTorch` in the published code).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AutoencoderConfig {
    /// Channels of the image.
    pub in_channels: usize,
    pub out_channels: usize,
    /// Channels at the first level; those of level `i` are this times `ch_mult[i]`.
    pub ch: usize,
    /// One entry a level; each level but the last halves the size.
    pub ch_mult: Vec<usize>,
    /// ResBlocks of each level on the way down; one more on the way up.
    pub num_res_blocks: Vec<usize>,
    /// Channels before the quantiser's 1x1 convolution and after it.
    pub z_channels: usize,
    pub embed_dim: usize,
    /// Entries of the codebook.
    pub n_embed: usize,
}

impl AutoencoderConfig {
    /// Pixels of the image, in each direction, for one of the latent.
    pub fn factor(&self) -> usize {
        1 << (self.ch_mult.len() - 1)
    }
}

/// The residual-shifting diffusion that a model was trained with; see [`crate::diffusion`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiffusionConfig {
    /// Scale from the low-resolution image to the high-resolution one: 4, or 1 for face restoration.
    pub scale: usize,
    /// Steps T of the schedule.
    pub steps: usize,
    /// Standard deviation of the noise at eta = 1.
    pub kappa: f64,
    /// Exponent of the schedule's growth.
    pub power: f64,
    /// Square root of eta at the first step, times kappa.
    pub min_noise_level: f64,
    /// Square root of eta at the last step.
    pub etas_end: f64,
}

/// Everything that a model of this family consists of but its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfficialConfig {
    pub unet: UnetConfig,
    pub autoencoder: AutoencoderConfig,
    pub diffusion: DiffusionConfig,
}
