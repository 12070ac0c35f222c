//! Settings of an engine and progress of a frame.

use std::{fmt, ops::ControlFlow, str::FromStr};

use super::{NoiseField, Precision};
use crate::{Error, Result};

/// Values of all settings. An engine ignores those that [`super::Capabilities::settings`] does not
/// list.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Share of the residual that is added to the base, 0 (bicubic interpolation) to 1.
    pub strength: f32,
    /// Degradation of the input, 0 (clean) to 1 (heavily compressed or noisy); `None` is automatic.
    pub denoise: Option<f32>,
    /// Value of an automatic `denoise`, 0 to 1.
    pub automatic_denoise: f32,
    /// Detail that the network may invent, 0 (faithful to the input) to 1 (generative); `None` is
    /// automatic.
    pub detail: Option<f32>,
    /// Use of previous frames.
    pub temporal: Temporal,
    /// Numeric precision of inference.
    pub precision: Precision,
    /// Maximum number of frames in flight, at least 1.
    pub queue_depth: usize,
    /// Submitted frames stay in device memory until they are received, for
    /// [`super::Engine::receive_device`].
    pub resident: bool,
    /// Share of the initial noise that the model was trained with, 0 to 1. Less noise invents less
    /// detail.
    pub noise: f32,
    /// Seed of the initial noise. The noise at a position of the latent depends only on the seed
    /// and the position.
    pub seed: u64,
    /// Noise that replaces the seeded one. It has the size of the frame's latent.
    pub noise_field: Option<NoiseField>,
    /// Number of sampling steps: 1 for a model that is distilled to one step, up to
    /// [`super::Capabilities::max_steps`] for others.
    pub steps: usize,
    /// Size of the tiles.
    pub tile: Tile,
    /// Minimum overlap of neighbouring tiles in pixels of the input, limited to half a tile.
    pub tile_overlap: usize,
    /// Method that matches the colours of the result to those of the input.
    pub color_fix: ColorFix,
}

/// Value of an automatic `denoise` for frames of unknown degradation. On held-out photos, clean and
/// JPEG of quality 60, `tiny-x2` loses at most 0.31 dB to the best position of the dial.
pub(crate) const AUTOMATIC_DENOISE: f32 = 0.4;

/// Value of an automatic `detail` at scales above [`FAITHFUL_SCALE`]. On images, clean and JPEG of
/// quality 60, `tiny-x4` at 0.5 has half of the gain in LPIPS that it has at 1, for 0.02 and 0.08 dB
/// of PSNR-Y instead of 0.14 and 0.26.
const AUTOMATIC_DETAIL: f32 = 0.5;

/// Largest scale with an automatic `detail` of 0. Up to it the input holds most of the detail, and
/// on clean video more detail costs PSNR-Y without a gain in LPIPS (docs/recipes.md).
const FAITHFUL_SCALE: f64 = 2.0;

impl Default for Options {
    fn default() -> Self {
        Self {
            strength: 1.0,
            denoise: None,
            automatic_denoise: AUTOMATIC_DENOISE,
            detail: None,
            temporal: Temporal::Auto,
            precision: Precision::Auto,
            queue_depth: 2,
            resident: false,
            noise: 1.0,
            seed: 0,
            noise_field: None,
            steps: 1,
            tile: Tile::Auto,
            tile_overlap: 16,
            color_fix: ColorFix::Wavelet,
        }
    }
}

impl Options {
    /// Returns the position of the dial `denoise`.
    pub fn denoise(&self) -> f32 {
        self.denoise.unwrap_or(self.automatic_denoise)
    }

    /// Returns the position of the dial `detail` for frames that grow by `scale`.
    pub fn detail(&self, scale: f64) -> f32 {
        let automatic = if scale > FAITHFUL_SCALE {
            AUTOMATIC_DETAIL
        } else {
            0.0
        };
        self.detail.unwrap_or(automatic)
    }
}

/// A setting that an engine has or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Setting {
    Strength,
    Denoise,
    Detail,
    Temporal,
    Precision,
    Noise,
    Seed,
    NoiseField,
    Steps,
    Tile,
    TileOverlap,
    ColorFix,
}

impl Setting {
    /// All settings with their names.
    pub const ALL: [(Self, &str); 12] = [
        (Self::Strength, "strength"),
        (Self::Denoise, "denoise"),
        (Self::Detail, "detail"),
        (Self::Temporal, "temporal"),
        (Self::Precision, "precision"),
        (Self::Noise, "noise"),
        (Self::Seed, "seed"),
        (Self::NoiseField, "noise field"),
        (Self::Steps, "steps"),
        (Self::Tile, "tile size"),
        (Self::TileOverlap, "tile overlap"),
        (Self::ColorFix, "colour fix"),
    ];

    /// Returns `true` if `options` has the default value of this setting, or one to the same effect
    /// in engines that lack it.
    pub fn is_default(self, options: &Options) -> bool {
        let default = Options::default();
        match self {
            Self::Strength => options.strength == default.strength,
            Self::Denoise => options.denoise == default.denoise,
            Self::Detail => options.detail == default.detail,
            // Without history, automatic is off.
            Self::Temporal => matches!(options.temporal, Temporal::Auto | Temporal::Off),
            Self::Precision => options.precision == default.precision,
            Self::Noise => options.noise == default.noise,
            Self::Seed => options.seed == default.seed,
            Self::NoiseField => options.noise_field == default.noise_field,
            Self::Steps => options.steps == default.steps,
            Self::Tile => options.tile == default.tile,
            Self::TileOverlap => options.tile_overlap == default.tile_overlap,
            Self::ColorFix => options.color_fix == default.color_fix,
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = Self::ALL.iter().find(|s| s.0 == *self).map_or("", |s| s.1);
        f.write_str(name)
    }
}

/// Use of previous frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Temporal {
    /// [`Self::Memory`] for networks with memory, [`Self::Filter`] for others with the dial
    /// `denoise`, otherwise [`Self::Off`].
    #[default]
    Auto,
    /// None. Every frame is upscaled on its own.
    Off,
    /// Where the input stands still, a share of the previous result is mixed into luma. The share
    /// falls to 0 for clean input, as `denoise` tells; without that dial it is always the largest.
    Filter,
    /// A network with memory sees its previous result, moved along with the picture.
    Memory,
}

impl Temporal {
    /// All values with their names.
    pub const ALL: [(Self, &str); 4] = [
        (Self::Auto, "auto"),
        (Self::Off, "off"),
        (Self::Filter, "filter"),
        (Self::Memory, "memory"),
    ];
}

impl fmt::Display for Temporal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = Self::ALL.iter().find(|t| t.0 == *self).map_or("", |t| t.1);
        f.write_str(name)
    }
}

impl FromStr for Temporal {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|t| t.1 == s);
        let unknown = || {
            Error::Setting(format!(
                "temporal '{s}' is unknown: use auto, off, filter or memory"
            ))
        };
        found.map(|t| t.0).ok_or_else(unknown)
    }
}

/// Size of the tiles that a frame is split into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tile {
    /// The largest size that needs at most half of the free memory and at most 10% more work than
    /// the fastest.
    #[default]
    Auto,
    /// One tile for the whole frame.
    Whole,
    /// Squares with this side in pixels of the input, rounded up to a multiple that the network
    /// needs.
    Side(usize),
}

/// Method that matches the colours of the result to those of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColorFix {
    /// Low frequencies of the base, high ones of the network's result.
    #[default]
    Wavelet,
    /// Mean and standard deviation of R, G and B of the base.
    Adain,
    /// No correction.
    None,
}

/// Progress of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Number of finished passes through a network.
    pub done: usize,
    /// Number of passes for the frame: for each tile one of the encoder, one for each step and one
    /// of the decoder.
    pub total: usize,
    /// Number of tiles.
    pub tiles: usize,
}

/// Callback before every pass through a network and after the last one, which may stop the frame.
pub type Observer<'a> = Option<&'a mut (dyn FnMut(Progress) -> ControlFlow<()> + Send)>;
