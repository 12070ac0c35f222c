//! Observers of training: progress, messages and requests to stop.

use std::path::PathBuf;

use super::data::{PhotoSet, Preparation};
use crate::Result;

/// Receives the progress of a run and can stop it.
///
/// All methods have a default that does nothing; `()` is an observer that ignores everything.
/// [`Observer::prepared`] and [`Observer::is_stopped`] are called from several threads.
pub trait Observer: Sync {
    /// Reports a fact that a user should know, such as a file that is left out.
    fn message(&self, _text: &str) {}

    /// Reports progress of preparing the training data.
    fn prepared(&self, _progress: Preparation) {}

    /// Reports the start of training, at step `progress.done`.
    fn started(&self, _progress: &Progress) {}

    /// Reports a step.
    fn stepped(&self, _progress: &Progress) {}

    /// Reports a checkpoint and the measurement on held-out data that follows it.
    fn measured(&self, _progress: &Progress, _held_out: &Measurement) {}

    /// Reports the end of a preparation or a training, complete or not.
    fn ended(&self) {}

    /// Returns `true` to stop the run. It saves a checkpoint first.
    fn is_stopped(&self) -> bool {
        false
    }
}

impl Observer for () {}

/// Progress of a training run.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub done: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Images in a step.
    pub images: usize,
    /// Names and mean values of the losses since the last checkpoint.
    pub losses: Vec<(&'static str, f64)>,
}

/// Measurement on held-out data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measurement {
    /// One line for people.
    pub text: String,
    /// Names and values of curves.
    pub values: Vec<(String, f64)>,
}

/// One of this many photos is held out by [`load_photos`].
const HOLD_OUT: usize = 20;

/// Loads the photos below `dirs` with sides of at least `side` pixels. Returns those to train on
/// and those that are held out, one of 20.
///
/// # Errors
/// [`crate::Error::Data`] when there is no usable photo.
pub fn load_photos(
    dirs: &[PathBuf],
    side: usize,
    observer: &dyn Observer,
) -> Result<[PhotoSet; 2]> {
    let photos = PhotoSet::load(dirs, side, |done, all| {
        observer.prepared(Preparation::Photos { done, all });
    });
    observer.ended();
    let mut photos = photos?;
    for skipped in photos.skipped() {
        observer.message(&skipped.to_string());
    }
    if let Some(note) = photos.too_few(HOLD_OUT) {
        observer.message(&format!("note: {note}"));
    }
    let held_out = photos.hold_out(HOLD_OUT);
    Ok([photos, held_out])
}
