// SPDX-License-Identifier: MPL-2.0

//! Loading, fallback and swap of models, and devices.

use gst::prelude::*;

use crate::common::*;

#[test]
fn a_missing_model_fails_the_start_and_is_named() {
    let (element, bus) = element(&[("model", "/no/such/model.safetensors")]);
    assert!(element.set_state(gst::State::Paused).is_err());
    let error = message(&bus, gst::MessageType::Error).unwrap();
    assert!(error.contains("/no/such/model.safetensors"), "{error}");
    element.set_state(gst::State::Null).unwrap();
}

#[test]
fn an_invalid_model_file_fails_the_start_and_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let header_of_4_gib = [0, 0, 0, 0, 1, 0, 0, 0, b'{'];
    for (name, bytes) in [
        ("empty", &[][..]),
        (
            "text",
            b"not a model at all, but long enough to hold a header",
        ),
        ("large", &header_of_4_gib),
    ] {
        let path = directory.path().join(format!("{name}.safetensors"));
        std::fs::write(&path, bytes).unwrap();
        let (element, bus) = element(&[("model", path.to_str().unwrap())]);
        assert!(element.set_state(gst::State::Paused).is_err(), "{name}");
        let error = message(&bus, gst::MessageType::Error).unwrap();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        element.set_state(gst::State::Null).unwrap();
    }
}

#[test]
fn the_fallback_replaces_a_missing_model() {
    for (fallback, model, width) in [
        ("bicubic", "bicubic", 64),
        ("passthrough", "passthrough", 32),
    ] {
        let properties = [
            ("model", "/no/such/model"),
            ("fallback", fallback),
            ("scale", "2"),
        ];
        let mut rig = Rig::raw(&properties, "I420", 32, 24);
        let warning = rig.message(gst::MessageType::Warning).unwrap();
        assert!(warning.contains("/no/such/model"), "{warning}");
        let buffer = blank(&info(&raw("I420", 32, 24)));
        rig.harness.push_and_pull(buffer).unwrap();
        assert_eq!(rig.out_info().width(), width);
        assert_eq!(rig.element.property::<String>("active-model"), model);
        assert!(rig.message(gst::MessageType::Error).is_none());
    }
}

#[test]
fn a_missing_device_is_an_error_or_falls_back_to_the_cpu() {
    let (missing, bus) = element(&[("device", "cuda:99")]);
    assert!(missing.set_state(gst::State::Paused).is_err());
    let error = message(&bus, gst::MessageType::Error).unwrap();
    assert!(error.contains("cuda:99"), "{error}");
    missing.set_state(gst::State::Null).unwrap();

    let rig = Rig::raw(
        &[("device", "cuda:99"), ("fallback", "cpu")],
        "I420",
        32,
        24,
    );
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("cuda:99"), "{warning}");
    assert_eq!(rig.element.property::<String>("active-device"), "cpu");
}

#[test]
fn invalid_values_fail_the_start_with_any_fallback() {
    for (name, value) in [("scale", "0.5"), ("device", "gpu"), ("device", "cuda:x")] {
        for fallback in ["error", "cpu", "bicubic", "passthrough"] {
            let (element, bus) = element(&[(name, value), ("fallback", fallback)]);
            assert!(
                element.set_state(gst::State::Paused).is_err(),
                "{name}={value}"
            );
            let error = message(&bus, gst::MessageType::Error).unwrap();
            assert!(error.contains(value), "{error}");
            element.set_state(gst::State::Null).unwrap();
        }
    }
}

#[test]
fn the_active_model_and_device_are_reported_while_running() {
    let (element, _bus) = element(&[]);
    assert_eq!(element.property::<Option<String>>("active-model"), None);
    assert_eq!(element.property::<Option<String>>("active-device"), None);
    let rig = Rig::raw(&[("scale", "2")], "I420", 32, 24);
    let model: String = rig.element.property("active-model");
    assert!(model.starts_with("tiny"), "{model}");
    assert_eq!(rig.element.property::<String>("active-device"), "cpu");
}

#[test]
fn a_model_set_while_running_takes_over_without_losing_a_frame() {
    let mut rig = Rig::raw(
        &[
            ("model", "/no/such/model"),
            ("fallback", "bicubic"),
            ("scale", "2"),
        ],
        "I420",
        32,
        24,
    );
    assert!(rig.message(gst::MessageType::Warning).is_some());
    let input = info(&raw("I420", 32, 24));
    rig.element.set_property("model", "tiny");
    let mut pushed = 0;
    while rig.element.property::<String>("active-model") == "bicubic" {
        assert_eq!(rig.harness.push(blank(&input)), Ok(gst::FlowSuccess::Ok));
        pushed += 1;
        assert!(pushed < 10_000, "the model did not take over");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(rig.harness.push(blank(&input)), Ok(gst::FlowSuccess::Ok));
    assert_eq!(rig.harness.buffers_received(), pushed + 1);
    assert!(rig.message(gst::MessageType::Warning).is_none());
}

#[test]
fn a_model_that_cannot_be_loaded_while_running_keeps_the_current_one() {
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 32, 24);
    let before: String = rig.element.property("active-model");
    rig.element.set_property("model", "/no/such/model");
    let warning = rig.wait_for(gst::MessageType::Warning);
    assert!(warning.contains("/no/such/model"), "{warning}");
    let input = info(&raw("I420", 32, 24));
    assert_eq!(rig.harness.push(blank(&input)), Ok(gst::FlowSuccess::Ok));
    assert_eq!(rig.element.property::<String>("active-model"), before);
    assert!(rig.message(gst::MessageType::Error).is_none());
}

#[test]
fn a_model_set_while_the_element_starts_is_loaded() {
    let (element, bus) = element(&[("model", "/no/such/model"), ("fallback", "bicubic")]);
    // The warning is posted during the start, after the first model failed.
    bus.set_sync_handler(|_, message| {
        if message.type_() == gst::MessageType::Warning {
            message.src().unwrap().set_property("model", "tiny-x2");
        }
        gst::BusSyncReply::Pass
    });
    element.set_state(gst::State::Paused).unwrap();
    assert_eq!(element.property::<String>("active-model"), "tiny-x2");
    element.set_state(gst::State::Null).unwrap();
    bus.unset_sync_handler();
}

#[test]
fn an_element_can_be_restarted() {
    let (element, _bus) = element(&[]);
    for _ in 0..3 {
        element.set_state(gst::State::Paused).unwrap();
        assert!(element.property::<Option<String>>("active-model").is_some());
        element.set_state(gst::State::Null).unwrap();
        assert_eq!(element.property::<Option<String>>("active-model"), None);
    }
}
