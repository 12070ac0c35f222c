//! Construction of pipelines, and error messages from their buses.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use gst::{MessageType, MessageView, PadProbeData, PadProbeReturn, PadProbeType, prelude::*};

use super::edits::Edits;
use crate::{Error, Result};

/// Reason why a pipeline ended.
pub(super) struct Failure {
    pub reason: String,
    /// The element that failed.
    pub source: Option<gst::Object>,
    /// True if the file is good but GStreamer lacks a plugin.
    pub missing: bool,
}

/// Receiver of a pipeline's messages. Collects the names of missing plugins, because only a later
/// error tells what they were needed for.
pub(super) struct Bus {
    bus: gst::Bus,
    missing: Vec<String>,
}

/// Name of the application messages by which our callbacks report why they cannot continue.
const REFUSED: &str = "tadsr-refused";

impl Bus {
    pub fn of(pipeline: &gst::Pipeline) -> Result<Self> {
        let bus = pipeline.bus();
        let bus = bus.ok_or_else(|| Error::GStreamer("a pipeline without a bus".into()))?;
        Ok(Self {
            bus,
            missing: Vec::new(),
        })
    }

    /// Returns the next error, waiting up to `timeout`.
    pub fn failure(&mut self, timeout: gst::ClockTime) -> Option<Failure> {
        match self.wait(timeout)? {
            Heard::Failure(failure) => Some(failure),
            Heard::End => None,
        }
    }

    /// Returns the next error or end of stream, waiting up to `timeout`.
    pub fn wait(&mut self, timeout: gst::ClockTime) -> Option<Heard> {
        let types = [
            MessageType::Error,
            MessageType::Element,
            MessageType::Application,
            MessageType::Eos,
        ];
        // Without time to wait timed_pop_filtered does not even look.
        let bus = self.bus.clone();
        let next = || {
            let waited = || bus.timed_pop_filtered(timeout, &types);
            bus.pop_filtered(&types).or_else(waited)
        };
        while let Some(message) = next() {
            match message.view() {
                MessageView::Error(error) => {
                    return Some(Heard::Failure(self.explain(error)));
                }
                MessageView::Element(element) => self.note_missing(element.structure()),
                MessageView::Application(app) => {
                    if let Some(reason) = refusal(app.structure()) {
                        return Some(Heard::Failure(Failure {
                            reason: self.lament().unwrap_or(reason),
                            source: None,
                            missing: !self.missing.is_empty(),
                        }));
                    }
                }
                _ => return Some(Heard::End),
            }
        }
        None
    }

    fn note_missing(&mut self, structure: Option<&gst::StructureRef>) {
        let missing = structure.filter(|s| s.name() == "missing-plugin");
        if let Some(name) = missing.and_then(|s| s.get::<String>("name").ok()) {
            self.missing.push(name);
        }
    }

    fn lament(&self) -> Option<String> {
        missing_plugins(&self.missing)
    }

    fn explain(&self, error: &gst::message::Error) -> Failure {
        let source = error.src().cloned();
        let cause = error.error();
        let missing = cause.matches(gst::CoreError::MissingPlugin)
            || cause.matches(gst::StreamError::CodecNotFound);
        if let (true, Some(reason)) = (missing, self.lament()) {
            return Failure {
                reason,
                source,
                missing,
            };
        }
        let text = cause.to_string();
        let debug = error.debug().unwrap_or_default();
        // The last line of the debug text is the element's own word; the first names a place in its
        // source.
        let detail = debug.lines().skip(1).last().map(str::trim);
        let reason = match detail.filter(|detail| !text.contains(detail)) {
            Some(detail) => format!("{} ({detail})", text.trim_end_matches('.')),
            None => text,
        };
        Failure {
            reason,
            source,
            missing,
        }
    }

    /// Returns the names of the plugins that were missing so far.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }
}

/// Returns a sentence about missing plugins, with the remedy.
pub(super) fn missing_plugins(names: &[String]) -> Option<String> {
    let names = names.join(", no ");
    (!names.is_empty()).then(|| {
        format!(
            "GStreamer has no {names} here: install the plugin that provides it (on Debian and Ubuntu mostly \
             gstreamer1.0-libav, gstreamer1.0-plugins-good, -bad or -ugly)"
        )
    })
}

/// Result of [`Bus::wait`].
pub(super) enum Heard {
    Failure(Failure),
    End,
}

fn refusal(structure: Option<&gst::StructureRef>) -> Option<String> {
    let structure = structure.filter(|s| s.name() == REFUSED)?;
    structure.get::<String>("reason").ok()
}

/// Posts on the bus of `pipeline`, from any thread, the reason why it cannot continue.
pub(super) fn refuse(pipeline: &gst::Pipeline, reason: &str) {
    let structure = gst::Structure::builder(REFUSED)
        .field("reason", reason)
        .build();
    // It fails only when the bus is gone, and then nobody listens.
    let _ = pipeline.post_message(gst::message::Application::new(structure));
}

/// Makes an element of the kind `factory`.
///
/// # Errors
/// Names the missing element.
pub(super) fn make(factory: &str) -> Result<gst::Element, String> {
    gst::ElementFactory::make(factory).build().map_err(|_| {
        format!(
            "GStreamer's element '{factory}' is missing: install the plugin that provides it \
             (gst-plugins-base, -good, -bad, -ugly or gst-libav)"
        )
    })
}

/// Returns `path` as text, which GStreamer's properties need.
pub(super) fn utf8(path: &Path) -> Result<&str, String> {
    path.to_str()
        .ok_or_else(|| "its name is not UTF-8, which GStreamer needs: rename it".into())
}

/// Pipeline that stops when dropped.
pub(super) struct Running(pub gst::Pipeline);

impl Drop for Running {
    fn drop(&mut self) {
        // Going down to NULL cannot fail.
        let _ = self.0.set_state(gst::State::Null);
    }
}

/// Returns true if none of the pipeline's threads runs, so no more data will arrive.
pub(super) fn is_idle(pipeline: &gst::Pipeline) -> bool {
    let running = |pad: &gst::Pad| pad.task_state() == gst::TaskState::Started;
    let elements = pipeline.iterate_recurse().into_iter().flatten();
    !elements.into_iter().any(|e| e.pads().iter().any(running))
}

/// Method of demuxing a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Demux {
    #[default]
    Plain,
    /// Without the edit lists of the file, which this module applies.
    Edited(Arc<Edits>),
    /// As an MPEG transport stream whose packets get times before they are demuxed. Without them
    /// GStreamer's demuxer sets no times in a file that begins before its first clock reference.
    /// All times are shifted by this value, so that packets before the reference have a time.
    TimedTransport(gst::ClockTime),
}

/// Name of the caps field with the colorimetry that the container states.
pub(super) const CONTAINER_COLOURS: &str = "container-colorimetry";

/// Name of the caps field that is true for VP8 and VP9 with alpha that is not decoded.
pub(super) const CONTAINER_ALPHA: &str = "container-alpha";

/// Name of the caps field that is true if the container, and not the bit stream, states that the
/// frames show two views.
const CONTAINER_VIEWS: &str = "container-views";

/// First version of GStreamer whose decoders of VP8 and VP9 with alpha are not used. Those of
/// 1.26.2 lose the last frame, those of 1.22 do not.
const LOSES_ALPHA: (u32, u32) = (1, 24);

/// Hides from the decoder after `pad` that the frames show two views, if the bit stream states it.
/// The decoder would guess another shape of the pixels, while players show both views as one
/// picture.
pub(super) fn hide_views(pad: &gst::Pad) {
    pad.add_probe(PadProbeType::EVENT_DOWNSTREAM, |_, info| {
        if let Some(PadProbeData::Event(event)) = &info.data
            && let gst::EventView::Caps(caps) = event.view()
            && let Some(structure) = caps.caps().structure(0)
            && structure.has_field("multiview-mode")
            && !structure.has_field(CONTAINER_VIEWS)
        {
            let mut structure = structure.to_owned();
            // A parser would add the fields again if there were none.
            structure.set("multiview-mode", "mono");
            structure.remove_field("multiview-flags");
            let caps = gst::Caps::builder_full().structure(structure).build();
            info.data = Some(PadProbeData::Event(gst::event::Caps::new(&caps)));
        }
        PadProbeReturn::Ok
    });
}

/// Renames fields in the caps from a demuxer: the colorimetry of H.264 and H.265, because parsers
/// and decoders would prefer it to that of the bit stream, and some containers do not state the
/// range; and the alpha of VP8 and VP9 if its decoders lose frames.
fn hide_fields(info: &mut gst::PadProbeInfo) -> PadProbeReturn {
    let Some(PadProbeData::Event(event)) = &info.data else {
        return PadProbeReturn::Ok;
    };
    let gst::EventView::Caps(caps) = event.view() else {
        return PadProbeReturn::Ok;
    };
    let Some(structure) = caps.caps().structure(0) else {
        return PadProbeReturn::Ok;
    };
    let (major, minor, ..) = gst::version();
    let mut structure = structure.to_owned();
    let has_views = structure.has_field("multiview-mode");
    if has_views {
        structure.set(CONTAINER_VIEWS, true);
    }
    match structure.name().as_str() {
        "video/x-h264" | "video/x-h265" => {
            if let Ok(colours) = structure.get::<String>("colorimetry") {
                structure.set(CONTAINER_COLOURS, colours);
                structure.remove_field("colorimetry");
            } else if !has_views {
                return PadProbeReturn::Ok;
            }
        }
        "video/x-vp8" | "video/x-vp9" if (major, minor) >= LOSES_ALPHA => {
            if structure.get("codec-alpha") == Ok(true) {
                structure.set(CONTAINER_ALPHA, true);
                // Without the field the decoders with alpha would match.
                structure.set("codec-alpha", false);
            } else if !has_views {
                return PadProbeReturn::Ok;
            }
        }
        _ if has_views => {}
        _ => return PadProbeReturn::Ok,
    }
    let caps = gst::Caps::builder_full().structure(structure).build();
    info.data = Some(PadProbeData::Event(gst::event::Caps::new(&caps)));
    PadProbeReturn::Ok
}

/// Sets the start of the first segment to zero. Matroska's demuxer starts it at the first packet,
/// and starts the next one, after a packet of another stream, at zero. The first frame would be
/// shown too early.
fn start_at_zero(info: &mut gst::PadProbeInfo) {
    let Some(PadProbeData::Event(event)) = &info.data else {
        return;
    };
    let gst::EventView::Segment(event) = event.view() else {
        return;
    };
    let Some(segment) = event.segment().downcast_ref::<gst::ClockTime>() else {
        return;
    };
    let zero = Some(gst::ClockTime::ZERO);
    if segment.time() == zero && segment.base() == zero && segment.start() > zero {
        let mut segment = segment.clone();
        segment.set_start(gst::ClockTime::ZERO);
        segment.set_position(gst::ClockTime::ZERO);
        info.data = Some(PadProbeData::Event(gst::event::Segment::new(&segment)));
    }
}

/// Adds to `pipeline` a parsebin that reads the file `path`. Its pads are the parsed streams. It
/// reads nothing before [`start`]. Returns all added elements, the parsebin last.
///
/// # Errors
/// Names the missing element.
pub(super) fn parse_file(
    pipeline: &gst::Pipeline,
    path: &Path,
    demux: &Demux,
) -> Result<Vec<gst::Element>, String> {
    let mut elements = vec![make("filesrc")?];
    elements[0].set_property("location", utf8(path)?);
    let mut shift = gst::ClockTime::ZERO;
    if let Demux::TimedTransport(by) = demux {
        shift = *by;
        let parser = make("tsparse")?;
        parser.set_property("set-timestamps", true);
        elements.push(parser);
    }
    let parse = make("parsebin")?;
    let mut followed = None;
    if let Demux::Edited(edits) = demux {
        edits.hide(&elements[0]);
        followed = Some(edits.clone());
    }
    // Its parsers of subtitles would drop their style.
    parse.connect("autoplug-continue", false, |values| {
        let caps = values
            .get(2)
            .and_then(|value| value.get::<gst::Caps>().ok());
        let structure = caps.as_ref().and_then(|caps| caps.structure(0));
        // A text file is an error of parsebin.
        let is_file = |name: &str| name.starts_with("text/") && name != "text/x-raw";
        let continues = structure.is_none_or(|s| !is_subtitles(s.name()) || is_file(s.name()));
        Some(continues.to_value())
    });
    if let Some(bin) = parse.downcast_ref::<gst::Bin>() {
        bin.connect_deep_element_added(move |_, _, element| {
            let Some(factory) = element.factory() else {
                return;
            };
            let klass = factory.metadata(gst::ELEMENT_METADATA_KLASS);
            if !klass.is_some_and(|klass| klass.contains("Demux")) {
                return;
            }
            let is_matroska = factory.name() == "matroskademux";
            let followed = followed.clone();
            element.connect_pad_added(move |_, pad| {
                pad.add_probe(PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
                    if is_matroska {
                        start_at_zero(info);
                    }
                    hide_fields(info)
                });
                if let Some(edits) = &followed {
                    edits.apply(pad);
                }
                if shift > gst::ClockTime::ZERO {
                    pad.add_probe(PadProbeType::BUFFER, move |_, info| {
                        if let Some(PadProbeData::Buffer(buffer)) = &mut info.data {
                            let (pts, dts) = (buffer.pts(), buffer.dts());
                            let buffer = buffer.make_mut();
                            buffer.set_pts(pts.map(|time| time + shift));
                            buffer.set_dts(dts.map(|time| time + shift));
                        }
                        PadProbeReturn::Ok
                    });
                }
            });
        });
    }
    elements.push(parse);
    link(pipeline, &elements)?;
    for element in &elements {
        element.set_locked_state(true);
    }
    Ok(elements)
}

/// Sets a pipeline to playing, and after that the elements that [`parse_file`] has added to it.
/// GStreamer knows no order of these, because nothing is linked to them yet. Packets that reach an
/// element before it accepts any would be lost, and end the demuxer without an error.
///
/// Errors are reported on the bus.
pub(super) fn start(pipeline: &gst::Pipeline) {
    let _ = pipeline.set_state(gst::State::Playing);
    // The reader of the file comes before the file, and asks it how it can be read.
    let elements: Vec<_> = pipeline.iterate_sorted().into_iter().flatten().collect();
    let held: Vec<_> = elements.iter().filter(|e| e.is_locked_state()).collect();
    for element in &held {
        let _ = element.set_state(gst::State::Ready);
    }
    for element in held {
        element.set_locked_state(false);
        let _ = element.sync_state_with_parent();
    }
}

/// Discards the data of `pad`.
pub(super) fn discard(pipeline: &gst::Pipeline, pad: &gst::Pad) -> Result<(), String> {
    let sink = make("fakesink")?;
    sink.set_property("async", false);
    sink.set_property("sync", false);
    append(pipeline, pad, &[sink], None)
}

/// Adds `elements` to a pipeline and links them in order.
pub(super) fn link(pipeline: &gst::Pipeline, elements: &[gst::Element]) -> Result<(), String> {
    pipeline
        .add_many(elements)
        .and_then(|()| gst::Element::link_many(elements))
        .map_err(|e| e.to_string())
}

/// Adds `elements` to the running pipeline and links them in order to `pad`. The pads of `onward`
/// are linked first, so nothing flows before the chain is complete.
pub(super) fn append(
    pipeline: &gst::Pipeline,
    pad: &gst::Pad,
    elements: &[gst::Element],
    onward: Option<(&gst::Pad, &gst::Pad)>,
) -> Result<(), String> {
    let failed = |e: gst::glib::BoolError| e.to_string();
    pipeline.add_many(elements).map_err(failed)?;
    gst::Element::link_many(elements).map_err(failed)?;
    if let Some((from, to)) = onward {
        from.link(to).map_err(|e| e.to_string())?;
    }
    for element in elements.iter().rev() {
        element.sync_state_with_parent().map_err(failed)?;
    }
    let first = elements.first().and_then(|e| e.static_pad("sink"));
    let first = first.ok_or("an element without a sink pad")?;
    pad.link(&first).map_err(|e| e.to_string())?;
    Ok(())
}

/// Drops the buffers at `pad` that begin after `cut`, a running time in nanoseconds.
pub(super) fn drop_after(pad: &gst::Pad, cut: &Arc<AtomicU64>) {
    let cut = cut.clone();
    on_time(pad, move |start, _| {
        if start.nseconds() > cut.load(Ordering::SeqCst) {
            PadProbeReturn::Drop
        } else {
            PadProbeReturn::Ok
        }
    });
}

/// Calls `f` for every buffer at `pad`, with the running times of its start and end.
pub(super) fn on_time(
    pad: &gst::Pad,
    f: impl Fn(gst::ClockTime, gst::ClockTime) -> PadProbeReturn + Send + Sync + 'static,
) {
    pad.add_probe(PadProbeType::BUFFER, move |pad, info| {
        let Some(PadProbeData::Buffer(buffer)) = &info.data else {
            return PadProbeReturn::Ok;
        };
        let segment = pad.sticky_event::<gst::event::Segment>(0);
        let start = segment.and_then(|event| {
            let segment = event.segment().downcast_ref::<gst::ClockTime>()?;
            segment.to_running_time(buffer.dts_or_pts()?)
        });
        let asked = start.map_or(PadProbeReturn::Ok, |start| {
            f(start, start + buffer.duration().unwrap_or_default())
        });
        if asked == PadProbeReturn::Drop {
            // A buffer that is left in the probe would be given back twice.
            info.data = None;
            return PadProbeReturn::Handled;
        }
        asked
    });
}

/// Returns true if streams with caps of this name are subtitles.
pub(super) fn is_subtitles(name: &str) -> bool {
    const NAMES: [&str; 4] = [
        "application/x-ass",
        "application/x-ssa",
        "application/x-usf",
        "application/x-teletext",
    ];
    let kind = name.split('/').next();
    matches!(
        kind,
        Some("text" | "subtitle" | "subpicture" | "closedcaption")
    ) || NAMES.contains(&name)
        || name.starts_with("application/x-subtitle")
}

/// Returns the common name of the codec of a stream with `caps`.
pub(super) fn codec_name(caps: &gst::CapsRef) -> String {
    let Some(structure) = caps.structure(0) else {
        return "nothing".into();
    };
    let version = structure.get::<i32>("mpegversion").unwrap_or(0);
    match (structure.name().as_str(), version) {
        ("audio/mpeg", 1) => "MP3".into(),
        ("audio/mpeg", _) => "AAC".into(),
        ("audio/x-raw", _) => "PCM".into(),
        ("audio/x-ac3", _) => "AC-3".into(),
        ("audio/x-eac3", _) => "E-AC-3".into(),
        ("audio/x-opus", _) => "Opus".into(),
        ("audio/x-vorbis", _) => "Vorbis".into(),
        ("audio/x-flac", _) => "FLAC".into(),
        ("video/x-h264", _) => "H.264".into(),
        ("video/x-h265", _) => "H.265".into(),
        ("video/x-vp8", _) => "VP8".into(),
        ("video/x-vp9", _) => "VP9".into(),
        ("video/x-av1", _) => "AV1".into(),
        ("video/x-theora", _) => "Theora".into(),
        ("video/mpeg", version @ (1 | 2 | 4)) => format!("MPEG-{version}"),
        ("video/x-raw", _) => "uncompressed".into(),
        ("text/x-raw", _) => "text".into(),
        ("application/x-ass", _) => "ASS".into(),
        ("application/x-ssa", _) => "SSA".into(),
        ("application/x-teletext", _) => "teletext".into(),
        ("application/x-subtitle-unknown", _) => "WebVTT or unknown".into(),
        ("subpicture/x-dvd", _) => "VobSub".into(),
        ("subpicture/x-pgs", _) => "PGS".into(),
        ("subpicture/x-dvb", _) => "DVB".into(),
        (name, _) => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the names of the elements that a pipeline has brought from READY to PAUSED, in
    /// order.
    fn started(pipeline: &gst::Pipeline) -> Vec<String> {
        let bus = pipeline.bus().unwrap();
        let mut names = Vec::new();
        while let Some(message) = bus.pop() {
            if let MessageView::StateChanged(change) = message.view()
                && (change.old(), change.current()) == (gst::State::Ready, gst::State::Paused)
                && let Some(source) = message.src()
            {
                names.push(source.name().to_string());
            }
        }
        names
    }

    #[test]
    fn a_file_is_read_only_when_everything_else_accepts_data() {
        crate::video::init().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 4096]).unwrap();
        let pipeline = gst::Pipeline::new();
        let first = make("queue").unwrap();
        let reader = parse_file(&pipeline, file.path(), &Demux::Plain).unwrap();
        let last = make("queue").unwrap();
        pipeline.add_many([&first, &last]).unwrap();
        start(&pipeline);
        let order = started(&pipeline);
        let place = |e: &gst::Element| order.iter().position(|name| *name == e.name());
        for queue in [&first, &last] {
            for element in &reader {
                let places = (place(queue), place(element));
                assert!(places.0.is_some() && places.1.is_some(), "{order:?}");
                assert!(places.0 < places.1, "{order:?}");
            }
        }
        pipeline.set_state(gst::State::Null).unwrap();
    }
}
