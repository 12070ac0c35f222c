// SPDX-License-Identifier: MPL-2.0

//! Properties that take effect while playing, QoS and statistics.

use gst::prelude::*;

use crate::common::{binding::SecondsBinding, *};

#[test]
fn strength_takes_effect_with_the_next_frame() {
    let mut rig = Rig::raw(&[("scale", "2")], "GRAY8", 32, 24);
    let input = frame(&info(&raw("GRAY8", 32, 24)), |_, x, y| {
        if (x / 3 + y / 5) % 2 == 0 { 200 } else { 50 }
    });
    let mut upscale = |strength: f64| {
        rig.element.set_property("strength", strength);
        let out = rig.harness.push_and_pull(input.clone()).unwrap();
        samples(&out, &rig.out_info(), 0)
    };
    let full = upscale(1.0);
    let none = upscale(0.0);
    let half = upscale(0.5);
    assert_ne!(full, none);
    for ((f, n), h) in full.iter().zip(&none).zip(&half) {
        let (low, high) = (f.min(n), f.max(n));
        // Clipping at black and white can reduce the difference.
        assert!(
            (low.saturating_sub(1)..=high + 1).contains(h),
            "{n} {h} {f}"
        );
    }
    assert_eq!(upscale(1.0), full);
}

#[test]
fn denoise_takes_effect_with_the_next_frame() {
    let mut rig = Rig::raw(&[("scale", "2")], "GRAY8", 32, 24);
    let input = frame(&info(&raw("GRAY8", 32, 24)), |_, x, y| {
        if (x / 3 + y / 5) % 2 == 0 { 200 } else { 50 }
    });
    let mut upscale = |denoise: f64| {
        rig.element.set_property("denoise", denoise);
        let out = rig.harness.push_and_pull(input.clone()).unwrap();
        samples(&out, &rig.out_info(), 0)
    };
    let automatic = upscale(-1.0);
    let clean = upscale(0.0);
    assert_ne!(clean, upscale(0.9));
    assert_eq!(clean, upscale(0.0));
    assert_eq!(automatic, upscale(-1.0));
}

#[test]
fn a_controlled_strength_follows_the_stream_time() {
    let mut rig = Rig::raw(&[("scale", "2")], "GRAY8", 32, 24);
    let input = frame(&info(&raw("GRAY8", 32, 24)), |_, x, y| {
        if (x / 3 + y / 5) % 2 == 0 { 200 } else { 50 }
    });
    let element = rig.element.clone();
    let mut upscale_at = |seconds: u64| {
        let mut input = input.copy();
        let pts = gst::ClockTime::from_seconds(seconds);
        input.get_mut().unwrap().set_pts(pts);
        let out = rig.harness.push_and_pull(input).unwrap();
        let image = samples(&out, &rig.out_info(), 0);
        (image, element.property::<f64>("strength"))
    };
    let (full, _) = upscale_at(0);
    let binding = SecondsBinding::new(&element, "strength");
    element.add_control_binding(&binding).unwrap();
    let (at_0, strength) = upscale_at(0);
    assert_eq!(strength, 0.0);
    assert_ne!(at_0, full);
    let (at_1, strength) = upscale_at(1);
    assert_eq!(strength, 1.0);
    assert_eq!(at_1, full);
}

#[test]
fn late_frames_are_dropped_and_counted() {
    let mut rig = Rig::raw(&[("scale", "2")], "GRAY8", 16, 8);
    let at = |seconds: u64| {
        let mut buffer = blank(&info(&raw("GRAY8", 16, 8)));
        let pts = gst::ClockTime::from_seconds(seconds);
        buffer.get_mut().unwrap().set_pts(pts);
        buffer
    };
    rig.harness.push_and_pull(at(0)).unwrap();
    // The sink reports that the frame at 1 s was 3 s late.
    let late = gst::event::Qos::new(
        gst::QOSType::Underflow,
        2.0,
        3 * gst::ClockTime::SECOND.nseconds() as i64,
        gst::ClockTime::SECOND,
    );
    assert!(rig.harness.push_upstream_event(late));
    for seconds in [1, 2, 60] {
        assert_eq!(rig.harness.push(at(seconds)), Ok(gst::FlowSuccess::Ok));
    }
    let stats: gst::Structure = rig.element.property("stats");
    assert_eq!(stats.get::<u64>("dropped"), Ok(2));
    assert_eq!(stats.get::<u64>("frames"), Ok(2));
    assert_eq!(rig.harness.buffers_received(), 2);
}

#[test]
fn stats_count_the_frames_since_the_start() {
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 32, 24);
    for _ in 0..5 {
        rig.harness
            .push_and_pull(blank(&info(&raw("I420", 32, 24))))
            .unwrap();
    }
    let stats: gst::Structure = rig.element.property("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(5));
    assert!(stats.get::<f64>("fps").unwrap() > 0.0);
    assert!(stats.get::<f64>("mean-ms").unwrap() > 0.0);
    rig.element.set_state(gst::State::Null).unwrap();
    let stats: gst::Structure = rig.element.property("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(0));
}
