//! Photos, decoded once into memory, and random patches of them.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

use image::RgbImage;
use rand::Rng;
use rayon::prelude::*;

use super::{
    files::{DataError, Skipped, decode, image_files},
    sampling::{Sampling, cut, texture},
};
use crate::{Error, frame::resample::Kernel, train::patch::Patch};

/// Photos in memory, 8-bit R'G'B'.
#[derive(Debug)]
pub struct PhotoSet {
    photos: Vec<RgbImage>,
    skipped: Vec<Skipped>,
    min_side: usize,
    pub sampling: Sampling,
}

impl PhotoSet {
    /// Loads every JPEG, PNG, WebP and TIFF file in `dirs`, folders or files, in sorted order, on all cores.
    ///
    /// Files that are damaged or whose shorter side is below `min_side` pixels are skipped, see
    /// [`Self::skipped`]. `progress` is called from several threads with (files done, files in
    /// all).
    ///
    /// # Errors
    /// [`DataError::Read`] for a directory that cannot be read, [`DataError::Empty`] when nothing
    /// is left.
    pub fn load(
        dirs: &[PathBuf],
        min_side: usize,
        progress: impl Fn(usize, usize) + Sync,
    ) -> Result<Self, DataError> {
        let files = image_files(dirs)?;
        let done = AtomicUsize::new(0);
        let decoded: Vec<_> = files
            .par_iter()
            .map(|path| {
                let photo = decode(path).and_then(|photo| large_enough(photo, min_side));
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, files.len());
                photo
            })
            .collect();
        let (mut photos, mut skipped) = (Vec::new(), Vec::new());
        for (path, photo) in files.into_iter().zip(decoded) {
            match photo {
                Ok(photo) => photos.push(photo),
                Err(reason) => skipped.push(Skipped { path, reason }),
            }
        }
        if photos.is_empty() {
            let dirs = dirs.to_vec();
            return Err(DataError::Empty { dirs, skipped });
        }
        Ok(Self {
            photos,
            skipped,
            min_side,
            sampling: Sampling::default(),
        })
    }

    /// Removes every `every`th photo and returns them as a held-out set.
    ///
    /// Photos are in the order of their paths. If there are fewer than `every` photos, the first is
    /// in both sets, see [`Self::too_few`].
    pub fn hold_out(&mut self, every: usize) -> Self {
        let (mut retained, mut taken) = (Vec::new(), Vec::new());
        for (i, photo) in self.photos.drain(..).enumerate() {
            let set = if i % every.max(2) == every.max(2) - 1 {
                &mut taken
            } else {
                &mut retained
            };
            set.push(photo);
        }
        if taken.is_empty() {
            taken.extend(retained.first().cloned());
        }
        self.photos = retained;
        Self {
            photos: taken,
            skipped: Vec::new(),
            min_side: self.min_side,
            sampling: self.sampling.clone(),
        }
    }

    /// Returns a note for the user if [`Self::hold_out`] returns a photo that stays in this set.
    pub fn too_few(&self, every: usize) -> Option<String> {
        let all = self.len();
        (all < every.max(2)).then(|| {
            format!(
                "{all} photos are too few to hold out one of {every}: the first is used for training \
                 and for measurements"
            )
        })
    }

    /// Joins `set` and `more` photos for patches of up to `min_side` pixels, if there are any. All
    /// of `more` are large enough.
    pub(super) fn join(set: Option<Self>, more: Vec<RgbImage>, min_side: usize) -> Option<Self> {
        let mut set = set.unwrap_or_else(|| Self {
            photos: Vec::new(),
            skipped: Vec::new(),
            min_side,
            sampling: Sampling::default(),
        });
        set.photos.extend(more);
        (!set.photos.is_empty()).then_some(set)
    }

    /// Returns a hash of the order, sizes and contents of the photos (every 1009th byte, FNV-1a).
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut mix = |v: u64| hash = (hash ^ v).wrapping_mul(0x0100_0000_01b3);
        for photo in &self.photos {
            mix(u64::from(photo.width()));
            mix(u64::from(photo.height()));
            photo
                .as_raw()
                .iter()
                .step_by(1009)
                .for_each(|&b| mix(u64::from(b)));
        }
        hash
    }

    /// Returns the number of photos.
    pub fn len(&self) -> usize {
        self.photos.len()
    }

    /// Returns `true` if there are no photos. A loaded set has at least one.
    pub fn is_empty(&self) -> bool {
        self.photos.is_empty()
    }

    /// Returns the files that were skipped.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Returns a random patch of `width` x `height` pixels: random photo, position, shrinking,
    /// flips and quarter turns.
    ///
    /// # Errors
    /// [`Error::Data`] when a side is 0 or above the `min_side` that the set was loaded with.
    pub fn sample<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        width: usize,
        height: usize,
    ) -> crate::Result<Patch> {
        let sides = 1..=self.min_side;
        if !sides.contains(&width) || !sides.contains(&height) {
            return Err(Error::Data(format!(
                "no patch of {width}x{height} pixels from photos loaded with a shortest side of {}",
                self.min_side
            )));
        }
        let photo = &self.photos[rng.random_range(0..self.photos.len())];
        let turn = rng.random::<bool>();
        let (w, h) = if turn {
            (height, width)
        } else {
            (width, height)
        };
        let factor = self.factor(rng);
        let source = |len: usize, limit: u32| {
            ((len as f64 / factor).round() as usize).clamp(len, limit as usize)
        };
        let size = (source(w, photo.width()), source(h, photo.height()));
        let position = self.position(rng, photo, size);
        let cut = cut(photo, position, size).resize(w, h, Kernel::CatmullRom)?;
        Ok(cut.turned(turn, rng.random(), rng.random()))
    }

    /// Returns a random square of a photo, of `max` pixels if the photo is large enough, and at
    /// least `min`. It is flipped and turned at random, and not shrunk.
    ///
    /// # Errors
    /// [`Error::Data`] when all photos are smaller than that.
    pub fn square<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        min: usize,
        max: usize,
    ) -> crate::Result<Patch> {
        let short = |photo: &RgbImage| photo.width().min(photo.height()) as usize;
        let large: Vec<_> = self.photos.iter().filter(|p| short(p) >= min).collect();
        if large.is_empty() || min == 0 {
            return Err(Error::Data(format!("no photo has sides of {min} pixels")));
        }
        let photo = large[rng.random_range(0..large.len())];
        let side = short(photo).min(max.max(min));
        let cut = cut(photo, self.position(rng, photo, (side, side)), (side, side));
        Ok(cut.turned(rng.random(), rng.random(), rng.random()))
    }

    /// Returns the number of photos with sides of at least `side` pixels.
    pub fn large(&self, side: usize) -> usize {
        let short = |photo: &&RgbImage| photo.width().min(photo.height()) as usize >= side;
        self.photos.iter().filter(short).count()
    }

    fn factor<R: Rng + ?Sized>(&self, rng: &mut R) -> f64 {
        let s = &self.sampling;
        if rng.random_bool(s.shrink) {
            rng.random_range(s.min_factor..=1.0)
        } else {
            1.0
        }
    }

    /// Returns a position for a patch in `photo`, chosen by [`Sampling`].
    fn position<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        photo: &RgbImage,
        (w, h): (usize, usize),
    ) -> (usize, usize) {
        let (free_x, free_y) = (photo.width() as usize - w, photo.height() as usize - h);
        self.sampling.choose(
            rng,
            |rng| (rng.random_range(0..=free_x), rng.random_range(0..=free_y)),
            |position| texture(photo, position, (w, h)),
        )
    }
}

fn large_enough(photo: RgbImage, min_side: usize) -> Result<RgbImage, String> {
    let (w, h) = photo.dimensions();
    if (w.min(h) as usize) < min_side {
        return Err(format!(
            "{w}x{h} is too small: both sides must be at least {min_side} pixels"
        ));
    }
    Ok(photo)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs, path::Path};

    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    /// Left half flat, right half textured. Colours encode the position.
    fn photo(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let texture = if x > width / 2 {
                (x * 89 + y * 57) % 64
            } else {
                0
            };
            image::Rgb([(x % 256) as u8, (100 + texture) as u8, (y % 256) as u8])
        })
    }

    fn load(dir: &Path, min_side: usize) -> Result<PhotoSet, DataError> {
        PhotoSet::load(&[dir.to_path_buf()], min_side, |_, _| {})
    }

    fn saved(photos: &[(&str, RgbImage)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, photo) in photos {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            photo.save(path).unwrap();
        }
        dir
    }

    #[test]
    fn photos_of_every_depth_of_the_tree_are_loaded_in_sorted_order_once() {
        let dir = saved(&[
            ("b.png", photo(70, 70)),
            ("a/deep/z.PNG", photo(80, 70)),
            ("a/c.jpg", photo(90, 70)),
        ]);
        fs::write(dir.path().join("notes.txt"), "no photo").unwrap();
        let roots = [dir.path().to_path_buf(), dir.path().join("a")];
        let calls = AtomicUsize::new(0);
        let count = |_, total| {
            assert_eq!(total, 3);
            calls.fetch_add(1, Ordering::Relaxed);
        };
        let set = PhotoSet::load(&roots, 64, count).unwrap();
        let widths: Vec<_> = set.photos.iter().map(|p| p.width()).collect();
        assert_eq!(widths, [90, 80, 70]);
        assert_eq!(calls.into_inner(), 3);
        assert!(set.skipped().is_empty());
    }

    #[test]
    fn damaged_and_small_files_are_skipped_and_named() {
        let dir = saved(&[("good.png", photo(70, 70)), ("small.png", photo(70, 20))]);
        let bytes = fs::read(dir.path().join("good.png")).unwrap();
        fs::write(dir.path().join("cut.png"), &bytes[..bytes.len() / 2]).unwrap();
        photo(90, 70).save(dir.path().join("cut.jpg")).unwrap();
        let bytes = fs::read(dir.path().join("cut.jpg")).unwrap();
        fs::write(dir.path().join("cut.jpg"), &bytes[..bytes.len() / 2]).unwrap();
        fs::write(dir.path().join("text.jpg"), "this is no picture").unwrap();
        let set = load(dir.path(), 64).unwrap();
        assert_eq!(set.len(), 1);
        let skipped = set.skipped().iter().map(|s| s.path.file_name().unwrap());
        assert_eq!(
            skipped.collect::<Vec<_>>(),
            ["cut.jpg", "cut.png", "small.png", "text.jpg"]
        );
        assert!(set.skipped()[2].reason.contains("70x20"));
    }

    #[test]
    fn an_empty_set_is_an_error_that_names_directories_and_reasons() {
        let dir = saved(&[("small.png", photo(20, 20))]);
        let text = load(dir.path(), 64).unwrap_err().to_string();
        assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        assert!(
            text.contains("small.png") && text.contains("20x20"),
            "{text}"
        );
        let missing = dir.path().join("nowhere");
        let text = load(&missing, 64).unwrap_err().to_string();
        assert!(text.contains("nowhere"), "{text}");
    }

    #[test]
    fn samples_have_the_asked_size_and_follow_the_seed() {
        let dir = saved(&[("a.png", photo(64, 100)), ("b.png", photo(200, 64))]);
        let set = load(dir.path(), 64).unwrap();
        let sample = |seed| {
            let mut rng = SmallRng::seed_from_u64(seed);
            let sizes = [(64, 64), (48, 16), (1, 64)];
            sizes.map(|(w, h)| set.sample(&mut rng, w, h).unwrap())
        };
        for seed in 0..20 {
            let patches = sample(seed);
            assert_eq!(patches, sample(seed));
            for (patch, (w, h)) in patches.iter().zip([(64, 64), (48, 16), (1, 64)]) {
                assert_eq!((patch.width, patch.height), (w, h));
                assert_eq!(patch.rgb.len(), 3 * w * h);
                assert!(patch.rgb.iter().all(|v| (0.0..=1.0).contains(v)));
            }
        }
        assert_ne!(sample(1), sample(2));
        let mut rng = SmallRng::seed_from_u64(0);
        for (w, h) in [(0, 8), (8, 65)] {
            assert!(set.sample(&mut rng, w, h).is_err());
        }
    }

    #[test]
    fn textured_positions_are_preferred_but_flat_ones_occur() {
        let dir = saved(&[("a.png", photo(256, 64))]);
        let mut set = load(dir.path(), 64).unwrap();
        set.sampling.shrink = 0.0;
        let mut rng = SmallRng::seed_from_u64(5);
        let mut textured = 0;
        for _ in 0..200 {
            let patch = set.sample(&mut rng, 16, 16).unwrap();
            let green = &patch.rgb[256..512];
            textured += usize::from(green.iter().any(|v| *v != green[0]));
        }
        assert!((130..195).contains(&textured), "{textured} of 200");
    }

    #[test]
    fn all_eight_symmetries_occur_and_hold_the_same_pixels() {
        let dir = saved(&[("a.png", photo(64, 64))]);
        let mut set = load(dir.path(), 64).unwrap();
        set.sampling.shrink = 0.0;
        let mut rng = SmallRng::seed_from_u64(6);
        let mut seen = HashSet::new();
        for _ in 0..100 {
            let bytes = set.sample(&mut rng, 64, 64).unwrap().to_rgb8();
            let mut pixels: Vec<_> = bytes.chunks(3).collect();
            pixels.sort();
            let original = photo(64, 64);
            let mut expected: Vec<_> = original.as_raw().chunks(3).collect();
            expected.sort();
            assert_eq!(pixels, expected);
            seen.insert(bytes);
        }
        assert_eq!(seen.len(), 8);
    }

    #[test]
    fn a_photo_is_shrunk_and_not_only_cut() {
        let mut bars = RgbImage::new(128, 128);
        for (x, _, p) in bars.enumerate_pixels_mut() {
            *p = image::Rgb([if x < 64 { 0 } else { 255 }; 3]);
        }
        let dir = saved(&[("a.png", bars)]);
        let mut set = load(dir.path(), 64).unwrap();
        set.sampling.shrink = 1.0;
        set.sampling.min_factor = 0.5;
        let mut rng = SmallRng::seed_from_u64(7);
        // Shrunk by about 0.5, almost every patch contains the edge.
        let between = (0..50).filter(|_| {
            let patch = set.sample(&mut rng, 64, 64).unwrap();
            patch.rgb.iter().any(|v| (0.05..0.95).contains(v))
        });
        assert!(between.count() > 20);
    }
}
