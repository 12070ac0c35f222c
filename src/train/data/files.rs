//! Files with photos and videos: finding and decoding them.

use std::{
    collections::HashSet,
    fmt, fs,
    io::{self, Cursor},
    path::{Path, PathBuf},
};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use crate::{Error, frame::MAX_SIDE};

/// Maximum size of a decoded image in bytes.
const MAX_BYTES: u64 = 2 << 30;

/// Error of loading photos.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A directory or file that cannot be read.
    #[error("'{path}' cannot be read")]
    Read { path: PathBuf, source: io::Error },
    /// No usable file.
    #[error("no usable photo (JPEG, PNG, WebP, TIFF) in {}{}", names(.dirs), reasons(.skipped))]
    Empty {
        dirs: Vec<PathBuf>,
        skipped: Vec<Skipped>,
    },
}

/// A file that is skipped, with the reason.
#[derive(Clone, Debug)]
pub struct Skipped {
    pub path: PathBuf,
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "skipped '{}': {}", self.path.display(), self.reason)
    }
}

impl From<DataError> for Error {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Read { path, source } => Self::Io {
                path,
                cause: source,
            },
            DataError::Empty { .. } => Self::Data(error.to_string()),
        }
    }
}

/// Returns the JPEG, PNG, WebP and TIFF files below `dirs`, sorted, each once. Links to a parent
/// folder are not followed.
///
/// # Errors
/// [`DataError::Read`] for a directory that cannot be read.
pub fn image_files(dirs: &[PathBuf]) -> Result<Vec<PathBuf>, DataError> {
    files(dirs, is_image)
}

/// As [`image_files`], for the files that are `wanted`. Files in `dirs` are always taken.
///
/// # Errors
/// [`DataError::Read`] for a directory that cannot be read.
pub fn files(dirs: &[PathBuf], wanted: fn(&Path) -> bool) -> Result<Vec<PathBuf>, DataError> {
    fn visit(
        path: &Path,
        wanted: fn(&Path) -> bool,
        seen: &mut HashSet<PathBuf>,
        files: &mut Vec<PathBuf>,
    ) -> Result<(), DataError> {
        let at = |source| DataError::Read {
            path: path.to_path_buf(),
            source,
        };
        // A dangling link stays in the list: decoding it reports the mistake.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        if !seen.insert(real) {
            return Ok(());
        }
        if !path.is_dir() {
            files.push(path.to_path_buf());
            return Ok(());
        }
        for entry in fs::read_dir(path).map_err(at)? {
            let path = entry.map_err(at)?.path();
            if path.is_dir() || wanted(&path) {
                visit(&path, wanted, seen, files)?;
            }
        }
        Ok(())
    }
    let (mut seen, mut files) = (HashSet::new(), Vec::new());
    for dir in dirs {
        // A dangling link exists: it is skipped later, with the reason.
        fs::symlink_metadata(dir).map_err(|source| DataError::Read {
            path: dir.clone(),
            source,
        })?;
        visit(dir, wanted, &mut seen, &mut files)?;
    }
    files.sort();
    Ok(files)
}

/// Decodes a JPEG, PNG, WebP or TIFF file, recognised by its content, to 8-bit R'G'B'. Of several
/// pictures in a file it takes the first.
///
/// # Errors
/// The reason as text: missing, damaged, not an image.
pub fn decode(path: &Path) -> Result<RgbImage, String> {
    let bytes = read_picture(path)?;
    let format = picture_format(&bytes).ok_or("The image format could not be determined")?;
    if format == ImageFormat::Jpeg && !jpeg_is_whole(&bytes) {
        return Err("the file ends in the middle of the picture".into());
    }
    let decoder = ImageReader::with_format(Cursor::new(&bytes), format).into_decoder();
    let decoder = decoder.map_err(|e| e.to_string())?;
    check_size(&decoder)?;
    let image = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?;
    Ok(image.into_rgb8())
}

/// Returns the format of a picture that begins with `bytes`. Knows also TIFF files with 64-bit
/// offsets.
pub fn picture_format(bytes: &[u8]) -> Option<ImageFormat> {
    const BIG_TIFF: [&[u8]; 2] = [b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"];
    if BIG_TIFF.iter().any(|start| bytes.starts_with(start)) {
        return Some(ImageFormat::Tiff);
    }
    image::guess_format(bytes).ok()
}

/// Reads the file at `path`. Refuses a pipe or device, which might never end.
///
/// # Errors
/// The reason as text.
pub fn read_picture(path: &Path) -> Result<Vec<u8>, String> {
    let file = fs::metadata(path).map_err(|e| e.to_string())?;
    if !file.is_file() {
        return Err("not a regular file".into());
    }
    fs::read(path).map_err(|e| e.to_string())
}

/// Refuses an image that needs more memory than a frame may. A header can claim any size.
///
/// # Errors
/// The reason as text.
pub fn check_size(decoder: &impl ImageDecoder) -> Result<(), String> {
    let (w, h) = decoder.dimensions();
    if w.max(h) as usize > MAX_SIDE || decoder.total_bytes() > MAX_BYTES {
        return Err(format!(
            "{w}x{h} pixels are too many: at most {MAX_SIDE} on a side and {} MiB in all",
            MAX_BYTES >> 20
        ));
    }
    Ok(())
}

/// Returns true if the JPEG picture in `bytes` has its end marker: decoders fill up one that breaks
/// off with grey. What follows the picture, such as the video of a motion photo, does not count.
pub fn jpeg_is_whole(bytes: &[u8]) -> bool {
    end_of_jpeg(bytes).is_some()
}

/// Walks over the segments of a JPEG picture and returns the place after its end marker.
fn end_of_jpeg(bytes: &[u8]) -> Option<usize> {
    let mut at = 2;
    loop {
        // Any number of fill bytes may come before a marker.
        while *bytes.get(at)? == 0xFF && *bytes.get(at + 1)? == 0xFF {
            at += 1;
        }
        if bytes[at] != 0xFF {
            return None;
        }
        let marker = *bytes.get(at + 1)?;
        at += 2;
        match marker {
            0xD9 => return Some(at),
            0xD0..=0xD8 | 0x01 => continue,
            _ => {}
        }
        let length = [*bytes.get(at)?, *bytes.get(at + 1)?];
        at += usize::from(u16::from_be_bytes(length)).max(2);
        if marker == 0xDA {
            // In a scan 0xFF is followed by 0 or a restart marker.
            let scan = bytes.get(at..)?.windows(2);
            at += scan
                .into_iter()
                .position(|w| w[0] == 0xFF && !matches!(w[1], 0 | 0xD0..=0xD7 | 0xFF))?;
        }
    }
}

/// Returns `true` if `path` has the name of a JPEG, PNG, WebP or TIFF file.
pub fn is_image(path: &Path) -> bool {
    const NAMES: [&str; 6] = ["jpg", "jpeg", "png", "webp", "tif", "tiff"];
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    extension.is_some_and(|e| NAMES.iter().any(|name| e == *name))
}

/// Returns `true` if `path` has the name of a video file.
pub fn is_video(path: &Path) -> bool {
    const NAMES: [&str; 18] = [
        "mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mts", "m2ts", "mpg", "mpeg", "ogv",
        "flv", "wmv", "3gp", "y4m", "mxf", "vob",
    ];
    let extension = path.extension().map(|e| e.to_ascii_lowercase());
    extension.is_some_and(|e| NAMES.iter().any(|name| e == *name))
}

/// Files of a corpus.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub photos: Vec<PathBuf>,
    pub videos: Vec<PathBuf>,
}

/// Finds photos and videos below `folders` by their names.
///
/// # Errors
/// [`DataError::Read`] for a folder that cannot be read.
pub fn find(folders: &[PathBuf]) -> Result<Found, DataError> {
    let found = files(folders, is_media)?;
    let (videos, photos) = found.into_iter().partition(|p| is_video(p));
    Ok(Found { photos, videos })
}

/// Returns `true` if `path` has the name of a photo or a video.
pub fn is_media(path: &Path) -> bool {
    is_image(path) || is_video(path)
}

fn names(paths: &[PathBuf]) -> String {
    let quoted: Vec<_> = paths.iter().map(|p| format!("'{}'", p.display())).collect();
    quoted.join(", ")
}

fn reasons(skipped: &[Skipped]) -> String {
    let first = skipped.first();
    first.map_or_else(String::new, |s| {
        format!(
            "; {} skipped, such as '{}': {}",
            skipped.len(),
            s.path.display(),
            s.reason
        )
    })
}
