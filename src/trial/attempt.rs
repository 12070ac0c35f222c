//! The progress of a trial, shared by its threads and its owner.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::record::{Record, State};
use crate::{Error, Result};

/// Progress of a trial. It may be cancelled, and only one of those who share it stores its end.
#[derive(Clone, Default)]
pub struct Attempt(Arc<Progress>);

#[derive(Default)]
struct Progress {
    cancelled: AtomicBool,
    step: Mutex<Step>,
}

/// State of the records.
#[derive(Default)]
enum Step {
    /// Nothing is being tried.
    #[default]
    Idle,
    /// `record` says "trying". `before` is what it said before.
    Trying {
        record: Record,
        before: Option<State>,
    },
    /// The trial was given up. It must not store anything any more.
    GivenUp,
}

impl Attempt {
    /// Asks the trial to end without a verdict as soon as possible. It goes on to guard the records
    /// until then.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Gives a trial up that has no verdict, because the program may end before the trial. The
    /// records say again what they said before it.
    pub fn withdraw(&self) {
        self.give_up(Record::restore);
    }

    /// Returns `true` for the same trial.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Gives a trial up that does not answer. Returns `true` if it was trying something, which is
    /// then refused.
    pub(super) fn refuse(&self, reason: &str) -> bool {
        self.give_up(|record, _| record.refuse(reason))
    }

    fn give_up(&self, store: impl FnOnce(&Record, Option<State>)) -> bool {
        self.cancel();
        // The lock is held until the end is stored, which a late answer must not replace.
        let mut step = self.step();
        match mem::replace(&mut *step, Step::GivenUp) {
            Step::Trying { record, before } => {
                store(&record, before);
                true
            }
            Step::Idle | Step::GivenUp => false,
        }
    }

    /// Returns `true` after [`Self::cancel`].
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// # Errors
    /// [`Error::Cancelled`] if the trial must end.
    pub(super) fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Stores that `record` is being tried, before a device is touched.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if the trial must end, [`Error::Io`] if that cannot be stored. Then the
    /// device must not be touched.
    pub(super) fn begin(&self, record: &Record) -> Result<()> {
        self.check()?;
        let mut step = self.step();
        if matches!(*step, Step::GivenUp) {
            return Err(Error::Cancelled);
        }
        let before = record.read();
        record.begin()?;
        *step = Step::Trying {
            record: record.clone(),
            before,
        };
        Ok(())
    }

    /// Stores the end of what is being tried. `store` gets the record and its previous state.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if the trial was given up. Then nothing is stored.
    pub(super) fn end(&self, store: impl FnOnce(&Record, Option<State>)) -> Result<()> {
        let mut step = self.step();
        if matches!(*step, Step::GivenUp) {
            return Err(Error::Cancelled);
        }
        if let Step::Trying { record, before } = mem::take(&mut *step) {
            store(&record, before);
        }
        Ok(())
    }

    fn step(&self) -> MutexGuard<'_, Step> {
        self.0.step.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
