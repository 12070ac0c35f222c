//! `tadsr-train fit`: supervised training of a student on photographs.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use tadsr::{
    nn::lite::StudentConfig,
    train::{
        data::PhotoSet,
        degrade::Degradation,
        fit::{Fit, Options},
    },
};

/// Train a student on photographs, supervised.
///
/// Every pair is made on the fly: a patch of a photo, shrunk by a random scale and damaged as the preset says. Ctrl-C
/// saves a checkpoint; --resume goes on from it exactly. The model is written beside it at every save.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tadsr-train fit --data photos --out runs/tiny-x2
  tadsr-train fit --data photos --out runs/tiny-x4 --scale 4 --steps 100000
  tadsr-train fit --data photos --out runs/tiny-x2 --resume
  gst-launch-1.0 videotestsrc ! tadsrupscale model=runs/tiny-x2/model.safetensors ! autovideosink")]
pub struct Args {
    /// Folders (or files) with JPEG and PNG photos
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Folder of the run: checkpoint and model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with the checkpoint in the run's folder
    #[arg(long)]
    resume: bool,
    /// The kind of student
    #[arg(long, value_enum, default_value = "tiny")]
    student: Size,
    /// Largest scale that the model serves, 2 to 4; `tiny` then has r = 2 up to 2, r = 4 above
    #[arg(long, default_value_t = 2.0)]
    scale: f64,
    /// What happens to the input besides being shrunk
    #[arg(long, value_enum, default_value = "streaming")]
    preset: Preset,
    /// Training steps
    #[arg(long, default_value_t = 50_000)]
    steps: u64,
    /// Patches in a step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Side of a high-resolution patch in pixels [default: 48 cells of the model's grid]
    #[arg(long)]
    patch: Option<usize>,
    /// Peak learning rate; it warms up, then falls along a cosine
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Decay of the averaged weights
    #[arg(long, default_value_t = 0.999)]
    ema: f64,
    /// Channels that each kernel is a product over while it is trained (folded in the model); 0 for none
    #[arg(long, default_value_t = 64)]
    expand: usize,
    /// The same seed, data and options give the same model
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Name of the model [default: the run's folder]
    #[arg(long)]
    name: Option<String>,
    /// Steps between two checkpoints, each with a measurement on held-out photos
    #[arg(long, default_value_t = 2000)]
    save_every: u64,
    /// Threads for the network; the data has as many again [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// Luma only, for CPUs
    Tiny,
    /// Luma and chroma, for GPUs
    Small,
}

#[derive(Clone, Copy, ValueEnum)]
enum Preset {
    /// A third JPEG-damaged, a few blurred or noisy, the rest clean
    Streaming,
    /// Shrunk and nothing else
    Clean,
}

impl Args {
    fn options(&self) -> Result<Options> {
        if !(1.0 < self.scale && self.scale <= 4.0) {
            bail!("--scale {}: above 1, up to 4", self.scale);
        }
        let (student, low) = match self.student {
            Size::Tiny if self.scale <= 2.0 => (StudentConfig::tiny(2), 1.0),
            Size::Tiny => (StudentConfig::tiny(4), 2.0),
            Size::Small => (StudentConfig::small(), 1.0),
        };
        let patch = self.patch.unwrap_or(48 * student.r);
        if patch < 16 || !patch.is_multiple_of(2 * student.r) {
            bail!(
                "--patch {patch}: a multiple of {} of at least 16",
                2 * student.r
            );
        }
        if self.steps == 0 || self.batch == 0 || self.save_every == 0 {
            bail!("--steps, --batch and --save-every must be at least 1");
        }
        if self.batch > 1024 || self.expand > 1024 || patch > 1024 {
            bail!("--batch, --patch and --expand: at most 1024");
        }
        let rate = self.lr > 0.0 && self.lr < 1.0;
        if !rate || !(0.0..1.0).contains(&self.ema) {
            bail!("--lr must be within 0 and 1, --ema at least 0 and below 1");
        }
        let folder = self
            .out
            .file_name()
            .map(|n| n.to_string_lossy().into_owned());
        Ok(Options {
            name: self
                .name
                .clone()
                .or(folder)
                .unwrap_or_else(|| "model".into()),
            student,
            scales: [low, self.scale],
            // Near scale 1 there is nothing to learn.
            train_scales: [low + (self.scale - low).min(0.25), self.scale],
            degradation: match self.preset {
                Preset::Streaming => Degradation::streaming(),
                Preset::Clean => Degradation::clean(),
            },
            steps: self.steps,
            batch: self.batch,
            patch,
            learning_rate: self.lr,
            ema: self.ema,
            expand: self.expand,
            seed: self.seed,
        })
    }
}

pub fn run(args: Args) -> Result<()> {
    let options = args.options()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores).max(1);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("'{}' cannot be made", args.out.display()))?;
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || flag.store(true, Ordering::SeqCst))?;

    let mut photos = load(&args.data, options.patch)?;
    let held_out = photos.hold_out(20);
    eprintln!(
        "{} photos to train on, {} held out; {:?} with {} parameters",
        photos.len(),
        held_out.len(),
        options.student.architecture,
        options.student.parameters()
    );
    let photos = Arc::new(photos);
    let mut fit = Fit::new(
        options.clone(),
        photos,
        &held_out,
        &args.out,
        args.resume,
        threads,
    )?;
    drop(held_out);
    train(&mut fit, &options, args.save_every, &stop)?;
    if fit.done() < options.steps {
        eprintln!(
            "stopped at step {} of {}; go on with the same command and --resume",
            fit.done(),
            options.steps
        );
    } else {
        eprintln!("model: {}", args.out.join("model.safetensors").display());
    }
    Ok(())
}

fn load(data: &[PathBuf], side: usize) -> Result<PhotoSet> {
    let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template(
        "decoding photos {bar:30} {pos}/{len}",
    )?);
    let photos = PhotoSet::load(data, side, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    for skipped in photos.skipped() {
        eprintln!("left out '{}': {}", skipped.path.display(), skipped.reason);
    }
    Ok(photos)
}

/// Steps until the end or until `stop`, with a line of numbers at every save.
fn train(fit: &mut Fit, options: &Options, save_every: u64, stop: &AtomicBool) -> Result<()> {
    let bar = ProgressBar::new(options.steps).with_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len} {per_sec} ETA {eta_precise} {msg}",
    )?);
    bar.set_position(fit.done());
    bar.reset_eta();
    let (start, first) = (Instant::now(), fit.done());
    let (mut shown, mut losses, mut count) = (Instant::now(), 0.0, 0u32);
    while fit.done() < options.steps && !stop.load(Ordering::SeqCst) {
        losses += f64::from(fit.step()?);
        count += 1;
        bar.set_position(fit.done());
        let saving = fit.done().is_multiple_of(save_every) || fit.done() == options.steps;
        if shown.elapsed() > Duration::from_secs(1) {
            bar.set_message(format!("loss {:.4}", losses / f64::from(count)));
            shown = Instant::now();
        }
        if saving {
            fit.save()?;
            let rate = (fit.done() - first) as f64 / start.elapsed().as_secs_f64();
            let gains: Vec<String> = fit
                .validate()?
                .iter()
                .map(|(name, gain)| format!("{name} {gain:+.3} dB"))
                .collect();
            let left = Duration::from_secs_f64((options.steps - fit.done()) as f64 / rate);
            let line = format!(
                "step {} of {}: loss {:.4}, against bicubic {}; {:.1} images/s, {} left",
                fit.done(),
                options.steps,
                losses / f64::from(count),
                gains.join(", "),
                rate * options.batch as f64,
                indicatif::HumanDuration(left)
            );
            log(&bar, &line);
            (losses, count) = (0.0, 0);
        }
    }
    fit.save()?;
    bar.finish_and_clear();
    Ok(())
}

/// Prints a line above the progress bar, or plainly where there is no terminal.
fn log(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() {
        eprintln!("{line}");
    } else {
        bar.println(line);
    }
}
