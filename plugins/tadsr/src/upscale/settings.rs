// SPDX-License-Identifier: MPL-2.0

//! Properties of the element. A new property is a field of [`Settings`] and an entry of
//! [`PROPERTIES`].

use std::sync::LazyLock;

use gst::{
    glib::{self, value::FromValue},
    prelude::*,
};
use tadsr::{
    Device, Error, Upscaler,
    engine::{self, Setting, Tile},
    ladder, trial,
};

use super::{ColorFix, Fallback, Overload, Precision, Temporal, scale::MAX_SCALE, stats::Status};

/// Values of the writable properties.
///
/// [`Self::new`] returns their defaults. `Default` is only its starting point.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    /// Name of a bundled model or path of a model file; `auto` or empty for a choice.
    pub model: String,
    /// Factor for both sides; 0 takes the size from the caps downstream.
    pub scale: f64,
    /// Device in the notation of [`Device`].
    pub device: String,
    /// Share of the network's residual that is added, 0 to 1.
    pub strength: f64,
    /// Degradation of the input, 0 to 1; negative is automatic.
    pub denoise: f64,
    /// 0 (faithful) to 1 (generative); negative is automatic.
    pub detail: f64,
    /// Use of previous frames.
    pub temporal: Temporal,
    /// Threads per frame on the CPU; 0 is one per core.
    pub threads: u32,
    /// Numeric precision of inference.
    pub precision: Precision,
    /// Action when the model or the device cannot be used.
    pub fallback: Fallback,
    /// Action when the machine cannot keep up.
    pub overload: Overload,
    /// Maximum number of frames in flight.
    pub queue_depth: u32,
    /// Share of the initial noise of diffusion models, 0 to 1.
    pub noise: f64,
    /// Seed of the initial noise.
    pub seed: u64,
    /// Sampling steps of diffusion models.
    pub steps: u32,
    /// Side of a tile in pixels of the input; 0 is automatic.
    pub tile_size: u32,
    /// Overlap of neighbouring tiles in pixels of the input.
    pub tile_overlap: u32,
    /// Colour correction of diffusion models.
    pub color_fix: ColorFix,
    /// Milliseconds from one message with statistics to the next; 0 for none.
    pub stats_interval: u32,
}

impl Settings {
    /// Returns the defaults of all properties.
    pub fn new() -> Self {
        let mut settings = Self::default();
        for property in PROPERTIES.iter() {
            property.set(&mut settings, property.spec.default_value());
        }
        settings
    }

    /// Returns the number of the CUDA device in the property `device`; `None` for another device.
    pub fn cuda_ordinal(&self) -> Option<usize> {
        match self.device.parse() {
            Ok(Device::Cuda(ordinal)) => Some(ordinal),
            _ => None,
        }
    }

    /// Returns true if a CUDA device may be used once the element has started.
    pub fn may_use_cuda(&self) -> bool {
        match self.device.parse() {
            Ok(Device::Cuda(_)) => true,
            Ok(Device::Auto) => trial::ruled_out().is_none(),
            Ok(Device::Cpu) | Err(_) => false,
        }
    }

    /// Returns the values of `denoise` and `detail`, which fold into the weights of the model.
    pub fn dials(&self) -> (f64, f64) {
        (self.denoise, self.detail)
    }

    /// Copies all live settings to `upscaler`. Returns those that the model or the device refuses,
    /// which keep their previous value.
    pub fn apply(&self, upscaler: &mut Upscaler) -> Vec<(Setting, Error)> {
        let mut refused = Vec::new();
        for property in PROPERTIES.iter() {
            if let Change::Live(setting, apply) = property.change {
                let result = apply(self, upscaler);
                refused.extend(result.err().map(|err| (setting, err)));
            }
        }
        refused
    }
}

/// Consequence of a new value while the element is started.
#[derive(Clone, Copy)]
pub(super) enum Change {
    /// None. The value is read at the next start, or when it is needed.
    Deferred,
    /// None. The value is read after each frame.
    EachFrame,
    /// Both pads renegotiate.
    Renegotiate,
    /// The model is loaded in the background.
    Reload,
    /// The function applies the value before the next frame.
    Live(Setting, fn(&Settings, &mut Upscaler) -> tadsr::Result<()>),
}

type Getter = Box<dyn Fn(Settings, &Status) -> glib::Value + Send + Sync>;
type Setter = Box<dyn Fn(&mut Settings, &glib::Value) + Send + Sync>;

/// A property: its specification, its storage and the consequence of a new value.
pub(super) struct Property {
    pub spec: glib::ParamSpec,
    pub change: Change,
    get: Getter,
    /// `None` for a read-only property.
    set: Option<Setter>,
}

impl Property {
    /// Creates a writable property that is stored in `field`.
    fn new<T>(spec: glib::ParamSpec, change: Change, field: fn(&mut Settings) -> &mut T) -> Self
    where
        T: Default + ToValue + for<'v> FromValue<'v> + 'static,
    {
        Self {
            spec,
            change,
            get: Box::new(move |mut settings, _| field(&mut settings).to_value()),
            // GObject checks type and range. Only a null string has no value; it is stored as an
            // empty one.
            set: Some(Box::new(move |settings, value| {
                *field(settings) = value.get().unwrap_or_default();
            })),
        }
    }

    /// Creates a read-only property.
    fn read_only(spec: glib::ParamSpec, get: fn(&Status) -> glib::Value) -> Self {
        Self {
            spec,
            change: Change::Deferred,
            get: Box::new(move |_, status| get(status)),
            set: None,
        }
    }

    /// Reads the property.
    pub fn get(&self, settings: Settings, status: &Status) -> glib::Value {
        (self.get)(settings, status)
    }

    /// Writes the property. GObject refuses to write a read-only one.
    pub fn set(&self, settings: &mut Settings, value: &glib::Value) {
        if let Some(set) = &self.set {
            set(settings, value);
        }
    }
}

/// Returns the property with the identifier `id` that GObject passes.
pub(super) fn property(id: usize) -> &'static Property {
    &PROPERTIES[id - 1]
}

/// All properties, in the order of their identifiers.
pub(super) static PROPERTIES: LazyLock<Vec<Property>> = LazyLock::new(|| {
    vec![
        Property::new(
            glib::ParamSpecString::builder("model")
                .nick("Model")
                .blurb(
                    "Name of a bundled model or path of a model file; auto = the largest bundled \
                     model that this machine runs in real time, chosen when the caps are set. \
                     While running, the new model loads in the background and takes over between \
                     two frames",
                )
                .default_value(ladder::AUTO)
                .mutable_playing()
                .build(),
            Change::Reload,
            |s| &mut s.model,
        ),
        Property::new(
            glib::ParamSpecDouble::builder("scale")
                .nick("Scale")
                .blurb(
                    "Factor for width and height, 1 to 4; the result must be whole pixels (0 = \
                     size from the caps downstream; if they leave it open, the native scale of a \
                     model that has one, otherwise 2)",
                )
                .minimum(0.0)
                .maximum(MAX_SCALE)
                .default_value(0.0)
                .mutable_playing()
                .build(),
            Change::Renegotiate,
            |s| &mut s.scale,
        ),
        Property::new(
            glib::ParamSpecString::builder("device")
                .nick("Device")
                .blurb(
                    "Device that runs the model: auto, cpu, cuda or cuda:N (auto = the CPU, until a \
                     CUDA device has proved to be correct and 1.3 times as fast). Diffusion models \
                     run on CUDA if the plugin is built with the feature cuda",
                )
                .default_value(Device::default().to_string().as_str())
                .mutable_ready()
                .build(),
            Change::Deferred,
            |s| &mut s.device,
        ),
        Property::new(
            glib::ParamSpecDouble::builder("strength")
                .nick("Strength")
                .blurb("Share of the network's detail that is added (0 = bicubic interpolation)")
                .minimum(0.0)
                .maximum(1.0)
                .default_value(1.0)
                .mutable_playing()
                .controllable()
                .build(),
            Change::Live(Setting::Strength, |s, upscaler| {
                upscaler.set_strength(s.strength as f32)
            }),
            |s| &mut s.strength,
        ),
        Property::new(
            glib::ParamSpecDouble::builder("denoise")
                .nick("Denoise")
                .blurb(
                    "Degradation of the input: 0 (clean) to 1 (heavily compressed or noisy); -1 \
                     estimates it from the frames. For models that have this dial",
                )
                .minimum(-1.0)
                .maximum(1.0)
                .default_value(-1.0)
                .mutable_playing()
                .controllable()
                .build(),
            Change::Live(Setting::Denoise, |s, upscaler| {
                let denoise = (s.denoise >= 0.0).then_some(s.denoise as f32);
                upscaler.set_denoise(denoise)
            }),
            |s| &mut s.denoise,
        ),
        Property::new(
            glib::ParamSpecDouble::builder("detail")
                .nick("Detail")
                .blurb(
                    "Detail that the network may invent: 0 (faithful to the input) to 1 \
                     (generative); -1 is 0.5 at scales above 2, otherwise 0. For models that have \
                     this dial",
                )
                .minimum(-1.0)
                .maximum(1.0)
                .default_value(-1.0)
                .mutable_playing()
                .controllable()
                .build(),
            Change::Live(Setting::Detail, |s, upscaler| {
                let detail = (s.detail >= 0.0).then_some(s.detail as f32);
                upscaler.set_detail(detail)
            }),
            |s| &mut s.detail,
        ),
        Property::new(
            glib::ParamSpecEnum::builder_with_default("temporal", Temporal::default())
                .nick("Temporal")
                .blurb(
                    "Use of previous frames, which reduces the flicker of degraded input. For \
                     models of the lite family on the CPU",
                )
                .mutable_playing()
                .build(),
            Change::Live(Setting::Temporal, |s, upscaler| {
                upscaler.set_temporal(s.temporal.into())
            }),
            |s| &mut s.temporal,
        ),
        Property::new(
            glib::ParamSpecUInt::builder("threads")
                .nick("Threads")
                .blurb("Threads per frame on the CPU (0 = one per core)")
                .maximum(1024)
                .default_value(0)
                .mutable_ready()
                .build(),
            Change::Deferred,
            |s| &mut s.threads,
        ),
        Property::new(
            glib::ParamSpecEnum::builder_with_default("precision", Precision::default())
                .nick("Precision")
                .blurb(
                    "Numeric precision of inference; lower precision is faster if the processor \
                     has instructions for it. Diffusion models run in f32 on the CPU, and in f16 \
                     (default), bf16 or f32 on CUDA devices",
                )
                .mutable_playing()
                .build(),
            Change::Live(Setting::Precision, |s, upscaler| {
                upscaler.set_precision(s.precision.into())
            }),
            |s| &mut s.precision,
        ),
        Property::new(
            glib::ParamSpecEnum::builder_with_default("fallback", Fallback::default())
                .nick("Fallback")
                .blurb("Action when the model or the device cannot be used")
                .mutable_ready()
                .build(),
            Change::Deferred,
            |s| &mut s.fallback,
        ),
        Property::new(
            glib::ParamSpecEnum::builder_with_default("overload", Overload::default())
                .nick("Overload")
                .blurb(
                    "Action when the machine cannot keep up with the frame rate. A change takes \
                     effect with the next caps",
                )
                .mutable_ready()
                .build(),
            Change::Deferred,
            |s| &mut s.overload,
        ),
        Property::new(
            glib::ParamSpecUInt::builder("queue-depth")
                .nick("Queue depth")
                .blurb(
                    "Maximum number of frames in flight on a CUDA device, so that copies and \
                     computation overlap; each frame above 1 adds one frame of latency. The CPU \
                     always has one",
                )
                .minimum(1)
                .maximum(16)
                .default_value(2)
                .mutable_ready()
                .build(),
            Change::Deferred,
            |s| &mut s.queue_depth,
        ),
        Property::new(
            glib::ParamSpecDouble::builder("noise")
                .nick("Noise")
                .blurb(
                    "Diffusion models: share of the initial noise that the model was trained \
                     with; less noise invents less detail",
                )
                .minimum(0.0)
                .maximum(1.0)
                .default_value(1.0)
                .mutable_playing()
                .controllable()
                .build(),
            Change::Live(Setting::Noise, |s, upscaler| {
                upscaler.set_noise(s.noise as f32)
            }),
            |s| &mut s.noise,
        ),
        Property::new(
            glib::ParamSpecUInt64::builder("seed")
                .nick("Seed")
                .blurb(
                    "Diffusion models: seed of the initial noise, which is the same for all \
                     frames of one size",
                )
                .default_value(0)
                .mutable_playing()
                .build(),
            Change::Live(Setting::Seed, |s, upscaler| upscaler.set_seed(s.seed)),
            |s| &mut s.seed,
        ),
        Property::new(
            glib::ParamSpecUInt::builder("steps")
                .nick("Steps")
                .blurb(
                    "Diffusion models: sampling steps per frame; 1 for a model that is distilled \
                     to one step, up to the length of the training schedule for others",
                )
                .minimum(1)
                .default_value(1)
                .mutable_playing()
                .build(),
            Change::Live(Setting::Steps, |s, upscaler| {
                upscaler.set_steps(s.steps as usize)
            }),
            |s| &mut s.steps,
        ),
        Property::new(
            glib::ParamSpecUInt::builder("tile-size")
                .nick("Tile size")
                .blurb(
                    "Diffusion models: side of the tiles that a frame is split into, in pixels of \
                     the input, rounded up to a size that the model supports (0 = chosen by free \
                     memory and computation time)",
                )
                .default_value(0)
                .mutable_playing()
                .build(),
            Change::Live(Setting::Tile, |s, upscaler| {
                upscaler.set_tile(if s.tile_size == 0 {
                    Tile::Auto
                } else {
                    Tile::Side(s.tile_size as usize)
                })
            }),
            |s| &mut s.tile_size,
        ),
        Property::new(
            glib::ParamSpecUInt::builder("tile-overlap")
                .nick("Tile overlap")
                .blurb(
                    "Diffusion models: overlap of neighbouring tiles, which are blended there, in \
                     pixels of the input; at most half a tile",
                )
                .default_value(16)
                .mutable_playing()
                .build(),
            Change::Live(Setting::TileOverlap, |s, upscaler| {
                upscaler.set_tile_overlap(s.tile_overlap as usize)
            }),
            |s| &mut s.tile_overlap,
        ),
        Property::new(
            glib::ParamSpecEnum::builder_with_default("color-fix", ColorFix::default())
                .nick("Colour fix")
                .blurb(
                    "Diffusion models: method that matches the colours of the result to those of \
                     the input",
                )
                .mutable_playing()
                .build(),
            Change::Live(Setting::ColorFix, |s, upscaler| {
                upscaler.set_color_fix(s.color_fix.into())
            }),
            |s| &mut s.color_fix,
        ),
        Property::new(
            glib::ParamSpecUInt::builder("stats-interval")
                .nick("Statistics interval")
                .blurb(
                    "Milliseconds from one element message with the statistics to the next (0 = \
                     none)",
                )
                .maximum(3_600_000)
                .default_value(0)
                .mutable_playing()
                .build(),
            Change::EachFrame,
            |s| &mut s.stats_interval,
        ),
        Property::read_only(
            glib::ParamSpecString::builder("active-device")
                .nick("Active device")
                .blurb("Device that runs the model")
                .read_only()
                .build(),
            |status| status.device.to_value(),
        ),
        Property::read_only(
            glib::ParamSpecString::builder("active-model")
                .nick("Active model")
                .blurb("Model in use; 'bicubic' or 'passthrough' if the fallback replaces it")
                .read_only()
                .build(),
            |status| status.model.to_value(),
        ),
        Property::read_only(
            glib::ParamSpecString::builder("active-precision")
                .nick("Active precision")
                .blurb("Numeric precision of the model in use, never auto")
                .read_only()
                .build(),
            |status| status.precision.to_value(),
        ),
        Property::read_only(
            glib::ParamSpecDouble::builder("active-scale")
                .nick("Active scale")
                .blurb("Size of the output over that of the input (0 before the caps are set)")
                .minimum(0.0)
                .read_only()
                .build(),
            |status| status.scale.to_value(),
        ),
        Property::read_only(
            glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
                .nick("Statistics")
                .blurb(
                    "Statistics since the start: frames upscaled (frames), frames dropped because \
                     they were late (dropped), frames per second from the first to the latest \
                     (fps), milliseconds per frame in the element: mean (mean-ms) and 99th \
                     percentile of the latest 1000 (p99-ms). With device=auto also the reason to \
                     use a CUDA device or not (cuda). On a CUDA device also the mean milliseconds \
                     per stage by its clock (upload-ms, compute-ms, download-ms) and the device \
                     memory in bytes (device-memory)",
                )
                .read_only()
                .build(),
            |status| status.stats.structure().to_value(),
        ),
    ]
});

impl From<Precision> for tadsr::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Auto => Self::Auto,
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
            Precision::Int16 => Self::Int16,
            Precision::Int8 => Self::Int8,
            Precision::F16 => Self::F16,
        }
    }
}

impl From<Temporal> for engine::Temporal {
    fn from(temporal: Temporal) -> Self {
        match temporal {
            Temporal::Auto => Self::Auto,
            Temporal::Off => Self::Off,
            Temporal::Filter => Self::Filter,
            Temporal::Memory => Self::Memory,
        }
    }
}

impl From<ColorFix> for engine::ColorFix {
    fn from(fix: ColorFix) -> Self {
        match fix {
            ColorFix::Wavelet => Self::Wavelet,
            ColorFix::Adain => Self::Adain,
            ColorFix::None => Self::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writable() -> impl Iterator<Item = &'static Property> {
        gst::init().unwrap();
        PROPERTIES.iter().filter(|property| property.set.is_some())
    }

    #[test]
    fn new_settings_have_the_default_of_every_property() {
        for property in writable() {
            let value = property.get(Settings::new(), &Status::default());
            let default = property.spec.default_value();
            let (value, default) = (value.serialize().unwrap(), default.serialize().unwrap());
            assert_eq!(value, default, "{}", property.spec.name());
        }
    }

    #[test]
    fn a_property_is_mutable_while_playing_if_a_change_takes_effect_there() {
        for property in writable() {
            let playing = property.spec.flags() & gst::PARAM_FLAG_MUTABLE_PLAYING;
            let deferred = matches!(property.change, Change::Deferred);
            assert_eq!(playing.is_empty(), deferred, "{}", property.spec.name());
        }
    }
}
