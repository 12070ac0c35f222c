//! The bundled models, which are compiled into the library, and models by name.

use std::path::Path;

use super::{LiteModel, Model};
use crate::{Error, Result};

/// Name of the default model.
pub const DEFAULT_MODEL: &str = "tiny";

/// Groups of bundled models from the smallest to the largest, for [`crate::ladder`]. A group may
/// lack a model for some scales.
pub const LADDER: [&str; 3] = ["tiny", "small", "base"];

/// A bundled model file.
pub struct Bundled {
    /// Name of the model, such as `tiny-x2`. The part before `-x` is the name of its group, which
    /// has a model for each range of scales.
    pub name: &'static str,
    bytes: &'static [u8],
}

impl Bundled {
    fn group(&self) -> &'static str {
        self.name
            .rsplit_once("-x")
            .map_or(self.name, |(group, _)| group)
    }
}

/// All bundled models. Those of a group are in ascending order of their scales.
pub static BUNDLED: &[Bundled] = &[
    Bundled {
        name: "tiny-x2",
        bytes: include_bytes!("../../models/tiny-x2.safetensors"),
    },
    Bundled {
        name: "tiny-x4",
        bytes: include_bytes!("../../models/tiny-x4.safetensors"),
    },
    Bundled {
        name: "small-x2",
        bytes: include_bytes!("../../models/small-x2.safetensors"),
    },
    Bundled {
        name: "small-x4",
        bytes: include_bytes!("../../models/small-x4.safetensors"),
    },
    Bundled {
        name: "base-x2",
        bytes: include_bytes!("../../models/base-x2.safetensors"),
    },
    Bundled {
        name: "base-x4",
        bytes: include_bytes!("../../models/base-x4.safetensors"),
    },
];

/// Former names of models and groups, and the present ones.
const FORMER: [(&str, &str); 5] = [
    ("tiny-clean", "tiny"),
    ("tiny-clean-x2", "tiny-x2"),
    ("tiny-dial", "tiny"),
    ("tiny-dial-x2", "tiny-x2"),
    ("tiny-dial-x4", "tiny-x4"),
];

impl Model {
    /// Loads a bundled model, a group or a model file. The default of an empty name is
    /// [`DEFAULT_MODEL`].
    ///
    /// # Errors
    /// [`Error::UnknownModel`] for other names, [`Error::Model`] and [`Error::Io`] as
    /// [`Model::read`].
    pub fn find(model: &str) -> Result<Self> {
        let name = or_default(model);
        match bundled(name)? {
            Some(models) => Ok(Self::Lite(models)),
            None => Self::read(existing(name)?),
        }
    }
}

/// Returns a checksum of a model file, or of the files of a bundled model or group.
///
/// # Errors
/// [`Error::UnknownModel`] for other names, [`Error::Io`] if the file cannot be read.
pub fn checksum(model: &str) -> Result<u32> {
    let name = present(or_default(model));
    let mut hasher = crc32fast::Hasher::new();
    let bundled = BUNDLED
        .iter()
        .filter(|b| b.name == name || b.group() == name);
    let found = bundled.map(|model| hasher.update(model.bytes)).count();
    if found == 0 {
        let path = existing(name)?;
        hasher.update(&std::fs::read(path).map_err(Error::io(path))?);
    }
    Ok(hasher.finalize())
}

impl LiteModel {
    /// Loads lite models by name, as [`Model::find`], in ascending order of their scales.
    ///
    /// # Errors
    /// As [`Model::find`], and [`Error::Model`] for a model of another family.
    pub fn find(model: &str) -> Result<Vec<Self>> {
        let name = or_default(model);
        match bundled(name)? {
            Some(models) => Ok(models),
            None => Ok(vec![Self::read(existing(name)?)?]),
        }
    }
}

fn or_default(model: &str) -> &str {
    if model.is_empty() {
        DEFAULT_MODEL
    } else {
        model
    }
}

/// Returns the present name of a model that may have a former one.
fn present(name: &str) -> &str {
    let former = FORMER.iter().find(|(former, _)| *former == name);
    former.map_or(name, |(_, present)| present)
}

/// Returns the bundled model or group of this name.
fn bundled(name: &str) -> Result<Option<Vec<LiteModel>>> {
    let name = present(name);
    let named = |b: &&Bundled| b.name == name || b.group() == name;
    let parse = |b: &Bundled| LiteModel::parse(b.bytes, Path::new(b.name));
    let found: Vec<LiteModel> = BUNDLED
        .iter()
        .filter(named)
        .map(parse)
        .collect::<Result<_>>()?;
    Ok((!found.is_empty()).then_some(found))
}

/// Returns `name` as the path of an existing file.
fn existing(name: &str) -> Result<&Path> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path);
    }
    let mut names: Vec<&str> = BUNDLED.iter().map(Bundled::group).collect();
    names.dedup();
    names.extend(BUNDLED.iter().map(|b| b.name));
    Err(Error::UnknownModel(format!(
        "model '{name}' is neither a file nor a bundled model (available: {})",
        names.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn former_names_of_models_are_understood() {
        for (former, present) in FORMER {
            let names = |name: &str| -> Vec<String> {
                let models = LiteModel::find(name).unwrap();
                models.into_iter().map(|m| m.metadata.name).collect()
            };
            assert_eq!(names(former), names(present), "{former}");
        }
    }
}
