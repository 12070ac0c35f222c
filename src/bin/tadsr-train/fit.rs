//! `tadsr-train fit`: supervised training of a student on photographs.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Result, bail};
use clap::ValueEnum;
use tadsr::{
    nn::lite::StudentConfig,
    train::{
        degrade::Degradation,
        fit::{Fit, Options},
        pairs::DamagedPhotos,
    },
};

use crate::run::{self, Plan, Training};

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
        run::check_common(self.steps, self.batch, self.save_every, self.lr, self.ema)?;
        if self.expand > 1024 || patch > 1024 {
            bail!("--patch and --expand: at most 1024");
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
    let threads = run::use_threads(args.threads)?;
    run::make_folder(&args.out)?;
    let stop = run::stop_flag()?;
    let mut photos = run::load_photos(&args.data, options.patch)?;
    let held_out = photos.hold_out(20);
    eprintln!(
        "{} photos to train on, {} held out; {:?} with {} parameters",
        photos.len(),
        held_out.len(),
        options.student.architecture,
        options.student.parameters()
    );
    let plan = Plan {
        steps: options.steps,
        images: options.batch,
        save_every: args.save_every,
        folder: &args.out,
    };
    let source = Arc::new(DamagedPhotos {
        photos: Arc::new(photos),
        degradation: options.degradation.clone(),
    });
    let held_out = Arc::new(held_out);
    let mut fit = Fit::new(options, source, held_out, &args.out, args.resume, threads)?;
    run::train(&mut fit, &plan, &stop)
}

impl Training for Fit {
    fn done(&self) -> u64 {
        Fit::done(self)
    }

    fn step(&mut self) -> tadsr::Result<Vec<(&'static str, f64)>> {
        Ok(vec![("loss", f64::from(Fit::step(self)?))])
    }

    fn save(&self) -> tadsr::Result<()> {
        Fit::save(self)
    }

    fn validate(&self) -> tadsr::Result<String> {
        let gains = Fit::validate(self)?;
        let gains = gains
            .iter()
            .map(|(name, gain)| format!("{name} {gain:+.3} dB"));
        let gains: Vec<String> = gains.collect();
        Ok(format!("against bicubic {}", gains.join(", ")))
    }
}
