//! Measurement of a clip, frame by frame: memory does not grow with its length.

use std::{collections::VecDeque, path::PathBuf, time::Duration};

use super::{
    Condition, Evaluation, Scores, Truth, View, border, check, condition::GOP, fitting,
    method::resized,
};
use crate::{
    Error, Result,
    frame::{Component, Frame, FrameInfo, PixelFormat, resample::Kernel},
    metrics::{Gray, Motion, Row, Temporal},
    video::Reader,
};

/// Frames in a part of a clip, the unit of the statistics: half a second of film.
const PART: usize = 12;
/// Maximum size in bytes of the low-resolution frames of all conditions that are encoded together.
const MEMORY: usize = 128 << 20;

/// Part of a clip that is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    pub path: PathBuf,
    /// Time at which the measurement begins.
    pub start: Duration,
    /// Maximum number of frames.
    pub frames: usize,
}

impl Clip {
    /// Returns the number of frames that will be measured, if the file tells.
    ///
    /// # Errors
    /// Those of [`Reader::open`].
    pub fn expected_frames(&self) -> Result<usize> {
        let reader = Reader::open(&self.path)?;
        let stream = reader.stream();
        let left = stream
            .duration()
            .zip(stream.framerate())
            .map(|(duration, (num, den))| {
                let seconds = duration.saturating_sub(self.start).as_secs_f64();
                (seconds * f64::from(num) / f64::from(den)).round() as usize
            });
        Ok(left.map_or(self.frames, |left| left.min(self.frames)))
    }
}

impl Evaluation {
    /// Measures every method under every condition for clips, at every scale, on `clip`. Returns a
    /// row for each part of it. `step` is called for every frame at every scale.
    ///
    /// # Errors
    /// [`Error::Video`] when the clip cannot be decoded, [`Error::Data`] when it is too small,
    /// [`Error::Setting`] when a codec is missing, [`Error::Cancelled`], and those of the methods.
    pub fn clip(&mut self, clip: &Clip, mut step: impl FnMut()) -> Result<Vec<Row>> {
        let conditions = self.conditions.iter().copied();
        let conditions: Vec<_> = conditions.filter(|c| c.is_for_clips()).collect();
        let mut rows = Vec::new();
        for scale in self.scales.clone() {
            let mut pass = Pass::new(self, clip, scale, &conditions)?;
            while pass.frame(self, clip, &mut rows)? {
                step();
            }
        }
        Ok(rows)
    }
}

/// State of a measurement at one scale.
struct Pass<'a> {
    scale: f64,
    conditions: &'a [Condition],
    truths: Frames,
    small: SmallFrames<'a>,
    /// Luma of the previous frame of the ground truth.
    last: Option<Gray>,
    /// For each method under each condition.
    collected: Vec<Collected>,
    frames: usize,
}

/// Measurements of the current part of a clip.
#[derive(Default)]
struct Collected {
    scores: Vec<Scores>,
    temporal: Temporal,
}

impl<'a> Pass<'a> {
    fn new(
        of: &mut Evaluation,
        clip: &Clip,
        scale: f64,
        conditions: &'a [Condition],
    ) -> Result<Self> {
        for method in &mut of.methods {
            method.begin(conditions.len())?;
        }
        let truths = Frames::open(clip, scale)?;
        let small = SmallFrames::new(Frames::open(clip, scale)?, conditions);
        let methods = of.methods.len() * conditions.len();
        Ok(Self {
            scale,
            conditions,
            truths,
            small,
            last: None,
            collected: (0..methods).map(|_| Collected::default()).collect(),
            frames: 0,
        })
    }

    /// Measures one frame. Returns `false` at the end. Adds complete parts to `rows`.
    fn frame(&mut self, of: &mut Evaluation, clip: &Clip, rows: &mut Vec<Row>) -> Result<bool> {
        let (Some(truth), Some(small)) = (self.truths.next()?, self.small.next(of)?) else {
            self.end_part(of, clip, rows);
            return Ok(false);
        };
        let size = (truth.info().width, truth.info().height);
        let truth = View::of(&truth.as_ref(), border(self.scale))?;
        let truth = Truth::new(truth, &of.models)?;
        let luma = &truth.view.luma;
        let motion = self.last.as_ref().map(|last| Motion::between(last, luma));
        let mut collected = self.collected.iter_mut();
        for (stream, small) in small.iter().enumerate() {
            for i in 0..of.methods.len() {
                check(&of.stop)?;
                let large = of.methods[i].upscale(stream, small, size)?;
                let result = View::of(&large.as_ref(), border(self.scale))?;
                if let Some(collected) = collected.next() {
                    collected.scores.push(truth.score(&result, &of.models)?);
                    collected.temporal.push(motion.as_ref(), result.luma);
                }
            }
        }
        self.last = Some(truth.view.luma);
        self.frames += 1;
        if self.frames.is_multiple_of(PART) {
            self.end_part(of, clip, rows);
        }
        Ok(true)
    }

    fn end_part(&mut self, of: &Evaluation, clip: &Clip, rows: &mut Vec<Row>) {
        let part = self.frames.saturating_sub(1) / PART;
        let pairs = self.conditions.iter();
        let pairs = pairs.flat_map(|c| of.methods.iter().map(move |m| (c, m)));
        for ((condition, method), collected) in pairs.zip(&mut self.collected) {
            let scores = std::mem::take(&mut collected.scores);
            if scores.is_empty() {
                continue;
            }
            let temporal = collected.temporal.take_scores();
            rows.push(Row {
                method: method.name().into(),
                condition: condition.to_string(),
                scale: self.scale,
                image: clip.path.display().to_string(),
                part,
                frames: scores.len(),
                exact: scores.iter().filter(|s| s.psnr_y.is_infinite()).count(),
                warping_error: temporal.warping_error,
                tof: temporal.tof,
                flicker: temporal.flicker,
                ..mean(&scores).into()
            });
        }
    }
}

fn mean(scores: &[Scores]) -> Scores {
    let mean = |of: fn(&Scores) -> Option<f64>| {
        let values: Vec<f64> = scores.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    Scores {
        psnr_y: mean(|s| Some(s.psnr_y).filter(|v| v.is_finite())).unwrap_or(f64::INFINITY),
        ssim: mean(|s| s.ssim),
        ms_ssim: mean(|s| s.ms_ssim),
        lpips: mean(|s| s.lpips),
        niqe: mean(|s| s.niqe),
    }
}

/// Frames of a clip: planar 4:2:0, cut to a size that the scale divides.
struct Frames {
    reader: Reader,
    start: Duration,
    left: usize,
    /// Formats of a low-resolution frame and of a frame.
    sizes: [(usize, usize); 2],
}

impl Frames {
    fn open(clip: &Clip, scale: f64) -> Result<Self> {
        let mut reader = Reader::open(&clip.path)?;
        let info = *reader.stream().frame();
        if !clip.start.is_zero() {
            reader.seek(clip.start)?;
        }
        // Even sides: chroma has half the samples.
        let side = |len| fitting(len, scale, 2);
        let ((lw, hw), (lh, hh)) = (side(info.width), side(info.height));
        if lw == 0 || lh == 0 {
            return Err(Error::Data(format!(
                "{}x{} pixels are too few for scale {scale}",
                info.width, info.height
            )));
        }
        Ok(Self {
            reader,
            start: clip.start,
            left: clip.frames,
            sizes: [(lw, lh), (hw, hh)],
        })
    }

    fn next(&mut self) -> Result<Option<Frame>> {
        if self.left == 0 {
            return Ok(None);
        }
        for frame in self.reader.by_ref() {
            let frame = frame?;
            if frame.pts >= self.start {
                self.left -= 1;
                let (width, height) = self.sizes[1];
                return planar(&frame.frame, width, height).map(Some);
            }
        }
        Ok(None)
    }
}

/// Returns the upper left part of a frame as I420, or I420_10LE for 10 bits.
fn planar(frame: &Frame, width: usize, height: usize) -> Result<Frame> {
    let info = frame.info();
    if info.width < width || info.height < height {
        return Err(Error::Data(format!(
            "the clip changes its size to {}x{}",
            info.width, info.height
        )));
    }
    let format = match info.format.depth() {
        8 => PixelFormat::I420,
        _ => PixelFormat::I420_10Le,
    };
    let subsampled = info.format.chroma_shift() == (1, 1);
    let whole = match (info.format == format, subsampled) {
        (true, _) => None,
        (false, true) => Some(repacked(frame, format)?),
        (false, false) => {
            let mut like = FrameInfo::new(format, info.width, info.height);
            if info.format.component(Component::Y).is_some() {
                like.colorimetry = info.colorimetry;
            }
            Some(Frame::from_rgb8_as(like, &frame.to_rgb8()?)?)
        }
    };
    let whole = whole.as_ref().unwrap_or(frame);
    let mut out = Frame::new(whole.info().with_size(width, height))?;
    for plane in 0..format.planes() {
        let (from_row, _) = format.plane_size(plane, info.width, info.height);
        let (row, _) = format.plane_size(plane, width, height);
        let rows = whole.plane(plane).chunks_exact(from_row);
        for (to, from) in out.plane_mut(plane).chunks_exact_mut(row).zip(rows) {
            to.copy_from_slice(&from[..row]);
        }
    }
    Ok(out)
}

/// Returns the same samples in another format with the same components.
fn repacked(frame: &Frame, format: PixelFormat) -> Result<Frame> {
    let info = FrameInfo {
        format,
        ..*frame.info()
    };
    let mut out = Frame::new(info)?;
    for layout in format.components() {
        let (w, h) = format.component_size(layout.component, info.width, info.height);
        let mut samples = vec![0.0; w * h];
        frame.as_ref().read(layout.component, &mut samples)?;
        out.as_mut().write(layout.component, &samples)?;
    }
    Ok(out)
}

/// Input of the upscalers: low-resolution frames under every condition. Codecs get the clip in
/// segments that begin with a key frame. A segment is as long as memory allows, and at most as long
/// as a usual group of pictures.
struct SmallFrames<'a> {
    frames: Frames,
    conditions: &'a [Condition],
    /// Frames by condition.
    ready: VecDeque<Vec<Frame>>,
    segment: usize,
    framerate: u32,
}

impl<'a> SmallFrames<'a> {
    fn new(frames: Frames, conditions: &'a [Condition]) -> Self {
        let (width, height) = frames.sizes[0];
        // Three bytes a pixel: 4:2:0 at two bytes a sample.
        let bytes = 3 * width * height * (1 + conditions.len());
        let segment = if conditions.iter().any(|c| c.codec().is_some()) {
            (MEMORY / bytes).clamp(PART, GOP as usize)
        } else {
            1
        };
        let rate = frames.reader.stream().framerate().unwrap_or((25, 1));
        let framerate = (f64::from(rate.0) / f64::from(rate.1)).round() as u32;
        Self {
            frames,
            conditions,
            ready: VecDeque::new(),
            segment,
            framerate: framerate.max(1),
        }
    }

    fn next(&mut self, of: &Evaluation) -> Result<Option<Vec<Frame>>> {
        if self.ready.is_empty() {
            self.make(of)?;
        }
        Ok(self.ready.pop_front())
    }

    fn make(&mut self, of: &Evaluation) -> Result<()> {
        let (width, height) = self.frames.sizes[0];
        let mut clean = Vec::new();
        while clean.len() < self.segment
            && let Some(frame) = self.frames.next()?
        {
            check(&of.stop)?;
            clean.push(resized(&frame, width, height, Kernel::CatmullRom)?);
        }
        self.ready = clean.iter().map(|_| Vec::new()).collect();
        for condition in self.conditions {
            check(&of.stop)?;
            let degraded = match condition.codec() {
                Some(codec) => codec.round_trip(&clean, self.framerate)?,
                None => clean.clone(),
            };
            self.ready
                .iter_mut()
                .zip(degraded)
                .for_each(|(frames, frame)| frames.push(frame));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::{Arc, atomic::AtomicBool},
    };

    use super::*;
    use crate::{
        Device,
        train::eval::{Method, MetricModels},
        video::{Options, StreamInfo, TimedFrame, Writer},
    };

    const SIZE: (usize, usize) = (135, 101);

    /// Texture that moves by a pixel per frame, except for a part that stands still.
    fn picture(t: usize) -> Vec<u8> {
        let pixel = |i: usize| {
            let (x, y) = (i % SIZE.0, i / SIZE.0);
            let u = if y < SIZE.1 / 2 { x + t } else { x };
            let wave =
                (0.9 * u as f32).sin() * 50.0 + (0.4 * y as f32 + 0.2 * u as f32).cos() * 50.0;
            [128.0 + wave, 120.0 + 0.5 * wave, 90.0].map(|v| v as u8)
        };
        (0..SIZE.0 * SIZE.1).flat_map(pixel).collect()
    }

    /// A lossless clip of `frames` frames at 10 a second.
    fn clip(dir: &Path, frames: usize) -> PathBuf {
        let path = dir.join("clip.mkv");
        let info = FrameInfo::new(PixelFormat::I420, SIZE.0, SIZE.1);
        let stream = StreamInfo::new(info, Some((10, 1))).unwrap();
        let options = Options {
            encoder: "avenc_ffv1".into(),
            ..Options::default()
        };
        let mut writer = Writer::create(&path, &stream, &options, None).unwrap();
        for t in 0..frames {
            let frame = TimedFrame {
                frame: Frame::from_rgb8_as(info, &picture(t)).unwrap(),
                pts: Duration::from_millis(100 * t as u64),
                duration: Some(Duration::from_millis(100)),
            };
            writer.push(&frame).unwrap();
        }
        writer.finish(false).unwrap();
        path
    }

    fn whole(path: PathBuf) -> Clip {
        Clip {
            path,
            start: Duration::ZERO,
            frames: 1000,
        }
    }

    fn evaluation(conditions: &[&str]) -> Evaluation {
        let methods = ["bicubic", "lanczos3"].map(|name| Method::interpolation(name).unwrap());
        let conditions = conditions.iter().map(|c| c.parse().unwrap()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        Evaluation::new(
            methods.into(),
            vec![2.0],
            conditions,
            MetricModels::default(),
            stop,
        )
        .unwrap()
    }

    #[test]
    fn a_clip_is_measured_in_parts_under_every_condition_for_clips() {
        let dir = tempfile::tempdir().unwrap();
        let clip = whole(clip(dir.path(), PART + 3));
        assert_eq!(clip.expected_frames().unwrap(), PART + 3);
        let mut steps = 0;
        let rows = evaluation(&["clean", "jpeg60", "h264-40"]).clip(&clip, || steps += 1);
        let rows = rows.unwrap();
        assert_eq!((rows.len(), steps), (2 * 2 * 2, PART + 3));
        for row in &rows {
            assert_eq!(row.frames, [PART, 3][row.part]);
            assert!(row.ssim.is_some() && row.tof.is_some() && row.flicker.is_some());
            assert!(row.psnr_y > 15.0 && row.psnr_y < 60.0, "{row:?}");
        }
        let of = |condition: &str| {
            let mut of = rows.iter().filter(|r| r.condition == condition);
            of.find(|r| r.method == "lanczos3").unwrap()
        };
        let (clean, coded) = (of("clean"), of("h264-40"));
        assert!(clean.psnr_y > coded.psnr_y + 1.0);
        // An interpolation changes the part that stands still only near the part that moves.
        let (still, whole) = (clean.flicker.unwrap(), clean.warping_error.unwrap());
        assert!(still < 0.5 && whole.is_finite(), "{still} {whole}");
    }

    #[test]
    fn every_condition_is_a_stream_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let clip = whole(clip(dir.path(), 5));
        let rows = |conditions: &[&str], models: &[&str]| {
            let mut evaluation = evaluation(conditions);
            let models = models
                .iter()
                .map(|m| Method::model(m, Device::Cpu).unwrap());
            evaluation.methods = models.collect();
            let rows = evaluation.clip(&clip, || {}).unwrap();
            rows.into_iter()
                .filter(|r| r.condition == "clean")
                .collect::<Vec<_>>()
        };
        // Automatic denoise and the temporal filter depend on the frames before.
        let filter = "tiny@temporal=filter,denoise=0.6";
        let among_others = rows(&["h264-40", "clean", "h264-30"], &["tiny", filter]);
        let alone = rows(&["clean"], &["tiny", filter]);
        assert_eq!(among_others.len(), 2);
        for (a, b) in among_others.iter().zip(&alone) {
            assert_eq!((a.psnr_y, a.flicker), (b.psnr_y, b.flicker), "{}", a.method);
        }
        let off = rows(&["clean"], &["tiny@temporal=off,denoise=0.6"]);
        assert_ne!(alone[1].psnr_y, off[0].psnr_y, "the filter has no effect");
    }

    #[test]
    fn start_and_number_of_frames_are_respected() {
        let dir = tempfile::tempdir().unwrap();
        let clip = Clip {
            start: Duration::from_millis(250),
            frames: 4,
            ..whole(clip(dir.path(), 10))
        };
        assert_eq!(clip.expected_frames().unwrap(), 4);
        let mut frames = Frames::open(&clip, 2.0).unwrap();
        let first = frames.next().unwrap().unwrap();
        assert_eq!((first.info().width, first.info().height), (132, 100));
        let info = FrameInfo::new(PixelFormat::I420, SIZE.0, SIZE.1);
        let third = Frame::from_rgb8_as(info, &picture(3)).unwrap();
        for (got, want) in first
            .plane(0)
            .chunks(132)
            .zip(third.plane(0).chunks(SIZE.0))
        {
            assert_eq!(got, &want[..132]);
        }
        let left = std::iter::from_fn(|| frames.next().unwrap()).count();
        assert_eq!(left, 3);
        let late = Clip {
            frames: 100,
            ..clip
        };
        assert_eq!(late.expected_frames().unwrap(), 8);
    }

    #[test]
    fn a_request_to_stop_ends_the_clip() {
        let dir = tempfile::tempdir().unwrap();
        let clip = whole(clip(dir.path(), 5));
        let mut evaluation = evaluation(&["clean"]);
        let stop = evaluation.stop.clone();
        let stopped = evaluation.clip(&clip, || {
            stop.store(true, std::sync::atomic::Ordering::SeqCst)
        });
        assert!(matches!(stopped, Err(Error::Cancelled)));
    }

    #[test]
    fn frames_of_every_format_become_planar() {
        let rgb: Vec<u8> = picture(0);
        let like = FrameInfo::new(PixelFormat::I420, SIZE.0, SIZE.1);
        let want = Frame::from_rgb8_as(like, &rgb).unwrap();
        for format in PixelFormat::ALL {
            let info = FrameInfo { format, ..like };
            let info = if format.is_rgb() {
                FrameInfo::new(format, SIZE.0, SIZE.1)
            } else {
                info
            };
            let frame = Frame::from_rgb8_as(info, &rgb).unwrap();
            let planar = planar(&frame, 100, 90).unwrap();
            let deep = format.depth() > 8;
            let worst = planar.plane(0).chunks(if deep { 200 } else { 100 });
            let worst = worst.zip(want.plane(0).chunks(SIZE.0)).flat_map(|(a, b)| {
                let code = |x: usize| {
                    if deep {
                        u16::from_le_bytes([a[2 * x], a[2 * x + 1]]) / 4
                    } else {
                        u16::from(a[x])
                    }
                };
                (0..100).map(move |x| code(x).abs_diff(u16::from(b[x])))
            });
            let worst = worst.max().unwrap();
            assert!(worst <= 2, "{format:?}: {worst}");
        }
        assert!(planar(&want, SIZE.0 + 1, 90).is_err());
    }
}
