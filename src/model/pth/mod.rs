//! Reader of the weights in PyTorch checkpoints (`.pth`, `.pt`, `.ckpt`, as written by `torch.save`
//! since PyTorch 1.6).
//!
//! A checkpoint is a zip archive with a pickle, and a pickle is a program. Here it is read as data:
//! a short list of instructions and names is supported, all others are refused, and nothing is
//! executed. candle's reader is not used, because it trusts lengths, shapes and nesting of the
//! file.

mod archive;
mod pickle;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};

use super::container::shown;
use crate::{Error, Result};
use archive::Archive;
use pickle::{Element, View};

/// The weights in a PyTorch checkpoint: the state dict itself, or that under `state_dict`,
/// `params_ema`, `params` or `ema`. All else in the checkpoint (optimiser, counters) is skipped.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    archive: Archive,
    /// Folder in the archive.
    folder: String,
    weights: BTreeMap<String, View>,
    /// Storages with a verified checksum.
    verified: BTreeSet<String>,
}

impl Checkpoint {
    /// Opens a checkpoint and reads names and shapes of its weights.
    ///
    /// # Errors
    /// [`Error::Io`] if the file does not exist, [`Error::Model`] if it is not a checkpoint, is
    /// damaged, or has code other than that of weights.
    pub fn open(path: &Path) -> Result<Self> {
        // A missing file has its own error.
        std::fs::metadata(path).map_err(Error::io(path))?;
        Self::open_inner(path).map_err(|reason| Error::model(path, reason))
    }

    fn open_inner(path: &Path) -> Result<Self, String> {
        let mut archive = Archive::open(path)?;
        let folder = folder(&archive)?;
        if let Some(order) = archive.entry(&format!("{folder}/byteorder")) {
            let order = archive.read(order, 0, order.len.min(6))?;
            if order != b"little" {
                return Err("written on a big-endian machine, which is not supported".into());
            }
        }
        let entry = archive.entry(&format!("{folder}/data.pkl"));
        let entry = entry.ok_or("no pickle")?;
        if entry.len > pickle::MAX_PICKLE {
            let max = pickle::MAX_PICKLE;
            return Err(format!(
                "its pickle has {} bytes, more than the {max} that weights take",
                entry.len
            ));
        }
        archive.verify(entry)?;
        let weights = pickle::weights(&archive.read(entry, 0, entry.len)?)?;
        let checkpoint = Self {
            path: path.into(),
            archive,
            folder,
            weights,
            verified: BTreeSet::new(),
        };
        checkpoint.check_storages()?;
        Ok(checkpoint)
    }

    /// Checks that every storage exists and has the length in the pickle, and that tensors with
    /// shared storages take at most a few times the length of the file.
    fn check_storages(&self) -> Result<(), String> {
        let (mut stored, mut used) = (BTreeMap::new(), 0u64);
        for (name, view) in &self.weights {
            let entry = self.archive.entry(&self.entry_name(view));
            let entry = entry.ok_or_else(|| format!("tensor '{}' has no data", shown(name)))?;
            if view.stored.checked_mul(view.element.size() as u64) != Some(entry.len) {
                return Err(format!(
                    "tensor '{}': its storage has {} bytes, not {} elements of {} bytes",
                    shown(name),
                    entry.len,
                    view.stored,
                    view.element.size()
                ));
            }
            stored.insert(&view.storage, entry.len);
            let count = pickle::product(&view.shape).unwrap_or(0);
            used += count * view.element.size() as u64;
        }
        if used > 4 * stored.values().sum::<u64>() {
            return Err("its tensors are many times larger than the file".into());
        }
        Ok(())
    }

    /// Returns the entry of the view's storage.
    fn entry_name(&self, view: &View) -> String {
        format!("{}/data/{}", self.folder, view.storage)
    }

    /// Returns names and shapes of the weights, sorted by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.weights
            .iter()
            .map(|(name, view)| (name.as_str(), view.shape.as_slice()))
    }

    /// Reads a tensor in its type in the file: F64, F32, F16, BF16 or I64.
    ///
    /// # Errors
    /// [`Error::Model`] if the tensor does not exist, has another type, or its data is damaged.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let wrong = |reason| Error::model(&self.path, reason);
        let view = self.weights.get(name).cloned();
        let view = view.ok_or_else(|| wrong(format!("there is no tensor '{}'", shown(name))))?;
        let read = match view.element {
            Element::F64 => self.elements(&view, f64::from_le_bytes),
            Element::F32 => self.elements(&view, f32::from_le_bytes),
            Element::F16 => self.elements(&view, f16::from_le_bytes),
            Element::BF16 => self.elements(&view, bf16::from_le_bytes),
            Element::I64 => self.elements(&view, i64::from_le_bytes),
            Element::Other(_) => Err("an integer type that weights do not have".into()),
        };
        read.map_err(|reason| {
            Error::model(&self.path, format!("tensor '{}': {reason}", shown(name)))
        })
    }

    /// Reads the elements of a view in the order of its shape.
    fn elements<T: WithDType, const N: usize>(
        &mut self,
        view: &View,
        value: impl Fn([u8; N]) -> T,
    ) -> Result<Tensor, String> {
        let name = self.entry_name(view);
        let entry = self.archive.entry(&name).ok_or("it has no data")?;
        if !self.verified.contains(&name) {
            self.archive.verify(entry)?;
            self.verified.insert(name);
        }
        let (at, len) = (view.offset * N as u64, (span(view) * N) as u64);
        let bytes = self.archive.read(entry, at, len)?;
        let (stored, _) = bytes.as_chunks::<N>();
        let values: Option<Vec<T>> = if is_contiguous(view) {
            Some(stored.iter().map(|&b| value(b)).collect())
        } else {
            let at = |i| stored.get(i).map(|&b| value(b));
            offsets(view).map(at).collect()
        };
        let values = values.ok_or("a stride beyond its storage")?;
        Tensor::from_vec(values, view.shape.as_slice(), &Device::Cpu).map_err(|e| e.to_string())
    }
}

/// Returns the number of stored elements from the first to the last of a view.
fn span(view: &View) -> usize {
    if view.shape.contains(&0) {
        return 0;
    }
    let steps = view.shape.iter().zip(&view.strides);
    1 + steps.map(|(n, stride)| (n - 1) * stride).sum::<usize>()
}

/// Returns `true` if the elements of a view are contiguous.
fn is_contiguous(view: &View) -> bool {
    let mut next = 1;
    view.shape
        .iter()
        .zip(&view.strides)
        .rev()
        .all(|(&n, &stride)| {
            let fits = n == 1 || stride == next;
            next *= n;
            fits
        })
}

/// Returns the offsets of a view's elements from its first one, in the order of its shape.
fn offsets(view: &View) -> impl Iterator<Item = usize> {
    let count = view.shape.iter().product::<usize>();
    let dims: Vec<_> = view
        .shape
        .iter()
        .copied()
        .zip(view.strides.iter().copied())
        .rev()
        .collect();
    (0..count).map(move |mut i| {
        let mut at = 0;
        for &(n, stride) in &dims {
            at += i % n * stride;
            i /= n;
        }
        at
    })
}

/// Returns the folder of the archive's entries.
fn folder(archive: &Archive) -> Result<String, String> {
    let folders = |name: &'static str| {
        archive
            .names()
            .filter_map(move |n| n.strip_suffix(name)?.strip_suffix('/'))
    };
    if folders("constants.pkl").next().is_some() {
        return Err(
            "a TorchScript program, not a checkpoint: save the model's state_dict() instead".into(),
        );
    }
    let mut found = folders("data.pkl");
    match (found.next(), found.next()) {
        (Some(folder), None) => Ok(folder.into()),
        (None, _) => Err("a zip archive, but not a PyTorch checkpoint (no data.pkl)".into()),
        _ => Err("an archive with more than one pickle".into()),
    }
}
