// SPDX-License-Identifier: MPL-2.0

//! `device=auto`: the trial of CUDA devices in the background, and the swap to the one that passes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gst::{prelude::*, subclass::prelude::*};
use gst_base::BaseTransform;
use tadsr::{
    Device, Error, Upscaler,
    trial::{self, Record, Trial, Verdict},
};

use super::{
    super::TadsrUpscale, CAT, LoadedModel, Session, State, configure, install, is_auto, lock,
    notify_active, overscale,
};

/// Time that a stop waits for a trial, so that it is not taken for one that crashed.
const PATIENCE: Duration = Duration::from_secs(2);

/// CUDA under `device=auto`.
#[derive(Default)]
pub(super) struct AutoCuda {
    /// A CUDA device may take over.
    possible: bool,
    /// Queue depth of that device.
    depth: usize,
    running: Option<Running>,
    /// Verdict on the device in use.
    record: Option<Record>,
}

struct Running {
    cancel: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl AutoCuda {
    /// Returns the number of frames in flight that must be expected.
    pub fn depth(&self) -> usize {
        if self.possible { self.depth } else { 1 }
    }

    /// Ends a trial early and waits for that, for a limited time.
    pub fn stop(self) {
        let Some(Running { cancel, thread }) = self.running else {
            return;
        };
        cancel.store(true, Ordering::Relaxed);
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Session {
    /// Finds out, when the element starts, whether a CUDA device may take over later.
    pub(super) fn prepare_trial(&self, state: &mut State) {
        let settings = self.settings();
        if !matches!(settings.device.parse(), Ok(Device::Auto)) {
            return;
        }
        let obstacle = trial::ruled_out();
        state.auto_cuda.possible = obstacle.is_none();
        state.auto_cuda.depth = settings.queue_depth as usize;
        state.status.stats.cuda = obstacle;
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

    /// Begins a trial for the negotiated frames, if a CUDA device may take over.
    pub(super) fn begin_trial(&self, element: &BaseTransform) {
        let settings = self.settings();
        let mut state = lock(&self.state);
        let auto = &state.auto_cuda;
        let (Some((model, Device::Cpu)), Some(negotiated)) =
            (state.lite.clone(), &state.negotiated)
        else {
            return;
        };
        let busy = auto
            .running
            .as_ref()
            .is_some_and(|r| !r.thread.is_finished());
        if !auto.possible || busy || negotiated.passes_through(None) {
            return;
        }
        let (from, to) = (negotiated.in_frame, negotiated.out_frame());
        let (cancel, abort) = (Arc::new(AtomicBool::new(false)), self.cancel.clone());
        let name = model.clone();
        let trial = Trial {
            model,
            from,
            to,
            load: Box::new(move |device| {
                configure(Upscaler::load(&name, device)?, &settings, &abort)
            }),
            // Frames may be in the memory of this device.
            only: self.cuda.get().map(|context| context.ordinal()),
            cancel: cancel.clone(),
        };
        let (generation, weak) = (state.generation, element.downgrade());
        let thread = thread::Builder::new().spawn(move || {
            let verdict = trial.run();
            if let Some(element) = weak.upgrade()
                && let Some(this) = element.downcast_ref::<TadsrUpscale>()
            {
                this.imp().session.end_trial(&element, generation, verdict);
            }
        });
        match thread {
            Ok(thread) => state.auto_cuda.running = Some(Running { cancel, thread }),
            Err(err) => gst::warning!(CAT, obj = element, "No trial of CUDA devices: {err}"),
        }
    }

    /// Swaps to the device that has passed, or stays on the CPU. Does nothing after a reload or a
    /// stop.
    fn end_trial(&self, element: &BaseTransform, generation: u64, verdict: Verdict) {
        let (ordinal, reason, record) = match verdict {
            Verdict::Use {
                ordinal,
                reason,
                record,
            } => (ordinal, reason, record),
            Verdict::Stay(reason) => return self.stay_on_cpu(element, generation, reason),
        };
        let model = match self.load_on(element, Device::Cuda(ordinal)) {
            Ok(model) => model,
            Err(err) => {
                record.refuse(&err.to_string());
                return self.stay_on_cpu(element, generation, err.to_string());
            }
        };
        let mut state = lock(&self.state);
        let max = model.upscaler.max_scale();
        let negotiated = state.negotiated.as_ref();
        let fits = negotiated.is_some_and(|n| overscale(n.scale(), max).is_none());
        if state.generation != generation || !fits {
            return;
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

    fn stay_on_cpu(&self, element: &BaseTransform, generation: u64, reason: String) {
        let mut state = lock(&self.state);
        if state.generation != generation {
            return;
        }
        gst::info!(CAT, obj = element, "Staying on the CPU: {reason}");
        state.auto_cuda.possible = false;
        state.status.stats.cuda = Some(reason);
        drop(state);
        self.update_latency(element);
    }

    /// Takes note of a failure of the device in use. Returns true if `device=auto` selected it:
    /// then the CPU continues, and no later trial selects it.
    pub(super) fn device_failed(&self, err: &Error) -> bool {
        let mut state = lock(&self.state);
        let Some(record) = state.auto_cuda.record.take() else {
            return false;
        };
        record.refuse(&format!("failed in a stream: {err}"));
        state.auto_cuda.possible = false;
        state.status.stats.cuda = Some(err.to_string());
        true
    }
}
