//! Everything that a model is trained on: photos, videos and drawings, and what happens to them on their way to the
//! upscaler.

use std::{
    env,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

use rand::{Rng, rngs::StdRng};
use serde::{Deserialize, Serialize};

#[cfg(feature = "video")]
use super::{
    clips::{self, ClipSet, Shape},
    pool::{Layout, Pool},
};
use super::{
    codec::{Codec, Kind, Rate},
    damage::{Damage, PRESETS, Recipe},
    data::{DataError, Fnv, Patch, PhotoSet, Sampling, Skipped, files, is_image, is_video},
    degrade::KernelWeights,
    motion::Motion,
    pairs::{DamagedPhotos, Pair, PairSource, Random},
    stages::Stage,
    synthetic::Synthetic,
};
use crate::{Error, Result};

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
    /// The damage, by its name in [`PRESETS`].
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
    /// Clips that codecs have damaged.
    pub pool: PoolSpec,
    /// Drawn pictures among the photos.
    #[serde(skip_serializing_if = "is_none")]
    pub synthetic: Synthetic,
    /// The damage, written down: it counts instead of the preset.
    #[serde(rename = "recipe", skip_serializing_if = "Vec::is_empty")]
    pub recipes: Vec<Recipe>,
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

/// Clips that codecs have damaged, made once and kept on disk.
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
    /// The damage that it names or holds.
    ///
    /// # Errors
    /// [`Error::Setting`] that names what is wrong with it.
    pub fn damage(&self) -> Result<Damage> {
        if self.recipes.is_empty() {
            let unknown = || {
                let text = format!("no preset '{}': {}", self.preset, PRESETS.join(", "));
                Error::Setting(text)
            };
            return Damage::preset(&self.preset).ok_or_else(unknown);
        }
        let damage = Damage {
            recipes: self.recipes.clone(),
        };
        damage.check().map(|()| damage)
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
        self.damage().map(drop)
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

/// How far a corpus is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// Photos decoded.
    Photos { done: usize, all: usize },
    /// Seconds of video looked through.
    Videos { done: f64, all: f64 },
    /// Damaged clips in the pool.
    Pool { done: usize, all: usize },
}

/// Photos, videos and damage, as a source of pairs.
pub struct Corpus {
    photos: Option<PhotoSet>,
    held_out: Arc<PhotoSet>,
    #[cfg(feature = "video")]
    clips: Option<ClipSet>,
    #[cfg(feature = "video")]
    pool: Option<Pool>,
    damage: Damage,
    spec: CorpusSpec,
    /// Whether what is held out can be compressed, too.
    compressed: bool,
    skipped: Vec<Skipped>,
    notes: Vec<String>,
}

/// Frames of photos that a camera moves over, damaged by H.264 of CRF 28, each clip made when it is asked for: a few of
/// them to measure on.
struct DamagedClips(Arc<PhotoSet>);

impl DamagedClips {
    /// Frames in a clip.
    const FRAMES: usize = 8;

    /// How many times larger than a picture from `small` pixels the clip is, as encoders want their frames.
    fn times(small: usize) -> usize {
        let times = 32usize.div_ceil(small.max(1));
        let odd = !(times * small).is_multiple_of(2);
        times + usize::from(odd)
    }

    /// Whether photos are there for pictures of `side` pixels from `small`.
    fn serve(photos: &PhotoSet, side: usize, small: usize) -> bool {
        photos.large(side * Self::times(small)) > 0 && Kind::H264.try_out().is_ok()
    }
}

impl PairSource for DamagedClips {
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
        let times = Self::times(small);
        let motion = Motion::default();
        let truth = motion.over(&self.0, &mut random.content, times * side, Self::FRAMES)?;
        let small_side = times * small;
        let clean = Stage::Shrink(KernelWeights::catmull_rom()).apply(
            truth.clone(),
            (small_side, small_side),
            &mut random.degradation,
        )?;
        let codec = Codec {
            kind: Kind::H264,
            rate: Rate::Crf(28),
            effort: 3,
            gop: 250,
            b_frames: 2,
            mb_tree: false,
        };
        let low = codec.compress(&clean)?;
        let t = random.content.random_range(0..Self::FRAMES);
        let (truth, low) = truth.get(t).zip(low.get(t)).ok_or_else(nothing)?;
        Ok(Pair {
            noise: clean.get(t).map_or(0.0, |clean| clean.luma_difference(low)),
            truth: truth.top_left(side, side),
            low: low.top_left(small, small),
        })
    }

    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
}

/// The files that a corpus is made of.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub photos: Vec<PathBuf>,
    pub videos: Vec<PathBuf>,
}

/// The photos and videos below `folders`, by their names.
///
/// # Errors
/// [`DataError::Read`] for a folder that cannot be read.
pub fn find(folders: &[PathBuf]) -> Result<Found, DataError> {
    let found = files(folders, is_material)?;
    let (videos, photos) = found.into_iter().partition(|p| is_video(p));
    Ok(Found { photos, videos })
}

/// Whether `path` has the name of a photo or a video.
pub fn is_material(path: &Path) -> bool {
    is_image(path) || is_video(path)
}

/// The size of the clips that are cut out of videos for patches of `patch` pixels.
#[cfg(feature = "video")]
pub fn clip_shape(spec: &CorpusSpec, damage: &Damage, patch: usize, scales: [f64; 2]) -> Shape {
    match damage.coded().next() {
        Some(_) => Shape {
            side: Layout::new(patch, scales).side,
            frames: spec.pool.frames,
        },
        None => Shape {
            side: (patch * 3).div_ceil(4) * 2,
            frames: 1,
        },
    }
}

/// What is to be done without the codecs that are not there.
pub struct Available {
    pub damage: Damage,
    /// What is left out and what it needs.
    pub notes: Vec<String>,
}

/// The damage that `spec` asks for, without the codecs that GStreamer does not have here.
///
/// # Errors
/// [`Error::Setting`] when nothing is left of a recipe that `spec` writes down itself.
pub fn available(spec: &CorpusSpec) -> Result<Available> {
    let all = spec.damage()?;
    let (mut missing, mut notes) = (Vec::new(), Vec::new());
    for kind in all.kinds() {
        if let Err(e) = kind.try_out() {
            let (name, needs) = (kind.name(), kind.needs());
            notes.push(format!("no {name} damage: it needs {needs}: {e}"));
            missing.push(kind);
        }
    }
    let mut damage = all.without(&missing);
    let lost: Vec<_> = all.recipes.iter().filter(|r| lost(r, &damage)).collect();
    if let (Some(recipe), false) = (lost.first(), spec.recipes.is_empty()) {
        let text = format!("recipe '{}': {}", recipe.name, notes.join("; "));
        return Err(Error::Setting(text));
    }
    if !lost.is_empty() {
        let recipes: Vec<_> = lost.iter().map(|r| r.name.as_str()).collect();
        let recipes = recipes.join("', '");
        notes.push(format!(
            "without a codec the preset 'stills' stands in for '{recipes}'"
        ));
        damage = Damage::stills();
    }
    Ok(Available { damage, notes })
}

fn lost(recipe: &Recipe, damage: &Damage) -> bool {
    damage.recipes.iter().all(|r| r.name != recipe.name)
}

impl Corpus {
    /// Finds and prepares everything for patches of `patch` pixels at scales from `scales[0]` to `scales[1]`: decodes the
    /// photos, cuts clips out of the videos and damages clips by codecs. What has been made before is found again in the
    /// cache. `progress` is called from several threads; false stops.
    ///
    /// # Errors
    /// [`Error::Setting`] for values that are out of range or data that cannot serve; [`Error::Cancelled`].
    pub fn load(
        spec: &CorpusSpec,
        patch: usize,
        scales: [f64; 2],
        progress: &(dyn Fn(Progress) -> bool + Sync),
    ) -> Result<Self> {
        spec.check()?;
        let Available { damage, mut notes } = available(spec)?;
        let unusable = |e: DataError| Error::Setting(describe(&e));
        let found = find(&spec.dirs).map_err(unusable)?;
        let report = |done, all| {
            // Photos are soon done: nothing stops them.
            progress(Progress::Photos { done, all });
        };
        let mut skipped = Vec::new();
        let mut photos = match PhotoSet::load(&found.photos, patch, report) {
            Ok(photos) => {
                skipped.extend(photos.skipped().iter().cloned());
                Some(photos)
            }
            Err(DataError::Empty { skipped: more, .. }) => {
                skipped.extend(more);
                None
            }
            Err(e) => return Err(unusable(e)),
        };
        notes.extend(photos.as_ref().and_then(|p| p.too_few(spec.hold_out)));
        let held_out = photos.as_mut().map(|p| p.hold_out(spec.hold_out));
        // After that: what is measured on is photographed.
        let mut photos = PhotoSet::join(photos, spec.synthetic.draw(patch)?, patch);
        #[cfg(feature = "video")]
        let (clips, mut held_out) = {
            let shape = clip_shape(spec, &damage, patch, scales);
            let (videos, more) = clips::survey(&found.videos, shape.side);
            skipped.extend(more);
            let report = |done, all| progress(Progress::Videos { done, all });
            let (mut clips, more) =
                ClipSet::load(&videos, &spec.clips, shape, &spec.cache(), report)?;
            skipped.extend(more);
            let mut frames = clips.hold_out(spec.hold_out)?;
            if held_out.is_none() && frames.is_empty() {
                let first = clips.first_frame()?;
                if first.is_some() {
                    let (all, every) = (clips.len(), spec.hold_out);
                    notes.push(format!(
                        "{all} clips of videos are too few to hold one of {every} out: the first is trained on and \
                         measured on"
                    ));
                }
                frames.extend(first);
            }
            let held_out = PhotoSet::join(held_out, frames, patch);
            ((!clips.is_empty()).then_some(clips), held_out)
        };
        #[cfg(not(feature = "video"))]
        let mut held_out = held_out;
        #[cfg(not(feature = "video"))]
        skipped.extend(found.videos.into_iter().map(|path| Skipped {
            path,
            reason: "this program is built without GStreamer (feature 'video')".into(),
        }));
        for set in photos.iter_mut().chain(&mut held_out) {
            set.sampling = spec.sampling.clone();
        }
        let Some(held_out) = held_out else {
            let dirs = spec.dirs.clone();
            return Err(unusable(DataError::Empty { dirs, skipped }));
        };
        let small = (patch as f64 / scales[1]).round() as usize;
        let mut corpus = Self {
            photos,
            compressed: DamagedClips::serve(&held_out, patch, small),
            held_out: Arc::new(held_out),
            #[cfg(feature = "video")]
            clips,
            #[cfg(feature = "video")]
            pool: None,
            damage,
            spec: spec.clone(),
            skipped,
            notes: Vec::new(),
        };
        #[cfg(feature = "video")]
        corpus.fill_pool(patch, scales, progress, &mut notes)?;
        corpus.notes.append(&mut notes);
        Ok(corpus)
    }

    #[cfg(feature = "video")]
    fn fill_pool(
        &mut self,
        patch: usize,
        scales: [f64; 2],
        progress: &(dyn Fn(Progress) -> bool + Sync),
        notes: &mut Vec<String>,
    ) -> Result<()> {
        if self.damage.coded().next().is_none() {
            return Ok(());
        }
        let layout = Layout::new(patch, scales);
        let side = layout.side;
        if self.clips.is_none() && self.photos.as_ref().is_none_or(|p| p.large(side) == 0) {
            return Err(Error::Setting(format!(
                "codec damage needs photos or videos with sides of at least {side} pixels: give larger ones, smaller \
                 patches, or a preset without codecs (stills, clean, real-world)"
            )));
        }
        let damage = Damage {
            recipes: self.damage.coded().cloned().collect(),
        };
        let mut hash = Fnv::default();
        (self.content(), self.spec.video_share.to_bits()).hash(&mut hash);
        format!("{:?}{:?}", self.spec.sampling, self.spec.motion).hash(&mut hash);
        let mut pool = Pool::open(
            &self.spec.cache(),
            &self.spec.pool,
            layout,
            damage,
            hash.finish(),
        )?;
        if pool.len() < self.spec.pool.clips {
            notes.push(format!(
                "the pool's limit of {} MB allows {} of {} damaged clips",
                self.spec.pool.limit,
                pool.len(),
                self.spec.pool.clips
            ));
        }
        pool.prepare(&|rng| self.clip(rng, side), &|done, all| {
            progress(Progress::Pool { done, all })
        })?;
        self.pool = Some(pool);
        Ok(())
    }

    /// The photos, without those held out.
    pub fn photos(&self) -> Option<&PhotoSet> {
        self.photos.as_ref()
    }

    /// Photos, and frames of clips, that are not in the pairs, but for one where [`Self::notes`] says so.
    pub fn held_out(&self) -> Arc<PhotoSet> {
        self.held_out.clone()
    }

    /// Kinds of damage, by name, of what is held out: clean, JPEG of quality 60, and H.264 of CRF 28 where it is there.
    pub fn held_out_kinds(&self) -> Vec<(&'static str, Arc<dyn PairSource>)> {
        let still = |recipe| {
            let photos = self.held_out.clone();
            Arc::new(DamagedPhotos { photos, recipe })
        };
        let mut kinds: Vec<(_, Arc<dyn PairSource>)> = vec![
            ("clean", still(Recipe::fixed())),
            ("jpeg60", still(Recipe::jpeg(60))),
        ];
        if self.compressed {
            kinds.push(("h264", Arc::new(DamagedClips(self.held_out.clone()))));
        }
        kinds
    }

    /// The clips of videos, without those held out.
    #[cfg(feature = "video")]
    pub fn clips(&self) -> Option<&ClipSet> {
        self.clips.as_ref()
    }

    /// The clips that codecs have damaged.
    #[cfg(feature = "video")]
    pub fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }

    /// The damage, without the codecs that are not there.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }

    /// The files that were left out.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// What the user should know: codecs that are not there, limits that were met, too little to hold some of it out.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A number that changes with the photos and the clips.
    fn content(&self) -> u64 {
        let mut hash = Fnv::default();
        self.photos
            .as_ref()
            .map(PhotoSet::fingerprint)
            .hash(&mut hash);
        #[cfg(feature = "video")]
        self.clips
            .as_ref()
            .map(ClipSet::fingerprint)
            .hash(&mut hash);
        hash.finish()
    }

    /// Whether the next picture comes from a video.
    #[cfg(feature = "video")]
    fn video(&self, rng: &mut StdRng, photos: bool) -> Option<&ClipSet> {
        let clips = self.clips.as_ref()?;
        (!photos || rng.random_bool(self.spec.video_share)).then_some(clips)
    }

    /// A truth for the pool.
    #[cfg(feature = "video")]
    fn clip(&self, rng: &mut StdRng, side: usize) -> Result<Vec<Patch>> {
        let photos = self.photos.as_ref().filter(|p| p.large(side) > 0);
        match (self.video(rng, photos.is_some()), photos) {
            (Some(clips), _) => clips.clip(rng),
            (_, Some(photos)) => self
                .spec
                .motion
                .over(photos, rng, side, self.spec.pool.frames),
            _ => Err(nothing()),
        }
    }

    /// A picture for damage without codecs.
    fn picture(&self, rng: &mut StdRng, side: usize) -> Result<Patch> {
        #[cfg(feature = "video")]
        if let Some(clips) = self.video(rng, self.photos.is_some()) {
            return clips.sample(rng, side, &self.spec.sampling);
        }
        let photos = self.photos.as_ref().ok_or_else(nothing)?;
        photos.sample(rng, side, side)
    }
}

/// Counts the changes in how pairs are drawn.
const VERSION: u32 = 2;

fn nothing() -> Error {
    Error::Frame("neither photos nor clips".into())
}

impl PairSource for Corpus {
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
        let recipe = self
            .damage
            .draw(&mut random.degradation)
            .ok_or_else(nothing)?;
        #[cfg(feature = "video")]
        if let (Some(_), Some(pool)) = (recipe.codecs(), &self.pool) {
            let make = |rng: &mut StdRng| self.clip(rng, pool.layout().side);
            return pool.pair(&make, &self.spec.sampling, random, side, small);
        }
        let truth = self.picture(&mut random.content, side)?;
        let degradation = &mut random.degradation;
        let (low, noise) = recipe.picture(&truth, (small, small), degradation)?;
        Ok(Pair { truth, low, noise })
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        (VERSION, self.content()).hash(&mut hash);
        self.damage.to_toml().hash(&mut hash);
        let shares = (self.spec.video_share.to_bits(), self.spec.hold_out);
        shares.hash(&mut hash);
        format!("{:?}{:?}", self.spec.sampling, self.spec.motion).hash(&mut hash);
        #[cfg(feature = "video")]
        self.pool.as_ref().map(Pool::key).hash(&mut hash);
        hash.finish()
    }
}

/// An error and what it comes from.
fn describe(error: &DataError) -> String {
    match error {
        DataError::Read { source, .. } => format!("{error}: {source}"),
        DataError::Empty { .. } => error.to_string(),
    }
}

/// The codecs, and what GStreamer says of those that it does not have here.
pub fn codecs() -> Vec<(Kind, Result<()>)> {
    Kind::ALL
        .into_iter()
        .map(|kind| (kind, kind.try_out()))
        .collect()
}
