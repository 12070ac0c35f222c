//! Encoding of the frames of a segment.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use gst::{ClockTime, prelude::*};
use gst_app::{AppSink, AppSrc};
use tempfile::NamedTempFile;

use super::file::SegmentWriter;
use crate::{
    Error, Result,
    video::{
        Container, Options, StreamInfo, TimedFrame,
        bus::{Bus, Running, make},
        encoder,
        writer::{BEHIND, POLL, STALLED, Watch},
    },
};

/// Encoder of frames to a file of packets.
pub(super) struct SegmentEncoder<'a> {
    pipeline: Running,
    source: AppSrc,
    sink: AppSink,
    bus: Bus,
    stream: StreamInfo,
    options: &'a Options,
    /// Path of the output, for errors.
    output: &'a Path,
    file: SegmentWriter,
    /// Number of packets in the file.
    written: Arc<AtomicU64>,
}

impl<'a> SegmentEncoder<'a> {
    /// Starts an encoder of frames of `stream` to `file`, for the container of `output`.
    ///
    /// # Errors
    /// As [`Writer::create`](crate::video::Writer::create).
    pub fn start(
        file: SegmentWriter,
        output: &'a Path,
        stream: &StreamInfo,
        options: &'a Options,
    ) -> Result<Self> {
        let failed = |reason| Error::video(output, reason);
        let (pipeline, source, sink) = build(output, stream, options).map_err(failed)?;
        let encoder = Self {
            bus: Bus::of(&pipeline)?,
            pipeline: Running(pipeline),
            source,
            sink,
            stream: stream.clone(),
            options,
            output,
            file,
            written: Arc::default(),
        };
        // Failures are reported on the bus.
        let _ = encoder.pipeline.0.set_state(gst::State::Playing);
        Ok(encoder)
    }

    /// Encodes `frame`. Waits while the encoder is busy with earlier frames.
    ///
    /// # Errors
    /// As [`Writer::push`](crate::video::Writer::push). [`Error::Io`] if the file cannot be
    /// written.
    pub fn push(&mut self, frame: &TimedFrame) -> Result<()> {
        let buffer = self.stream.timed(frame).map_err(|e| self.failed(e))?;
        let mut watch = Watch::new(&self.written);
        while self.source.current_level_buffers() >= BEHIND {
            self.receive(POLL)?;
            self.options.check_stop()?;
            watch.check(STALLED).map_err(|e| self.failed(e))?;
        }
        self.receive(ClockTime::ZERO)?;
        if self.source.push_buffer(buffer).is_err() {
            self.receive(ClockTime::from_seconds(1))?;
            return Err(self.failed("the encoder accepts no more frames".into()));
        }
        let end = frame.pts + frame.duration.unwrap_or_default();
        self.file.content.add(frame.pts, end);
        Ok(())
    }

    /// Encodes the remaining frames and completes the file, as [`SegmentWriter::finish`].
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(mut self, is_whole: bool) -> Result<Option<NamedTempFile>> {
        // Failures are reported on the bus.
        let _ = self.source.end_of_stream();
        let mut watch = Watch::new(&self.written);
        while !self.sink.is_eos() {
            self.receive(10 * POLL)?;
            watch.check(STALLED).map_err(|e| self.failed(e))?;
        }
        drop(self.pipeline);
        self.file.finish(is_whole)
    }

    /// Writes the packets that the encoder has made, waiting up to `timeout` for the first.
    fn receive(&mut self, timeout: ClockTime) -> Result<()> {
        let mut next = self.sink.try_pull_sample(timeout);
        while let Some(sample) = next {
            self.file.add(&sample)?;
            self.written.fetch_add(1, Ordering::Relaxed);
            next = self.sink.try_pull_sample(ClockTime::ZERO);
        }
        match self.bus.failure(ClockTime::ZERO) {
            Some(failure) => Err(self.failed(failure.reason)),
            None => Ok(()),
        }
    }

    fn failed(&self, reason: String) -> Error {
        Error::video(self.output, reason)
    }
}

/// Builds appsrc ! encoder ! appsink, whose packets have the form that the muxer of `output` needs.
fn build(
    output: &Path,
    stream: &StreamInfo,
    options: &Options,
) -> Result<(gst::Pipeline, AppSrc, AppSink), String> {
    let container = Container::of(output).ok_or("the output is not a video file")?;
    let track = make(container.muxer())?.request_pad_simple("video_%u");
    let track = track.ok_or("the container does not support video")?;
    let taken = track.pad_template_caps();
    let sink = AppSink::builder().caps(&taken).sync(false).build();
    let pipeline = gst::Pipeline::new();
    pipeline.add(&sink).map_err(|e| e.to_string())?;
    let target = sink.static_pad("sink").ok_or("a sink without a pad")?;
    let source = encoder::add(&pipeline, container, stream, options, &target, &taken)?;
    Ok((pipeline, source, sink))
}
