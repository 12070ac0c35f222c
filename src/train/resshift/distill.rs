//! Distillation of a ResShift model into one step: TAD-SR (He et al., arXiv 2408.07476).
//!
//! A step updates the discriminator first, on results without gradients, then the student against
//! the updated discriminator. The gradient at the student's result is computed before the graph of
//! the student is built, so the graphs of teacher and student never need memory at the same time.

use std::{
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

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
        adversary::{DiscriminatorTrainer, FeaturePair},
        checkpoint,
        data::{PhotoSet, loader::Loader},
        init::Tensors,
        losses::{
            Perturbation, Teacher, Term, hinge_generator, norm, normals, regression,
            score_direction, score_distillation, stand_in,
        },
        observer::Measurement,
        optim::{Parameter, Trained},
        random::{Fnv, step_seed},
        ranks::Ranks,
        trainer::{RunContext, Training},
    },
};

/// Weights that a student begins with. Tensors that do not fit its shape are random.
#[derive(Clone, Copy)]
pub enum InitialWeights<'a> {
    Teacher,
    Model(&'a ResShiftModel),
    Random,
}

#[derive(Serialize, Deserialize)]
struct State {
    options: Options,
    step: u64,
    /// [`PhotoSet::fingerprint`] of the photos and of the held-out photos, and the hash of the
    /// teacher.
    fingerprints: [u64; 3],
    /// Model that the student began with, if it is not the teacher.
    begun: Option<Origin>,
}

/// Metadata of a model that a student began with or learnt from.
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

/// Names of the student's losses in errors.
const TERMS: [&str; 3] = ["regression", "score", "adversarial loss"];

/// Losses of one step and norms of their gradients, means over its batches, in the order of
/// [`TERMS`].
#[derive(Default)]
struct StepLosses {
    /// Losses of the student, without their weights.
    losses: [f64; 3],
    /// Loss of the discriminator.
    discriminator: f64,
    /// Norms of the gradients of the weighted losses at the student's result.
    gradients: [f64; 3],
}

/// A batch with all random numbers of a step and all that follows without the student's gradient.
struct Prepared {
    lq: Tensor,
    zy: Tensor,
    z0: Tensor,
    /// Time that the student starts from, for each sample.
    start: Vec<usize>,
    /// Input of the student, scaled.
    input: Tensor,
    /// Deterministic result of the teacher.
    goal: Tensor,
    /// Result of the student, without gradients.
    result: Tensor,
    score: (Vec<usize>, Tensor),
    adversarial: (Vec<usize>, Tensor),
}

/// Frozen networks.
struct Frozen {
    config: ResShiftConfig,
    schedule: Schedule,
    teacher: Unet,
    autoencoder: Autoencoder,
}

/// Teacher with the low-resolution images of a batch, for the losses.
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

/// Distillation in a folder: `checkpoint.safetensors` and `model.safetensors`.
pub struct Distill {
    options: Options,
    frozen: Frozen,
    /// Model of the teacher, whose autoencoder the student's model takes over.
    model: ResShiftModel,
    student: Unet,
    trained: Trained,
    adversary: DiscriminatorTrainer<Discriminator>,
    step: u64,
    loader: Loader<Pictures>,
    held_out: Prepared,
    fingerprints: [u64; 3],
    begun: Option<Origin>,
    ranks: Arc<dyn Ranks>,
    dir: PathBuf,
}

/// Separates the seeds of noise, initial weights and measurements from those of the data.
const NOISE: u64 = 0x4e4f_4953;
const STUDENT: u64 = 0x5354_5544;
const DISCRIMINATOR: u64 = 0x4449_5343;
const HELD_OUT: u64 = 0x4845_4c44;

impl Distill {
    /// Starts a run, or continues with its checkpoint. `photos` are for training, `held_out` for
    /// measurements.
    ///
    /// # Errors
    /// [`Error::Setting`] when the options do not fit the teacher; [`Error::Training`] when a new
    /// run has a checkpoint, a continued run has none, or it was made with other options, photos or
    /// another teacher.
    pub fn new(
        options: Options,
        teacher: ResShiftModel,
        begin: InitialWeights,
        photos: Arc<PhotoSet>,
        held_out: &PhotoSet,
        context: &RunContext,
    ) -> Result<Self> {
        let dir = context.folder;
        let config = teacher.metadata.config.clone();
        options.check(&config)?;
        let path = dir.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, context.start)?;
        let (device, dtype) = (&context.device, context.dtype);
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
        let discriminator = DiscriminatorConfig::new(channels, frozen.config.unet.model_channels);
        let spec = PictureSpec::new(&options, &frozen.config);
        let examined = spec.batch(held_out, options.batch, HELD_OUT)?;
        let step = saved.as_ref().map_or(0, |(_, state)| state.step);
        let indices = context.ranks.indices(step, options.accumulate);
        let (batch, all) = (options.batch, photos.clone());
        let make = move |seed| spec.batch(&all, batch, seed);
        let mut run = Self {
            // As in the released code, gradients are not clipped.
            trained: Trained::new(parameters, 0.999, options.ema, f64::INFINITY)?,
            adversary: {
                let seed = options.seed ^ DISCRIMINATOR;
                DiscriminatorTrainer::new(init::discriminator(&discriminator, seed, device)?)?
            },
            held_out: prepare(&options, &frozen, &student, &examined, HELD_OUT)?,
            fingerprints: [
                photos.fingerprint(),
                held_out.fingerprint(),
                fingerprint(&teacher)?,
            ],
            begun: match begin {
                InitialWeights::Model(model) => Some(Origin::of(model)),
                InitialWeights::Teacher | InitialWeights::Random => None,
            },
            model: teacher,
            step,
            loader: Loader::start(make, options.seed, indices, context.data_threads),
            ranks: context.ranks.clone(),
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
        // A run that has diverged continues with another learning rate.
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

    /// Returns a hash of photos, teacher and options.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        self.fingerprints.hash(&mut hash);
        format!("{:?}", self.options).hash(&mut hash);
        hash.finish()
    }

    /// Updates the discriminator and returns its loss.
    fn step_discriminator(&mut self, batches: &[Prepared], rate: f64) -> Result<f64> {
        let frozen = &self.frozen;
        let (loss, grads) = self.adversary.loss(&*self.ranks, batches.len(), |i| {
            let batch = &batches[i];
            let (perturbation, seen) = (
                frozen.perturbation(batch, &batch.adversarial),
                frozen.seen(batch),
            );
            Ok(FeaturePair {
                real: perturbation.features(&batch.z0, &seen)?,
                fake: perturbation.features(&batch.result, &seen)?,
                t: perturbation.t.to_vec(),
            })
        })?;
        self.finite("discriminator's loss", loss)?;
        self.adversary.update(&grads, rate)?;
        Ok(loss)
    }

    /// Updates the student. Adds its losses to `report`.
    fn step_student(
        &mut self,
        batches: &[Prepared],
        rate: f64,
        report: &mut StepLosses,
    ) -> Result<()> {
        let discriminator = if self.options.weights.adversarial > 0.0 {
            Some(self.adversary.discriminator()?)
        } else {
            None
        };
        let share = 1.0 / self.options.accumulate as f64;
        let mut sums = [[0.0; TERMS.len()]; 2];
        let mut grads = GradStore::default();
        for batch in batches {
            let mut total = batch.result.zeros_like()?;
            for (i, term) in self
                .terms(batch, discriminator.as_ref())?
                .iter()
                .enumerate()
            {
                let Some((term, weight)) = term else { continue };
                let gradient = (&term.gradient * *weight)?;
                sums[0][i] += share * term.value;
                sums[1][i] += share * norm(&gradient)?;
                total = (total + gradient)?;
            }
            let z = seen(&self.student, batch).predict(&batch.input, &batch.start)?;
            let loss = (stand_in(&z, &total)? * share)?;
            grads.extend(loss.backward()?)?;
        }
        let parameters = self.trained.parameters();
        let values = sums.as_flattened_mut();
        self.ranks.sum_gradients(&mut grads, parameters, values)?;
        [report.losses, report.gradients] = sums;
        for (i, term) in TERMS.iter().enumerate() {
            self.finite(term, report.losses[i])?;
            self.finite(term, report.gradients[i])?;
        }
        let whole = self.trained.step(&grads, rate)?;
        self.finite("gradient", whole)?;
        Ok(())
    }

    /// Returns the terms of the loss in the order of [`TERMS`], with their weights. Terms of weight
    /// 0 are left out.
    fn terms(
        &self,
        batch: &Prepared,
        discriminator: Option<&Discriminator>,
    ) -> Result<[Option<(Term, f64)>; 3]> {
        let (w, frozen, z) = (&self.options.weights, &self.frozen, &batch.result);
        let seen = frozen.seen(batch);
        let regression = Term::at(z, |z| regression(z, &batch.goal))?;
        let score = if w.score > 0.0 {
            let perturbation = frozen.perturbation(batch, &batch.score);
            let weight = self.options.score_weight;
            let g = score_direction(z, &batch.goal, &perturbation, weight, &seen)?;
            Some((Term::at(z, |z| score_distillation(z, &g))?, w.score))
        } else {
            None
        };
        let adversarial = match discriminator {
            Some(discriminator) => {
                let perturbation = frozen.perturbation(batch, &batch.adversarial);
                let loss = |z: &Tensor| {
                    let features = perturbation.features(z, &seen)?;
                    hinge_generator(&discriminator.forward(&features, perturbation.t)?)
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
            "the {what} is {value} at step {step}: continue at a lower learning rate, by --resume and \
             --lr or the recipe's learning_rate"
        );
        Err(Error::training(&self.dir, reason))
    }

    /// Returns the distances of the averaged student's result to the deterministic result of the
    /// teacher and to the real latent, on held-out images with fixed noise: norms of the
    /// differences over the norms of the goals.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn distances(&self) -> Result<[f64; 2]> {
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

    /// Returns the averaged weights by the names of the network.
    fn averages(&self) -> Tensors {
        let own = |(name, t): (String, Tensor)| {
            let name = name.strip_prefix("student.").unwrap_or(&name);
            (name.to_string(), t)
        };
        self.trained.averages().into_iter().map(own).collect()
    }

    /// Returns the current student, with averaged weights, as a ResShift model.
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
}

impl Training for Distill {
    fn done(&self) -> u64 {
        self.step
    }

    /// Takes one step.
    ///
    /// # Errors
    /// When a loss or gradient is not finite. The checkpoint is still good.
    fn step(&mut self) -> Result<Vec<(&'static str, f64)>> {
        let batches = self.options.accumulate;
        let own = self.ranks.share(batches);
        let mut prepared = Vec::with_capacity(own);
        for index in self.ranks.indices(self.step, batches).take(own) {
            let pictures = self.loader.next_batch()?;
            let seed = step_seed(self.options.seed ^ NOISE, index);
            let (o, frozen) = (&self.options, &self.frozen);
            prepared.push(prepare(o, frozen, &self.student, &pictures, seed)?);
        }
        let warm_up = self.options.warm_up.max(1);
        let rate = self.options.learning_rate * ((self.step + 1) as f64 / warm_up as f64).min(1.0);
        let mut report = StepLosses::default();
        if self.options.weights.adversarial > 0.0 {
            report.discriminator = self.step_discriminator(&prepared, rate)?;
        }
        self.step_student(&prepared, rate, &mut report)?;
        self.step += 1;
        let StepLosses {
            losses: [regression, score, generator],
            discriminator,
            gradients,
        } = report;
        Ok(vec![
            ("regression", regression),
            ("score", score),
            ("generator", generator),
            ("discriminator", discriminator),
            ("grad_regression", gradients[0]),
            ("grad_score", gradients[1]),
            ("grad_generator", gradients[2]),
        ])
    }

    /// Writes checkpoint and model into the folder of the run.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written, [`Error::Training`] when weights are not
    /// finite. Existing files stay as they are.
    fn save(&self) -> Result<()> {
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
        // The model comes first: a checkpoint at the last step implies that it exists.
        let path = self.dir.join("model.safetensors");
        self.model().save(&path, Precision::F32)?;
        checkpoint::save(&self.dir.join("checkpoint.safetensors"), tensors, &state)
    }

    fn validate(&self) -> Result<Measurement> {
        let [teacher, truth] = self.distances()?;
        Ok(Measurement {
            text: format!(
                "held out {teacher:.4} from the teacher's result, {truth:.4} from the ground truth"
            ),
            values: vec![
                ("held out/teacher".into(), teacher),
                ("held out/truth".into(), truth),
            ],
        })
    }
}

impl Frozen {
    fn seen<'a>(&'a self, batch: &'a Prepared) -> Seen<'a> {
        seen(&self.teacher, batch)
    }

    fn perturbation<'a>(
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

/// Encodes the images, samples noise and times from `seed`, and runs teacher and student from the
/// same noise.
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
    let mut noisy = |below: usize| -> Result<_> {
        let t = (0..n).map(|_| rng.random_range(0..below)).collect();
        Ok((t, normals(&z0, &mut rng)?))
    };
    let score = noisy(options.score_times)?;
    // The last time is pure noise, which tells the discriminator nothing.
    let adversarial = noisy(config.diffusion.steps - 1)?;
    let start = vec![start; n];
    let schedule = &frozen.schedule;
    let z = schedule.perturb(&zy, &zy, &start, &noise)?;
    let input = schedule.scale_input(&z, &start)?;
    let seen = |unet| Seen { unet, lq: &lq };
    let goal = deterministic(schedule, &zy, z, start[0], &seen(&frozen.teacher))?;
    // The graph is dropped; the update of the student builds it again.
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

/// Returns the deterministic result of the teacher from the latent `z` at time `start`, in all
/// steps below.
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

/// Creates the student and its variables.
fn new_student(
    options: &Options,
    teacher: &ResShiftModel,
    begin: InitialWeights,
    device: &Device,
) -> Result<(Unet, Vec<Parameter>)> {
    let own = |(name, t): (&String, &Tensor)| {
        let name = name.strip_prefix("unet.")?;
        Some((name.to_string(), t.clone()))
    };
    let like: Tensors = match begin {
        InitialWeights::Teacher => teacher.tensors.iter().filter_map(own).collect(),
        InitialWeights::Model(model) => model.tensors.iter().filter_map(own).collect(),
        InitialWeights::Random => Tensors::new(),
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

/// Returns a hash of the weights of the model (every 1009th value of each tensor, FNV-1a).
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
