// SPDX-License-Identifier: MPL-2.0

//! Conversion of GStreamer buffers to the library's frames: layout of the planes and colours.
//!
//! Buffers, video metas and crop metas are not trusted: every length is checked against the mapped
//! memory, which `gst_video_frame_map` does not do.

use gst_video::{VideoChromaSite, VideoColorMatrix, VideoColorRange, VideoInfo};
use tadsr::{
    Error,
    frame::{
        ChromaSite, Colorimetry, FrameInfo, FrameMut, FrameRef, Matrix, PixelFormat, Plane,
        PlaneMut, Range,
    },
};

/// Returns the library's description of frames with `info`, which was read from `caps`; `None` for
/// an unsupported format.
///
/// For fields that the caps omit, `info` holds GStreamer's defaults for the frame size. The
/// exception is the chroma site of caps that state a colorimetry: the library's default replaces
/// it, which is the same. An unsupported matrix is replaced by the nearest one.
pub(super) fn frame_info(info: &VideoInfo, caps: &gst::CapsRef) -> Option<FrameInfo> {
    let format = PixelFormat::from_name(info.format().to_str())?;
    let mut result = FrameInfo::new(format, info.width() as usize, info.height() as usize);
    let default = result.colorimetry;
    let colorimetry = info.colorimetry();
    result.colorimetry = Colorimetry {
        matrix: match colorimetry.matrix() {
            VideoColorMatrix::Bt601 | VideoColorMatrix::Fcc => Matrix::Bt601,
            VideoColorMatrix::Bt709 | VideoColorMatrix::Smpte240m => Matrix::Bt709,
            VideoColorMatrix::Bt2020 => Matrix::Bt2020,
            _ => default.matrix,
        },
        range: match colorimetry.range() {
            VideoColorRange::Range0_255 => Range::Full,
            VideoColorRange::Range16_235 => Range::Limited,
            _ => default.range,
        },
    };
    // If the caps state a chroma site and no colorimetry, `info` has the defaults of both.
    let stated = caps.structure(0)?.get::<&str>("chroma-site").ok();
    let stated = stated.and_then(|text| text.parse().ok());
    let site = stated.unwrap_or(info.chroma_site());
    if !site.is_empty() {
        result.chroma_site = ChromaSite {
            horizontal_cosited: site.contains(VideoChromaSite::H_COSITED),
            vertical_cosited: site.contains(VideoChromaSite::V_COSITED),
        };
    }
    Some(result)
}

/// Calls `read` with the frame in `buffer`.
///
/// # Errors
/// Returns [`Error::Frame`] if the buffer does not hold a frame of `info`, and the errors of
/// `read`.
pub(super) fn with_input<T>(
    buffer: &gst::BufferRef,
    info: &VideoInfo,
    frame: FrameInfo,
    read: impl FnOnce(&FrameRef) -> tadsr::Result<T>,
) -> tadsr::Result<T> {
    let layout = Layout::of(buffer, info).map_err(Error::Frame)?;
    let data = buffer
        .map_readable()
        .map_err(|err| Error::Frame(err.to_string()))?;
    let frame = layout.frame(frame, &data);
    read(&frame.map_err(Error::Frame)?)
}

/// Calls `write` with the frame to be written to `buffer`.
///
/// # Errors
/// As [`with_input`].
pub(super) fn with_output<T>(
    buffer: &mut gst::BufferRef,
    info: &VideoInfo,
    frame: FrameInfo,
    write: impl FnOnce(&mut FrameMut) -> tadsr::Result<T>,
) -> tadsr::Result<T> {
    let layout = Layout::of(buffer, info).map_err(Error::Frame)?;
    let mut data = buffer
        .map_writable()
        .map_err(|err| Error::Frame(err.to_string()))?;
    let frame = layout.frame_mut(frame, &mut data);
    write(&mut frame.map_err(Error::Frame)?)
}

/// Offset and stride in bytes of each plane of a frame in a buffer.
#[derive(Debug)]
pub(super) struct Layout(Vec<(usize, usize)>);

impl Layout {
    /// Returns the layout of a frame of `info` in `buffer`: that of its video meta, otherwise that
    /// of the caps. A crop meta is applied if its rectangle has the size in the caps.
    ///
    /// # Errors
    /// Describes how the video meta contradicts the caps.
    pub fn of(buffer: &gst::BufferRef, info: &VideoInfo) -> Result<Self, String> {
        let Some(meta) = buffer.meta::<gst_video::VideoMeta>() else {
            return Self::new(info.offset(), info.stride());
        };
        if meta.format() != info.format()
            || meta.width() < info.width()
            || meta.height() < info.height()
        {
            return Err(format!(
                "the video meta of the buffer is for {} {}x{}, the caps are for {} {}x{}",
                meta.format(),
                meta.width(),
                meta.height(),
                info.format(),
                info.width(),
                info.height()
            ));
        }
        let mut layout = Self::new(meta.offset(), meta.stride())?;
        if let Some(crop) = buffer.meta::<gst_video::VideoCropMeta>() {
            let (x, y, w, h) = crop.rect();
            let inside = |start: u32, size: u32, all: u32| {
                start.checked_add(size).is_some_and(|end| end <= all)
            };
            if (w, h) == (info.width(), info.height())
                && inside(x, w, meta.width())
                && inside(y, h, meta.height())
            {
                layout.crop(info.format(), x as usize, y as usize);
            }
        }
        Ok(layout)
    }

    fn new(offsets: &[usize], strides: &[i32]) -> Result<Self, String> {
        let planes = offsets.iter().zip(strides).map(|(&offset, &stride)| {
            let stride = usize::try_from(stride)
                .map_err(|_| format!("the buffer's negative stride {stride} is not supported"))?;
            Ok((offset, stride))
        });
        planes.collect::<Result<_, _>>().map(Self)
    }

    /// Moves the top left corner by `x` and `y` pixels, rounded down to whole samples in planes
    /// with subsampled chroma, and so to an even pixel in YUY2.
    fn crop(&mut self, format: gst_video::VideoFormat, x: usize, y: usize) {
        let Some(format) = PixelFormat::from_name(format.to_str()) else {
            return;
        };
        for (plane, (offset, stride)) in self.0.iter_mut().enumerate() {
            let of_plane = format.components().iter().filter(|c| c.plane == plane);
            if let Some(first) = of_plane.max_by_key(|c| c.step) {
                // Sizes round up: the size up to and including the corner, minus one, is the
                // position of the corner.
                let (w, h) = format.component_size(first.component, x + 1, y + 1);
                *offset += (h - 1) * *stride + (w - 1) * first.step;
            }
        }
    }

    /// Returns offset and stride of each plane of a frame of `info` in a memory of `len` bytes.
    ///
    /// # Errors
    /// Describes which plane does not fit in the memory.
    pub fn within(&self, info: &FrameInfo, len: usize) -> Result<&[(usize, usize)], String> {
        if self.0.len() != info.format.planes() {
            let (planes, format) = (self.0.len(), info.format.name());
            return Err(format!(
                "the buffer has {planes} planes, {format} has {}",
                info.format.planes()
            ));
        }
        for (plane, &(offset, stride)) in self.0.iter().enumerate() {
            let (row, rows) = info.format.plane_size(plane, info.width, info.height);
            let end = (stride.checked_mul(rows - 1))
                .and_then(|n| n.checked_add(offset)?.checked_add(row));
            if row > stride || end.is_none_or(|end| end > len) {
                return Err(format!(
                    "a memory of {len} bytes is too small for {rows} rows of {row} bytes at \
                     offset {offset} and stride {stride}"
                ));
            }
        }
        Ok(&self.0)
    }

    /// Returns the frame in `data`, the whole memory of the buffer.
    pub fn frame<'a>(&self, info: FrameInfo, data: &'a [u8]) -> Result<FrameRef<'a>, String> {
        let planes = self.0.iter().map(|&(offset, stride)| {
            let data = data.get(offset..).unwrap_or_default();
            Plane { data, stride }
        });
        FrameRef::new(info, planes.collect()).map_err(|err| mismatch(data.len(), &err))
    }

    /// As [`Self::frame`], for writing.
    pub fn frame_mut<'a>(
        &self,
        info: FrameInfo,
        data: &'a mut [u8],
    ) -> Result<FrameMut<'a>, String> {
        let len = data.len();
        let mut order: Vec<usize> = (0..self.0.len()).collect();
        order.sort_by_key(|&plane| self.0[plane].0);

        let mut planes: Vec<_> = self.0.iter().map(|_| None).collect();
        // From the last plane in memory to the first, because each ends where the next begins.
        let mut rest = data;
        for plane in order.into_iter().rev() {
            let (offset, stride) = self.0[plane];
            let (before, data) = rest.split_at_mut_checked(offset).ok_or_else(|| {
                format!(
                    "a plane starts at byte {offset}, after the end of the buffer of {len} bytes"
                )
            })?;
            planes[plane] = Some(PlaneMut { data, stride });
            rest = before;
        }
        let planes = planes.into_iter().flatten().collect();
        FrameMut::new(info, planes).map_err(|err| mismatch(len, &err))
    }
}

fn mismatch(len: usize, err: &Error) -> String {
    format!("the buffer of {len} bytes does not match its caps: {err}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(fields: &str) -> FrameInfo {
        gst::init().unwrap();
        let caps = format!("video/x-raw,framerate=25/1,{fields}");
        let caps: gst::Caps = caps.parse().unwrap();
        frame_info(&VideoInfo::from_caps(&caps).unwrap(), &caps).unwrap()
    }

    #[test]
    fn every_template_format_is_known_by_its_name() {
        for format in PixelFormat::ALL {
            let info = described(&format!("format={},width=6,height=4", format.name()));
            assert_eq!((info.format, info.width, info.height), (format, 6, 4));
        }
    }

    #[test]
    fn stated_colours_are_used() {
        for (text, matrix, range) in [
            ("bt601", Matrix::Bt601, Range::Limited),
            ("bt709", Matrix::Bt709, Range::Limited),
            ("bt2020", Matrix::Bt2020, Range::Limited),
            ("bt2100-pq", Matrix::Bt2020, Range::Limited),
            ("1:4:0:0", Matrix::Bt601, Range::Full),
            ("1:3:5:1", Matrix::Bt709, Range::Full),
            ("2:5:0:0", Matrix::Bt709, Range::Limited),
        ] {
            let info = described(&format!(
                "format=I420,width=6,height=4,colorimetry=(string){text}"
            ));
            assert_eq!(info.colorimetry, Colorimetry { matrix, range }, "{text}");
        }
    }

    #[test]
    fn colours_that_are_not_stated_follow_the_size() {
        let small = described("format=I420,width=720,height=576");
        let large = described("format=I420,width=1920,height=1080");
        assert_eq!(small.colorimetry.matrix, Matrix::Bt601);
        assert_eq!(large.colorimetry.matrix, Matrix::Bt709);
        let rgb = described("format=RGB,width=720,height=576");
        assert_eq!(rgb.colorimetry.range, Range::Full);
    }

    #[test]
    fn chroma_sites_are_used() {
        for (site, horizontal, vertical) in [
            ("jpeg", false, false),
            ("mpeg2", true, false),
            ("cosited", true, true),
            ("v-cosited", false, true),
        ] {
            let info = described(&format!("format=I420,width=6,height=4,chroma-site={site}"));
            let expected = ChromaSite {
                horizontal_cosited: horizontal,
                vertical_cosited: vertical,
            };
            assert_eq!(info.chroma_site, expected, "{site}");
        }
    }

    #[test]
    fn a_crop_begins_at_a_whole_sample_of_every_plane() {
        use gst_video::VideoFormat;
        let cropped = |format, planes: usize| {
            let mut layout = Layout(vec![(100, 64); planes]);
            layout.crop(format, 5, 3);
            layout.0.iter().map(|p| p.0 - 100).collect::<Vec<_>>()
        };
        assert_eq!(cropped(VideoFormat::I420, 3), [3 * 64 + 5, 64 + 2, 64 + 2]);
        assert_eq!(cropped(VideoFormat::Nv12, 2), [3 * 64 + 5, 64 + 4]);
        assert_eq!(cropped(VideoFormat::Yuy2, 1), [3 * 64 + 8]);
        assert_eq!(cropped(VideoFormat::Uyvy, 1), [3 * 64 + 8]);
        assert_eq!(cropped(VideoFormat::Argb, 1), [3 * 64 + 20]);
        let whole = 3 * 64 + 5;
        assert_eq!(
            cropped(VideoFormat::A420, 4),
            [whole, 64 + 2, 64 + 2, whole]
        );
    }

    #[test]
    fn input_planes_that_exceed_the_memory_are_refused() {
        let info = described("format=I420,width=4,height=2");
        let within =
            |planes: &[(usize, usize)], len| Layout(planes.into()).within(&info, len).is_ok();
        assert!(within(&[(0, 4), (8, 2), (10, 2)], 12));
        assert!(!within(&[(0, 4), (8, 2), (10, 2)], 11));
        assert!(!within(&[(0, 3), (8, 2), (10, 2)], 12));
        assert!(!within(&[(0, usize::MAX), (8, 2), (10, 2)], 12));
        assert!(!within(&[(0, 4), (usize::MAX, 2), (10, 2)], 12));
        assert!(!within(&[(0, 4), (8, 2)], 12));
        assert!(!within(&[(0, 4), (8, 2), (10, 2), (0, 2)], 12));
    }

    #[test]
    fn output_planes_that_overlap_or_exceed_the_memory_are_refused() {
        let info = described("format=I420,width=4,height=2");
        let mut data = vec![0; 12];
        let write = |layout: &Layout, data: &mut Vec<u8>| layout.frame_mut(info, data).is_ok();
        assert!(write(&Layout(vec![(0, 4), (8, 2), (10, 2)]), &mut data));
        assert!(write(&Layout(vec![(4, 4), (0, 2), (2, 2)]), &mut data));
        assert!(!write(&Layout(vec![(0, 4), (8, 2), (8, 2)]), &mut data));
        assert!(!write(&Layout(vec![(0, 4), (7, 2), (10, 2)]), &mut data));
        assert!(!write(&Layout(vec![(0, 4), (8, 2), (11, 2)]), &mut data));
        assert!(!write(&Layout(vec![(0, 4), (8, 2), (13, 2)]), &mut data));
    }
}
