// SPDX-License-Identifier: MPL-2.0

//! Negotiation: caps of one pad from those of the other, reasons to refuse caps, and the negotiated
//! formats.

use std::sync::LazyLock;

use gst::prelude::*;
use gst_video::{VideoColorimetry, VideoInfo, VideoInterlaceMode};
use tadsr::frame::{FrameInfo, MAX_SIDE, PixelFormat};

use super::{
    Fallback, gstcuda, planes,
    scale::{Scale, invalid_scale, overscale},
};

/// Formats of both pads.
#[derive(Clone)]
pub(super) struct Negotiated {
    pub input: VideoInfo,
    pub output: VideoInfo,
    /// Input frames as the library describes them.
    pub in_frame: FrameInfo,
    /// Input buffers are in CUDA memory.
    pub in_cuda: bool,
    /// Output buffers are in CUDA memory.
    pub out_cuda: bool,
}

impl Negotiated {
    /// Returns `None` if the library does not support the format.
    pub fn new(
        incaps: &gst::Caps,
        input: &VideoInfo,
        outcaps: &gst::Caps,
        output: &VideoInfo,
    ) -> Option<Self> {
        Some(Self {
            input: input.clone(),
            output: output.clone(),
            in_frame: planes::frame_info(input, incaps)?,
            in_cuda: in_cuda_memory(incaps),
            out_cuda: in_cuda_memory(outcaps),
        })
    }

    /// Returns the output frames as the library describes them, with the colours of the input.
    pub fn out_frame(&self) -> FrameInfo {
        let (width, height) = (self.output.width(), self.output.height());
        self.in_frame.with_size(width as usize, height as usize)
    }

    /// Returns the larger of the factors for width and height.
    pub fn scale(&self) -> f64 {
        let x = f64::from(self.output.width()) / f64::from(self.input.width());
        let y = f64::from(self.output.height()) / f64::from(self.input.height());
        x.max(y)
    }

    /// Returns true if frames pass through unchanged: the size does not change and the model does
    /// not restore at a scale of 1.
    pub fn passes_through(&self, native_scale: Option<f64>) -> bool {
        let size = |info: &VideoInfo| (info.width(), info.height());
        let progressive = self.input.interlace_mode() == VideoInterlaceMode::Progressive;
        size(&self.input) == size(&self.output)
            && self.in_cuda == self.out_cuda
            && !(progressive && native_scale == Some(1.0))
    }

    /// Returns the duration of `frames` frames; 0 without a fixed frame rate.
    pub fn duration(&self, frames: usize) -> gst::ClockTime {
        let fps = self.input.fps();
        let (Ok(num @ 1..), Ok(den)) = (u64::try_from(fps.numer()), u64::try_from(fps.denom()))
        else {
            return gst::ClockTime::ZERO;
        };
        let nanoseconds =
            (frames as u64 * den).mul_div_ceil(gst::ClockTime::SECOND.nseconds(), num);
        gst::ClockTime::from_nseconds(nanoseconds.unwrap_or(0))
    }
}

/// Conditions that decide which caps are possible.
pub(super) struct Rules {
    /// Value of the property `scale`.
    pub requested: f64,
    /// Scale in force; `None` if `requested` is invalid.
    pub scale: Option<Scale>,
    /// Maximum scale of the model, if one is loaded.
    pub max_scale: Option<f64>,
    pub fallback: Fallback,
    /// Buffers may be in CUDA memory.
    pub cuda: bool,
}

impl Rules {
    /// Returns the caps of the other pad for `caps` at the pad with direction `from`.
    pub fn transform(&self, from: gst::PadDirection, caps: &gst::Caps) -> gst::Caps {
        let mut result = gst::Caps::new_empty();
        let Some(scale) = self.scale else {
            return result;
        };
        // Alternatives that move frames between system and CUDA memory come last.
        let mut moved = gst::Caps::new_empty();
        for (structure, features) in caps.iter_with_features() {
            let cuda = is_cuda(features);
            if scale.is_identity() {
                result.merge(with_features(structure.to_owned(), features));
                continue;
            }
            // Frames in CUDA memory cannot be upscaled without CUDA.
            if cuda && !self.cuda {
                continue;
            }
            if let Some(scaled) = self.scaled(scale, from, structure) {
                if self.cuda {
                    moved.merge(in_memory(scaled.clone(), !cuda));
                }
                result.merge(if cuda {
                    in_memory(scaled, true)
                } else {
                    with_features(scaled, features)
                });
            }
            let stream = from == gst::PadDirection::Sink && caps.is_fixed();
            if self.passes_interlaced()
                && let Some(interlaced) = interlaced(structure, stream)
            {
                result.merge(with_features(interlaced, features));
            }
        }
        result.merge(moved);
        if self.cuda && from == gst::PadDirection::Src {
            // Upstream should prefer CUDA memory, where the frames are used.
            let mut cuda_first = result.intersect(&CUDA_CAPS);
            cuda_first.merge(result);
            return cuda_first;
        }
        result
    }

    /// Scales the part of `structure` that is not passed through as interlaced video.
    ///
    /// Without the fallback to passthrough, interlaced caps are scaled too: they are refused when
    /// they are set, with a reason that a failed negotiation could not give.
    fn scaled(
        &self,
        scale: Scale,
        from: gst::PadDirection,
        structure: &gst::StructureRef,
    ) -> Option<gst::Structure> {
        if self.passes_interlaced() {
            let progressive = progressive(structure)?;
            scale.transform(from, &progressive)
        } else {
            scale.transform(from, structure)
        }
    }

    fn passes_interlaced(&self) -> bool {
        self.fallback == Fallback::Passthrough
    }

    /// Chooses size and pixel aspect ratio in `outcaps` for the fixed `incaps`, and states the
    /// colours of the input.
    pub fn fixate(&self, incaps: &gst::Caps, outcaps: &mut gst::Caps) {
        if let (Some(scale), Some(input)) = (self.scale, incaps.structure(0))
            && let Some(output) = outcaps.make_mut().structure_mut(0)
        {
            scale.fixate(input, output);
            state_colorimetry(output, input);
            state_chroma_site(output, input);
        }
    }

    /// Returns a reason why the fixed input `caps` cannot be upscaled to a size that the caps
    /// `downstream` allow, if only the size is in the way.
    pub fn size_refusal(&self, caps: &gst::Caps, downstream: &gst::Caps) -> Option<String> {
        let possible = self.transform(gst::PadDirection::Sink, caps);
        if possible.is_empty() || possible.can_intersect(downstream) {
            return None;
        }
        let wanted = without_size(&possible);
        let mut fits = gst::Caps::new_empty();
        for (structure, features) in downstream.iter_with_features() {
            let one = with_features(structure.to_owned(), features);
            if one.can_intersect(&wanted) {
                fits.merge(one);
            }
        }
        let (from, to, needed) = (size_text(caps)?, size_text(&possible)?, size_text(&fits)?);
        Some(format!(
            "Video of {from} pixels can become {to}, and downstream needs {needed}: choose another \
             size there or another model, or put 'videoscale' after this element"
        ))
    }

    /// Returns a reason why the fixed input `caps` cannot be upscaled, if there is one that
    /// explains more than "not negotiated".
    pub fn refusal(&self, caps: &gst::CapsRef) -> Option<String> {
        let structure = caps.structure(0)?;
        let mode = structure
            .get::<&str>("interlace-mode")
            .unwrap_or("progressive");
        let progressive = mode == "progressive";
        if !progressive && !self.passes_interlaced() {
            return Some(format!(
                "Interlaced video (interlace-mode={mode}) cannot be upscaled: \
                 put 'deinterlace' before this element or set fallback=passthrough"
            ));
        }
        if structure.get::<&str>("multiview-mode") == Ok("separated") {
            return Some("Video with a separate buffer per view cannot be upscaled".into());
        }
        let width = structure.get::<i32>("width").ok()?;
        let height = structure.get::<i32>("height").ok()?;
        let Some(scale) = self.scale else {
            return Some(invalid_scale(self.requested));
        };
        if !progressive {
            return None;
        }
        // Bicubic interpolation supports every scale.
        if self.fallback != Fallback::Bicubic
            && let Some(reason) = self
                .max_scale
                .and_then(|max| overscale(self.requested, max))
        {
            return Some(reason);
        }
        let scaled = scale.transform(gst::PadDirection::Sink, structure);
        scaled.is_none().then(|| {
            format!(
                "{width}x{height} times {} is not a size in whole pixels up to {MAX_SIDE}: \
                 choose another scale or crop the video before this element",
                self.requested
            )
        })
    }
}

/// Returns `caps` for any size.
fn without_size(caps: &gst::Caps) -> gst::Caps {
    let mut caps = caps.copy();
    for structure in caps.make_mut().iter_mut() {
        structure.remove_fields(["width", "height"]);
    }
    caps
}

/// Returns width and height of the first structure of `caps`, such as `640 x [ 240, 480 ]`.
fn size_text(caps: &gst::CapsRef) -> Option<String> {
    let structure = caps.structure(0)?;
    let side = |name| structure.value(name).ok()?.serialize().ok();
    Some(format!("{} x {}", side("width")?, side("height")?))
}

/// Returns the caps of both pad templates.
pub(super) fn template() -> gst::Caps {
    let formats = PixelFormat::ALL.map(|f| gst_video::VideoFormat::from_string(f.name()));
    let mut caps = gst_video::VideoCapsBuilder::new()
        .format_list(formats)
        .width_range(1..=MAX_SIDE as i32)
        .height_range(1..=MAX_SIDE as i32)
        .build();
    caps.merge(CUDA_CAPS.clone());
    caps
}

/// Frames in CUDA memory. Both sides are even, because GstCuda lets the chroma planes of odd sizes
/// overlap.
static CUDA_CAPS: LazyLock<gst::Caps> = LazyLock::new(|| {
    let even = gst::IntRange::with_step(2, MAX_SIDE as i32 / 2 * 2, 2);
    gst_video::VideoCapsBuilder::new()
        .features([gstcuda::FEATURE])
        .format_list(gstcuda::FORMATS)
        .field("width", even)
        .field("height", even)
        .build()
});

/// Returns true if frames with `caps` are in CUDA memory.
pub(super) fn in_cuda_memory(caps: &gst::CapsRef) -> bool {
    caps.features(0).is_some_and(is_cuda)
}

fn is_cuda(features: &gst::CapsFeaturesRef) -> bool {
    features.contains(gstcuda::FEATURE)
}

fn with_features(structure: gst::Structure, features: &gst::CapsFeaturesRef) -> gst::Caps {
    let mut caps = gst::Caps::new_empty();
    caps.make_mut()
        .append_structure_full(structure, Some(features.to_owned()));
    caps
}

/// Returns caps for `structure` in CUDA or system memory; empty if CUDA memory cannot hold such
/// frames.
fn in_memory(structure: gst::Structure, cuda: bool) -> gst::Caps {
    if cuda {
        let features = gst::CapsFeatures::new([gstcuda::FEATURE]);
        with_features(structure, &features).intersect(&CUDA_CAPS)
    } else {
        gst::Caps::from(structure)
    }
}

const INTERLACED: [&str; 4] = ["interleaved", "mixed", "fields", "alternate"];

/// Returns the progressive part of `structure`, which includes one without an interlace mode.
fn progressive(structure: &gst::StructureRef) -> Option<gst::Structure> {
    with_interlace_modes(structure, &["progressive"])
}

/// Returns the interlaced part of `structure`. Without an interlace mode, a `stream` is
/// progressive, and other caps allow any mode.
fn interlaced(structure: &gst::StructureRef, stream: bool) -> Option<gst::Structure> {
    if stream && !structure.has_field("interlace-mode") {
        return None;
    }
    let mut result = with_interlace_modes(structure, &INTERLACED)?;
    if !result.has_field("interlace-mode") {
        result.set("interlace-mode", gst::List::new(INTERLACED));
    }
    Some(result)
}

/// Restricts the interlace modes of `structure`, if it states any, to `modes`; `None` if none is
/// left.
fn with_interlace_modes(structure: &gst::StructureRef, modes: &[&str]) -> Option<gst::Structure> {
    let mut result = structure.to_owned();
    if let Ok(mode) = structure.get::<&str>("interlace-mode") {
        return modes.contains(&mode).then_some(result);
    }
    if let Ok(list) = structure.get::<gst::ListRef>("interlace-mode") {
        let allowed: Vec<&str> = list
            .iter()
            .filter_map(|mode| mode.get::<&str>().ok())
            .filter(|mode| modes.contains(mode))
            .collect();
        match allowed[..] {
            [] => return None,
            [one] => result.set("interlace-mode", one),
            _ => result.set("interlace-mode", gst::List::new(allowed)),
        }
    }
    Some(result)
}

/// Writes the colorimetry of `input` on `output`.
///
/// Without it, GStreamer guesses from the frame size, and guesses differently for a larger one. A
/// colorimetry that downstream asks for is overwritten, because the element does not convert
/// colours: the caps are then refused.
fn state_colorimetry(output: &mut gst::StructureRef, input: &gst::StructureRef) {
    let Ok(info) = VideoInfo::from_caps(&gst::Caps::from(input.to_owned())) else {
        return;
    };
    let resized = resized(input, output);
    let stated = input.get::<&str>("colorimetry").ok();
    match stated.map(|text| (text, text.parse::<VideoColorimetry>())) {
        // Without a matrix GStreamer guesses the whole colorimetry. State the guess for matrix and
        // range.
        Some((_, Ok(stated))) if resized && info.is_yuv() && stated != info.colorimetry() => {
            let guess = info.colorimetry();
            let (transfer, primaries) = (stated.transfer(), stated.primaries());
            let full = VideoColorimetry::new(guess.range(), guess.matrix(), transfer, primaries);
            output.set("colorimetry", full.to_string());
        }
        Some((text, Ok(_))) => output.set("colorimetry", text),
        // State the guess also for a colorimetry that cannot be parsed.
        _ if resized || output.has_field("colorimetry") => {
            output.set("colorimetry", info.colorimetry().to_string());
        }
        _ => {}
    }
}

/// Writes the chroma site of `input` on `output`, as [`state_colorimetry`] does.
fn state_chroma_site(output: &mut gst::StructureRef, input: &gst::StructureRef) {
    let caps = gst::Caps::from(input.to_owned());
    let Ok(info) = VideoInfo::from_caps(&caps) else {
        return;
    };
    if let Ok(stated) = input.get::<&str>("chroma-site") {
        output.set("chroma-site", stated);
    } else if info.is_yuv() && (resized(input, output) || output.has_field("chroma-site")) {
        // `info` has no chroma site if the caps state a colorimetry and no site.
        if let Some(frame) = planes::frame_info(&info, &caps) {
            output.set("chroma-site", frame.chroma_site.name());
        }
    }
}

fn resized(input: &gst::StructureRef, output: &gst::StructureRef) -> bool {
    let size = |s: &gst::StructureRef| ["width", "height"].map(|side| s.get::<i32>(side).ok());
    size(input) != size(output)
}
