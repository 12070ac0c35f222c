//! Batches of images in high and low resolution.

use rand::{SeedableRng, rngs::StdRng};

use super::options::Options;
use crate::{
    Result,
    nn::resshift::ResShiftConfig,
    train::{data::PhotoSet, degradation::DegradationRecipe, patch::Patch},
};

/// Batch of images in -1 .. 1: high resolution `[n, patch, patch, 3]` and low resolution `[n, patch
/// / scale, .., 3]`.
pub(super) struct Pictures {
    pub high: Vec<f32>,
    pub low: Vec<f32>,
}

/// Specification of batches.
pub(super) struct PictureSpec {
    patch: usize,
    scale: usize,
    degradation: DegradationRecipe,
}

impl PictureSpec {
    pub fn new(options: &Options, config: &ResShiftConfig) -> Self {
        Self {
            patch: options.patch,
            scale: config.diffusion.scale,
            degradation: options.degradation.clone(),
        }
    }

    /// Returns the batch of `count` images of `seed` from `photos`.
    pub fn batch(&self, photos: &PhotoSet, count: usize, seed: u64) -> Result<Pictures> {
        let mut rng = StdRng::seed_from_u64(seed);
        let small = self.patch / self.scale;
        let (mut high, mut low) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let picture = photos.sample(&mut rng, self.patch, self.patch)?;
            let (degraded, _) = self
                .degradation
                .picture(&picture, (small, small), &mut rng)?;
            high.extend(interleaved(&picture));
            low.extend(interleaved(&degraded));
        }
        Ok(Pictures { high, low })
    }
}

/// Returns the samples pixel by pixel, in -1 .. 1.
fn interleaved(patch: &Patch) -> impl Iterator<Item = f32> {
    let area = patch.width * patch.height;
    let pixel = move |i: usize| [0, 1, 2].map(|c| 2.0 * patch.rgb[c * area + i] - 1.0);
    (0..area).flat_map(pixel)
}
