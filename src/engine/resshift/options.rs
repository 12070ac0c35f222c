//! What a caller can choose, and what it is told while a frame is made.

use super::NoiseField;

/// How the ResShift networks are run on a frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// How much of the noise that the network was trained to start from is added to the latent, 0 to 1. Less noise
    /// invents less detail.
    pub noise: f32,
    /// What the noise is drawn from. The noise at a place of the latent depends on the seed and the place alone.
    pub seed: u64,
    /// Noise to use instead of a drawn one, as large as the frame's latent.
    pub noise_field: Option<NoiseField>,
    /// Steps of the sampler: 1 for a model that was distilled to one, otherwise the number of the model's schedule.
    pub steps: usize,
    pub tile: Tile,
    /// Pixels of the input that neighbouring tiles share, at least. No more than half a tile is used.
    pub overlap: usize,
    pub color_fix: ColorFix,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            noise: 1.0,
            seed: 0,
            noise_field: None,
            steps: 1,
            tile: Tile::Auto,
            overlap: 16,
            color_fix: ColorFix::Wavelet,
        }
    }
}

/// How large the pieces are that a frame is cut into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tile {
    /// The largest size that fits into half of the free memory and costs hardly more time than the fastest.
    #[default]
    Auto,
    /// The frame in one piece.
    Whole,
    /// Squares with sides of this many pixels of the input, rounded up to what the network needs.
    Side(usize),
}

/// How the colours of the result are brought back to those of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColorFix {
    /// Low frequencies come from the input enlarged by bicubic interpolation, high ones from the network.
    #[default]
    Wavelet,
    /// Mean and standard deviation of R, G and B become those of the enlarged input.
    Adain,
    /// What the network makes is left as it is.
    None,
}

/// How far a frame has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Passes through a network that are done.
    pub done: usize,
    /// Passes that the frame takes: for each tile one of the encoder, one a step, one of the decoder.
    pub total: usize,
    /// Tiles that the frame is cut into.
    pub tiles: usize,
}
