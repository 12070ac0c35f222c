//! Pool of clips that codecs have compressed, on disk, with their ground truth.
//!
//! Encoding a clip for every patch would slow down the training. Clips are therefore encoded and
//! decoded once, some of their frames are retained, and patches are cut out of these at random
//! positions. A clip depends on its number and the description of the pool only: a missing clip is
//! made again on demand, with the same result.

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
/// Clips have whole scales, so that whole low-resolution pixels cover whole pixels of the ground
/// truth. A scale in between uses the next larger one, and its ground truth is shrunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Side of the ground truth in pixels.
    pub side: usize,
    /// Scales in rising order.
    pub scales: Vec<usize>,
}

impl Layout {
    /// Layout for patches of `patch` pixels at scales from `low` to `high`, 1 to 4.
    pub fn new(patch: usize, [low, high]: [f64; 2]) -> Self {
        let above = |s: f64| s > low || s >= high;
        let whole = |s: &usize| above(*s as f64) && ((*s - 1) as f64) < high;
        let scales: Vec<usize> = (2..=4).filter(whole).collect();
        // Largest part of each: at the smallest scale that it serves.
        let need = scales.iter().map(|&s| {
            let smallest = low.max((s - 1) as f64);
            (patch as f64 / smallest).ceil() as usize * s
        });
        // Room for several positions in a clip. A multiple of 48 makes all low-resolution sides
        // even.
        let side = need.max().unwrap_or(patch) * 5 / 4;
        let side = side.max(2 * patch).next_multiple_of(48).max(144);
        Self { side, scales }
    }

    /// Returns the number of clips within the limit of `spec`, and their size in bytes.
    pub fn room(&self, spec: &PoolSpec) -> (usize, u64) {
        let max = (spec.limit << 20) / self.bytes(0, spec).max(1);
        let count = spec.clips.min(usize::try_from(max).unwrap_or(usize::MAX));
        (count, (0..count).map(|i| self.bytes(i, spec)).sum())
    }

    /// Returns the scale of clip `i`: every second clip has the largest scale, the others share the
    /// rest.
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

    /// Returns the size of clip `i` in bytes. A file holds the ground truth and the degraded frame
    /// of each retained frame, as rows of R, G, B, and finally
    /// [`Degraded::noise`](crate::train::degradation::Degraded::noise) as an f32.
    fn bytes(&self, i: usize, spec: &PoolSpec) -> u64 {
        let low = self.side / self.scale(i);
        (3 * (self.side.pow(2) + low.pow(2)) * spec.retained + size_of::<f32>()) as u64
    }

    /// Returns the scale that serves images of `side` pixels from `small`.
    fn scale_for(&self, side: usize, small: usize) -> Result<usize> {
        let inside = |s: &&usize| **s * small <= self.side;
        let mut inside = self.scales.iter().filter(inside);
        // The largest scale may miss a side that it does not divide by a part of a low-resolution
        // pixel.
        let near = self.scales.last();
        let near = near.filter(|&s| s * (small + 1) > side && s * small <= self.side);
        let found = inside.find(|s| **s * small >= side).or(near);
        found.copied().ok_or_else(|| {
            Error::Data(format!(
                "the compressed clips ({} pixels, scales {:?}) do not serve {side} pixels from \
                 {small}",
                self.side, self.scales
            ))
        })
    }
}

/// Function that returns the ground truth of a clip.
pub type Make<'a> = dyn Fn(&mut StdRng) -> Result<Vec<Patch>> + Sync + 'a;

/// Pool of compressed clips.
pub struct Pool {
    folder: PathBuf,
    spec: PoolSpec,
    layout: Layout,
    degradation: Degradation,
    key: u64,
    /// Number of clips and their size in bytes.
    count: usize,
    size: u64,
    /// Clips of each scale of the layout, from the least to the most degraded once they are
    /// prepared.
    ranked: Vec<Vec<usize>>,
}

impl Pool {
    /// Opens the pool in `cache` whose clips are degraded by `degradation`. `source` is a hash of
    /// the data of the ground truth. Clips are not made yet.
    ///
    /// # Errors
    /// [`Error::Setting`] when the limit is too small, [`Error::Io`] when the folder cannot be
    /// made.
    pub fn open(
        cache: &Path,
        spec: &PoolSpec,
        layout: Layout,
        degradation: Degradation,
        source: u64,
    ) -> Result<Self> {
        // The name of the folder is a hash of this text: any change makes all pools again.
        let about = format!(
            "# Clips damaged by codecs. Made by tadsr-train, which makes them again if they are \
             removed.\n\
             # {layout:?}, {} frames, {} kept, seed {}, source {source:016x}\n\n{}",
            spec.frames,
            spec.retained,
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
        if pool.count < PoolSpec::MIN_CLIPS {
            return Err(Error::Setting(format!(
                "pool: limit = {} MB: not room for {} clips of {} bytes",
                spec.limit,
                PoolSpec::MIN_CLIPS,
                pool.bytes(0)
            )));
        }
        fs::create_dir_all(&pool.folder).map_err(Error::io(&pool.folder))?;
        let file = pool.folder.join("about.toml");
        write_atomically(&file, about.as_bytes())?;
        Ok(pool)
    }

    /// Returns the number of clips.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns `true` if there are no clips, which [`Self::open`] refuses.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the sizes of the clips.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the folder of the pool.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns a hash of the description of the clips.
    pub fn key(&self) -> u64 {
        let mut hash = Fnv::default();
        (self.key, self.count).hash(&mut hash);
        hash.finish()
    }

    /// Returns the size of all clips in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes the missing clips, on all cores. `progress` is called from several threads with (clips
    /// done, clips in all) and returns `false` to stop.
    ///
    /// # Errors
    /// Those of `make`, the codec and the disk; [`Error::Cancelled`].
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

    /// Returns `frames` successive images of `side` x `side` pixels and their degraded versions of
    /// `small` x `small` pixels, at a random position on the grid of the codec's blocks in a random
    /// clip, all mirrored and turned alike. They are successive frames of the clip only if all are
    /// retained. Makes a missing clip.
    ///
    /// # Errors
    /// [`Error::Data`] when the pool does not serve such sizes or clips of so many frames; those of
    /// `make`, the codec and the disk.
    pub fn pairs(
        &self,
        make: &Make,
        sampling: &Sampling,
        random: &mut Random,
        (side, small): (usize, usize),
        frames: usize,
    ) -> Result<Vec<Pair>> {
        let scale = self.layout.scale_for(side, small)?;
        let retained = self.spec.retained;
        let Some(last) = retained.checked_sub(frames) else {
            let text = format!("clips of {retained} frames, not {frames}");
            return Err(Error::Data(text));
        };
        let clip = self.choose(random, scale);
        let rng = &mut random.content;
        let first = rng.random_range(0..=last);
        if self.read(clip, first).is_none() {
            self.make(clip, make)?;
        }
        let read = |frame| {
            let gone = || Error::training(self.path(clip), "has just been removed");
            self.read(clip, frame).ok_or_else(gone)
        };
        let clip = (first..first + frames).map(read);
        let clip = clip.collect::<Result<Vec<_>>>()?;
        let Some((truth, low, _)) = clip.first() else {
            return Ok(Vec::new());
        };
        let free = (low.width() as usize - small) / GRID;
        let size = scale * small;
        let large = |(x, y): (usize, usize)| (scale * x, scale * y);
        let position = sampling.choose(
            rng,
            |rng| [0, 1].map(|_| GRID * rng.random_range(0..=free)).into(),
            |position| texture(truth, large(position), (size, size)),
        );
        let (turn, x, y) = (rng.random(), rng.random(), rng.random());
        let pair = |(truth, low, noise): &(RgbImage, RgbImage, f64)| {
            let truth = cut(truth, large(position), (size, size));
            let truth = truth.resize(side, side, Kernel::CatmullRom)?;
            Ok(Pair {
                truth: truth.turned(turn, x, y),
                low: cut(low, position, (small, small)).turned(turn, x, y),
                noise: *noise,
            })
        };
        clip.iter().map(pair).collect()
    }

    /// Returns the number of a clip of `scale`.
    fn choose(&self, random: &mut Random, scale: usize) -> usize {
        let at = self.layout.scales.iter().position(|&s| s == scale);
        let clips = at.map_or(&[][..], |i| &self.ranked[i]);
        clips.get(random.near(clips.len())).copied().unwrap_or(0)
    }

    /// Returns the noise of clip `i`, see [`crate::train::degradation::Degraded`], if the clip
    /// exists.
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
        let nothing = || Error::Data("a pool without recipes".into());
        let mut attempts = 0;
        let degraded = loop {
            let recipe = self.degradation.sample(&mut rng).ok_or_else(nothing)?;
            let degraded = recipe.apply(truth.clone(), (low, low), &mut rng)?;
            attempts += 1;
            if attempts == ATTEMPTS || !is_destroyed(&truth, &degraded.frames) {
                break degraded;
            }
        };
        let (degraded, noise) = (degraded.frames, degraded.noise as f32);
        let mut retained = index::sample(&mut rng, self.spec.frames, self.spec.retained).into_vec();
        retained.sort();
        let mut bytes = Vec::new();
        for t in retained {
            let frame = truth.get(t).zip(degraded.get(t));
            let (truth, degraded) =
                frame.ok_or_else(|| Error::Data("a clip is too short".into()))?;
            bytes.extend(truth.to_rgb8());
            bytes.extend(degraded.to_rgb8());
        }
        bytes.extend(noise.to_le_bytes());
        self.write(i, &bytes)
    }

    /// Writes clip `i` atomically. If several threads make it at the same time, the last one stays.
    fn write(&self, i: usize, bytes: &[u8]) -> Result<()> {
        static WRITTEN: AtomicUsize = AtomicUsize::new(0);
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let part = format!("{}-{number}.part", process::id());
        let part = self.path(i).with_extension(part);
        let written = fs::write(&part, bytes).and_then(|()| fs::rename(&part, self.path(i)));
        written.map_err(|e| {
            // A part that cannot be removed does no harm.
            let _ = fs::remove_file(&part);
            Error::io(&part)(e)
        })
    }

    /// Reads a retained frame of clip `i`, if the clip is complete: ground truth, degraded frame
    /// and the noise of the clip.
    fn read(&self, i: usize, frame: usize) -> Option<(RgbImage, RgbImage, f64)> {
        let mut file = File::open(self.path(i)).ok()?;
        if file.metadata().ok()?.len() != self.bytes(i) {
            return None;
        }
        let frames = self.bytes(i) - size_of::<f32>() as u64;
        let len = frames / self.spec.retained as u64;
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

/// Distance between positions in a frame of low resolution, in pixels: the blocks of a codec lie in
/// a patch as in a whole frame.
const GRID: usize = 8;

/// Version of the clips, part of the name of the folder.
const VERSION: u32 = 5;

/// Degradations that are tried for a clip.
const ATTEMPTS: usize = 20;

/// Share of the variance of luma below which a frame is destroyed.
const DESTROYED: f64 = 0.05;

/// Returns `true` if almost nothing is left of a frame of `truth`. At very low bit rates, encoders
/// leave out the whole of such small clips, and decoders return grey. A network would learn to
/// change grey areas.
fn is_destroyed(truth: &[Patch], degraded: &[Patch]) -> bool {
    let mut frames = truth.iter().zip(degraded);
    frames.any(|(truth, degraded)| variance(degraded) < DESTROYED * variance(truth))
}

/// Returns the variance of luma.
fn variance(frame: &Patch) -> f64 {
    let luma = frame.luma();
    let moment = |power: i32| {
        let sum: f64 = luma.iter().map(|v| f64::from(*v).powi(power)).sum();
        sum / luma.len() as f64
    };
    moment(2) - moment(1).powi(2)
}

/// Separates the random numbers of the pool from those of the training.
const POOL: u64 = 0x504f_4f4c;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clip_that_has_become_grey_is_destroyed() {
        let mut truth = Patch::new(8, 8);
        let texture = |(i, v): (usize, &mut f32)| *v = 0.3 + 0.4 * (i % 3) as f32 / 2.0;
        truth.rgb.iter_mut().enumerate().for_each(texture);
        let mut soft = truth.clone();
        soft.rgb
            .iter_mut()
            .for_each(|v| *v = 0.5 + 0.5 * (*v - 0.5));
        let mut grey = Patch::new(4, 4);
        grey.rgb.fill(0.51);
        assert!(!is_destroyed(&[truth.clone()], &[soft.clone()]));
        let clip = [truth.clone(), truth];
        assert!(is_destroyed(&clip, &[soft, grey.clone()]));
        assert!(
            !is_destroyed(&[grey.clone()], &[grey]),
            "flat from the start"
        );
    }

    /// Another name would make all pools again, which takes hours.
    #[test]
    fn the_name_of_a_pool_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let recipes = Degradation::streaming().coded().cloned().collect();
        let layout = Layout::new(48, [1.25, 2.0]);
        let spec = PoolSpec::default();
        let pool = Pool::open(dir.path(), &spec, layout, Degradation { recipes }, 7).unwrap();
        assert_eq!(pool.folder(), dir.path().join("pool-b8dcf4b62b579af5"));
    }
}
