//! The folder with the finished segments of a video.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, TryLockError},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

use super::{
    Plan,
    file::{SegmentReader, UNFINISHED, sync_folder},
};
use crate::{Error, Result};

/// File with the [`MadeOf`] of all segments.
const MANIFEST: &str = "manifest.json";
/// File that the processes lock which use the folder.
const LOCK: &str = "lock";

/// Everything that determines the frames of a video, by name: the checksum of the input, the model,
/// settings.
pub type MadeOf = BTreeMap<String, String>;

/// Use of a folder of segments by this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// By several processes, each of which makes some segments.
    Shared,
    /// By this process only. If `replace`, segments that were made of something else are removed.
    Alone { replace: bool },
}

/// State of the file of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Finished,
    Missing,
    /// Damaged, with a description.
    Damaged(String),
}

/// Folder of the segments of a video, beside its output.
pub struct Segments {
    pub(super) plan: Plan,
    pub(super) output: PathBuf,
    folder: PathBuf,
    /// Held until the folder is not used any more.
    lock: File,
    /// Reason why the segments that were in the folder have been removed.
    pub replaced: Option<String>,
}

/// Returns the folder of the segments of `output`: `film.mp4.segments` for `film.mp4`.
pub fn segments_folder(output: &Path) -> PathBuf {
    let mut name = output.file_name().map_or_else(OsString::new, Into::into);
    name.push(".segments");
    output.with_file_name(name)
}

impl Segments {
    /// Returns what the segments of `output` are made of; `None` if there are none.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read, [`Error::Video`] if its manifest is damaged.
    pub fn made_of(output: &Path) -> Result<Option<MadeOf>> {
        read_manifest(&segments_folder(output))
    }

    /// Opens or creates the folder of the segments of `output`, which are those of `plan` and made
    /// of the file `input` and of `settings`.
    ///
    /// # Errors
    /// [`Error::Video`] if the segments in the folder are made of something else, or another
    /// process uses the folder. [`Error::Io`] if it cannot be written.
    pub fn open(
        plan: Plan,
        input: &Path,
        output: &Path,
        settings: &MadeOf,
        access: Access,
    ) -> Result<Self> {
        let folder = segments_folder(output);
        let mut made_of = settings.clone();
        made_of.insert("input".into(), identity(input)?);
        made_of.insert("segments".into(), plan.identity());
        match fs::create_dir(&folder) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(Error::io(&folder)(e)),
            _ => sync_folder(&folder)?,
        }
        let path = folder.join(LOCK);
        let lock = File::options().create(true).append(true).open(&path);
        let mut segments = Self {
            lock: lock.map_err(Error::io(&path))?,
            plan,
            output: output.into(),
            folder,
            replaced: None,
        };
        segments.take(access)?;
        if access != Access::Shared {
            // Those of processes that have been killed.
            segments.remove_files(|name| name.starts_with(UNFINISHED))?;
        }
        let known = read_manifest(&segments.folder)?;
        let known = match known {
            Some(known) => known,
            None => segments.write_manifest(&made_of)?,
        };
        let differences = differences(&known, &made_of);
        if differences.is_empty() {
            return Ok(segments);
        }
        let reason = format!(
            "its segments are of another video or other settings: {}",
            differences.join("; ")
        );
        if segments.files(is_segment)?.is_empty() {
            // Another process may be making some.
            segments.take(Access::Alone { replace: true })?;
        } else if access != (Access::Alone { replace: true }) {
            let remedy = "give the same ones to go on, or remove the folder";
            return Err(Error::video(
                &segments.folder,
                format!("{reason}; {remedy}"),
            ));
        } else {
            segments.replaced = Some(reason);
        }
        segments.remove_files(|name| name == MANIFEST || is_segment(name))?;
        segments.write_manifest(&made_of)?;
        segments.take(access)?;
        Ok(segments)
    }

    /// Locks the folder until this value is dropped.
    fn take(&self, access: Access) -> Result<()> {
        let locked = match access {
            Access::Shared => self.lock.try_lock_shared(),
            Access::Alone { .. } => self.lock.try_lock(),
        };
        match locked {
            Err(TryLockError::WouldBlock) => {
                let reason = "another process uses the folder: wait until it has ended";
                Err(Error::video(&self.folder, reason))
            }
            // Some file systems have no locks.
            _ => Ok(()),
        }
    }

    /// Returns the division of the video.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns the folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the path of the segment `index`.
    pub fn path(&self, index: usize) -> PathBuf {
        self.folder.join(format!("{:05}.segment", index + 1))
    }

    /// Reads the segment `index` to check it.
    pub fn state(&self, index: usize) -> State {
        match SegmentReader::open(&self.path(index)).and_then(|mut file| file.check()) {
            Ok(()) => State::Finished,
            Err(e) if e.kind() == ErrorKind::NotFound => State::Missing,
            Err(e) => State::Damaged(e.to_string()),
        }
    }

    /// Removes the folder with all segments.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be removed.
    pub fn remove(self) -> Result<()> {
        self.remove_files(|name| {
            name == MANIFEST || name == LOCK || name.starts_with(UNFINISHED) || is_segment(name)
        })?;
        drop(self.lock);
        // Files of the user may be in the folder.
        match fs::remove_dir(&self.folder) {
            Err(e) if e.kind() != ErrorKind::DirectoryNotEmpty => Err(Error::io(&self.folder)(e)),
            _ => Ok(()),
        }
    }

    /// Returns the files in the folder whose names are wanted.
    fn files(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let failed = Error::io(&self.folder);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            if entry.file_name().to_str().is_some_and(&is_wanted) {
                files.push(entry.path());
            }
        }
        Ok(files)
    }

    fn remove_files(&self, is_unwanted: impl Fn(&str) -> bool) -> Result<()> {
        let mut files = self.files(is_unwanted)?.into_iter();
        files.try_for_each(|file| fs::remove_file(&file).map_err(Error::io(&file)))
    }

    /// Writes the manifest unless another process has done so. Returns the one in the folder.
    fn write_manifest(&self, made_of: &MadeOf) -> Result<MadeOf> {
        let path = self.folder.join(MANIFEST);
        let failed = Error::io(&path);
        let text = serde_json::to_vec_pretty(made_of).map_err(|e| failed(e.into()))?;
        let file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(&self.folder);
        let mut file = file.map_err(&failed)?;
        file.write_all(&text).map_err(&failed)?;
        file.as_file().sync_all().map_err(&failed)?;
        match file.persist_noclobber(&path) {
            Err(e) if e.error.kind() != ErrorKind::AlreadyExists => return Err(failed(e.error)),
            _ => sync_folder(&path)?,
        }
        let written = read_manifest(&self.folder)?;
        written.ok_or_else(|| failed(ErrorKind::NotFound.into()))
    }
}

fn is_segment(name: &str) -> bool {
    let number = name.strip_suffix(".segment");
    number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn read_manifest(folder: &Path) -> Result<Option<MadeOf>> {
    let path = folder.join(MANIFEST);
    let text = match fs::read(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.map_err(Error::io(&path))?,
    };
    let damaged = |e| Error::video(&path, format!("it is damaged ({e}): remove the folder"));
    serde_json::from_slice(&text).map(Some).map_err(damaged)
}

/// Returns size and checksum of a file.
fn identity(path: &Path) -> Result<String> {
    let mut hasher = crc32fast::Hasher::new();
    let mut size = 0;
    let mut read = || -> io::Result<()> {
        let mut file = File::open(path)?;
        let mut block = vec![0; 1 << 20];
        loop {
            match file.read(&mut block)? {
                0 => return Ok(()),
                read => {
                    size += read as u64;
                    hasher.update(&block[..read]);
                }
            }
        }
    };
    read().map_err(Error::io(path))?;
    Ok(format!("{size} bytes, checksum {:08x}", hasher.finalize()))
}

/// Returns the names whose values differ, with both values.
fn differences(was: &MadeOf, is: &MadeOf) -> Vec<String> {
    let mut names: Vec<_> = was.keys().chain(is.keys()).collect();
    names.sort();
    names.dedup();
    let value = |made_of: &MadeOf, name| made_of.get(name).map_or("none", |v| v).to_string();
    let values = names
        .into_iter()
        .map(|name| (name, value(was, name), value(is, name)));
    let differ = values.filter(|(_, was, is)| was != is);
    differ
        .map(|(name, was, is)| format!("{name} was {was}, now {is}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_have_a_name_and_both_values() {
        let of = |pairs: &[(&str, &str)]| -> MadeOf {
            let pairs = pairs.iter();
            pairs.map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let was = of(&[("model", "tiny"), ("scale", "2")]);
        assert!(differences(&was, &was).is_empty());
        let is = of(&[("model", "small"), ("scale", "2"), ("seed", "1")]);
        let expected = ["model was tiny, now small", "seed was none, now 1"];
        assert_eq!(differences(&was, &is), expected);
    }
}
