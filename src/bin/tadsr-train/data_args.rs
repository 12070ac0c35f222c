//! Options that select training data.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use tadsr::train::{data::spec::CorpusSpec, degradation::Degradation, lite};

/// Training data.
#[derive(clap::Args, Clone, Debug)]
pub struct Data {
    /// Folders or files with photos (JPEG, PNG, WebP, TIFF) and videos
    #[arg(long, required_unless_present = "pairs", num_args = 1.., value_name = "PATH")]
    pub data: Vec<PathBuf>,
    /// Two folders with the same images and videos in low and in high resolution, instead of --data
    #[arg(
        long,
        num_args = 2,
        value_names = ["LOW", "HIGH"],
        conflicts_with_all = ["data", "preset", "degradation"]
    )]
    pub pairs: Option<Vec<PathBuf>>,
    #[command(flatten)]
    pub degradation: DegradationArgs,
    /// Folder for prepared clips, which later runs use again [default: tadsr in the user's cache
    /// folder]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// Degradation of the input.
#[derive(clap::Args, Clone, Debug)]
pub struct DegradationArgs {
    /// Degradation of the input besides shrinking
    #[arg(long, value_enum, default_value = "streaming")]
    pub preset: Preset,
    /// TOML file with degradation recipes, as `tadsr-train data preset` prints them, instead of a
    /// preset
    #[arg(long, alias = "damage", value_name = "FILE", conflicts_with = "preset")]
    pub degradation: Option<PathBuf>,
}

/// Named degradations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Clean, H.264, H.265, VP9, AV1, JPEG and a little real-world
    Streaming,
    /// Shrunk, nothing else
    Clean,
    /// Two rounds of blur, resizing, noise and JPEG, with the ranges of Real-ESRGAN
    RealWorld,
    /// A third JPEG, a few blurred or noisy, the rest clean; needs no codecs
    Stills,
}

/// Sizes of students.
#[derive(Clone, Copy, ValueEnum)]
pub enum Size {
    /// For any CPU
    Tiny,
    /// For CPUs with time to spare
    Small,
    /// For GPUs and large CPUs
    Base,
}

impl From<Size> for lite::Size {
    fn from(size: Size) -> Self {
        match size {
            Size::Tiny => Self::Tiny,
            Size::Small => Self::Small,
            Size::Base => Self::Base,
        }
    }
}

impl Preset {
    /// Name of the preset in the library.
    pub fn name(self) -> &'static str {
        match self {
            Self::Streaming => "streaming",
            Self::Clean => "clean",
            Self::RealWorld => "real-world",
            Self::Stills => "stills",
        }
    }
}

impl DegradationArgs {
    /// Sets the degradation of `spec`.
    pub fn set(&self, spec: &mut CorpusSpec) -> Result<()> {
        spec.preset = self.preset.name().into();
        if let Some(path) = &self.degradation {
            let text = fs::read_to_string(path);
            let text = text.with_context(|| format!("'{}' cannot be read", path.display()))?;
            let degradation = Degradation::from_toml(&text);
            let degradation = degradation.with_context(|| format!("'{}'", path.display()))?;
            spec.recipes = degradation.recipes;
        }
        Ok(())
    }
}

impl Data {
    /// Returns the specification of a corpus.
    pub fn spec(&self) -> Result<CorpusSpec> {
        let mut spec = CorpusSpec {
            dirs: self.data.clone(),
            pairs: self.pairs.clone().and_then(two),
            cache: self.cache.clone(),
            ..CorpusSpec::default()
        };
        self.degradation.set(&mut spec)?;
        Ok(spec)
    }
}

/// The two folders of `--pairs`.
pub fn two(pairs: Vec<PathBuf>) -> Option<[PathBuf; 2]> {
    pairs.try_into().ok()
}
