//! Encoding: frames become a file, with the audio of another.

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
    audio::{self, Audio},
    bus::{Bus, Heard, make, utf8},
};
use crate::{Error, Result};

/// Frames that wait for the encoder.
const BEHIND: u64 = 4;
/// A pause in which nothing reaches the file, after which writing is given up: slow encoders look ahead over many
/// large frames.
const STALLED: Duration = Duration::from_secs(300);
/// The same once somebody has asked to stop, and only the end of the file is waited for.
const STALLED_AT_STOP: Duration = Duration::from_secs(20);
/// How often room in the queue and errors are looked for.
const POLL: ClockTime = ClockTime::from_mseconds(10);

/// A kind of video file.
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
    /// The kind of file that the extension of `path` stands for.
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

    fn muxer(self) -> &'static str {
        match self {
            Self::Mp4 => "mp4mux",
            Self::QuickTime => "qtmux",
            Self::Matroska => "matroskamux",
            Self::WebM => "webmmux",
        }
    }

    /// The encoder where none is asked for: visually close to lossless, at a speed that leaves time to the upscaler.
    pub fn default_encoder(self) -> &'static str {
        match self {
            Self::WebM => {
                "vp9enc deadline=1 cpu-used=4 row-mt=true threads=16 end-usage=cq cq-level=24 target-bitrate=100000000"
            }
            _ => "x264enc pass=qual quantizer=18 speed-preset=veryfast",
        }
    }
}

/// How a file is written.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The encoder as in a launch line, such as `x265enc speed-preset=fast`; empty is
    /// [`Container::default_encoder`].
    pub encoder: String,
    /// Leave out the audio.
    pub no_audio: bool,
    /// Once it is set, nothing waits for an encoder or for audio any more, but for a short while to end the file.
    pub stop: Option<Arc<AtomicBool>>,
}

impl Options {
    fn is_stopped(&self) -> bool {
        let stop = self.stop.as_ref();
        stop.is_some_and(|stop| stop.load(Ordering::SeqCst))
    }
}

/// Writes frames to a video file.
///
/// The file is whole only after [`Self::finish`]; a writer that is dropped before leaves a file that does not play.
pub struct Writer {
    path: PathBuf,
    pipeline: gst::Pipeline,
    source: AppSrc,
    bus: Bus,
    stream: StreamInfo,
    audio: Option<Audio>,
    options: Options,
    /// Buffers that have reached the file.
    written: Arc<AtomicU64>,
    /// The running time in nanoseconds at which the audio ends at the latest.
    cut: Arc<AtomicU64>,
    frames: u64,
    /// Where the last frame ends.
    end: Duration,
}

impl Writer {
    /// Starts the file `path`, which is replaced if it exists, for frames of `stream`. The audio streams of the file
    /// `audio` are copied into it, or encoded anew where the container does not hold their kind.
    ///
    /// # Errors
    /// [`Error::Video`] when the extension of `path` is not that of a [`Container`], the encoder cannot be had or does
    /// not fit the container; [`Error::Io`] when the file cannot be written; [`Error::Cancelled`].
    pub fn create(
        path: &Path,
        stream: &StreamInfo,
        options: &Options,
        audio: Option<&Path>,
    ) -> Result<Self> {
        super::init()?;
        let failed = |reason| Error::video(path, reason);
        let container = Container::of(path).ok_or_else(|| {
            failed("a video is written as .mp4, .m4v, .mov, .mkv or .webm".into())
        })?;
        fs::File::create(path).map_err(Error::io(path))?;
        let (pipeline, source, mux) =
            build(path, container, stream, &options.encoder).map_err(failed)?;
        let written = count(&mux);
        let cut = Arc::new(AtomicU64::new(u64::MAX));
        let audio = audio.map(|from| Audio::add(&pipeline, &mux, from, container, cut.clone()));
        let mut writer = Self {
            path: path.into(),
            bus: Bus::of(&pipeline)?,
            pipeline,
            source,
            stream: stream.clone(),
            audio: audio.transpose().map_err(failed)?,
            options: options.clone(),
            written,
            cut,
            frames: 0,
            end: Duration::ZERO,
        };
        // Why it fails is on the bus.
        let _ = writer.pipeline.set_state(gst::State::Playing);
        writer.await_audio()?;
        Ok(writer)
    }

    /// Frames pushed so far.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Writes `frame`, waiting while the encoder is busy with those before it.
    ///
    /// # Errors
    /// [`Error::Video`] when the frame is not one of the stream, or encoding or writing fails; [`Error::Cancelled`] when
    /// it is to stop while the encoder is busy. The file can still be finished.
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
        // A push that blocks would never return when the encoder has failed.
        let mut watch = Watch::new(&self.written);
        while self.source.current_level_buffers() >= BEHIND {
            self.look_for_errors(POLL)?;
            self.check_stop()?;
            watch.check(STALLED).map_err(|e| self.failed(e))?;
        }
        self.look_for_errors(ClockTime::ZERO)?;
        if self.source.push_buffer(buffer).is_err() {
            self.look_for_errors(ClockTime::from_seconds(1))?;
            return Err(self.failed("the encoder takes no more frames".into()));
        }
        self.frames += 1;
        self.end = frame.pts + frame.duration.unwrap_or_default();
        Ok(())
    }

    /// Encodes what is left, ends the file and waits for that. With `cut` the audio ends with the last frame, too.
    /// Says what became of each audio stream, such as `AAC copied`.
    ///
    /// # Errors
    /// [`Error::Video`] when encoding or writing fails, or no frame was pushed.
    pub fn finish(mut self, cut: bool) -> Result<Vec<String>> {
        if self.frames == 0 {
            return Err(self.failed("a video without frames".into()));
        }
        if cut {
            let end = u64::try_from(self.end.as_nanos()).unwrap_or(u64::MAX);
            self.cut.store(end, Ordering::SeqCst);
        }
        // If it fails, the bus says why.
        let _ = self.source.end_of_stream();
        let mut watch = Watch::new(&self.written);
        loop {
            match self.bus.wait(10 * POLL) {
                Some(Heard::End) => break,
                Some(Heard::Failure(failure)) => self.judge(failure)?,
                None => {
                    let patience = match self.options.is_stopped() {
                        true => STALLED_AT_STOP,
                        false => STALLED,
                    };
                    watch.check(patience).map_err(|e| self.failed(e))?;
                }
            }
        }
        // Only now the file is closed and its last bytes are where they belong.
        self.pipeline
            .set_state(gst::State::Null)
            .map_err(|_| self.failed("the file cannot be closed".into()))?;
        Ok(self.audio.as_ref().map_or_else(Vec::new, Audio::notes))
    }

    fn failed(&self, reason: String) -> Error {
        Error::video(&self.path, reason)
    }

    fn check_stop(&self) -> Result<()> {
        match self.options.is_stopped() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }

    fn look_for_errors(&mut self, timeout: ClockTime) -> Result<()> {
        match self.bus.failure(timeout) {
            Some(failure) => self.judge(failure),
            None => Ok(()),
        }
    }

    /// An error in the file that the audio comes from ends the audio; any other ends the writing.
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

    /// Waits until it is known which audio streams there are: the muxer cannot be told later.
    fn await_audio(&mut self) -> Result<()> {
        let since = Instant::now();
        while self.audio.as_ref().is_some_and(|a| !a.is_known()) {
            self.look_for_errors(POLL)?;
            self.check_stop()?;
            if since.elapsed() > audio::PATIENCE {
                return Err(self.failed("its audio cannot be found out: leave it out".into()));
            }
        }
        self.look_for_errors(ClockTime::ZERO)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // It cannot fail downwards, and there is nobody to tell.
        let _ = self.pipeline.set_state(gst::State::Null);
    }
}

/// Sees when nothing reaches the file any more.
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

    /// Fails when nothing has come for the time of `patience`.
    fn check(&mut self, patience: Duration) -> Result<(), String> {
        let now = self.counter.load(Ordering::Relaxed);
        if now != self.last {
            (self.last, self.since) = (now, Instant::now());
        }
        if self.since.elapsed() > patience {
            return Err(format!(
                "encoding has stood still for {} s",
                patience.as_secs()
            ));
        }
        Ok(())
    }
}

/// appsrc ! videoconvert ! encoder ! muxer ! filesink; gives the source and the muxer.
fn build(
    path: &Path,
    container: Container,
    stream: &StreamInfo,
    encoder: &str,
) -> Result<(gst::Pipeline, AppSrc, gst::Element), String> {
    let failed = |e: gst::glib::BoolError| e.to_string();
    let source = AppSrc::builder()
        .caps(stream.caps())
        .format(gst::Format::Time)
        .max_bytes(0)
        .build();
    let convert = make("videoconvert")?;
    let encoder = parse_encoder(encoder, container)?;
    let mux = make(container.muxer())?;
    let sink = make("filesink")?;
    sink.set_property("location", utf8(path)?);
    let pipeline = gst::Pipeline::new();
    pipeline
        .add_many([source.upcast_ref(), &convert, &encoder, &mux, &sink])
        .map_err(failed)?;
    gst::Element::link_many([source.upcast_ref(), &convert, &encoder]).map_err(|_| {
        format!(
            "the encoder does not take {} frames",
            stream.frame().format.name()
        )
    })?;
    mux.link(&sink).map_err(failed)?;
    let track = mux
        .request_pad_simple("video_%u")
        .ok_or("the container holds no video")?;
    if stream.framerate().is_none() && track.find_property("trak-timescale").is_some() {
        // Without a rate that it could follow, MP4's clock would tick coarsely.
        track.set_property("trak-timescale", 90_000_u32);
    }
    let encoded = encoder
        .static_pad("src")
        .ok_or("an encoder without output")?;
    link_encoded(&pipeline, &encoded, &track)?;
    Ok((pipeline, source, mux))
}

/// The encoder of the launch line `text`, or the container's own for an empty one.
fn parse_encoder(text: &str, container: Container) -> Result<gst::Element, String> {
    let text = if text.trim().is_empty() {
        container.default_encoder()
    } else {
        text
    };
    let bin = gst::parse::bin_from_description(text, true);
    let bin = bin.map_err(|e| format!("the encoder '{text}' cannot be had: {e}"))?;
    if bin.static_pad("sink").is_none() || bin.static_pad("src").is_none() {
        return Err(format!(
            "'{text}' is no encoder: it needs one input and one output"
        ));
    }
    Ok(bin.upcast())
}

/// Links what an encoder puts out to a muxer's pad, with a parser between where the muxer wants another form.
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
        |_| format!("this container holds no {kind}: choose another encoder or extension");
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

/// Counts what leaves the muxer.
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
