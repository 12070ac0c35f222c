// SPDX-License-Identifier: MPL-2.0

//! `overload`: smaller models while the machine cannot keep up, and the announced latency.

use std::time::{Duration, Instant};

use gst::prelude::*;

use crate::common::*;

/// Caps that no machine upscales in real time, and that any machine does.
const FAST: &str = "video/x-raw,format=GRAY8,width=320,height=180,framerate=100000/1";
const SLOW: &str = "video/x-raw,format=GRAY8,width=320,height=180,framerate=1/2";

const LIMIT: Duration = Duration::from_secs(60);

fn level(rig: &Rig) -> Option<u32> {
    let stats: gst::Structure = rig.element.property("stats");
    stats.get("level").ok()
}

/// Returns levels and models of the next step.
fn step(rig: &Rig) -> Option<(u32, String)> {
    let message = rig.bus.pop_filtered(&[gst::MessageType::Element])?;
    let structure = message.structure().unwrap();
    assert_eq!(structure.name(), "tadsrupscale-overload");
    assert!(structure.get::<String>("reason").unwrap().contains('%'));
    Some((
        structure.get("level").unwrap(),
        structure.get("model").unwrap(),
    ))
}

/// A harness is a live source. A frame without a timestamp is never late.
fn push(rig: &mut Rig, caps: &str) {
    let mut buffer = blank(&info(caps));
    buffer.get_mut().unwrap().set_pts(gst::ClockTime::NONE);
    rig.harness.push_and_pull(buffer).unwrap();
}

#[test]
fn an_overloaded_stream_steps_down_to_bicubic_and_new_caps_restore_the_model() {
    for overload in ["auto", "adapt"] {
        let properties = [("model", "small"), ("scale", "2"), ("overload", overload)];
        let mut rig = Rig::with_caps(&properties, FAST);
        assert_eq!(level(&rig), Some(0));
        let (start, mut steps) = (Instant::now(), Vec::new());
        while steps.len() < 2 {
            assert!(start.elapsed() < LIMIT, "{steps:?}");
            push(&mut rig, FAST);
            steps.extend(step(&rig));
        }
        assert!(
            start.elapsed() >= Duration::from_secs(2),
            "a rest between steps"
        );
        assert_eq!(steps, [(1, "tiny".into()), (2, "bicubic".into())]);
        push(&mut rig, FAST);
        assert_eq!(rig.element.property::<String>("active-model"), "bicubic");
        assert_eq!(level(&rig), Some(2));

        rig.harness.set_src_caps_str(SLOW);
        push(&mut rig, SLOW);
        assert_eq!(rig.element.property::<String>("active-model"), "small-x2");
        assert_eq!(level(&rig), Some(0));
        assert!(rig.message(gst::MessageType::Warning).is_none());
    }
}

#[test]
fn another_model_begins_at_its_own_level() {
    let properties = [("model", "small"), ("scale", "2"), ("overload", "adapt")];
    let mut rig = Rig::with_caps(&properties, FAST);
    let start = Instant::now();
    while step(&rig).is_none() {
        assert!(start.elapsed() < LIMIT);
        push(&mut rig, FAST);
    }
    rig.element.set_property("model", "small-x2");
    while rig.element.property::<String>("active-model") != "small-x2" {
        assert!(start.elapsed() < LIMIT);
        push(&mut rig, FAST);
    }
    assert_eq!(level(&rig), Some(0));
}

#[test]
fn with_drop_the_model_stays() {
    let properties = [("model", "small"), ("scale", "2"), ("overload", "drop")];
    let mut rig = Rig::with_caps(&properties, FAST);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        push(&mut rig, FAST);
    }
    assert_eq!(step(&rig), None);
    assert_eq!(level(&rig), None);
    assert_eq!(rig.element.property::<String>("active-model"), "small-x2");
}

#[test]
fn the_time_for_a_frame_is_announced_as_latency_up_to_one_frame() {
    let caps = raw("GRAY8", 64, 48);
    let properties = [("scale", "2"), ("overload", "adapt")];
    let mut rig = Rig::with_caps(&properties, &caps);
    rig.harness.set_upstream_latency(FRAME * 5);
    assert_eq!(rig.harness.query_latency(), Some(FRAME * 5));
    let start = Instant::now();
    while rig.harness.query_latency() == Some(FRAME * 5) {
        assert!(start.elapsed() < LIMIT);
        push(&mut rig, &caps);
    }
    let latency = rig.harness.query_latency().unwrap();
    assert!(latency > FRAME * 5 && latency <= FRAME * 6, "{latency}");
    assert!(rig.message(gst::MessageType::Latency).is_some());
}
