//! The audio of one file in another: copied as it is, or encoded anew where the container does not hold its kind.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use gst::{PadProbeReturn, prelude::*};

use super::{
    Container,
    bus::{Failure, append, codec_name, discard, file_source, make, on_data, on_time, refuse},
};

/// How long to wait for the list of a file's streams.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What codecs are encoded to where they cannot be copied, the first that is there.
const AAC: [&str; 3] = ["avenc_aac", "fdkaacenc", "voaacenc"];
const FREE: [&str; 2] = ["opusenc", "vorbisenc"];
/// Bits a second of audio that is encoded anew.
const BITRATE: i32 = 192_000;

/// The audio streams of a file on their way into a muxer.
pub(super) struct Audio {
    source: gst::Element,
    parse: gst::Element,
    shared: Arc<Shared>,
}

/// What GStreamer's threads and the writer share.
#[derive(Default)]
struct Shared {
    /// All streams of the file are linked.
    known: AtomicBool,
    /// Elements between the parser and the muxer, and the pads at which each stream can be ended.
    elements: Mutex<Vec<gst::Element>>,
    ends: Mutex<Vec<gst::Pad>>,
    /// The first element of each stream.
    queues: Mutex<Vec<gst::Element>>,
    notes: Mutex<Vec<String>>,
}

impl Audio {
    /// Adds the audio of the file `from` to `pipeline`. Buffers later than `cut`, a running time in nanoseconds, are
    /// left out.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn add(
        pipeline: &gst::Pipeline,
        mux: &gst::Element,
        from: &Path,
        container: Container,
        cut: Arc<AtomicU64>,
    ) -> Result<Self, String> {
        let source = file_source(from)?;
        let parse = make("parsebin")?;
        pipeline
            .add_many([&source, &parse])
            .and_then(|()| source.link(&parse))
            .map_err(|e| e.to_string())?;
        let shared = Arc::new(Shared::default());
        let (weak, mux, state) = (pipeline.downgrade(), mux.downgrade(), shared.clone());
        parse.connect_pad_added(move |_, pad| {
            let (Some(pipeline), Some(mux)) = (weak.upgrade(), mux.upgrade()) else {
                return;
            };
            let known = state.clone();
            on_data(pad, move || known.known.store(true, Ordering::SeqCst));
            let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
            let audio = |s: &gst::StructureRef| s.name().starts_with("audio/");
            let linked = if caps.structure(0).is_some_and(audio) {
                state.track(&pipeline, &mux, pad, &caps, container, &cut)
            } else {
                discard(&pipeline, pad)
            };
            if let Err(reason) = linked {
                refuse(&pipeline, &format!("its audio cannot be kept: {reason}"));
            }
        });
        Ok(Self {
            source,
            parse,
            shared,
        })
    }

    /// Whether all audio streams have been found.
    pub fn is_known(&self) -> bool {
        self.shared.known.load(Ordering::SeqCst)
    }

    /// What became of each stream.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.shared.notes).clone()
    }

    /// Whether `failure` happened on the audio's way.
    pub fn owns(&self, failure: &Failure) -> bool {
        let Some(failed) = &failure.source else {
            return false;
        };
        let elements = lock(&self.shared.elements);
        [&self.source, &self.parse]
            .into_iter()
            .chain(elements.iter())
            .any(|e| failed == e.upcast_ref::<gst::Object>() || failed.has_as_ancestor(e))
    }

    /// Ends the audio where it is, after a failure.
    pub fn give_up(&self, reason: &str) {
        self.shared.known.store(true, Ordering::SeqCst);
        let ends = std::mem::take(&mut *lock(&self.shared.ends));
        // Not from this thread: the event waits for a place in the queue, and it may be for this thread's frames, or for
        // the end of another stream, that the muxer leaves the queue full.
        for end in ends {
            self.parse.call_async(move |_| {
                // One that has ended already refuses.
                let _ = end.send_event(gst::event::Eos::new());
            });
        }
        lock(&self.shared.notes).push(format!("the audio breaks off: {reason}"));
    }
}

impl Shared {
    /// Leads the audio stream of `pad` into the muxer.
    fn track(
        self: &Arc<Self>,
        pipeline: &gst::Pipeline,
        mux: &gst::Element,
        pad: &gst::Pad,
        caps: &gst::CapsRef,
        container: Container,
        cut: &Arc<AtomicU64>,
    ) -> Result<(), String> {
        let track = mux.request_pad_simple("audio_%u");
        let track = track.ok_or("the container takes no audio")?;
        let name = codec_name(caps);
        let queue = self.queue()?;
        let (chain, decoder) = match copying(caps, &track.pad_template_caps()) {
            Some(parser) => {
                self.note(format!("{name} copied"));
                let chain = [Some(queue), parser.map(make).transpose()?];
                (chain.into_iter().flatten().collect::<Vec<_>>(), None)
            }
            None => {
                let encoder = encoder(container)?;
                let kind = encoder.factory().map(|f| f.name().to_string());
                self.note(format!(
                    "{name} encoded anew by {}",
                    kind.unwrap_or_default()
                ));
                let chain = [make("audioconvert")?, make("audioresample")?, encoder];
                (chain.into(), Some([queue, make("decodebin")?]))
            }
        };
        let end = chain.first().and_then(|e| e.static_pad("sink"));
        let end = end.ok_or("an element without a sink pad")?;
        let mut elements = lock(&self.elements);
        elements.extend(chain.iter().chain(decoder.iter().flatten()).cloned());
        drop(elements);
        lock(&self.ends).push(end.clone());

        let last = chain.last().and_then(|e| e.static_pad("src"));
        let last = last.ok_or("an element without a source pad")?;
        let cut = cut.clone();
        on_time(&track, move |time, _| {
            match time.nseconds() > cut.load(Ordering::SeqCst) {
                true => PadProbeReturn::Drop,
                false => PadProbeReturn::Ok,
            }
        });
        match decoder {
            None => append(pipeline, pad, &chain, Some((&last, &track))),
            Some(decoder) => {
                let failed = |e: gst::glib::BoolError| e.to_string();
                pipeline.add_many(&chain).map_err(failed)?;
                gst::Element::link_many(&chain).map_err(failed)?;
                last.link(&track).map_err(|e| e.to_string())?;
                for element in &chain {
                    element.sync_state_with_parent().map_err(failed)?;
                }
                let weak = pipeline.downgrade();
                decoder[1].connect_pad_added(move |_, pad| {
                    if let (Some(pipeline), Err(e)) = (weak.upgrade(), pad.link(&end)) {
                        refuse(&pipeline, &format!("its audio cannot be decoded: {e}"));
                    }
                });
                append(pipeline, pad, &decoder, None)
            }
        }
    }

    /// A queue at the begin of a stream.
    fn queue(self: &Arc<Self>) -> Result<gst::Element, String> {
        let queue = make("queue")?;
        for signal in ["overrun", "underrun"] {
            let shared = Arc::downgrade(self);
            queue.connect(signal, false, move |_| {
                shared.upgrade()?.make_room();
                None
            });
        }
        lock(&self.queues).push(queue.clone());
        Ok(queue)
    }

    /// Lets full queues grow while another is empty: the muxer waits for that stream, and the parser may be waiting for a
    /// place in a full queue before it comes to it. A stream that begins late or ends early makes others as much longer; what
    /// takes too much memory is given up.
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
            let text = "its streams lie further apart than 1 GiB of them holds";
            gst::element_error!(queues[0], gst::ResourceError::NoSpaceLeft, ("{}", text));
            return queues.clear();
        }
        for queue in queues.iter() {
            let grow = |kind: &str, more: u32| {
                let (most, level) = (format!("max-size-{kind}"), format!("current-level-{kind}"));
                if queue.property::<u32>(&level) >= queue.property::<u32>(&most) {
                    queue.set_property(&most, queue.property::<u32>(&level).saturating_add(more));
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

    fn note(&self, text: String) {
        lock(&self.notes).push(text);
    }
}

/// Whether a container that takes `taken` holds a stream with `caps` as it is, and the parser that gives it the form
/// that the container wants, if there is one.
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
        // What the parser changes.
        for field in ["stream-format", "framed", "parsed", "alignment", "format"] {
            kept.remove_field(field);
        }
    }
    let kept = gst::Caps::builder_full().structure(kept).build();
    kept.can_intersect(taken).then_some(parser)
}

/// The encoder for audio that `container` does not hold as it is.
fn encoder(container: Container) -> Result<gst::Element, String> {
    let candidates: &[&str] = match container {
        Container::WebM => &FREE,
        _ => &AAC,
    };
    let found = candidates.iter().find_map(|name| make(name).ok());
    let encoder = found.ok_or_else(|| {
        format!(
            "it has to be encoded anew, and none of the encoders {} is there",
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
