//! Options of a distillation.

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    nn::resshift::{ResShiftConfig, UnetConfig},
    train::{degradation::DegradationRecipe, losses::ScoreWeight, trainer::check_common},
};

/// Weights of the losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weights {
    pub regression: f64,
    /// Weight of high-frequency score distillation; 0 leaves it out.
    pub score: f64,
    /// Weight of the generator's loss; 0 leaves the discriminator out.
    pub adversarial: f64,
}

/// Published weights for real-world images.
impl Default for Weights {
    fn default() -> Self {
        Self {
            regression: 1.0,
            score: 1.0,
            adversarial: 0.02,
        }
    }
}

/// All that determines the result of a run, besides data and teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    pub name: String,
    /// Shape of the student; latent and low-resolution image are those of the teacher.
    pub student: UnetConfig,
    /// Degradation of the low-resolution image.
    #[serde(rename = "damage")]
    pub degradation: DegradationRecipe,
    pub steps: u64,
    /// Images that pass the networks at once.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels.
    pub patch: usize,
    pub learning_rate: f64,
    /// Steps over which the learning rate rises to its value, where it stays.
    pub warm_up: u64,
    pub ema: f64,
    pub weights: Weights,
    pub score_weight: ScoreWeight,
    /// Times of score distillation: 0 to below this.
    pub score_times: usize,
    /// Times that the student starts from, one for each batch.
    pub starts: Vec<usize>,
    pub seed: u64,
}

impl Options {
    /// Checks that a student can be trained with these options from a teacher of `config`.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range.
    pub fn check(&self, config: &ResShiftConfig) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(text));
        check_common(
            self.steps,
            self.batch,
            self.accumulate,
            self.learning_rate,
            self.ema,
        )?;
        self.student.check().map_err(Error::Setting)?;
        self.degradation.check()?;
        let latent = |c: &UnetConfig| (c.in_channels, c.out_channels, c.cond_lq, c.lq_ratio());
        if latent(&self.student) != latent(&config.unet) {
            return wrong(
                "the student's latent or low-resolution image is not the teacher's: in_channels, \
                 out_channels, cond_lq and lq_size / image_size must be equal"
                    .into(),
            );
        }
        let (steps, starts) = (config.diffusion.steps, &self.starts);
        if starts.is_empty() || starts.iter().any(|&t| t >= steps) {
            return wrong(format!(
                "starts = {starts:?}: one or more times from 0 to {}",
                steps - 1
            ));
        }
        if self.score_times == 0 || self.score_times > steps {
            let times = self.score_times;
            return wrong(format!("score_times = {times}: 1 to {steps}"));
        }
        let unit = patch_multiple(&self.student, config);
        if self.patch == 0 || !self.patch.is_multiple_of(unit) {
            return wrong(format!("patch = {}: a multiple of {unit}", self.patch));
        }
        let w = &self.weights;
        let all = [w.regression, w.score, w.adversarial];
        if all.iter().any(|w| !(0.0..=1e6).contains(w)) || all.iter().all(|w| *w == 0.0) {
            return wrong("weights of the losses: 0 to 1000000, and not all 0".into());
        }
        Ok(())
    }
}

/// Returns the divisor of the side of a patch that teacher and student need.
pub fn patch_multiple(student: &UnetConfig, config: &ResShiftConfig) -> usize {
    let common = |a: usize, b: usize| (1..=b).map(|i| i * a).find(|m| m.is_multiple_of(b));
    let (a, b) = (student.latent_multiple(), config.unet.latent_multiple());
    let pixels = config.autoencoder.factor() * common(a, b).unwrap_or(a * b);
    common(pixels, config.diffusion.scale).unwrap_or(pixels)
}

/// Returns the shape of a student like `teacher` with `channels` channels at its first level. The
/// width of the Swin layers shrinks in proportion, in whole heads and groups.
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
