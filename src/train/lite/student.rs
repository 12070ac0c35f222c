//! A student's training: supervised, then by time-aware distillation (TAD-SR, arXiv 2408.07476) from a teacher.
//!
//! The student sees no noise: it maps the base's latent to the residual, so that a still picture stays still. What is
//! then left of the method: the residual that it gives is perturbed, and the frozen teacher scores it and looks at it for
//! the discriminator. Regression pulls only the low frequencies towards the teacher's sample, for one network cannot meet
//! samples that differ by their noise, and a mean over them has no texture.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use candle_nn::{VarBuilder, VarMap};
use image::RgbImage;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    Begin, Guided, HeldOut, Latent, Material, Place, begin::build, bounded, check_common, gain,
    teacher::FrozenTeacher,
};
use crate::{
    Error, Result,
    metrics::{Lpips, Picture},
    model::{Layer, LayerCondition, LiteModel, Metadata},
    nn::lite::{
        Condition, Discriminator, DiscriminatorConfig, LayerSpec, Student, StudentConfig,
        latent::{Grid, luma_slot, shuffle_add},
    },
    train::{
        adversary::{Adversary, Judge, Judged, mean_of_heads},
        checkpoint,
        degrade::normal,
        init,
        loader::{Loader, step_seed},
        losses::{
            Perturbation, ScoreWeight, Term, hinge_generator, norm, normals, regression,
            score_direction, score_distillation, stand_in,
        },
        optim::{CLIP, Parameter, Trained, cosine},
        pairs::Batch,
        report::SampleRow,
    },
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
    fn shares(&self) -> [f64; 5] {
        [
            self.real,
            self.consistency,
            self.regression,
            self.score,
            self.adversarial,
        ]
    }

    fn needs_teacher(&self) -> bool {
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

/// The terms of the student's loss: their names in logs.
pub const TERMS: [&str; 5] = ["real", "consistency", "regression", "score", "adversarial"];
const GRADIENTS: [&str; 5] = [
    "grad_real",
    "grad_consistency",
    "grad_regression",
    "grad_score",
    "grad_adversarial",
];

/// Scale of the Charbonnier loss `sqrt(d^2 + eps^2)`, in units of the residual's standard deviation.
const CHARBONNIER_EPS: f64 = 0.02;

/// Standard deviation of the error that half of the batches have in the dial `denoise`: users and
/// estimators do not hit it exactly, and between the degradations that the data have the network
/// must not do as it likes.
const BLUR: f64 = 0.1;

/// What the running norms of the terms' gradients keep of themselves in a step.
const NORM_DECAY: f64 = 0.98;

/// Pictures of each kind of damage in [`StudentRun::samples`].
const SAMPLES: usize = 4;

/// Separates the seeds of noise and initial weights from those of the data.
const NOISE: u64 = 0x4e4f_4953;
const DISCRIMINATOR: u64 = 0x4449_5343;

/// The student that is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    pub name: String,
    pub student: StudentConfig,
    /// Scales that the model serves.
    pub scales: [f64; 2],
}

#[derive(Serialize, Deserialize)]
struct State {
    options: Options,
    target: Target,
    latent: Latent,
    step: u64,
    /// Steps of the run as it began.
    planned: u64,
    /// Updates of the discriminator.
    judged: u64,
    slowed: i32,
    /// Of the data.
    fingerprint: u64,
    /// Of the teacher; checkpoints of before it was kept have none.
    #[serde(default)]
    teacher: Option<u64>,
}

/// A training run in a directory: `checkpoint.safetensors` and `model.safetensors`.
pub struct StudentRun {
    options: Options,
    target: Target,
    latent: Latent,
    patch: usize,
    teacher: Option<FrozenTeacher>,
    student: Student,
    trained: Trained,
    adversary: Option<Adversary<Discriminator>>,
    /// Running norms of the terms' gradients; 0 for a term that has not been seen yet.
    norms: [f64; 5],
    step: u64,
    /// Steps of the run as it began: it may be prolonged, and then the terms' schedule stays.
    planned: u64,
    judged: u64,
    /// How often the learning rate has been halved.
    slowed: i32,
    loader: Loader<Batch>,
    held_out: Vec<HeldOut>,
    lpips: Option<Lpips>,
    fingerprint: u64,
    device: Device,
    dir: PathBuf,
}

/// A batch as a step uses it: latents, and what was drawn for it.
struct Drawn {
    base: Tensor,
    residual: Tensor,
    at: Condition,
    zero: Tensor,
    /// Times and noise of score and discriminator, and the noise that the teacher starts from.
    score: (Vec<usize>, Tensor),
    judged: (Vec<usize>, Tensor),
    prior: Tensor,
}

/// How a held-out batch turned out.
#[derive(Clone, Debug)]
pub struct Validation {
    /// The kind of damage.
    pub name: &'static str,
    /// Gain in PSNR over the bicubic base, in dB.
    pub gain: f64,
    /// LPIPS of luma alone, of the student and of the base, where its weights are there.
    pub lpips: Option<[f64; 2]>,
}

impl StudentRun {
    /// Starts a run at `place`, with the weights of `begin` if there are any, or goes on. Without a
    /// `teacher` the options must not ask for its terms. A run that goes on may have more steps
    /// than it began with, and other learning rates.
    ///
    /// # Errors
    /// [`Error::Training`] when there is a checkpoint and the run does not go on with it, or the
    /// other way round, or it was made with other options or data; [`Error::Setting`] when options
    /// are out of range or do not fit the teacher, or `begin` is of another student.
    pub fn new(
        options: Options,
        target: Target,
        latent: Latent,
        teacher: Option<FrozenTeacher>,
        begin: Option<&Begin>,
        material: &Material,
        place: &Place,
    ) -> Result<Self> {
        let patch = check(&options, &target, &latent, teacher.as_ref())?;
        let path = place.dir.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, place.start)?;
        let mut spec = latent.pairs(patch, options.batch);
        spec.alike = target.student.conditioning.denoise;
        let (mut student, parameters) = new_student(target.student, &options, &place.device)?;
        student.set_dtype(place.dtype);
        let step = saved.as_ref().map_or(0, |(_, state)| state.step);
        let first = step * options.accumulate as u64;
        let held_out = material.validation(&spec, &latent.stats)?;
        let (source, stats) = (material.source.clone(), latent.stats.clone());
        let make = move |seed| spec.batch(&*source, &stats, seed);
        let mut trained = Trained::new(parameters, 0.99, options.ema, CLIP)?;
        if options.muon_rate > 0.0 {
            trained = trained.with_muon(is_inner_kernel)?;
        }
        let mut run = Self {
            trained,
            adversary: new_adversary(&options, teacher.as_ref(), &place.device)?,
            norms: [0.0; 5],
            step: 0,
            planned: options.steps,
            judged: 0,
            slowed: place.slower,
            held_out,
            lpips: None,
            fingerprint: material.fingerprint(),
            device: place.device.clone(),
            dir: place.dir.to_path_buf(),
            loader: Loader::start(make, options.seed, first, place.data_threads),
            patch,
            teacher,
            student,
            options,
            target,
            latent,
        };
        match (saved, begin) {
            (Some((tensors, state)), _) => run.restore(&path, &tensors, state)?,
            (None, Some(begin)) => {
                let expand = run.options.expand;
                begin.check(&run.target.student, expand, &run.latent)?;
                run.trained.begin(&begin.parameters(
                    &run.target.student,
                    expand,
                    run.options.seed,
                )?)?;
            }
            (None, None) => {}
        }
        Ok(run)
    }

    fn restore(&mut self, path: &Path, tensors: &init::Tensors, state: State) -> Result<()> {
        if state.fingerprint != self.fingerprint {
            let reason = "was made with other data: give it as it was";
            return Err(Error::training(path, reason));
        }
        // A run that diverged goes on with another learning rate, one that is prolonged with more
        // steps.
        let was = Options {
            learning_rate: self.options.learning_rate,
            muon_rate: match state.options.muon_rate > 0.0 && self.options.muon_rate > 0.0 {
                true => self.options.muon_rate,
                false => state.options.muon_rate,
            },
            steps: self.options.steps.max(state.options.steps),
            ..state.options.clone()
        };
        let taught =
            |teacher: &FrozenTeacher| state.teacher.is_some_and(|t| t != teacher.fingerprint);
        if self.teacher.as_ref().is_some_and(taught) {
            let reason = "was made with another teacher: give it as it was";
            return Err(Error::training(path, reason));
        }
        if was != self.options || state.target != self.target || state.latent != self.latent {
            let mut found = checkpoint::differences(&was, &self.options);
            found.extend(checkpoint::differences(&state.target, &self.target));
            found.extend(checkpoint::differences(&state.latent, &self.latent));
            return Err(checkpoint::other_options(path, found));
        }
        self.trained.restore(state.step, tensors)?;
        if let Some(adversary) = &mut self.adversary {
            adversary.restore(state.judged, tensors)?;
        }
        let norms = tensors.get("norms").map(Tensor::to_vec1::<f64>);
        if let Some(norms) = norms.transpose()? {
            self.norms.iter_mut().zip(norms).for_each(|(n, v)| *n = v);
        }
        (self.step, self.judged) = (state.step, state.judged);
        self.planned = state.planned;
        self.slowed += state.slowed;
        Ok(())
    }

    /// Measures LPIPS, too, in [`Self::validate`].
    pub fn set_lpips(&mut self, lpips: Lpips) {
        self.lpips = Some(lpips);
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.step
    }

    /// Takes one step and gives its losses: the terms that have a share, the discriminator's, and the norms of the terms'
    /// weighted gradients at the student's result.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss or gradient is out of bounds; the checkpoint is then still the last good one.
    pub fn step(&mut self) -> Result<Vec<(&'static str, f64)>> {
        let count = self.options.accumulate as u64;
        let mut batches = Vec::new();
        for i in 0..count {
            let batch = self.loader.next_batch()?;
            batches.push(self.draw(&batch, self.step * count + i)?);
        }
        let shares = self.shares();
        let mut discriminator = 0.0;
        if shares[4] > 0.0 {
            discriminator = self.step_discriminator(&batches)?;
        }
        let (losses, gradients) = self.step_student(&batches, &shares)?;
        self.step += 1;
        let all = self.options.distillation.shares();
        let used = |i: &usize| all[*i] > 0.0;
        let mut report: Vec<_> = (0..5).filter(used).map(|i| (TERMS[i], losses[i])).collect();
        if all[4] > 0.0 {
            report.push(("discriminator", discriminator));
        }
        report.extend((0..5).filter(used).map(|i| (GRADIENTS[i], gradients[i])));
        Ok(report)
    }

    /// The terms' shares at this step.
    fn shares(&self) -> [f64; 5] {
        let d = &self.options.distillation;
        let mut shares = d.shares();
        let begin = d.after * self.planned as f64;
        let after = self.step as f64 - begin;
        if after < 0.0 {
            shares[2..].fill(0.0);
        } else {
            let ramp = (d.ramp * self.planned as f64).max(1.0);
            shares[4] *= ((after + 1.0) / ramp).min(1.0);
        }
        shares
    }

    fn draw(&self, batch: &Batch, index: u64) -> Result<Drawn> {
        let [base, residual] = self.latent.tensors(batch, self.patch, &self.device)?;
        let d = &self.options.distillation;
        let mut rng = StdRng::seed_from_u64(step_seed(self.options.seed ^ NOISE, index));
        let mut at = batch.condition();
        if self.target.student.conditioning.denoise && rng.random_bool(0.5) {
            at.denoise = (at.denoise + BLUR * f64::from(normal(&mut rng))).clamp(0.0, 1.0);
        }
        let n = base.dim(0)?;
        let mut noisy = |below: usize| -> Result<_> {
            let t = (0..n).map(|_| rng.random_range(0..below)).collect();
            Ok((t, normals(&residual, &mut rng)?))
        };
        let zero = base.zeros_like()?;
        let Some(teacher) = &self.teacher else {
            // Nobody looks at noise.
            let none = (vec![0; n], zero.clone());
            return Ok(Drawn {
                score: none.clone(),
                judged: none,
                prior: zero.clone(),
                zero,
                base,
                residual,
                at,
            });
        };
        let steps = teacher.schedule.steps();
        let score = noisy(d.score_times)?;
        // The last time is all noise; at the others there is something to judge.
        let judge_times = match d.judge_times {
            0 => steps - 1,
            times => times,
        };
        let mut judged = noisy(judge_times)?;
        if !d.time_aware {
            judged = (vec![0; n], zero.clone());
        }
        Ok(Drawn {
            score,
            judged,
            prior: noisy(1)?.1,
            zero,
            base,
            residual,
            at,
        })
    }

    /// Updates the discriminator; gives its loss.
    fn step_discriminator(&mut self, batches: &[Drawn]) -> Result<f64> {
        let (Some(teacher), Some(adversary)) = (&self.teacher, &mut self.adversary) else {
            return Ok(0.0);
        };
        let (loss, grads) = adversary.loss(batches.len(), |i| {
            let batch = &batches[i];
            let (draw, guided) = (batch.judged(teacher), batch.guided(teacher));
            let fake = self.student.forward(&batch.base, &batch.at)?.detach();
            Ok(Judged {
                real: draw.features(&batch.residual, &guided)?,
                fake: draw.features(&fake, &guided)?,
                t: draw.t.to_vec(),
            })
        })?;
        bounded(&self.dir, self.step, "discriminator's loss", loss)?;
        adversary.update(&grads, self.options.distillation.discriminator_rate)?;
        self.judged += 1;
        Ok(loss)
    }

    /// Updates the student; gives the terms' values and the norms of their weighted gradients.
    fn step_student(
        &mut self,
        batches: &[Drawn],
        shares: &[f64; 5],
    ) -> Result<([f64; 5], [f64; 5])> {
        let judge = match &self.adversary {
            Some(adversary) if shares[4] > 0.0 => Some(adversary.judge()?),
            _ => None,
        };
        let part = 1.0 / batches.len() as f64;
        let (mut losses, mut norms) = ([0.0; 5], [0.0; 5]);
        let mut grads = GradStore::default();
        for batch in batches {
            let result = self.student.forward(&batch.base, &batch.at)?;
            let z = result.detach();
            let terms = self.terms(batch, &z, shares, judge.as_ref())?;
            let weights = self.weights(&terms, shares)?;
            let mut total = z.zeros_like()?;
            for (i, term) in terms.iter().enumerate() {
                let Some(term) = term else { continue };
                let gradient = (&term.gradient * weights[i])?;
                losses[i] += part * bounded(&self.dir, self.step, TERMS[i], term.value)?;
                norms[i] += part * norm(&gradient)?;
                total = (total + gradient)?;
            }
            grads.extend((stand_in(&result, &total)? * part)?.backward()?)?;
        }
        let o = &self.options;
        let warm_up = (o.steps / 20).clamp(1, 500);
        let factor = cosine(0.5f64.powi(self.slowed), self.step, o.steps, warm_up);
        let (rate, muon) = (o.learning_rate * factor, o.muon_rate * factor);
        let whole = self.trained.step_with(&grads, rate, muon)?;
        bounded(&self.dir, self.step, "gradient", whole)?;
        Ok((losses, norms))
    }

    /// What each term is multiplied by: its gradient's norm, in the running mean, becomes its share of the first term's.
    fn weights(&mut self, terms: &[Option<Term>; 5], shares: &[f64; 5]) -> Result<[f64; 5]> {
        for (running, term) in self.norms.iter_mut().zip(terms) {
            let Some(term) = term else { continue };
            let now = bounded(&self.dir, self.step, "gradient", norm(&term.gradient)?)?;
            *running = match *running {
                0.0 => now,
                before => NORM_DECAY * before + (1.0 - NORM_DECAY) * now,
            };
        }
        let first = self.norms.iter().find(|n| **n > 0.0);
        let (first, sum) = (*first.unwrap_or(&1.0), shares.iter().sum::<f64>());
        let mut weights = [0.0; 5];
        for (i, weight) in weights.iter_mut().enumerate() {
            // A term without a gradient, such as that of a discriminator which knows nothing yet, is not blown up.
            if self.norms[i] > 1e-4 * first {
                *weight = shares[i] / sum * first / self.norms[i];
            }
        }
        Ok(weights)
    }

    /// The terms that have a share, in the order of [`TERMS`].
    fn terms(
        &self,
        batch: &Drawn,
        z: &Tensor,
        shares: &[f64; 5],
        judge: Option<&Discriminator>,
    ) -> Result<[Option<Term>; 5]> {
        let d = &self.options.distillation;
        let mut terms = [None, None, None, None, None];
        if shares[0] > 0.0 {
            terms[0] = Some(Term::at(z, |z| charbonnier(z, &batch.residual))?);
        }
        if shares[1] > 0.0 {
            let means = self.cell_means(z.device())?;
            let loss = |z: &Tensor| charbonnier(&low(z, &means)?, &low(&batch.residual, &means)?);
            terms[1] = Some(Term::at(z, loss)?);
        }
        let Some(teacher) = &self.teacher else {
            return Ok(terms);
        };
        let guided = batch.guided(teacher);
        if shares[2] > 0.0 || shares[3] > 0.0 {
            let goal = teacher.sample(&batch.base, batch.at.scale, &batch.prior)?;
            if shares[2] > 0.0 && d.low_pass {
                let means = self.cell_means(z.device())?;
                let loss = |z: &Tensor| regression(&low(z, &means)?, &low(&goal, &means)?);
                terms[2] = Some(Term::at(z, loss)?);
            } else if shares[2] > 0.0 {
                terms[2] = Some(Term::at(z, |z| regression(z, &goal))?);
            }
            if shares[3] > 0.0 {
                let draw = batch.perturbation(teacher, &batch.score);
                let g = score_direction(z, &goal, &draw, d.score_weight, &guided)?;
                terms[3] = Some(Term::at(z, |z| score_distillation(z, &g))?);
            }
        }
        if let Some(judge) = judge {
            let draw = batch.judged(teacher);
            let loss = |z: &Tensor| {
                let features = draw.features(z, &guided)?;
                let heads = judge.heads(&features, draw.t)?;
                mean_of_heads(heads.iter().map(hinge_generator))
            };
            terms[4] = Some(Term::at(z, loss)?);
        }
        Ok(terms)
    }

    /// What takes a whitened residual `[.., c]` to the means of each plane's samples in a cell, in standard deviations of
    /// the first channel: `[c, planes]`.
    fn cell_means(&self, device: &Device) -> Result<Tensor> {
        let (std, luma) = (&self.latent.stats.residual_std, self.latent.r.pow(2));
        let channels = std.len();
        let half = (channels - luma) / 2;
        let planes = if half == 0 { 1 } else { 3 };
        let mut map = vec![0f32; channels * planes];
        for (c, std_c) in std.iter().enumerate() {
            let (plane, count) = match c.checked_sub(luma) {
                None => (0, luma),
                Some(chroma) => (1 + chroma / half, half),
            };
            map[c * planes + plane] = std_c / std[0] / count as f32;
        }
        Ok(Tensor::from_vec(map, (channels, planes), device)?)
    }

    /// How the averaged student does on held-out photos, for each kind of damage.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn validate(&self) -> Result<Vec<Validation>> {
        let student = self.model()?.student()?;
        let measure = |(name, batch): &HeldOut| {
            let [base, residual] = self.latent.tensors(batch, self.patch, &Device::Cpu)?;
            let result = student.forward(&base, &batch.condition())?;
            let left = (&result - &residual)?;
            let lpips = self.lpips.as_ref().map(|lpips| {
                let truth = self.pictures(&base, &residual)?;
                let of =
                    |residual: &Tensor| distance(lpips, &self.pictures(&base, residual)?, &truth);
                Ok::<_, Error>([of(&result)?, of(&residual.zeros_like()?)?])
            });
            Ok(Validation {
                name,
                gain: gain(&residual, &left, &self.latent.stats)?,
                lpips: lpips.transpose()?,
            })
        };
        self.held_out.iter().map(measure).collect()
    }

    /// Held-out pictures, a few of each kind of damage: bicubic, the averaged student's, the teacher's if there is one, and
    /// the truth. Luma alone.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn samples(&self) -> Result<Vec<SampleRow>> {
        let student = self.model()?.student()?;
        let mut rows = Vec::new();
        for (name, batch) in &self.held_out {
            let [base, residual] = self.latent.tensors(batch, self.patch, &Device::Cpu)?;
            let few = base.dim(0)?.min(SAMPLES);
            let (base, residual) = (base.narrow(0, 0, few)?, residual.narrow(0, 0, few)?);
            let mut columns = vec![
                ("bicubic", base.zeros_like()?),
                ("student", student.forward(&base, &batch.condition())?),
            ];
            if let Some(teacher) = &self.teacher {
                let base = base.to_device(&self.device)?;
                let noise = normals(&base, &mut StdRng::seed_from_u64(NOISE))?;
                let sample = teacher.sample(&base, batch.scale, &noise)?;
                columns.push(("teacher", sample.to_device(&Device::Cpu)?));
            }
            columns.push(("truth", residual));
            let mut pictures = Vec::new();
            for (column, residual) in columns {
                pictures.push((column, self.pictures(&base, &residual)?));
            }
            for i in 0..few {
                let image = |(column, all): &(&str, Vec<Picture>)| {
                    let side = self.patch as u32;
                    let image = RgbImage::from_raw(side, side, all.get(i)?.rgb().to_vec())?;
                    Some((column.to_string(), image))
                };
                rows.push(SampleRow {
                    label: format!("{name} {}", i + 1),
                    images: pictures.iter().filter_map(image).collect(),
                });
            }
        }
        Ok(rows)
    }

    /// The luma pictures that residuals over `base` make.
    fn pictures(&self, base: &Tensor, residual: &Tensor) -> Result<Vec<Picture>> {
        let stats = &self.latent.stats;
        let of = |values: &[f32]| Tensor::new(values, base.device());
        let sum = base
            .broadcast_mul(&of(&stats.input_std)?)?
            .broadcast_add(&of(&stats.input_mean)?)?
            .add(&residual.broadcast_mul(&of(&stats.residual_std)?)?)?;
        let (r, side) = (self.latent.r, self.patch);
        let grid = Grid::new(self.latent.kind, r, side, side);
        let ones = vec![1.0; grid.channels];
        let picture = |i| {
            let latent = sum.get(i)?.flatten_all()?.to_vec1::<f32>()?;
            let mut luma = vec![0.0; side * side];
            shuffle_add(&latent, luma_slot(r), grid, &ones, &mut luma, side);
            let grey = luma.iter().flat_map(|v| [(v * 255.0).round() as u8; 3]);
            Picture::new(side, side, grey.collect())
        };
        (0..base.dim(0)?).map(picture).collect()
    }

    /// The model as it stands: the averaged weights, branches folded.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn model(&self) -> Result<LiteModel> {
        let student = self.target.student;
        let vb = VarBuilder::from_tensors(self.trained.averages(), DType::F32, &Device::Cpu);
        let tensors = build(student, self.options.expand, vb)?.folded()?;
        let values = |name: String| -> Result<Vec<f32>> {
            let t = tensors.get(&name);
            let t = t.ok_or_else(|| Error::training(&self.dir, format!("no tensor '{name}'")))?;
            Ok(t.flatten_all()?.to_vec1()?)
        };
        let mut metadata = Metadata::lite(&self.target.name, student, self.target.scales);
        metadata.training = serde_json::json!({
            "tool": format!("tadsr-train {}", env!("CARGO_PKG_VERSION")),
            "options": self.options,
            "train_scales": self.latent.scales,
            "steps_done": self.step,
        });
        let condition = |spec| LayerCondition::read(spec, |name, _| values(name.to_string()));
        let layer = |spec: LayerSpec| {
            let conditions = spec.conditions(&student.conditioning).into_iter();
            Ok(Layer {
                weight: values(format!("{}.weight", spec.name))?,
                bias: values(format!("{}.bias", spec.name))?,
                conditions: conditions.map(condition).collect::<Result<_>>()?,
                spec,
            })
        };
        let layers = student.layers().into_iter().map(layer);
        Ok(LiteModel {
            metadata,
            stats: self.latent.stats.clone(),
            layers: layers.collect::<Result<_>>()?,
            calibration: None,
        })
    }

    /// Writes checkpoint and model into the run's directory.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written; the files there before stay whole.
    pub fn save(&self) -> Result<()> {
        let mut tensors = self.trained.state()?;
        if let Some(adversary) = &self.adversary {
            tensors.extend(adversary.state());
        }
        // As a tensor: numbers in JSON need not come back to the last digit.
        let norms = Tensor::new(&self.norms, &Device::Cpu)?;
        tensors.push(("norms".into(), norms));
        let state = State {
            options: self.options.clone(),
            target: self.target.clone(),
            latent: self.latent.clone(),
            step: self.step,
            planned: self.planned,
            judged: self.judged,
            slowed: self.slowed,
            fingerprint: self.fingerprint,
            teacher: self.teacher.as_ref().map(|t| t.fingerprint),
        };
        // The model first: weights that are not finite must not replace a good checkpoint, and a checkpoint at the last
        // step says that the model is there.
        let bytes = self.model()?.to_bytes(true)?;
        checkpoint::write_atomically(&self.dir.join("model.safetensors"), &bytes)?;
        checkpoint::save(&self.dir.join("checkpoint.safetensors"), tensors, &state)
    }
}

impl Drawn {
    fn guided<'a>(&'a self, teacher: &'a FrozenTeacher) -> Guided<'a> {
        Guided {
            teacher: &teacher.net,
            schedule: &teacher.schedule,
            base: &self.base,
            scale: self.at.scale,
        }
    }

    fn perturbation<'a>(
        &'a self,
        teacher: &'a FrozenTeacher,
        (t, noise): &'a (Vec<usize>, Tensor),
    ) -> Perturbation<'a> {
        Perturbation {
            schedule: &teacher.schedule,
            zy: &self.zero,
            t,
            noise,
        }
    }

    fn judged<'a>(&'a self, teacher: &'a FrozenTeacher) -> Perturbation<'a> {
        self.perturbation(teacher, &self.judged)
    }
}

/// The weights of `name`, to begin a run with: a model file, the checkpoint of a student's run,
/// whose averages count, or the name of a bundled model.
///
/// # Errors
/// As [`Begin::of_model`], and [`Error::Training`] for a damaged checkpoint.
pub fn begin(name: &str) -> Result<Begin> {
    let path = Path::new(name);
    if !path.is_file() || !checkpoint::is_checkpoint(path)? {
        return Begin::of_model(name);
    }
    let (tensors, state) = checkpoint::load::<State>(path)?;
    let averages = tensors.into_iter().filter_map(|(name, tensor)| {
        let name = name.strip_prefix("ema.")?.to_string();
        Some((name, tensor))
    });
    let student = state.target.student;
    let vb = VarBuilder::from_tensors(averages.collect(), DType::F32, &Device::Cpu);
    let folded = build(student, state.options.expand, vb).and_then(|net| net.folded());
    Ok(Begin {
        tensors: folded.map_err(|e| Error::training(path, format!("is damaged: {e}")))?,
        name: name.into(),
        student,
        scales: state.target.scales,
        stats: state.latent.stats,
    })
}

/// Checks that everything fits; gives the side of a patch.
fn check(
    options: &Options,
    target: &Target,
    latent: &Latent,
    teacher: Option<&FrozenTeacher>,
) -> Result<usize> {
    let wrong = |text: String| Err(Error::Setting(text));
    let student = &target.student;
    if let Err(reason) = student.check() {
        return wrong(reason);
    }
    if (student.latent, student.r) != (latent.kind, latent.r) {
        return wrong("the student's latent is not the one that is trained on".into());
    }
    options.check()?;
    if let Some(teacher) = teacher {
        if teacher.latent != *latent {
            return wrong("the teacher was trained on another latent: other scales or data".into());
        }
        options.distillation.check_times(teacher.schedule.steps())?;
    } else if options.distillation.needs_teacher() {
        return wrong("distillation needs a teacher".into());
    }
    options.patch_side(latent.r, teacher.map_or(1, |t| t.net.config().multiple()))
}

fn new_adversary(
    options: &Options,
    teacher: Option<&FrozenTeacher>,
    device: &Device,
) -> Result<Option<Adversary<Discriminator>>> {
    let Some(teacher) = teacher.filter(|_| options.distillation.adversarial > 0.0) else {
        return Ok(None);
    };
    let config = DiscriminatorConfig {
        channels: teacher.net.feature_channels(),
        width: options.distillation.width,
        time_channels: teacher.net.config().widths[0],
    };
    let made = init::lite_discriminator(&config, options.seed ^ DISCRIMINATOR, device)?;
    Ok(Some(Adversary::new(made)?))
}

/// `mean sqrt((z - goal)^2 + eps^2)`
fn charbonnier(z: &Tensor, goal: &Tensor) -> candle_core::Result<Tensor> {
    let squares = ((z - goal)?.sqr()? + CHARBONNIER_EPS * CHARBONNIER_EPS)?;
    squares.sqrt()?.mean_all()
}

/// A residual `[n, h, w, c]` by `means` `[c, planes]`: `[n h w, planes]`.
fn low(z: &Tensor, means: &Tensor) -> candle_core::Result<Tensor> {
    z.flatten_to(2)?.matmul(means)
}

/// Mean LPIPS of luma pictures.
fn distance(lpips: &Lpips, pictures: &[Picture], truths: &[Picture]) -> Result<f64> {
    let mut sum = 0.0;
    for (picture, truth) in pictures.iter().zip(truths) {
        let [a, b] = [lpips.features(picture)?, lpips.features(truth)?];
        sum += lpips.distance(&a, &b)?;
    }
    Ok(sum / pictures.len().max(1) as f64)
}

/// A kernel, or a factor of one, of a layer between head and tail.
fn is_inner_kernel((name, _): &Parameter) -> bool {
    let kernel = ["weight", "expand", "squeeze"]
        .iter()
        .any(|k| name.ends_with(k));
    name.starts_with("body.") && kernel
}

/// A student with weights drawn from the seed: He's normal distribution, the last layer a tenth of it, biases zero.
fn new_student(
    config: StudentConfig,
    options: &Options,
    device: &Device,
) -> Result<(Student, Vec<Parameter>)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let student = build(config, options.expand, vb)?;
    let parameters = init::sorted(&vars)?;
    let mut rng = StdRng::seed_from_u64(options.seed);
    for (name, var) in &parameters {
        let variance = match (name.rsplit('.').next(), var.dims()) {
            (Some("weight" | "expand"), [_, ci, kh, kw]) => 2.0 / (ci * kh * kw) as f32,
            (Some("squeeze"), [_, width]) => 1.0 / *width as f32,
            _ => 0.0,
        };
        let last = name.starts_with("tail") && !name.ends_with("squeeze");
        let std = variance.sqrt() * if last { 0.1 } else { 1.0 };
        let values: Vec<f32> = (0..var.elem_count())
            .map(|_| std * normal(&mut rng))
            .collect();
        var.set(&Tensor::from_vec(values, var.shape(), device)?)?;
    }
    Ok((student, parameters))
}
