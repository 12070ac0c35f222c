//! `tadsr-train data`: checks training data and prints degradation presets.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use clap::{Args as ClapArgs, Subcommand};
#[cfg(feature = "video")]
use tadsr::train::data::{clips, pool::Layout};
use tadsr::train::{
    data::{
        PhotoSet, Skipped, corpus,
        files::{self, Found},
        spec::CorpusSpec,
    },
    degradation::Degradation,
    lite::{self, train_scales},
};

use crate::{
    data_args::{DegradationArgs, Preset, Size},
    training::as_option,
};

/// Check training data, or print a degradation preset.
#[derive(ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Check(Check),
    Preset(Print),
}

/// List the files that training would use, and the reasons to skip others.
///
/// Prints also the disk space for prepared clips, the degradation and the codecs that GStreamer has
/// on this machine. Writes nothing.
#[derive(ClapArgs)]
#[command(after_help = "\
Examples:
  tadsr-train data check photos videos
  # For a model for scales up to 4:
  tadsr-train data check photos --scale 4
  # With degradation recipes of your own:
  tadsr-train data check photos --degradation degradation.toml")]
struct Check {
    /// Folders or files with photos (JPEG, PNG, WebP, TIFF) and videos
    #[arg(required = true, value_name = "PATH")]
    dirs: Vec<PathBuf>,
    #[command(flatten)]
    degradation: DegradationArgs,
    /// Size of the student
    #[arg(long, value_enum, default_value = "tiny")]
    student: Size,
    /// Largest scale that the model serves, above 1 up to 4
    #[arg(long, default_value_t = 2.0)]
    scale: f64,
    /// Side of a high-resolution patch in pixels, 16 to 1024 [default: 48 grid cells]
    #[arg(long, value_name = "PIXELS")]
    patch: Option<usize>,
    /// Folder for prepared clips [default: tadsr in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// Print the degradation recipes of a preset as TOML.
///
/// Edit the file and pass it to --degradation. docs/training.md describes the stages and keys.
#[derive(ClapArgs)]
#[command(after_help = "\
Examples:
  tadsr-train data preset streaming > degradation.toml
  tadsr-train fit --data photos --degradation degradation.toml --out runs/mine")]
struct Print {
    /// Name of the preset
    #[arg(value_enum)]
    preset: Preset,
}

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Check(check) => check.run(),
        Command::Preset(Print { preset }) => {
            if let Some(degradation) = Degradation::preset(preset.name()) {
                print!("{}", degradation.to_toml());
            }
            Ok(())
        }
    }
}

impl Check {
    fn run(&self) -> Result<()> {
        let (student, low) = lite::Size::from(self.student)
            .student(self.scale)
            .map_err(as_option)?;
        let patch = self.patch.unwrap_or(48 * student.r);
        if !(16..=1024).contains(&patch) {
            bail!("--patch {patch}: 16 to 1024");
        }
        let mut spec = CorpusSpec {
            dirs: self.dirs.clone(),
            cache: self.cache.clone(),
            ..CorpusSpec::default()
        };
        self.degradation.set(&mut spec)?;
        let available = corpus::available(&spec)?;
        let found = files::find(&self.dirs)?;
        let photos = photos(&found, patch)?;
        let count = media(
            &spec,
            &available.degradation,
            &found,
            photos,
            patch,
            train_scales(low, self.scale),
        )?;
        others(&self.dirs)?;
        degradation(&available);
        encoders();
        if count == 0 {
            bail!("nothing to train on: no usable photo or video");
        }
        Ok(())
    }
}

/// Prints the photos. Returns those that can be used.
fn photos(found: &Found, patch: usize) -> Result<Option<PhotoSet>> {
    let (set, skipped) = match PhotoSet::load(&found.photos, patch, |_, _| {}) {
        Ok(set) => {
            let skipped = set.skipped().to_vec();
            (Some(set), skipped)
        }
        Err(tadsr::train::data::DataError::Empty { skipped, .. }) => (None, skipped),
        Err(e) => return Err(e.into()),
    };
    let count = set.as_ref().map_or(0, PhotoSet::len);
    println!("photos: {count} with sides of at least {patch} pixels");
    print_skipped(&skipped);
    Ok(set)
}

fn print_skipped(skipped: &[Skipped]) {
    for skipped in skipped {
        println!("  {skipped}");
    }
}

/// Prints the videos and the clips that are made. Returns the number of photos and videos.
#[cfg(feature = "video")]
fn media(
    spec: &CorpusSpec,
    degradation: &Degradation,
    found: &Found,
    photos: Option<PhotoSet>,
    patch: usize,
    scales: [f64; 2],
) -> Result<usize> {
    let coded = degradation.coded().next().is_some();
    let layout = Layout::new(patch, scales);
    let shape = corpus::clip_shape(spec, degradation, patch, scales);
    let (videos, skipped) = clips::survey(&found.videos, shape.side);
    let (count, side) = (videos.len(), shape.side);
    println!(
        "videos: {count} with sides of at least {side} pixels, {:.0} s",
        // The sum of none is -0.
        clips::seconds(&videos).abs()
    );
    for v in &videos {
        let rate = v
            .rate
            .map_or("no constant rate".into(), |r| format!("{r:.2} fps"));
        let (path, codec) = (v.path.display(), &v.codec);
        println!(
            "  {path}: {}x{}, {rate}, {:.1} s, {codec}",
            v.width, v.height, v.seconds
        );
    }
    print_skipped(&skipped);
    let mb = |bytes: u64| bytes.div_ceil(1 << 20);
    let cache = spec.cache();
    println!("cache in {}:", cache.display());
    if count > 0 {
        let clips = spec.clips.clips(shape, &videos);
        let frames = shape.frames;
        let size = mb(clips * shape.bytes());
        println!(
            "  up to {clips} clips of {frames} frames, {side}x{side}: {size} MB (at most {} MB)",
            spec.clips.limit
        );
    }
    let large = photos.as_ref().map_or(0, |p| p.large(layout.side));
    if coded {
        let (clips, bytes) = layout.room(&spec.pool);
        let lows: Vec<_> = layout
            .scales
            .iter()
            .map(|s| (layout.side / s).to_string())
            .collect();
        println!(
            "  {clips} compressed clips of {0}x{0} from {1} pixels: {2} MB (at most {3} MB); \
             {large} photos and {count} videos are large enough for them",
            layout.side,
            lows.join(", "),
            mb(bytes),
            spec.pool.limit
        );
    }
    if !coded && count == 0 {
        println!("  nothing");
    }
    let share = match (&photos, count) {
        (None, 0) | (Some(_), 0) => 0.0,
        (None, _) => 1.0,
        _ => spec.video_share,
    };
    let s = &spec.sampling;
    println!(
        "sampling: {:.0} % of the images from videos; {:.0} % of the patches are the most textured \
         of {}",
        100.0 * share,
        100.0 * s.textured,
        s.candidates
    );
    if coded && large == 0 && count == 0 {
        bail!(
            "codec degradation needs photos or videos with sides of at least {} pixels",
            layout.side
        );
    }
    Ok(photos.map_or(0, |p| p.len()) + count)
}

#[cfg(not(feature = "video"))]
fn media(
    _: &CorpusSpec,
    _: &Degradation,
    found: &Found,
    photos: Option<PhotoSet>,
    _: usize,
    _: [f64; 2],
) -> Result<usize> {
    if !found.videos.is_empty() {
        let count = found.videos.len();
        println!(
            "videos: {count} left out: this program is built without GStreamer (feature 'video')"
        );
    }
    Ok(photos.map_or(0, |p| p.len()))
}

/// Prints the number of files whose names are not those of photos or videos.
fn others(dirs: &[PathBuf]) -> Result<()> {
    let named = |path: &Path| !files::is_media(path);
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for path in tadsr::train::data::files(dirs, named)? {
        if fs::metadata(&path).is_ok_and(|m| m.is_file()) && !files::is_media(&path) {
            let kind = path
                .extension()
                .map_or("no extension".into(), |e| format!(".{}", e.display()));
            *kinds.entry(kind).or_default() += 1;
        }
    }
    if !kinds.is_empty() {
        let kinds: Vec<_> = kinds
            .iter()
            .map(|(kind, n)| format!("{n} with {kind}"))
            .collect();
        println!("ignored by name: {}", kinds.join(", "));
    }
    Ok(())
}

/// Prints the degradation.
fn degradation(available: &corpus::Available) {
    let recipes = &available.degradation.recipes;
    let all: f64 = recipes.iter().map(|r| r.weight).sum();
    println!("degradation:");
    for recipe in recipes {
        let stages: Vec<_> = recipe.stages.iter().map(|s| s.name()).collect();
        let share = 100.0 * recipe.weight / all;
        println!("  {share:.0} % {}: {}", recipe.name, stages.join(", "));
    }
    for note in &available.notes {
        println!("  note: {note}");
    }
}

/// Prints the codecs that GStreamer has on this machine.
fn encoders() {
    println!("codecs:");
    for (kind, found) in corpus::codecs() {
        match found {
            Ok(()) => println!("  {}: available", kind.name()),
            Err(_) => println!("  {}: missing; it needs {}", kind.name(), kind.needs()),
        }
    }
}
