//! `tadsr-train fit`: supervised training of a student on photos and videos.

use std::path::PathBuf;

use anyhow::{Result, bail};
use tadsr::train::lite::{
    self,
    student::{Distillation, Options, initial_weights},
};

use crate::{
    data_args::{Data, Size},
    training::{self, as_option},
};

/// Default options of the library.
fn defaults() -> Options {
    Options::default()
}

/// Train a real-time model on photos and videos, by supervision.
///
/// A training pair is a patch of an image and the same patch shrunk by a random scale and degraded
/// by the preset. Only compression by video codecs is prepared before the training, as clips in the
/// cache. The model is written to model.safetensors in the folder of the run at every checkpoint.
/// Ctrl-C saves a checkpoint; --resume continues exactly from there. The folder also gets
/// recipe.toml, from which `tadsr-train run` makes the same model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train fit --data photos --out runs/tiny-x2
  tadsr-train fit --data photos videos --out runs/tiny-x4 --scale 4 --steps 100000
  # Clean input only:
  tadsr-train fit --data photos --preset clean --out runs/clean-x2
  # Continue after Ctrl-C, or with more --steps:
  tadsr-train fit --data photos --out runs/tiny-x2 --resume
  # Adapt a bundled model to your images:
  tadsr-train fit --data photos --out runs/mine --begin tiny-x2 --steps 5000
  # Matched pairs: files of the same names in both folders:
  tadsr-train fit --pairs recordings masters --out runs/matched
  # One model for clean and compressed input:
  tadsr-train fit --data photos videos --out runs/one --denoise
  # A network with memory for video:
  tadsr-train fit --data photos videos --out runs/video --begin tiny-x2 --memory 7
  # Play a video with the result:
  gst-launch-1.0 videotestsrc ! tadsrupscale model=runs/tiny-x2/model.safetensors ! autovideosink")]
pub struct Args {
    #[command(flatten)]
    data: Data,
    /// Folder of the run: checkpoint, model and logs
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Continue with the checkpoint in the folder of the run
    #[arg(long)]
    resume: bool,
    /// Model to begin with: a model file, the checkpoint of another run or the name of a bundled
    /// model. It determines size, scales and dials [default: random weights]
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["student", "scale"])]
    begin: Option<String>,
    /// Size of the student
    #[arg(long, value_enum, default_value = "tiny")]
    student: Size,
    /// Largest scale that the model serves, above 1 up to 4. The side of a grid cell is 2 pixels
    /// for scales up to 2, and 4 above
    #[arg(long, default_value_t = 2.0)]
    scale: f64,
    /// Add the dial denoise: one model for clean and for compressed input
    #[arg(long)]
    denoise: bool,
    /// Give the network a memory of the previous frame, with this many channels of state: 1 to 64
    /// [default: that of the model to begin with, or none]
    #[arg(long, value_name = "CHANNELS")]
    memory: Option<usize>,
    /// Training steps
    #[arg(long, default_value_t = defaults().steps, value_name = "N")]
    steps: u64,
    /// Training pairs in a step, 1 to 1024
    #[arg(long, default_value_t = defaults().batch, value_name = "N")]
    batch: usize,
    /// Side of a high-resolution patch in pixels, 16 to 1024 [default: 48 grid cells]
    #[arg(long, value_name = "PIXELS")]
    patch: Option<usize>,
    /// Peak learning rate, after a warm-up and before a cosine decay
    #[arg(long, default_value_t = defaults().learning_rate, value_name = "RATE")]
    lr: f64,
    /// Peak learning rate of Muon, which optimises the inner kernels, below 1; 0 for AdamW, as for
    /// all other weights
    #[arg(long, default_value_t = defaults().muon_rate, value_name = "RATE")]
    muon_lr: f64,
    /// Decay of the averaged weights, at least 0, below 1
    #[arg(long, default_value_t = defaults().ema, value_name = "DECAY")]
    ema: f64,
    /// Train each kernel as a product over this many channels, up to 1024; 0 trains kernels
    /// directly. The model file holds the product
    #[arg(long, default_value_t = defaults().expand, value_name = "CHANNELS")]
    expand: usize,
    /// Seed; the same seed, data and options make the same model
    #[arg(
        long,
        default_value_t = defaults().seed,
        value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64)
    )]
    seed: u64,
    /// Name of the model [default: name of the run's folder]
    #[arg(long)]
    name: Option<String>,
    /// Steps from one checkpoint, with a measurement on held-out data, to the next
    #[arg(long, default_value_t = 2000, value_name = "STEPS")]
    save_every: u64,
    #[command(flatten)]
    machine: training::Machine,
}

impl Args {
    /// Returns the recipe for the arguments.
    fn recipe(&self) -> Result<lite::Recipe> {
        if self.patch == Some(0) {
            bail!("--patch 0: at least 16, or leave it out");
        }
        let folder = self.out.file_name().map(|n| n.to_string_lossy());
        let name = self.name.as_deref().or(folder.as_deref());
        let mut recipe =
            lite::Recipe::new(name.unwrap_or("model"), self.student.into(), self.scale);
        if let Some(begin) = &self.begin {
            let model = initial_weights(begin)?;
            recipe.begin = Some(begin.clone());
            recipe.scale = model.scales[1];
            recipe.lowest = Some(model.scales[0]);
            recipe.shape = Some(model.student.into());
            recipe.conditioning.denoise = model.student.conditioning.denoise;
            recipe.memory = model.student.memory;
        }
        recipe.memory = self.memory.unwrap_or(recipe.memory);
        recipe.conditioning.denoise |= self.denoise;
        recipe.data = self.data.spec()?;
        recipe.student = Options {
            steps: self.steps,
            batch: self.batch,
            patch: self.patch.unwrap_or(0),
            learning_rate: self.lr,
            muon_rate: self.muon_lr,
            ema: self.ema,
            expand: self.expand,
            seed: self.seed,
            distillation: Distillation::none(),
            ..Options::default()
        };
        recipe.check().map_err(as_option)?;
        Ok(recipe)
    }
}

pub fn run(args: Args) -> Result<()> {
    let recipe = args.recipe()?;
    let mut options = args.machine.options(&args.out)?;
    options.resume = Some(args.resume);
    options.save_every = args.save_every;
    training::run(&recipe.into(), &options, Some("--resume"))
}
