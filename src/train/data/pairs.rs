//! Training pairs: the whitened latent of the base, and the whitened residual to the ground truth.

use std::sync::Arc;

use rand::{Rng, SeedableRng, rngs::StdRng};
use rayon::prelude::*;

use super::{motion::Motion, photos::PhotoSet};
use crate::{
    Error, Result,
    frame::{
        Matrix,
        resample::{Axis, Kernel, Options, Resampler},
    },
    nn::lite::{
        Condition, LatentKind, LatentStats, denoise_of,
        latent::{Grid, chroma_slot, grid_resampler, luma_slot, unshuffle},
        memory::ClipMotion,
    },
    train::{degradation::DegradationRecipe, patch::Patch, random::step_seed},
};

/// Source of images and their low-resolution versions.
pub trait PairSource: Send + Sync {
    /// Returns a random image of `side` x `side` pixels and its degraded version of `small` x
    /// `small` pixels, which covers exactly the same area. Depends on the source and `random` only.
    ///
    /// # Errors
    /// When the source has no image of that size.
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair>;

    /// Returns `frames` successive pairs of a video, each as [`Self::pair`] of `sides`: those of
    /// the images and of their degraded versions.
    ///
    /// # Errors
    /// As [`Self::pair`]; [`Error::Data`] when the source has no such clips.
    fn clip(
        &self,
        _random: &mut Random,
        _sides: (usize, usize),
        _frames: usize,
    ) -> Result<Vec<Pair>> {
        Err(no_clips())
    }

    /// Returns a hash of the contents of the source.
    fn fingerprint(&self) -> u64;

    /// Returns the side of the low-resolution versions of a batch of images of side `side`. The
    /// scale is the upper end of `scales` with probability `native`, otherwise any in the range. A
    /// source with fixed scales overrides this.
    fn draw_small(&self, rng: &mut StdRng, side: usize, scales: [f64; 2], native: f64) -> usize {
        let scale = if rng.random_bool(native) {
            scales[1]
        } else {
            rng.random_range(scales[0]..=scales[1])
        };
        (side as f64 / scale).round() as usize
    }
}

/// Returns the error of a source of pictures only.
pub(super) fn no_clips() -> Error {
    Error::Data("a network with memory needs clips: give videos or photos by --data".into())
}

/// Random numbers of a pair, in two generators, so that several pairs can be degraded alike.
#[derive(Clone, Debug)]
pub struct Random {
    /// Selects the image.
    pub content: StdRng,
    /// Selects the degradation.
    pub degradation: StdRng,
}

/// Pairs that are degraded alike come from about a sixteenth of a ranking, to either side a share
/// of this.
const NEIGHBOURS: usize = 32;

impl Random {
    /// Creates both generators from their seeds.
    pub fn new(content: u64, degradation: u64) -> Self {
        Self {
            content: StdRng::seed_from_u64(content),
            degradation: StdRng::seed_from_u64(degradation),
        }
    }

    /// Returns the index of one of `len` items that are ranked by their degradation, near a random
    /// rank. Returns 0 if there are no items.
    pub(super) fn near(&mut self, len: usize) -> usize {
        let Some(last) = len.checked_sub(1) else {
            return 0;
        };
        let (rank, reach) = (self.degradation.random_range(0..=last), len / NEIGHBOURS);
        let nearest = rank.saturating_sub(reach)..=(rank + reach).min(last);
        self.content.random_range(nearest)
    }
}

/// An image and its degraded version.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    pub truth: Patch,
    pub low: Patch,
    /// Mean square of the change by noise and compression in `low`, in squared 8-bit steps of luma.
    pub noise: f64,
}

/// Photos that are degraded one by one.
#[derive(Clone, Debug)]
pub struct DegradedPhotos {
    pub photos: Arc<PhotoSet>,
    pub recipe: DegradationRecipe,
}

impl PairSource for DegradedPhotos {
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
        let truth = self.photos.sample(&mut random.content, side, side)?;
        let degradation = &mut random.degradation;
        let (low, noise) = self.recipe.picture(&truth, (small, small), degradation)?;
        Ok(Pair { truth, low, noise })
    }

    /// Moves a camera over a photo.
    fn clip(
        &self,
        random: &mut Random,
        (side, small): (usize, usize),
        frames: usize,
    ) -> Result<Vec<Pair>> {
        let (photos, content) = (&self.photos, &mut random.content);
        let truths = Motion::default().over(photos, content, side, frames)?;
        let degradation = &mut random.degradation;
        let degraded = self
            .recipe
            .apply(truths.clone(), (small, small), degradation)?;
        let noise = degraded.noise;
        let pairs = truths.into_iter().zip(degraded.frames);
        Ok(pairs
            .map(|(truth, low)| Pair { truth, low, noise })
            .collect())
    }

    fn fingerprint(&self) -> u64 {
        self.photos.fingerprint()
    }
}

/// Conversion of pairs to latents.
#[derive(Clone, Debug)]
pub struct PairSpec {
    pub latent: LatentKind,
    /// Side of a grid cell in output pixels.
    pub r: usize,
    /// Side of a high-resolution patch in pixels, a multiple of `2 r`.
    pub patch: usize,
    /// Pairs in a batch.
    pub batch: usize,
    /// Range of scales; the upper end is the native scale of the model.
    pub scales: [f64; 2],
    /// Probability that a batch has the upper scale; otherwise the scale is uniform in the range.
    pub native: f64,
    /// Degrades all pairs of a batch alike, which a network with the dial `denoise` needs.
    pub alike: bool,
    /// Successive frames of each pair; 1 for pictures.
    pub frames: usize,
}

/// A batch of pairs at one scale.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Scale, output over input.
    pub scale: f64,
    /// Mean degradation of the input: position of the dial.
    pub denoise: f64,
    /// Whitened latent of the base, `[frames, batch, grid, grid, channels]`.
    pub base: Vec<f32>,
    /// Whitened difference between the latents of ground truth and base.
    pub residual: Vec<f32>,
    /// Motion in the low-resolution frames, if there are several.
    pub motion: Option<ClipMotion>,
}

impl Batch {
    /// Returns the condition of the network.
    pub fn condition(&self) -> Condition {
        Condition {
            denoise: self.denoise,
            ..Condition::at(self.scale)
        }
    }
}

/// Planes of an image in the sizes that the latent needs.
struct Planes {
    luma: Vec<f32>,
    /// Empty for a luma latent.
    chroma: [Vec<f32>; 2],
}

impl PairSpec {
    /// Returns the grid of a patch.
    pub fn grid(&self) -> Grid {
        Grid::new(self.latent, self.r, self.patch, self.patch)
    }

    /// Returns the batch of `seed` from `source`.
    ///
    /// # Errors
    /// When the source has no images of the size of the patch.
    pub fn batch(&self, source: &dyn PairSource, stats: &LatentStats, seed: u64) -> Result<Batch> {
        let mut random = Random::new(seed, 0);
        let small = {
            let rng = &mut random.content;
            source.draw_small(rng, self.patch, self.scales, self.native)
        };
        let grid = self.grid();
        let mut base = vec![0.0; self.frames * self.batch * grid.len()];
        let mut residual = base.clone();
        let (mut kind, mut noise) = (random.content.random(), 0.0);
        let mut lows = Vec::new();
        for i in 0..self.batch {
            if !self.alike {
                kind = random.content.random();
            }
            random.degradation = StdRng::seed_from_u64(kind);
            let clip = match self.frames {
                1 => vec![source.pair(&mut random, self.patch, small)?],
                frames => source.clip(&mut random, (self.patch, small), frames)?,
            };
            for (t, pair) in clip.into_iter().enumerate() {
                let at = (t * self.batch + i) * grid.len()..(t * self.batch + i + 1) * grid.len();
                let (base, residual) = (&mut base[at.clone()], &mut residual[at]);
                self.pair(&pair.truth, &pair.low, stats, base, residual);
                noise += pair.noise / (self.frames * self.batch) as f64;
                if self.frames > 1 {
                    lows.push(pair.low.luma());
                }
            }
        }
        Ok(Batch {
            scale: self.patch as f64 / small as f64,
            denoise: denoise_of(noise.sqrt()),
            base,
            residual,
            motion: (self.frames > 1).then(|| self.motion(&lows, small)),
        })
    }

    /// Finds the motion in the luma of clips with sides of `small` pixels.
    fn motion(&self, lows: &[Vec<f32>], small: usize) -> ClipMotion {
        let grid = self.grid();
        let resampler = grid_resampler((small, small), (self.patch, self.patch), self.r);
        let luma = |clip: usize, t: usize| {
            let low = &lows[clip * self.frames + t];
            match &resampler {
                Some(resampler) => {
                    let mut cells = vec![0.0; grid.width * grid.height];
                    resampler.run(low, &mut cells);
                    cells
                }
                None => low.clone(),
            }
        };
        ClipMotion::find(
            (self.batch, self.frames),
            (grid.width, grid.height, self.r),
            luma,
        )
    }

    /// Replaces the first pair of a batch from [`Self::batch`], in all frames, with flat grey of a
    /// random level, whose residual is zero. Without such pairs, networks may change the level of
    /// flat areas at a high `denoise`, because compressed images are rarely flat.
    pub fn insert_grey(&self, batch: &mut Batch, stats: &LatentStats, seed: u64) {
        let level: f32 = StdRng::seed_from_u64(seed).random();
        let size = self.grid().len();
        let luma = self.r * self.r;
        let whitened = |i: usize, mean: &f32, std: &f32| {
            let value = if i < luma { level } else { 0.0 };
            (value - mean) / std
        };
        let statistics = stats.input_mean.iter().zip(&stats.input_std).enumerate();
        let cell: Vec<f32> = statistics.map(|(i, (m, s))| whitened(i, m, s)).collect();
        let frame = self.batch * size;
        for base in batch.base.chunks_exact_mut(frame) {
            for base in base[..size].chunks_exact_mut(cell.len()) {
                base.copy_from_slice(&cell);
            }
        }
        for residual in batch.residual.chunks_exact_mut(frame) {
            residual[..size].fill(0.0);
        }
    }

    fn pair(
        &self,
        truth: &Patch,
        low: &Patch,
        stats: &LatentStats,
        base: &mut [f32],
        residual: &mut [f32],
    ) {
        let side = self.patch;
        let truth = self.planes(truth);
        let low_side = low.width;
        let low = self.planes(low);
        let up = |plane: &[f32], from: usize, to: usize| resize(plane, from, to, Kernel::Bicubic);
        let bicubic = Planes {
            luma: up(&low.luma, low_side, side),
            chroma: low.chroma.map(|c| {
                if c.is_empty() {
                    c
                } else {
                    up(&c, low_side.div_ceil(2), side / 2)
                }
            }),
        };
        self.latent(&bicubic, &stats.input_mean, &stats.input_std, base);
        let minus = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        let difference = Planes {
            luma: minus(&truth.luma, &bicubic.luma),
            chroma: [0, 1].map(|i| minus(&truth.chroma[i], &bicubic.chroma[i])),
        };
        let zeros = vec![0.0; stats.residual_std.len()];
        self.latent(&difference, &zeros, &stats.residual_std, residual);
    }

    fn planes(&self, picture: &Patch) -> Planes {
        let luma = picture.luma();
        if self.latent == LatentKind::Luma {
            return Planes {
                luma,
                chroma: [Vec::new(), Vec::new()],
            };
        }
        let (r, rest) = picture.rgb.split_at(luma.len());
        let b = &rest[luma.len()..];
        let (kr, _, kb) = Matrix::Bt709.luma_weights();
        let side = picture.width;
        let halved = |c: &[f32], k: f32| {
            let full: Vec<f32> = c.iter().zip(&luma).map(|(c, y)| (c - y) * k).collect();
            resize(&full, side, side.div_ceil(2), Kernel::Area)
        };
        let chroma = [halved(b, 0.5 / (1.0 - kb)), halved(r, 0.5 / (1.0 - kr))];
        Planes { luma, chroma }
    }

    fn latent(&self, planes: &Planes, mean: &[f32], std: &[f32], out: &mut [f32]) {
        let (r, grid) = (self.r, self.grid());
        unshuffle(&planes.luma, self.patch, luma_slot(r), grid, mean, std, out);
        if self.latent == LatentKind::Yuv {
            for (i, plane) in planes.chroma.iter().enumerate() {
                let slot = chroma_slot(r, i);
                unshuffle(plane, self.patch / 2, slot, grid, mean, std, out);
            }
        }
    }

    /// Measures the statistics of the latent over the first `batches` batches of `seed`.
    ///
    /// # Errors
    /// As [`Self::batch`].
    pub fn measure(&self, source: &dyn PairSource, seed: u64, batches: u64) -> Result<LatentStats> {
        let channels = self.grid().channels;
        let plain = LatentStats {
            input_mean: vec![0.0; channels],
            input_std: vec![1.0; channels],
            residual_std: vec![1.0; channels],
        };
        let all = (0..batches)
            .into_par_iter()
            .map(|i| self.batch(source, &plain, step_seed(seed ^ STATISTICS, i)))
            .collect::<Result<Vec<_>>>()?;
        // Mean and standard deviation. The sums run in the order of the batches, so threads do not
        // matter.
        let moment = |values: &dyn Fn(&Batch) -> &[f32], channel: usize| {
            let (mut n, mut sum, mut squares) = (0.0, 0.0, 0.0);
            for batch in &all {
                for &v in values(batch).iter().skip(channel).step_by(channels) {
                    let v = f64::from(v);
                    (n, sum, squares) = (n + 1.0, sum + v, squares + v * v);
                }
            }
            let mean = sum / n;
            (
                mean as f32,
                (squares / n - mean * mean).max(1e-8).sqrt() as f32,
            )
        };
        let base: Vec<_> = (0..channels).map(|c| moment(&|b| &b.base, c)).collect();
        let residual = (0..channels).map(|c| moment(&|b| &b.residual, c).1);
        Ok(LatentStats {
            input_mean: base.iter().map(|m| m.0).collect(),
            input_std: base.iter().map(|m| m.1).collect(),
            residual_std: residual.collect(),
        })
    }
}

/// Separates the random numbers of the statistics from those of the training.
const STATISTICS: u64 = 0x5354_4154;

/// Resizes a square plane from side `from` to `to`, with antialiasing if it shrinks.
fn resize(plane: &[f32], from: usize, to: usize, kernel: Kernel) -> Vec<f32> {
    let axis = || {
        let options = Options {
            antialias: to < from,
            ..Options::default()
        };
        Axis::new(from, to, kernel, options)
    };
    let mut out = vec![0.0; to * to];
    Resampler::new(axis(), axis()).run(plane, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Degrades by a random number.
    struct Drawn;

    impl PairSource for Drawn {
        fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
            let mut truth = Patch::new(side, side);
            truth.rgb.fill(random.content.random());
            let mut low = Patch::new(small, small);
            low.rgb.fill(random.degradation.random());
            let noise = (255.0 * f64::from(low.rgb[0])).powi(2);
            Ok(Pair { truth, low, noise })
        }

        fn fingerprint(&self) -> u64 {
            0
        }
    }

    fn spec(latent: LatentKind) -> PairSpec {
        PairSpec {
            latent,
            r: 2,
            patch: 8,
            batch: 4,
            scales: [2.0, 2.0],
            native: 1.0,
            alike: false,
            frames: 1,
        }
    }

    #[test]
    fn pairs_of_a_batch_are_degraded_alike_if_the_dial_needs_it() {
        let stats = LatentStats::nominal(LatentKind::Luma, 2);
        for alike in [true, false] {
            let spec = PairSpec {
                alike,
                ..spec(LatentKind::Luma)
            };
            let batch = spec.batch(&Drawn, &stats, 5).unwrap();
            let first = |values: &[f32]| {
                let pairs = values.chunks_exact(spec.grid().len());
                pairs.map(|pair| pair[0]).collect::<Vec<_>>()
            };
            let (low, residual) = (first(&batch.base), first(&batch.residual));
            assert_eq!(low.iter().all(|v| *v == low[0]), alike, "{low:?}");
            assert!(residual.iter().any(|v| *v != residual[0]), "other pictures");
            if alike {
                let level = f64::from(low[0] * stats.input_std[0] + stats.input_mean[0]);
                assert!((batch.denoise - denoise_of(255.0 * level)).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_grey_pair_has_one_level_and_no_residual_and_others_stay() {
        let stats = LatentStats::nominal(LatentKind::Yuv, 2);
        let spec = spec(LatentKind::Yuv);
        let before = spec.batch(&Drawn, &stats, 5).unwrap();
        let mut batch = before.clone();
        spec.insert_grey(&mut batch, &stats, 9);
        let size = spec.grid().len();
        assert_eq!(batch.base[size..], before.base[size..]);
        assert_eq!(batch.residual[size..], before.residual[size..]);
        assert!(batch.residual[..size].iter().all(|v| *v == 0.0));
        let level = batch.base[0] * stats.input_std[0] + stats.input_mean[0];
        assert!((0.0..=1.0).contains(&level), "{level}");
        for cell in batch.base[..size].chunks_exact(stats.input_mean.len()) {
            let sample = |i: usize| cell[i] * stats.input_std[i] + stats.input_mean[i];
            assert!((0..4).all(|i| (sample(i) - level).abs() < 1e-6), "{cell:?}");
            assert!((4..6).all(|i| sample(i).abs() < 1e-6), "{cell:?}");
        }
    }
}
