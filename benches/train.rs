//! Speed of training steps with optimisers and averages: of a student, with plain and with expanded
//! kernels, of the teacher, and of distillation with a discriminator.
//!
//! `cargo bench --bench train [-- --threads N] [--device cuda] [--json]`. On CUDA feature maps are
//! bf16. `benches/peers/train.py` runs this and PyTorch in turn. Batches are random and prepared,
//! because other threads make them during training. The result is the best of many steps.

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use tadsr::{
    nn::lite::{Condition, DiscriminatorConfig, Student, StudentConfig, Teacher, TeacherConfig},
    train::{
        adversary::{DiscriminatorTrainer, FeatureDiscriminator, FeaturePair, mean_of_heads},
        lite,
        losses::{Term, hinge_generator, stand_in},
        optim::{AdamW, Ema, Parameter},
        ranks::Alone,
    },
};

const BATCH: usize = 16;
/// Side of the grid in cells.
const GRID: usize = 48;

/// Device of the networks and type of their feature maps.
struct Place {
    device: Device,
    dtype: DType,
}

/// Parameters of a network and their optimiser.
struct Trained {
    parameters: Vec<Parameter>,
    adam: AdamW,
    ema: Ema,
    steps: u64,
}

impl Trained {
    /// Sets random weights that preserve the size of the signal.
    fn new(vars: &VarMap) -> Result<Self> {
        let all = vars.data().lock().expect("no thread has panicked");
        let parameters: Vec<Parameter> = all.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
        for (_, var) in &parameters {
            let inputs: usize = var.dims().iter().skip(1).product();
            let std = (1.0 / inputs.max(1) as f32).sqrt();
            var.set(&Tensor::randn(0f32, std, var.shape(), var.device())?)?;
        }
        Ok(Self {
            adam: AdamW::new(parameters.clone())?,
            ema: Ema::new(parameters.clone(), 0.999)?,
            parameters,
            steps: 0,
        })
    }

    fn step(&mut self, loss: &Tensor) -> Result<()> {
        assert!(loss.to_scalar::<f32>()?.is_finite());
        let grads = loss.backward()?;
        assert!(self.parameters.iter().all(|(_, v)| grads.get(v).is_some()));
        self.adam.step(&grads, 1e-4)?;
        self.steps += 1;
        self.ema.update(self.steps)
    }
}

/// Returns the best time of `step` in milliseconds, over at least `TIME` and three runs.
fn best(place: &Place, mut step: impl FnMut() -> Result<()>) -> Result<f64> {
    const TIME: Duration = Duration::from_millis(2500);
    let mut step = || {
        step()?;
        place.device.synchronize()
    };
    step()?;
    let (start, mut best, mut runs) = (Instant::now(), Duration::MAX, 0);
    while start.elapsed() < TIME || runs < 3 {
        let run = Instant::now();
        step()?;
        best = best.min(run.elapsed());
        runs += 1;
    }
    Ok(best.as_secs_f64() * 1e3)
}

fn random(place: &Place, channels: usize) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, (BATCH, GRID, GRID, channels), &place.device)
}

fn charbonnier(z: &Tensor, truth: &Tensor) -> Result<Tensor> {
    ((z - truth)?.sqr()? + 4e-4)?.sqrt()?.mean_all()
}

/// Times supervision with a Charbonnier loss.
fn student(place: &Place, config: StudentConfig, expand: Option<usize>) -> Result<f64> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &place.device);
    let mut student = match expand {
        None => Student::new(config, vb)?,
        Some(width) => Student::expanded(config, width, vb)?,
    };
    student.set_dtype(place.dtype);
    let mut trained = Trained::new(&vars)?;
    let channels = config.latent.channels(config.r);
    let (base, truth) = (random(place, channels)?, random(place, channels)?);
    best(place, || {
        trained.step(&charbonnier(
            &student.forward(&base, &Condition::at(3.7))?,
            &truth,
        )?)
    })
}

/// Times denoising with a squared loss.
fn teacher(place: &Place, config: TeacherConfig) -> Result<f64> {
    let channels = config.latent;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &place.device);
    let mut teacher = Teacher::new(config, vb)?;
    teacher.set_dtype(place.dtype);
    let mut trained = Trained::new(&vars)?;
    let (base, noisy, truth) = (
        random(place, channels)?,
        random(place, channels)?,
        random(place, channels)?,
    );
    let times: Vec<usize> = (0..BATCH).map(|i| i % 8).collect();
    best(place, || {
        let difference = (teacher.forward(&noisy, &base, &times, 3.7)? - &truth)?;
        trained.step(&difference.sqr()?.mean_all()?)
    })
}

/// Times distillation: an update of the discriminator on features of the frozen teacher for noisy
/// residuals, then of the student with a Charbonnier and an adversarial loss, whose gradients at
/// its result are balanced.
fn distillation(place: &Place, config: StudentConfig) -> Result<f64> {
    const SCALE: f64 = 3.7;
    let channels = config.latent.channels(config.r);
    let teacher = TeacherConfig {
        widths: vec![32, 48, 64],
        blocks: 1,
        ..TeacherConfig::micro(channels, config.r)
    };
    let (teacher, variables) = lite::init::teacher(&teacher, 1, &place.device)?;
    let frozen = variables
        .into_iter()
        .map(|(name, var)| (name, var.as_detached_tensor()));
    let frozen = VarBuilder::from_tensors(frozen.collect(), DType::F32, &place.device);
    let mut teacher = Teacher::new(teacher.config().clone(), frozen)?;
    teacher.set_dtype(place.dtype);
    let judge = DiscriminatorConfig {
        channels: teacher.feature_channels(),
        width: 64,
        time_channels: 32,
    };
    let mut adversary =
        DiscriminatorTrainer::new(lite::init::discriminator(&judge, 1, &place.device)?)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &place.device);
    let mut student = Student::expanded(config, 64, vb)?;
    student.set_dtype(place.dtype);
    let mut trained = Trained::new(&vars)?;
    let (base, truth, noise) = (
        random(place, channels)?,
        random(place, channels)?,
        random(place, channels)?,
    );
    let t: Vec<usize> = (0..BATCH).map(|i| i % 2).collect();
    let features = |z: &Tensor| {
        let noisy = ((z * 0.9)? + (&noise * 0.2)?)?;
        teacher.features(&noisy, &base, &t, SCALE)
    };
    best(place, || {
        let loss = adversary.loss(&Alone, 1, |_| {
            Ok(FeaturePair {
                real: features(&truth)?,
                fake: features(&student.forward(&base, &Condition::at(SCALE))?.detach())?,
                t: t.clone(),
            })
        });
        let (loss, grads) = loss.map_err(candle_core::Error::wrap)?;
        assert!(loss.is_finite());
        adversary.update(&grads, 5e-4)?;

        let judge = adversary.discriminator()?;
        let result = student.forward(&base, &Condition::at(SCALE))?;
        let real = Term::at(&result, |z| charbonnier(z, &truth))?;
        let adversarial = Term::at(&result, |z| {
            let heads = judge.heads(&features(z)?, &t)?;
            mean_of_heads(heads.iter().map(hinge_generator))
        })?;
        let norm = |g: &Tensor| g.sqr()?.sum_all()?.to_scalar::<f32>();
        let ratio = (norm(&real.gradient)? / norm(&adversarial.gradient)?).sqrt();
        let gradient = (real.gradient + (adversarial.gradient * (0.6 * f64::from(ratio)))?)?;
        trained.step(&stand_in(&result, &gradient)?)
    })
}

fn main() -> Result<()> {
    tadsr::train::keep_memory();
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().skip_while(|a| *a != name).nth(1);
    let threads = value("--threads").and_then(|n| n.parse().ok()).unwrap_or(1);
    // SAFETY: no other thread runs yet.
    unsafe { tadsr::ops::use_threads(threads) }.expect("the first pool of the process");
    let device = value("--device").map_or("cpu", String::as_str);
    let device = tadsr::Device::from_str(device).and_then(tadsr::train::device);
    let device = device.map_err(candle_core::Error::wrap)?;
    let dtype = match device.is_cpu() {
        true => DType::F32,
        false => DType::BF16,
    };
    let place = &Place { device, dtype };
    let rows = [
        ("tiny, r = 4", student(place, StudentConfig::tiny(4), None)?),
        (
            "tiny, r = 4, expanded to 64",
            student(place, StudentConfig::tiny(4), Some(64))?,
        ),
        ("small", student(place, StudentConfig::chroma(), None)?),
        (
            "micro teacher, r = 4",
            teacher(place, TeacherConfig::micro(16, 4))?,
        ),
        (
            "distillation of tiny, r = 4",
            distillation(place, StudentConfig::tiny(4))?,
        ),
    ];
    if args.iter().any(|a| a == "--json") {
        let rows = rows.map(|(name, ms)| serde_json::json!({"name": name, "ms": ms}));
        println!("{}", serde_json::json!({"threads": threads, "rows": rows}));
    } else {
        println!("{threads} thread(s), {BATCH} x {GRID}x{GRID}");
        rows.iter()
            .for_each(|(name, ms)| println!("{name:32} {ms:9.2} ms"));
    }
    Ok(())
}
