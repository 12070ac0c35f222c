//! Checkpoints: tensors and a JSON state in one safetensors file, replaced atomically.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{Error, Result};

/// File with the checkpoint in the folder of a run.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// Returns `true` if there is a checkpoint in `folder`.
pub fn has_checkpoint(folder: &Path) -> bool {
    folder.join(CHECKPOINT).exists()
}

const STATE_KEY: &str = "tadsr-checkpoint";

/// Writes `bytes` to `path` atomically: a reader or a crash sees the old file or the new one, never
/// a part.
///
/// # Errors
/// [`Error::Io`].
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    put_in_place(path, |part| fs::write(part, bytes).map_err(Error::io(path)))
}

/// Saves `tensors` and `state`.
///
/// # Errors
/// [`Error::Io`], or [`Error::Model`] when something cannot be serialised.
pub fn save(path: &Path, tensors: Vec<(String, Tensor)>, state: &impl Serialize) -> Result<()> {
    let wrong = |e: String| Error::model(path, e);
    let json = serde_json::to_string(state).map_err(|e| wrong(e.to_string()))?;
    let header = HashMap::from([(STATE_KEY.to_string(), json)]);
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    put_in_place(path, |part| {
        // Directly to the file, because the state of a large network takes gigabytes.
        safetensors::serialize_to_file(&tensors, Some(header), part).map_err(|e| match e {
            SafeTensorError::IoError(e) => Error::io(path)(e),
            e => wrong(e.to_string()),
        })
    })
}

/// Returns the error of a checkpoint that cannot be continued because of `differences`.
pub fn other_options(path: &Path, differences: Vec<String>) -> Error {
    let differences = differences.join("; ");
    Error::training(path, format!("was made with other options: {differences}"))
}

/// Lists the values that differ between `was` and `is`, such as `steps 3000, now 3500`.
pub fn differences(was: &impl Serialize, is: &impl Serialize) -> Vec<String> {
    fn walk(name: &str, was: &Value, is: &Value, found: &mut Vec<String>) {
        match (was, is) {
            (Value::Object(a), Value::Object(b)) => {
                let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
                for key in keys {
                    let name = match name {
                        "" => key.clone(),
                        _ => format!("{name}.{key}"),
                    };
                    walk(&name, &was[key], &is[key], found);
                }
            }
            _ if was == is => {}
            // Long lists, such as statistics, are named only.
            (Value::Array(a), _) if a.len() > 4 => found.push(name.into()),
            _ => found.push(format!("{name} {was}, now {is}")),
        }
    }
    let was = serde_json::to_value(was).unwrap_or_default();
    let is = serde_json::to_value(is).unwrap_or_default();
    let mut found = Vec::new();
    walk("", &was, &is, &mut found);
    found
}

/// Calls `write` for the file `path`.part, flushes it to disk and renames it to `path`.
fn put_in_place(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut part = OsString::from(path);
    part.push(".part");
    let part = PathBuf::from(part);
    let written = write(&part).and_then(|()| {
        let synced = fs::File::open(&part).and_then(|f| f.sync_all());
        let replaced = synced.and_then(|()| fs::rename(&part, path));
        replaced.map_err(Error::io(path))
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&part);
    }
    written
}

/// Loads a checkpoint of [`save`].
///
/// # Errors
/// [`Error::Io`], or [`Error::Model`] when the file is damaged or no checkpoint.
pub fn load<S: DeserializeOwned>(path: &Path) -> Result<(HashMap<String, Tensor>, S)> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let damaged = |e| Error::model(path, format!("damaged checkpoint ({e})"));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let json = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get(STATE_KEY))
        .ok_or_else(|| Error::model(path, "not a checkpoint of this tool"))?;
    let state = serde_json::from_str(json)
        .map_err(|e| Error::model(path, format!("state cannot be understood: {e}")))?;
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
    Ok((tensors, state))
}

/// Returns `true` if [`save`] wrote the file at `path`, and `false` for other safetensors files.
///
/// # Errors
/// [`Error::Io`] when it cannot be read.
pub fn is_checkpoint(path: &Path) -> Result<bool> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let header = SafeTensors::read_metadata(&bytes).ok();
    let metadata = header.and_then(|(_, header)| header.metadata().clone());
    Ok(metadata.is_some_and(|m| m.contains_key(STATE_KEY)))
}

/// Start of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new run; a checkpoint in its folder is an error.
    New,
    /// Continues with the checkpoint.
    Resumed,
    /// A new run that is not saved.
    Dry,
}

impl Start {
    /// Returns the start of a run that continues if `resume`.
    pub fn of(resume: bool) -> Self {
        if resume { Self::Resumed } else { Self::New }
    }
}

/// Loads the checkpoint of a run that continues. Checks that a new run does not overwrite one.
///
/// # Errors
/// Those of [`load`], and [`Error::Training`] when the file exists although the run is new, or is
/// missing although the run continues.
pub fn load_if<S: DeserializeOwned>(
    path: &Path,
    start: Start,
) -> Result<Option<(HashMap<String, Tensor>, S)>> {
    match (path.exists(), start) {
        (true, Start::Resumed) => load(path).map(Some),
        (_, Start::Dry) | (false, Start::New) => Ok(None),
        (true, Start::New) => {
            let reason = "exists: continue with --resume, or choose another folder for the run";
            Err(Error::training(path, reason))
        }
        (false, Start::Resumed) => {
            let reason = "does not exist: nothing to resume";
            Err(Error::training(path, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_are_named_with_both_values() {
        let was =
            json!({"name": "a", "steps": 3, "sizes": [1, 2], "stats": {"mean": [1, 2, 3, 4, 5]}});
        assert!(differences(&was, &was).is_empty());
        let is = json!({"name": "b", "sizes": [1, 3], "stats": {"mean": [1, 2, 3, 4, 6]}});
        let expected = [
            "name \"a\", now \"b\"",
            "sizes [1,2], now [1,3]",
            "stats.mean",
            "steps 3, now null",
        ];
        assert_eq!(differences(&was, &is), expected);
    }

    #[test]
    fn writing_touches_no_other_file_and_leaves_none_behind_when_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a.part"), "another's").unwrap();
        write_atomically(&path("a.png"), b"new").unwrap();
        assert_eq!(fs::read(path("a.part")).unwrap(), b"another's");
        assert_eq!(fs::read(path("a.png")).unwrap(), b"new");
        fs::create_dir(path("folder")).unwrap();
        assert!(write_atomically(&path("folder"), b"new").is_err());
        assert!(save(&path("folder"), Vec::new(), &()).is_err());
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["a.part", "a.png", "folder"]);
    }
}
