//! Training data as a whole: photos, videos and rendered images, and their degradation.

use std::{
    hash::{Hash, Hasher},
    sync::Arc,
};

use rand::{Rng, rngs::StdRng};

#[cfg(feature = "video")]
use super::{
    clips::{self, ClipSet, Shape},
    pool::{Layout, Pool},
};
use super::{
    files::{DataError, Skipped, find},
    motion::Motion,
    pairs::{DegradedPhotos, Pair, PairSource, Random},
    photos::PhotoSet,
    spec::{CorpusSpec, Preparation},
};
use crate::{
    Error, Result,
    train::{
        degradation::{
            Degradation, DegradationRecipe,
            codec::{Codec, Kind, Rate},
            filters::KernelWeights,
            stages::Stage,
        },
        patch::Patch,
        random::Fnv,
    },
};

/// Photos, videos and degradation, as a source of pairs.
pub struct Corpus {
    photos: Option<PhotoSet>,
    held_out: Arc<PhotoSet>,
    #[cfg(feature = "video")]
    clips: Option<ClipSet>,
    #[cfg(feature = "video")]
    pool: Option<Pool>,
    degradation: Degradation,
    spec: CorpusSpec,
    /// `true` if the held-out images can be compressed, too.
    compressed: bool,
    skipped: Vec<Skipped>,
    notes: Vec<String>,
}

/// Held-out frames: photos under a moving camera, compressed by H.264 of CRF 28. Each clip is made
/// on demand.
struct CompressedClips(Arc<PhotoSet>);

impl CompressedClips {
    /// Frames in a clip.
    const FRAMES: usize = 8;

    /// Factor by which a clip is larger than an image of `small` pixels, so that its sides are even
    /// and at least 32 pixels.
    fn times(small: usize) -> usize {
        let times = 32usize.div_ceil(small.max(1));
        let odd = !(times * small).is_multiple_of(2);
        times + usize::from(odd)
    }

    /// Returns `true` if there are photos and a codec for images of `side` pixels from `small`.
    fn serve(photos: &PhotoSet, side: usize, small: usize) -> bool {
        photos.large(side * Self::times(small)) > 0 && Kind::H264.try_out().is_ok()
    }
}

impl CompressedClips {
    /// Makes a clip of `frames` frames.
    fn make(
        &self,
        random: &mut Random,
        (side, small): (usize, usize),
        frames: usize,
    ) -> Result<Vec<Pair>> {
        let times = Self::times(small);
        let motion = Motion::default();
        let truth = motion.over(&self.0, &mut random.content, times * side, frames)?;
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
        let frames = truth.iter().zip(&clean).zip(&low);
        let pair = |((truth, clean), low): ((&Patch, &Patch), &Patch)| Pair {
            noise: clean.luma_difference(low),
            truth: truth.top_left(side, side),
            low: low.top_left(small, small),
        };
        Ok(frames.map(pair).collect())
    }
}

impl PairSource for CompressedClips {
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
        let mut clip = self.make(random, (side, small), Self::FRAMES)?;
        let t = random.content.random_range(0..Self::FRAMES);
        if t < clip.len() {
            Ok(clip.swap_remove(t))
        } else {
            Err(nothing())
        }
    }

    fn clip(&self, random: &mut Random, sides: (usize, usize), frames: usize) -> Result<Vec<Pair>> {
        let mut clip = self.make(random, sides, frames.max(Self::FRAMES))?;
        clip.truncate(frames);
        Ok(clip)
    }

    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
}

/// Returns the size of the clips that are cut out of videos for patches of `patch` pixels.
#[cfg(feature = "video")]
pub fn clip_shape(
    spec: &CorpusSpec,
    degradation: &Degradation,
    patch: usize,
    scales: [f64; 2],
) -> Shape {
    match pooled(spec, degradation).next() {
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

/// Returns the recipes whose images come from clips in the pool.
#[cfg(feature = "video")]
fn pooled<'a>(
    spec: &CorpusSpec,
    degradation: &'a Degradation,
) -> impl Iterator<Item = &'a DegradationRecipe> {
    let all = spec.pool.successive;
    let recipes = degradation.recipes.iter();
    recipes.filter(move |recipe| all || recipe.codecs().is_some())
}

/// Degradation with the codecs of this machine.
pub struct Available {
    pub degradation: Degradation,
    /// Codecs that are left out, and the packages that they need.
    pub notes: Vec<String>,
}

/// Returns the degradation of `spec` without the codecs that GStreamer lacks on this machine.
///
/// # Errors
/// [`Error::Setting`] when nothing is left of a recipe in `spec`.
pub fn available(spec: &CorpusSpec) -> Result<Available> {
    let all = spec.degradation()?;
    let (mut missing, mut notes) = (Vec::new(), Vec::new());
    for kind in all.kinds() {
        if let Err(e) = kind.try_out() {
            let (name, needs) = (kind.name(), kind.needs());
            notes.push(format!("no {name} degradation: it needs {needs}: {e}"));
            missing.push(kind);
        }
    }
    let mut degradation = all.without(&missing);
    let lost: Vec<_> = all
        .recipes
        .iter()
        .filter(|r| lost(r, &degradation))
        .collect();
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
        degradation = Degradation::stills();
    }
    Ok(Available { degradation, notes })
}

fn lost(recipe: &DegradationRecipe, degradation: &Degradation) -> bool {
    degradation.recipes.iter().all(|r| r.name != recipe.name)
}

impl Corpus {
    /// Prepares the data for patches of `patch` pixels at scales from `scales[0]` to `scales[1]`:
    /// decodes the photos, cuts clips out of the videos, and compresses clips by codecs. Clips in
    /// the cache are used again. `progress` is called from several threads and returns `false` to
    /// stop.
    ///
    /// # Errors
    /// [`Error::Setting`] for values that are out of range, [`Error::Data`] and [`Error::Io`] for
    /// data that is missing or unfit; [`Error::Cancelled`].
    pub fn load(
        spec: &CorpusSpec,
        patch: usize,
        scales: [f64; 2],
        progress: &(dyn Fn(Preparation) -> bool + Sync),
    ) -> Result<Self> {
        spec.check()?;
        let mut spec = spec.clone();
        if spec.pool.successive {
            spec.pool.retained = spec.pool.frames;
        }
        let spec = &spec;
        let Available {
            degradation,
            mut notes,
        } = available(spec)?;
        let found = find(&spec.dirs)?;
        let report = |done, all| {
            // Photos are fast to decode, so this does not stop.
            progress(Preparation::Photos { done, all });
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
            Err(e) => return Err(e.into()),
        };
        notes.extend(photos.as_ref().and_then(|p| p.too_few(spec.hold_out)));
        let held_out = photos.as_mut().map(|p| p.hold_out(spec.hold_out));
        // Rendered images join after the split: measurements are on photos only.
        let mut photos = PhotoSet::join(photos, spec.synthetic.render(patch)?, patch);
        #[cfg(feature = "video")]
        let (clips, mut held_out) = {
            let shape = clip_shape(spec, &degradation, patch, scales);
            let (videos, more) = clips::survey(&found.videos, shape.side);
            skipped.extend(more);
            let report = |done, all| progress(Preparation::Videos { done, all });
            let (mut clips, more) =
                ClipSet::load(&videos, &spec.clips, shape, &spec.cache(), report)?;
            skipped.extend(more);
            let mut frames = clips.hold_out(spec.hold_out)?;
            if held_out.is_none() && frames.is_empty() {
                let first = clips.first_frame()?;
                if first.is_some() {
                    let (all, every) = (clips.len(), spec.hold_out);
                    notes.push(format!(
                        "{all} clips of videos are too few to hold out one of {every}: the first is \
                         used for training and for measurements"
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
            return Err(DataError::Empty { dirs, skipped }.into());
        };
        let small = (patch as f64 / scales[1]).round() as usize;
        let mut corpus = Self {
            photos,
            compressed: CompressedClips::serve(&held_out, patch, small),
            held_out: Arc::new(held_out),
            #[cfg(feature = "video")]
            clips,
            #[cfg(feature = "video")]
            pool: None,
            degradation,
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
        progress: &(dyn Fn(Preparation) -> bool + Sync),
        notes: &mut Vec<String>,
    ) -> Result<()> {
        if pooled(&self.spec, &self.degradation).next().is_none() {
            return Ok(());
        }
        let layout = Layout::new(patch, scales);
        let side = layout.side;
        if self.clips.is_none() && self.photos.as_ref().is_none_or(|p| p.large(side) == 0) {
            return Err(Error::Setting(format!(
                "degraded clips need photos or videos with sides of at least {side} pixels: use \
                 larger ones, smaller patches, or for a network without memory a preset without \
                 codecs (stills, clean, real-world)"
            )));
        }
        let degradation = Degradation {
            recipes: pooled(&self.spec, &self.degradation).cloned().collect(),
        };
        let mut hash = Fnv::default();
        (self.content(), self.spec.video_share.to_bits()).hash(&mut hash);
        self.hash_settings(&mut hash);
        let mut pool = Pool::open(
            &self.spec.cache(),
            &self.spec.pool,
            layout,
            degradation,
            hash.finish(),
        )?;
        if pool.len() < self.spec.pool.clips {
            notes.push(format!(
                "the pool's limit of {} MB allows {} of {} compressed clips",
                self.spec.pool.limit,
                pool.len(),
                self.spec.pool.clips
            ));
        }
        pool.prepare(&|rng| self.clean_clip(rng, side), &|done, all| {
            progress(Preparation::Pool { done, all })
        })?;
        self.pool = Some(pool);
        Ok(())
    }

    /// Describes the training data in one line.
    pub fn summary(&self) -> String {
        let photos = self.photos().map_or(0, PhotoSet::len);
        let text = format!("{photos} photos to train on");
        #[cfg(feature = "video")]
        let text = {
            let clips = self
                .clips()
                .map(|clips| format!(", {} clips of videos", clips.len()));
            let pool = self.pool().map(|pool| {
                let (count, mb) = (pool.len(), pool.size() >> 20);
                let folder = pool.folder().display();
                format!(", {count} compressed clips ({mb} MB in '{folder}')")
            });
            text + &clips.unwrap_or_default() + &pool.unwrap_or_default()
        };
        text
    }

    /// Returns the photos without those held out.
    pub fn photos(&self) -> Option<&PhotoSet> {
        self.photos.as_ref()
    }

    /// Returns held-out photos and frames. They are not in the pairs, except one if [`Self::notes`]
    /// says so.
    pub fn held_out(&self) -> Arc<PhotoSet> {
        self.held_out.clone()
    }

    /// Returns the held-out images under some degradations, by name: clean, JPEG of quality 60, and
    /// H.264 of CRF 28 if the codec is available.
    pub fn held_out_kinds(&self) -> Vec<(&'static str, Arc<dyn PairSource>)> {
        let still = |recipe| {
            let photos = self.held_out.clone();
            Arc::new(DegradedPhotos { photos, recipe })
        };
        let mut kinds: Vec<(_, Arc<dyn PairSource>)> = vec![
            ("clean", still(DegradationRecipe::fixed())),
            ("jpeg60", still(DegradationRecipe::jpeg(60))),
        ];
        if self.compressed {
            kinds.push(("h264", Arc::new(CompressedClips(self.held_out.clone()))));
        }
        kinds
    }

    /// Returns the clips of videos without those held out.
    #[cfg(feature = "video")]
    pub fn clips(&self) -> Option<&ClipSet> {
        self.clips.as_ref()
    }

    /// Returns the clips that codecs have compressed.
    #[cfg(feature = "video")]
    pub fn pool(&self) -> Option<&Pool> {
        self.pool.as_ref()
    }

    /// Returns the degradation without missing codecs.
    pub fn degradation(&self) -> &Degradation {
        &self.degradation
    }

    /// Returns the files that were skipped.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Returns notes for the user: missing codecs, limits that were reached, too few files to hold
    /// some out.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Hashes sampling and motion by the names and values of their fields: renaming a field makes
    /// all pools again and separates runs from their checkpoints.
    fn hash_settings(&self, hash: &mut Fnv) {
        format!("{:?}{:?}", self.spec.sampling, self.spec.motion).hash(hash);
    }

    /// Returns a hash of the photos and the clips.
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

    /// Returns the clips if the next image comes from a video.
    #[cfg(feature = "video")]
    fn video(&self, rng: &mut StdRng, photos: bool) -> Option<&ClipSet> {
        let clips = self.clips.as_ref()?;
        (!photos || rng.random_bool(self.spec.video_share)).then_some(clips)
    }

    /// Returns the ground truth of a clip for the pool.
    #[cfg(feature = "video")]
    fn clean_clip(&self, rng: &mut StdRng, side: usize) -> Result<Vec<Patch>> {
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

    /// Returns an image for degradation without codecs.
    fn picture(&self, rng: &mut StdRng, side: usize) -> Result<Patch> {
        #[cfg(feature = "video")]
        if let Some(clips) = self.video(rng, self.photos.is_some()) {
            return clips.sample(rng, side, &self.spec.sampling);
        }
        let photos = self.photos.as_ref().ok_or_else(nothing)?;
        photos.sample(rng, side, side)
    }
}

/// Version of the sampling of pairs, part of the fingerprint.
const VERSION: u32 = 2;

fn nothing() -> Error {
    Error::Data("neither photos nor clips".into())
}

impl PairSource for Corpus {
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
        let recipe = self
            .degradation
            .sample(&mut random.degradation)
            .ok_or_else(nothing)?;
        #[cfg(feature = "video")]
        if let (Some(_), Some(pool)) = (recipe.codecs(), &self.pool) {
            let make = |rng: &mut StdRng| self.clean_clip(rng, pool.layout().side);
            let sampling = &self.spec.sampling;
            let pairs = pool.pairs(&make, sampling, random, (side, small), 1)?;
            return pairs.into_iter().next().ok_or_else(nothing);
        }
        let truth = self.picture(&mut random.content, side)?;
        let degradation = &mut random.degradation;
        let (low, noise) = recipe.picture(&truth, (small, small), degradation)?;
        Ok(Pair { truth, low, noise })
    }

    #[cfg(feature = "video")]
    fn clip(&self, random: &mut Random, sides: (usize, usize), frames: usize) -> Result<Vec<Pair>> {
        let pool = self.pool.as_ref().filter(|_| self.spec.pool.successive);
        let pool = pool.ok_or_else(super::pairs::no_clips)?;
        let make = |rng: &mut StdRng| self.clean_clip(rng, pool.layout().side);
        pool.pairs(&make, &self.spec.sampling, random, sides, frames)
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        (VERSION, self.content()).hash(&mut hash);
        self.degradation.to_toml().hash(&mut hash);
        let shares = (self.spec.video_share.to_bits(), self.spec.hold_out);
        shares.hash(&mut hash);
        self.hash_settings(&mut hash);
        #[cfg(feature = "video")]
        self.pool.as_ref().map(Pool::key).hash(&mut hash);
        hash.finish()
    }
}

/// Returns the codecs, with the error of those that GStreamer lacks on this machine.
pub fn codecs() -> Vec<(Kind, Result<()>)> {
    Kind::ALL
        .into_iter()
        .map(|kind| (kind, kind.try_out()))
        .collect()
}
