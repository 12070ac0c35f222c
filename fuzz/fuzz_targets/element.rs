//! Sequences of caps, buffers, events, queries, properties and states at the element. It must not
//! panic or raise a critical warning. Each frame that it accepts must be returned or counted as
//! dropped, fit the caps and follow the one before.
#![no_main]

use std::sync::Once;

use arbitrary::Arbitrary;
use gst::{glib, prelude::*};
use gst_check::Harness;
use gst_video::VideoInfo;
use libfuzzer_sys::fuzz_target;
use tadsr::frame::PixelFormat;

#[derive(Arbitrary, Debug)]
struct Size {
    width: u8,
    height: u8,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Caps {
        format: u8,
        size: Size,
        rate: u8,
        interlaced: bool,
        aspect: [u8; 2],
    },
    OutputSize(Size),
    AnyOutput,
    Frames(u8),
    Buffer {
        bytes: u16,
        flags: u8,
    },
    ShortFrame(u8),
    Flush,
    Segment {
        rate: i8,
        start: u8,
    },
    Gap,
    Eos,
    StreamStart,
    Discontinuity,
    Seek {
        rate: i8,
        start: u8,
        flush: bool,
    },
    Reconfigure,
    Qos {
        late: i32,
    },
    Latency,
    Restart,
    Model(u8),
    Scale(u8),
    Strength(u8),
    Denoise(i8),
    Detail(u8),
    Temporal(u8),
    Precision(u8),
    Fallback(u8),
    Overload(u8),
    Threads(u8),
    Interval(u8),
}

const MODELS: [&str; 5] = ["tiny", "tiny-x2", "tiny-x4", "auto", "no such model"];

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        // GLib has read G_DEBUG before `main`.
        glib::log_set_always_fatal(glib::LogLevels::LEVEL_ERROR | glib::LogLevels::LEVEL_CRITICAL);
        gsttadsr::plugin_register_static().unwrap();
    });
}

struct Rig {
    element: gst::Element,
    harness: Harness,
    bus: gst::Bus,
    info: Option<VideoInfo>,
    /// Frames pushed and pulled.
    frames: [u64; 2],
    /// Frames since the start that the element has accepted, and that it has returned.
    since_start: [u64; 2],
    next: gst::ClockTime,
    last: Option<gst::ClockTime>,
}

impl Rig {
    fn new() -> Self {
        let element = gst::ElementFactory::make("tadsrupscale")
            .property("model", "tiny")
            .property("device", "cpu")
            .build()
            .unwrap();
        let bus = gst::Bus::new();
        element.set_bus(Some(&bus));
        let mut harness = Harness::with_element(&element, Some("sink"), Some("src"));
        harness.play();
        Self {
            element,
            harness,
            bus,
            info: None,
            frames: [0; 2],
            since_start: [0; 2],
            next: gst::ClockTime::ZERO,
            last: None,
        }
    }

    fn push(&mut self, bytes: usize, flags: gst::BufferFlags) {
        let mut buffer = gst::Buffer::with_size(bytes).unwrap();
        let b = buffer.get_mut().unwrap();
        b.map_writable().unwrap().fill(self.frames[0] as u8);
        b.set_pts(self.next);
        b.set_flags(flags);
        self.next += gst::ClockTime::from_mseconds(40);
        self.frames[0] += 1;
        if self.harness.push(buffer) == Ok(gst::FlowSuccess::Ok) {
            self.since_start[0] += 1;
        }
        self.pull();
    }

    /// Checks that each accepted frame came out or was counted as dropped.
    fn check_complete(&self) {
        let stats = self.element.property::<gst::Structure>("stats");
        let dropped = stats.get::<u64>("dropped").unwrap();
        let [accepted, returned] = self.since_start;
        assert!(
            returned + dropped >= accepted,
            "{accepted} accepted, {returned} returned, {dropped} dropped"
        );
    }

    fn pull(&mut self) {
        while let Some(buffer) = self.harness.try_pull() {
            self.frames[1] += 1;
            self.since_start[1] += 1;
            assert!(
                self.frames[1] <= self.frames[0],
                "more frames than there were"
            );
            let caps = self.element.static_pad("src").unwrap().current_caps();
            if let Some(info) = caps.and_then(|c| VideoInfo::from_caps(&c).ok()) {
                assert!(buffer.size() >= info.size(), "{} bytes", buffer.size());
            }
            assert!(
                self.last <= buffer.pts(),
                "{:?} after {:?}",
                buffer.pts(),
                self.last
            );
            self.last = buffer.pts();
        }
    }

    fn frame_size(&self) -> usize {
        self.info.as_ref().map_or(64, VideoInfo::size)
    }

    fn event(&mut self, event: gst::Event) {
        self.harness.push_event(event);
        self.pull();
    }

    fn set(&self, name: &str, values: &[&str], value: u8) {
        let value = values[usize::from(value) % values.len()];
        self.element.set_property_from_str(name, value);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Caps {
                format,
                size,
                rate,
                interlaced,
                aspect,
            } => {
                let formats = PixelFormat::ALL;
                let caps = gst::Caps::builder("video/x-raw")
                    .field(
                        "format",
                        formats[usize::from(format) % formats.len()].name(),
                    )
                    .field("width", i32::from(size.width % 80) + 1)
                    .field("height", i32::from(size.height % 60) + 1)
                    .field("framerate", gst::Fraction::new(i32::from(rate), 1))
                    .field(
                        "interlace-mode",
                        if interlaced {
                            "interleaved"
                        } else {
                            "progressive"
                        },
                    )
                    .field(
                        "pixel-aspect-ratio",
                        gst::Fraction::new(aspect[0].max(1).into(), aspect[1].max(1).into()),
                    )
                    .build();
                // The harness has a method for this, which requires that the caps are accepted.
                if self.harness.push_event(gst::event::Caps::new(&caps)) {
                    self.info = VideoInfo::from_caps(&caps).ok();
                    let segment = gst::FormattedSegment::<gst::ClockTime>::new();
                    self.event(gst::event::Segment::new(&segment));
                }
                self.pull();
            }
            Op::OutputSize(size) => self.harness.set_sink_caps(
                gst::Caps::builder("video/x-raw")
                    .field("width", i32::from(size.width) + 1)
                    .field("height", i32::from(size.height) + 1)
                    .build(),
            ),
            Op::AnyOutput => self.harness.set_sink_caps(gst::Caps::new_any()),
            Op::Frames(count) => {
                for _ in 0..count % 8 {
                    self.push(self.frame_size(), gst::BufferFlags::empty());
                }
            }
            Op::Buffer { bytes, flags } => {
                self.push(
                    bytes.into(),
                    gst::BufferFlags::from_bits_truncate(u32::from(flags) << 4),
                );
            }
            Op::ShortFrame(missing) => {
                let bytes = self.frame_size().saturating_sub(missing.into());
                self.push(bytes, gst::BufferFlags::empty());
            }
            Op::Flush => {
                self.event(gst::event::FlushStart::new());
                self.event(gst::event::FlushStop::new(true));
                self.last = None;
                let segment = gst::FormattedSegment::<gst::ClockTime>::new();
                self.event(gst::event::Segment::new(&segment));
            }
            Op::Segment { rate, start } => {
                let mut segment = gst::FormattedSegment::<gst::ClockTime>::new();
                if rate != 0 {
                    segment.set_rate(f64::from(rate) / 16.0);
                }
                segment.set_start(gst::ClockTime::from_mseconds(start.into()));
                self.event(gst::event::Segment::new(&segment));
            }
            Op::Gap => self.event(gst::event::Gap::new(self.next, None)),
            Op::Eos => self.event(gst::event::Eos::new()),
            Op::StreamStart => self.event(gst::event::StreamStart::new("another")),
            Op::Discontinuity => self.push(self.frame_size(), gst::BufferFlags::DISCONT),
            Op::Seek { rate, start, flush } => {
                let rate = if rate == 0 {
                    1.0
                } else {
                    f64::from(rate) / 16.0
                };
                let flags = if flush {
                    gst::SeekFlags::FLUSH
                } else {
                    gst::SeekFlags::empty()
                };
                let event = gst::event::Seek::new(
                    rate,
                    flags,
                    gst::SeekType::Set,
                    gst::ClockTime::from_mseconds(start.into()),
                    gst::SeekType::None,
                    gst::ClockTime::NONE,
                );
                self.harness.push_upstream_event(event);
            }
            Op::Reconfigure => {
                self.harness
                    .push_upstream_event(gst::event::Reconfigure::new());
            }
            Op::Qos { late } => {
                // A frame is not early by more than its time.
                let late = i64::from(late).max(-(self.next.nseconds() as i64));
                let event = gst::event::Qos::new(
                    gst::QOSType::Underflow,
                    1.0 + late.unsigned_abs() as f64 / 1e6,
                    late,
                    self.next,
                );
                self.harness.push_upstream_event(event);
            }
            Op::Latency => drop(self.harness.query_latency()),
            Op::Restart => {
                self.check_complete();
                self.since_start = [0; 2];
                self.element.set_state(gst::State::Ready).unwrap();
                self.element.set_state(gst::State::Playing).unwrap();
                self.last = None;
                self.harness
                    .push_event(gst::event::StreamStart::new("restarted"));
            }
            Op::Model(n) => self.set("model", &MODELS, n),
            Op::Scale(n) => self
                .element
                .set_property("scale", (f64::from(n) / 64.0).min(4.0)),
            Op::Strength(n) => self.element.set_property("strength", f64::from(n) / 255.0),
            Op::Denoise(n) => self
                .element
                .set_property("denoise", (f64::from(n) / 127.0).max(-1.0)),
            Op::Detail(n) => self.element.set_property("detail", f64::from(n) / 255.0),
            Op::Temporal(n) => self.set("temporal", &["auto", "off", "filter", "memory"], n),
            Op::Precision(n) => self.set("precision", &["auto", "f32", "bf16", "int16", "int8", "f16"], n),
            Op::Fallback(n) => self.set("fallback", &["error", "cpu", "passthrough", "bicubic"], n),
            Op::Overload(n) => self.set("overload", &["auto", "drop", "adapt"], n),
            Op::Threads(n) => self.element.set_property("threads", u32::from(n % 4)),
            Op::Interval(n) => self.element.set_property("stats-interval", u32::from(n)),
        }
        while let Some(message) = self.bus.pop() {
            if let gst::MessageView::Error(error) = message.view() {
                let text = error.to_string();
                assert!(!text.to_lowercase().contains("panicked"), "{text}");
            }
        }
    }
}

fuzz_target!(|ops: Vec<Op>| {
    init();
    let mut rig = Rig::new();
    ops.into_iter().take(40).for_each(|op| rig.apply(op));
    rig.check_complete();
});
