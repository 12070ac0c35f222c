//! Edit lists of MP4 and QuickTime files: the part of a track that is shown, and its time.
//!
//! GStreamer's demuxer follows edit lists, but ends early if one begins between key frames. For
//! such a file this module hides the edit lists from the demuxer and sets the segments of its
//! streams.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    sync::Arc,
    time::Duration,
};

use gst::{ClockTime, PadProbeData, PadProbeReturn, PadProbeType, prelude::*};

/// Maximum size of an index in bytes.
const MAX_INDEX: u64 = 256 << 20;

/// Line about chapters from [`hidden`].
pub(super) const CHAPTERS: &str =
    "its chapters are left out: GStreamer does not read those of MP4 and QuickTime";

/// Part of a track that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edit {
    pub track: u32,
    /// Start of the part, in the time of the track.
    pub start: Duration,
    pub length: Duration,
    /// Time of the film at which the part is shown.
    pub at: Duration,
}

/// Edit lists of a file, if each shows only one part of its track.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Edits {
    pub list: Vec<Edit>,
    /// Replacement bytes by their offset in the file. They remove the edit lists and set the
    /// duration to that of the longest track.
    patches: Vec<(u64, Vec<u8>)>,
}

impl Edits {
    /// Reads the edit lists of the file `path`. Returns none if the file is not an MP4 file, is
    /// damaged, or has a list of several parts.
    pub fn read(path: &Path) -> Self {
        Self::try_read(path).unwrap_or_default()
    }

    fn try_read(path: &Path) -> Option<Self> {
        let (index, offset) = read_index(path)?;
        Self::parse(&index, offset)
    }

    /// Parses the content of a `moov` box at `offset` in its file.
    fn parse(index: &[u8], offset: u64) -> Option<Self> {
        let place =
            |part: &[u8]| offset + (part.as_ptr() as usize - index.as_ptr() as usize) as u64;
        let head = find(index, b"mvhd")?;
        let film = number(head, 12, 20)?;
        let mut edits = Self::default();
        let mut length = 0.0_f64;
        let mut durations = vec![duration_field(head, 16, 24)?];
        for trak in boxes(index)
            .filter(|(name, _)| name == b"trak")
            .map(|(_, trak)| trak)
        {
            let (head, media) = (find(trak, b"tkhd")?, find(find(trak, b"mdia")?, b"mdhd")?);
            let ticks = number(media, 12, 20)?;
            let media = duration_field(media, 16, 24)?;
            let media = media
                .iter()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            length = length.max(media as f64 / f64::from(ticks.max(1)));
            durations.push(duration_field(head, 20, 28)?);
            let Some(edts) = find(trak, b"edts") else {
                continue;
            };
            edits.patches.push((place(edts) - 4, b"free".to_vec()));
            let track = number(head, 12, 20)?;
            edits
                .list
                .push(part(find(edts, b"elst")?, track, film, ticks)?);
        }
        // All ones mean that the length of a track is unknown.
        let length = (length * f64::from(film)).ceil() as u64;
        for field in durations {
            let bytes = length.min(u64::from(u32::MAX - 1)).to_be_bytes();
            edits
                .patches
                .push((place(field), bytes[8 - field.len()..].to_vec()));
        }
        Some(edits)
    }

    /// Hides the edit lists from the elements that read from the file source `source`.
    pub fn hide(self: &Arc<Self>, source: &gst::Element) {
        let Some(pad) = source.static_pad("src") else {
            return;
        };
        let edits = self.clone();
        pad.add_probe(PadProbeType::PULL | PadProbeType::BUFFER, move |_, info| {
            let Some(PadProbeData::Buffer(buffer)) = &mut info.data else {
                return PadProbeReturn::Ok;
            };
            let start = buffer.offset();
            let end = start.saturating_add(buffer.size() as u64);
            let inside =
                |(at, bytes): &&(u64, Vec<u8>)| *at < end && at + bytes.len() as u64 > start;
            let patches: Vec<_> = edits.patches.iter().filter(inside).collect();
            if !patches.is_empty()
                && let Ok(mut map) = buffer.make_mut().map_writable()
            {
                let bytes = patches.iter().flat_map(|(at, bytes)| (*at..).zip(bytes));
                for (at, byte) in bytes {
                    let at = at
                        .checked_sub(start)
                        .and_then(|at| usize::try_from(at).ok());
                    if let Some(to) = at.and_then(|at| map.get_mut(at)) {
                        *to = *byte;
                    }
                }
            }
            PadProbeReturn::Ok
        });
    }

    /// Sets the segment of the stream at `pad`, a source pad of the demuxer.
    pub fn apply(self: &Arc<Self>, pad: &gst::Pad) {
        let edits = self.clone();
        pad.add_probe(PadProbeType::EVENT_DOWNSTREAM, move |pad, info| {
            let Some(PadProbeData::Event(event)) = &info.data else {
                return PadProbeReturn::Ok;
            };
            if event.type_() != gst::EventType::Segment {
                return PadProbeReturn::Ok;
            }
            if let Some(edit) = edits.of(pad) {
                let mut segment = gst::FormattedSegment::<ClockTime>::new();
                let time = |d: Duration| ClockTime::try_from(d).ok();
                segment.set_start(time(edit.start));
                segment.set_position(time(edit.start));
                segment.set_stop(time(edit.start + edit.length));
                segment.set_base(time(edit.at));
                segment.set_time(time(edit.at));
                info.data = Some(PadProbeData::Event(gst::event::Segment::new(&segment)));
            }
            PadProbeReturn::Ok
        });
    }

    fn of(&self, pad: &gst::Pad) -> Option<Edit> {
        let start = pad.sticky_event::<gst::event::StreamStart>(0)?;
        let track: u32 = start.stream_id().rsplit('/').next()?.parse().ok()?;
        self.list.iter().find(|edit| edit.track == track).copied()
    }
}

/// Returns the content of the `moov` box of an MP4 or QuickTime file, and its offset in the file.
fn read_index(path: &Path) -> Option<(Vec<u8>, u64)> {
    let mut file = File::open(path).ok()?;
    let end = file.metadata().ok()?.len();
    let mut at = 0;
    while at + 8 <= end {
        let mut head = [0; 16];
        file.seek(SeekFrom::Start(at)).ok()?;
        let read = file.read(&mut head).ok()?;
        let size = u64::from(u32::from_be_bytes(head[..4].try_into().ok()?));
        let (size, header) = match size {
            0 => (end - at, 8),
            1 if read == 16 => (u64::from_be_bytes(head[8..].try_into().ok()?), 16),
            size => (size, 8),
        };
        if &head[4..8] == b"moov" {
            if size > MAX_INDEX || size < header {
                return None;
            }
            file.seek(SeekFrom::Start(at + header)).ok()?;
            let mut index = vec![0; usize::try_from(size - header).ok()?];
            file.read_exact(&mut index).ok()?;
            return Some((index, at + header));
        }
        at = at.checked_add(size.max(8))?;
    }
    None
}

/// Returns a line for each thing in the MP4 or QuickTime file `path` that GStreamer does not read:
/// chapters and a timecode.
pub(super) fn hidden(path: &Path) -> Vec<&'static str> {
    let index = read_index(path).map_or_else(Vec::new, |(index, _)| index);
    let tracks = || boxes(&index).filter(|(name, _)| name == b"trak");
    let has_list = find(&index, b"udta").is_some_and(|data| find(data, b"chpl").is_some());
    let refers =
        |track| find(track, b"tref").is_some_and(|references| find(references, b"chap").is_some());
    let is_timecode = |track| {
        let handler = find(track, b"mdia").and_then(|media| find(media, b"hdlr"));
        handler.and_then(|handler| handler.get(8..12)) == Some(b"tmcd")
    };
    let mut found = Vec::new();
    if has_list || tracks().any(|(_, track)| refers(track)) {
        found.push(CHAPTERS);
    }
    if tracks().any(|(_, track)| is_timecode(track)) {
        found.push("its timecode track is left out");
    }
    found
}

/// Reads an edit list of one part. The part may start later than the film.
fn part(elst: &[u8], track: u32, film: u32, ticks: u32) -> Option<Edit> {
    let wide = is_wide(elst)?;
    let count = u32::from_be_bytes(elst.get(4..8)?.try_into().ok()?);
    let mut entries = elst.get(8..)?.chunks_exact(if wide { 20 } else { 12 });
    let mut read = || {
        let entry = entries.next()?;
        Some(if wide {
            let length = u64::from_be_bytes(entry[..8].try_into().ok()?);
            (length, i64::from_be_bytes(entry[8..16].try_into().ok()?))
        } else {
            let length = u32::from_be_bytes(entry[..4].try_into().ok()?);
            let start = i32::from_be_bytes(entry[4..8].try_into().ok()?);
            (length.into(), start.into())
        })
    };
    let time = |value: u64, ticks: u32| {
        (ticks > 0).then(|| Duration::from_secs_f64(value as f64 / f64::from(ticks)))
    };
    let (mut length, mut start) = read()?;
    let mut at = Duration::ZERO;
    if count == 2 && start == -1 {
        at = time(length, film)?;
        (length, start) = read()?;
    } else if count != 1 {
        return None;
    }
    Some(Edit {
        track,
        start: time(u64::try_from(start).ok()?, ticks)?,
        length: time(length, film)?,
        at,
    })
}

/// Returns the boxes in `data` with their content, up to the first incomplete one.
pub(super) fn boxes(data: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    let mut rest = data;
    std::iter::from_fn(move || {
        let size = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let name = rest.get(4..8)?.try_into().ok()?;
        let content = rest.get(8..size.max(8))?;
        rest = &rest[size.max(8)..];
        Some((name, content))
    })
}

pub(super) fn find<'a>(data: &'a [u8], name: &[u8; 4]) -> Option<&'a [u8]> {
    let found = boxes(data).find(|(found, _)| found == name)?;
    Some(found.1)
}

/// Reads a number of a box whose offset depends on the box's version, 0 or 1.
pub(super) fn number(content: &[u8], narrow: usize, wide: usize) -> Option<u32> {
    let at = if is_wide(content)? { wide } else { narrow };
    Some(u32::from_be_bytes(
        content.get(at..at + 4)?.try_into().ok()?,
    ))
}

/// Returns the bytes of a duration: 4 in version 0 of a box, 8 in version 1.
pub(super) fn duration_field(content: &[u8], narrow: usize, wide: usize) -> Option<&[u8]> {
    if is_wide(content)? {
        content.get(wide..wide + 8)
    } else {
        content.get(narrow..narrow + 4)
    }
}

pub(super) fn is_wide(content: &[u8]) -> Option<bool> {
    content.first().map(|version| *version == 1)
}
