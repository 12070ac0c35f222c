//! Ctrl-C: the first time a request, the second time the end.

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

/// The error of what was asked to stop and has: how far it came, and how it goes on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Stopped(pub String);

/// Whether somebody has asked to stop.
#[derive(Clone, Default)]
pub struct Stop {
    asked: Arc<AtomicBool>,
    /// What is removed when the request is not followed in time.
    unfinished: Arc<Mutex<Option<PathBuf>>>,
}

impl Stop {
    /// Listens to Ctrl-C, and to being terminated or hung up.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        let heard = stop.clone();
        ctrlc::set_handler(move || {
            if !heard.asked.swap(true, Ordering::SeqCst) {
                eprintln!("stopping; once more to stop at once");
                return;
            }
            let file = heard.unfinished.lock();
            if let Some(path) = &*file.unwrap_or_else(PoisonError::into_inner) {
                // There is nobody left to tell.
                let _ = fs::remove_file(path);
            }
            process::exit(130);
        })?;
        Ok(stop)
    }

    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// What is set when somebody has asked.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }

    /// Names the file that is worth nothing when the process ends at once.
    #[cfg(feature = "video")]
    pub fn set_unfinished(&self, path: Option<PathBuf>) {
        let mut file = self
            .unfinished
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *file = path;
    }
}
