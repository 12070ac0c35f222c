// SPDX-License-Identifier: MPL-2.0

//! The element on an emulated CUDA device: frames in flight, events between them, and failures.

use std::sync::Arc;

use crate::common::*;
use gst::prelude::*;
use tadsr::{
    cuda::{driver::Driver, emulator::Fake},
    engine::lite::cuda::emulated,
};

const SIZE: (u32, u32) = (24, 18);
/// `CUDA_ERROR_LAUNCH_FAILED`, after which the device is lost.
const LOST: i32 = 719;

fn plug() -> Arc<Fake> {
    let fake = emulated::device((8, 0), 1 << 30);
    fake.plug();
    fake
}

fn ordinal(fake: &Fake) -> usize {
    fake.info().ordinal
}

fn rig(fake: &Arc<Fake>, depth: &str, more: &[(&str, &str)]) -> Rig {
    let device = format!("cuda:{}", ordinal(fake));
    let mut properties = vec![("device", device.as_str()), ("queue-depth", depth)];
    properties.extend_from_slice(more);
    Rig::raw(&properties, "I420", SIZE.0, SIZE.1)
}

/// Returns the luma of the `n`th frame upscaled on the CPU.
fn by_cpu(n: u64, model: &str, strength: &str) -> Vec<u16> {
    let properties = [
        ("device", "cpu"),
        ("precision", "f32"),
        ("model", model),
        ("strength", strength),
    ];
    let mut rig = Rig::raw(&properties, "I420", SIZE.0, SIZE.1);
    let out = rig.harness.push_and_pull(numbered(SIZE, n)).unwrap();
    samples(&out, &rig.out_info(), 0)
}

/// Asserts that `out` are the upscaled frames `numbers`, in order.
fn assert_frames(rig: &Rig, out: &[gst::Buffer], numbers: std::ops::Range<u64>) {
    assert_frames_as(rig, out, numbers, "tiny", "1");
}

fn assert_frames_as(
    rig: &Rig,
    out: &[gst::Buffer],
    numbers: std::ops::Range<u64>,
    model: &str,
    strength: &str,
) {
    let times: Vec<_> = out.iter().map(|b| b.pts().unwrap()).collect();
    let expected: Vec<_> = numbers.clone().map(|n| FRAME * n).collect();
    assert_eq!(times, expected);
    for (buffer, n) in out.iter().zip(numbers) {
        let got = samples(buffer, &rig.out_info(), 0);
        let want = by_cpu(n, model, strength);
        assert_eq!(got.len(), want.len());
        let error = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max();
        // The device computes in f16, the fallback possibly in 8-bit integers.
        assert!(error.unwrap() <= 5, "frame {n} is wrong by {error:?}");
    }
}

/// Returns all output buffers so far.
fn pulled(rig: &mut Rig) -> Vec<gst::Buffer> {
    std::iter::from_fn(|| rig.harness.try_pull()).collect()
}

#[test]
fn frames_are_pushed_in_order_and_the_last_ones_at_the_end_of_the_stream() {
    for depth in [1, 2, 3] {
        let fake = plug();
        let mut rig = rig(&fake, &depth.to_string(), &[]);
        let device = format!("cuda:{}", ordinal(&fake));
        assert_eq!(rig.element.property::<String>("active-device"), device);
        for n in 0..5 {
            rig.harness.push(numbered(SIZE, n)).unwrap();
            let out = rig.harness.buffers_in_queue() as u64;
            assert_eq!(out, (n + 2).saturating_sub(depth), "after frame {n}");
        }
        rig.harness.push_event(gst::event::Eos::new());
        let out = pulled(&mut rig);
        assert_frames(&rig, &out, 0..5);
        assert!(rig.message(gst::MessageType::Warning).is_none());

        let stats: gst::Structure = rig.element.property("stats");
        assert_eq!(stats.get::<u64>("frames"), Ok(5));
        assert!(stats.get::<u64>("device-memory").unwrap() > 0);
        for time in [
            "upload-ms",
            "compute-ms",
            "download-ms",
            "mean-ms",
            "p99-ms",
        ] {
            assert!(stats.get::<f64>(time).unwrap() > 0.0, "{time}");
        }
        drop((rig, out));
        assert_eq!(fake.alive(), 0, "released with the element and its buffers");
    }
}

#[test]
fn frames_in_flight_add_latency() {
    for (depth, frames) in [("1", 0), ("3", 2)] {
        let fake = plug();
        let mut rig = rig(&fake, depth, &[]);
        let posted = rig.message(gst::MessageType::Latency).is_some();
        assert_eq!(posted, frames > 0);
        rig.harness.set_upstream_latency(FRAME * 5);
        assert_eq!(rig.harness.query_latency(), Some(FRAME * (5 + frames)));
    }
    // Passthrough has no latency.
    let fake = plug();
    let mut rig = rig(&fake, "3", &[("scale", "1")]);
    rig.harness.push_and_pull(numbered(SIZE, 0)).unwrap();
    assert_eq!(rig.harness.query_latency(), Some(gst::ClockTime::ZERO));
}

#[test]
fn events_keep_their_position_between_frames() {
    let fake = plug();
    let mut rig = rig(&fake, "3", &[]);
    // Output in order: timestamps of frames, names of events.
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = order.clone();
    let pad = rig.element.static_pad("src").unwrap();
    let kinds = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
    pad.add_probe(kinds, move |_, info| {
        let item = match &info.data {
            Some(gst::PadProbeData::Buffer(b)) => {
                (b.pts().unwrap().nseconds() / FRAME.nseconds()).to_string()
            }
            Some(gst::PadProbeData::Event(e)) => e.type_().name().to_string(),
            _ => return gst::PadProbeReturn::Ok,
        };
        seen.lock().unwrap().push(item);
        gst::PadProbeReturn::Ok
    });
    let tag = || {
        let mut tags = gst::TagList::new();
        tags.make_mut()
            .add::<gst::tags::Title>(&"a title", gst::TagMergeMode::Append);
        gst::event::Tag::new(tags)
    };
    rig.harness.push(numbered(SIZE, 0)).unwrap();
    rig.harness.push_event(tag());
    rig.harness.push(numbered(SIZE, 1)).unwrap();
    rig.harness.push(numbered(SIZE, 2)).unwrap();
    rig.harness.push(numbered(SIZE, 3)).unwrap();
    rig.harness
        .push_event(gst::event::Gap::builder(FRAME * 4).duration(FRAME).build());
    rig.harness.push(numbered(SIZE, 5)).unwrap();
    rig.harness.push_event(tag());
    rig.harness.push_event(gst::event::Eos::new());
    let order: Vec<String> = order.lock().unwrap().clone();
    assert_eq!(order.join(" "), "0 tag 1 2 3 gap 5 tag eos");
}

#[test]
fn a_change_of_size_or_scale_loses_no_frame() {
    let fake = plug();
    let mut rig = rig(&fake, "3", &[("scale", "2")]);
    for n in 0..2 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.element.set_property("scale", 3.0);
    for n in 2..4 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    let out = pulled(&mut rig);
    assert_eq!(out.len(), 2, "drained before the new size");
    let small = info(&raw("I420", 32, 16));
    rig.harness.set_src_caps_str(&raw("I420", 32, 16));
    rig.harness.push(blank(&small)).unwrap();
    rig.harness.push_event(gst::event::Eos::new());
    let more = pulled(&mut rig);
    let sizes: Vec<usize> = out.iter().chain(&more).map(|b| b.size()).collect();
    let size = |width, height| info(&raw("I420", width, height)).size();
    let expected = [
        size(48, 36),
        size(48, 36),
        size(72, 54),
        size(72, 54),
        size(96, 48),
    ];
    assert_eq!(sizes, expected);
}

#[test]
fn a_flush_drops_the_frames_in_flight() {
    let fake = plug();
    let mut rig = rig(&fake, "3", &[]);
    for n in 0..2 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.harness.push_event(gst::event::FlushStart::new());
    rig.harness.push_event(gst::event::FlushStop::new(true));
    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
    rig.harness.push_event(gst::event::Segment::new(&segment));
    assert_eq!(pulled(&mut rig).len(), 0);
    for n in 10..13 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    assert_frames(&rig, &out, 10..13);
}

#[test]
fn the_fallback_to_the_cpu_loses_no_frame_of_a_lost_device() {
    // A device may fail when a frame is submitted, and when it is received.
    for call in ["launch_graph", "synchronize_event"] {
        let fake = plug();
        let mut rig = rig(&fake, "3", &[("fallback", "cpu")]);
        for n in 0..4 {
            rig.harness.push(numbered(SIZE, n)).unwrap();
        }
        fake.fail(call, 0, LOST);
        for n in 4..7 {
            rig.harness.push(numbered(SIZE, n)).unwrap();
        }
        let warning = rig.message(gst::MessageType::Warning).unwrap();
        assert!(
            warning.contains("lost") && warning.contains("CPU"),
            "{warning}"
        );
        assert!(
            rig.message(gst::MessageType::Warning).is_none(),
            "posted once"
        );
        assert_eq!(rig.element.property::<String>("active-device"), "cpu");
        let out = pulled(&mut rig);
        assert_frames(&rig, &out, 0..7);
        assert_eq!(rig.harness.query_latency(), Some(gst::ClockTime::ZERO));
        assert!(rig.message(gst::MessageType::Error).is_none());
    }
}

#[test]
fn a_lost_device_ends_the_stream_or_falls_back_to_bicubic() {
    let fake = plug();
    let mut rig_1 = rig(&fake, "2", &[]);
    rig_1.harness.push(numbered(SIZE, 0)).unwrap();
    fake.fail("synchronize_event", 0, LOST);
    assert_eq!(
        rig_1.harness.push(numbered(SIZE, 1)),
        Err(gst::FlowError::Error)
    );
    let error = rig_1.message(gst::MessageType::Error).unwrap();
    assert!(error.contains("lost"), "{error}");

    let fake = plug();
    let mut rig_2 = rig(&fake, "2", &[("fallback", "bicubic")]);
    rig_2.harness.push(numbered(SIZE, 0)).unwrap();
    fake.fail("synchronize_event", 0, LOST);
    rig_2.harness.push(numbered(SIZE, 1)).unwrap();
    assert_eq!(rig_2.element.property::<String>("active-model"), "bicubic");
    let out = pulled(&mut rig_2);
    assert_frames_as(&rig_2, &out, 0..2, "tiny", "0");
}

#[test]
fn a_defective_full_or_old_device_fails_the_start_or_falls_back() {
    let wrong = plug();
    wrong.set_kernels(emulated::defective);
    let full = emulated::device((8, 0), 1000);
    full.plug();
    let old = emulated::device((7, 0), 1 << 30);
    old.plug();
    for (fake, reason) in [(wrong, "wrongly"), (full, "memory"), (old, "7.5")] {
        let device = format!("cuda:{}", ordinal(&fake));
        let (failing, bus) = element(&[("device", &device)]);
        assert!(failing.set_state(gst::State::Paused).is_err());
        let error = message(&bus, gst::MessageType::Error).unwrap();
        assert!(error.contains(reason), "{error}");
        failing.set_state(gst::State::Null).unwrap();

        let mut rig = rig(&fake, "2", &[("fallback", "cpu")]);
        let warning = rig.message(gst::MessageType::Warning).unwrap();
        assert!(warning.contains(reason), "{warning}");
        assert_eq!(rig.element.property::<String>("active-device"), "cpu");
        let out = rig.harness.push_and_pull(numbered(SIZE, 0)).unwrap();
        assert_frames(&rig, &[out], 0..1);
    }
}

#[test]
fn an_unsupported_precision_is_an_error_with_the_remedy() {
    let fake = plug();
    let device = format!("cuda:{}", ordinal(&fake));
    let (failing, bus) = element(&[("device", &device), ("precision", "int8")]);
    assert!(failing.set_state(gst::State::Paused).is_err());
    let error = message(&bus, gst::MessageType::Error).unwrap();
    assert!(
        error.contains("f16") && error.contains("device=cpu"),
        "{error}"
    );
    failing.set_state(gst::State::Null).unwrap();
}

#[test]
fn a_new_model_takes_over_after_the_frames_in_flight() {
    let fake = plug();
    let mut rig = rig(&fake, "3", &[("model", "tiny")]);
    for n in 0..2 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.element.set_property("model", "small");
    let mut sent = 2;
    while rig.element.property::<String>("active-model") != "small-x2" {
        rig.harness.push(numbered(SIZE, sent)).unwrap();
        sent += 1;
        assert!(sent < 10_000, "the model did not take over");
    }
    for n in sent..sent + 3 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    let last = &out[out.len() - 2..];
    assert_frames_as(&rig, last, sent + 1..sent + 3, "small", "1");
    let times: Vec<_> = out.iter().map(|b| b.pts().unwrap()).collect();
    assert_eq!(times, (0..sent + 3).map(|n| FRAME * n).collect::<Vec<_>>());
    assert_frames(&rig, &out[..2], 0..2);
    let stats: gst::Structure = rig.element.property("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(sent + 3));
    assert!(rig.message(gst::MessageType::Error).is_none());
}

#[test]
fn a_dial_takes_effect_with_the_next_frame_and_loses_none_in_flight() {
    let fake = plug();
    let frames = |before: f64, after: f64| -> Vec<Vec<u8>> {
        let mut rig = rig(&fake, "3", &[("model", "tiny")]);
        for (n, denoise) in (0..6).zip([before, before, before, after, after, after]) {
            rig.element.set_property("denoise", denoise);
            rig.harness.push(numbered(SIZE, n)).unwrap();
        }
        rig.harness.push_event(gst::event::Eos::new());
        let bytes = |buffer: &gst::Buffer| buffer.map_readable().unwrap().to_vec();
        pulled(&mut rig).iter().map(bytes).collect()
    };
    let (clean, degraded, moved) = (frames(0.0, 0.0), frames(0.8, 0.8), frames(0.0, 0.8));
    assert_ne!(clean[3], degraded[3]);
    assert_eq!(moved.len(), 6);
    assert_eq!(moved[..3], clean[..3]);
    assert_eq!(moved[3..], degraded[3..]);
}

#[test]
fn the_pool_has_buffers_for_the_frames_in_flight() {
    let fake = plug();
    let mut rig = rig(&fake, "4", &[]);
    let caps: gst::Caps = raw("I420", SIZE.0, SIZE.1).parse().unwrap();
    let mut query = gst::query::Allocation::new(Some(&caps), true);
    assert!(
        rig.element
            .static_pad("sink")
            .unwrap()
            .query(query.query_mut())
    );
    let min = query.allocation_pools().map(|(_, _, min, _)| min).max();
    assert_eq!(min, Some(5));
    rig.harness.push(numbered(SIZE, 0)).unwrap();
    assert!(rig.harness.try_pull().is_none());
    // A drain query returns the frames immediately.
    rig.element
        .static_pad("sink")
        .unwrap()
        .query(gst::query::Drain::new().query_mut());
    let out = pulled(&mut rig);
    assert_frames(&rig, &out, 0..1);
}

#[test]
fn a_short_buffer_is_an_error_after_the_frames_in_flight() {
    let fake = plug();
    let mut rig = rig(&fake, "3", &[("fallback", "cpu")]);
    rig.harness.push(numbered(SIZE, 0)).unwrap();
    let mut short = gst::Buffer::from_mut_slice(vec![0u8; 100]);
    short.get_mut().unwrap().set_pts(FRAME);
    assert_eq!(rig.harness.push(short), Err(gst::FlowError::Error));
    let out = pulled(&mut rig);
    assert_frames(&rig, &out, 0..1);
    let error = rig.message(gst::MessageType::Error).unwrap();
    assert!(error.contains("100"), "{error}");
    assert!(
        rig.message(gst::MessageType::Warning).is_none(),
        "the device did not fail"
    );
}

#[test]
fn a_discontinuity_marks_its_own_frame_and_drains_only_before_it() {
    let fake = plug();
    let mut rig = rig(&fake, "3", &[]);
    let marked = |n: u64, mark: bool| {
        let mut buffer = numbered(SIZE, n);
        if mark {
            let buffer = buffer.get_mut().unwrap();
            buffer.set_flags(gst::BufferFlags::DISCONT);
        }
        buffer
    };
    // Sources mark the first frame.
    for n in 0..5 {
        rig.harness.push(marked(n, n == 0)).unwrap();
        let out = rig.harness.buffers_in_queue() as u64;
        assert_eq!(out, n.saturating_sub(1), "after frame {n}");
    }
    // A later discontinuity: the frames in flight are pushed first.
    rig.harness.push(marked(5, true)).unwrap();
    assert_eq!(rig.harness.buffers_in_queue(), 5);
    for n in 6..8 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    assert_eq!(rig.harness.buffers_in_queue(), 6);
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    let marks: Vec<usize> = (0..out.len())
        .filter(|&n| out[n].flags().contains(gst::BufferFlags::DISCONT))
        .collect();
    assert_eq!(marks, [0, 5]);
    assert_frames(&rig, &out, 0..8);
}

#[test]
fn a_pipeline_has_frames_in_flight_and_loses_none() {
    init();
    let fake = plug();
    let line = format!(
        "videotestsrc num-buffers=6 pattern=ball ! \
         video/x-raw,format=NV12,width=24,height=18,framerate=25/1 ! \
         tadsrupscale name=up device=cuda:{} queue-depth=3 ! \
         fakesink name=sink sync=false signal-handoffs=true",
        ordinal(&fake)
    );
    let pipeline = gst::parse::launch(&line)
        .unwrap()
        .downcast::<gst::Pipeline>()
        .unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let kinds = [gst::MessageType::Eos, gst::MessageType::Error];
    let limit = gst::ClockTime::from_seconds(60);
    let end = pipeline
        .bus()
        .unwrap()
        .timed_pop_filtered(limit, &kinds)
        .unwrap();
    assert_eq!(end.type_(), gst::MessageType::Eos, "{end:?}");
    let stats: gst::Structure = pipeline.by_name("up").unwrap().property("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(6));
    // Frames overlap: three of the six frames are submitted before the first one is received.
    let log = fake.log();
    let calls = log
        .iter()
        .filter(|c| ["launch_graph", "elapsed"].contains(&c.as_str()));
    let calls: String = calls
        .map(|c| if c == "launch_graph" { 's' } else { 'e' })
        .collect();
    // The times of three stages are read when a frame is received.
    let calls = calls.replace("eee", "r");
    assert!(calls.ends_with("sssrsrsrsrrr"), "{calls}");
    pipeline.set_state(gst::State::Null).unwrap();
}

#[test]
fn an_unsupported_precision_set_while_playing_changes_nothing() {
    let fake = plug();
    let mut rig = rig(&fake, "2", &[("fallback", "cpu")]);
    for n in 0..2 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.element.set_property_from_str("precision", "f32");
    for n in 2..4 {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("f32"), "{warning}");
    assert!(
        rig.message(gst::MessageType::Warning).is_none(),
        "posted once"
    );
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    assert_frames(&rig, &out, 0..4);
    assert_ne!(rig.element.property::<String>("active-device"), "cpu");
}

#[test]
fn a_model_set_after_the_loss_of_the_device_runs_by_cpu() {
    let fake = plug();
    let mut rig = rig(&fake, "2", &[("fallback", "cpu")]);
    rig.harness.push(numbered(SIZE, 0)).unwrap();
    fake.fail("synchronize_event", 0, LOST);
    rig.harness.push(numbered(SIZE, 1)).unwrap();
    assert_eq!(rig.element.property::<String>("active-device"), "cpu");
    rig.element.set_property("model", "small");
    let mut sent = 2;
    while rig.element.property::<String>("active-model") != "small-x2" {
        rig.harness.push(numbered(SIZE, sent)).unwrap();
        sent += 1;
        assert!(sent < 10_000, "the model did not take over");
    }
    rig.harness.push(numbered(SIZE, sent)).unwrap();
    let out = pulled(&mut rig);
    let last = &out[out.len() - 1..];
    assert_frames_as(&rig, last, sent..sent + 1, "small", "1");
}
