// SPDX-License-Identifier: MPL-2.0

//! Sizes and caps: scales, passthrough, interlaced video, scales that a model does not support.

use gst::prelude::*;
use tadsr::frame::PixelFormat;

use crate::common::*;

/// Returns the caps that the sink pad accepts if downstream accepts `downstream`.
fn sink_caps(rig: &mut Rig, downstream: &str) -> gst::Caps {
    rig.harness.set_sink_caps_str(downstream);
    let pad = rig.element.static_pad("sink").unwrap();
    pad.query_caps(None)
}

#[test]
fn sink_caps_have_the_output_size_divided_by_the_scale() {
    let mut rig = Rig::new(&[("scale", "4")]);
    let wanted = "video/x-raw,format=I420,width=640,height=480,pixel-aspect-ratio=4/3";
    let sink = sink_caps(&mut rig, wanted);
    let expected = "video/x-raw,format=I420,width=160,height=120,pixel-aspect-ratio=4/3";
    assert!(sink.is_subset(&caps(expected)), "{sink}");
}

#[test]
fn a_size_that_the_scale_does_not_divide_is_refused() {
    let mut rig = Rig::new(&[("scale", "4")]);
    let sink = sink_caps(&mut rig, "video/x-raw,width=641,height=480");
    assert!(sink.is_empty(), "{sink}");
}

#[test]
fn fractional_scales_give_exact_sizes() {
    let rig = Rig::raw(&[("scale", "1.5")], "I420", 322, 242);
    let info = rig.out_info();
    assert_eq!((info.width(), info.height()), (483, 363));

    let rig = Rig::raw(&[("scale", "1.5")], "I420", 321, 242);
    let error = rig.message(gst::MessageType::Error).unwrap();
    assert!(error.contains("321x242"), "{error}");
}

#[test]
fn an_open_size_doubles() {
    let rig = Rig::raw(&[], "NV12", 321, 241);
    let info = rig.out_info();
    assert_eq!((info.width(), info.height()), (642, 482));
}

#[test]
fn scale_0_takes_the_size_from_downstream_and_keeps_the_display_aspect_ratio() {
    let mut rig = Rig::new(&[]);
    rig.harness.play();
    rig.harness
        .set_sink_caps_str("video/x-raw,width=640,height=360");
    rig.harness.set_src_caps_str(
        "video/x-raw,format=I420,width=320,height=240,framerate=25/1,pixel-aspect-ratio=1/1",
    );
    let info = rig.out_info();
    assert_eq!((info.width(), info.height()), (640, 360));
    assert_eq!(info.par(), gst::Fraction::new(3, 4));
}

#[test]
fn scale_0_refuses_to_shrink_and_to_grow_beyond_the_model() {
    let mut rig = Rig::new(&[]);
    let sink = sink_caps(&mut rig, "video/x-raw,width=1920,height=1080");
    assert!(sink.can_intersect(&caps("video/x-raw,width=480,height=270")));
    assert!(sink.can_intersect(&caps("video/x-raw,width=1920,height=540")));
    assert!(!sink.can_intersect(&caps("video/x-raw,width=479,height=270")));
    assert!(!sink.can_intersect(&caps("video/x-raw,width=1921,height=1080")));
}

#[test]
fn a_fixed_scale_keeps_aspect_framerate_and_multiview() {
    let input = "video/x-raw,format=I420,width=32,height=24,framerate=30000/1001,\
                 pixel-aspect-ratio=16/15,multiview-mode=side-by-side,multiview-flags=0:ffffffff";
    let rig = Rig::with_caps(&[("scale", "3")], input);
    let out = rig.out_caps();
    let out = out.structure(0).unwrap();
    assert_eq!(out.get::<i32>("width"), Ok(96));
    for field in ["framerate", "pixel-aspect-ratio", "multiview-mode"] {
        let input = caps(input);
        let before = input.structure(0).unwrap().value(field).unwrap();
        let after = out.value(field).unwrap();
        assert!(
            before.compare(after) == Some(std::cmp::Ordering::Equal),
            "{field}"
        );
    }
}

#[test]
fn video_without_a_fixed_framerate_is_upscaled() {
    for rate in ["", ",framerate=0/1"] {
        for scale in ["1", "2"] {
            let caps = format!("video/x-raw,format=I420,width=32,height=24{rate}");
            let mut rig = Rig::with_caps(&[("scale", scale)], &caps);
            rig.harness.push_and_pull(blank(&info(&caps))).unwrap();
            assert_eq!(rig.harness.query_latency(), Some(gst::ClockTime::ZERO));
        }
    }
}

#[test]
fn scale_1_passes_buffers_through_unchanged() {
    let mut rig = Rig::raw(&[("scale", "1")], "I420", 32, 24);
    let buffer = blank(&info(&raw("I420", 32, 24)));
    let address = buffer.as_ptr();
    let out = rig.harness.push_and_pull(buffer).unwrap();
    assert_eq!(out.as_ptr(), address);
    assert_eq!(rig.out_caps(), caps(&raw("I420", 32, 24)));
}

#[test]
fn every_format_is_kept() {
    for format in PixelFormat::ALL {
        let mut rig = Rig::raw(&[("scale", "2")], format.name(), 16, 8);
        let buffer = blank(&info(&raw(format.name(), 16, 8)));
        let out = rig.harness.push_and_pull(buffer).unwrap();
        let info = rig.out_info();
        assert_eq!(info.format().to_str().as_str(), format.name());
        assert_eq!((info.width(), info.height()), (32, 16));
        assert!(out.size() >= info.size(), "{}", format.name());
    }
}

#[test]
fn a_scale_set_while_running_changes_the_output_with_the_next_frame() {
    let mut rig = Rig::raw(&[("scale", "2")], "GRAY8", 16, 8);
    let buffer = blank(&info(&raw("GRAY8", 16, 8)));
    rig.harness.push_and_pull(buffer.clone()).unwrap();
    rig.element.set_property("scale", 4.0);
    rig.harness.push_and_pull(buffer.clone()).unwrap();
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (64, 32));
    rig.element.set_property("scale", 1.0);
    rig.harness.push_and_pull(buffer.clone()).unwrap();
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (16, 8));
    rig.element.set_property("scale", 0.0);
    rig.harness.push_and_pull(buffer).unwrap();
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (32, 16));
}

#[test]
fn caps_may_change_between_frames() {
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 16, 8);
    for (format, width, height) in [
        ("I420", 16, 8),
        ("NV12", 7, 5),
        ("RGB", 16, 8),
        ("RGB", 1, 1),
    ] {
        let text = raw(format, width, height);
        rig.harness.set_src_caps_str(&text);
        let out = rig.harness.push_and_pull(blank(&info(&text))).unwrap();
        let got = rig.out_info();
        assert_eq!((got.width(), got.height()), (width * 2, height * 2));
        assert!(out.size() >= got.size());
    }
}

#[test]
fn a_scale_that_becomes_impossible_while_playing_is_an_error_with_the_reason() {
    for (scale, reason) in [("1.5", "65x49 times 1.5"), ("0.5", "scale=0.5 is invalid")] {
        let input = raw("I420", 65, 49);
        let mut rig = Rig::with_caps(&[("scale", "2")], &input);
        rig.harness.push_and_pull(blank(&info(&input))).unwrap();
        rig.element.set_property_from_str("scale", scale);
        let pushed = rig.harness.push(blank(&info(&input)));
        assert_eq!(pushed, Err(gst::FlowError::NotNegotiated));
        let error = rig.message(gst::MessageType::Error).unwrap();
        assert!(error.contains(reason), "{error}");
        assert!(
            rig.message(gst::MessageType::Error).is_none(),
            "posted once"
        );
    }
}

#[test]
fn interlaced_video_is_refused_with_a_reason() {
    for mode in ["interleaved", "mixed", "fields"] {
        let input = format!("{},interlace-mode={mode}", raw("I420", 32, 24));
        let mut rig = Rig::with_caps(&[("scale", "2")], &input);
        let error = rig.message(gst::MessageType::Error).unwrap();
        assert!(
            error.contains(mode) && error.contains("deinterlace"),
            "{error}"
        );
        let pushed = rig.harness.push(blank(&info(&input)));
        assert_eq!(pushed, Err(gst::FlowError::NotNegotiated));
    }
}

#[test]
fn interlaced_video_passes_through_with_that_fallback() {
    for scale in ["0", "2"] {
        let input = format!("{},interlace-mode=interleaved", raw("I420", 32, 24));
        let properties = [("scale", scale), ("fallback", "passthrough")];
        let mut rig = Rig::with_caps(&properties, &input);
        let buffer = blank(&info(&input));
        let address = buffer.as_ptr();
        let out = rig.harness.push_and_pull(buffer).unwrap();
        assert_eq!(out.as_ptr(), address);
        assert_eq!(rig.out_caps(), caps(&input));

        // Progressive video is still upscaled, with and without a stated interlace mode.
        for progressive in ["", ",interlace-mode=progressive"] {
            let input = raw("I420", 32, 24) + progressive;
            rig.harness.set_src_caps_str(&input);
            rig.harness.push_and_pull(blank(&info(&input))).unwrap();
            assert_eq!(rig.out_info().width(), 64);
        }
    }
}

#[test]
fn views_in_separate_buffers_are_refused() {
    let input = format!("{},multiview-mode=separated,views=2", raw("I420", 32, 24));
    let rig = Rig::with_caps(&[("scale", "2")], &input);
    let error = rig.message(gst::MessageType::Error).unwrap();
    assert!(error.contains("view"), "{error}");
}

#[test]
fn a_scale_beyond_the_model_is_refused_while_running_with_the_maximum() {
    for fallback in ["error", "cpu", "passthrough"] {
        let properties = [("model", "tiny-x2"), ("scale", "2"), ("fallback", fallback)];
        let mut rig = Rig::raw(&properties, "GRAY8", 16, 8);
        let text = raw("GRAY8", 16, 8);
        let buffer = blank(&info(&text));
        rig.harness.push_and_pull(buffer.clone()).unwrap();
        rig.element.set_property("scale", 4.0);
        for _ in 0..2 {
            let pushed = rig.harness.push(buffer.clone());
            assert_eq!(pushed, Err(gst::FlowError::NotNegotiated), "{fallback}");
        }
        let error = rig.message(gst::MessageType::Error).unwrap();
        assert!(error.contains("scale of 4"), "{error}");
        assert!(error.contains("at most 2"), "{error}");
        assert!(rig.message(gst::MessageType::Error).is_none());

        // A supported scale works again.
        rig.element.set_property("scale", 2.0);
        rig.harness.push_and_pull(buffer.clone()).unwrap();
        assert_eq!(rig.out_info().width(), 32);

        // New caps are refused, too.
        rig.element.set_property("scale", 4.0);
        rig.harness.set_src_caps_str(&raw("GRAY8", 16, 4));
        let error = rig.message(gst::MessageType::Error).unwrap();
        assert!(error.contains("at most 2"), "{error}");
        rig.element.set_property("scale", 2.0);
        rig.harness.set_src_caps_str(&text);
        rig.harness.push_and_pull(buffer).unwrap();
        assert_eq!(rig.out_info().width(), 32);
    }
}

#[test]
fn a_scale_beyond_the_model_falls_back_while_running_without_losing_a_frame() {
    let properties = [
        ("model", "tiny-x2"),
        ("scale", "2"),
        ("fallback", "bicubic"),
    ];
    let mut rig = Rig::raw(&properties, "GRAY8", 16, 8);
    let text = raw("GRAY8", 16, 8);
    let input = frame(&info(&text), |_, x, _| if x < 8 { 200 } else { 50 });
    rig.harness.push_and_pull(input.clone()).unwrap();
    assert_eq!(rig.element.property::<String>("active-model"), "tiny-x2");

    rig.element.set_property("scale", 4.0);
    let out = rig.harness.push_and_pull(input.clone()).unwrap();
    let image = samples(&out, &rig.out_info(), 0);
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (64, 32));
    assert_eq!(rig.element.property::<String>("active-model"), "bicubic");
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("at most 2"), "{warning}");
    assert!(rig.message(gst::MessageType::Error).is_none());

    let mut plain = Rig::raw(&[("scale", "4"), ("strength", "0")], "GRAY8", 16, 8);
    let expected = plain.harness.push_and_pull(input.clone()).unwrap();
    assert_eq!(image, samples(&expected, &plain.out_info(), 0));

    // The fallback stays for new caps before the next frame.
    rig.harness.set_src_caps_str(&raw("GRAY8", 8, 8));
    let buffer = blank(&info(&raw("GRAY8", 8, 8)));
    rig.harness.push_and_pull(buffer).unwrap();
    assert_eq!(rig.out_info().width(), 32);
    assert!(rig.message(gst::MessageType::Warning).is_none());
}

#[test]
fn a_scale_beyond_the_model_with_new_caps_falls_back() {
    let properties = [
        ("model", "tiny-x2"),
        ("scale", "2"),
        ("fallback", "bicubic"),
    ];
    let mut rig = Rig::raw(&properties, "GRAY8", 16, 8);
    rig.element.set_property("scale", 3.0);
    let text = raw("GRAY8", 8, 8);
    rig.harness.set_src_caps_str(&text);
    rig.harness.push_and_pull(blank(&info(&text))).unwrap();
    assert_eq!(rig.out_info().width(), 24);
    assert!(rig.message(gst::MessageType::Warning).is_some());
    assert!(rig.message(gst::MessageType::Error).is_none());
}

/// Returns a started element whose downstream takes only 64x48 pixels.
fn fixed_output(fallback: &str) -> Rig {
    let mut rig = Rig::new(&[("model", "tiny-x2"), ("fallback", fallback)]);
    rig.harness
        .set_sink_caps_str("video/x-raw,width=64,height=48");
    rig.harness.play();
    rig
}

#[test]
fn a_size_that_no_scale_reaches_is_refused_with_the_sizes() {
    for fallback in ["error", "bicubic", "passthrough", "cpu"] {
        // The new input is too large, then too small.
        for (width, height) in [(80, 60), (12, 9)] {
            let mut rig = fixed_output(fallback);
            let push = |rig: &mut Rig, width, height| {
                let caps = raw("GRAY8", width, height);
                rig.harness.set_src_caps_str(&caps);
                rig.harness.push(blank(&info(&caps)))
            };
            assert!(push(&mut rig, 32, 24).is_ok());
            assert!(rig.message(gst::MessageType::Error).is_none());
            assert!(push(&mut rig, width, height).is_err(), "{fallback}");
            let error = rig.message(gst::MessageType::Error).unwrap();
            let from = format!("{width} x {height}");
            assert!(
                error.contains(&from) && error.contains("64 x 48"),
                "{error}"
            );
            // The previous size works again.
            assert!(push(&mut rig, 32, 24).is_ok(), "{fallback}");
            assert!(rig.message(gst::MessageType::Error).is_none());
        }
    }
}

#[test]
fn a_size_that_the_model_does_not_reach_is_made_by_the_fallback() {
    let caps = raw("GRAY8", 20, 15);
    let mut rig = fixed_output("error");
    rig.harness.set_src_caps_str(&caps);
    let error = rig.message(gst::MessageType::Error).unwrap();
    assert!(error.contains("[ 20, 40 ]"), "{error}");
    let mut rig = fixed_output("bicubic");
    rig.harness.set_src_caps_str(&raw("GRAY8", 32, 24));
    rig.harness
        .push_and_pull(blank(&info(&raw("GRAY8", 32, 24))))
        .unwrap();
    rig.harness.set_src_caps_str(&caps);
    rig.harness.push_and_pull(blank(&info(&caps))).unwrap();
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (64, 48));
    assert_eq!(rig.element.property::<String>("active-model"), "bicubic");
    assert!(rig.message(gst::MessageType::Warning).is_some());
    assert!(rig.message(gst::MessageType::Error).is_none());
}
