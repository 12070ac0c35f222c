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
    encoder,
    matroska::{self, Attachment},
    mp4::{Delayed, hide_delays},
    subtitles::Subtitles,
    survey::{Kind, Survey},
};
use crate::{Error, Result};

/// Maximum number of frames that wait for the encoder.
pub(super) const BEHIND: u64 = 4;
/// Maximum size of the encoded frames that wait for the muxer.
const BYTES_BEHIND: u64 = 16 << 20;
/// Pause without output after which writing fails. Slow encoders look ahead over many large frames.
pub(super) const STALLED: Duration = Duration::from_secs(300);
/// The same after a request to stop, when only the end of the file is missing.
const STALLED_AT_STOP: Duration = Duration::from_secs(20);
/// Interval of checks for space in the queue and for errors.
pub(super) const POLL: ClockTime = ClockTime::from_mseconds(10);
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

    /// # Errors
    /// [`Error::Cancelled`] if a stop is requested.
    pub(super) fn check_stop(&self) -> Result<()> {
        if self.is_stopped() {
            return Err(Error::Cancelled);
        }
        Ok(())
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
        let source = audio.zip(survey.as_ref());
        Self::with_source(path, Input::Frames(stream), options, source)
    }

    /// As [`Self::create`], with audio, tags and chapters of a surveyed file.
    pub(super) fn with_source(
        path: &Path,
        input: Input,
        options: &Options,
        source: Option<(&Path, &Survey)>,
    ) -> Result<Self> {
        let writer = Self::prepare(path, input, options, source)?;
        fs::File::create(path).map_err(Error::io(path))?;
        start(&writer.pipeline);
        if let Some(subtitles) = &writer.subtitles {
            subtitles.push();
        }
        Ok(writer)
    }

    /// Builds the writer without touching the file. Reports what becomes of the streams of
    /// `source`.
    ///
    /// # Errors
    /// As [`Self::create`], if a stream cannot be kept.
    pub(super) fn prepare(
        path: &Path,
        input: Input,
        options: &Options,
        source: Option<(&Path, &Survey)>,
    ) -> Result<Self> {
        let failed = |reason| Error::video(path, reason);
        let container = Container::of(path).ok_or_else(|| {
            failed("a video is written as .mp4, .m4v, .mov, .mkv or .webm".into())
        })?;
        let (pipeline, appsrc, mux) = build(path, container, input, options).map_err(failed)?;
        let cut = Arc::new(AtomicU64::new(u64::MAX));
        let (mut audio, mut subtitles, mut attachments) = (None, None, Vec::new());
        if let Some((from, survey)) = source {
            attachments = describe(&mux, container, survey, options);
            report_other_streams(survey, container, options);
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
        Ok(Self {
            path: path.into(),
            bus: Bus::of(&pipeline)?,
            written: count(&mux),
            pipeline,
            source: appsrc,
            stream: input.stream().clone(),
            audio,
            subtitles,
            container,
            attachments,
            options: options.clone(),
            cut,
            frames: 0,
            end: Duration::ZERO,
        })
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
        let buffer = self.stream.timed(frame).map_err(|e| self.failed(e))?;
        self.wait_while(|source| source.current_level_buffers() >= BEHIND)?;
        let pushed = self.source.push_buffer(buffer);
        self.pushed(pushed, frame.pts + frame.duration.unwrap_or_default())
    }

    /// Writes an encoded frame. `end` is the time at which the last frame so far ends.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub(super) fn push_packet(&mut self, packet: &gst::Sample, end: Duration) -> Result<()> {
        self.wait_while(|source| source.current_level_bytes() >= BYTES_BEHIND)?;
        let pushed = self.source.push_sample(packet);
        self.pushed(pushed, end)
    }

    /// Waits while the source `is_full`. A blocking push would never return after a failure of the
    /// encoder.
    fn wait_while(&mut self, is_full: impl Fn(&AppSrc) -> bool) -> Result<()> {
        let mut watch = Watch::new(&self.written);
        while is_full(&self.source) {
            self.look_for_errors(POLL)?;
            self.options.check_stop()?;
            watch.check(STALLED).map_err(|e| self.failed(e))?;
        }
        self.look_for_errors(ClockTime::ZERO)
    }

    fn pushed(
        &mut self,
        result: Result<gst::FlowSuccess, gst::FlowError>,
        end: Duration,
    ) -> Result<()> {
        if result.is_err() {
            self.look_for_errors(ClockTime::from_seconds(1))?;
            return Err(self.failed("the encoder accepts no more frames".into()));
        }
        self.frames += 1;
        self.end = end;
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
                let subtitles = self.subtitles.as_ref();
                let tracks = matroska::Tracks {
                    delays,
                    audio: audio.map_or_else(Vec::new, |audio| audio.marks.clone()),
                    subtitles: subtitles.map_or_else(Vec::new, Subtitles::marks),
                };
                matroska::complete(&self.path, &self.attachments, &tracks)
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

/// Reports the streams that are neither the video nor audio or subtitles, and what the container
/// does not support of the others.
fn report_other_streams(survey: &Survey, container: Container, options: &Options) {
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
    let is_matroska = matches!(container, Container::Matroska | Container::WebM);
    // A mark of the only audio stream changes nothing.
    let is_marked = |kind, least| {
        let mut tracks = survey.tracks(kind);
        tracks.any(|track| !track.marks.is_empty()) && survey.tracks(kind).count() >= least
    };
    if !is_matroska && (is_marked(Kind::Audio, 2) || is_marked(Kind::Subtitles, 1)) {
        options.tell(
            "the marks of its streams (default, forced, commentary and the like) are left out: \
             this container does not support them",
        );
    }
    let track = main.and_then(|main| survey.tracks(Kind::Video).nth(main));
    let video = track.and_then(|track| track.caps.structure(0));
    let views = video.and_then(|video| video.get::<String>("multiview-mode").ok());
    if let Some(views) = views.filter(|views| views != "mono") {
        options.tell(&format!(
            "the stereo mode ({views}) is left out: the frames keep both views"
        ));
    }
    survey.hidden.iter().for_each(|line| options.tell(line));
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
pub(super) struct Watch {
    counter: Arc<AtomicU64>,
    last: u64,
    since: Instant,
}

impl Watch {
    pub fn new(counter: &Arc<AtomicU64>) -> Self {
        Self {
            last: counter.load(Ordering::Relaxed),
            counter: counter.clone(),
            since: Instant::now(),
        }
    }

    /// Fails if nothing has arrived for the time `patience`.
    pub fn check(&mut self, patience: Duration) -> Result<(), String> {
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

/// Video that enters a muxer.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    /// Frames of a stream, through an encoder.
    Frames(&'a StreamInfo),
    /// Encoded frames of a stream, with their caps.
    Packets(&'a StreamInfo, &'a gst::Caps),
}

impl Input<'_> {
    fn stream(&self) -> &StreamInfo {
        match self {
            Self::Frames(stream) | Self::Packets(stream, _) => stream,
        }
    }
}

/// Builds a source of `input` ! muxer ! filesink, with an encoder for frames. Returns the source
/// and the muxer.
fn build(
    path: &Path,
    container: Container,
    input: Input,
    options: &Options,
) -> Result<(gst::Pipeline, AppSrc, gst::Element), String> {
    let mux = make(container.muxer())?;
    let sink = make("filesink")?;
    sink.set_property("location", utf8(path)?);
    let pipeline = gst::Pipeline::new();
    link(&pipeline, &[mux.clone(), sink])?;
    let track = mux
        .request_pad_simple("video_%u")
        .ok_or("the container does not support video")?;
    let stream = input.stream();
    if track.find_property("trak-timescale").is_some() {
        if stream.framerate().is_none() {
            // Without a rate to follow, MP4's clock would tick coarsely.
            track.set_property("trak-timescale", 90_000_u32);
        }
        let usual = stream.frame_duration().map(ClockTime::try_from);
        lengthen_last(&track, usual.and_then(Result::ok).unwrap_or_default());
    }
    let source = match input {
        Input::Frames(stream) => {
            let taken = track.pad_template_caps();
            encoder::add(&pipeline, container, stream, options, &track, &taken)?
        }
        Input::Packets(_, caps) => {
            let source = AppSrc::builder()
                .caps(caps)
                .format(gst::Format::Time)
                .handle_segment_change(true)
                .max_bytes(0)
                .build();
            link(&pipeline, &[source.clone().upcast()])?;
            let from = source.static_pad("src").ok_or("a source without output")?;
            from.link(&track).map_err(|e| e.to_string())?;
            source
        }
    };
    Ok((pipeline, source, mux))
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
