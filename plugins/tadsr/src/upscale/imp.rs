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
    collections::{HashSet, VecDeque},
    mem,
    ops::ControlFlow,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use gst::{glib, prelude::*, subclass::prelude::*};
use gst_base::{
    prelude::*,
    subclass::{
        base_transform::{GenerateOutputSuccess, InputBuffer, PrepareOutputBufferSuccess},
        prelude::*,
    },
};
use gst_video::{
    VideoColorimetry, VideoInfo, subclass::prelude::*, video_meta::VideoMetaTransformScale,
};
use tadsr::{
    Device, Error, Upscaler,
    engine::{self, Setting, Tile, Times},
    frame::{FrameInfo, FrameMut, FrameRef, MAX_SIDE, PixelFormat},
};

use super::{
    ColorFix, Fallback, Precision, gstcuda,
    planes::{self, Layout},
    scale::{MAX_SCALE, Scale},
    stats::Stats,
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
    queue_depth: u32,
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
            queue_depth: 2,
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
    /// Sets on `upscaler` everything that may change from frame to frame. Returns the settings that it refuses, which
    /// keep their value before.
    fn apply(&self, upscaler: &mut Upscaler) -> Vec<(Setting, Error)> {
        let tile = match self.tile_size {
            0 => Tile::Auto,
            side => Tile::Side(side as usize),
        };
        let color_fix = match self.color_fix {
            ColorFix::Wavelet => engine::ColorFix::Wavelet,
            ColorFix::Adain => engine::ColorFix::Adain,
            ColorFix::None => engine::ColorFix::None,
        };
        let results = [
            (
                Setting::Strength,
                upscaler.set_strength(self.strength as f32),
            ),
            (
                Setting::Precision,
                upscaler.set_precision(self.precision.into()),
            ),
            (Setting::Noise, upscaler.set_noise(self.noise as f32)),
            (Setting::Seed, upscaler.set_seed(self.seed)),
            (Setting::Steps, upscaler.set_steps(self.steps as usize)),
            (Setting::Tile, upscaler.set_tile(tile)),
            (
                Setting::TileOverlap,
                upscaler.set_tile_overlap(self.tile_overlap as usize),
            ),
            (Setting::ColorFix, upscaler.set_color_fix(color_fix)),
        ];
        let refused = results
            .into_iter()
            .filter_map(|(setting, result)| Some((setting, result.err()?)));
        refused.collect()
    }
}

/// What does the work, from READY to PAUSED and back.
#[derive(Default)]
enum Engine {
    /// The element is not started.
    #[default]
    None,
    Ready(Loaded),
    /// The streaming thread has it.
    Busy,
    /// There is no model and the fallback is passthrough.
    Bypass,
}

/// A model and how it is used.
struct Loaded {
    upscaler: Box<Upscaler>,
    /// What it was asked for by.
    model: String,
    /// The fallback is bicubic: the network's residual is left out.
    plain: bool,
    /// Warnings of refused settings that were posted.
    warned: HashSet<String>,
}

/// A frame in work: what came in, and what goes out in its place.
struct Frame {
    input: gst::Buffer,
    output: gst::Buffer,
    started: Instant,
}

/// What waits for frames in work.
enum Item {
    Frame(Frame),
    /// Pushed after the frames before it.
    Event(gst::Event),
}

/// What goes in and what comes out.
#[derive(Clone)]
struct Negotiated {
    input: VideoInfo,
    output: VideoInfo,
    /// The input as the library sees it.
    frame: FrameInfo,
    /// Whether input and output are in a CUDA device's memory.
    on_device: [bool; 2],
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
        size(&self.input) == size(&self.output)
            && self.on_device[0] == self.on_device[1]
            && !(progressive && native_scale == Some(1.0))
    }
}

#[derive(Default)]
struct State {
    engine: Engine,
    /// A model that was loaded meanwhile; it takes over with the next frame.
    next: Option<Loaded>,
    /// Counts the models asked for and the stops, so that a model that was loaded too late is recognised.
    generation: u64,
    /// The largest scale that the model serves.
    max_scale: Option<f64>,
    /// The only scale that the model itself makes, for models that have only one.
    native_scale: Option<f64>,
    /// Frames that the engine has in work before one comes out.
    depth: usize,
    /// The latency that was told.
    latency: gst::ClockTime,
    /// Of the caps in force.
    negotiated: Option<Negotiated>,
    /// Input caps that were refused with an error message.
    refused: Option<gst::Caps>,
    active_device: Option<String>,
    active_model: Option<String>,
    stats: Stats,
}

#[derive(Default)]
pub struct TadsrUpscale {
    settings: Mutex<Settings>,
    state: Mutex<State>,
    /// Frames in work, oldest first, and what comes between them. Of the streaming thread.
    queue: Mutex<VecDeque<Item>>,
    /// The frame in work is not wanted any more: the pads are flushing or the element stops.
    cancel: Arc<AtomicBool>,
    /// The CUDA context that the pipeline shares, from READY to PAUSED and back.
    cuda: gstcuda::Slot,
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
                    .blurb(
                        "Device that runs the model: auto, cpu, cuda or cuda:N; auto is the CPU; published models run on \
                         CUDA devices where the plugin was built with the feature cuda",
                    )
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
                         instructions for them. Published models are computed in f32 on the CPU, on CUDA devices in f16, or in f32 or \
                         bf16 where that is asked for",
                    )
                    .mutable_playing()
                    .build(),
                glib::ParamSpecEnum::builder_with_default("fallback", default.fallback)
                    .nick("Fallback")
                    .blurb("What to do when the model or the device cannot be used")
                    .mutable_ready()
                    .build(),
                glib::ParamSpecUInt::builder("queue-depth")
                    .nick("Queue depth")
                    .blurb(
                        "Frames that a CUDA device has in work at a time, so that it computes while others are copied; \
                         each but the first delays the video by a frame. The CPU has one",
                    )
                    .minimum(1)
                    .maximum(16)
                    .default_value(default.queue_depth)
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
                         (dropped), frames per second from the first to the latest (fps), milliseconds that a frame \
                         spends here: mean (mean-ms) and 99th percentile of the latest 1000 (p99-ms). On a CUDA device \
                         also the mean milliseconds by its clock (upload-ms, compute-ms, download-ms) and bytes of its \
                         memory (device-memory)",
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
                // Of what is no scale at all upstream would only hear that nothing can be negotiated.
                if self.scale().is_none() {
                    self.refuse_current();
                }
                // Upstream may have to change its size, or what comes out does.
                self.obj().reconfigure_sink();
                self.obj().reconfigure_src();
            }
            "device" => settings.device = text(),
            "strength" => settings.strength = value.get().expect("type checked upstream"),
            "threads" => settings.threads = value.get().expect("type checked upstream"),
            "precision" => settings.precision = value.get().expect("type checked upstream"),
            "queue-depth" => settings.queue_depth = value.get().expect("type checked upstream"),
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
            "queue-depth" => lock(&self.settings).queue_depth.to_value(),
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
            let mut caps = gst_video::VideoCapsBuilder::new()
                .format_list(formats)
                .width_range(1..=MAX_SIDE as i32)
                .height_range(1..=MAX_SIDE as i32)
                .build();
            caps.merge(ON_DEVICE.clone());
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

    fn set_context(&self, context: &gst::Context) {
        if let Some(ordinal) = self.ordinal() {
            let element = self.obj();
            self.cuda.offer(element.upcast_ref(), context, ordinal);
        }
        self.parent_set_context(context);
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
        self.cuda.stop();
        if let Some(ordinal) = self.ordinal() {
            let element = self.obj();
            self.cuda.start(element.upcast_ref(), ordinal);
        }
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
            Err(_) => {
                // There will be no stop.
                self.cuda.stop();
                self.progress(gst::ProgressType::Error, "No model");
            }
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
        lock(&self.queue).clear();
        self.cuda.stop();
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
        let cuda = self.reaches_device();
        let (mut result, mut elsewhere) = (gst::Caps::new_empty(), gst::Caps::new_empty());
        for (structure, features) in caps.iter_with_features() {
            let on_device = gstcuda::is_feature(features);
            let same = |s: gst::Structure| {
                let mut caps = gst::Caps::new_empty();
                caps.make_mut()
                    .append_structure_full(s, Some(features.to_owned()));
                caps
            };
            match scale {
                // Without CUDA, what is in a device's memory passes through or not at all.
                Some(scale) if !scale.is_identity() && (cuda || !on_device) => {
                    let to_scale = match passes_interlaced {
                        true => progressive(structure),
                        false => Some(structure.to_owned()),
                    };
                    let scaled = to_scale.and_then(|s| scale.transform(direction, &s));
                    if let Some(scaled) = scaled {
                        // On the way, frames may move to the device's memory and back.
                        if cuda {
                            elsewhere.merge(placed(scaled.clone(), !on_device));
                        }
                        result.merge(match on_device {
                            true => placed(scaled, true),
                            false => same(scaled),
                        });
                    }
                    let fixed = direction == gst::PadDirection::Sink && caps.is_fixed();
                    if passes_interlaced && let Some(interlaced) = interlaced(structure, fixed) {
                        result.merge(same(interlaced));
                    }
                }
                Some(scale) if scale.is_identity() => result.merge(same(structure.to_owned())),
                _ => {}
            }
        }
        result.merge(elsewhere);
        // Whoever can choose is to leave frames where they are used.
        if cuda && direction == gst::PadDirection::Src {
            let mut device_first = result.intersect(&ON_DEVICE);
            device_first.merge(result);
            result = device_first;
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
            gst::EventType::FlushStop => {
                self.discard();
                self.cancel.store(false, Ordering::Relaxed);
            }
            _ => {}
        }
        if event.is_serialized() && !lock(&self.queue).is_empty() {
            if waits(event.type_()) {
                lock(&self.queue).push_back(Item::Event(event));
                return true;
            }
            // What keeps the frames from going out will keep the event, too.
            let _ = self.drain();
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

    /// Latency grows by the frames in work. Who asks for a drain or for other buffers wants them out.
    fn query(&self, direction: gst::PadDirection, query: &mut gst::QueryRef) -> bool {
        let drains = [gst::QueryType::Drain, gst::QueryType::Allocation];
        if direction == gst::PadDirection::Sink && drains.contains(&query.type_()) {
            // What keeps the frames from going out is told with the next one.
            let _ = self.drain();
        }
        if query.type_() == gst::QueryType::Context
            && let Some(context) = self.cuda.get()
            && context.answer(self.obj().upcast_ref(), query)
        {
            return true;
        }
        if !BaseTransformImplExt::parent_query(self, direction, query) {
            return false;
        }
        if direction == gst::PadDirection::Src
            && let gst::QueryViewMut::Latency(query) = query.view_mut()
        {
            let own = self.latency();
            let (live, min, max) = query.result();
            query.set(live, min + own, max.map(|max| max + own));
        }
        true
    }

    /// Frames in work keep their buffers.
    fn propose_allocation(
        &self,
        decide_query: Option<&gst::query::Allocation>,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        // Frames that are passed through are allocated by others.
        if decide_query.is_some()
            && let Some((pool, size)) = self.pool_for(query)
        {
            query.add_allocation_pool(Some(&pool), size, 0, 0);
        }
        self.parent_propose_allocation(decide_query, query)?;
        // Without it, the answer is that of another element: frames pass through.
        if decide_query.is_some() {
            let depth = lock(&self.state).depth as u32;
            more_buffers(query, |min| min.max(depth + 1));
        }
        Ok(())
    }

    /// As above.
    fn decide_allocation(
        &self,
        query: &mut gst::query::Allocation,
    ) -> Result<(), gst::LoggableError> {
        if on_device(query.get().0) {
            // Whatever downstream offers: frames are to be in this element's context.
            let (pool, size) = self
                .pool_for(query)
                .ok_or_else(|| gst::loggable_error!(CAT, "no CUDA memory for frames"))?;
            match query.allocation_pools().next() {
                Some((_, _, min, max)) => {
                    query.set_nth_allocation_pool(0, Some(&pool), size, min, max);
                }
                None => query.add_allocation_pool(Some(&pool), size, 0, 0),
            }
        }
        let depth = lock(&self.state).depth as u32;
        more_buffers(query, |min| min + depth.saturating_sub(1));
        self.parent_decide_allocation(query)
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
            self.drain()?;
            self.obj().set_passthrough(passes);
            self.obj().reconfigure_src();
        }
        // Not `is_discont`, which stays until a frame comes out. The frame that comes out next gets the mark; after one that
        // is left out below, that may be one before it.
        if inbuf.flags().contains(gst::BufferFlags::DISCONT) {
            self.drain()?;
        }
        let src_flags = self.obj().src_pad().pad_flags();
        if src_flags.contains(gst::PadFlags::NEED_RECONFIGURE) && self.refuse_current() {
            return Err(gst::FlowError::NotNegotiated);
        }
        let result = self.parent_submit_input_buffer(is_discont, inbuf);
        if result == Ok(gst_base::BASE_TRANSFORM_FLOW_DROPPED) {
            lock(&self.state).stats.dropped += 1;
        }
        result
    }

    /// A frame goes into work; the oldest in work comes out when there are as many as there may be.
    fn generate_output(&self) -> Result<GenerateOutputSuccess, gst::FlowError> {
        if self.obj().is_passthrough() {
            return self.parent_generate_output();
        }
        let Some(input) = self.take_queued_buffer() else {
            // Called again after a frame was pushed.
            self.push_events();
            return Ok(GenerateOutputSuccess::NoOutput);
        };
        let prepared = self.parent_prepare_output_buffer(InputBuffer::Readable(&input))?;
        let PrepareOutputBufferSuccess::Buffer(output) = prepared else {
            // Only what transforms in place does that.
            return Err(gst::FlowError::Error);
        };
        let started = Instant::now();
        let done = self.work(Some(Frame {
            input,
            output,
            started,
        }))?;
        Ok(done.map_or(
            GenerateOutputSuccess::NoOutput,
            GenerateOutputSuccess::Buffer,
        ))
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
        // The caps before are still those downstream. Frames that cannot go out are lost with what keeps them.
        if self.drain().is_err() {
            self.discard();
        }
        // From here on no model takes over that does not serve the scale; the one in use may still be one.
        let negotiated = Some(Negotiated {
            input: in_info.clone(),
            output: out_info.clone(),
            frame,
            on_device: [on_device(Some(incaps)), on_device(Some(outcaps))],
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
        self.tell_latency();
        Ok(())
    }
}

impl State {
    /// Takes over what the read-only properties tell of the model; `None` is passthrough.
    fn describe(&mut self, loaded: Option<&Loaded>) {
        match loaded {
            Some(loaded) => {
                self.depth = loaded.upscaler.queue_depth();
                self.max_scale = Some(loaded.upscaler.max_scale());
                self.native_scale = loaded.upscaler.native_scale();
                self.active_device = Some(loaded.upscaler.active_device().to_string());
                self.active_model = Some(loaded.name(self.ratio()));
            }
            None => {
                self.depth = 1;
                self.native_scale = None;
                self.active_device = None;
                self.active_model = Some("passthrough".into());
            }
        }
    }

    /// Takes the engine out, so that it works without a lock; `None` when there is none.
    fn take(&mut self) -> Option<Loaded> {
        match mem::replace(&mut self.engine, Engine::Busy) {
            Engine::Ready(loaded) => Some(loaded),
            other => {
                self.engine = other;
                None
            }
        }
    }

    /// Ends what [`Self::take`] began. A stopped element has no use for it.
    fn put_back(&mut self, loaded: Loaded) {
        if matches!(self.engine, Engine::Busy) {
            self.engine = Engine::Ready(loaded);
        }
    }

    /// Puts a model in place, behind the frames in work; `None` is passthrough. Returns what it replaces, to be dropped
    /// without the lock.
    fn install(&mut self, loaded: Option<Loaded>) -> (Engine, Option<Loaded>) {
        self.describe(loaded.as_ref());
        let waits = match &self.engine {
            Engine::Busy => true,
            Engine::Ready(old) => old.upscaler.in_flight() > 0,
            Engine::None | Engine::Bypass => false,
        };
        match loaded {
            Some(loaded) if waits => (Engine::None, self.next.replace(loaded)),
            loaded => {
                let engine = loaded.map_or(Engine::Bypass, Engine::Ready);
                (mem::replace(&mut self.engine, engine), self.next.take())
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
    fn new(upscaler: Upscaler, model: &str, plain: bool) -> Self {
        Self {
            upscaler: Box::new(upscaler),
            model: model.into(),
            plain,
            warned: HashSet::new(),
        }
    }

    /// Whether it runs on a CUDA device.
    fn on_device(&self) -> bool {
        self.upscaler.active_device() != Device::Cpu
    }

    fn name(&self, scale: f64) -> String {
        match self.plain {
            true => "bicubic".into(),
            false => self.upscaler.active_model(scale).into(),
        }
    }
}

impl TadsrUpscale {
    /// The number of the CUDA device that is asked for, if one is.
    fn ordinal(&self) -> Option<usize> {
        match lock(&self.settings).device.parse() {
            Ok(Device::Cuda(ordinal)) => Some(ordinal),
            _ => None,
        }
    }

    /// Whether frames may be in a CUDA device's memory; before the start, whether one is asked for.
    fn reaches_device(&self) -> bool {
        let started = !matches!(lock(&self.state).engine, Engine::None);
        self.cuda.get().is_some() || (!started && self.ordinal().is_some())
    }

    /// A pool in the CUDA device's memory and the size of its buffers, where `query` is for frames there.
    fn pool_for(&self, query: &gst::query::Allocation) -> Option<(gst::BufferPool, u32)> {
        let caps = query.get_owned().0.filter(|caps| on_device(Some(caps)))?;
        let size = VideoInfo::from_caps(&caps).ok()?.size() as u32;
        let pool = self.cuda.get()?.pool()?;
        let mut config = pool.config();
        config.set_params(Some(&caps), size, 0, 0);
        config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
        pool.set_config(config).ok()?;
        // Rows are longer there.
        let size = pool.config().params().map_or(size, |(_, size, ..)| size);
        Some((pool, size))
    }

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

    /// Says why the video that comes in cannot be upscaled any more, if so.
    fn refuse_current(&self) -> bool {
        let Some(caps) = self.obj().sink_pad().current_caps() else {
            return false;
        };
        let refusal = self.refusal(&caps);
        if let Some(reason) = &refusal {
            self.refuse(&caps, reason);
        }
        refusal.is_some()
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
        let loaded = self
            .bicubic(&settings)
            .map_err(|err| format!("{reason}; {err}"))?;
        let mut state = lock(&self.state);
        if state.overscale().is_none() {
            // A model that was loaded in the background serves it.
            return Ok(());
        }
        let old = state.install(Some(loaded));
        drop(state);
        drop(old);
        gst::element_imp_warning!(self, gst::LibraryError::Settings, ("{reason}; {PLAIN}"));
        self.notify_active();
        Ok(())
    }

    /// Loads the model that `settings` ask for, or what the fallback puts in its place, with a warning: `None` to pass
    /// the video through.
    fn load_or_fall_back(&self, settings: &Settings) -> Result<Option<Loaded>, gst::ErrorMessage> {
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

        let err = match self.load_model(settings, device) {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(err) => err,
        };
        let (instead, loaded) = match settings.fallback {
            Fallback::Error | Fallback::Cpu => return Err(error_message(&err)),
            Fallback::Passthrough => ("leaving the video as it is", None),
            Fallback::Bicubic => {
                let loaded = self.bicubic(settings).map_err(|_| error_message(&err))?;
                (PLAIN, Some(loaded))
            }
        };
        gst::element_imp_warning!(self, gst::ResourceError::OpenRead, ("{err}; {instead}"));
        Ok(loaded)
    }

    /// Loads the model that `settings` ask for on `device`, or on the CPU as the fallback has it, with a warning.
    fn load_model(&self, settings: &Settings, device: Device) -> tadsr::Result<Loaded> {
        let model = &settings.model;
        let upscaler = match self.load(settings, model, device) {
            Err(err) if settings.fallback == Fallback::Cpu && matches!(device, Device::Cuda(_)) => {
                let upscaler = self.load(settings, model, Device::Cpu)?;
                gst::element_imp_warning!(self, gst::ResourceError::OpenRead, ("{err}; {ON_CPU}"));
                upscaler
            }
            result => result?,
        };
        Ok(Loaded::new(upscaler, model, false))
    }

    fn load(&self, settings: &Settings, model: &str, device: Device) -> tadsr::Result<Upscaler> {
        let mut upscaler = match (device, self.cuda.get()) {
            (Device::Cuda(ordinal), Some(context)) => {
                Upscaler::load_in(model, context.device(ordinal)?)?
            }
            _ => Upscaler::load(model, device)?,
        };
        upscaler.set_threads(settings.threads as usize)?;
        upscaler.set_queue_depth(settings.queue_depth as usize);
        for (setting, err) in settings.apply(&mut upscaler) {
            // A setting that the model lacks is warned of with the first frame.
            if upscaler.capabilities().has(setting) {
                return Err(err);
            }
        }
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

    /// The fallback to bicubic interpolation: the default model is the frame around it.
    fn bicubic(&self, settings: &Settings) -> tadsr::Result<Loaded> {
        let upscaler = self.load(settings, "", Device::Cpu)?;
        Ok(Loaded::new(upscaler, "", true))
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
            let result = imp.load_model(&settings, device);
            imp.take_over(generation, result);
        });
    }

    fn take_over(&self, generation: u64, result: tadsr::Result<Loaded>) {
        let mut state = lock(&self.state);
        if state.generation != generation {
            return;
        }
        let ratio = state.ratio();
        let result = result.and_then(|new| match overscale(ratio, new.upscaler.max_scale()) {
            Some(reason) if state.negotiated.is_some() => Err(Error::Scale(reason)),
            _ => Ok(new),
        });
        let loaded = match result {
            Ok(loaded) => loaded,
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
        let old = state.install(Some(loaded));
        drop(state);
        drop(old);
        self.notify_active();
        self.tell_latency();
        // Other sizes may have become possible.
        self.obj().reconfigure_src();
    }

    /// Puts `frame` into work and gets the oldest frame out when there are as many in work as there may be; without a
    /// frame, gets all out. All but the last that comes out are pushed.
    fn work(&self, frame: Option<Frame>) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let mut state = lock(&self.state);
        let Some(negotiated) = state.negotiated.clone() else {
            return Err(gst::FlowError::NotNegotiated);
        };
        let Some(mut loaded) = state.take() else {
            return Err(gst::FlowError::Flushing);
        };
        let next = state.next.take();
        drop(state);

        let result = self.swap(&mut loaded, next, &negotiated).and_then(|()| {
            let Some(frame) = frame else {
                return self.finish(&mut loaded, &negotiated, 0);
            };
            self.begin_or_recover(&mut loaded, &negotiated, &frame.input)?;
            lock(&self.queue).push_back(Item::Frame(frame));
            let most = loaded.upscaler.queue_depth() - 1;
            self.finish(&mut loaded, &negotiated, most)
        });
        if result.is_err() {
            loaded.upscaler.flush();
            lock(&self.queue).clear();
        }
        let mut state = lock(&self.state);
        state.stats.device_memory = loaded.upscaler.device_memory() as u64;
        state.put_back(loaded);
        result
    }

    /// Lets the model `next` take over, if there is one, behind the frames in work.
    fn swap(
        &self,
        loaded: &mut Loaded,
        next: Option<Loaded>,
        negotiated: &Negotiated,
    ) -> Result<(), gst::FlowError> {
        let Some(next) = next else {
            return Ok(());
        };
        let last = self.finish(loaded, negotiated, 0);
        *loaded = next;
        // The old one may have been replaced by its fallback since the new one came.
        lock(&self.state).describe(Some(loaded));
        self.notify_active();
        self.tell_latency();
        self.push(last?)?;
        self.push_events();
        Ok(())
    }

    /// Gets frames out until at most `most` are in work, or fewer if the engine has come to take fewer. All but the last
    /// are pushed.
    fn finish(
        &self,
        loaded: &mut Loaded,
        negotiated: &Negotiated,
        most: usize,
    ) -> Result<Option<gst::Buffer>, gst::FlowError> {
        let mut last = None;
        loop {
            let queue = lock(&self.queue);
            let frames = queue.iter().filter(|i| matches!(i, Item::Frame(_))).count();
            if frames <= most.min(loaded.upscaler.queue_depth() - 1) {
                return Ok(last);
            }
            drop(queue);
            self.push(last.take())?;
            let next = lock(&self.queue).pop_front();
            match next {
                Some(Item::Frame(mut frame)) => {
                    let done = self.end_or_recover(loaded, negotiated, &mut frame);
                    if done.is_err() {
                        // Before its buffer is given back, which a device may be reading.
                        loaded.upscaler.flush();
                    }
                    let times = done?;
                    lock(&self.state).stats.count(frame.started, times);
                    last = Some(frame.output);
                }
                Some(Item::Event(event)) => self.push_event(event),
                // Nobody else takes frames out.
                None => return Ok(None),
            }
        }
    }

    /// As [`Self::begin`], and if it fails, what [`Self::recover`] makes of it. If that fails, the frames before still go
    /// out.
    fn begin_or_recover(
        &self,
        loaded: &mut Loaded,
        negotiated: &Negotiated,
        input: &gst::Buffer,
    ) -> Result<(), gst::FlowError> {
        let Err(err) = self.begin(loaded, negotiated, input) else {
            return Ok(());
        };
        let recovered = self.recover(loaded, err);
        if recovered == Err(gst::FlowError::Error) && loaded.upscaler.in_flight() > 0 {
            let last = self.finish(loaded, negotiated, 0)?;
            self.push(last)?;
        }
        recovered
    }

    /// Sends a frame to a CUDA device.
    ///
    /// # Errors
    /// As [`Self::end`].
    fn begin(
        &self,
        loaded: &mut Loaded,
        negotiated: &Negotiated,
        input: &gst::Buffer,
    ) -> tadsr::Result<()> {
        if !loaded.upscaler.is_pipelined() {
            return Ok(());
        }
        self.apply(loaded);
        let upscaler = &mut loaded.upscaler;
        upscaler.set_resident(negotiated.on_device[1]);
        let (from, to) = (negotiated.frame, negotiated.out_frame());
        if negotiated.on_device[0]
            && let Some(context) = self.cuda.get()
            && let Some(mapped) = context
                .read(input, &negotiated.input, &from)
                .map_err(Error::Frame)?
        {
            // SAFETY: the planes lie in the memory of the context that the model was loaded in, and the queue keeps the
            // buffer until its frame is received or forgotten.
            return unsafe { upscaler.submit_device(from, mapped.planes(), to) };
        }
        with_input(input, negotiated, |src| upscaler.submit(src, to))
    }

    /// Gets the oldest frame back from a CUDA device, or upscales it here and now.
    ///
    /// # Errors
    /// Says what is wrong with a buffer, or why the engine failed; [`Error::Cancelled`] when the frame is not wanted any
    /// more.
    fn end(
        &self,
        loaded: &mut Loaded,
        negotiated: &Negotiated,
        frame: &mut Frame,
    ) -> tadsr::Result<Option<Times>> {
        if loaded.upscaler.is_pipelined() {
            let upscaler = &mut loaded.upscaler;
            let to = negotiated.out_frame();
            if negotiated.on_device[1]
                && let Some(context) = self.cuda.get()
                && let Some(mapped) = context
                    .write(frame.output.make_mut(), &negotiated.output, &to)
                    .map_err(Error::Frame)?
            {
                // SAFETY: the planes lie in the memory of the context that the model was loaded in, in a buffer that is
                // nobody else's.
                return unsafe { upscaler.receive_device(to, mapped.planes()) }.map(Some);
            }
            return with_output(&mut frame.output, negotiated, |dst| {
                upscaler.receive(dst).map(Some)
            });
        }
        self.apply(loaded);
        let upscaler = &mut loaded.upscaler;
        with_input(&frame.input, negotiated, |src| {
            with_output(&mut frame.output, negotiated, |dst| {
                upscaler.upscale_into(src, dst).map(|()| None)
            })
        })
    }

    /// As [`Self::end`], and if it fails, once more after [`Self::recover`].
    fn end_or_recover(
        &self,
        loaded: &mut Loaded,
        negotiated: &Negotiated,
        frame: &mut Frame,
    ) -> Result<Option<Times>, gst::FlowError> {
        self.end(loaded, negotiated, frame).or_else(|err| {
            self.recover(loaded, err)?;
            let again = self.end(loaded, negotiated, frame);
            again.map_err(|err| self.fail(&err))
        })
    }

    /// Makes the engine follow the properties. A setting that it refuses stays as it was, with one warning.
    fn apply(&self, loaded: &mut Loaded) {
        let mut settings = lock(&self.settings).clone();
        if loaded.plain {
            settings.strength = 0.0;
        }
        for (_, err) in settings.apply(&mut loaded.upscaler) {
            let reason = err.to_string();
            // The model of the fallback was not asked for.
            if !loaded.plain && loaded.warned.insert(reason.clone()) {
                gst::element_imp_warning!(
                    self,
                    gst::LibraryError::Settings,
                    ("{reason}; it stays as it was")
                );
            }
        }
    }

    /// After an engine failed in the middle of the video: replaces it as the fallback has it, with a warning. Frames in
    /// work are then upscaled anew.
    ///
    /// # Errors
    /// When nothing replaces it, with an error message; when the frame is not wanted any more, without.
    fn recover(&self, loaded: &mut Loaded, err: Error) -> Result<(), gst::FlowError> {
        let settings = lock(&self.settings).clone();
        let (instead, new) = match settings.fallback {
            // No engine would take the buffer, nor is one to blame.
            _ if matches!(err, Error::Cancelled | Error::Frame(_)) => return Err(self.fail(&err)),
            Fallback::Cpu if loaded.on_device() => {
                let model = &loaded.model;
                let upscaler = self.load(&settings, model, Device::Cpu);
                (ON_CPU, upscaler.map(|u| Loaded::new(u, model, false)))
            }
            Fallback::Bicubic if !loaded.plain => (PLAIN, self.bicubic(&settings)),
            _ => return Err(self.fail(&err)),
        };
        *loaded = new.map_err(|second| {
            gst::warning!(CAT, imp = self, "{instead} fails, too: {second}");
            self.fail(&err)
        })?;
        lock(&self.state).describe(Some(loaded));
        gst::element_imp_warning!(
            self,
            gst::StreamError::Failed,
            ("{err}; {instead} from here")
        );
        self.notify_active();
        self.tell_latency();
        Ok(())
    }

    /// What a failure makes of the flow; it is told unless somebody wanted it.
    fn fail(&self, err: &Error) -> gst::FlowError {
        if matches!(err, Error::Cancelled) {
            return gst::FlowError::Flushing;
        }
        gst::element_imp_error!(self, gst::StreamError::Failed, ("{err}"));
        gst::FlowError::Error
    }

    /// Gets all frames in work out, and pushes them.
    fn drain(&self) -> Result<(), gst::FlowError> {
        if lock(&self.queue).is_empty() {
            return Ok(());
        }
        let last = self.work(None)?;
        self.push(last)?;
        self.push_events();
        Ok(())
    }

    /// Forgets the frames in work, and what comes between them.
    fn discard(&self) {
        let taken = lock(&self.state).take();
        if let Some(mut loaded) = taken {
            // Before their buffers are given back, which a device may be reading.
            loaded.upscaler.flush();
            lock(&self.state).put_back(loaded);
        }
        lock(&self.queue).clear();
    }

    fn push(&self, buffer: Option<gst::Buffer>) -> Result<(), gst::FlowError> {
        match buffer {
            Some(buffer) => self.obj().src_pad().push(buffer).map(drop),
            None => Ok(()),
        }
    }

    /// Pushes the events before the next frame in work.
    fn push_events(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let Some(Item::Event(_)) = queue.front() else {
                return;
            };
            let event = queue.pop_front();
            drop(queue);
            if let Some(Item::Event(event)) = event {
                self.push_event(event);
            }
        }
    }

    fn push_event(&self, event: gst::Event) {
        // Downstream may not want it; nobody waits for the answer any more.
        let _ = self.parent_sink_event(event);
    }

    /// The time that the frames in work delay the video by: a frame's each, but for the one that comes out.
    fn latency(&self) -> gst::ClockTime {
        let state = lock(&self.state);
        let delay = (state.negotiated.as_ref()).and_then(|negotiated| {
            let fps = negotiated.input.fps();
            let (num, den) = (
                u64::try_from(fps.numer()).ok().filter(|&num| num > 0)?,
                u64::try_from(fps.denom()).ok()?,
            );
            let frames = state.depth.saturating_sub(1) as u64;
            (frames * den).mul_div_ceil(gst::ClockTime::SECOND.nseconds(), num)
        });
        drop(state);
        match self.obj().is_passthrough() {
            true => gst::ClockTime::ZERO,
            false => gst::ClockTime::from_nseconds(delay.unwrap_or(0)),
        }
    }

    /// Tells the pipeline when the latency is another one.
    fn tell_latency(&self) {
        let latency = self.latency();
        let before = mem::replace(&mut lock(&self.state).latency, latency);
        if latency != before {
            gst::debug!(CAT, imp = self, "latency is {latency}");
            let message = gst::message::Latency::builder().src(&*self.obj()).build();
            // Nobody may be listening.
            let _ = self.obj().post_message(message);
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

/// What is told when the CPU takes over.
const ON_CPU: &str = "running on the CPU";

/// What is told when bicubic interpolation takes over.
const PLAIN: &str = "upscaling without a network";

/// Frames in a CUDA device's memory. Their sides are even: the chroma planes of others overlap where GstCuda allocates them.
static ON_DEVICE: LazyLock<gst::Caps> = LazyLock::new(|| {
    let even = gst::IntRange::with_step(2, MAX_SIDE as i32 / 2 * 2, 2);
    gst_video::VideoCapsBuilder::new()
        .features([gstcuda::FEATURE])
        .format_list(gstcuda::FORMATS)
        .field("width", even)
        .field("height", even)
        .build()
});

/// Whether frames of `caps` are in a CUDA device's memory.
fn on_device(caps: Option<&gst::CapsRef>) -> bool {
    let features = caps.and_then(|caps| caps.features(0));
    features.is_some_and(gstcuda::is_feature)
}

/// Frames of `structure` in a CUDA device's memory, or in the system's; empty when they cannot be there.
fn placed(structure: gst::Structure, on_device: bool) -> gst::Caps {
    let mut caps = gst::Caps::from(structure);
    if on_device {
        let features = gst::CapsFeatures::new([gstcuda::FEATURE]);
        caps.make_mut().set_features_simple(Some(features));
        caps = caps.intersect(&ON_DEVICE);
    }
    caps
}

/// Calls `f` with the frame in `buffer`.
fn with_input<T>(
    buffer: &gst::BufferRef,
    negotiated: &Negotiated,
    f: impl FnOnce(&FrameRef) -> tadsr::Result<T>,
) -> tadsr::Result<T> {
    let layout = Layout::of(buffer, &negotiated.input).map_err(Error::Frame)?;
    let data = buffer
        .map_readable()
        .map_err(|err| Error::Frame(err.to_string()))?;
    let frame = layout.frame(negotiated.frame, &data);
    f(&frame.map_err(Error::Frame)?)
}

/// Calls `f` with the frame that `buffer` is to hold.
fn with_output<T>(
    buffer: &mut gst::Buffer,
    negotiated: &Negotiated,
    f: impl FnOnce(&mut FrameMut) -> tadsr::Result<T>,
) -> tadsr::Result<T> {
    let buffer = buffer.make_mut();
    let layout = Layout::of(buffer, &negotiated.output).map_err(Error::Frame)?;
    let mut data = buffer
        .map_writable()
        .map_err(|err| Error::Frame(err.to_string()))?;
    let frame = layout.frame_mut(negotiated.out_frame(), &mut data);
    f(&mut frame.map_err(Error::Frame)?)
}

/// Whether a serialized event may wait for the frames in work; others want them out first.
fn waits(kind: gst::EventType) -> bool {
    matches!(
        kind,
        gst::EventType::Tag
            | gst::EventType::Toc
            | gst::EventType::Protection
            | gst::EventType::SinkMessage
            | gst::EventType::CustomDownstream
            | gst::EventType::CustomDownstreamSticky
            | gst::EventType::CustomBoth
    )
}

/// Makes the pools in `query` hold as many buffers as `least` makes of their own minimum.
fn more_buffers(query: &mut gst::query::Allocation, least: impl Fn(u32) -> u32) {
    let pools: Vec<_> = query.allocation_pools().collect();
    for (index, (pool, size, min, max)) in pools.into_iter().enumerate() {
        let min = least(min);
        // 0 is no limit.
        let max = if max == 0 { 0 } else { max.max(min) };
        query.set_nth_allocation_pool(index as u32, pool.as_ref(), size, min, max);
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
    let caps = gst::Caps::from(input.to_owned());
    let Ok(info) = VideoInfo::from_caps(&caps) else {
        return;
    };
    let side = |s: &gst::StructureRef, side| s.get::<i32>(side).ok();
    let grows = ["width", "height"]
        .into_iter()
        .any(|s| side(input, s) != side(output, s));

    // What is written but not understood is replaced by what it is taken for.
    let stated = input.get::<&str>("colorimetry").ok();
    match stated.map(|text| (text, text.parse::<VideoColorimetry>())) {
        // Colours without a matrix: all of them would be guessed, matrix and range as they are here, but by the new size.
        Some((_, Ok(stated))) if grows && info.is_yuv() && stated != info.colorimetry() => {
            let taken = info.colorimetry();
            let taken = VideoColorimetry::new(
                taken.range(),
                taken.matrix(),
                stated.transfer(),
                stated.primaries(),
            );
            output.set("colorimetry", taken.to_string());
        }
        Some((text, Ok(_))) => output.set("colorimetry", text),
        _ if grows || output.has_field("colorimetry") => {
            output.set("colorimetry", info.colorimetry().to_string());
        }
        _ => {}
    }
    if let Ok(stated) = input.get::<&str>("chroma-site") {
        output.set("chroma-site", stated);
    } else if info.is_yuv() && (grows || output.has_field("chroma-site")) {
        // Where colours are stated and the site is not, `info` has none.
        if let Some(frame) = planes::frame_info(&info, &caps) {
            output.set("chroma-site", frame.chroma_site.name());
        }
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
