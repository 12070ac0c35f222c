//! Settings of an engine, and the progress of a frame.

use std::{fmt, ops::ControlFlow};

use super::{NoiseField, Precision};

/// Settings of an engine. Each has a value for every engine; [`super::Capabilities`] tells which
/// ones take effect.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Share of the network's work in the result: 0 is bicubic interpolation alone, 1 the network's
    /// result.
    pub strength: f32,
    /// Degradation of the input that the network expects, 0 (clean) to 1 (heavily compressed);
    /// `None` is automatic.
    pub denoise: Option<f32>,
    /// 0 is faithful to the input, 1 generative.
    pub detail: f32,
    pub precision: Precision,
    /// Frames that may be in flight, at least 1.
    pub queue_depth: usize,
    /// Leaves submitted frames in the device's memory until they are received, for
    /// [`super::Engine::receive_device`].
    pub resident: bool,
    /// Share of the noise that the network was trained to start from, 0 to 1. Less noise invents
    /// less detail.
    pub noise: f32,
    /// Seed of the noise. The noise at a position of the latent depends on the seed and the
    /// position alone.
    pub seed: u64,
    /// Noise to use instead of the seeded one, as large as the frame's latent.
    pub noise_field: Option<NoiseField>,
    /// Steps of the sampler: 1 for a model that was distilled to one, otherwise the number of the
    /// model's schedule.
    pub steps: usize,
    pub tile: Tile,
    /// Minimum number of input pixels that neighbouring tiles share. No more than half a tile is
    /// used.
    pub tile_overlap: usize,
    pub color_fix: ColorFix,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            strength: 1.0,
            denoise: None,
            detail: 0.0,
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

/// A setting that an engine has or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Setting {
    Strength,
    Denoise,
    Detail,
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
    pub const ALL: [(Self, &str); 11] = [
        (Self::Strength, "strength"),
        (Self::Denoise, "denoise"),
        (Self::Detail, "detail"),
        (Self::Precision, "precision"),
        (Self::Noise, "noise"),
        (Self::Seed, "seed"),
        (Self::NoiseField, "noise field"),
        (Self::Steps, "steps"),
        (Self::Tile, "tile size"),
        (Self::TileOverlap, "tile overlap"),
        (Self::ColorFix, "colour fix"),
    ];

    /// Returns `true` if `options` has the default value of this setting.
    pub fn is_default(self, options: &Options) -> bool {
        let default = Options::default();
        match self {
            Self::Strength => options.strength == default.strength,
            Self::Denoise => options.denoise == default.denoise,
            Self::Detail => options.detail == default.detail,
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

/// Size of the tiles that a frame is cut into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tile {
    /// The largest size that fits into half of the free memory and costs hardly more time than the
    /// fastest.
    #[default]
    Auto,
    /// The frame in one piece.
    Whole,
    /// Squares with sides of this many pixels of the input, rounded up to what the network needs.
    Side(usize),
}

/// Correction of the result's colours towards those of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColorFix {
    /// Low frequencies come from the input enlarged by bicubic interpolation, high ones from the
    /// network.
    #[default]
    Wavelet,
    /// Mean and standard deviation of R, G and B become those of the enlarged input.
    Adain,
    /// The network's result stays as it is.
    None,
}

/// Progress of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Passes through a network that are done.
    pub done: usize,
    /// Passes that the frame takes: for each tile one of the encoder, one a step, one of the
    /// decoder.
    pub total: usize,
    /// Tiles that the frame is cut into.
    pub tiles: usize,
}

/// Called before every pass through a network and after the last; may stop the frame.
pub type Observer<'a> = Option<&'a mut (dyn FnMut(Progress) -> ControlFlow<()> + Send)>;
