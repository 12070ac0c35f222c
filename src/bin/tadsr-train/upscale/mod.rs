//! `tadsr-train upscale`: pictures, videos and folders of both, with any model.

#[cfg(feature = "video")]
mod film;
mod folder;
mod part;
mod picture;
mod settings;
mod size;
mod tiff;
#[cfg(feature = "video")]
mod video;

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
#[cfg(feature = "video")]
use tadsr::video::{Container, Segments, partial_path, segments_folder};
use tadsr::{
    Error, Upscaler,
    frame::{Frame, FrameInfo},
    ladder,
    model::DEFAULT_MODEL,
};

use part::Range;
use picture::Picture;
use settings::Settings;
use size::Size;

use crate::{
    events::Event,
    meter::Meter,
    stop::{Stop, Stopped},
};

/// Upscale a picture, a video or a folder of both
///
/// Folders are searched recursively, without hidden files. Files keep their names and relative
/// paths. Other files are skipped with a warning. Files that cannot be upscaled are listed at the
/// end, and the exit status is then a failure. PNG keeps alpha, and all formats keep a colour
/// profile. WebP and TIFF become PNG. Up to 16 bits a sample are kept in PNG.
///
/// A video keeps its frames, timestamps, pixel shape, depth and colours. Audio is copied if the
/// container of OUT supports its codec, otherwise re-encoded. Sizes become even. Output is written
/// to NAME.partial.EXT and renamed to OUT when complete. --start and --duration select a part: its
/// frames, and its audio to the precision of a packet.
///
/// A video that is longer than --segment-length is made in segments, in the folder OUT.segments.
/// After a crash or Ctrl-C the same command goes on with the next segment. Ctrl-C completes the
/// partial file of a shorter video so that it plays, and a second Ctrl-C removes it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tadsr-train upscale small.png large.png --scale 2
  tadsr-train upscale scan.tif scan-large.png --scale 4
  tadsr-train upscale holidays holidays-large --scale 4 --model runs/my-x4/model.safetensors
  tadsr-train upscale holidays holidays-wide --width 1920
  tadsr-train upscale clip.mp4 clip-hd.mp4 --width 1920 --height 1080
  tadsr-train upscale clip.mp4 clip-large.mkv --scale 1.5 --encoder 'x265enc speed-preset=fast'
  tadsr-train upscale film.mkv scene.mp4 --start 1:02:30 --duration 12.5
  tadsr-train upscale season season-large --skip-existing
  tadsr-train upscale film.mkv large.mkv --model small --list-segments
  tadsr-train upscale film.mkv large.mkv --model small --segment 1
  tadsr-train upscale film.mkv large.mkv --model small --join
  tadsr-train upscale clip.mp4 large.mp4 --json | jq -r 'select(.event == \"progress\").eta_s'
  tadsr-train upscale face.png out.png --model tad-sr.safetensors --seed 7 --noise 0.5
  tadsr-train upscale face.png out.png --model resshift.safetensors --steps 15 --noise-file noise.safetensors")]
pub struct Args {
    /// A picture (PNG, JPEG, WebP, TIFF), a video that GStreamer plays, or a folder of them
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Output: .png, .jpg or .jpeg for a picture, .mp4, .mov, .mkv or .webm for a video, or a
    /// folder
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Replace existing files, and segments that were made with other settings
    #[arg(long)]
    overwrite: bool,
    /// Skip files of a folder whose output exists
    #[arg(long, conflicts_with = "overwrite")]
    skip_existing: bool,
    /// Quality of JPEG output, 1 to 100 [default: 95]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: Option<u8>,
    /// Encoder of a video, as in a gst-launch line [default: x264enc with visually lossless
    /// quality; vp9enc for .webm]
    #[arg(long, value_name = "ELEMENT")]
    encoder: Option<String>,
    /// Print progress and result as JSON objects on standard output, one per line
    #[arg(long)]
    json: bool,
    /// Omit the audio of a video
    #[arg(long)]
    no_audio: bool,
    #[command(flatten)]
    range: Range,
    #[cfg(feature = "video")]
    #[command(flatten)]
    segments: film::SegmentArgs,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    settings: Settings,
}

/// Kind of the input.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Folder,
    Picture,
    /// Any other file. GStreamer decides whether it is a video.
    Video,
}

impl Kind {
    fn of(path: &Path) -> Result<Self> {
        let cannot = || format!("'{}' cannot be read", path.display());
        let is = fs::metadata(path).with_context(cannot)?;
        if is.is_dir() {
            return Ok(Self::Folder);
        }
        // Reading a pipe would block.
        ensure!(
            is.is_file(),
            "'{}' is neither a regular file nor a folder",
            path.display()
        );
        let mut start = Vec::new();
        let file = fs::File::open(path).with_context(cannot)?;
        file.take(16).read_to_end(&mut start).with_context(cannot)?;
        ensure!(!start.is_empty(), "'{}' is empty", path.display());
        ensure!(
            !start.starts_with(b"GIF8"),
            "'{}' is a GIF: convert it to a video or a PNG first, for example with \
             'ffmpeg -i in.gif out.mkv'",
            path.display()
        );
        ensure!(
            !picture::is_avif(&start),
            "'{}' is an AVIF or HEIC picture, which is not supported: convert it to a PNG first, \
             for example with 'ffmpeg -i in.avif out.png'",
            path.display()
        );
        Ok(if picture::is_picture(&start) {
            Self::Picture
        } else {
            Self::Video
        })
    }
}

/// Loaded model, with the settings and files of the command.
struct Job<'a> {
    upscaler: Upscaler,
    /// Name of its group, if the input chooses the model.
    model: &'static str,
    settings: &'a Settings,
    /// True until the noise is saved.
    save_noise: bool,
}

impl Job<'_> {
    /// Chooses the model for frames of the size `from` that become frames of the size `to` every
    /// `interval`, or in any time.
    fn choose_model(
        &mut self,
        from: &FrameInfo,
        (width, height): (usize, usize),
        interval: Option<Duration>,
    ) -> Result<()> {
        if !self.settings.is_auto() {
            return Ok(());
        }
        let to = from.with_size(width, height);
        let model = match interval {
            Some(interval) => {
                let time = |model| -> Result<Duration> {
                    let mut upscaler = self.settings.load_model(model)?;
                    Ok(ladder::frame_time(&mut upscaler, *from, to)?)
                };
                ladder::choose(from, &to, interval, time)?.model
            }
            None => ladder::largest(from, &to)?,
        };
        if self.model != model {
            self.upscaler = self.settings.load_model(model)?;
            self.model = model;
        }
        Ok(())
    }

    /// Loads the model that made the segments of the video `output`, if there are any and the input
    /// chooses the model.
    #[cfg(feature = "video")]
    fn use_model_of_segments(&mut self, output: &Path) -> Result<bool> {
        if !self.settings.is_auto() {
            return Ok(false);
        }
        let made_of = Segments::made_of(output)?.unwrap_or_default();
        let made_by = made_of.get(settings::MODEL);
        let mut models = tadsr::model::LADDER.into_iter();
        let model = models.find(|model| made_by.is_some_and(|made_by| made_by == model));
        if let Some(model) = model.filter(|model| *model != self.model) {
            self.upscaler = self.settings.load_model(model)?;
            self.model = model;
        }
        Ok(model.is_some())
    }

    /// Upscales `frame` to the scale that is set, or to `size` if given.
    fn upscale(&mut self, frame: &Frame, size: Option<(usize, usize)>) -> tadsr::Result<Frame> {
        if self.save_noise {
            self.settings.save_noise(&self.upscaler, frame.info())?;
            self.save_noise = false;
        }
        let Some((width, height)) = size else {
            return self.upscaler.upscale(frame);
        };
        let mut large = Frame::new(frame.info().with_size(width, height))?;
        self.upscaler
            .upscale_into(&frame.as_ref(), &mut large.as_mut())?;
        Ok(large)
    }
}

pub fn run(args: Args) -> Result<()> {
    let json = args.json;
    let result = upscale(args);
    if let (true, Err(error)) = (json, &result) {
        let (message, stopped) = (format!("{error:#}"), error.is::<Stopped>());
        let message = &message;
        Event::Error { message, stopped }.print();
    }
    result
}

fn upscale(args: Args) -> Result<()> {
    let kind = Kind::of(&args.input)?;
    args.check(kind)?;
    #[cfg(feature = "video")]
    if args.segments.list {
        return film::list(&args);
    }
    let output = args.target(kind)?;
    let upscaler = args.settings.load()?;
    let mut job = Job {
        upscaler,
        model: DEFAULT_MODEL,
        settings: &args.settings,
        save_noise: args.settings.save_noise.is_some(),
    };
    let stop = Stop::on_signals()?;
    match kind {
        Kind::Folder => folder::run(&args, &mut job, &output, &stop),
        Kind::Picture => one_picture(&args, &mut job, &output, &stop),
        #[cfg(feature = "video")]
        Kind::Video => video::run(&args, &mut job, &args.input, &output, &stop),
        #[cfg(not(feature = "video"))]
        Kind::Video => bail!(
            "'{}' is no picture, and this build has no support for videos",
            args.input.display()
        ),
    }
}

impl Args {
    /// Prints a warning or change.
    fn notice(&self, line: &str) {
        if self.json {
            Event::Notice { message: line }.print();
        } else {
            eprintln!("{line}");
        }
    }

    /// Refuses options that do not apply to `kind`.
    fn check(&self, kind: Kind) -> Result<()> {
        let only = |given: bool, option: &str, what: &str| {
            ensure!(
                !given,
                "{option} is for {what}, and '{}' is none",
                self.input.display()
            );
            Ok(())
        };
        if kind == Kind::Picture {
            only(self.encoder.is_some(), "--encoder", "videos")?;
            only(self.no_audio, "--no-audio", "videos")?;
            #[cfg(feature = "video")]
            only(self.segments.length.is_some(), "--segment-length", "videos")?;
        }
        if kind != Kind::Video {
            let one = if kind == Kind::Folder {
                "one video"
            } else {
                "videos"
            };
            only(self.range.start.is_some(), "--start", one)?;
            only(self.range.duration.is_some(), "--duration", one)?;
            #[cfg(feature = "video")]
            {
                only(self.segments.list, "--list-segments", one)?;
                only(self.segments.segment.is_some(), "--segment", one)?;
                only(self.segments.join, "--join", one)?;
            }
        } else {
            only(self.quality.is_some(), "--quality", "pictures")?;
        }
        if kind == Kind::Folder {
            let one = "one picture or video";
            only(self.settings.save_noise.is_some(), "--save-noise", one)?;
        } else {
            only(self.skip_existing, "--skip-existing", "folders")?;
        }
        self.settings.check_noise_target(self.overwrite)
    }

    /// Returns the output path. In a folder, a file gets the input's name.
    fn target(&self, kind: Kind) -> Result<PathBuf> {
        let mut output = self.output.clone();
        if kind == Kind::Folder {
            ensure!(
                !output.exists() || output.is_dir(),
                "'{}' is a folder, and '{}' exists and is none",
                self.input.display(),
                output.display()
            );
            return Ok(output);
        }
        if let (true, Some(name)) = (output.is_dir(), self.input.file_name()) {
            output.push(name);
            if kind == Kind::Picture {
                output = picture::output_name(&output);
            }
        }
        match kind {
            Kind::Picture => ensure!(
                picture::has_picture_name(&output),
                "'{}': a picture is written as .png, .jpg or .jpeg",
                output.display()
            ),
            _ if picture::has_picture_name(&output) => {
                bail!(
                    "'{}' is no PNG, JPEG, WebP or TIFF picture, so that it cannot become '{}'",
                    self.input.display(),
                    output.display()
                )
            }
            _ => {}
        }
        if same_file(&self.input, &output) {
            bail!(
                "'{}' is the input and cannot be the output",
                output.display()
            );
        }
        ensure!(
            !output.is_dir(),
            "'{}' is a folder and cannot be replaced",
            output.display()
        );
        if output.exists() && !self.overwrite {
            bail!("'{}' exists; --overwrite replaces it", output.display());
        }
        let parent = output.parent().filter(|p| !p.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|p| !p.is_dir()) {
            bail!(
                "'{}' cannot be written: there is no folder '{}'",
                output.display(),
                parent.display()
            );
        }
        #[cfg(feature = "video")]
        if kind == Kind::Video {
            self.check_video_target(&self.input, &output)?;
        }
        Ok(output)
    }

    /// Refuses a video that cannot be written, or whose unfinished file would replace another.
    #[cfg(feature = "video")]
    fn check_video_target(&self, input: &Path, output: &Path) -> Result<()> {
        ensure!(
            Container::of(output).is_some(),
            "'{}': a video is written as .mp4, .m4v, .mov, .mkv or .webm",
            output.display()
        );
        let partial = partial_path(output);
        ensure!(
            !same_file(input, &partial),
            "'{}' is the name of '{}' until it is complete: choose another name for the output",
            input.display(),
            output.display()
        );
        // With segments, the partial file can only be one of them joined.
        let is_kept = !self.overwrite && !segments_folder(output).exists();
        if partial.symlink_metadata().is_ok() && is_kept {
            bail!(
                "'{}' exists, the name of '{}' until it is complete; \
                 move it away, or replace it with --overwrite",
                partial.display(),
                output.display()
            );
        }
        Ok(())
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Upscales one picture into another file. Returns its new size.
fn upscale_picture(
    args: &Args,
    job: &mut Job,
    input: &Path,
    output: &Path,
    meter: &Meter,
) -> Result<(usize, usize)> {
    let small = Picture::read(input, !picture::is_jpeg_name(output))?;
    let used = small.frame.info().format.depth();
    if u32::from(small.bits) > used {
        meter.log(&format!(
            "'{}' has {} bits a sample: only {used} are used",
            input.display(),
            small.bits
        ));
    }
    let info = small.frame.info();
    let size = args.size.of((info.width, info.height), &job.upscaler, 1)?;
    let scale = job.upscaler.scale();
    let side = |len: usize| (len as f64 * scale).round() as usize;
    let target = size.unwrap_or_else(|| (side(info.width), side(info.height)));
    check_jpeg_sides(target, output)?;
    job.choose_model(info, target, None)?;
    job.upscaler.reset();
    let large = small.with_frame(job.upscale(&small.frame, size)?);
    if large.loses_alpha(output) {
        meter.log(&format!(
            "'{}' loses its alpha: JPEG does not support it",
            input.display()
        ));
    }
    if large.loses_colours(output) {
        meter.log(&format!(
            "'{}' states its colours by gamma, primaries or code points: \
             JPEG does not support these, they are left out",
            input.display()
        ));
    }
    if large.loses_texts(output) {
        meter.log(&format!(
            "'{}' loses its title, comments or other texts: JPEG does not support them",
            input.display()
        ));
    }
    large.write(output, args.quality.unwrap_or(95))?;
    let info = large.frame.info();
    Ok((info.width, info.height))
}

/// Refuses sizes that JPEG does not support before upscaling.
fn check_jpeg_sides((width, height): (usize, usize), output: &Path) -> Result<()> {
    let most = u16::MAX;
    let side = width.max(height);
    ensure!(
        !picture::is_jpeg_name(output) || side <= usize::from(most),
        "'{}' would be {side} pixels long, and the maximum of JPEG is {most}: write a PNG",
        output.display()
    );
    Ok(())
}

fn one_picture(args: &Args, job: &mut Job, output: &Path, stop: &Stop) -> Result<()> {
    let meter = Meter::passes()?.with_json(args.json);
    job.upscaler.set_observer(Some(meter.observer(stop)));
    let made = upscale_picture(args, job, &args.input, output, &meter);
    meter.finish();
    let (width, height) = made.map_err(|e| match is_cancelled(&e) {
        true => Stopped("stopped; nothing was written".into()).into(),
        false => e.context(format!("'{}'", args.input.display())),
    })?;
    if args.json {
        Event::Picture {
            path: output.display().to_string(),
            width,
            height,
        }
        .print();
    } else {
        println!("{}: {width}x{height}", output.display());
    }
    Ok(())
}

fn is_cancelled(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::Cancelled))
}
