//! Training of a teacher: residual-shifting diffusion (ResShift, arXiv 2307.12348) on the whitened
//! residual.

use std::{
    fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    slice::from_mut,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor, backprop::GradStore};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    Diffusion, Guided, HeldOut, Latent, TrainingData, bounded, gain, init,
    origin::{Conversion, Origin},
};
use crate::{
    Error, Result,
    diffusion::{Schedule, deterministic},
    nn::lite::{Condition, LatentKind, LatentStats, Teacher, TeacherConfig},
    train::{
        checkpoint,
        data::{loader::Loader, pairs::Batch},
        init::Tensors,
        losses::{Perturbation, Teacher as _, denoising, normals},
        observer::Measurement,
        optim::{CLIP, Parameter, Trained, cosine},
        random::{Fnv, step_seed},
        ranks::Ranks,
        trainer::{RunContext, Training, check_common},
    },
};

/// All that determines the result of a run, besides data and latent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Channels of each level, multiples of 16. Each level but the last halves the grid.
    pub widths: Vec<usize>,
    /// ResBlocks of each level, in each direction.
    pub blocks: usize,
    /// Model file or bundled model whose result is the origin of the diffusion; `None` for the
    /// bicubic base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    pub diffusion: Diffusion,
    pub steps: u64,
    /// Pairs in a batch.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels; 0 for 48 grid cells.
    pub patch: usize,
    /// Peak learning rate, after a warm-up and before a cosine decay.
    pub learning_rate: f64,
    /// Peak learning rate of the 3x3 kernels between head and tail, which Muon optimises; 0 for
    /// AdamW, as for all other weights.
    pub muon_rate: f64,
    /// Decay of the averaged weights.
    pub ema: f64,
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            widths: vec![16, 32, 48],
            blocks: 2,
            origin: None,
            diffusion: Diffusion::default(),
            steps: 30_000,
            batch: 8,
            accumulate: 1,
            patch: 0,
            learning_rate: 1e-3,
            muon_rate: 0.0,
            ema: 0.999,
            seed: 1,
        }
    }
}

impl Options {
    /// Returns the shape of the network for a latent of `kind` and `r`.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range.
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

    /// Returns the side of a high-resolution patch for a latent of `r` and a network that needs
    /// sides of `multiple` cells.
    ///
    /// # Errors
    /// [`Error::Setting`] when it is out of range.
    pub fn patch_side(&self, r: usize, multiple: usize) -> Result<usize> {
        let patch = match self.patch {
            0 => 48 * r,
            patch => patch,
        };
        let multiple = r * multiple;
        if (1..=1024).contains(&patch) && patch.is_multiple_of(multiple) {
            Ok(patch)
        } else {
            Err(Error::Setting(format!(
                "teacher: patch = {patch}: a multiple of {multiple} up to 1024"
            )))
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range for any latent.
    pub fn check(&self) -> Result<()> {
        let checked = check_common(
            self.steps,
            self.batch,
            self.accumulate,
            self.learning_rate,
            self.ema,
        );
        checked.map_err(|e| Error::Setting(format!("teacher: {e}")))?;
        if !(0.0..1.0).contains(&self.muon_rate) {
            return Err(Error::Setting(format!(
                "teacher: muon_rate = {}: at least 0, below 1",
                self.muon_rate
            )));
        }
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
    /// Halvings of the learning rate after divergence.
    #[serde(rename = "slowed")]
    halvings: i32,
    /// Hash of the data.
    fingerprint: u64,
}

impl State {
    /// Checks that a run with `options`, `latent` and `fingerprint` made the file at `path`, which
    /// has these `tensors`.
    fn check(
        &self,
        path: &Path,
        tensors: &Tensors,
        options: &Options,
        latent: &Latent,
        fingerprint: u64,
    ) -> Result<()> {
        if self.fingerprint != fingerprint {
            let reason = "was made with other data: give it as it was";
            return Err(Error::training(path, reason));
        }
        if let Some(name) = &options.origin
            && Origin::differs(name, tensors, latent)?
        {
            return Err(checkpoint::other_options(
                path,
                vec![format!("origin '{name}' has changed")],
            ));
        }
        // A run that has diverged continues with other learning rates. The file contains the
        // origin, whose path may have changed.
        let origin = self.options.origin.as_ref();
        let was = Options {
            learning_rate: options.learning_rate,
            muon_rate: if self.options.muon_rate > 0.0 && options.muon_rate > 0.0 {
                options.muon_rate
            } else {
                self.options.muon_rate
            },
            origin: origin.map(|was| options.origin.as_ref().unwrap_or(was).clone()),
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
    /// Hash of its file; 0 without a file.
    pub fingerprint: u64,
    origin: Option<Arc<Origin>>,
    /// From the latent of a student to that of the teacher.
    conversion: Conversion,
}

/// A batch in the latent of a teacher.
pub struct View {
    /// Latent of the base, or of the origin.
    pub base: Tensor,
    /// Residual of the origin over the base.
    origin: Option<Tensor>,
}

impl FrozenTeacher {
    /// Reads the file of a teacher, for use on `device` with feature maps of `dtype`.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Model`] when it is not the file of a teacher.
    pub fn read(path: &Path, device: &Device, dtype: DType) -> Result<Self> {
        let mut hash = Fnv::default();
        fs::read(path).map_err(Error::io(path))?.hash(&mut hash);
        let fingerprint = hash.finish();
        let (tensors, state) = checkpoint::load::<State>(path)?;
        let config = state.options.config(state.latent.kind, state.latent.r)?;
        let origin = Origin::restored(&tensors, path, &state.latent, device, dtype)?.map(Arc::new);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, device);
        let mut net = Teacher::new(config, vb)?;
        net.set_dtype(dtype);
        Ok(Self {
            net,
            schedule: state.options.diffusion.schedule()?,
            sampling_steps: state.options.diffusion.sampling_steps,
            fingerprint,
            origin,
            conversion: Conversion::new(&state.latent.stats, &state.latent.stats, device)?,
            latent: state.latent,
        })
    }

    /// Makes the teacher serve students whose latent has these statistics.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn serve(&mut self, stats: &LatentStats, device: &Device) -> Result<()> {
        self.conversion = Conversion::new(stats, &self.latent.stats, device)?;
        Ok(())
    }

    /// Converts the latent of the base of a student's batch.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn view(&self, base: &Tensor, at: &Condition) -> Result<View> {
        let base = self.conversion.base(base)?;
        Ok(match &self.origin {
            Some(origin) => {
                let [residual, base] = origin.predict(&base, at)?;
                View {
                    base,
                    origin: Some(residual),
                }
            }
            None => View { base, origin: None },
        })
    }

    /// Converts a student's residual to one over the base of `view`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn residual(&self, view: &View, residual: &Tensor) -> candle_core::Result<Tensor> {
        let residual = self.conversion.residual(residual)?;
        match &view.origin {
            Some(origin) => residual - origin,
            None => Ok(residual),
        }
    }

    /// Converts in the opposite direction of [`Self::residual`].
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn residual_back(&self, view: &View, residual: &Tensor) -> candle_core::Result<Tensor> {
        match &view.origin {
            Some(origin) => self.conversion.residual_back(&(residual + origin)?),
            None => self.conversion.residual_back(residual),
        }
    }

    /// Samples the residual over the base of `view` with the deterministic sampler, from `noise` of
    /// the shape of the residual.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn sample(&self, view: &View, scale: f64, noise: &Tensor) -> Result<Tensor> {
        let guided = Guided {
            teacher: &self.net,
            schedule: &self.schedule,
            base: &view.base,
            scale,
        };
        let n = noise.dim(0)?;
        let zero = noise.zeros_like()?;
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

/// Training of a teacher in a folder: `checkpoint.safetensors` and `teacher.safetensors`, the
/// averaged weights.
pub struct TeacherRun {
    options: Options,
    latent: Latent,
    patch: usize,
    schedule: Schedule,
    teacher: Teacher,
    origin: Option<Arc<Origin>>,
    trained: Trained,
    step: u64,
    /// Halvings of the learning rate after divergence.
    halvings: i32,
    loader: Loader<Batch>,
    held_out: Vec<HeldOut>,
    fingerprint: u64,
    device: Device,
    dtype: DType,
    ranks: Arc<dyn Ranks>,
    dir: PathBuf,
}

impl TeacherRun {
    /// Starts a run, or continues with its checkpoint.
    ///
    /// # Errors
    /// [`Error::Training`] when a new run has a checkpoint, a continued run has none, or it was
    /// made with other options or data; [`Error::Setting`] when a value is out of range.
    pub fn new(
        options: Options,
        latent: Latent,
        data: &TrainingData,
        context: &RunContext,
    ) -> Result<Self> {
        let path = context.folder.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, context.start)?;
        let fingerprint = data.fingerprint();
        let config = options.config(latent.kind, latent.r)?;
        options.check()?;
        let patch = options.patch_side(latent.r, config.multiple())?;
        let seed = options.seed ^ WEIGHTS;
        let (mut teacher, parameters) = init::teacher(&config, seed, &context.device)?;
        teacher.set_dtype(context.dtype);
        let mut trained = Trained::new(parameters, 0.999, options.ema, CLIP)?;
        if options.muon_rate > 0.0 {
            trained = trained.with_muon(is_inner_kernel)?;
        }
        let (mut step, mut halvings) = (0, context.halvings);
        let (device, dtype) = (&context.device, context.dtype);
        let origin = match (saved, &options.origin) {
            (Some((tensors, state)), _) => {
                state.check(&path, &tensors, &options, &latent, fingerprint)?;
                trained.restore(state.step, &tensors)?;
                step = state.step;
                halvings += state.halvings;
                Origin::restored(&tensors, &path, &latent, device, dtype)?
            }
            (None, Some(name)) => Some(Origin::load(name, &latent, device, dtype)?),
            (None, None) => None,
        };
        let mut spec = latent.pairs(patch, options.batch);
        spec.alike = origin.as_ref().is_some_and(Origin::knows_degradation);
        let held_out = data.validation(&spec, &latent.stats)?;
        let (source, stats) = (data.source.clone(), latent.stats.clone());
        let make = move |seed| spec.batch(&*source, &stats, seed);
        let indices = context.ranks.indices(step, options.accumulate);
        Ok(Self {
            schedule: options.diffusion.schedule()?,
            loader: Loader::start(make, options.seed, indices, context.data_threads),
            options,
            latent,
            patch,
            teacher,
            origin: origin.map(Arc::new),
            trained,
            step,
            held_out,
            halvings,
            fingerprint,
            device: context.device.clone(),
            dtype: context.dtype,
            ranks: context.ranks.clone(),
            dir: context.folder.to_path_buf(),
        })
    }

    /// Returns `true` if `dir` has a teacher that has taken all steps of `options`, and no
    /// checkpoint.
    ///
    /// # Errors
    /// [`Error::Training`] when it was made with other options or data; those of
    /// [`checkpoint::load`].
    pub fn is_done(
        options: &Options,
        latent: &Latent,
        data: &TrainingData,
        dir: &Path,
    ) -> Result<bool> {
        let path = dir.join("teacher.safetensors");
        if dir.join("checkpoint.safetensors").exists() || !path.exists() {
            return Ok(false);
        }
        let (tensors, state) = checkpoint::load::<State>(&path)?;
        state.check(&path, &tensors, options, latent, data.fingerprint())?;
        Ok(state.step >= options.steps)
    }

    /// Returns the latent of the base, or of the origin, and the residual over it.
    fn tensors(&self, batch: &Batch, device: &Device) -> Result<[Tensor; 2]> {
        let Some(origin) = &self.origin else {
            return self.latent.tensors(batch, self.patch, device);
        };
        let [base, residual] = self.latent.tensors(batch, self.patch, &self.device)?;
        let [predicted, base] = origin.predict(&base, &batch.condition())?;
        let residual = (residual - predicted)?;
        Ok([base.to_device(device)?, residual.to_device(device)?])
    }

    /// Returns the loss of `teacher`, which is on `device`.
    fn loss(&self, teacher: &Teacher, batch: &Batch, seed: u64, device: &Device) -> Result<Tensor> {
        let [base, residual] = self.tensors(batch, device)?;
        let mut rng = StdRng::seed_from_u64(seed);
        let times = 0..base.dim(0)?;
        let t: Vec<usize> = times
            .map(|_| rng.random_range(0..self.schedule.steps()))
            .collect();
        let perturbation = Perturbation {
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
        Ok(denoising(&residual, &perturbation, |x, t| {
            guided.predict(x, t)
        })?)
    }

    /// Returns the current teacher, with averaged weights.
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
            fingerprint: 0,
            origin: self.origin.clone(),
            conversion: Conversion::new(&self.latent.stats, &self.latent.stats, &self.device)?,
            latent: self.latent.clone(),
        })
    }

    fn averaged(&self, device: &Device) -> Result<Teacher> {
        let vb = VarBuilder::from_tensors(self.trained.averages(), DType::F32, device);
        let config = self.options.config(self.latent.kind, self.latent.r)?;
        Ok(Teacher::new(config, vb)?)
    }

    /// Measures on held-out images, for each degradation.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn measure(&self) -> Result<Vec<Validation>> {
        let cpu = Device::Cpu;
        let teacher = self.averaged(&cpu)?;
        let measure = |(_, batch): &HeldOut| {
            let loss = self
                .loss(&teacher, batch, HELD_OUT, &cpu)?
                .to_scalar::<f32>()?;
            let [_, whole] = self.latent.tensors(batch, self.patch, &cpu)?;
            let [base, residual] = self.tensors(batch, &cpu)?;
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
            let gain = |left: &Tensor| gain(&whole, left, &self.latent.stats);
            Ok([
                f64::from(loss),
                gain(&(&residual - mean)?)?,
                gain(&residual)?,
            ])
        };
        let measured = self.ranks.shared_work(&self.held_out, measure)?;
        let validation = |((name, _), [loss, gain, origin]): (&HeldOut, [f64; 3])| Validation {
            name,
            loss,
            gain,
            origin: self.origin.is_some().then_some(origin),
        };
        Ok(self.held_out.iter().zip(measured).map(validation).collect())
    }
}

/// Measurement of a held-out batch.
#[derive(Clone, Debug)]
pub struct Validation {
    /// Name of the degradation.
    pub name: &'static str,
    pub loss: f64,
    /// Gain in PSNR over the bicubic base, in dB, of the prediction from noise only, which is the
    /// mean of all possible images.
    pub gain: f64,
    /// The same of the origin, if it is not the base.
    pub origin: Option<f64>,
}

/// Returns `true` for the 3x3 kernels between head and tail.
fn is_inner_kernel((name, var): &Parameter) -> bool {
    let outer = name.starts_with("head") || name.starts_with("tail");
    !outer && matches!(var.dims(), [_, _, 3, 3])
}

impl Training for TeacherRun {
    fn done(&self) -> u64 {
        self.step
    }

    /// Returns the loss of the step: the mean square error of the prediction, 1 for a teacher that
    /// predicts no residual.
    ///
    /// # Errors
    /// [`Error::Diverged`] when the loss is out of bounds. The checkpoint is still good.
    fn step(&mut self) -> Result<Vec<(&'static str, f64)>> {
        let o = &self.options;
        let (mut grads, mut sum) = (GradStore::default(), 0.0);
        let indices = self.ranks.indices(self.step, o.accumulate);
        for index in indices.take(self.ranks.share(o.accumulate)) {
            let batch = self.loader.next_batch()?;
            let seed = step_seed(o.seed ^ NOISE, index);
            let loss =
                (self.loss(&self.teacher, &batch, seed, &self.device)? / o.accumulate as f64)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            grads.extend(loss.backward()?)?;
        }
        let parameters = self.trained.parameters();
        self.ranks
            .sum_gradients(&mut grads, parameters, from_mut(&mut sum))?;
        bounded(&self.dir, self.step, "loss", sum)?;
        let warm_up = (o.steps / 20).clamp(1, 1000);
        let factor = cosine(0.5f64.powi(self.halvings), self.step, o.steps, warm_up);
        let (rate, muon) = (o.learning_rate * factor, o.muon_rate * factor);
        let norm = self.trained.step_with(&grads, rate, muon)?;
        bounded(&self.dir, self.step, "gradient", norm)?;
        self.step += 1;
        Ok(vec![("loss", sum)])
    }

    /// Writes the checkpoint and the file of the teacher.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written. Existing files stay as they are.
    fn save(&self) -> Result<()> {
        let state = State {
            options: self.options.clone(),
            latent: self.latent.clone(),
            step: self.step,
            halvings: self.halvings,
            fingerprint: self.fingerprint,
        };
        let path = |name| self.dir.join(name);
        // The teacher comes first: a checkpoint at the last step implies that it exists.
        let mut averages: Vec<_> = self.trained.averages().into_iter().collect();
        let mut trained = self.trained.state()?;
        if let Some(origin) = &self.origin {
            averages.push(origin.state()?);
            trained.push(origin.state()?);
        }
        checkpoint::save(&path("teacher.safetensors"), averages, &state)?;
        checkpoint::save(&path("checkpoint.safetensors"), trained, &state)
    }

    fn validate(&self) -> Result<Measurement> {
        let (mut text, mut values) = (Vec::new(), Vec::new());
        for v in self.measure()? {
            let (name, loss, gain) = (v.name, v.loss, v.gain);
            let origin = v
                .origin
                .map_or(String::new(), |o| format!(", origin {o:+.3} dB"));
            text.push(format!("{name} {loss:.4} ({gain:+.3} dB{origin})"));
            values.push((format!("held out {name}/loss"), loss));
            values.push((format!("held out {name}/gain"), gain));
        }
        let text = format!("held out {}", text.join(", "));
        Ok(Measurement { text, values })
    }
}
