//! The encoder of a video, from frames to packets.

use gst::{PadProbeReturn, PadProbeType, prelude::*};
use gst_app::AppSrc;

use super::{
    Container, Options, StreamInfo,
    bus::{link, make},
};

/// Adds appsrc ! videoconvert ! encoder to `pipeline` and links it to `target`, which accepts
/// encoded video with the caps `taken`. Returns the source of frames of `stream`.
pub(super) fn add(
    pipeline: &gst::Pipeline,
    container: Container,
    stream: &StreamInfo,
    options: &Options,
    target: &gst::Pad,
    taken: &gst::Caps,
) -> Result<AppSrc, String> {
    let source = AppSrc::builder()
        .caps(stream.caps())
        .format(gst::Format::Time)
        .max_bytes(0)
        .build();
    let convert = make("videoconvert")?;
    let encoder = parse_encoder(&options.encoder, container)?;
    let input = encoder
        .static_pad("sink")
        .ok_or("an encoder without input")?;
    let filter = make("capsfilter")?;
    if options.encoder.trim().is_empty() {
        filter.set_property("caps", coded_caps(stream, &input.query_caps(None)));
    } else if let Some(caps) = alpha_caps(stream, &input.query_caps(None)) {
        filter.set_property("caps", caps);
    }
    report_changes(&input, stream, options);
    let chain = [source.clone().upcast(), convert, filter, encoder.clone()];
    link(pipeline, &chain).map_err(|_| {
        format!(
            "the encoder does not support {} frames",
            stream.frame().format.name()
        )
    })?;
    let encoded = encoder
        .static_pad("src")
        .ok_or("an encoder without output")?;
    check_size(stream, &input, &encoded, taken)?;
    link_encoded(pipeline, &encoded, target, taken)?;
    Ok(source)
}

/// Refuses frames that are too small for the encoder between `input` and `encoded`, or for a muxer
/// that accepts caps `muxed`.
fn check_size(
    stream: &StreamInfo,
    input: &gst::Pad,
    encoded: &gst::Pad,
    muxed: &gst::Caps,
) -> Result<(), String> {
    // Returns the minimum of a side in caps of the kind `name`.
    let least = |caps: &gst::CapsRef, name: &str, side: &str| {
        let kinds = caps.iter().filter(|structure| structure.name() == name);
        let sides = kinds.map(|structure| {
            let range = structure.get::<gst::IntRange<i32>>(side);
            range.map_or(1, |range| range.min())
        });
        usize::try_from(sides.min().unwrap_or(1)).unwrap_or(1)
    };
    let (taken, made) = (input.query_caps(None), encoded.query_caps(None));
    let kind = made.structure(0).map_or("", |s| s.name().as_str());
    let least = |side| least(&taken, "video/x-raw", side).max(least(muxed, kind, side));
    let (width, height) = (least("width"), least("height"));
    let frame = stream.frame();
    if frame.width < width || frame.height < height {
        return Err(format!(
            "its frames have {}x{} pixels, and the minimum of encoder and container is \
             {width}x{height}: choose a larger size, or Matroska (.mkv)",
            frame.width, frame.height
        ));
    }
    Ok(())
}

/// Returns the caps of a default encoder's input, out of the caps `taken` that it accepts. They
/// have the depth (of up to 12 bits) and chroma of the stream if the encoder supports these. RGB
/// and grey become 4:2:0, which all players show.
fn coded_caps(stream: &StreamInfo, taken: &gst::Caps) -> gst::Caps {
    let info = stream.frame();
    let format = info.format;
    let depths: &[u32] = match format.depth() {
        8 => &[8],
        9..=10 => &[10],
        _ => &[12, 10],
    };
    let has_chroma = format.component(crate::frame::Component::U).is_some();
    let chroma = match format.chroma_shift() {
        _ if !has_chroma => 420,
        (1, 1) => 420,
        (1, 0) => 422,
        _ => 444,
    };
    let named = |chroma, depth| match (chroma, depth) {
        (422, 12) => "I422_12LE",
        (422, 10) => "I422_10LE",
        (422, _) => "Y42B",
        (444, 12) => "Y444_12LE",
        (444, 10) => "Y444_10LE",
        (444, _) => "Y444",
        (_, 12) => "I420_12LE",
        (_, 10) => "I420_10LE",
        _ => "I420",
    };
    let with_chroma = depths.iter().map(|&depth| named(chroma, depth));
    let without = depths.iter().map(|&depth| named(420, depth));
    let candidates = with_chroma.chain(without).chain(["I420"]);
    let with = |name: &str| {
        let mut caps = gst::Caps::builder("video/x-raw")
            .field("format", name)
            .build();
        if !format.is_rgb() {
            // Only the format is converted, not the colours.
            if let Some(colours) = stream.coded_colours() {
                caps.make_mut().set("colorimetry", colours);
            }
        }
        caps
    };
    let found = candidates.map(with).find(|caps| {
        let mut format = caps.clone();
        if let Some(structure) = format.make_mut().structure_mut(0) {
            structure.remove_field("colorimetry");
        }
        format.can_intersect(taken)
    });
    found.unwrap_or_else(|| gst::Caps::new_empty_simple("video/x-raw"))
}

/// Returns the part with alpha of the caps `taken` that an encoder accepts; `None` if the stream
/// has no alpha or the encoder does not support it. A converter would prefer other formats.
fn alpha_caps(stream: &StreamInfo, taken: &gst::Caps) -> Option<gst::Caps> {
    if !stream.frame().format.has_alpha() {
        return None;
    }
    let has_alpha = |format: &gst_video::VideoFormat| {
        gst_video::VideoFormatInfo::from_format(*format).has_alpha()
    };
    let formats = gst_video::VideoFormat::iter_raw().filter(has_alpha);
    let caps = gst::Caps::builder("video/x-raw")
        .field(
            "format",
            gst::List::new(formats.map(|format| format.to_str())),
        )
        .build();
    caps.can_intersect(taken).then_some(caps)
}

/// Reports once, when the format at `input` is known, which of depth, chroma and alpha of the
/// stream the encoder does not support.
fn report_changes(input: &gst::Pad, stream: &StreamInfo, options: &Options) {
    let (from, options) = (stream.frame().format, options.clone());
    input.add_probe(PadProbeType::EVENT_DOWNSTREAM, move |_, info| {
        let Some(gst::PadProbeData::Event(event)) = &info.data else {
            return PadProbeReturn::Ok;
        };
        let gst::EventView::Caps(caps) = event.view() else {
            return PadProbeReturn::Ok;
        };
        let Ok(to) = gst_video::VideoInfo::from_caps(caps.caps()) else {
            return PadProbeReturn::Remove;
        };
        let to = to.format_info();
        let depth = to.depth().iter().copied().max().unwrap_or(8);
        if depth < from.depth() {
            let from = from.depth();
            options.tell(&format!(
                "{from} bits a sample become {depth}, the maximum of the encoder"
            ));
        }
        if from.has_alpha() && !to.has_alpha() {
            options.tell(
                "alpha is left out: the encoder does not support it (avenc_ffv1 in .mkv and \
                 avenc_prores_ks in .mov do)",
            );
        }
        PadProbeReturn::Remove
    });
}

/// Returns the encoder of the launch line `text`, or the container's default if it is empty.
fn parse_encoder(text: &str, container: Container) -> Result<gst::Element, String> {
    let text = if text.trim().is_empty() {
        container.default_encoder()
    } else {
        text
    };
    let bin = gst::parse::bin_from_description(text, true);
    let bin = bin.map_err(|e| format!("the encoder '{text}' cannot be used: {e}"))?;
    if bin.static_pad("sink").is_none() || bin.static_pad("src").is_none() {
        return Err(format!(
            "'{text}' is not an encoder: it needs one input and one output"
        ));
    }
    for element in bin.iterate_recurse().into_iter().flatten() {
        if element.find_property("lag-in-frames").is_some() && !text.contains("lag-in-frames") {
            // At the end GStreamer's VP9 encoder loses some of the frames in its look-ahead.
            // The type of the number differs among encoders.
            element.set_property_from_str("lag-in-frames", "0");
        }
    }
    Ok(bin.upcast())
}

/// Links the output of an encoder to `target`, which accepts caps `taken`, with a parser between if
/// these need another form.
fn link_encoded(
    pipeline: &gst::Pipeline,
    encoded: &gst::Pad,
    target: &gst::Pad,
    taken: &gst::Caps,
) -> Result<(), String> {
    let made = encoded.query_caps(None);
    let kind = made.structure(0).map_or("", |s| s.name().as_str());
    let parser = match kind {
        "video/x-h265" => Some("h265parse"),
        "video/x-av1" => Some("av1parse"),
        "video/x-h264" if !made.can_intersect(taken) => Some("h264parse"),
        _ => None,
    };
    let refused =
        |_| format!("this container does not support {kind}: choose another encoder or extension");
    let Some(parser) = parser else {
        return encoded.link(target).map(drop).map_err(refused);
    };
    let parser = make(parser)?;
    pipeline.add(&parser).map_err(|e| e.to_string())?;
    let pads = (parser.static_pad("sink"), parser.static_pad("src"));
    let (Some(sink), Some(src)) = pads else {
        return Err("a parser without pads".into());
    };
    encoded.link(&sink).map_err(refused)?;
    src.link(target).map(drop).map_err(refused)
}
