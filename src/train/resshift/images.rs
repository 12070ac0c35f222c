//! Batches of images in high and low resolution.

use rand::{SeedableRng, rngs::StdRng};

use super::options::Options;
use crate::{
    Result,
    nn::resshift::ResShiftConfig,
    train::{data::PhotoSet, degradation::DegradationRecipe, patch::Patch},
};

/// A batch of pictures: high resolution `[n, patch, patch, 3]` and low resolution `[n, patch / scale, .., 3]`, in
/// -1 .. 1.
pub(super) struct Pictures {
    pub high: Vec<f32>,
    pub low: Vec<f32>,
}

/// How pictures are made.
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

    /// The batch of `count` pictures that `seed` gives from `photos`.
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

/// The samples pixel by pixel, in -1 .. 1.
fn interleaved(patch: &Patch) -> impl Iterator<Item = f32> {
    let area = patch.width * patch.height;
    let pixel = move |i: usize| [0, 1, 2].map(|c| 2.0 * patch.rgb[c * area + i] - 1.0);
    (0..area).flat_map(pixel)
}
