//! Interpolation filters.

use std::f64::consts::PI;

/// Shape of an interpolation filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Cubic convolution with a = -0.75: PyTorch's `interpolate(mode="bicubic")`, OpenCV's
    /// `INTER_CUBIC`.
    Bicubic,
    /// Cubic convolution with a = -0.5: PIL's `BICUBIC`, also PyTorch's with `antialias=True`.
    /// Reproduces linear ramps.
    CatmullRom,
    /// Sinc windowed by a sinc, three lobes: PIL's `LANCZOS`.
    Lanczos3,
    /// Linear interpolation.
    Bilinear,
    /// Mean of the source over the area of the output sample, at any ratio, antialiased or not.
    Area,
}

impl Kernel {
    /// Returns the distance beyond which the kernel is 0, if it is widened by `width` at `ratio`.
    pub(super) fn support(self, width: f64, ratio: f64) -> f64 {
        match self {
            Self::Bicubic | Self::CatmullRom => 2.0 * width,
            Self::Lanczos3 => 3.0 * width,
            Self::Bilinear => width,
            Self::Area => (ratio + 1.0) / 2.0,
        }
    }

    /// Returns the weight, not yet normalised, of the source sample at distance `d` from the
    /// position of the output.
    pub(super) fn weight(self, d: f64, width: f64, ratio: f64) -> f64 {
        let x = (d / width).abs();
        match self {
            Self::Bicubic => cubic_convolution(x, -0.75),
            Self::CatmullRom => cubic_convolution(x, -0.5),
            Self::Lanczos3 if x < 3.0 => sinc(x) * sinc(x / 3.0),
            Self::Lanczos3 => 0.0,
            Self::Bilinear => (1.0 - x).max(0.0),
            // Overlap of the source sample and the output sample.
            Self::Area => {
                let half = ratio / 2.0;
                ((d + 0.5).min(half) - (d - 0.5).max(-half)).max(0.0)
            }
        }
    }
}

/// Returns the kernel of R. G. Keys, "Cubic convolution interpolation for digital image
/// processing", 1981, equation 4 with free a.
fn cubic_convolution(x: f64, a: f64) -> f64 {
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        1.0
    } else {
        (PI * x).sin() / (PI * x)
    }
}
