// SPDX-License-Identifier: MPL-2.0

//! `device=auto`: the trial of CUDA devices in the background, and the swap to the one that passes.

use std::{
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gst::{prelude::*, subclass::prelude::*};
use gst_base::BaseTransform;
use tadsr::{
    Device, Error, Upscaler,
    frame::FrameInfo,
    trial::{self, Attempt, Record, Trial, Verdict},
};

use super::{
    super::TadsrUpscale, CAT, LoadedModel, Session, State, configure, install, is_auto, lock,
    notify_active, overscale,
};

/// Time that a stop waits for a trial, so that a crash of the trial is still noted.
const PATIENCE: Duration = Duration::from_secs(2);

/// CUDA under `device=auto`.
#[derive(Default)]
pub(super) struct AutoCuda {
    /// A CUDA device may take over.
    possible: bool,
    /// Queue depth of that device.
    depth: usize,
    /// Trials that may still run, the newest last. The others are cancelled.
    trials: Vec<Running>,
    /// Verdict on the device in use.
    record: Option<Record>,
}

struct Running {
    subject: Subject,
    attempt: Attempt,
    thread: JoinHandle<()>,
}

/// Model and frames of a trial.
#[derive(Clone, PartialEq)]
struct Subject {
    model: String,
    /// Input and output.
    frames: [FrameInfo; 2],
    /// Number of reloads.
    generation: u64,
}

impl AutoCuda {
    /// Returns the number of frames in flight that must be expected.
    pub fn depth(&self) -> usize {
        if self.possible { self.depth } else { 1 }
    }

    /// Ends the trials early and waits for that, for a limited time.
    pub fn stop(self) {
        self.trials.iter().for_each(|trial| trial.attempt.cancel());
        let start = Instant::now();
        let runs = |trial: &Running| !trial.thread.is_finished();
        while self.trials.iter().any(runs) && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(5));
        }
        // If the program ends before the trial, that must not look like a crash of the trial.
        for trial in self.trials {
            trial.attempt.withdraw();
        }
    }
}

impl State {
    /// Returns the frames before and after; `None` if they pass through or before negotiation.
    fn frames(&self) -> Option<[FrameInfo; 2]> {
        let negotiated = self.negotiated.as_ref();
        let negotiated = negotiated.filter(|n| !n.passes_through(None))?;
        Some([negotiated.in_frame, negotiated.out_frame()])
    }

    /// Returns what a trial would be for now; `None` if there is nothing to try.
    fn subject(&self) -> Option<Subject> {
        match &self.lite {
            Some((model, Device::Cpu)) if self.auto_cuda.possible => Some(Subject {
                model: model.clone(),
                frames: self.frames()?,
                generation: self.generation,
            }),
            _ => None,
        }
    }

    /// Notes that no CUDA device will take over.
    fn stay_on_cpu(&mut self, element: &BaseTransform, reason: String) {
        gst::info!(CAT, obj = element, "Staying on the CPU: {reason}");
        self.auto_cuda.possible = false;
        self.status.stats.cuda = Some(reason);
    }
}

impl Session {
    /// Finds out, when the element starts, whether a CUDA device may take over later.
    pub(super) fn prepare_trial(&self, element: &BaseTransform, state: &mut State) {
        let settings = self.settings();
        if !matches!(settings.device.parse(), Ok(Device::Auto)) {
            return;
        }
        state.auto_cuda.depth = settings.queue_depth as usize;
        match trial::ruled_out() {
            Some(reason) => state.stay_on_cpu(element, reason),
            None => state.auto_cuda.possible = true,
        }
    }

    /// Takes the CUDA context of a neighbour before negotiation, if a CUDA device may take over
    /// later. Frames may then be in CUDA memory.
    pub fn join_cuda(&self, element: &BaseTransform) {
        let state = lock(&self.state);
        let joins = state.auto_cuda.possible && state.negotiated.is_none();
        drop(state);
        if joins && self.cuda.get().is_none() {
            self.cuda.join(element.upcast_ref());
        }
    }

    /// Begins a trial for the negotiated frames, if a CUDA device may take over, unless one runs
    /// for them. Cancels trials for others.
    pub(super) fn begin_trial(&self, element: &BaseTransform) {
        let settings = self.settings();
        let context = self.cuda.get();
        let mut state = lock(&self.state);
        let subject = state.subject();
        let trials = &mut state.auto_cuda.trials;
        trials.retain(|trial| !trial.thread.is_finished());
        if let Some(newest) = trials.last()
            && Some(&newest.subject) == subject.as_ref()
            && !newest.attempt.is_cancelled()
        {
            return;
        }
        trials.iter().for_each(|trial| trial.attempt.cancel());
        let Some(subject) = subject else { return };

        let attempt = Attempt::default();
        let (name, weak) = (subject.model.clone(), element.downgrade());
        let (abort, opener) = (self.cancel.clone(), weak.clone());
        let trial = Trial {
            model: subject.model.clone(),
            from: subject.frames[0],
            to: subject.frames[1],
            load: Box::new(move |device| {
                configure(Upscaler::load(&name, device)?, &settings, &abort)
            }),
            open: Box::new(move |device| {
                let element = opener.upgrade().ok_or(Error::Cancelled)?;
                let this = element.downcast_ref::<TadsrUpscale>();
                let session = &this.ok_or(Error::Cancelled)?.imp().session;
                session.load_on(&element, device)
            }),
            // Frames may be in the memory of this device.
            only: context.map(|context| context.ordinal()),
            attempt: attempt.clone(),
        };
        let owner = attempt.clone();
        let thread = thread::Builder::new().spawn(move || {
            let verdict = trial.run();
            if let Some(element) = weak.upgrade()
                && let Some(this) = element.downcast_ref::<TadsrUpscale>()
            {
                this.imp().session.end_trial(&element, &owner, verdict);
            }
        });
        match thread {
            Ok(thread) => {
                state.status.stats.cuda = None;
                state.auto_cuda.trials.push(Running {
                    subject,
                    attempt,
                    thread,
                });
            }
            Err(err) => {
                state.stay_on_cpu(element, format!("no thread for the trial: {err}"));
                drop(state);
                self.update_latency(element);
            }
        }
    }

    /// Swaps to the device that has passed, or stays on the CPU. Does nothing if another trial
    /// follows, after a reload, new caps or a stop.
    fn end_trial(&self, element: &BaseTransform, attempt: &Attempt, verdict: Verdict<LoadedModel>) {
        let mut state = lock(&self.state);
        // The model on the CPU may be another, because of overload.
        let trial = state.auto_cuda.trials.last();
        let counts = trial.is_some_and(|trial| {
            trial.attempt.is(attempt)
                && trial.subject.generation == state.generation
                && Some(trial.subject.frames) == state.frames()
        });
        if !counts {
            return;
        }
        let (ordinal, reason, record, model) = match verdict {
            Verdict::Use {
                ordinal,
                reason,
                record,
                opened,
            } => (ordinal, reason, record, opened),
            Verdict::Stay(reason) => {
                state.stay_on_cpu(element, reason);
                drop(state);
                return self.update_latency(element);
            }
            Verdict::Undecided(reason) => {
                gst::info!(
                    CAT,
                    obj = element,
                    "Staying on the CPU until new caps: {reason}"
                );
                state.status.stats.cuda = Some(reason);
                return;
            }
        };
        let max = model.upscaler.max_scale();
        let negotiated = state.negotiated.as_ref();
        if let Some(reason) = negotiated.and_then(|n| overscale(n.scale(), max)) {
            state.stay_on_cpu(element, reason);
            drop(state);
            return self.update_latency(element);
        }
        gst::info!(CAT, obj = element, "Swapping to cuda:{ordinal}: {reason}");
        state.auto_cuda.record = Some(record);
        state.status.stats.cuda = Some(reason);
        install(state, Some(model));
        notify_active(element);
        self.update_latency(element);
        self.govern_anew(element);
    }

    /// Loads the model of the settings on a CUDA device, without a fallback.
    fn load_on(&self, element: &BaseTransform, device: Device) -> tadsr::Result<LoadedModel> {
        let settings = self.settings();
        let conditions = self.conditions();
        let name = if is_auto(&settings.model) {
            self.choose(element, &settings, device, conditions)?
        } else {
            &settings.model
        };
        let upscaler = self.load(&settings, name, device)?;
        Ok(LoadedModel {
            requested: settings.model.clone(),
            conditions,
            ..LoadedModel::new(upscaler, name, false)
        })
    }

    /// Takes note of a failure of the device in use. Returns true if `device=auto` selected it:
    /// then the CPU continues, and no later trial selects it.
    pub(super) fn device_failed(&self, element: &BaseTransform, err: &Error) -> bool {
        let mut state = lock(&self.state);
        let Some(record) = state.auto_cuda.record.take() else {
            return false;
        };
        record.refuse(&format!("failed in a stream: {err}"));
        state.stay_on_cpu(element, err.to_string());
        true
    }
}
