//! Memory of a student: what it knows of the previous frame.
//!
//! Blocks of the grid's luma, one sample a cell, are searched in the previous frame
//! ([`Tracker`]). The previous result and the state of the network are moved along. Where the
//! moved luma differs from that of this frame, they are trusted less: the confidence falls from 1
//! to 0. In scenes and cells without a past it is 0, and the network computes the same as without
//! memory.
//!
//! Inputs of the first layer, `z` channels of the latent and `m` of the state:
//! - `z`: the whitened latent of the base,
//! - `z`: confidence times the difference of the moved result and the base, over the deviation of
//!   the residual,
//! - `m`: confidence times the moved state,
//! - 1: the confidence.
//!
//! Outputs of the last layer:
//! - `z`: the whitened residual `r` of this frame alone,
//! - `z`: gates `g`. The residual becomes `r + c gate(g) (d - r)`, with the confidence `c` and the
//!   difference `d` of the second input before it is multiplied by `c`,
//! - `m`: the state for the next frame, limited to -1 to 1.

use candle_core::{Device, Result, Tensor};

use super::latent::LatentStats;
use crate::kernels::motion::BLOCK;
pub use crate::kernels::tracker::Tracker;

/// Returns the share of the previous result for an output `g` of the network: the hard sigmoid.
pub fn gate(g: f32) -> f32 {
    (g / 6.0 + 0.5).clamp(0.0, 1.0)
}

/// Motion in a batch of clips, for training.
///
/// Tensors have one row for each frame but the first.
pub struct Clips {
    pub frames: usize,
    /// Indices of the samples of the previous result, flattened, `[frames - 1, n h w z]`.
    pub(super) samples: Tensor,
    /// Indices of the cells of the previous state, `[frames - 1, n h w]`.
    pub(super) cells: Tensor,
    /// `[frames - 1, n h w]`
    pub(super) confidence: Tensor,
    pub(super) stats: LatentStats,
}

/// Motion in clips as vectors, see [`Clips`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClipMotion {
    pub frames: usize,
    samples: Vec<u32>,
    cells: Vec<u32>,
    confidence: Vec<f32>,
}

impl ClipMotion {
    /// Finds the motion in clips of `frames` frames. `luma` returns the luma of a frame of a clip
    /// on the grid of `width` x `height` cells of side `r`.
    pub fn find(
        (clips, frames): (usize, usize),
        (width, height, r): (usize, usize, usize),
        luma: impl Fn(usize, usize) -> Vec<f32>,
    ) -> Self {
        let (cells, samples) = (width * height, width * height * r * r);
        let later = frames.saturating_sub(1) * clips;
        let mut motion = Self {
            frames,
            samples: vec![0; later * samples],
            cells: vec![0; later * cells],
            confidence: vec![0.0; later * cells],
        };
        // Planes of the indices, which are warped like values. They are exact as f32.
        let own: Vec<f32> = (0..cells).map(|i| i as f32).collect();
        let shuffled: Vec<f32> = (0..samples)
            .map(|i| {
                let (x, y) = (i % (width * r), i / (width * r));
                ((y / r * width + x / r) * r * r + y % r * r + x % r) as f32
            })
            .collect();
        let (mut moved, mut moved_samples) = (own.clone(), shuffled.clone());
        for clip in 0..clips {
            let mut tracker = Tracker::new(width, height);
            for t in 0..frames {
                tracker.next(&luma(clip, t));
                let Some(row) = t.checked_sub(1) else {
                    continue;
                };
                let at = row * clips + clip;
                motion.confidence[at * cells..][..cells].copy_from_slice(tracker.confidence());
                tracker.field().warp(&own, width, 1, BLOCK, &mut moved);
                for (to, from) in motion.cells[at * cells..][..cells].iter_mut().zip(&moved) {
                    *to = (clip * cells) as u32 + *from as u32;
                }
                tracker
                    .field()
                    .warp(&shuffled, width * r, 1, BLOCK * r, &mut moved_samples);
                let rows = &mut motion.samples[at * samples..][..samples];
                for (y, row) in moved_samples.chunks_exact(width * r).enumerate() {
                    for (x, from) in row.iter().enumerate() {
                        let to = (y / r * width + x / r) * r * r + y % r * r + x % r;
                        rows[to] = (clip * samples) as u32 + *from as u32;
                    }
                }
            }
        }
        motion
    }

    /// Returns the tensors on `device` for a latent with `stats`.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    pub fn tensors(&self, stats: &LatentStats, device: &Device) -> Result<Clips> {
        let rows = self.frames.saturating_sub(1);
        Ok(Clips {
            frames: self.frames,
            samples: Tensor::new(self.samples.as_slice(), device)?.reshape((rows, ()))?,
            cells: Tensor::new(self.cells.as_slice(), device)?.reshape((rows, ()))?,
            confidence: Tensor::new(self.confidence.as_slice(), device)?.reshape((rows, ()))?,
            stats: stats.clone(),
        })
    }
}
