//! The latent: planes of the bicubic base or of a residual, unshuffled to a grid of `1/r` of the
//! output's size.
//!
//! Channel `dy * r + dx` of grid cell (x, y) is the luma sample (x r + dx, y r + dy). A `yuv`
//! latent appends both chroma planes at half the resolution of luma, unshuffled by `r/2`, so that a
//! 4:2:0 frame needs no resampling. The conversion is exact and fast, and a residual of 0 gives the
//! base.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::frame::resample::{Axis, Kernel, Options, Resampler};

/// Planes of the latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LatentKind {
    /// Luma only, `r * r` channels. Chroma is resampled.
    Luma,
    /// Luma and 4:2:0 chroma, `r * r * 3/2` channels, for even `r`.
    Yuv,
}

impl LatentKind {
    /// Returns the channels of the latent for a grid cell of side `r`.
    pub fn channels(self, r: usize) -> usize {
        match self {
            Self::Luma => r * r,
            Self::Yuv => r * r + 2 * (r / 2) * (r / 2),
        }
    }
}

/// Statistics of each channel in the training set, which whiten the latent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatentStats {
    /// Mean of the latent of the base.
    pub input_mean: Vec<f32>,
    /// Standard deviation of the latent of the base, above 0.
    pub input_std: Vec<f32>,
    /// Standard deviation of the residual (ground truth minus base), above 0.
    pub residual_std: Vec<f32>,
}

impl LatentStats {
    /// Returns constants that are typical of photographs. Training depends only on the scale of the
    /// residual.
    pub fn nominal(kind: LatentKind, r: usize) -> Self {
        let (all, luma) = (kind.channels(r), r * r);
        let per_channel = |y: f32, c: f32| (0..all).map(|i| if i < luma { y } else { c }).collect();
        Self {
            input_mean: per_channel(0.5, 0.0),
            input_std: per_channel(0.25, 0.1),
            residual_std: per_channel(0.04, 0.02),
        }
    }
}

/// The grid of a latent: rows of cells of `channels` floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Cells in a row and number of rows, including both margins.
    pub width: usize,
    pub height: usize,
    pub channels: usize,
    /// Cells on each side that repeat the samples at the border.
    pub margin: usize,
}

impl Grid {
    /// Returns the grid of `width` x `height` output pixels without a margin.
    pub fn new(kind: LatentKind, r: usize, width: usize, height: usize) -> Self {
        Self {
            width: width.div_ceil(r),
            height: height.div_ceil(r),
            channels: kind.channels(r),
            margin: 0,
        }
    }

    /// Returns the grid with a margin of `margin` cells.
    pub fn with_margin(self, margin: usize) -> Self {
        Self {
            width: self.width + 2 * margin - 2 * self.margin,
            height: self.height + 2 * margin - 2 * self.margin,
            margin,
            ..self
        }
    }

    /// Returns the number of floats.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.width * self.height * self.channels
    }
}

/// Returns the resampler from an image of the size `from` to the cells of side `r` of its result of
/// the size `to`; `None` if a cell is a pixel of the image.
pub fn grid_resampler(from: (usize, usize), to: (usize, usize), r: usize) -> Option<Resampler> {
    let grid = (to.0.div_ceil(r), to.1.div_ceil(r));
    let axis = |from: usize, to: usize, cells: usize| {
        let options = Options {
            antialias: true,
            ratio: Some((from * r) as f64 / to as f64),
            ..Options::default()
        };
        Axis::new(from, cells, Kernel::Bilinear, options)
    };
    (grid != from).then(|| Resampler::new(axis(from.0, to.0, grid.0), axis(from.1, to.1, grid.1)))
}

/// Position of a plane in the latent.
#[derive(Clone, Copy, Debug)]
pub struct PlaneSlot {
    /// First channel.
    pub channel: usize,
    /// Unshuffle factor of this plane.
    pub r: usize,
}

/// Returns the position of luma for a grid cell of side `r`.
pub fn luma_slot(r: usize) -> PlaneSlot {
    PlaneSlot { channel: 0, r }
}

/// Returns the position of Cb (`which` 0) or Cr (1) in a `yuv` latent for a grid cell of side `r`.
pub fn chroma_slot(r: usize, which: usize) -> PlaneSlot {
    let half = r / 2;
    PlaneSlot {
        channel: r * r + which * half * half,
        r: half,
    }
}

/// Writes plane `src` (`width` samples a row) to the latent as `(sample - mean) / std`. The margin
/// and cells beyond the last row and column repeat the samples at the border.
pub fn unshuffle(
    src: &[f32],
    width: usize,
    slot: PlaneSlot,
    grid: Grid,
    mean: &[f32],
    std: &[f32],
    latent: &mut [f32],
) {
    let (r, height, skip) = (slot.r, src.len() / width, grid.margin * slot.r);
    let rows = latent.par_chunks_exact_mut(grid.width * grid.channels);
    rows.enumerate().for_each(|(gy, cells)| {
        for (dy, dx) in (0..r).flat_map(|dy| (0..r).map(move |dx| (dy, dx))) {
            let y = (gy * r + dy).saturating_sub(skip).min(height - 1);
            let row = &src[y * width..(y + 1) * width];
            let channel = slot.channel + dy * r + dx;
            let (mean, scale) = (mean[channel], 1.0 / std[channel]);
            let mut cells = cells[channel..].iter_mut().step_by(grid.channels);
            for cell in cells.by_ref().take(grid.margin) {
                *cell = (row[0] - mean) * scale;
            }
            let inside = width.saturating_sub(dx).div_ceil(r);
            let samples = row.iter().skip(dx).step_by(r);
            for (cell, &v) in cells.by_ref().take(inside).zip(samples) {
                *cell = (v - mean) * scale;
            }
            for cell in cells {
                *cell = (row[width - 1] - mean) * scale;
            }
        }
    });
}

/// Adds `gain[channel]` times the latent to plane `dst` (`width` samples a row), the inverse of
/// [`unshuffle`].
pub fn shuffle_add(
    latent: &[f32],
    slot: PlaneSlot,
    grid: Grid,
    gain: &[f32],
    dst: &mut [f32],
    width: usize,
) {
    let r = slot.r;
    dst.par_chunks_mut(width).enumerate().for_each(|(y, row)| {
        let (gy, dy) = (y / r + grid.margin, y % r);
        let cells = &latent[gy * grid.width * grid.channels..][..grid.width * grid.channels];
        for dx in 0..r.min(width) {
            let channel = slot.channel + dy * r + dx;
            let gain = gain[channel];
            let cells = cells[channel..].iter().step_by(grid.channels);
            let cells = cells.skip(grid.margin);
            for (v, &z) in row[dx..].iter_mut().step_by(r).zip(cells) {
                *v += gain * z;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares at sizes that are not multiples of the factors.
    #[test]
    fn shuffle_is_the_inverse_of_unshuffle_at_any_size() {
        for (w, h) in [(1, 1), (2, 3), (7, 5), (8, 8), (13, 4)] {
            for (r, margin) in [(1, 0), (2, 0), (3, 2), (4, 1)] {
                let src: Vec<f32> = (0..w * h).map(|i| (i as f32 * 0.37).sin()).collect();
                let grid = Grid::new(LatentKind::Luma, r, w, h).with_margin(margin);
                let (mean, std) = (vec![0.25; r * r], vec![0.5; r * r]);
                let mut latent = vec![f32::NAN; grid.len()];
                let slot = PlaneSlot { channel: 0, r };
                unshuffle(&src, w, slot, grid, &mean, &std, &mut latent);
                assert!(latent.iter().all(|v| v.is_finite()), "{w}x{h} r {r}");
                let mut back = vec![0.25; w * h];
                shuffle_add(&latent, slot, grid, &std, &mut back, w);
                for (a, b) in back.iter().zip(&src) {
                    assert!((a - b).abs() < 1e-6, "{w}x{h} r {r}: {a}, not {b}");
                }
            }
        }
    }

    #[test]
    fn samples_beyond_the_plane_replicate_its_border() {
        let grid = Grid::new(LatentKind::Luma, 2, 3, 3);
        let src: Vec<f32> = (0..9).map(|i| i as f32).collect();
        let mut latent = vec![f32::NAN; grid.len()];
        let slot = PlaneSlot { channel: 0, r: 2 };
        unshuffle(&src, 3, slot, grid, &[0.0; 4], &[1.0; 4], &mut latent);
        assert_eq!(latent[..8], [0.0, 1.0, 3.0, 4.0, 2.0, 2.0, 5.0, 5.0]);
        assert_eq!(latent[8..], [6.0, 7.0, 6.0, 7.0, 8.0, 8.0, 8.0, 8.0]);
        let grid = grid.with_margin(1);
        let mut latent = vec![f32::NAN; grid.len()];
        unshuffle(&src, 3, slot, grid, &[0.0; 4], &[1.0; 4], &mut latent);
        let row = |y: usize| &latent[y * 16..(y + 1) * 16];
        assert_eq!(
            row(0),
            [0, 0, 0, 0, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2].map(|v| v as f32)
        );
        assert_eq!(
            row(1),
            [0, 0, 3, 3, 0, 1, 3, 4, 2, 2, 5, 5, 2, 2, 5, 5].map(|v| v as f32)
        );
        assert_eq!(
            row(3),
            [6, 6, 6, 6, 6, 7, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8].map(|v| v as f32)
        );
    }
}
