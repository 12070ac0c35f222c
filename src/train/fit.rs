//! Supervised training of a lite student: the Charbonnier loss between predicted and true residual.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use rand::{SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    checkpoint,
    data::PhotoSet,
    degrade::{Degradation, normal},
    loader::{Loader, step_seed},
    optim::{AdamW, Ema, Parameter, cosine},
    pairs::{Batch, DamagedPhotos, PairSource, PairSpec},
};
use crate::{
    Error, Result,
    model::{Layer, LiteModel, Metadata},
    nn::lite::{LatentStats, Student, StudentConfig},
};

/// Everything that determines a run's result, beside the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    pub name: String,
    pub student: StudentConfig,
    /// Scales that the model serves; training draws from `train_scales`.
    pub scales: [f64; 2],
    /// Scales in training; the upper end is also the model's own.
    pub train_scales: [f64; 2],
    pub degradation: Degradation,
    pub steps: u64,
    pub batch: usize,
    /// Side of a high-resolution patch in pixels.
    pub patch: usize,
    pub learning_rate: f64,
    pub ema: f64,
    /// Channels that each kernel is a product over while it is trained; 0 trains the kernels themselves.
    pub expand: usize,
    pub seed: u64,
}

/// Scale of the Charbonnier loss `sqrt(d^2 + eps^2)`, in units of the residual's standard deviation.
const CHARBONNIER_EPS: f64 = 0.02;

/// Batches that the latent's statistics are measured on.
const STATISTICS_BATCHES: u64 = 64;

#[derive(Serialize, Deserialize)]
struct State {
    options: Options,
    step: u64,
    stats: [Vec<f32>; 3],
    /// [`PairSource::fingerprint`] of the data, and that of the photos held out.
    photos: [u64; 2],
}

/// A training run in a directory: `checkpoint.safetensors` and `model.safetensors`.
pub struct Fit {
    options: Options,
    stats: LatentStats,
    student: Student,
    parameters: Vec<Parameter>,
    adam: AdamW,
    ema: Ema,
    step: u64,
    loader: Loader<Batch>,
    validation: Vec<(&'static str, Batch)>,
    fingerprint: [u64; 2],
    dir: PathBuf,
}

impl Fit {
    /// Starts a run in `dir`, or goes on with the checkpoint there if `resume`. The pairs of `source` are trained on,
    /// the photos `held_out` only measured on.
    ///
    /// # Errors
    /// [`Error::Model`] when `dir` has a checkpoint and `resume` is not set, or the other way round, or its options are
    /// other ones.
    pub fn new(
        options: Options,
        source: Arc<dyn PairSource>,
        held_out: Arc<PhotoSet>,
        dir: &Path,
        resume: bool,
        data_threads: usize,
    ) -> Result<Self> {
        options
            .student
            .check()
            .map_err(|e| Error::training(dir, e))?;
        let path = dir.join("checkpoint.safetensors");
        let saved = checkpoint::load_if::<State>(&path, resume)?;
        let spec = PairSpec {
            latent: options.student.latent,
            r: options.student.r,
            patch: options.patch,
            batch: options.batch,
            scales: options.train_scales,
            native: 0.6,
        };
        let fingerprint = [source.fingerprint(), held_out.fingerprint()];
        let (student, parameters) = new_student(&options)?;
        let mut adam = AdamW::new(parameters.clone())?;
        let mut ema = Ema::new(parameters.clone(), options.ema)?;
        let (stats, step) = match saved {
            None => (spec.measure(&*source, options.seed, STATISTICS_BATCHES)?, 0),
            Some((tensors, state)) => {
                if state.photos != fingerprint {
                    let reason = "was made with other data: give --data as it was";
                    return Err(Error::training(path, reason));
                }
                // A run that diverged goes on with another learning rate.
                let was = Options {
                    learning_rate: options.learning_rate,
                    ..state.options.clone()
                };
                if was != options {
                    let was = serde_json::to_string(&state.options).unwrap_or_default();
                    return Err(Error::training(
                        path,
                        format!("was made with other options: {was}"),
                    ));
                }
                let get = |name: &str| {
                    let found = tensors.get(name).cloned();
                    found.ok_or_else(|| candle_core::Error::Msg(format!("no tensor '{name}'")))
                };
                for (name, var) in &parameters {
                    var.set(&get(&format!("weights.{name}"))?)?;
                }
                adam.restore(state.step, get)?;
                ema.restore(|name| get(&format!("ema.{name}")))?;
                let [input_mean, input_std, residual_std] = state.stats;
                let stats = LatentStats {
                    input_mean,
                    input_std,
                    residual_std,
                };
                (stats, state.step)
            }
        };
        let validation = validation(&spec, &held_out, &stats)?;
        let of_data = stats.clone();
        let make = move |seed| spec.batch(&*source, &of_data, seed);
        let loader = Loader::start(make, options.seed, step, data_threads);
        Ok(Self {
            options,
            stats,
            student,
            parameters,
            adam,
            ema,
            step,
            loader,
            validation,
            fingerprint,
            dir: dir.to_path_buf(),
        })
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.step
    }

    /// Takes one step and gives its loss.
    ///
    /// # Errors
    /// When the loss is not finite; the checkpoint is then still the last good one.
    pub fn step(&mut self) -> Result<f32> {
        let batch = self.loader.next_batch()?;
        let o = &self.options;
        let (z, truth) = tensors(o, &batch)?;
        let difference = (self.student.forward(&z, batch.scale)? - truth)?;
        let loss = (difference.sqr()? + CHARBONNIER_EPS * CHARBONNIER_EPS)?
            .sqrt()?
            .mean_all()?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            return Err(Error::training(
                &self.dir,
                format!(
                    "the loss is {value} at step {}: go on with --resume and a lower --lr",
                    self.step
                ),
            ));
        }
        let warm_up = (o.steps / 50).clamp(1, 500);
        let lr = cosine(o.learning_rate, self.step, o.steps, warm_up);
        self.adam.step(&loss.backward()?, lr)?;
        self.step += 1;
        self.ema.update(self.step)?;
        Ok(value)
    }

    /// Gain in PSNR over the bicubic base in dB, on held-out patches, for each kind of damage.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn validate(&self) -> Result<Vec<(&'static str, f64)>> {
        let model = self.model()?;
        let student = model.student()?;
        let gain = |(name, batch): &(&'static str, Batch)| {
            let (z, truth) = tensors(&self.options, batch)?;
            let left = (student.forward(&z, batch.scale)? - &truth)?;
            let energy = |t: &Tensor| -> Result<f64> {
                // Channels have their own units: back to luma and chroma before they are added.
                let std = Tensor::new(self.stats.residual_std.as_slice(), t.device())?;
                Ok(f64::from(
                    t.broadcast_mul(&std)?
                        .sqr()?
                        .mean_all()?
                        .to_scalar::<f32>()?,
                ))
            };
            Ok((*name, 10.0 * (energy(&truth)? / energy(&left)?).log10()))
        };
        self.validation.iter().map(gain).collect()
    }

    /// The model as it stands: the averaged weights.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn model(&self) -> Result<LiteModel> {
        let o = &self.options;
        let averages = self.ema.state().into_iter().collect();
        let vb = VarBuilder::from_tensors(averages, DType::F32, &Device::Cpu);
        let student = match o.expand {
            0 => Student::new(o.student, vb)?,
            width => Student::expanded(o.student, width, vb)?,
        };
        let tensors = student.folded()?;
        let values = |name: String| -> Result<Vec<f32>> {
            let t = tensors
                .get(&name)
                .ok_or_else(|| Error::training(&self.dir, name))?;
            Ok(t.flatten_all()?.to_vec1()?)
        };
        let mut metadata = Metadata::lite(&o.name, o.student, o.scales);
        metadata.training = serde_json::json!({
            "tool": format!("tadsr-train {}", env!("CARGO_PKG_VERSION")),
            "method": "supervised, Charbonnier on the whitened residual",
            "options": o,
            "steps_done": self.step,
        });
        let layer = |spec: crate::nn::lite::LayerSpec| {
            Ok(Layer {
                weight: values(format!("{}.weight", spec.name))?,
                bias: values(format!("{}.bias", spec.name))?,
                scale: values(format!("{}.scale", spec.name))?,
                spec,
            })
        };
        Ok(LiteModel {
            metadata,
            stats: self.stats.clone(),
            layers: o
                .student
                .layers()
                .into_iter()
                .map(layer)
                .collect::<Result<_>>()?,
        })
    }

    /// Writes checkpoint and model into the run's directory.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written; the files there before stay whole.
    pub fn save(&self) -> Result<()> {
        let prefixed = |prefix: &str, all: Vec<(String, Tensor)>| {
            let name = |(n, t)| (format!("{prefix}.{n}"), t);
            all.into_iter().map(name).collect::<Vec<_>>()
        };
        let weights = self.parameters.iter();
        let weights = weights
            .map(|(n, v)| (n.clone(), v.as_tensor().clone()))
            .collect();
        let mut tensors = prefixed("weights", weights);
        tensors.extend(prefixed("ema", self.ema.state()));
        tensors.extend(self.adam.state());
        let s = &self.stats;
        let state = State {
            options: self.options.clone(),
            step: self.step,
            photos: self.fingerprint,
            stats: [
                s.input_mean.clone(),
                s.input_std.clone(),
                s.residual_std.clone(),
            ],
        };
        // The model first: weights that are not finite must not replace a good checkpoint.
        let bytes = self.model()?.to_bytes(true)?;
        checkpoint::save(&self.dir.join("checkpoint.safetensors"), tensors, &state)?;
        checkpoint::write_atomically(&self.dir.join("model.safetensors"), &bytes)
    }
}

/// Batches of held-out patches at the model's own scale: clean, and JPEG of quality 60.
pub(super) fn validation(
    spec: &PairSpec,
    held_out: &Arc<PhotoSet>,
    stats: &LatentStats,
) -> Result<Vec<(&'static str, Batch)>> {
    let kinds = [
        ("clean", Degradation::fixed()),
        ("jpeg60", Degradation::jpeg(60)),
    ];
    let batch = |(name, degradation)| {
        let spec = PairSpec {
            batch: 64,
            native: 1.0,
            ..spec.clone()
        };
        let source = DamagedPhotos {
            photos: held_out.clone(),
            degradation,
        };
        Ok((name, spec.batch(&source, stats, step_seed(0, 0))?))
    };
    kinds.into_iter().map(batch).collect()
}

fn tensors(options: &Options, batch: &Batch) -> Result<(Tensor, Tensor)> {
    let student = &options.student;
    let side = options.patch / student.r;
    let channels = student.latent.channels(student.r);
    let shape = (
        batch.base.len() / (side * side * channels),
        side,
        side,
        channels,
    );
    Ok((
        Tensor::from_slice(&batch.base, shape, &Device::Cpu)?,
        Tensor::from_slice(&batch.residual, shape, &Device::Cpu)?,
    ))
}

/// A student with weights drawn from the seed: He's normal distribution, the last layer a tenth of it, biases zero.
fn new_student(options: &Options) -> Result<(Student, Vec<Parameter>)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let student = match options.expand {
        0 => Student::new(options.student, vb)?,
        width => Student::expanded(options.student, width, vb)?,
    };
    let all = vars.data().lock();
    let all = all.map_err(|_| Error::Frame("the variables are poisoned".into()))?;
    let mut parameters: Vec<Parameter> = all.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    // The map has no order of its own, and candle's CPU random numbers no seed.
    parameters.sort_by(|a, b| a.0.cmp(&b.0));
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
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?;
    }
    drop(all);
    Ok((student, parameters))
}
