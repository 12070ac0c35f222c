// SPDX-License-Identifier: MPL-2.0

//! Loading of models: by name or by choice, with fallbacks.

use tadsr::engine::Setting;

use super::*;

impl Session {
    /// With `model=auto`, chooses a model for the negotiated frames. If that fails, the model in
    /// use stays.
    pub(super) fn adapt_model(&self, element: &BaseTransform) {
        let settings = self.settings();
        let (device, loaded, conditions) = match &*lock(&self.state) {
            State {
                current: Current::Ready(model),
                negotiated: Some(negotiated),
                ..
            } if !model.bicubic && is_auto(&model.requested) && is_auto(&settings.model) => {
                let conditions = Conditions::of(negotiated);
                if conditions.is_none() || conditions == model.conditions {
                    return;
                }
                (
                    model.upscaler.active_device(),
                    model.loaded.clone(),
                    conditions,
                )
            }
            _ => return,
        };
        let result = self
            .choose(element, &settings, device, conditions)
            .and_then(|name| {
                let changes = name != loaded;
                changes
                    .then(|| self.load_named(element, &settings, name, device))
                    .transpose()
            });
        let mut state = lock(&self.state);
        match result {
            Ok(Some(mut model)) => {
                model.conditions = conditions;
                install(state, Some(model));
            }
            Ok(None) => {
                if let Current::Ready(model) = &mut state.current {
                    model.conditions = conditions;
                }
            }
            Err(err) => gst::warning!(CAT, obj = element, "{err}; keeping model {loaded}"),
        }
    }

    /// Loads the requested model again. If that fails, the model in use stays.
    pub(super) fn restore_model(&self, element: &BaseTransform) {
        let settings = self.settings();
        let device = match &lock(&self.state).current {
            Current::Ready(model) => model.upscaler.active_device(),
            _ => return,
        };
        match self.load_model(element, &settings, device) {
            Ok(model) => install(lock(&self.state), Some(model)),
            Err(err) => gst::warning!(CAT, obj = element, "{err}; keeping the model in use"),
        }
    }

    /// Loads the model of `settings`, or its fallback with a warning; `None` is passthrough.
    pub(super) fn load_or_fall_back(
        &self,
        element: &BaseTransform,
        settings: &Settings,
    ) -> Result<Option<LoadedModel>, gst::ErrorMessage> {
        if Scale::new(settings.scale, MAX_SCALE, None).is_none() {
            let reason = invalid_scale(settings.scale);
            return Err(gst::error_msg!(gst::LibraryError::Settings, ("{reason}")));
        }
        let device: Device = settings
            .device
            .parse()
            .map_err(|err| gst::error_msg!(gst::LibraryError::Settings, ("{err}")))?;

        let err = match self.load_model(element, settings, device) {
            Ok(model) => return Ok(Some(model)),
            Err(err) => err,
        };
        let (action, model) = match settings.fallback {
            Fallback::Error | Fallback::Cpu => return Err(error_message(&err)),
            Fallback::Passthrough => (PASSTHROUGH, None),
            Fallback::Bicubic => {
                let model = self.load_bicubic(settings);
                (BICUBIC, Some(model.map_err(|_| error_message(&err))?))
            }
        };
        gst::element_warning!(element, gst::ResourceError::OpenRead, ("{err}; {action}"));
        Ok(model)
    }

    /// Loads the model of `settings` on `device`, or as a fallback on the CPU, with a warning.
    pub(super) fn load_model(
        &self,
        element: &BaseTransform,
        settings: &Settings,
        device: Device,
    ) -> tadsr::Result<LoadedModel> {
        if !is_auto(&settings.model) {
            return self.load_named(element, settings, &settings.model, device);
        }
        let conditions = self.conditions();
        let name = self.choose(element, settings, device, conditions)?;
        let mut model = self.load_named(element, settings, name, device)?;
        model.conditions = conditions;
        Ok(model)
    }

    /// Returns the conditions for a choice from the ladder; `None` before negotiation.
    pub(super) fn conditions(&self) -> Option<Conditions> {
        self.negotiated().as_ref().and_then(Conditions::of)
    }

    /// Returns the model for `conditions` on `device`; the default model if they are not known yet.
    pub(super) fn choose(
        &self,
        element: &BaseTransform,
        settings: &Settings,
        device: Device,
        conditions: Option<Conditions>,
    ) -> tadsr::Result<&'static str> {
        conditions.map_or(Ok(DEFAULT_MODEL), |conditions| {
            conditions.choose(element, |name| self.load(settings, name, device))
        })
    }

    /// Loads the model `name` for the value of the property `model`, as [`Self::load_model`].
    pub(super) fn load_named(
        &self,
        element: &BaseTransform,
        settings: &Settings,
        name: &str,
        device: Device,
    ) -> tadsr::Result<LoadedModel> {
        let result = self.load(settings, name, device);
        let upscaler = match result {
            Err(err) if settings.fallback == Fallback::Cpu && matches!(device, Device::Cuda(_)) => {
                let upscaler = self.load(settings, name, Device::Cpu)?;
                gst::element_warning!(element, gst::ResourceError::OpenRead, ("{err}; {ON_CPU}"));
                upscaler
            }
            result => result?,
        };
        let mut model = LoadedModel::new(upscaler, name, false);
        model.requested.clone_from(&settings.model);
        Ok(model)
    }

    /// Loads the fallback to bicubic interpolation, which is the default model without its
    /// residual.
    pub(super) fn load_bicubic(&self, settings: &Settings) -> tadsr::Result<LoadedModel> {
        let upscaler = self.load(settings, "", Device::Cpu)?;
        Ok(LoadedModel::new(upscaler, "", true))
    }

    pub(super) fn load(
        &self,
        settings: &Settings,
        model: &str,
        device: Device,
    ) -> tadsr::Result<Upscaler> {
        let upscaler = match (device, self.cuda.get()) {
            (Device::Cuda(ordinal), Some(context)) => {
                Upscaler::load_in(model, context.external(ordinal)?)?
            }
            _ => Upscaler::load(model, device)?,
        };
        configure(upscaler, settings, &self.cancel)
    }
}

/// Applies `settings`. `cancel` aborts the frame in progress.
pub(super) fn configure(
    mut upscaler: Upscaler,
    settings: &Settings,
    cancel: &Arc<AtomicBool>,
) -> tadsr::Result<Upscaler> {
    upscaler.set_threads(settings.threads as usize)?;
    upscaler.set_queue_depth(settings.queue_depth as usize);
    for (setting, err) in settings.apply(&mut upscaler) {
        // A setting that the model lacks, such as memory, leads to a warning with the first frame.
        if upscaler.capabilities().has(setting) && setting != Setting::Temporal {
            return Err(err);
        }
    }
    let cancel = cancel.clone();
    upscaler.set_observer(Some(Box::new(move |_| {
        if cancel.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })));
    // A model of the element's choice fits the negotiated scale.
    let reason = overscale(settings.scale, upscaler.max_scale());
    match reason.filter(|_| !is_auto(&settings.model)) {
        Some(reason) => Err(Error::Scale(reason)),
        None => Ok(upscaler),
    }
}
