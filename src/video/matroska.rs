//! Completion of Matroska files that GStreamer has written: it quotes tags of several words, and
//! writes neither attachments nor what tracks are marked as.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
};

use gst::{ClockTime, prelude::*};

/// Identifiers of elements, with their length markers (RFC 9559 section 5).
const EBML: u32 = 0x1A45_DFA3;
const SEGMENT: u32 = 0x1853_8067;
const SEEK_HEAD: u32 = 0x114D_9B74;
const SEEK: u32 = 0x4DBB;
const SEEK_ID: u32 = 0x53AB;
const SEEK_POSITION: u32 = 0x53AC;
const VOID: u32 = 0xEC;
const DOC_TYPE_VERSION: u32 = 0x4287;
const TRACKS: u32 = 0x1654_AE6B;
const TRACK_ENTRY: u32 = 0xAE;
const TRACK_NUMBER: u32 = 0xD7;
const TRACK_TYPE: u32 = 0x83;
const AUDIO: &[u8] = &[2];
const SUBTITLES: &[u8] = &[17];
const FLAG_DEFAULT: u32 = 0x88;
/// Flags of a track: played by default, forced, for the hearing impaired, for the visually
/// impaired, with descriptions, in the original language, commentary.
const MARKS: [u32; 7] = [FLAG_DEFAULT, 0x55AA, 0x55AB, 0x55AC, 0x55AD, 0x55AE, 0x55AF];
const VIDEO_SETTINGS: u32 = 0xE0;
const AUDIO_SETTINGS: u32 = 0xE1;
const CODEC_DELAY: u32 = 0x56AA;
const CLUSTER: u32 = 0x1F43_B675;
const TAGS: u32 = 0x1254_C367;
const TAG: u32 = 0x7373;
const SIMPLE_TAG: u32 = 0x67C8;
const TAG_STRING: u32 = 0x4487;
const ATTACHMENTS: u32 = 0x1941_A469;
const ATTACHED_FILE: u32 = 0x61A7;
const FILE_DESCRIPTION: u32 = 0x467E;
const FILE_NAME: u32 = 0x466E;
const FILE_TYPE: u32 = 0x4660;
const FILE_DATA: u32 = 0x465C;
const FILE_UID: u32 = 0x46AE;
/// Maximum size of tags in bytes.
const MAX_TAGS: u64 = 64 << 20;

/// A file inside of a Matroska file, such as a font.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    pub name: String,
    pub media_type: String,
    pub description: Option<String>,
    pub data: Vec<u8>,
}

impl Attachment {
    /// Reads an attachment or a cover out of a tag. A file without a name becomes the cover.
    pub fn of(sample: &gst::Sample) -> Option<Self> {
        let data = sample.buffer()?.map_readable().ok()?.to_vec();
        let caps = sample.caps().and_then(|caps| caps.structure(0));
        let text = |field| sample.info()?.get::<String>(field).ok();
        let found = caps.map_or("application/octet-stream", |s| s.name().as_str());
        let media_type = text("mimetype").unwrap_or_else(|| found.into());
        let name = text("filename").unwrap_or_else(|| {
            let extension = if media_type == "image/png" {
                "png"
            } else {
                "jpg"
            };
            format!("cover.{extension}")
        });
        Some(Self {
            name,
            media_type,
            description: text("description"),
            data,
        })
    }

    fn element(&self, uid: u64) -> Vec<u8> {
        let mut content = Vec::new();
        if let Some(description) = &self.description {
            content.extend(element(FILE_DESCRIPTION, description.as_bytes()));
        }
        content.extend(element(FILE_NAME, self.name.as_bytes()));
        content.extend(element(FILE_TYPE, self.media_type.as_bytes()));
        content.extend(element(FILE_DATA, &self.data));
        content.extend(element(FILE_UID, &uid.to_be_bytes()));
        element(ATTACHED_FILE, &content)
    }
}

/// Properties of the tracks that the muxer does not write, in the order of the tracks.
#[derive(Debug, Default)]
pub(super) struct Tracks {
    /// Delay of each audio stream by its encoder.
    pub delays: Vec<Option<ClockTime>>,
    /// [`marks`] of each audio stream.
    pub audio: Vec<Vec<u8>>,
    /// [`marks`] of each stream of subtitles.
    pub subtitles: Vec<Vec<u8>>,
}

impl Tracks {
    fn is_written(&self) -> bool {
        let mut marks = self.audio.iter().chain(&self.subtitles);
        let mut delays = self.delays.iter().flatten();
        marks.all(Vec::is_empty) && delays.all(|delay| delay.is_zero())
    }
}

/// Returns for each track of the file `path` its number and the elements that mark it, if it is a
/// Matroska file.
pub(super) fn marks(path: &Path) -> Vec<(u32, Vec<u8>)> {
    let content = || -> io::Result<Option<Vec<u8>>> {
        let mut file = File::open(path)?;
        let Some(first) = header(&mut file, 0)?.filter(|e| e.id == EBML) else {
            return Ok(None);
        };
        let segment = header(&mut file, first.end())?;
        let Some(segment) = segment.filter(|e| e.id == SEGMENT) else {
            return Ok(None);
        };
        let tracks = find_tracks(&mut file, &segment)?;
        let tracks = tracks.filter(|tracks| tracks.size < MAX_TAGS);
        tracks.map(|tracks| read(&mut file, &tracks)).transpose()
    };
    let content = content().ok().flatten().unwrap_or_default();
    let entries = elements(&content).filter(|(id, _)| *id == TRACK_ENTRY);
    let marks = entries.filter_map(|(_, entry)| {
        let number = elements(entry).find(|(id, _)| *id == TRACK_NUMBER)?.1;
        let marks = elements(entry).filter(|(id, value)| {
            let is_set = value.iter().any(|byte| *byte != 0);
            // By default a track is played by default, and is nothing else.
            MARKS.contains(id) && is_set != (*id == FLAG_DEFAULT)
        });
        let marks = marks.flat_map(|(id, value)| element(id, value)).collect();
        Some((u32::try_from(integer(number)).ok()?, marks))
    });
    marks.collect()
}

/// Removes the quotes from the tags of the file `path`, and appends `attachments`. Completes the
/// descriptions of its `tracks`.
///
/// # Errors
/// If the file cannot be written, or is built in another way than by GStreamer.
pub(super) fn complete(path: &Path, attachments: &[Attachment], tracks: &Tracks) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let end = file.metadata()?.len();
    let other = || io::Error::other("the file is built in an unknown way");
    let first = header(&mut file, 0)?
        .filter(|e| e.id == EBML)
        .ok_or_else(other)?;
    let segment = header(&mut file, first.end())?;
    let segment = segment.filter(|e| e.id == SEGMENT).ok_or_else(other)?;
    let is_whole = segment.end() == end && segment.head == 12;
    let index = header(&mut file, segment.content())?;
    let index = index.filter(|e| is_whole && e.id == SEEK_HEAD);
    let index = index.ok_or_else(other)?;
    if !tracks.is_written() {
        describe(&mut file, &first, &segment, tracks)?.ok_or_else(other)?;
    }
    let mut entries = seek_entries(&read(&mut file, &index)?);
    let tags = entries
        .iter()
        .find(|(id, _)| *id == TAGS)
        .map(|(_, at)| *at);
    let mut tail = Vec::new();
    let mut start = end;
    if let Some(at) = tags {
        let tags = header(&mut file, segment.content() + at)?;
        let tags = tags.filter(|e| e.id == TAGS && e.end() == end && e.size < MAX_TAGS);
        let tags = tags.ok_or_else(other)?;
        start = tags.at;
        tail = element(TAGS, &unquoted(&read(&mut file, &tags)?));
    }
    if !attachments.is_empty() {
        entries.push((ATTACHMENTS, start + tail.len() as u64 - segment.content()));
        let files = attachments.iter().zip(1..);
        let content: Vec<u8> = files.flat_map(|(file, uid)| file.element(uid)).collect();
        tail.extend(element(ATTACHMENTS, &content));
    }
    let index_content = seek_head(&entries, index.size).ok_or_else(other)?;
    // Until the sizes are written, the old end is valid.
    file.seek(SeekFrom::Start(start))?;
    file.write_all(&tail)?;
    let end = start + tail.len() as u64;
    file.set_len(end)?;
    file.seek(SeekFrom::Start(index.content()))?;
    file.write_all(&index_content)?;
    file.seek(SeekFrom::Start(segment.at + 4))?;
    file.write_all(&long_size(end - segment.content()))?;
    file.sync_data()
}

/// Returns the place of the descriptions of the tracks.
fn find_tracks(file: &mut File, segment: &Place) -> io::Result<Option<Place>> {
    let mut at = segment.content();
    loop {
        match header(file, at)? {
            Some(place) if place.id == TRACKS => return Ok(Some(place)),
            Some(place) if place.id != CLUSTER => at = place.end(),
            _ => return Ok(None),
        }
    }
}

/// Completes the descriptions of the `tracks`, which have free space in their sizes. Returns `None`
/// if they have not.
fn describe(
    file: &mut File,
    first: &Place,
    segment: &Place,
    tracks: &Tracks,
) -> io::Result<Option<()>> {
    let Some(place) = find_tracks(file, segment)? else {
        return Ok(None);
    };
    let content = read(file, &place)?;
    let entries = described(&content, tracks);
    // A single byte cannot be filled.
    let mut sizes = [2, 3].into_iter().filter_map(|width| {
        let entries = entries
            .iter()
            .flat_map(|(id, entry)| sized_element(*id, entry, width));
        filled(entries.collect(), place.size)
    });
    let Some(written) = sizes.next() else {
        return Ok(None);
    };
    file.seek(SeekFrom::Start(place.content()))?;
    file.write_all(&written)?;
    // The delay belongs to version 4 of the format.
    let head = read(file, first)?;
    let version = elements(&head).find(|(id, _)| *id == DOC_TYPE_VERSION);
    if let Some((_, version)) = version
        && let [0..4] = version
    {
        let place = version.as_ptr() as usize - head.as_ptr() as usize;
        file.seek(SeekFrom::Start(first.content() + place as u64))?;
        file.write_all(&[4])?;
    }
    Ok(Some(()))
}

/// Returns the elements of `content` in less space, with what is to be written of the `tracks`.
fn described(content: &[u8], tracks: &Tracks) -> Vec<(u32, Vec<u8>)> {
    let (mut delays, mut audio) = (tracks.delays.iter(), tracks.audio.iter());
    let mut subtitles = tracks.subtitles.iter();
    let short = |(id, entry): (u32, &[u8])| {
        if id != TRACK_ENTRY {
            return (id, entry.to_vec());
        }
        let is = |kind| elements(entry).any(|part| part == (TRACK_TYPE, kind));
        let has = |id| elements(entry).any(|(found, _)| found == id);
        let (mut delay, mut marks) = (None, None);
        if is(AUDIO) {
            (delay, marks) = (delays.next(), audio.next());
        } else if is(SUBTITLES) {
            marks = subtitles.next();
        }
        // Of the elements in a track only those of two identifiers are long in GStreamer's files.
        let parts = elements(entry).filter(|(id, _)| marks.is_none() || !MARKS.contains(id));
        let parts = parts.map(|(id, part)| match id {
            VIDEO_SETTINGS | AUDIO_SETTINGS => sized_element(id, part, 2),
            _ => element(id, part),
        });
        let mut short: Vec<u8> = parts.flatten().collect();
        short.extend(marks.into_iter().flatten());
        if let Some(Some(delay)) = delay
            && !has(CODEC_DELAY)
        {
            let bytes = delay.nseconds().to_be_bytes();
            let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(7);
            short.extend(element(CODEC_DELAY, &bytes[first..]));
        }
        (id, short)
    };
    elements(content).map(short).collect()
}

/// Place of an element in a file.
struct Place {
    id: u32,
    at: u64,
    /// Length of identifier and size.
    head: u64,
    size: u64,
}

impl Place {
    fn content(&self) -> u64 {
        self.at + self.head
    }

    fn end(&self) -> u64 {
        self.content().saturating_add(self.size)
    }
}

fn header(file: &mut File, at: u64) -> io::Result<Option<Place>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(at))?;
    file.take(12).read_to_end(&mut bytes)?;
    Ok(parse_header(&bytes).map(|(id, head, size)| Place {
        id,
        at,
        head: head as u64,
        size,
    }))
}

fn read(file: &mut File, place: &Place) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(place.content()))?;
    file.take(place.size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns identifier, length of the header, and size of the element at the start of `bytes`.
fn parse_header(bytes: &[u8]) -> Option<(u32, usize, u64)> {
    let length = |byte: &u8| byte.leading_zeros() as usize + 1;
    let id = bytes.get(..length(bytes.first()?))?;
    let rest = &bytes[id.len()..];
    let size = rest.get(..length(rest.first()?))?;
    let mask = u64::MAX >> (64 - 7 * size.len().min(8));
    let id_number = u32::try_from(integer(id)).ok()?;
    Some((id_number, id.len() + size.len(), integer(size) & mask))
}

fn integer(bytes: &[u8]) -> u64 {
    let join = |sum, byte: &u8| sum << 8 | u64::from(*byte);
    bytes.iter().fold(0, join)
}

/// Returns the elements in `data` with their content, up to the first incomplete one.
fn elements(data: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    let mut rest = data;
    std::iter::from_fn(move || {
        let (id, head, size) = parse_header(rest)?;
        let size = usize::try_from(size).ok()?;
        let content = rest.get(head..)?.get(..size)?;
        rest = &rest[head + size..];
        Some((id, content))
    })
}

fn element(id: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = id_bytes(id);
    if content.len() < 127 {
        bytes.push(0x80 | content.len() as u8);
    } else {
        bytes.extend(long_size(content.len() as u64));
    }
    bytes.extend(content);
    bytes
}

/// Returns an element whose size takes `width` bytes, at least 2, or 8 if that is not enough.
fn sized_element(id: u32, content: &[u8], width: usize) -> Vec<u8> {
    let size = content.len() as u64;
    let bytes = (size | 1 << (7 * width)).to_be_bytes();
    if size >= (1 << (7 * width)) - 1 {
        return [&id_bytes(id)[..], &long_size(size), content].concat();
    }
    [&id_bytes(id)[..], &bytes[8 - width..], content].concat()
}

/// Appends an empty element, so that there are `size` bytes.
fn filled(mut content: Vec<u8>, size: u64) -> Option<Vec<u8>> {
    let free = usize::try_from(size).ok()?.checked_sub(content.len())?;
    match free {
        0 => {}
        1 => return None,
        2..128 => content.extend(element(VOID, &vec![0; free - 2])),
        _ => content.extend(element(VOID, &vec![0; free - 9])),
    }
    Some(content)
}

fn id_bytes(id: u32) -> Vec<u8> {
    let bytes = id.to_be_bytes();
    bytes[id.leading_zeros() as usize / 8..].to_vec()
}

/// Returns a size in 8 bytes.
fn long_size(size: u64) -> [u8; 8] {
    (size | 1 << 56).to_be_bytes()
}

/// Returns identifiers and positions in the content of a seek head.
fn seek_entries(index: &[u8]) -> Vec<(u32, u64)> {
    let entries = elements(index).filter(|(id, _)| *id == SEEK);
    let entries = entries.filter_map(|(_, entry)| {
        let field = |id| elements(entry).find(|(found, _)| *found == id);
        let id = u32::try_from(integer(field(SEEK_ID)?.1)).ok()?;
        Some((id, integer(field(SEEK_POSITION)?.1)))
    });
    // Clusters have no fixed place in the index.
    entries.filter(|(id, _)| *id != CLUSTER).collect()
}

/// Returns the content of a seek head in exactly `size` bytes.
fn seek_head(entries: &[(u32, u64)], size: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    for (id, position) in entries {
        let mut entry = element(SEEK_ID, &id_bytes(*id));
        entry.extend(element(SEEK_POSITION, &position.to_be_bytes()));
        content.extend(element(SEEK, &entry));
    }
    filled(content, size)
}

/// Returns the content of tags with the texts that GStreamer was given.
fn unquoted(tags: &[u8]) -> Vec<u8> {
    let parts = elements(tags).map(|(id, content)| match id {
        TAG | SIMPLE_TAG => element(id, &unquoted(content)),
        TAG_STRING => element(id, &unquoted_text(content)),
        _ => element(id, content),
    });
    parts.flatten().collect()
}

/// Returns the text whose serialization by GStreamer is `text`, or `text` if there is none.
fn unquoted_text(text: &[u8]) -> Vec<u8> {
    let trimmed = text.strip_suffix(b"\0").unwrap_or(text);
    let original = || {
        let text = std::str::from_utf8(trimmed).ok()?;
        let quoted = text.starts_with('"').then_some(text)?;
        let value = gst::glib::Value::deserialize(quoted, String::static_type()).ok()?;
        let is_same = value.serialize().is_ok_and(|again| again == quoted);
        value.get::<String>().ok().filter(|_| is_same)
    };
    original().map_or_else(|| text.to_vec(), String::into_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_texts_that_gstreamer_has_quoted_change() {
        gst::init().unwrap();
        let serialized = "My \"Film\" äö\\".to_value().serialize().unwrap();
        for (text, expected) in [
            (serialized.as_str(), "My \"Film\" äö\\"),
            ("\"My\\ Film\"\0", "My Film"),
            ("Film", "Film"),
            ("\"as it is\"", "\"as it is\""),
            ("\"", "\""),
        ] {
            let result = unquoted_text(text.as_bytes());
            assert_eq!(String::from_utf8(result).unwrap(), expected);
        }
        let string = element(TAG_STRING, b"\"a\\ b\"");
        let simple = element(SIMPLE_TAG, &string);
        let tag = element(TAG, &simple);
        let expected = element(TAG, &element(SIMPLE_TAG, &element(TAG_STRING, b"a b")));
        assert_eq!(unquoted(&tag), expected);
    }

    #[test]
    fn elements_and_the_index_are_read_as_they_are_written() {
        for size in [0, 126, 127, 70_000] {
            let content = vec![7; size];
            let bytes = element(SEGMENT, &content);
            assert_eq!(
                elements(&bytes).collect::<Vec<_>>(),
                [(SEGMENT, &content[..])]
            );
        }
        for (size, width, head) in [(5, 2, 3), (16_382, 2, 3), (16_383, 2, 9), (16_383, 3, 4)] {
            let content = vec![7; size];
            let bytes = sized_element(TRACK_ENTRY, &content, width);
            assert_eq!(bytes.len(), head + size);
            assert_eq!(
                elements(&bytes).collect::<Vec<_>>(),
                [(TRACK_ENTRY, &content[..])]
            );
        }
        let entries = [(TAGS, 5), (ATTACHMENTS, 1 << 40)];
        for size in [42, 44, 140, 300] {
            let content = seek_head(&entries, size).unwrap();
            assert_eq!(content.len() as u64, size);
            assert_eq!(seek_entries(&content), entries);
        }
        assert_eq!(seek_head(&entries, 41), None);
        assert_eq!(seek_head(&entries, 43), None);
    }
}
