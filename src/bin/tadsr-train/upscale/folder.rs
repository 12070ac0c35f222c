//! Upscaling of all pictures and videos in a folder.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::{
    Args, Event, Job, Meter, Stop, Stopped, is_cancelled,
    picture::{has_readable_name, output_name},
    upscale_picture,
};

/// Files below a folder, as sorted relative paths.
#[derive(Default)]
struct Files {
    pictures: Vec<PathBuf>,
    videos: Vec<PathBuf>,
    others: Vec<PathBuf>,
    /// Errors of folders that cannot be read.
    unread: Vec<String>,
}

impl Files {
    /// Lists the files below `root`. Skips `except`, hidden files, and folders found a second time.
    fn below(root: &Path, except: &Path) -> Self {
        let mut files = Self::default();
        let mut seen: HashSet<_> = except.canonicalize().ok().into_iter().collect();
        files.visit(root, Path::new(""), &mut seen);
        files.pictures.sort();
        files.videos.sort();
        files.others.sort();
        files
    }

    fn visit(&mut self, root: &Path, at: &Path, seen: &mut HashSet<PathBuf>) {
        if let Err(e) = self.try_visit(root, at, seen) {
            self.unread.push(format!("{e:#}"));
        }
    }

    fn try_visit(&mut self, root: &Path, at: &Path, seen: &mut HashSet<PathBuf>) -> Result<()> {
        let folder = root.join(at);
        let cannot = || format!("'{}' cannot be read", folder.display());
        if !seen.insert(folder.canonicalize().with_context(cannot)?) {
            return Ok(());
        }
        for entry in fs::read_dir(&folder).with_context(cannot)? {
            let name = entry.with_context(cannot)?.file_name();
            let path = at.join(&name);
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if root.join(&path).is_dir() {
                self.visit(root, &path, seen);
            } else if has_readable_name(&path) {
                self.pictures.push(path);
            } else if has_video_name(&path) {
                self.videos.push(path);
            } else {
                self.others.push(path);
            }
        }
        Ok(())
    }
}

/// Extensions of video files.
const VIDEOS: [&str; 18] = [
    "3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf",
    "ogv", "ts", "vob", "webm", "wmv",
];

fn has_video_name(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let extension = extension.map(str::to_ascii_lowercase).unwrap_or_default();
    cfg!(feature = "video") && VIDEOS.contains(&extension.as_str())
}

/// Returns the name of the output for a video named `path`: the same, or that of a Matroska file if
/// the container is only read.
fn video_output_name(path: &Path) -> PathBuf {
    #[cfg(feature = "video")]
    if tadsr::video::Container::of(path).is_none() {
        return path.with_extension("mkv");
    }
    path.into()
}

/// File of the folder with its output.
struct Item {
    from: PathBuf,
    to: PathBuf,
    is_video: bool,
}

impl Item {
    fn new(from: &Path, is_video: bool) -> Self {
        Self {
            from: from.into(),
            to: if is_video {
                video_output_name(from)
            } else {
                output_name(from)
            },
            is_video,
        }
    }

    /// Upscales the file. `meter` displays the progress of pictures.
    #[cfg_attr(
        not(feature = "video"),
        expect(unused_variables, reason = "only videos stop")
    )]
    fn upscale(&self, args: &Args, job: &mut Job, meter: &Meter, stop: &Stop) -> Result<()> {
        make_folder_of(&self.to)?;
        #[cfg(feature = "video")]
        if self.is_video {
            args.check_video_target(&self.from, &self.to)?;
            return super::video::run(args, job, &self.from, &self.to, stop);
        }
        upscale_picture(args, job, &self.from, &self.to, meter).map(drop)
    }
}

/// Upscales every picture and video below the input folder into the folder `output`.
pub fn run(args: &Args, job: &mut Job, output: &Path, stop: &Stop) -> Result<()> {
    if super::same_file(&args.input, output) {
        bail!(
            "'{}' is the input and cannot be the output",
            output.display()
        );
    }
    let files = Files::below(&args.input, output);
    for other in &files.others {
        let path = args.input.join(other);
        args.notice(&format!(
            "skipped '{}': its name is not that of a PNG, JPEG, WebP or TIFF file or of a video",
            path.display()
        ));
    }
    let pictures = files.pictures.iter().map(|path| Item::new(path, false));
    let videos = files.videos.iter().map(|path| Item::new(path, true));
    let mut items: Vec<_> = pictures.chain(videos).collect();
    if items.is_empty() && files.unread.is_empty() {
        bail!(
            "no picture (.png, .jpg, .jpeg, .webp, .tif, .tiff) and no video in '{}'",
            args.input.display()
        );
    }
    check_names(&items)?;
    for item in &mut items {
        item.from = args.input.join(&item.from);
        item.to = output.join(&item.to);
    }
    let all = items.len();
    if args.skip_existing {
        items.retain(|item| !item.to.exists());
    } else if let (false, Some(first)) = (args.overwrite, items.iter().find(|i| i.to.exists())) {
        bail!(
            "'{}' exists; --overwrite replaces existing files, --skip-existing keeps them",
            first.to.display()
        );
    }
    let existing = all - items.len();
    let pictures = items.iter().filter(|item| !item.is_video).count();
    let meter = Meter::new("pictures", "images/s", Some(pictures as u64))?;
    let meter = meter.with_json(args.json);
    job.upscaler.set_observer(Some(meter.observer(stop)));
    let (mut done, mut failed) = ([0; 2], [0; 2]);
    let (mut errors, mut rate) = (Vec::new(), 0.0);
    for item in &items {
        if item.is_video {
            // Each video has its own display.
            meter.finish();
        }
        let kind = usize::from(item.is_video);
        match item.upscale(args, job, &meter, stop) {
            Ok(()) => done[kind] += 1,
            Err(e) if is_cancelled(&e) || e.is::<Stopped>() => break,
            Err(e) => {
                let line = if item.is_video {
                    format!("{e:#}")
                } else {
                    format!("'{}': {e:#}", item.from.display())
                };
                meter.log(&line);
                failed[kind] += 1;
                errors.push(line);
            }
        }
        if !item.is_video {
            meter.advance();
            rate = f64::from(done[0]) / meter.seconds();
        }
        if stop.is_asked() {
            break;
        }
    }
    meter.finish();
    for line in &files.unread {
        args.notice(&format!("{line}: its files are skipped"));
    }
    if !args.json {
        let mut parts = Vec::new();
        let [pictures, videos] = [&files.pictures, &files.videos].map(Vec::len);
        if pictures > 0 || videos == 0 {
            parts.push(format!(
                "{} of {pictures} pictures, {rate:.2} images/s",
                done[0]
            ));
        }
        if videos > 0 {
            parts.push(format!("{} of {videos} videos", done[1]));
        }
        if existing > 0 {
            parts.push(format!("{existing} were there already"));
        }
        println!("{}: {}", output.display(), parts.join(", "));
    }
    report(failed, &errors, &files.unread, stop)?;
    if args.json {
        Event::Folder {
            path: output.display().to_string(),
            pictures: done[0] as usize,
            videos: done[1] as usize,
            of: all,
            existing,
        }
        .print();
    }
    Ok(())
}

/// Refuses files whose outputs would have the same name.
fn check_names(items: &[Item]) -> Result<()> {
    let mut names = HashMap::new();
    for item in items {
        if let Some(other) = names.insert(&item.to, &item.from) {
            bail!(
                "'{}' and '{}' would both become '{}': rename one of them",
                other.display(),
                item.from.display(),
                item.to.display()
            );
        }
    }
    Ok(())
}

fn make_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("'{}' cannot be created", folder.display()))
}

/// Fails if there are errors or the work was stopped. `failed` are the numbers of pictures and of
/// videos.
fn report(failed: [u32; 2], errors: &[String], unread: &[String], stop: &Stop) -> Result<()> {
    if !errors.is_empty() {
        let names = [["picture", "pictures"], ["video", "videos"]];
        let counts = failed
            .into_iter()
            .zip(names)
            .filter(|(count, _)| *count > 0);
        let counts = counts.map(|(count, [one, many])| match count {
            1 => format!("1 {one}"),
            count => format!("{count} {many}"),
        });
        let counts: Vec<_> = counts.collect();
        bail!(
            "{} could not be upscaled:\n  {}",
            counts.join(" and "),
            errors.join("\n  ")
        );
    }
    if !unread.is_empty() {
        bail!("some folders could not be read");
    }
    if stop.is_asked() {
        let text = "stopped; continue with the same command and --skip-existing";
        return Err(Stopped(text.into()).into());
    }
    Ok(())
}
