//! Video frames: planes with strides, pixel formats, colour matrices and ranges, resampling.
//!
//! Samples are normalised to f32. Luma and R, G, B, A are 0 (black) to 1 (white), chroma is -0.5 to
//! 0.5. Values beyond the nominal range (super-white in limited-range video) are not clamped.

mod alpha;
pub mod aspect;
mod color;
mod format;
mod luma;
pub mod resample;
mod rgb;
mod rgb8;
mod samples;

pub(crate) use alpha::spread_colours;
pub use color::{ChromaSite, Colorimetry, Matrix, Range};
pub use format::{Component, ComponentLayout, PixelFormat};
pub(crate) use luma::Luma;
pub(crate) use samples::{Quant, Sink, Source};

use crate::{Error, Result};

/// Largest width or height of a frame, in pixels.
pub const MAX_SIDE: usize = 32768;

/// Format, size and colour of a frame.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FrameInfo {
    pub format: PixelFormat,
    /// Pixels, 1 to [`MAX_SIDE`].
    pub width: usize,
    /// Pixels, 1 to [`MAX_SIDE`].
    pub height: usize,
    pub colorimetry: Colorimetry,
    pub chroma_site: ChromaSite,
}

/// One plane of a borrowed frame.
#[derive(Clone, Copy, Debug)]
pub struct Plane<'a> {
    pub data: &'a [u8],
    /// Bytes from one row to the next, at least the row's bytes.
    pub stride: usize,
}

/// One plane of a mutably borrowed frame.
#[derive(Debug)]
pub struct PlaneMut<'a> {
    pub data: &'a mut [u8],
    /// Bytes from one row to the next, at least the row's bytes.
    pub stride: usize,
}

/// A frame to read: borrowed planes that are large enough for `info`.
#[derive(Debug)]
pub struct FrameRef<'a> {
    info: FrameInfo,
    planes: Vec<Plane<'a>>,
}

/// A frame to write: borrowed planes that are large enough for `info`.
#[derive(Debug)]
pub struct FrameMut<'a> {
    info: FrameInfo,
    planes: Vec<PlaneMut<'a>>,
}

/// A frame that owns its planes, which have no padding.
#[derive(Clone, Debug)]
pub struct Frame {
    info: FrameInfo,
    planes: Vec<Vec<u8>>,
}

impl std::fmt::Display for FrameInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let matrix = match self.colorimetry.matrix {
            Matrix::Bt601 => "BT.601",
            Matrix::Bt709 => "BT.709",
            Matrix::Bt2020 => "BT.2020",
        };
        let range = match self.colorimetry.range {
            Range::Limited => "limited",
            Range::Full => "full",
        };
        let (format, site) = (self.format.name(), self.chroma_site.name());
        let (w, h) = (self.width, self.height);
        write!(
            f,
            "{format} {w}x{h} ({matrix}, {range} range, chroma {site})"
        )
    }
}

impl FrameInfo {
    /// Describes a frame of `width` x `height` in `format`, with GStreamer's default colorimetry
    /// and chroma site for this size.
    pub fn new(format: PixelFormat, width: usize, height: usize) -> Self {
        Self {
            format,
            width,
            height,
            colorimetry: Colorimetry::default_for(format, height),
            chroma_site: ChromaSite::default_for(format, height),
        }
    }

    /// Returns the same description with another size.
    pub fn with_size(self, width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            ..self
        }
    }

    fn check_sides(&self) -> Result<()> {
        let (w, h) = (self.width, self.height);
        if !(1..=MAX_SIDE).contains(&w) || !(1..=MAX_SIDE).contains(&h) {
            return Err(Error::Frame(format!(
                "a frame of {w}x{h} pixels: sides must be 1 to {MAX_SIDE}"
            )));
        }
        Ok(())
    }

    /// Checks planes given by their bytes and strides.
    fn check(&self, planes: &[(usize, usize)]) -> Result<()> {
        self.check_sides()?;
        let (w, h) = (self.width, self.height);
        if planes.len() != self.format.planes() {
            return Err(Error::Frame(format!(
                "{} has {} planes, {} given",
                self.format.name(),
                self.format.planes(),
                planes.len()
            )));
        }
        for (i, &(len, stride)) in planes.iter().enumerate() {
            let (row, rows) = self.format.plane_size(i, w, h);
            let need = (rows - 1)
                .checked_mul(stride)
                .and_then(|n| n.checked_add(row));
            if stride < row || need.is_none_or(|n| len < n) {
                return Err(Error::Frame(format!(
                    "plane {i} of a {w}x{h} {} frame holds {len} bytes with stride {stride}: \
                     {rows} rows of {row} bytes do not fit",
                    self.format.name()
                )));
            }
        }
        Ok(())
    }
}

impl<'a> FrameRef<'a> {
    /// # Errors
    /// [`Error::Frame`] if a side is out of range, the number of planes is not that of the format,
    /// or a plane is too short for its stride and rows.
    pub fn new(info: FrameInfo, planes: Vec<Plane<'a>>) -> Result<Self> {
        info.check(
            &planes
                .iter()
                .map(|p| (p.data.len(), p.stride))
                .collect::<Vec<_>>(),
        )?;
        Ok(Self { info, planes })
    }

    pub fn info(&self) -> &FrameInfo {
        &self.info
    }

    pub fn planes(&self) -> &[Plane<'a>] {
        &self.planes
    }
}

impl<'a> FrameMut<'a> {
    /// # Errors
    /// As [`FrameRef::new`].
    pub fn new(info: FrameInfo, planes: Vec<PlaneMut<'a>>) -> Result<Self> {
        info.check(
            &planes
                .iter()
                .map(|p| (p.data.len(), p.stride))
                .collect::<Vec<_>>(),
        )?;
        Ok(Self { info, planes })
    }

    pub fn info(&self) -> &FrameInfo {
        &self.info
    }

    pub fn planes(&self) -> &[PlaneMut<'a>] {
        &self.planes
    }

    pub fn planes_mut(&mut self) -> &mut [PlaneMut<'a>] {
        &mut self.planes
    }
}

/// Allocates `len` values, such as zeros.
///
/// # Errors
/// [`Error::Memory`] if there is not enough memory.
pub(crate) fn zeros<T: Copy + Default>(len: usize) -> Result<Vec<T>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| {
        let mib = (len.saturating_mul(size_of::<T>()) >> 20) + 1;
        Error::Memory(format!("no {mib} MiB of memory for frames of this size"))
    })?;
    zeros.resize(len, T::default());
    Ok(zeros)
}

impl Frame {
    /// Makes a frame of zero bytes.
    ///
    /// # Errors
    /// [`Error::Frame`] if a side is out of range, [`Error::Memory`] if there is not enough memory.
    pub fn new(info: FrameInfo) -> Result<Self> {
        info.check_sides()?;
        let planes = (0..info.format.planes()).map(|p| {
            let (row, rows) = info.format.plane_size(p, info.width, info.height);
            zeros(row * rows)
        });
        Ok(Self {
            info,
            planes: planes.collect::<Result<_>>()?,
        })
    }

    pub fn info(&self) -> &FrameInfo {
        &self.info
    }

    /// Returns the bytes of plane `i`, rows without padding.
    pub fn plane(&self, i: usize) -> &[u8] {
        &self.planes[i]
    }

    pub fn plane_mut(&mut self, i: usize) -> &mut [u8] {
        &mut self.planes[i]
    }

    pub fn as_ref(&self) -> FrameRef<'_> {
        let info = self.info;
        let planes = self.planes.iter().enumerate().map(|(i, data)| Plane {
            data,
            stride: info.format.plane_size(i, info.width, info.height).0,
        });
        FrameRef {
            info,
            planes: planes.collect(),
        }
    }

    pub fn as_mut(&mut self) -> FrameMut<'_> {
        let info = self.info;
        let planes = self
            .planes
            .iter_mut()
            .enumerate()
            .map(|(i, data)| PlaneMut {
                data,
                stride: info.format.plane_size(i, info.width, info.height).0,
            });
        FrameMut {
            info,
            planes: planes.collect(),
        }
    }
}
