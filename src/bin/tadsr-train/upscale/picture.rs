//! Picture files with their metadata: PNG and JPEG, read and written; WebP and TIFF, only read.

use std::{
    borrow::Cow,
    io::Cursor,
    path::{Path, PathBuf},
};

use anyhow::{Context, Error, Result, bail, ensure};
use image::{
    DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, ImageReader,
    codecs::jpeg::{JpegEncoder, PixelDensity, PixelDensityUnit},
    metadata::Orientation,
};
use tadsr::{
    frame::{
        Frame, FrameInfo, PixelFormat,
        aspect::{pixel_stretch, reduced},
    },
    train::{
        checkpoint::write_atomically,
        data::{check_size, jpeg_is_whole, read_picture},
    },
};

/// A picture in memory.
pub struct Picture {
    /// GRAY8, RGB or RGBA.
    pub frame: Frame,
    /// Colour profile, gamma, EXIF, density and other metadata, as chunks of a PNG file.
    metadata: png::Info<'static>,
    /// True if the file had more than 8 bits a sample.
    /// Bits per sample of the file. The frame has 8.
    pub bits: u16,
}

/// Formats that are read.
const READ: [ImageFormat; 4] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Tiff,
];

/// Returns true if a file that begins with `bytes` is a picture that can be read.
pub fn is_picture(bytes: &[u8]) -> bool {
    image::guess_format(bytes).is_ok_and(|format| READ.contains(&format))
}

/// Returns true if a file that begins with `bytes` is an AVIF or HEIC picture.
pub fn is_avif(bytes: &[u8]) -> bool {
    const BRANDS: [&[u8]; 4] = [b"avif", b"heic", b"heix", b"mif1"];
    bytes.get(4..8) == Some(b"ftyp") && bytes.get(8..12).is_some_and(|b| BRANDS.contains(&b))
}

/// Returns true if `path` has the extension of a picture that can be read.
pub fn has_readable_name(path: &Path) -> bool {
    ImageFormat::from_path(path).is_ok_and(|format| READ.contains(&format))
}

/// Returns true if `path` has the extension of a picture that can be written: PNG or JPEG.
pub fn has_picture_name(path: &Path) -> bool {
    format_of(path).is_some()
}

/// Returns the name of the output for an input named `path`: the same, or that of a PNG if the
/// format is only read.
pub fn output_name(path: &Path) -> PathBuf {
    if has_picture_name(path) {
        path.into()
    } else {
        path.with_extension("png")
    }
}

/// Returns true if a file named `path` is written as JPEG.
pub fn is_jpeg_name(path: &Path) -> bool {
    format_of(path) == Some(ImageFormat::Jpeg)
}

fn format_of(path: &Path) -> Option<ImageFormat> {
    let format = ImageFormat::from_path(path).ok()?;
    matches!(format, ImageFormat::Png | ImageFormat::Jpeg).then_some(format)
}

impl Picture {
    /// Reads the picture `path` and rotates it upright.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_picture(path).map_err(Error::msg)?;
        let format = image::guess_format(&bytes).ok();
        let Some(format) = format.filter(|format| READ.contains(format)) else {
            bail!("no PNG, JPEG, WebP or TIFF picture, although its name is that of one");
        };
        match format {
            ImageFormat::Jpeg => ensure!(
                jpeg_is_whole(&bytes),
                "the file ends in the middle of the picture"
            ),
            ImageFormat::WebP => check_webp(&bytes)?,
            ImageFormat::Tiff => check_tiff(&bytes)?,
            _ => {}
        }
        let reader = ImageReader::with_format(Cursor::new(&bytes), format);
        let mut decoder = reader.into_decoder()?;
        check_size(&decoder).map_err(Error::msg)?;
        let mut metadata = match format {
            ImageFormat::Png => png_metadata(&bytes)?,
            _ => png::Info::default(),
        };
        if format == ImageFormat::Jpeg {
            metadata.pixel_dims = jpeg_density(&bytes);
        }
        metadata.icc_profile = decoder.icc_profile().unwrap_or_default().map(Cow::Owned);
        let orientation = decoder.orientation()?;
        metadata.exif_metadata = decoder.exif_metadata().unwrap_or_default().map(|mut exif| {
            // The orientation is applied below.
            let _ = Orientation::remove_from_exif_chunk(&mut exif);
            Cow::Owned(exif)
        });
        if let ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16 = decoder.original_color_type()
        {
            // The decoded picture is RGB, but the profile describes CMYK.
            metadata.icc_profile = None;
        }
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Self::new(image, metadata)
    }

    fn new(image: DynamicImage, metadata: png::Info<'static>) -> Result<Self> {
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
            metadata,
            bits: colors.bits_per_pixel() / u16::from(colors.channel_count()),
        })
    }

    /// Returns the same picture with other samples. The density states the shape of the pixels if
    /// the size has another shape.
    pub fn with_frame(&self, frame: Frame) -> Self {
        let size = |frame: &Frame| (frame.info().width, frame.info().height);
        let mut metadata = self.metadata.clone();
        if let Some(stretch) = pixel_stretch(size(&self.frame), size(&frame)) {
            metadata.pixel_dims = Some(stretched(metadata.pixel_dims, stretch));
        }
        Self {
            frame,
            metadata,
            bits: self.bits,
        }
    }

    /// Returns true if the picture has alpha that a file named `path` cannot contain.
    pub fn loses_alpha(&self, path: &Path) -> bool {
        is_jpeg_name(path) && self.frame.info().format.has_alpha()
    }

    /// Returns true if a file named `path` cannot describe the picture's colours.
    pub fn loses_colours(&self, path: &Path) -> bool {
        let metadata = &self.metadata;
        is_jpeg_name(path)
            && metadata.icc_profile.is_none()
            && (metadata.source_gamma.is_some() && metadata.srgb.is_none()
                || metadata.source_chromaticities.is_some() && metadata.srgb.is_none()
                || metadata.coding_independent_code_points.is_some())
    }

    /// Writes the picture, all or nothing, in the format for the extension of `path`.
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
        let file = if is_jpeg_name(path) {
            self.jpeg(&samples, (width, height), color, quality)
        } else {
            self.png(&samples, (width, height), color)
        };
        let file = file.with_context(|| format!("'{}' cannot be created", path.display()))?;
        Ok(write_atomically(path, &file)?)
    }

    fn jpeg(
        &self,
        samples: &[u8],
        (width, height): (u32, u32),
        color: ExtendedColorType,
        quality: u8,
    ) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut file, quality);
        if let Some(profile) = &self.metadata.icc_profile {
            encoder.set_icc_profile(profile.to_vec())?;
        }
        if let Some(exif) = &self.metadata.exif_metadata {
            encoder.set_exif_metadata(exif.to_vec())?;
        }
        if let Some(density) = &self.metadata.pixel_dims {
            encoder.set_pixel_density(jfif_density(density));
        }
        encoder.write_image(samples, width, height, color)?;
        Ok(file)
    }

    fn png(
        &self,
        samples: &[u8],
        (width, height): (u32, u32),
        color: ExtendedColorType,
    ) -> Result<Vec<u8>> {
        let mut info = self.metadata.clone();
        (info.width, info.height) = (width, height);
        info.bit_depth = png::BitDepth::Eight;
        info.color_type = match color {
            ExtendedColorType::L8 => png::ColorType::Grayscale,
            ExtendedColorType::Rgba8 => png::ColorType::Rgba,
            _ => png::ColorType::Rgb,
        };
        let mut file = Vec::new();
        let mut encoder = png::Encoder::with_info(&mut file, info)?;
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(samples)?;
        writer.finish()?;
        Ok(file)
    }
}

/// Returns the metadata of a PNG file.
///
/// # Errors
/// If the file is animated: only its first picture would be kept.
fn png_metadata(bytes: &[u8]) -> Result<png::Info<'static>> {
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    let info = reader.info();
    if let Some(animation) = info.animation_control {
        ensure!(
            animation.num_frames < 2,
            "an animation of {} pictures: convert it to a video first, for example with \
             'ffmpeg -i in.png out.mkv'",
            animation.num_frames
        );
    }
    let mut metadata = png::Info::default();
    metadata.pixel_dims = info.pixel_dims;
    metadata.source_gamma = info.gama_chunk;
    metadata.source_chromaticities = info.chrm_chunk;
    metadata.srgb = info.srgb;
    metadata.coding_independent_code_points = info.coding_independent_code_points;
    metadata.mastering_display_color_volume = info.mastering_display_color_volume;
    metadata.content_light_level = info.content_light_level;
    metadata.uncompressed_latin1_text = info.uncompressed_latin1_text.clone();
    metadata.compressed_latin1_text = info.compressed_latin1_text.clone();
    metadata.utf8_text = info.utf8_text.clone();
    Ok(metadata)
}

/// Refuses an animated WebP file, of which only the first picture would be kept.
fn check_webp(bytes: &[u8]) -> Result<()> {
    // Chunks of a RIFF file: name, length, content, filler to an even length.
    let (mut at, mut pictures) = (12_usize, 0);
    while let Some(&[a, b, c, d, ref length @ ..]) = bytes.get(at..at.saturating_add(8)) {
        pictures += usize::from([a, b, c, d] == *b"ANMF");
        let length = length
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        at = at
            .saturating_add(8)
            .saturating_add(length.next_multiple_of(2));
    }
    ensure!(
        pictures < 2,
        "an animation of {pictures} pictures: convert it to a video or to PNG files first, for \
         example with 'magick in.webp -coalesce out-%04d.png'"
    );
    Ok(())
}

/// Refuses a TIFF file of several pictures, of which only the first would be kept, and one that
/// begins with a preview.
fn check_tiff(bytes: &[u8]) -> Result<()> {
    let previews = tiff_previews(bytes);
    let pictures = previews.iter().filter(|is_preview| !**is_preview).count();
    ensure!(
        previews.first() != Some(&true),
        "the first picture of the file is a preview, as in raw photos: convert it to a PNG first"
    );
    ensure!(
        pictures < 2,
        "a file of {pictures} pictures: split it first, for example with \
         'magick in.tif out-%04d.png'"
    );
    Ok(())
}

/// Returns for each picture of a TIFF file whether it is a preview of another.
fn tiff_previews(bytes: &[u8]) -> Vec<bool> {
    const MAX_PICTURES: usize = 10_000;
    const NEW_SUBFILE_TYPE: usize = 254;
    let is_big_endian = bytes.starts_with(b"MM");
    let number = |at: usize, size: usize| {
        let field = bytes.get(at..at.checked_add(size)?)?;
        let join = |sum, byte: &u8| sum << 8 | usize::from(*byte);
        Some(if is_big_endian {
            field.iter().fold(0, join)
        } else {
            field.iter().rev().fold(0, join)
        })
    };
    let mut previews = Vec::new();
    let mut at = number(4, 4).unwrap_or(0);
    while let (1.., Some(entries)) = (at, number(at, 2)) {
        let entry = |i| at + 2 + 12 * i;
        let kind = (0..entries).find(|i| number(entry(*i), 2) == Some(NEW_SUBFILE_TYPE));
        let kind = kind.and_then(|i| number(entry(i) + 8, 4)).unwrap_or(0);
        previews.push(kind & 1 == 1);
        at = number(entry(entries), 4).unwrap_or(0);
        if previews.len() == MAX_PICTURES {
            // The list may be a circle.
            break;
        }
    }
    previews
}

/// Returns the density of pixels that are wider by a factor.
fn stretched(
    density: Option<png::PixelDimensions>,
    (num, den): (u64, u64),
) -> png::PixelDimensions {
    let unit = density.map_or(png::Unit::Unspecified, |density| density.unit);
    let (x, y) = density.map_or((1, 1), |d| (u64::from(d.xppu), u64::from(d.yppu)));
    let (x, y) = match unit {
        png::Unit::Meter => (x, (y as f64 * num as f64 / den as f64).round() as u64),
        png::Unit::Unspecified => reduced(x.max(1) * den, y.max(1) * num),
    };
    let ppu = |v: u64| u32::try_from(v).unwrap_or(u32::MAX).max(1);
    let (xppu, yppu) = (ppu(x), ppu(y));
    png::PixelDimensions { xppu, yppu, unit }
}

/// Returns the density in the JFIF header of a JPEG file.
fn jpeg_density(bytes: &[u8]) -> Option<png::PixelDimensions> {
    let header = bytes.get(2..)?;
    if header.get(..2)? != [0xFF, 0xE0] || header.get(4..9)? != b"JFIF\0" {
        return None;
    }
    let value = |at: usize| {
        let bytes = [*header.get(at)?, *header.get(at + 1)?];
        Some(u32::from(u16::from_be_bytes(bytes)))
    };
    let (unit, x, y) = (*header.get(11)?, value(12)?, value(14)?);
    let per_metre = |density: u32, inches: f64| (f64::from(density) * inches).round() as u32;
    let (xppu, yppu, unit) = match unit {
        1 => (
            per_metre(x, 1.0 / 0.0254),
            per_metre(y, 1.0 / 0.0254),
            png::Unit::Meter,
        ),
        2 => (100 * x, 100 * y, png::Unit::Meter),
        _ => (x, y, png::Unit::Unspecified),
    };
    Some(png::PixelDimensions { xppu, yppu, unit })
}

fn jfif_density(density: &png::PixelDimensions) -> PixelDensity {
    let per_inch = |ppu: u32| (f64::from(ppu) * 0.0254).round() as u16;
    let (x, y, unit) = match density.unit {
        png::Unit::Meter => {
            let (x, y) = (per_inch(density.xppu), per_inch(density.yppu));
            (x, y, PixelDensityUnit::Inches)
        }
        png::Unit::Unspecified => {
            let value = |ppu: u32| u16::try_from(ppu).unwrap_or(u16::MAX);
            let (x, y) = (value(density.xppu), value(density.yppu));
            (x, y, PixelDensityUnit::PixelAspectRatio)
        }
    };
    PixelDensity {
        density: (x.max(1), y.max(1)),
        unit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_alpha_profile_and_density_survive_a_png_and_all_but_alpha_a_jpeg() {
        let dir = tempfile::tempdir().unwrap();
        for (image, format) in [
            (DynamicImage::new_luma8(5, 3), PixelFormat::Gray8),
            (DynamicImage::new_rgb8(5, 3), PixelFormat::Rgb),
            (DynamicImage::new_rgba8(5, 3), PixelFormat::Rgba),
            (DynamicImage::new_luma_a8(5, 3), PixelFormat::Rgba),
            (DynamicImage::new_rgb16(5, 3), PixelFormat::Rgb),
        ] {
            let mut info = png::Info::default();
            info.icc_profile = Some(vec![7; 200].into());
            info.pixel_dims = Some(png::PixelDimensions {
                xppu: 11_811,
                yppu: 11_811,
                unit: png::Unit::Meter,
            });
            let deep = format == PixelFormat::Rgb && image.as_rgb16().is_some();
            let mut picture = Picture::new(image, info.clone()).unwrap();
            assert_eq!(
                (picture.frame.info().format, picture.bits > 8),
                (format, deep)
            );
            let samples = picture.frame.plane_mut(0).iter_mut().enumerate();
            samples.for_each(|(i, s)| *s = 3 * i as u8);
            for name in ["a.png", "a.jpg"] {
                let path = dir.path().join(name);
                picture.write(&path, 95).unwrap();
                let back = Picture::read(&path).unwrap();
                let (was, is) = (&picture.metadata, &back.metadata);
                assert_eq!(is.icc_profile, was.icc_profile, "{format:?} {name}");
                let density = |m: &png::Info| m.pixel_dims.map(|d| (d.xppu, d.yppu));
                assert_eq!(density(is), density(was), "{format:?} {name}");
                if name == "a.png" {
                    assert_eq!(back.frame.plane(0), picture.frame.plane(0), "{format:?}");
                } else {
                    assert!(!back.frame.info().format.has_alpha());
                }
            }
        }
    }
}
