// SPDX-License-Identifier: MPL-2.0

//! The session of an element with an engine that uses previous frames.

use std::sync::atomic::AtomicU8;

use gst::subclass::prelude::*;
use gst_check::Harness;
use tadsr::{
    Precision, Result,
    engine::{Capabilities, Engine, Observer, Options},
    frame::{FrameInfo, FrameMut, FrameRef},
};

use super::*;
use crate::upscale::TadsrUpscale;

/// An engine whose samples are the number of frames since the last reset.
struct Counter {
    frames: Arc<AtomicU8>,
    capabilities: Capabilities,
    options: Options,
}

impl Counter {
    fn new(frames: Arc<AtomicU8>) -> Self {
        Self {
            frames,
            capabilities: Capabilities {
                scales: [1.0, 4.0],
                default_scale: 2.0,
                native_scale: None,
                precisions: vec![Precision::F32],
                settings: Vec::new(),
                max_steps: None,
                pipelined: false,
                history: true,
            },
            options: Options::default(),
        }
    }
}

impl Engine for Counter {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn model(&self, _: f64) -> &str {
        "counter"
    }

    fn precision(&self, _: f64) -> Precision {
        Precision::F32
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn set_options(&mut self, options: Options) -> Result<()> {
        self.options = options;
        Ok(())
    }

    fn prepare(&mut self, _: &FrameInfo, _: &FrameInfo) -> Result<()> {
        Ok(())
    }

    fn run(&mut self, _: &FrameRef, dst: &mut FrameMut, _: Observer) -> Result<()> {
        let frames = self.frames.fetch_add(1, Ordering::Relaxed);
        for plane in dst.planes_mut() {
            plane.data.fill(frames);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.frames.store(0, Ordering::Relaxed);
    }
}

fn caps(height: i32) -> gst::Caps {
    gst_video::VideoCapsBuilder::new()
        .format(gst_video::VideoFormat::Gray8)
        .width(4)
        .height(height)
        .framerate(gst::Fraction::new(25, 1))
        .build()
}

/// Creates an element in a harness that upscales with a [`Counter`] of `frames`.
fn harness_with(frames: Arc<AtomicU8>) -> Harness {
    gst::init().unwrap();
    crate::plugin_register_static().unwrap();
    let element = gst::ElementFactory::make("tadsrupscale");
    let element = element.property("scale", 2.0).build().unwrap();
    let mut harness = Harness::with_element(&element, Some("sink"), Some("src"));
    harness.play();
    harness.set_src_caps(caps(4));
    let upscaler = Upscaler::with_engine(Box::new(Counter::new(frames)), Device::Cpu);
    let session = &element
        .downcast_ref::<TadsrUpscale>()
        .unwrap()
        .imp()
        .session;
    let model = LoadedModel::new(upscaler, "counter", false);
    install(lock(&session.state), Some(model));
    harness
}

fn harness() -> Harness {
    harness_with(Arc::default())
}

/// Upscales a frame. Returns its first sample.
fn upscaled(harness: &mut Harness, height: usize, flags: gst::BufferFlags) -> u8 {
    let mut buffer = gst::Buffer::from_mut_slice(vec![0u8; 4 * height]);
    buffer.get_mut().unwrap().set_flags(flags);
    let out = harness.push_and_pull(buffer).unwrap();
    out.map_readable().unwrap()[0]
}

/// Upscales three frames. Returns their first samples.
fn three(harness: &mut Harness) -> [u8; 3] {
    [(); 3].map(|()| upscaled(harness, 4, gst::BufferFlags::empty()))
}

fn segment() -> gst::Event {
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    gst::event::Segment::new(&segment)
}

#[test]
fn a_continuous_stream_does_not_reset_the_model() {
    let mut harness = harness();
    assert_eq!(three(&mut harness), [0, 1, 2]);
    harness.push_event(gst::event::Tag::new(gst::TagList::new()));
    assert_eq!(three(&mut harness), [3, 4, 5]);
}

#[test]
fn a_discontinuity_resets_the_model() {
    let mut harness = harness();
    assert_eq!(three(&mut harness), [0, 1, 2]);
    let discont = gst::BufferFlags::DISCONT;
    assert_eq!(upscaled(&mut harness, 4, discont), 0);
    assert_eq!(three(&mut harness), [1, 2, 3]);
}

#[test]
fn a_segment_resets_the_model() {
    let mut harness = harness();
    assert_eq!(three(&mut harness), [0, 1, 2]);
    harness.push_event(segment());
    assert_eq!(three(&mut harness), [0, 1, 2]);
}

#[test]
fn a_flush_resets_the_model() {
    let frames = Arc::new(AtomicU8::new(0));
    let mut harness = harness_with(frames.clone());
    assert_eq!(three(&mut harness), [0, 1, 2]);
    harness.push_event(gst::event::FlushStart::new());
    harness.push_event(gst::event::FlushStop::new(true));
    // Before the segment, which resets the model as well.
    assert_eq!(frames.load(Ordering::Relaxed), 0);
    harness.push_event(segment());
    assert_eq!(three(&mut harness), [0, 1, 2]);
}

#[test]
fn new_caps_reset_the_model() {
    let mut harness = harness();
    assert_eq!(three(&mut harness), [0, 1, 2]);
    harness.push_event(gst::event::Caps::new(&caps(2)));
    assert_eq!(upscaled(&mut harness, 2, gst::BufferFlags::empty()), 0);
}
