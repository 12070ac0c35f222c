// SPDX-License-Identifier: MPL-2.0

//! `model=auto`: the choice by the speed of the machine.

use gst::prelude::*;
use tadsr::{Device, Upscaler, frame, ladder};

use crate::common::*;

/// Caps of 32x24 pixels that any machine upscales in real time with any model of the ladder.
const SLOW: &str = "video/x-raw,format=GRAY8,width=32,height=24,framerate=1/2";

/// Caps that no machine upscales in real time.
const FAST: &str = "video/x-raw,format=GRAY8,width=640,height=360,framerate=100000/1";

fn active(rig: &Rig) -> String {
    rig.element.property("active-model")
}

/// Returns the models and reasons of all choices since the last call.
fn choices(rig: &Rig) -> Vec<(String, String)> {
    let mut choices = Vec::new();
    while let Some(message) = rig.bus.pop_filtered(&[gst::MessageType::Element]) {
        let structure = message.structure().unwrap();
        assert_eq!(structure.name(), "tadsrupscale-model");
        let text = |field| structure.get::<String>(field).unwrap();
        choices.push((text("model"), text("reason")));
    }
    choices
}

fn largest() -> &'static str {
    let from = frame::FrameInfo::new(frame::PixelFormat::Gray8, 32, 24);
    ladder::largest(&from, &from.with_size(64, 48)).unwrap()
}

#[test]
fn the_largest_model_in_real_time_is_chosen_with_the_caps_and_told() {
    for model in ["auto", ""] {
        let rig = Rig::with_caps(&[("model", model), ("scale", "2")], SLOW);
        assert!(active(&rig).starts_with(largest()), "{}", active(&rig));
        let choices = choices(&rig);
        assert_eq!(choices.len(), 1, "{choices:?}");
        assert_eq!(choices[0].0, largest());
        let reason = &choices[0].1;
        assert!(
            reason.contains("32x24 to 64x48 every 2000.0 ms"),
            "{reason}"
        );
    }
    let rig = Rig::with_caps(&[("model", "auto"), ("scale", "2")], FAST);
    assert_eq!(active(&rig), "tiny-x2");
    assert_eq!(choices(&rig)[0].0, "tiny");
}

#[test]
fn frames_are_upscaled_by_the_chosen_model() {
    let mut rig = Rig::with_caps(&[("model", "auto"), ("scale", "2")], SLOW);
    let info = info(SLOW);
    let value = |_, x, y| (60 + 40 * (x / 3 % 2) + 3 * y) as u16;
    let output = rig.harness.push_and_pull(frame(&info, value)).unwrap();
    let mut input =
        frame::Frame::new(frame::FrameInfo::new(frame::PixelFormat::Gray8, 32, 24)).unwrap();
    for (i, sample) in input.plane_mut(0).iter_mut().enumerate() {
        *sample = value(0, i % 32, i / 32) as u8;
    }
    let mut upscaler = Upscaler::load(largest(), Device::Cpu).unwrap();
    let want = upscaler.upscale(&input).unwrap();
    let want: Vec<u16> = want.plane(0).iter().map(|v| u16::from(*v)).collect();
    assert_eq!(samples(&output, &rig.out_info(), 0), want);
}

#[test]
fn new_caps_choose_again_and_equal_caps_do_not() {
    let mut rig = Rig::with_caps(&[("model", "auto"), ("scale", "2")], SLOW);
    assert_eq!(choices(&rig).len(), 1);
    rig.harness
        .set_src_caps_str(&format!("{SLOW},colorimetry=bt601"));
    rig.harness.push_and_pull(blank(&info(SLOW))).unwrap();
    rig.harness.set_src_caps_str(FAST);
    rig.harness.push_and_pull(blank(&info(FAST))).unwrap();
    assert_eq!(active(&rig), "tiny-x2");
    rig.harness.set_src_caps_str(SLOW);
    rig.harness.push_and_pull(blank(&info(SLOW))).unwrap();
    assert!(active(&rig).starts_with(largest()));
    let models: Vec<_> = choices(&rig).into_iter().map(|c| c.0).collect();
    assert_eq!(models[models.len() - 2..], ["tiny", largest()]);
    rig.harness.set_src_caps_str(SLOW);
    rig.harness.push_and_pull(blank(&info(SLOW))).unwrap();
    assert!(choices(&rig).is_empty());
}

#[test]
fn a_scale_beyond_the_chosen_model_chooses_again() {
    let mut rig = Rig::with_caps(&[("model", "auto"), ("scale", "2")], SLOW);
    assert_eq!(active(&rig), "base-x2");
    rig.element.set_property("scale", 4.0);
    rig.harness.push_and_pull(blank(&info(SLOW))).unwrap();
    assert_eq!(
        (rig.out_info().width(), active(&rig)),
        (128, "base-x4".into())
    );
    rig.element.set_property("scale", 2.0);
    rig.harness.push_and_pull(blank(&info(SLOW))).unwrap();
    assert_eq!(
        (rig.out_info().width(), active(&rig)),
        (64, "base-x2".into())
    );
    assert!(rig.message(gst::MessageType::Warning).is_none());
}

#[test]
fn a_stream_without_a_frame_rate_is_taken_for_30_frames_per_second() {
    let variable = SLOW.replace("1/2", "0/1");
    let rig = Rig::with_caps(&[("model", "auto"), ("scale", "2")], &variable);
    let reason = &choices(&rig)[0].1;
    assert!(reason.contains("every 33.3 ms"), "{reason}");
}

#[test]
fn a_named_model_is_not_replaced() {
    let rig = Rig::with_caps(&[("model", "tiny"), ("scale", "2")], SLOW);
    assert_eq!(active(&rig), "tiny-x2");
    assert!(choices(&rig).is_empty());
}

#[test]
fn auto_set_while_running_chooses_for_the_stream() {
    let mut rig = Rig::with_caps(&[("model", "tiny"), ("scale", "2")], SLOW);
    rig.element.set_property("model", "auto");
    rig.wait_for(gst::MessageType::Element);
    for _ in 0..600 {
        if active(&rig).starts_with(largest()) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    rig.harness.push_and_pull(blank(&info(SLOW))).unwrap();
    assert!(active(&rig).starts_with(largest()), "{}", active(&rig));
}

#[test]
fn frames_that_pass_through_choose_nothing() {
    let rig = Rig::with_caps(&[("model", "auto"), ("scale", "1")], SLOW);
    assert!(choices(&rig).is_empty());
}

#[test]
fn elements_share_the_time() {
    let first = Rig::with_caps(&[("model", "auto"), ("scale", "2")], SLOW);
    let second = Rig::with_caps(&[("model", "auto"), ("scale", "2")], SLOW);
    assert!(choices(&first)[0].1.contains("in 1 element"));
    assert!(choices(&second)[0].1.contains("in 2 element"));
    drop(first.harness);
    first.element.set_state(gst::State::Null).unwrap();
    let third = Rig::with_caps(&[("model", "auto"), ("scale", "2")], SLOW);
    assert!(choices(&third)[0].1.contains("in 2 element"));
}
