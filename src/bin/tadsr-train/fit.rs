//! `tadsr-train fit`: supervised training of a student on photographs.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use tadsr::train::{
    lite::student::{Distillation, Options, StudentRun, begin},
    recipe::Recipe,
    report::SampleRow,
};

use crate::{
    corpus,
    recipe::{self, Told},
    run::{self, HeldOut, Training},
};

/// Train a student on photos and videos, supervised.
///
/// Every pair is made on the fly: a patch of a photo or a frame, shrunk by a random scale and
/// damaged as the preset says; only what video codecs damage is prepared before, as clips on disk.
/// Ctrl-C saves a checkpoint; --resume goes on from it exactly. The model is written beside it at
/// every save, and before that recipe.toml, by which `tadsr-train run` (with the same --begin)
/// makes the same model.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tadsr-train fit --data photos --out runs/tiny-x2
  tadsr-train fit --data photos videos --out runs/tiny-x4 --scale 4 --steps 100000
  tadsr-train fit --data photos --preset clean --out runs/tiny-clean-x2
  tadsr-train fit --data photos --out runs/tiny-x2 --resume                  # goes on, with more --steps if you like
  tadsr-train fit --data photos --out runs/mine --begin tiny-x2 --steps 5000 # a bundled model, for your pictures
  tadsr-train fit --pairs recordings masters --out runs/matched              # of the same names in both folders
  tadsr-train fit --data photos videos --out runs/one --denoise              # one model for clean and compressed input
  gst-launch-1.0 videotestsrc ! tadsrupscale model=runs/tiny-x2/model.safetensors ! autovideosink")]
pub struct Args {
    #[command(flatten)]
    data: corpus::Data,
    /// Folder of the run: checkpoint and model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with the checkpoint in the run's folder
    #[arg(long)]
    resume: bool,
    /// Model to go on from: a file, the checkpoint of another run or the name of a bundled model.
    /// It decides the kind of student, its scales and dials
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["student", "scale"])]
    begin: Option<String>,
    /// The kind of student
    #[arg(long, value_enum, default_value = "tiny")]
    student: corpus::Size,
    /// Largest scale that the model serves, above 1 up to 4; the grid then has r = 2 up to 2, r = 4
    /// above
    #[arg(long, default_value_t = 2.0)]
    scale: f64,
    /// Let the weights depend on how degraded the input is: one model for clean and for compressed
    /// input
    #[arg(long)]
    denoise: bool,
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
    #[arg(long, default_value_t = 5e-3)]
    lr: f64,
    /// Peak learning rate of Muon, which optimises the inner kernels; 0 leaves them to AdamW, as
    /// the rest
    #[arg(long, default_value_t = 0.01)]
    muon_lr: f64,
    /// Decay of the averaged weights
    #[arg(long, default_value_t = 0.999)]
    ema: f64,
    /// Channels that each kernel is a product over while it is trained (folded in the model); 0 for none
    #[arg(long, default_value_t = 64)]
    expand: usize,
    /// The same seed, data and options give the same model
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seed: u64,
    /// Name of the model [default: the run's folder]
    #[arg(long)]
    name: Option<String>,
    /// Steps between two checkpoints, each with a measurement on held-out photos
    #[arg(long, default_value_t = 2000)]
    save_every: u64,
    #[command(flatten)]
    compute: run::Compute,
    /// Threads for the network; the data has as many again [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
}

impl Args {
    /// The recipe that the arguments stand for.
    fn recipe(&self) -> Result<Recipe> {
        run::check_common(self.steps, self.batch, self.save_every, self.lr, self.ema)?;
        if self.patch == Some(0) {
            bail!("--patch 0: at least 16, or leave it out");
        }
        let begin = self.begin.as_deref().map(begin).transpose()?;
        let (config, size) = match &begin {
            Some(begin) => (begin.student, begin.scales),
            None => {
                let (student, lowest) = self.student.at(self.scale)?;
                (student, [lowest, self.scale])
            }
        };
        let mut conditioning = config.conditioning;
        conditioning.denoise |= self.denoise;
        let student = Options {
            steps: self.steps,
            batch: self.batch,
            accumulate: 1,
            patch: self.patch.unwrap_or(0),
            learning_rate: self.lr,
            muon_rate: self.muon_lr,
            ema: self.ema,
            expand: self.expand,
            seed: self.seed,
            distillation: Distillation::none(),
        };
        student.check()?;
        let patch = student.patch_side(config.r, 1);
        patch.map_err(|e| anyhow!("--{e}"))?;
        let folder = self.out.file_name().map(|n| n.to_string_lossy());
        let name = self.name.as_deref().or(folder.as_deref());
        Ok(Recipe {
            name: name.unwrap_or("model").into(),
            size: self.student.into(),
            scale: size[1],
            lowest: begin.is_some().then_some(size[0]),
            shape: begin.is_some().then(|| config.into()),
            conditioning,
            data: self.data.spec()?,
            teacher: None,
            student,
        })
    }
}

pub fn run(args: Args) -> Result<()> {
    let told = Told {
        out: args.out.clone(),
        teacher: None,
        begin: args.begin.clone(),
        lpips: None,
        dry_run: false,
        resume: Some(args.resume),
        save_every: args.save_every,
        compute: args.compute.clone(),
        threads: args.threads,
    };
    recipe::make(args.recipe()?, told)
}

impl Training for StudentRun {
    fn done(&self) -> u64 {
        Self::done(self)
    }

    fn step(&mut self) -> tadsr::Result<Vec<(&'static str, f64)>> {
        Self::step(self)
    }

    fn save(&self) -> tadsr::Result<()> {
        Self::save(self)
    }

    fn samples(&self) -> tadsr::Result<Vec<SampleRow>> {
        Self::samples(self)
    }

    fn validate(&self) -> tadsr::Result<HeldOut> {
        let (mut text, mut values) = (Vec::new(), Vec::new());
        for v in Self::validate(self)? {
            let mut line = format!("{} {:+.3} dB", v.name, v.gain);
            values.push((format!("held out {}/gain", v.name), v.gain));
            if let Some([ours, base]) = v.lpips {
                line += &format!(", LPIPS {ours:.4} ({base:.4})");
                values.push((format!("held out {}/LPIPS", v.name), ours));
            }
            text.push(line);
        }
        let text = format!("against bicubic {}", text.join("; "));
        Ok(HeldOut { text, values })
    }
}
