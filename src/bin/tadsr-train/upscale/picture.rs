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
        data::{check_size, jpeg_is_whole, picture_format, read_picture},
    },
};

use super::tiff;

/// A picture in memory.
pub struct Picture {
    /// GRAY8, RGB or RGBA; GRAY16 or RGBA64 with 16 bits a sample.
    pub frame: Frame,
    /// Colour profile, gamma, EXIF, density and other metadata, as chunks of a PNG file.
    metadata: png::Info<'static>,
    /// Bits per sample of the file. The frame may have fewer.
    pub bits: u16,
    has_alpha: bool,
}

/// Keyword of the text of a PNG file with XMP metadata.
const XMP: &str = "XML:com.adobe.xmp";

/// Formats that are read.
const READ: [ImageFormat; 4] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Tiff,
];

/// Returns true if a file that begins with `bytes` is a picture that can be read.
pub fn is_picture(bytes: &[u8]) -> bool {
    picture_format(bytes).is_some_and(|format| READ.contains(&format))
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
    /// Reads the picture `path` and rotates it upright. The frame has more than 8 bits a sample
    /// only if the file has, and `deep` is set.
    pub fn read(path: &Path, deep: bool) -> Result<Self> {
        let bytes = read_picture(path).map_err(Error::msg)?;
        let format = picture_format(&bytes).filter(|format| READ.contains(format));
        let Some(format) = format else {
            bail!("no PNG, JPEG, WebP or TIFF picture, although its name is that of one");
        };
        match format {
            ImageFormat::Jpeg => ensure!(
                jpeg_is_whole(&bytes),
                "the file ends in the middle of the picture"
            ),
            ImageFormat::WebP => check_webp(&bytes)?,
            ImageFormat::Tiff => tiff::check(&bytes)?,
            _ => {}
        }
        let reader = ImageReader::with_format(Cursor::new(&bytes), format);
        let mut decoder = reader.into_decoder()?;
        check_size(&decoder).map_err(Error::msg)?;
        let mut metadata = match format {
            ImageFormat::Png => png_metadata(&bytes)?,
            _ => png::Info::default(),
        };
        match format {
            ImageFormat::Jpeg => metadata.pixel_dims = jpeg_density(&bytes),
            ImageFormat::Tiff => metadata.pixel_dims = tiff::density(&bytes),
            _ => {}
        }
        metadata.icc_profile = decoder.icc_profile().unwrap_or_default().map(Cow::Owned);
        let orientation = decoder.orientation()?;
        metadata.exif_metadata = decoder.exif_metadata().unwrap_or_default().map(|mut exif| {
            // The orientation is applied below.
            let _ = Orientation::remove_from_exif_chunk(&mut exif);
            Cow::Owned(exif)
        });
        if format != ImageFormat::Png
            && let Some(xmp) = decoder.xmp_metadata().unwrap_or_default()
            && let Ok(text) = String::from_utf8(xmp)
        {
            let chunk = png::text_metadata::ITXtChunk::new(XMP, upright(text));
            metadata.utf8_text.push(chunk);
        }
        if let ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16 = decoder.original_color_type()
        {
            // The decoded picture is RGB, but the profile describes CMYK.
            metadata.icc_profile = None;
        }
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Self::new(image, metadata, deep)
    }

    fn new(image: DynamicImage, metadata: png::Info<'static>, deep: bool) -> Result<Self> {
        let colors = image.color();
        let (width, height) = (image.width() as usize, image.height() as usize);
        let bits = colors.bits_per_pixel() / u16::from(colors.channel_count());
        let (has_color, has_alpha) = (colors.has_color(), colors.has_alpha());
        let little_endian = |samples: Vec<u16>| -> Vec<u8> {
            samples.iter().flat_map(|v| v.to_le_bytes()).collect()
        };
        let name = match (has_color, has_alpha) {
            (false, false) => "GRAY16_LE",
            _ => "RGBA64_LE",
        };
        let deep_format = PixelFormat::from_name(name).filter(|_| deep && bits > 8);
        let (format, bytes) = match (has_color, has_alpha, deep_format) {
            (false, false, Some(format)) => (format, little_endian(image.into_luma16().into_raw())),
            (.., Some(format)) => (format, little_endian(image.into_rgba16().into_raw())),
            (_, true, None) => (PixelFormat::Rgba, image.into_rgba8().into_raw()),
            (true, false, None) => (PixelFormat::Rgb, image.into_rgb8().into_raw()),
            (false, false, None) => (PixelFormat::Gray8, image.into_luma8().into_raw()),
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
            bits,
            has_alpha,
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
            has_alpha: self.has_alpha,
        }
    }

    /// Returns true if the picture has alpha that a file named `path` cannot contain.
    pub fn loses_alpha(&self, path: &Path) -> bool {
        is_jpeg_name(path) && self.has_alpha
    }

    /// Returns true if texts of the picture cannot be kept in a file named `path`.
    pub fn loses_texts(&self, path: &Path) -> bool {
        let texts = &self.metadata;
        let other = texts.utf8_text.iter().any(|text| text.keyword != XMP);
        let latin = texts.uncompressed_latin1_text.len() + texts.compressed_latin1_text.len();
        let long = self.xmp().is_some_and(|xmp| xmp_length(&xmp).is_none());
        is_jpeg_name(path) && (other || long || latin > 0)
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
        let mut samples = self.frame.plane(0).to_vec();
        let is_deep = info.format.depth() > 8;
        let mut channels = info.format.components().len();
        if channels == 4 && (is_jpeg_name(path) || !self.has_alpha) {
            let pixel = if is_deep { 8 } else { 4 };
            let pixels = samples.chunks_exact(pixel);
            samples = pixels.flat_map(|p| &p[..pixel / 4 * 3]).copied().collect();
            channels = 3;
        }
        if is_deep {
            ensure!(!is_jpeg_name(path), "JPEG has 8 bits a sample");
            // PNG stores the high byte first.
            samples
                .as_chunks_mut::<2>()
                .0
                .iter_mut()
                .for_each(|v| v.reverse());
        }
        let color = match (channels, is_deep) {
            (1, false) => ExtendedColorType::L8,
            (1, true) => ExtendedColorType::L16,
            (4, false) => ExtendedColorType::Rgba8,
            (4, true) => ExtendedColorType::Rgba16,
            (_, true) => ExtendedColorType::Rgb16,
            (_, false) => ExtendedColorType::Rgb8,
        };
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
        if let Some(xmp) = self.xmp() {
            insert_xmp(&mut file, &xmp);
        }
        Ok(file)
    }

    /// Returns the XMP metadata, which PNG keeps as a text.
    fn xmp(&self) -> Option<String> {
        let mut texts = self.metadata.utf8_text.iter();
        texts.find(|text| text.keyword == XMP)?.get_text().ok()
    }

    fn png(
        &self,
        samples: &[u8],
        (width, height): (u32, u32),
        color: ExtendedColorType,
    ) -> Result<Vec<u8>> {
        let mut info = self.metadata.clone();
        (info.width, info.height) = (width, height);
        info.bit_depth = match color {
            ExtendedColorType::L16 | ExtendedColorType::Rgb16 | ExtendedColorType::Rgba16 => {
                png::BitDepth::Sixteen
            }
            _ => png::BitDepth::Eight,
        };
        info.color_type = match color {
            ExtendedColorType::L8 | ExtendedColorType::L16 => png::ColorType::Grayscale,
            ExtendedColorType::Rgba8 | ExtendedColorType::Rgba16 => png::ColorType::Rgba,
            _ => png::ColorType::Rgb,
        };
        let mut file = Vec::new();
        let colors = color_chunks(&info);
        let mut encoder = png::Encoder::with_info(&mut file, info)?;
        encoder.set_compression(png::Compression::Fast);
        let mut writer = encoder.write_header()?;
        for (name, content) in colors {
            writer.write_chunk(name, &content)?;
        }
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

/// Returns XMP metadata of a picture that was rotated upright.
fn upright(mut xmp: String) -> String {
    for turned in '2'..='8' {
        for (before, after) in [("tiff:Orientation=\"", "\""), ("<tiff:Orientation>", "<")] {
            let stated = format!("{before}{turned}{after}");
            xmp = xmp.replace(&stated, &format!("{before}1{after}"));
        }
    }
    xmp
}

/// Start of a segment with XMP metadata.
const XMP_SEGMENT: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";

/// Returns the length of the segment of a JPEG file with `xmp`; `None` if it is too long for one.
fn xmp_length(xmp: &str) -> Option<u16> {
    u16::try_from(2 + XMP_SEGMENT.len() + xmp.len()).ok()
}

/// Inserts XMP metadata into a JPEG file after its first segment. Metadata that is too long for a
/// segment is left out.
fn insert_xmp(jpeg: &mut Vec<u8>, xmp: &str) {
    const MARKER: [u8; 2] = [0xFF, 0xE1];
    let Some(length) = xmp_length(xmp) else {
        return;
    };
    // A JFIF header comes first.
    let at = match jpeg.get(2..6) {
        Some(&[0xFF, 0xE0, high, low]) => 4 + usize::from(u16::from_be_bytes([high, low])),
        _ => 2,
    };
    let length = length.to_be_bytes();
    let segment = [&MARKER[..], &length, XMP_SEGMENT, xmp.as_bytes()].concat();
    jpeg.splice(at..at, segment);
}

/// Returns the chunks of colours and high dynamic range that the encoder does not write.
fn color_chunks(info: &png::Info) -> Vec<(png::chunk::ChunkType, Vec<u8>)> {
    let mut chunks = Vec::new();
    if let Some(code) = info.coding_independent_code_points {
        let content = vec![
            code.color_primaries,
            code.transfer_function,
            code.matrix_coefficients,
            u8::from(code.is_video_full_range_image),
        ];
        chunks.push((png::chunk::cICP, content));
    }
    if let Some(display) = info.mastering_display_color_volume {
        let c = display.chromaticities;
        let points = [c.red, c.green, c.blue, c.white];
        let points = points.iter().flat_map(|(x, y)| [x, y]);
        // In units of 0.00002, those of the structure are 0.00001.
        let points = points.flat_map(|v| ((v.into_scaled() / 2) as u16).to_be_bytes());
        let luminances = [display.max_luminance, display.min_luminance];
        let content = points.chain(luminances.into_iter().flat_map(u32::to_be_bytes));
        chunks.push((png::chunk::mDCV, content.collect()));
    }
    if let Some(light) = info.content_light_level {
        let levels = [
            light.max_content_light_level,
            light.max_frame_average_light_level,
        ];
        let content = levels.into_iter().flat_map(u32::to_be_bytes);
        chunks.push((png::chunk::cLLI, content.collect()));
    }
    chunks
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
            let mut picture = Picture::new(image, info.clone(), false).unwrap();
            assert_eq!(
                (picture.frame.info().format, picture.bits > 8),
                (format, deep)
            );
            let samples = picture.frame.plane_mut(0).iter_mut().enumerate();
            samples.for_each(|(i, s)| *s = 3 * i as u8);
            let xmp = "<x tiff:Orientation=\"1\" title=\"T\u{fc}r\"/>";
            let chunk = png::text_metadata::ITXtChunk::new(XMP, xmp);
            picture.metadata.utf8_text.push(chunk);
            for name in ["a.png", "a.jpg"] {
                let path = dir.path().join(name);
                picture.write(&path, 95).unwrap();
                let back = Picture::read(&path, false).unwrap();
                let (was, is) = (&picture.metadata, &back.metadata);
                assert_eq!(is.icc_profile, was.icc_profile, "{format:?} {name}");
                assert_eq!(back.xmp().as_deref(), Some(xmp), "{format:?} {name}");
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

    #[test]
    fn the_orientation_of_xmp_is_that_of_the_rotated_picture() {
        let text =
            |n| format!("<a tiff:Orientation=\"{n}\"><tiff:Orientation>{n}</tiff:Orientation>");
        assert_eq!(upright(text(6)), text(1));
        assert_eq!(upright(text(1)), text(1));
    }

    #[test]
    fn colours_of_high_dynamic_range_survive_a_png() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        let mut info = png::Info::default();
        info.coding_independent_code_points = Some(png::CodingIndependentCodePoints {
            color_primaries: 9,
            transfer_function: 16,
            matrix_coefficients: 0,
            is_video_full_range_image: true,
        });
        let scaled = |x, y| (png::ScaledFloat::new(x), png::ScaledFloat::new(y));
        info.mastering_display_color_volume = Some(png::MasteringDisplayColorVolume {
            chromaticities: png::SourceChromaticities {
                white: scaled(0.3127, 0.329),
                red: scaled(0.708, 0.292),
                green: scaled(0.17, 0.797),
                blue: scaled(0.131, 0.046),
            },
            max_luminance: 10_000_000,
            min_luminance: 50,
        });
        info.content_light_level = Some(png::ContentLightLevelInfo {
            max_content_light_level: 10_000_000,
            max_frame_average_light_level: 4_000_000,
        });
        let picture = Picture::new(DynamicImage::new_rgb16(5, 3), info, true).unwrap();
        picture.write(&path, 95).unwrap();
        let back = Picture::read(&path, true).unwrap();
        let colors = |m: &png::Info| {
            (
                m.coding_independent_code_points,
                m.mastering_display_color_volume,
                m.content_light_level,
            )
        };
        assert!(colors(&picture.metadata).0.is_some());
        assert_eq!(colors(&back.metadata), colors(&picture.metadata));
    }

    #[test]
    fn samples_of_16_bits_survive_a_png() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        for image in [
            DynamicImage::new_luma16(5, 3),
            DynamicImage::new_luma_a16(5, 3),
            DynamicImage::new_rgb16(5, 3),
            DynamicImage::new_rgba16(5, 3),
        ] {
            let color = image.color();
            let mut picture = Picture::new(image, png::Info::default(), true).unwrap();
            assert_eq!(picture.frame.info().format.depth(), 16);
            let samples = picture.frame.plane_mut(0).iter_mut().enumerate();
            samples.for_each(|(i, s)| *s = (37 * i + i / 7) as u8);
            picture.write(&path, 95).unwrap();
            let back = Picture::read(&path, true).unwrap();
            let format = back.frame.info().format;
            let (is, was) = (back.frame.plane(0), picture.frame.plane(0));
            if color.has_alpha() || !color.has_color() {
                assert_eq!(is, was, "{color:?}");
            } else {
                let colors = |plane: &[u8]| -> Vec<u8> {
                    plane.chunks(8).flat_map(|p| &p[..6]).copied().collect()
                };
                assert_eq!(colors(is), colors(was), "{color:?}");
                assert!(!back.has_alpha);
            }
            assert_eq!(format, picture.frame.info().format);
            assert!(picture.write(&dir.path().join("a.jpg"), 95).is_err());
            assert_eq!(
                Picture::read(&path, false)
                    .unwrap()
                    .frame
                    .info()
                    .format
                    .depth(),
                8
            );
        }
    }

    /// Returns a TIFF file with 64-bit offsets. Each picture has 2x1 grey pixels, and is a preview
    /// if its value is true.
    fn big_tiff(is_big_endian: bool, previews: &[bool]) -> Vec<u8> {
        let mut file = if is_big_endian {
            b"MM".to_vec()
        } else {
            b"II".to_vec()
        };
        let put = |file: &mut Vec<u8>, value: u64, size: usize| {
            let bytes = value.to_be_bytes();
            let bytes = bytes[8 - size..].iter();
            if is_big_endian {
                file.extend(bytes);
            } else {
                file.extend(bytes.rev());
            }
        };
        let header = [(43, 2), (8, 2), (0, 2), (16, 8)];
        header
            .into_iter()
            .for_each(|(value, size)| put(&mut file, value, size));
        for (i, is_preview) in previews.iter().enumerate() {
            let at = file.len() as u64;
            // Tag, type (16 or 64 bits), value.
            let entries = [
                (254, 4, u64::from(*is_preview)),
                (256, 3, 2),
                (257, 3, 1),
                (258, 3, 8),
                (259, 3, 1),
                (262, 3, 1),
                (273, 16, at + 8 + 20 * 9 + 8),
                (278, 3, 1),
                (279, 16, 2),
            ];
            put(&mut file, entries.len() as u64, 8);
            for (tag, kind, value) in entries {
                put(&mut file, tag, 2);
                put(&mut file, kind, 2);
                put(&mut file, 1, 8);
                let size = match kind {
                    3 => 2,
                    4 => 4,
                    _ => 8,
                };
                put(&mut file, value, size);
                file.extend(vec![0; 8 - size]);
            }
            let next = at + 8 + 20 * 9 + 8 + 2;
            put(&mut file, if i + 1 < previews.len() { next } else { 0 }, 8);
            file.extend([50, 200]);
        }
        file
    }

    #[test]
    fn tiff_files_with_64_bit_offsets_are_read_and_their_pictures_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tif");
        for is_big_endian in [false, true] {
            let read = |previews: &[bool]| {
                std::fs::write(&path, big_tiff(is_big_endian, previews)).unwrap();
                Picture::read(&path, false)
            };
            for previews in [&[false][..], &[false, true]] {
                let picture = read(previews).unwrap();
                assert_eq!(picture.frame.plane(0), [50, 200]);
            }
            let refused = |previews| read(previews).map(drop).unwrap_err().to_string();
            assert!(refused(&[false, false]).contains("2 pictures"));
            assert!(refused(&[true, false]).contains("preview"));
            assert!(is_picture(&big_tiff(is_big_endian, &[false])[..16]));
        }
    }
}
