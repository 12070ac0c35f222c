// SPDX-License-Identifier: MPL-2.0

//! The element `tadsrupscale`: its type, its enums, its registration.

use gst::{glib, prelude::*};

mod gstcuda;
mod imp;
mod planes;
mod scale;
mod stats;

/// What `tadsrupscale` does when it cannot do what its properties ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscaleFallback")]
#[repr(u32)]
pub enum Fallback {
    #[default]
    #[enum_value(name = "Error: stop with an error message", nick = "error")]
    Error = 0,
    #[enum_value(
        name = "CPU: run on the CPU when the device cannot be used",
        nick = "cpu"
    )]
    Cpu = 1,
    #[enum_value(
        name = "Passthrough: leave the video as it is, in its size; interlaced video too",
        nick = "passthrough"
    )]
    Passthrough = 2,
    #[enum_value(name = "Bicubic: upscale without the network", nick = "bicubic")]
    Bicubic = 3,
}

/// In what numbers `tadsrupscale` computes a network.
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
    #[enum_value(name = "BF16: products of 16-bit floats", nick = "bf16")]
    Bf16 = 2,
    #[enum_value(
        name = "INT8: products of 8-bit integers, of calibrated models",
        nick = "int8"
    )]
    Int8 = 3,
    #[enum_value(name = "F16: products of 16-bit floats, on CUDA devices", nick = "f16")]
    F16 = 4,
}

impl From<Precision> for tadsr::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Auto => Self::Auto,
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
            Precision::Int8 => Self::Int8,
            Precision::F16 => Self::F16,
        }
    }
}

/// How `tadsrupscale` brings the colours of what a published network makes back to those of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, glib::Enum)]
#[enum_type(name = "GstTadsrUpscaleColorFix")]
#[repr(u32)]
pub enum ColorFix {
    #[default]
    #[enum_value(
        name = "Wavelet: large structures come from the input, fine ones from the network",
        nick = "wavelet"
    )]
    Wavelet = 0,
    #[enum_value(
        name = "Adain: mean and deviation of each colour become those of the input",
        nick = "adain"
    )]
    Adain = 1,
    #[enum_value(name = "None: as the network makes them", nick = "none")]
    None = 2,
}

glib::wrapper! {
    pub struct TadsrUpscale(ObjectSubclass<imp::TadsrUpscale>)
        @extends gst_video::VideoFilter, gst_base::BaseTransform, gst::Element, gst::Object;
}

/// Adds the element to `plugin`. It is never plugged in automatically.
pub fn register(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    #[cfg(feature = "doc")]
    for kind in [
        Fallback::static_type(),
        Precision::static_type(),
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
