//! `tadsr-train distill`: a ResShift network, distilled into one step.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Parser, ValueEnum};
use indicatif::{HumanBytes, HumanDuration};
use tadsr::{
    model::ResShiftModel,
    nn::resshift::{ResShiftConfig, UnetConfig},
    train::{
        checkpoint::Start,
        degradation::DegradationRecipe,
        losses::ScoreWeight,
        resshift::{Begin, Distill, Options, Place, Weights, narrowed},
    },
};
use toml::{Table, Value};

use crate::{
    dry_run,
    recipe::Told,
    run::{self, HeldOut, Plan, Training},
    stop::Stop,
};

/// Distil a many-step model into a student that takes one step.
///
/// The teacher is a model of the ResShift family. Every step lets it sample its deterministic
/// result in all its steps, so a step is expensive: --dry-run measures one and says what the whole
/// run takes. Ctrl-C saves a checkpoint; --resume goes on from it exactly. The student is written
/// beside it at every save; losses.csv has the losses of each step.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/one-step --dry-run
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/one-step
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/narrow --student-channels 64
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/one-step --resume")]
pub struct Args {
    /// Model file of the teacher
    #[arg(long, value_name = "MODEL")]
    teacher: PathBuf,
    /// Folders (or files) with JPEG and PNG photos
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Folder of the run: checkpoint, model and losses
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with the checkpoint in the run's folder
    #[arg(long)]
    resume: bool,
    /// Take one step without writing anything, and say how long the run takes and how much memory it needs
    #[arg(long)]
    dry_run: bool,
    /// Model file that the student begins with, of any shape [default: the teacher]
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["student_channels", "student_config", "from_scratch"])]
    student: Option<PathBuf>,
    /// A narrower student: channels at its first level, a multiple of 32 [default: the teacher's]
    #[arg(long, value_name = "N", conflicts_with = "student_config")]
    student_channels: Option<usize>,
    /// A student of another shape: a JSON file with the network's configuration, as `unet` in a model file
    #[arg(long, value_name = "JSON")]
    student_config: Option<PathBuf>,
    /// Let the student begin with random weights, and not with those of the model that fit
    #[arg(long)]
    from_scratch: bool,
    /// What happens to the low-resolution pictures
    #[arg(long, value_enum, default_value = "real-world")]
    preset: Preset,
    /// Training steps
    #[arg(long, default_value_t = 30_000)]
    steps: u64,
    /// Pictures that go through the networks at once
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Batches whose gradients are averaged in a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Side of a high-resolution patch in pixels [default: what the teacher was built for]
    #[arg(long)]
    patch: Option<usize>,
    /// Learning rate, of student and discriminator
    #[arg(long, default_value_t = 5e-5)]
    lr: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 5000)]
    warm_up: u64,
    /// Decay of the averaged weights
    #[arg(long, default_value_t = 0.999)]
    ema: f64,
    /// Weight of the distance to the teacher's result
    #[arg(long, default_value_t = 1.0, value_name = "W")]
    regression: f64,
    /// Weight of high-frequency score distillation; 0 leaves it out
    #[arg(long, default_value_t = 1.0, value_name = "W")]
    score: f64,
    /// Weight of the adversarial loss; 0 leaves it out
    #[arg(long, default_value_t = 0.02, value_name = "W")]
    adversarial: f64,
    /// How score distillation weighs its times
    #[arg(long, value_enum, default_value = "published")]
    score_weighting: Weighting,
    /// Score distillation draws its times from the first N
    #[arg(long, default_value_t = 3, value_name = "N")]
    score_times: usize,
    /// Times that the student starts from, such as 3,7,11,14 [default: the last alone]
    #[arg(long, value_delimiter = ',', num_args = 1.., value_name = "T")]
    starts: Vec<usize>,
    /// The same seed, data, teacher and options give the same model
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Name of the model [default: the run's folder]
    #[arg(long)]
    name: Option<String>,
    /// Steps between two checkpoints, each with a measurement on held-out photos
    #[arg(long, default_value_t = 500)]
    save_every: u64,
    #[command(flatten)]
    compute: run::Compute,
    /// Threads for the networks; the data has as many again [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
    /// Whether a recipe stands for these arguments
    #[arg(skip)]
    recipe: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// Two rounds of blur, resizing, noise and JPEG, as Real-ESRGAN has them
    RealWorld,
    /// A third JPEG-compressed, a few blurred or noisy, the rest clean
    Stills,
    /// Shrunk and nothing else
    Clean,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weighting {
    /// All alike, as published; the least time then dominates
    Published,
    /// By their noise level
    NoiseLevel,
}

impl Args {
    fn options(&self, config: &ResShiftConfig, begin: &Begin) -> Result<Options> {
        run::check_common(self.steps, self.batch, self.save_every, self.lr, self.ema)?;
        if self.accumulate == 0 || self.accumulate > 1024 {
            bail!("--accumulate {}: 1 to 1024", self.accumulate);
        }
        let name = self.name.clone().or_else(|| {
            let folder = self.out.file_name()?;
            Some(folder.to_string_lossy().into_owned())
        });
        let plain = Options::new(name.as_deref().unwrap_or("model"), config);
        let options = Options {
            student: self.shape(config, begin)?,
            degradation: match self.preset {
                Preset::RealWorld => DegradationRecipe::real_world(),
                Preset::Stills => DegradationRecipe::stills(),
                Preset::Clean => DegradationRecipe::clean(),
            },
            steps: self.steps,
            batch: self.batch,
            accumulate: self.accumulate,
            patch: self.patch.unwrap_or(plain.patch),
            learning_rate: self.lr,
            warm_up: self.warm_up,
            ema: self.ema,
            weights: Weights {
                regression: self.regression,
                score: self.score,
                adversarial: self.adversarial,
            },
            score_weight: match self.score_weighting {
                Weighting::Published => ScoreWeight::Published,
                Weighting::NoiseLevel => ScoreWeight::NoiseLevel,
            },
            score_times: self.score_times,
            starts: match self.starts.is_empty() {
                true => plain.starts.clone(),
                false => self.starts.clone(),
            },
            seed: self.seed,
            ..plain
        };
        options.check(config).map_err(|e| anyhow!(e))?;
        Ok(options)
    }

    /// The student's shape.
    fn shape(&self, config: &ResShiftConfig, begin: &Begin) -> Result<UnetConfig> {
        if let Begin::Model(model) = begin {
            return Ok(model.metadata.config.unet.clone());
        }
        if let Some(path) = &self.student_config {
            let text = fs::read_to_string(path)
                .with_context(|| format!("'{}' cannot be read", path.display()))?;
            return serde_json::from_str(&text)
                .with_context(|| format!("'{}' is no network's configuration", path.display()));
        }
        match self.student_channels {
            Some(n) if n == 0 || n > 4096 || !n.is_multiple_of(32) => {
                bail!("--student-channels {n}: a multiple of 32 up to 4096")
            }
            Some(n) => Ok(narrowed(&config.unet, n)),
            None => Ok(config.unet.clone()),
        }
    }
}

/// The arguments that the recipe at `path` and what `tadsr-train run` is told stand for, if it is one for a published
/// model: `published` names the teacher, the other keys are the options of this command.
pub fn of_recipe(path: &Path, data: &[PathBuf], told: &Told) -> Result<Option<Args>> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let Ok(mut table) = text.parse::<Table>() else {
        // Reading it as another recipe says what is wrong.
        return Ok(None);
    };
    let Some(teacher) = table.remove("published") else {
        return Ok(None);
    };
    table.insert("teacher".into(), teacher);
    if told.teacher.is_some() || told.begin.is_some() || told.lpips.is_some() {
        bail!(
            "'{}' distils a ResShift model: --teacher, --begin and --lpips are for other recipes",
            path.display()
        );
    }
    if !data.is_empty() {
        table.remove("data");
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut line: Vec<OsString> = vec!["recipe".into()];
    for (key, value) in table {
        let option = format!("--{}", key.replace('_', "-"));
        let values = match value {
            Value::Boolean(false) => continue,
            Value::Boolean(true) => Vec::new(),
            Value::Array(values) => values,
            value => vec![value],
        };
        line.push(option.into());
        line.extend(values.into_iter().map(|value| match value {
            Value::String(s)
                if ["teacher", "student", "student_config", "data"].contains(&&*key) =>
            {
                folder.join(s).into()
            }
            Value::String(s) => s.into(),
            value => value.to_string().into(),
        }));
    }
    if !data.is_empty() {
        line.push("--data".into());
        line.extend(data.iter().map(OsString::from));
    }
    line.extend(["--out".into(), told.out.clone().into()]);
    line.extend(["--save-every".into(), told.save_every.to_string().into()]);
    if let Some(threads) = told.threads {
        line.extend(["--threads".into(), threads.to_string().into()]);
    }
    if told.dry_run {
        line.push("--dry-run".into());
    } else if told.out.join("checkpoint.safetensors").exists() {
        line.push("--resume".into());
    }
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }
    let read = Line::try_parse_from(line);
    let mut read = read.map_err(|e| anyhow!("'{}': {e}", path.display()))?;
    read.args.compute = told.compute.clone();
    read.args.recipe = true;
    Ok(Some(read.args))
}

pub fn run(args: Args) -> Result<()> {
    let threads = run::use_threads(args.threads)?;
    let (device, dtype) = args.compute.open()?;
    let teacher = ResShiftModel::read(&args.teacher)?;
    let model = args
        .student
        .as_deref()
        .map(ResShiftModel::read)
        .transpose()?;
    let begin = match &model {
        _ if args.from_scratch => Begin::Random,
        Some(model) => Begin::Model(model),
        None => Begin::Teacher,
    };
    let options = args.options(&teacher.metadata.config, &begin)?;
    if !args.dry_run {
        run::make_folder(&args.out)?;
    }
    let stop = Stop::on_signals()?.flag();
    let [photos, held_out] = run::photos(&args.data, options.patch)?;
    eprintln!(
        "{} photos to train on, {} held out; teacher '{}' with {}, student with {} parameters",
        photos.len(),
        held_out.len(),
        teacher.metadata.name,
        parameters(&teacher.metadata.config.unet),
        parameters(&options.student),
    );
    let plan = Plan {
        steps: options.steps,
        images: options.batch * options.accumulate,
        save_every: args.save_every,
        folder: &args.out,
        product: "model.safetensors",
        go_on: (!args.recipe).then_some("--resume"),
    };
    let place = Place {
        dir: &args.out,
        start: match args.dry_run {
            true => Start::Dry,
            false => Start::of(args.resume),
        },
        data_threads: threads,
        device: &device,
        dtype,
    };
    let photos = Arc::new(photos);
    let mut distill = Distill::new(options, teacher, begin, photos, &held_out, place)?;
    drop(model);
    drop(held_out);
    if args.dry_run {
        return dry_run(&mut distill, &plan);
    }
    if distill.done() == 0 {
        eprintln!(
            "before the first step: {}",
            Training::validate(&distill)?.text
        );
    }
    run::train(&mut distill, &plan, &stop)
}

fn parameters(config: &UnetConfig) -> usize {
    let shapes = config.tensors();
    shapes
        .iter()
        .map(|(_, s)| s.iter().product::<usize>())
        .sum()
}

/// Takes a step and says what it took and what the run will.
fn dry_run(distill: &mut Distill, plan: &Plan) -> Result<()> {
    let start = Instant::now();
    distill.step()?;
    let step = start.elapsed();
    let left = plan.steps.saturating_sub(distill.done() - 1);
    let whole = Duration::from_secs_f64(step.as_secs_f64() * left as f64);
    println!(
        "one step of {} images: {:.1} s; {left} steps: about {}",
        plan.images,
        step.as_secs_f64(),
        HumanDuration(whole)
    );
    if let Some(peak) = dry_run::peak_memory() {
        println!("memory at its peak: {}", HumanBytes(peak));
    }
    println!("nothing was written to '{}'", plan.folder.display());
    Ok(())
}

impl Training for Distill {
    fn done(&self) -> u64 {
        Distill::done(self)
    }

    fn step(&mut self) -> tadsr::Result<Vec<(&'static str, f64)>> {
        let r = Distill::step(self)?;
        Ok(vec![
            ("regression", r.losses[0]),
            ("score", r.losses[1]),
            ("generator", r.losses[2]),
            ("discriminator", r.discriminator),
            ("grad_regression", r.gradients[0]),
            ("grad_score", r.gradients[1]),
            ("grad_generator", r.gradients[2]),
        ])
    }

    fn save(&self) -> tadsr::Result<()> {
        Distill::save(self)
    }

    fn validate(&self) -> tadsr::Result<HeldOut> {
        let [teacher, truth] = Distill::validate(self)?;
        Ok(HeldOut {
            text: format!(
                "held out {teacher:.4} from the teacher's result, {truth:.4} from the picture"
            ),
            values: vec![
                ("held out/teacher".into(), teacher),
                ("held out/truth".into(), truth),
            ],
        })
    }
}
