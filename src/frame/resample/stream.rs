//! Resampling of some columns, row by row.

use std::ops::Range as Rows;

use super::{axis::Axis, resampler::Resampler};
use crate::kernels::{resample::combine_rows, simd::Isa};

/// Some columns of a plane, resampled row by row from top to bottom: the values of
/// [`Resampler::run`] if that resamples rows first.
pub(crate) struct Stream {
    horizontal: Axis,
    vertical: Axis,
    /// Columns of the source that the columns of the output weigh.
    columns: Rows<usize>,
    /// Source rows of one call of the horizontal loop.
    source: Vec<f32>,
    /// Scratch memory of the horizontal loop.
    scratch: Vec<f32>,
    /// Latest source rows, horizontally resampled: row i at i modulo `capacity`. The first of them
    /// are repeated after the last, so that the rows of an output are always neighbours.
    retained: Vec<f32>,
    capacity: usize,
    /// Source rows read so far.
    read: usize,
}

impl Stream {
    /// Creates the stream of output columns `columns` of `resampler`.
    pub(crate) fn new(resampler: &Resampler, columns: Rows<usize>) -> Self {
        let (horizontal, source) = resampler.horizontal.part(columns);
        let vertical = resampler.vertical.clone();
        let (taps, at_once) = (vertical.taps, horizontal.rows_at_once());
        let capacity = (taps + at_once).next_multiple_of(at_once);
        Self {
            source: vec![0.0; at_once * source.len()],
            scratch: vec![0.0; horizontal.scratch_len()],
            retained: vec![0.0; (capacity + taps) * horizontal.dst_len()],
            capacity,
            columns: source,
            horizontal,
            vertical,
            read: 0,
        }
    }

    /// Returns to the top.
    pub(crate) fn restart(&mut self) {
        self.read = 0;
    }

    /// Writes output row `y`, not above the last one since the top. `read` writes some columns of a
    /// source row.
    ///
    /// # Panics
    /// If there is no such row or `dst` is not as long as the columns.
    pub(crate) fn row(
        &mut self,
        y: usize,
        dst: &mut [f32],
        read: impl Fn(usize, Rows<usize>, &mut [f32]),
    ) {
        let isa = Isa::best();
        let (width, taps) = (self.horizontal.dst_len(), self.vertical.taps);
        let first = self.vertical.start(y);
        let at_once = self.horizontal.rows_at_once();
        while self.read < first + taps {
            // Batches begin at multiples even if rows are left out: they never wrap in the buffer.
            let from = self.read.max(first / at_once * at_once);
            let to = (from + at_once).min(self.vertical.src_len());
            let source = &mut self.source[..(to - from) * self.columns.len()];
            let rows = source.chunks_exact_mut(self.columns.len());
            rows.zip(from..)
                .for_each(|(row, i)| read(i, self.columns.clone(), row));
            let slot = from % self.capacity;
            let retained = &mut self.retained[slot * width..][..(to - from) * width];
            self.horizontal
                .run_rows(isa, source, retained, &mut self.scratch);
            let again = (slot + to - from).min(taps);
            if slot < again {
                let behind = (self.capacity + slot) * width;
                self.retained
                    .copy_within(slot * width..again * width, behind);
            }
            self.read = to;
        }
        let rows = &self.retained[first % self.capacity * width..];
        combine_rows(isa, dst, rows, width, self.vertical.weights(y));
    }
}
