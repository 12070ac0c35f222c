//! Model files of the ResShift family.

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
    diffusion::Schedule,
    nn::resshift::{Autoencoder, ResShiftConfig, Unet},
};

/// Name of the family in the metadata, which is older than the name in the code.
pub(super) const FAMILY: &str = "official";

/// Metadata of a model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResShiftMetadata {
    pub format_version: u32,
    /// Name of the family in the file, `official`.
    pub family: String,
    pub name: String,
    pub config: ResShiftConfig,
    pub licence: String,
    /// Origin of the weights, imported files or training, in free form.
    pub source: serde_json::Value,
}

impl ResShiftMetadata {
    /// Makes the metadata of a new model.
    pub fn new(name: &str, config: ResShiftConfig, licence: &str) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            family: FAMILY.into(),
            name: name.into(),
            config,
            licence: licence.into(),
            source: serde_json::Value::Null,
        }
    }

    fn check(&self) -> Result<(), String> {
        container::check_label(
            self.format_version,
            FORMAT_VERSION,
            &self.family,
            &self.name,
        )?;
        self.config.check()
    }

    /// Returns names and shapes of the file's tensors. Their names are those in the published
    /// checkpoints after `unet.` or `autoencoder.`.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let unet = self.config.unet.tensors().into_iter();
        let unet = unet.map(|(name, shape)| (format!("unet.{name}"), shape));
        let autoencoder = self.config.autoencoder.tensors().into_iter();
        let autoencoder = autoencoder.map(|(name, shape)| (format!("autoencoder.{name}"), shape));
        unet.chain(autoencoder).collect()
    }

    /// Writes a model file with this metadata. `values` returns the values of the tensors of
    /// [`Self::tensors`] in order. The file is replaced atomically.
    ///
    /// # Errors
    /// [`Error::Model`] if the configuration is out of range or a value does not fit in
    /// `precision`, [`Error::Io`], and the errors of `values`.
    pub fn write(
        &self,
        path: &Path,
        precision: Precision,
        values: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let wrong = |reason: String| Error::model(path, reason);
        self.check().map_err(wrong)?;
        let json = serde_json::to_string(self).map_err(|e| wrong(e.to_string()))?;
        container::write(path, json, &self.tensors(), precision, values)
    }
}

/// A ResShift model with the content of its file.
#[derive(Clone, Debug)]
pub struct ResShiftModel {
    pub metadata: ResShiftMetadata,
    /// Tensors of [`ResShiftMetadata::tensors`] in f32 on the CPU.
    pub tensors: HashMap<String, Tensor>,
}

impl ResShiftModel {
    /// Reads a model file, tensor by tensor.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Model`] if it is not a valid model.
    pub fn read(path: &Path) -> Result<Self> {
        Self::load(container::open(path)?, path)
    }

    /// Parses the bytes of a model file. `path` is for error messages.
    ///
    /// # Errors
    /// [`Error::Model`] with the reason.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::load(Cursor::new(bytes), path)
    }

    fn load(source: impl Read + Seek, path: &Path) -> Result<Self> {
        let load = || Self::from_reader(Reader::new(source)?);
        load().map_err(|reason| Error::model(path, reason))
    }

    pub(super) fn from_reader(mut reader: Reader<impl Read + Seek>) -> Result<Self, String> {
        let metadata: ResShiftMetadata = reader.metadata(FAMILY)?;
        metadata.check()?;
        let expected = metadata.tensors();
        // With checked names and shapes, the file has a value for each allocated one.
        reader.compare(&expected).map_err(|m| m.to_string())?;
        let mut tensors = HashMap::new();
        for (name, shape) in expected {
            let values = reader.take(&name, &shape)?;
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu);
            tensors.insert(name, tensor.map_err(|e| e.to_string())?);
        }
        Ok(Self { metadata, tensors })
    }

    /// Writes the model file. It is replaced atomically.
    ///
    /// # Errors
    /// As [`ResShiftMetadata::write`], and [`Error::Model`] if a tensor is missing.
    pub fn save(&self, path: &Path, precision: Precision) -> Result<()> {
        self.metadata.write(path, precision, |name, shape| {
            let tensor = self.tensors.get(name).filter(|t| t.dims() == shape);
            let tensor = tensor.ok_or_else(|| {
                Error::model(
                    path,
                    format!("no tensor '{name}' of shape {shape:?} to save"),
                )
            })?;
            Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        })
    }

    /// Builds the U-Net on `device`. On the CPU it shares the memory of the tensors.
    ///
    /// # Errors
    /// If the tensors are not those of the configuration or cannot be copied to the device.
    pub fn unet(&self, device: &Device) -> Result<Unet> {
        let config = &self.metadata.config.unet;
        Ok(Unet::new(config, self.builder(device).pp("unet"))?)
    }

    /// Builds the autoencoder on `device`. On the CPU it shares the memory of the tensors.
    ///
    /// # Errors
    /// As [`Self::unet`].
    pub fn autoencoder(&self, device: &Device) -> Result<Autoencoder> {
        let config = &self.metadata.config.autoencoder;
        let vb = self.builder(device).pp("autoencoder");
        Ok(Autoencoder::new(config, vb)?)
    }

    /// Returns the noise schedule of the model's training.
    ///
    /// # Errors
    /// If the configuration is out of range.
    pub fn schedule(&self) -> Result<Schedule> {
        Ok(Schedule::new(&self.metadata.config.diffusion)?)
    }

    fn builder(&self, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.tensors.clone(), DType::F32, device)
    }
}
