//! The error type of the library.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Reasons why a call fails. A message names the file or the value and, if there is one, the
/// remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Planes, strides, formats or sizes that do not fit together.
    #[error("{0}")]
    Frame(String),
    /// A model file, checkpoint or file of metric weights that cannot be used.
    #[error("model file '{path}': {reason}")]
    Model { path: PathBuf, reason: String },
    /// A model name that is neither bundled nor a file.
    #[error("{0}")]
    UnknownModel(String),
    /// A scale that the model does not support.
    #[error("{0}")]
    Scale(String),
    /// A setting or recipe that is invalid, or that the model or the device does not support.
    #[error("{0}")]
    Setting(String),
    /// A device that is missing, cannot run the model, or has failed on a call.
    #[error("{0}")]
    Device(String),
    /// A device that is lost: all further calls on it in this process fail.
    #[error("{0}")]
    DeviceLost(String),
    /// A call that the number of frames in flight does not allow.
    #[error("{0}")]
    InFlight(String),
    /// A thread that cannot be started or has ended too early.
    #[error("{0}")]
    Thread(String),
    /// Not enough memory.
    #[error("{0}")]
    Memory(String),
    /// A caller's request to stop, through a hook or an observer.
    #[error("stopped before the frame was done")]
    Cancelled,
    /// A file that cannot be read or written.
    #[error("'{path}': {cause}")]
    Io {
        path: PathBuf,
        cause: std::io::Error,
    },
    /// Training data that cannot be used.
    #[error("{0}")]
    Data(String),
    /// A training run that cannot start or continue. `path` is its folder or checkpoint.
    #[error("'{path}': {reason}")]
    Training { path: PathBuf, reason: String },
    /// A training run whose loss or gradient is not finite or far too large. Its checkpoint is the
    /// last good one.
    #[error(
        "'{path}': the {what} is out of bounds at step {step}; the last checkpoint is good: \
         continue from it with a lower learning rate"
    )]
    Diverged {
        path: PathBuf,
        what: String,
        step: u64,
    },
    /// A video file that cannot be read or written.
    #[error("'{path}': {reason}")]
    Video { path: PathBuf, reason: String },
    /// GStreamer cannot be used.
    #[error("GStreamer: {0}")]
    GStreamer(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// Returns the conversion of an I/O error at `path`.
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
