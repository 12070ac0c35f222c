// SPDX-License-Identifier: MPL-2.0

//! Helpers for tests of the element: an element in a test harness, and frames with given samples.

#![allow(dead_code, reason = "each test binary uses some of the helpers")]

pub mod binding;

use std::{
    path::Path,
    sync::{Mutex, Once},
};

use gst::{glib, prelude::*};
use gst_check::Harness;
use gst_video::{VideoFrameExt, VideoInfo};
use tadsr::{
    engine::NoiseField,
    model::{Precision, ResShiftMetadata},
    nn::resshift::ResShiftConfig,
};

pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gsttadsr::plugin_register_static().unwrap();
        #[cfg(unix)]
        if !gst::active_tracers().is_empty() {
            // SAFETY: the function has the type of a handler and stays loaded.
            unsafe { libc::atexit(log_live_objects) };
        }
    });
}

/// Buses that [`element`] has made. Their messages keep the elements alive, which keep the buses.
static BUSES: Mutex<Vec<glib::WeakRef<gst::Bus>>> = Mutex::new(Vec::new());

/// Writes the objects that are alive at the end of the process to the log of the tracer.
#[cfg(unix)]
extern "C" fn log_live_objects() {
    for bus in BUSES.lock().unwrap().iter().filter_map(|bus| bus.upgrade()) {
        bus.set_flushing(true);
    }
    for tracer in gst::active_tracers() {
        tracer.emit_by_name::<()>("log-live-objects", &[]);
    }
}

/// An element in a test harness, and its bus.
pub struct Rig {
    pub harness: Harness,
    pub element: gst::Element,
    pub bus: gst::Bus,
}

/// Creates an element and its bus. Property values are parsed as by `gst-launch-1.0`. The default
/// of `model` is `tiny` here, that of `device` the CPU and that of `overload` to drop frames, so
/// that results do not depend on the machine.
pub fn element(properties: &[(&str, &str)]) -> (gst::Element, gst::Bus) {
    init();
    let mut builder = gst::ElementFactory::make("tadsrupscale")
        .property("model", "tiny")
        .property("device", "cpu")
        .property_from_str("overload", "drop");
    for (name, value) in properties {
        builder = builder.property_from_str(name, value);
    }
    let element = builder.build().unwrap();
    let bus = gst::Bus::new();
    element.set_bus(Some(&bus));
    BUSES.lock().unwrap().push(bus.downgrade());
    (element, bus)
}

impl Rig {
    pub fn new(properties: &[(&str, &str)]) -> Self {
        let (element, bus) = element(properties);
        let harness = Harness::with_element(&element, Some("sink"), Some("src"));
        Self {
            harness,
            element,
            bus,
        }
    }

    /// Creates a started element with input caps.
    pub fn with_caps(properties: &[(&str, &str)], caps: &str) -> Self {
        let mut rig = Self::new(properties);
        rig.harness.play();
        rig.harness.set_src_caps_str(caps);
        rig
    }

    /// Creates a started element with raw input of a format and size, 25 frames per second.
    pub fn raw(properties: &[(&str, &str)], format: &str, width: u32, height: u32) -> Self {
        Self::with_caps(properties, &raw(format, width, height))
    }

    pub fn out_caps(&self) -> gst::Caps {
        let pad = self.element.static_pad("src").unwrap();
        pad.current_caps().expect("output caps")
    }

    pub fn out_info(&self) -> VideoInfo {
        VideoInfo::from_caps(&self.out_caps()).unwrap()
    }

    /// Returns the text and debug text of the next message of a kind.
    pub fn message(&self, kind: gst::MessageType) -> Option<String> {
        message(&self.bus, kind)
    }

    /// Waits for the next message of a kind, at most 60 seconds. Returns the same as
    /// [`Self::message`].
    pub fn wait_for(&self, kind: gst::MessageType) -> String {
        let limit = gst::ClockTime::from_seconds(60);
        text(
            &self
                .bus
                .timed_pop_filtered(limit, &[kind])
                .expect("message"),
        )
    }
}

pub fn message(bus: &gst::Bus, kind: gst::MessageType) -> Option<String> {
    bus.pop_filtered(&[kind]).map(|m| text(&m))
}

fn text(message: &gst::Message) -> String {
    let (error, debug) = match message.view() {
        gst::MessageView::Error(m) => (m.error(), m.debug()),
        gst::MessageView::Warning(m) => (m.error(), m.debug()),
        other => return format!("{other:?}"),
    };
    format!("{error} {}", debug.unwrap_or_default())
}

/// Returns raw caps at 25 frames per second.
pub fn raw(format: &str, width: u32, height: u32) -> String {
    format!("video/x-raw,format={format},width={width},height={height},framerate=25/1")
}

/// Parses caps.
pub fn caps(text: &str) -> gst::Caps {
    text.parse().unwrap()
}

pub fn info(caps: &str) -> VideoInfo {
    init();
    VideoInfo::from_caps(&caps.parse::<gst::Caps>().unwrap()).unwrap()
}

/// Returns a buffer of zeros with a timestamp.
pub fn blank(info: &VideoInfo) -> gst::Buffer {
    let mut buffer = gst::Buffer::from_mut_slice(vec![0u8; info.size()]);
    buffer.get_mut().unwrap().set_pts(gst::ClockTime::ZERO);
    buffer
}

/// Duration of a frame at 25 frames per second.
pub const FRAME: gst::ClockTime = gst::ClockTime::from_mseconds(40);

/// Returns `buffer` with the timestamp of frame `n`, counted from 0, at 25 frames per second.
pub fn timed(mut buffer: gst::Buffer, n: u64) -> gst::Buffer {
    let buffer_ref = buffer.get_mut().unwrap();
    buffer_ref.set_pts(FRAME * n);
    buffer_ref.set_duration(FRAME);
    buffer
}

/// Returns a frame whose samples are `value(component, x, y)`. Values have the depth of the format.
/// Components are in GStreamer's order.
pub fn frame(info: &VideoInfo, value: impl Fn(usize, usize, usize) -> u16) -> gst::Buffer {
    let mut frame = gst_video::VideoFrame::from_buffer_writable(blank(info), info).unwrap();
    for_each_sample(info, |c, x, y, plane, at, bytes, shift| {
        let v = value(c, x, y) << shift;
        let data = frame.plane_data_mut(plane as u32).unwrap();
        data[at..at + bytes].copy_from_slice(&v.to_le_bytes()[..bytes]);
    });
    frame.into_buffer()
}

/// Returns the samples of one component, row by row.
pub fn samples(buffer: &gst::Buffer, info: &VideoInfo, component: usize) -> Vec<u16> {
    let frame = gst_video::VideoFrame::from_buffer_readable(buffer.clone(), info).unwrap();
    let info = frame.info();
    let mut result = Vec::new();
    for_each_sample(info, |c, _, _, plane, at, bytes, shift| {
        if c == component {
            let data = frame.plane_data(plane as u32).unwrap();
            let mut le = [0; 2];
            le[..bytes].copy_from_slice(&data[at..at + bytes]);
            result.push(u16::from_le_bytes(le) >> shift);
        }
    });
    result
}

/// Calls `f(component, x, y, plane, offset, bytes, shift)` for every sample. `offset` is the
/// position in the plane in bytes, `bytes` the size of a sample, and `shift` the number of unused
/// low bits.
fn for_each_sample(
    info: &VideoInfo,
    mut f: impl FnMut(usize, usize, usize, usize, usize, usize, u32),
) {
    for c in 0..info.n_components() as usize {
        let plane = info.comp_plane(c as u8) as usize;
        let stride = info.stride()[plane] as usize;
        let step = info.comp_pstride(c as u8) as usize;
        let bytes = if info.comp_depth(c as u8) > 8 { 2 } else { 1 };
        let shift = info.format_info().shift()[c];
        // GStreamer counts this offset in samples, but the pixel stride in bytes. In packed pixels
        // of 16 bits a sample, it counts both in bytes.
        let offset = match (info.format(), c) {
            // GStreamer describes VYUY like UYVY, but converts it by its name.
            (gst_video::VideoFormat::Vyuy, 1) => 2,
            (gst_video::VideoFormat::Vyuy, 2) => 0,
            _ => info.comp_poffset(c as u8) as usize,
        };
        let offset = if step == 8 { offset } else { offset * bytes };
        for y in 0..info.comp_height(c as u8) as usize {
            for x in 0..info.comp_width(c as u8) as usize {
                let at = offset + y * stride + x * step;
                f(c, x, y, plane, at, bytes, shift);
            }
        }
    }
}

/// Returns the `n`th I420 frame of a size. All frames differ.
pub fn numbered((width, height): (u32, u32), n: u64) -> gst::Buffer {
    let info = info(&raw("I420", width, height));
    let buffer = frame(&info, |c, x, y| match c {
        0 => 60 + ((x * 3 + y * 5 + n as usize * 7) % 23) as u16 * 4,
        _ => 120,
    });
    timed(buffer, n)
}

/// Writes a minimal ResShift model with random weights and returns its path.
///
/// `scale` is its native scale: 4, or 1 as in models for faces. The side of a tile is a multiple of
/// 8 pixels at scale 4, and of 32 pixels at scale 1.
pub fn resshift_model(directory: &Path, scale: usize) -> String {
    let mut config = ResShiftConfig::realsr_x4();
    let (unet, autoencoder) = (&mut config.unet, &mut config.autoencoder);
    unet.model_channels = 32;
    unet.channel_mult = vec![1, 1];
    unet.num_res_blocks = vec![1, 1];
    (unet.image_size, unet.window_size, unet.lq_size) = (8, 4, 32 / scale);
    unet.attention_resolutions = vec![8, 4];
    (unet.swin_embed_dim, unet.num_head_channels) = (32, 16);
    (autoencoder.ch, autoencoder.ch_mult) = (32, vec![1; 3]);
    (autoencoder.num_res_blocks, autoencoder.n_embed) = (vec![1; 3], 64);
    config.diffusion.scale = scale;
    config.diffusion.steps = 1000;
    let metadata = ResShiftMetadata::new(&format!("random-x{scale}"), config, "none");
    let mut seed = 0;
    let values = |name: &str, shape: &[usize]| {
        seed += 1;
        let noise = NoiseField::seeded(1, 1, shape.iter().product(), seed);
        let fan_in: usize = shape[1..].iter().product();
        let spread = match shape.len() {
            1 => 0.1,
            _ if name.contains("embedding") => 1.0,
            // Grey with weak texture, so that colours must come from the input.
            _ if name.ends_with("decoder.conv_out.weight") => 0.1 * (fan_in as f32).powf(-0.5),
            _ => (fan_in as f32).powf(-0.5),
        };
        let mean = f32::from(shape.len() == 1 && name.ends_with("weight"));
        Ok(noise.values().iter().map(|v| mean + spread * v).collect())
    };
    let path = directory.join(format!("random-x{scale}.safetensors"));
    metadata.write(&path, Precision::F32, values).unwrap();
    path.to_str().unwrap().to_owned()
}
