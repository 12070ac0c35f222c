//! Conversion between rows of samples and rows of grid cells, whose channels are `r * r` samples.

use super::simd::{Isa, dispatch};

/// Largest r.
const MAX_R: usize = 8;

/// Writes rows of samples into one row of cells as `(sample - mean) * scale`.
///
/// `rows` are `r` rows of `width` samples each; `cells` begins at the first channel for them in the
/// first cell, and cells are `step` floats apart. `whiten` is (mean, scale) by channel.
///
/// # Panics
/// If a slice is too short, or r is not 1 to 8.
pub fn unshuffle(
    isa: Isa,
    r: usize,
    rows: &[f32],
    width: usize,
    whiten: (&[f32], &[f32]),
    cells: &mut [f32],
    step: usize,
) {
    let (mean, scale) = whiten;
    assert!((1..=MAX_R).contains(&r) && mean.len() == r * r && scale.len() == r * r);
    unshuffle_on(isa, r, rows, width, whiten, cells, step);
}

/// Computes `out = base + gain * cells` for one row of samples. `cells` begins at the channel for
/// the first sample of the row in the first cell, cells are `step` floats apart, and there are `r`
/// gains.
///
/// # Panics
/// If a slice is too short, or r is not 1 to 8.
pub fn add_shuffled(
    isa: Isa,
    r: usize,
    base: &[f32],
    gain: &[f32],
    cells: &[f32],
    step: usize,
    out: &mut [f32],
) {
    assert!((1..=MAX_R).contains(&r) && gain.len() == r && out.len() == base.len());
    add_on(isa, r, base, gain, cells, step, out);
}

dispatch! {
    /// Rounds products and sums separately on every instruction set.
    fn unshuffle_on(
        r: usize,
        rows: &[f32],
        width: usize,
        whiten: (&[f32], &[f32]),
        cells: &mut [f32],
        step: usize,
    ) {
        let (mean, scale) = whiten;
        match r {
            1 => unshuffle_by::<1, 1>(rows, width, mean, scale, cells, step),
            2 => unshuffle_by::<2, 4>(rows, width, mean, scale, cells, step),
            4 => unshuffle_by::<4, 16>(rows, width, mean, scale, cells, step),
            _ => {
                for (y, row) in rows.chunks_exact(width.max(1)).take(r).enumerate() {
                    for (i, samples) in row.chunks_exact(r).enumerate() {
                        for (x, v) in samples.iter().enumerate() {
                            let c = y * r + x;
                            cells[i * step + c] = (v - mean[c]) * scale[c];
                        }
                    }
                }
            }
        }
    }
}

dispatch! {
    fn add_on(r: usize, base: &[f32], gain: &[f32], cells: &[f32], step: usize, out: &mut [f32]) {
        let whole = match r {
            1 => base.len(),
            2 | 4 => base.len() / r * r,
            _ => 0,
        };
        let (head, tail) = out.split_at_mut(whole);
        match r {
            1 => add_by::<1>(&base[..whole], gain, cells, step, head),
            2 => add_by::<2>(&base[..whole], gain, cells, step, head),
            4 => add_by::<4>(&base[..whole], gain, cells, step, head),
            _ => {}
        }
        for (i, (v, b)) in tail.iter_mut().zip(&base[whole..]).enumerate() {
            let x = (whole + i) % r;
            *v = b + gain[x] * cells[(whole + i) / r * step + x];
        }
    }
}

/// Writes `R` rows into cells of `C` = `R * R` channels.
#[inline(always)]
fn unshuffle_by<const R: usize, const C: usize>(
    rows: &[f32],
    width: usize,
    mean: &[f32],
    scale: &[f32],
    cells: &mut [f32],
    step: usize,
) {
    let rows: [&[[f32; R]]; R] =
        std::array::from_fn(|y| rows[y * width..][..width].as_chunks::<R>().0);
    let (mean, scale): ([f32; C], [f32; C]) = (part(mean, 0), part(scale, 0));
    let count = width / R;
    let rows = rows.map(|row| &row[..count]);
    for (i, cell) in cells.chunks_mut(step).take(count).enumerate() {
        let Some(cell) = cell.first_chunk_mut::<C>() else {
            return;
        };
        for c in 0..C {
            cell[c] = (rows[c / R][i][c % R] - mean[c]) * scale[c];
        }
    }
}

fn part<const N: usize>(of: &[f32], from: usize) -> [f32; N] {
    std::array::from_fn(|i| of[from + i])
}

#[inline(always)]
fn add_by<const R: usize>(base: &[f32], gain: &[f32], cells: &[f32], step: usize, out: &mut [f32]) {
    let gain: [f32; R] = part(gain, 0);
    let samples = base.as_chunks::<R>().0.iter().zip(cells.chunks(step));
    for (out, (base, cell)) in out.as_chunks_mut::<R>().0.iter_mut().zip(samples) {
        let Some(cell) = cell.first_chunk::<R>() else {
            return;
        };
        for x in 0..R {
            out[x] = base[x] + gain[x] * cell[x];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;
    use proptest::prelude::*;

    /// Returns the place of sample `x` of row `y` in cells of `step` floats.
    fn place(r: usize, x: usize, y: usize, step: usize) -> usize {
        x / r * step + y * r + x % r
    }

    proptest! {
        #[test]
        fn every_instruction_set_moves_each_sample_to_its_channel_and_back(
            r in 1usize..9, width in 1usize..70, before in 0usize..5, after in 0usize..20, seed: u32,
        ) {
            let (width, step) = (r * width, before + r * r + after);
            let hash = |i: usize| (i as u32 ^ seed).wrapping_mul(2654435761) >> 8;
            let value = |i: usize| hash(i) as f32 / (1 << 24) as f32;
            let rows: Vec<f32> = (0..r * width).map(value).collect();
            let mean: Vec<f32> = (0..r * r).map(|i| value(i + 7)).collect();
            let scale: Vec<f32> = (0..r * r).map(|i| 0.5 + value(i + 99)).collect();
            for isa in Isa::all(&Cpu::detected()) {
                let mut cells = vec![9.0; width / r * step];
                unshuffle(isa, r, &rows, width, (&mean, &scale), &mut cells[before..], step);
                let mut want = vec![9.0; cells.len()];
                for (i, v) in rows.iter().enumerate() {
                    let (x, y) = (i % width, i / width);
                    let channel = y * r + x % r;
                    want[before + place(r, x, y, step)] = (v - mean[channel]) * scale[channel];
                }
                prop_assert_eq!(&cells, &want, "{:?}", isa);

                let shorter = width - seed as usize % r;
                for y in 0..r {
                    let (base, gain) = (&rows[y * width..][..shorter], &scale[y * r..][..r]);
                    let mut out = vec![0.0; shorter];
                    add_shuffled(isa, r, base, gain, &cells[before + y * r..], step, &mut out);
                    for (x, (out, base)) in out.iter().zip(base).enumerate() {
                        let cell = cells[before + place(r, x, y, step)];
                        prop_assert_eq!(*out, base + gain[x % r] * cell, "{:?}", isa);
                    }
                }
            }
        }
    }
}
