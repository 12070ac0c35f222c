//! Picture files: PNG and JPEG with what is to be kept of them.

use std::{io::Cursor, path::Path};

use anyhow::{Context, Error, Result, bail};
use image::{
    DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, ImageReader,
    codecs::{jpeg::JpegEncoder, png::PngEncoder},
};
use tadsr::{
    frame::{Frame, FrameInfo, PixelFormat},
    train::{
        checkpoint::write_atomically,
        data::{check_size, jpeg_is_whole, read_picture},
    },
};

/// A picture in memory.
pub struct Picture {
    /// GRAY8, RGB or RGBA.
    pub frame: Frame,
    /// The colour profile that came with it.
    profile: Option<Vec<u8>>,
    /// It had more than 8 bits a sample.
    pub reduced: bool,
}

/// Whether a file that begins with `bytes` is a PNG or JPEG picture.
pub fn is_picture(bytes: &[u8]) -> bool {
    let format = image::guess_format(bytes);
    matches!(format, Ok(ImageFormat::Png | ImageFormat::Jpeg))
}

/// Whether the name of `path` ends as that of a PNG or JPEG picture.
pub fn has_picture_name(path: &Path) -> bool {
    format_of(path).is_some()
}

/// Whether what is written to `path` is a JPEG picture.
pub fn is_jpeg_name(path: &Path) -> bool {
    format_of(path) == Some(ImageFormat::Jpeg)
}

fn format_of(path: &Path) -> Option<ImageFormat> {
    let format = ImageFormat::from_path(path).ok()?;
    matches!(format, ImageFormat::Png | ImageFormat::Jpeg).then_some(format)
}

impl Picture {
    /// Reads the picture `path`, upright.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_picture(path).map_err(Error::msg)?;
        if !is_picture(&bytes) {
            bail!("no PNG or JPEG picture, whatever its name says");
        }
        if image::guess_format(&bytes)? == ImageFormat::Jpeg && !jpeg_is_whole(&bytes) {
            bail!("the file ends in the middle of the picture");
        }
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        let mut decoder = reader.into_decoder()?;
        check_size(&decoder).map_err(Error::msg)?;
        let mut profile = decoder.icc_profile().unwrap_or_default();
        let orientation = decoder.orientation()?;
        if decoder.original_color_type() == ExtendedColorType::Cmyk8 {
            // What is decoded is RGB, and the profile is about inks.
            profile = None;
        }
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Self::new(image, profile)
    }

    fn new(image: DynamicImage, profile: Option<Vec<u8>>) -> Result<Self> {
        let colors = image.color();
        let (width, height) = (image.width() as usize, image.height() as usize);
        let (format, bytes) = match (colors.has_color(), colors.has_alpha()) {
            (_, true) => (PixelFormat::Rgba, image.into_rgba8().into_raw()),
            (true, false) => (PixelFormat::Rgb, image.into_rgb8().into_raw()),
            (false, false) => (PixelFormat::Gray8, image.into_luma8().into_raw()),
        };
        let mut frame = Frame::new(FrameInfo::new(format, width, height))?;
        let plane = frame.plane_mut(0);
        if plane.len() != bytes.len() {
            bail!("{width}x{height} pixels in {} bytes", bytes.len());
        }
        plane.copy_from_slice(&bytes);
        Ok(Self {
            frame,
            profile,
            reduced: colors.bits_per_pixel() / u16::from(colors.channel_count()) > 8,
        })
    }

    /// The same picture with other samples.
    pub fn with_frame(&self, frame: Frame) -> Self {
        Self {
            frame,
            profile: self.profile.clone(),
            reduced: self.reduced,
        }
    }

    /// Whether writing to `path` throws alpha away.
    pub fn loses_alpha(&self, path: &Path) -> bool {
        is_jpeg_name(path) && self.frame.info().format.has_alpha()
    }

    /// Writes the picture, all or nothing, in the format that the name asks for.
    pub fn write(&self, path: &Path, quality: u8) -> Result<()> {
        let info = self.frame.info();
        let (width, height) = (u32::try_from(info.width)?, u32::try_from(info.height)?);
        let (mut samples, mut color) = (
            self.frame.plane(0).to_vec(),
            match info.format {
                PixelFormat::Gray8 => ExtendedColorType::L8,
                PixelFormat::Rgba => ExtendedColorType::Rgba8,
                _ => ExtendedColorType::Rgb8,
            },
        );
        if self.loses_alpha(path) {
            samples = samples
                .chunks_exact(4)
                .flat_map(|p| [p[0], p[1], p[2]])
                .collect();
            color = ExtendedColorType::Rgb8;
        }
        let mut file = Vec::new();
        if is_jpeg_name(path) {
            let mut encoder = JpegEncoder::new_with_quality(&mut file, quality);
            self.set_profile(&mut encoder);
            encoder.write_image(&samples, width, height, color)
        } else {
            let mut encoder = PngEncoder::new(&mut file);
            self.set_profile(&mut encoder);
            encoder.write_image(&samples, width, height, color)
        }
        .with_context(|| format!("'{}' cannot be made", path.display()))?;
        Ok(write_atomically(path, &file)?)
    }

    fn set_profile(&self, encoder: &mut impl ImageEncoder) {
        if let Some(profile) = &self.profile {
            // Both formats take profiles.
            let _ = encoder.set_icc_profile(profile.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_alpha_and_profile_survive_a_png_and_all_but_alpha_a_jpeg() {
        let dir = tempfile::tempdir().unwrap();
        for (image, format) in [
            (DynamicImage::new_luma8(5, 3), PixelFormat::Gray8),
            (DynamicImage::new_rgb8(5, 3), PixelFormat::Rgb),
            (DynamicImage::new_rgba8(5, 3), PixelFormat::Rgba),
            (DynamicImage::new_luma_a8(5, 3), PixelFormat::Rgba),
            (DynamicImage::new_rgb16(5, 3), PixelFormat::Rgb),
        ] {
            let deep = format == PixelFormat::Rgb && image.as_rgb16().is_some();
            let mut picture = Picture::new(image, Some(vec![7; 200])).unwrap();
            assert_eq!(
                (picture.frame.info().format, picture.reduced),
                (format, deep)
            );
            let samples = picture.frame.plane_mut(0).iter_mut().enumerate();
            samples.for_each(|(i, s)| *s = 3 * i as u8);
            for name in ["a.png", "a.jpg"] {
                let path = dir.path().join(name);
                picture.write(&path, 95).unwrap();
                let back = Picture::read(&path).unwrap();
                assert_eq!(back.profile, picture.profile, "{format:?} {name}");
                if name == "a.png" {
                    assert_eq!(back.frame.plane(0), picture.frame.plane(0), "{format:?}");
                } else {
                    assert!(!back.frame.info().format.has_alpha());
                }
            }
        }
    }
}
