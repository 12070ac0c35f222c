//! Quality metrics: PSNR, SSIM and MS-SSIM of luma, LPIPS, NIQE, temporal stability, and tables.

mod flow;
mod lpips;
mod niqe;
mod psnr;
mod report;
mod ssim;
mod table;
mod temporal;

pub use flow::Flow;
pub use lpips::{Lpips, LpipsFeatures};
pub use niqe::Niqe;
pub use psnr::psnr;
pub use report::{Comparison, Gate, Limit, Mean, Report, Row};
pub use ssim::{ms_ssim, ssim};
pub use table::Table;
pub use temporal::{Motion, Temporal, TemporalScores};

use crate::{Error, Result, frame::Matrix};

/// A picture to measure: interleaved 8-bit R'G'B', full range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// A plane of samples from 0 to 255.
#[derive(Clone, Debug, PartialEq)]
pub struct Gray {
    pub width: usize,
    pub height: usize,
    /// `width * height` samples, row-major.
    pub data: Vec<f32>,
}

impl Gray {
    /// Averages blocks of 2x2 samples. An odd last row or column is dropped.
    fn halved(&self) -> Self {
        let (width, height) = (self.width / 2, self.height / 2);
        let pair = |row: usize, x: usize| {
            let at = row * self.width + 2 * x;
            self.data[at] + self.data[at + 1]
        };
        let data = (0..height)
            .flat_map(|y| (0..width).map(move |x| 0.25 * (pair(2 * y, x) + pair(2 * y + 1, x))));
        Self {
            width,
            height,
            data: data.collect(),
        }
    }
}

impl Picture {
    /// # Errors
    /// [`Error::Frame`] if `rgb` does not have three bytes for each of `width` x `height` pixels.
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

    /// Returns interleaved R'G'B' bytes.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Removes `border` pixels on each side. The result may be empty.
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

    /// Returns luma as in super-resolution literature: BT.601, limited range (16 black, 235 white),
    /// not rounded.
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
