// SPDX-License-Identifier: MPL-2.0

//! Colorimetry and chroma site in caps.

use gst::prelude::*;
use tadsr::frame::PixelFormat;

use crate::common::*;

#[test]
fn implied_colours_are_stated_in_the_output_caps() {
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
fn a_chroma_site_that_stated_colours_leave_open_is_stated() {
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
fn upstream_need_not_state_colours() {
    // Upstream caps must be a subset of the answer, so a field that they lack would exclude them.
    let rig = Rig::new(&[]);
    let sink = rig.element.static_pad("sink").unwrap();
    let input = caps(&raw("I420", 32, 24));
    assert!(input.is_subset(&sink.query_caps(Some(&input))));
}

#[test]
fn a_downstream_that_requires_other_colours_is_refused() {
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
