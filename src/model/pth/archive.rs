//! The zip archive of a PyTorch checkpoint, read by the crate `zip`.
//!
//! PyTorch stores entries without compression. Only such archives are read, so that no entry takes
//! more memory than its bytes in the file. Entries lie inside the file and do not overlap.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use zip::{
    CompressionMethod, ZipArchive,
    read::{ArchiveOffset, Config},
    result::ZipError,
};

use super::super::container::shown;

/// Largest file in bytes, several times that of the largest published checkpoint.
const MAX_FILE: u64 = u32::MAX as u64;
/// Bytes of the directory and of the search for it. They bound the memory that the directory takes.
const MAX_DIRECTORY: u64 = 4 << 20;
/// Bytes of the smallest archive, an empty one.
const MIN_FILE: u64 = 22;
/// Bytes of the local header of an entry without a name.
const LOCAL_HEADER: u64 = 30;

/// Bytes of an entry in the file, with their checksum.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    start: u64,
    pub len: u64,
    crc: u32,
}

/// An open archive whose directory is checked.
#[derive(Debug)]
pub(super) struct Archive {
    file: File,
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    pub fn open(path: &Path) -> Result<Self, String> {
        // Opening a pipe would wait for a writer.
        if !std::fs::metadata(path).map_err(text)?.is_file() {
            return Err("not a regular file".into());
        }
        let mut file = File::open(path).map_err(text)?;
        let len = file.metadata().map_err(text)?.len();
        if len > MAX_FILE {
            return Err(format!(
                "{len} bytes, more than a checkpoint's weights need: save the state dict alone"
            ));
        }
        if len < MIN_FILE {
            return Err("too short to be a PyTorch checkpoint".into());
        }
        let head = bytes_at(&mut file, 0, 9)?;
        if !head.starts_with(b"PK\x03\x04") {
            return Err(foreign(&head));
        }
        let limited = Limited {
            file,
            left: MAX_DIRECTORY,
        };
        let config = Config {
            archive_offset: ArchiveOffset::Known(0),
        };
        let mut zip = ZipArchive::with_config(config, limited).map_err(damaged)?;
        let entries = entries(&mut zip)?;
        let file = zip.into_inner().file;
        Ok(Self { file, entries })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn entry(&self, name: &str) -> Option<Entry> {
        self.entries.get(name).copied()
    }

    /// Reads `len` bytes of the entry from its byte `at` on.
    pub fn read(&mut self, entry: Entry, at: u64, len: u64) -> Result<Vec<u8>, String> {
        let end = at.checked_add(len).filter(|&end| end <= entry.len);
        end.ok_or("a read past the end of an entry")?;
        bytes_at(&mut self.file, entry.start + at, len)
    }

    /// Compares the entry's bytes with its checksum.
    pub fn verify(&mut self, entry: Entry) -> Result<(), String> {
        // PyTorch writes 0 if it is set to save without checksums.
        if entry.crc == 0 {
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(entry.start)).map_err(text)?;
        let mut rest = (&mut self.file).take(entry.len);
        let mut buffer = vec![0; 1 << 16];
        let mut crc = crc32fast::Hasher::new();
        loop {
            match rest.read(&mut buffer).map_err(text)? {
                0 => break,
                n => crc.update(&buffer[..n]),
            }
        }
        if rest.limit() > 0 {
            return Err("the file has become shorter".into());
        }
        if crc.finalize() != entry.crc {
            return Err("damaged: a checksum is wrong; download the file again".into());
        }
        Ok(())
    }
}

/// A file of which a limited number of bytes may be read.
struct Limited {
    file: File,
    left: u64,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let left = self.left.checked_sub(read as u64);
        self.left = left.ok_or_else(|| io::Error::other("the directory is too large"))?;
        Ok(read)
    }
}

impl Seek for Limited {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Checks the archive's entries and finds their bytes.
fn entries(zip: &mut ZipArchive<Limited>) -> Result<BTreeMap<String, Entry>, String> {
    if zip.has_duplicate_names() {
        return Err("a zip archive with an entry that is there twice".into());
    }
    let directory = zip.central_directory_start();
    let mut entries = BTreeMap::new();
    for i in 0..zip.len() {
        let entry = zip.by_index_data(i).map_err(damaged)?;
        let name = std::str::from_utf8(entry.name_raw());
        let name = name.map_err(|_| "a zip archive with a name that is not text")?;
        let name = name.to_string();
        let (len, crc) = (entry.size(), entry.crc32());
        let stored = entry.compression() == CompressionMethod::Stored;
        if !stored || entry.encrypted() || entry.compressed_size() != len {
            return Err(format!(
                "its entry '{}' is compressed or encrypted, which PyTorch never does",
                shown(&name)
            ));
        }
        let end = entry
            .header_start()
            .saturating_add(LOCAL_HEADER)
            .saturating_add(len);
        if end > directory {
            return Err(format!("its entry '{}' is not in the file", shown(&name)));
        }
        let start = zip.by_index_raw(i).map_err(damaged)?.data_start();
        let start = start.ok_or("a zip archive with an entry without data")?;
        entries.insert(name, Entry { start, len, crc });
    }
    if zip.has_overlapping_entries().map_err(damaged)? {
        return Err("a zip archive whose entries overlap".into());
    }
    Ok(entries)
}

fn text(e: io::Error) -> String {
    e.to_string()
}

fn damaged(e: ZipError) -> String {
    format!("a truncated or damaged zip archive ({e}): download the file again")
}

/// Names a file that is not a zip archive by its first bytes, with the remedy.
fn foreign(head: &[u8]) -> String {
    match head {
        [0x80, _, ..] | [b'}' | b'(' | b']', ..] => {
            "a pickle in PyTorch's old format, which is not read; convert it once with a recent \
             PyTorch: python -c \"import torch; \
             torch.save(torch.load('old.pth', map_location='cpu'), 'new.pth')\""
                .into()
        }
        [.., b'{'] => "a safetensors file, not a PyTorch checkpoint".into(),
        _ => "not a PyTorch checkpoint (no zip archive)".into(),
    }
}

/// Reads `len` bytes at `start`.
fn bytes_at(file: &mut File, start: u64, len: u64) -> Result<Vec<u8>, String> {
    file.seek(SeekFrom::Start(start)).map_err(text)?;
    let mut bytes = Vec::new();
    let wanted = usize::try_from(len).map_err(|_| "too large for this machine")?;
    bytes
        .try_reserve_exact(wanted)
        .map_err(|_| format!("not enough memory for {len} bytes"))?;
    file.take(len).read_to_end(&mut bytes).map_err(text)?;
    if bytes.len() < wanted {
        return Err("the file is cut short: download it again".into());
    }
    Ok(bytes)
}
