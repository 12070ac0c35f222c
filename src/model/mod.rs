//! Model files, each a safetensors file with JSON metadata, and the bundled models.

mod blend;
mod bundled;
mod container;
mod estimator;
mod file;
#[cfg(feature = "train")]
pub mod import;
mod onnx;
#[cfg(feature = "train")]
pub mod pth;
mod resshift;

use std::path::Path;

use crate::{Error, Result};

pub use bundled::{BUNDLED, Bundled, DEFAULT_MODEL, LADDER, checksum};
pub use container::{CONDITIONED_VERSION, FORMAT_VERSION, MEMORY_VERSION, Mismatch, Precision};
pub use estimator::{EstimatorMetadata, write_estimator};
pub use file::{Calibration, Layer, LayerCondition, LiteModel, Metadata};
pub use onnx::OnnxEnds;
pub use resshift::{ResShiftMetadata, ResShiftModel};

/// A model of any family.
#[derive(Clone, Debug)]
pub enum Model {
    /// Lite models for real time, one for each range of scales, in ascending order.
    Lite(Vec<LiteModel>),
    /// A ResShift, SinSR or TAD-SR model.
    ResShift(Box<ResShiftModel>),
}

/// Reads the metadata of the model file `path` without its weights.
///
/// # Errors
/// [`Error::Io`] if the file cannot be read, [`Error::Model`] if it is not a model.
pub fn model_metadata(path: &Path) -> Result<serde_json::Value> {
    let file = container::open(path)?;
    let reader = container::Reader::new(file);
    let metadata = reader.and_then(|reader| reader.any_metadata());
    metadata.map_err(|reason| Error::model(path, reason))
}

impl Model {
    /// Reads a model file of any family.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Model`] if it is not a valid model.
    pub fn read(path: &Path) -> Result<Self> {
        let file = container::open(path)?;
        let read = || {
            let reader = container::Reader::new(file)?;
            match reader.family() {
                resshift::FAMILY => {
                    ResShiftModel::from_reader(reader).map(|m| Self::ResShift(Box::new(m)))
                }
                file::FAMILY => LiteModel::from_reader(reader).map(|model| Self::Lite(vec![model])),
                other => Err(format!(
                    "family '{other}': this library supports 'lite' and 'official'"
                )),
            }
        };
        read().map_err(|reason: String| Error::model(path, reason))
    }
}
