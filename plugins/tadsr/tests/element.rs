// SPDX-License-Identifier: MPL-2.0

//! Tests of the element in a harness: negotiation, colours, metadata, errors, properties.

mod common;

use common::{binding::SecondsBinding, *};
use gst::prelude::*;
use gst_video::{VideoInfo, prelude::*};
use tadsr::frame::PixelFormat;

fn caps(text: &str) -> gst::Caps {
    text.parse().unwrap()
}

/// Returns the caps that the sink pad accepts if downstream accepts `downstream`.
fn sink_caps(rig: &mut Rig, downstream: &str) -> gst::Caps {
    rig.harness.set_sink_caps_str(downstream);
    let pad = rig.element.static_pad("sink").unwrap();
    pad.query_caps(None)
}

// Negotiation

#[test]
fn upstream_is_asked_for_the_size_that_the_scale_makes_the_wanted_one() {
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
fn fractional_scales_make_exact_sizes() {
    let rig = Rig::raw(&[("scale", "1.5")], "I420", 322, 242);
    let info = rig.out_info();
    assert_eq!((info.width(), info.height()), (483, 363));

    let rig = Rig::raw(&[("scale", "1.5")], "I420", 321, 242);
    let error = rig.message(gst::MessageType::Error).unwrap();
    assert!(error.contains("321x242"), "{error}");
}

#[test]
fn without_a_wanted_size_frames_double() {
    let rig = Rig::raw(&[], "NV12", 321, 241);
    let info = rig.out_info();
    assert_eq!((info.width(), info.height()), (642, 482));
}

#[test]
fn scale_0_makes_the_size_that_downstream_wants_and_keeps_the_aspect() {
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
fn video_without_a_fixed_framerate_is_upscaled_like_any_other() {
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
fn scale_1_passes_buffers_through_untouched() {
    let mut rig = Rig::raw(&[("scale", "1")], "I420", 32, 24);
    let buffer = blank(&info(&raw("I420", 32, 24)));
    let address = buffer.as_ptr();
    let out = rig.harness.push_and_pull(buffer).unwrap();
    assert_eq!(out.as_ptr(), address);
    assert_eq!(rig.out_caps(), caps(&raw("I420", 32, 24)));
}

#[test]
fn the_format_stays_whatever_it_is() {
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
        assert!(rig.message(gst::MessageType::Error).is_none(), "said once");
    }
}

// Interlaced video

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
fn interlaced_video_passes_through_when_asked_to() {
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

// Colours in caps

#[test]
fn the_colours_that_the_input_implies_are_written_on_the_output() {
    for format in PixelFormat::ALL {
        // These heights cover all changes of GStreamer's defaults.
        for height in [16, 300, 576, 577, 700, 1000] {
            let input = raw(format.name(), 16, height);
            let rig = Rig::with_caps(&[("scale", "4")], &input);
            let out = rig.out_caps();
            let structure = out.structure(0).unwrap();
            let (before, after) = (info(&input), rig.out_info());
            assert!(structure.has_field("colorimetry"), "{out}");
            assert_eq!(after.colorimetry(), before.colorimetry(), "{input} {out}");
            if before.is_yuv() {
                assert_eq!(after.chroma_site(), before.chroma_site(), "{input} {out}");
            }
        }
    }
}

#[test]
fn colours_without_a_matrix_do_not_change_with_the_size() {
    for stated in ["2:0:0:0", "2:0:5:1", "1:0:0:0", "2:1:5:1"] {
        let input = raw("I420", 16, 300) + ",colorimetry=" + stated;
        let out = Rig::with_caps(&[("scale", "4")], &input).out_info();
        let (before, after) = (info(&input).colorimetry(), out.colorimetry());
        assert_eq!(after.matrix(), before.matrix(), "{stated}");
        assert_eq!(after.range(), before.range(), "{stated}");
        let stated: gst_video::VideoColorimetry = stated.parse().unwrap();
        assert_eq!(after.primaries(), stated.primaries(), "{stated:?}");
        assert_eq!(after.transfer(), stated.transfer(), "{stated:?}");
    }
}

#[test]
fn the_chroma_site_that_stated_colours_leave_open_is_written_as_it_is_taken() {
    for (height, site) in [(300, "jpeg"), (600, "mpeg2")] {
        let input = raw("I420", 16, height) + ",colorimetry=bt601";
        let out = Rig::with_caps(&[("scale", "4")], &input).out_caps();
        let structure = out.structure(0).unwrap();
        assert_eq!(structure.get::<&str>("chroma-site"), Ok(site), "{out}");
    }
}

#[test]
fn stated_colours_and_hdr_metadata_pass_through() {
    let light = "content-light-level=(string)1000:400";
    let display =
        "mastering-display-info=(string)34000:16000:13250:34500:7500:3000:15635:16450:10000000:1";
    let input = format!(
        "{},colorimetry=bt2100-pq,chroma-site=v-cosited+h-cosited,{light},{display}",
        raw("P010_10LE", 32, 24)
    );
    let rig = Rig::with_caps(&[("scale", "2")], &input);
    let mut expected = caps(&input);
    expected.make_mut().set("width", 64);
    expected.make_mut().set("height", 48);
    assert_eq!(rig.out_caps(), expected);
}

#[test]
fn upstream_is_not_asked_to_state_colours() {
    // Upstream caps must be a subset of the answer, so a field that they lack would exclude them.
    let rig = Rig::new(&[]);
    let sink = rig.element.static_pad("sink").unwrap();
    let input = caps(&raw("I420", 32, 24));
    assert!(input.is_subset(&sink.query_caps(Some(&input))));
}

#[test]
fn a_downstream_that_wants_other_colours_is_not_lied_to() {
    for (scale, wanted) in [
        ("0", "bt709"),
        ("1", "bt709"),
        ("2", "bt709"),
        ("2", "bt601"),
    ] {
        let mut rig = Rig::new(&[("scale", scale)]);
        rig.harness.play();
        rig.harness
            .set_sink_caps_str(&format!("video/x-raw,colorimetry={wanted}"));
        rig.harness.set_src_caps_str(&raw("I420", 32, 24));
        let pushed = rig.harness.push(blank(&info(&raw("I420", 32, 24))));
        let expected = match wanted {
            "bt601" => Ok(gst::FlowSuccess::Ok),
            _ => Err(gst::FlowError::NotNegotiated),
        };
        assert_eq!(pushed, expected, "scale={scale} {wanted}");
    }
}

// Buffers and their metadata

#[test]
fn times_offsets_and_flags_are_kept_for_every_frame() {
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 16, 8);
    let info = info(&raw("I420", 16, 8));
    let flags = gst::BufferFlags::CORRUPTED
        | gst::BufferFlags::DELTA_UNIT
        | gst::BufferFlags::GAP
        | gst::BufferFlags::DISCONT;
    for n in 0..10u64 {
        let mut buffer = blank(&info);
        let b = buffer.get_mut().unwrap();
        b.set_pts(gst::ClockTime::from_mseconds(n * 40));
        b.set_dts(gst::ClockTime::from_mseconds(n * 40 + 1));
        b.set_duration(gst::ClockTime::from_mseconds(40));
        b.set_offset(n);
        b.set_offset_end(n + 1);
        b.set_flags(flags);
        let out = rig.harness.push_and_pull(buffer.clone()).unwrap();
        assert_eq!(out.pts(), buffer.pts());
        assert_eq!(out.dts(), buffer.dts());
        assert_eq!(out.duration(), buffer.duration());
        assert_eq!((out.offset(), out.offset_end()), (n, n + 1));
        assert!(out.flags().contains(flags), "{:?}", out.flags());
    }
    assert_eq!(rig.harness.buffers_received(), 10);
}

#[test]
fn a_region_of_interest_grows_with_the_frame() {
    let mut rig = Rig::raw(&[("scale", "4")], "I420", 32, 24);
    let mut buffer = blank(&info(&raw("I420", 32, 24)));
    let mut roi =
        gst_video::VideoRegionOfInterestMeta::add(buffer.get_mut().unwrap(), "face", (3, 5, 10, 7));
    roi.set_id(7);
    roi.add_param(
        gst::Structure::builder("detection")
            .field("score", 0.5)
            .build(),
    );
    let out = rig.harness.push_and_pull(buffer).unwrap();
    let rois: Vec<_> = out
        .iter_meta::<gst_video::VideoRegionOfInterestMeta>()
        .collect();
    assert_eq!(rois.len(), 1);
    assert_eq!(rois[0].rect(), (12, 20, 40, 28));
    assert_eq!(rois[0].roi_type(), "face");
    assert_eq!(rois[0].id(), 7);
    let score = rois[0].param("detection").map(|p| p.get::<f64>("score"));
    assert_eq!(score, Some(Ok(0.5)));
}

#[test]
fn captions_timecodes_and_reference_times_are_kept() {
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 32, 24);
    let mut buffer = blank(&info(&raw("I420", 32, 24)));
    let b = buffer.get_mut().unwrap();
    gst_video::VideoCaptionMeta::add(b, gst_video::VideoCaptionType::Cea608Raw, &[0x80, 0x20]);
    let timecode = gst_video::ValidVideoTimeCode::new(
        gst::Fraction::new(25, 1),
        None,
        gst_video::VideoTimeCodeFlags::empty(),
        1,
        2,
        3,
        4,
        0,
    )
    .unwrap();
    gst_video::VideoTimeCodeMeta::add(b, &timecode);
    let reference = caps("timestamp/x-ntp");
    gst::ReferenceTimestampMeta::add(b, &reference, gst::ClockTime::SECOND, gst::ClockTime::NONE);
    gst_video::VideoAFDMeta::add(
        b,
        0,
        gst_video::VideoAFDSpec::AtscA53,
        gst_video::VideoAFDValue::_43Full43Pillar,
    );

    let out = rig.harness.push_and_pull(buffer).unwrap();
    let caption = out.meta::<gst_video::VideoCaptionMeta>().expect("caption");
    assert_eq!(caption.data(), [0x80, 0x20]);
    let kept = out
        .meta::<gst_video::VideoTimeCodeMeta>()
        .expect("timecode");
    assert_eq!(kept.tc().to_string(), timecode.to_string());
    let kept = out
        .meta::<gst::ReferenceTimestampMeta>()
        .expect("reference timestamp");
    assert_eq!(kept.timestamp(), gst::ClockTime::SECOND);
    let kept = out.meta::<gst_video::VideoAFDMeta>().expect("AFD");
    assert_eq!(kept.afd(), gst_video::VideoAFDValue::_43Full43Pillar);
}

#[test]
fn a_crop_is_applied_when_it_makes_the_promised_size_and_never_forwarded() {
    let whole = info(&raw("I420", 32, 24));
    for (crop, inside) in [((9, 5, 8, 8), true), ((9, 5, 7, 8), false)] {
        let mut rig = Rig::raw(&[("scale", "2"), ("strength", "0")], "I420", 8, 8);
        // Bright inside the rectangle, dark outside.
        let mut buffer = frame(&whole, |c, x, y| {
            let (x, y) = if c == 0 { (x, y) } else { (x * 2, y * 2) };
            let bright = (8..18).contains(&x) && (4..14).contains(&y);
            if bright { 200 } else { 60 }
        });
        let b = buffer.get_mut().unwrap();
        gst_video::VideoMeta::add_full(
            b,
            gst_video::VideoFrameFlags::empty(),
            whole.format(),
            whole.width(),
            whole.height(),
            whole.offset(),
            whole.stride(),
        )
        .unwrap();
        gst_video::VideoCropMeta::add(b, crop);
        let out = rig.harness.push_and_pull(buffer).unwrap();
        assert!(out.meta::<gst_video::VideoCropMeta>().is_none());
        let expected = if inside { 200 } else { 60 };
        for c in 0..3 {
            // Away from the edge of the rectangle.
            let got = samples(&out, &rig.out_info(), c);
            assert_eq!(got[0], expected, "component {c}");
        }
    }
}

#[test]
fn pointers_are_moved_back_to_where_the_input_has_them() {
    let mut rig = Rig::raw(&[("scale", "4")], "I420", 32, 24);
    rig.harness
        .push_and_pull(blank(&info(&raw("I420", 32, 24))))
        .unwrap();
    while rig.harness.try_pull_upstream_event().is_some() {}
    let event = gst_video::NavigationEvent::new_mouse_move(64.0, 48.0).build();
    assert!(rig.harness.push_upstream_event(event));
    let event = rig.harness.pull_upstream_event().unwrap();
    let structure = event.structure().unwrap();
    assert_eq!(structure.get::<f64>("pointer_x"), Ok(16.0));
    assert_eq!(structure.get::<f64>("pointer_y"), Ok(12.0));
}

#[test]
fn a_buffer_shorter_than_its_caps_is_an_error() {
    for format in PixelFormat::ALL {
        let mut rig = Rig::raw(&[("scale", "2")], format.name(), 16, 8);
        let whole = info(&raw(format.name(), 16, 8)).size();
        for size in [0, 1, whole / 2, whole - 1] {
            let buffer = gst::Buffer::from_mut_slice(vec![0u8; size]);
            assert_eq!(rig.harness.push(buffer), Err(gst::FlowError::Error));
            let error = rig.message(gst::MessageType::Error).unwrap();
            assert!(error.contains(&format!("{size} bytes")), "{error}");
        }
        // The element still works.
        let buffer = blank(&info(&raw(format.name(), 16, 8)));
        assert_eq!(rig.harness.push(buffer), Ok(gst::FlowSuccess::Ok));
    }
}

#[test]
fn a_video_meta_that_lies_is_an_error() {
    let info = info(&raw("I420", 16, 8));
    let good = (info.offset().to_vec(), info.stride().to_vec());
    let with = |offset: Vec<usize>, stride: Vec<i32>, width, height| {
        let mut buffer = blank(&info);
        gst_video::VideoMeta::add_full(
            buffer.get_mut().unwrap(),
            gst_video::VideoFrameFlags::empty(),
            gst_video::VideoFormat::I420,
            width,
            height,
            &offset,
            &stride,
        )
        .unwrap();
        buffer
    };
    let lies = [
        with(vec![0, 128, 1 << 40], good.1.clone(), 16, 8),
        with(vec![0, 128, usize::MAX], good.1.clone(), 16, 8),
        with(good.0.clone(), vec![-16, 8, 8], 16, 8),
        with(good.0.clone(), vec![4, 8, 8], 16, 8),
        with(good.0.clone(), vec![i32::MAX; 3], 16, 8),
        with(good.0.clone(), good.1.clone(), 15, 8),
        with(good.0.clone(), good.1.clone(), 0, 0),
    ];
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 16, 8);
    for lie in lies {
        assert_eq!(rig.harness.push(lie), Err(gst::FlowError::Error));
        assert!(rig.message(gst::MessageType::Error).is_some());
    }
    let truth = with(good.0, good.1, 16, 8);
    assert_eq!(rig.harness.push(truth), Ok(gst::FlowSuccess::Ok));
}

// Pixels

/// Upscales a frame of one colour. Without the network every sample keeps its value within one
/// step, with the network the mean does.
fn assert_colour_is_kept(input: &str, scale: &str, colour: [u16; 4]) {
    let mut rig = Rig::with_caps(&[("scale", scale)], input);
    let flat = frame(&info(input), |c, _, _| colour[c]);
    let info = rig.out_info();
    for strength in [0.0, 1.0] {
        rig.element.set_property("strength", strength);
        let out = rig.harness.push_and_pull(flat.clone()).unwrap();
        for (c, wanted) in colour.into_iter().enumerate() {
            if c as u32 == info.n_components() {
                break;
            }
            let samples = samples(&out, &info, c);
            let depth = info.comp_depth(c as u8);
            let what =
                format!("{input} x{scale} strength={strength} component {c} is not {wanted}");
            if strength == 0.0 {
                let close = |v: &u16| v.abs_diff(wanted) <= 1;
                assert!(samples.iter().all(close), "{what}: {samples:?}");
            } else {
                let sum: f64 = samples.iter().map(|&v| f64::from(v)).sum();
                let mean = sum / samples.len() as f64;
                let step = f64::from(1 << (depth - 8));
                assert!(
                    (mean - f64::from(wanted)).abs() <= 2.0 * step,
                    "{what}: {mean}"
                );
            }
        }
    }
}

const COLOURS: [[u16; 4]; 3] = [
    [180, 90, 160, 255],
    [40, 140, 110, 10],
    [126, 128, 128, 128],
];

#[test]
fn one_colour_stays_that_colour_in_every_format_matrix_and_range() {
    for format in PixelFormat::ALL {
        let unit = 1 << (format.depth() - 8);
        let ranges_and_matrices: &[&str] = if format.is_rgb() {
            &["1:1:5:1", "2:1:5:1"]
        } else {
            &[
                "1:3:5:1", "2:3:5:1", "1:4:16:4", "2:4:16:4", "1:6:13:7", "2:6:13:7",
            ]
        };
        for colorimetry in ranges_and_matrices {
            for colour in COLOURS {
                let input = raw(format.name(), 12, 10) + ",colorimetry=" + colorimetry;
                assert_colour_is_kept(&input, "2", colour.map(|v| v * unit));
            }
        }
        for scale in ["1.5", "3", "4"] {
            let colour = COLOURS[0].map(|v| v * unit);
            assert_colour_is_kept(&raw(format.name(), 12, 10), scale, colour);
        }
    }
}

#[test]
fn tiny_and_odd_sizes_work_in_every_format() {
    for format in PixelFormat::ALL {
        let unit = 1 << (format.depth() - 8);
        for (width, height) in [(1, 1), (1, 7), (5, 1), (2, 3), (7, 5)] {
            for scale in ["2", "3", "4"] {
                let colour = COLOURS[0].map(|v| v * unit);
                assert_colour_is_kept(&raw(format.name(), width, height), scale, colour);
            }
        }
    }
}

#[test]
fn padding_between_rows_and_planes_is_not_read_as_picture() {
    for format in ["I420", "YV12", "NV12", "P010_10LE", "RGB", "GRAY8"] {
        let tight = info(&raw(format, 10, 6));
        let strides: Vec<i32> = tight.stride().iter().map(|s| s + 22).collect();
        let mut offsets = vec![];
        let mut end = 17;
        for (plane, stride) in strides.iter().enumerate() {
            offsets.push(end);
            let c = (0..tight.n_components()).find(|&c| tight.comp_plane(c as u8) == plane as u32);
            end += *stride as usize * tight.comp_height(c.unwrap() as u8) as usize + 5;
        }
        let picture = |c: usize, x: usize, y: usize| (30 + 20 * c + 5 * x + 7 * y) as u16;
        let packed = frame(&tight, picture);

        let mut padded = gst::Buffer::from_mut_slice(vec![0xEEu8; end]);
        let b = padded.get_mut().unwrap();
        gst_video::VideoMeta::add_full(
            b,
            gst_video::VideoFrameFlags::empty(),
            tight.format(),
            10,
            6,
            &offsets,
            &strides,
        )
        .unwrap();
        let source = gst_video::VideoFrameRef::from_buffer_ref_readable(&packed, &tight).unwrap();
        let mut target = gst_video::VideoFrameRef::from_buffer_ref_writable(b, &tight).unwrap();
        source.copy(&mut target).unwrap();
        drop(target);

        let mut rig = Rig::raw(&[("scale", "2")], format, 10, 6);
        let from_packed = rig.harness.push_and_pull(packed.clone()).unwrap();
        let from_padded = rig.harness.push_and_pull(padded).unwrap();
        let info = rig.out_info();
        for c in 0..info.n_components() as usize {
            let (a, b) = (
                samples(&from_packed, &info, c),
                samples(&from_padded, &info, c),
            );
            assert_eq!(a, b, "{format} component {c}");
        }
    }
}

#[test]
fn planes_may_lie_in_memories_of_their_own() {
    let info = info(&raw("I420", 10, 6));
    let whole = frame(&info, |c, x, y| (30 + 20 * c + 5 * x + 7 * y) as u16);
    let bytes = whole.map_readable().unwrap().to_vec();
    let mut split = gst::Buffer::new();
    let ends = [info.offset()[1], info.offset()[2], info.size()];
    for (start, end) in info.offset().iter().zip(ends) {
        let memory = gst::Memory::from_slice(bytes[*start..end].to_vec());
        split.get_mut().unwrap().append_memory(memory);
    }
    assert_eq!(split.n_memory(), 3);
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 10, 6);
    let from_whole = rig.harness.push_and_pull(whole).unwrap();
    let from_split = rig.harness.push_and_pull(split).unwrap();
    for c in 0..3 {
        let info = rig.out_info();
        assert_eq!(
            samples(&from_whole, &info, c),
            samples(&from_split, &info, c)
        );
    }
}

#[test]
fn rows_are_written_as_far_apart_as_downstream_wants_them() {
    for format in ["I420", "YV12", "P010_10LE", "BGRA"] {
        let input = frame(&info(&raw(format, 10, 6)), |c, x, y| {
            (30 + 20 * c + 5 * x + 7 * y) as u16
        });
        let mut plain = Rig::raw(&[("scale", "2")], format, 10, 6);
        let expected = plain.harness.push_and_pull(input.clone()).unwrap();

        let mut rig = Rig::new(&[("scale", "2")]);
        let src = rig.element.static_pad("src").unwrap();
        src.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, |_, probe| {
            let Some(gst::PadProbeData::Query(query)) = &mut probe.data else {
                return gst::PadProbeReturn::Ok;
            };
            let gst::QueryViewMut::Allocation(query) = query.view_mut() else {
                return gst::PadProbeReturn::Ok;
            };
            propose_padded_pool(query);
            gst::PadProbeReturn::Handled
        });
        rig.harness.play();
        rig.harness.set_src_caps_str(&raw(format, 10, 6));
        let got = rig.harness.push_and_pull(input).unwrap();

        let info = rig.out_info();
        let meta = got.meta::<gst_video::VideoMeta>().expect("video meta");
        assert!(
            meta.stride()[0] > info.stride()[0],
            "{format} {:?}",
            meta.stride()
        );
        for c in 0..info.n_components() as usize {
            let (a, b) = (samples(&expected, &info, c), samples(&got, &info, c));
            assert_eq!(a, b, "{format} component {c}");
        }
    }
}

/// Proposes a pool whose frames have padding around the picture.
fn propose_padded_pool(query: &mut gst::query::Allocation) {
    let caps = query.get_owned().0.expect("caps");
    let size = VideoInfo::from_caps(&caps).unwrap().size() as u32;
    let pool = gst_video::VideoBufferPool::new();
    let mut config = pool.config();
    config.set_params(Some(&caps), size, 0, 0);
    config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
    config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_ALIGNMENT);
    config.set_video_alignment(&gst_video::VideoAlignment::new(2, 4, 16, 34, &[15; 4]));
    pool.set_config(config).unwrap();
    query.add_allocation_pool(Some(&pool), size, 0, 0);
    query.add_allocation_meta::<gst_video::VideoMeta>(None);
}

#[test]
fn the_two_orders_of_chroma_planes_give_the_same_picture() {
    let picture = |c: usize, x: usize, y: usize| (40 + 50 * c + 3 * x + 2 * y) as u16;
    let upscaled = ["I420", "YV12", "NV12"].map(|format| {
        let mut rig = Rig::raw(&[("scale", "2")], format, 16, 12);
        let input = frame(&info(&raw(format, 16, 12)), picture);
        let out = rig.harness.push_and_pull(input).unwrap();
        let info = rig.out_info();
        [0, 1, 2].map(|c| samples(&out, &info, c))
    });
    assert_eq!(upscaled[0], upscaled[1]);
    assert_eq!(upscaled[0], upscaled[2]);
    assert_ne!(upscaled[0][1], upscaled[0][2]);
}

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
    let mut rig = Rig::raw(&[("scale", "2"), ("model", "tiny-dial")], "GRAY8", 32, 24);
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

// Properties and errors

#[test]
fn a_controlled_strength_follows_the_time_of_the_frames() {
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
        let picture = samples(&out, &rig.out_info(), 0);
        (picture, element.property::<f64>("strength"))
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
fn a_model_that_is_not_there_fails_the_start_and_is_named() {
    let (element, bus) = element(&[("model", "/no/such/model.safetensors")]);
    assert!(element.set_state(gst::State::Paused).is_err());
    let error = message(&bus, gst::MessageType::Error).unwrap();
    assert!(error.contains("/no/such/model.safetensors"), "{error}");
    element.set_state(gst::State::Null).unwrap();
}

#[test]
fn a_file_that_is_no_model_fails_the_start_and_is_named() {
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
fn the_fallback_replaces_a_model_that_is_not_there() {
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
fn a_device_that_is_not_there_is_an_error_or_becomes_the_cpu() {
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
fn values_that_mean_nothing_fail_the_start_whatever_the_fallback() {
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
fn the_active_model_and_device_are_told_while_running() {
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
        assert!(pushed < 10_000, "the model never took over");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(rig.harness.push(blank(&input)), Ok(gst::FlowSuccess::Ok));
    assert_eq!(rig.harness.buffers_received(), pushed + 1);
    assert!(rig.message(gst::MessageType::Warning).is_none());
}

#[test]
fn a_model_that_fails_while_running_leaves_the_old_one_in_place() {
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
fn a_scale_beyond_the_model_set_while_running_is_refused_with_the_models_largest() {
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
fn a_scale_beyond_the_model_set_while_running_falls_back_without_losing_a_frame() {
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
    let picture = samples(&out, &rig.out_info(), 0);
    assert_eq!((rig.out_info().width(), rig.out_info().height()), (64, 32));
    assert_eq!(rig.element.property::<String>("active-model"), "bicubic");
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("at most 2"), "{warning}");
    assert!(rig.message(gst::MessageType::Error).is_none());

    let mut plain = Rig::raw(&[("scale", "4"), ("strength", "0")], "GRAY8", 16, 8);
    let expected = plain.harness.push_and_pull(input.clone()).unwrap();
    assert_eq!(picture, samples(&expected, &plain.out_info(), 0));

    // The fallback stays for new caps before the next frame.
    rig.harness.set_src_caps_str(&raw("GRAY8", 8, 8));
    let buffer = blank(&info(&raw("GRAY8", 8, 8)));
    rig.harness.push_and_pull(buffer).unwrap();
    assert_eq!(rig.out_info().width(), 32);
    assert!(rig.message(gst::MessageType::Warning).is_none());
}

#[test]
fn new_input_and_a_scale_beyond_the_model_at_once_fall_back() {
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

#[test]
fn frames_that_are_too_late_are_left_out_and_counted() {
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
fn an_element_starts_again_after_it_was_stopped() {
    let (element, _bus) = element(&[]);
    for _ in 0..3 {
        element.set_state(gst::State::Paused).unwrap();
        assert!(element.property::<Option<String>>("active-model").is_some());
        element.set_state(gst::State::Null).unwrap();
        assert_eq!(element.property::<Option<String>>("active-model"), None);
    }
}

#[test]
fn upstream_is_offered_a_pool_with_room_for_strides() {
    let rig = Rig::raw(&[("scale", "2")], "I420", 32, 24);
    let input = caps(&raw("I420", 32, 24));
    let mut query = gst::query::Allocation::new(Some(&input), true);
    let sink = rig.element.static_pad("sink").unwrap();
    assert!(sink.query(&mut query));
    let size = VideoInfo::from_caps(&input).unwrap().size() as u32;
    assert!(query.allocation_pools().any(|pool| pool.1 >= size));
    let meta = query.find_allocation_meta::<gst_video::VideoMeta>();
    assert!(meta.is_some());
}
