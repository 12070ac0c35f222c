//! `tadsr-train estimator`: trains the estimator of degradation.

use std::path::PathBuf;

use anyhow::{Result, bail};
use tadsr::{
    model::{EstimatorMetadata, write_estimator},
    train::{
        Observer,
        data::corpus::Corpus,
        lite::{
            TrainingData,
            estimator::{self, Options},
        },
    },
};

use crate::{
    data_args::Data,
    stop::{Stop, Stopped},
    training::{Console, Machine, as_option},
};

/// Clips that codecs compress. They are larger than those for a student, and fewer suffice.
const CLIPS: usize = 500;

fn defaults() -> Options {
    Options::default()
}

/// Train the estimator of degradation, which sets the dial `denoise` if it is automatic.
///
/// It learns from the low-resolution input of a training how strongly it is degraded. The program
/// has one estimator for all models, models/estimator.safetensors at the time of the build; this
/// command makes that file. Ctrl-C ends the training and keeps its result.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train estimator --data photos videos --out models/estimator.safetensors
  tadsr-train estimator --data photos --preset stills --steps 5000 --out estimator.safetensors")]
pub struct Args {
    #[command(flatten)]
    data: Data,
    /// File to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Training steps
    #[arg(long, default_value_t = defaults().steps, value_name = "N")]
    steps: u64,
    /// Frames in a step, each with a degradation of its own, 1 to 256
    #[arg(long, default_value_t = defaults().frames, value_name = "N")]
    frames: usize,
    /// Peak learning rate, after a warm-up and before a cosine decay
    #[arg(long, default_value_t = defaults().learning_rate, value_name = "RATE")]
    lr: f64,
    /// Seed; the same seed, data and options make the same estimator
    #[arg(long, default_value_t = defaults().seed)]
    seed: u64,
    #[command(flatten)]
    machine: Machine,
}

pub fn run(args: Args) -> Result<()> {
    let machine = args.machine.options(&args.out)?;
    if machine.ranks.count() > 1 {
        bail!("estimators are trained by one process: start it without the MPI launcher");
    }
    let console = Console::new(Stop::on_signals()?, true);
    let options = Options {
        steps: args.steps,
        frames: args.frames,
        learning_rate: args.lr,
        seed: args.seed,
        ..defaults()
    };
    let mut spec = args.data.spec()?;
    spec.pool.clips = CLIPS;
    let corpus = Corpus::load(&spec, estimator::PATCH, [1.25, 2.0], &|progress| {
        console.prepared(progress);
        !console.is_stopped()
    });
    console.ended();
    let corpus = match corpus {
        Err(tadsr::Error::Cancelled) => {
            let text = "stopped while preparing the data; the same command continues";
            return Err(Stopped(text.into()).into());
        }
        corpus => corpus?,
    };
    let notes = corpus.notes().iter().cloned();
    let skipped = corpus.skipped().iter().map(ToString::to_string);
    for text in skipped.chain(notes).chain([corpus.summary()]) {
        console.message(&text);
    }
    let data = TrainingData::corpus(corpus);
    let trained =
        estimator::train(&data, &options, machine.data_threads, &console).map_err(as_option)?;
    let done = Options {
        steps: trained.steps,
        ..options.clone()
    };
    let training = serde_json::json!({ "options": done, "preset": spec.preset });
    let metadata = EstimatorMetadata::new(trained.config, trained.floor, training);
    write_estimator(&args.out, &metadata, &trained.tensors)?;
    let (file, steps) = (args.out.display(), trained.steps);
    if steps < options.steps {
        let text = format!(
            "stopped at step {steps} of {}: '{file}' is of that step",
            options.steps
        );
        return Err(Stopped(text).into());
    }
    println!("'{file}'");
    Ok(())
}
