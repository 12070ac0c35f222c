//! Files that were cut off: their outermost box or element is longer than the rest of the file.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

/// Boxes of MP4 and QuickTime that may be the last one.
const BOXES: [&[u8; 4]; 9] = [
    b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"udta", b"uuid",
];

/// Returns the number of bytes that are missing at the end of the MP4, QuickTime, Matroska or WebM
/// file `path`, as far as it states its length.
pub(super) fn missing(path: &Path) -> Option<u64> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    let mut at = |position| {
        let mut head = Vec::new();
        file.seek(SeekFrom::Start(position)).ok()?;
        file.by_ref().take(16).read_to_end(&mut head).ok()?;
        Some(head)
    };
    let end = if at(0)?.starts_with(&EBML) {
        matroska(&mut at)?
    } else {
        mp4(&mut at, length)?
    };
    end.checked_sub(length).filter(|bytes| *bytes > 0)
}

/// Returns the end of the last box, of which `at` returns the first 16 bytes.
fn mp4(at: &mut impl FnMut(u64) -> Option<Vec<u8>>, length: u64) -> Option<u64> {
    let mut end = 0_u64;
    while end < length {
        let head = at(end)?;
        let size = u32::from_be_bytes(head.get(..4)?.try_into().ok()?);
        if !BOXES.iter().any(|name| head.get(4..8) == Some(&name[..])) {
            return None;
        }
        let size = match size {
            0 => length - end,
            1 => u64::from_be_bytes(head.get(8..16)?.try_into().ok()?),
            size => size.into(),
        };
        end = end.checked_add(size.max(8))?;
    }
    Some(end)
}

/// Identifiers of the first two elements (RFC 9559 section 5).
const EBML: [u8; 4] = [0x1A, 0x45, 0xDF, 0xA3];
const SEGMENT: [u8; 4] = [0x18, 0x53, 0x80, 0x67];

/// Returns the end of the segment; `None` if it is not stated.
fn matroska(at: &mut impl FnMut(u64) -> Option<Vec<u8>>) -> Option<u64> {
    let (size, length) = size(at(0)?.get(4..)?)?;
    let segment = size.checked_add(4 + length)?;
    let head = at(segment)?;
    if !head.starts_with(&SEGMENT) {
        return None;
    }
    let (size, length) = self::size(&head[4..])?;
    segment.checked_add(4 + length)?.checked_add(size)
}

/// Reads the size of an element. Returns it and the number of its bytes; `None` if it is unknown.
fn size(bytes: &[u8]) -> Option<(u64, u64)> {
    let count = bytes.first()?.leading_zeros() as usize + 1;
    let bytes = bytes.get(..count).filter(|_| count <= 8)?;
    let value = bytes.iter().fold(0, |v, byte| v << 8 | u64::from(*byte));
    let ones = (1 << (7 * count)) - 1;
    let value = value & ones;
    (value != ones).then_some((value, count as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing_of(bytes: &[u8]) -> Option<u64> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        missing(file.path())
    }

    fn mp4_box(name: &[u8; 4], size: u32, content: usize) -> Vec<u8> {
        [&size.to_be_bytes()[..], name, &vec![0; content]].concat()
    }

    #[test]
    fn the_last_box_of_an_mp4_file_must_be_whole() {
        let file = |last: Vec<u8>| [mp4_box(b"ftyp", 16, 8), last].concat();
        assert_eq!(missing_of(&file(mp4_box(b"mdat", 100, 92))), None);
        assert_eq!(missing_of(&file(mp4_box(b"mdat", 100, 32))), Some(60));
        let mut wide = mp4_box(b"mdat", 1, 8);
        wide[15] = 50;
        assert_eq!(missing_of(&file(wide)), Some(34));
        // To the end of the file.
        assert_eq!(missing_of(&file(mp4_box(b"mdat", 0, 32))), None);
        // Not a box.
        assert_eq!(missing_of(&file(b"\xff\xff\xff\xffjunk".to_vec())), None);
        assert_eq!(missing_of(&file(vec![0, 0])), None);
        assert_eq!(missing_of(b""), None);
    }

    #[test]
    fn the_segment_of_a_matroska_file_must_be_whole() {
        let file = |size: &[u8], content: usize| {
            [&EBML[..], &[0x82, 1, 2], &SEGMENT, size, &vec![0; content]].concat()
        };
        assert_eq!(missing_of(&file(&[0x40, 200], 200)), None);
        assert_eq!(missing_of(&file(&[0x40, 200], 150)), Some(50));
        assert_eq!(
            missing_of(&file(&[0x01, 0, 0, 0, 0, 0, 0, 200], 199)),
            Some(1)
        );
        // Unknown, as in live streams.
        assert_eq!(missing_of(&file(&[0xFF], 10)), None);
        assert_eq!(missing_of(&file(&[0x00], 10)), None);
        assert_eq!(missing_of(&EBML), None);
    }
}
