//! Decoding of files to frames.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{self, AtomicUsize},
    },
    time::{Duration, Instant},
};

use gst::{ClockTime, prelude::*};
use gst_app::AppSink;

use super::{
    PROBE, Part, StreamInfo, TimedFrame,
    bus::{
        Bus, Demux, Failure, append, codec_name, discard, hide_views, is_idle, make,
        missing_plugins, parse_file, refuse, start,
    },
    cut::missing,
    orientation::Turn,
    survey::{Kind, Survey, Track},
};
use crate::{Error, Result, frame::PixelFormat};

/// Maximum number of decoded frames that wait for the caller.
const AHEAD: u32 = 4;
/// Pause in decoding after which the reader gives up. No working decoder takes as long for a frame.
const STALLED: Duration = Duration::from_secs(60);
/// Interval of checks for errors while no frame arrives.
const POLL: ClockTime = ClockTime::from_mseconds(50);
/// Consecutive checks without a running GStreamer thread after which the reader gives up.
const QUIET: u32 = 40;
/// Maximum time by which decoded frames may end before the packets do.
const SHORT: Duration = Duration::from_millis(200);
/// Time between the end of the video and the stated end of the file from which a warning is given.
const MISSING: Duration = Duration::from_millis(1500);
/// Maximum difference between the times of a packet and its decoded frame.
const SAME: Duration = Duration::from_millis(1);

/// Iterator over the frames of a file's main video stream, in the order of display.
///
/// Frames keep the bit depth, matrix, range and chroma site of the file. Formats that the library
/// lacks are converted to the nearest one that it has. Interlaced video is deinterlaced to one
/// frame for each frame, in 8 bits. Frames are rotated as the file states. No frames follow an
/// error.
pub struct Reader {
    source: Source,
    /// Survey of the whole file.
    whole: Arc<Survey>,
    /// Survey of the part.
    survey: Arc<Survey>,
    /// Index of the decoded stream among the video streams.
    track: usize,
    stream: StreamInfo,
    /// Caps of the frames, to detect changes.
    caps: gst::Caps,
    /// First frame, decoded to determine the kind of the stream.
    first: Option<gst::Sample>,
    /// Frames of other times are skipped.
    part: Part,
    /// Duration that the file states.
    stated: Duration,
    /// Number of frames returned.
    frames: u64,
    /// End of the last frame returned.
    end: Duration,
    /// End of the last frame decoded.
    decoded: Duration,
    /// True if the frames follow a seek: their running time then counts from its target.
    sought: bool,
    over: bool,
    warnings: Vec<String>,
}

impl Reader {
    /// Opens `path`. Reads it once to the end without decoding, to find all of its streams, then
    /// decodes the first frame.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read. [`Error::Video`] if it is not a video, has no
    /// video stream, its decoder is missing, or its frames cannot be used.
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
        let survey = Survey::of(path)?;
        let track = survey.main_video().ok_or_else(|| {
            let names: Vec<_> = survey.tracks.iter().map(|t| codec_name(&t.caps)).collect();
            let found = if names.is_empty() {
                "GStreamer finds no stream".into()
            } else {
                format!("there is no video in it, only {}", names.join(", "))
            };
            failed(missing_plugins(&survey.missing).unwrap_or(found))
        })?;
        if let (Some(probe), Some(true)) = (PROBE.get(), track_of(&survey, track).map(is_unusual)) {
            probe(path).map_err(failed)?;
        }
        let turn = track_of(&survey, track).map_or(Turn::default(), |t| t.turn_at(Duration::ZERO));
        let mut source = Source::start(path, &survey.demux, track, turn)?;
        let none = || failed("the video has no frames".into());
        let first = source.sample()?.ok_or_else(none)?;
        let caps = first.caps_owned().ok_or_else(none)?;
        let container = track_of(&survey, track).and_then(Track::colours);
        let mut stream = StreamInfo::from_caps(&caps, container.as_deref()).map_err(failed)?;
        let duration = source.pipeline.query_duration::<ClockTime>();
        stream.set_duration(duration.map(Duration::from));
        let missing = survey.missing.iter();
        let mut warnings: Vec<_> = missing
            .map(|name| format!("GStreamer has no {name}: the stream is left out"))
            .collect();
        if track_of(&survey, track).is_some_and(Track::hides_alpha) {
            warnings.push(format!(
                "its alpha is left out: with it, {} loses frames",
                gst::version_string()
            ));
        }
        let survey = Arc::new(survey);
        Ok(Self {
            source,
            whole: survey.clone(),
            survey,
            track,
            stream,
            caps,
            first: Some(first),
            part: Part::WHOLE,
            stated: duration.map_or(Duration::ZERO, Duration::from),
            frames: 0,
            end: Duration::ZERO,
            decoded: Duration::ZERO,
            sought: false,
            over: false,
            warnings,
        })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// Returns the properties of the first frame. Later frames have the same, except in files that
    /// change their size midway.
    pub fn stream(&self) -> &StreamInfo {
        &self.stream
    }

    /// Returns the common name of the video's codec.
    pub fn codec(&self) -> String {
        self.track()
            .map_or_else(String::new, |track| codec_name(&track.caps))
    }

    /// Returns the number of audio streams.
    pub fn audio_streams(&self) -> usize {
        self.survey.tracks(Kind::Audio).count()
    }

    /// Returns the number of subtitle streams.
    pub fn subtitle_streams(&self) -> usize {
        self.survey.tracks(Kind::Subtitles).count()
    }

    /// Returns the decoded stream as the file contains it.
    pub(super) fn track(&self) -> Option<&Track> {
        track_of(&self.survey, self.track)
    }

    /// Returns the parts of the video stream that did not become frames, as sentences with both
    /// values. The list is complete after the last frame.
    pub(super) fn losses(&self) -> Vec<String> {
        let track = self.track();
        track.map_or_else(Vec::new, |track| losses(track, self.frames, self.end))
    }

    pub(super) fn survey(&self) -> &Arc<Survey> {
        &self.survey
    }

    /// Returns oddities of the file that are not errors. The list is complete after the last frame.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Continues with the last key frame at or before `to`.
    ///
    /// # Errors
    /// [`Error::Video`] if the file does not allow it.
    pub fn seek(&mut self, to: Duration) -> Result<()> {
        let to = ClockTime::from_nseconds(u64::try_from(to.as_nanos()).unwrap_or(u64::MAX - 1));
        let flags = gst::SeekFlags::FLUSH | gst::SeekFlags::KEY_UNIT | gst::SeekFlags::SNAP_BEFORE;
        let sought = self.source.pipeline.seek_simple(flags, to);
        sought.map_err(|_| self.failed("GStreamer cannot seek in the file".into()))?;
        self.first = None;
        self.over = false;
        self.sought = true;
        Ok(())
    }

    fn failed(&self, reason: String) -> Error {
        Error::video(self.path(), reason)
    }

    /// Restricts the reader to the frames in `part` of the file: decodes up to the first of them,
    /// after a seek if the file allows it. [`Self::stream`] then has the properties of that frame.
    /// Another part may be set later.
    ///
    /// # Errors
    /// [`Error::Video`] if no frame is in the part, or decoding fails.
    pub fn set_part(&mut self, part: Part) -> Result<()> {
        let track = track_of(&self.whole, self.track);
        let times = track.map_or_else(Vec::new, |track| track.times.clone());
        let end = track.and_then(|track| track.end);
        let end = end.map_or(Duration::ZERO, Duration::from);
        let start = part.start.as_secs_f64();
        if part.start >= end {
            let end = end.as_secs_f64();
            let reason = format!("it ends at {end:.3} s, before the start at {start:.3} s");
            return Err(self.failed(reason));
        }
        if part.end < Duration::MAX && end + MISSING < part.end {
            self.warn(format!(
                "it ends at {:.3} s, before the end of the part at {:.3} s",
                end.as_secs_f64(),
                part.end.as_secs_f64()
            ));
        }
        self.part = part;
        (self.frames, self.end, self.decoded) = Default::default();
        self.over = false;
        self.survey = Arc::new(self.whole.within(part));
        let turn = self
            .track()
            .map_or(Turn::default(), |t| t.turn_at(part.start));
        if turn != self.source.turn {
            self.restart(turn)?;
        }
        if part.start > Duration::ZERO && !self.seek_to_part(&times)? {
            self.restart(self.source.turn)?;
        }
        let Some(first) = self.sample()? else {
            let reason = format!("no frame is shown between {start:.3} s and the end of the part");
            return Err(self.failed(reason));
        };
        self.set_caps(&first)?;
        self.first = Some(first);
        let length = part.end.min(self.stated.max(end)) - part.start;
        self.stream.set_duration(Some(length));
        Ok(())
    }

    fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Decodes from the start of the file again, and turns the frames by `turn`.
    fn restart(&mut self, turn: Turn) -> Result<()> {
        self.source = Source::start(&self.source.path, &self.survey.demux, self.track, turn)?;
        self.first = None;
        self.sought = false;
        Ok(())
    }

    /// Seeks to the last key frame before the part. Returns false if the file does not allow it, or
    /// frames would be missing. `times` are those of all packets.
    fn seek_to_part(&mut self, times: &[(ClockTime, ClockTime)]) -> Result<bool> {
        let is_all_timed = self.track().is_some_and(|track| track.untimed == 0);
        let starts = || times.iter().map(|(start, _)| Duration::from(*start));
        // The start of the part may be before the key frame that is its first frame.
        let first = starts().filter(|start| self.part.has(*start)).min();
        let target = first.unwrap_or(self.part.start);
        if !self.survey.can_seek() || !is_all_timed || self.seek(target).is_err() {
            return Ok(false);
        }
        let first = loop {
            match self.source.sample() {
                Ok(Some(sample)) => match self.time(&sample) {
                    Some(time) => break (sample, time),
                    None => continue,
                },
                _ => return Ok(false),
            }
        };
        let (sample, time) = first;
        self.first = Some(sample);
        let is_known = starts().any(|start| start.abs_diff(time) < SAME);
        let is_skipped = |start: Duration| self.part.has(start) && start + SAME < time;
        Ok(is_known && !starts().any(is_skipped))
    }

    /// Returns the next frame in the part; `None` at the end.
    fn pull(&mut self) -> Result<Option<TimedFrame>> {
        let Some(sample) = self.sample()? else {
            return Ok(None);
        };
        self.set_caps(&sample)?;
        let (Some(buffer), Some(pts)) = (sample.buffer(), self.time(&sample)) else {
            return Ok(None);
        };
        let turn = self
            .track()
            .map_or(Turn::default(), |track| track.turn_at(pts));
        if turn != self.source.turn {
            let (time, from) = (pts.as_secs_f64(), self.source.turn);
            return Err(self.failed(format!(
                "at {time:.2} s the rotation changes from {from} to {turn}: cut it there and \
                 upscale the parts"
            )));
        }
        let duration = buffer.duration().map(Duration::from);
        let duration = duration.or(self.stream.frame_duration());
        self.end = pts + duration.unwrap_or_default();
        self.decoded = self.end;
        self.frames += 1;
        Ok(Some(TimedFrame {
            frame: self.stream.read(buffer).map_err(|e| self.failed(e))?,
            pts,
            duration,
        }))
    }

    /// Returns the next decoded frame in the part; `None` at the end. Skips frames that are only
    /// decoded as a reference for others.
    fn sample(&mut self) -> Result<Option<gst::Sample>> {
        loop {
            let sample = match self.first.take() {
                Some(first) => Some(first),
                None => self.source.sample()?,
            };
            let Some(sample) = sample else {
                self.look_for_missing_end();
                return Ok(None);
            };
            let Some(time) = self.time(&sample) else {
                continue;
            };
            match self.part.place(time) {
                Ordering::Equal => return Ok(Some(sample)),
                Ordering::Greater => return Ok(None),
                Ordering::Less => {}
            }
            let duration = sample.buffer().and_then(|buffer| buffer.duration());
            let duration = duration.map(Duration::from);
            let duration = duration.or(self.stream.frame_duration());
            self.decoded = time + duration.unwrap_or_default();
        }
    }

    /// Returns the time of a decoded frame; `None` if it is not shown.
    fn time(&self, sample: &gst::Sample) -> Option<Duration> {
        let segment = sample.segment().and_then(|s| s.downcast_ref::<ClockTime>());
        let (Some(segment), Some(pts)) = (segment, sample.buffer()?.pts()) else {
            return Some(self.decoded);
        };
        let time = segment.to_running_time(pts)?;
        let from = segment.time().filter(|_| self.sought);
        Some(Duration::from(time) + from.map(Duration::from).unwrap_or_default())
    }

    /// Updates the properties of the stream if `sample` has others.
    fn set_caps(&mut self, sample: &gst::Sample) -> Result<()> {
        let Some(caps) = sample.caps().filter(|caps| **caps != *self.caps) else {
            return Ok(());
        };
        self.caps = caps.to_owned();
        let duration = self.stream.duration();
        let container = self.track().and_then(Track::colours);
        self.stream =
            StreamInfo::from_caps(&self.caps, container.as_deref()).map_err(|e| self.failed(e))?;
        self.stream.set_duration(duration);
        Ok(())
    }

    /// Warns of a file that was cut off. Such a file ends without an error, but early and in all
    /// streams.
    fn look_for_missing_end(&mut self) {
        let stated = self.stated.min(self.part.end);
        let ends = self.survey.tracks.iter().filter_map(|track| track.end);
        let read = ends.max().map_or(self.end, Duration::from).max(self.end);
        let is_read = read < self.part.end;
        if let Some(bytes) = missing(self.path()).filter(|_| is_read) {
            self.warn(format!(
                "the file is cut off: {bytes} bytes are missing at its end"
            ));
        } else if read + MISSING < stated {
            self.warn(format!(
                "the file ends at {:.1} s instead of {:.1} s: it may be cut off",
                read.as_secs_f64(),
                stated.as_secs_f64()
            ));
        }
    }
}

fn track_of(survey: &Survey, index: usize) -> Option<&Track> {
    survey.tracks(Kind::Video).nth(index)
}

/// Returns the packets of `track` that did not become one of the `frames` decoded frames, which end
/// at `end`, as sentences with both values.
pub(super) fn losses(track: &Track, frames: u64, end: Duration) -> Vec<String> {
    let mut found = Vec::new();
    if frames < track.packets && track.is_frame_by_frame() {
        found.push(format!(
            "{} frames are in the input, {frames} could be decoded",
            track.packets
        ));
    }
    let stated = track.end.map_or(Duration::ZERO, Duration::from);
    if end + SHORT < stated {
        found.push(format!(
            "the video of the input ends at {:.3} s, its decoded frames end at {:.3} s",
            stated.as_secs_f64(),
            end.as_secs_f64()
        ));
    }
    found
}

/// Returns true unless the decoder of a stream is known not to crash with its pixel format.
fn is_unusual(track: &Track) -> bool {
    let Some(structure) = track.caps.structure(0) else {
        return true;
    };
    match structure.name().as_str() {
        "video/x-vp8" | "video/x-vp9" | "video/x-av1" | "video/mpeg" | "video/x-raw" => false,
        "video/x-h264" | "video/x-h265" => {
            let chroma = structure.get::<&str>("chroma-format").unwrap_or("4:2:0");
            chroma == "4:0:0" && structure.get::<u32>("bit-depth-luma").unwrap_or(8) > 8
        }
        _ => true,
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

/// Running pipeline that decodes a file.
struct Source {
    path: PathBuf,
    pipeline: gst::Pipeline,
    sink: AppSink,
    bus: Bus,
    /// Turn of the frames that the packets state.
    turn: Turn,
    /// Failure received while waiting for another message.
    failed: Option<Failure>,
}

impl Source {
    fn start(path: &Path, demux: &Demux, track: usize, turn: Turn) -> Result<Self> {
        let failed = |reason| Error::video(path, reason);
        let (pipeline, sink) = build(path, demux, track, turn).map_err(failed)?;
        let source = Self {
            path: path.into(),
            bus: Bus::of(&pipeline)?,
            pipeline,
            sink,
            turn,
            failed: None,
        };
        start(&source.pipeline);
        Ok(source)
    }

    /// Returns the next decoded frame; `None` at the end. Frames decoded before an error come
    /// before it.
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
            // GStreamer 1.22's autopluggers do not report some early errors.
            quiet = if is_idle(&self.pipeline) {
                quiet + 1
            } else {
                0
            };
            if quiet > QUIET {
                let reason =
                    "GStreamer finds nothing to decode: the file may be damaged or incomplete";
                return Err(Error::video(&self.path, reason));
            }
            if since.elapsed() > STALLED {
                let reason = format!("no frame was decoded for {} s", STALLED.as_secs());
                return Err(Error::video(&self.path, reason));
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Going down to NULL cannot fail.
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// Builds a parsebin whose video stream number `track` continues as in [`decode`]. The others are
/// discarded.
fn build(
    path: &Path,
    demux: &Demux,
    track: usize,
    turn: Turn,
) -> Result<(gst::Pipeline, AppSink), String> {
    let pipeline = gst::Pipeline::new();
    let elements = parse_file(&pipeline, path, demux)?;
    let formats = PixelFormat::ALL.map(PixelFormat::name);
    let caps = gst::Caps::builder("video/x-raw")
        .field("format", gst::List::new(formats))
        .build();
    let sink = AppSink::builder()
        .caps(&caps)
        .sync(false)
        .max_buffers(AHEAD)
        .build();
    pipeline.add(&sink).map_err(|e| e.to_string())?;
    let (weak, target) = (pipeline.downgrade(), sink.downgrade());
    let videos = AtomicUsize::new(0);
    elements[elements.len() - 1].connect_pad_added(move |_, pad| {
        let (Some(pipeline), Some(sink)) = (weak.upgrade(), target.upgrade()) else {
            return;
        };
        let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
        let is_main = Kind::of(&caps) == Kind::Video
            && videos.fetch_add(1, atomic::Ordering::SeqCst) == track;
        let linked = if is_main {
            decode(&pipeline, pad, &sink, turn)
        } else {
            discard(&pipeline, pad)
        };
        if let Err(reason) = linked {
            refuse(&pipeline, &reason);
        }
    });
    Ok((pipeline, sink))
}

/// Connects the encoded stream of `pad` through a decoder to `sink`.
fn decode(
    pipeline: &gst::Pipeline,
    pad: &gst::Pad,
    sink: &AppSink,
    turn: Turn,
) -> Result<(), String> {
    let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
    if caps.structure(0).is_some_and(|s| s.name() == "video/x-raw") {
        return show(pipeline, pad, pad, sink, turn);
    }
    let decoder = make("decodebin")?;
    let (weak, target, encoded) = (pipeline.downgrade(), sink.downgrade(), pad.downgrade());
    decoder.connect_pad_added(move |_, pad| {
        if let (Some(pipeline), Some(sink), Some(encoded)) =
            (weak.upgrade(), target.upgrade(), encoded.upgrade())
            && let Err(reason) = show(&pipeline, pad, &encoded, &sink, turn)
        {
            refuse(&pipeline, &reason);
        }
    });
    hide_views(pad);
    append(pipeline, pad, &[decoder], None)
}

/// Connects the raw video of `pad` to `sink`, in one of the library's formats. Deinterlaces and
/// rotates it if its caps, and the tags or the packets of the `encoded` stream require this.
fn show(
    pipeline: &gst::Pipeline,
    pad: &gst::Pad,
    encoded: &gst::Pad,
    sink: &AppSink,
    turn: Turn,
) -> Result<(), String> {
    let mut chain = Vec::new();
    let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
    let mode = caps.structure(0);
    let mode = mode.and_then(|s| s.get::<&str>("interlace-mode").ok());
    match mode {
        None | Some("progressive") => {}
        Some("interleaved" | "mixed") => {
            // The deinterlacer takes only 8 bits, so a converter may have to come first. Unless it
            // is strict, it passes other formats unchanged.
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
    let is_turned = is_turned(encoded);
    if is_turned || !turn.is_none() {
        chain.push(make("videoconvert")?);
        let flip = make("videoflip")?;
        let direction = if is_turned { "auto" } else { turn.direction() };
        flip.set_property_from_str("video-direction", direction);
        chain.push(flip);
    }
    chain.push(make("videoconvert")?);
    let last = chain.last().and_then(|e| e.static_pad("src"));
    let last = last.ok_or("a converter without a source pad")?;
    let end = sink.static_pad("sink").ok_or("a sink without a pad")?;
    append(pipeline, pad, &chain, Some((&last, &end)))
}

/// Returns true if the tags that have passed `pad` require a rotation of the frames.
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
