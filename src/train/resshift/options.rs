//! Options of a distillation.

use serde::{Deserialize, Serialize};

use crate::{
    nn::resshift::{ResShiftConfig, UnetConfig},
    train::{degradation::DegradationRecipe, losses::ScoreWeight},
};

/// Weights of the losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weights {
    pub regression: f64,
    /// Of high-frequency score distillation; 0 leaves it out.
    pub score: f64,
    /// Of the generator's loss; 0 leaves the discriminator out.
    pub adversarial: f64,
}

/// The published weights for real-world pictures.
impl Default for Weights {
    fn default() -> Self {
        Self {
            regression: 1.0,
            score: 1.0,
            adversarial: 0.02,
        }
    }
}

/// Everything that determines a run's result, beside the data and the teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    pub name: String,
    /// The student's shape; its latent and low-resolution image are the teacher's.
    pub student: UnetConfig,
    /// What the low-resolution image goes through.
    #[serde(rename = "damage")]
    pub degradation: DegradationRecipe,
    pub steps: u64,
    /// Images that go through the networks at once.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels.
    pub patch: usize,
    pub learning_rate: f64,
    /// Steps over which the learning rate rises to its value, which it then keeps.
    pub warm_up: u64,
    pub ema: f64,
    pub weights: Weights,
    pub score_weight: ScoreWeight,
    /// Score distillation draws its times from 0 up to this, exclusive.
    pub score_times: usize,
    /// Times that the student starts from; a batch draws one of them.
    pub starts: Vec<usize>,
    pub seed: u64,
}

impl Options {
    /// The published settings for a student like the teacher of `config`; `patch` is what its latent was built for.
    pub fn new(name: &str, config: &ResShiftConfig) -> Self {
        Self {
            name: name.into(),
            student: config.unet.clone(),
            degradation: DegradationRecipe::real_world(),
            steps: 30_000,
            batch: 8,
            accumulate: 1,
            patch: config.unet.image_size * config.autoencoder.factor(),
            learning_rate: 5e-5,
            warm_up: 5000,
            ema: 0.999,
            weights: Weights::default(),
            score_weight: ScoreWeight::Published,
            score_times: 3.min(config.diffusion.steps),
            starts: vec![config.diffusion.steps - 1],
            seed: 1,
        }
    }

    /// Whether a student can be trained with these options from a teacher of `config`.
    ///
    /// # Errors
    /// What does not fit, in words.
    pub fn check(&self, config: &ResShiftConfig) -> std::result::Result<(), String> {
        self.student.check()?;
        self.degradation.check().map_err(|e| e.to_string())?;
        let latent = |c: &UnetConfig| (c.in_channels, c.out_channels, c.cond_lq, c.lq_ratio());
        if latent(&self.student) != latent(&config.unet) {
            return Err(
                "the student's latent or low-resolution image is not the teacher's: in_channels, out_channels, cond_lq \
                 and lq_size / image_size must be equal"
                    .into(),
            );
        }
        let steps = config.diffusion.steps;
        if self.starts.is_empty() || self.starts.iter().any(|&t| t >= steps) {
            return Err(format!(
                "starts {:?}: one or more times from 0 to {}",
                self.starts,
                steps - 1
            ));
        }
        if self.score_times == 0 || self.score_times > steps {
            return Err(format!("score times {}: 1 to {steps}", self.score_times));
        }
        let unit = patch_multiple(&self.student, config);
        if self.patch == 0 || !self.patch.is_multiple_of(unit) {
            return Err(format!("patch {}: a multiple of {unit}", self.patch));
        }
        let w = &self.weights;
        let all = [w.regression, w.score, w.adversarial];
        if all.iter().any(|w| !(0.0..=1e6).contains(w)) || all.iter().all(|w| *w == 0.0) {
            return Err("weights of the losses: not negative, and not all 0".into());
        }
        Ok(())
    }
}

/// What a patch's side must be a multiple of, so that teacher and student can see it.
pub fn patch_multiple(student: &UnetConfig, config: &ResShiftConfig) -> usize {
    let common = |a: usize, b: usize| (1..=b).map(|i| i * a).find(|m| m.is_multiple_of(b));
    let (a, b) = (student.latent_multiple(), config.unet.latent_multiple());
    let pixels = config.autoencoder.factor() * common(a, b).unwrap_or(a * b);
    common(pixels, config.diffusion.scale).unwrap_or(pixels)
}

/// A student of the teacher's kind with `channels` channels at its first level: the Swin layers' width shrinks with it,
/// in whole heads and groups.
pub fn narrowed(teacher: &UnetConfig, channels: usize) -> UnetConfig {
    let head = teacher.num_head_channels.max(1);
    let wanted = teacher.swin_embed_dim * channels / teacher.model_channels.max(1);
    let fits = |width: &usize| width.is_multiple_of(32) && width.is_multiple_of(head);
    let width = (wanted.max(1)..).find(fits);
    UnetConfig {
        model_channels: channels,
        swin_embed_dim: width.unwrap_or(teacher.swin_embed_dim),
        ..teacher.clone()
    }
}
