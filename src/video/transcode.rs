//! From a file to a file, with a function between.

use std::{
    ffi::OsString,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use super::{
    Container, Options, Reader, TimedFrame, Writer,
    survey::Kind,
    verify::{AUDIO, Expected, differences},
};
use crate::{Error, Result, frame::Frame};

/// Outcome of [`transcode`].
#[derive(Debug)]
pub struct Transcoded {
    /// The file that was written: the one asked for when the end is [`End::Complete`], otherwise
    /// [`partial_path`]. `None` when it broke off before the first frame.
    pub path: Option<PathBuf>,
    /// Frames written.
    pub frames: u64,
    pub end: End,
    /// Fate of each audio stream, such as `AAC copied`.
    pub audio: Vec<String>,
    /// Oddities of the input that are no errors.
    pub warnings: Vec<String>,
}

/// Reason why there are no more frames.
#[derive(Debug)]
pub enum End {
    /// The video is over.
    Complete,
    /// The function has given no more frames, or there was a request to stop.
    Stopped,
    /// The input cannot be decoded any further, or has frames of another kind from there on.
    Damaged(Error),
    /// The file does not hold all that the input has: each difference with both values.
    Incomplete(Vec<String>),
}

/// The name under which `output` is written until it is complete: `film.partial.mp4` for
/// `film.mp4`.
pub fn partial_path(output: &Path) -> PathBuf {
    let mut name = output.file_stem().map_or_else(OsString::new, Into::into);
    name.push(".partial");
    if let Some(extension) = output.extension() {
        name.push(".");
        name.push(extension);
    }
    output.with_file_name(name)
}

/// Writes what `each` makes of every frame of `input` to the file `output`, with the input's audio,
/// timestamps, pixel shape, colours, tags and chapters. `each` is asked for one frame after the other.
/// The first frame that it gives sets the size.
///
/// At the end the written file is demuxed, and its frames, times and audio are compared with those
/// of the input. It has its name only if they are the same, and then replaces what had that name
/// before. Otherwise it is left under the name that [`partial_path`] returns, as it is when `each`
/// gives `None`, [`Options::stop`] is set while the encoder is busy, or the input turns out to be
/// damaged or changes the size, the pixel shape or the colours of its frames: it plays, and holds the
/// frames until then with as much audio. A file that already has that name is replaced, but never the
/// input.
///
/// # Errors
/// Those of `each`, and as [`Writer`]; nothing is left then.
pub fn transcode(
    mut input: Reader,
    output: &Path,
    options: &Options,
    mut each: impl FnMut(&TimedFrame) -> Result<Option<Frame>>,
) -> Result<Transcoded> {
    let mut partial = Partial::new(output, input.path())?;
    let survey = input.survey().clone();
    let path = input.path().to_owned();
    let stream = input.stream().clone();
    let named = |e| with_path(e, output);
    let kind = *stream.frame();
    let shape = stream.pixel_aspect();
    let mut writer: Option<Writer> = None;
    let mut expected = Expected::default();
    let end = loop {
        let frame = match input.next() {
            None => break End::Complete,
            Some(Ok(frame)) => frame,
            Some(Err(e)) => break End::Damaged(e),
        };
        if *frame.frame.info() != kind {
            let reason = format!(
                "at {:.2} s the video changes from {kind} to {}: cut it there and upscale the parts",
                frame.pts.as_secs_f64(),
                frame.frame.info()
            );
            break End::Damaged(Error::Video { path, reason });
        }
        if input.stream().pixel_aspect() != shape {
            let (from, to) = (shape, input.stream().pixel_aspect());
            let reason = format!(
                "at {:.2} s the shape of its pixels changes from {}:{} to {}:{}: cut it there and upscale the parts",
                frame.pts.as_secs_f64(),
                from.0,
                from.1,
                to.0,
                to.1
            );
            break End::Damaged(Error::Video { path, reason });
        }
        let Some(made) = each(&frame)? else {
            break End::Stopped;
        };
        if writer.is_none() {
            let (width, height) = (made.info().width, made.info().height);
            let stream = stream.with_size(width, height)?;
            partial.make(output)?;
            match Writer::with_source(&partial.path, &stream, options, Some((&path, &survey))) {
                Ok(created) => writer = Some(created),
                Err(Error::Cancelled) => break End::Stopped,
                Err(e) => return Err(named(e)),
            }
        }
        if let Some(writer) = &mut writer {
            let made = TimedFrame {
                frame: made,
                pts: frame.pts,
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
    // What broke off before a frame was encoded is no video.
    if let Some(writer) = writer.filter(|w| w.frames() > 0) {
        let whole = matches!(done.end, End::Complete);
        done.frames = writer.frames();
        let closed = writer.close(!whole).map_err(&named)?;
        done.audio = closed.audio;
        if whole {
            let mut lost = input.losses();
            for (n, (track, encoded)) in survey.tracks(Kind::Audio).zip(closed.encoded).enumerate()
            {
                let start = track.first.unwrap_or_default().into();
                let length = encoded.map_or(track.duration(), Into::into);
                if length + AUDIO < track.duration() {
                    lost.push(format!(
                        "audio stream {} lasts {:.3} s, {:.3} s of it could be decoded",
                        n + 1,
                        track.duration().as_secs_f64(),
                        length.as_secs_f64()
                    ));
                }
                expected.audio.push((start, length));
            }
            lost.extend(differences(&partial.path, &expected).map_err(&named)?);
            if !lost.is_empty() {
                done.end = End::Incomplete(lost);
            }
        }
        let whole = matches!(done.end, End::Complete);
        done.path = Some(partial.keep(whole.then_some(output))?);
    }
    Ok(done)
}

/// An error about the unfinished file, with the name that the caller knows.
fn with_path(error: Error, output: &Path) -> Error {
    let path = output.to_owned();
    match error {
        Error::Video { reason, .. } => Error::Video { path, reason },
        Error::Io { cause, .. } => Error::Io { path, cause },
        error => error,
    }
}

/// A file that, once made, is removed unless it is kept.
struct Partial {
    path: PathBuf,
    made: bool,
}

impl Partial {
    fn new(output: &Path, input: &Path) -> Result<Self> {
        let path = partial_path(output);
        let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
        if same(&path, input) {
            let reason = format!(
                "until it is complete it would be called '{}', as the input is",
                path.display()
            );
            return Err(Error::video(output, reason));
        }
        Ok(Self { path, made: false })
    }

    /// Makes the file anew: what had its name may be a link to a file that is still wanted, such as
    /// the input.
    fn make(&mut self, output: &Path) -> Result<()> {
        if Container::of(output).is_none() {
            // The writer says so; nothing is to be touched before.
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

    /// Keeps the file, as `name` if there is one.
    fn keep(mut self, name: Option<&Path>) -> Result<PathBuf> {
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
            // There is nobody left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}
