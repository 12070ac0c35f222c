// SPDX-License-Identifier: MPL-2.0

//! Samples of the output in all formats and memory layouts.

use gst::prelude::*;
use gst_video::{VideoInfo, prelude::*};
use tadsr::frame::PixelFormat;

use crate::common::*;

/// Upscales a frame of one colour. Without the network every sample keeps its value within one
/// step, with the network the mean does.
fn assert_flat_colour(input: &str, scale: &str, colour: [u16; 4]) {
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
            let text =
                format!("{input} x{scale} strength={strength} component {c} is not {wanted}");
            if strength == 0.0 {
                let close = |v: &u16| v.abs_diff(wanted) <= 1;
                assert!(samples.iter().all(close), "{text}: {samples:?}");
            } else {
                let sum: f64 = samples.iter().map(|&v| f64::from(v)).sum();
                let mean = sum / samples.len() as f64;
                let step = f64::from(1 << (depth - 8));
                assert!(
                    (mean - f64::from(wanted)).abs() <= 2.0 * step,
                    "{text}: {mean}"
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
fn a_flat_colour_is_kept_in_every_format_matrix_and_range() {
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
                assert_flat_colour(&input, "2", colour.map(|v| v * unit));
            }
        }
        for scale in ["1.5", "3", "4"] {
            let colour = COLOURS[0].map(|v| v * unit);
            assert_flat_colour(&raw(format.name(), 12, 10), scale, colour);
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
                assert_flat_colour(&raw(format.name(), width, height), scale, colour);
            }
        }
    }
}

#[test]
fn padding_between_rows_and_planes_is_ignored() {
    for format in [
        "I420",
        "YV12",
        "NV12",
        "P010_10LE",
        "RGB",
        "GRAY8",
        "YUY2",
        "A420",
        "GBR",
        "xRGB",
        "ARGB64_LE",
    ] {
        let tight = info(&raw(format, 10, 6));
        let strides: Vec<i32> = tight.stride().iter().map(|s| s + 22).collect();
        let mut offsets = vec![];
        let mut end = 17;
        for (plane, stride) in strides.iter().enumerate() {
            offsets.push(end);
            let c = (0..tight.n_components()).find(|&c| tight.comp_plane(c as u8) == plane as u32);
            end += *stride as usize * tight.comp_height(c.unwrap() as u8) as usize + 5;
        }
        let image = |c: usize, x: usize, y: usize| (30 + 20 * c + 5 * x + 7 * y) as u16;
        let packed = frame(&tight, image);

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
fn planes_may_have_separate_memories() {
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
fn output_rows_have_the_stride_of_the_downstream_pool() {
    for format in [
        "I420",
        "YV12",
        "P010_10LE",
        "BGRA",
        "UYVY",
        "A420",
        "RGBA64_LE",
    ] {
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

/// Proposes a pool whose frames have padding on all sides.
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
fn the_order_of_chroma_planes_does_not_change_the_result() {
    let image = |c: usize, x: usize, y: usize| (40 + 50 * c + 3 * x + 2 * y) as u16;
    let upscaled = ["I420", "YV12", "NV12"].map(|format| {
        let mut rig = Rig::raw(&[("scale", "2")], format, 16, 12);
        let input = frame(&info(&raw(format, 16, 12)), image);
        let out = rig.harness.push_and_pull(input).unwrap();
        let info = rig.out_info();
        [0, 1, 2].map(|c| samples(&out, &info, c))
    });
    assert_eq!(upscaled[0], upscaled[1]);
    assert_eq!(upscaled[0], upscaled[2]);
    assert_ne!(upscaled[0][1], upscaled[0][2]);
}

#[test]
fn packed_pixels_become_the_samples_of_planes() {
    let image = |c: usize, x: usize, y: usize| (40 + 50 * c + 3 * x + 2 * y) as u16;
    for formats in [
        &["Y42B", "NV16", "YUY2", "UYVY", "YVYU", "VYUY"][..],
        &["RGBA", "BGRA", "ARGB", "ABGR"],
        &["RGB", "BGR", "RGBx", "BGRx", "xRGB", "xBGR", "GBR"],
    ] {
        for (width, height) in [(1, 3), (16, 12), (17, 5)] {
            let upscaled = |format: &str| {
                let mut rig = Rig::raw(&[("scale", "1.5")], format, 2 * width, 2 * height);
                let input = frame(&info(&raw(format, 2 * width, 2 * height)), image);
                let even = rig.harness.push_and_pull(input).unwrap();
                let even = all_samples(&even, &rig.out_info());
                let mut rig = Rig::raw(&[("scale", "3")], format, width, height);
                let input = frame(&info(&raw(format, width, height)), image);
                let odd = rig.harness.push_and_pull(input).unwrap();
                [even, all_samples(&odd, &rig.out_info())]
            };
            let first = upscaled(formats[0]);
            for format in &formats[1..] {
                assert!(upscaled(format) == first, "{format} {width}x{height}");
            }
        }
    }
}

fn all_samples(buffer: &gst::Buffer, info: &VideoInfo) -> Vec<Vec<u16>> {
    (0..info.n_components() as usize)
        .map(|c| samples(buffer, info, c))
        .collect()
}

fn as_rgba(buffer: &gst::Buffer, from: &VideoInfo) -> Vec<Vec<u16>> {
    let to = info(&raw("RGBA", from.width(), from.height()));
    let source = gst_video::VideoFrame::from_buffer_readable(buffer.clone(), from).unwrap();
    let mut target = gst_video::VideoFrame::from_buffer_writable(blank(&to), &to).unwrap();
    gst_video::VideoConverter::new(from, &to, None)
        .unwrap()
        .frame(&source, &mut target);
    all_samples(&target.into_buffer(), &to)
}

/// GStreamer converts the frame before and after the element.
#[test]
fn gstreamer_shows_the_same_picture_after_the_element_in_every_format() {
    for format in PixelFormat::ALL {
        let unit = 1 << (format.depth() - 8);
        // GStreamer converts the last column of VYUY of odd width to another colour.
        let (width, height) = (24, 13);
        let input = info(&raw(format.name(), width, height));
        let soft = frame(&input, |c, x, y| {
            let value = match c {
                1 | 2 if !format.is_rgb() => 100 + 10 * c + x + 2 * y,
                _ => 90 + 20 * c + 2 * x + 3 * y,
            };
            value as u16 * unit
        });
        let properties = &[("scale", "2"), ("strength", "0")];
        let mut rig = Rig::raw(properties, format.name(), width, height);
        let out = rig.harness.push_and_pull(soft.clone()).unwrap();
        let got = as_rgba(&out, &rig.out_info());

        let mut rig = Rig::raw(properties, "RGBA", width, height);
        let rgba = info(&raw("RGBA", width, height));
        let before = as_rgba(&soft, &input);
        let converted = frame(&rgba, |c, x, y| before[c][y * width as usize + x]);
        let out = rig.harness.push_and_pull(converted).unwrap();
        // GStreamer takes the x of RGBx for alpha.
        let components = if format.has_alpha() { 4 } else { 3 };
        let want = all_samples(&out, &rig.out_info());
        for (c, want) in want.iter().enumerate().take(components) {
            let worst = got[c].iter().zip(want).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(worst.unwrap() <= 6, "{format:?} component {c}: {worst:?}");
        }
    }
}
