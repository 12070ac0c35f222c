//! Input and output of a network as grids in memory.

use std::{marker::PhantomData, ops::Range};

use super::network::NetworkIo;
use crate::nn::lite::latent::Grid;

/// Latent and residual of a whole frame.
pub(super) struct GridIo<'a> {
    latent: &'a [f32],
    /// Grid of the latent.
    grid: Grid,
    residual: *mut f32,
    width: usize,
    len: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: blocks write disjoint columns of the residual.
unsafe impl Sync for GridIo<'_> {}

impl<'a> GridIo<'a> {
    /// Reads `latent` on `grid` and writes `residual` without a margin.
    ///
    /// # Panics
    /// If `latent` has another length than its grid.
    pub fn new(latent: &'a [f32], grid: Grid, residual: &'a mut [f32]) -> Self {
        assert_eq!(latent.len(), grid.len(), "latent of {grid:?}");
        Self {
            latent,
            grid,
            width: grid.with_margin(0).width,
            len: residual.len(),
            residual: residual.as_mut_ptr(),
            borrowed: PhantomData,
        }
    }
}

impl NetworkIo for GridIo<'_> {
    fn latent(&self, _block: usize, y: isize, x: Range<isize>, out: &mut [f32], step: usize) {
        let Grid {
            width,
            height,
            channels,
            margin,
        } = self.grid;
        let inside =
            |at: isize, len: usize| (at + margin as isize).clamp(0, len as isize - 1) as usize;
        let row = &self.latent[inside(y, height) * width * channels..][..width * channels];
        for (x, cell) in x.zip(out.chunks_exact_mut(step)) {
            cell[..channels].copy_from_slice(&row[inside(x, width) * channels..][..channels]);
        }
    }

    fn residual(&self, _block: usize, y: usize, x: Range<usize>, residual: &[f32]) {
        let start = (y * self.width + x.start) * self.grid.channels;
        assert!(start + residual.len() <= self.len, "row {y}, columns {x:?}");
        // SAFETY: the range is inside, as just checked; no other block writes these columns.
        unsafe { std::slice::from_raw_parts_mut(self.residual.add(start), residual.len()) }
            .copy_from_slice(residual);
    }
}
