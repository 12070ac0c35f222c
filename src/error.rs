//! The library's error type.

use std::path::PathBuf;

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
    /// A device that is not there.
    #[error("{0}")]
    Device(String),
    /// A file that cannot be read or written.
    #[error("'{path}': {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn model(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Model {
            path: path.into(),
            reason: reason.into(),
        }
    }
}
