//! A pool of clips that codecs have compressed, on disk, together with what they were before.
//!
//! Encoding a clip for every patch would starve the training. So a clip is encoded and decoded once, some of its frames
//! are kept, and patches are cut out of them at random places. What a clip is depends on its number and the pool's seed
//! alone: one that is missing is made when it is needed, and is the same as if it had been made before.

use std::{
    fs::{self, File},
    hash::{Hash, Hasher},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use image::RgbImage;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::index};
use rayon::prelude::*;

use super::{
    pairs::{Pair, Random},
    sampling::{Sampling, cut, texture},
    spec::PoolSpec,
};
use crate::{
    Error, Result,
    frame::resample::Kernel,
    train::{
        checkpoint::write_atomically,
        degradation::Degradation,
        patch::Patch,
        random::{Fnv, step_seed},
    },
};

/// Sizes of the clips for patches of one size and a range of scales.
///
/// Clips are made at whole scales, so that every cut-out of whole low-resolution pixels covers whole pixels of the truth.
/// A scale in between takes the next larger whole one, and its truth is shrunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Side of the truth in pixels.
    pub side: usize,
    /// The scales, rising.
    pub scales: Vec<usize>,
}

impl Layout {
    /// For patches of `patch` pixels at scales from `low` to `high`, of 1 to 4.
    pub fn new(patch: usize, [low, high]: [f64; 2]) -> Self {
        let above = |s: f64| s > low || s >= high;
        let whole = |s: &usize| above(*s as f64) && ((*s - 1) as f64) < high;
        let scales: Vec<usize> = (2..=4).filter(whole).collect();
        // The largest cut-out of each: at the smallest scale that it serves.
        let need = scales.iter().map(|&s| {
            let smallest = low.max((s - 1) as f64);
            (patch as f64 / smallest).ceil() as usize * s
        });
        // Some room around it, for several places in a clip. 48 makes all low-resolution sides even.
        let side = need.max().unwrap_or(patch) * 5 / 4;
        let side = side.max(2 * patch).next_multiple_of(48).max(144);
        Self { side, scales }
    }

    /// The number of clips that the limit of `spec` allows, and their bytes.
    pub fn room(&self, spec: &PoolSpec) -> (usize, u64) {
        let most = (spec.limit << 20) / self.bytes(0, spec).max(1);
        let count = spec.clips.min(usize::try_from(most).unwrap_or(usize::MAX));
        (count, (0..count).map(|i| self.bytes(i, spec)).sum())
    }

    /// The scale of clip `i`: every second one has the largest, the others take turns.
    fn scale(&self, i: usize) -> usize {
        match &self.scales[..] {
            [] => 1,
            [only] => *only,
            [others @ .., largest] => match i % 2 {
                0 => *largest,
                _ => others[i / 2 % others.len()],
            },
        }
    }

    /// Bytes of clip `i`: for each kept frame the truth, then the degraded one, rows of R, G, B;
    /// last what noise and compression have changed, a float in squared 8-bit steps.
    fn bytes(&self, i: usize, spec: &PoolSpec) -> u64 {
        let low = self.side / self.scale(i);
        (3 * (self.side.pow(2) + low.pow(2)) * spec.kept + size_of::<f32>()) as u64
    }

    /// Which of the scales serves pictures of `side` pixels from `small`.
    fn scale_for(&self, side: usize, small: usize) -> Result<usize> {
        let inside = |s: &&usize| **s * small <= self.side;
        let mut inside = self.scales.iter().filter(inside);
        // A side that the largest scale does not divide may be missed by a part of a low-resolution pixel.
        let near = self.scales.last();
        let near = near.filter(|&s| s * (small + 1) > side && s * small <= self.side);
        let found = inside.find(|s| **s * small >= side).or(near);
        found.copied().ok_or_else(|| {
            Error::Frame(format!(
                "the compressed clips ({} pixels, scales {:?}) do not serve {side} pixels from {small}",
                self.side, self.scales
            ))
        })
    }
}

/// What gives the truth of a clip.
pub type Make<'a> = dyn Fn(&mut StdRng) -> Result<Vec<Patch>> + Sync + 'a;

/// The pool.
pub struct Pool {
    folder: PathBuf,
    spec: PoolSpec,
    layout: Layout,
    degradation: Degradation,
    key: u64,
    /// The number of clips and their bytes.
    count: usize,
    size: u64,
    /// For each of the layout's scales its clips, from the least to the most degraded once they are
    /// prepared.
    ranked: Vec<Vec<usize>>,
}

impl Pool {
    /// The pool in `cache` whose clips are degraded by the recipes of `degradation`; `source` is a number that changes with what
    /// their truth is made of. Nothing is made yet.
    ///
    /// # Errors
    /// [`Error::Setting`] when the limit is too small, [`Error::Io`] when the folder cannot be made.
    pub fn open(
        cache: &Path,
        spec: &PoolSpec,
        layout: Layout,
        degradation: Degradation,
        source: u64,
    ) -> Result<Self> {
        let about = format!(
            "# Clips damaged by codecs. Made by tadsr-train, which makes them again if they are removed.\n\
             # {layout:?}, {} frames, {} kept, seed {}, source {source:016x}\n\n{}",
            spec.frames,
            spec.kept,
            spec.seed,
            degradation.to_toml()
        );
        let mut hash = Fnv::default();
        (VERSION, &about).hash(&mut hash);
        let key = hash.finish();
        let mut pool = Self {
            folder: cache.join(format!("pool-{key:016x}")),
            spec: spec.clone(),
            layout,
            degradation,
            key,
            count: 0,
            size: 0,
            ranked: Vec::new(),
        };
        (pool.count, pool.size) = pool.layout.room(spec);
        let of_scale = |&scale: &usize| {
            let clips = (0..pool.count).filter(|&i| pool.layout.scale(i) == scale);
            clips.collect()
        };
        pool.ranked = pool.layout.scales.iter().map(of_scale).collect();
        if pool.count < PoolSpec::LEAST {
            return Err(Error::Setting(format!(
                "pool: limit = {} MB: not room for {} clips of {} bytes",
                spec.limit,
                PoolSpec::LEAST,
                pool.bytes(0)
            )));
        }
        fs::create_dir_all(&pool.folder).map_err(Error::io(&pool.folder))?;
        let file = pool.folder.join("about.toml");
        write_atomically(&file, about.as_bytes())?;
        Ok(pool)
    }

    /// The number of clips.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The clips' sizes.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A number that changes with the clips.
    pub fn key(&self) -> u64 {
        let mut hash = Fnv::default();
        (self.key, self.count).hash(&mut hash);
        hash.finish()
    }

    /// Bytes of all clips, when they have been made.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes the clips that are not there yet, on all cores. `progress` is called from several threads with (clips there,
    /// clips in all); false stops.
    ///
    /// # Errors
    /// What `make`, a codec or the disk says; [`Error::Cancelled`].
    pub fn prepare(
        &mut self,
        make: &Make,
        progress: &(dyn Fn(usize, usize) -> bool + Sync),
    ) -> Result<()> {
        let there = |i: usize| {
            let file = fs::metadata(self.path(i));
            file.is_ok_and(|m| m.len() == self.bytes(i))
        };
        let missing: Vec<_> = (0..self.count).filter(|&i| !there(i)).collect();
        let done = AtomicUsize::new(self.count - missing.len());
        let stopped = AtomicBool::new(false);
        missing.into_par_iter().try_for_each(|i| {
            if stopped.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            self.make(i, make)?;
            if !progress(done.fetch_add(1, Ordering::Relaxed) + 1, self.count) {
                stopped.store(true, Ordering::Relaxed);
            }
            Ok(())
        })?;
        let noise: Vec<f32> = (0..self.count)
            .map(|i| self.noise(i).unwrap_or(0.0))
            .collect();
        for clips in &mut self.ranked {
            clips.sort_by(|&a, &b| noise[a].total_cmp(&noise[b]));
        }
        Ok(())
    }

    /// A picture of `side` x `side` pixels and its degraded version of `small` x `small` pixels, at
    /// a random place of a frame of a random clip, both mirrored and turned. A clip that is not
    /// there is made.
    ///
    /// # Errors
    /// [`Error::Frame`] when the pool is not for such sizes; what `make`, a codec or the disk says.
    pub fn pair(
        &self,
        make: &Make,
        sampling: &Sampling,
        random: &mut Random,
        side: usize,
        small: usize,
    ) -> Result<Pair> {
        let scale = self.layout.scale_for(side, small)?;
        let clip = self.draw(random, scale);
        let rng = &mut random.content;
        let frame = rng.random_range(0..self.spec.kept);
        let (truth, low, noise) = match self.read(clip, frame) {
            Some(frame) => frame,
            None => {
                self.make(clip, make)?;
                let gone = || Error::training(self.path(clip), "has just been removed");
                self.read(clip, frame).ok_or_else(gone)?
            }
        };
        let free = low.width() as usize - small;
        let size = scale * small;
        let large = |(x, y): (usize, usize)| (scale * x, scale * y);
        let place = sampling.choose(
            rng,
            |rng| (rng.random_range(0..=free), rng.random_range(0..=free)),
            |place| texture(&truth, large(place), (size, size)),
        );
        let low = cut(&low, place, (small, small));
        let truth =
            cut(&truth, large(place), (size, size)).resize(side, side, Kernel::CatmullRom)?;
        let (turn, x, y) = (rng.random(), rng.random(), rng.random());
        Ok(Pair {
            truth: truth.turned(turn, x, y),
            low: low.turned(turn, x, y),
            noise,
        })
    }

    /// A clip of `scale`.
    fn draw(&self, random: &mut Random, scale: usize) -> usize {
        let at = self.layout.scales.iter().position(|&s| s == scale);
        let clips = at.map_or(&[][..], |i| &self.ranked[i]);
        clips.get(random.near(clips.len())).copied().unwrap_or(0)
    }

    /// Returns the noise of clip `i` (see [`crate::train::degradation::Degraded`]) if the clip is there.
    fn noise(&self, i: usize) -> Option<f32> {
        let mut file = File::open(self.path(i)).ok()?;
        let mut bytes = [0; size_of::<f32>()];
        file.seek(SeekFrom::End(-(bytes.len() as i64))).ok()?;
        file.read_exact(&mut bytes).ok()?;
        Some(f32::from_le_bytes(bytes))
    }

    fn bytes(&self, i: usize) -> u64 {
        self.layout.bytes(i, &self.spec)
    }

    fn path(&self, i: usize) -> PathBuf {
        self.folder.join(format!("{i:06}.rgb"))
    }

    fn make(&self, i: usize, make: &Make) -> Result<()> {
        let mut rng = StdRng::seed_from_u64(step_seed(self.spec.seed ^ POOL, i as u64));
        let truth = make(&mut rng)?;
        let low = self.layout.side / self.layout.scale(i);
        let nothing = || Error::Frame("a pool without recipes".into());
        let recipe = self.degradation.draw(&mut rng).ok_or_else(nothing)?;
        let degraded = recipe.apply(truth.clone(), (low, low), &mut rng)?;
        let (degraded, noise) = (degraded.frames, degraded.noise as f32);
        let mut kept = index::sample(&mut rng, self.spec.frames, self.spec.kept).into_vec();
        kept.sort();
        let mut bytes = Vec::new();
        for t in kept {
            let frame = truth.get(t).zip(degraded.get(t));
            let (truth, degraded) = frame.ok_or_else(|| Error::Frame("a clip is short".into()))?;
            bytes.extend(truth.to_rgb8());
            bytes.extend(degraded.to_rgb8());
        }
        bytes.extend(noise.to_le_bytes());
        self.write(i, &bytes)
    }

    /// Puts clip `i` in its place at once; of several threads that make it at the same time, the last one's stays.
    fn write(&self, i: usize, bytes: &[u8]) -> Result<()> {
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let part = format!("{}-{number}.part", process::id());
        let part = self.path(i).with_extension(part);
        let written = fs::write(&part, bytes).and_then(|()| fs::rename(&part, self.path(i)));
        written.map_err(|e| {
            // Nothing more can be done about a file that is in nobody's way.
            let _ = fs::remove_file(&part);
            Error::io(&part)(e)
        })
    }

    /// A kept frame of clip `i`, if the clip is there and whole: the truth, the degraded one and the
    /// clip's noise.
    fn read(&self, i: usize, frame: usize) -> Option<(RgbImage, RgbImage, f64)> {
        let mut file = File::open(self.path(i)).ok()?;
        if file.metadata().ok()?.len() != self.bytes(i) {
            return None;
        }
        let frames = self.bytes(i) - size_of::<f32>() as u64;
        let len = frames / self.spec.kept as u64;
        let mut bytes = vec![0; len as usize];
        file.seek(SeekFrom::Start(frame as u64 * len)).ok()?;
        file.read_exact(&mut bytes).ok()?;
        let (side, low) = (self.layout.side, self.layout.side / self.layout.scale(i));
        let degraded = bytes.split_off(3 * side * side);
        let image = |side: usize, bytes| RgbImage::from_raw(side as u32, side as u32, bytes);
        let (truth, degraded) = image(side, bytes).zip(image(low, degraded))?;
        Some((truth, degraded, self.noise(i)?.into()))
    }
}

/// Counts the changes in what clips are made of.
const VERSION: u32 = 4;
/// Separates the random numbers of the pool from those of the training.
const POOL: u64 = 0x504f_4f4c;
