// SPDX-License-Identifier: MPL-2.0

//! From GStreamer buffers to the library's frames: where planes lie in a buffer, and which colours they hold.
//!
//! Every length comes from outside (the buffer, its video meta, its crop meta) and is checked against the mapped
//! memory; `gst_video_frame_map` would trust the meta.

use gst_video::{VideoChromaSite, VideoColorMatrix, VideoColorRange, VideoInfo};
use tadsr::frame::{
    ChromaSite, Colorimetry, FrameInfo, FrameMut, FrameRef, Matrix, PixelFormat, Plane, PlaneMut,
    Range,
};

/// The library's description of frames with `info`, which was read from `caps`; `None` for a format that it does not
/// know.
///
/// What the caps leave out `info` holds as GStreamer's default for this size, but for the chroma site of caps that state
/// colours alone: that is the library's default, which is the same. Matrices that the library does not have become the
/// nearest one.
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
    // Where the caps state a chroma site and no colorimetry, `info` has the default for both.
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

/// Where the planes of a frame start in a buffer, and how far their rows lie apart, in bytes.
#[derive(Debug)]
pub(super) struct Layout(Vec<(usize, usize)>);

impl Layout {
    /// Where `buffer` holds a frame of `info`: as its video meta says, otherwise as the caps imply. A crop meta is
    /// applied when its rectangle has the size that the caps promise.
    ///
    /// # Errors
    /// Says in what way the video meta contradicts the caps.
    pub fn of(buffer: &gst::BufferRef, info: &VideoInfo) -> Result<Self, String> {
        let Some(meta) = buffer.meta::<gst_video::VideoMeta>() else {
            return Self::new(info.offset(), info.stride());
        };
        if meta.format() != info.format()
            || meta.width() < info.width()
            || meta.height() < info.height()
        {
            return Err(format!(
                "the buffer's video meta says {} {}x{} where the caps say {} {}x{}",
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
                layout.shift(info.format(), x as usize, y as usize);
            }
        }
        Ok(layout)
    }

    fn new(offsets: &[usize], strides: &[i32]) -> Result<Self, String> {
        let planes = offsets.iter().zip(strides).map(|(&offset, &stride)| {
            let stride = usize::try_from(stride).map_err(|_| {
                format!("rows that run upwards (stride {stride}) are not supported")
            })?;
            Ok((offset, stride))
        });
        planes.collect::<Result<_, _>>().map(Self)
    }

    /// Moves the frame's top left corner by `x` and `y` pixels, rounded down to whole chroma samples on the planes
    /// that hold chroma.
    fn shift(&mut self, format: gst_video::VideoFormat, x: usize, y: usize) {
        let Some(format) = PixelFormat::from_name(format.to_str()) else {
            return;
        };
        for (plane, (offset, stride)) in self.0.iter_mut().enumerate() {
            let first = format.components().iter().find(|c| c.plane == plane);
            if let Some(first) = first {
                // The sizes round up; one less than the size of what lies before the corner and the corner itself
                // is the corner.
                let (w, h) = format.component_size(first.component, x + 1, y + 1);
                *offset += (h - 1) * *stride + (w - 1) * first.step;
            }
        }
    }

    /// Where the planes of the frame start, and how far their rows lie apart, in a memory of `len` bytes.
    ///
    /// # Errors
    /// Says in what way the memory does not hold the frame.
    pub fn within(&self, info: &FrameInfo, len: usize) -> Result<&[(usize, usize)], String> {
        if self.0.len() != info.format.planes() {
            let (planes, format) = (self.0.len(), info.format.name());
            return Err(format!(
                "the buffer has {planes} planes, which {format} does not"
            ));
        }
        for (plane, &(offset, stride)) in self.0.iter().enumerate() {
            let (row, rows) = info.format.plane_size(plane, info.width, info.height);
            let end = (stride.checked_mul(rows - 1))
                .and_then(|n| n.checked_add(offset)?.checked_add(row));
            if row > stride || end.is_none_or(|end| end > len) {
                return Err(format!(
                    "a memory of {len} bytes does not hold {rows} rows of {row} bytes from byte {offset} on, {stride} apart"
                ));
            }
        }
        Ok(&self.0)
    }

    /// The frame in `data`, the whole memory of the buffer.
    pub fn frame<'a>(&self, info: FrameInfo, data: &'a [u8]) -> Result<FrameRef<'a>, String> {
        let planes = self.0.iter().map(|&(offset, stride)| {
            let data = data.get(offset..).unwrap_or_default();
            Plane { data, stride }
        });
        FrameRef::new(info, planes.collect()).map_err(|err| short(data.len(), &err))
    }

    /// As [`Self::frame`], to write to.
    pub fn frame_mut<'a>(
        &self,
        info: FrameInfo,
        data: &'a mut [u8],
    ) -> Result<FrameMut<'a>, String> {
        let len = data.len();
        let mut order: Vec<usize> = (0..self.0.len()).collect();
        order.sort_by_key(|&plane| self.0[plane].0);

        let mut planes: Vec<_> = self.0.iter().map(|_| None).collect();
        // From the last plane to the first: each ends where the next begins.
        let mut rest = data;
        for plane in order.into_iter().rev() {
            let (offset, stride) = self.0[plane];
            let (before, data) = rest
                .split_at_mut_checked(offset)
                .ok_or_else(|| format!("a plane starts at byte {offset} of a buffer of {len}"))?;
            planes[plane] = Some(PlaneMut { data, stride });
            rest = before;
        }
        let planes = planes.into_iter().flatten().collect();
        FrameMut::new(info, planes).map_err(|err| short(len, &err))
    }
}

fn short(len: usize, err: &tadsr::Error) -> String {
    format!("a buffer of {len} bytes does not hold a frame of its caps: {err}")
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
    fn stated_colours_are_taken_over() {
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
    fn colours_that_are_not_stated_are_those_of_the_size() {
        let small = described("format=I420,width=720,height=576");
        let large = described("format=I420,width=1920,height=1080");
        assert_eq!(small.colorimetry.matrix, Matrix::Bt601);
        assert_eq!(large.colorimetry.matrix, Matrix::Bt709);
        let rgb = described("format=RGB,width=720,height=576");
        assert_eq!(rgb.colorimetry.range, Range::Full);
    }

    #[test]
    fn chroma_sites_are_taken_over() {
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
    fn planes_that_a_memory_does_not_hold_are_refused() {
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
    fn planes_that_share_bytes_or_lie_outside_are_no_frame_to_write_to() {
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
