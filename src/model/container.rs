//! The common part of model files: tensors by name in safetensors, all else as JSON under the
//! metadata key `tadsr`.
//!
//! Files are read and written tensor by tensor, so that a large model is in memory only once. A
//! file is untrusted input: memory is allocated only for data that fits in the length of the file.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fmt, fs,
    io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata as Header, TensorInfo},
};
use serde::Deserialize;

use crate::{Error, Result};

/// Format version of models without dials.
pub const FORMAT_VERSION: u32 = 1;

/// Format version of models with dials.
pub const CONDITIONED_VERSION: u32 = 2;

/// Format version of models with memory, the newest that this library reads.
pub const MEMORY_VERSION: u32 = 3;

/// Maximum length of a model file in bytes.
const MAX_FILE: u64 = 4 << 30;

/// Maximum length of a header in bytes. The largest models have about 100 KiB.
const MAX_HEADER: u64 = 16 << 20;

pub(super) const METADATA_KEY: &str = "tadsr";

/// Maximum number of tensor names of each kind in a message.
const LISTED: usize = 100;

/// Type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    F16,
    BF16,
}

impl Precision {
    /// Returns the bytes of a weight.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// Returns the bytes of `values`, or `None` if one is not finite or too large for the type.
    fn bytes(self, values: &[f32]) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(values.len() * self.size());
        for &v in values {
            let stored = match self {
                Self::F32 => {
                    bytes.extend(v.to_le_bytes());
                    v
                }
                Self::F16 => {
                    let v = f16::from_f32(v);
                    bytes.extend(v.to_le_bytes());
                    v.to_f32()
                }
                Self::BF16 => {
                    let v = bf16::from_f32(v);
                    bytes.extend(v.to_le_bytes());
                    v.to_f32()
                }
            };
            if !stored.is_finite() {
                return None;
            }
        }
        Some(bytes)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        })
    }
}

/// Metadata of every family.
#[derive(Deserialize)]
struct Label {
    format_version: u32,
    family: String,
    name: String,
}

/// Opens a model file for a [`Reader`].
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Model`] if it cannot hold a model.
pub(super) fn open(path: &Path) -> Result<BufReader<fs::File>> {
    let found = fs::metadata(path).map_err(Error::io(path))?;
    if !found.is_file() {
        return Err(Error::model(path, "not a regular file"));
    }
    // Files in /proc have length 0 and can block the reader.
    if found.len() == 0 {
        return Err(Error::model(path, "an empty file"));
    }
    if found.len() > MAX_FILE {
        let reason = format!("more than {MAX_FILE} bytes, which no model has");
        return Err(Error::model(path, reason));
    }
    Ok(BufReader::new(
        fs::File::open(path).map_err(Error::io(path))?,
    ))
}

/// A reader of the tensors of a model file, which counts missing and unused ones.
pub(super) struct Reader<R> {
    source: R,
    /// Offset of the tensors' data.
    data: u64,
    json: String,
    family: String,
    left: HashMap<String, TensorInfo>,
}

impl<R: Read + Seek> Reader<R> {
    /// Reads the header: names, types, shapes and offsets of the tensors, and the version, family
    /// and name of the metadata. The tensors are contiguous up to the end of the file.
    pub fn new(mut source: R) -> Result<Self, String> {
        let foreign =
            |e: &dyn fmt::Display| format!("not a safetensors file or a truncated one ({e})");
        let io = |e: std::io::Error| foreign(&e);
        let len = source.seek(SeekFrom::End(0)).map_err(io)?;
        source.rewind().map_err(io)?;
        let mut size = [0; 8];
        source.read_exact(&mut size).map_err(io)?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size > len - 8 {
            return Err(foreign(&format!("a header of {size} bytes")));
        }
        let mut header = vec![0; size as usize];
        source.read_exact(&mut header).map_err(io)?;
        let header: Header = serde_json::from_slice(&header).map_err(|e| foreign(&e))?;
        let data = 8 + size;
        if header.data_len() as u64 != len - data {
            return Err(foreign(&format!(
                "{} bytes of tensors, not {}",
                len - data,
                header.data_len()
            )));
        }
        let json = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY));
        let json = json
            .ok_or("a safetensors file, but not a model of this project (no 'tadsr' metadata)")?
            .clone();
        let label: Label = parse(&json)?;
        check_label(
            label.format_version,
            MEMORY_VERSION,
            &label.family,
            &label.name,
        )?;
        let left = header
            .tensors()
            .into_iter()
            .map(|(name, info)| (name, info.clone()));
        let left = left.collect();
        Ok(Self {
            source,
            data,
            json,
            family: label.family,
            left,
        })
    }

    pub fn family(&self) -> &str {
        &self.family
    }

    /// Parses the metadata of a model of `family`.
    pub fn metadata<T: for<'a> Deserialize<'a>>(&self, family: &str) -> Result<T, String> {
        if self.family != family {
            return Err(format!(
                "a model of the family '{}' where one of '{family}' is required",
                self.family
            ));
        }
        parse(&self.json)
    }

    /// Parses the metadata of any family.
    pub fn any_metadata(&self) -> Result<serde_json::Value, String> {
        parse(&self.json)
    }

    /// Checks that the file has exactly the `expected` names and shapes.
    pub fn compare(&self, expected: &[(String, Vec<usize>)]) -> Result<(), Mismatch> {
        compare(
            expected,
            self.left.iter().map(|(n, i)| (n.as_str(), &i.shape[..])),
        )
    }

    /// Reads the values of a tensor of F32, F16 or BF16 and checks that they are finite.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
        let info = self.left.remove(name);
        let info = info.ok_or_else(|| format!("tensor '{name}' is missing"))?;
        if info.shape != shape {
            return Err(format!(
                "tensor '{name}' has shape {:?}, not {shape:?}",
                info.shape
            ));
        }
        let value: fn(&[u8]) -> f32 = match info.dtype {
            Dtype::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Dtype::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Dtype::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            other => {
                return Err(format!(
                    "tensor '{name}' has type {other:?}, not F32, F16 or BF16"
                ));
            }
        };
        // The offsets lie inside the file, and the lengths are those of the shapes.
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let start = SeekFrom::Start(self.data + start as u64);
        let read = self
            .source
            .seek(start)
            .and_then(|_| self.source.read_exact(&mut bytes));
        read.map_err(|e| format!("tensor '{name}' cannot be read ({e})"))?;
        let each = info.dtype.bitsize() / 8;
        let values: Vec<f32> = bytes.chunks_exact(each).map(value).collect();
        if values.iter().any(|v| !v.is_finite()) {
            return Err(format!("tensor '{name}' holds a value that is not finite"));
        }
        Ok(values)
    }

    /// Returns `true` if the file has a tensor of this name that has not been read.
    pub fn has(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    pub fn finish(self) -> Result<(), String> {
        let mut left: Vec<_> = self.left.into_keys().collect();
        if left.is_empty() {
            return Ok(());
        }
        left.sort();
        left.truncate(LISTED);
        Err(format!(
            "tensors that the architecture does not have: {}",
            left.join(", ")
        ))
    }
}

fn parse<T: for<'a> Deserialize<'a>>(json: &str) -> Result<T, String> {
    serde_json::from_str(json).map_err(|e| format!("invalid metadata: {e}"))
}

/// Checks the metadata of every family.
pub(super) fn check_label(
    version: u32,
    newest: u32,
    family: &str,
    name: &str,
) -> Result<(), String> {
    if !(FORMAT_VERSION..=newest).contains(&version) {
        return Err(format!(
            "format version {version}: this library reads versions up to {newest}, use a newer \
             release"
        ));
    }
    let printable = |s: &str| s.len() <= 100 && !s.chars().any(char::is_control);
    if !printable(name) || !printable(family) {
        return Err("its name or family is longer than 100 bytes or not printable".into());
    }
    Ok(())
}

/// Differences between tensors and those of an architecture, sorted by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mismatch {
    pub missing: Vec<String>,
    pub unexpected: Vec<String>,
    /// Name, actual shape, expected shape.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let shape = |(name, found, expected): &(String, _, _)| {
            format!("{name} {found:?} instead of {expected:?}")
        };
        let misshapen: Vec<String> = self.misshapen.iter().map(shape).collect();
        let mut separator = "";
        for (what, names) in [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("of another shape", &misshapen),
        ] {
            if names.is_empty() {
                continue;
            }
            let first: Vec<String> = names.iter().take(LISTED).map(|n| shown(n)).collect();
            let more = if names.len() > LISTED { ", ..." } else { "" };
            write!(
                f,
                "{separator}{} {what}: {}{more}",
                names.len(),
                first.join(", ")
            )?;
            separator = "; ";
        }
        Ok(())
    }
}

/// Checks that the tensors `found` are exactly the `expected` ones.
pub(super) fn compare<'a>(
    expected: &[(String, Vec<usize>)],
    found: impl Iterator<Item = (&'a str, &'a [usize])>,
) -> Result<(), Mismatch> {
    let mut left: BTreeMap<&str, &[usize]> = found.collect();
    let mut mismatch = Mismatch::default();
    for (name, shape) in expected {
        match left.remove(name.as_str()) {
            None => mismatch.missing.push(name.clone()),
            Some(found) if found != shape => {
                mismatch
                    .misshapen
                    .push((name.clone(), found.to_vec(), shape.clone()));
            }
            Some(_) => {}
        }
    }
    mismatch.missing.sort();
    mismatch.misshapen.sort();
    mismatch.unexpected = left.into_keys().map(String::from).collect();
    if mismatch == Mismatch::default() {
        Ok(())
    } else {
        Err(mismatch)
    }
}

/// Writes a model file whose tensors, `names` with shapes, all have one type. `values` returns the
/// values of one tensor after the other. The file is replaced atomically.
///
/// # Errors
/// [`Error::Io`], [`Error::Model`] if a value is not finite or too large for the type, and the
/// errors of `values`.
pub(super) fn write(
    path: &Path,
    json: String,
    tensors: &[(String, Vec<usize>)],
    precision: Precision,
    values: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
) -> Result<()> {
    let mut part = OsString::from(path);
    part.push(".part");
    let part = PathBuf::from(part);
    let io = Error::io(path);
    let file = fs::File::create(&part).map_err(&io)?;
    let mut written = write_to(file, path, json, tensors, precision, values);
    if written.is_ok() {
        written = fs::rename(&part, path).map_err(&io);
    }
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&part);
    }
    written
}

fn write_to(
    file: fs::File,
    path: &Path,
    json: String,
    tensors: &[(String, Vec<usize>)],
    precision: Precision,
    mut values: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
) -> Result<()> {
    let (io, wrong) = (Error::io(path), |reason: String| Error::model(path, reason));
    let mut file = BufWriter::new(file);
    let header = header(json, tensors, precision).map_err(wrong)?;
    let size = (header.len() as u64).to_le_bytes();
    file.write_all(&size).map_err(&io)?;
    file.write_all(&header).map_err(&io)?;
    for (name, shape) in tensors {
        let values = values(name, shape)?;
        if values.len() != shape.iter().product::<usize>() {
            return Err(wrong(format!(
                "tensor '{name}' has {} values for {shape:?}",
                values.len()
            )));
        }
        let bytes = precision.bytes(&values).ok_or_else(|| {
            wrong(format!(
                "tensor '{name}' holds a value that is not finite or does not fit in {precision}"
            ))
        })?;
        file.write_all(&bytes).map_err(&io)?;
    }
    let file = file.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync_all().map_err(&io)
}

/// Returns the header of a safetensors file, padded to a multiple of 8 bytes.
fn header(
    json: String,
    tensors: &[(String, Vec<usize>)],
    precision: Precision,
) -> Result<Vec<u8>, String> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * precision.size();
        let info = TensorInfo {
            dtype: precision.dtype(),
            shape: shape.clone(),
            data_offsets: (start, end),
        };
        (name.clone(), info)
    });
    let metadata = HashMap::from([(METADATA_KEY.to_string(), json)]);
    let header = Header::new(Some(metadata), infos.collect()).map_err(|e| e.to_string())?;
    let mut bytes = serde_json::to_vec(&header).map_err(|e| e.to_string())?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

/// Returns a name of a file in a form for messages, short and printable.
pub(super) fn shown(name: &str) -> String {
    let short: String = name.chars().take(100).collect();
    short.escape_debug().to_string()
}
