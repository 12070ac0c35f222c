//! Files of segments: the bytes of all packets, then their description as JSON, then the length and
//! the checksum of the JSON. Only a complete file has the description, which comes last.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use crc32fast::Hasher;
use gst::ClockTime;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::{Error, Result, video::verify::Expected};

/// Start of the names of files that are being written.
pub(super) const UNFINISHED: &str = ".unfinished-";
/// Bytes of length and checksum at the end of a file.
const TAIL: usize = 12;
/// Time that is added to those of packets, whose decoding times may be negative.
const SHIFT: ClockTime = ClockTime::from_seconds(3600 * 1000);

/// Description of a segment.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Content {
    /// Caps of the packets; empty if there are none.
    pub caps: String,
    packets: Vec<Packet>,
    /// Number and times of the frames that were encoded, on the clock of the output.
    pub frames: u64,
    pub first: Duration,
    pub last: Duration,
    /// End of the last frame.
    pub end: Duration,
    /// Checksum of the bytes of all packets.
    checksum: u32,
}

impl Content {
    /// Adds a frame that was encoded.
    pub fn add(&mut self, pts: Duration, end: Duration) {
        if self.frames == 0 {
            (self.first, self.last) = (pts, pts);
        }
        self.frames += 1;
        self.first = self.first.min(pts);
        self.last = self.last.max(pts);
        self.end = self.end.max(end);
    }

    /// Adds the frames to those `expected` in a file.
    pub fn add_to(&self, expected: &mut Expected) {
        if self.frames > 0 {
            expected.add(self.first);
            expected.add(self.last);
            expected.frames = expected.frames + self.frames - 2;
        }
    }
}

/// Times of a packet in nanoseconds of running time, its flags and its size.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Packet {
    pts: Option<i64>,
    dts: Option<i64>,
    duration: Option<u64>,
    flags: u32,
    bytes: usize,
}

/// File of a segment that is being written. It is removed when dropped before [`Self::finish`].
pub(super) struct SegmentWriter {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
    hasher: Hasher,
    pub content: Content,
}

impl SegmentWriter {
    /// Creates an unfinished file that becomes `path`.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(folder)
            .map_err(Error::io(path))?;
        Ok(Self {
            path: path.into(),
            file: BufWriter::new(file),
            hasher: Hasher::new(),
            content: Content::default(),
        })
    }

    /// Adds a packet of an encoder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written, [`Error::Video`] if its caps differ from those of the
    /// packets before.
    pub fn add(&mut self, sample: &gst::Sample) -> Result<()> {
        let wrong = |reason: &str| Error::video(&self.path, reason);
        let (Some(buffer), Some(caps)) = (sample.buffer(), sample.caps()) else {
            return Err(wrong("the encoder made a packet without a format"));
        };
        let caps = caps.to_string();
        if self.content.packets.is_empty() {
            self.content.caps = caps;
        } else if self.content.caps != caps {
            return Err(wrong("the encoder changes its format: choose another one"));
        }
        let segment = sample.segment().and_then(|s| s.downcast_ref::<ClockTime>());
        let running = |time: Option<ClockTime>| {
            let time = segment?.to_running_time_full(time?)?;
            let length = i64::try_from(time.abs().nseconds()).ok()?;
            Some(if time.is_negative() { -length } else { length })
        };
        let data = buffer.map_readable();
        let data = data.map_err(|_| wrong("a packet cannot be read"))?;
        self.content.packets.push(Packet {
            pts: running(buffer.pts()),
            dts: running(buffer.dts()),
            duration: buffer.duration().map(ClockTime::nseconds),
            flags: buffer.flags().bits(),
            bytes: data.len(),
        });
        self.hasher.update(&data);
        self.file.write_all(&data).map_err(Error::io(&self.path))
    }

    /// Completes the file and writes it to the disk. If `is_whole`, gives it its name, which may
    /// replace a file. Otherwise it is removed when the result is dropped.
    pub fn finish(mut self, is_whole: bool) -> Result<Option<NamedTempFile>> {
        let failed = Error::io(&self.path);
        self.content.checksum = self.hasher.finalize();
        let content = serde_json::to_vec(&self.content).map_err(|e| failed(e.into()))?;
        let length = (content.len() as u64).to_le_bytes();
        let checksum = crc32fast::hash(&content).to_le_bytes();
        for part in [&content[..], &length, &checksum] {
            self.file.write_all(part).map_err(&failed)?;
        }
        let file = self.file.into_inner();
        let file = file.map_err(|e| failed(e.into_error()))?;
        file.as_file().sync_all().map_err(&failed)?;
        if !is_whole {
            return Ok(Some(file));
        }
        file.persist(&self.path).map_err(|e| failed(e.error))?;
        sync_folder(&self.path)?;
        Ok(None)
    }
}

/// Writes to the disk which files the folder of `path` has.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    // Other systems cannot open folders.
    if cfg!(unix) {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(Error::io(folder))?;
    }
    Ok(())
}

/// Finished file of a segment.
pub(super) struct SegmentReader {
    file: BufReader<File>,
    pub content: Content,
}

impl SegmentReader {
    /// Opens the file `path` and reads its description.
    ///
    /// # Errors
    /// If the file cannot be read, or its length or description is not that of a finished file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let damaged = || io::Error::other("the file is damaged");
        let mut file = BufReader::new(File::open(path)?);
        let all = file.get_ref().metadata()?.len();
        let end = all.checked_sub(TAIL as u64).ok_or_else(damaged)?;
        file.seek(SeekFrom::Start(end))?;
        let mut tail = [0; TAIL];
        file.read_exact(&mut tail)?;
        let (length, checksum) = tail.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        let start = end.checked_sub(number(length)).ok_or_else(damaged)?;
        file.seek(SeekFrom::Start(start))?;
        let mut content = Vec::new();
        file.by_ref().take(end - start).read_to_end(&mut content)?;
        if u64::from(crc32fast::hash(&content)) != number(checksum) {
            return Err(damaged());
        }
        let content: Content = serde_json::from_slice(&content)?;
        let stated: u64 = content.packets.iter().map(|p| p.bytes as u64).sum();
        if stated != start {
            return Err(damaged());
        }
        file.rewind()?;
        Ok(Self { file, content })
    }

    /// Reads all packets, to find damage.
    pub fn check(&mut self) -> io::Result<()> {
        let mut hasher = Hasher::new();
        let mut data = Vec::new();
        for packet in &self.content.packets {
            data.resize(packet.bytes, 0);
            self.file.read_exact(&mut data)?;
            hasher.update(&data);
        }
        self.file.rewind()?;
        if hasher.finalize() != self.content.checksum {
            return Err(io::Error::other("its packets are damaged"));
        }
        Ok(())
    }

    /// Returns the next packets as samples with `caps`. `last` is the decoding time of the last
    /// packet of the segments before.
    pub fn packets(
        &mut self,
        caps: &gst::Caps,
        last: &mut Option<i64>,
    ) -> impl Iterator<Item = io::Result<gst::Sample>> {
        let mut segment = gst::FormattedSegment::<ClockTime>::new();
        segment.set_start(SHIFT);
        segment.set_time(ClockTime::ZERO);
        let Self { file, content } = self;
        content.packets.iter().map(move |packet| {
            let mut bytes = vec![0; packet.bytes];
            file.read_exact(&mut bytes)?;
            let mut buffer = gst::Buffer::from_slice(bytes);
            if let Some(buffer) = buffer.get_mut() {
                // An encoder that reorders frames begins to decode before it shows the first.
                let dts = packet
                    .dts
                    .map(|dts| last.map_or(dts, |last| dts.max(last + 1)));
                *last = dts.or(*last);
                buffer.set_pts(packet.pts.and_then(shifted));
                buffer.set_dts(dts.and_then(shifted));
                buffer.set_duration(packet.duration.map(ClockTime::from_nseconds));
                buffer.set_flags(gst::BufferFlags::from_bits_truncate(packet.flags));
            }
            let sample = gst::Sample::builder().buffer(&buffer).caps(caps);
            Ok(sample.segment(&segment).build())
        })
    }
}

fn shifted(time: i64) -> Option<ClockTime> {
    let time = SHIFT.nseconds().checked_add_signed(time)?;
    Some(ClockTime::from_nseconds(time))
}
