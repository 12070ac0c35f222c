// SPDX-License-Identifier: MPL-2.0

//! The choice of a model for `model=auto`: the largest that this machine runs in real time.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use gst::prelude::*;
use gst_base::BaseTransform;
use tadsr::{
    Upscaler,
    frame::FrameInfo,
    ladder::{self, Choice},
};

use super::{CAT, caps::Negotiated};

/// Started elements of this process. They share the processor.
static ELEMENTS: AtomicU32 = AtomicU32::new(0);

/// Counts a started element as long as it lives.
pub(super) struct Share(());

impl Share {
    pub fn new() -> Self {
        ELEMENTS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        ELEMENTS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns true if a value of the property `model` stands for a choice.
pub(super) fn is_auto(model: &str) -> bool {
    model.is_empty() || model == ladder::AUTO
}

/// Frames before and after, and the time between two of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Conditions {
    from: FrameInfo,
    to: FrameInfo,
    interval: Duration,
}

impl Conditions {
    /// Returns `None` if frames pass through unchanged.
    pub fn of(negotiated: &Negotiated) -> Option<Self> {
        let interval = match negotiated.duration(1) {
            gst::ClockTime::ZERO => ladder::DEFAULT_INTERVAL,
            duration => duration.into(),
        };
        (!negotiated.passes_through(None)).then(|| Self {
            from: negotiated.in_frame,
            to: negotiated.out_frame(),
            interval,
        })
    }

    /// Returns the time between two frames.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Measures models that `load` returns, and chooses one. Posts an element message
    /// `tadsrupscale-model` with the choice and its reason.
    pub fn choose(
        &self,
        element: &BaseTransform,
        load: impl Fn(&str) -> tadsr::Result<Upscaler>,
    ) -> tadsr::Result<&'static str> {
        let elements = ELEMENTS.load(Ordering::Relaxed).max(1);
        let interval = self.interval / elements;
        let time = |group| {
            let mut upscaler = load(group)?;
            upscaler.set_queue_depth(1);
            ladder::frame_time(&mut upscaler, self.from, self.to)
        };
        let choice = ladder::choose(&self.from, &self.to, interval, time)?;
        let reason = self.reason(&choice, elements);
        gst::info!(CAT, obj = element, "Model {}: {reason}", choice.model);
        let structure = gst::Structure::builder("tadsrupscale-model")
            .field("model", choice.model)
            .field("reason", reason)
            .build();
        let message = gst::message::Element::builder(structure).src(element);
        // Fails without a bus.
        let _ = element.post_message(message.build());
        Ok(choice.model)
    }

    fn reason(&self, choice: &Choice, elements: u32) -> String {
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        let times: Vec<_> = choice
            .times
            .iter()
            .map(|(model, time)| format!("{model} takes {}", ms(*time)))
            .collect();
        let (from, to) = (self.from, self.to);
        format!(
            "{}x{} to {}x{} every {} in {elements} element(s): {}",
            from.width,
            from.height,
            to.width,
            to.height,
            ms(self.interval),
            times.join(", ")
        )
    }
}
