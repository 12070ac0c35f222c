//! Training of a student: supervision, then time-aware distillation (TAD-SR, arXiv 2408.07476) from
//! a teacher.
//!
//! The student has no noise input: it maps the latent of the base to the residual, so still images
//! do not flicker. Its residual is perturbed, and the frozen teacher scores it and provides the
//! features for the discriminator. Regression uses the low frequencies of the teacher's sample
//! only: a network without noise learns the mean of samples with different noise, which has no
//! texture.
//!
//! A student with the dial `detail` is trained at 1, its generative end. Only the tensors of this
//! dial learn, so that 0 remains the faithful model that the run begins with. [`Options::faithful`]
//! trains all else.

mod held_out;
mod options;
mod prepared;
mod terms;

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use candle_nn::{VarBuilder, VarMap};
use rand::{SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

pub use held_out::Validation;
pub use options::{Distillation, Options};
use prepared::Prepared;

use super::{
    HeldOut, InitialWeights, Latent, TrainingData, bounded,
    init::{self, Judge},
    initial::build,
    teacher::FrozenTeacher,
};
use crate::{
    Error, Result,
    metrics::Lpips,
    model::{Layer, LayerCondition, LiteModel, Metadata},
    nn::lite::{Condition, DiscriminatorConfig, LayerSpec, Student, StudentConfig},
    train::{
        adversary::{DiscriminatorTrainer, FeaturePair},
        checkpoint,
        data::{loader::Loader, pairs::Batch},
        init::{Tensors, sorted},
        losses::{Term, norm, stand_in},
        observer::Measurement,
        optim::{CLIP, Parameter, Trained, cosine},
        random::normal,
        ranks::Ranks,
        report::SampleRow,
        trainer::{RunContext, Training},
    },
};

/// Names of the terms of the loss in logs.
pub const TERMS: [&str; 8] = [
    "real",
    "consistency",
    "regression",
    "score",
    "adversarial",
    "change",
    "features",
    "pattern",
];
const GRADIENTS: [&str; TERMS.len()] = [
    "grad_real",
    "grad_consistency",
    "grad_regression",
    "grad_score",
    "grad_adversarial",
    "grad_change",
    "grad_features",
    "grad_pattern",
];

/// Indices in [`TERMS`]: terms that need a teacher, one of them, the term of clips, another one
/// that needs a teacher, and the last.
const TAUGHT: Range<usize> = 2..5;
const ADVERSARIAL: usize = 4;
const CHANGE: usize = 5;
const FEATURES: usize = 6;
const PATTERN: usize = 7;

/// One of this many batches contains a flat pair.
const GREY: u64 = 4;

/// Decay of the running norms of the gradients per step.
const NORM_DECAY: f64 = 0.98;

/// Separates the seeds of noise and initial weights from those of the data.
const NOISE: u64 = 0x4e4f_4953;
const DISCRIMINATOR: u64 = 0x4449_5343;

/// Student that a run makes.
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
    /// Steps that were planned at the beginning of the run.
    planned: u64,
    /// Updates of the discriminator.
    #[serde(rename = "judged")]
    discriminator_steps: u64,
    /// Halvings of the learning rate after divergence.
    #[serde(rename = "slowed")]
    halvings: i32,
    /// Hash of the data.
    fingerprint: u64,
    /// Hash of the teacher; old checkpoints have none.
    #[serde(default)]
    teacher: Option<u64>,
}

/// Training of a student in a folder: `checkpoint.safetensors` and `model.safetensors`.
pub struct StudentRun {
    options: Options,
    target: Target,
    latent: Latent,
    patch: usize,
    teacher: Option<FrozenTeacher>,
    student: Student,
    trained: Trained,
    adversary: Option<DiscriminatorTrainer<Judge>>,
    /// Running norms of the gradients of the terms; 0 for a term that has not been computed yet.
    norms: [f64; TERMS.len()],
    step: u64,
    /// Steps that were planned at the beginning of the run. If it is prolonged, the schedule of the
    /// terms stays.
    planned: u64,
    discriminator_steps: u64,
    /// Halvings of the learning rate after divergence.
    halvings: i32,
    loader: Loader<Batch>,
    held_out: Vec<HeldOut>,
    lpips: Option<Lpips>,
    fingerprint: u64,
    device: Device,
    ranks: Arc<dyn Ranks>,
    dir: PathBuf,
}

impl StudentRun {
    /// Starts a run, with the weights of `begin` if given, or continues with its checkpoint.
    /// Without a `teacher` the options must not have its terms. A run that continues may have more
    /// steps than it began with, and other learning rates.
    ///
    /// # Errors
    /// [`Error::Training`] when a new run has a checkpoint, a continued run has none, or it was
    /// made with other options or data; [`Error::Setting`] when options are out of range or do not
    /// fit the teacher, or `begin` is another student.
    pub fn new(
        options: Options,
        target: Target,
        latent: Latent,
        mut teacher: Option<FrozenTeacher>,
        begin: Option<&InitialWeights>,
        data: &TrainingData,
        context: &RunContext,
    ) -> Result<Self> {
        let patch = check(&options, &target, &latent, teacher.as_ref())?;
        if let Some(teacher) = &mut teacher {
            teacher.serve(&latent.stats, &context.device)?;
        }
        let path = context.folder.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, context.start)?;
        let mut spec = latent.pairs(patch, options.batch);
        spec.alike = target.student.conditioning.denoise;
        if target.student.memory > 0 {
            spec.frames = options.frames;
        }
        let (mut student, parameters) = new_student(target.student, &options, &context.device)?;
        student.set_dtype(context.dtype);
        let step = saved.as_ref().map_or(0, |(_, state)| state.step);
        let indices = context.ranks.indices(step, options.accumulate);
        let held_out = data.validation(&spec, &latent.stats)?;
        let (source, stats) = (data.source.clone(), latent.stats.clone());
        let make = move |seed: u64| {
            let mut batch = spec.batch(&*source, &stats, seed)?;
            if seed.is_multiple_of(GREY) {
                spec.insert_grey(&mut batch, &stats, seed);
            }
            Ok(batch)
        };
        let mut trained = Trained::new(parameters, 0.99, options.ema, CLIP)?;
        if options.muon_rate > 0.0 {
            trained = trained.with_muon(is_inner_kernel)?;
        }
        let mut run = Self {
            trained,
            adversary: new_adversary(&options, teacher.as_ref(), &context.device)?,
            norms: [0.0; TERMS.len()],
            step: 0,
            planned: options.steps,
            discriminator_steps: 0,
            halvings: context.halvings,
            held_out,
            lpips: None,
            fingerprint: data.fingerprint(),
            device: context.device.clone(),
            ranks: context.ranks.clone(),
            dir: context.folder.to_path_buf(),
            loader: Loader::start(make, options.seed, indices, context.data_threads),
            patch,
            teacher,
            student,
            options,
            target,
            latent,
        };
        let has_detail = run.target.student.conditioning.detail;
        if has_detail && saved.is_none() && begin.is_none() {
            let text = "the dial detail needs a model to begin with, which it is at 0";
            return Err(Error::Setting(text.into()));
        }
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

    fn restore(&mut self, path: &Path, tensors: &Tensors, state: State) -> Result<()> {
        if state.fingerprint != self.fingerprint {
            let reason = "was made with other data: give it as it was";
            return Err(Error::training(path, reason));
        }
        // A run that has diverged continues with another learning rate, a prolonged run with more
        // steps.
        let was = Options {
            learning_rate: self.options.learning_rate,
            muon_rate: if state.options.muon_rate > 0.0 && self.options.muon_rate > 0.0 {
                self.options.muon_rate
            } else {
                state.options.muon_rate
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
            adversary.restore(state.discriminator_steps, tensors)?;
        }
        // Older checkpoints have fewer terms.
        let norms = tensors.get("norms").map(Tensor::to_vec1::<f64>);
        if let Some(norms) = norms.transpose()? {
            self.norms.iter_mut().zip(norms).for_each(|(n, v)| *n = v);
        }
        (self.step, self.discriminator_steps) = (state.step, state.discriminator_steps);
        self.planned = state.planned;
        self.halvings += state.halvings;
        Ok(())
    }

    /// Measures also LPIPS in [`Self::measure`].
    pub fn set_lpips(&mut self, lpips: Lpips) {
        self.lpips = Some(lpips);
    }

    /// Returns the shares of the terms at this step.
    fn shares(&self) -> [f64; TERMS.len()] {
        let d = &self.options.distillation;
        let mut shares = self.all_shares();
        let begin = d.after * self.planned as f64;
        let after = self.step as f64 - begin;
        if after < 0.0 {
            shares[TAUGHT].fill(0.0);
            shares[FEATURES] = 0.0;
        } else {
            let ramp = (d.ramp * self.planned as f64).max(1.0);
            shares[ADVERSARIAL] *= ((after + 1.0) / ramp).min(1.0);
        }
        shares
    }

    /// Returns the shares that the terms grow to.
    fn all_shares(&self) -> [f64; TERMS.len()] {
        let mut shares = self.options.distillation.shares();
        if self.target.student.memory == 0 {
            shares[CHANGE] = 0.0;
        }
        shares
    }

    /// Returns `true` if the dial `detail` is trained, and `false` if all else is.
    fn is_detail(&self) -> bool {
        self.target.student.conditioning.detail && !self.options.faithful
    }

    /// Returns the condition of the network for `batch`.
    fn condition(&self, batch: &Batch) -> Condition {
        Condition {
            detail: f64::from(u8::from(self.is_detail())),
            ..batch.condition()
        }
    }

    /// Updates the discriminator and returns its loss.
    fn step_discriminator(&mut self, batches: &[Prepared]) -> Result<f64> {
        let Some(adversary) = &self.adversary else {
            return Ok(0.0);
        };
        let (loss, grads) = adversary.loss(&*self.ranks, batches.len(), |i| {
            let batch = &batches[i];
            let fake = batch.forward(&self.student)?.detach();
            let (real, t) = self.judged(batch, &batch.residual)?;
            let (fake, _) = self.judged(batch, &fake)?;
            Ok(FeaturePair { real, fake, t })
        })?;
        let Some(adversary) = &mut self.adversary else {
            return Ok(0.0);
        };
        bounded(&self.dir, self.step, "discriminator's loss", loss)?;
        adversary.update(&grads, self.options.distillation.discriminator_rate)?;
        self.discriminator_steps += 1;
        Ok(loss)
    }

    /// Updates the student. Returns the means over all batches of the values of the terms and of
    /// the norms of their weighted gradients.
    fn step_student(
        &mut self,
        batches: &[Prepared],
        shares: &[f64; TERMS.len()],
    ) -> Result<[[f64; TERMS.len()]; 2]> {
        let discriminator = match &self.adversary {
            Some(adversary) if shares[ADVERSARIAL] > 0.0 => Some(adversary.discriminator()?),
            _ => None,
        };
        let part = 1.0 / self.options.accumulate as f64;
        // Values, norms of the weighted gradients, and running norms.
        let mut sums = [[0.0; TERMS.len()]; 3];
        let mut grads = GradStore::default();
        for batch in batches {
            let result = batch.forward(&self.student)?;
            let z = result.detach();
            let terms = self.terms(batch, &z, shares, discriminator.as_ref())?;
            let norms = self.running_norms(&terms)?;
            let weights = weights(&norms, shares);
            let mut total = z.zeros_like()?;
            for (i, term) in terms.iter().enumerate() {
                let Some(term) = term else { continue };
                let gradient = (&term.gradient * weights[i])?;
                sums[0][i] += part * term.value;
                sums[1][i] += part * norm(&gradient)?;
                total = (total + gradient)?;
            }
            sums[2]
                .iter_mut()
                .zip(norms)
                .for_each(|(s, n)| *s += part * n);
            grads.extend((stand_in(&result, &total)? * part)?.backward()?)?;
        }
        if self.target.student.conditioning.detail {
            let trains_dial = self.is_detail();
            self.trained
                .freeze(&mut grads, |name| name.contains(".detail.") != trains_dial);
        }
        let parameters = self.trained.parameters();
        let values = sums.as_flattened_mut();
        self.ranks.sum_gradients(&mut grads, parameters, values)?;
        let [losses, norms, running] = sums;
        for (i, term) in TERMS.iter().enumerate() {
            bounded(&self.dir, self.step, term, losses[i])?;
            bounded(&self.dir, self.step, "gradient", running[i])?;
        }
        self.norms = running;
        let o = &self.options;
        let warm_up = (o.steps / 20).clamp(1, 500);
        let factor = cosine(0.5f64.powi(self.halvings), self.step, o.steps, warm_up);
        let (rate, muon) = (o.learning_rate * factor, o.muon_rate * factor);
        let whole = self.trained.step_with(&grads, rate, muon)?;
        bounded(&self.dir, self.step, "gradient", whole)?;
        Ok([losses, norms])
    }

    /// Returns the running norms of the gradients after a batch with these terms.
    fn running_norms(&self, terms: &[Option<Term>; TERMS.len()]) -> Result<[f64; TERMS.len()]> {
        let mut norms = self.norms;
        for (running, term) in norms.iter_mut().zip(terms) {
            let Some(term) = term else { continue };
            let now = norm(&term.gradient)?;
            *running = match *running {
                0.0 => now,
                before => NORM_DECAY * before + (1.0 - NORM_DECAY) * now,
            };
        }
        Ok(norms)
    }

    /// Returns the current model, with averaged weights and folded kernels.
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
}

impl Training for StudentRun {
    fn done(&self) -> u64 {
        self.step
    }

    /// Returns the losses of the step: the terms that have a share, the loss of the discriminator,
    /// and the norms of the weighted gradients at the student's result.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss or gradient is out of bounds. The checkpoint is still good.
    fn step(&mut self) -> Result<Vec<(&'static str, f64)>> {
        let count = self.options.accumulate;
        let mut batches = Vec::new();
        for index in self
            .ranks
            .indices(self.step, count)
            .take(self.ranks.share(count))
        {
            let batch = self.loader.next_batch()?;
            batches.push(self.prepare(&batch, index)?);
        }
        let shares = self.shares();
        let mut discriminator = 0.0;
        if shares[ADVERSARIAL] > 0.0 {
            discriminator = self.step_discriminator(&batches)?;
        }
        let [losses, gradients] = self.step_student(&batches, &shares)?;
        self.step += 1;
        let all = self.all_shares();
        let used = |i: &usize| all[*i] > 0.0;
        let mut report: Vec<_> = (0..TERMS.len())
            .filter(used)
            .map(|i| (TERMS[i], losses[i]))
            .collect();
        if all[ADVERSARIAL] > 0.0 {
            report.push(("discriminator", discriminator));
        }
        report.extend(
            (0..TERMS.len())
                .filter(used)
                .map(|i| (GRADIENTS[i], gradients[i])),
        );
        Ok(report)
    }

    /// Writes checkpoint and model into the folder of the run.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written. Existing files stay as they are.
    fn save(&self) -> Result<()> {
        let mut tensors = self.trained.state()?;
        if let Some(adversary) = &self.adversary {
            tensors.extend(adversary.state());
        }
        // A tensor, because numbers in JSON may lose their last digit.
        let norms = Tensor::new(&self.norms, &Device::Cpu)?;
        tensors.push(("norms".into(), norms));
        let state = State {
            options: self.options.clone(),
            target: self.target.clone(),
            latent: self.latent.clone(),
            step: self.step,
            planned: self.planned,
            discriminator_steps: self.discriminator_steps,
            halvings: self.halvings,
            fingerprint: self.fingerprint,
            teacher: self.teacher.as_ref().map(|t| t.fingerprint),
        };
        // The model comes first: weights that are not finite must not replace a good checkpoint,
        // and a checkpoint at the last step implies that the model exists.
        let bytes = self.model()?.to_bytes(true)?;
        checkpoint::write_atomically(&self.dir.join("model.safetensors"), &bytes)?;
        checkpoint::save(&self.dir.join("checkpoint.safetensors"), tensors, &state)
    }

    fn validate(&self) -> Result<Measurement> {
        let (mut text, mut values) = (Vec::new(), Vec::new());
        for v in self.measure()? {
            let mut line = format!("{} {:+.3} dB", v.name, v.gain);
            values.push((format!("held out {}/gain", v.name), v.gain));
            if let Some([student, base]) = v.lpips {
                line += &format!(", LPIPS {student:.4} ({base:.4})");
                values.push((format!("held out {}/LPIPS", v.name), student));
            }
            text.push(line);
        }
        let text = format!("against bicubic {}", text.join("; "));
        Ok(Measurement { text, values })
    }

    fn samples(&self) -> Result<Vec<SampleRow>> {
        self.held_out_samples()
    }
}

/// Reads the weights of `name`: a model file, the averaged weights in the checkpoint of a student,
/// or a bundled model.
///
/// # Errors
/// As [`InitialWeights::of_model`], and [`Error::Training`] for a damaged checkpoint.
pub fn initial_weights(name: &str) -> Result<InitialWeights> {
    let path = Path::new(name);
    if !path.is_file() || !checkpoint::is_checkpoint(path)? {
        return InitialWeights::of_model(name);
    }
    let (tensors, state) = checkpoint::load::<State>(path)?;
    let averages = tensors.into_iter().filter_map(|(name, tensor)| {
        let name = name.strip_prefix("ema.")?.to_string();
        Some((name, tensor))
    });
    let student = state.target.student;
    let vb = VarBuilder::from_tensors(averages.collect(), DType::F32, &Device::Cpu);
    let folded = build(student, state.options.expand, vb).and_then(|net| net.folded());
    Ok(InitialWeights {
        tensors: folded.map_err(|e| Error::training(path, format!("is damaged: {e}")))?,
        name: name.into(),
        student,
        scales: state.target.scales,
        stats: state.latent.stats,
    })
}

/// Checks that all parts fit. Returns the side of a patch.
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
        let shape = |latent: &Latent| (latent.kind, latent.r, latent.scales);
        if shape(&teacher.latent) != shape(latent) {
            return wrong(
                "the teacher was trained for another kind of latent or other scales".into(),
            );
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
) -> Result<Option<DiscriminatorTrainer<Judge>>> {
    let d = &options.distillation;
    if d.adversarial <= 0.0 {
        return Ok(None);
    }
    let seed = options.seed ^ DISCRIMINATOR;
    let made = match teacher {
        Some(teacher) if !d.pixels => {
            let config = DiscriminatorConfig {
                channels: teacher.net.feature_channels(),
                width: d.width,
                time_channels: teacher.net.config().widths[0],
            };
            init::discriminator(&config, seed, device)?
        }
        _ => init::image_discriminator(d.width, seed, device)?,
    };
    Ok(Some(DiscriminatorTrainer::new(made)?))
}

/// Returns the weights of the terms. The running norm of each gradient becomes its share of the
/// norm of the first term.
fn weights(norms: &[f64; TERMS.len()], shares: &[f64; TERMS.len()]) -> [f64; TERMS.len()] {
    let first = norms.iter().find(|n| **n > 0.0);
    let (first, sum) = (*first.unwrap_or(&1.0), shares.iter().sum::<f64>());
    let mut weights = [0.0; TERMS.len()];
    for (i, weight) in weights.iter_mut().enumerate() {
        // A term without a gradient, such as that of a new discriminator, is not amplified.
        if norms[i] > 1e-4 * first {
            *weight = shares[i] / sum * first / norms[i];
        }
    }
    weights
}

/// Returns `true` for a kernel, or a factor of a kernel, of a layer between head and tail.
fn is_inner_kernel((name, _): &Parameter) -> bool {
    let kernel = ["weight", "expand", "squeeze"]
        .iter()
        .any(|k| name.ends_with(k));
    name.starts_with("body.") && kernel
}

/// Creates a student with random weights of the seed: the normal distribution of He, a tenth of it
/// in the last layer, and zero biases.
fn new_student(
    config: StudentConfig,
    options: &Options,
    device: &Device,
) -> Result<(Student, Vec<Parameter>)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let student = build(config, options.expand, vb)?;
    let parameters = sorted(&vars)?;
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
