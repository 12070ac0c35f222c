//! Import of published checkpoints into a model file.

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

/// What checkpoints keep beside weights; it is computed when the network is built.
const BUFFERS: [&str; 2] = ["relative_position_index", "attn_mask"];

/// The checkpoint of one of a model's two networks.
pub struct Part {
    path: PathBuf,
    checkpoint: Checkpoint,
    /// Names in the file by those of the ResShift networks.
    names: BTreeMap<String, String>,
    /// Shapes of weights and buffers, by the names of the ResShift networks.
    shapes: BTreeMap<String, Vec<usize>>,
}

impl Part {
    /// Opens a checkpoint. What data-parallel training (`module`) and compilation (`_orig_mod`) put into its names is
    /// taken out.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and [`Error::Model`] when two names become one.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let (mut names, mut shapes) = (BTreeMap::new(), BTreeMap::new());
        for (name, shape) in checkpoint.shapes() {
            let plain = plain(name);
            shapes.insert(plain.clone(), shape.to_vec());
            if let Some(other) = names.insert(plain, name.to_string()) {
                let (a, b) = (shown(name), shown(&other));
                let reason = format!("tensors '{a}' and '{b}' are the same one");
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

    /// The U-Net that these tensors are of. The side of the latent that it was built for, which
    /// decides where windows are shifted, is `image_size`, else that of a mask in the file, else 64
    /// as in every ResShift model.
    ///
    /// # Errors
    /// [`Error::Model`] with the tensor that tells no U-Net.
    pub fn unet_config(&self, image_size: Option<usize>) -> Result<UnetConfig> {
        recognise::unet(&self.shapes, image_size).map_err(|e| Error::model(&self.path, e))
    }

    /// The autoencoder that these tensors are of.
    ///
    /// # Errors
    /// [`Error::Model`] with the tensor that tells no autoencoder.
    pub fn autoencoder_config(&self) -> Result<AutoencoderConfig> {
        recognise::autoencoder(&self.shapes).map_err(|e| Error::model(&self.path, e))
    }

    /// Whether the weights are exactly these, by name and shape.
    ///
    /// # Errors
    /// [`Error::Model`] with what is missing, unexpected or of another shape.
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

/// The name without what wrappers put into it, however often they did.
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

/// Writes the model file of two checkpoints, tensor by tensor; `progress` is told the parameters written so far.
///
/// # Errors
/// [`Error::Model`] when a checkpoint does not fit the metadata's configuration or a value does not fit in `precision`,
/// [`Error::Io`].
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
    fn wrappers_are_taken_out_of_names_however_they_are_stacked() {
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
