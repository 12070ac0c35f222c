//! Options of a student's training.

use serde::{Deserialize, Serialize};

use super::TERMS;
use crate::{
    Error, Result,
    train::{lite::check_common, losses::ScoreWeight},
};

/// Everything that determines a run's result, beside the data, the latent and the teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    pub steps: u64,
    /// Pairs in a batch.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels; 0 for 48 cells of the grid.
    pub patch: usize,
    /// Peak for all but the inner kernels; it warms up, then falls along a cosine.
    pub learning_rate: f64,
    /// Peak for the kernels between head and tail, which Muon optimises; 0 leaves them to AdamW, as
    /// the rest.
    pub muon_rate: f64,
    /// Decay of the averaged weights.
    pub ema: f64,
    /// Channels that each kernel is a product over while it is trained; 0 trains the kernels themselves.
    pub expand: usize,
    pub seed: u64,
    pub distillation: Distillation,
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
            seed: 1,
            distillation: Distillation::default(),
        }
    }
}

impl Options {
    /// # Errors
    /// [`Error::Setting`] that names what is out of range, whatever the student and the teacher.
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
        self.distillation.check()?;
        let batches = [self.batch, self.accumulate];
        check_common(self.steps, batches, self.learning_rate, self.ema)
    }

    /// The side of a high-resolution patch for a latent of `r` and a teacher that takes sides of `multiple` cells.
    ///
    /// # Errors
    /// [`Error::Setting`] when that is out of range.
    pub fn patch_side(&self, r: usize, multiple: usize) -> Result<usize> {
        let patch = match self.patch {
            0 => 48 * r,
            patch => patch,
        };
        let multiple = r * multiple.max(2);
        match (16..=1024).contains(&patch) && patch.is_multiple_of(multiple) {
            true => Ok(patch),
            false => Err(Error::Setting(format!(
                "patch = {patch}: 16 to 1024, a multiple of {multiple}"
            ))),
        }
    }
}

/// How the teacher teaches. The terms' gradients are balanced: each is brought to its share of the norm that the first
/// term's gradient has. The defaults are what paid in the ablation of `docs/recipes.md`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillation {
    /// Share of the steps that go by with the terms of the truth alone.
    pub after: f64,
    /// Share of the steps over which the adversarial term grows to its share.
    pub ramp: f64,
    /// Share of the Charbonnier loss to the true residual.
    pub real: f64,
    /// Share of the difference to the truth, shrunk by the grid's factor.
    pub consistency: f64,
    /// Share of the regression to the teacher's sample.
    pub regression: f64,
    /// Whether the regression sees the mean of each grid cell alone.
    pub low_pass: bool,
    /// Share of high-frequency score distillation.
    pub score: f64,
    /// The score is looked at at times below this.
    pub score_times: usize,
    pub score_weight: ScoreWeight,
    /// Share of the adversarial term.
    pub adversarial: f64,
    /// Whether the discriminator sees residuals at random noise levels; else as they are.
    pub time_aware: bool,
    /// It sees them at times below this; 0: at all but the last.
    pub judge_times: usize,
    /// Channels in the discriminator's heads.
    pub width: usize,
    /// The discriminator's learning rate.
    pub discriminator_rate: f64,
}

impl Default for Distillation {
    fn default() -> Self {
        Self {
            after: 0.4,
            ramp: 0.05,
            real: 0.5,
            consistency: 0.1,
            regression: 0.0,
            low_pass: true,
            score: 0.0,
            score_times: 3,
            score_weight: ScoreWeight::NoiseLevel,
            adversarial: 0.3,
            time_aware: true,
            judge_times: 2,
            width: 32,
            discriminator_rate: 5e-4,
        }
    }
}

impl Distillation {
    /// The truth alone: what a run without a teacher does.
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

    /// The terms' shares in the order of [`TERMS`].
    pub(super) fn shares(&self) -> [f64; 5] {
        [
            self.real,
            self.consistency,
            self.regression,
            self.score,
            self.adversarial,
        ]
    }

    pub(super) fn needs_teacher(&self) -> bool {
        self.shares()[2..].iter().any(|share| *share > 0.0)
    }

    /// # Errors
    /// [`Error::Setting`] when the teacher's schedule has fewer steps than are asked for.
    pub(in crate::train) fn check_times(&self, steps: usize) -> Result<()> {
        match self.score_times.max(self.judge_times) <= steps {
            true => Ok(()),
            false => Err(Error::Setting(format!(
                "distillation: score_times and judge_times: at most the teacher's {steps} steps"
            ))),
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
