//! Description of training data: the table `[data]` of a recipe.

use std::{
    env,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{motion::Motion, sampling::Sampling, synthetic::Synthetic};
use crate::{
    Error, Result,
    train::degradation::{Degradation, DegradationRecipe, PRESETS},
};

/// What a corpus is made of: the table `[data]` of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CorpusSpec {
    /// Folders, or files, with photos and videos.
    pub dirs: Vec<PathBuf>,
    /// Instead of folders: one of low resolution and one with the same pictures and videos at high
    /// resolution.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<[PathBuf; 2]>,
    /// The degradation, by its name in [`PRESETS`].
    pub preset: String,
    /// Where clips are kept; [`default_cache`] if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Every such photo, and video, is kept out of the training, to measure on it; at least 2. Of fewer videos one clip
    /// of as many is, the last ones of each; of fewer photos the first is measured on and trained on.
    pub hold_out: usize,
    /// Probability that a picture is a frame of a video, where there are videos and photos.
    pub video_share: f64,
    /// How patches are drawn.
    pub sampling: Sampling,
    /// How a camera moves over photos.
    pub motion: Motion,
    /// What is cut out of videos.
    pub clips: ClipSpec,
    /// Clips that codecs have compressed.
    pub pool: PoolSpec,
    /// Drawn pictures among the photos.
    #[serde(skip_serializing_if = "is_none")]
    pub synthetic: Synthetic,
    /// The degradation, written down: it counts instead of the preset.
    #[serde(rename = "recipe", skip_serializing_if = "Vec::is_empty")]
    pub recipes: Vec<DegradationRecipe>,
}

/// What is cut out of videos.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClipSpec {
    /// Seconds of a video from one moment that is looked at to the next; more where the limit would be passed.
    pub every: f64,
    /// Squares that are kept of a moment, at most: those with the most texture.
    pub places: usize,
    /// Frames are shrunk by up to this factor as far as their size allows: it removes what the video's own compression
    /// has left.
    pub shrink: f64,
    /// Megabytes (2^20 bytes) of clips, at most, in all.
    pub limit: u64,
}

/// Clips that codecs have compressed, made once and kept on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolSpec {
    /// Clips in the pool; fewer where the limit would be passed.
    pub clips: usize,
    /// Frames that are encoded of each.
    pub frames: usize,
    /// Frames that are kept of these, to cut pairs out of them.
    pub kept: usize,
    /// Megabytes (2^20 bytes), at most.
    pub limit: u64,
    /// Another seed gives other clips.
    pub seed: u64,
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
            places: 2,
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
            kept: 4,
            limit: 4096,
            seed: 1,
        }
    }
}

impl ClipSpec {
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("clips: {text}")));
        if !(self.every >= 0.0 && self.every.is_finite()) {
            return wrong(format!("every = {}: seconds, at least 0", self.every));
        }
        if !(1..=1000).contains(&self.places) {
            return wrong(format!("places = {}: 1 to 1000", self.places));
        }
        if !(1.0..=8.0).contains(&self.shrink) {
            return wrong(format!("shrink = {}: 1 to 8", self.shrink));
        }
        limit("clips", self.limit)
    }
}

impl PoolSpec {
    /// With fewer clips there is no pool.
    pub const LEAST: usize = 8;

    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("pool: {text}")));
        if !(Self::LEAST..=10_000_000).contains(&self.clips) {
            let least = Self::LEAST;
            return wrong(format!("clips = {}: {least} to 10000000", self.clips));
        }
        if !(1..=250).contains(&self.frames) {
            return wrong(format!("frames = {}: 1 to 250", self.frames));
        }
        if !(1..=self.frames).contains(&self.kept) {
            return wrong(format!("kept = {}: 1 to frames", self.kept));
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
    /// The degradation that it names or holds.
    ///
    /// # Errors
    /// [`Error::Setting`] that names what is wrong with it.
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
            let text = "dirs and pairs exclude each other: what is paired is degraded already";
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

    /// The folder for clips.
    pub fn cache(&self) -> PathBuf {
        self.cache.clone().unwrap_or_else(default_cache)
    }
}

/// `tadsr` in the user's folder for caches.
pub fn default_cache() -> PathBuf {
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let base = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.filter(|p| p.is_absolute()).or_else(home);
    base.unwrap_or_else(env::temp_dir).join("tadsr")
}
