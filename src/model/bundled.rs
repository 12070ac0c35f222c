//! The models that come with the library, compiled into it.

use std::path::Path;

use super::LiteModel;
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
];

impl LiteModel {
    /// Loads what `model` names: a bundled model, a group of them, or a model file. Empty is [`DEFAULT_MODEL`].
    /// The models come in the order of their scales.
    ///
    /// # Errors
    /// [`Error::UnknownModel`] when `model` is neither, [`Error::Model`] and [`Error::Io`] as
    /// [`LiteModel::read`].
    pub fn find(model: &str) -> Result<Vec<Self>> {
        let name = if model.is_empty() {
            DEFAULT_MODEL
        } else {
            model
        };
        let found: Vec<&Bundled> = BUNDLED
            .iter()
            .filter(|b| b.name == name || b.group() == name)
            .collect();
        if !found.is_empty() {
            let parse = |b: &&Bundled| Self::parse(b.bytes, Path::new(b.name));
            return found.iter().map(parse).collect();
        }
        let path = Path::new(name);
        if path.exists() {
            return Ok(vec![Self::read(path)?]);
        }
        let names: Vec<&str> = BUNDLED.iter().map(|b| b.name).collect();
        Err(Error::UnknownModel(format!(
            "model '{name}' is neither a file nor a bundled model (there are {DEFAULT_MODEL}, {})",
            names.join(", ")
        )))
    }
}
