//! `tadsr-train distill`: distils a ResShift model into a student of one step.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use tadsr::train::{losses::ScoreWeight, resshift::Recipe};

use crate::training;

/// Default values of the library: the published settings.
fn defaults() -> Recipe {
    Recipe::default()
}

/// Distil a ResShift model of many steps into a student of one step.
///
/// In every training step the teacher samples its result in all its steps, so a training step is
/// expensive: --dry-run measures one and prints the time and memory that the run needs. The student
/// is written to model.safetensors in the folder of the run at every checkpoint, and the losses of
/// each step to losses.csv. Ctrl-C saves a checkpoint; --resume continues exactly from there.
/// docs/distillation.md describes the method.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  # Time and memory that a run needs:
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/one-step --dry-run
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/one-step
  # Continue after Ctrl-C:
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/one-step --resume
  # A narrower and faster student:
  tadsr-train distill --teacher resshift.safetensors --data photos -o runs/narrow \\
      --student-channels 64")]
pub struct Args {
    /// Model file of the teacher, as `tadsr-train import` writes it
    #[arg(long, value_name = "MODEL")]
    teacher: PathBuf,
    /// Folders or files with photos (JPEG, PNG, WebP, TIFF)
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Folder of the run: checkpoint, model and logs
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Continue with the checkpoint in the folder of the run
    #[arg(long)]
    resume: bool,
    /// Take one step and print the time and memory that the run needs; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Model file that the student begins with, of any shape [default: the teacher]
    #[arg(
        long,
        value_name = "MODEL",
        conflicts_with_all = ["student_channels", "student_config", "from_scratch"]
    )]
    student: Option<PathBuf>,
    /// Channels of a narrower student at its first level, a multiple of 32 up to 4096 [default: as
    /// the teacher]
    #[arg(long, value_name = "N", conflicts_with = "student_config")]
    student_channels: Option<usize>,
    /// JSON file with the shape of the student, like `unet` in the metadata of a model file
    #[arg(long, value_name = "JSON")]
    student_config: Option<PathBuf>,
    /// Begin with random weights instead of those of the teacher that fit
    #[arg(long)]
    from_scratch: bool,
    /// Degradation of the input
    #[arg(long, value_enum, default_value = "real-world")]
    preset: Preset,
    /// Training steps
    #[arg(long, default_value_t = defaults().steps, value_name = "N")]
    steps: u64,
    /// Images that pass the networks at once, 1 to 1024
    #[arg(long, default_value_t = defaults().batch, value_name = "N")]
    batch: usize,
    /// Batches whose gradients are averaged in a step, 1 to 1024
    #[arg(long, default_value_t = defaults().accumulate, value_name = "N")]
    accumulate: usize,
    /// Side of a high-resolution patch in pixels [default: the size that the teacher was built for]
    #[arg(long, value_name = "PIXELS")]
    patch: Option<usize>,
    /// Learning rate of student and discriminator
    #[arg(long, default_value_t = defaults().learning_rate, value_name = "RATE")]
    lr: f64,
    /// Steps over which the learning rate rises to its value
    #[arg(long, default_value_t = defaults().warm_up, value_name = "STEPS")]
    warm_up: u64,
    /// Decay of the averaged weights, at least 0, below 1
    #[arg(long, default_value_t = defaults().ema, value_name = "DECAY")]
    ema: f64,
    /// Weight of the distance to the result of the teacher
    #[arg(long, default_value_t = defaults().regression, value_name = "WEIGHT")]
    regression: f64,
    /// Weight of high-frequency score distillation; 0 leaves it out
    #[arg(long, default_value_t = defaults().score, value_name = "WEIGHT")]
    score: f64,
    /// Weight of the adversarial loss; 0 leaves it out
    #[arg(long, default_value_t = defaults().adversarial, value_name = "WEIGHT")]
    adversarial: f64,
    /// Weights of the times in score distillation
    #[arg(long, value_enum, default_value = "published")]
    score_weighting: Weighting,
    /// Number of times in score distillation: 0 to N - 1
    #[arg(long, default_value_t = defaults().score_times, value_name = "N")]
    score_times: usize,
    /// Times that the student starts from, such as 3,7,11,14 [default: the last]
    #[arg(long, value_delimiter = ',', num_args = 1.., value_name = "TIME")]
    starts: Vec<usize>,
    /// Seed; the same seed, data, teacher and options make the same model
    #[arg(long, default_value_t = defaults().seed)]
    seed: u64,
    /// Name of the model [default: name of the run's folder]
    #[arg(long)]
    name: Option<String>,
    /// Steps from one checkpoint, with a measurement on held-out photos, to the next
    #[arg(long, default_value_t = 500, value_name = "STEPS")]
    save_every: u64,
    #[command(flatten)]
    machine: training::Machine,
}

#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// Two rounds of blur, resizing, noise and JPEG, as in Real-ESRGAN
    RealWorld,
    /// A third JPEG, a few blurred or noisy, the rest clean
    Stills,
    /// Shrunk, nothing else
    Clean,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weighting {
    /// Equal weights, as in the released code; the first time then dominates
    Published,
    /// Weights by noise level
    NoiseLevel,
}

impl Args {
    /// Returns the recipe for the arguments.
    fn recipe(&self) -> Recipe {
        Recipe {
            teacher: self.teacher.clone(),
            data: self.data.clone(),
            name: self.name.clone(),
            student: self.student.clone(),
            student_channels: self.student_channels,
            student_config: self.student_config.clone(),
            from_scratch: self.from_scratch,
            preset: match self.preset {
                Preset::RealWorld => "real-world",
                Preset::Stills => "stills",
                Preset::Clean => "clean",
            }
            .into(),
            steps: self.steps,
            batch: self.batch,
            accumulate: self.accumulate,
            patch: self.patch,
            learning_rate: self.lr,
            warm_up: self.warm_up,
            ema: self.ema,
            regression: self.regression,
            score: self.score,
            adversarial: self.adversarial,
            score_weighting: match self.score_weighting {
                Weighting::Published => ScoreWeight::Published,
                Weighting::NoiseLevel => ScoreWeight::NoiseLevel,
            },
            score_times: self.score_times,
            starts: self.starts.clone(),
            seed: self.seed,
        }
    }
}

pub fn run(args: Args) -> Result<()> {
    let recipe = args.recipe().into();
    let mut options = args.machine.options(&args.out)?;
    options.resume = Some(args.resume);
    options.save_every = args.save_every;
    if args.dry_run {
        return training::estimate(&recipe, &options);
    }
    training::run(&recipe, &options, Some("--resume"))
}
