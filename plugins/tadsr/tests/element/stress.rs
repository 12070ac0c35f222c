// SPDX-License-Identifier: MPL-2.0

//! Many instances, state changes at any time, playback backwards.

use std::sync::{Arc, Mutex};

use gst::prelude::*;

use crate::common::*;

/// Creates a pipeline from a description with one upscaler.
fn pipeline(description: &str) -> gst::Pipeline {
    init();
    let bin = gst::parse::launch(description).unwrap();
    bin.downcast().unwrap()
}

const UPSCALER: &str = "tadsrupscale name=upscaler model=tiny device=cpu overload=drop scale=2";

/// Waits for the end of the stream or an error. Returns the text of the error.
fn end(pipeline: &gst::Pipeline) -> Option<String> {
    let kinds = [gst::MessageType::Eos, gst::MessageType::Error];
    let bus = pipeline.bus().unwrap();
    let limit = gst::ClockTime::from_seconds(120);
    let message = bus.timed_pop_filtered(limit, &kinds).expect("an end");
    match message.view() {
        gst::MessageView::Error(e) => Some(format!("{} {:?}", e.error(), e.debug())),
        _ => None,
    }
}

/// Records the timestamps at the sink pad of the element `name` of a pipeline.
fn timestamps(pipeline: &gst::Pipeline, name: &str) -> Arc<Mutex<Vec<gst::ClockTime>>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let (seen, element) = (all.clone(), pipeline.by_name(name).unwrap());
    let pad = element.static_pad("sink").unwrap();
    pad.add_probe(gst::PadProbeType::BUFFER, move |_, info| {
        let pts = info.buffer().and_then(|b| b.pts());
        seen.lock().unwrap().extend(pts);
        gst::PadProbeReturn::Ok
    });
    all
}

#[test]
fn sixty_four_instances_upscale_in_one_process() {
    let pipelines: Vec<_> = (0..64)
        .map(|_| {
            let source = "videotestsrc num-buffers=10 ! video/x-raw,width=48,height=32";
            let pipeline = pipeline(&format!("{source} ! {UPSCALER} ! fakesink name=end"));
            (timestamps(&pipeline, "end"), pipeline)
        })
        .collect();
    for (_, pipeline) in &pipelines {
        pipeline.set_state(gst::State::Playing).unwrap();
    }
    for (frames, pipeline) in pipelines {
        assert_eq!(end(&pipeline), None);
        pipeline.set_state(gst::State::Null).unwrap();
        assert_eq!(frames.lock().unwrap().len(), 10);
    }
}

#[test]
fn any_order_of_state_changes_leaves_an_element_that_works() {
    let source = "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=200/1";
    let pipeline = pipeline(&format!("{source} ! {UPSCALER} ! fakesink name=end"));
    let states = [
        gst::State::Null,
        gst::State::Ready,
        gst::State::Paused,
        gst::State::Playing,
    ];
    let mut random = 1_u32;
    for n in 0..200 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        pipeline
            .set_state(states[(random >> 24) as usize % 4])
            .unwrap();
        if n % 3 == 0 {
            let _ = pipeline.state(gst::ClockTime::from_mseconds(u64::from(random >> 28)));
        }
    }
    pipeline.set_state(gst::State::Null).unwrap();
    let frames = timestamps(&pipeline, "end");
    pipeline.set_state(gst::State::Playing).unwrap();
    let start = std::time::Instant::now();
    while frames.lock().unwrap().len() < 20 {
        assert!(
            start.elapsed().as_secs() < 120,
            "no frames after the changes"
        );
        let message = pipeline
            .bus()
            .unwrap()
            .pop_filtered(&[gst::MessageType::Error]);
        assert!(message.is_none(), "{message:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    pipeline.set_state(gst::State::Null).unwrap();
}

#[test]
fn playback_backwards_upscales_each_frame_in_the_order_of_the_source() {
    let source = "videotestsrc ! video/x-raw,width=64,height=48,framerate=25/1";
    let pipeline = pipeline(&format!(
        "{source} ! {UPSCALER} temporal=filter ! fakesink name=end"
    ));
    pipeline.set_state(gst::State::Paused).unwrap();
    pipeline.state(gst::ClockTime::from_seconds(60)).0.unwrap();
    let [pushed, frames] = ["upscaler", "end"].map(|name| timestamps(&pipeline, name));
    let second = gst::ClockTime::SECOND;
    let flags = gst::SeekFlags::FLUSH | gst::SeekFlags::ACCURATE;
    let (from, to) = (gst::SeekType::Set, gst::SeekType::Set);
    pipeline
        .seek(-1.0, flags, from, gst::ClockTime::ZERO, to, second)
        .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    assert_eq!(end(&pipeline), None);
    pipeline.set_state(gst::State::Null).unwrap();
    let frames = frames.lock().unwrap();
    assert!(
        frames.len() >= 25 && frames.is_sorted_by(|a, b| a > b),
        "{frames:?}"
    );
    assert_eq!(*frames, *pushed.lock().unwrap());
}
