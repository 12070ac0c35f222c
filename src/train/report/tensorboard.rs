//! Event files for TensorBoard: scalars and images by step.
//!
//! The only crate for the format (tensorboard-rs 0.5) is not maintained: it needs `image` 0.23 and
//! `protobuf` 2. A file is a sequence of records (`tensorflow/core/lib/io/record_writer.h`): length
//! of the data as u64, its masked CRC-32C, the data, its masked CRC-32C, all little-endian. The
//! data is an `Event` in protobuf (`tensorflow/core/util/event.proto`, `summary.proto`).

use std::{
    fs::{self, File},
    io::{self, BufWriter, Cursor, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use image::{ImageFormat, RgbImage};

use crate::{Error, Result};

/// Writer of curves and images into a folder.
pub struct EventWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventWriter {
    /// Starts a file in `folder` for a run that has done `done` steps. Curves of earlier files of
    /// the run continue. TensorBoard discards their points after `done`, because these steps are
    /// taken again.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(folder: &Path, done: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        // TensorBoard reads the files of a folder sorted by name.
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let since = since.unwrap_or_default();
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.{}.tadsr",
            since.as_secs(),
            since.subsec_nanos(),
            std::process::id()
        );
        let path = folder.join(name);
        let file = File::create_new(&path).map_err(Error::io(&path))?;
        let mut writer = Self {
            path,
            file: BufWriter::new(file),
        };
        writer.event(0, |event| event.bytes(3, b"brain.Event:2"))?;
        if done > 0 {
            // SessionLog { status: START }
            writer.event(done + 1, |event| event.message(7, |log| log.varint(1, 1)))?;
        }
        Ok(writer)
    }

    /// Writes points of curves at `step`: names, such as `loss/regression`, and values.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        self.event(step, |event| {
            event.message(5, |summary| {
                for (name, value) in values {
                    summary.message(1, |entry| {
                        entry.bytes(1, name.as_bytes());
                        entry.fixed32(2, (*value as f32).to_bits());
                    });
                }
            });
        })
    }

    /// Writes an image at `step`.
    ///
    /// # Errors
    /// [`Error::Io`], also for an image without pixels.
    pub fn picture(&mut self, step: u64, name: &str, picture: &RgbImage) -> Result<()> {
        let mut png = Cursor::new(Vec::new());
        picture
            .write_to(&mut png, ImageFormat::Png)
            .map_err(|e| Error::io(&self.path)(io::Error::other(e)))?;
        self.event(step, |event| {
            event.message(5, |summary| {
                summary.message(1, |entry| {
                    entry.bytes(1, name.as_bytes());
                    entry.message(4, |image| {
                        image.varint(1, picture.height().into());
                        image.varint(2, picture.width().into());
                        // Three channels: RGB.
                        image.varint(3, 3);
                        image.bytes(4, png.get_ref());
                    });
                });
            });
        })
    }

    /// Writes buffered data to the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))
    }

    fn event(&mut self, step: u64, fill: impl FnOnce(&mut Message)) -> Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut event = Message::default();
        event.fixed64(1, since.unwrap_or_default().as_secs_f64().to_bits());
        event.varint(2, step);
        fill(&mut event);
        let written = self.file.write_all(&record(&event.0));
        written.map_err(Error::io(&self.path))
    }
}

/// Formats a record of the file.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), RFC 3720 appendix B.4.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    let step = |crc: u32, byte: &u8| (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize];
    !data.iter().fold(!0, step)
}

/// Message in the encoding of protobuf.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u64, value: u64) {
        self.number(field << 3);
        self.number(value);
    }

    fn fixed64(&mut self, field: u64, bits: u64) {
        self.number(field << 3 | 1);
        self.0.extend(bits.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.number(field << 3 | 2);
        self.number(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }

    fn fixed32(&mut self, field: u64, bits: u32) {
        self.number(field << 3 | 5);
        self.0.extend(bits.to_le_bytes());
    }

    /// Varint: seven bits per byte, the lowest first.
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// Returns the records of a file after checking them.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut found) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (length, after) = rest.split_at(8);
            let (crc, after) = after.split_at(4);
            assert_eq!(crc, masked_crc(length).to_le_bytes());
            let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            let (data, after) = after.split_at(length);
            let (crc, after) = after.split_at(4);
            assert_eq!(crc, masked_crc(data).to_le_bytes());
            found.push(data.to_vec());
            rest = after;
        }
        found
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut all: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        all.sort();
        all
    }

    #[test]
    fn scalars_and_images_are_messages_of_the_format() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(folder.path(), 0).unwrap();
        writer.scalars(300, &[("loss/a".into(), 0.5)]).unwrap();
        let picture = RgbImage::from_pixel(2, 1, image::Rgb([1, 2, 3]));
        writer.picture(7, "sample", &picture).unwrap();
        writer.flush().unwrap();
        let records = records(&files(folder.path())[0]);
        assert_eq!(records.len(), 3);
        // After the field of the time: step 0, then the version as field 3 of 13 bytes.
        assert_eq!(records[0][9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        // Step 300, summary { value { tag, simple_value } }.
        let want = b"\x10\xac\x02\x2a\x0f\x0a\x0d\x0a\x06loss/a\x15\x00\x00\x00\x3f";
        assert_eq!(records[1][9..], *want);
        let png = records[2].windows(4).position(|w| w == b"\x89PNG").unwrap();
        let head = &records[2][..png];
        assert!(
            head.windows(6).any(|w| w == b"\x08\x01\x10\x02\x18\x03"),
            "{head:?}"
        );
    }

    #[test]
    fn a_continued_run_writes_its_first_step() {
        let folder = tempfile::tempdir().unwrap();
        drop(EventWriter::open(folder.path(), 0).unwrap());
        drop(EventWriter::open(folder.path(), 4).unwrap());
        let files = files(folder.path());
        assert_eq!(files.len(), 2);
        assert_eq!(records(&files[0]).len(), 1);
        // Step 5, session_log { status: START }.
        assert_eq!(records(&files[1])[1][9..], *b"\x10\x05\x3a\x02\x08\x01");
    }
}
