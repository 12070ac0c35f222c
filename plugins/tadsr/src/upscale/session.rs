// SPDX-License-Identifier: MPL-2.0

//! The model from READY to PAUSED and back: loading, falling back, and swapping it while playing.

use std::{
    collections::HashSet,
    mem,
    ops::ControlFlow,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use gst::{glib, prelude::*};
use gst_base::{BaseTransform, prelude::*};
use tadsr::{Device, Error, Upscaler, engine::Times, model::DEFAULT_MODEL};

use load::configure;
use overload::Governed;
use trial::AutoCuda;

use super::{
    CAT, Fallback,
    auto::{Conditions, Share, is_auto},
    caps::{Negotiated, Rules},
    gstcuda, lock, pinned,
    scale::{MAX_SCALE, Scale, invalid_scale, overscale},
    settings::{Property, Settings},
    stats::Status,
};

/// Texts that end a warning about a fallback.
const ON_CPU: &str = "running on the CPU";
const BICUBIC: &str = "upscaling with bicubic interpolation";
const PASSTHROUGH: &str = "passing the video through";

/// A model with its settings.
pub(super) struct LoadedModel {
    pub upscaler: Box<Upscaler>,
    /// Value of the property `model`.
    requested: String,
    /// Name or path of the model.
    loaded: String,
    /// Conditions that it was chosen for, if `requested` leaves the choice to the element.
    conditions: Option<Conditions>,
    /// The fallback to bicubic interpolation: the network's residual is not added.
    bicubic: bool,
    /// Values of the properties `denoise` and `detail` that were applied.
    dials: (f64, f64),
    /// Warnings about refused settings that were posted.
    warned: HashSet<String>,
}

impl LoadedModel {
    fn new(upscaler: Upscaler, loaded: &str, bicubic: bool) -> Self {
        Self {
            upscaler: Box::new(upscaler),
            requested: loaded.into(),
            loaded: loaded.into(),
            conditions: None,
            bicubic,
            dials: Settings::new().dials(),
            warned: HashSet::new(),
        }
    }

    /// Returns the maximum scale. If the element chooses models, it is that of all of them, because
    /// another scale leads to another choice.
    fn max_scale(&self) -> f64 {
        if is_auto(&self.requested) {
            MAX_SCALE
        } else {
            self.upscaler.max_scale()
        }
    }

    fn on_cpu(&self) -> bool {
        self.upscaler.active_device() == Device::Cpu
    }

    /// Returns the value of the property `active-model`.
    fn name(&self, scale: f64) -> String {
        if self.bicubic {
            "bicubic".into()
        } else {
            self.upscaler.active_model(scale).into()
        }
    }
}

/// The model in use, or the reason why there is none here.
#[derive(Default)]
enum Current {
    /// The element is stopped.
    #[default]
    Stopped,
    Ready(LoadedModel),
    /// The streaming thread has taken the model.
    Busy,
    /// The fallback is passthrough, and there is no model.
    Passthrough,
}

/// State from READY to PAUSED and back.
#[derive(Default)]
struct State {
    /// Model in use.
    current: Current,
    /// Model that takes over with the next frame.
    next: Option<LoadedModel>,
    /// Number of reloads and stops, which identifies outdated reloads.
    generation: u64,
    /// Maximum scale of the model.
    max_scale: Option<f64>,
    /// Scale of a model that has only one.
    native_scale: Option<f64>,
    /// Maximum number of frames in flight.
    depth: usize,
    /// Allocator of memory that the device accesses directly.
    pinned: Option<pinned::PinnedAllocator>,
    /// There is such an allocator since the negotiation, or no longer.
    reallocate: bool,
    /// Latency reported to the pipeline.
    latency: gst::ClockTime,
    /// Formats of the caps in force.
    negotiated: Option<Negotiated>,
    /// Input caps that an error message was posted for.
    refused: Option<gst::Caps>,
    /// Values of the read-only properties.
    status: Status,
    /// The element is started.
    share: Option<Share>,
    /// CUDA under `device=auto`.
    auto_cuda: AutoCuda,
    /// Name and device of the model in use, if it is a lite model.
    lite: Option<(String, Device)>,
    /// The stream while `overload` adapts it.
    governed: Option<Governed>,
    /// The time for a frame is announced as latency.
    announces: bool,
    /// Announced time for a frame.
    processing: Duration,
}

impl State {
    /// Updates everything that depends on the model; `None` is passthrough.
    fn describe(&mut self, model: Option<&LoadedModel>) {
        self.note_lite(model);
        let host = model.and_then(|model| model.upscaler.host_allocator());
        self.reallocate ^= host.is_some() != self.pinned.is_some();
        self.pinned = host.map(pinned::PinnedAllocator::new);
        if let Some(model) = model {
            self.depth = model.upscaler.queue_depth();
            self.max_scale = Some(model.max_scale());
            self.native_scale = model.upscaler.native_scale();
            self.status.device = Some(model.upscaler.active_device().to_string());
            self.describe_at_scale(model);
        } else {
            self.depth = 1;
            self.native_scale = None;
            self.status.device = None;
            self.status.model = Some("passthrough".into());
            self.status.precision = None;
        }
    }

    /// Updates what depends on the model and the scale.
    fn describe_at_scale(&mut self, model: &LoadedModel) {
        let scale = self.scale();
        self.status.model = Some(model.name(scale));
        self.status.precision = Some(model.upscaler.active_precision(scale).to_string());
    }

    /// Takes the model, so that inference runs without a lock.
    fn take(&mut self) -> Option<LoadedModel> {
        match mem::replace(&mut self.current, Current::Busy) {
            Current::Ready(model) => Some(model),
            other => {
                self.current = other;
                None
            }
        }
    }

    /// Makes `model` the current one, or the next one if frames are in flight; `None` is
    /// passthrough. Returns the models that it replaces.
    fn install(&mut self, model: Option<LoadedModel>) -> (Current, Option<LoadedModel>) {
        self.describe(model.as_ref());
        let in_flight = match &self.current {
            Current::Busy => true,
            Current::Ready(old) => old.upscaler.in_flight() > 0,
            Current::Stopped | Current::Passthrough => false,
        };
        match model {
            Some(model) if in_flight => (Current::Stopped, self.next.replace(model)),
            model => {
                let current = model.map_or(Current::Passthrough, Current::Ready);
                (mem::replace(&mut self.current, current), self.next.take())
            }
        }
    }

    /// Returns an error text if the model does not support the negotiated scale.
    fn overscale(&self) -> Option<String> {
        overscale(self.negotiated.as_ref()?.scale(), self.max_scale?)
    }

    /// Returns the maximum number of frames in flight, now or on a CUDA device that may take over.
    fn expected_depth(&self) -> usize {
        if self.lite.is_some() {
            self.depth.max(self.auto_cuda.depth())
        } else {
            self.depth
        }
    }

    /// Returns the negotiated scale; before negotiation, a guess.
    fn scale(&self) -> f64 {
        self.negotiated.as_ref().map_or(2.0, Negotiated::scale)
    }
}

/// Settings and model of an element.
///
/// No lock is held while a model is loaded or used, nor while messages are posted.
pub(super) struct Session {
    /// CUDA context of the pipeline, while started.
    pub cuda: gstcuda::SharedContext,
    /// Aborts the frame in progress: the pads are flushing or the element stops.
    pub cancel: Arc<AtomicBool>,
    /// Values of the writable properties. May be locked while `state` is, but not the reverse.
    settings: Mutex<Settings>,
    state: Mutex<State>,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            cuda: gstcuda::SharedContext::default(),
            cancel: Arc::default(),
            settings: Mutex::new(Settings::new()),
            state: Mutex::default(),
        }
    }
}

/// Properties and negotiation.
impl Session {
    pub fn settings(&self) -> Settings {
        lock(&self.settings).clone()
    }

    pub fn get(&self, property: &Property) -> glib::Value {
        property.get(self.settings(), &lock(&self.state).status)
    }

    pub fn set(&self, property: &Property, value: &glib::Value) {
        property.set(&mut lock(&self.settings), value);
    }

    pub fn negotiated(&self) -> Option<Negotiated> {
        lock(&self.state).negotiated.clone()
    }

    /// Returns the maximum number of frames in flight.
    pub fn depth(&self) -> u32 {
        lock(&self.state).expected_depth() as u32
    }

    /// Returns the allocator of memory that the device accesses directly.
    pub fn pinned(&self) -> Option<pinned::PinnedAllocator> {
        lock(&self.state).pinned.clone()
    }

    /// Returns true, once, if buffers should be allocated again, in memory that suits the device.
    pub fn reallocates(&self) -> bool {
        mem::take(&mut lock(&self.state).reallocate)
    }

    /// Returns the conditions that decide which caps are possible now.
    pub fn rules(&self) -> Rules {
        let settings = self.settings();
        let context = self.cuda.get().is_some();
        let state = lock(&self.state);
        let scale = if matches!(state.current, Current::Passthrough) {
            Scale::new(1.0, 1.0, None)
        } else {
            // Bicubic interpolation replaces a model that does not support the scale.
            let max = state
                .max_scale
                .filter(|_| settings.fallback != Fallback::Bicubic);
            Scale::new(settings.scale, max.unwrap_or(MAX_SCALE), state.native_scale)
        };
        let stopped = matches!(state.current, Current::Stopped);
        Rules {
            requested: settings.scale,
            scale,
            max_scale: state.max_scale,
            fallback: settings.fallback,
            // Before the start, assume that there will be a CUDA context.
            cuda: context || (stopped && settings.may_use_cuda()),
        }
    }

    /// Returns true if frames pass through unchanged; `None` before negotiation.
    pub fn passes_through(&self) -> Option<bool> {
        let state = lock(&self.state);
        let negotiated = state.negotiated.as_ref()?;
        Some(negotiated.passes_through(state.native_scale))
    }

    /// Stores the negotiated formats. If the model does not support the scale, the fallback to
    /// bicubic interpolation replaces it, with a warning.
    ///
    /// # Errors
    /// Returns a reason if the scale is not supported; the previous formats stay in force.
    pub fn negotiate(&self, element: &BaseTransform, negotiated: Negotiated) -> Result<(), String> {
        // From here on, a reloaded model takes over only if it supports the scale.
        let previous = lock(&self.state).negotiated.replace(negotiated);
        if let Err(reason) = self.ensure_scale(element) {
            // The pads keep their caps. If upstream returns to them, they are not negotiated again.
            lock(&self.state).negotiated = previous;
            return Err(reason);
        }
        if self.is_outdated() {
            self.restore_model(element);
        } else {
            self.adapt_model(element);
        }
        let mut state = lock(&self.state);
        state.status.scale = state.scale();
        state.reallocate = false;
        if let Some(model) = state.take() {
            state.describe_at_scale(&model);
            state.current = Current::Ready(model);
        }
        drop(state);
        self.govern(element);
        self.begin_trial(element);
        Ok(())
    }

    fn ensure_scale(&self, element: &BaseTransform) -> Result<(), String> {
        let Some(reason) = lock(&self.state).overscale() else {
            return Ok(());
        };
        let settings = self.settings();
        if settings.fallback != Fallback::Bicubic {
            return Err(reason);
        }
        let model = self
            .load_bicubic(&settings)
            .map_err(|err| format!("{reason}; {err}"))?;
        let state = lock(&self.state);
        if state.overscale().is_none() {
            // A reloaded model, which supports the scale, has taken over.
            return Ok(());
        }
        install(state, Some(model));
        gst::element_warning!(
            element,
            gst::LibraryError::Settings,
            ("{reason}; {BICUBIC}")
        );
        notify_active(element);
        Ok(())
    }

    /// Posts an error that gives the reason to refuse the input `caps`. Posts it once, because
    /// upstream may try again with each buffer.
    pub fn refuse(&self, element: &BaseTransform, caps: &gst::Caps, reason: &str) {
        let previous = lock(&self.state).refused.replace(caps.clone());
        if previous.as_ref() != Some(caps) {
            gst::element_error!(element, gst::StreamError::Format, ("{reason}"), ["{caps}"]);
        }
    }

    /// Lets [`Self::refuse`] post an error for the same caps again.
    pub fn forget_refusal(&self) {
        lock(&self.state).refused = None;
    }

    /// Returns the delay by the frames in flight, without the frame that is returned, and in live
    /// pipelines the time for a frame.
    pub fn latency(&self, element: &BaseTransform) -> gst::ClockTime {
        if element.is_passthrough() {
            return gst::ClockTime::ZERO;
        }
        let state = lock(&self.state);
        let delayed = state.expected_depth().saturating_sub(1);
        let negotiated = state.negotiated.as_ref();
        let waiting = negotiated.map_or(gst::ClockTime::ZERO, |n| n.duration(delayed));
        waiting + gst::ClockTime::try_from(state.processing).unwrap_or(gst::ClockTime::ZERO)
    }

    /// Posts a latency message if the latency has changed.
    pub fn update_latency(&self, element: &BaseTransform) {
        let latency = self.latency(element);
        let previous = mem::replace(&mut lock(&self.state).latency, latency);
        if latency != previous {
            gst::debug!(CAT, obj = element, "Latency is {latency}");
            let message = gst::message::Latency::builder().src(element).build();
            // Fails without a bus.
            let _ = element.post_message(message);
        }
    }
}

/// Start, stop and reload.
impl Session {
    /// Loads the model. Returns when it is loaded.
    pub fn start(&self, element: &BaseTransform) -> Result<(), gst::ErrorMessage> {
        progress(element, gst::ProgressType::Start, "Loading the model");
        self.cuda.stop();
        if let Some(ordinal) = self.settings().cuda_ordinal() {
            self.cuda.start(element.upcast_ref(), ordinal);
        }
        if let Err(err) = self.load_at_start(element) {
            // GStreamer does not stop an element that failed to start.
            self.cuda.stop();
            progress(
                element,
                gst::ProgressType::Error,
                "Loading the model failed",
            );
            return Err(err);
        }
        progress(element, gst::ProgressType::Complete, "Model loaded");
        notify_active(element);
        Ok(())
    }

    fn load_at_start(&self, element: &BaseTransform) -> Result<(), gst::ErrorMessage> {
        loop {
            let settings = self.settings();
            let result = self.load_or_fall_back(element, &settings);
            let mut state = lock(&self.state);
            // Setting `model` in a stopped element does not load it. Load one that was set
            // meanwhile.
            if lock(&self.settings).model != settings.model {
                continue;
            }
            let model = result?;
            state.share = Some(Share::new());
            self.prepare_trial(element, &mut state);
            install(state, model);
            return Ok(());
        }
    }

    /// Drops the model and resets the state.
    pub fn stop(&self, element: &BaseTransform) {
        let mut state = lock(&self.state);
        let generation = state.generation + 1;
        let stopped = State {
            generation,
            ..State::default()
        };
        let mut old = mem::replace(&mut *state, stopped);
        drop(state);
        mem::take(&mut old.auto_cuda).stop();
        drop(old);
        self.cuda.stop();
        notify_active(element);
    }

    /// Starts a reload in a started element. Returns the arguments for [`Self::finish_reload`].
    pub fn begin_reload(&self) -> Option<(u64, Settings)> {
        let mut state = lock(&self.state);
        if matches!(state.current, Current::Stopped) {
            return None;
        }
        state.generation += 1;
        let generation = state.generation;
        drop(state);
        Some((generation, self.settings()))
    }

    /// Loads the model of `settings`, which takes over between two frames. On failure the current
    /// model stays, with a warning. Does nothing after a newer reload or a stop.
    pub fn finish_reload(&self, element: &BaseTransform, generation: u64, settings: &Settings) {
        let device = settings.device.parse().unwrap_or_default();
        let result = self.load_model(element, settings, device);

        let state = lock(&self.state);
        if state.generation != generation {
            return;
        }
        let result = result.and_then(|new| {
            let max = new.upscaler.max_scale();
            let negotiated = state.negotiated.as_ref();
            match negotiated.and_then(|n| overscale(n.scale(), max)) {
                Some(reason) => Err(Error::Scale(reason)),
                None => Ok(new),
            }
        });
        match result {
            Ok(model) => {
                install(state, Some(model));
                notify_active(element);
                self.update_latency(element);
                // The model may support other sizes.
                element.reconfigure_src();
                self.govern_anew(element);
                self.begin_trial(element);
            }
            Err(err) => {
                drop(state);
                gst::element_warning!(
                    element,
                    gst::ResourceError::OpenRead,
                    ("{err}; keeping the current model")
                );
                // A trial that has ended during the reload does not count.
                self.begin_trial(element);
            }
        }
    }
}

/// Use by the streaming thread.
impl Session {
    /// Takes the model in use, its successor if there is one, and the formats.
    pub fn take(&self) -> Result<(LoadedModel, Option<LoadedModel>, Negotiated), gst::FlowError> {
        let mut state = lock(&self.state);
        let negotiated = state.negotiated.clone();
        let negotiated = negotiated.ok_or(gst::FlowError::NotNegotiated)?;
        let model = state.take().ok_or(gst::FlowError::Flushing)?;
        Ok((model, state.next.take(), negotiated))
    }

    /// Returns the model that [`Self::take`] took. A stopped element drops it.
    pub fn put_back(&self, model: LoadedModel) {
        let mut state = lock(&self.state);
        if matches!(state.current, Current::Busy) {
            state.status.stats.device_memory = model.upscaler.device_memory() as u64;
            state.status.stats.denoise = model.upscaler.active_denoise();
            let scale = state.scale();
            state.status.stats.detail = model.upscaler.active_detail(scale);
            let precision = model.upscaler.active_precision(scale);
            state.status.precision = Some(precision.to_string());
            state.current = Current::Ready(model);
        }
    }

    /// Makes the model drop its frames in flight and forget previous frames.
    pub fn reset(&self) {
        let model = lock(&self.state).take();
        if let Some(mut model) = model {
            model.upscaler.flush();
            model.upscaler.reset();
            self.put_back(model);
        }
    }

    /// Publishes that `model` is in use.
    pub fn announce(&self, element: &BaseTransform, model: &LoadedModel) {
        lock(&self.state).describe(Some(model));
        notify_active(element);
        self.update_latency(element);
    }

    /// Returns true if a dial was moved since [`Self::apply_settings`].
    pub fn dials_moved(&self, model: &LoadedModel) -> bool {
        self.settings().dials() != model.dials
    }

    /// Applies the live settings to `model`. An unsupported setting keeps its value, with one
    /// warning.
    pub fn apply_settings(&self, element: &BaseTransform, model: &mut LoadedModel) {
        let mut settings = self.settings();
        if model.upscaler.in_flight() == 0 {
            model.dials = settings.dials();
        }
        if model.bicubic {
            settings.strength = 0.0;
        }
        for (_, err) in settings.apply(&mut model.upscaler) {
            let reason = err.to_string();
            // The settings are not meant for the fallback.
            if !model.bicubic && model.warned.insert(reason.clone()) {
                gst::element_warning!(
                    element,
                    gst::LibraryError::Settings,
                    ("{reason}; keeping the previous value")
                );
            }
        }
    }

    /// Replaces a model that failed on a frame by the fallback, with a warning. Frames in flight
    /// must be upscaled again.
    ///
    /// # Errors
    /// As [`post_failure`], if there is no replacement.
    pub fn recover(
        &self,
        element: &BaseTransform,
        model: &mut LoadedModel,
        err: Error,
    ) -> Result<(), gst::FlowError> {
        let settings = self.settings();
        let (action, replacement) = match settings.fallback {
            // Another model would fail on the same buffer.
            _ if matches!(err, Error::Cancelled | Error::Frame(_)) => {
                return Err(post_failure(element, &err));
            }
            _ if !model.on_cpu()
                && (self.device_failed(element, &err) || settings.fallback == Fallback::Cpu) =>
            {
                let upscaler = self.load(&settings, &model.loaded, Device::Cpu);
                let replace = |upscaler| LoadedModel {
                    requested: model.requested.clone(),
                    ..LoadedModel::new(upscaler, &model.loaded, false)
                };
                (ON_CPU, upscaler.map(replace))
            }
            Fallback::Bicubic if !model.bicubic => (BICUBIC, self.load_bicubic(&settings)),
            _ => return Err(post_failure(element, &err)),
        };
        *model = replacement.map_err(|second| {
            gst::warning!(CAT, obj = element, "The fallback failed, too: {second}");
            post_failure(element, &err)
        })?;
        lock(&self.state).describe(Some(model));
        gst::element_warning!(
            element,
            gst::StreamError::Failed,
            ("{err}; {action} from this frame on")
        );
        notify_active(element);
        self.govern_anew(element);
        self.update_latency(element);
        Ok(())
    }

    /// Counts a completed frame.
    pub fn count_frame(&self, element: &BaseTransform, started: Instant, times: Option<Times>) {
        lock(&self.state).status.stats.count(started, times);
        self.post_statistics(element);
        self.count_load(element, Some(started.elapsed()));
    }

    /// Posts the statistics, if the property `stats-interval` asks for it.
    fn post_statistics(&self, element: &BaseTransform) {
        let interval = Duration::from_millis(self.settings().stats_interval.into());
        let due = lock(&self.state).status.due(interval);
        if let Some(stats) = due {
            let message = gst::message::Element::builder(stats).src(element);
            // Fails without a bus.
            let _ = element.post_message(message.build());
        }
    }

    /// Counts a frame that was dropped because it was late.
    pub fn count_dropped(&self, element: &BaseTransform) {
        lock(&self.state).status.stats.dropped += 1;
        self.post_statistics(element);
        self.count_load(element, None);
    }
}

/// As [`State::install`], and drops the replaced models without the lock.
fn install(mut state: MutexGuard<State>, model: Option<LoadedModel>) {
    let old = state.install(model);
    drop(state);
    drop(old);
}

/// Posts an error message for a frame that failed, unless it was cancelled. Returns the flow error.
pub(super) fn post_failure(element: &BaseTransform, err: &Error) -> gst::FlowError {
    if matches!(err, Error::Cancelled) {
        return gst::FlowError::Flushing;
    }
    gst::element_error!(element, gst::StreamError::Failed, ("{err}"));
    gst::FlowError::Error
}

fn error_message(err: &Error) -> gst::ErrorMessage {
    match err {
        Error::Device(_) | Error::DeviceLost(_) => {
            gst::error_msg!(gst::LibraryError::Init, ("{err}"))
        }
        Error::Scale(_) | Error::Setting(_) => {
            gst::error_msg!(gst::LibraryError::Settings, ("{err}"))
        }
        Error::UnknownModel(_) => gst::error_msg!(gst::ResourceError::NotFound, ("{err}")),
        _ => gst::error_msg!(gst::ResourceError::OpenRead, ("{err}")),
    }
}

fn progress(element: &BaseTransform, kind: gst::ProgressType, text: &str) {
    let message = gst::message::Progress::builder(kind, "load-model", text)
        .src(element)
        .build();
    // Fails without a bus.
    let _ = element.post_message(message);
}

fn notify_active(element: &BaseTransform) {
    element.notify("active-device");
    element.notify("active-model");
    element.notify("active-precision");
}

mod load;
mod overload;
mod trial;

#[cfg(test)]
mod tests;
