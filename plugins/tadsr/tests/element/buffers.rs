// SPDX-License-Identifier: MPL-2.0

//! Timestamps, flags and metas of buffers, invalid buffers, pools.

use gst::prelude::*;
use gst_video::VideoInfo;
use tadsr::frame::PixelFormat;

use crate::common::*;

#[test]
fn timestamps_offsets_and_flags_are_those_of_the_input() {
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
fn captions_timecodes_and_reference_timestamps_are_copied() {
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
    let copied = out
        .meta::<gst_video::VideoTimeCodeMeta>()
        .expect("timecode");
    assert_eq!(copied.tc().to_string(), timecode.to_string());
    let copied = out
        .meta::<gst::ReferenceTimestampMeta>()
        .expect("reference timestamp");
    assert_eq!(copied.timestamp(), gst::ClockTime::SECOND);
    let copied = out.meta::<gst_video::VideoAFDMeta>().expect("AFD");
    assert_eq!(copied.afd(), gst_video::VideoAFDValue::_43Full43Pillar);
}

#[test]
fn a_crop_of_the_negotiated_size_is_applied_and_no_crop_is_forwarded() {
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
fn pointer_coordinates_are_converted_to_the_input_size() {
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
fn a_wrong_video_meta_is_an_error() {
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
    let wrong = [
        with(vec![0, 128, 1 << 40], good.1.clone(), 16, 8),
        with(vec![0, 128, usize::MAX], good.1.clone(), 16, 8),
        with(good.0.clone(), vec![-16, 8, 8], 16, 8),
        with(good.0.clone(), vec![4, 8, 8], 16, 8),
        with(good.0.clone(), vec![i32::MAX; 3], 16, 8),
        with(good.0.clone(), good.1.clone(), 15, 8),
        with(good.0.clone(), good.1.clone(), 0, 0),
    ];
    let mut rig = Rig::raw(&[("scale", "2")], "I420", 16, 8);
    for buffer in wrong {
        assert_eq!(rig.harness.push(buffer), Err(gst::FlowError::Error));
        assert!(rig.message(gst::MessageType::Error).is_some());
    }
    let correct = with(good.0, good.1, 16, 8);
    assert_eq!(rig.harness.push(correct), Ok(gst::FlowSuccess::Ok));
}

#[test]
fn upstream_is_offered_a_pool_and_video_metas() {
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
