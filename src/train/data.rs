//! Training photographs, decoded once into memory, and random patches of them.

use std::{
    collections::HashSet,
    fs,
    hash::Hasher,
    io::{self, Cursor},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    Error,
    frame::{
        MAX_SIDE, Matrix,
        resample::{Axis, Kernel, Options, Resampler},
    },
};

/// Bytes that a decoded picture may take.
const MAX_BYTES: u64 = 2 << 30;

/// Why no photographs could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A directory or file that cannot be read.
    #[error("'{path}' cannot be read")]
    Read { path: PathBuf, source: io::Error },
    /// No file that can be used.
    #[error("no usable photo (.jpg, .jpeg, .png) in {}{}", names(.dirs), reasons(.skipped))]
    Empty {
        dirs: Vec<PathBuf>,
        skipped: Vec<Skipped>,
    },
}

/// A file that was left out, and why.
#[derive(Clone, Debug)]
pub struct Skipped {
    pub path: PathBuf,
    pub reason: String,
}

/// Planar R'G'B' samples, 0 (black) to 1 (white).
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Shape [3, height, width], row-major.
    pub rgb: Vec<f32>,
}

/// The hash of Fowler, Noll and Vo (1a): the same on every machine and in every version.
pub(in crate::train) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// How patches are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Places in a photo that compete for a patch; the one with the most texture wins ...
    pub candidates: usize,
    /// ... with this probability; else the first is taken, so that flat areas are seen too.
    pub textured: f64,
    /// Probability that the photo is shrunk first, which removes compression artefacts of the source.
    pub shrink: f64,
    /// Smallest factor of that shrinking, 0 to 1.
    pub min_factor: f64,
}

/// Photographs in memory, 8-bit R'G'B'.
#[derive(Debug)]
pub struct PhotoSet {
    photos: Vec<RgbImage>,
    skipped: Vec<Skipped>,
    min_side: usize,
    pub sampling: Sampling,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            candidates: 3,
            textured: 0.75,
            shrink: 0.5,
            min_factor: 0.5,
        }
    }
}

impl Sampling {
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> crate::Result<()> {
        let shares = [
            ("textured", self.textured, 0.0),
            ("shrink", self.shrink, 0.0),
            ("min_factor", self.min_factor, 0.1),
        ];
        for (name, value, least) in shares {
            if !(least..=1.0).contains(&value) {
                let text = format!("sampling: {name} = {value}: {least} to 1");
                return Err(Error::Setting(text));
            }
        }
        if !(1..=100).contains(&self.candidates) {
            let text = format!("sampling: candidates = {}: 1 to 100", self.candidates);
            return Err(Error::Setting(text));
        }
        Ok(())
    }
}

impl Sampling {
    /// One of the places that `draw` gives: the one with the most `detail`, or just the first.
    pub(super) fn choose<T: Copy, R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        mut draw: impl FnMut(&mut R) -> T,
        detail: impl Fn(T) -> u64,
    ) -> T {
        let first = draw(rng);
        let others: Vec<_> = (1..self.candidates).map(|_| draw(rng)).collect();
        if !rng.random_bool(self.textured) {
            return first;
        }
        let all = others.into_iter().chain([first]);
        all.max_by_key(|&place| detail(place)).unwrap_or(first)
    }
}

impl PhotoSet {
    /// Loads every JPEG and PNG file below `dirs` (a file may be named too) in sorted order, on all cores.
    ///
    /// Files that are damaged or whose shorter side is below `min_side` pixels are left out and listed in
    /// [`Self::skipped`]. `progress` is called from several threads with (files done, files in all).
    ///
    /// # Errors
    /// [`DataError::Read`] for a directory that cannot be read, [`DataError::Empty`] when nothing is left.
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

    /// Takes every `every`th photo out into a set of its own, to measure on what was not trained on.
    ///
    /// Photos are in the order of their paths; with fewer than `every` photos the first is taken and stays in both:
    /// [`Self::too_few`] says so.
    pub fn hold_out(&mut self, every: usize) -> Self {
        let (mut kept, mut taken) = (Vec::new(), Vec::new());
        for (i, photo) in self.photos.drain(..).enumerate() {
            let set = if i % every.max(2) == every.max(2) - 1 {
                &mut taken
            } else {
                &mut kept
            };
            set.push(photo);
        }
        if taken.is_empty() {
            taken.extend(kept.first().cloned());
        }
        self.photos = kept;
        Self {
            photos: taken,
            skipped: Vec::new(),
            min_side: self.min_side,
            sampling: self.sampling.clone(),
        }
    }

    /// What to tell the user where [`Self::hold_out`] takes a photo that is trained on.
    pub fn too_few(&self, every: usize) -> Option<String> {
        let all = self.len();
        (all < every.max(2)).then(|| {
            format!(
                "{all} photos are too few to hold one of {every} out: the first is trained on and measured on"
            )
        })
    }

    /// The photos of `set` and `more` ones, if there are any, for patches of up to `min_side` pixels. All of `more` are
    /// large enough.
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

    /// A number that changes with the photos: their order, sizes and contents (every 1009th byte, FNV-1a).
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

    /// Number of photos.
    pub fn len(&self) -> usize {
        self.photos.len()
    }

    /// Never: an empty set is an error of [`Self::load`].
    pub fn is_empty(&self) -> bool {
        self.photos.is_empty()
    }

    /// The files that were left out.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// A random patch of `width` x `height` pixels: random photo, place, shrinking, flips and quarter turns.
    ///
    /// # Errors
    /// [`Error::Frame`] when a side is 0 or above the `min_side` that the set was loaded with.
    pub fn sample<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        width: usize,
        height: usize,
    ) -> crate::Result<Patch> {
        let sides = 1..=self.min_side;
        if !sides.contains(&width) || !sides.contains(&height) {
            return Err(Error::Frame(format!(
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
        let place = self.place(rng, photo, size);
        let cut = cut(photo, place, size).resize(w, h, Kernel::CatmullRom)?;
        Ok(cut.turned(turn, rng.random(), rng.random()))
    }

    /// A random square of a photo with sides of at least `least` pixels and of `most` where the photo allows it, as it
    /// is but for flips and quarter turns.
    ///
    /// # Errors
    /// [`Error::Frame`] when all photos are smaller than that.
    pub fn square<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        least: usize,
        most: usize,
    ) -> crate::Result<Patch> {
        let short = |photo: &RgbImage| photo.width().min(photo.height()) as usize;
        let large: Vec<_> = self.photos.iter().filter(|p| short(p) >= least).collect();
        if large.is_empty() || least == 0 {
            return Err(Error::Frame(format!(
                "no photo has sides of {least} pixels"
            )));
        }
        let photo = large[rng.random_range(0..large.len())];
        let side = short(photo).min(most.max(least));
        let cut = cut(photo, self.place(rng, photo, (side, side)), (side, side));
        Ok(cut.turned(rng.random(), rng.random(), rng.random()))
    }

    /// The number of photos with sides of at least `side` pixels.
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

    /// Where in `photo` a patch of `size` is taken: candidates are drawn and the textured one is preferred.
    fn place<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        photo: &RgbImage,
        (w, h): (usize, usize),
    ) -> (usize, usize) {
        let (free_x, free_y) = (photo.width() as usize - w, photo.height() as usize - h);
        self.sampling.choose(
            rng,
            |rng| (rng.random_range(0..=free_x), rng.random_range(0..=free_y)),
            |place| texture(photo, place, (w, h)),
        )
    }
}

impl Patch {
    /// A black patch.
    pub fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            rgb: vec![0.0; 3 * width * height],
        }
    }

    /// From interleaved 8-bit R'G'B'.
    pub fn from_rgb8(width: usize, height: usize, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 3 * width * height, "three bytes a pixel");
        let plane = |c: usize| bytes[c..].iter().step_by(3).map(|&v| f32::from(v) / 255.0);
        let rgb = plane(0).chain(plane(1)).chain(plane(2)).collect();
        Self { width, height, rgb }
    }

    /// As interleaved 8-bit R'G'B', rounded and clamped.
    pub fn to_rgb8(&self) -> Vec<u8> {
        let area = self.width * self.height;
        (0..area)
            .flat_map(|i| [0, 1, 2].map(|c| self.rgb[c * area + i]))
            .map(|v| (v * 255.0).round().clamp(0.0, 255.0) as u8)
            .collect()
    }

    /// Resampled to `width` x `height` (antialiased where it shrinks), clamped to 0..1.
    ///
    /// # Errors
    /// [`Error::Frame`] when a side is 0.
    pub fn resize(self, width: usize, height: usize, kernel: Kernel) -> crate::Result<Self> {
        if (self.width, self.height) == (width, height) {
            return Ok(self);
        }
        if self.rgb.is_empty() || width == 0 || height == 0 {
            return Err(Error::Frame(format!(
                "a patch of {}x{} pixels cannot become {width}x{height}",
                self.width, self.height
            )));
        }
        let axis = |src, dst| {
            let options = Options {
                antialias: dst < src,
                ..Options::default()
            };
            Axis::new(src, dst, kernel, options)
        };
        let resampler = Resampler::new(axis(self.width, width), axis(self.height, height));
        let mut out = Self::new(width, height);
        let planes = self.rgb.chunks_exact(self.width * self.height);
        for (src, dst) in planes.zip(out.rgb.chunks_exact_mut(width * height)) {
            resampler.run(src, dst);
            dst.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
        }
        Ok(out)
    }

    /// Luma (BT.709), 0 to 1, `[height, width]`.
    pub fn luma(&self) -> Vec<f32> {
        let area = self.width * self.height;
        let (r, rest) = self.rgb.split_at(area);
        let (g, b) = rest.split_at(area);
        let (kr, kg, kb) = Matrix::Bt709.luma_weights();
        let pixels = r.iter().zip(g).zip(b);
        pixels.map(|((r, g), b)| kr * r + kg * g + kb * b).collect()
    }

    /// Mean square of the difference in luma (BT.709) to `other`, of the same size, in squared
    /// 8-bit steps.
    pub fn luma_difference(&self, other: &Self) -> f64 {
        let (a, b) = (self.luma(), other.luma());
        let squares = a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2));
        255.0 * 255.0 * squares.sum::<f64>() / a.len().max(1) as f64
    }

    /// The upper left part of `width` x `height` pixels.
    ///
    /// # Panics
    /// When the patch is smaller.
    pub fn top_left(&self, width: usize, height: usize) -> Self {
        assert!(
            width <= self.width && height <= self.height,
            "a part of a patch"
        );
        let mut out = Self::new(width, height);
        for (c, plane) in self.rgb.chunks_exact(self.width * self.height).enumerate() {
            for (y, row) in plane.chunks_exact(self.width).take(height).enumerate() {
                out.rgb[(c * height + y) * width..][..width].copy_from_slice(&row[..width]);
            }
        }
        out
    }

    /// Transposed if `turn`, then mirrored: with both mirrors the eight symmetries of the square.
    pub(super) fn turned(self, turn: bool, mirror_x: bool, mirror_y: bool) -> Self {
        let (width, height) = if turn {
            (self.height, self.width)
        } else {
            (self.width, self.height)
        };
        let mut out = Self::new(width, height);
        let planes = self.rgb.chunks_exact(width * height);
        for (src, dst) in planes.zip(out.rgb.chunks_exact_mut(width * height)) {
            for (y, row) in dst.chunks_exact_mut(width).enumerate() {
                let sy = if mirror_y { height - 1 - y } else { y };
                for (x, v) in row.iter_mut().enumerate() {
                    let sx = if mirror_x { width - 1 - x } else { x };
                    let at = if turn {
                        sx * self.width + sy
                    } else {
                        sy * self.width + sx
                    };
                    *v = src[at];
                }
            }
        }
        out
    }
}

/// The JPEG and PNG files below `dirs`, sorted, each once; directories that link back to a parent end there.
///
/// # Errors
/// [`DataError::Read`] for a directory that cannot be read.
pub fn image_files(dirs: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    files(dirs, is_image)
}

/// As [`image_files`], for the files that are `wanted`; those that `dirs` names are taken as they are.
///
/// # Errors
/// [`DataError::Read`] for a directory that cannot be read.
pub fn files(dirs: &[PathBuf], wanted: fn(&Path) -> bool) -> Result<Vec<PathBuf>, DataError> {
    fn visit(
        path: &Path,
        wanted: fn(&Path) -> bool,
        seen: &mut HashSet<PathBuf>,
        files: &mut Vec<PathBuf>,
    ) -> Result<(), DataError> {
        let at = |source| DataError::Read {
            path: path.to_path_buf(),
            source,
        };
        // A dangling link stays in the list: decoding it says what is wrong.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        if !seen.insert(real) {
            return Ok(());
        }
        if !path.is_dir() {
            files.push(path.to_path_buf());
            return Ok(());
        }
        for entry in fs::read_dir(path).map_err(at)? {
            let path = entry.map_err(at)?.path();
            if path.is_dir() || wanted(&path) {
                visit(&path, wanted, seen, files)?;
            }
        }
        Ok(())
    }
    let (mut seen, mut files) = (HashSet::new(), Vec::new());
    for dir in dirs {
        // A dangling link is there: what is read from it is left out, with the reason.
        fs::symlink_metadata(dir).map_err(|source| DataError::Read {
            path: dir.clone(),
            source,
        })?;
        visit(dir, wanted, &mut seen, &mut files)?;
    }
    files.sort();
    Ok(files)
}

/// Decodes a JPEG or PNG file, recognised by its content, to 8-bit R'G'B'.
///
/// # Errors
/// The reason as text: missing, damaged, not an image.
pub fn decode(path: &Path) -> Result<RgbImage, String> {
    let bytes = read_picture(path)?;
    let format = image::guess_format(&bytes).map_err(|e| e.to_string())?;
    if format == ImageFormat::Jpeg && !jpeg_is_whole(&bytes) {
        return Err("the file ends in the middle of the picture".into());
    }
    let decoder = ImageReader::with_format(Cursor::new(&bytes), format).into_decoder();
    let decoder = decoder.map_err(|e| e.to_string())?;
    check_size(&decoder)?;
    let image = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?;
    Ok(image.into_rgb8())
}

/// The bytes of the file `path`; a pipe or device, which might never end, is refused.
///
/// # Errors
/// The reason as text.
pub fn read_picture(path: &Path) -> Result<Vec<u8>, String> {
    let file = fs::metadata(path).map_err(|e| e.to_string())?;
    if !file.is_file() {
        return Err("not a regular file".into());
    }
    fs::read(path).map_err(|e| e.to_string())
}

/// Refuses a picture that would need more memory than a frame may: its header alone can claim any size.
///
/// # Errors
/// The reason as text.
pub fn check_size(decoder: &impl ImageDecoder) -> Result<(), String> {
    let (w, h) = decoder.dimensions();
    if w.max(h) as usize > MAX_SIDE || decoder.total_bytes() > MAX_BYTES {
        return Err(format!(
            "{w}x{h} pixels are too many: sides may be up to {MAX_SIDE}, and all samples up to {} MiB",
            MAX_BYTES >> 20
        ));
    }
    Ok(())
}

/// Whether an end marker follows the last scan: the decoder fills up a picture that breaks off with grey. In a
/// scan 0xFF is followed by 0 or a restart marker, so neither marker can appear by chance.
pub fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let last = |marker: u8| bytes.windows(2).rposition(|w| w == [0xFF, marker]);
    last(0xD9) > last(0xDA)
}

/// Whether `path` has the name of a JPEG or PNG file.
pub fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    extension.is_some_and(|e| e == "jpg" || e == "jpeg" || e == "png")
}

/// Whether `path` has the name of a video file.
pub fn is_video(path: &Path) -> bool {
    const NAMES: [&str; 18] = [
        "mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mts", "m2ts", "mpg", "mpeg", "ogv",
        "flv", "wmv", "3gp", "y4m", "mxf", "vob",
    ];
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    extension.is_some_and(|e| NAMES.iter().any(|name| e == *name))
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

/// Mean absolute difference of neighbours in green, sampled on every second pixel. It grows with detail; the
/// absolute value, not the square, so that a few hard edges do not outweigh fine texture.
pub(super) fn texture(photo: &RgbImage, (x0, y0): (usize, usize), (w, h): (usize, usize)) -> u64 {
    let stride = 3 * photo.width() as usize;
    let bytes = photo.as_raw();
    let mut sum = 0;
    for y in (y0..y0 + h - 1).step_by(2) {
        for x in (x0..x0 + w - 1).step_by(2) {
            let at = y * stride + 3 * x + 1;
            let v = bytes[at];
            sum += u64::from(v.abs_diff(bytes[at + 3])) + u64::from(v.abs_diff(bytes[at + stride]));
        }
    }
    sum
}

pub(super) fn cut(photo: &RgbImage, (x0, y0): (usize, usize), (w, h): (usize, usize)) -> Patch {
    let row = 3 * photo.width() as usize;
    let rows = photo.as_raw().chunks_exact(row).skip(y0).take(h);
    let bytes: Vec<u8> = rows
        .flat_map(|r| &r[3 * x0..3 * (x0 + w)])
        .copied()
        .collect();
    Patch::from_rgb8(w, h, &bytes)
}

fn names(paths: &[PathBuf]) -> String {
    let quoted: Vec<_> = paths.iter().map(|p| format!("'{}'", p.display())).collect();
    quoted.join(", ")
}

fn reasons(skipped: &[Skipped]) -> String {
    let first = skipped.first();
    first.map_or_else(String::new, |s| {
        format!(
            "; {} left out, such as '{}': {}",
            skipped.len(),
            s.path.display(),
            s.reason
        )
    })
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    /// Left half flat, right half textured; every pixel's colours say where it lies.
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
    fn damaged_and_small_files_are_left_out_and_named() {
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
        let draw = |seed| {
            let mut rng = SmallRng::seed_from_u64(seed);
            let sizes = [(64, 64), (48, 16), (1, 64)];
            sizes.map(|(w, h)| set.sample(&mut rng, w, h).unwrap())
        };
        for seed in 0..20 {
            let patches = draw(seed);
            assert_eq!(patches, draw(seed));
            for (patch, (w, h)) in patches.iter().zip([(64, 64), (48, 16), (1, 64)]) {
                assert_eq!((patch.width, patch.height), (w, h));
                assert_eq!(patch.rgb.len(), 3 * w * h);
                assert!(patch.rgb.iter().all(|v| (0.0..=1.0).contains(v)));
            }
        }
        assert_ne!(draw(1), draw(2));
        let mut rng = SmallRng::seed_from_u64(0);
        for (w, h) in [(0, 8), (8, 65)] {
            assert!(set.sample(&mut rng, w, h).is_err());
        }
    }

    #[test]
    fn textured_places_are_preferred_but_flat_ones_are_seen() {
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
    fn all_eight_symmetries_are_drawn_and_hold_the_same_pixels() {
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
        // A factor near 0.5 shows the edge from any place that a full-size cut could miss.
        let between = (0..50).filter(|_| {
            let patch = set.sample(&mut rng, 64, 64).unwrap();
            patch.rgb.iter().any(|v| (0.05..0.95).contains(v))
        });
        assert!(between.count() > 20);
    }
}
