//! The models that come with the library, compiled into it, and finding a model by name.

use std::path::Path;

use super::{LiteModel, Model};
use crate::{Error, Result};

/// The model that is used when none is named.
pub const DEFAULT_MODEL: &str = "tiny";

/// A model file inside the library.
pub struct Bundled {
    /// The name it is asked for by, such as `tiny-x2`. The part before `-x` names the whole group: a model file for
    /// each range of scales.
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

/// All bundled models, those of a group from small scales to large.
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
        name: "tiny-clean-x2",
        bytes: include_bytes!("../../models/tiny-clean-x2.safetensors"),
    },
    Bundled {
        name: "tiny-dial-x2",
        bytes: include_bytes!("../../models/tiny-dial-x2.safetensors"),
    },
    Bundled {
        name: "tiny-dial-x4",
        bytes: include_bytes!("../../models/tiny-dial-x4.safetensors"),
    },
    Bundled {
        name: "small-x2",
        bytes: include_bytes!("../../models/small-x2.safetensors"),
    },
    Bundled {
        name: "small-x4",
        bytes: include_bytes!("../../models/small-x4.safetensors"),
    },
];

impl Model {
    /// Loads what `model` names: a bundled model, a group of them, or a model file. Empty is [`DEFAULT_MODEL`].
    ///
    /// # Errors
    /// [`Error::UnknownModel`] when `model` is neither, [`Error::Model`] and [`Error::Io`] as [`Model::read`].
    pub fn find(model: &str) -> Result<Self> {
        let name = or_default(model);
        match bundled(name)? {
            Some(models) => Ok(Self::Lite(models)),
            None => Self::read(existing(name)?),
        }
    }
}

impl LiteModel {
    /// Loads what `model` names, as [`Model::find`], where only the lite family will do. The models come in the order
    /// of their scales.
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

/// The bundled model or group of this name.
fn bundled(name: &str) -> Result<Option<Vec<LiteModel>>> {
    let named = |b: &&Bundled| b.name == name || b.group() == name;
    let parse = |b: &Bundled| LiteModel::parse(b.bytes, Path::new(b.name));
    let found: Vec<LiteModel> = BUNDLED
        .iter()
        .filter(named)
        .map(parse)
        .collect::<Result<_>>()?;
    Ok((!found.is_empty()).then_some(found))
}

/// `name` as the path of a file that is there.
fn existing(name: &str) -> Result<&Path> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path);
    }
    let names: Vec<&str> = BUNDLED.iter().map(|b| b.name).collect();
    Err(Error::UnknownModel(format!(
        "model '{name}' is neither a file nor a bundled model (there are {DEFAULT_MODEL}, {})",
        names.join(", ")
    )))
}
