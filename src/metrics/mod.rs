//! Image quality metrics: PSNR and SSIM of luma, LPIPS, and tables of them.

mod lpips;
mod psnr;
mod report;
mod ssim;

pub use lpips::{Lpips, LpipsFeatures};
pub use psnr::psnr;
pub use report::{Mean, Report, Row};
pub use ssim::ssim;

use crate::{Error, Result, frame::Matrix};

/// A picture to be judged: interleaved 8-bit R'G'B', full range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// A plane of samples on the scale 0..255.
#[derive(Clone, Debug, PartialEq)]
pub struct Gray {
    pub width: usize,
    pub height: usize,
    /// Row-major, `width * height` samples.
    pub data: Vec<f32>,
}

impl Picture {
    /// # Errors
    /// [`Error::Frame`] when `rgb` does not hold three bytes for each of `width` x `height` pixels.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self> {
        let need = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if need != Some(rgb.len()) {
            return Err(Error::Frame(format!(
                "{} bytes are no {width}x{height} RGB picture: three bytes a pixel are needed",
                rgb.len()
            )));
        }
        Ok(Self { width, height, rgb })
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn height(&self) -> usize {
        self.height
    }

    /// Interleaved R'G'B' bytes.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Without `border` pixels on each side; empty where nothing is left.
    pub fn cropped(&self, border: usize) -> Self {
        let width = self.width.saturating_sub(2 * border);
        let height = self.height.saturating_sub(2 * border);
        let rows = self.rgb.chunks_exact(3 * self.width.max(1)).skip(border);
        let rgb = rows
            .take(height)
            .flat_map(|row| row.iter().skip(3 * border).take(3 * width))
            .copied()
            .collect();
        Self { width, height, rgb }
    }

    /// Luma as the super-resolution literature takes it: BT.601, limited range (16 black, 235 white), not rounded.
    pub fn luma(&self) -> Gray {
        let (kr, kg, kb) = Matrix::Bt601.luma_weights();
        let pixels = self.rgb.chunks_exact(3);
        let data = pixels
            .map(|p| kr * f32::from(p[0]) + kg * f32::from(p[1]) + kb * f32::from(p[2]))
            .map(|full| 16.0 + 219.0 / 255.0 * full)
            .collect();
        Gray {
            width: self.width,
            height: self.height,
            data,
        }
    }
}
