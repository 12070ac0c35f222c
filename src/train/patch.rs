//! Patches of images: planar R'G'B' samples in floating point.

use crate::{
    Error, Result,
    frame::{
        Matrix,
        resample::{Axis, Kernel, Options, Resampler},
    },
};

/// Planar R'G'B' samples, 0 (black) to 1 (white).
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Samples of shape [3, height, width], row-major.
    pub rgb: Vec<f32>,
}

impl Patch {
    /// Creates a black patch.
    pub fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            rgb: vec![0.0; 3 * width * height],
        }
    }

    /// Converts interleaved 8-bit R'G'B'.
    pub fn from_rgb8(width: usize, height: usize, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 3 * width * height, "three bytes a pixel");
        let plane = |c: usize| bytes[c..].iter().step_by(3).map(|&v| f32::from(v) / 255.0);
        let rgb = plane(0).chain(plane(1)).chain(plane(2)).collect();
        Self { width, height, rgb }
    }

    /// Converts to interleaved 8-bit R'G'B', rounded and clamped.
    pub fn to_rgb8(&self) -> Vec<u8> {
        let area = self.width * self.height;
        (0..area)
            .flat_map(|i| [0, 1, 2].map(|c| self.rgb[c * area + i]))
            .map(|v| (v * 255.0).round().clamp(0.0, 255.0) as u8)
            .collect()
    }

    /// Resamples to `width` x `height`, with antialiasing if it shrinks, clamped to 0..1.
    ///
    /// # Errors
    /// [`Error::Frame`] when a side is 0.
    pub fn resize(self, width: usize, height: usize, kernel: Kernel) -> Result<Self> {
        if (self.width, self.height) == (width, height) {
            return Ok(self);
        }
        if self.rgb.is_empty() || width == 0 || height == 0 {
            return Err(Error::Frame(format!(
                "a patch of {}x{} pixels cannot become {width}x{height}",
                self.width, self.height
            )));
        }
        let axis = |src, dst| {
            let options = Options {
                antialias: dst < src,
                ..Options::default()
            };
            Axis::new(src, dst, kernel, options)
        };
        let resampler = Resampler::new(axis(self.width, width), axis(self.height, height));
        let mut out = Self::new(width, height);
        let planes = self.rgb.chunks_exact(self.width * self.height);
        for (src, dst) in planes.zip(out.rgb.chunks_exact_mut(width * height)) {
            resampler.run(src, dst);
            dst.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
        }
        Ok(out)
    }

    /// Returns luma (BT.709), 0 to 1, `[height, width]`.
    pub fn luma(&self) -> Vec<f32> {
        let area = self.width * self.height;
        let (r, rest) = self.rgb.split_at(area);
        let (g, b) = rest.split_at(area);
        let (kr, kg, kb) = Matrix::Bt709.luma_weights();
        let pixels = r.iter().zip(g).zip(b);
        pixels.map(|((r, g), b)| kr * r + kg * g + kb * b).collect()
    }

    /// Returns the mean square of the difference in luma (BT.709) to `other`, of the same size, in
    /// squared 8-bit steps.
    pub fn luma_difference(&self, other: &Self) -> f64 {
        let (a, b) = (self.luma(), other.luma());
        let squares = a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2));
        255.0 * 255.0 * squares.sum::<f64>() / a.len().max(1) as f64
    }

    /// Returns the upper left part of `width` x `height` pixels.
    ///
    /// # Panics
    /// When the patch is smaller.
    pub fn top_left(&self, width: usize, height: usize) -> Self {
        assert!(
            width <= self.width && height <= self.height,
            "a part of a patch"
        );
        let mut out = Self::new(width, height);
        for (c, plane) in self.rgb.chunks_exact(self.width * self.height).enumerate() {
            for (y, row) in plane.chunks_exact(self.width).take(height).enumerate() {
                out.rgb[(c * height + y) * width..][..width].copy_from_slice(&row[..width]);
            }
        }
        out
    }

    /// Transposes if `turn`, then mirrors. All combinations are the eight symmetries of the square.
    pub(super) fn turned(self, turn: bool, mirror_x: bool, mirror_y: bool) -> Self {
        let (width, height) = if turn {
            (self.height, self.width)
        } else {
            (self.width, self.height)
        };
        let mut out = Self::new(width, height);
        let planes = self.rgb.chunks_exact(width * height);
        for (src, dst) in planes.zip(out.rgb.chunks_exact_mut(width * height)) {
            for (y, row) in dst.chunks_exact_mut(width).enumerate() {
                let sy = if mirror_y { height - 1 - y } else { y };
                for (x, v) in row.iter_mut().enumerate() {
                    let sx = if mirror_x { width - 1 - x } else { x };
                    let at = if turn {
                        sx * self.width + sy
                    } else {
                        sy * self.width + sx
                    };
                    *v = src[at];
                }
            }
        }
        out
    }
}
