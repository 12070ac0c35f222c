//! Video files, read and written through GStreamer.
//!
//! [`Reader`] decodes whatever GStreamer plays into the library's frames. [`Writer`] encodes frames
//! and takes the audio over from another file. [`transcode`] puts a function between both, and
//! compares the file that it has written with the input. Frames are decoded and encoded in
//! GStreamer's threads, a few frames ahead and behind: memory does not grow with the length of a
//! file.
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
mod edits;
mod reader;
mod stream;
mod survey;
mod through;
mod transcode;
mod verify;
mod writer;

pub use reader::Reader;
pub use stream::StreamInfo;
pub use through::through;
pub use transcode::{End, Transcoded, partial_path, transcode};
pub use writer::{Container, Notice, Options, Writer};

use std::{path::Path, sync::OnceLock, time::Duration};

use crate::{Error, Result, frame::Frame};

/// A frame and when it is shown.
#[derive(Clone, Debug)]
pub struct TimedFrame {
    pub frame: Frame,
    /// Since the start of the file.
    pub pts: Duration,
    /// `None` when the file does not say.
    pub duration: Option<Duration>,
}

/// Function that decodes the start of a file where a crash does no harm, such as in another
/// process. An error says what happened.
pub type Probe = fn(&Path) -> Result<(), String>;

static PROBE: OnceLock<Probe> = OnceLock::new();

/// Sets the function that [`Reader::open`] calls before it decodes a file of an unusual pixel
/// format. GStreamer's libav decoders crash with formats that GStreamer does not know. The first
/// call counts.
pub fn set_probe(probe: Probe) {
    // A second probe is no better than the first.
    let _ = PROBE.set(probe);
}

/// Starts GStreamer, if nobody has.
fn init() -> Result<()> {
    gst::init().map_err(|e| Error::GStreamer(format!("cannot be started: {e}")))
}
