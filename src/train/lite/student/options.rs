//! Options of the training of a student.

use serde::{Deserialize, Serialize};

use super::TERMS;
use crate::{
    Error, Result,
    train::{losses::ScoreWeight, trainer::check_common},
};

/// All that determines the result of a run, besides data, latent and teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    pub steps: u64,
    /// Pairs in a batch.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels; 0 for 48 grid cells.
    pub patch: usize,
    /// Peak learning rate of all weights but the inner kernels, after a warm-up and before a cosine
    /// decay.
    pub learning_rate: f64,
    /// Peak learning rate of the kernels between head and tail, which Muon optimises; 0 for AdamW,
    /// as for all other weights.
    pub muon_rate: f64,
    /// Decay of the averaged weights.
    pub ema: f64,
    /// Number of channels over which each kernel is a product in training; 0 trains plain kernels.
    pub expand: usize,
    /// Trains a model with the dial `detail` at 0, its faithful end, and leaves the dial as it is.
    /// By default only the dial is trained, at 1.
    pub faithful: bool,
    /// Successive frames of a clip for a network with memory. Each patch of a batch is a clip.
    #[serde(skip_serializing_if = "is_usual")]
    pub frames: usize,
    pub seed: u64,
    pub distillation: Distillation,
}

/// Usual number of frames of a clip.
const FRAMES: usize = 7;

fn is_usual(frames: &usize) -> bool {
    *frames == FRAMES
}

impl Default for Options {
    fn default() -> Self {
        Self {
            steps: 50_000,
            batch: 16,
            accumulate: 1,
            patch: 0,
            learning_rate: 5e-3,
            muon_rate: 0.01,
            ema: 0.999,
            expand: 64,
            faithful: false,
            frames: FRAMES,
            seed: 1,
            distillation: Distillation::default(),
        }
    }
}

impl Options {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range for any student and teacher.
    pub fn check(&self) -> Result<()> {
        if self.expand > 1024 {
            return Err(Error::Setting(format!(
                "expand = {}: up to 1024",
                self.expand
            )));
        }
        if !(0.0..1.0).contains(&self.muon_rate) {
            return Err(Error::Setting(format!(
                "muon_rate = {}: at least 0, below 1",
                self.muon_rate
            )));
        }
        if !(2..=64).contains(&self.frames) {
            return Err(Error::Setting(format!("frames = {}: 2 to 64", self.frames)));
        }
        self.distillation.check()?;
        check_common(
            self.steps,
            self.batch,
            self.accumulate,
            self.learning_rate,
            self.ema,
        )
    }

    /// Returns the side of a high-resolution patch for a latent of `r` and a teacher that needs
    /// sides of `multiple` cells.
    ///
    /// # Errors
    /// [`Error::Setting`] when it is out of range.
    pub fn patch_side(&self, r: usize, multiple: usize) -> Result<usize> {
        let patch = match self.patch {
            0 => 48 * r,
            patch => patch,
        };
        let multiple = r * multiple.max(2);
        if (16..=1024).contains(&patch) && patch.is_multiple_of(multiple) {
            Ok(patch)
        } else {
            Err(Error::Setting(format!(
                "patch = {patch}: 16 to 1024, a multiple of {multiple}"
            )))
        }
    }
}

/// Terms of distillation. Their gradients are balanced: each is scaled to its share of the norm of
/// the first term's gradient. The ablation in `docs/recipes.md` compares them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillation {
    /// Share of the steps with supervision only.
    pub after: f64,
    /// Share of the steps over which the adversarial term grows to its share.
    pub ramp: f64,
    /// Share of the Charbonnier loss to the true residual.
    pub real: f64,
    /// Share of the loss between the means of grid cells.
    pub consistency: f64,
    /// Share of the Charbonnier loss to the true change from frame to frame where it is small, for
    /// a network with memory.
    #[serde(skip_serializing_if = "is_usual_change")]
    pub change: f64,
    /// Share of the regression to a sample of the teacher.
    pub regression: f64,
    /// Applies the regression to the means of grid cells.
    pub low_pass: bool,
    /// Share of high-frequency score distillation.
    pub score: f64,
    /// Times of score distillation: 0 to below this.
    pub score_times: usize,
    pub score_weight: ScoreWeight,
    /// Share of the difference between the features of the teacher's encoder for the result and
    /// for the truth, as the discriminator on features sees them.
    #[serde(skip_serializing_if = "is_zero")]
    pub features: f64,
    /// Share of the Charbonnier loss between the means of each channel of the latent over squares
    /// of 4x4 cells, which a pattern that repeats in each cell changes.
    #[serde(skip_serializing_if = "is_zero")]
    pub pattern: f64,
    /// Share of the adversarial term.
    pub adversarial: f64,
    /// Trains the discriminator on images instead of the features of the teacher. The adversarial
    /// term then needs no teacher.
    #[serde(skip_serializing_if = "is_false")]
    pub pixels: bool,
    /// Perturbs residuals to random noise levels for the discriminator.
    pub time_aware: bool,
    /// Times of the discriminator: 0 to below this; 0 for all but the last.
    pub judge_times: usize,
    /// Channels in the heads of the discriminator.
    pub width: usize,
    /// Learning rate of the discriminator.
    pub discriminator_rate: f64,
}

/// Usual share of the loss of changes.
const CHANGE: f64 = 0.3;

fn is_usual_change(share: &f64) -> bool {
    *share == CHANGE
}

fn is_zero(share: &f64) -> bool {
    *share == 0.0
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Default for Distillation {
    fn default() -> Self {
        Self {
            after: 0.4,
            ramp: 0.05,
            real: 0.5,
            consistency: 0.1,
            change: CHANGE,
            regression: 0.0,
            low_pass: true,
            score: 0.0,
            score_times: 3,
            score_weight: ScoreWeight::NoiseLevel,
            features: 0.0,
            pattern: 0.0,
            adversarial: 0.3,
            pixels: false,
            time_aware: true,
            judge_times: 2,
            width: 32,
            discriminator_rate: 5e-4,
        }
    }
}

impl Distillation {
    /// Supervision only, for runs without a teacher.
    pub fn none() -> Self {
        Self {
            real: 1.0,
            consistency: 0.0,
            regression: 0.0,
            score: 0.0,
            adversarial: 0.0,
            ..Self::default()
        }
    }

    /// Returns the shares of the terms in the order of [`TERMS`].
    pub(super) fn shares(&self) -> [f64; TERMS.len()] {
        [
            self.real,
            self.consistency,
            self.regression,
            self.score,
            self.adversarial,
            self.change,
            self.features,
            self.pattern,
        ]
    }

    pub(in crate::train) fn needs_teacher(&self) -> bool {
        let adversarial = if self.pixels { 0.0 } else { self.adversarial };
        self.regression > 0.0 || self.score > 0.0 || self.features > 0.0 || adversarial > 0.0
    }

    /// Checks the times of score distillation and discriminator for a teacher of `steps` steps.
    ///
    /// # Errors
    /// [`Error::Setting`] when the schedule of the teacher has fewer steps.
    pub(in crate::train) fn check_times(&self, steps: usize) -> Result<()> {
        if self.score_times.max(self.judge_times) <= steps {
            Ok(())
        } else {
            Err(Error::Setting(format!(
                "distillation: score_times and judge_times: at most the teacher's {steps} steps"
            )))
        }
    }

    fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("distillation: {text}")));
        for (name, share) in [("after", self.after), ("ramp", self.ramp)] {
            if !(0.0..=1.0).contains(&share) {
                return wrong(format!("{name} = {share}: 0 to 1"));
            }
        }
        for (name, share) in TERMS.iter().zip(self.shares()) {
            if !(0.0..=1.0).contains(&share) {
                return wrong(format!("{name} = {share}: a share is 0 to 1"));
            }
        }
        if self.real + self.consistency <= 0.0 {
            return wrong("real and consistency are both 0: the truth must have a share".into());
        }
        if self.features > 0.0 && self.pixels {
            return wrong("features are those of the teacher: not with pixels = true".into());
        }
        if self.score_times == 0 || self.width == 0 || self.width > 1024 {
            return wrong("score_times and width (up to 1024) must be at least 1".into());
        }
        let rate = self.discriminator_rate;
        if !(rate > 0.0 && rate.is_finite()) {
            return wrong(format!("discriminator_rate = {rate}: above 0 and finite"));
        }
        Ok(())
    }
}
