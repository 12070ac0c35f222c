// SPDX-License-Identifier: MPL-2.0

/**
 * SECTION:element-tadsrupscale
 * @see_also: videoscale
 *
 * Upscales video with a super-resolution network.
 *
 * |[
 * gst-launch-1.0 filesrc location=in.mp4 ! decodebin ! videoconvert ! tadsrupscale ! x264enc ! mp4mux ! filesink location=out.mp4
 * ]| Doubles the size of a film.
 * |[
 * gst-launch-1.0 videotestsrc ! video/x-raw,width=854,height=480 ! tadsrupscale ! video/x-raw,width=1920,height=1080 ! autovideosink
 * ]| Upscales to the size that the capsfilter asks for, here by 2.25.
 * |[
 * gst-launch-1.0 videotestsrc ! video/x-raw,width=320,height=240 ! tadsrupscale scale=4 strength=0.5 ! autovideosink
 * ]| Four times the size, with half of the detail that the network adds over bicubic interpolation.
 * |[
 * gst-launch-1.0 filesrc location=in.mp4 ! decodebin ! videoconvert ! tadsrupscale model=tad-sr.safetensors noise=0.5 ! x264enc ! mp4mux ! filesink location=out.mp4
 * ]| Four times the size by a published diffusion model that `tadsr-train import` has made a model file of, with half
 * of the noise that it was trained to start from. That takes seconds a frame, or minutes.
 *
 * The default scale, 0, takes the size from the caps downstream; where they leave it open it is twice that of the
 * input, or what the model makes if it makes only one. The format stays as it is, and so do the colours: colorimetry
 * and chroma-site of the input are written on the output caps, because what GStreamer assumes without them depends on
 * the size.
 *
 * On processors with AVX-512 VNNI or AVX-512 BF16 the bundled models are computed in 8-bit integers or 16-bit floats,
 * which is faster and costs less than 0.02 dB; #tadsrupscale:precision chooses. On one machine the same video always
 * gives the same result; another processor may give other last bits, unless the precision is set to the same `int8`.
 *
 * Video whose size stays is passed through, unless the model is one that restores video in its own size.
 *
 * Published models start from noise, which is the same for every frame of a size as long as #tadsrupscale:seed is: a
 * still picture stays still. Large frames are cut into tiles that overlap and fade into each other.
 *
 * Interlaced video must be deinterlaced first.
 */
use std::{
    mem,
    ops::ControlFlow,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use gst::{glib, prelude::*, subclass::prelude::*};
use gst_base::{prelude::*, subclass::prelude::*};
use gst_video::{VideoInfo, subclass::prelude::*, video_meta::VideoMetaTransformScale};
use tadsr::{
    Device, Error, Upscaler,
    engine::official::{self, Tile},
    frame::{FrameInfo, MAX_SIDE, PixelFormat},
};

use super::{
    ColorFix, Fallback, Precision,
    planes::{self, Layout},
    scale::{MAX_SCALE, Scale},
};

static CAT: LazyLock<gst::DebugCategory> = LazyLock::new(|| {
    gst::DebugCategory::new(
        "tadsrupscale",
        gst::DebugColorFlags::empty(),
        Some("Super-resolution upscaler"),
    )
});

/// What the properties say.
#[derive(Clone, Debug)]
struct Settings {
    model: String,
    scale: f64,
    device: String,
    strength: f64,
    threads: u32,
    precision: Precision,
    fallback: Fallback,
    noise: f64,
    seed: u64,
    steps: u32,
    /// 0 is automatic.
    tile_size: u32,
    tile_overlap: u32,
    color_fix: ColorFix,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: String::new(),
            scale: 0.0,
            device: Device::default().to_string(),
            strength: 1.0,
            threads: 0,
            precision: Precision::default(),
            fallback: Fallback::default(),
            noise: 1.0,
            seed: 0,
            steps: 1,
            tile_size: 0,
            tile_overlap: 16,
            color_fix: ColorFix::default(),
        }
    }
}

impl Settings {
    /// Makes `upscaler` follow what may change from frame to frame.
    fn apply(&self, upscaler: &mut Upscaler) -> tadsr::Result<()> {
        upscaler.set_strength(self.strength as f32);
        upscaler.set_precision(self.precision.into())?;
        upscaler.set_noise(self.noise as f32);
        upscaler.set_seed(self.seed);
        upscaler.set_tile(match self.tile_size {
            0 => Tile::Auto,
            side => Tile::Side(side as usize),
        });
        upscaler.set_tile_overlap(self.tile_overlap as usize);
        upscaler.set_color_fix(match self.color_fix {
            ColorFix::Wavelet => official::ColorFix::Wavelet,
            ColorFix::Adain => official::ColorFix::Adain,
            ColorFix::None => official::ColorFix::None,
        });
        upscaler.set_steps(self.steps as usize)
    }
}

/// What does the work, from READY to PAUSED and back.
#[derive(Default)]
enum Engine {
    /// The element is not started.
    #[default]
    None,
    Ready(Loaded),
    /// A frame is being upscaled; a model that was loaded meanwhile waits for its end.
    Busy(Option<Loaded>),
    /// There is no model and the fallback is passthrough.
    Bypass,
}

impl Engine {
    fn ready(upscaler: Upscaler) -> Self {
        let plain = false;
        Self::Ready(Loaded { upscaler, plain })
    }
}

/// A model and how it is used.
struct Loaded {
    upscaler: Upscaler,
    /// The fallback is bicubic: the network's residual is left out.
    plain: bool,
}

/// What goes in and what comes out.
#[derive(Clone)]
struct Negotiated {
    input: VideoInfo,
    output: VideoInfo,
    /// The input as the library sees it.
    frame: FrameInfo,
}

impl Negotiated {
    /// The output as the library sees it: the colours are those of the input, whatever the size would suggest.
    fn out_frame(&self) -> FrameInfo {
        let (width, height) = (self.output.width(), self.output.height());
        self.frame.with_size(width as usize, height as usize)
    }

    /// The scale: the larger of both directions.
    fn ratio(&self) -> f64 {
        let x = f64::from(self.output.width()) / f64::from(self.input.width());
        let y = f64::from(self.output.height()) / f64::from(self.input.height());
        x.max(y)
    }

    /// Whether frames go through as they are: their size stays, and the model does not work at it.
    fn passes_through(&self, native_scale: Option<f64>) -> bool {
        let size = |info: &VideoInfo| (info.width(), info.height());
        let progressive = self.input.interlace_mode() == gst_video::VideoInterlaceMode::Progressive;
        size(&self.input) == size(&self.output) && !(progressive && native_scale == Some(1.0))
    }
}

#[derive(Default)]
struct State {
    engine: Engine,
    /// Counts the models asked for and the stops, so that a model that was loaded too late is recognised.
    generation: u64,
    /// The largest scale that the model serves.
    max_scale: Option<f64>,
    /// The only scale that the model itself makes, for models that have only one.
    native_scale: Option<f64>,
    /// Of the caps in force.
    negotiated: Option<Negotiated>,
    /// Input caps that were refused with an error message.
    refused: Option<gst::Caps>,
    active_device: Option<String>,
    active_model: Option<String>,
    stats: Stats,
}

/// What the property `stats` tells, since the element was started.
#[derive(Default)]
struct Stats {
    frames: u64,
    /// Frames that came too late to be shown and were left out.
    dropped: u64,
    /// Time spent on upscaling.
    busy: Duration,
    /// When the first frame was done and the latest.
    span: Option<(Instant, Instant)>,
}

impl Stats {
    fn count(&mut self, started: Instant) {
        let now = Instant::now();
        self.frames += 1;
        self.busy += now - started;
        self.span = Some((self.span.map_or(now, |(first, _)| first), now));
    }

    fn structure(&self) -> gst::Structure {
        let seconds = self
            .span
            .map_or(0.0, |(first, last)| (last - first).as_secs_f64());
        let per = |n: f64, of: f64| if of > 0.0 { n / of } else { 0.0 };
        gst::Structure::builder("tadsr-stats")
            .field("frames", self.frames)
            .field("dropped", self.dropped)
            .field("fps", per(self.frames.saturating_sub(1) as f64, seconds))
            .field(
                "mean-ms",
                per(self.busy.as_secs_f64() * 1e3, self.frames as f64),
            )
            .build()
    }
}

#[derive(Default)]
pub struct TadsrUpscale {
    settings: Mutex<Settings>,
    state: Mutex<State>,
    /// The frame in work is not wanted any more: the pads are flushing or the element stops.
    cancel: Arc<AtomicBool>,
}

#[glib::object_subclass]
impl ObjectSubclass for TadsrUpscale {
    const NAME: &'static str = "GstTadsrUpscale";
    type Type = super::TadsrUpscale;
    type ParentType = gst_video::VideoFilter;
}

impl ObjectImpl for TadsrUpscale {
    fn constructed(&self) {
        self.parent_constructed();
        // A source that could make the wanted size itself shall not: it is asked for what suits the scale.
        self.obj().set_prefer_passthrough(false);
        // A gap's frame is upscaled like any other and stays marked.
        self.obj().set_gap_aware(true);
    }

    fn properties() -> &'static [glib::ParamSpec] {
        static PROPERTIES: LazyLock<Vec<glib::ParamSpec>> = LazyLock::new(|| {
            let default = Settings::default();
            vec![
                glib::ParamSpecString::builder("model")
                    .nick("Model")
                    .blurb(
                        "Name of a bundled model or path of a model file (empty = the default model). \
                         While running, the new model is loaded in the background and takes over between two frames",
                    )
                    .default_value(default.model.as_str())
                    .mutable_playing()
                    .build(),
                glib::ParamSpecDouble::builder("scale")
                    .nick("Scale")
                    .blurb(
                        "Factor by which width and height grow, 1 to 4; the result must be whole pixels \
                         (0 = to the size in the caps downstream; where they leave it open, twice the size or what \
                         the model makes if it makes only one)",
                    )
                    .minimum(0.0)
                    .maximum(MAX_SCALE)
                    .default_value(default.scale)
                    .mutable_playing()
                    .build(),
                glib::ParamSpecString::builder("device")
                    .nick("Device")
                    .blurb("Device that runs the model: auto, cpu, cuda or cuda:N")
                    .default_value(default.device.as_str())
                    .mutable_ready()
                    .build(),
                glib::ParamSpecDouble::builder("strength")
                    .nick("Strength")
                    .blurb("How much of the network's detail is added (0 = bicubic interpolation)")
                    .minimum(0.0)
                    .maximum(1.0)
                    .default_value(default.strength)
                    .mutable_playing()
                    .controllable()
                    .build(),
                glib::ParamSpecUInt::builder("threads")
                    .nick("Threads")
                    .blurb("Threads that a frame is spread over on the CPU (0 = one for every core)")
                    .maximum(1024)
                    .default_value(default.threads)
                    .mutable_ready()
                    .build(),
                glib::ParamSpecEnum::builder_with_default("precision", default.precision)
                    .nick("Precision")
                    .blurb(
                        "In what numbers the network is computed; less precise ones are faster where the processor has \
                         instructions for them. Published models are always computed in f32",
                    )
                    .mutable_playing()
                    .build(),
                glib::ParamSpecEnum::builder_with_default("fallback", default.fallback)
                    .nick("Fallback")
                    .blurb("What to do when the model or the device cannot be used")
                    .mutable_ready()
                    .build(),
                glib::ParamSpecDouble::builder("noise")
                    .nick("Noise")
                    .blurb(
                        "Published models: how much of the noise that they were trained to start from they get; less \
                         noise invents less detail",
                    )
                    .minimum(0.0)
                    .maximum(1.0)
                    .default_value(default.noise)
                    .mutable_playing()
                    .controllable()
                    .build(),
                glib::ParamSpecUInt64::builder("seed")
                    .nick("Seed")
                    .blurb("Published models: what the noise is drawn from; it is the same for every frame of a size")
                    .default_value(default.seed)
                    .mutable_playing()
                    .build(),
                glib::ParamSpecUInt::builder("steps")
                    .nick("Steps")
                    .blurb(
                        "Published models: steps for a frame, 1 for a model that was distilled to one step, up to those \
                         of the schedule that it was trained with",
                    )
                    .minimum(1)
                    .default_value(default.steps)
                    .mutable_playing()
                    .build(),
                glib::ParamSpecUInt::builder("tile-size")
                    .nick("Tile size")
                    .blurb(
                        "Published models: sides of the tiles that a frame is cut into, in pixels of the input, rounded \
                         up to what the model takes (0 = by the free memory and the time it takes)",
                    )
                    .default_value(default.tile_size)
                    .mutable_playing()
                    .build(),
                glib::ParamSpecUInt::builder("tile-overlap")
                    .nick("Tile overlap")
                    .blurb(
                        "Published models: pixels of the input over which neighbouring tiles fade into each other, half a \
                         tile at most",
                    )
                    .default_value(default.tile_overlap)
                    .mutable_playing()
                    .build(),
                glib::ParamSpecEnum::builder_with_default("color-fix", default.color_fix)
                    .nick("Colour fix")
                    .blurb("Published models: how the colours of the result are brought back to those of the input")
                    .mutable_playing()
                    .build(),
                glib::ParamSpecString::builder("active-device")
                    .nick("Active device")
                    .blurb("Device that runs the model")
                    .read_only()
                    .build(),
                glib::ParamSpecString::builder("active-model")
                    .nick("Active model")
                    .blurb("Model in use; 'bicubic' or 'passthrough' when the fallback replaces it")
                    .read_only()
                    .build(),
                glib::ParamSpecBoxed::builder::<gst::Structure>("stats")
                    .nick("Statistics")
                    .blurb(
                        "Since the start: frames upscaled (frames), frames left out because they came too late \
                         (dropped), frames per second from the first to the latest (fps), mean time that upscaling a frame takes in milliseconds (mean-ms)",
                    )
                    .read_only()
                    .build(),
            ]
        });
        &PROPERTIES
    }

    fn set_property(&self, _id: usize, value: &glib::Value, pspec: &glib::ParamSpec) {
        let mut settings = lock(&self.settings);
        // GObject has checked type and range.
        let text = || {
            value
                .get::<Option<String>>()
                .ok()
                .flatten()
                .unwrap_or_default()
        };
        match pspec.name() {
            "model" => {
                settings.model = text();
                drop(settings);
                self.load_in_background();
            }
            "scale" => {
                settings.scale = value.get().expect("type checked upstream");
                drop(settings);
                // What this scale leads to is told anew.
                lock(&self.state).refused = None;
                // Upstream may have to change its size, or what comes out does.
                self.obj().reconfigure_sink();
                self.obj().reconfigure_src();
            }
            "device" => settings.device = text(),
            "strength" => settings.strength = value.get().expect("type checked upstream"),
            "threads" => settings.threads = value.get().expect("type checked upstream"),
            "precision" => settings.precision = value.get().expect("type checked upstream"),
            "fallback" => settings.fallback = value.get().expect("type checked upstream"),
            "noise" => settings.noise = value.get().expect("type checked upstream"),
            "seed" => settings.seed = value.get().expect("type checked upstream"),
            "steps" => settings.steps = value.get().expect("type checked upstream"),
            "tile-size" => settings.tile_size = value.get().expect("type checked upstream"),
            "tile-overlap" => settings.tile_overlap = value.get().expect("type checked upstream"),
            "color-fix" => settings.color_fix = value.get().expect("type checked upstream"),
            name => unreachable!("no writable property '{name}'"),
        }
    }

    fn property(&self, _id: usize, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "model" => lock(&self.settings).model.to_value(),
            "scale" => lock(&self.settings).scale.to_value(),
            "device" => lock(&self.settings).device.to_value(),
            "strength" => lock(&self.settings).strength.to_value(),
            "threads" => lock(&self.settings).threads.to_value(),
            "precision" => lock(&self.settings).precision.to_value(),
            "fallback" => lock(&self.settings).fallback.to_value(),
            "noise" => lock(&self.settings).noise.to_value(),
            "seed" => lock(&self.settings).seed.to_value(),
            "steps" => lock(&self.settings).steps.to_value(),
            "tile-size" => lock(&self.settings).tile_size.to_value(),
            "tile-overlap" => lock(&self.settings).tile_overlap.to_value(),
            "color-fix" => lock(&self.settings).color_fix.to_value(),
            "active-device" => lock(&self.state).active_device.to_value(),
            "active-model" => lock(&self.state).active_model.to_value(),
            "stats" => lock(&self.state).stats.structure().to_value(),
            name => unreachable!("no property '{name}'"),
        }
    }
}

impl GstObjectImpl for TadsrUpscale {}

impl ElementImpl for TadsrUpscale {
    fn metadata() -> Option<&'static gst::subclass::ElementMetadata> {
        static METADATA: LazyLock<gst::subclass::ElementMetadata> = LazyLock::new(|| {
            gst::subclass::ElementMetadata::new(
                "Super-resolution upscaler",
                "Filter/Converter/Video/Scaler",
                "Upscales video with a super-resolution network",
                "The TADSR developers",
            )
        });
        Some(&METADATA)
    }

    fn pad_templates() -> &'static [gst::PadTemplate] {
        static TEMPLATES: LazyLock<Vec<gst::PadTemplate>> = LazyLock::new(|| {
            let formats = PixelFormat::ALL.map(|f| gst_video::VideoFormat::from_string(f.name()));
            let caps = gst_video::VideoCapsBuilder::new()
                .format_list(formats)
                .width_range(1..=MAX_SIDE as i32)
                .height_range(1..=MAX_SIDE as i32)
                .build();
            let template = |name, direction| {
                gst::PadTemplate::new(name, direction, gst::PadPresence::Always, &caps)
                    .expect("caps are raw video")
            };
            vec![
                template("sink", gst::PadDirection::Sink),
                template("src", gst::PadDirection::Src),
            ]
        });
        &TEMPLATES
    }

    /// Stopping waits for the frame in work, which a published model may take long for: it is given up.
    fn change_state(
        &self,
        transition: gst::StateChange,
    ) -> Result<gst::StateChangeSuccess, gst::StateChangeError> {
        let stopping = transition == gst::StateChange::PausedToReady;
        if stopping {
            self.cancel.store(true, Ordering::Relaxed);
        }
        let result = self.parent_change_state(transition);
        if stopping {
            self.cancel.store(false, Ordering::Relaxed);
        }
        result
    }
}

impl BaseTransformImpl for TadsrUpscale {
    const MODE: gst_base::subclass::BaseTransformMode =
        gst_base::subclass::BaseTransformMode::NeverInPlace;
    const PASSTHROUGH_ON_SAME_CAPS: bool = false;
    const TRANSFORM_IP_ON_PASSTHROUGH: bool = false;

    /// Loads the model, in the thread that changes the state: before a frame flows.
    fn start(&self) -> Result<(), gst::ErrorMessage> {
        self.progress(gst::ProgressType::Start, "Loading the model");
        let result = loop {
            let settings = lock(&self.settings).clone();
            let result = self.load_or_fall_back(&settings);
            let mut state = lock(&self.state);
            // While there is no engine, setting a model does not load it: one set meanwhile is loaded here.
            if lock(&self.settings).model != settings.model {
                continue;
            }
            break result.map(|engine| state.install(engine));
        };
        match &result {
            Ok(_) => self.progress(gst::ProgressType::Complete, "Model loaded"),
            Err(_) => self.progress(gst::ProgressType::Error, "No model"),
        }
        result?;
        self.notify_active();
        Ok(())
    }

    fn stop(&self) -> Result<(), gst::ErrorMessage> {
        let mut state = lock(&self.state);
        let generation = state.generation + 1;
        let old = mem::replace(
            &mut *state,
            State {
                generation,
                ..State::default()
            },
        );
        drop(state);
        drop(old);
        self.notify_active();
        Ok(())
    }

    fn transform_caps(
        &self,
        direction: gst::PadDirection,
        caps: &gst::Caps,
        filter: Option<&gst::Caps>,
    ) -> Option<gst::Caps> {
        let scale = self.scale();
        // Otherwise it is refused when it comes, with a reason that failed negotiation would not give.
        let passes_interlaced = lock(&self.settings).fallback == Fallback::Passthrough;
        let mut result = gst::Caps::new_empty();
        let out = result.make_mut();
        for (structure, features) in caps.iter_with_features() {
            let mut append =
                |s: gst::Structure| out.append_structure_full(s, Some(features.to_owned()));
            match scale {
                Some(scale) if !scale.is_identity() => {
                    let to_scale = match passes_interlaced {
                        true => progressive(structure),
                        false => Some(structure.to_owned()),
                    };
                    let scaled = to_scale.and_then(|s| scale.transform(direction, &s));
                    if let Some(scaled) = scaled {
                        append(scaled);
                    }
                    let fixed = direction == gst::PadDirection::Sink && caps.is_fixed();
                    if passes_interlaced && let Some(interlaced) = interlaced(structure, fixed) {
                        append(interlaced);
                    }
                }
                Some(_) => append(structure.to_owned()),
                None => {}
            }
        }
        gst::debug!(CAT, imp = self, "{direction:?} {caps} becomes {result}");
        Some(match filter {
            Some(filter) => filter.intersect_with_mode(&result, gst::CapsIntersectMode::First),
            None => result,
        })
    }

    fn fixate_caps(
        &self,
        direction: gst::PadDirection,
        caps: &gst::Caps,
        mut othercaps: gst::Caps,
    ) -> gst::Caps {
        othercaps.truncate();
        if direction == gst::PadDirection::Sink
            && let (Some(scale), Some(input)) = (self.scale(), caps.structure(0))
            && let Some(output) = othercaps.make_mut().structure_mut(0)
        {
            scale.fixate(input, output);
            write_colours(output, input);
        }
        self.parent_fixate_caps(direction, caps, othercaps)
    }

    /// Accepts also caps that [`Self::sink_event`] will refuse, because it can say why.
    fn accept_caps(&self, direction: gst::PadDirection, caps: &gst::Caps) -> bool {
        (direction == gst::PadDirection::Sink && self.refusal(caps).is_some())
            || self.parent_accept_caps(direction, caps)
    }

    fn sink_event(&self, event: gst::Event) -> bool {
        match event.type_() {
            // It comes while a frame is in work.
            gst::EventType::FlushStart => self.cancel.store(true, Ordering::Relaxed),
            gst::EventType::FlushStop => self.cancel.store(false, Ordering::Relaxed),
            _ => {}
        }
        if let gst::EventView::Caps(caps) = event.view() {
            let caps = caps.caps_owned();
            let refusal = self.refusal(&caps);
            if let Some(reason) = refusal {
                self.refuse(&caps, &reason);
                return false;
            }
            lock(&self.state).refused = None;
        }
        self.parent_sink_event(event)
    }

    /// Pointer coordinates are those of the output when they arrive and those of the input when they leave.
    fn src_event(&self, mut event: gst::Event) -> bool {
        if event.type_() == gst::EventType::Navigation
            && let Some(Negotiated { input, output, .. }) = lock(&self.state).negotiated.clone()
        {
            let structure = event.make_mut().structure_mut();
            for (field, from, to) in [
                ("pointer_x", output.width(), input.width()),
                ("pointer_y", output.height(), input.height()),
            ] {
                if let Ok(v) = structure.get::<f64>(field) {
                    structure.set(field, v * f64::from(to) / f64::from(from));
                }
            }
        }
        self.parent_src_event(event)
    }

    /// Metas that speak of sizes are scaled, the crop that the output no longer has is dropped; captions,
    /// timecodes and what else does not depend on the size is kept.
    fn transform_meta<'a>(
        &self,
        outbuf: &mut gst::BufferRef,
        meta: gst::MetaRef<'a, gst::Meta>,
        inbuf: &'a gst::BufferRef,
    ) -> bool {
        if meta.api() == gst_video::VideoCropMeta::meta_api() {
            return false;
        }
        if meta.has_tag::<gst_video::video_meta::tags::Size>() {
            let Some(Negotiated { input, output, .. }) = lock(&self.state).negotiated.clone()
            else {
                return false;
            };
            let scale = VideoMetaTransformScale::new(&input, &output);
            if let Some(roi) = meta.downcast_ref::<gst_video::VideoRegionOfInterestMeta>() {
                add_scaled_roi(outbuf, roi, &input, &output);
            } else if meta.transform(outbuf, &scale).is_err() {
                gst::debug!(
                    CAT,
                    imp = self,
                    "dropping a {} that cannot be scaled",
                    meta.api()
                );
            }
            return false;
        }
        meta.tags_contain_only(&["video", "orientation", "colorspace"])
            || self.parent_transform_meta(outbuf, meta, inbuf)
    }

    fn before_transform(&self, inbuf: &gst::BufferRef) {
        let segment = self.obj().segment();
        let time = segment
            .downcast_ref::<gst::ClockTime>()
            .and_then(|s| s.to_stream_time(inbuf.pts()?));
        if let Some(time) = time
            && let Err(err) = self.obj().sync_values(time)
        {
            gst::warning!(
                CAT,
                imp = self,
                "controlled properties keep their values: {err}"
            );
        }
    }

    fn submit_input_buffer(
        &self,
        is_discont: bool,
        inbuf: gst::Buffer,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        // Here, because between two frames nothing relies on the mode.
        let state = lock(&self.state);
        let native_scale = state.native_scale;
        let passes = (state.negotiated.as_ref()).map(|n| n.passes_through(native_scale));
        drop(state);
        if let Some(passes) = passes
            && passes != self.obj().is_passthrough()
        {
            self.obj().set_passthrough(passes);
            self.obj().reconfigure_src();
        }
        let result = self.parent_submit_input_buffer(is_discont, inbuf);
        if result == Ok(gst_base::BASE_TRANSFORM_FLOW_DROPPED) {
            lock(&self.state).stats.dropped += 1;
        }
        result
    }

    fn transform(
        &self,
        inbuf: &gst::Buffer,
        outbuf: &mut gst::BufferRef,
    ) -> Result<gst::FlowSuccess, gst::FlowError> {
        let mut state = lock(&self.state);
        let Some(negotiated) = state.negotiated.clone() else {
            return Err(gst::FlowError::NotNegotiated);
        };
        // Taken out, so that no lock is held while it works.
        let mut loaded = match mem::replace(&mut state.engine, Engine::Busy(None)) {
            Engine::Ready(loaded) => loaded,
            other => {
                state.engine = other;
                return Err(gst::FlowError::Flushing);
            }
        };
        drop(state);

        let started = Instant::now();
        let result = self.upscale(&mut loaded, &negotiated, inbuf, outbuf);
        self.put_back(loaded, result.is_ok().then_some(started));
        match result {
            Ok(()) => Ok(gst::FlowSuccess::Ok),
            Err(Error::Cancelled) => Err(gst::FlowError::Flushing),
            Err(reason) => {
                gst::element_imp_error!(self, gst::StreamError::Failed, ("{reason}"));
                Err(gst::FlowError::Error)
            }
        }
    }
}

impl VideoFilterImpl for TadsrUpscale {
    fn set_info(
        &self,
        incaps: &gst::Caps,
        in_info: &VideoInfo,
        outcaps: &gst::Caps,
        out_info: &VideoInfo,
    ) -> Result<(), gst::LoggableError> {
        gst::info!(CAT, imp = self, "from {incaps} to {outcaps}");
        let frame = planes::frame_info(in_info, incaps)
            .ok_or_else(|| gst::loggable_error!(CAT, "no frames of format {}", in_info.format()))?;
        // From here on no model takes over that does not serve the scale; the one in use may still be one.
        let negotiated = Some(Negotiated {
            input: in_info.clone(),
            output: out_info.clone(),
            frame,
        });
        let before = mem::replace(&mut lock(&self.state).negotiated, negotiated);
        if let Err(reason) = self.serve_scale() {
            // The pads keep their caps, and with them again there is no call of this.
            lock(&self.state).negotiated = before;
            self.refuse(incaps, &reason);
            return Err(gst::loggable_error!(CAT, "{reason}"));
        }
        let mut state = lock(&self.state);
        if let Engine::Ready(loaded) = &state.engine {
            state.active_model = Some(loaded.name(state.ratio()));
        }
        let native_scale = state.native_scale;
        let passes = (state.negotiated.as_ref()).is_some_and(|n| n.passes_through(native_scale));
        drop(state);
        self.obj().set_passthrough(passes);
        self.obj().notify("active-model");
        Ok(())
    }
}

impl State {
    /// Takes over what the read-only properties tell of `engine`.
    fn describe(&mut self, engine: &Engine) {
        match engine {
            Engine::Ready(loaded) => {
                self.max_scale = Some(loaded.upscaler.max_scale());
                self.native_scale = loaded.upscaler.native_scale();
                self.active_device = Some(loaded.upscaler.active_device().to_string());
                self.active_model = Some(loaded.name(self.ratio()));
            }
            _ => {
                self.native_scale = None;
                self.active_device = None;
                self.active_model = Some("passthrough".into());
            }
        }
    }

    /// Puts `engine` in place, behind the frame that is being upscaled. Returns what it replaces, to be dropped
    /// without the lock.
    fn install(&mut self, engine: Engine) -> Engine {
        self.describe(&engine);
        match (mem::take(&mut self.engine), engine) {
            (Engine::Busy(next), Engine::Ready(loaded)) => {
                self.engine = Engine::Busy(Some(loaded));
                next.map_or(Engine::None, Engine::Ready)
            }
            (old, engine) => {
                self.engine = engine;
                old
            }
        }
    }

    /// Why the model in use does not serve the scale in force; `None` if it does.
    fn overscale(&self) -> Option<String> {
        overscale(self.negotiated.as_ref()?.ratio(), self.max_scale?)
    }

    /// The scale in force; before there is one, the usual.
    fn ratio(&self) -> f64 {
        self.negotiated.as_ref().map_or(2.0, Negotiated::ratio)
    }
}

impl Loaded {
    fn name(&self, scale: f64) -> String {
        match self.plain {
            true => "bicubic".into(),
            false => self.upscaler.active_model(scale).into(),
        }
    }
}

impl TadsrUpscale {
    /// The scale in force; `None` when the property asks for one that does not exist.
    fn scale(&self) -> Option<Scale> {
        let state = lock(&self.state);
        let (max, native) = (state.max_scale, state.native_scale);
        let bypass = matches!(state.engine, Engine::Bypass);
        drop(state);
        if bypass {
            return Scale::new(1.0, 1.0, None);
        }
        let scale = lock(&self.settings).scale;
        Scale::new(scale, max.unwrap_or(MAX_SCALE), native)
    }

    /// Why video with the fixed `caps` cannot be upscaled, where it can be said better than "not negotiated".
    fn refusal(&self, caps: &gst::CapsRef) -> Option<String> {
        let structure = caps.structure(0)?;
        let fallback = lock(&self.settings).fallback;
        let mode = structure
            .get::<&str>("interlace-mode")
            .unwrap_or("progressive");
        if mode != "progressive" && fallback != Fallback::Passthrough {
            return Some(format!(
                "Interlaced video (interlace-mode={mode}) cannot be upscaled: \
                 put 'deinterlace' before this element or set fallback=passthrough"
            ));
        }
        if structure.get::<&str>("multiview-mode") == Ok("separated") {
            return Some("Video with separate buffers for each view cannot be upscaled".into());
        }
        let (width, height) = (
            structure.get::<i32>("width"),
            structure.get::<i32>("height"),
        );
        let (Ok(width), Ok(height)) = (width, height) else {
            return None;
        };
        let value = lock(&self.settings).scale;
        // The fallback to bicubic interpolation serves every scale.
        if fallback != Fallback::Bicubic
            && mode == "progressive"
            && let Some(max) = lock(&self.state).max_scale
            && let Some(reason) = overscale(value, max)
        {
            return Some(reason);
        }
        match self.scale() {
            None => Some(format!(
                "scale={value} is no scale: use 0 or 1 to {MAX_SCALE}"
            )),
            Some(scale) if mode == "progressive" => scale
                .transform(gst::PadDirection::Sink, structure)
                .is_none()
                .then(|| {
                    format!(
                        "{width}x{height} times {value} is not a size in whole pixels \
                         up to {MAX_SIDE}: choose another scale or crop before this element"
                    )
                }),
            Some(_) => None,
        }
    }

    /// Says why video with the input `caps` is refused, once: upstream may try again with every buffer.
    fn refuse(&self, caps: &gst::Caps, reason: &str) {
        let told = lock(&self.state).refused.replace(caps.clone());
        if told.as_ref() != Some(caps) {
            gst::element_imp_error!(self, gst::StreamError::Format, ("{reason}"), ["{caps}"]);
        }
    }

    /// After negotiation: where the model in use does not serve the scale, replaces it as the fallback to bicubic
    /// interpolation has it, with a warning.
    ///
    /// # Errors
    /// Says why the model does not serve the scale when it is not replaced.
    fn serve_scale(&self) -> Result<(), String> {
        let Some(reason) = lock(&self.state).overscale() else {
            return Ok(());
        };
        let settings = lock(&self.settings).clone();
        if settings.fallback != Fallback::Bicubic {
            return Err(reason);
        }
        let engine = self
            .bicubic(&settings)
            .map_err(|err| format!("{reason}; {err}"))?;
        let mut state = lock(&self.state);
        if state.overscale().is_none() {
            // A model that was loaded in the background serves it.
            return Ok(());
        }
        let old = state.install(engine);
        drop(state);
        drop(old);
        gst::element_imp_warning!(
            self,
            gst::LibraryError::Settings,
            ("{reason}; upscaling without a network")
        );
        self.notify_active();
        Ok(())
    }

    /// Loads the model that `settings` ask for, or what the fallback puts in its place, with a warning.
    fn load_or_fall_back(&self, settings: &Settings) -> Result<Engine, gst::ErrorMessage> {
        if Scale::new(settings.scale, MAX_SCALE, None).is_none() {
            return Err(gst::error_msg!(
                gst::LibraryError::Settings,
                (
                    "scale={} is no scale: use 0 or 1 to {MAX_SCALE}",
                    settings.scale
                )
            ));
        }
        let device: Device = settings
            .device
            .parse()
            .map_err(|err| gst::error_msg!(gst::LibraryError::Settings, ("{err}")))?;

        let err = match self.load(settings, &settings.model, device) {
            Ok(upscaler) => return Ok(Engine::ready(upscaler)),
            Err(err) => err,
        };
        let (instead, engine) = match settings.fallback {
            Fallback::Error => return Err(error_message(&err)),
            Fallback::Cpu => {
                let loaded = self.load(settings, &settings.model, Device::Cpu);
                let upscaler = loaded.map_err(|err| error_message(&err))?;
                ("running on the CPU", Engine::ready(upscaler))
            }
            Fallback::Passthrough => ("leaving the video as it is", Engine::Bypass),
            Fallback::Bicubic => {
                let engine = self.bicubic(settings).map_err(|_| error_message(&err))?;
                ("upscaling without a network", engine)
            }
        };
        gst::element_imp_warning!(self, gst::ResourceError::OpenRead, ("{err}; {instead}"));
        Ok(engine)
    }

    fn load(&self, settings: &Settings, model: &str, device: Device) -> tadsr::Result<Upscaler> {
        let mut upscaler = Upscaler::load(model, device)?;
        upscaler.set_threads(settings.threads as usize)?;
        settings.apply(&mut upscaler)?;
        let cancel = self.cancel.clone();
        upscaler.set_observer(Some(Box::new(move |_| {
            match cancel.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })));
        match overscale(settings.scale, upscaler.max_scale()) {
            Some(reason) => Err(Error::Scale(reason)),
            None => Ok(upscaler),
        }
    }

    /// The engine of the fallback to bicubic interpolation: the default model is the frame around it.
    fn bicubic(&self, settings: &Settings) -> tadsr::Result<Engine> {
        let upscaler = self.load(settings, "", Device::Cpu)?;
        let plain = true;
        Ok(Engine::Ready(Loaded { upscaler, plain }))
    }

    /// After `model` was set in a started element: loads it in another thread and lets it take over between two
    /// frames. If it cannot, the old one stays and a warning message says why.
    fn load_in_background(&self) {
        let mut state = lock(&self.state);
        if matches!(state.engine, Engine::None) {
            return;
        }
        state.generation += 1;
        let generation = state.generation;
        drop(state);

        let settings = lock(&self.settings).clone();
        self.obj().call_async(move |element| {
            let imp = element.imp();
            let device = settings.device.parse().unwrap_or_default();
            let result = imp.load(&settings, &settings.model, device);
            imp.take_over(generation, result);
        });
    }

    fn take_over(&self, generation: u64, result: tadsr::Result<Upscaler>) {
        let mut state = lock(&self.state);
        if state.generation != generation {
            return;
        }
        let ratio = state.ratio();
        let result = result.and_then(|upscaler| match overscale(ratio, upscaler.max_scale()) {
            Some(reason) if state.negotiated.is_some() => Err(Error::Scale(reason)),
            _ => Ok(upscaler),
        });
        let upscaler = match result {
            Ok(upscaler) => upscaler,
            Err(err) => {
                drop(state);
                gst::element_imp_warning!(
                    self,
                    gst::ResourceError::OpenRead,
                    ("{err}; the old model stays in use")
                );
                return;
            }
        };
        let old = state.install(Engine::ready(upscaler));
        drop(state);
        drop(old);
        self.notify_active();
        // Other sizes may have become possible.
        self.obj().reconfigure_src();
    }

    /// Upscales one frame.
    ///
    /// # Errors
    /// Says what is wrong with a buffer, or why the engine failed and the fallback did not help; [`Error::Cancelled`]
    /// when the frame is not wanted any more.
    fn upscale(
        &self,
        loaded: &mut Loaded,
        negotiated: &Negotiated,
        inbuf: &gst::Buffer,
        outbuf: &mut gst::BufferRef,
    ) -> tadsr::Result<()> {
        let settings = lock(&self.settings).clone();
        let in_layout = Layout::of(inbuf, &negotiated.input).map_err(Error::Frame)?;
        let out_layout = Layout::of(outbuf, &negotiated.output).map_err(Error::Frame)?;
        let unmapped = |err: glib::BoolError| Error::Frame(err.to_string());
        let data = inbuf.map_readable().map_err(unmapped)?;
        let mut out_data = outbuf.map_writable().map_err(unmapped)?;
        let src = in_layout
            .frame(negotiated.frame, &data)
            .map_err(Error::Frame)?;
        let mut dst = out_layout
            .frame_mut(negotiated.out_frame(), &mut out_data)
            .map_err(Error::Frame)?;

        let upscaler = &mut loaded.upscaler;
        if !loaded.plain {
            let result = settings.apply(upscaler);
            let result = result.and_then(|()| upscaler.upscale_into(&src, &mut dst));
            let err = match result {
                Err(err) if settings.fallback == Fallback::Bicubic => err,
                result => return result,
            };
            if matches!(err, Error::Cancelled) {
                return Err(err);
            }
            gst::element_imp_warning!(
                self,
                gst::StreamError::Failed,
                ("{err}; upscaling without a network from here")
            );
            loaded.plain = true;
            lock(&self.state).active_model = Some(loaded.name(1.0));
            self.obj().notify("active-model");
        }
        loaded.upscaler.set_strength(0.0);
        loaded.upscaler.upscale_into(&src, &mut dst)
    }

    /// Ends what [`Self::transform`] began; `started` is when, if the frame is to be counted.
    fn put_back(&self, loaded: Loaded, started: Option<Instant>) {
        let mut state = lock(&self.state);
        if let Some(started) = started {
            state.stats.count(started);
        }
        // A stopped element has no use for it.
        if let Engine::Busy(next) = mem::take(&mut state.engine) {
            state.engine = Engine::Ready(next.unwrap_or(loaded));
        }
    }

    fn progress(&self, kind: gst::ProgressType, text: &str) {
        let message = gst::message::Progress::builder(kind, "load-model", text)
            .src(&*self.obj())
            .build();
        // Nobody may be listening.
        let _ = self.obj().post_message(message);
    }

    fn notify_active(&self) {
        self.obj().notify("active-device");
        self.obj().notify("active-model");
    }
}

/// The part of `structure` that is progressive video: all of it where it does not say.
fn progressive(structure: &gst::StructureRef) -> Option<gst::Structure> {
    with_interlace_modes(structure, &["progressive"])
}

/// The part of `structure` that is interlaced video. `fixed` says that it describes a stream, which is progressive
/// where it does not say.
fn interlaced(structure: &gst::StructureRef, fixed: bool) -> Option<gst::Structure> {
    if fixed && !structure.has_field("interlace-mode") {
        return None;
    }
    let mut result = with_interlace_modes(structure, &INTERLACED)?;
    if !result.has_field("interlace-mode") {
        result.set("interlace-mode", gst::List::new(INTERLACED));
    }
    Some(result)
}

const INTERLACED: [&str; 4] = ["interleaved", "mixed", "fields", "alternate"];

/// `structure` with those of its interlace modes that are among `modes`.
fn with_interlace_modes(structure: &gst::StructureRef, modes: &[&str]) -> Option<gst::Structure> {
    let mut result = structure.to_owned();
    if let Ok(mode) = structure.get::<&str>("interlace-mode") {
        return modes.contains(&mode).then_some(result);
    }
    if let Ok(list) = structure.get::<gst::ListRef>("interlace-mode") {
        let kept: Vec<&str> = list
            .iter()
            .filter_map(|mode| mode.get::<&str>().ok())
            .filter(|mode| modes.contains(mode))
            .collect();
        match kept[..] {
            [] => return None,
            [one] => result.set("interlace-mode", one),
            _ => result.set("interlace-mode", gst::List::new(kept)),
        }
    }
    Some(result)
}

/// Writes colorimetry and chroma site of the video with the caps structure `input` on `output`: absent, they would be
/// guessed from the size, and the guess changes where the size grows. What downstream would rather have is
/// overwritten, because nothing here converts colours; the caps are then refused.
fn write_colours(output: &mut gst::StructureRef, input: &gst::StructureRef) {
    let Ok(info) = VideoInfo::from_caps(&gst::Caps::from(input.to_owned())) else {
        return;
    };
    let side = |s: &gst::StructureRef, side| s.get::<i32>(side).ok();
    let grows = ["width", "height"]
        .into_iter()
        .any(|s| side(input, s) != side(output, s));

    // What is written but not understood is replaced by what it is taken for.
    let stated = input.get::<&str>("colorimetry").ok();
    let stated = stated.filter(|text| text.parse::<gst_video::VideoColorimetry>().is_ok());
    if let Some(stated) = stated {
        output.set("colorimetry", stated);
    } else if grows || output.has_field("colorimetry") {
        output.set("colorimetry", info.colorimetry().to_string());
    }
    let site = info.chroma_site();
    if let Ok(stated) = input.get::<&str>("chroma-site") {
        output.set("chroma-site", stated);
    } else if info.is_yuv() && !site.is_empty() && (grows || output.has_field("chroma-site")) {
        output.set("chroma-site", site.to_str().as_str());
    }
}

/// Adds to `outbuf` the region that `roi` marks. Its transform function would leave out the parameters.
fn add_scaled_roi(
    outbuf: &mut gst::BufferRef,
    roi: &gst_video::VideoRegionOfInterestMeta,
    input: &VideoInfo,
    output: &VideoInfo,
) {
    let scaled = |v: u32, to: u32, from: u32| {
        // A frame's sides are small and a region that lies outside may end anywhere.
        (u64::from(v) * u64::from(to) / u64::from(from)).min(u32::MAX.into()) as u32
    };
    let (x, y, w, h) = roi.rect();
    let rect = (
        scaled(x, output.width(), input.width()),
        scaled(y, output.height(), input.height()),
        scaled(w, output.width(), input.width()),
        scaled(h, output.height(), input.height()),
    );
    let mut copy = gst_video::VideoRegionOfInterestMeta::add(outbuf, roi.roi_type(), rect);
    copy.set_id(roi.id());
    copy.set_parent_id(roi.parent_id());
    for param in roi.params() {
        copy.add_param(param.to_owned());
    }
}

/// Why a model that serves scales up to `max` does not serve `scale`; `None` if it does. A scale that was made a
/// fraction may have grown by a millionth.
fn overscale(scale: f64, max: f64) -> Option<String> {
    (scale > max + 1e-6)
        .then(|| format!("a scale of {scale} is more than the model serves: at most {max}"))
}

fn error_message(err: &Error) -> gst::ErrorMessage {
    match err {
        Error::Device(_) => gst::error_msg!(gst::LibraryError::Init, ("{err}")),
        Error::Scale(_) | Error::Setting(_) => {
            gst::error_msg!(gst::LibraryError::Settings, ("{err}"))
        }
        Error::UnknownModel(_) => gst::error_msg!(gst::ResourceError::NotFound, ("{err}")),
        _ => gst::error_msg!(gst::ResourceError::OpenRead, ("{err}")),
    }
}

/// Locks; what a panic left behind is whole, since nothing is half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
