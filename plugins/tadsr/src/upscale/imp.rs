// SPDX-License-Identifier: MPL-2.0

//! The element: implementations of its class and parent classes.

use std::sync::{LazyLock, atomic::Ordering};

use gst::{glib, prelude::*, subclass::prelude::*};
use gst_base::{
    prelude::*,
    subclass::{
        base_transform::{GenerateOutputSuccess, InputBuffer, PrepareOutputBufferSuccess},
        prelude::*,
    },
};
use gst_video::{VideoInfo, subclass::prelude::*};

use super::{
    CAT,
    caps::{self, Negotiated},
    meta::{self, Treatment},
    pinned,
    queue::{self, Queue, QueuedFrame, Streaming},
    session::Session,
    settings::{self, Change, PROPERTIES},
};

#[derive(Default)]
pub struct TadsrUpscale {
    /// Settings and model.
    pub(super) session: Session,
    /// Frames in flight and the events between them.
    queue: Queue,
}

#[glib::object_subclass]
impl ObjectSubclass for TadsrUpscale {
    const NAME: &'static str = "GstTadsrUpscale";
    type Type = super::TadsrUpscale;
    type ParentType = gst_video::VideoFilter;
    type Interfaces = (gst::Preset,);
}

impl ObjectImpl for TadsrUpscale {
    fn constructed(&self) {
        self.parent_constructed();
        // Ask upstream for the input size that suits the scale, even if it could provide the output
        // size.
        self.obj().set_prefer_passthrough(false);
        // Gap frames are upscaled like others and keep their flag.
        self.obj().set_gap_aware(true);
    }

    fn properties() -> &'static [glib::ParamSpec] {
        static SPECS: LazyLock<Vec<glib::ParamSpec>> =
            LazyLock::new(|| PROPERTIES.iter().map(|p| p.spec.clone()).collect());
        &SPECS
    }

    fn set_property(&self, id: usize, value: &glib::Value, _pspec: &glib::ParamSpec) {
        let property = settings::property(id);
        self.session.set(property, value);
        match property.change {
            Change::Deferred | Change::EachFrame | Change::Live(..) => {}
            Change::Renegotiate => self.renegotiate(),
            Change::Reload => self.reload(),
        }
    }

    fn property(&self, id: usize, _pspec: &glib::ParamSpec) -> glib::Value {
        self.session.get(settings::property(id))
    }
}

impl GstObjectImpl for TadsrUpscale {}

impl PresetImpl for TadsrUpscale {}

impl ElementImpl for TadsrUpscale {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "Super-resolution upscaler",
                "Filter/Converter/Video/Scaler",
                "Upscales video with a super-resolution network",
                "The TADSR developers",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
            let caps = caps::template();
            let template = |name, direction| {
                gst::PadTemplate::new(name, direction, gst::PadPresence::Always, &caps)
                    .expect("caps are raw video")
            };
            vec![
                template("sink", gst::PadDirection::Sink),
                template("src", gst::PadDirection::Src),
            ]
        });
        &TEMPLATES
    }

    fn set_context(&self, context: &gst::Context) {
        if let Some(ordinal) = self.session.settings().cuda_ordinal() {
            let element = self.obj();
            self.session
                .cuda
                .offer(element.upcast_ref(), context, ordinal);
        }
        self.parent_set_context(context);
    }

    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        // Stopping waits for the streaming thread, and a diffusion model may take minutes for a
        // frame.
        let stopping = transition == gst::StateChange::PausedToReady;
        if stopping {
            self.session.cancel.store(true, Ordering::Relaxed);
        }
        let result = self.parent_change_state(transition);
        if stopping {
            self.session.cancel.store(false, Ordering::Relaxed);
        }
        result
    }
}

impl BaseTransformImpl for TadsrUpscale {
    const MODE: gst_base::subclass::BaseTransformMode =
        gst_base::subclass::BaseTransformMode::NeverInPlace;
    const PASSTHROUGH_ON_SAME_CAPS: bool = false;
    const TRANSFORM_IP_ON_PASSTHROUGH: bool = false;

    fn start(&self) -> Result<(), gst::ErrorMessage> {
        self.session.start(self.obj().upcast_ref())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        // In this order, because the device may read the buffers until the model is dropped.
        self.session.stop(self.obj().upcast_ref());
        self.queue.clear();
        Ok(())
    }

    fn transform_caps(
        &self,
        direction: gst::PadDirection,
        caps: &gst::Caps,
        filter: Option<&gst::Caps>,
    ) -> Option<gst::Caps> {
        self.session.join_cuda(self.obj().upcast_ref());
        let result = self.session.rules().transform(direction, caps);
        gst::debug!(
            CAT,
            imp = self,
            "Transformed {direction:?} {caps} to {result}"
        );
        Some(match filter {
            Some(filter) => filter.intersect_with_mode(&result, gst::CapsIntersectMode::First),
            None => result,
        })
    }

    fn fixate_caps(
        &self,
        direction: gst::PadDirection,
        caps: &gst::Caps,
        mut othercaps: gst::Caps,
    ) -> gst::Caps {
        othercaps.truncate();
        if direction == gst::PadDirection::Sink {
            self.session.rules().fixate(caps, &mut othercaps);
        }
        self.parent_fixate_caps(direction, caps, othercaps)
    }

    fn accept_caps(&self, direction: gst::PadDirection, caps: &gst::Caps) -> bool {
        // `sink_event` refuses caps with a reason, which this function cannot give.
        let refused_later = direction == gst::PadDirection::Sink && self.refusal(caps).is_some();
        refused_later || self.parent_accept_caps(direction, caps)
    }

    fn sink_event(&self, event: gst::Event) -> bool {
        match event.type_() {
            // Arrives while the streaming thread works on a frame.
            gst::EventType::FlushStart => self.session.cancel.store(true, Ordering::Relaxed),
            gst::EventType::FlushStop => {
                self.streaming().discard();
                self.session.cancel.store(false, Ordering::Relaxed);
            }
            _ => {}
        }
        if event.is_serialized() && !self.queue.is_empty() {
            if queue::can_wait(event.type_()) {
                self.queue.push_event(event);
                return true;
            }
            // If the frames cannot be pushed, the event cannot either.
            let _ = self.streaming().drain();
        }
        if event.type_() == gst::EventType::Segment {
            // The next frame may come from another position of the stream.
            self.session.reset();
        }
        if let gst::EventView::Caps(caps) = event.view() {
            let caps = caps.caps_owned();
            if let Some(reason) = self.refusal(&caps) {
                self.session.refuse(self.obj().upcast_ref(), &caps, &reason);
                return false;
            }
            self.session.forget_refusal();
        }
        self.parent_sink_event(event)
    }

    fn query(&self, direction: gst::PadDirection, query: &mut gst::QueryRef) -> bool {
        let draining = [gst::QueryType::Drain, gst::QueryType::Allocation];
        if direction == gst::PadDirection::Sink && draining.contains(&query.type_()) {
            // The next frame returns a failure.
            let _ = self.streaming().drain();
        }
        if query.type_() == gst::QueryType::Context
            && let Some(context) = self.session.cuda.get()
            && context.answer(self.obj().upcast_ref(), query)
        {
            return true;
        }
        if !BaseTransformImplExt::parent_query(self, direction, query) {
            return false;
        }
        if direction == gst::PadDirection::Src
            && let gst::QueryViewMut::Latency(query) = query.view_mut()
        {
            let own = self.session.latency(self.obj().upcast_ref());
            let (live, min, max) = query.result();
            query.set(live, min + own, max.map(|max| max + own));
        }
        true
    }

    fn propose_allocation(
        &self,
        decide_query: Option<&gst::query::Allocation>,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        // In passthrough, the answer comes from downstream.
        if decide_query.is_none() {
            return self.parent_propose_allocation(decide_query, query);
        }
        if let Some((pool, size)) = self.cuda_pool(query) {
            query.add_allocation_pool(Some(&pool), size, 0, 0);
        } else if !query.get().0.is_some_and(caps::in_cuda_memory)
            && let Some(allocator) = self.session.pinned()
        {
            pinned::propose(query, &allocator);
        }
        self.parent_propose_allocation(decide_query, query)?;
        let depth = self.session.depth();
        queue::reserve_buffers(query, |min| min.max(depth + 1));
        Ok(())
    }

    fn decide_allocation(
        &self,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        if query.get().0.is_some_and(caps::in_cuda_memory) {
            // Output buffers must be in the CUDA context of this element, so replace the pool of
            // downstream.
            let (pool, size) = self
                .cuda_pool(query)
                .ok_or_else(|| gst::loggable_error!(CAT, "CUDA memory cannot be allocated"))?;
            match query.allocation_pools().next() {
                Some((_, _, min, max)) => {
                    query.set_nth_allocation_pool(0, Some(&pool), size, min, max);
                }
                None => query.add_allocation_pool(Some(&pool), size, 0, 0),
            }
        } else if let Some(allocator) = self.session.pinned() {
            pinned::decide(query, &allocator);
        }
        let depth = self.session.depth();
        queue::reserve_buffers(query, |min| min + depth.saturating_sub(1));
        self.parent_decide_allocation(query)
    }

    fn src_event(&self, mut event: gst::Event) -> bool {
        if event.type_() == gst::EventType::Navigation
            && let Some(Negotiated { input, output, .. }) = self.session.negotiated()
        {
            meta::scale_pointer(event.make_mut(), &input, &output);
        }
        self.parent_src_event(event)
    }

    fn transform_meta<'a>(
        &self,
        outbuf: &mut gst::BufferRef,
        meta: gst::MetaRef<'a, gst::Meta>,
        inbuf: &'a gst::BufferRef,
    ) -> bool {
        match Treatment::of(&meta) {
            Treatment::Copy => true,
            Treatment::Drop => false,
            Treatment::Scale => {
                if let Some(Negotiated { input, output, .. }) = self.session.negotiated()
                    && let Err(err) = meta::copy_scaled(outbuf, &meta, &input, &output)
                {
                    gst::debug!(CAT, imp = self, "Dropping a {}: {err}", meta.api());
                }
                false
            }
            Treatment::Default => self.parent_transform_meta(outbuf, meta, inbuf),
        }
    }

    fn before_transform(&self, inbuf: &gst::BufferRef) {
        let segment = self.obj().segment();
        let time = segment
            .downcast_ref::<gst::ClockTime>()
            .and_then(|s| s.to_stream_time(inbuf.pts()?));
        if let Some(time) = time
            && let Err(err) = self.obj().sync_values(time)
        {
            gst::warning!(
                CAT,
                imp = self,
                "Controlled properties keep their values: {err}"
            );
        }
    }

    fn submit_input_buffer(
        &self,
        is_discont: bool,
        inbuf: gst::Buffer,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        // Passthrough can be switched here, between two frames.
        if let Some(passthrough) = self.session.passes_through()
            && passthrough != self.obj().is_passthrough()
        {
            self.streaming().drain()?;
            self.obj().set_passthrough(passthrough);
            self.obj().reconfigure_src();
        }
        // Drain before a discontinuity, because the base class marks the next output frame. It does
        // not do so exactly if it drops the frame below: then the mark may be on an earlier one.
        // `is_discont` is unsuitable here: it stays set until a frame is returned.
        if inbuf.flags().contains(gst::BufferFlags::DISCONT) {
            self.streaming().drain_and_reset()?;
        }
        if self.session.reallocates() {
            self.obj().reconfigure_src();
            self.obj().reconfigure_sink();
        }
        let src_flags = self.obj().src_pad().pad_flags();
        if src_flags.contains(gst::PadFlags::NEED_RECONFIGURE) && self.refuse_current_caps() {
            return Err(gst::FlowError::NotNegotiated);
        }
        let result = self.parent_submit_input_buffer(is_discont, inbuf);
        if result == Ok(gst_base::BASE_TRANSFORM_FLOW_DROPPED) {
            self.session.count_dropped(self.obj().upcast_ref());
        }
        result
    }

    fn generate_output(&self) -> Result<GenerateOutputSuccess, gst::FlowError> {
        if self.obj().is_passthrough() {
            return self.parent_generate_output();
        }
        let Some(input) = self.take_queued_buffer() else {
            // The base class calls again after it has pushed a frame.
            self.streaming().push_events();
            return Ok(GenerateOutputSuccess::NoOutput);
        };
        let prepared = self.parent_prepare_output_buffer(InputBuffer::Readable(&input))?;
        let PrepareOutputBufferSuccess::Buffer(output) = prepared else {
            // Only for elements that transform in place.
            return Err(gst::FlowError::Error);
        };
        let oldest = self.streaming().process(QueuedFrame::new(input, output))?;
        Ok(oldest.map_or(
            GenerateOutputSuccess::NoOutput,
            GenerateOutputSuccess::Buffer,
        ))
    }
}

impl VideoFilterImpl for TadsrUpscale {
    fn set_info(
        &self,
        incaps: &gst::Caps,
        in_info: &VideoInfo,
        outcaps: &gst::Caps,
        out_info: &VideoInfo,
    ) -> Result<(), gst::LoggableError> {
        gst::info!(CAT, imp = self, "Negotiated {incaps} to {outcaps}");
        let negotiated = Negotiated::new(incaps, in_info, outcaps, out_info)
            .ok_or_else(|| gst::loggable_error!(CAT, "unsupported format {}", in_info.format()))?;
        // Downstream still has the previous caps. Frames that cannot be pushed are lost.
        if self.streaming().drain_and_reset().is_err() {
            self.streaming().discard();
        }
        let element = self.obj();
        if let Err(reason) = self.session.negotiate(element.upcast_ref(), negotiated) {
            self.session.refuse(element.upcast_ref(), incaps, &reason);
            return Err(gst::loggable_error!(CAT, "{reason}"));
        }
        element.set_passthrough(self.session.passes_through() == Some(true));
        for property in ["active-model", "active-precision", "active-scale"] {
            element.notify(property);
        }
        self.session.update_latency(element.upcast_ref());
        Ok(())
    }
}

impl TadsrUpscale {
    /// Operations of the streaming thread.
    fn streaming(&self) -> Streaming<'_> {
        Streaming {
            element: self.obj().clone().upcast(),
            session: &self.session,
            queue: &self.queue,
        }
    }

    /// Renegotiates both pads after a property has changed the possible caps.
    fn renegotiate(&self) {
        self.session.forget_refusal();
        // Without this error, upstream only learns that it cannot negotiate.
        if self.session.rules().scale.is_none() {
            self.refuse_current_caps();
        }
        self.obj().reconfigure_sink();
        self.obj().reconfigure_src();
    }

    /// Loads another model in a thread of its own.
    fn reload(&self) {
        let Some((generation, settings)) = self.session.begin_reload() else {
            return;
        };
        self.obj().call_async(move |element| {
            let session = &element.imp().session;
            session.finish_reload(element.upcast_ref(), generation, &settings);
        });
    }

    /// Returns a reason why the fixed input `caps` cannot be upscaled here and to the caps
    /// downstream.
    fn refusal(&self, caps: &gst::Caps) -> Option<String> {
        let rules = self.session.rules();
        rules.refusal(caps).or_else(|| {
            let src_pad = self.obj().src_pad().clone();
            rules.size_refusal(caps, &src_pad.peer()?.query_caps(None))
        })
    }

    /// Posts an error if the current input cannot be upscaled any more. Returns true in that case.
    fn refuse_current_caps(&self) -> bool {
        let Some(caps) = self.obj().sink_pad().current_caps() else {
            return false;
        };
        let refusal = self.refusal(&caps);
        if let Some(reason) = &refusal {
            self.session.refuse(self.obj().upcast_ref(), &caps, reason);
        }
        refusal.is_some()
    }

    /// Returns a pool and the size of its buffers if `query` is for frames in CUDA memory.
    fn cuda_pool(&self, query: &gst::query::Allocation) -> Option<(gst::BufferPool, u32)> {
        let caps = query.get_owned().0?;
        if !caps::in_cuda_memory(&caps) {
            return None;
        }
        self.session.cuda.get()?.pool(&caps)
    }
}
