//! Audio of one file in another: copied, or re-encoded if the container does not support the codec.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use gst::{ClockTime, PadProbeData, PadProbeReturn, PadProbeType, prelude::*};
use gst_app::AppSrc;

use super::{
    Container, Part,
    bus::{Bus, Failure, Heard, codec_name, discard, drop_after, link, make, parse_file, refuse},
    subtitles::language_tags,
    survey::{Kind, Survey, Track},
};

/// Encoders for streams that cannot be copied. The first installed one is used.
const AAC: [&str; 3] = ["avenc_aac", "fdkaacenc", "voaacenc"];
const FREE: [&str; 2] = ["opusenc", "vorbisenc"];
/// Bits per second of re-encoded audio.
const BITRATE: i32 = 192_000;
/// Time limit for testing a muxer with the first packets of a stream.
const TRIAL: ClockTime = ClockTime::from_seconds(10);

/// Method by which a stream enters a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// Copied, through the parser that converts it to the form that the container needs.
    Copy(Option<&'static str>),
    Encode,
}

/// Audio streams of a file that enter a muxer.
pub(super) struct Audio {
    parse: gst::Element,
    shared: Arc<Shared>,
    /// Marks of the track of each stream.
    pub marks: Vec<Vec<u8>>,
}

/// State that GStreamer's threads and the writer share.
#[derive(Default)]
struct Shared {
    elements: Mutex<Vec<gst::Element>>,
    /// First element of each stream: its queue.
    queues: Mutex<Vec<gst::Element>>,
    notes: Mutex<Vec<String>>,
    /// `None` for a copied stream.
    encoded: Mutex<Vec<Option<Arc<Encoded>>>>,
}

/// Times of the audio that an encoder has received, in nanoseconds.
#[derive(Default)]
struct Encoded {
    length: AtomicU64,
    /// Time of the encoder's own samples before the first one that it received.
    delay: AtomicU64,
}

impl Audio {
    /// Adds the audio of the file `from` with the survey `survey` to `pipeline`. Drops buffers
    /// later than `cut`, a running time in nanoseconds.
    ///
    /// # Errors
    /// Names the missing element, or the stream that cannot be kept.
    pub fn add(
        pipeline: &gst::Pipeline,
        mux: &gst::Element,
        from: &Path,
        survey: &Survey,
        container: Container,
        cut: &Arc<AtomicU64>,
    ) -> Result<Self, String> {
        let shared = Arc::new(Shared::default());
        // Index of the queue of each audio stream in the file.
        let mut places = Vec::new();
        for track in survey.tracks(Kind::Audio) {
            let is_used = survey.is_used(track);
            places.push(is_used.then(|| lock(&shared.queues).len()));
            if is_used {
                shared.track(pipeline, mux, track, container, cut)?;
                if let (Some(part), Some(queue)) = (survey.part, lock(&shared.queues).last()) {
                    keep_part(queue, part)?;
                }
            }
        }
        let mut elements = parse_file(pipeline, from, &survey.demux)?;
        lock(&shared.elements).extend(elements.iter().cloned());
        let parse = elements.pop().ok_or("no parser")?;
        let (weak, state, streams) = (pipeline.downgrade(), shared.clone(), AtomicUsize::new(0));
        parse.connect_pad_added(move |_, pad| {
            let Some(pipeline) = weak.upgrade() else {
                return;
            };
            let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
            let queue = if Kind::of(&caps) == Kind::Audio {
                let index = streams.fetch_add(1, Ordering::SeqCst);
                let place = places.get(index).copied().flatten();
                place.and_then(|place| lock(&state.queues).get(place).cloned())
            } else {
                None
            };
            let linked = match queue.and_then(|queue| queue.static_pad("sink")) {
                Some(sink) => pad.link(&sink).map(drop).map_err(|e| e.to_string()),
                None => discard(&pipeline, pad),
            };
            if let Err(reason) = linked {
                refuse(&pipeline, &format!("its audio cannot be kept: {reason}"));
            }
        });
        Ok(Self {
            parse,
            shared,
            marks: survey.audio().map(|track| track.marks.clone()).collect(),
        })
    }

    /// Returns the result for each stream, such as `AAC copied`.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.shared.notes).clone()
    }

    /// Returns the encoded length of each stream; `None` for a copied one.
    pub fn encoded(&self) -> Vec<Option<ClockTime>> {
        self.times(|encoded| &encoded.length)
    }

    /// Returns the delay of each stream by its encoder, of which the container does not know;
    /// `None` for a copied one.
    pub fn delays(&self) -> Vec<Option<ClockTime>> {
        self.times(|encoded| &encoded.delay)
    }

    fn times(&self, of: impl Fn(&Encoded) -> &AtomicU64) -> Vec<Option<ClockTime>> {
        let encoded = lock(&self.shared.encoded);
        let time = |e: &Arc<Encoded>| ClockTime::from_nseconds(of(e).load(Ordering::SeqCst));
        encoded.iter().map(|e| e.as_ref().map(time)).collect()
    }

    /// Returns true if `failure` comes from an element that the audio passes through.
    pub fn owns(&self, failure: &Failure) -> bool {
        let Some(failed) = &failure.source else {
            return false;
        };
        let elements = lock(&self.shared.elements);
        let mut elements = elements.iter();
        elements.any(|e| failed == e.upcast_ref::<gst::Object>() || failed.has_as_ancestor(e))
    }

    /// Ends the audio at its current position, after a failure.
    pub fn give_up(&self, reason: &str) {
        let ends: Vec<_> = lock(&self.shared.queues)
            .iter()
            .filter_map(|queue| queue.static_pad("sink"))
            .collect();
        // Not from this thread, because the event waits for space in the queue. The muxer may leave
        // the queue full until it gets this thread's frames, or the end of another stream.
        for end in ends {
            self.parse.call_async(move |_| {
                // A queue that has already ended refuses the event.
                let _ = end.send_event(gst::event::Eos::new());
            });
        }
        lock(&self.shared.notes).push(format!("the audio ends early: {reason}"));
    }
}

impl Shared {
    /// Connects an audio stream to the muxer.
    fn track(
        self: &Arc<Self>,
        pipeline: &gst::Pipeline,
        mux: &gst::Element,
        track: &Track,
        container: Container,
        cut: &Arc<AtomicU64>,
    ) -> Result<(), String> {
        let name = codec_name(&track.caps);
        let (route, change) = route(container, track)
            .map_err(|reason| format!("its {name} audio cannot be kept: {reason}"))?;
        let pad = mux.request_pad_simple("audio_%u");
        let pad = pad.ok_or("the container does not support audio")?;
        let queue = self.queue()?;
        let chain = Chain::add(pipeline, route, container, &queue, &pad)?;
        lock(&self.elements).extend(chain.elements);
        lock(&self.notes).push(match &chain.encoder {
            Some(encoder) => format!("{name} re-encoded by {encoder}{change}"),
            None => format!("{name} copied"),
        });
        lock(&self.encoded).push(chain.encoded);
        let set_time = Mutex::new(track.lead_times());
        let sink = queue.static_pad("sink").ok_or("a queue without input")?;
        sink.add_probe(PadProbeType::BUFFER, move |_, info| {
            if let Some(PadProbeData::Buffer(buffer)) = &mut info.data {
                lock(&set_time)(buffer);
            }
            PadProbeReturn::Ok
        });
        lock(&self.queues).push(queue);
        if let Some(tags) = language_tags(container, &track.tags) {
            state_language(&pad, tags);
        }
        if chain.encoder.is_none() {
            keep_partly_shown(&pad);
        }
        drop_after(&pad, cut);
        Ok(())
    }

    /// Returns a queue for the start of a stream.
    fn queue(self: &Arc<Self>) -> Result<gst::Element, String> {
        let queue = make("queue")?;
        for signal in ["overrun", "underrun"] {
            let shared = Arc::downgrade(self);
            queue.connect(signal, false, move |_| {
                shared.upgrade()?.make_room();
                None
            });
        }
        Ok(queue)
    }

    /// Lets full queues grow while another is empty. The muxer waits for the stream of the empty
    /// queue, and the parser may wait for space in a full queue before it reaches that stream. A
    /// stream that begins late or ends early makes the other queues longer. Fails if they take too
    /// much memory.
    fn make_room(&self) {
        const ALL: u64 = 1 << 30;
        const BUFFERS: u32 = 200;
        const BYTES: u32 = 10 << 20;
        const TIME: u64 = 1_000_000_000;
        let mut queues = lock(&self.queues);
        let is_empty = |queue: &gst::Element| queue.property::<u32>("current-level-buffers") == 0;
        if !queues.iter().any(is_empty) {
            return;
        }
        let bytes = |queue: &gst::Element| u64::from(queue.property::<u32>("current-level-bytes"));
        if queues.iter().map(bytes).sum::<u64>() > ALL {
            let text = "more than 1 GiB of its streams must be buffered to interleave them";
            gst::element_error!(queues[0], gst::ResourceError::NoSpaceLeft, ("{}", text));
            return queues.clear();
        }
        for queue in queues.iter() {
            let grow = |kind: &str, more: u32| {
                let (max, level) = (format!("max-size-{kind}"), format!("current-level-{kind}"));
                if queue.property::<u32>(&level) >= queue.property::<u32>(&max) {
                    queue.set_property(&max, queue.property::<u32>(&level).saturating_add(more));
                }
            };
            grow("buffers", BUFFERS);
            grow("bytes", BYTES);
            let level = queue.property::<u64>("current-level-time");
            if level >= queue.property::<u64>("max-size-time") {
                queue.set_property("max-size-time", level.saturating_add(TIME));
            }
        }
    }
}

/// Moves the start of a packet that begins before the segment at `pad` and ends in it to the start
/// of the segment. The muxer would drop the packet.
fn keep_partly_shown(pad: &gst::Pad) {
    pad.add_probe(PadProbeType::BUFFER, |pad, info| {
        let segment = pad.sticky_event::<gst::event::Segment>(0);
        let start = segment.and_then(|event| {
            let segment = event.segment().downcast_ref::<ClockTime>()?;
            segment.start()
        });
        if let Some(PadProbeData::Buffer(buffer)) = &mut info.data
            && let (Some(start), Some(time)) = (start, buffer.pts())
            && let Some(duration) = buffer.duration()
            && time < start
            && start < time + duration
        {
            let buffer = buffer.make_mut();
            buffer.set_pts(start);
            buffer.set_dts(buffer.dts().map(|_| start));
            buffer.set_duration(time + duration - start);
        }
        PadProbeReturn::Ok
    });
}

/// Passes `tags` to the muxer of `pad` before the first packet.
fn state_language(pad: &gst::Pad, tags: gst::TagList) {
    pad.add_probe(PadProbeType::EVENT_DOWNSTREAM, move |pad, info| {
        let Some(PadProbeData::Event(event)) = &info.data else {
            return PadProbeReturn::Ok;
        };
        if event.type_() != gst::EventType::Segment {
            return PadProbeReturn::Ok;
        }
        // A refused event leaves the language of the container.
        pad.send_event(gst::event::Tag::new(tags.clone()));
        PadProbeReturn::Remove
    });
}

/// Drops the packets of `queue` that are outside of `part`. The times of all others count from its
/// start.
fn keep_part(queue: &gst::Element, part: Part) -> Result<(), String> {
    let (Some(input), Some(output)) = (queue.static_pad("sink"), queue.static_pad("src")) else {
        return Err("a queue without pads".into());
    };
    input.add_probe(PadProbeType::BUFFER, move |pad, info| {
        let Some(PadProbeData::Buffer(buffer)) = &info.data else {
            return PadProbeReturn::Ok;
        };
        let time = buffer.pts().or(buffer.dts());
        let Some(time) = time.filter(|_| !buffer.flags().contains(gst::BufferFlags::HEADER)) else {
            return PadProbeReturn::Ok;
        };
        let segment = pad.sticky_event::<gst::event::Segment>(0);
        let time = segment.and_then(|event| {
            let segment = event.segment().downcast_ref::<ClockTime>()?;
            segment.to_running_time(time)
        });
        // A packet before the segment may be partly shown.
        if part.has(time.unwrap_or_default().into()) {
            return PadProbeReturn::Ok;
        }
        // A buffer that is left in the probe would be given back twice.
        info.data = None;
        PadProbeReturn::Handled
    });
    let start = i64::try_from(part.start.as_nanos()).map_err(|_| "a part that begins too late")?;
    output.set_offset(-start);
    Ok(())
}

/// Elements between a queue and a muxer.
struct Chain {
    elements: Vec<gst::Element>,
    /// Name of the encoder, if the stream is re-encoded.
    encoder: Option<String>,
    encoded: Option<Arc<Encoded>>,
}

impl Chain {
    /// Links `queue`, and the elements that `route` needs after it, to the muxer's `pad`.
    fn add(
        pipeline: &gst::Pipeline,
        route: Route,
        container: Container,
        queue: &gst::Element,
        pad: &gst::Pad,
    ) -> Result<Self, String> {
        let mut elements = vec![queue.clone()];
        let last = |e: &gst::Element| e.static_pad("src").ok_or("an element without output");
        if let Route::Copy(parser) = route {
            elements.extend(parser.map(make).transpose()?);
            link(pipeline, &elements)?;
            let end = last(&elements[elements.len() - 1])?;
            end.link(pad).map_err(|e| e.to_string())?;
            return Ok(Self {
                elements,
                encoder: None,
                encoded: None,
            });
        }
        Self::encode(pipeline, encoder(container)?, queue, pad)
    }

    /// Links `queue` through a decoder and `encoder` to the muxer's `pad`.
    fn encode(
        pipeline: &gst::Pipeline,
        encoder: gst::Element,
        queue: &gst::Element,
        pad: &gst::Pad,
    ) -> Result<Self, String> {
        let last = |e: &gst::Element| e.static_pad("src").ok_or("an element without output");
        let mut elements = vec![queue.clone()];
        let name = encoder.factory().map(|f| f.name().to_string());
        let decoder = make("decodebin")?;
        let raw = [make("audioconvert")?, make("audioresample")?, encoder];
        link(pipeline, &[queue.clone(), decoder.clone()])?;
        link(pipeline, &raw)?;
        let end = last(&raw[2])?;
        end.link(pad).map_err(|e| e.to_string())?;
        let sink = raw[0]
            .static_pad("sink")
            .ok_or("a converter without input")?;
        let encoded = continuous(
            &raw[2]
                .static_pad("sink")
                .ok_or("an encoder without input")?,
            name.as_deref().unwrap_or_default(),
        );
        let weak = pipeline.downgrade();
        decoder.connect_pad_added(move |_, pad| {
            if let (Some(pipeline), Err(e)) = (weak.upgrade(), pad.link(&sink)) {
                refuse(&pipeline, &format!("its audio cannot be decoded: {e}"));
            }
        });
        elements.push(decoder);
        elements.extend(raw);
        Ok(Self {
            elements,
            encoder: Some(name.unwrap_or_default()),
            encoded: Some(encoded),
        })
    }
}

/// Returns words about the channels if the encoder at the end of the running elements `chain` has
/// another number of them than the decoder; otherwise nothing.
fn channel_change(chain: &[gst::Element]) -> String {
    let channels = |element: &gst::Element| {
        let caps = element.static_pad("sink")?.current_caps()?;
        caps.structure(0)?.get::<i32>("channels").ok()
    };
    let [.., convert, _, encoder] = chain else {
        return String::new();
    };
    match (channels(convert), channels(encoder)) {
        (Some(from), Some(to)) if from != to => format!(", {from} channels become {to}"),
        _ => String::new(),
    }
}

/// Returns the samples that the encoder `name` puts before the first one of its input and that its
/// packets do not state, and the number of samples that it keeps back at the end.
fn delay(name: &str) -> (u64, u64) {
    match name {
        "avenc_aac" => (1024, 0),
        "fdkaacenc" => (2048, 0),
        "voaacenc" => (1600, 1600 + 1024),
        _ => (0, 0),
    }
}

/// Corrects the times of decoded audio at `pad`, the input of the encoder `name`, and measures its
/// length. In some containers the times of packets are shorter than their samples. An encoder would
/// drop the difference.
fn continuous(pad: &gst::Pad, name: &str) -> Arc<Encoded> {
    let encoded = Arc::new(Encoded::default());
    let shared = encoded.clone();
    let (delay, behind) = delay(name);
    let (first, end) = (OnceLock::new(), Mutex::new(None::<ClockTime>));
    let is_over = AtomicBool::new(false);
    let kinds = PadProbeType::BUFFER | PadProbeType::EVENT_DOWNSTREAM;
    pad.add_probe(kinds, move |pad, info| {
        if is_over.load(Ordering::SeqCst) {
            return PadProbeReturn::Ok;
        }
        if let Some(PadProbeData::Event(event)) = &info.data {
            let is_end = event.type_() == gst::EventType::Eos;
            let last = *lock(&end);
            if let (true, 1.., Some(last)) = (is_end, behind, last) {
                is_over.store(true, Ordering::SeqCst);
                // The end is in force even if the silence is refused.
                let _ = silence(pad, behind, last).map(|silence| pad.chain(silence));
            }
            return PadProbeReturn::Ok;
        }
        if let Some(PadProbeData::Buffer(buffer)) = &mut info.data {
            let mut end = lock(&end);
            if let (Some(pts), Some(duration)) = (buffer.pts(), buffer.duration()) {
                let start = match *end {
                    // Overlap beyond jitter.
                    Some(end) if pts + duration / 4 < end => end,
                    _ => pts,
                };
                *end = Some(start + duration);
                if start != pts {
                    buffer.make_mut().set_pts(start);
                }
                let first = first.get_or_init(|| {
                    let rate = raw_format(pad).map_or(0, |(rate, _)| rate);
                    let time = delay.mul_div_round(1_000_000_000, rate).unwrap_or(0);
                    shared.delay.store(time, Ordering::SeqCst);
                    start
                });
                let whole = (start + duration).saturating_sub(*first);
                shared.length.store(whole.nseconds(), Ordering::SeqCst);
            }
        }
        PadProbeReturn::Ok
    });
    encoded
}

/// Returns the rate of the raw audio at `pad`, and the bytes of a sample of all channels.
fn raw_format(pad: &gst::Pad) -> Option<(u64, u64)> {
    let caps = pad.current_caps()?;
    let structure = caps.structure(0)?;
    let rate = u64::try_from(structure.get::<i32>("rate").ok()?).ok()?;
    let channels = u64::try_from(structure.get::<i32>("channels").ok()?).ok()?;
    let format = structure.get::<&str>("format").ok()?;
    // Such as S16LE or F32LE.
    let bits = format.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let bits: u64 = bits.get(..2)?.parse().ok()?;
    Some((rate, channels * bits / 8)).filter(|(rate, _)| *rate > 0)
}

/// Returns silence of `samples` samples that begins at `time`, for the input `pad` of an encoder of
/// signed samples.
fn silence(pad: &gst::Pad, samples: u64, time: ClockTime) -> Option<gst::Buffer> {
    let (rate, size) = raw_format(pad)?;
    let bytes = usize::try_from(samples * size).ok()?;
    let mut buffer = gst::Buffer::from_slice(vec![0; bytes]);
    let buffer_mut = buffer.get_mut()?;
    buffer_mut.set_pts(time);
    let duration = samples.mul_div_round(1_000_000_000, rate)?;
    buffer_mut.set_duration(ClockTime::from_nseconds(duration));
    Some(buffer)
}

/// Tests with the first packets of a stream how `container` accepts it. Returns the method, and
/// words about the channels if their number changes.
fn route(container: Container, track: &Track) -> Result<(Route, String), String> {
    let mux = make(container.muxer())?;
    let pad = mux.request_pad_simple("audio_%u");
    let pad = pad.ok_or("the container does not support audio")?;
    let copy = copying(&track.caps, &pad.pad_template_caps()).map(Route::Copy);
    let mut reason = String::new();
    for route in copy.into_iter().chain([Route::Encode]) {
        match trial(container, track, route) {
            Ok(change) => return Ok((route, change)),
            Err(failed) => reason = failed,
        }
    }
    Err(reason)
}

/// Sends the first packets of `track` through `route` into a muxer. Returns words about the
/// channels if their number changes.
fn trial(container: Container, track: &Track, route: Route) -> Result<String, String> {
    let pipeline = gst::Pipeline::new();
    let source = AppSrc::builder()
        .caps(&track.caps)
        .format(gst::Format::Time)
        .build();
    let (queue, mux, sink) = (make("queue")?, make(container.muxer())?, make("fakesink")?);
    let pad = mux.request_pad_simple("audio_%u");
    let pad = pad.ok_or("the container does not support audio")?;
    link(&pipeline, &[source.clone().upcast()])?;
    link(&pipeline, &[mux, sink])?;
    let chain = Chain::add(&pipeline, route, container, &queue, &pad)?;
    source.link(&queue).map_err(|e| e.to_string())?;
    let taken = Arc::new(AtomicUsize::new(0));
    let counter = taken.clone();
    pad.add_probe(PadProbeType::BUFFER, move |_, _| {
        counter.fetch_add(1, Ordering::SeqCst);
        PadProbeReturn::Ok
    });
    let mut bus = Bus::of(&pipeline).map_err(|e| e.to_string())?;
    // Failures are reported on the bus.
    let _ = pipeline.set_state(gst::State::Playing);
    let mut set_time = track.lead_times();
    for buffer in &track.head {
        let mut buffer = buffer.clone();
        set_time(&mut buffer);
        let _ = source.push_buffer(buffer);
    }
    let _ = source.end_of_stream();
    let heard = bus.wait(TRIAL);
    let change = match &chain.encoder {
        Some(_) => channel_change(&chain.elements),
        None => String::new(),
    };
    let _ = pipeline.set_state(gst::State::Null);
    match heard {
        Some(Heard::End) if taken.load(Ordering::SeqCst) > 0 => Ok(change),
        Some(Heard::Failure(failure)) => Err(failure.reason),
        _ => Err("the container accepts none of its packets".into()),
    }
}

/// Returns the parser, if any, that converts a stream with `caps` to the form that a container with
/// the caps `taken` needs; `None` if the container does not support such a stream.
fn copying(caps: &gst::CapsRef, taken: &gst::Caps) -> Option<Option<&'static str>> {
    let structure = caps.structure(0)?;
    let version = structure.get::<i32>("mpegversion").unwrap_or(0);
    let parser = match (structure.name().as_str(), version) {
        ("audio/mpeg", 2 | 4) => Some("aacparse"),
        ("audio/mpeg", 1) => Some("mpegaudioparse"),
        ("audio/x-ac3" | "audio/x-eac3", _) => Some("ac3parse"),
        ("audio/x-flac", _) => Some("flacparse"),
        ("audio/x-opus", _) => Some("opusparse"),
        ("audio/x-raw", _) => Some("audioconvert"),
        _ => None,
    };
    let mut kept = structure.to_owned();
    if parser.is_some() {
        // The parser may change these fields.
        for field in ["stream-format", "framed", "parsed", "alignment", "format"] {
            kept.remove_field(field);
        }
    }
    let kept = gst::Caps::builder_full().structure(kept).build();
    kept.can_intersect(taken).then_some(parser)
}

/// Returns an encoder for audio that `container` does not support.
fn encoder(container: Container) -> Result<gst::Element, String> {
    let candidates: &[&str] = if container == Container::WebM {
        &FREE
    } else {
        &AAC
    };
    let found = candidates.iter().find_map(|name| make(name).ok());
    let encoder = found.ok_or_else(|| {
        format!(
            "it has to be re-encoded, and none of the encoders {} is installed",
            candidates.join(", ")
        )
    })?;
    let bitrate = encoder.find_property("bitrate");
    if bitrate.is_some() {
        encoder.set_property_from_str("bitrate", &BITRATE.to_string());
    }
    Ok(encoder)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::video::{
        bus::start,
        matroska,
        mp4::{Delayed, hide_delays},
    };

    /// Encodes a click at 1 s of 2 s. Returns the time of the click in the file, and the length.
    fn click(encoder: &str, container: Container, rate: usize) -> (f64, f64) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let pipeline = gst::Pipeline::new();
        let caps = gst::Caps::builder("audio/x-raw")
            .field("format", "S16LE")
            .field("layout", "interleaved")
            .field("rate", rate as i32)
            .field("channels", 1)
            .build();
        let source = AppSrc::builder()
            .caps(&caps)
            .format(gst::Format::Time)
            .max_bytes(0)
            .build();
        let (queue, mux) = (make("queue").unwrap(), make(container.muxer()).unwrap());
        let sink = make("filesink").unwrap();
        sink.set_property("location", path.to_str().unwrap());
        link(&pipeline, &[source.clone().upcast()]).unwrap();
        link(&pipeline, &[mux.clone(), sink]).unwrap();
        let pad = mux.request_pad_simple("audio_%u").unwrap();
        let chain = Chain::encode(&pipeline, make(encoder).unwrap(), &queue, &pad).unwrap();
        source.link(&queue).unwrap();
        start(&pipeline);
        for i in 0..20 {
            let mut samples = vec![0_i16; rate / 10];
            if i == 10 {
                samples[..24].iter_mut().for_each(|v| *v = 20_000);
            }
            let bytes: Vec<u8> = samples.iter().flat_map(|v| v.to_le_bytes()).collect();
            let mut buffer = gst::Buffer::from_slice(bytes);
            let buffer_mut = buffer.get_mut().unwrap();
            buffer_mut.set_pts(ClockTime::from_mseconds(100 * i));
            buffer_mut.set_duration(ClockTime::from_mseconds(100));
            source.push_buffer(buffer).unwrap();
        }
        source.end_of_stream().unwrap();
        let mut bus = Bus::of(&pipeline).unwrap();
        assert!(matches!(bus.wait(TRIAL), Some(Heard::End)), "{encoder}");
        pipeline.set_state(gst::State::Null).unwrap();
        let encoded = chain.encoded.unwrap();
        let time = |value: &AtomicU64| ClockTime::from_nseconds(value.load(Ordering::SeqCst));
        let (delay, length) = (time(&encoded.delay), time(&encoded.length));
        let seconds = length.nseconds() as f64 / 1e9;
        assert!((seconds - 2.0).abs() < 1e-3, "{encoder}: {seconds} s");
        if container == Container::Matroska {
            let tracks = matroska::Tracks {
                delays: vec![Some(delay)],
                ..Default::default()
            };
            matroska::complete(&path, &[], &tracks).unwrap();
        } else {
            let delayed = (!delay.is_zero()).then_some(Delayed { delay, length });
            hide_delays(&path, &[delayed]).unwrap();
        }
        let output = Command::new("ffmpeg")
            .args(["-v", "error", "-copyts", "-i"])
            .arg(&path)
            .args([
                "-af",
                "aresample=48000:async=1:first_pts=0",
                "-f",
                "s16le",
                "-",
            ])
            .output()
            .unwrap();
        let samples = output.stdout.as_chunks::<2>().0.iter();
        let samples: Vec<i16> = samples.map(|v| i16::from_le_bytes(*v)).collect();
        let peak = samples.iter().map(|v| v.unsigned_abs()).max().unwrap();
        let first = samples.iter().position(|v| v.unsigned_abs() > peak / 2);
        let time = |samples: usize| samples as f64 / 48_000.0;
        (time(first.unwrap()), time(samples.len()))
    }

    #[test]
    fn every_encoder_keeps_sync_and_the_end() {
        crate::video::init().unwrap();
        let mut tested = 0;
        for encoder in AAC.into_iter().chain(FREE) {
            if make(encoder).is_err() {
                continue;
            }
            tested += 1;
            for container in [Container::Mp4, Container::Matroska] {
                if container == Container::Mp4 && FREE.contains(&encoder) {
                    continue;
                }
                for rate in [48_000, 44_100] {
                    let (click, length) = click(encoder, container, rate);
                    let what = format!("{encoder} {container:?} {rate}: {click} s, {length} s");
                    assert!((click - 1.0).abs() < 0.005, "{what}");
                    assert!((1.995..2.06).contains(&length), "{what}");
                }
            }
        }
        assert!(tested > 1);
    }
}
