//! Filters that degradation uses: downscale kernels, convolutions, JPEG.

use std::io::Cursor;

use image::{ExtendedColorType, ImageFormat, ImageReader, codecs::jpeg::JpegEncoder};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, frame::resample::Kernel, train::patch::Patch};

/// Weights of the downscale kernels; they need not sum to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KernelWeights {
    pub catmull_rom: f64,
    pub area: f64,
    pub bilinear: f64,
    pub lanczos3: f64,
}

/// Mostly the sharp kernels that scalers use by default. Each softer kernel in the mixture reduces
/// the gain on all others, because a small network cannot tell them apart.
impl Default for KernelWeights {
    fn default() -> Self {
        Self {
            catmull_rom: 0.6,
            area: 0.1,
            bilinear: 0.0,
            lanczos3: 0.3,
        }
    }
}

impl KernelWeights {
    /// Returns weights of one kernel only.
    pub fn catmull_rom() -> Self {
        Self {
            catmull_rom: 1.0,
            area: 0.0,
            bilinear: 0.0,
            lanczos3: 0.0,
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] for weights that are negative or all zero.
    pub(super) fn check(&self) -> Result<()> {
        let weights = [self.catmull_rom, self.area, self.bilinear, self.lanczos3];
        let sum: f64 = weights.iter().sum();
        if weights.iter().any(|w| *w < 0.0) || !(sum > 0.0 && sum.is_finite()) {
            let text = "kernels: weights are not negative and not all zero";
            return Err(Error::Setting(text.into()));
        }
        Ok(())
    }

    pub(super) fn sample<R: Rng + ?Sized>(&self, rng: &mut R) -> Kernel {
        let weighted = [
            (Kernel::CatmullRom, self.catmull_rom),
            (Kernel::Area, self.area),
            (Kernel::Bilinear, self.bilinear),
            (Kernel::Lanczos3, self.lanczos3),
        ];
        let mut left = rng.random::<f64>() * weighted.iter().map(|w| w.1).sum::<f64>();
        for (kernel, weight) in weighted {
            left -= weight;
            if left < 0.0 {
                return kernel;
            }
        }
        Kernel::CatmullRom
    }
}

/// Encodes interleaved 8-bit R'G'B' as a baseline 4:4:4 JPEG of `quality`, 1 to 100, and decodes it
/// again.
///
/// # Errors
/// [`Error::Frame`] when a side is 0 or above 65535, or the length of `bytes` does not fit the
/// sides.
pub fn jpeg_round_trip(bytes: &[u8], width: usize, height: usize, quality: u8) -> Result<Vec<u8>> {
    let failed = |why: String| Error::Frame(format!("JPEG of {width}x{height} pixels: {why}"));
    let (Ok(w), Ok(h)) = (u16::try_from(width), u16::try_from(height)) else {
        return Err(failed("a side is above 65535".into()));
    };
    if bytes.len() != 3 * width * height {
        return Err(failed(format!("{} bytes given", bytes.len())));
    }
    let mut file = Vec::new();
    JpegEncoder::new_with_quality(&mut file, quality)
        .encode(bytes, w.into(), h.into(), ExtendedColorType::Rgb8)
        .map_err(|e| failed(e.to_string()))?;
    let decoded = ImageReader::with_format(Cursor::new(file), ImageFormat::Jpeg)
        .decode()
        .map_err(|e| failed(e.to_string()))?;
    Ok(decoded.into_rgb8().into_raw())
}

/// Convolves with `taps` (dx, dy, weight). Weights are scaled to a sum of 1; borders repeat.
pub(super) fn convolve(picture: &mut Patch, mut taps: Vec<(isize, isize, f32)>) {
    let (w, h) = (picture.width, picture.height);
    let sum: f32 = taps.iter().map(|t| t.2).sum();
    taps.iter_mut().for_each(|t| t.2 /= sum);
    let rx = taps.iter().map(|t| t.0.unsigned_abs()).max().unwrap_or(0);
    let padded_w = w + 2 * rx;
    for plane in picture.rgb.chunks_exact_mut(w * h) {
        let mut src = Vec::with_capacity(padded_w * h);
        for row in plane.chunks_exact(w) {
            src.extend(std::iter::repeat_n(row[0], rx));
            src.extend_from_slice(row);
            src.extend(std::iter::repeat_n(row[w - 1], rx));
        }
        plane.fill(0.0);
        for (y, dst) in plane.chunks_exact_mut(w).enumerate() {
            for &(dx, dy, k) in &taps {
                let row = y.saturating_add_signed(dy).min(h - 1) * padded_w;
                let from = (row + rx).saturating_add_signed(dx);
                for (d, s) in dst.iter_mut().zip(&src[from..][..w]) {
                    *d += k * s;
                }
            }
        }
    }
}

/// Returns a number that depends on the image. Images that share their random numbers must not
/// share their noise.
pub(super) fn content(picture: &Patch) -> u64 {
    u64::from(picture.rgb.iter().sum::<f32>().to_bits())
}
