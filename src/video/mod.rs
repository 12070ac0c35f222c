//! Video files, read and written through GStreamer.
//!
//! [`Reader`] decodes whatever GStreamer plays into the library's frames, [`Writer`] encodes frames and takes the
//! audio over from another file, and [`transcode`] puts a function between both. Frames are decoded and encoded in
//! GStreamer's threads, a few frames ahead and behind: memory does not grow with the length of a file.
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
mod reader;
mod stream;
mod through;
mod transcode;
mod writer;

pub use reader::Reader;
pub use stream::StreamInfo;
pub use through::through;
pub use transcode::{End, Transcoded, partial_path, transcode};
pub use writer::{Container, Options, Writer};

use std::time::Duration;

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

/// Starts GStreamer, if nobody has.
fn init() -> Result<()> {
    gst::init().map_err(|e| Error::GStreamer(format!("cannot be started: {e}")))
}
