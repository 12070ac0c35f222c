// SPDX-License-Identifier: MPL-2.0

//! Element `tadsrupscale`: type, enums and registration.

/**
 * SECTION:element-tadsrupscale
 * @see_also: videoscale
 *
 * Upscales video with a super-resolution network.
 *
 * |[
 * gst-launch-1.0 filesrc location=in.mp4 ! decodebin ! videoconvert ! tadsrupscale ! \
 *     x264enc ! mp4mux ! filesink location=out.mp4
 * ]| Doubles the size of a video file.
 * |[
 * gst-launch-1.0 videotestsrc ! video/x-raw,width=854,height=480 ! tadsrupscale ! \
 *     video/x-raw,width=1920,height=1080 ! autovideosink
 * ]| Upscales to the size in the caps downstream, here by a factor of 2.25.
 * |[
 * gst-launch-1.0 videotestsrc ! video/x-raw,width=320,height=240 ! \
 *     tadsrupscale scale=4 strength=0.5 ! autovideosink
 * ]| Upscales by a factor of 4, with half of the detail that the network adds to bicubic
 * interpolation.
 * |[
 * gst-launch-1.0 filesrc location=in.mp4 ! decodebin ! videoconvert ! \
 *     tadsrupscale model=tad-sr.safetensors noise=0.5 ! x264enc ! mp4mux ! \
 *     filesink location=out.mp4
 * ]| Upscales by a factor of 4 with a diffusion model that was converted by `tadsr-train import`,
 * and half of the initial noise. This takes seconds to minutes per frame.
 *
 * By default (#tadsrupscale:scale is 0) the caps downstream set the output size. If they leave it
 * open, the size doubles, or grows by the native scale of a model that has one. Format and colours
 * do not change: the output caps state the colorimetry and chroma-site of the input, because
 * GStreamer's defaults depend on the frame size.
 *
 * On processors with AVX-512 VNNI, AVX-512 BF16 or AVX2 the bundled models run in 8-bit integers,
 * 16-bit floats or 16-bit integers, which is faster and costs less than 0.02 dB;
 * #tadsrupscale:precision overrides this. The result is deterministic on one machine. Other
 * processors may differ in the last bits, unless the precision is `int16` or `int8` on both.
 *
 * Video that keeps its size passes through, unless the model restores video at a scale of 1.
 *
 * Diffusion models start from noise. It is the same for all frames of one size until
 * #tadsrupscale:seed changes, so that still images do not flicker. Large frames are split into
 * overlapping tiles that are blended.
 *
 * Interlaced video must be deinterlaced first.
 */
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use gst::{glib, prelude::*};

mod auto;
mod caps;
mod governor;
mod gstcuda;
mod imp;
mod meta;
mod pinned;
mod planes;
mod queue;
mod scale;
mod session;
mod settings;
mod stats;

static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "tadsrupscale",
        gst::DebugColorFlags::empty(),
        Some("Super-resolution upscaler"),
    )
});

/// Action of `tadsrupscale` when the model or the device cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscaleFallback")]
#[repr(u32)]
pub enum Fallback {
    #[default]
    #[enum_value(name = "Error: stop with an error message", nick = "error")]
    Error = 0,
    #[enum_value(name = "CPU: run on the CPU if the device fails", nick = "cpu")]
    Cpu = 1,
    #[enum_value(
        name = "Passthrough: forward the video unchanged, interlaced video too",
        nick = "passthrough"
    )]
    Passthrough = 2,
    #[enum_value(name = "Bicubic: upscale without the network", nick = "bicubic")]
    Bicubic = 3,
}

/// Action of `tadsrupscale` when the machine cannot keep up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscaleOverload")]
#[repr(u32)]
pub enum Overload {
    #[default]
    #[enum_value(
        name = "Auto: adapt if the source is live, otherwise drop",
        nick = "auto"
    )]
    Auto = 0,
    #[enum_value(name = "Drop: drop late frames", nick = "drop")]
    Drop = 1,
    #[enum_value(
        name = "Adapt: use smaller models, then bicubic interpolation, then drop late frames",
        nick = "adapt"
    )]
    Adapt = 2,
}

/// Numeric precision of inference in `tadsrupscale`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscalePrecision")]
#[repr(u32)]
pub enum Precision {
    #[default]
    #[enum_value(
        name = "Auto: the fastest that the device has instructions for",
        nick = "auto"
    )]
    Auto = 0,
    #[enum_value(name = "F32: 32-bit floats", nick = "f32")]
    F32 = 1,
    #[enum_value(name = "BF16: products of bfloat16 numbers", nick = "bf16")]
    Bf16 = 2,
    #[enum_value(
        name = "INT8: products of 8-bit integers, for calibrated models",
        nick = "int8"
    )]
    Int8 = 3,
    #[enum_value(
        name = "F16: products of half-precision floats, on CUDA devices",
        nick = "f16"
    )]
    F16 = 4,
    #[enum_value(
        name = "INT16: products of 16-bit integers, for calibrated models",
        nick = "int16"
    )]
    Int16 = 5,
}

/// Use of previous frames in `tadsrupscale`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscaleTemporal")]
#[repr(u32)]
pub enum Temporal {
    #[default]
    #[enum_value(
        name = "Auto: memory if the network has one, or filter if it has the dial denoise",
        nick = "auto"
    )]
    Auto = 0,
    #[enum_value(name = "Off: every frame on its own", nick = "off")]
    Off = 1,
    #[enum_value(
        name = "Filter: mix in the previous result where the input stands still",
        nick = "filter"
    )]
    Filter = 2,
    #[enum_value(
        name = "Memory: a network with memory sees its previous result",
        nick = "memory"
    )]
    Memory = 3,
}

/// Method of `tadsrupscale` to match the colours of a diffusion model's result to those of the
/// input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscaleColorFix")]
#[repr(u32)]
pub enum ColorFix {
    #[default]
    #[enum_value(
        name = "Wavelet: low frequencies from the input, high ones from the network",
        nick = "wavelet"
    )]
    Wavelet = 0,
    #[enum_value(
        name = "Adain: mean and standard deviation of each channel from the input",
        nick = "adain"
    )]
    Adain = 1,
    #[enum_value(name = "None: colours of the network", nick = "none")]
    None = 2,
}

glib::wrapper! {
    pub struct TadsrUpscale(ObjectSubclass<imp::TadsrUpscale>)
        @extends gst_video::VideoFilter, gst_base::BaseTransform, gst::Element, gst::Object,
        @implements gst::Preset;
}

/// Registers the element with `plugin`. Its rank excludes it from autoplugging.
pub fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    #[cfg(feature = "doc")]
    for kind in [
        Fallback::static_type(),
        Overload::static_type(),
        Precision::static_type(),
        Temporal::static_type(),
        ColorFix::static_type(),
    ] {
        kind.mark_as_plugin_api(gst::PluginAPIFlags::empty());
    }

    gst::Element::register(
        Some(plugin),
        "tadsrupscale",
        gst::Rank::NONE,
        TadsrUpscale::static_type(),
    )
}

/// Locks `mutex`, also after a panic: no critical section of this crate leaves its data half
/// written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
