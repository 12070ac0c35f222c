//! The teacher's training: residual-shifting diffusion (ResShift, arXiv 2307.12348) on the whitened residual.

use std::{
    fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    Diffusion, Guided, HeldOut, Latent, Material, Place, bounded, check_common, gain, init,
};
use crate::{
    Error, Result,
    diffusion::{Schedule, deterministic},
    nn::lite::{LatentKind, Teacher, TeacherConfig},
    train::{
        checkpoint,
        data::{loader::Loader, pairs::Batch},
        losses::{Perturbation, Teacher as _, denoising, normals},
        optim::{CLIP, Trained, cosine},
        random::{Fnv, step_seed},
    },
};

/// Everything that determines a run's result, beside the data and the latent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Channels of each level, multiples of 16; each level but the last halves the grid.
    pub widths: Vec<usize>,
    /// ResBlocks of each level, on the way down and on the way up.
    pub blocks: usize,
    pub diffusion: Diffusion,
    pub steps: u64,
    /// Pairs in a batch.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels; 0 for 48 cells of the grid.
    pub patch: usize,
    /// Peak; it warms up, then falls along a cosine.
    pub learning_rate: f64,
    /// Decay of the averaged weights.
    pub ema: f64,
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            widths: vec![16, 32, 48],
            blocks: 2,
            diffusion: Diffusion::default(),
            steps: 30_000,
            batch: 8,
            accumulate: 1,
            patch: 0,
            learning_rate: 1e-3,
            ema: 0.999,
            seed: 1,
        }
    }
}

impl Options {
    /// The network's shape for a latent of `kind` and `r`.
    ///
    /// # Errors
    /// [`Error::Setting`] that names what is out of range.
    pub fn config(&self, kind: LatentKind, r: usize) -> Result<TeacherConfig> {
        let config = TeacherConfig {
            latent: kind.channels(r),
            r,
            widths: self.widths.clone(),
            blocks: self.blocks,
        };
        config
            .check()
            .map_err(|e| Error::Setting(format!("teacher: {e}")))?;
        Ok(config)
    }

    /// The side of a high-resolution patch for a latent of `r` and a network that takes sides of `multiple` cells.
    ///
    /// # Errors
    /// [`Error::Setting`] when that is out of range.
    pub fn patch_side(&self, r: usize, multiple: usize) -> Result<usize> {
        let patch = match self.patch {
            0 => 48 * r,
            patch => patch,
        };
        let multiple = r * multiple;
        match (1..=1024).contains(&patch) && patch.is_multiple_of(multiple) {
            true => Ok(patch),
            false => Err(Error::Setting(format!(
                "teacher: patch = {patch}: a multiple of {multiple} up to 1024"
            ))),
        }
    }

    /// # Errors
    /// [`Error::Setting`] that names what is out of range, whatever the latent.
    pub fn check(&self) -> Result<()> {
        let batches = [self.batch, self.accumulate];
        check_common(self.steps, batches, self.learning_rate, self.ema)
            .map_err(|e| Error::Setting(format!("teacher: {e}")))?;
        self.diffusion.schedule().map(|_| ())
    }
}

/// Separates the seeds of noise, initial weights and measurements from those of the data.
const NOISE: u64 = 0x4e4f_4953;
const WEIGHTS: u64 = 0x5445_4143;
const HELD_OUT: u64 = 0x4845_4c44;

#[derive(Serialize, Deserialize)]
struct State {
    options: Options,
    latent: Latent,
    step: u64,
    slowed: i32,
    /// Of the data.
    fingerprint: u64,
}

impl State {
    /// Whether a run of `options`, `latent` and `fingerprint` is the one of the file at `path`.
    fn check(
        &self,
        path: &Path,
        options: &Options,
        latent: &Latent,
        fingerprint: u64,
    ) -> Result<()> {
        if self.fingerprint != fingerprint {
            let reason = "was made with other data: give it as it was";
            return Err(Error::training(path, reason));
        }
        // A run that diverged goes on with another learning rate.
        let was = Options {
            learning_rate: options.learning_rate,
            ..self.options.clone()
        };
        if was != *options || self.latent != *latent {
            let mut found = checkpoint::differences(&was, options);
            found.extend(checkpoint::differences(&self.latent, latent));
            return Err(checkpoint::other_options(path, found));
        }
        Ok(())
    }
}

/// A trained teacher, frozen.
pub struct FrozenTeacher {
    pub net: Teacher,
    pub schedule: Schedule,
    pub sampling_steps: usize,
    pub latent: Latent,
    /// A number that changes with its weights and options; 0 for one that was not read from a file.
    pub fingerprint: u64,
}

impl FrozenTeacher {
    /// Reads a teacher's file, for use on `device` with feature maps of `dtype`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Model`] when it is no teacher.
    pub fn read(path: &Path, device: &Device, dtype: DType) -> Result<Self> {
        let mut hash = Fnv::default();
        fs::read(path).map_err(Error::io(path))?.hash(&mut hash);
        let fingerprint = hash.finish();
        let (tensors, state) = checkpoint::load::<State>(path)?;
        let config = state.options.config(state.latent.kind, state.latent.r)?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, device);
        let mut net = Teacher::new(config, vb)?;
        net.set_dtype(dtype);
        Ok(Self {
            net,
            schedule: state.options.diffusion.schedule()?,
            sampling_steps: state.options.diffusion.sampling_steps,
            latent: state.latent,
            fingerprint,
        })
    }

    /// A sample of the residual over `base` by the deterministic sampler, from `noise` of the residual's shape.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn sample(&self, base: &Tensor, scale: f64, noise: &Tensor) -> Result<Tensor> {
        let guided = Guided {
            teacher: &self.net,
            schedule: &self.schedule,
            base,
            scale,
        };
        let n = base.dim(0)?;
        let zero = base.zeros_like()?;
        let prior = self.schedule.prior(&zero, noise)?;
        let predict = |x: &Tensor, t| guided.predict(x, &vec![t; n]);
        Ok(deterministic(
            &self.schedule,
            &zero,
            &prior,
            self.sampling_steps,
            predict,
        )?)
    }
}

/// A training run in a directory: `checkpoint.safetensors` and `teacher.safetensors`, the averaged weights.
pub struct TeacherRun {
    options: Options,
    latent: Latent,
    patch: usize,
    schedule: Schedule,
    teacher: Teacher,
    trained: Trained,
    step: u64,
    /// How often the learning rate has been halved.
    slowed: i32,
    loader: Loader<Batch>,
    held_out: Vec<HeldOut>,
    fingerprint: u64,
    device: Device,
    dtype: DType,
    dir: PathBuf,
}

impl TeacherRun {
    /// Starts a run at `place`, or goes on with its checkpoint.
    ///
    /// # Errors
    /// [`Error::Training`] when there is a checkpoint and the run does not go on with it, or the other way round, or it
    /// was made with other options or data; [`Error::Setting`] when a value is out of range.
    pub fn new(
        options: Options,
        latent: Latent,
        material: &Material,
        place: &Place,
    ) -> Result<Self> {
        let path = place.dir.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, place.start)?;
        let fingerprint = material.fingerprint();
        let config = options.config(latent.kind, latent.r)?;
        options.check()?;
        let patch = options.patch_side(latent.r, config.multiple())?;
        let seed = options.seed ^ WEIGHTS;
        let (mut teacher, parameters) = init::teacher(&config, seed, &place.device)?;
        teacher.set_dtype(place.dtype);
        let mut trained = Trained::new(parameters, 0.999, options.ema, CLIP)?;
        let (mut step, mut slowed) = (0, place.slower);
        if let Some((tensors, state)) = saved {
            state.check(&path, &options, &latent, fingerprint)?;
            trained.restore(state.step, &tensors)?;
            step = state.step;
            slowed += state.slowed;
        }
        let spec = latent.pairs(patch, options.batch);
        let held_out = material.validation(&spec, &latent.stats)?;
        let (source, stats) = (material.source.clone(), latent.stats.clone());
        let make = move |seed| spec.batch(&*source, &stats, seed);
        let first = step * options.accumulate as u64;
        Ok(Self {
            schedule: options.diffusion.schedule()?,
            loader: Loader::start(make, options.seed, first, place.data_threads),
            options,
            latent,
            patch,
            teacher,
            trained,
            step,
            held_out,
            slowed,
            fingerprint,
            device: place.device.clone(),
            dtype: place.dtype,
            dir: place.dir.to_path_buf(),
        })
    }

    /// Whether `dir` has a teacher that has taken all steps of `options`, and no checkpoint: there is nothing to train.
    ///
    /// # Errors
    /// [`Error::Training`] when it was made with other options or data; those of [`checkpoint::load`].
    pub fn is_done(
        options: &Options,
        latent: &Latent,
        material: &Material,
        dir: &Path,
    ) -> Result<bool> {
        let path = dir.join("teacher.safetensors");
        if dir.join("checkpoint.safetensors").exists() || !path.exists() {
            return Ok(false);
        }
        let (_, state) = checkpoint::load::<State>(&path)?;
        state.check(&path, options, latent, material.fingerprint())?;
        Ok(state.step >= options.steps)
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.step
    }

    /// Takes one step and gives its loss: the mean square of what the prediction misses, 1 for a teacher that predicts
    /// no residual.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the loss is out of bounds; the checkpoint is then still the last good one.
    pub fn step(&mut self) -> Result<f64> {
        let o = &self.options;
        let (mut grads, mut sum) = (GradStore::default(), 0.0);
        for i in 0..o.accumulate as u64 {
            let batch = self.loader.next_batch()?;
            let seed = step_seed(o.seed ^ NOISE, self.step * o.accumulate as u64 + i);
            let loss =
                (self.loss(&self.teacher, &batch, seed, &self.device)? / o.accumulate as f64)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            grads.extend(loss.backward()?)?;
        }
        bounded(&self.dir, self.step, "loss", sum)?;
        let warm_up = (o.steps / 20).clamp(1, 1000);
        let peak = o.learning_rate * 0.5f64.powi(self.slowed);
        let rate = cosine(peak, self.step, o.steps, warm_up);
        let norm = self.trained.step(&grads, rate)?;
        bounded(&self.dir, self.step, "gradient", norm)?;
        self.step += 1;
        Ok(sum)
    }

    /// The loss of `teacher`, which is on `device`.
    fn loss(&self, teacher: &Teacher, batch: &Batch, seed: u64, device: &Device) -> Result<Tensor> {
        let [base, residual] = self.latent.tensors(batch, self.patch, device)?;
        let mut rng = StdRng::seed_from_u64(seed);
        let times = 0..base.dim(0)?;
        let t: Vec<usize> = times
            .map(|_| rng.random_range(0..self.schedule.steps()))
            .collect();
        let draw = Perturbation {
            schedule: &self.schedule,
            zy: &base.zeros_like()?,
            t: &t,
            noise: &normals(&residual, &mut rng)?,
        };
        let guided = Guided {
            teacher,
            schedule: &self.schedule,
            base: &base,
            scale: batch.scale,
        };
        Ok(denoising(&residual, &draw, |x, t| guided.predict(x, t))?)
    }

    /// On held-out photos, for each kind of degradation: the loss, and the gain in PSNR over the base in dB of the prediction
    /// from noise alone, the mean of what the picture may be.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn validate(&self) -> Result<Vec<(&'static str, f64, f64)>> {
        let cpu = Device::Cpu;
        let teacher = self.averaged(&cpu)?;
        let measure = |(name, batch): &HeldOut| {
            let loss = self
                .loss(&teacher, batch, HELD_OUT, &cpu)?
                .to_scalar::<f32>()?;
            let [base, residual] = self.latent.tensors(batch, self.patch, &cpu)?;
            let mut rng = StdRng::seed_from_u64(HELD_OUT);
            let last = self.schedule.steps() - 1;
            let t = vec![last; base.dim(0)?];
            let prior = self
                .schedule
                .prior(&base.zeros_like()?, &normals(&residual, &mut rng)?)?;
            let x = (prior * self.schedule.input_scale(last))?;
            let guided = Guided {
                teacher: &teacher,
                schedule: &self.schedule,
                base: &base,
                scale: batch.scale,
            };
            let mean = guided.predict(&x, &t)?;
            let left = (&residual - mean)?;
            Ok((
                *name,
                f64::from(loss),
                gain(&residual, &left, &self.latent.stats)?,
            ))
        };
        self.held_out.iter().map(measure).collect()
    }

    /// The teacher as it stands: the averaged weights.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn frozen(&self) -> Result<FrozenTeacher> {
        let mut net = self.averaged(&self.device)?;
        net.set_dtype(self.dtype);
        Ok(FrozenTeacher {
            net,
            schedule: self.schedule.clone(),
            sampling_steps: self.options.diffusion.sampling_steps,
            latent: self.latent.clone(),
            fingerprint: 0,
        })
    }

    fn averaged(&self, device: &Device) -> Result<Teacher> {
        let vb = VarBuilder::from_tensors(self.trained.averages(), DType::F32, device);
        let config = self.options.config(self.latent.kind, self.latent.r)?;
        Ok(Teacher::new(config, vb)?)
    }

    /// Writes the checkpoint and the teacher's file.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written; the files there before stay whole.
    pub fn save(&self) -> Result<()> {
        let state = State {
            options: self.options.clone(),
            latent: self.latent.clone(),
            step: self.step,
            slowed: self.slowed,
            fingerprint: self.fingerprint,
        };
        let path = |name| self.dir.join(name);
        // The teacher first: a checkpoint at the last step says that it is there.
        let averages = self.trained.averages().into_iter().collect();
        checkpoint::save(&path("teacher.safetensors"), averages, &state)?;
        checkpoint::save(
            &path("checkpoint.safetensors"),
            self.trained.state()?,
            &state,
        )
    }
}
