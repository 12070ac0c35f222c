//! Checkpoints: tensors and a JSON state in one safetensors file, replaced atomically.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{Device, Tensor};
use safetensors::{SafeTensorError, SafeTensors};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result};

const STATE_KEY: &str = "tadsr-checkpoint";

/// Writes `bytes` to `path` so that a reader or a crash sees the old file or the new one, never a part.
///
/// # Errors
/// [`Error::Io`].
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = Error::io(path);
    let part = path.with_extension("part");
    fs::write(&part, bytes).map_err(&io)?;
    put_in_place(&part, path)
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
    let part = path.with_extension("part");
    // Straight to the file: a large network's state takes gigabytes.
    safetensors::serialize_to_file(&tensors, Some(header), &part).map_err(|e| match e {
        SafeTensorError::IoError(e) => Error::io(path)(e),
        e => wrong(e.to_string()),
    })?;
    put_in_place(&part, path)
}

/// Makes sure that `part` is on the disk, then lets it replace `path`.
fn put_in_place(part: &Path, path: &Path) -> Result<()> {
    let io = Error::io(path);
    fs::File::open(part)
        .and_then(|f| f.sync_all())
        .map_err(&io)?;
    fs::rename(part, path).map_err(&io)
}

/// Loads what [`save`] saved.
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

/// Loads the checkpoint of a run that goes on (`resume`), or makes sure that a new run does not overwrite one.
///
/// # Errors
/// Those of [`load`], and [`Error::Training`] when the file exists though the run is new, or is missing though it goes on.
pub fn load_if<S: DeserializeOwned>(
    path: &Path,
    resume: bool,
) -> Result<Option<(HashMap<String, Tensor>, S)>> {
    match (path.exists(), resume) {
        (true, true) => load(path).map(Some),
        (false, false) => Ok(None),
        (true, false) => {
            let reason = "exists: go on with --resume, or choose another folder for the run";
            Err(Error::training(path, reason))
        }
        (false, true) => {
            let reason = "does not exist: nothing to resume";
            Err(Error::training(path, reason))
        }
    }
}
