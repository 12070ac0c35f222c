//! Ctrl-C: the first asks the work to stop, the second ends the process.

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

/// Error of work that has stopped on request: how far it is, and how to continue.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Stopped(pub String);

/// Request to stop.
#[derive(Clone, Default)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    /// File that is removed when the process ends at once.
    unfinished: Arc<Mutex<Option<PathBuf>>>,
}

impl Stop {
    /// Returns a request that Ctrl-C and the signals for termination and hang-up set.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let heard = stop.clone();
        ctrlc::set_handler(move || {
            if !heard.asked.swap(true, Ordering::SeqCst) {
                eprintln!("stopping; press Ctrl-C again to end at once");
                return;
            }
            let file = heard.unfinished.lock();
            if let Some(path) = &*file.unwrap_or_else(PoisonError::into_inner) {
                // An error cannot be reported any more.
                let _ = fs::remove_file(path);
            }
            process::exit(130);
        })?;
        Ok(stop)
    }

    /// Returns `true` once a stop is requested.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Flag that is set once a stop is requested.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }

    /// Sets the file to remove when the process ends at once.
    #[cfg(feature = "video")]
    pub fn set_unfinished(&self, path: Option<PathBuf>) {
        let mut file = self
            .unfinished
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *file = path;
    }
}
