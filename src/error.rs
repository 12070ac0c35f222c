//! The library's error type.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong; every message names the file or value at fault and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A frame whose planes, strides or sizes do not fit together.
    #[error("{0}")]
    Frame(String),
    /// A model file that cannot be used.
    #[error("model file '{path}': {reason}")]
    Model { path: PathBuf, reason: String },
    /// A model name that is neither bundled nor a file.
    #[error("{0}")]
    UnknownModel(String),
    /// A scale that the model does not serve.
    #[error("{0}")]
    Scale(String),
    /// A device that is not there, cannot run the model, or failed.
    #[error("{0}")]
    Device(String),
    /// A setting that the model cannot follow.
    #[error("{0}")]
    Setting(String),
    /// The caller's hook asked to stop.
    #[error("stopped before the frame was done")]
    Cancelled,
    /// A file that cannot be read or written.
    #[error("'{path}': {cause}")]
    Io {
        path: PathBuf,
        cause: std::io::Error,
    },
    /// Not enough memory.
    #[error("{0}")]
    Memory(String),
    /// A training run that cannot start or go on; `path` is its folder or checkpoint.
    #[error("'{path}': {reason}")]
    Training { path: PathBuf, reason: String },
    /// A training run whose loss or gradient is no number or far too large; its checkpoint is the last good one.
    #[error(
        "'{path}': the {what} is out of bounds at step {step}; the last checkpoint is good: go on from it with a lower \
         learning rate"
    )]
    Diverged {
        path: PathBuf,
        what: String,
        step: u64,
    },
    /// A video file that cannot be read or written.
    #[error("'{path}': {reason}")]
    Video { path: PathBuf, reason: String },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// What makes an error of an I/O error at `path`.
    pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> Self {
        |cause| Self::Io {
            path: path.into(),
            cause,
        }
    }

    #[cfg(feature = "train")]
    pub(crate) fn training(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Training {
            path: path.into(),
            reason: reason.into(),
        }
    }

    #[cfg(feature = "video")]
    pub(crate) fn video(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Video {
            path: path.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn model(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Model {
            path: path.into(),
            reason: reason.into(),
        }
    }
}
