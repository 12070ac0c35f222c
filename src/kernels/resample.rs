//! Loops of separable resampling. All instruction sets give the same bits: every output is the same
//! sum in the same order.

use super::simd::dispatch;

/// Rows that the general horizontal loop handles at once.
pub(crate) const LANES: usize = 16;

/// Source samples in the window of an output of `enlarge2` to `enlarge4`.
pub(crate) const WINDOW: usize = 5;

/// Adds the weighted sum of `N` rows of `src` to `dst`, or writes it if `first`.
#[inline(always)]
fn add_rows<const N: usize>(
    dst: &mut [f32],
    src: &[f32],
    stride: usize,
    weights: &[f32],
    first: bool,
) {
    let n = dst.len();
    let rows: [&[f32]; N] = std::array::from_fn(|k| &src[k * stride..][..n]);
    let weights: [f32; N] = std::array::from_fn(|k| weights[k]);
    for (x, d) in dst.iter_mut().enumerate() {
        let mut sum = rows[0][x] * weights[0];
        for k in 1..N {
            sum += rows[k][x] * weights[k];
        }
        *d = if first { sum } else { *d + sum };
    }
}

/// Computes `N` outputs for each step of one source sample.
#[inline(always)]
fn enlarge<const N: usize>(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
    let dst = dst.as_chunks_mut::<N>().0;
    let weights: [[f32; WINDOW]; N] = std::array::from_fn(|k| weights[k]);
    let windows: [&[f32]; WINDOW] = std::array::from_fn(|i| &src[i..][..dst.len()]);
    for (x, d) in dst.iter_mut().enumerate() {
        for (d, w) in d.iter_mut().zip(&weights) {
            let mut sum = windows[0][x] * w[0];
            for i in 1..WINDOW {
                sum += windows[i][x] * w[i];
            }
            *d = sum;
        }
    }
}

dispatch! {
    /// Computes one row from consecutive rows of `src`, as many as there are weights.
    pub(crate) fn combine_rows(dst: &mut [f32], src: &[f32], stride: usize, weights: &[f32]) {
        for (i, weights) in weights.chunks(4).enumerate() {
            let src = &src[4 * i * stride..];
            match weights.len() {
                1 => add_rows::<1>(dst, src, stride, weights, i == 0),
                2 => add_rows::<2>(dst, src, stride, weights, i == 0),
                3 => add_rows::<3>(dst, src, stride, weights, i == 0),
                _ => add_rows::<4>(dst, src, stride, weights, i == 0),
            }
        }
    }

    /// Computes one row, output by output; `combine_columns` does the same for many rows.
    pub(crate) fn combine_row(dst: &mut [f32], src: &[f32], starts: &[u32], weights: &[f32], taps: usize) {
        let outputs = dst.iter_mut().zip(starts).zip(weights.chunks_exact(taps));
        for ((d, &start), weights) in outputs {
            let mut sum = 0.0;
            for (s, w) in src[start as usize..][..taps].iter().zip(weights) {
                sum += s * w;
            }
            *d = sum;
        }
    }

    /// Turns `LANES` rows into columns.
    pub(crate) fn transpose(columns: &mut [[f32; LANES]], src: &[f32]) {
        let n = columns.len();
        let rows: [&[f32]; LANES] = std::array::from_fn(|r| &src[r * n..][..n]);
        for (x, column) in columns.iter_mut().enumerate() {
            for r in 0..LANES {
                column[r] = rows[r][x];
            }
        }
    }

    /// Computes `LANES` rows of `dst` from the columns of the source.
    pub(crate) fn combine_columns(
        dst: &mut [f32],
        columns: &[[f32; LANES]],
        starts: &[u32],
        weights: &[f32],
        taps: usize,
    ) {
        let width = starts.len();
        let mut tile = [[0.0f32; LANES]; LANES];
        for left in (0..width).step_by(LANES) {
            let n = LANES.min(width - left);
            for (i, out) in tile[..n].iter_mut().enumerate() {
                let mut sums = [0.0f32; LANES];
                let columns = &columns[starts[left + i] as usize..][..taps];
                let weights = &weights[(left + i) * taps..][..taps];
                for (column, &w) in columns.iter().zip(weights) {
                    for l in 0..LANES {
                        sums[l] += column[l] * w;
                    }
                }
                *out = sums;
            }
            for r in 0..LANES {
                let row = &mut dst[r * width + left..][..n];
                for (i, d) in row.iter_mut().enumerate() {
                    *d = tile[i][r];
                }
            }
        }
    }

    /// Enlarges a row twofold by windows of `WINDOW` samples.
    pub(crate) fn enlarge2(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
        enlarge::<2>(dst, src, weights);
    }

    /// Enlarges a row threefold.
    pub(crate) fn enlarge3(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
        enlarge::<3>(dst, src, weights);
    }

    /// Enlarges a row fourfold.
    pub(crate) fn enlarge4(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
        enlarge::<4>(dst, src, weights);
    }
}
