//! Distillation of a ResShift network into one step: TAD-SR (He et al., arXiv 2408.07476).
//!
//! A step updates the discriminator first, on results that carry no gradient, then the student against the updated
//! discriminator. The gradient at the student's result is computed before the student's graph is built, so the frozen
//! teacher's graph and the student's never need memory at the same time.

use std::{path::Path, path::PathBuf, sync::Arc};

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    images::{PictureSpec, Pictures},
    init,
    options::Options,
};
use crate::{
    Error, Result,
    diffusion::Schedule,
    model::{Precision, ResShiftMetadata, ResShiftModel},
    nn::resshift::{
        Autoencoder, Discriminator, DiscriminatorConfig, ResShiftConfig, Unet, upsample_bicubic,
    },
    train::{
        adversary::{Adversary, Judged},
        checkpoint::{self, Start},
        data::{PhotoSet, loader::Loader},
        init::Tensors,
        losses::{
            Perturbation, Teacher, Term, hinge_generator, norm, normals, regression,
            score_direction, score_distillation, stand_in,
        },
        optim::{Parameter, Trained},
        random::step_seed,
    },
};

/// What a new student's weights are: those of the same name and shape in a model, and random ones.
#[derive(Clone, Copy)]
pub enum Begin<'a> {
    Teacher,
    Model(&'a ResShiftModel),
    Random,
}

/// Where a run is.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Of `checkpoint.safetensors` and `model.safetensors`.
    pub dir: &'a Path,
    pub start: Start,
    /// Threads that make pictures.
    pub data_threads: usize,
    /// Where the networks are, and the type of the U-Nets' and the autoencoder's feature maps.
    pub device: &'a Device,
    pub dtype: DType,
}

#[derive(Serialize, Deserialize)]
struct State {
    options: Options,
    step: u64,
    /// [`PhotoSet::fingerprint`] of the photos and of those held out, and the teacher's.
    fingerprints: [u64; 3],
    /// The model that the student began with, where that is not the teacher.
    begun: Option<Origin>,
}

/// Whose weights a student has taken over or learnt from, as their file says it.
#[derive(Clone, Serialize, Deserialize)]
struct Origin {
    name: String,
    licence: String,
    source: serde_json::Value,
}

impl Origin {
    fn of(model: &ResShiftModel) -> Self {
        let metadata = &model.metadata;
        Self {
            name: metadata.name.clone(),
            licence: metadata.licence.clone(),
            source: metadata.source.clone(),
        }
    }
}

/// The student's losses, in the order of [`StepReport`].
const TERMS: [&str; 3] = ["regression", "score", "adversarial loss"];

/// Losses and other numbers of one step, means over its batches. Three numbers are for regression, score distillation
/// and the adversarial loss.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// The student's losses, without their weights.
    pub losses: [f64; 3],
    /// The discriminator's loss.
    pub discriminator: f64,
    /// Norms of the weighted losses' gradients at the student's result.
    pub gradients: [f64; 3],
}

/// A batch with all that is drawn for it and all that follows without the student's gradient.
struct Prepared {
    lq: Tensor,
    zy: Tensor,
    z0: Tensor,
    /// The time that the student starts from, for each sample.
    start: Vec<usize>,
    /// The student's input, scaled.
    input: Tensor,
    /// The teacher's deterministic result.
    goal: Tensor,
    /// The student's result; carries no gradient.
    result: Tensor,
    score: (Vec<usize>, Tensor),
    adversarial: (Vec<usize>, Tensor),
}

/// The frozen networks.
struct Frozen {
    config: ResShiftConfig,
    schedule: Schedule,
    teacher: Unet,
    autoencoder: Autoencoder,
}

/// The teacher as the losses see it, with the low-resolution images of a batch.
struct Seen<'a> {
    unet: &'a Unet,
    lq: &'a Tensor,
}

impl Seen<'_> {
    fn lq(&self) -> Option<&Tensor> {
        self.unet.config().cond_lq.then_some(self.lq)
    }
}

impl Teacher for Seen<'_> {
    fn predict(&self, x: &Tensor, t: &[usize]) -> candle_core::Result<Tensor> {
        self.unet.forward(x, t, self.lq())
    }

    fn features(&self, x: &Tensor, t: &[usize]) -> candle_core::Result<Vec<Tensor>> {
        self.unet.features(x, t, self.lq())
    }
}

/// A training run in a directory: `checkpoint.safetensors` and `model.safetensors`.
pub struct Distill {
    options: Options,
    frozen: Frozen,
    /// The teacher's file, for the student's.
    model: ResShiftModel,
    student: Unet,
    trained: Trained,
    adversary: Adversary<Discriminator>,
    step: u64,
    loader: Loader<Pictures>,
    held_out: Prepared,
    fingerprints: [u64; 3],
    begun: Option<Origin>,
    dir: PathBuf,
}

/// Separates the seeds of noise, initial weights and measurements from those of the data.
const NOISE: u64 = 0x4e4f_4953;
const STUDENT: u64 = 0x5354_5544;
const DISCRIMINATOR: u64 = 0x4449_5343;
const HELD_OUT: u64 = 0x4845_4c44;

impl Distill {
    /// Starts a run at `place`, or goes on with the checkpoint there. `photos` are trained on, `held_out` only measured
    /// on.
    ///
    /// # Errors
    /// [`Error::Training`] when the options do not fit the teacher, when there is a checkpoint and the run does not go on
    /// with it, or the other way round, or when it was made with other options, photos or another teacher.
    pub fn new(
        options: Options,
        teacher: ResShiftModel,
        begin: Begin,
        photos: Arc<PhotoSet>,
        held_out: &PhotoSet,
        place: Place,
    ) -> Result<Self> {
        let dir = place.dir;
        let config = teacher.metadata.config.clone();
        let unfit = |e: String| Error::training(dir, e);
        options.check(&config).map_err(unfit)?;
        let path = dir.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, place.start)?;
        let (device, dtype) = (place.device, place.dtype);
        let mut frozen = Frozen {
            schedule: teacher.schedule()?,
            teacher: teacher.unet(device)?,
            autoencoder: teacher.autoencoder(device)?,
            config,
        };
        frozen.teacher.set_dtype(dtype);
        frozen.autoencoder.set_dtype(dtype);
        let (mut student, parameters) = new_student(&options, &teacher, begin, device)?;
        student.set_dtype(dtype);
        let channels = frozen.teacher.feature_channels();
        let judge = DiscriminatorConfig::new(channels, frozen.config.unet.model_channels);
        let spec = PictureSpec::new(&options, &frozen.config);
        let examined = spec.batch(held_out, options.batch, HELD_OUT)?;
        let step = saved.as_ref().map_or(0, |(_, state)| state.step);
        let first = step * options.accumulate as u64;
        let (batch, all) = (options.batch, photos.clone());
        let make = move |seed| spec.batch(&all, batch, seed);
        let mut run = Self {
            // As published, gradients of any length are followed.
            trained: Trained::new(parameters, 0.999, options.ema, f64::INFINITY)?,
            adversary: {
                let seed = options.seed ^ DISCRIMINATOR;
                Adversary::new(init::discriminator(&judge, seed, device)?)?
            },
            held_out: prepare(&options, &frozen, &student, &examined, HELD_OUT)?,
            fingerprints: [
                photos.fingerprint(),
                held_out.fingerprint(),
                fingerprint(&teacher)?,
            ],
            begun: match begin {
                Begin::Model(model) => Some(Origin::of(model)),
                Begin::Teacher | Begin::Random => None,
            },
            model: teacher,
            step,
            loader: Loader::start(make, options.seed, first, place.data_threads),
            dir: dir.to_path_buf(),
            options,
            frozen,
            student,
        };
        if let Some((tensors, state)) = saved {
            run.restore(&path, &tensors, state)?;
        }
        Ok(run)
    }

    fn restore(&mut self, path: &Path, tensors: &Tensors, state: State) -> Result<()> {
        if state.fingerprints != self.fingerprints {
            let reason = "was made with other photos or another teacher: give them as they were";
            return Err(Error::training(path, reason));
        }
        // A run that diverged goes on with another learning rate.
        let was = Options {
            learning_rate: self.options.learning_rate,
            ..state.options.clone()
        };
        if was != self.options {
            let found = checkpoint::differences(&was, &self.options);
            return Err(checkpoint::other_options(path, found));
        }
        self.trained.restore(state.step, tensors)?;
        self.adversary.restore(state.step, tensors)?;
        self.begun = state.begun.or(self.begun.take());
        Ok(())
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.step
    }

    /// Takes one step.
    ///
    /// # Errors
    /// When a loss or gradient is not finite; the checkpoint is then still the last good one.
    pub fn step(&mut self) -> Result<StepReport> {
        let batches = self.options.accumulate;
        let first = self.step * batches as u64;
        let mut prepared = Vec::with_capacity(batches);
        for i in 0..batches as u64 {
            let pictures = self.loader.next_batch()?;
            let seed = step_seed(self.options.seed ^ NOISE, first + i);
            let (o, frozen) = (&self.options, &self.frozen);
            prepared.push(prepare(o, frozen, &self.student, &pictures, seed)?);
        }
        let warm_up = self.options.warm_up.max(1);
        let rate = self.options.learning_rate * ((self.step + 1) as f64 / warm_up as f64).min(1.0);
        let mut report = StepReport::default();
        if self.options.weights.adversarial > 0.0 {
            report.discriminator = self.step_discriminator(&prepared, rate)?;
        }
        self.step_student(&prepared, rate, &mut report)?;
        self.step += 1;
        Ok(report)
    }

    /// Updates the discriminator; gives its loss.
    fn step_discriminator(&mut self, batches: &[Prepared], rate: f64) -> Result<f64> {
        let frozen = &self.frozen;
        let (loss, grads) = self.adversary.loss(batches.len(), |i| {
            let batch = &batches[i];
            let (draw, seen) = (frozen.draw(batch, &batch.adversarial), frozen.seen(batch));
            Ok(Judged {
                real: draw.features(&batch.z0, &seen)?,
                fake: draw.features(&batch.result, &seen)?,
                t: draw.t.to_vec(),
            })
        })?;
        self.finite("discriminator's loss", loss)?;
        self.adversary.update(&grads, rate)?;
        Ok(loss)
    }

    /// Updates the student; adds its numbers to `report`.
    fn step_student(
        &mut self,
        batches: &[Prepared],
        rate: f64,
        report: &mut StepReport,
    ) -> Result<()> {
        let judge = match self.options.weights.adversarial > 0.0 {
            true => Some(self.adversary.judge()?),
            false => None,
        };
        let share = 1.0 / batches.len() as f64;
        let mut grads = GradStore::default();
        for batch in batches {
            let mut total = batch.result.zeros_like()?;
            for (i, term) in self.terms(batch, judge.as_ref())?.iter().enumerate() {
                let Some((term, weight)) = term else { continue };
                let gradient = (&term.gradient * *weight)?;
                report.losses[i] += share * self.finite(TERMS[i], term.value)?;
                let norm = self.finite(TERMS[i], norm(&gradient)?)?;
                report.gradients[i] += share * norm;
                total = (total + gradient)?;
            }
            let z = seen(&self.student, batch).predict(&batch.input, &batch.start)?;
            let loss = (stand_in(&z, &total)? * share)?;
            grads.extend(loss.backward()?)?;
        }
        let whole = self.trained.step(&grads, rate)?;
        self.finite("gradient", whole)?;
        Ok(())
    }

    /// The terms of the student's loss in the order of [`TERMS`], with their weights; those of weight 0 are left out.
    fn terms(
        &self,
        batch: &Prepared,
        judge: Option<&Discriminator>,
    ) -> Result<[Option<(Term, f64)>; 3]> {
        let (w, frozen, z) = (&self.options.weights, &self.frozen, &batch.result);
        let seen = frozen.seen(batch);
        let regression = Term::at(z, |z| regression(z, &batch.goal))?;
        let score = match w.score > 0.0 {
            true => {
                let draw = frozen.draw(batch, &batch.score);
                let weight = self.options.score_weight;
                let g = score_direction(z, &batch.goal, &draw, weight, &seen)?;
                Some((Term::at(z, |z| score_distillation(z, &g))?, w.score))
            }
            false => None,
        };
        let adversarial = match judge {
            Some(judge) => {
                let draw = frozen.draw(batch, &batch.adversarial);
                let loss = |z: &Tensor| {
                    let features = draw.features(z, &seen)?;
                    hinge_generator(&judge.forward(&features, draw.t)?)
                };
                Some((Term::at(z, loss)?, w.adversarial))
            }
            None => None,
        };
        Ok([Some((regression, w.regression)), score, adversarial])
    }

    fn finite(&self, what: &str, value: f64) -> Result<f64> {
        if value.is_finite() {
            return Ok(value);
        }
        let step = self.step;
        let reason = format!(
            "the {what} is {value} at step {step}: go on at a lower learning rate, by --resume and --lr or the recipe's lr"
        );
        Err(Error::training(&self.dir, reason))
    }

    /// How far the averaged student's result is from the teacher's deterministic one, and from the real latent, on
    /// held-out pictures with fixed noise: norms of the differences over the goals' norms.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn validate(&self) -> Result<[f64; 2]> {
        let averages = self.averages();
        let vb = VarBuilder::from_tensors(averages, DType::F32, self.student.device());
        let mut unet = Unet::new(&self.options.student, vb)?;
        unet.set_dtype(self.student.dtype());
        let batch = &self.held_out;
        let z = seen(&unet, batch).predict(&batch.input, &batch.start)?;
        let apart =
            |goal: &Tensor| -> Result<f64> { Ok(norm(&(&z - goal)?)? / norm(goal)?.max(1e-12)) };
        Ok([apart(&batch.goal)?, apart(&batch.z0)?])
    }

    /// The averaged weights by the network's own names.
    fn averages(&self) -> Tensors {
        let own = |(name, t): (String, Tensor)| {
            let name = name.strip_prefix("student.").unwrap_or(&name);
            (name.to_string(), t)
        };
        self.trained.averages().into_iter().map(own).collect()
    }

    /// The student as it stands, with averaged weights, as a model of the teacher's family.
    pub fn model(&self) -> ResShiftModel {
        let autoencoder = self.model.tensors.iter();
        let mut tensors: Tensors = autoencoder
            .filter(|(name, _)| name.starts_with("autoencoder."))
            .map(|(name, t)| (name.clone(), t.clone()))
            .collect();
        let averages = self.averages().into_iter();
        tensors.extend(averages.map(|(name, t)| (format!("unet.{name}"), t)));
        let teacher = Origin::of(&self.model);
        let licence = match &self.begun {
            Some(begun) if begun.licence != teacher.licence => {
                format!("{} AND {}", teacher.licence, begun.licence)
            }
            _ => teacher.licence.clone(),
        };
        let config = ResShiftConfig {
            unet: self.options.student.clone(),
            ..self.frozen.config.clone()
        };
        let mut metadata = ResShiftMetadata::new(&self.options.name, config, &licence);
        metadata.source = serde_json::json!({
            "tool": format!("tadsr-train {}", env!("CARGO_PKG_VERSION")),
            "method": "time-aware distillation into one step (TAD-SR)",
            "teacher": teacher,
            "begun_with": self.begun,
            "options": self.options,
            "steps_done": self.step,
        });
        ResShiftModel { metadata, tensors }
    }

    /// Writes checkpoint and model into the run's directory.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written, [`Error::Training`] when weights are not finite; the files there
    /// before stay whole.
    pub fn save(&self) -> Result<()> {
        let mut tensors = self.trained.state()?;
        tensors.extend(self.adversary.state());
        for (name, t) in &tensors {
            self.finite(name, norm(&t.to_dtype(DType::F32)?)?)?;
        }
        let state = State {
            options: self.options.clone(),
            step: self.step,
            fingerprints: self.fingerprints,
            begun: self.begun.clone(),
        };
        // The model first: a checkpoint at the last step says that it is there.
        let path = self.dir.join("model.safetensors");
        self.model().save(&path, Precision::F32)?;
        checkpoint::save(&self.dir.join("checkpoint.safetensors"), tensors, &state)
    }
}

impl Frozen {
    fn seen<'a>(&'a self, batch: &'a Prepared) -> Seen<'a> {
        seen(&self.teacher, batch)
    }

    fn draw<'a>(
        &'a self,
        batch: &'a Prepared,
        (t, noise): &'a (Vec<usize>, Tensor),
    ) -> Perturbation<'a> {
        Perturbation {
            schedule: &self.schedule,
            zy: &batch.zy,
            t,
            noise,
        }
    }
}

fn seen<'a>(unet: &'a Unet, batch: &'a Prepared) -> Seen<'a> {
    Seen {
        unet,
        lq: &batch.lq,
    }
}

/// Encodes the pictures, draws noise and times from `seed`, and lets teacher and student work from the same noise.
fn prepare(
    options: &Options,
    frozen: &Frozen,
    student: &Unet,
    pictures: &Pictures,
    seed: u64,
) -> Result<Prepared> {
    let config = &frozen.config;
    let (side, scale) = (options.patch, config.diffusion.scale);
    let n = pictures.high.len() / (3 * side * side);
    let device = student.device();
    let images = |values: &[f32], side| Tensor::from_slice(values, (n, side, side, 3), device);
    let lq = images(&pictures.low, side / scale)?;
    let z0 = frozen.autoencoder.encode(&images(&pictures.high, side)?)?;
    let zy = frozen.autoencoder.encode(&upsample_bicubic(&lq, scale)?)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let start = options.starts[rng.random_range(0..options.starts.len())];
    let noise = normals(&z0, &mut rng)?;
    let mut draw = |below: usize| -> Result<_> {
        let t = (0..n).map(|_| rng.random_range(0..below)).collect();
        Ok((t, normals(&z0, &mut rng)?))
    };
    let score = draw(options.score_times)?;
    // The last time is all noise; at the others there is something to judge.
    let adversarial = draw(config.diffusion.steps - 1)?;
    let start = vec![start; n];
    let schedule = &frozen.schedule;
    let z = schedule.perturb(&zy, &zy, &start, &noise)?;
    let input = schedule.scale_input(&z, &start)?;
    let seen = |unet| Seen { unet, lq: &lq };
    let goal = deterministic(schedule, &zy, z, start[0], &seen(&frozen.teacher))?;
    // The graph goes at once; the student's own step builds it anew.
    let result = seen(student).predict(&input, &start)?.detach();
    Ok(Prepared {
        start,
        input,
        goal,
        result,
        score,
        adversarial,
        zy,
        z0,
        lq,
    })
}

/// The teacher's deterministic result from the latent `z` at time `start`, by every time below it.
fn deterministic(
    schedule: &Schedule,
    zy: &Tensor,
    mut z: Tensor,
    start: usize,
    teacher: &impl Teacher,
) -> Result<Tensor> {
    for from in (0..=start).rev() {
        let t = vec![from; z.dim(0)?];
        let clean = teacher.predict(&schedule.scale_input(&z, &t)?, &t)?;
        z = schedule.deterministic_step(&z, &clean, zy, from, from.checked_sub(1))?;
    }
    Ok(z)
}

/// The student and its variables.
fn new_student(
    options: &Options,
    teacher: &ResShiftModel,
    begin: Begin,
    device: &Device,
) -> Result<(Unet, Vec<Parameter>)> {
    let own = |(name, t): (&String, &Tensor)| {
        let name = name.strip_prefix("unet.")?;
        Some((name.to_string(), t.clone()))
    };
    let like: Tensors = match begin {
        Begin::Teacher => teacher.tensors.iter().filter_map(own).collect(),
        Begin::Model(model) => model.tensors.iter().filter_map(own).collect(),
        Begin::Random => Tensors::new(),
    };
    let shapes = options.student.tensors();
    let variables = init::unet(&shapes, &like, options.seed ^ STUDENT, device)?;
    let tensors = variables.iter();
    let tensors = tensors.map(|(name, var)| (name.clone(), var.as_tensor().clone()));
    let vb = VarBuilder::from_tensors(tensors.collect(), DType::F32, device);
    let student = Unet::new(&options.student, vb)?;
    let name = |(name, var)| (format!("student.{name}"), var);
    Ok((student, variables.into_iter().map(name).collect()))
}

/// A number that changes with the model's weights (every 1009th value of each tensor, FNV-1a).
fn fingerprint(model: &ResShiftModel) -> Result<u64> {
    let mut names: Vec<_> = model.tensors.keys().collect();
    names.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut mix = |v: u64| hash = (hash ^ v).wrapping_mul(0x0100_0000_01b3);
    for name in names {
        name.bytes().for_each(|b| mix(b.into()));
        let values = model.tensors[name].flatten_all()?.to_vec1::<f32>()?;
        let sampled = values.iter().step_by(1009);
        sampled.for_each(|v| mix(v.to_bits().into()));
    }
    Ok(hash)
}
