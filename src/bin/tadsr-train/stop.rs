//! Handling of Ctrl-C: the first requests a stop, the second ends the process at once.

use std::{
    fs,
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Result;

/// Error after a requested stop. Its text states the progress and how to continue.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Stopped(pub String);

impl Stopped {
    /// Returns the error of a process that leaves the text to another one.
    pub fn silently() -> anyhow::Error {
        Self(String::new()).into()
    }
}

/// Request to stop, which all clones share.
#[derive(Clone, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// Incomplete output file, which the second Ctrl-C removes.
    unfinished: Arc<Mutex<Option<PathBuf>>>,
}

impl Stop {
    /// Installs a handler for SIGINT (Ctrl-C), SIGTERM and SIGHUP. Returns the request that the
    /// handler sets.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let in_handler = stop.clone();
        ctrlc::set_handler(move || {
            if !in_handler.requested.swap(true, Ordering::SeqCst) {
                eprintln!("stopping; press Ctrl-C again to end at once");
                return;
            }
            let file = in_handler.unfinished.lock();
            if let Some(path) = &*file.unwrap_or_else(PoisonError::into_inner) {
                // The process ends now, so an error cannot be handled.
                let _ = fs::remove_file(path);
            }
            process::exit(130);
        })?;
        Ok(stop)
    }

    /// Returns `true` if a stop is requested.
    pub fn is_asked(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Returns the flag that a requested stop sets.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.requested.clone()
    }

    /// Sets the incomplete output file that the second Ctrl-C removes; `None` if there is none.
    #[cfg(feature = "video")]
    pub fn set_unfinished(&self, path: Option<PathBuf>) {
        let mut file = self
            .unfinished
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *file = path;
    }
}
