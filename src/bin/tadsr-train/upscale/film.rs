//! Upscaling of a long video in segments, from which it goes on after a crash.

use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use tadsr::video::{
    Access, End, Made, Plan, Reader, Segments, State, Step, TimedFrame, segments_folder,
};

use super::{
    Args, Event, Job, Meter, Stopped, part,
    video::{self, Work},
};
use crate::events::rounded;

/// Segments of a long video.
#[derive(Debug, clap::Args)]
pub struct SegmentArgs {
    /// Length of a segment in seconds; up to twice as long where key frames are far apart
    /// [default: 30]
    #[arg(long = "segment-length", value_name = "SECONDS", value_parser = part::duration,
        help_heading = SEGMENTS)]
    pub length: Option<Duration>,
    /// List the segments, one per line: number, start and end in seconds, frames (- if unknown)
    #[arg(long = "list-segments", conflicts_with_all = ["segment", "join"],
        help_heading = SEGMENTS)]
    pub list: bool,
    /// Make only segment K of the list, beside OUT
    #[arg(long, value_name = "K", conflicts_with = "join", help_heading = SEGMENTS)]
    pub segment: Option<usize>,
    /// Join all segments, which --segment has made, to OUT
    #[arg(long, help_heading = SEGMENTS)]
    pub join: bool,
}

const SEGMENTS: &str = "Segments of a long video";
const LENGTH: Duration = Duration::from_secs(30);

impl SegmentArgs {
    /// Divides the video of `reader`.
    pub fn plan(&self, reader: &Reader) -> Plan {
        Plan::new(reader, self.length.unwrap_or(LENGTH))
    }

    /// Returns true if only one step of the work is to be done.
    pub fn is_step(&self) -> bool {
        self.segment.is_some() || self.join
    }
}

/// Prints the segments of the input.
pub fn list(args: &Args) -> Result<()> {
    let reader = video::open(args, &args.input)?;
    let plan = args.segments.plan(&reader);
    for (segment, part) in (1..).zip(plan.segments()) {
        let (start, end) = (part.start.as_secs_f64(), part.end.as_secs_f64());
        if args.json {
            let event = Event::Segment {
                segment,
                start: rounded(start),
                end: rounded(end),
                frames: part.frames,
            };
            event.print();
        } else {
            let frames = part.frames.map_or("-".into(), |frames| frames.to_string());
            println!("{segment}\t{start:.3}\t{end:.3}\t{frames}");
        }
    }
    Ok(())
}

/// Makes the segments of `plan` that are not finished, and joins all. With --segment or --join,
/// does only this step.
pub fn run(work: &Work, job: &mut Job, reader: Reader, plan: Plan) -> Result<()> {
    let film = Film::open(work, job, plan)?;
    match work.args.segments.segment {
        Some(number) => film.make_one(job, reader, number),
        None => film.make_all(job, reader),
    }
}

/// Video with its segments.
struct Film<'a> {
    work: &'a Work<'a>,
    segments: Segments,
    /// Number of segments.
    count: usize,
}

impl<'a> Film<'a> {
    fn open(work: &'a Work, job: &Job, plan: Plan) -> Result<Self> {
        let args = work.args;
        let count = plan.len();
        if let Some(number) = args.segments.segment {
            ensure!(
                (1..=count).contains(&number),
                "there is no segment {number}: the video has segments 1 to {count}"
            );
        }
        let folder = segments_folder(work.output);
        ensure!(
            !args.segments.join || folder.exists(),
            "there is no '{}': make the segments 1 to {count} with --segment first",
            folder.display()
        );
        let access = match args.segments.segment {
            Some(_) => Access::Shared,
            None => Access::Alone {
                replace: args.overwrite && !args.segments.join,
            },
        };
        let mut made_of = args.settings.made_of(job.model)?;
        let (width, height) = work.size;
        made_of.insert("size".into(), format!("{width}x{height}"));
        let encoder = args.encoder.as_deref().unwrap_or("default");
        made_of.insert("encoder".into(), encoder.into());
        let segments = Segments::open(plan, work.input, work.output, &made_of, access)?;
        let film = Self {
            work,
            segments,
            count,
        };
        if let Some(reason) = &film.segments.replaced {
            film.warn(&format!("{reason}; they are replaced"));
        }
        Ok(film)
    }

    /// Prints a line about the folder of the segments.
    fn warn(&self, line: &str) {
        let folder = self.segments.folder().display();
        self.work.args.notice(&format!("'{folder}': {line}"));
    }

    /// Returns true if the segment `index` has to be made.
    fn is_missing(&self, index: usize) -> bool {
        let state = self.segments.state(index);
        if let State::Damaged(reason) = &state {
            self.warn(&format!("segment {} is damaged: {reason}", index + 1));
        }
        !matches!(state, State::Finished)
    }

    /// Makes the segment with this number, unless it is finished.
    fn make_one(&self, job: &mut Job, mut reader: Reader, number: usize) -> Result<()> {
        let (count, index) = (self.count, number - 1);
        let missing = if self.is_missing(index) {
            vec![index]
        } else {
            Vec::new()
        };
        let (made, fps) = self.make(job, &mut reader, &missing)?;
        if let End::Damaged(e) = made.end {
            bail!(
                "{e}\nsegment {number} cannot be made; without --segment the frames before are kept"
            );
        }
        let (path, frames) = (self.segments.path(index).display().to_string(), made.frames);
        if self.work.args.json {
            Event::SegmentDone {
                path,
                segment: number,
                frames,
            }
            .print();
        } else if missing.is_empty() {
            println!("{path}: segment {number} of {count} is already finished");
        } else {
            println!("{path}: segment {number} of {count}, {frames} frames, {fps:.2} fps");
        }
        Ok(())
    }

    /// Makes all missing segments and joins them to the output. With --join, missing segments are
    /// an error.
    fn make_all(self, job: &mut Job, mut reader: Reader) -> Result<()> {
        let (work, count) = (self.work, self.count);
        let from = *reader.stream().frame();
        let missing: Vec<_> = (0..count).filter(|&index| self.is_missing(index)).collect();
        if work.args.segments.join && !missing.is_empty() {
            let numbers: Vec<_> = missing
                .iter()
                .map(|index| (index + 1).to_string())
                .collect();
            let folder = self.segments.folder().display();
            bail!(
                "'{folder}': of the segments 1 to {count} these are missing: {}; \
                 make each with --segment",
                numbers.join(", ")
            );
        }
        if missing.len() < count && !work.args.segments.join {
            let finished = count - missing.len();
            self.warn(&format!(
                "goes on: {finished} of {count} segments are finished"
            ));
        }
        let warned = reader.warnings().len();
        let (made, fps) = match self.make(job, &mut reader, &missing) {
            Ok(made) => made,
            Err(e) => return Err(self.unfinished(e)),
        };
        let meter = Meter::passes()?.with_json(work.args.json);
        let done = match self.segments.join(&reader, made, &work.options(&meter)) {
            Ok(done) => done,
            Err(e) => return Err(self.unfinished(e.into())),
        };
        let warnings = done.warnings.iter().skip(warned);
        warnings.for_each(|line| work.warn(line));
        match done.end {
            End::Complete => self.segments.remove()?,
            End::Stopped => return Err(self.unfinished(Stopped("stopped".into()).into())),
            _ => self.warn("the segments are kept"),
        }
        work.report(&done, &from, fps)
    }

    /// Makes the segments `missing`. Returns the outcome with the number of frames of all of them,
    /// and the frames per second.
    fn make(&self, job: &mut Job, reader: &mut Reader, missing: &[usize]) -> Result<(Made, f64)> {
        let work = self.work;
        let parts: Vec<_> = self.segments.plan().segments().collect();
        let meter = work.meter(job, missing.iter().map(|&index| parts[index].frames).sum())?;
        let options = work.options(&meter);
        let history = work.args.settings.history(&job.upscaler);
        let mut step = |frame: &TimedFrame, step: Step| {
            if step.restarts {
                job.upscaler.reset();
            }
            let made = work.upscale(job, frame);
            if let (Ok(Some(_)), true) = (&made, step.is_written) {
                meter.advance();
            }
            made
        };
        let mut make = || -> tadsr::Result<Made> {
            self.segments.check(work.input, work.size, &options)?;
            let mut all = Made::default();
            for run in missing.chunk_by(|a, b| a + 1 == *b) {
                let range = run[0]..run[0] + run.len();
                let frames = all.frames;
                all = self
                    .segments
                    .make(reader, range, history, &options, &mut step)?;
                all.frames += frames;
                if !matches!(all.end, End::Complete) {
                    break;
                }
            }
            Ok(all)
        };
        let made = make();
        meter.finish();
        let made = made?;
        if let End::Stopped = made.end {
            return Err(Stopped("stopped".into()).into());
        }
        let fps = made.frames as f64 / meter.seconds();
        Ok((made, fps))
    }

    /// Adds to `error` how to go on, or removes the folder if no segment is finished.
    fn unfinished(self, error: anyhow::Error) -> anyhow::Error {
        let finished = (0..self.count).filter(|&index| self.segments.path(index).exists());
        let finished = finished.count();
        if finished == 0 {
            // The first error is the one to report.
            let _ = self.segments.remove();
            return error;
        }
        let text = format!(
            "{error:#}\n'{}' has {finished} of {} segments; the same command goes on",
            self.segments.folder().display(),
            self.count
        );
        if error.is::<Stopped>() {
            Stopped(text).into()
        } else {
            anyhow!(text)
        }
    }
}
