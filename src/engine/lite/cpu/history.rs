//! Temporal filter of luma: where the input stands still, a share of the previous result is mixed
//! into the result, so that compression artefacts and noise flicker less.
//!
//! The share depends on the change of the input from the previous frame to this one. It is computed
//! before the network runs, from the input alone. The result is then mixed row by row.

use std::marker::PhantomData;

use rayon::prelude::*;

use crate::{
    Result,
    frame::{FrameInfo, FrameRef, Luma, resample::Resampler, zeros},
    kernels::{
        simd::Isa,
        temporal::{changes, mix, shares},
    },
    nn::lite::latent::grid_resampler,
};

/// A step of 8-bit video in samples.
const STEP: f32 = 1.0 / 255.0;

/// Mean change of the input around a cell from which on the previous result has no share.
pub(super) const LIMIT: f32 = 3.0 * STEP;

/// Mean change of the input between two scenes. Below it, [`LIMIT`] protects everything that moves.
const CUT: f32 = 20.0 * STEP;

/// Rows of the input that are worth another thread.
const ROWS: usize = 32;

/// The previous frame: luma of its input and of its result.
pub(super) struct History {
    from: (usize, usize),
    to: (usize, usize),
    /// Side of a grid cell.
    r: usize,
    /// Cells in a row of the grid.
    columns: usize,
    /// From the input to the grid; `None` if a cell is a pixel of the input.
    resampler: Option<Resampler>,
    planes: Option<Planes>,
    /// The planes hold the previous frame.
    known: bool,
}

/// Planes for frames of one size.
struct Planes {
    /// Luma of the input and of the previous input.
    input: [Vec<f32>; 2],
    /// Change of the input.
    change: Vec<f32>,
    /// Change of the input in cells, if these are not its pixels.
    cells: Vec<f32>,
    /// Share of the previous result for each cell.
    shares: Vec<f32>,
    /// Luma of the previous result before it was rounded.
    result: Vec<f32>,
}

impl History {
    /// Creates the history of frames `src` that become frames `dst`, for a network on cells of side
    /// `r`.
    pub fn new(src: &FrameInfo, dst: &FrameInfo, r: usize) -> Self {
        let (from, to) = ((src.width, src.height), (dst.width, dst.height));
        Self {
            from,
            to,
            r,
            columns: to.0.div_ceil(r),
            resampler: grid_resampler(from, to, r),
            planes: None,
            known: false,
        }
    }

    /// Forgets the previous frame.
    pub fn forget(&mut self) {
        self.known = false;
    }

    /// Takes `frame` as the next one. Returns the filter of its result, whose shares are up to
    /// `max`, above 0. The history counts as unknown until [`Self::complete`]. Runs on the current
    /// rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory, [`crate::Error::Frame`] if the frame
    /// is not valid.
    pub fn next(&mut self, frame: &FrameRef, max: f32) -> Result<Filter<'_>> {
        let known = std::mem::take(&mut self.known);
        let planes = match &mut self.planes {
            Some(planes) => planes,
            none => none.insert(Planes::new(self.from, self.to, self.r)?),
        };
        let Planes {
            input: [input, last],
            change,
            cells,
            shares,
            result,
        } = planes;
        std::mem::swap(input, last);
        read_luma(frame, input)?;
        if known && differences(self.from.0, input, last, change) < CUT {
            let change = match &self.resampler {
                Some(resampler) => {
                    resampler.run(change, cells);
                    cells
                }
                None => change,
            };
            share(self.columns, change, max, shares);
        } else {
            shares.fill(0.0);
            result.fill(0.0);
        }
        Ok(Filter {
            r: self.r,
            shares,
            columns: self.columns,
            width: self.to.0,
            len: result.len(),
            result: result.as_mut_ptr(),
            borrowed: PhantomData,
        })
    }

    /// Ends a frame whose result has passed the filter.
    pub fn complete(&mut self) {
        self.known = true;
    }
}

impl Planes {
    fn new(from: (usize, usize), to: (usize, usize), r: usize) -> Result<Self> {
        let input = from.0 * from.1;
        let grid = to.0.div_ceil(r) * to.1.div_ceil(r);
        Ok(Self {
            input: [zeros(input)?, zeros(input)?],
            change: zeros(input)?,
            cells: zeros(grid)?,
            shares: zeros(grid)?,
            result: zeros(to.0 * to.1)?,
        })
    }
}

/// Reads the luma of `frame`.
pub(super) fn read_luma(frame: &FrameRef, luma: &mut [f32]) -> Result<()> {
    let (width, source) = (frame.info().width, Luma::new(frame)?);
    let rows = luma.par_chunks_mut(width).enumerate().with_min_len(ROWS);
    rows.for_each_init(Vec::new, |scratch, (y, row)| {
        source.read(y, 0..width, row, scratch);
    });
    Ok(())
}

/// Writes the change of each sample. Returns the mean.
fn differences(width: usize, input: &[f32], last: &[f32], change: &mut [f32]) -> f32 {
    let isa = Isa::best();
    let inputs = input.par_chunks(width).zip(last.par_chunks(width));
    let rows = change.par_chunks_mut(width).zip(inputs).with_min_len(ROWS);
    // Summed in the same order for any number of threads.
    let sums: Vec<f32> = rows.map(|(out, (a, b))| changes(isa, a, b, out)).collect();
    sums.iter().sum::<f32>() / change.len() as f32
}

/// Writes the share of each cell.
fn share(columns: usize, change: &[f32], max: f32, out: &mut [f32]) {
    let (isa, last) = (Isa::best(), change.len() / columns - 1);
    let row = |y: usize| &change[y * columns..][..columns];
    let rows = out.par_chunks_mut(columns).enumerate().with_min_len(ROWS);
    rows.for_each(|(y, out)| {
        let around = [row(y.saturating_sub(1)), row(y), row(last.min(y + 1))];
        shares(isa, around, LIMIT, max, out);
    });
}

/// Mix of the result of a frame with the previous one.
pub(super) struct Filter<'a> {
    r: usize,
    /// Rows of `columns` shares.
    shares: &'a [f32],
    columns: usize,
    /// Luma of the previous result, in rows of `width`.
    result: *mut f32,
    len: usize,
    width: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: `apply` requires that its callers do not overlap.
unsafe impl Sync for Filter<'_> {}

impl Filter<'_> {
    /// Mixes the result's `luma` in row `y` from column `x` on, a multiple of r, with that of the
    /// previous result, and retains it for the next frame.
    ///
    /// # Safety
    /// No other thread applies the filter to the same columns of this row at the same time.
    ///
    /// # Panics
    /// If the samples are outside of the frame.
    pub unsafe fn apply(&self, y: usize, x: usize, luma: &mut [f32]) {
        let start = y * self.width + x;
        assert!(
            x + luma.len() <= self.width && start + luma.len() <= self.len,
            "row {y} from {x}"
        );
        // SAFETY: the range is inside, as just checked, and only this caller uses it.
        let last = unsafe { std::slice::from_raw_parts_mut(self.result.add(start), luma.len()) };
        let shares = &self.shares[y / self.r * self.columns + x / self.r..];
        mix(Isa::best(), self.r, shares, luma, last);
    }

    /// As [`Self::apply`] for frames in R, G and B, whose luma gets `residual`: adds what the mix
    /// changes to `residual`. `luma` is that of the result, and `scratch` is working memory.
    ///
    /// # Safety
    /// As [`Self::apply`].
    pub unsafe fn apply_to_residual(
        &self,
        y: usize,
        x: usize,
        luma: &mut [f32],
        residual: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        scratch.clear();
        scratch.extend_from_slice(luma);
        // SAFETY: as the caller promises.
        unsafe { self.apply(y, x, luma) };
        let mixed = luma.iter().zip(scratch.iter());
        for (residual, (new, old)) in residual.iter_mut().zip(mixed) {
            *residual += new - old;
        }
    }
}
