//! Stored verdicts of trials.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process,
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// File with the verdict about one device and model.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    path: PathBuf,
    /// Description of what is tried, for people who read the file.
    what: String,
}

/// Contents of a file.
#[derive(Serialize, Deserialize)]
struct Contents {
    what: String,
    #[serde(flatten)]
    state: State,
}

/// State of a trial.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum State {
    /// The process `pid` is in the trial, or has crashed in it.
    Trying { pid: u32 },
    /// The device passes.
    Fast { reason: String },
    /// The device does not pass, or has failed later.
    Refused { reason: String },
}

impl Record {
    pub fn new(folder: &Path, name: &str, what: &str) -> Self {
        Self {
            path: folder.join(format!("{name}.json")),
            what: what.into(),
        }
    }

    /// Returns the stored state; `None` if there is none or it cannot be read.
    pub fn read(&self) -> Option<State> {
        let bytes = fs::read(&self.path).ok()?;
        let contents: Contents = serde_json::from_slice(&bytes).ok()?;
        Some(contents.state)
    }

    /// Returns a reason not to start a trial while the stored state is [`State::Trying`] of the
    /// process `pid`.
    pub fn obstacle(&self, pid: u32) -> String {
        let path = self.path.display();
        if is_alive(pid) {
            format!("another trial is in progress (process {pid}, '{path}')")
        } else {
            format!("an earlier trial crashed or hung; delete '{path}' to repeat it")
        }
    }

    /// Stores that a trial begins, before the device is touched.
    ///
    /// # Errors
    /// [`Error::Io`] if that cannot be stored. Then the device must not be touched.
    pub fn begin(&self) -> Result<()> {
        self.write(State::Trying { pid: process::id() })
    }

    /// Stores that the device passes.
    pub fn accept(&self, reason: &str) {
        self.end(State::Fast {
            reason: reason.into(),
        });
    }

    /// Stores that the device does not pass or has failed.
    pub fn refuse(&self, reason: &str) {
        self.end(State::Refused {
            reason: reason.into(),
        });
    }

    /// Stores a previous state again; `None` removes the state.
    pub fn restore(&self, state: Option<State>) {
        match state {
            Some(state) => self.end(state),
            // A state that stays prevents further trials, which is safe.
            None => drop(fs::remove_file(&self.path)),
        }
    }

    fn end(&self, state: State) {
        // As above.
        let _ = self.write(state);
    }

    /// Writes the file as a whole, so that it outlives a crash of the system.
    fn write(&self, state: State) -> Result<()> {
        let failed = Error::io(&self.path);
        let contents = Contents {
            what: self.what.clone(),
            state,
        };
        let text = serde_json::to_string_pretty(&contents).map_err(|e| failed(e.into()))?;
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).map_err(&failed)?;
        }
        let new = self.path.with_extension(format!("{}.new", process::id()));
        File::create(&new)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&new, &self.path))
            .map_err(failed)
    }
}

impl State {
    /// Returns `true` if another process is in the trial.
    pub fn in_progress(&self) -> bool {
        matches!(self, Self::Trying { pid } if is_alive(*pid))
    }
}

/// Returns `true` if another process `pid` is running. The trials of one process run one after the
/// other, so a record of this process is that of an earlier one with the same number.
fn is_alive(pid: u32) -> bool {
    pid != process::id() && Path::new("/proc").join(pid.to_string()).exists()
}
