//! Events of a command for other programs: JSON objects on standard output, one per line.

use std::collections::BTreeMap;

use serde::Serialize;

/// Event of a command.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event<'a> {
    /// Progress so far. `items` and `rate` have one entry: the number of items by their name, and
    /// the items per second by the name of the unit.
    Progress {
        #[serde(flatten)]
        items: BTreeMap<&'static str, u64>,
        of: Option<u64>,
        #[serde(flatten)]
        rate: BTreeMap<&'static str, f64>,
        eta_s: Option<f64>,
    },
    /// Warning or change, in one sentence.
    Notice { message: &'a str },
    /// Complete output of a picture.
    #[serde(rename = "done")]
    Picture {
        path: String,
        width: usize,
        height: usize,
    },
    /// Complete output of a folder.
    #[serde(rename = "done")]
    Folder {
        path: String,
        pictures: usize,
        videos: usize,
        of: usize,
        existing: usize,
    },
    /// Complete output of a video.
    #[cfg(feature = "video")]
    #[serde(rename = "done")]
    Video(Video<'a>),
    /// Complete output of a video of a folder. Others follow.
    #[cfg(feature = "video")]
    #[serde(rename = "video")]
    FolderVideo(Video<'a>),
    /// Segment of a video that may be made on its own.
    #[cfg(feature = "video")]
    Segment {
        segment: usize,
        start: f64,
        end: f64,
        frames: Option<u64>,
    },
    /// Finished segment of a video.
    #[cfg(feature = "video")]
    #[serde(rename = "done")]
    SegmentDone {
        path: String,
        segment: usize,
        frames: u64,
    },
    /// Incomplete output of a video. An error follows.
    #[cfg(feature = "video")]
    Partial(Video<'a>),
    /// Failure, or the end after a requested stop.
    Error { message: &'a str, stopped: bool },
}

/// Written video.
#[cfg(feature = "video")]
#[derive(Debug, Serialize)]
pub struct Video<'a> {
    pub path: String,
    pub frames: u64,
    pub width: usize,
    pub height: usize,
    pub fps: f64,
    /// Result for each audio stream, such as `AAC copied`.
    pub audio: &'a [String],
}

impl Event<'_> {
    /// Prints the event as a line on standard output.
    pub fn print(&self) {
        // Text and numbers always have JSON.
        if let Ok(line) = serde_json::to_string(self) {
            println!("{line}");
        }
    }
}

/// Returns `value` with three digits after the point.
pub fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
