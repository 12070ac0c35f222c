//! Description of training data: the table `[data]` of a recipe.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{motion::Motion, sampling::Sampling, synthetic::Synthetic};
use crate::{
    Error, Result,
    cache::cache_folder,
    train::degradation::{Degradation, DegradationRecipe, PRESETS},
};

/// Description of a corpus: the table `[data]` of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CorpusSpec {
    /// Folders and files with photos and videos.
    pub dirs: Vec<PathBuf>,
    /// Matched pairs instead of `dirs`: folders with the same images and videos in low and in high
    /// resolution.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<[PathBuf; 2]>,
    /// Name of the degradation, one of [`PRESETS`].
    pub preset: String,
    /// Folder for clips; `None` for `tadsr` in the user's cache folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// One of this many photos and videos is held out for measurements; at least 2. If there are
    /// fewer videos, the last clips of each are held out. If there are fewer photos, the first is
    /// both trained and measured on.
    pub hold_out: usize,
    /// Probability that an image is a frame of a video, if there are both photos and videos.
    pub video_share: f64,
    /// Choice of patches.
    pub sampling: Sampling,
    /// Motion of a camera over photos.
    pub motion: Motion,
    /// Clips that are cut out of videos.
    pub clips: ClipSpec,
    /// Clips that codecs have compressed.
    pub pool: PoolSpec,
    /// Rendered images among the photos.
    #[serde(skip_serializing_if = "is_none")]
    pub synthetic: Synthetic,
    /// Degradation recipes, instead of the preset.
    #[serde(rename = "recipe", skip_serializing_if = "Vec::is_empty")]
    pub recipes: Vec<DegradationRecipe>,
}

/// Clips that are cut out of videos.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipSpec {
    /// Seconds between two moments of a video; more if the limit requires it.
    pub every: f64,
    /// Maximum number of squares per moment, those with the most texture.
    #[serde(alias = "places")]
    pub squares: usize,
    /// Maximum factor by which frames are shrunk, as far as their size allows. Shrinking removes
    /// compression artefacts of the video.
    pub shrink: f64,
    /// Maximum size of all clips in megabytes (2^20 bytes).
    pub limit: u64,
}

/// Clips that codecs compress once and that stay on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolSpec {
    /// Number of clips; fewer if the limit requires it.
    pub clips: usize,
    /// Encoded frames per clip.
    pub frames: usize,
    /// Retained frames per clip.
    #[serde(alias = "kept")]
    pub retained: usize,
    /// Maximum size in megabytes (2^20 bytes).
    pub limit: u64,
    /// Seed of the clips.
    pub seed: u64,
    /// Degrades all images as clips and retains all frames, for networks with memory. Training sets
    /// this if the network has memory.
    #[serde(skip_serializing_if = "is_false")]
    pub successive: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Default for CorpusSpec {
    fn default() -> Self {
        Self {
            dirs: Vec::new(),
            pairs: None,
            preset: "streaming".into(),
            recipes: Vec::new(),
            cache: None,
            hold_out: 20,
            video_share: 0.3,
            sampling: Sampling::default(),
            motion: Motion::default(),
            clips: ClipSpec::default(),
            pool: PoolSpec::default(),
            synthetic: Synthetic::default(),
        }
    }
}

fn is_none(synthetic: &Synthetic) -> bool {
    *synthetic == Synthetic::default()
}

impl Default for ClipSpec {
    fn default() -> Self {
        Self {
            every: 1.0,
            squares: 2,
            shrink: 1.5,
            limit: 4096,
        }
    }
}

impl Default for PoolSpec {
    fn default() -> Self {
        Self {
            clips: 1000,
            frames: 12,
            retained: 4,
            limit: 4096,
            seed: 1,
            successive: false,
        }
    }
}

impl ClipSpec {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("clips: {text}")));
        if !(self.every >= 0.0 && self.every.is_finite()) {
            return wrong(format!("every = {}: seconds, at least 0", self.every));
        }
        if !(1..=1000).contains(&self.squares) {
            return wrong(format!("squares = {}: 1 to 1000", self.squares));
        }
        if !(1.0..=8.0).contains(&self.shrink) {
            return wrong(format!("shrink = {}: 1 to 8", self.shrink));
        }
        limit("clips", self.limit)
    }
}

impl PoolSpec {
    /// Minimum number of clips.
    pub const MIN_CLIPS: usize = 8;

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("pool: {text}")));
        if !(Self::MIN_CLIPS..=10_000_000).contains(&self.clips) {
            let min = Self::MIN_CLIPS;
            return wrong(format!("clips = {}: {min} to 10000000", self.clips));
        }
        if !(1..=250).contains(&self.frames) {
            return wrong(format!("frames = {}: 1 to 250", self.frames));
        }
        if !(1..=self.frames).contains(&self.retained) {
            return wrong(format!("retained = {}: 1 to frames", self.retained));
        }
        limit("pool", self.limit)
    }
}

/// Checks a number of megabytes.
fn limit(table: &str, limit: u64) -> Result<()> {
    if !(1..=1 << 30).contains(&limit) {
        let text = format!("{table}: limit = {limit}: megabytes, 1 to {}", 1 << 30);
        return Err(Error::Setting(text));
    }
    Ok(())
}

impl CorpusSpec {
    /// Returns the degradation.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the mistake.
    pub fn degradation(&self) -> Result<Degradation> {
        if self.recipes.is_empty() {
            let unknown = || {
                let text = format!("no preset '{}': {}", self.preset, PRESETS.join(", "));
                Error::Setting(text)
            };
            return Degradation::preset(&self.preset).ok_or_else(unknown);
        }
        let degradation = Degradation {
            recipes: self.recipes.clone(),
        };
        degradation.check().map(|()| degradation)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.video_share) {
            let text = format!(
                "video_share = {}: a probability is 0 to 1",
                self.video_share
            );
            return Err(Error::Setting(text));
        }
        if self.pairs.is_some() && !self.dirs.is_empty() {
            let text = "dirs and pairs exclude each other: pairs are already degraded";
            return Err(Error::Setting(text.into()));
        }
        if self.hold_out < 2 {
            let text = format!("hold_out = {}: at least 2", self.hold_out);
            return Err(Error::Setting(text));
        }
        self.sampling.check()?;
        self.motion.check()?;
        self.clips.check()?;
        self.pool.check()?;
        self.synthetic.check()?;
        self.degradation().map(drop)
    }

    /// Returns the folder for clips.
    pub fn cache(&self) -> PathBuf {
        self.cache.clone().unwrap_or_else(cache_folder)
    }
}

/// Progress of preparing training data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Preparation {
    /// Photos decoded.
    Photos { done: usize, all: usize },
    /// Seconds of video processed.
    Videos { done: f64, all: f64 },
    /// Compressed clips in the pool.
    Pool { done: usize, all: usize },
}
