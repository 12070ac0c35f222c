// SPDX-License-Identifier: MPL-2.0

//! Tests of the element with diffusion models.

use crate::common::*;
use gst::prelude::*;
use tadsr::frame::PixelFormat;

fn textured(text: &str) -> gst::Buffer {
    let info = info(text);
    let unit = 1 << (info.comp_depth(0) - 8);
    frame(&info, |c, x, y| {
        unit * (60 + 30 * c + 7 * x % 40 + 5 * y % 30) as u16
    })
}

/// Returns all samples of a frame, by component.
fn all_samples(rig: &Rig, buffer: &gst::Buffer) -> Vec<Vec<u16>> {
    let info = rig.out_info();
    let components = 0..info.n_components() as usize;
    components.map(|c| samples(buffer, &info, c)).collect()
}

/// Upscales a frame. Returns its samples.
fn upscaled(rig: &mut Rig, buffer: &gst::Buffer) -> Vec<Vec<u16>> {
    let out = rig.harness.push_and_pull(buffer.copy()).unwrap();
    all_samples(rig, &out)
}

#[test]
fn a_still_clip_gives_the_same_frame_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let input = raw("I420", 20, 10);
    let mut rig = Rig::with_caps(&[("model", &model), ("scale", "4")], &input);
    let still = textured(&input);
    let first = upscaled(&mut rig, &still);
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (80, 40));
    for _ in 1..5 {
        assert_eq!(upscaled(&mut rig, &still), first);
    }
    let stats: gst::Structure = rig.element.property("stats");
    assert_eq!(stats.get::<u64>("frames"), Ok(5));
    assert_eq!(rig.element.property::<String>("active-model"), "random-x4");
}

#[test]
fn an_open_size_is_that_of_the_native_scale() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let rig = Rig::raw(&[("model", &model)], "NV12", 8, 6);
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (32, 24));
    // A smaller output is downscaled from the native scale.
    let mut rig = Rig::raw(&[("model", &model), ("scale", "1.5")], "NV12", 8, 6);
    let out = rig.harness.push_and_pull(textured(&raw("NV12", 8, 6)));
    assert!(out.is_ok());
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (12, 9));
}

/// The network returns grey for any input.
#[test]
fn a_flat_colour_stays_in_every_format_and_odd_sizes_and_caps_may_change() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let mut rig = Rig::new(&[("model", &model), ("scale", "4")]);
    rig.harness.play();
    let sizes = [(1, 1), (5, 3), (2, 9), (13, 7)];
    for (i, format) in PixelFormat::ALL.into_iter().enumerate() {
        let (width, height) = sizes[i % sizes.len()];
        let unit = 1 << (format.depth() - 8);
        let colour = [170, 100, 150, 220].map(|v| v * unit);
        let input = raw(format.name(), width, height);
        rig.harness.set_src_caps_str(&input);
        let flat = frame(&info(&input), |c, _, _| colour[c]);
        for fix in ["wavelet", "adain"] {
            rig.element.set_property_from_str("color-fix", fix);
            for (c, samples) in upscaled(&mut rig, &flat).iter().enumerate() {
                let mean =
                    samples.iter().map(|&v| f64::from(v)).sum::<f64>() / samples.len() as f64;
                let off = (mean - f64::from(colour[c])).abs() / f64::from(unit);
                assert!(
                    off <= 1.5,
                    "{input} {fix} component {c}: {mean}, not {}",
                    colour[c]
                );
            }
        }
    }
}

#[test]
fn ten_bits_stay_ten_bits() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    for format in ["P010_10LE", "I420_10LE"] {
        let input = raw(format, 10, 6);
        let mut rig = Rig::with_caps(&[("model", &model)], &input);
        let result = upscaled(&mut rig, &textured(&input));
        let fine = result[0].iter().filter(|v| *v % 4 != 0).count();
        assert!(
            fine > result[0].len() / 2,
            "{format}: {fine} of {}",
            result[0].len()
        );
    }
}

#[test]
fn a_change_of_family_while_playing_loses_no_frame() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let input = raw("I420", 8, 6);
    let mut rig = Rig::with_caps(&[("scale", "2")], &input);
    let buffer = textured(&input);
    let (mut pushed, mut seen) = (0, Vec::new());
    for (model, name) in [
        (model.as_str(), "random-x4"),
        ("tiny", "tiny-x2"),
        (&model, "random-x4"),
    ] {
        rig.element.set_property("model", model);
        while rig.element.property::<String>("active-model") != name {
            assert_eq!(rig.harness.push(buffer.copy()), Ok(gst::FlowSuccess::Ok));
            pushed += 1;
            assert!(pushed < 100_000, "the model did not take over");
        }
        assert_eq!(rig.harness.push(buffer.copy()), Ok(gst::FlowSuccess::Ok));
        pushed += 1;
        let mut last = None;
        while let Some(buffer) = rig.harness.try_pull() {
            last = Some(buffer);
        }
        seen.push(all_samples(&rig, &last.unwrap()));
        assert_eq!((rig.out_info().width(), rig.out_info().height()), (16, 12));
    }
    assert_eq!(rig.harness.buffers_received(), pushed);
    assert_ne!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
    assert!(rig.message(gst::MessageType::Warning).is_none());
}

#[test]
fn a_model_of_scale_1_restores_video_without_a_change_of_size() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 1);
    for scale in ["0", "1"] {
        let input = raw("I420", 30, 14);
        let mut rig = Rig::with_caps(&[("model", &model), ("scale", scale)], &input);
        let buffer = textured(&input);
        let result = upscaled(&mut rig, &buffer);
        assert_eq!((rig.out_info().width(), rig.out_info().height()), (30, 14));
        assert_ne!(result, all_samples(&rig, &buffer));
        rig.element.set_property("strength", 0.0);
        assert_eq!(upscaled(&mut rig, &buffer), all_samples(&rig, &buffer));
    }
}

#[test]
fn passthrough_ends_and_begins_with_a_model_of_scale_1() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 1);
    let input = raw("GRAY8", 16, 8);
    let mut rig = Rig::with_caps(&[("scale", "1")], &input);
    let buffer = textured(&input);
    let swap = |rig: &Rig, model: &str, name: &str| {
        rig.element.set_property("model", model);
        for _ in 0..10_000 {
            if rig
                .element
                .property::<String>("active-model")
                .starts_with(name)
            {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("'{name}' did not take over");
    };
    let mut restored = Vec::new();
    for _ in 0..2 {
        let sent = buffer.copy();
        let address = sent.as_ptr();
        assert_eq!(rig.harness.push_and_pull(sent).unwrap().as_ptr(), address);
        swap(&rig, &model, "random-x1");
        restored.push(upscaled(&mut rig, &buffer));
        assert_ne!(restored[0], all_samples(&rig, &buffer));
        swap(&rig, "tiny", "tiny");
    }
    assert_eq!(restored[0], restored[1]);
}

#[test]
fn interlaced_video_passes_through_with_a_model_of_scale_1() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 1);
    let input = format!("{},interlace-mode=interleaved", raw("I420", 16, 8));
    let properties = [("model", model.as_str()), ("fallback", "passthrough")];
    let mut rig = Rig::with_caps(&properties, &input);
    let buffer = textured(&input);
    let address = buffer.as_ptr();
    assert_eq!(rig.harness.push_and_pull(buffer).unwrap().as_ptr(), address);
}

#[test]
fn settings_take_effect_with_the_next_frame() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let input = raw("RGB", 20, 9);
    let mut rig = Rig::with_caps(&[("model", &model)], &input);
    let buffer = textured(&input);
    let plain = upscaled(&mut rig, &buffer);
    for (name, value, back) in [
        ("seed", "7", "0"),
        ("noise", "0.25", "1"),
        ("steps", "2", "1"),
        ("tile-size", "16", "0"),
        ("color-fix", "none", "wavelet"),
        ("strength", "0.5", "1"),
    ] {
        rig.element.set_property_from_str(name, value);
        assert_ne!(upscaled(&mut rig, &buffer), plain, "{name}={value}");
        rig.element.set_property_from_str(name, back);
        assert_eq!(upscaled(&mut rig, &buffer), plain, "{name}={back}");
    }
}

#[test]
fn too_many_steps_fail_the_start_and_change_nothing_while_playing() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let (element, bus) = element(&[("model", &model), ("steps", "1001")]);
    assert!(element.set_state(gst::State::Paused).is_err());
    let error = message(&bus, gst::MessageType::Error).unwrap();
    assert!(
        error.contains("1001 steps") && error.contains("1 to 1000"),
        "{error}"
    );
    element.set_state(gst::State::Null).unwrap();

    let input = raw("GRAY8", 8, 8);
    let mut rig = Rig::with_caps(&[("model", &model)], &input);
    let before = upscaled(&mut rig, &textured(&input));
    rig.element.set_property("steps", 1001u32);
    for _ in 0..2 {
        assert_eq!(upscaled(&mut rig, &textured(&input)), before);
    }
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("1001 steps"), "{warning}");
    assert!(
        rig.message(gst::MessageType::Warning).is_none(),
        "posted once"
    );
}

#[test]
fn a_setting_that_the_model_lacks_leads_to_one_warning() {
    let input = raw("GRAY8", 8, 8);
    let mut rig = Rig::with_caps(&[("noise", "0.5")], &input);
    for (seed, setting) in [(0, "noise"), (1, "seed")] {
        rig.element.set_property("seed", seed as u64);
        for _ in 0..2 {
            upscaled(&mut rig, &textured(&input));
        }
        let warning = rig.message(gst::MessageType::Warning).unwrap();
        assert!(
            warning.contains(&format!("has no setting '{setting}'")),
            "{warning}"
        );
        assert!(rig.message(gst::MessageType::Warning).is_none());
    }
}

/// No machine has enough memory for 32768x32768 output pixels in floating point.
#[test]
fn too_little_memory_for_a_frame_is_an_error_and_another_size_works() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    let input = raw("GRAY8", 8192, 8192);
    let mut rig = Rig::with_caps(&[("model", &model), ("tile-size", "8192")], &input);
    let pushed = rig.harness.push(blank(&info(&input)));
    assert_eq!(pushed, Err(gst::FlowError::Error));
    let error = rig.message(gst::MessageType::Error).unwrap();
    assert!(
        error.contains("MiB are free") && error.contains("smaller tiles"),
        "{error}"
    );
    let small = raw("GRAY8", 8, 8);
    rig.harness.set_src_caps_str(&small);
    rig.harness.push_and_pull(textured(&small)).unwrap();
}

#[test]
fn a_frame_in_progress_is_cancelled_by_a_stop_or_flush() {
    let directory = tempfile::tempdir().unwrap();
    let model = resshift_model(directory.path(), 4);
    for flush in [true, false] {
        let input = raw("GRAY8", 64, 64);
        // About 64,000 passes.
        let properties = [
            ("model", model.as_str()),
            ("steps", "1000"),
            ("tile-size", "8"),
            ("tile-overlap", "0"),
        ];
        let mut rig = Rig::with_caps(&properties, &input);
        let element = rig.element.clone();
        let stopper = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(200));
            if flush {
                let sink = element.static_pad("sink").unwrap();
                assert!(sink.send_event(gst::event::FlushStart::new()));
            } else {
                element.set_state(gst::State::Ready).unwrap();
            }
        });
        let pushed = rig.harness.push(textured(&input));
        assert_eq!(pushed, Err(gst::FlowError::Flushing));
        stopper.join().unwrap();
        let stats: gst::Structure = rig.element.property("stats");
        assert_eq!(stats.get::<u64>("frames"), Ok(0), "flush {flush}");
        assert!(rig.message(gst::MessageType::Error).is_none());
        if flush {
            let sink = rig.element.static_pad("sink").unwrap();
            assert!(sink.send_event(gst::event::FlushStop::new(true)));
            rig.element.set_property("steps", 1u32);
            let segment = gst::FormattedSegment::<gst::ClockTime>::new();
            assert!(rig.harness.push_event(gst::event::Segment::new(&segment)));
            rig.harness.push_and_pull(textured(&input)).unwrap();
        }
    }
}
