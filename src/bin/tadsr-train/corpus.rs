//! The options that say what is trained on, and the progress of preparing it.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use tadsr::{
    nn::lite::StudentConfig,
    train::{
        data::{
            corpus::{Corpus, Progress},
            spec::CorpusSpec,
        },
        degradation::Degradation,
        recipe,
    },
};

use crate::stop::Stopped;

/// What is trained on.
#[derive(clap::Args, Clone, Debug)]
pub struct Data {
    /// Folders (or files) with photos (JPEG, PNG) and videos
    #[arg(long, required_unless_present = "pairs", num_args = 1.., value_name = "DIR")]
    pub data: Vec<PathBuf>,
    /// Two folders instead: low resolution, and the same pictures and videos at high resolution
    #[arg(long, num_args = 2, value_names = ["LOW", "HIGH"], conflicts_with_all = ["data", "preset", "degradation"])]
    pub pairs: Option<Vec<PathBuf>>,
    #[command(flatten)]
    pub degradation: DegradationArgs,
    /// Folder for prepared clips, which later runs find again [default: tadsr in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// What happens to pictures.
#[derive(clap::Args, Clone, Debug)]
pub struct DegradationArgs {
    /// What happens to the input besides being shrunk
    #[arg(long, value_enum, default_value = "streaming")]
    pub preset: Preset,
    /// Instead of a preset: degradation recipes in a TOML file, as `tadsr-train data preset` prints them
    #[arg(long, alias = "damage", value_name = "FILE", conflicts_with = "preset")]
    pub degradation: Option<PathBuf>,
}

/// Degradations with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Half of it through H.264, H.265, VP9 and AV1, the rest clean, JPEG and a little of real-world
    Streaming,
    /// Shrunk and nothing else
    Clean,
    /// Two rounds of blur, resizing, noise and JPEG, with Real-ESRGAN's ranges
    RealWorld,
    /// A third JPEG-compressed, a few blurred or noisy, the rest clean; needs no codecs
    Stills,
}

/// The kinds of students.
#[derive(Clone, Copy, ValueEnum)]
pub enum Size {
    /// For any CPU
    Tiny,
    /// For CPUs with time to spare
    Small,
    /// For GPUs and large CPUs
    Base,
}

impl Size {
    /// The student for scales up to `scale`, and the lowest scale that it serves.
    pub fn at(self, scale: f64) -> Result<(StudentConfig, f64)> {
        let size = recipe::Size::from(self);
        size.student(scale).map_err(|e| anyhow!("--{e}"))
    }
}

impl From<Size> for recipe::Size {
    fn from(size: Size) -> Self {
        match size {
            Size::Tiny => Self::Tiny,
            Size::Small => Self::Small,
            Size::Base => Self::Base,
        }
    }
}

impl Preset {
    /// Its name in the library.
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
    /// Puts the degradation into `spec`.
    pub fn set(&self, spec: &mut CorpusSpec) -> Result<()> {
        spec.preset = self.preset.name().into();
        if let Some(path) = &self.degradation {
            let text = fs::read_to_string(path);
            let text = text.with_context(|| format!("'{}' cannot be read", path.display()))?;
            let degradation = Degradation::from_toml(&text);
            spec.recipes = degradation
                .with_context(|| format!("'{}'", path.display()))?
                .recipes;
        }
        Ok(())
    }
}

impl Data {
    /// As a corpus says it.
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

/// Two folders, as --pairs takes them.
pub fn two(pairs: Vec<PathBuf>) -> Option<[PathBuf; 2]> {
    pairs.try_into().ok()
}

/// Prepares a corpus for patches of `patch` pixels at `scales`, with progress, and says what is left out. `stop` ends it;
/// what has been made by then is found again.
pub fn load(
    spec: &CorpusSpec,
    patch: usize,
    scales: [f64; 2],
    stop: &AtomicBool,
) -> Result<Corpus> {
    let shown: Mutex<Option<(&str, ProgressBar)>> = Mutex::new(None);
    let report = |progress: Progress| {
        let (what, done, all) = match progress {
            Progress::Photos { done, all } => ("decoding photos", done as u64, all as u64),
            Progress::Videos { done, all } => {
                ("cutting clips, seconds of video", done as u64, all as u64)
            }
            Progress::Pool { done, all } => ("compressing clips", done as u64, all as u64),
        };
        if let Ok(mut shown) = shown.lock() {
            let (_, bar) = match shown.take() {
                Some((name, bar)) if name == what => shown.insert((name, bar)),
                _ => shown.insert((what, bar(what))),
            };
            bar.set_length(all.max(done));
            bar.set_position(done);
        }
        !stop.load(Ordering::Relaxed)
    };
    let corpus = Corpus::load(spec, patch, scales, &report);
    if let Ok(Some((_, bar))) = shown.into_inner() {
        bar.finish_and_clear();
    }
    if stop.load(Ordering::Relaxed) {
        let text = "stopped while the data was prepared; the same command goes on with it";
        return Err(Stopped(text.into()).into());
    }
    let corpus = corpus?;
    for skipped in corpus.skipped() {
        eprintln!("left out '{}': {}", skipped.path.display(), skipped.reason);
    }
    for note in corpus.notes() {
        eprintln!("note: {note}");
    }
    Ok(corpus)
}

/// What a corpus has, in words.
pub fn describe(corpus: &Corpus) -> String {
    let photos = corpus.photos().map_or(0, |p| p.len());
    let text = format!("{photos} photos to train on");
    #[cfg(feature = "video")]
    let text = {
        let clips = corpus
            .clips()
            .map(|clips| format!(", {} clips of videos", clips.len()));
        let pool = corpus.pool().map(|pool| {
            let (count, mb) = (pool.len(), pool.size() >> 20);
            let folder = pool.folder().display();
            format!(", {count} compressed clips ({mb} MB in '{folder}')")
        });
        text + &clips.unwrap_or_default() + &pool.unwrap_or_default()
    };
    text
}

fn bar(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {per_sec} ETA {eta}");
    let bar = ProgressBar::no_length().with_prefix(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
