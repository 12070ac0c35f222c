//! Resampling of rows along an axis.

use super::axis::Axis;
use crate::kernels::{
    resample::{LANES, combine_columns, combine_row, enlarge2, enlarge3, enlarge4, transpose},
    simd::Isa,
};

impl Axis {
    /// Elements of scratch memory for [`Axis::run_rows`].
    pub(super) fn scratch_len(&self) -> usize {
        if self.phases.is_some() {
            0
        } else {
            self.src_len() * LANES
        }
    }

    /// Rows that [`Axis::run_rows`] handles best at once.
    pub(super) fn rows_at_once(&self) -> usize {
        if self.phases.is_some() { 1 } else { LANES }
    }

    /// Resamples each row of `src` into a row of `dst`.
    pub(super) fn run_rows(&self, isa: Isa, src: &[f32], dst: &mut [f32], scratch: &mut [f32]) {
        let (sw, dw) = (self.src_len(), self.dst_len());
        let (mut src, mut dst) = (src, dst);
        if self.phases.is_none() {
            let columns = scratch.as_chunks_mut::<LANES>().0;
            while dst.len() >= LANES * dw {
                let (src_block, src_rest) = src.split_at(LANES * sw);
                let (dst_block, dst_rest) = dst.split_at_mut(LANES * dw);
                transpose(isa, columns, src_block);
                combine_columns(
                    isa,
                    dst_block,
                    columns,
                    &self.starts,
                    &self.weights,
                    self.taps,
                );
                (src, dst) = (src_rest, dst_rest);
            }
        }
        for (src, dst) in src.chunks_exact(sw).zip(dst.chunks_exact_mut(dw)) {
            self.run_row(isa, src, dst);
        }
    }

    fn run_row(&self, isa: Isa, src: &[f32], dst: &mut [f32]) {
        let Some(phases) = &self.phases else {
            return combine_row(isa, dst, src, &self.starts, &self.weights, self.taps);
        };
        let (from, count) = (phases.output, phases.weights.len());
        let to = from + phases.periods * count;
        for outputs in [0..from, to..self.dst_len()] {
            let weights = &self.weights[outputs.start * self.taps..];
            let starts = &self.starts[outputs.clone()];
            combine_row(isa, &mut dst[outputs], src, starts, weights, self.taps);
        }
        let (dst, src) = (&mut dst[from..to], &src[phases.source..]);
        match count {
            2 => enlarge2(isa, dst, src, &phases.weights),
            3 => enlarge3(isa, dst, src, &phases.weights),
            _ => enlarge4(isa, dst, src, &phases.weights),
        }
    }
}
