//! Files of degradation estimators, and the bundled one.

use std::{
    collections::HashMap,
    io::{Cursor, Read, Seek},
    path::Path,
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::container::{self, FORMAT_VERSION, Precision, Reader};
use crate::{
    Error, Result,
    nn::lite::{Estimator, EstimatorConfig},
};

/// Name of the family in the metadata.
pub(super) const FAMILY: &str = "lite-estimator";

/// The bundled estimator, which `tadsr-train estimator` has trained.
static BUNDLED: &[u8] = include_bytes!("../../models/estimator.safetensors");

/// Metadata of the file of an estimator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EstimatorMetadata {
    pub format_version: u32,
    /// Name of the family, `lite-estimator`.
    pub family: String,
    pub name: String,
    pub estimator: EstimatorConfig,
    /// Mean estimate for clean input, 0 to 0.9.
    #[serde(default)]
    pub floor: f32,
    pub licence: String,
    /// Data and steps of its training, in free form.
    pub training: serde_json::Value,
}

impl EstimatorMetadata {
    /// Makes the metadata of a new estimator.
    pub fn new(estimator: EstimatorConfig, floor: f32, training: serde_json::Value) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            family: FAMILY.into(),
            name: "estimator".into(),
            estimator,
            floor,
            licence: "MIT OR Apache-2.0".into(),
            training,
        }
    }
}

impl Estimator {
    /// Returns the bundled estimator.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not valid, which tests exclude.
    pub fn bundled() -> Result<Self> {
        Self::load(Cursor::new(BUNDLED), Path::new("estimator.safetensors"))
    }

    fn load(source: impl Read + Seek, path: &Path) -> Result<Self> {
        let load = || -> std::result::Result<_, String> {
            let mut reader = Reader::new(source)?;
            let metadata: EstimatorMetadata = reader.metadata(FAMILY)?;
            metadata.estimator.check()?;
            let floor = metadata.floor;
            if !(0.0..=0.9).contains(&floor) {
                return Err(format!("floor = {floor}: 0 to 0.9"));
            }
            let mut tensors = HashMap::new();
            for (name, shape) in metadata.estimator.tensors() {
                let values = reader.take(&name, &shape)?;
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu);
                tensors.insert(name, tensor.map_err(|e| e.to_string())?);
            }
            reader.finish()?;
            let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
            let estimator = Self::new(metadata.estimator, vb).map_err(|e| e.to_string())?;
            Ok(estimator.with_floor(floor))
        };
        load().map_err(|reason| Error::model(path, reason))
    }
}

/// Writes `tensors` of [`EstimatorConfig::tensors`] to the file of an estimator, in f16.
///
/// # Errors
/// [`Error::Io`], [`Error::Model`] if a value does not fit in f16.
pub fn write_estimator(
    path: &Path,
    metadata: &EstimatorMetadata,
    tensors: &HashMap<String, Tensor>,
) -> Result<()> {
    let json = serde_json::to_string(metadata).map_err(|e| Error::model(path, e.to_string()))?;
    let names = metadata.estimator.tensors();
    container::write(path, json, &names, Precision::F16, |name, _| {
        let missing = || Error::model(path, format!("tensor '{name}' is missing"));
        let tensor = tensors.get(name).ok_or_else(missing)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_estimator_is_valid() {
        let estimator = Estimator::bundled().unwrap();
        assert_eq!(*estimator.config(), EstimatorConfig::default());
    }

    #[test]
    fn a_model_of_another_family_is_refused() {
        let path = Path::new("tiny-x2.safetensors");
        let bytes = include_bytes!("../../models/tiny-x2.safetensors");
        let error = Estimator::load(Cursor::new(&bytes[..]), path).err();
        let text = error.unwrap().to_string();
        assert!(text.contains("lite-estimator"), "{text}");
    }
}
