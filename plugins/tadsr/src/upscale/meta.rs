// SPDX-License-Identifier: MPL-2.0

//! Metas and navigation events, whose coordinates depend on the frame size.

use gst::prelude::*;
use gst_video::{
    VideoCropMeta, VideoInfo, VideoRegionOfInterestMeta, video_meta::VideoMetaTransformScale,
};

/// Treatment of a meta of an input buffer.
pub(super) enum Treatment {
    /// Copied unchanged.
    Copy,
    /// Copied with [`copy_scaled`].
    Scale,
    /// Not copied.
    Drop,
    /// Left to the base class.
    Default,
}

impl Treatment {
    /// Returns the treatment of `meta`.
    pub fn of(meta: &gst::MetaRef<gst::Meta>) -> Self {
        if meta.api() == VideoCropMeta::meta_api() {
            // Applied when the input frame is read.
            Self::Drop
        } else if meta.has_tag::<gst_video::video_meta::tags::Size>() {
            Self::Scale
        } else if meta.tags_contain_only(&["video", "orientation", "colorspace"]) {
            Self::Copy
        } else {
            Self::Default
        }
    }
}

/// Adds `meta` to `outbuf`, scaled from the size of `input` to that of `output`.
///
/// # Errors
/// Fails if the meta cannot be scaled.
pub(super) fn copy_scaled(
    outbuf: &mut gst::BufferRef,
    meta: &gst::MetaRef<gst::Meta>,
    input: &VideoInfo,
    output: &VideoInfo,
) -> Result<(), gst::glib::BoolError> {
    if let Some(roi) = meta.downcast_ref::<VideoRegionOfInterestMeta>() {
        add_scaled_roi(outbuf, roi, input, output);
        return Ok(());
    }
    meta.transform(outbuf, &VideoMetaTransformScale::new(input, output))
}

/// Adds the scaled region `roi` to `outbuf`. The transform function of the meta would lose its
/// parameters.
fn add_scaled_roi(
    outbuf: &mut gst::BufferRef,
    roi: &VideoRegionOfInterestMeta,
    input: &VideoInfo,
    output: &VideoInfo,
) {
    let scaled = |v: u32, to: u32, from: u32| {
        // A region outside the frame may exceed 32 bits.
        (u64::from(v) * u64::from(to) / u64::from(from)).min(u32::MAX.into()) as u32
    };
    let (x, y, w, h) = roi.rect();
    let rect = (
        scaled(x, output.width(), input.width()),
        scaled(y, output.height(), input.height()),
        scaled(w, output.width(), input.width()),
        scaled(h, output.height(), input.height()),
    );
    let mut copy = VideoRegionOfInterestMeta::add(outbuf, roi.roi_type(), rect);
    copy.set_id(roi.id());
    copy.set_parent_id(roi.parent_id());
    for param in roi.params() {
        copy.add_param(param.to_owned());
    }
}

/// Converts the pointer coordinates of a navigation event from the size of `output` to that of
/// `input`.
pub(super) fn scale_pointer(event: &mut gst::EventRef, input: &VideoInfo, output: &VideoInfo) {
    let structure = event.structure_mut();
    for (field, from, to) in [
        ("pointer_x", output.width(), input.width()),
        ("pointer_y", output.height(), input.height()),
    ] {
        if let Ok(v) = structure.get::<f64>(field) {
            structure.set(field, v * f64::from(to) / f64::from(from));
        }
    }
}
