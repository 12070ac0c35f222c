//! Reads the weights of PyTorch checkpoints (`.pth`, `.pt`, `.ckpt` as `torch.save` writes them since PyTorch 1.6).
//!
//! A checkpoint is a zip archive with a pickle, and a pickle is a program. Here it is read as data: a short list of
//! instructions and names is understood, anything else is refused by its name, nothing is ever run. candle's own reader
//! is not used: it trusts lengths, shapes and nesting that a hostile file chooses.

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

/// The weights in a PyTorch checkpoint: a bare state dict or one under `state_dict`, `params_ema`, `params` or `ema`.
/// Whatever else the checkpoint holds (optimiser, counters) is skipped.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    archive: Archive,
    /// The archive's folder.
    folder: String,
    weights: BTreeMap<String, View>,
    /// Storages whose checksum is right.
    verified: BTreeSet<String>,
}

impl Checkpoint {
    /// Opens a checkpoint and reads what it says of its weights, not the weights.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no such file, [`Error::Model`] when it is no checkpoint, is damaged, or names
    /// anything but weights.
    pub fn open(path: &Path) -> Result<Self> {
        // A missing file has a better message of its own.
        std::fs::metadata(path).map_err(Error::io(path))?;
        Self::open_inner(path).map_err(|reason| Error::model(path, reason))
    }

    fn open_inner(path: &Path) -> Result<Self, String> {
        let mut archive = Archive::open(path)?;
        let folder = folder(&archive)?;
        if let Some(order) = archive.entry(&format!("{folder}/byteorder")) {
            let order = archive.read(order, 0, order.len.min(6))?;
            if order != b"little" {
                return Err("written on a big-endian machine, which is not read".into());
            }
        }
        let entry = archive.entry(&format!("{folder}/data.pkl"));
        let entry = entry.ok_or("no pickle")?;
        if entry.len > pickle::MAX_PICKLE {
            let most = pickle::MAX_PICKLE;
            return Err(format!(
                "its pickle has {} bytes, more than the {most} that weights take",
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

    /// Every storage is there and as long as the pickle says, and shared storages do not add up to more than a few
    /// times the file.
    fn check_storages(&self) -> Result<(), String> {
        let (mut stored, mut used) = (BTreeMap::new(), 0u64);
        for (name, view) in &self.weights {
            let entry = self.archive.entry(&self.place(view));
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
            return Err("its tensors are many times what the file holds".into());
        }
        Ok(())
    }

    /// Where the view's storage is in the archive.
    fn place(&self, view: &View) -> String {
        format!("{}/data/{}", self.folder, view.storage)
    }

    /// Names and shapes of the weights, sorted by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.weights
            .iter()
            .map(|(name, view)| (name.as_str(), view.shape.as_slice()))
    }

    /// Reads a tensor, in the type that it has in the file: F64, F32, F16, BF16 or I64.
    ///
    /// # Errors
    /// [`Error::Model`] when there is no such tensor, it is of another type or its data is damaged.
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
            Element::Other(_) => Err("integers that no weights are".into()),
        };
        read.map_err(|reason| {
            Error::model(&self.path, format!("tensor '{}': {reason}", shown(name)))
        })
    }

    /// The elements of a view, in the order of its shape.
    fn elements<T: WithDType, const N: usize>(
        &mut self,
        view: &View,
        value: impl Fn([u8; N]) -> T,
    ) -> Result<Tensor, String> {
        let place = self.place(view);
        let entry = self.archive.entry(&place).ok_or("it has no data")?;
        if !self.verified.contains(&place) {
            self.archive.verify(entry)?;
            self.verified.insert(place);
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
        let values = values.ok_or("a stride out of its storage")?;
        Tensor::from_vec(values, view.shape.as_slice(), &Device::Cpu).map_err(|e| e.to_string())
    }
}

/// Elements from the first to the last of a view, both counted; a view lies inside its storage.
fn span(view: &View) -> usize {
    if view.shape.contains(&0) {
        return 0;
    }
    let steps = view.shape.iter().zip(&view.strides);
    1 + steps.map(|(n, stride)| (n - 1) * stride).sum::<usize>()
}

/// Whether the elements of a view lie one after the other.
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

/// Where the elements of a view lie, counted from its first, in the order of its shape.
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

/// The folder that the archive's entries are in.
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
        (None, _) => Err("a zip archive, but no PyTorch checkpoint (no data.pkl)".into()),
        _ => Err("an archive with more than one pickle".into()),
    }
}
