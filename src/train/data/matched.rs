//! Matched images and videos, the same in low and in high resolution, as a source of pairs.

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
};

use image::RgbImage;
use rand::{Rng, rngs::StdRng};
use rayon::prelude::*;

use super::{
    files::{Skipped, decode, files, is_media, is_video},
    pairs::{Pair, PairSource, Random},
    sampling::{Sampling, cut, texture},
};
use crate::{
    Error, Result,
    frame::{Frame, resample::Kernel},
    train::{patch::Patch, random::Fnv},
};

/// Number of frames that are taken from a video, spread over its length.
const FRAMES: usize = 32;

/// Largest accepted shift between a pair, in low-resolution pixels.
const SHIFT: f64 = 0.25;

/// Smallest accepted correlation between a pair.
const CORRELATION: f64 = 0.7;

/// Variance of luma below which an image cannot be aligned, in squared 8-bit steps.
const FLAT: f64 = 4.0;

/// Pairs of one scale, from the least to the most degraded.
#[derive(Clone, Debug)]
pub struct Matched {
    pairs: Vec<Entry>,
    /// Scale as a reduced fraction.
    scale: (usize, usize),
    pub sampling: Sampling,
    skipped: Vec<Skipped>,
}

#[derive(Clone, Debug)]
struct Entry {
    /// Number of the file.
    file: usize,
    low: RgbImage,
    high: RgbImage,
    /// Mean square of the difference in luma between `low` and the shrunk `high`, in squared 8-bit
    /// steps.
    noise: f64,
}

impl Matched {
    /// Loads the images and videos below `low` and `high` that have the same path except for the
    /// extension, and are large enough for patches of `patch` high-resolution pixels. Files that
    /// have no counterpart, another scale than the first pair, or other content are skipped, see
    /// [`Self::skipped`].
    ///
    /// # Errors
    /// [`Error::Setting`] when a folder cannot be read or nothing is left.
    pub fn load(low: &Path, high: &Path, patch: usize) -> Result<Self> {
        let [lows, highs] = [named(low)?, named(high)?];
        let mut skipped = Vec::new();
        for (these, others, other) in [(&lows, &highs, high), (&highs, &lows, low)] {
            let alone = these.iter().filter(|(name, _)| !others.contains_key(*name));
            skipped.extend(alone.map(|(_, path)| Skipped {
                path: path.clone(),
                reason: format!("no file of that name in '{}'", other.display()),
            }));
        }
        let both = lows
            .iter()
            .filter_map(|(name, low)| Some((low, highs.get(name)?)));
        let both: Vec<_> = both.collect();
        let read: Vec<_> = both
            .par_iter()
            .map(|(low, high)| entries(low, high).map_err(|reason| ((*low).clone(), reason)))
            .collect();
        let (mut pairs, mut scale, mut files) = (Vec::new(), None, 0);
        for (entries, (path, _)) in read.into_iter().zip(&both) {
            let checked = entries.and_then(|entries| {
                let wrong = |reason| ((*path).clone(), reason);
                if entries.is_empty() {
                    return Err(wrong("no frames".into()));
                }
                // The size of a video may change.
                for Entry { low, high, .. } in &entries {
                    let of = ratio(low, high).map_err(wrong)?;
                    let (p, q) = *scale.get_or_insert(of);
                    if of != (p, q) {
                        let (a, b) = of;
                        let text = format!("its scale is {a}/{b}, that of the others {p}/{q}");
                        return Err(wrong(text));
                    }
                    if (high.width().min(high.height()) as usize) < patch + p {
                        return Err(wrong(format!("too small for patches of {patch} pixels")));
                    }
                }
                Ok(entries)
            });
            match checked {
                Ok(entries) => {
                    files += 1;
                    pairs.extend(entries.into_iter().map(|e| Entry { file: files, ..e }));
                }
                Err((path, reason)) => skipped.push(Skipped { path, reason }),
            }
        }
        let Some(scale) = scale.filter(|_| !pairs.is_empty()) else {
            let (low, high) = (low.display(), high.display());
            let first = skipped.first();
            let why = first.map(|s| format!("; '{}': {}", s.path.display(), s.reason));
            let why = why.unwrap_or_default();
            let text = format!("no matched pictures or videos in '{low}' and '{high}'{why}");
            return Err(Error::Setting(text));
        };
        if !(patch * scale.1).is_multiple_of(scale.0) {
            return Err(Error::Setting(format!(
                "patch = {patch}: pairs of scale {}/{} need a multiple of {}",
                scale.0, scale.1, scale.0
            )));
        }
        pairs.sort_by(|a, b| a.noise.total_cmp(&b.noise));
        Ok(Self {
            pairs,
            scale,
            sampling: Sampling::default(),
            skipped,
        })
    }

    /// Removes the pairs of every `every`th file and returns them as held out. If there are fewer
    /// files, none are held out. Whole files, because the frames of a video are nearly identical.
    pub fn hold_out(&mut self, every: usize) -> Self {
        let all = std::mem::take(&mut self.pairs).into_iter();
        let (out, retained): (Vec<_>, Vec<_>) = all.partition(|pair| pair.file % every == 0);
        self.pairs = retained;
        Self {
            pairs: out,
            scale: self.scale,
            sampling: self.sampling.clone(),
            skipped: Vec::new(),
        }
    }

    /// Returns the number of pairs of images; a video counts as several.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Returns the number of files on each side.
    pub fn files(&self) -> usize {
        self.pairs.iter().map(|pair| pair.file).max().unwrap_or(0)
    }

    /// Returns `true` if there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Returns the scale.
    pub fn scale(&self) -> f64 {
        self.scale.0 as f64 / self.scale.1 as f64
    }

    /// Returns the files that were skipped.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }
}

impl PairSource for Matched {
    fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
        let (p, q) = self.scale;
        if small * p != side * q || self.pairs.is_empty() {
            let text = format!("pairs of scale {p}/{q} do not serve {side} pixels from {small}");
            return Err(Error::Data(text));
        }
        let i = random.near(self.pairs.len());
        let rng = &mut random.content;
        let Entry {
            low, high, noise, ..
        } = &self.pairs[i];
        // Steps of q low-resolution pixels are whole high-resolution pixels.
        let steps = |len: u32| (len as usize - small) / q;
        let (columns, rows) = (steps(low.width()), steps(low.height()));
        let position = self.sampling.choose(
            rng,
            |rng| {
                let (x, y) = (rng.random_range(0..=columns), rng.random_range(0..=rows));
                ((q * x, q * y), (p * x, p * y))
            },
            |(_, high_at)| texture(high, high_at, (side, side)),
        );
        let (turn, x, y) = (rng.random(), rng.random(), rng.random());
        Ok(Pair {
            truth: cut(high, position.1, (side, side)).turned(turn, x, y),
            low: cut(low, position.0, (small, small)).turned(turn, x, y),
            noise: *noise,
        })
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        self.scale.hash(&mut hash);
        for pair in &self.pairs {
            for image in [&pair.low, &pair.high] {
                image.dimensions().hash(&mut hash);
                let some = image.as_raw().iter().step_by(997);
                some.for_each(|v| v.hash(&mut hash));
            }
        }
        hash.finish()
    }

    fn draw_small(&self, _: &mut StdRng, side: usize, _: [f64; 2], _: f64) -> usize {
        side * self.scale.1 / self.scale.0
    }
}

/// Returns the images and videos below `folder` by their path in it, without the extension.
fn named(folder: &Path) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let found = files(&[folder.to_path_buf()], is_media);
    let found = found.map_err(|e| Error::Setting(e.to_string()))?;
    let name = |path: PathBuf| {
        let inside = path.strip_prefix(folder).unwrap_or(&path);
        (inside.with_extension(""), path)
    };
    Ok(found.into_iter().map(name).collect())
}

/// Returns the pairs of two files after checking them.
fn entries(low: &Path, high: &Path) -> Result<Vec<Entry>, String> {
    let of_high = |e: String| format!("'{}': {e}", high.display());
    let (count, counterpart) = (count(low)?, count(high).map_err(of_high)?);
    if count != counterpart {
        return Err(format!("{count} frames, its counterpart has {counterpart}"));
    }
    let all = FRAMES.min(count);
    let taken: Vec<_> = (0..all).map(|i| i * count / all).collect();
    let lows = pictures(low, &taken)?;
    let highs = pictures(high, &taken).map_err(of_high)?;
    let entry = |(low, high): (RgbImage, RgbImage)| {
        Ok(Entry {
            file: 0,
            noise: aligned(&low, &high)?,
            low,
            high,
        })
    };
    lows.into_iter().zip(highs).map(entry).collect()
}

/// Returns the number of frames of a video, or 1 for an image.
fn count(path: &Path) -> Result<usize, String> {
    if !is_video(path) {
        return Ok(1);
    }
    let mut count = 0;
    each_frame(path, |_| {
        count += 1;
        Ok(())
    })?;
    Ok(count)
}

/// Returns the frames of a video with the numbers `taken`, which rise, or the image.
fn pictures(path: &Path, taken: &[usize]) -> Result<Vec<RgbImage>, String> {
    if !is_video(path) {
        return decode(path).map(|picture| vec![picture]);
    }
    let (mut at, mut retained) = (0, Vec::new());
    each_frame(path, |frame| {
        if taken.get(retained.len()) == Some(&at) {
            let (w, h) = (frame.info().width as u32, frame.info().height as u32);
            let rgb = frame.to_rgb8().map_err(|e| e.to_string())?;
            retained.extend(RgbImage::from_raw(w, h, rgb));
        }
        at += 1;
        Ok(())
    })?;
    Ok(retained)
}

/// Calls `take` for each frame of a video. All of them would not fit into memory.
#[cfg(feature = "video")]
fn each_frame(
    path: &Path,
    mut take: impl FnMut(&Frame) -> Result<(), String>,
) -> Result<(), String> {
    let reader = crate::video::Reader::open(path).map_err(|e| e.to_string())?;
    for frame in reader {
        take(&frame.map_err(|e| e.to_string())?.frame)?;
    }
    Ok(())
}

#[cfg(not(feature = "video"))]
fn each_frame(_: &Path, _: impl FnMut(&Frame) -> Result<(), String>) -> Result<(), String> {
    Err("this program is built without GStreamer (feature 'video')".into())
}

/// Returns the scale of a pair as a reduced fraction.
fn ratio(low: &RgbImage, high: &RgbImage) -> Result<(usize, usize), String> {
    let (lw, lh) = (low.width() as usize, low.height() as usize);
    let (hw, hh) = (high.width() as usize, high.height() as usize);
    let sizes = format!("{lw}x{lh} and {hw}x{hh}");
    if hw * lh != hh * lw {
        return Err(format!("{sizes} pixels have different shapes"));
    }
    if hw <= lw || hw > 4 * lw {
        return Err(format!(
            "{sizes} pixels: a scale above 1, up to 4, is needed"
        ));
    }
    let (mut a, mut b) = (hw, lw);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    Ok((hw / a, lw / a))
}

/// Checks that both images have the same content at the same position. Returns the noise of an
/// [`Entry`].
fn aligned(low: &RgbImage, high: &RgbImage) -> Result<f64, String> {
    ratio(low, high)?;
    let (w, h) = (low.width() as usize, low.height() as usize);
    let patch = |image: &RgbImage| {
        let size = (image.width() as usize, image.height() as usize);
        cut(image, (0, 0), size)
    };
    let shrunk = patch(high).resize(w, h, Kernel::CatmullRom);
    let (low, shrunk) = (patch(low), shrunk.map_err(|e| e.to_string())?);
    // In 8-bit steps.
    let luma = |patch: &Patch| -> Vec<f64> {
        let luma = patch.luma().into_iter();
        luma.map(|v| 255.0 * f64::from(v)).collect()
    };
    let (a, b) = (luma(&low), luma(&shrunk));
    const REACH: usize = 2;
    if w.min(h) <= 4 * REACH {
        return Err("too small to be aligned".into());
    }
    // Mean square of the difference if `a` is shifted by (x, y) pixels, and its parts.
    let moments = |dx: isize, dy: isize| {
        let (mut aa, mut bb, mut ab, mut sa, mut sb, mut n) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for y in REACH..h - REACH {
            for x in REACH..w - REACH {
                let at = y.wrapping_add_signed(dy) * w + x.wrapping_add_signed(dx);
                let (p, q) = (a[at], b[y * w + x]);
                (aa, bb, ab) = (aa + p * p, bb + q * q, ab + p * q);
                (sa, sb, n) = (sa + p, sb + q, n + 1.0);
            }
        }
        let (va, vb) = (aa / n - (sa / n).powi(2), bb / n - (sb / n).powi(2));
        (va, vb, ab / n - sa * sb / n / n)
    };
    let (va, vb, covariance) = moments(0, 0);
    let noise = low.luma_difference(&shrunk);
    if va < FLAT && vb < FLAT {
        return Ok(noise);
    }
    let reach = -(REACH as isize)..=REACH as isize;
    let places = reach
        .clone()
        .flat_map(|dy| reach.clone().map(move |dx| (dx, dy)));
    let error = |(dx, dy): (isize, isize)| {
        let (va, vb, covariance) = moments(dx, dy);
        va + vb - 2.0 * covariance
    };
    let errors = places.map(|position| (error(position), position));
    let best = errors.min_by(|a, b| a.0.total_cmp(&b.0));
    let (x, y) = best.map_or((0, 0), |(_, position)| position);
    // Between whole pixels the error is approximately a parabola.
    let part = |before: f64, at: f64, after: f64| {
        let curve = before - 2.0 * at + after;
        if curve > 0.0 {
            (before - after) / (2.0 * curve)
        } else {
            0.0
        }
    };
    let inside = |v: isize| v.unsigned_abs() < REACH;
    let at = error((x, y));
    let shift = [
        if inside(x) {
            x as f64 + part(error((x - 1, y)), at, error((x + 1, y)))
        } else {
            x as f64
        },
        if inside(y) {
            y as f64 + part(error((x, y - 1)), at, error((x, y + 1)))
        } else {
            y as f64
        },
    ];
    if shift.iter().any(|s| s.abs() > SHIFT) {
        let [x, y] = shift;
        return Err(format!(
            "shifted by ({x:.1}, {y:.1}) pixels against its counterpart"
        ));
    }
    if covariance < CORRELATION * (va * vb).sqrt() {
        return Err("does not show what its counterpart shows".into());
    }
    Ok(noise)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::train::degradation::stages::tests::scene;

    fn image(patch: &Patch) -> RgbImage {
        let (w, h) = (patch.width as u32, patch.height as u32);
        RgbImage::from_raw(w, h, patch.to_rgb8()).unwrap()
    }

    /// Makes folders with pairs of these names: a scene of twice the size, and its shrunk version
    /// after `change`.
    fn folders(pairs: &[(&str, &dyn Fn(Patch) -> Patch)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["low", "high"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        for (name, change) in pairs {
            let high = scene(96, 80);
            let low = high.clone().resize(48, 40, Kernel::CatmullRom).unwrap();
            image(&high)
                .save(dir.path().join("high").join(name))
                .unwrap();
            image(&change(low))
                .save(dir.path().join("low").join(name))
                .unwrap();
        }
        dir
    }

    fn load(dir: &Path) -> Result<Matched> {
        Matched::load(&dir.join("low"), &dir.join("high"), 32)
    }

    fn same(patch: Patch) -> Patch {
        patch
    }

    #[test]
    fn both_images_of_a_pair_have_the_same_content() {
        let dir = folders(&[("a.png", &same), ("b.png", &same)]);
        let matched = load(dir.path()).unwrap();
        assert_eq!((matched.len(), matched.scale()), (2, 2.0));
        for seed in 0..8 {
            let mut random = Random::new(seed, 9);
            let small = matched.draw_small(&mut random.content, 32, [1.0, 2.0], 0.5);
            let pair = matched.pair(&mut random, 32, small).unwrap();
            assert_eq!((pair.truth.width, pair.low.width), (32, 16));
            let shrunk = pair.truth.resize(16, 16, Kernel::CatmullRom).unwrap();
            // At the borders the shrunk ground truth lacks its surroundings.
            let mut worst = 0f32;
            for y in 3..13 {
                for x in 3..13 {
                    let i = y * 16 + x;
                    worst = worst.max((shrunk.rgb[i] - pair.low.rgb[i]).abs());
                }
            }
            assert!(worst < 0.01, "{worst}");
        }
    }

    #[test]
    fn files_that_do_not_match_are_skipped_by_name() {
        let shifted = |by: usize| {
            move |low: Patch| {
                let mut out = low.clone();
                for (i, v) in out.rgb.iter_mut().enumerate() {
                    let x = i % low.width;
                    *v = low.rgb[i - x + (x + by).min(low.width - 1)];
                }
                out
            }
        };
        let mirrored = |low: Patch| low.turned(false, true, false);
        let larger = |low: Patch| low.resize(32, 40, Kernel::CatmullRom).unwrap();
        let one = shifted(1);
        let dir = folders(&[
            ("a.png", &same),
            ("shifted.png", &one),
            ("mirrored.png", &mirrored),
            ("other-shape.png", &larger),
        ]);
        fs::write(dir.path().join("low/alone.png"), "").unwrap();
        let matched = load(dir.path()).unwrap();
        assert_eq!(matched.len(), 1);
        let reason = |name: &str| {
            let mut all = matched.skipped().iter();
            all.find(|s| s.path.ends_with(name)).unwrap().reason.clone()
        };
        assert!(
            reason("shifted.png").contains("shifted by (-1.0, 0.0)"),
            "{}",
            reason("shifted.png")
        );
        assert!(reason("mirrored.png").contains("counterpart"));
        assert!(reason("other-shape.png").contains("different shapes"));
        assert!(reason("alone.png").contains("no file of that name"));
    }

    #[test]
    fn whole_files_are_held_out() {
        let names = ["a.png", "b.png", "c.png", "d.png"];
        let same: &dyn Fn(Patch) -> Patch = &same;
        let dir = folders(&names.map(|name| (name, same)));
        let mut matched = load(dir.path()).unwrap();
        let whole = matched.fingerprint();
        let out = matched.hold_out(2);
        assert_eq!((matched.len(), out.len()), (2, 2));
        assert_ne!(matched.fingerprint(), whole);
        let files = |set: &Matched| set.pairs.iter().map(|pair| pair.file).collect::<Vec<_>>();
        assert!(
            files(&out)
                .iter()
                .all(|file| !files(&matched).contains(file))
        );
        assert!(load(dir.path()).unwrap().hold_out(5).is_empty());
    }

    #[test]
    fn a_sub_pixel_shift_is_detected() {
        let dir = folders(&[("a.png", &|low: Patch| {
            let (w, h) = (low.width, low.height);
            let mut out = low.clone();
            for i in 0..3 * w * h {
                let x = i % w;
                let next = low.rgb[i - x + (x + 1).min(w - 1)];
                out.rgb[i] = 0.5 * (low.rgb[i] + next);
            }
            out
        })]);
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("a.png") && error.contains("shifted"),
            "{error}"
        );
    }
}
