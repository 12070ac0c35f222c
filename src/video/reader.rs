//! Decoding: a file becomes frames.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use gst::{ClockTime, PadProbeReturn, prelude::*};
use gst_app::AppSink;

use super::{
    StreamInfo, TimedFrame,
    bus::{Bus, Failure, append, codec_name, discard, file_source, make, on_data, on_time, refuse},
};
use crate::{Error, Result, frame::PixelFormat};

/// Decoded frames that wait for the caller.
const AHEAD: u32 = 4;
/// A pause in decoding after which the file is given up. Nothing that works takes so long for a frame.
const STALLED: Duration = Duration::from_secs(60);
/// How often errors are looked for while there is no frame.
const POLL: ClockTime = ClockTime::from_mseconds(50);
/// How often in a row none of GStreamer's threads has had anything to do when it is given up.
const QUIET: u32 = 40;
/// How long to wait at the end of the video for the end of the other streams.
const OTHERS: Duration = Duration::from_secs(10);
/// A video that ends this much before its file says it does is reported.
const MISSING: Duration = Duration::from_millis(1500);

/// Decodes the first video stream of a file: an iterator of frames in the order in which they are shown.
///
/// Frames keep the bit depth, matrix, range and chroma site of the file; formats that the library does not have become
/// the nearest one that it has. Interlaced video is deinterlaced, a frame for each frame, in 8 bits, and pictures that the
/// file says are to be turned are turned. After an error there are no more frames.
pub struct Reader {
    source: Source,
    found: Arc<Found>,
    stream: StreamInfo,
    /// Caps of the frames, to see when they change.
    caps: gst::Caps,
    /// The first frame, decoded to know the stream.
    first: Option<gst::Sample>,
    /// Where the last frame ends.
    end: Duration,
    /// Whether the frames come from behind a jump: their running time then counts from there.
    sought: bool,
    over: bool,
    warnings: Vec<String>,
}

/// What the file holds, found out in GStreamer's threads.
#[derive(Default)]
struct Found {
    video: AtomicBool,
    codec: Mutex<String>,
    audio: AtomicUsize,
    subtitles: AtomicUsize,
    /// Where the streams beside the video end, as far as they have been read, in nanoseconds.
    others_end: AtomicU64,
}

impl Reader {
    /// Opens `path` and decodes its first frame.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Video`] when it is no video, holds no video stream, its
    /// decoder is missing, or its frames are of no use.
    pub fn open(path: &Path) -> Result<Self> {
        super::init()?;
        let file = fs::metadata(path).map_err(Error::io(path))?;
        let failed = |reason: String| Error::video(path, reason);
        if !file.is_file() {
            return Err(failed("not a regular file".into()));
        }
        fs::File::open(path).map_err(Error::io(path))?;
        if file.len() == 0 {
            return Err(failed("an empty file".into()));
        }
        let (mut source, found) = Source::start(path)?;
        let none = || failed("a video without frames".into());
        let first = source.sample()?.ok_or_else(none)?;
        let caps = first.caps_owned().ok_or_else(none)?;
        let mut stream = StreamInfo::from_caps(&caps).map_err(failed)?;
        let duration = source.pipeline.query_duration::<ClockTime>();
        stream.set_duration(duration.map(Duration::from));
        let warnings = source.missing().iter();
        let warnings =
            warnings.map(|name| format!("GStreamer has no {name}: that stream is left out"));
        let warnings = warnings.collect();
        Ok(Self {
            source,
            found,
            stream,
            caps,
            first: Some(first),
            end: Duration::ZERO,
            sought: false,
            over: false,
            warnings,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// What the first frame is like; the frames after it are the same, but for files that change their size midway.
    pub fn stream(&self) -> &StreamInfo {
        &self.stream
    }

    /// What people call the video's codec.
    pub fn codec(&self) -> String {
        self.found
            .codec
            .lock()
            .map_or_else(|_| String::new(), |c| c.clone())
    }

    /// The number of audio streams.
    pub fn audio_streams(&self) -> usize {
        self.found.audio.load(Ordering::SeqCst)
    }

    /// The number of subtitle streams.
    pub fn subtitle_streams(&self) -> usize {
        self.found.subtitles.load(Ordering::SeqCst)
    }

    /// What is odd about the file without being an error; complete when there are no more frames.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Goes on with the last key frame at or before `to`.
    ///
    /// # Errors
    /// [`Error::Video`] when the file does not allow it.
    pub fn seek(&mut self, to: Duration) -> Result<()> {
        let to = ClockTime::from_nseconds(u64::try_from(to.as_nanos()).unwrap_or(u64::MAX - 1));
        let flags = gst::SeekFlags::FLUSH | gst::SeekFlags::KEY_UNIT | gst::SeekFlags::SNAP_BEFORE;
        let sought = self.source.pipeline.seek_simple(flags, to);
        sought.map_err(|_| self.failed("GStreamer cannot seek in it".into()))?;
        self.first = None;
        self.over = false;
        self.sought = true;
        Ok(())
    }

    fn failed(&self, reason: String) -> Error {
        Error::video(self.path(), reason)
    }

    /// The next frame that is to be shown; `None` at the end.
    fn pull(&mut self) -> Result<Option<TimedFrame>> {
        loop {
            let sample = match self.first.take() {
                Some(first) => Some(first),
                None => self.source.sample()?,
            };
            let Some(sample) = sample else {
                self.look_for_missing_end();
                return Ok(None);
            };
            if let Some(frame) = self.frame(&sample)? {
                return Ok(Some(frame));
            }
        }
    }

    /// The frame in `sample`; `None` for one that is decoded only for the sake of others.
    fn frame(&mut self, sample: &gst::Sample) -> Result<Option<TimedFrame>> {
        let (Some(buffer), Some(caps)) = (sample.buffer(), sample.caps()) else {
            return Ok(None);
        };
        if *caps != *self.caps {
            self.caps = caps.to_owned();
            let duration = self.stream.duration();
            self.stream = StreamInfo::from_caps(&self.caps).map_err(|e| self.failed(e))?;
            self.stream.set_duration(duration);
        }
        let segment = sample.segment().and_then(|s| s.downcast_ref::<ClockTime>());
        let pts = match (segment, buffer.pts()) {
            (Some(segment), Some(pts)) => match segment.to_running_time(pts) {
                Some(time) => {
                    let from = segment.time().filter(|_| self.sought);
                    Duration::from(time) + from.map(Duration::from).unwrap_or_default()
                }
                None => return Ok(None),
            },
            _ => self.end,
        };
        let duration = buffer.duration().map(Duration::from);
        let duration = duration.or(self.stream.frame_duration());
        self.end = pts + duration.unwrap_or_default();
        Ok(Some(TimedFrame {
            frame: self.stream.read(buffer).map_err(|e| self.failed(e))?,
            pts,
            duration,
        }))
    }

    /// A file that breaks off ends like any other, only early, and in all of its streams.
    fn look_for_missing_end(&mut self) {
        let all = self.stream.duration().unwrap_or_default();
        if self.end + MISSING >= all {
            return;
        }
        self.source.await_others();
        let others = self.found.others_end.load(Ordering::SeqCst);
        if self.end.max(Duration::from_nanos(others)) + MISSING < all {
            self.warnings.push(format!(
                "the video ends at {:.1} s where the file says {:.1} s: it may be cut off",
                self.end.as_secs_f64(),
                all.as_secs_f64()
            ));
        }
    }
}

impl Iterator for Reader {
    type Item = Result<TimedFrame>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let next = self.pull();
        self.over = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}

/// A running pipeline that decodes a file.
struct Source {
    path: PathBuf,
    pipeline: gst::Pipeline,
    sink: AppSink,
    bus: Bus,
    /// Heard while listening for something else.
    failed: Option<Failure>,
}

impl Source {
    fn start(path: &Path) -> Result<(Self, Arc<Found>)> {
        let failed = |reason| Error::video(path, reason);
        let (pipeline, sink, found) = build(path).map_err(failed)?;
        let source = Self {
            path: path.into(),
            bus: Bus::of(&pipeline)?,
            pipeline,
            sink,
            failed: None,
        };
        // Why it fails is on the bus, where the first sample is waited for.
        let _ = source.pipeline.set_state(gst::State::Playing);
        Ok((source, found))
    }

    /// The next decoded frame; `None` at the end. Frames decoded before an error come before it.
    fn sample(&mut self) -> Result<Option<gst::Sample>> {
        let since = Instant::now();
        let mut quiet = 0;
        loop {
            if let Some(sample) = self.sink.try_pull_sample(POLL) {
                return Ok(Some(sample));
            }
            let heard = self.failed.take();
            if let Some(failure) = heard.or_else(|| self.bus.failure(ClockTime::ZERO)) {
                return Err(Error::video(&self.path, failure.reason));
            }
            if self.sink.is_eos() {
                return Ok(None);
            }
            // Of some errors GStreamer's autopluggers tell nobody when they come early (1.22).
            quiet = if is_idle(&self.pipeline) {
                quiet + 1
            } else {
                0
            };
            if quiet > QUIET {
                let reason = "GStreamer finds nothing to decode in it: is it damaged, or was it never finished?";
                return Err(Error::video(&self.path, reason));
            }
            if since.elapsed() > STALLED {
                let reason = format!("decoding has stood still for {} s", STALLED.as_secs());
                return Err(Error::video(&self.path, reason));
            }
        }
    }

    /// Names of the plugins that the streams beside the video would need.
    fn missing(&mut self) -> &[String] {
        self.failed = self.bus.failure(ClockTime::ZERO);
        self.bus.missing()
    }

    /// Waits until the other streams have ended, too; they are not decoded, so that is soon.
    fn await_others(&mut self) {
        let since = Instant::now();
        while since.elapsed() < OTHERS && !is_idle(&self.pipeline) {
            if self.bus.wait(POLL).is_some() {
                return;
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // It cannot fail downwards, and there is nobody to tell.
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// Whether none of the pipeline's threads is running: nothing will come any more.
fn is_idle(pipeline: &gst::Pipeline) -> bool {
    let running = |pad: &gst::Pad| pad.task_state() == gst::TaskState::Started;
    let elements = pipeline.iterate_recurse().into_iter().flatten();
    !elements.into_iter().any(|e| e.pads().iter().any(running))
}

/// filesrc ! parsebin, whose first video stream goes on as [`decode`] says; the others are counted and thrown away.
fn build(path: &Path) -> Result<(gst::Pipeline, AppSink, Arc<Found>), String> {
    let pipeline = gst::Pipeline::new();
    let source = file_source(path)?;
    let parse = make("parsebin")?;
    let formats = PixelFormat::ALL.map(PixelFormat::name);
    let caps = gst::Caps::builder("video/x-raw")
        .field("format", gst::List::new(formats))
        .build();
    let sink = AppSink::builder()
        .caps(&caps)
        .sync(false)
        .max_buffers(AHEAD)
        .build();
    pipeline
        .add_many([&source, &parse, sink.upcast_ref()])
        .and_then(|()| source.link(&parse))
        .map_err(|e| e.to_string())?;
    let found = Arc::new(Found::default());
    let weak = pipeline.downgrade();
    let (seen, target) = (found.clone(), sink.downgrade());
    parse.connect_pad_added(move |parse, pad| {
        let (Some(pipeline), Some(sink)) = (weak.upgrade(), target.upgrade()) else {
            return;
        };
        let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
        let kind = caps.structure(0).map_or("", |s| s.name().as_str());
        let linked = if is_video(kind) && !seen.video.swap(true, Ordering::SeqCst) {
            if let Ok(mut codec) = seen.codec.lock() {
                *codec = codec_name(&caps);
            }
            decode(&pipeline, pad, &sink)
        } else {
            if kind.starts_with("audio/") {
                seen.audio.fetch_add(1, Ordering::SeqCst);
            } else if kind.starts_with("text/") || kind.starts_with("subpicture/") {
                seen.subtitles.fetch_add(1, Ordering::SeqCst);
            }
            let seen = seen.clone();
            on_time(pad, move |_, end| {
                seen.others_end.fetch_max(end.nseconds(), Ordering::SeqCst);
                PadProbeReturn::Ok
            });
            discard(&pipeline, pad)
        };
        if let Err(reason) = linked {
            refuse(&pipeline, &reason);
        }
        let (weak, parse, seen) = (weak.clone(), parse.downgrade(), seen.clone());
        on_data(pad, move || {
            if let (false, Some(pipeline), Some(parse)) = (
                seen.video.load(Ordering::SeqCst),
                weak.upgrade(),
                parse.upgrade(),
            ) {
                let caps = parse
                    .src_pads()
                    .into_iter()
                    .filter_map(|p| p.current_caps());
                let names: Vec<_> = caps.map(|c| codec_name(&c)).collect();
                let reason = format!("there is no video in it, only {}", names.join(", "));
                refuse(&pipeline, &reason);
            }
        });
    });
    Ok((pipeline, sink, found))
}

fn is_video(kind: &str) -> bool {
    kind.starts_with("video/") || kind.starts_with("image/")
}

/// Leads the encoded stream of `pad` through a decoder to `sink`.
fn decode(pipeline: &gst::Pipeline, pad: &gst::Pad, sink: &AppSink) -> Result<(), String> {
    let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
    if caps.structure(0).is_some_and(|s| s.name() == "video/x-raw") {
        return show(pipeline, pad, pad, sink);
    }
    let decoder = make("decodebin")?;
    let (weak, target, encoded) = (pipeline.downgrade(), sink.downgrade(), pad.downgrade());
    decoder.connect_pad_added(move |_, pad| {
        if let (Some(pipeline), Some(sink), Some(encoded)) =
            (weak.upgrade(), target.upgrade(), encoded.upgrade())
            && let Err(reason) = show(&pipeline, pad, &encoded, &sink)
        {
            refuse(&pipeline, &reason);
        }
    });
    append(pipeline, pad, &[decoder], None)
}

/// Leads the raw video of `pad` to `sink`: deinterlaced and turned where its caps and the tags of the `encoded` stream
/// ask for it, in one of the library's formats.
fn show(
    pipeline: &gst::Pipeline,
    pad: &gst::Pad,
    encoded: &gst::Pad,
    sink: &AppSink,
) -> Result<(), String> {
    let mut chain = Vec::new();
    let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
    let mode = caps.structure(0);
    let mode = mode.and_then(|s| s.get::<&str>("interlace-mode").ok());
    match mode {
        None | Some("progressive") => {}
        Some("interleaved" | "mixed") => {
            // It takes 8 bits only, so a converter may have to come first; unless it is strict, others pass it as they are.
            chain.push(make("videoconvert")?);
            let deinterlace = make("deinterlace")?;
            deinterlace.set_property_from_str("mode", "auto-strict");
            deinterlace.set_property_from_str("fields", "top");
            chain.push(deinterlace);
        }
        Some(other) => {
            return Err(format!(
                "the video is interlaced in a way ({other}) that GStreamer cannot deinterlace"
            ));
        }
    }
    if is_turned(encoded) {
        chain.push(make("videoconvert")?);
        let flip = make("videoflip")?;
        flip.set_property_from_str("video-direction", "auto");
        chain.push(flip);
    }
    chain.push(make("videoconvert")?);
    let last = chain.last().and_then(|e| e.static_pad("src"));
    let last = last.ok_or("a converter without a source pad")?;
    let end = sink.static_pad("sink").ok_or("a sink without a pad")?;
    append(pipeline, pad, &chain, Some((&last, &end)))
}

/// Whether the tags that have come through `pad` say that the pictures are to be turned.
fn is_turned(pad: &gst::Pad) -> bool {
    let mut turned = false;
    pad.sticky_events_foreach(|event| {
        if let gst::EventView::Tag(tag) = event.view() {
            let orientation = tag.tag().get::<gst::tags::ImageOrientation>();
            turned |= orientation.is_some_and(|o| o.get() != "rotate-0");
        }
        std::ops::ControlFlow::Continue(gst::EventForeachAction::Keep)
    });
    turned
}
