//! Resampling of whole planes.

use std::{cell::RefCell, ops::Range as Rows};

use rayon::prelude::*;

use super::{
    axis::{Axis, Options},
    kernel::Kernel,
};
use crate::{
    Result,
    frame::{Component, FrameInfo},
    kernels::{
        resample::{LANES, combine_rows},
        simd::Isa,
    },
};

/// Samples that make a task worth handing to another thread.
const SAMPLES_PER_TASK: usize = 1 << 16;

/// Rows below which a task repeats too much horizontal work of its neighbours.
const MIN_TASK_ROWS: usize = 32;

/// Resamples planes from one size to another.
#[derive(Clone, Debug)]
pub struct Resampler {
    pub(super) horizontal: Axis,
    pub(super) vertical: Axis,
    /// Order of the directions: the one that costs less.
    pub(super) horizontal_first: bool,
}

thread_local! {
    /// Intermediate rows, reused by the next call on the thread.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Resampler {
    pub fn new(horizontal: Axis, vertical: Axis) -> Self {
        let (sw, sh) = (horizontal.src_len(), vertical.src_len());
        let (dw, dh) = (horizontal.dst_len(), vertical.dst_len());
        let cost = |rows: usize, columns: usize| {
            (dw * rows) as f64 * horizontal.taps as f64
                + (columns * dh) as f64 * vertical.taps as f64
        };
        Self {
            horizontal_first: cost(sh, dw) <= cost(dh, sw),
            horizontal,
            vertical,
        }
    }

    /// Creates the resampler of plane `component` for frames like `info` that become `width` x
    /// `height`: chroma keeps its site among the luma samples and moves by the ratio of the luma.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] if a side of either frame is out of range.
    pub fn for_component(
        info: &FrameInfo,
        component: Component,
        width: usize,
        height: usize,
        kernel: Kernel,
        antialias: bool,
    ) -> Result<Self> {
        info.check_sides()?;
        info.with_size(width, height).check_sides()?;
        let format = info.format;
        let (sw, sh) = format.component_size(component, info.width, info.height);
        let (dw, dh) = format.component_size(component, width, height);
        let chroma = matches!(component, Component::U | Component::V);
        let (sx, sy) = format.chroma_shift();
        let axis = |src, dst, luma_ratio, shift: u32, cosited| {
            let centre = if chroma && cosited {
                0.5 / f64::from(1 << shift)
            } else {
                0.5
            };
            let options = Options {
                antialias,
                centre,
                ratio: Some(luma_ratio),
            };
            Axis::new(src, dst, kernel, options)
        };
        let site = info.chroma_site;
        let (rx, ry) = (
            info.width as f64 / width as f64,
            info.height as f64 / height as f64,
        );
        Ok(Self::new(
            axis(sw, dw, rx, sx, site.horizontal_cosited),
            axis(sh, dh, ry, sy, site.vertical_cosited),
        ))
    }

    pub fn horizontal(&self) -> &Axis {
        &self.horizontal
    }

    pub fn vertical(&self) -> &Axis {
        &self.vertical
    }

    /// Resamples the plane `src` into `dst`, both without padding. Runs on the current rayon pool.
    ///
    /// # Panics
    /// If the length of a plane does not fit its axis.
    pub fn run(&self, src: &[f32], dst: &mut [f32]) {
        let (dw, dh) = (self.horizontal.dst_len(), self.vertical.dst_len());
        self.check(src, dst);
        let threads = rayon::current_num_threads();
        let rows = SAMPLES_PER_TASK
            .div_ceil(dw)
            .max(MIN_TASK_ROWS)
            .max(dh.div_ceil(4 * threads));
        if threads == 1 || rows >= dh {
            self.run_band(Isa::best(), src, 0..dh, dst);
        } else {
            let bands = dst.par_chunks_mut(rows * dw).enumerate();
            bands.for_each(|(i, band)| {
                let top = i * rows;
                self.run_band(Isa::best(), src, top..top + band.len() / dw, band);
            });
        }
    }

    fn check(&self, src: &[f32], dst: &[f32]) {
        let (sw, sh) = (self.horizontal.src_len(), self.vertical.src_len());
        let (dw, dh) = (self.horizontal.dst_len(), self.vertical.dst_len());
        assert_eq!(src.len(), sw * sh, "source samples of {sw}x{sh}");
        assert_eq!(dst.len(), dw * dh, "output samples of {dw}x{dh}");
    }

    /// Computes rows `rows` of the output, without checks.
    pub(super) fn run_band(&self, isa: Isa, src: &[f32], rows: Rows<usize>, dst: &mut [f32]) {
        if rows.is_empty() {
            return;
        }
        let (horizontal, vertical) = (&self.horizontal, &self.vertical);
        let (sw, dw) = (horizontal.src_len(), horizontal.dst_len());
        match (horizontal.identity, vertical.identity) {
            (true, true) => dst.copy_from_slice(&src[rows.start * sw..rows.end * sw]),
            (true, false) => {
                for (y, dst) in rows.zip(dst.chunks_exact_mut(dw)) {
                    let src = &src[vertical.start(y) * sw..];
                    combine_rows(isa, dst, src, sw, vertical.weights(y));
                }
            }
            (false, true) => SCRATCH.with_borrow_mut(|scratch| {
                let src = &src[rows.start * sw..rows.end * sw];
                horizontal.run_rows(isa, src, dst, reserve(scratch, horizontal.scratch_len()));
            }),
            (false, false) if self.horizontal_first => {
                SCRATCH.with_borrow_mut(|s| self.horizontal_first(isa, src, rows, dst, s));
            }
            (false, false) => {
                SCRATCH.with_borrow_mut(|s| self.vertical_first(isa, src, rows, dst, s));
            }
        }
    }

    fn horizontal_first(
        &self,
        isa: Isa,
        src: &[f32],
        rows: Rows<usize>,
        dst: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (horizontal, vertical) = (&self.horizontal, &self.vertical);
        let (sw, dw) = (horizontal.src_len(), horizontal.dst_len());
        let capacity = vertical.taps + LANES;
        let scratch = reserve(scratch, capacity * dw + horizontal.scratch_len());
        let (retained, scratch) = scratch.split_at_mut(capacity * dw);
        let end = vertical.source_of(rows.clone()).end;
        // `retained` holds source rows `held`, horizontally resampled.
        let mut held = 0..0;
        for (y, dst) in rows.zip(dst.chunks_exact_mut(dw)) {
            let need = vertical.source_of(y..y + 1);
            if need.end > held.end {
                // As many rows as the horizontal loop handles best at once; drop old ones if they
                // do not fit.
                let from = held.end.max(need.start);
                let to = need.end.max((from + horizontal.rows_at_once()).min(end));
                if from != held.end || to - held.start > capacity {
                    let keep = need.start.min(held.end) - held.start..held.len();
                    retained.copy_within(keep.start * dw..keep.end * dw, 0);
                    held.start = need.start;
                }
                let rows = &mut retained[(from - held.start) * dw..(to - held.start) * dw];
                horizontal.run_rows(isa, &src[from * sw..to * sw], rows, scratch);
                held.end = to;
            }
            let rows = &retained[(need.start - held.start) * dw..];
            combine_rows(isa, dst, rows, dw, vertical.weights(y));
        }
    }

    fn vertical_first(
        &self,
        isa: Isa,
        src: &[f32],
        rows: Rows<usize>,
        dst: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (horizontal, vertical) = (&self.horizontal, &self.vertical);
        let (sw, dw) = (horizontal.src_len(), horizontal.dst_len());
        let scratch = reserve(scratch, LANES * sw + horizontal.scratch_len());
        let (block, scratch) = scratch.split_at_mut(LANES * sw);
        for (i, dst) in dst.chunks_mut(LANES * dw).enumerate() {
            let block = &mut block[..dst.len() / dw * sw];
            for (y, row) in (rows.start + i * LANES..).zip(block.chunks_exact_mut(sw)) {
                let src = &src[vertical.start(y) * sw..];
                combine_rows(isa, row, src, sw, vertical.weights(y));
            }
            horizontal.run_rows(isa, block, dst, scratch);
        }
    }
}

/// Returns the first `len` elements of `scratch`, which grows if it is shorter.
fn reserve(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}
