//! Subtitles of one file in another: copied, or converted to text that the container supports.

use std::sync::{Arc, atomic::AtomicU64};

use gst::{ClockTime, prelude::*};
use gst_app::AppSrc;

use super::{
    Container,
    bus::{codec_name, drop_after, link},
    survey::{Cue, Kind, Survey, Track},
};

/// Texts that begin within this time are shown as one.
const SAME_TIME: ClockTime = ClockTime::from_mseconds(10);

/// Conversion of the text of a cue; `None` if nothing of it is shown.
type Convert = fn(&str) -> Option<String>;

/// Way of a stream into a container.
struct Route {
    caps: gst::Caps,
    /// `None` copies the bytes.
    convert: Option<Convert>,
    /// Name of the format that the stream becomes, if it changes.
    becomes: Option<&'static str>,
}

/// Subtitles that enter a muxer. They are in memory, so the muxer never waits for them.
pub(super) struct Subtitles {
    streams: Vec<Stream>,
    /// A line for each stream that changes or is left out.
    pub notes: Vec<String>,
}

struct Stream {
    source: AppSrc,
    events: Vec<gst::Event>,
    /// Empty subtitle before the first one. Some players end the last one of an MP4 file too early
    /// if the first begins late.
    filler: Option<gst::Buffer>,
    cues: Vec<gst::Buffer>,
    /// Start of the first cue and of the last.
    span: (ClockTime, ClockTime),
    /// Marks of the track.
    marks: Vec<u8>,
}

impl Subtitles {
    /// Adds the subtitles of the file with the survey `survey` to `pipeline`. Drops cues later than
    /// `cut`, a running time in nanoseconds.
    ///
    /// # Errors
    /// Names the missing element.
    pub fn add(
        pipeline: &gst::Pipeline,
        mux: &gst::Element,
        survey: &Survey,
        container: Container,
        cut: &Arc<AtomicU64>,
    ) -> Result<Self, String> {
        let mut all = Self {
            streams: Vec::new(),
            notes: Vec::new(),
        };
        for (n, track) in survey.tracks(Kind::Subtitles).enumerate() {
            let name = format!("subtitles {} ({})", n + 1, codec_name(&track.caps));
            let route = match route(container, track) {
                Ok(route) => route,
                Err(reason) => {
                    all.notes.push(format!("{name} are left out: {reason}"));
                    continue;
                }
            };
            let origin = survey.part.map_or(ClockTime::ZERO, |part| {
                ClockTime::try_from(part.start).unwrap_or_default()
            });
            let cues = track.cues.iter();
            let cues: Vec<_> = cues.filter_map(|cue| route.buffer(cue, origin)).collect();
            let is_mp4 = matches!(container, Container::Mp4 | Container::QuickTime);
            let (cues, overlaps) = if is_mp4 {
                one_by_one(cues)
            } else {
                (cues, false)
            };
            let times = || cues.iter().filter_map(|cue| cue.pts());
            let Some(span) = times().min().zip(times().max()) else {
                let place = if survey.part.is_some() {
                    "this part"
                } else {
                    "it"
                };
                all.notes
                    .push(format!("{name} are left out: nothing is shown in {place}"));
                continue;
            };
            if overlaps {
                all.notes.push(format!(
                    "{name}: overlapping texts are shortened or joined, because this container \
                     shows one at a time"
                ));
            }
            if let Some(becomes) = route.becomes {
                all.notes.push(format!("{name} become {becomes}"));
            }
            let source = AppSrc::builder()
                .caps(&route.caps)
                .format(gst::Format::Time)
                .max_bytes(0)
                .build();
            link(pipeline, &[source.clone().upcast()])?;
            let pad = mux.request_pad_simple("subtitle_%u");
            let pad = pad.ok_or("the container does not support subtitles")?;
            let from = source.static_pad("src").ok_or("a source without output")?;
            from.link(&pad).map_err(|e| e.to_string())?;
            drop_after(&pad, cut);
            let mut events = track.events.clone();
            if track.tags.n_tags() > 0 {
                events.push(gst::event::Tag::new(track.tags.clone()));
            }
            let language = language_tags(container, &track.tags);
            events.extend(language.map(gst::event::Tag::new));
            all.streams.push(Stream {
                source,
                events,
                filler: (is_mp4 && !span.0.is_zero()).then(|| empty(span.0)),
                cues,
                span,
                marks: track.marks.clone(),
            });
        }
        Ok(all)
    }

    /// Passes all subtitles to the muxer. The pipeline must have been started.
    pub fn push(&self) {
        for stream in &self.streams {
            // If an event or a buffer is refused, the reason is on the bus.
            for event in &stream.events {
                let _ = stream.source.send_event(event.clone());
            }
            for cue in stream.filler.iter().chain(&stream.cues) {
                let _ = stream.source.push_buffer(cue.clone());
            }
            let _ = stream.source.end_of_stream();
        }
    }

    /// Returns for each stream the marks of its track.
    pub fn marks(&self) -> Vec<Vec<u8>> {
        self.streams.iter().map(|s| s.marks.clone()).collect()
    }

    /// Returns for each stream the number of cues, and the start of the first and of the last.
    pub fn expected(&self) -> Vec<(usize, ClockTime, ClockTime)> {
        let streams = self.streams.iter();
        streams
            .map(|s| (s.cues.len(), s.span.0, s.span.1))
            .collect()
    }
}

/// Returns tags for a stream of unknown language with the `tags`, if `container` would otherwise
/// mean English.
pub(super) fn language_tags(container: Container, tags: &gst::TagList) -> Option<gst::TagList> {
    let is_matroska = matches!(container, Container::Matroska | Container::WebM);
    if !is_matroska || tags.get::<gst::tags::LanguageCode>().is_some() {
        return None;
    }
    let mut unknown = gst::TagList::new();
    let tags = unknown.get_mut()?;
    tags.add::<gst::tags::LanguageCode>(&"und", gst::TagMergeMode::Replace);
    Some(unknown)
}

/// Returns a subtitle without text for the time from zero to `end`.
fn empty(end: ClockTime) -> gst::Buffer {
    let mut buffer = gst::Buffer::new();
    if let Some(buffer) = buffer.get_mut() {
        buffer.set_pts(ClockTime::ZERO);
        buffer.set_duration(end);
    }
    buffer
}

/// Ends each text of `cues` when the next one begins, and joins those that begin at the same time.
/// Returns true if that changes a text.
fn one_by_one(mut cues: Vec<gst::Buffer>) -> (Vec<gst::Buffer>, bool) {
    cues.sort_by_key(|cue| cue.pts());
    let mut single: Vec<gst::Buffer> = Vec::new();
    let mut changed = false;
    for cue in cues {
        if let Some(last) = single.last_mut()
            && let Some((from, to)) = last.pts().zip(cue.pts())
        {
            if to < from + SAME_TIME {
                *last = joined(last, &cue).unwrap_or_else(|| last.clone());
                changed = true;
                continue;
            }
            if last.duration().is_some_and(|duration| from + duration > to) {
                last.make_mut().set_duration(to - from);
                changed = true;
            }
        }
        single.push(cue);
    }
    (single, changed)
}

/// Returns both texts, one below the other, from the start of `first` to the end of the longer one.
fn joined(first: &gst::Buffer, second: &gst::Buffer) -> Option<gst::Buffer> {
    let (a, b) = (first.map_readable().ok()?, second.map_readable().ok()?);
    let text = [a.trim_ascii_end(), b.trim_ascii_end()].join(&b'\n');
    let mut buffer = gst::Buffer::from_slice(text);
    let buffer_mut = buffer.get_mut()?;
    buffer_mut.set_pts(first.pts());
    buffer_mut.set_duration(first.duration().max(second.duration()));
    Some(buffer)
}

impl Route {
    /// Returns the converted cue, whose time counts from `origin`.
    fn buffer(&self, cue: &Cue, origin: ClockTime) -> Option<gst::Buffer> {
        let mut buffer = match self.convert {
            None => cue.data.copy(),
            Some(convert) => {
                let map = cue.data.map_readable().ok()?;
                let text = String::from_utf8_lossy(&map);
                gst::Buffer::from_slice(convert(text.trim_end_matches('\0'))?.into_bytes())
            }
        };
        let buffer_mut = buffer.get_mut()?;
        buffer_mut.set_pts(cue.start.saturating_sub(origin));
        buffer_mut.set_dts(ClockTime::NONE);
        buffer_mut.set_duration(cue.duration);
        Some(buffer)
    }
}

/// Returns the way of `track` into `container`.
///
/// # Errors
/// States why the stream cannot be kept.
fn route(container: Container, track: &Track) -> Result<Route, String> {
    let unsupported = || "this container does not support them".to_string();
    let structure = track.caps.structure(0).ok_or_else(unsupported)?;
    let name = structure.name().as_str();
    if container == Container::WebM {
        return Err("WebM supports only WebVTT, which GStreamer does not write".into());
    }
    let is_matroska = container == Container::Matroska;
    let text = |convert, becomes| Route {
        caps: gst::Caps::builder("text/x-raw")
            .field("format", "utf8")
            .build(),
        convert: Some(convert),
        becomes,
    };
    let is_markup = structure.get::<&str>("format") == Ok("pango-markup");
    match name {
        "text/x-raw" if !is_markup => Ok(text(as_is, None)),
        "text/x-raw" if is_matroska => Ok(text(unescaped, None)),
        "text/x-raw" => {
            let is_styled = |cue: &Cue| {
                let text = cue.text();
                unescaped(&text) != plain(&text)
            };
            let styled = track.cues.iter().any(is_styled);
            Ok(text(plain, styled.then_some("text without its style")))
        }
        "application/x-ass" | "application/x-ssa" if !is_matroska => {
            Ok(text(ass_text, Some("text without its style")))
        }
        "application/x-subtitle-unknown" if is_web_vtt(track) => {
            let becomes = "plain text, without its positions";
            Ok(text(
                if is_matroska { vtt_text } else { vtt_plain },
                Some(becomes),
            ))
        }
        "application/x-ass" | "application/x-ssa" | "application/x-usf" | "subpicture/x-dvd"
            if is_matroska =>
        {
            Ok(Route {
                caps: track.caps.clone(),
                convert: None,
                becomes: None,
            })
        }
        _ if is_matroska => Err("GStreamer cannot write them".into()),
        _ => Err(unsupported()),
    }
}

/// Returns `text` unless it is empty.
fn as_is(text: &str) -> Option<String> {
    let text = text.trim_end();
    (!text.is_empty()).then(|| text.into())
}

/// Returns the text for its form in markup, with the tags. GStreamer escapes the whole text of a
/// SubRip cue unless it is valid markup.
fn unescaped(text: &str) -> Option<String> {
    const ENTITIES: [(&str, &str); 6] = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&apos;", "'"),
        ("&#39;", "'"),
        ("&amp;", "&"),
    ];
    let mut text = text.to_string();
    for (entity, character) in ENTITIES {
        text = text.replace(entity, character);
    }
    as_is(&text)
}

/// Returns the text for its form in markup, without the tags.
fn plain(text: &str) -> Option<String> {
    let text = unescaped(text)?;
    const TAGS: [&str; 9] = ["i", "b", "u", "s", "tt", "font", "span", "big", "small"];
    let text = without_tags(&text, |tag| {
        let name = tag.trim_start_matches('/');
        let name = name.split([' ', '=']).next().unwrap_or("");
        TAGS.contains(&name.to_ascii_lowercase().as_str())
    });
    // Positions of SubRip, such as {\an8}.
    as_is(&without_overrides(&text))
}

/// Removes each `<tag>` for which `is_tag` is true.
fn without_tags(text: &str, is_tag: impl Fn(&str) -> bool) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        result.push_str(&rest[..start]);
        rest = &rest[start..];
        match rest.find('>') {
            Some(end) if is_tag(&rest[1..end]) => rest = &rest[end + 1..],
            _ => {
                result.push('<');
                rest = &rest[1..];
            }
        }
    }
    result + rest
}

/// Removes the overrides of SSA and ASS, such as `{\i1}`.
fn without_overrides(text: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("{\\") {
        let Some(length) = rest[start..].find('}') else {
            break;
        };
        result.push_str(&rest[..start]);
        rest = &rest[start + length + 1..];
    }
    result + rest
}

/// Returns the text of an event of SSA or ASS as Matroska stores it, without its style. Drawings
/// have none.
fn ass_text(event: &str) -> Option<String> {
    // ReadOrder, Layer, Style, Name, MarginL, MarginR, MarginV, Effect, Text.
    let text = event.splitn(9, ',').nth(8)?;
    let is_drawing = text.split("\\p").skip(1).any(|after| {
        let digit = after.chars().next();
        digit.is_some_and(|c| c.is_ascii_digit() && c != '0')
    });
    if is_drawing {
        return None;
    }
    let text = without_overrides(text);
    let text = text.replace("\\N", "\n").replace("\\n", "\n");
    as_is(&text.replace("\\h", "\u{a0}"))
}

/// Returns true if `line` consists of settings of a WebVTT cue, such as `align:start`.
fn is_settings(line: &str) -> bool {
    const NAMES: [&str; 6] = ["vertical", "line", "position", "size", "align", "region"];
    let mut settings = line.split_whitespace();
    settings.all(|s| {
        s.split_once(':')
            .is_some_and(|(name, _)| NAMES.contains(&name))
    })
}

/// Returns true if all cues of a stream without known caps are text, as those of WebVTT are.
fn is_web_vtt(track: &Track) -> bool {
    let is_text = |cue: &Cue| {
        let map = cue.data.map_readable();
        map.is_ok_and(|map| {
            let text = std::str::from_utf8(&map);
            text.is_ok_and(|text| {
                !text
                    .chars()
                    .any(|c| c.is_control() && !"\r\n\t".contains(c))
            })
        })
    };
    track.cues.iter().all(is_text)
}

/// Returns the text of a WebVTT cue, with the tags that SubRip has. In WebM an identifier and the
/// settings come before the text, a line each.
fn vtt_text(block: &str) -> Option<String> {
    let mut lines = block.splitn(3, '\n');
    let text = match (lines.next(), lines.next(), lines.next()) {
        (Some(_), Some(settings), Some(text)) if is_settings(settings) => text,
        _ => block,
    };
    let text = without_tags(text, |tag| {
        !["i", "b", "u", "/i", "/b", "/u"].contains(&tag)
            && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/')
    });
    let text = text
        .replace("&nbsp;", "\u{a0}")
        .replace("&lrm;", "\u{200e}");
    unescaped(&text.replace("&rlm;", "\u{200f}"))
}

fn vtt_plain(block: &str) -> Option<String> {
    let text = vtt_text(block)?;
    let is_tag = |tag: &str| ["i", "b", "u", "/i", "/b", "/u"].contains(&tag);
    as_is(&without_tags(&text, is_tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn styled_text_becomes_plain_text() {
        let some = |text: &str| Some(text.to_string());
        assert_eq!(plain("<i>a</i> &lt; b &amp; c"), some("a < b & c"));
        assert_eq!(
            plain("{\\an8}x &lt;font color=red&gt;y&lt;/font&gt;"),
            some("x y")
        );
        assert_eq!(plain("<b></b>"), None);
        assert_eq!(unescaped("<i>a</i> &amp;lt; b"), some("<i>a</i> &lt; b"));
        let event = "3,0,Default,,0,0,0,,{\\i1}One, two{\\i0}\\Nthree\\h4";
        assert_eq!(ass_text(event), some("One, two\nthree\u{a0}4"));
        assert_eq!(ass_text("3,0,D,,0,0,0,,{\\p1}m 0 0 l 9 9{\\p0}"), None);
        assert_eq!(ass_text("damaged"), None);
    }

    #[test]
    fn web_vtt_loses_only_identifier_settings_and_voices() {
        let some = |text: &str| Some(text.to_string());
        assert_eq!(
            vtt_text("\n\n<v Ann>Hi <i>you</i>\nA &lt; B"),
            some("Hi <i>you</i>\nA < B")
        );
        assert_eq!(vtt_text("7\nalign:start line:0\nHi"), some("Hi"));
        assert_eq!(
            vtt_text("One\nand two\nand three"),
            some("One\nand two\nand three")
        );
        assert_eq!(vtt_plain("<i>One</i> <00:01.000>two"), some("One two"));
    }
}
