//! Upscaling of a video.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use tadsr::{
    Error,
    frame::{Frame, FrameInfo},
    ladder,
    video::{
        End, Notice, Options, Reader, TimedFrame, Transcoded, partial_path, segments_folder,
        transcode,
    },
};

use super::{Args, Event, Job, Meter, Stop, Stopped, film};
use crate::events::{Video, rounded};

/// Upscales the video `input` into the file `output`.
pub fn run(args: &Args, job: &mut Job, input: &Path, output: &Path, stop: &Stop) -> Result<()> {
    let reader = open(args, input)?;
    let warn = |line: &str| args.notice(&format!("'{}': {line}", input.display()));
    let warned = reader.warnings().len();
    reader.warnings().iter().for_each(|line| warn(line));
    let from = *reader.stream().frame();
    let size = args.size.of((from.width, from.height), &job.upscaler, 2);
    let size = size.with_context(|| format!("'{}'", input.display()))?;
    let (scale, max) = (job.upscaler.scale(), job.upscaler.max_scale());
    let size = size.unwrap_or_else(|| even_size(&from, scale, max));
    let interval = reader.stream().framerate().and_then(|(n, d)| {
        let seconds = f64::from(d) / f64::from(n);
        Duration::try_from_secs_f64(seconds).ok()
    });
    let interval = interval.unwrap_or(ladder::DEFAULT_INTERVAL);
    if !job.use_model_of_segments(output)? {
        job.choose_model(&from, size, Some(interval))?;
    }
    if args.settings.is_auto() {
        let scale = size.0 as f64 / from.width as f64;
        warn(&format!("model {}", job.upscaler.active_model(scale)));
    }
    job.upscaler.reset();
    let plan = args.segments.plan(&reader);
    let work = Work {
        args,
        input,
        output,
        stop,
        size,
    };
    if plan.len() > 1 || args.segments.is_step() || segments_folder(output).exists() {
        return film::run(&work, job, reader, plan);
    }
    let meter = work.meter(job, reader.stream().expected_frames())?;
    let done = transcode(reader, output, &work.options(&meter), |frame| {
        let made = work.upscale(job, frame);
        if let Ok(Some(_)) = made {
            // From here on the incomplete file is ours.
            stop.set_unfinished(Some(partial_path(output)));
            meter.advance();
        }
        made
    });
    if let Ok(Transcoded {
        end: End::Complete,
        frames,
        ..
    }) = &done
    {
        meter.set_total(*frames);
    }
    meter.finish();
    stop.set_unfinished(None);
    let done = done.map_err(|e| anyhow!(e).context(format!("'{}'", input.display())))?;
    done.warnings
        .iter()
        .skip(warned)
        .for_each(|line| warn(line));
    let fps = done.frames as f64 / meter.seconds();
    work.report(&done, &from, fps)
}

/// Opens the video `input`, or the part of it that `args` select.
pub fn open(args: &Args, input: &Path) -> Result<Reader> {
    let mut reader = Reader::open(input)?;
    if let Some(part) = args.range.part() {
        reader.set_part(part)?;
    }
    Ok(reader)
}

/// Video that is upscaled.
pub struct Work<'a> {
    pub args: &'a Args,
    pub input: &'a Path,
    pub output: &'a Path,
    pub stop: &'a Stop,
    /// Size of the output.
    pub size: (usize, usize),
}

impl Work<'_> {
    /// Prints a line about the input.
    pub fn warn(&self, line: &str) {
        let input = self.input.display();
        self.args.notice(&format!("'{input}': {line}"));
    }

    /// Returns a display of `frames`, in which `job` also shows its progress.
    pub fn meter(&self, job: &mut Job, frames: Option<u64>) -> Result<Meter> {
        let meter = Meter::new("frames", "fps", frames)?.with_json(self.args.json);
        job.upscaler.set_observer(Some(meter.observer(self.stop)));
        Ok(meter)
    }

    pub fn options(&self, meter: &Meter) -> Options {
        Options {
            encoder: self.args.encoder.clone().unwrap_or_default(),
            no_audio: self.args.no_audio,
            stop: Some(self.stop.flag()),
            notice: Some(Notice(Arc::new({
                let (meter, input) = (meter.clone(), self.input.display().to_string());
                move |line: &str| meter.log(&format!("'{input}': {line}"))
            }))),
        }
    }

    /// Upscales `frame`; `None` if a stop is requested.
    pub fn upscale(&self, job: &mut Job, frame: &TimedFrame) -> tadsr::Result<Option<Frame>> {
        if self.stop.is_asked() {
            return Ok(None);
        }
        match job.upscale(&frame.frame, Some(self.size)) {
            Err(Error::Cancelled) => Ok(None),
            made => made.map(Some),
        }
    }

    /// Prints the result of a video with frames like `from`.
    pub fn report(&self, done: &Transcoded, from: &FrameInfo, fps: f64) -> Result<()> {
        let (frames, size) = (done.frames, self.size);
        let Some(path) = &done.path else {
            return match &done.end {
                End::Damaged(e) => Err(anyhow!("{e}; no frame was decoded before")),
                _ => {
                    let text = "stopped before the first frame; nothing was written";
                    Err(Stopped(text.into()).into())
                }
            };
        };
        if self.args.json {
            let video = Video {
                path: path.display().to_string(),
                frames,
                width: size.0,
                height: size.1,
                fps: rounded(fps),
                audio: &done.audio,
            };
            match &done.end {
                End::Complete if self.input != self.args.input => Event::FolderVideo(video).print(),
                End::Complete => Event::Video(video).print(),
                _ => Event::Partial(video).print(),
            }
        } else {
            let audio = match done.audio.join(", ") {
                text if text.is_empty() => "none".into(),
                text => text,
            };
            // Segments may have been made before.
            let speed = if fps > 0.0 {
                format!(", {fps:.2} fps")
            } else {
                String::new()
            };
            println!(
                "{}: {frames} frames, {}x{} to {}x{}{speed}, audio: {audio}",
                path.display(),
                from.width,
                from.height,
                size.0,
                size.1,
            );
        }
        match &done.end {
            End::Complete => Ok(()),
            End::Stopped => {
                let path = path.display();
                let text = format!("stopped: '{path}' contains {frames} frames");
                Err(Stopped(text).into())
            }
            End::Incomplete(differences) => bail!(
                "the video is not complete: {}\n'{}' contains the written part",
                differences.join("; "),
                path.display()
            ),
            End::Damaged(e) => bail!(
                "{e}\n'{}' contains the {frames} frames before",
                path.display()
            ),
        }
    }
}

/// Returns the size of `from` at `scale` in even numbers, which most encoders need. It is not
/// smaller than `from`, and exceeds the scale `most` only by less than a pixel, if that limit is
/// odd.
fn even_size(from: &FrameInfo, scale: f64, most: f64) -> (usize, usize) {
    let side = |len: usize| {
        let even = 2 * (len as f64 * scale / 2.0).round() as usize;
        let even = even.max(len.next_multiple_of(2));
        match even as f64 >= len as f64 * most + 1.0 {
            true => (even - 2).max(len),
            false => even,
        }
    };
    (side(from.width), side(from.height))
}

#[cfg(test)]
mod tests {
    use tadsr::frame::PixelFormat;

    use super::*;

    #[test]
    fn sizes_are_even_and_never_smaller_than_the_input() {
        let frame = |w, h| FrameInfo::new(PixelFormat::I420, w, h);
        let size = |w, h, scale| even_size(&frame(w, h), scale, 4.0);
        assert_eq!(size(640, 360, 2.0), (1280, 720));
        assert_eq!(size(33, 17, 1.5), (50, 26));
        assert_eq!(size(33, 17, 1.0), (34, 18));
        assert_eq!(size(1, 1, 4.0), (4, 4));
        assert_eq!(size(854, 480, 2.25), (1922, 1080));
        // At the maximum scale of the model.
        assert_eq!(even_size(&frame(33, 17), 3.0, 3.0), (98, 50));
        assert_eq!(even_size(&frame(33, 18), 1.0, 1.0), (33, 18));
    }
}
