//! Upscaling of all pictures in a folder.

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
            } else {
                self.others.push(path);
            }
        }
        Ok(())
    }
}

/// Upscales every picture below the input folder into the folder `output`.
pub fn run(args: &Args, job: &mut Job, output: &Path, stop: &Stop) -> Result<()> {
    if super::same_file(&args.input, output) {
        bail!(
            "'{}' is the input and cannot be the output",
            output.display()
        );
    }
    let mut files = Files::below(&args.input, output);
    for other in &files.others {
        let path = args.input.join(other);
        args.notice(&format!(
            "skipped '{}': its name is not that of a PNG, JPEG, WebP or TIFF file",
            path.display()
        ));
    }
    if files.pictures.is_empty() && files.unread.is_empty() {
        bail!(
            "no picture (.png, .jpg, .jpeg, .webp, .tif, .tiff) in '{}'",
            args.input.display()
        );
    }
    let all = files.pictures.len();
    check_names(&files.pictures)?;
    let target = |path: &PathBuf| output.join(output_name(path));
    let exists = |path: &PathBuf| target(path).exists();
    if args.skip_existing {
        files.pictures.retain(|path| !exists(path));
    } else if let (false, Some(first)) = (args.overwrite, files.pictures.iter().find(|p| exists(p)))
    {
        bail!(
            "'{}' exists; --overwrite replaces existing files, --skip-existing keeps them",
            target(first).display()
        );
    }
    let kept = all - files.pictures.len();
    let meter = Meter::new("pictures", "images/s", Some(files.pictures.len() as u64))?;
    let meter = meter.with_json(args.json);
    job.upscaler.set_observer(Some(meter.observer(stop)));
    let (mut done, mut failed) = (0, Vec::new());
    for path in &files.pictures {
        let (from, to) = (args.input.join(path), target(path));
        let made =
            make_folder_of(&to).and_then(|()| upscale_picture(args, job, &from, &to, &meter));
        match made {
            Ok(_) => done += 1,
            Err(e) if is_cancelled(&e) => break,
            Err(e) => {
                let line = format!("'{}': {e:#}", from.display());
                meter.log(&line);
                failed.push(line);
            }
        }
        meter.advance();
        if stop.is_asked() {
            break;
        }
    }
    meter.finish();
    let rate = f64::from(done) / meter.seconds();
    let already = match kept {
        0 => String::new(),
        _ => format!(", {kept} were there already"),
    };
    for line in &files.unread {
        args.notice(&format!("{line}: its pictures are skipped"));
    }
    if !args.json {
        println!(
            "{}: {done} of {all} pictures, {rate:.2} images/s{already}",
            output.display()
        );
    }
    report(&failed, &files.unread, stop)?;
    if args.json {
        let (pictures, of, existing) = (done as usize, all, kept);
        Event::Folder {
            path: output.display().to_string(),
            pictures,
            of,
            existing,
        }
        .print();
    }
    Ok(())
}

/// Refuses pictures whose outputs would have the same name.
fn check_names(pictures: &[PathBuf]) -> Result<()> {
    let mut names = HashMap::new();
    for path in pictures {
        let name = output_name(path);
        if let Some(other) = names.insert(name.clone(), path) {
            bail!(
                "'{}' and '{}' would both become '{}': rename one of them",
                other.display(),
                path.display(),
                name.display()
            );
        }
    }
    Ok(())
}

fn make_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("'{}' cannot be created", folder.display()))
}

fn report(failed: &[String], unread: &[String], stop: &Stop) -> Result<()> {
    if !failed.is_empty() {
        bail!(
            "{} could not be upscaled:\n  {}",
            match failed.len() {
                1 => "1 picture".into(),
                n => format!("{n} pictures"),
            },
            failed.join("\n  ")
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
