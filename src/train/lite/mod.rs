//! Training of the lite family: a teacher, and students by time-aware distillation.
//!
//! The latent is the whitened residual over the bicubic base, see [`crate::nn::lite::latent`]. With
//! the base as origin, residual-shifting diffusion has `zy = 0`: `r_t = (1 - eta_t) r_0 + kappa
//! sqrt(eta_t) eps`, so [`super::losses`] apply unchanged.

pub mod estimator;
pub mod init;
mod initial;
mod origin;
pub mod recipe;
mod run;
pub mod student;
pub mod teacher;

pub use initial::InitialWeights;
pub use recipe::{Recipe, Shape, Size, train_scales};
pub use run::{estimate, run};

use std::{path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    data::{
        corpus::Corpus,
        matched::Matched,
        pairs::{Batch, PairSource, PairSpec},
    },
    losses,
    random::step_seed,
};
use crate::{
    Error, Result,
    diffusion::Schedule,
    nn::{
        lite::{LatentKind, LatentStats, Teacher},
        resshift::DiffusionConfig,
    },
};

/// Number of batches on which the statistics of the latent are measured.
const STATISTICS_BATCHES: u64 = 64;

/// Probability that a batch has the largest scale.
const NATIVE: f64 = 0.6;

/// Latent of a teacher and its students.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    pub kind: LatentKind,
    /// Side of a grid cell in output pixels.
    pub r: usize,
    /// Range of scales in training; the upper end is the native scale of the model.
    pub scales: [f64; 2],
    pub stats: LatentStats,
}

impl Latent {
    /// Latent of `kind` with nominal statistics.
    pub fn nominal(kind: LatentKind, r: usize, scales: [f64; 2]) -> Self {
        Self {
            kind,
            r,
            scales,
            stats: LatentStats::nominal(kind, r),
        }
    }

    /// Returns the latent with the statistics of `source`, measured on patches of `patch` pixels.
    ///
    /// # Errors
    /// As [`PairSpec::measure`].
    pub fn measured(&self, source: &dyn PairSource, patch: usize) -> Result<Self> {
        let stats = self
            .pairs(patch, 16)
            .measure(source, 0, STATISTICS_BATCHES)?;
        Ok(Self {
            stats,
            ..self.clone()
        })
    }

    /// Returns the specification of batches of `batch` pairs with sides of `patch` pixels.
    pub fn pairs(&self, patch: usize, batch: usize) -> PairSpec {
        PairSpec {
            latent: self.kind,
            r: self.r,
            patch,
            batch,
            scales: self.scales,
            native: NATIVE,
            alike: false,
            frames: 1,
        }
    }

    /// Returns the whitened base and the whitened residual of a batch of patches of `patch` pixels,
    /// `[n, h, w, c]`, on `device`.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn tensors(&self, batch: &Batch, patch: usize, device: &Device) -> Result<[Tensor; 2]> {
        let (side, channels) = (patch / self.r, self.kind.channels(self.r));
        let n = batch.base.len() / (side * side * channels);
        let tensor = |values: &[f32]| Tensor::from_slice(values, (n, side, side, channels), device);
        Ok([tensor(&batch.base)?, tensor(&batch.residual)?])
    }
}

/// Data for training, and held-out data for measurements.
#[derive(Clone)]
pub struct TrainingData {
    pub source: Arc<dyn PairSource>,
    /// Held-out images under some degradations, by name.
    pub held_out: Vec<(&'static str, Arc<dyn PairSource>)>,
}

impl TrainingData {
    /// Takes all data of a corpus.
    pub fn corpus(corpus: Corpus) -> Self {
        Self {
            held_out: corpus.held_out_kinds(),
            source: Arc::new(corpus),
        }
    }

    /// Takes matched pairs. Those of every `hold_out`th file are held out. If there are fewer
    /// files, all are trained and measured on.
    pub fn matched(mut pairs: Matched, hold_out: usize) -> Self {
        let mut held_out = pairs.hold_out(hold_out);
        if held_out.is_empty() {
            held_out = pairs.clone();
        }
        let held_out = Arc::new(held_out);
        Self {
            source: Arc::new(pairs),
            held_out: vec![("pairs", held_out)],
        }
    }

    fn fingerprint(&self) -> u64 {
        self.source.fingerprint()
    }

    /// Returns a batch of each held-out degradation at the native scale of the model. If `pairs`
    /// are clips, the last batch is one of compressed clips.
    fn validation(&self, pairs: &PairSpec, stats: &LatentStats) -> Result<Vec<HeldOut>> {
        let pictures = PairSpec {
            batch: 64,
            native: 1.0,
            frames: 1,
            ..pairs.clone()
        };
        let batch = |(name, source): &(&'static str, Arc<dyn PairSource>)| {
            Ok((*name, pictures.batch(&**source, stats, step_seed(0, 0))?))
        };
        let mut all = self
            .held_out
            .iter()
            .map(batch)
            .collect::<Result<Vec<_>>>()?;
        let compressed = self.held_out.iter().find(|(name, _)| *name == "h264");
        if let (Some((_, source)), true) = (compressed, pairs.frames > 1) {
            let clips = PairSpec {
                batch: 16,
                frames: pairs.frames,
                ..pictures
            };
            all.push((
                "h264 clips",
                clips.batch(&**source, stats, step_seed(0, 0))?,
            ));
        }
        Ok(all)
    }
}

/// Name of a degradation and its held-out batch.
type HeldOut = (&'static str, Batch);

/// Diffusion of the whitened residual.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Diffusion {
    /// Steps T of the schedule.
    pub steps: usize,
    /// Standard deviation of the noise at eta = 1, in standard deviations of the residual.
    pub kappa: f64,
    /// Exponent of the growth of the schedule.
    pub power: f64,
    /// Standard deviation of the noise at the first step.
    pub min_noise_level: f64,
    /// Square root of eta at the last step.
    pub etas_end: f64,
    /// Steps of the deterministic sampler, up to T.
    pub sampling_steps: usize,
}

impl Default for Diffusion {
    fn default() -> Self {
        Self {
            steps: 8,
            kappa: 1.0,
            power: 0.3,
            min_noise_level: 0.1,
            etas_end: 0.99,
            sampling_steps: 4,
        }
    }
}

impl Diffusion {
    /// Returns the noise schedule.
    ///
    /// # Errors
    /// When a value is out of range.
    pub fn schedule(&self) -> Result<Schedule> {
        let schedule = Schedule::new(&DiffusionConfig {
            scale: 1,
            steps: self.steps,
            kappa: self.kappa,
            power: self.power,
            min_noise_level: self.min_noise_level,
            etas_end: self.etas_end,
        })?;
        schedule.times(self.sampling_steps)?;
        Ok(schedule)
    }
}

/// A teacher with the base of a batch, for losses and samplers.
///
/// The network predicts the difference of the residual to the best linear guess from the noisy
/// residual, over its deviation (the preconditioning of EDM, Karras et al., arXiv 2206.00364, for a
/// residual of variance 1). With little noise it need not learn to copy its input.
pub struct Guided<'a> {
    pub teacher: &'a Teacher,
    pub schedule: &'a Schedule,
    /// Whitened latent of the base.
    pub base: &'a Tensor,
    pub scale: f64,
}

impl losses::Teacher for Guided<'_> {
    fn predict(&self, x: &Tensor, t: &[usize]) -> candle_core::Result<Tensor> {
        let each = |of: &dyn Fn(usize) -> f64| {
            let values: Vec<f32> = t.iter().map(|&t| of(t) as f32).collect();
            Tensor::from_vec(values, (t.len(), 1, 1, 1), x.device())
        };
        let eta = |t: usize| self.schedule.sqrt_eta()[t].powi(2);
        let noise = |t: usize| self.schedule.kappa().powi(2) * eta(t);
        let variance = |t: usize| (1.0 - eta(t)).powi(2) + noise(t);
        let guess = each(&|t| (1.0 - eta(t)) / variance(t) / self.schedule.input_scale(t))?;
        let left = each(&|t| (noise(t) / variance(t)).sqrt())?;
        let y = self.teacher.forward(x, self.base, t, self.scale)?;
        x.broadcast_mul(&guess)? + y.broadcast_mul(&left)?
    }

    fn features(&self, x: &Tensor, t: &[usize]) -> candle_core::Result<Vec<Tensor>> {
        self.teacher.features(x, self.base, t, self.scale)
    }
}

/// Bound of losses and gradients, beyond which a run has diverged. In units of the residual's
/// deviation both are about 1.
const BOUND: f64 = 1e6;

/// Returns the value if it is within [`BOUND`].
fn bounded(dir: &Path, step: u64, what: &str, value: f64) -> Result<f64> {
    if value.abs() < BOUND {
        Ok(value)
    } else {
        Err(Error::Diverged {
            path: dir.into(),
            what: what.into(),
            step,
        })
    }
}

/// Returns the gain in PSNR over the base in dB: the mean square of `truth` over that of `left`.
/// Channels have different units, so both are converted to those of luma and chroma first.
fn gain(truth: &Tensor, left: &Tensor, stats: &LatentStats) -> Result<f64> {
    let std = Tensor::new(stats.residual_std.as_slice(), truth.device())?;
    let energy = |t: &Tensor| -> Result<f64> {
        let mean = t.broadcast_mul(&std)?.sqr()?.mean_all()?;
        Ok(f64::from(mean.to_scalar::<f32>()?))
    };
    Ok(10.0 * (energy(truth)? / energy(left)?).log10())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use candle_nn::VarBuilder;

    use super::{losses::Teacher as _, *};
    use crate::{nn::lite::TeacherConfig, testing::normal, train::losses::Perturbation};

    /// With a network that returns zero, the prediction is the best linear guess, whose error is
    /// known.
    #[test]
    fn a_network_that_returns_zero_predicts_the_best_linear_guess() {
        let config = TeacherConfig::micro(4, 2);
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let teacher = Teacher::new(config, vb).unwrap();
        let schedule = Diffusion::default().schedule().unwrap();
        let random = || normal(0.0, 1.0, (4, 64, 64, 4));
        let (residual, noise, base) = (random(), random(), random());
        let guided = Guided {
            teacher: &teacher,
            schedule: &schedule,
            base: &base,
            scale: 2.0,
        };
        for t in 0..schedule.steps() {
            let perturbation = Perturbation {
                schedule: &schedule,
                zy: &base.zeros_like().unwrap(),
                t: &[t; 4],
                noise: &noise,
            };
            let guess = guided
                .predict(&perturbation.input(&residual).unwrap(), &[t; 4])
                .unwrap();
            let missed = (guess - &residual).unwrap().sqr().unwrap();
            let missed = missed.mean_all().unwrap().to_scalar::<f32>().unwrap();
            let eta = schedule.sqrt_eta()[t].powi(2);
            let want = (eta / ((1.0 - eta).powi(2) + eta)) as f32;
            assert!(
                (missed - want).abs() < 0.03 * want,
                "{t}: {missed}, not {want}"
            );
        }
    }

    #[test]
    fn gains_are_in_the_units_of_the_image() {
        let stats = LatentStats {
            residual_std: vec![1.0, 3.0],
            ..LatentStats::nominal(LatentKind::Luma, 1)
        };
        let truth = Tensor::new(&[[1f32, 1.0]], &Device::Cpu).unwrap();
        let left = Tensor::new(&[[1f32, 0.0]], &Device::Cpu).unwrap();
        let gain = gain(&truth, &left, &stats).unwrap();
        assert!((gain - 10.0).abs() < 1e-5, "{gain}");
    }
}
