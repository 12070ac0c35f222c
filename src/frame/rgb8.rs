//! Conversion between frames and packed 8-bit RGB of image files, for tools and tests. It favours
//! accuracy over speed.

use super::{Component, Frame, FrameInfo, FrameRef, PixelFormat, Plane, rgb::RGB};
use crate::{Error, Result};

impl Frame {
    /// Makes an RGB frame from `rgb`: rows of R, G, B bytes without padding.
    ///
    /// # Errors
    /// [`Error::Frame`] if a side is out of range or `rgb` has the wrong length.
    pub fn from_rgb8(width: usize, height: usize, rgb: &[u8]) -> Result<Self> {
        let mut frame = Self::new(FrameInfo::new(PixelFormat::Rgb, width, height))?;
        let plane = frame.plane_mut(0);
        if rgb.len() != plane.len() {
            return Err(wrong_length(width, height, rgb.len()));
        }
        plane.copy_from_slice(rgb);
        Ok(frame)
    }

    /// Makes a frame `info` from `rgb`: rows of R, G, B bytes without padding, full range.
    /// Subsampled chroma is filtered to its site by a triangle filter. Alpha is opaque.
    ///
    /// # Errors
    /// [`Error::Frame`] if a side is out of range or `rgb` has the wrong length.
    pub fn from_rgb8_as(info: FrameInfo, rgb: &[u8]) -> Result<Self> {
        let (w, h) = (info.width, info.height);
        let mut frame = Self::new(info)?;
        if rgb.len() != 3 * w * h {
            return Err(wrong_length(w, h, rgb.len()));
        }
        let plane = Plane {
            data: rgb,
            stride: 3 * w,
        };
        let source = FrameRef::new(FrameInfo::new(PixelFormat::Rgb, w, h), vec![plane])?;
        let mut target = frame.as_mut();
        for (component, plane) in info.planes_of_rgb(source.to_rgb()?) {
            target.write(component, &plane)?;
        }
        if info.format.has_alpha() {
            target.write(Component::A, &vec![1.0; w * h])?;
        }
        Ok(frame)
    }

    /// Returns rows of R, G, B bytes, see [`FrameRef::to_rgb8`].
    ///
    /// # Errors
    /// None for a valid frame.
    pub fn to_rgb8(&self) -> Result<Vec<u8>> {
        self.as_ref().to_rgb8()
    }
}

impl FrameRef<'_> {
    /// Returns rows of R, G, B bytes without padding, full range. Subsampled chroma is interpolated
    /// from its site by a Catmull-Rom filter. Alpha is dropped. Grey gives three equal components.
    ///
    /// # Errors
    /// None for a valid frame.
    pub fn to_rgb8(&self) -> Result<Vec<u8>> {
        let info = self.info();
        let (w, h) = (info.width, info.height);
        let mut out = Frame::new(FrameInfo::new(PixelFormat::Rgb, w, h))?;
        for (component, plane) in RGB.into_iter().zip(self.to_rgb()?) {
            out.as_mut().write(component, &plane)?;
        }
        Ok(out.planes.swap_remove(0))
    }
}

fn wrong_length(width: usize, height: usize, len: usize) -> Error {
    Error::Frame(format!(
        "{len} bytes for a {width}x{height} RGB image: {} are needed",
        3 * width * height
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{ChromaSite, Matrix, Range};

    /// Makes colours smooth enough for 4:2:0.
    fn gradient(w: usize, h: usize) -> Vec<u8> {
        let pixel = |x: usize, y: usize| {
            [
                60 + 120 * x / w,
                80 + 100 * y / h,
                200 - 60 * (x + y) / (w + h),
            ]
        };
        (0..h)
            .flat_map(|y| (0..w).flat_map(move |x| pixel(x, y).map(|v| v as u8)))
            .collect()
    }

    fn worst(a: &[u8], b: &[u8]) -> u8 {
        assert_eq!(a.len(), b.len());
        a.iter()
            .zip(b)
            .map(|(a, b)| a.abs_diff(*b))
            .max()
            .unwrap_or(0)
    }

    #[test]
    fn smooth_pictures_survive_every_format_matrix_range_and_site() {
        let (w, h) = (33, 17);
        let rgb = gradient(w, h);
        for format in PixelFormat::ALL {
            for range in [Range::Limited, Range::Full] {
                for matrix in [Matrix::Bt601, Matrix::Bt709, Matrix::Bt2020] {
                    for cosited in [false, true] {
                        let mut info = FrameInfo::new(format, w, h);
                        info.colorimetry.matrix = matrix;
                        info.colorimetry.range = range;
                        info.chroma_site = ChromaSite {
                            horizontal_cosited: cosited,
                            vertical_cosited: cosited,
                        };
                        if format.is_gray() {
                            continue;
                        }
                        let back = Frame::from_rgb8_as(info, &rgb).unwrap().to_rgb8().unwrap();
                        let worst = worst(&back, &rgb);
                        assert!(worst <= 6, "{info:?}: {worst}");
                        if format.is_rgb() && range == Range::Full {
                            assert_eq!(worst, 0);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn grey_holds_the_luma() {
        let info = FrameInfo::new(PixelFormat::Gray8, 2, 1);
        let frame = Frame::from_rgb8_as(info, &[255, 0, 0, 10, 10, 10]).unwrap();
        assert_eq!(frame.plane(0), [76, 10]);
        assert_eq!(frame.to_rgb8().unwrap(), [76, 76, 76, 10, 10, 10]);
    }

    #[test]
    fn alpha_is_opaque() {
        let info = FrameInfo::new(PixelFormat::Bgra, 1, 1);
        let frame = Frame::from_rgb8_as(info, &[1, 2, 3]).unwrap();
        assert_eq!(frame.plane(0), [3, 2, 1, 255]);
    }

    /// Describes full-range 4:2:0 with this horizontal site.
    fn sited(width: usize, cosited: bool) -> FrameInfo {
        let mut info = FrameInfo::new(PixelFormat::I420, width, 2);
        info.colorimetry.range = Range::Full;
        info.chroma_site.horizontal_cosited = cosited;
        info
    }

    #[test]
    fn chroma_is_interpolated_from_its_site() {
        // The middle of the edge in Cb is at luma column 3 if cosited, 3.5 if centred.
        let blue = |cosited| {
            let mut frame = Frame::new(sited(8, cosited)).unwrap();
            frame.plane_mut(0).fill(100);
            frame.plane_mut(1).copy_from_slice(&[100, 100, 150, 150]);
            frame.plane_mut(2).fill(128);
            let rgb = frame.to_rgb8().unwrap();
            [rgb[3 * 3 + 2], rgb[3 * 4 + 2]]
        };
        let middle = (100.0 + (125.0 - 128.0) * 1.772f32).round() as u8;
        assert_eq!(blue(true)[0], middle);
        let [left, right] = blue(false);
        assert!(
            (left + right).div_ceil(2).abs_diff(middle) <= 1,
            "{left} {right}"
        );
        assert!(left < middle && middle < right, "{left} {right}");
    }

    #[test]
    fn chroma_is_filtered_onto_its_site() {
        // Blue 8x has Cb 4x: at columns 2i if cosited, 2i + 0.5 if centred.
        let rgb: Vec<u8> = (0..16)
            .map(|x| [0, 0, 8 * x])
            .cycle()
            .take(32)
            .flatten()
            .collect();
        for (cosited, at_zero) in [(true, 128), (false, 130)] {
            let frame = Frame::from_rgb8_as(sited(16, cosited), &rgb).unwrap();
            let inner: Vec<u8> = (1..7).map(|i| at_zero + 8 * i).collect();
            assert_eq!(frame.plane(1)[1..7], inner, "cosited: {cosited}");
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        assert!(Frame::from_rgb8(2, 2, &[0; 11]).is_err());
        assert!(Frame::from_rgb8(0, 2, &[]).is_err());
        let info = FrameInfo::new(PixelFormat::I420, 2, 2);
        assert!(Frame::from_rgb8_as(info, &[0; 13]).is_err());
    }
}
