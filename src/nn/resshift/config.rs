//! Architectures of the ResShift networks.

use serde::{Deserialize, Serialize};

/// Channels of the U-Net's low-resolution image.
pub(super) const LQ_CHANNELS: usize = 3;

/// Groups of every group norm.
pub(super) const GROUPS: usize = 32;
/// Added to the variance in the group norms of the U-Net.
pub(super) const UNET_NORM_EPS: f64 = 1e-5;

/// Maximum number of channels of a level. The ResShift networks have 640.
const MAX_CHANNELS: usize = 4096;

/// Maximum number of levels of a network.
const MAX_LEVELS: usize = 8;

/// The U-Net with Swin layers (`UNetModelSwin` in the published code).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnetConfig {
    /// Side of the latent that the network was built for. It determines the levels with Swin layers
    /// and the shifted windows. Inputs may have any size.
    pub image_size: usize,
    /// Channels of the latent in the input and in the output.
    pub in_channels: usize,
    pub out_channels: usize,
    /// Channels of the first level. Level `i` has `channel_mult[i]` times as many.
    pub model_channels: usize,
    pub channel_mult: Vec<usize>,
    /// ResBlocks of each level in the encoder. The decoder has one more.
    pub num_res_blocks: Vec<usize>,
    /// Sides of the latent, derived from `image_size`, at which a level has a Swin layer.
    pub attention_resolutions: Vec<usize>,
    /// Channels of an attention head.
    pub num_head_channels: usize,
    /// Swin blocks in a Swin layer.
    pub swin_depth: usize,
    /// Channels inside a Swin layer.
    pub swin_embed_dim: usize,
    /// Side of a window in pixels.
    pub window_size: usize,
    /// Width of the MLP in a block as a multiple of `swin_embed_dim`.
    pub mlp_ratio: usize,
    /// `true` if the low-resolution image is an input besides the latent.
    pub cond_lq: bool,
    /// Side of the low-resolution image that the network was built for, `image_size` times a power
    /// of two.
    pub lq_size: usize,
}

impl UnetConfig {
    /// Checks the range of every field.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> Result<(), String> {
        range("image_size", self.image_size, 1, 4096)?;
        range("in_channels", self.in_channels, 1, 64)?;
        range("out_channels", self.out_channels, 1, 64)?;
        levels(
            "channel_mult",
            self.model_channels,
            &self.channel_mult,
            &self.num_res_blocks,
        )?;
        let halvings = self.channel_mult.len() - 1;
        if !self.image_size.is_multiple_of(1 << halvings) {
            return Err(format!(
                "image_size {} cannot be halved {halvings} times",
                self.image_size
            ));
        }
        range(
            "length of attention_resolutions",
            self.attention_resolutions.len(),
            0,
            64,
        )?;
        range("swin_depth", self.swin_depth, 1, 16)?;
        channels("swin_embed_dim", self.swin_embed_dim)?;
        range(
            "num_head_channels",
            self.num_head_channels,
            1,
            self.swin_embed_dim,
        )?;
        if !self.swin_embed_dim.is_multiple_of(self.num_head_channels) {
            return Err(format!(
                "swin_embed_dim {} is not a multiple of num_head_channels {}",
                self.swin_embed_dim, self.num_head_channels
            ));
        }
        range("heads", self.heads(), 1, 64)?;
        range("window_size", self.window_size, 1, 32)?;
        range("mlp_ratio", self.mlp_ratio, 1, 16)?;
        if self.cond_lq {
            let ratio = self.lq_size / self.image_size;
            if !ratio.is_power_of_two() || ratio > 64 || self.lq_size != ratio * self.image_size {
                return Err(format!(
                    "lq_size {} is not image_size {} times a power of two up to 64",
                    self.lq_size, self.image_size
                ));
            }
        }
        Ok(())
    }

    /// Returns the number of which height and width of the latent must be multiples, so that the
    /// windows of all levels fit.
    pub fn latent_multiple(&self) -> usize {
        let deepest = self.channel_mult.len() - 1;
        (0..=deepest)
            .filter(|&level| level == deepest || self.has_swin(level))
            .map(|level| self.window(level).0 << level)
            .fold(1, lcm)
    }

    /// Returns the ratio of the sides of the low-resolution image and the latent.
    pub fn lq_ratio(&self) -> usize {
        self.lq_size / self.image_size
    }

    /// Returns the channels of level `level`.
    pub(super) fn channels(&self, level: usize) -> usize {
        self.model_channels * self.channel_mult[level]
    }

    pub(super) fn heads(&self) -> usize {
        self.swin_embed_dim / self.num_head_channels
    }

    /// Returns `true` if level `level` has Swin layers. The middle always has one.
    pub(super) fn has_swin(&self, level: usize) -> bool {
        self.attention_resolutions
            .contains(&(self.image_size >> level))
    }

    /// Returns the side of the windows at level `level` and the shift of every second block. A
    /// window that covers the whole latent of `image_size` has the size of the latent and no shift.
    pub(super) fn window(&self, level: usize) -> (usize, usize) {
        let resolution = self.image_size >> level;
        if resolution <= self.window_size {
            (resolution, 0)
        } else {
            (self.window_size, self.window_size / 2)
        }
    }
}

/// The vector-quantised autoencoder (`VQModelTorch` in the published code).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AutoencoderConfig {
    /// Channels of the image.
    pub in_channels: usize,
    pub out_channels: usize,
    /// Channels of the first level. Level `i` has `ch_mult[i]` times as many.
    pub ch: usize,
    /// Factors of the levels. Each level but the last halves the size.
    pub ch_mult: Vec<usize>,
    /// ResBlocks of each level in the encoder. The decoder has one more.
    pub num_res_blocks: Vec<usize>,
    /// Channels before and after the 1x1 convolution of the quantiser.
    pub z_channels: usize,
    pub embed_dim: usize,
    /// Entries of the codebook.
    pub n_embed: usize,
}

impl AutoencoderConfig {
    /// Returns the ratio of the sides of the image and the latent.
    pub fn factor(&self) -> usize {
        1 << (self.ch_mult.len() - 1)
    }

    /// Checks the range of every field.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> Result<(), String> {
        range("in_channels", self.in_channels, 1, 4)?;
        range("out_channels", self.out_channels, 1, 4)?;
        levels("ch_mult", self.ch, &self.ch_mult, &self.num_res_blocks)?;
        range("z_channels", self.z_channels, 1, 64)?;
        range("embed_dim", self.embed_dim, 1, 64)?;
        range("n_embed", self.n_embed, 1, 1 << 16)
    }
}

/// The residual-shifting diffusion of a model, see [`crate::diffusion`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiffusionConfig {
    /// Scale from the low-resolution to the high-resolution image: 4, or 1 for face restoration.
    pub scale: usize,
    /// Number of steps T of the schedule.
    pub steps: usize,
    /// Standard deviation of the noise at eta = 1.
    pub kappa: f64,
    /// Exponent of the growth of the schedule.
    pub power: f64,
    /// Square root of eta at the first step, times kappa.
    pub min_noise_level: f64,
    /// Square root of eta at the last step.
    pub etas_end: f64,
}

impl DiffusionConfig {
    /// Checks the range of every field.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> Result<(), String> {
        range("scale", self.scale, 1, 8)?;
        range("steps", self.steps, 2, 1000)?;
        let within = |name: &str, value: f64, max: f64| {
            if value > 0.0 && value <= max {
                Ok(())
            } else {
                Err(format!("{name} = {value}: above 0, up to {max}"))
            }
        };
        within("kappa", self.kappa, 100.0)?;
        within("power", self.power, 100.0)?;
        within("etas_end", self.etas_end, 1.0)?;
        within("min_noise_level", self.min_noise_level, 100.0)?;
        if self.first_sqrt_eta() >= self.etas_end {
            return Err(format!(
                "min_noise_level = {}: the schedule would not grow to etas_end = {}",
                self.min_noise_level, self.etas_end
            ));
        }
        Ok(())
    }

    /// Returns the square root of eta at time 0.
    pub(crate) fn first_sqrt_eta(&self) -> f64 {
        (self.min_noise_level / self.kappa).min(self.min_noise_level)
    }
}

/// Configuration of a model of this family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResShiftConfig {
    pub unet: UnetConfig,
    pub autoencoder: AutoencoderConfig,
    pub diffusion: DiffusionConfig,
}

impl ResShiftConfig {
    /// Returns real-world x4 with a schedule of 15 steps: `resshift_realsrx4_s15_v*`, SinSR,
    /// TAD-SR.
    pub fn realsr_x4() -> Self {
        Self {
            unet: resshift_unet(3, 64),
            autoencoder: AutoencoderConfig {
                in_channels: 3,
                out_channels: 3,
                ch: 128,
                ch_mult: vec![1, 2, 4],
                num_res_blocks: vec![2; 3],
                z_channels: 3,
                embed_dim: 3,
                n_embed: 8192,
            },
            diffusion: resshift_diffusion(4, 15, 0.04),
        }
    }

    /// Returns real-world x4 with a schedule of 4 steps: `resshift_realsrx4_s4_*`.
    pub fn realsr_x4_s4() -> Self {
        Self {
            diffusion: resshift_diffusion(4, 4, 0.2),
            ..Self::realsr_x4()
        }
    }

    /// Returns restoration of faces of 512x512 pixels: `resshift_faceir_s4`, TAD-faceir.
    pub fn faceir() -> Self {
        Self {
            unet: resshift_unet(8, 512),
            autoencoder: AutoencoderConfig {
                in_channels: 3,
                out_channels: 3,
                ch: 64,
                ch_mult: vec![1, 2, 4, 8],
                num_res_blocks: vec![1, 2, 3, 4],
                z_channels: 8,
                embed_dim: 8,
                n_embed: 4096,
            },
            diffusion: resshift_diffusion(1, 4, 0.2),
        }
    }

    /// Checks the range of every field and that the parts fit together.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> Result<(), String> {
        let part = |name: &'static str| move |e: String| format!("{name}: {e}");
        let (unet, autoencoder, diffusion) = (&self.unet, &self.autoencoder, &self.diffusion);
        unet.check().map_err(part("unet"))?;
        autoencoder.check().map_err(part("autoencoder"))?;
        diffusion.check().map_err(part("diffusion"))?;
        let latent = autoencoder.embed_dim;
        if (unet.in_channels, unet.out_channels) != (latent, latent) {
            return Err(format!(
                "the U-Net has {} input and {} output channels, but the autoencoder's latent has \
                 {latent}",
                unet.in_channels, unet.out_channels
            ));
        }
        if unet.cond_lq && diffusion.scale * unet.lq_size != autoencoder.factor() * unet.image_size
        {
            return Err(format!(
                "an image of {0}x{0} at scale {1} has no latent of {2}x{2}",
                unet.lq_size, diffusion.scale, unet.image_size
            ));
        }
        Ok(())
    }
}

fn resshift_unet(latent_channels: usize, lq_size: usize) -> UnetConfig {
    UnetConfig {
        image_size: 64,
        in_channels: latent_channels,
        out_channels: latent_channels,
        model_channels: 160,
        channel_mult: vec![1, 2, 2, 4],
        num_res_blocks: vec![2; 4],
        attention_resolutions: vec![64, 32, 16, 8],
        num_head_channels: 32,
        swin_depth: 2,
        swin_embed_dim: 192,
        window_size: 8,
        mlp_ratio: 4,
        cond_lq: true,
        lq_size,
    }
}

fn resshift_diffusion(scale: usize, steps: usize, min_noise_level: f64) -> DiffusionConfig {
    DiffusionConfig {
        scale,
        steps,
        kappa: 2.0,
        power: 0.3,
        min_noise_level,
        etas_end: 0.99,
    }
}

fn range(name: &str, value: usize, min: usize, max: usize) -> Result<(), String> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(format!("{name} = {value}: {min} to {max}"))
    }
}

/// Checks channels of a group norm.
fn channels(name: &str, value: usize) -> Result<(), String> {
    range(name, value, GROUPS, MAX_CHANNELS)?;
    if !value.is_multiple_of(GROUPS) {
        return Err(format!("{name} = {value}: a multiple of {GROUPS}"));
    }
    Ok(())
}

/// Checks the channels and blocks of all levels.
fn levels(name: &str, base: usize, mult: &[usize], blocks: &[usize]) -> Result<(), String> {
    channels("base channels", base)?;
    range(&format!("length of {name}"), mult.len(), 1, MAX_LEVELS)?;
    for &m in mult {
        range(name, m, 1, MAX_CHANNELS / base)?;
    }
    if blocks.len() != mult.len() {
        return Err(format!(
            "num_res_blocks has {} entries and {name} {}",
            blocks.len(),
            mult.len()
        ));
    }
    blocks
        .iter()
        .try_for_each(|&b| range("num_res_blocks", b, 1, 16))
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presets() -> [ResShiftConfig; 3] {
        [
            ResShiftConfig::realsr_x4(),
            ResShiftConfig::realsr_x4_s4(),
            ResShiftConfig::faceir(),
        ]
    }

    fn parameters(tensors: &[(String, Vec<usize>)]) -> usize {
        tensors
            .iter()
            .map(|(_, s)| s.iter().product::<usize>())
            .sum()
    }

    #[test]
    fn presets_have_the_published_numbers_of_parameters() {
        let [real, ..] = presets();
        let unet = parameters(&real.unet.tensors());
        let autoencoder = parameters(&real.autoencoder.tensors());
        assert_eq!((unet + 50_000) / 100_000, 1186, "{unet}");
        assert_eq!((autoencoder + 50_000) / 100_000, 553, "{autoencoder}");
    }

    #[test]
    fn presets_pass_and_serve_latents_in_multiples_of_64() {
        for preset in presets() {
            preset.check().unwrap();
            assert_eq!(preset.unet.latent_multiple(), 64);
        }
    }

    #[test]
    fn the_first_tensor_of_a_face_model_sees_128_features_of_the_image() {
        let face = ResShiftConfig::faceir();
        let tensors = face.unet.tensors();
        let shape = |wanted: &str| &tensors.iter().find(|(name, _)| name == wanted).unwrap().1;
        assert_eq!(*shape("input_blocks.0.0.weight"), [160, 8 + 128, 3, 3]);
        assert_eq!(*shape("feature_extractor.0.weight"), [16, 3, 3, 3]);
        assert_eq!(*shape("feature_extractor.8.op.weight"), [128, 64, 3, 3]);
    }

    #[test]
    fn a_hostile_configuration_is_refused_before_a_network_is_built() {
        let spoil: [fn(&mut ResShiftConfig); 18] = [
            |c| c.unet.image_size = 0,
            |c| c.unet.image_size = 12,
            |c| c.unet.model_channels = 100,
            |c| c.unet.channel_mult = vec![],
            |c| c.unet.channel_mult[3] = usize::MAX,
            |c| c.unet.num_res_blocks = vec![1; 3],
            |c| c.unet.num_res_blocks[0] = 0,
            |c| c.unet.num_head_channels = 0,
            |c| c.unet.num_head_channels = 7,
            |c| c.unet.swin_embed_dim = 1 << 40,
            |c| c.unet.window_size = 0,
            |c| c.unet.lq_size = 0,
            |c| c.unet.lq_size = 192,
            |c| c.autoencoder.ch_mult = vec![1; 60],
            |c| c.autoencoder.n_embed = 0,
            |c| c.diffusion.steps = 1,
            |c| c.diffusion.kappa = f64::NAN,
            |c| c.diffusion.min_noise_level = 5.0,
        ];
        for (i, spoil) in spoil.iter().enumerate() {
            let mut config = ResShiftConfig::realsr_x4();
            spoil(&mut config);
            assert!(config.check().is_err(), "{i}: {config:?}");
            if config.unet.check().is_err() {
                assert_eq!(config.unet.tensors(), []);
            }
        }
    }
}
