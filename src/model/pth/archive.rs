//! The zip archive around a PyTorch checkpoint.
//!
//! PyTorch writes a narrow kind of zip: entries stored without compression, one after the other, no comment. Only that
//! kind is read, so that nothing in the file can make the reader take more memory than the file is long.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use super::super::container::shown;

/// The largest file: beyond it zip needs other records than those that are read here.
const MAX_FILE: u64 = u32::MAX as u64;

const END: [u8; 4] = *b"PK\x05\x06";
const DIRECTORY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
const END_LEN: u64 = 22;
const DIRECTORY_LEN: usize = 46;
const LOCAL_LEN: u64 = 30;

/// Where an entry's bytes lie in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    start: u64,
    pub len: u64,
    crc: u32,
}

/// An open archive: its directory is checked, every entry lies inside the file and none overlaps another.
#[derive(Debug)]
pub(super) struct Archive {
    file: File,
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    pub fn open(path: &Path) -> Result<Self, String> {
        let io = |e: std::io::Error| e.to_string();
        // Asked before it is opened: a pipe would wait for a writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err("not a regular file".into());
        }
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        if len > MAX_FILE {
            return Err(format!(
                "{len} bytes, more than a checkpoint's weights need: save the state dict alone"
            ));
        }
        let entries = directory(&mut file, len)?;
        let entries = locate(&mut file, entries)?;
        Ok(Self { file, entries })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn entry(&self, name: &str) -> Option<Entry> {
        self.entries.get(name).copied()
    }

    /// `len` bytes of the entry from byte `at` of it.
    pub fn read(&mut self, entry: Entry, at: u64, len: u64) -> Result<Vec<u8>, String> {
        let end = at.checked_add(len).filter(|&end| end <= entry.len);
        end.ok_or("a read past the end of an entry")?;
        bytes_at(&mut self.file, entry.start + at, len)
    }

    /// Whether the entry's bytes are those that were written.
    pub fn verify(&mut self, entry: Entry) -> Result<(), String> {
        let io = |e: std::io::Error| e.to_string();
        // Writers that were told to leave the sum out write 0.
        if entry.crc == 0 {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(entry.start)).map_err(io)?;
        let mut rest = (&mut self.file).take(entry.len);
        let mut buffer = vec![0; 1 << 16];
        let mut crc = !0;
        loop {
            match rest.read(&mut buffer).map_err(io)? {
                0 => break,
                n => crc = crc32(crc, &buffer[..n]),
            }
        }
        if rest.limit() > 0 {
            return Err("the file has become shorter".into());
        }
        if !crc != entry.crc {
            return Err("damaged: a checksum is wrong; download the file again".into());
        }
        Ok(())
    }
}

/// An entry as the directory has it: name, offset of its local header, length, checksum.
type Listed = (String, u64, u64, u32);

/// Reads the directory at the end of the file.
fn directory(file: &mut File, len: u64) -> Result<Vec<Listed>, String> {
    let cut = "a truncated zip archive: download the file again";
    if len < END_LEN {
        return Err("too short to be a PyTorch checkpoint".into());
    }
    let head = bytes_at(file, 0, 9)?;
    if !head.starts_with(&LOCAL) {
        return Err(foreign(&head));
    }
    let end = bytes_at(file, len - END_LEN, END_LEN)?;
    if !end.starts_with(&END) {
        return Err(cut.into());
    }
    let (count, size, start) = (u16_at(&end, 10)?, u32_at(&end, 12)?, u32_at(&end, 16)?);
    let (size, start) = (u64::from(size), u64::from(start));
    if start + size > len - END_LEN || usize::from(count) * DIRECTORY_LEN > size as usize {
        return Err("a zip archive whose directory does not lie inside it".into());
    }
    let bytes = bytes_at(file, start, size)?;
    let mut rest = &bytes[..];
    let mut listed = Vec::new();
    for _ in 0..count {
        let (entry, used) = listing(rest, start)?;
        listed.push(entry);
        rest = rest.get(used..).ok_or(cut)?;
    }
    Ok(listed)
}

/// The first entry in `bytes` of a directory that begins at `limit` in the file, and the bytes that it takes.
fn listing(bytes: &[u8], limit: u64) -> Result<(Listed, usize), String> {
    if !bytes.starts_with(&DIRECTORY) {
        return Err("a zip archive with a damaged directory".into());
    }
    let lengths = [28, 30, 32].map(|at| u16_at(bytes, at).map(usize::from));
    let [name, extra, comment] = lengths;
    let (name, used) = (name?, DIRECTORY_LEN + extra? + comment?);
    let raw = bytes.get(DIRECTORY_LEN..DIRECTORY_LEN + name);
    let text = raw.and_then(|n| std::str::from_utf8(n).ok());
    let text = text.ok_or("a zip archive with a name that is no text")?;
    let (flags, method) = (u16_at(bytes, 8)?, u16_at(bytes, 10)?);
    let (packed, len) = (u32_at(bytes, 20)?, u32_at(bytes, 24)?);
    if method != 0 || flags & 1 != 0 || packed != len {
        return Err(format!(
            "its entry '{}' is compressed or encrypted, which PyTorch never does",
            shown(text)
        ));
    }
    let offset = u64::from(u32_at(bytes, 42)?);
    if offset + LOCAL_LEN + u64::from(len) > limit {
        return Err(format!("its entry '{}' is not in the file", shown(text)));
    }
    let entry = (text.to_string(), offset, len.into(), u32_at(bytes, 16)?);
    Ok((entry, used + name))
}

/// Where the bytes of the entries begin, which only their local headers tell.
fn locate(file: &mut File, mut listed: Vec<Listed>) -> Result<BTreeMap<String, Entry>, String> {
    listed.sort_by_key(|&(_, offset, ..)| offset);
    let (mut entries, mut free) = (BTreeMap::new(), 0);
    for (name, offset, len, crc) in listed {
        let local = bytes_at(file, offset, LOCAL_LEN)?;
        let lengths = u64::from(u16_at(&local, 26)?) + u64::from(u16_at(&local, 28)?);
        let start = offset + LOCAL_LEN + lengths;
        if !local.starts_with(&LOCAL) || offset < free {
            let text = shown(&name);
            return Err(format!("its entry '{text}' overlaps another or is damaged"));
        }
        free = start + len;
        let entry = Entry { start, len, crc };
        if let Some(twice) = entries.insert(name.clone(), entry).map(|_| shown(&name)) {
            return Err(format!("its entry '{twice}' is there twice"));
        }
    }
    Ok(entries)
}

/// What a file is that does not begin as a zip archive does, and what to do about it.
fn foreign(head: &[u8]) -> String {
    match head {
        [0x80, _, ..] | [b'}' | b'(' | b']', ..] => {
            "a pickle in PyTorch's old format, which is not read; convert it once with a recent PyTorch: \
             python -c \"import torch; torch.save(torch.load('old.pth', map_location='cpu'), 'new.pth')\""
                .into()
        }
        [.., b'{'] => "a safetensors file, not a PyTorch checkpoint".into(),
        _ => "not a PyTorch checkpoint (no zip archive)".into(),
    }
}

/// `len` bytes at `start`; the caller knows that the file has them.
fn bytes_at(file: &mut File, start: u64, len: u64) -> Result<Vec<u8>, String> {
    let io = |e: std::io::Error| e.to_string();
    file.seek(SeekFrom::Start(start)).map_err(io)?;
    let mut bytes = Vec::new();
    let wanted = usize::try_from(len).map_err(|_| "too large for this machine")?;
    bytes
        .try_reserve_exact(wanted)
        .map_err(|_| format!("not enough memory for {len} bytes"))?;
    file.take(len).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() < wanted {
        return Err("the file is cut short: download it again".into());
    }
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, String> {
    let field = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    field
        .map(u16::from_le_bytes)
        .ok_or_else(|| "a zip archive with a damaged header".into())
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    Ok(u32::from(u16_at(bytes, at)?) | u32::from(u16_at(bytes, at + 2)?) << 16)
}

/// The checksum of zip (CRC-32, reflected polynomial 0xEDB88320), carried on from `crc`; both ends are inverted.
fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut c, mut bit) = (i as u32, 0);
            while bit < 8 {
                c = (c >> 1) ^ (0xedb8_8320 * (c & 1));
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    let step = |c: u32, &b: &u8| (c >> 8) ^ TABLE[usize::from(c as u8 ^ b)];
    bytes.iter().fold(crc, step)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_that_of_zip() {
        assert_eq!(!super::crc32(!0, b"123456789"), 0xcbf4_3926);
        let parts = super::crc32(super::crc32(!0, b"1234"), b"56789");
        assert_eq!(!parts, 0xcbf4_3926);
    }
}
