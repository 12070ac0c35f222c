//! Encoding of frames to a file, with the audio of another file.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gst::{ClockTime, PadProbeReturn, PadProbeType, prelude::*};
use gst_app::AppSrc;

use super::{
    StreamInfo, TimedFrame,
    audio::Audio,
    bus::{Bus, Heard, codec_name, link, make, start, utf8},
    matroska::{self, Attachment},
    mp4::{Delayed, hide_delays},
    subtitles::Subtitles,
    survey::{Kind, Survey},
};
use crate::{Error, Result};

/// Maximum number of frames that wait for the encoder.
const BEHIND: u64 = 4;
/// Pause without output after which writing fails. Slow encoders look ahead over many large frames.
const STALLED: Duration = Duration::from_secs(300);
/// The same after a request to stop, when only the end of the file is missing.
const STALLED_AT_STOP: Duration = Duration::from_secs(20);
/// Interval of checks for space in the queue and for errors.
const POLL: ClockTime = ClockTime::from_mseconds(10);
/// Minimum duration of the last frame in an MP4 file.
const SHORTEST: ClockTime = ClockTime::from_mseconds(1);

/// Kind of video file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `.mp4`, `.m4v`
    Mp4,
    /// `.mov`
    QuickTime,
    /// `.mkv`
    Matroska,
    /// `.webm`
    WebM,
}

impl Container {
    /// Returns the kind of file for the extension of `path`.
    pub fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "mp4" | "m4v" => Some(Self::Mp4),
            "mov" => Some(Self::QuickTime),
            "mkv" => Some(Self::Matroska),
            "webm" => Some(Self::WebM),
            _ => None,
        }
    }

    pub(super) fn muxer(self) -> &'static str {
        match self {
            Self::Mp4 => "mp4mux",
            Self::QuickTime => "qtmux",
            Self::Matroska => "matroskamux",
            Self::WebM => "webmmux",
        }
    }

    /// Returns the default encoder: visually almost lossless, and fast enough to leave time for the
    /// upscaler.
    pub fn default_encoder(self) -> &'static str {
        match self {
            Self::WebM => {
                "vp9enc deadline=1 cpu-used=4 row-mt=true threads=16 end-usage=cq cq-level=24 target-bitrate=100000000"
            }
            _ => "x264enc pass=qual quantizer=18 speed-preset=veryfast",
        }
    }
}

/// Options of a written file.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Encoder as in a launch line, such as `x265enc speed-preset=fast`; if empty,
    /// [`Container::default_encoder`].
    pub encoder: String,
    /// Omit the audio.
    pub no_audio: bool,
    /// Request to stop. Once set, nothing waits for the encoder or for audio, except for a short
    /// time to complete the file.
    pub stop: Option<Arc<AtomicBool>>,
    /// Function called with each deliberate change, such as audio that is re-encoded, as early as
    /// the change is known.
    pub notice: Option<Notice>,
}

/// Function that receives changes, one line each.
#[derive(Clone)]
pub struct Notice(pub Arc<dyn Fn(&str) + Send + Sync>);

impl std::fmt::Debug for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Notice")
    }
}

impl Options {
    pub(super) fn tell(&self, line: &str) {
        if let Some(Notice(tell)) = &self.notice {
            tell(line);
        }
    }

    fn is_stopped(&self) -> bool {
        let stop = self.stop.as_ref();
        stop.is_some_and(|stop| stop.load(Ordering::SeqCst))
    }
}

/// Writer of frames to a video file.
///
/// The file is complete only after [`Self::finish`]. If the writer is dropped before, the file does
/// not play.
pub struct Writer {
    path: PathBuf,
    pipeline: gst::Pipeline,
    source: AppSrc,
    bus: Bus,
    stream: StreamInfo,
    audio: Option<Audio>,
    subtitles: Option<Subtitles>,
    container: Container,
    attachments: Vec<Attachment>,
    options: Options,
    /// Number of buffers that the file contains.
    written: Arc<AtomicU64>,
    /// Running time in nanoseconds at which the audio ends at the latest.
    cut: Arc<AtomicU64>,
    frames: u64,
    /// End of the last frame.
    end: Duration,
}

impl Writer {
    /// Creates or replaces the file `path` for frames of `stream`. The audio streams of the file
    /// `audio` are copied into it, or re-encoded if the container does not support their codec.
    ///
    /// # Errors
    /// [`Error::Video`] if the extension of `path` is not that of a [`Container`], or the encoder
    /// is not installed or does not fit the container. [`Error::Io`] if the file cannot be written.
    pub fn create(
        path: &Path,
        stream: &StreamInfo,
        options: &Options,
        audio: Option<&Path>,
    ) -> Result<Self> {
        super::init()?;
        let survey = audio.map(Survey::of).transpose()?;
        Self::with_source(path, stream, options, audio.zip(survey.as_ref()))
    }

    /// As [`Self::create`], with audio, tags and chapters of a surveyed file.
    pub(super) fn with_source(
        path: &Path,
        stream: &StreamInfo,
        options: &Options,
        source: Option<(&Path, &Survey)>,
    ) -> Result<Self> {
        let failed = |reason| Error::video(path, reason);
        let container = Container::of(path).ok_or_else(|| {
            failed("a video is written as .mp4, .m4v, .mov, .mkv or .webm".into())
        })?;
        fs::File::create(path).map_err(Error::io(path))?;
        let (pipeline, appsrc, mux) = build(path, container, stream, options).map_err(failed)?;
        let cut = Arc::new(AtomicU64::new(u64::MAX));
        let (mut audio, mut subtitles, mut attachments) = (None, None, Vec::new());
        if let Some((from, survey)) = source {
            attachments = describe(&mux, container, survey, options);
            report_other_streams(survey, options);
            let added = Subtitles::add(&pipeline, &mux, survey, container, &cut).map_err(failed)?;
            added.notes.iter().for_each(|line| options.tell(line));
            subtitles = Some(added);
            if !options.no_audio {
                for (n, track) in survey.tracks(Kind::Audio).enumerate() {
                    if !survey.is_used(track) {
                        let n = n + 1;
                        options.tell(&format!("audio stream {n} has no sound in this part"));
                    }
                }
            }
            if !options.no_audio && survey.audio().next().is_some() {
                let added = Audio::add(&pipeline, &mux, from, survey, container, &cut);
                let added = added.map_err(failed)?;
                let encoded = added.encoded().into_iter().zip(added.notes());
                for (_, note) in encoded.filter(|(encoded, _)| encoded.is_some()) {
                    options.tell(&format!("audio: {note}"));
                }
                audio = Some(added);
            }
        }
        let writer = Self {
            path: path.into(),
            bus: Bus::of(&pipeline)?,
            written: count(&mux),
            pipeline,
            source: appsrc,
            stream: stream.clone(),
            audio,
            subtitles,
            container,
            attachments,
            options: options.clone(),
            cut,
            frames: 0,
            end: Duration::ZERO,
        };
        start(&writer.pipeline);
        if let Some(subtitles) = &writer.subtitles {
            subtitles.push();
        }
        Ok(writer)
    }

    /// Returns the number of frames pushed so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Writes `frame`. Waits while the encoder is busy with earlier frames.
    ///
    /// # Errors
    /// [`Error::Video`] if the frame does not match the stream, or encoding or writing fails.
    /// [`Error::Cancelled`] if a stop is requested while the encoder is busy. The file can still be
    /// finished.
    pub fn push(&mut self, frame: &TimedFrame) -> Result<()> {
        let mut buffer = self
            .stream
            .write(&frame.frame)
            .map_err(|e| self.failed(e))?;
        if let Some(buffer) = buffer.get_mut() {
            let clock = |d: Duration| ClockTime::try_from(d).ok();
            buffer.set_pts(clock(frame.pts));
            buffer.set_duration(frame.duration.and_then(clock));
        }
        // A blocking push would never return after a failure of the encoder.
        let mut watch = Watch::new(&self.written);
        while self.source.current_level_buffers() >= BEHIND {
            self.look_for_errors(POLL)?;
            self.check_stop()?;
            watch.check(STALLED).map_err(|e| self.failed(e))?;
        }
        self.look_for_errors(ClockTime::ZERO)?;
        if self.source.push_buffer(buffer).is_err() {
            self.look_for_errors(ClockTime::from_seconds(1))?;
            return Err(self.failed("the encoder accepts no more frames".into()));
        }
        self.frames += 1;
        self.end = frame.pts + frame.duration.unwrap_or_default();
        Ok(())
    }

    /// Encodes the remaining frames and completes the file. If `cut` is set, the audio ends with
    /// the last frame. Returns the result for each audio stream, such as `AAC copied`.
    ///
    /// # Errors
    /// [`Error::Video`] if encoding or writing fails, or no frame was pushed.
    pub fn finish(self, cut: bool) -> Result<Vec<String>> {
        self.close(cut).map(|closed| closed.audio)
    }

    pub(super) fn close(mut self, cut: bool) -> Result<Closed> {
        if self.frames == 0 {
            return Err(self.failed("the video has no frames".into()));
        }
        if cut {
            let end = u64::try_from(self.end.as_nanos()).unwrap_or(u64::MAX);
            self.cut.store(end, Ordering::SeqCst);
        }
        // Failures are reported on the bus.
        let _ = self.source.end_of_stream();
        let mut watch = Watch::new(&self.written);
        loop {
            match self.bus.wait(10 * POLL) {
                Some(Heard::End) => break,
                Some(Heard::Failure(failure)) => self.judge(failure)?,
                None => {
                    let patience = if self.options.is_stopped() {
                        STALLED_AT_STOP
                    } else {
                        STALLED
                    };
                    watch.check(patience).map_err(|e| self.failed(e))?;
                }
            }
        }
        // The file is closed and complete only in the state NULL.
        self.pipeline
            .set_state(gst::State::Null)
            .map_err(|_| self.failed("the file cannot be closed".into()))?;
        let audio = self.audio.as_ref();
        let delays = audio.map_or_else(Vec::new, Audio::delays);
        let encoded = audio.map_or_else(Vec::new, Audio::encoded);
        let completed = match self.container {
            Container::Matroska | Container::WebM => {
                matroska::complete(&self.path, &self.attachments, &delays)
            }
            Container::Mp4 | Container::QuickTime => {
                let delays = delays.iter().zip(&encoded).map(|(delay, length)| {
                    let (delay, length) = ((*delay)?, (*length)?);
                    (!delay.is_zero()).then_some(Delayed { delay, length })
                });
                hide_delays(&self.path, &delays.collect::<Vec<_>>())
            }
        };
        completed.map_err(|e| self.failed(format!("it cannot be completed: {e}")))?;
        let subtitles = self.subtitles.as_ref();
        Ok(Closed {
            audio: audio.map_or_else(Vec::new, Audio::notes),
            encoded,
            subtitles: subtitles.map_or_else(Vec::new, Subtitles::expected),
        })
    }

    fn failed(&self, reason: String) -> Error {
        Error::video(&self.path, reason)
    }

    fn check_stop(&self) -> Result<()> {
        if self.options.is_stopped() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    fn look_for_errors(&mut self, timeout: ClockTime) -> Result<()> {
        match self.bus.failure(timeout) {
            Some(failure) => self.judge(failure),
            None => Ok(()),
        }
    }

    /// An error in the source file of the audio ends the audio; any other error ends the writing.
    fn judge(&mut self, failure: super::bus::Failure) -> Result<()> {
        match &self.audio {
            Some(audio) if audio.owns(&failure) && !failure.missing => {
                audio.give_up(&failure.reason);
                Ok(())
            }
            Some(audio) if audio.owns(&failure) => Err(self.failed(format!(
                "its audio cannot be kept: {}; or leave the audio out",
                failure.reason
            ))),
            _ => Err(self.failed(failure.reason)),
        }
    }
}

/// Result of a writer.
pub(super) struct Closed {
    /// Result for each audio stream.
    pub audio: Vec<String>,
    /// Encoded length of each audio stream; `None` for a copied stream.
    pub encoded: Vec<Option<ClockTime>>,
    /// Number of cues of each stream of subtitles, and the start of the first and of the last.
    pub subtitles: Vec<(usize, ClockTime, ClockTime)>,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Going down to NULL cannot fail.
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// Reports the streams that are neither the video nor audio or subtitles.
fn report_other_streams(survey: &Survey, options: &Options) {
    let main = survey.main_video();
    let videos = survey.tracks(Kind::Video).enumerate();
    let others = videos.filter(|(index, _)| Some(*index) != main);
    let videos = others.map(|(index, track)| (format!("video stream {}", index + 1), track));
    let others = survey
        .tracks(Kind::Other)
        .map(|track| ("a stream".into(), track));
    for (name, track) in videos.chain(others) {
        options.tell(&format!("{name} ({}) is left out", codec_name(&track.caps)));
    }
}

/// Passes the metadata of the source file to the muxer: title, artist, chapters. Returns the
/// attachments, which the muxer does not write.
fn describe(
    mux: &gst::Element,
    container: Container,
    survey: &Survey,
    options: &Options,
) -> Vec<Attachment> {
    let mut attachments = Vec::new();
    let is_matroska = matches!(container, Container::Matroska | Container::WebM);
    for sample in survey.tags.iter_tag::<gst::tags::Attachment>() {
        attachments.extend(Attachment::of(&sample.get()));
    }
    if is_matroska {
        for sample in survey.tags.iter_tag::<gst::tags::Image>() {
            attachments.extend(Attachment::of(&sample.get()));
        }
    }
    if !attachments.is_empty() && container != Container::Matroska {
        let names: Vec<_> = attachments.iter().map(|file| file.name.as_str()).collect();
        options.tell(&format!(
            "its attachments are left out: this container does not support them ({})",
            names.join(", ")
        ));
        attachments.clear();
    }
    let technical =
        |name: &str| name.contains("codec") || name.contains("bitrate") || name.contains("encoder");
    let mut tags = gst::TagList::new();
    if let Some(tags) = tags.get_mut() {
        tags.insert(&survey.tags, gst::TagMergeMode::Append);
        let names: Vec<_> = tags
            .iter_generic()
            .map(|(name, _)| name.to_string())
            .collect();
        for name in names {
            let handled = ["container-format", "duration", "attachment"];
            if technical(&name)
                || handled.contains(&name.as_str())
                || is_matroska && name == "image"
            {
                tags.remove_generic(name.as_str());
            }
        }
    }
    if let Some(setter) = mux.dynamic_cast_ref::<gst::TagSetter>() {
        setter.merge_tags(&tags, gst::TagMergeMode::Keep);
    }
    match (&survey.chapters, mux.dynamic_cast_ref::<gst::TocSetter>()) {
        (None, _) => {}
        (Some(_), _) if survey.part.is_some() => {
            options.tell("its chapters are left out: they are those of the whole file");
        }
        (Some(chapters), Some(setter)) => setter.set_toc(Some(chapters)),
        (Some(_), None) => {
            options.tell("its chapters are left out: this container does not support them");
        }
    }
    attachments
}

/// Detects that nothing reaches the file any more.
struct Watch {
    counter: Arc<AtomicU64>,
    last: u64,
    since: Instant,
}

impl Watch {
    fn new(counter: &Arc<AtomicU64>) -> Self {
        Self {
            last: counter.load(Ordering::Relaxed),
            counter: counter.clone(),
            since: Instant::now(),
        }
    }

    /// Fails if nothing has arrived for the time `patience`.
    fn check(&mut self, patience: Duration) -> Result<(), String> {
        let now = self.counter.load(Ordering::Relaxed);
        if now != self.last {
            (self.last, self.since) = (now, Instant::now());
        }
        if self.since.elapsed() > patience {
            return Err(format!("nothing was encoded for {} s", patience.as_secs()));
        }
        Ok(())
    }
}

/// Builds appsrc ! videoconvert ! encoder ! muxer ! filesink and returns the source and the muxer.
fn build(
    path: &Path,
    container: Container,
    stream: &StreamInfo,
    options: &Options,
) -> Result<(gst::Pipeline, AppSrc, gst::Element), String> {
    let source = AppSrc::builder()
        .caps(stream.caps())
        .format(gst::Format::Time)
        .max_bytes(0)
        .build();
    let convert = make("videoconvert")?;
    let encoder = parse_encoder(&options.encoder, container)?;
    let input = encoder
        .static_pad("sink")
        .ok_or("an encoder without input")?;
    let filter = make("capsfilter")?;
    if options.encoder.trim().is_empty() {
        filter.set_property("caps", coded_caps(stream, &input.query_caps(None)));
    } else if let Some(caps) = alpha_caps(stream, &input.query_caps(None)) {
        filter.set_property("caps", caps);
    }
    report_changes(&input, stream, options);
    let mux = make(container.muxer())?;
    let sink = make("filesink")?;
    sink.set_property("location", utf8(path)?);
    let pipeline = gst::Pipeline::new();
    link(&pipeline, &[mux.clone(), sink])?;
    let chain = [source.clone().upcast(), convert, filter, encoder.clone()];
    link(&pipeline, &chain).map_err(|_| {
        format!(
            "the encoder does not support {} frames",
            stream.frame().format.name()
        )
    })?;
    let track = mux
        .request_pad_simple("video_%u")
        .ok_or("the container does not support video")?;
    if track.find_property("trak-timescale").is_some() {
        if stream.framerate().is_none() {
            // Without a rate to follow, MP4's clock would tick coarsely.
            track.set_property("trak-timescale", 90_000_u32);
        }
        let usual = stream.frame_duration().map(ClockTime::try_from);
        lengthen_last(&track, usual.and_then(Result::ok).unwrap_or_default());
    }
    let encoded = encoder
        .static_pad("src")
        .ok_or("an encoder without output")?;
    check_size(stream, &input, &encoded, &track)?;
    link_encoded(&pipeline, &encoded, &track)?;
    Ok((pipeline, source, mux))
}

/// Refuses frames that are too small for the encoder between `input` and `encoded`, or for the
/// muxer's pad `track`.
fn check_size(
    stream: &StreamInfo,
    input: &gst::Pad,
    encoded: &gst::Pad,
    track: &gst::Pad,
) -> Result<(), String> {
    // Returns the minimum of a side in caps of the kind `name`.
    let least = |caps: &gst::CapsRef, name: &str, side: &str| {
        let kinds = caps.iter().filter(|structure| structure.name() == name);
        let sides = kinds.map(|structure| {
            let range = structure.get::<gst::IntRange<i32>>(side);
            range.map_or(1, |range| range.min())
        });
        usize::try_from(sides.min().unwrap_or(1)).unwrap_or(1)
    };
    let (taken, made) = (input.query_caps(None), encoded.query_caps(None));
    let kind = made.structure(0).map_or("", |s| s.name().as_str());
    let muxed = track.pad_template_caps();
    let least = |side| least(&taken, "video/x-raw", side).max(least(&muxed, kind, side));
    let (width, height) = (least("width"), least("height"));
    let frame = stream.frame();
    if frame.width < width || frame.height < height {
        return Err(format!(
            "its frames have {}x{} pixels, and the minimum of encoder and container is \
             {width}x{height}: choose a larger size, or Matroska (.mkv)",
            frame.width, frame.height
        ));
    }
    Ok(())
}

/// Returns the caps of a default encoder's input, out of the caps `taken` that it accepts. They
/// have the depth (of up to 12 bits) and chroma of the stream if the encoder supports these. RGB
/// and grey become 4:2:0, which all players show.
fn coded_caps(stream: &StreamInfo, taken: &gst::Caps) -> gst::Caps {
    let info = stream.frame();
    let format = info.format;
    let depths: &[u32] = match format.depth() {
        8 => &[8],
        9..=10 => &[10],
        _ => &[12, 10],
    };
    let has_chroma = format.component(crate::frame::Component::U).is_some();
    let chroma = match format.chroma_shift() {
        _ if !has_chroma => 420,
        (1, 1) => 420,
        (1, 0) => 422,
        _ => 444,
    };
    let named = |chroma, depth| match (chroma, depth) {
        (422, 12) => "I422_12LE",
        (422, 10) => "I422_10LE",
        (422, _) => "Y42B",
        (444, 12) => "Y444_12LE",
        (444, 10) => "Y444_10LE",
        (444, _) => "Y444",
        (_, 12) => "I420_12LE",
        (_, 10) => "I420_10LE",
        _ => "I420",
    };
    let with_chroma = depths.iter().map(|&depth| named(chroma, depth));
    let without = depths.iter().map(|&depth| named(420, depth));
    let candidates = with_chroma.chain(without).chain(["I420"]);
    let with = |name: &str| {
        let mut caps = gst::Caps::builder("video/x-raw")
            .field("format", name)
            .build();
        if !format.is_rgb() {
            // Only the format is converted, not the colours.
            if let Some(colours) = stream.coded_colours() {
                caps.make_mut().set("colorimetry", colours);
            }
        }
        caps
    };
    let found = candidates.map(with).find(|caps| {
        let mut format = caps.clone();
        if let Some(structure) = format.make_mut().structure_mut(0) {
            structure.remove_field("colorimetry");
        }
        format.can_intersect(taken)
    });
    found.unwrap_or_else(|| gst::Caps::new_empty_simple("video/x-raw"))
}

/// Returns the part with alpha of the caps `taken` that an encoder accepts; `None` if the stream
/// has no alpha or the encoder does not support it. A converter would prefer other formats.
fn alpha_caps(stream: &StreamInfo, taken: &gst::Caps) -> Option<gst::Caps> {
    if !stream.frame().format.has_alpha() {
        return None;
    }
    let has_alpha = |format: &gst_video::VideoFormat| {
        gst_video::VideoFormatInfo::from_format(*format).has_alpha()
    };
    let formats = gst_video::VideoFormat::iter_raw().filter(has_alpha);
    let caps = gst::Caps::builder("video/x-raw")
        .field(
            "format",
            gst::List::new(formats.map(|format| format.to_str())),
        )
        .build();
    caps.can_intersect(taken).then_some(caps)
}

/// Reports once, when the format at `input` is known, which of depth, chroma and alpha of the
/// stream the encoder does not support.
fn report_changes(input: &gst::Pad, stream: &StreamInfo, options: &Options) {
    let (from, options) = (stream.frame().format, options.clone());
    input.add_probe(PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
        let Some(gst::PadProbeData::Event(event)) = &info.data else {
            return PadProbeReturn::Ok;
        };
        let gst::EventView::Caps(caps) = event.view() else {
            return PadProbeReturn::Ok;
        };
        let Ok(to) = gst_video::VideoInfo::from_caps(caps.caps()) else {
            return PadProbeReturn::Remove;
        };
        let to = to.format_info();
        let depth = to.depth().iter().copied().max().unwrap_or(8);
        if depth < from.depth() {
            let from = from.depth();
            options.tell(&format!(
                "{from} bits a sample become {depth}, the maximum of the encoder"
            ));
        }
        if from.has_alpha() && !to.has_alpha() {
            options.tell(
                "alpha is left out: the encoder does not support it (avenc_ffv1 in .mkv and \
                 avenc_prores_ks in .mov do)",
            );
        }
        PadProbeReturn::Remove
    });
}

/// Sets the duration of each packet at `track` so that it reaches the end of all frames so far.
/// MP4's muxer uses only that of the last packet. It would otherwise end the track with the last
/// frame in decoding order, which is not the last one that is shown. A packet without a duration
/// has the `usual` one.
fn lengthen_last(track: &gst::Pad, usual: ClockTime) {
    let state = std::sync::Mutex::new(None::<(ClockTime, ClockTime, ClockTime)>);
    track.add_probe(PadProbeType::BUFFER, move |_, info| {
        let Some(gst::PadProbeData::Buffer(buffer)) = &mut info.data else {
            return PadProbeReturn::Ok;
        };
        let Some(pts) = buffer.pts() else {
            return PadProbeReturn::Ok;
        };
        let stated = buffer.duration().unwrap_or_default();
        // A frame at the end of its track is not shown. Not every input states durations.
        let duration = buffer.duration().unwrap_or(usual).max(SHORTEST);
        let dts = buffer.dts().unwrap_or(pts);
        let mut state = state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let (first_pts, first_dts, end) = state.unwrap_or((pts, dts, pts));
        let end = end.max(pts + duration);
        *state = Some((first_pts, first_dts, end));
        let shown = end.saturating_sub(first_pts);
        let decoded = dts.saturating_sub(first_dts);
        let needed = shown.saturating_sub(decoded);
        if needed > stated {
            buffer.make_mut().set_duration(needed);
        }
        PadProbeReturn::Ok
    });
}

/// Returns the encoder of the launch line `text`, or the container's default if it is empty.
fn parse_encoder(text: &str, container: Container) -> Result<gst::Element, String> {
    let text = if text.trim().is_empty() {
        container.default_encoder()
    } else {
        text
    };
    let bin = gst::parse::bin_from_description(text, true);
    let bin = bin.map_err(|e| format!("the encoder '{text}' cannot be used: {e}"))?;
    if bin.static_pad("sink").is_none() || bin.static_pad("src").is_none() {
        return Err(format!(
            "'{text}' is not an encoder: it needs one input and one output"
        ));
    }
    for element in bin.iterate_recurse().into_iter().flatten() {
        if element.find_property("lag-in-frames").is_some() && !text.contains("lag-in-frames") {
            // At the end GStreamer's VP9 encoder loses some of the frames in its look-ahead.
            element.set_property("lag-in-frames", 0);
        }
    }
    Ok(bin.upcast())
}

/// Links the output of an encoder to a muxer's pad, with a parser between if the muxer needs
/// another form.
fn link_encoded(
    pipeline: &gst::Pipeline,
    encoded: &gst::Pad,
    track: &gst::Pad,
) -> Result<(), String> {
    let made = encoded.query_caps(None);
    let taken = track.pad_template_caps();
    let kind = made.structure(0).map_or("", |s| s.name().as_str());
    let parser = match kind {
        "video/x-h265" => Some("h265parse"),
        "video/x-av1" => Some("av1parse"),
        "video/x-h264" if !made.can_intersect(&taken) => Some("h264parse"),
        _ => None,
    };
    let refused =
        |_| format!("this container does not support {kind}: choose another encoder or extension");
    let Some(parser) = parser else {
        return encoded.link(track).map(drop).map_err(refused);
    };
    let parser = make(parser)?;
    pipeline.add(&parser).map_err(|e| e.to_string())?;
    let pads = (parser.static_pad("sink"), parser.static_pad("src"));
    let (Some(sink), Some(src)) = pads else {
        return Err("a parser without pads".into());
    };
    encoded.link(&sink).map_err(refused)?;
    src.link(track).map(drop).map_err(refused)
}

/// Counts the buffers that leave the muxer.
fn count(mux: &gst::Element) -> Arc<AtomicU64> {
    let written = Arc::new(AtomicU64::new(0));
    let counter = written.clone();
    if let Some(pad) = mux.static_pad("src") {
        let kinds = PadProbeType::BUFFER | PadProbeType::BUFFER_LIST;
        pad.add_probe(kinds, move |_, _| {
            counter.fetch_add(1, Ordering::Relaxed);
            PadProbeReturn::Ok
        });
    }
    written
}
