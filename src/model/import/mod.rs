//! Import of published checkpoints to a model file.

mod recognise;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::DType;

use super::{
    Precision, ResShiftMetadata,
    container::{compare, shown},
    pth::Checkpoint,
};
use crate::{
    Error, Result,
    nn::resshift::{AutoencoderConfig, UnetConfig},
};

/// Constant buffers in checkpoints. The network computes them.
const BUFFERS: [&str; 2] = ["relative_position_index", "attn_mask"];

/// The checkpoint of one of a model's two networks.
pub struct Part {
    path: PathBuf,
    checkpoint: Checkpoint,
    /// Names in the file by names in the ResShift networks.
    names: BTreeMap<String, String>,
    /// Shapes of weights and buffers by names in the ResShift networks.
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Part {
    /// Opens a checkpoint. The parts of names that data-parallel training (`module`) and
    /// compilation (`_orig_mod`) add are removed.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and [`Error::Model`] if two names become equal.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let (mut names, mut shapes) = (BTreeMap::new(), BTreeMap::new());
        for (name, shape) in checkpoint.shapes() {
            let plain = plain(name);
            shapes.insert(plain.clone(), shape.to_vec());
            if let Some(other) = names.insert(plain, name.to_string()) {
                let (a, b) = (shown(name), shown(&other));
                let reason = format!("tensors '{a}' and '{b}' have the same name");
                return Err(Error::model(path, reason));
            }
        }
        Ok(Self {
            path: path.into(),
            checkpoint,
            names,
            shapes,
        })
    }

    /// Infers the U-Net of these tensors. `image_size` is the side of the latent that it was built
    /// for, which determines the shifted windows. The default is the side of a mask in the file,
    /// otherwise 64 as in all ResShift models.
    ///
    /// # Errors
    /// [`Error::Model`] with a tensor that does not fit a U-Net.
    pub fn unet_config(&self, image_size: Option<usize>) -> Result<UnetConfig> {
        recognise::unet(&self.shapes, image_size).map_err(|e| Error::model(&self.path, e))
    }

    /// Infers the autoencoder of these tensors.
    ///
    /// # Errors
    /// [`Error::Model`] with a tensor that does not fit an autoencoder.
    pub fn autoencoder_config(&self) -> Result<AutoencoderConfig> {
        recognise::autoencoder(&self.shapes).map_err(|e| Error::model(&self.path, e))
    }

    /// Checks that the weights have exactly these names and shapes.
    ///
    /// # Errors
    /// [`Error::Model`] with the tensors that are missing, unexpected or of another shape.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let weights = self.shapes.iter().filter(|(name, _)| !is_buffer(name));
        let weights = weights.map(|(name, shape)| (name.as_str(), shape.as_slice()));
        compare(expected, weights).map_err(|mismatch| {
            let reason = format!("its tensors do not fit the network: {mismatch}");
            Error::model(&self.path, reason)
        })
    }

    fn values(&mut self, name: &str) -> Result<Vec<f32>> {
        let wrong = |reason| Error::model(&self.path, reason);
        let stored = self.names.get(name);
        let stored = stored.ok_or_else(|| wrong(format!("tensor '{name}' is missing")))?;
        let tensor = self.checkpoint.read(stored)?;
        if tensor.dtype() == DType::I64 {
            return Err(wrong(format!("tensor '{name}' holds integers")));
        }
        Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

/// Returns the name without the parts that wrappers add, which may be nested.
fn plain(name: &str) -> String {
    let parts = name.split('.').filter(|&part| part != "_orig_mod");
    let parts: Vec<&str> = parts.skip_while(|&part| part == "module").collect();
    parts.join(".")
}

fn is_buffer(name: &str) -> bool {
    name.rsplit('.')
        .next()
        .is_some_and(|last| BUFFERS.contains(&last))
}

/// Writes the model file of two checkpoints, tensor by tensor. `progress` gets the number of
/// parameters written so far.
///
/// # Errors
/// [`Error::Model`] if a checkpoint does not fit the configuration in the metadata or a value does
/// not fit in `precision`, and [`Error::Io`].
pub fn write(
    path: &Path,
    metadata: &ResShiftMetadata,
    precision: Precision,
    unet: &mut Part,
    autoencoder: &mut Part,
    mut progress: impl FnMut(usize),
) -> Result<()> {
    unet.check(&metadata.config.unet.tensors())?;
    autoencoder.check(&metadata.config.autoencoder.tensors())?;
    let mut written = 0;
    metadata.write(path, precision, |name, _| {
        let values = match name.split_once('.') {
            Some(("unet", name)) => unet.values(name)?,
            Some((_, name)) => autoencoder.values(name)?,
            None => Vec::new(),
        };
        written += values.len();
        progress(written);
        Ok(values)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_removed_from_names_however_they_are_nested() {
        for name in [
            "out.2.weight",
            "module.out.2.weight",
            "_orig_mod.out.2.weight",
            "module._orig_mod.out.2.weight",
            "_orig_mod.module.module.out.2.weight",
            "module.out._orig_mod.2.weight",
        ] {
            assert_eq!(plain(name), "out.2.weight");
        }
        assert_eq!(plain("out.module.weight"), "out.module.weight");
    }
}
