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

/// Returns a still picture with noise that differs by `seed`.
fn noisy(seed: usize) -> gst::Buffer {
    frame(&info(&raw("GRAY8", 64, 48)), |_, x, y| {
        let noise = (x * 73 + y * 151 + seed * 977) * (x + 3 * y + 7 * seed + 11) % 7 / 3;
        let picture = if (x / 9 + y / 13) % 2 == 0 { 90 } else { 160 };
        (picture + noise) as u16
    })
}

fn temporal_rig(temporal: &str) -> Rig {
    let settings = [("scale", "2"), ("denoise", "0.6"), ("temporal", temporal)];
    Rig::raw(&settings, "GRAY8", 64, 48)
}

/// Upscales the picture `seed` as frame `n`.
fn upscaled(rig: &mut Rig, seed: usize, n: u64) -> Vec<u16> {
    let out = rig.harness.push_and_pull(timed(noisy(seed), n)).unwrap();
    samples(&out, &rig.out_info(), 0)
}

#[test]
fn the_temporal_filter_reduces_flicker() {
    let flicker = |temporal: &str| {
        let mut rig = temporal_rig(temporal);
        let results: Vec<_> = (0..10).map(|n| upscaled(&mut rig, n, n as u64)).collect();
        let pairs = results[4..].windows(2).flat_map(|w| w[0].iter().zip(&w[1]));
        pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>()
    };
    let (off, filter) = (flicker("off"), flicker("filter"));
    assert!(filter < off * 3 / 4, "{filter} against {off}");
}

#[test]
fn the_temporal_filter_can_be_switched_between_two_frames() {
    let mut rig = temporal_rig("filter");
    let first = upscaled(&mut rig, 1, 0);
    upscaled(&mut rig, 0, 1);
    assert_ne!(upscaled(&mut rig, 1, 2), first);
    rig.element.set_property_from_str("temporal", "off");
    assert_eq!(upscaled(&mut rig, 1, 3), first);
}

#[test]
fn nothing_of_the_frames_before_a_seek_is_left() {
    let mut rig = temporal_rig("filter");
    let first = upscaled(&mut rig, 1, 0);
    upscaled(&mut rig, 0, 1);
    rig.harness.push_event(gst::event::FlushStart::new());
    rig.harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    rig.harness.push_event(gst::event::Segment::new(&segment));
    assert_eq!(upscaled(&mut rig, 1, 0), first);
}

#[test]
fn late_frames_that_are_dropped_do_not_disturb_the_temporal_filter() {
    let mut rig = temporal_rig("filter");
    upscaled(&mut rig, 0, 0);
    // The sink reports that the frame at 40 ms was 100 ms late.
    let late = 100 * gst::ClockTime::MSECOND.nseconds() as i64;
    let event = gst::event::Qos::new(gst::QOSType::Underflow, 2.0, late, FRAME);
    assert!(rig.harness.push_upstream_event(event));
    for n in 1..3 {
        let pushed = rig.harness.push(timed(noisy(n), n as u64));
        assert_eq!(pushed, Ok(gst::FlowSuccess::Ok));
    }
    let after = upscaled(&mut rig, 9, 60);
    let stats: gst::Structure = rig.element.property("stats");
    assert_eq!(stats.get::<u64>("dropped"), Ok(2));
    // The frame follows the last one that was upscaled.
    let mut without = temporal_rig("filter");
    upscaled(&mut without, 0, 0);
    assert_eq!(upscaled(&mut without, 9, 60), after);
}

#[test]
fn the_memory_of_a_network_ends_at_a_seek() {
    let model = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../models/tiny-x2-memory.safetensors"
    );
    let settings = [("model", model), ("scale", "2"), ("denoise", "0.6")];
    let mut rig = Rig::raw(&settings, "GRAY8", 64, 48);
    let first = upscaled(&mut rig, 1, 0);
    upscaled(&mut rig, 0, 1);
    assert_ne!(upscaled(&mut rig, 1, 2), first);
    rig.harness.push_event(gst::event::FlushStart::new());
    rig.harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    rig.harness.push_event(gst::event::Segment::new(&segment));
    assert_eq!(upscaled(&mut rig, 1, 0), first);
    rig.element.set_property_from_str("temporal", "off");
    upscaled(&mut rig, 0, 1);
    assert_eq!(upscaled(&mut rig, 1, 2), first);
}

#[test]
fn a_network_without_memory_is_told_once() {
    let mut rig = temporal_rig("memory");
    upscaled(&mut rig, 1, 0);
    let warning = rig.wait_for(gst::MessageType::Warning);
    assert!(warning.contains("without memory"), "{warning}");
    upscaled(&mut rig, 0, 1);
    assert_eq!(rig.message(gst::MessageType::Warning), None);
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

#[test]
fn statistics_are_posted_at_intervals() {
    let mut rig = Rig::raw(&[("scale", "2"), ("stats-interval", "1")], "GRAY8", 32, 24);
    let bus = gst::Bus::new();
    rig.element.set_bus(Some(&bus));
    let mut push = |n: u64| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        let grey = frame(&info(&raw("GRAY8", 32, 24)), |_, _, _| 128);
        rig.harness.push_and_pull(timed(grey, n)).unwrap();
        let messages = std::iter::from_fn(|| bus.pop());
        let structures = messages.filter_map(|m| m.structure().map(|s| s.to_owned()));
        structures
            .filter(|s| s.name() == "tadsr-stats")
            .collect::<Vec<_>>()
    };
    assert!(push(0).is_empty(), "the first frame begins an interval");
    let stats = push(1);
    assert_eq!(stats.len(), 1, "{stats:?}");
    assert_eq!(stats[0].get::<u64>("frames"), Ok(2));
    assert_eq!(stats[0].get::<f64>("scale"), Ok(2.0));
    assert_eq!(stats[0].get::<&str>("model"), Ok("tiny-x2"));
    assert!(stats[0].get::<&str>("precision").is_ok());
    rig.element.set_property("stats-interval", 0u32);
    let mut push = |n: u64| {
        let grey = frame(&info(&raw("GRAY8", 32, 24)), |_, _, _| 128);
        rig.harness.push_and_pull(timed(grey, n)).unwrap();
    };
    push(2);
    assert!(bus.pop_filtered(&[gst::MessageType::Element]).is_none());
    // Its messages keep the element alive.
    bus.set_flushing(true);
}

#[test]
fn the_precision_and_the_scale_in_force_are_readable() {
    init();
    assert_eq!(element(&[]).0.property::<f64>("active-scale"), 0.0);
    let mut rig = Rig::raw(&[("scale", "1.5"), ("precision", "f32")], "GRAY8", 32, 24);
    let mut precision = || {
        let grey = frame(&info(&raw("GRAY8", 32, 24)), |_, _, _| 128);
        rig.harness.push_and_pull(grey).unwrap();
        rig.element.property::<String>("active-precision")
    };
    assert_eq!(precision(), "f32");
    rig.element.set_property_from_str("precision", "bf16");
    let mut precision = || {
        let grey = frame(&info(&raw("GRAY8", 32, 24)), |_, _, _| 128);
        rig.harness.push_and_pull(grey).unwrap();
        rig.element.property::<String>("active-precision")
    };
    assert_eq!(precision(), "bf16");
    assert_eq!(rig.element.property::<f64>("active-scale"), 1.5);
}

/// Every value in the file of presets is set by its preset, and by gst-launch's notation.
#[test]
fn presets_set_their_values() {
    init();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/presets");
    gst::Preset::set_app_dir(folder).unwrap();
    let text = std::fs::read_to_string(format!("{folder}/GstTadsrUpscale.prs")).unwrap();
    let mut preset = String::new();
    let (mut names, mut values) = (Vec::new(), 0);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            preset = name.into();
            names.extend((name != "_presets_").then_some(name.to_string()));
        }
        let Some((key, want)) = line.split_once('=').filter(|_| preset != "_presets_") else {
            continue;
        };
        if key.starts_with("_meta/") {
            continue;
        }
        let element = gst::parse::launch(&format!("tadsrupscale @preset={preset}")).unwrap();
        let found = element.property_value(key);
        let found = found.serialize().unwrap();
        let same = match (want.parse::<f64>(), found.parse::<f64>()) {
            (Ok(want), Ok(found)) => want == found,
            _ => found == want,
        };
        assert!(same, "{preset}: {key} is {found}, not {want}");
        values += 1;
    }
    assert_eq!(names, ["live", "archive", "animation", "low-light"]);
    assert!(values > 15);
    // Otherwise an error would leak the element.
    let fatal = gst::ParseFlags::FATAL_ERRORS;
    let launch = gst::parse::launch_full("tadsrupscale @preset=none", None, fatal);
    assert!(launch.is_err(), "an unknown preset");
}
