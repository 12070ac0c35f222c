//! Completion of MP4 and QuickTime files that GStreamer has written: the edit lists of its muxer
//! show the samples that an audio encoder puts before the first one.

use std::{
    fs::OpenOptions,
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
};

use gst::{ClockTime, prelude::*};

use super::edits::{boxes, duration_field, find, is_wide, number};

/// Maximum size of an index in bytes.
const MAX_INDEX: u64 = 256 << 20;

/// Delay of an audio stream by its encoder, and the length of its input.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delayed {
    pub delay: ClockTime,
    pub length: ClockTime,
}

/// Hides the delay of the audio streams of the file `path`. `delays` are those of all its audio
/// streams in order.
///
/// # Errors
/// If the file cannot be written, or is built in another way than by GStreamer.
pub(super) fn hide_delays(path: &Path, delays: &[Option<Delayed>]) -> io::Result<()> {
    if delays.iter().all(Option::is_none) {
        return Ok(());
    }
    let other = || io::Error::other("the file is built in an unknown way");
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let end = file.metadata()?.len();
    let mut at = 0;
    let (start, size) = loop {
        let mut head = [0; 16];
        file.seek(SeekFrom::Start(at))?;
        let read = file.read(&mut head)?;
        let short = |bytes: &[u8]| bytes.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
        let (size, header) = match short(&head[..4]) {
            1 => (short(&head[8..]), 16),
            size => (size, 8),
        };
        if read < 8 || size < header || at + size > end {
            return Err(other());
        }
        if &head[4..8] == b"moov" {
            break (at + header, size - header);
        }
        at += size;
    };
    if size > MAX_INDEX {
        return Err(other());
    }
    let mut index = vec![0; usize::try_from(size).map_err(|_| other())?];
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(&mut index)?;
    let patches = patches(&index, delays).ok_or_else(other)?;
    for (at, bytes) in patches {
        file.seek(SeekFrom::Start(start + at as u64))?;
        file.write_all(&bytes)?;
    }
    file.sync_data()
}

/// Returns the bytes to replace in the content of a `moov` box, with their offsets.
fn patches(index: &[u8], delays: &[Option<Delayed>]) -> Option<Vec<(usize, Vec<u8>)>> {
    let place = |part: &[u8]| part.as_ptr() as usize - index.as_ptr() as usize;
    let bytes = |value: u64, size: usize| value.to_be_bytes()[8 - size..].to_vec();
    let value = |field: &[u8]| field.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
    let film = find(index, b"mvhd")?;
    let ticks_of_film = u64::from(number(film, 12, 20)?);
    let ticks = |time: ClockTime, rate: u64| time.nseconds().mul_div_round(rate, 1_000_000_000);
    let mut patches = Vec::new();
    let mut longest = 0;
    let tracks = boxes(index).filter(|(name, _)| name == b"trak");
    let mut delays = delays.iter();
    for (_, track) in tracks {
        let head = find(track, b"tkhd")?;
        let length = duration_field(head, 20, 28)?;
        let media = find(track, b"mdia")?;
        let is_audio = find(media, b"hdlr")?.get(8..12)? == b"soun";
        let delayed = if is_audio { *delays.next()? } else { None };
        let Some(Delayed {
            delay,
            length: shown,
        }) = delayed
        else {
            longest = longest.max(value(length));
            continue;
        };
        let list = find(find(track, b"edts")?, b"elst")?;
        let size = if is_wide(list)? { 8 } else { 4 };
        let count = usize::try_from(value(list.get(4..8)?)).ok()?;
        // Only the last entry shows samples.
        let last = 8 + count.checked_sub(1)? * (2 * size + 4);
        let (shown_field, start_field) = (
            list.get(last..last + size)?,
            list.get(last + size..last + 2 * size)?,
        );
        let rate = u64::from(number(find(media, b"mdhd")?, 12, 20)?);
        let start = value(start_field) + ticks(delay, rate)?;
        let before = value(length).checked_sub(value(shown_field))?;
        let most = value(shown_field).checked_sub(ticks(delay, ticks_of_film)?)?;
        let shown = ticks(shown, ticks_of_film)?.min(most);
        patches.push((place(shown_field), bytes(shown, size)));
        patches.push((place(start_field), bytes(start, size)));
        patches.push((place(length), bytes(before + shown, length.len())));
        longest = longest.max(before + shown);
    }
    let length = duration_field(film, 16, 24)?;
    patches.push((place(length), bytes(longest, length.len())));
    Some(patches)
}
