// SPDX-License-Identifier: MPL-2.0

//! Frames in flight, in order with the events between them.

use std::{collections::VecDeque, sync::Mutex, time::Instant};

use gst::prelude::*;
use gst_base::{BaseTransform, prelude::*};
use tadsr::{Error, engine::Times};

use super::{
    caps::Negotiated,
    lock, pinned, planes,
    session::{LoadedModel, Session, post_failure},
};

/// A frame in flight.
pub(super) struct QueuedFrame {
    input: gst::Buffer,
    output: gst::Buffer,
    started: Instant,
}

impl QueuedFrame {
    /// Creates a frame to be upscaled from `input` into `output`.
    pub fn new(input: gst::Buffer, output: gst::Buffer) -> Self {
        Self {
            input,
            output,
            started: Instant::now(),
        }
    }
}

enum Item {
    Frame(QueuedFrame),
    /// Pushed after the frames before it.
    Event(gst::Event),
}

/// Frames in flight and events between them, oldest first. Only the streaming thread changes it, or
/// a thread that has stopped streaming.
#[derive(Default)]
pub(super) struct Queue(Mutex<VecDeque<Item>>);

impl Queue {
    pub fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    pub fn clear(&self) {
        lock(&self.0).clear();
    }

    /// Queues an event that [`can_wait`].
    pub fn push_event(&self, event: gst::Event) {
        lock(&self.0).push_back(Item::Event(event));
    }

    fn push_frame(&self, frame: QueuedFrame) {
        lock(&self.0).push_back(Item::Frame(frame));
    }

    fn pop(&self) -> Option<Item> {
        lock(&self.0).pop_front()
    }

    /// Takes the first item if it is an event.
    fn pop_event(&self) -> Option<gst::Event> {
        let mut queue = lock(&self.0);
        let Item::Event(event) = queue.front()? else {
            return None;
        };
        let event = event.clone();
        queue.pop_front();
        Some(event)
    }

    /// Returns the number of frames.
    fn frames(&self) -> usize {
        let queue = lock(&self.0);
        queue.iter().filter(|i| matches!(i, Item::Frame(_))).count()
    }
}

/// Returns true if a serialized event of this type can be queued behind the frames in flight.
/// Before other events, the queue is drained.
pub(super) fn can_wait(kind: gst::EventType) -> bool {
    matches!(
        kind,
        gst::EventType::Tag
            | gst::EventType::Toc
            | gst::EventType::Protection
            | gst::EventType::SinkMessage
            | gst::EventType::CustomDownstream
            | gst::EventType::CustomDownstreamSticky
            | gst::EventType::CustomBoth
    )
}

/// Replaces the minimum of each pool in `query` by `new_min` of it, because frames in flight hold
/// buffers.
pub(super) fn reserve_buffers(query: &mut gst::query::Allocation, new_min: impl Fn(u32) -> u32) {
    let pools: Vec<_> = query.allocation_pools().collect();
    for (index, (pool, size, min, max)) in pools.into_iter().enumerate() {
        let min = new_min(min);
        // 0 is unlimited.
        let max = if max == 0 { 0 } else { max.max(min) };
        query.set_nth_allocation_pool(index as u32, pool.as_ref(), size, min, max);
    }
}

/// Operations of the streaming thread.
pub(super) struct Streaming<'a> {
    pub element: BaseTransform,
    pub session: &'a Session,
    pub queue: &'a Queue,
}

impl Streaming<'_> {
    /// Starts a frame. Returns the oldest one when the maximum number of frames is in flight.
    pub fn process(&self, frame: QueuedFrame) -> Result<Option<gst::Buffer>, gst::FlowError> {
        self.run(|guard| guard.process(frame))
    }

    /// Completes all frames in flight, and pushes them and the events between them.
    pub fn drain(&self) -> Result<(), gst::FlowError> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let last = self.run(|guard| guard.complete(0))?;
        self.push(last)?;
        self.push_events();
        Ok(())
    }

    /// As [`Self::drain`], before a frame that does not continue the previous ones.
    pub fn drain_and_reset(&self) -> Result<(), gst::FlowError> {
        let result = self.drain();
        self.session.reset();
        result
    }

    /// Drops all frames in flight and the events between them.
    pub fn discard(&self) {
        // The device may still read the buffers, so reset it before they are released.
        self.session.reset();
        self.queue.clear();
    }

    /// Pushes the events before the next frame.
    pub fn push_events(&self) {
        while let Some(event) = self.queue.pop_event() {
            self.push_event(event);
        }
    }

    /// Runs `work` with the model, without a lock. If it fails, drops all frames in flight.
    fn run(
        &self,
        work: impl FnOnce(&mut ModelGuard) -> Result<Option<gst::Buffer>, gst::FlowError>,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let (model, next, negotiated) = self.session.take()?;
        let mut guard = ModelGuard {
            streaming: self,
            model,
            negotiated,
        };
        let result = guard.swap(next).and_then(|()| work(&mut guard));
        if result.is_err() {
            guard.model.upscaler.flush();
            self.queue.clear();
        }
        self.session.put_back(guard.model);
        result
    }

    fn push(&self, buffer: Option<gst::Buffer>) -> Result<(), gst::FlowError> {
        match buffer {
            Some(buffer) => self.element.src_pad().push(buffer).map(drop),
            None => Ok(()),
        }
    }

    fn push_event(&self, event: gst::Event) {
        // The event was accepted when it was queued, so the result cannot be returned.
        let _ = self.element.src_pad().push_event(event);
    }
}

/// The model between [`Session::take`] and [`Session::put_back`], with the formats.
struct ModelGuard<'a> {
    streaming: &'a Streaming<'a>,
    model: LoadedModel,
    negotiated: Negotiated,
}

impl ModelGuard<'_> {
    /// Replaces the model by `next`, if there is one, after the frames in flight.
    fn swap(&mut self, next: Option<LoadedModel>) -> Result<(), gst::FlowError> {
        let Some(next) = next else {
            return Ok(());
        };
        let last = self.complete(0);
        self.model = next;
        // Again, because the old model may have been replaced by its fallback meanwhile.
        self.streaming
            .session
            .announce(&self.streaming.element, &self.model);
        self.streaming.push(last?)?;
        self.streaming.push_events();
        Ok(())
    }

    fn process(&mut self, frame: QueuedFrame) -> Result<Option<gst::Buffer>, gst::FlowError> {
        // The frames in flight keep their weights.
        if self.model.upscaler.in_flight() > 0 && self.streaming.session.dials_moved(&self.model) {
            let last = self.complete(0)?;
            self.streaming.push(last)?;
        }
        self.submit_or_recover(&frame.input)?;
        self.streaming.queue.push_frame(frame);
        self.complete(self.model.upscaler.queue_depth() - 1)
    }

    /// Completes frames until at most `max` are in flight. Pushes all but the last, and returns
    /// that.
    fn complete(&mut self, max: usize) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let mut last = None;
        // A fallback may reduce the queue depth.
        while self.streaming.queue.frames() > max.min(self.model.upscaler.queue_depth() - 1) {
            self.streaming.push(last.take())?;
            match self.streaming.queue.pop() {
                Some(Item::Frame(frame)) => last = Some(self.complete_frame(frame)?),
                Some(Item::Event(event)) => self.streaming.push_event(event),
                None => break,
            }
        }
        Ok(last)
    }

    fn complete_frame(&mut self, mut frame: QueuedFrame) -> Result<gst::Buffer, gst::FlowError> {
        let result = self.receive_or_recover(&mut frame);
        if result.is_err() {
            // The device may still read the buffer, so flush it before the buffer is released.
            self.model.upscaler.flush();
        }
        self.streaming
            .session
            .count_frame(&self.streaming.element, frame.started, result?);
        Ok(frame.output)
    }

    /// As [`Self::submit`], and replaces a model that fails. Without a replacement, the frames in
    /// flight are still pushed.
    fn submit_or_recover(&mut self, input: &gst::Buffer) -> Result<(), gst::FlowError> {
        let Err(err) = self.submit(input) else {
            return Ok(());
        };
        let recovered = self.recover(err);
        if recovered == Err(gst::FlowError::Error) && self.model.upscaler.in_flight() > 0 {
            let last = self.complete(0)?;
            self.streaming.push(last)?;
        }
        recovered
    }

    /// As [`Self::receive`], and tries again with the replacement of a model that fails.
    fn receive_or_recover(
        &mut self,
        frame: &mut QueuedFrame,
    ) -> Result<Option<Times>, gst::FlowError> {
        self.receive(frame).or_else(|err| {
            if matches!(err, Error::DeviceLost(_)) && !self.negotiated.out_cuda {
                pinned::abandon(&mut frame.output);
            }
            self.recover(err)?;
            self.receive(frame)
                .map_err(|err| post_failure(&self.streaming.element, &err))
        })
    }

    fn recover(&mut self, err: Error) -> Result<(), gst::FlowError> {
        let Streaming {
            element, session, ..
        } = self.streaming;
        session.recover(element, &mut self.model, err)
    }

    fn apply_settings(&mut self) {
        let Streaming {
            element, session, ..
        } = self.streaming;
        session.apply_settings(element, &mut self.model);
    }

    /// Sends a frame to a CUDA device. Does nothing on the CPU.
    ///
    /// # Errors
    /// As [`Self::receive`].
    fn submit(&mut self, input: &gst::Buffer) -> tadsr::Result<()> {
        if !self.model.upscaler.is_pipelined() {
            return Ok(());
        }
        self.apply_settings();
        let (negotiated, upscaler) = (&self.negotiated, &mut self.model.upscaler);
        upscaler.set_resident(negotiated.out_cuda);
        let (from, to) = (negotiated.in_frame, negotiated.out_frame());
        if negotiated.in_cuda
            && let Some(context) = self.streaming.session.cuda.get()
            && let Some(mapped) = context
                .read(input, &negotiated.input, &from)
                .map_err(Error::Frame)?
        {
            // SAFETY: the planes are in the memory of the context that the model was loaded in. The
            // queue holds the buffer until the frame is received or flushed.
            return unsafe { upscaler.submit_device(from, mapped.planes(), to) };
        }
        planes::with_input(input, &negotiated.input, from, |src| {
            upscaler.submit(src, to)
        })
    }

    /// Receives the oldest frame from a CUDA device, or upscales it on the CPU.
    ///
    /// # Errors
    /// Returns [`Error::Frame`] for an invalid buffer, [`Error::Cancelled`] after a flush or stop,
    /// and other errors if the model fails.
    fn receive(&mut self, frame: &mut QueuedFrame) -> tadsr::Result<Option<Times>> {
        if self.model.upscaler.is_pipelined() {
            self.receive_from_device(&mut frame.output).map(Some)
        } else {
            self.upscale(frame).map(|()| None)
        }
    }

    fn receive_from_device(&mut self, output: &mut gst::Buffer) -> tadsr::Result<Times> {
        let (negotiated, upscaler) = (&self.negotiated, &mut self.model.upscaler);
        let (output, to) = (output.make_mut(), negotiated.out_frame());
        if negotiated.out_cuda
            && let Some(context) = self.streaming.session.cuda.get()
            && let Some(mapped) = context
                .write(output, &negotiated.output, &to)
                .map_err(Error::Frame)?
        {
            // SAFETY: the planes are in the memory of the context that the model was loaded in, and
            // `mapped` borrows the buffer exclusively.
            return unsafe { upscaler.receive_device(to, mapped.planes()) };
        }
        planes::with_output(output, &negotiated.output, to, |dst| upscaler.receive(dst))
    }

    fn upscale(&mut self, frame: &mut QueuedFrame) -> tadsr::Result<()> {
        self.apply_settings();
        let (negotiated, upscaler) = (&self.negotiated, &mut self.model.upscaler);
        let (from, to) = (negotiated.in_frame, negotiated.out_frame());
        let output = frame.output.make_mut();
        planes::with_input(&frame.input, &negotiated.input, from, |src| {
            planes::with_output(output, &negotiated.output, to, |dst| {
                upscaler.upscale_into(src, dst)
            })
        })
    }
}
