//! Clips of videos: successive frames of the same square.
//!
//! Videos are decoded once, through GStreamer, on all cores. Textured squares are cut out and
//! stored in a cache of bounded size that later runs use again.

use std::{
    fs,
    fs::File,
    hash::{Hash, Hasher},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use image::RgbImage;
use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{
    files::Skipped,
    sampling::{Sampling, cut, texture},
    spec::ClipSpec,
};
use crate::{
    Error, Result,
    frame::{Component, Frame, resample::Kernel},
    train::{patch::Patch, random::Fnv},
    video::Reader,
};

/// Size of all clips of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Side of the square frames in pixels, even.
    pub side: usize,
    /// Successive frames.
    pub frames: usize,
}

impl Shape {
    /// Bytes of a clip.
    pub fn bytes(self) -> u64 {
        (3 * self.side * self.side * self.frames) as u64
    }
}

impl ClipSpec {
    /// Returns the seconds between two moments of videos of `seconds` in all, such that all clips
    /// fit into the limit.
    fn spacing(&self, shape: Shape, seconds: f64) -> f64 {
        let max = ((self.limit << 20) / (shape.bytes() * self.squares as u64)).max(1);
        self.every.max(seconds / max as f64)
    }

    /// Returns the maximum number of clips of `videos`.
    pub fn clips(&self, shape: Shape, videos: &[Source]) -> u64 {
        let spacing = self.spacing(shape, seconds(videos));
        // Moments closer than the length of a clip would overlap. A clip lasts at least as long as
        // at 60 frames per second.
        let spacing = spacing.max(shape.frames as f64 / 60.0);
        let moments = |v: &Source| (v.seconds / spacing).ceil().max(1.0) as u64;
        videos.iter().map(moments).sum::<u64>() * self.squares as u64
    }
}

/// Properties of a video.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: PathBuf,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Frames per second, if the rate is constant.
    pub rate: Option<f64>,
    /// Duration; 0 if the file does not tell.
    pub seconds: f64,
    /// Name of its codec for people.
    pub codec: String,
}

/// Returns the total duration of `videos` in seconds.
pub fn seconds(videos: &[Source]) -> f64 {
    videos.iter().map(|v| v.seconds).sum()
}

/// Opens the videos at `paths`, on all cores. Skips those whose sides are below `side` pixels or
/// that cannot be played.
pub fn survey(paths: &[PathBuf], side: usize) -> (Vec<Source>, Vec<Skipped>) {
    let open = |path: &PathBuf| {
        let path = path.clone();
        open(&path, side).map_err(|reason| Skipped { path, reason })
    };
    let (mut videos, mut skipped) = (Vec::new(), Vec::new());
    for video in paths.par_iter().map(open).collect::<Vec<_>>() {
        match video {
            Ok(video) => videos.push(video),
            Err(reason) => skipped.push(reason),
        }
    }
    (videos, skipped)
}

fn open(path: &Path, side: usize) -> Result<Source, String> {
    let reader = Reader::open(path).map_err(|e| e.to_string())?;
    let stream = reader.stream();
    let (width, height) = (stream.frame().width, stream.frame().height);
    if width.min(height) < side {
        return Err(format!(
            "{width}x{height} is too small: both sides must be at least {side} pixels"
        ));
    }
    Ok(Source {
        path: path.into(),
        width,
        height,
        rate: stream.framerate().map(|(n, d)| f64::from(n) / f64::from(d)),
        seconds: stream.duration().unwrap_or_default().as_secs_f64(),
        codec: reader.codec(),
    })
}

/// Index in the cache beside the clips of a video.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Index {
    source: PathBuf,
    clips: usize,
    /// Hash of the contents of the clips.
    hash: u64,
}

/// Clips from videos.
#[derive(Debug)]
pub struct ClipSet {
    shape: Shape,
    /// Files of [`Shape::bytes`] bytes: frame after frame, rows of R, G, B.
    clips: Vec<PathBuf>,
    fingerprint: u64,
}

impl ClipSet {
    /// Cuts clips out of `videos`, on all cores. Returns the clips and the videos that are of no
    /// use. `cache` is the folder of the clips; clips of an earlier run with the same files and
    /// values are used again. `progress` is called from several threads with (seconds of video
    /// done, seconds in all) and returns `false` to stop.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn load(
        videos: &[Source],
        spec: &ClipSpec,
        shape: Shape,
        cache: &Path,
        progress: impl Fn(f64, f64) -> bool + Sync,
    ) -> Result<(Self, Vec<Skipped>)> {
        let all = seconds(videos);
        let stopped = AtomicBool::new(false);
        let done = Mutex::new(0.0);
        let report = |seconds: f64| {
            // The number is valid even if another thread has panicked.
            let mut done = done.lock().unwrap_or_else(|p| p.into_inner());
            *done += seconds;
            if !progress(*done, all) {
                stopped.store(true, Ordering::Relaxed);
            }
            !stopped.load(Ordering::Relaxed)
        };
        let extraction = Extraction {
            spec,
            shape,
            spacing: spec.spacing(shape, all),
            cache,
            report: &report,
        };
        let extracted: Vec<_> = videos.par_iter().map(|v| extraction.clips_of(v)).collect();
        if stopped.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let (mut clips, mut skipped, mut hash) = (Vec::new(), Vec::new(), Fnv::default());
        for (video, of_video) in videos.iter().zip(extracted) {
            match of_video {
                Ok((paths, content)) => {
                    clips.extend(paths);
                    content.hash(&mut hash);
                }
                Err(reason) => skipped.push(Skipped {
                    path: video.path.clone(),
                    reason,
                }),
            }
        }
        let set = Self {
            shape,
            clips,
            fingerprint: hash.finish(),
        };
        Ok((set, skipped))
    }

    /// Removes the held-out clips and returns their middle frames. If there are at least `every`
    /// videos, every `every`th is held out. If there are fewer, one of `every` clips is held out:
    /// the last clips of each video, because consecutive clips are nearly identical.
    ///
    /// # Errors
    /// As [`Self::clip`].
    pub fn hold_out(&mut self, every: usize) -> Result<Vec<RgbImage>> {
        let every = every.max(2);
        // Each video has a folder of its own.
        let videos = self.clips.chunk_by(|a, b| a.parent() == b.parent());
        let whole = videos.clone().count() >= every;
        let (mut retained, mut taken) = (Vec::new(), Vec::new());
        let mut seen = 0;
        let mut hash = Fnv::default();
        self.fingerprint.hash(&mut hash);
        for (i, clips) in videos.enumerate() {
            let before = seen;
            seen += clips.len();
            let count = match whole {
                true if i % every == every - 1 => clips.len(),
                true => 0,
                false => seen / every - before / every,
            };
            let (rest, last) = clips.split_at(clips.len() - count);
            rest.len().hash(&mut hash);
            retained.extend_from_slice(rest);
            taken.extend_from_slice(last);
        }
        self.clips = retained;
        self.fingerprint = hash.finish();
        let middle = |path: &PathBuf| self.frame(path, self.shape.frames / 2);
        taken.iter().map(middle).collect()
    }

    /// Returns the middle frame of the first clip, if there is one.
    ///
    /// # Errors
    /// As [`Self::clip`].
    pub fn first_frame(&self) -> Result<Option<RgbImage>> {
        let first = self.clips.first();
        first
            .map(|path| self.frame(path, self.shape.frames / 2))
            .transpose()
    }

    /// Returns the number of clips.
    pub fn len(&self) -> usize {
        self.clips.len()
    }

    /// Returns `true` if there are no clips.
    pub fn is_empty(&self) -> bool {
        self.clips.is_empty()
    }

    /// Returns the size of the clips.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Returns a hash of the order and contents of the clips.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Returns a random clip, mirrored, turned and reversed at random.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Video`] when the cache has been changed, [`Error::Data`] when
    /// there are no clips.
    pub fn clip<R: Rng + ?Sized>(&self, rng: &mut R) -> Result<Vec<Patch>> {
        let path = self.random_clip(rng)?;
        let (turn, mirror_x, mirror_y) = (rng.random(), rng.random(), rng.random());
        let side = self.shape.side;
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let frames = bytes.chunks_exact(3 * side * side);
        let patch = |b: &[u8]| Patch::from_rgb8(side, side, b).turned(turn, mirror_x, mirror_y);
        let mut clip: Vec<_> = frames.map(patch).collect();
        if clip.len() != self.shape.frames {
            return Err(changed(path));
        }
        if rng.random::<bool>() {
            clip.reverse();
        }
        Ok(clip)
    }

    /// Returns a random square of `side` pixels of a frame, chosen by `sampling`.
    ///
    /// # Errors
    /// As [`Self::clip`]; [`Error::Data`] when `side` is 0 or above that of the set.
    pub fn sample<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        side: usize,
        sampling: &Sampling,
    ) -> Result<Patch> {
        let all = self.shape.side;
        if !(1..=all).contains(&side) {
            let text = format!("no patch of {side} pixels from clips of {all} pixels");
            return Err(Error::Data(text));
        }
        let path = self.random_clip(rng)?;
        let frame = self.frame(path, rng.random_range(0..self.shape.frames))?;
        let factor = if rng.random_bool(sampling.shrink) {
            rng.random_range(sampling.min_factor..=1.0)
        } else {
            1.0
        };
        let source = ((side as f64 / factor).round() as usize).clamp(side, all);
        let (free, size) = (all - source, (source, source));
        let position = sampling.choose(
            rng,
            |rng| (rng.random_range(0..=free), rng.random_range(0..=free)),
            |position| texture(&frame, position, size),
        );
        let patch = cut(&frame, position, size).resize(side, side, Kernel::CatmullRom)?;
        Ok(patch.turned(rng.random(), rng.random(), rng.random()))
    }

    fn random_clip<R: Rng + ?Sized>(&self, rng: &mut R) -> Result<&PathBuf> {
        if self.clips.is_empty() {
            return Err(Error::Data("no clips".into()));
        }
        Ok(&self.clips[rng.random_range(0..self.clips.len())])
    }

    /// Reads frame `i` of a clip.
    fn frame(&self, path: &Path, i: usize) -> Result<RgbImage> {
        let side = self.shape.side;
        let mut bytes = vec![0; 3 * side * side];
        let mut file = File::open(path).map_err(Error::io(path))?;
        let read = file
            .seek(SeekFrom::Start((i * bytes.len()) as u64))
            .and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|_| changed(path))?;
        RgbImage::from_raw(side as u32, side as u32, bytes).ok_or_else(|| changed(path))
    }
}

fn changed(path: &Path) -> Error {
    Error::video(path, "no clip of this set: remove the cache")
}

/// Extraction of clips from videos.
struct Extraction<'a> {
    spec: &'a ClipSpec,
    shape: Shape,
    /// Seconds from one moment to the next.
    spacing: f64,
    cache: &'a Path,
    /// Reports seconds of video that are done; returns `false` to stop.
    report: &'a (dyn Fn(f64) -> bool + Sync),
}

impl Extraction<'_> {
    /// Returns the clips of `video` in the cache and a hash of their contents. Makes them if they
    /// are missing.
    fn clips_of(&self, video: &Source) -> Result<(Vec<PathBuf>, u64), String> {
        let folder = self.cache.join(self.name(video)?);
        let index = match read_index(&folder) {
            Some(index) => {
                (self.report)(video.seconds);
                index
            }
            None => {
                // If two processes do this at the same time, the clips of the first stay.
                let part = folder.with_extension(format!("{}.part", process::id()));
                let made = self.fill(video, &part, &folder);
                let _ = fs::remove_dir_all(&part);
                made?
            }
        };
        if index.clips == 0 {
            return Err("no moment with texture and without a cut".into());
        }
        let paths = (0..index.clips).map(|i| clip_path(&folder, i)).collect();
        Ok((paths, index.hash))
    }

    /// Writes the clips of `video` and their index into `part` and renames it to `folder`.
    fn fill(&self, video: &Source, part: &Path, folder: &Path) -> Result<Index, String> {
        let cannot = |e: std::io::Error| format!("'{}': {e}", part.display());
        fs::create_dir_all(part).map_err(cannot)?;
        let index = self.extract(video, part)?;
        let json = serde_json::to_vec_pretty(&index).map_err(|e| e.to_string())?;
        fs::write(part.join("index.json"), json).map_err(cannot)?;
        if let Err(e) = fs::rename(part, folder) {
            return read_index(folder).ok_or_else(|| cannot(e));
        }
        Ok(index)
    }

    /// Returns the name of the folder for the clips of `video`. It changes with the file and the
    /// extraction.
    fn name(&self, video: &Source) -> Result<String, String> {
        let cannot = |e: std::io::Error| e.to_string();
        let file = fs::metadata(&video.path).map_err(cannot)?;
        let modified = file.modified().map_err(cannot)?.duration_since(UNIX_EPOCH);
        let mut hash = Fnv::default();
        video.path.canonicalize().map_err(cannot)?.hash(&mut hash);
        (file.len(), modified.unwrap_or_default()).hash(&mut hash);
        let values = [self.shape.side, self.shape.frames, self.spec.squares];
        (VERSION, values).hash(&mut hash);
        let factors = [self.spacing, self.spec.shrink];
        factors.map(f64::to_bits).hash(&mut hash);
        Ok(format!("{:016x}", hash.finish()))
    }

    /// Decodes `video` and writes its clips to `folder`.
    fn extract(&self, video: &Source, folder: &Path) -> Result<Index, String> {
        let mut reader = Reader::open(&video.path).map_err(|e| e.to_string())?;
        let mut index = Index {
            source: video.path.clone(),
            clips: 0,
            hash: 0,
        };
        let mut hash = Fnv::default();
        let (mut next, mut reported) = (0.0, 0.0);
        let (mut seeks, mut left) = (true, None);
        let mut moment: Vec<Frame> = Vec::with_capacity(self.shape.frames);
        while let Some(frame) = reader.next() {
            // A file that breaks off is used up to there.
            let Ok(frame) = frame else { break };
            let time = frame.pts.as_secs_f64();
            // If key frames are far apart, a seek may lead back.
            seeks &= left.take().is_none_or(|left| time > left);
            if time < next {
                continue;
            }
            let frame = frame.frame;
            if frame.info().width.min(frame.info().height) < self.shape.side {
                continue;
            }
            if moment.last().is_some_and(|last| is_cut(last, &frame)) {
                moment.clear();
            }
            moment.push(frame);
            if moment.len() < self.shape.frames {
                continue;
            }
            for clip in squares(&moment, self.spec, self.shape)? {
                let path = clip_path(folder, index.clips);
                fs::write(&path, &clip).map_err(|e| format!("'{}': {e}", path.display()))?;
                clip.iter().step_by(4099).for_each(|b| b.hash(&mut hash));
                index.clips += 1;
            }
            moment.clear();
            next = (next + self.spacing).max(time);
            if !(self.report)(time - reported) {
                return Err("stopped".into());
            }
            reported = time;
            if seeks && next - time > FAR {
                // If seeking fails, all frames are decoded.
                seeks = reader.seek(Duration::from_secs_f64(next)).is_ok();
                left = Some(time);
            }
        }
        (self.report)(video.seconds - reported);
        index.hash = hash.finish();
        Ok(index)
    }
}

fn read_index(folder: &Path) -> Option<Index> {
    let bytes = fs::read(folder.join("index.json")).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn clip_path(folder: &Path, i: usize) -> PathBuf {
    folder.join(format!("{i:06}.rgb"))
}

/// Version of the extraction, part of the name of the folder.
const VERSION: u32 = 1;

/// Distance in time from which seeking is faster than decoding the frames in between.
const FAR: f64 = 10.0;

/// Returns luma, 0 to 1, or the nearest component.
fn luma(frame: &Frame) -> Vec<f32> {
    let format = frame.info().format;
    let component = match format.component(Component::Y) {
        Some(_) => Component::Y,
        None => Component::G,
    };
    let mut plane = vec![0.0; frame.info().width * frame.info().height];
    // This cannot fail: the format has the component, and the plane has its size.
    let _ = frame.as_ref().read(component, &mut plane);
    plane
}

/// Returns `true` if another scene begins between two frames: they differ by more than motion
/// explains.
fn is_cut(a: &Frame, b: &Frame) -> bool {
    if a.info() != b.info() {
        return true;
    }
    let (a, b) = (luma(a), luma(b));
    let sampled = a.iter().zip(&b).step_by(37);
    let count = sampled.len().max(1) as f32;
    sampled.map(|(a, b)| (a - b).abs()).sum::<f32>() / count > 0.12
}

/// Mean absolute difference of neighbouring pixels below which a square is flat, as a share of the
/// range.
const FLAT: f32 = 0.008;

/// Returns the squares of `moment` with the most texture, as clips.
fn squares(moment: &[Frame], spec: &ClipSpec, shape: Shape) -> Result<Vec<Vec<u8>>, String> {
    let Some(middle) = moment.get(moment.len() / 2) else {
        return Ok(Vec::new());
    };
    let info = middle.info();
    let room = info.width.min(info.height) as f64 / shape.side as f64;
    // Even, and at most the sides of the frame.
    let side = ((shape.side as f64 * spec.shrink.min(room)) as usize & !1).max(shape.side);
    let plane = luma(middle);
    let starts = |len: usize| (0..=len - side).step_by((side / 2) & !1);
    let mut found: Vec<_> = starts(info.height)
        .flat_map(|y| starts(info.width).map(move |x| (x, y)))
        .map(|at| (detail(&plane, info.width, at, side), at))
        .filter(|(detail, _)| *detail >= FLAT)
        .collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut taken: Vec<(usize, usize)> = Vec::new();
    for (_, at) in found {
        let apart = |t: &(usize, usize)| t.0.abs_diff(at.0) >= side || t.1.abs_diff(at.1) >= side;
        if taken.len() < spec.squares && taken.iter().all(apart) {
            taken.push(at);
        }
    }
    let clip = |&at: &(usize, usize)| {
        let mut bytes = Vec::with_capacity(shape.bytes() as usize);
        for frame in moment {
            let cut = square(frame, at, side)?;
            let patch = Patch::from_rgb8(side, side, &cut);
            bytes.extend(if side == shape.side {
                cut
            } else {
                patch
                    .resize(shape.side, shape.side, Kernel::CatmullRom)?
                    .to_rgb8()
            });
        }
        Ok(bytes)
    };
    let clips = taken.iter().map(clip).collect::<Result<_>>();
    clips.map_err(|e| e.to_string())
}

/// Returns the mean absolute difference of neighbouring pixels in a square of `plane`, on every
/// third row.
fn detail(plane: &[f32], width: usize, (x0, y0): (usize, usize), side: usize) -> f32 {
    let (mut sum, mut count) = (0.0, 0.0f32);
    for y in (y0..y0 + side - 1).step_by(3) {
        let rows = &plane[y * width + x0..];
        for x in 0..side - 1 {
            sum += (rows[x] - rows[x + 1]).abs() + (rows[x] - rows[x + width]).abs();
            count += 2.0;
        }
    }
    sum / count.max(1.0)
}

/// Returns a square of a frame as rows of R, G, B. Its position is even. Some pixels around it take
/// part in the interpolation of chroma.
fn square(frame: &Frame, (x, y): (usize, usize), side: usize) -> Result<Vec<u8>> {
    const AROUND: usize = 8;
    let info = frame.info();
    let (left, top) = (x.min(AROUND), y.min(AROUND));
    let width = (left + side + AROUND).min(info.width - x + left);
    let height = (top + side + AROUND).min(info.height - y + top);
    let part = part(frame, (x - left, y - top), (width, height))?;
    let rgb = part.to_rgb8()?;
    let rows = rgb.chunks_exact(3 * width).skip(top).take(side);
    Ok(rows
        .flat_map(|row| &row[3 * left..][..3 * side])
        .copied()
        .collect())
}

/// Returns a part of a frame at an even position.
fn part(frame: &Frame, (x, y): (usize, usize), (w, h): (usize, usize)) -> Result<Frame> {
    let (info, format) = (frame.info(), frame.info().format);
    let mut part = Frame::new(info.with_size(w, h))?;
    for plane in 0..format.planes() {
        let (stride, _) = format.plane_size(plane, info.width, info.height);
        let (skip, top) = format.plane_size(plane, x, y);
        let (row, _) = format.plane_size(plane, w, h);
        let source = frame.plane(plane).chunks_exact(stride).skip(top);
        for (to, from) in part.plane_mut(plane).chunks_exact_mut(row).zip(source) {
            to.copy_from_slice(&from[skip..skip + row]);
        }
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::{
        frame::{FrameInfo, PixelFormat},
        train::data::files::find,
        video::{Options, StreamInfo, TimedFrame, Writer},
    };

    /// Colours in a pattern that does not repeat.
    fn noise(x: usize, y: usize, scene: usize) -> [u8; 3] {
        let mut v = (x / 3 * 73_856_093) ^ (y / 3 * 19_349_663) ^ (scene * 83_492_791);
        v ^= v >> 13;
        // Soft, so that motion is not detected as a cut. The next scene has another brightness.
        [v, v / 3, v / 7].map(|v| (60 + 80 * (scene % 2) + v % 60) as u8)
    }

    /// Writes a video with scenes of 20 frames, in which texture moves 2 pixels to the left per
    /// frame.
    fn video(
        path: &Path,
        (w, h): (usize, usize),
        scenes: usize,
        pixel: fn(usize, usize, usize) -> [u8; 3],
    ) {
        let info = FrameInfo::new(PixelFormat::I420, w, h);
        let stream = StreamInfo::new(info, Some((25, 1))).unwrap();
        let options = Options {
            encoder: "x264enc pass=quant quantizer=4 speed-preset=ultrafast key-int-max=10".into(),
            ..Options::default()
        };
        let mut writer = Writer::create(path, &stream, &options, None).unwrap();
        for t in 0..20 * scenes {
            let rgb: Vec<u8> = (0..w * h)
                .flat_map(|i| pixel(i % w + 2 * (t % 20), i / w, t / 20))
                .collect();
            let step = Duration::from_millis(40);
            let frame = TimedFrame {
                frame: Frame::from_rgb8_as(info, &rgb).unwrap(),
                pts: step * t as u32,
                duration: Some(step),
            };
            writer.push(&frame).unwrap();
        }
        writer.finish(false).unwrap();
    }

    const SHAPE: Shape = Shape {
        side: 64,
        frames: 5,
    };

    fn spec() -> ClipSpec {
        ClipSpec {
            every: 0.4,
            shrink: 1.0,
            ..ClipSpec::default()
        }
    }

    struct Data(tempfile::TempDir);

    impl Data {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn load(&self, spec: &ClipSpec, shape: Shape) -> (ClipSet, Vec<Skipped>) {
            let found = find(&[self.0.path().to_path_buf()]).unwrap();
            let (videos, mut skipped) = survey(&found.videos, shape.side);
            let (set, more) =
                ClipSet::load(&videos, spec, shape, &self.path("cache"), |_, _| true).unwrap();
            skipped.extend(more);
            (set, skipped)
        }
    }

    /// Returns the mean absolute difference of green between two frames, the second shifted by `dx`
    /// pixels.
    fn difference(a: &RgbImage, b: &RgbImage, dx: u32) -> f64 {
        let (w, h) = a.dimensions();
        let squares = (0..w - dx).flat_map(|x| (0..h).map(move |y| (x, y)));
        let sum: u64 = squares
            .map(|(x, y)| u64::from(a.get_pixel(x + dx, y)[1].abs_diff(b.get_pixel(x, y)[1])))
            .sum();
        sum as f64 / f64::from((w - dx) * h)
    }

    /// Returns the frames of clip `i`.
    fn read(set: &ClipSet, i: usize) -> Vec<RgbImage> {
        let frames = 0..set.shape.frames;
        frames
            .map(|t| set.frame(&set.clips[i], t).unwrap())
            .collect()
    }

    #[test]
    fn clips_hold_successive_frames_of_one_square_and_one_scene() {
        let data = Data::new();
        video(&data.path("a.mp4"), (160, 96), 3, noise);
        let (set, skipped) = data.load(&spec(), SHAPE);
        assert!(
            set.len() >= 6 && skipped.is_empty(),
            "{} {skipped:?}",
            set.len()
        );
        for i in 0..set.len() {
            for pair in read(&set, i).windows(2) {
                let (moved, still) = (
                    difference(&pair[0], &pair[1], 2),
                    difference(&pair[0], &pair[1], 0),
                );
                assert!(moved < 6.0 && still > 10.0, "clip {i}: {moved} {still}");
            }
        }
    }

    #[test]
    fn large_frames_are_shrunk() {
        let data = Data::new();
        video(&data.path("a.mp4"), (160, 96), 1, noise);
        let shrunk = ClipSpec {
            shrink: 1.5,
            ..spec()
        };
        let (set, _) = data.load(&shrunk, SHAPE);
        // Two pixels per frame become fewer.
        let frames = read(&set, 0);
        let (moved, still) = (
            difference(&frames[0], &frames[3], 4),
            difference(&frames[0], &frames[3], 6),
        );
        assert!(moved < 0.5 * still, "{moved} {still}");
    }

    #[test]
    fn the_cache_is_used_again_until_the_file_or_the_clips_change() {
        let data = Data::new();
        video(&data.path("a.mkv"), (96, 96), 2, noise);
        let (set, _) = data.load(&spec(), SHAPE);
        let (clips, fingerprint) = (set.clips.clone(), set.fingerprint());
        fs::write(&clips[0], vec![7; SHAPE.bytes() as usize]).unwrap();
        let (set, _) = data.load(&spec(), SHAPE);
        assert_eq!((&set.clips, set.fingerprint()), (&clips, fingerprint));
        assert_eq!(read(&set, 0)[0].as_raw()[0], 7);
        let other = Shape { frames: 4, ..SHAPE };
        assert!(data.load(&spec(), other).0.clips[0] != clips[0]);
        fs::write(&clips[0], "short").unwrap();
        let error = set.frame(&clips[0], 0).unwrap_err().to_string();
        assert!(error.contains("remove the cache"), "{error}");
        video(&data.path("a.mkv"), (96, 96), 3, noise);
        let (set, _) = data.load(&spec(), SHAPE);
        assert!(set.clips[0] != clips[0] && set.fingerprint() != fingerprint);
    }

    #[test]
    fn clips_stay_within_the_limit() {
        let data = Data::new();
        video(&data.path("a.mp4"), (160, 96), 4, noise);
        let wide = ClipSpec {
            every: 0.0,
            ..spec()
        };
        let shape = Shape {
            side: 96,
            frames: 10,
        };
        let narrow = ClipSpec {
            limit: 1,
            ..wide.clone()
        };
        let max = (1 << 20) / shape.bytes();
        let (many, few) = (
            data.load(&wide, shape).0.len(),
            data.load(&narrow, shape).0.len(),
        );
        assert!(few as u64 <= max && few > 0 && many > few, "{many} {few}");
        let (videos, _) = survey(&[data.path("a.mp4")], 96);
        assert!(narrow.clips(shape, &videos) <= max && (seconds(&videos) - 3.2).abs() < 0.1);
    }

    #[test]
    fn unusable_videos_are_skipped_with_a_reason() {
        let data = Data::new();
        video(&data.path("small.mp4"), (96, 48), 1, noise);
        video(&data.path("flat.mp4"), (96, 96), 1, |_, _, _| {
            [90, 100, 110]
        });
        fs::write(data.path("text.mp4"), "no video at all").unwrap();
        video(&data.path("whole.mkv"), (96, 96), 2, noise);
        let bytes = fs::read(data.path("whole.mkv")).unwrap();
        fs::write(data.path("cut.mkv"), &bytes[..bytes.len() / 2]).unwrap();
        fs::remove_file(data.path("whole.mkv")).unwrap();
        let (set, mut skipped) = data.load(&spec(), SHAPE);
        skipped.sort_by(|a, b| a.path.cmp(&b.path));
        let reasons: Vec<_> = skipped.iter().map(|s| s.reason.as_str()).collect();
        assert!(reasons.len() == 3 && !set.is_empty(), "{reasons:?}");
        for (reason, text) in reasons.iter().zip(["texture", "96x48", "text.mp4"]) {
            assert!(reason.contains(text), "{reason}");
        }
    }

    #[test]
    fn samples_have_the_size_asked_for_and_follow_the_seed() {
        let data = Data::new();
        video(&data.path("a.mp4"), (96, 96), 2, noise);
        let (mut set, _) = data.load(&spec(), SHAPE);
        let sampling = Sampling::default();
        for seed in 0..10 {
            let rng = || SmallRng::seed_from_u64(seed);
            let clip = set.clip(&mut rng()).unwrap();
            assert_eq!(clip, set.clip(&mut rng()).unwrap());
            assert!(clip.len() == 5 && clip.iter().all(|p| (p.width, p.height) == (64, 64)));
            let patch = set.sample(&mut rng(), 48, &sampling).unwrap();
            assert_eq!(patch, set.sample(&mut rng(), 48, &sampling).unwrap());
            assert_eq!((patch.width, patch.rgb.len()), (48, 3 * 48 * 48));
        }
        let mut rng = SmallRng::seed_from_u64(0);
        assert!(set.sample(&mut rng, 65, &sampling).is_err());
        let all = set.len();
        let held_out = set.hold_out(2).unwrap();
        assert_eq!((held_out.len(), set.len()), (all / 2, all.div_ceil(2)));
    }

    #[test]
    fn whole_videos_are_held_out_or_the_end_of_one() {
        let data = Data::new();
        let all = |data: &Data| data.load(&spec(), SHAPE).0;
        let rest = |every| {
            let mut set = all(&data);
            let taken = set.hold_out(every).unwrap().len();
            assert_eq!(taken + set.len(), all(&data).len());
            set.clips
        };
        video(&data.path("a.mp4"), (96, 96), 3, noise);
        let clips = all(&data).clips;
        assert_eq!(rest(3), clips[..clips.len() - clips.len() / 3]);
        for name in ["b.mp4", "c.mp4"] {
            video(&data.path(name), (96, 96), 2, noise);
        }
        // The second of three videos, and no part of the others.
        let clips = all(&data).clips;
        let videos: Vec<_> = clips.chunk_by(|a, b| a.parent() == b.parent()).collect();
        assert_eq!(rest(2), [videos[0], videos[2]].concat());
        assert_eq!(rest(3), [videos[0], videos[1]].concat());
    }

    #[test]
    fn held_out_clips_change_the_fingerprint_of_the_rest() {
        let data = Data::new();
        video(&data.path("a.mp4"), (96, 96), 2, noise);
        let without = |every| {
            let (mut set, _) = data.load(&spec(), SHAPE);
            set.hold_out(every).unwrap();
            set.fingerprint()
        };
        assert_eq!(without(2), without(2));
        assert!(without(2) != without(3) && without(2) != without(1000));
    }

    #[test]
    fn a_stopped_extraction_leaves_no_incomplete_files() {
        let data = Data::new();
        video(&data.path("a.mp4"), (96, 96), 2, noise);
        let (videos, _) = survey(&[data.path("a.mp4")], 64);
        let cache = data.path("cache");
        let stopped = ClipSet::load(&videos, &spec(), SHAPE, &cache, |_, _| false);
        assert!(matches!(stopped, Err(Error::Cancelled)));
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
    }
}
