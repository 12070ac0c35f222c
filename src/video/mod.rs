//! Video files, read and written through GStreamer.
//!
//! [`Reader`] decodes every file that GStreamer can play into the library's frames. [`Writer`]
//! encodes frames and copies the audio of another file. [`transcode`] passes the frames of a reader
//! through a function to a writer, and compares the written file with the input. GStreamer's
//! threads decode and encode a few frames ahead and behind, so memory does not grow with the length
//! of a file, except by 16 bytes a packet.
//!
//! ```no_run
//! use std::path::Path;
//! use tadsr::{Device, Upscaler, video::{Options, Reader, transcode}};
//!
//! let mut upscaler = Upscaler::load("tiny", Device::Auto)?;
//! let reader = Reader::open(Path::new("small.mp4"))?;
//! let done = transcode(reader, Path::new("large.mp4"), &Options::default(), |frame| {
//!     upscaler.upscale(&frame.frame).map(Some)
//! })?;
//! println!("{} frames", done.frames);
//! # Ok::<(), tadsr::Error>(())
//! ```

mod audio;
mod bus;
mod cut;
mod edits;
mod encoder;
mod matroska;
mod mp4;
mod orientation;
mod part;
mod reader;
mod segments;
mod stream;
mod subtitles;
mod survey;
mod through;
mod transcode;
mod verify;
mod writer;

pub use part::Part;
pub use reader::Reader;
pub use segments::{Access, Made, MadeOf, Plan, Segment, Segments, State, Step, segments_folder};
pub use stream::StreamInfo;
pub use through::through;
pub use transcode::{End, Transcoded, partial_path, transcode};
pub use writer::{Container, Notice, Options, Writer};

use std::{path::Path, sync::OnceLock, time::Duration};

use crate::{Error, Result, frame::Frame};

/// A frame with its presentation time.
#[derive(Clone, Debug)]
pub struct TimedFrame {
    pub frame: Frame,
    /// Time since the start of the file.
    pub pts: Duration,
    /// Display time; `None` if the file does not state it.
    pub duration: Option<Duration>,
}

/// Function that decodes the start of a file where a crash does no harm, for example in another
/// process. Its error is a description of what happened.
pub type Probe = fn(&Path) -> Result<(), String>;

static PROBE: OnceLock<Probe> = OnceLock::new();

/// Sets the function that [`Reader::open`] calls before it decodes a file of an unusual pixel
/// format. GStreamer's libav decoders crash with formats that GStreamer does not know. Only the
/// first call has an effect.
pub fn set_probe(probe: Probe) {
    let _ = PROBE.set(probe);
}

/// Initializes GStreamer, if necessary.
fn init() -> Result<()> {
    gst::init().map_err(|e| Error::GStreamer(format!("cannot be started: {e}")))
}
