//! Transcoding: a function applied to the frames of a file.

use std::{
    ffi::OsString,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Container, Options, Reader, StreamInfo, TimedFrame, Writer,
    survey::Survey,
    verify::{Expected, differences, left_out, tolerance},
    writer::Input,
};
use crate::{Error, Result, frame::Frame};

/// Outcome of [`transcode`].
#[derive(Debug)]
pub struct Transcoded {
    /// Path of the written file: the output name if the end is [`End::Complete`], otherwise
    /// [`partial_path`]. `None` if there was no frame.
    pub path: Option<PathBuf>,
    /// Frames written.
    pub frames: u64,
    pub end: End,
    /// Result for each audio stream, such as `AAC copied`.
    pub audio: Vec<String>,
    /// Oddities of the input that are not errors.
    pub warnings: Vec<String>,
}

/// Reason why there are no more frames.
#[derive(Debug, Default)]
pub enum End {
    /// The video has ended.
    #[default]
    Complete,
    /// The function returned no more frames, or a stop was requested.
    Stopped,
    /// The rest of the input cannot be decoded, or has frames of another kind.
    Damaged(Error),
    /// The file lacks a part of the input: each difference with both values.
    Incomplete(Vec<String>),
}

/// Returns the name of `output` until it is complete: `film.partial.mp4` for `film.mp4`.
pub fn partial_path(output: &Path) -> PathBuf {
    let mut name = output.file_stem().map_or_else(OsString::new, Into::into);
    name.push(".partial");
    if let Some(extension) = output.extension() {
        name.push(".");
        name.push(extension);
    }
    output.with_file_name(name)
}

/// Calls `each` for every frame of `input`, one after the other, and writes its results to the file
/// `output` with the input's audio, timestamps, pixel shape, colours, tags and chapters. The first
/// result sets the size.
///
/// If the input has a [part](Reader::set_part), only the part is written. Its times then count from
/// the start of the part, and chapters are left out.
///
/// The output is written under the name that [`partial_path`] returns. A file with that name is
/// replaced, unless it is the input. At the end the written file is demuxed, and its frames, times
/// and audio are compared with those of the input. If they are equal, the file is renamed to
/// `output` and replaces an existing file.
///
/// The file keeps the partial name if the comparison fails, if `each` returns `None`, if
/// [`Options::stop`] is set while the encoder is busy, or if the input is damaged or changes the
/// size, the pixel shape or the colours of its frames. It then plays, and contains the frames up to
/// that point with as much audio.
///
/// # Errors
/// Those of `each` and of [`Writer`]. No file is left in that case.
pub fn transcode(
    mut input: Reader,
    output: &Path,
    options: &Options,
    mut each: impl FnMut(&TimedFrame) -> Result<Option<Frame>>,
) -> Result<Transcoded> {
    let mut partial = Partial::new(output, input.path())?;
    let survey = input.survey().clone();
    let origin = survey.origin();
    let path = input.path().to_owned();
    let stream = input.stream().clone();
    let named = |e| with_path(e, output);
    let mut writer: Option<Writer> = None;
    let mut expected = Expected::default();
    let end = loop {
        let frame = match input.next() {
            None => break End::Complete,
            Some(Ok(frame)) => frame,
            Some(Err(e)) => break End::Damaged(e),
        };
        if let Err(e) = check_kind(&input, &stream, &frame) {
            break End::Damaged(e);
        }
        let Some(made) = each(&frame)? else {
            break End::Stopped;
        };
        if writer.is_none() {
            let (width, height) = (made.info().width, made.info().height);
            let stream = stream.with_size(width, height)?;
            partial.make(output)?;
            let (video, source) = (Input::Frames(&stream), Some((&*path, &*survey)));
            match Writer::with_source(&partial.path, video, options, source) {
                Ok(created) => writer = Some(created),
                Err(Error::Cancelled) => break End::Stopped,
                Err(e) => return Err(named(e)),
            }
        }
        if let Some(writer) = &mut writer {
            let made = TimedFrame {
                frame: made,
                pts: frame.pts.saturating_sub(origin),
                duration: frame.duration,
            };
            match writer.push(&made) {
                Ok(()) => expected.add(made.pts),
                Err(Error::Cancelled) => break End::Stopped,
                Err(e) => return Err(named(e)),
            }
        }
    };
    let mut done = Transcoded {
        path: None,
        frames: 0,
        end,
        audio: Vec::new(),
        warnings: input.warnings().to_vec(),
    };
    // Without an encoded frame the file is not a video.
    if let Some(writer) = writer.filter(|w| w.frames() > 0) {
        let losses = || input.losses();
        conclude(&mut done, writer, &partial.path, expected, &survey, losses).map_err(named)?;
        done.path = Some(partial.keep(matches!(done.end, End::Complete).then_some(output))?);
    }
    Ok(done)
}

/// Fails if `frame`, the last one of `input`, is not a frame of `stream`.
pub(super) fn check_kind(input: &Reader, stream: &StreamInfo, frame: &TimedFrame) -> Result<()> {
    let changed = |what: &str, from: String, to: String| {
        let time = frame.pts.as_secs_f64();
        let reason = format!(
            "at {time:.2} s {what} from {from} to {to}: cut it there and upscale the parts"
        );
        Err(Error::video(input.path(), reason))
    };
    let (kind, now) = (stream.frame(), frame.frame.info());
    if now != kind {
        return changed("the video changes", kind.to_string(), now.to_string());
    }
    let shape = |stream: &StreamInfo| {
        let (width, height) = stream.pixel_aspect();
        format!("{width}:{height}")
    };
    let (from, to) = (shape(stream), shape(input.stream()));
    if from != to {
        return changed("the shape of its pixels changes", from, to);
    }
    let (from, to) = (stream.colours(), input.stream().colours());
    if from != to {
        return changed("the colours change", from, to);
    }
    Ok(())
}

/// Completes the file of `writer` at `partial`. If the video has ended, compares the file with what
/// is `expected` in it and with the input of the survey `survey`, whose `losses` it adds.
pub(super) fn conclude(
    done: &mut Transcoded,
    writer: Writer,
    partial: &Path,
    mut expected: Expected,
    survey: &Survey,
    losses: impl FnOnce() -> Vec<String>,
) -> Result<()> {
    let whole = matches!(done.end, End::Complete);
    done.frames = expected.frames;
    let closed = writer.close(!whole)?;
    done.audio = closed.audio;
    if !whole {
        return Ok(());
    }
    let mut lost = losses();
    for (n, (track, encoded)) in survey.audio().zip(closed.encoded).enumerate() {
        let start = Duration::from(track.first.unwrap_or_default());
        let start = start.saturating_sub(survey.origin());
        let length = encoded.map_or(track.duration(), Into::into);
        if length + tolerance(track) < track.duration() {
            lost.push(format!(
                "audio stream {} lasts {:.3} s, {:.3} s of it could be decoded",
                n + 1,
                track.duration().as_secs_f64(),
                length.as_secs_f64()
            ));
        }
        expected.audio.push((start, length));
    }
    let subtitles = closed.subtitles.into_iter();
    expected.subtitles = subtitles
        .map(|(cues, first, last)| (cues, first.into(), last.into()))
        .collect();
    let written = Survey::of(partial)?;
    done.warnings.extend(left_out(survey, &written));
    lost.extend(differences(&expected, &written));
    if !lost.is_empty() {
        done.end = End::Incomplete(lost);
    }
    Ok(())
}

/// Returns an error about the unfinished file under the name that the caller knows.
pub(super) fn with_path(error: Error, output: &Path) -> Error {
    let path = output.to_owned();
    match error {
        Error::Video { reason, .. } => Error::Video { path, reason },
        Error::Io { cause, .. } => Error::Io { path, cause },
        error => error,
    }
}

/// File that is removed when dropped, once it is made and unless it is kept.
pub(super) struct Partial {
    pub path: PathBuf,
    made: bool,
}

impl Partial {
    pub fn new(output: &Path, input: &Path) -> Result<Self> {
        let path = partial_path(output);
        let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
        if same(&path, input) {
            let reason = format!(
                "until it is complete its name would be '{}', that of the input",
                path.display()
            );
            return Err(Error::video(output, reason));
        }
        Ok(Self { path, made: false })
    }

    /// Makes a new file. An existing one may be a link to a file that is still needed, such as the
    /// input.
    pub fn make(&mut self, output: &Path) -> Result<()> {
        if Container::of(output).is_none() {
            // The writer reports this. No file may be touched before.
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(&self.path)(e)),
            _ => {}
        }
        fs::File::create_new(&self.path).map_err(Error::io(output))?;
        self.made = true;
        Ok(())
    }

    /// Keeps the file, and renames it to `name` if given.
    pub fn keep(mut self, name: Option<&Path>) -> Result<PathBuf> {
        if let Some(name) = name {
            fs::rename(&self.path, name).map_err(Error::io(name))?;
        }
        self.made = false;
        Ok(name.unwrap_or(&self.path).to_owned())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.made {
            // Errors cannot be reported here.
            let _ = fs::remove_file(&self.path);
        }
    }
}
