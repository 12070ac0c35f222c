//! Between rows of samples and rows of cells of `r * r` samples (see [`crate::nn::lite::latent`]).

use super::Isa;

/// The largest r.
const MOST: usize = 8;

/// Writes rows of samples into one row of cells as `(sample - mean) * scale`.
///
/// `rows` are `r` rows of `width` samples each; `cells` begins at the first cell's first channel for them, and cells lie
/// `step` floats apart.
///
/// # Panics
/// When a slice is too short, or r is not 1 to 8.
pub fn unshuffle(
    r: usize,
    rows: &[f32],
    width: usize,
    whiten: (&[f32], &[f32]),
    cells: &mut [f32],
    step: usize,
) {
    let (mean, scale) = whiten;
    assert!((1..=MOST).contains(&r) && mean.len() == r * r && scale.len() == r * r);
    unshuffle_on(Isa::best(), r, rows, width, whiten, cells, step);
}

/// `out = base + gain * cells` for one row of samples. `cells` begins at the first cell's channel for the row's first
/// sample, cells lie `step` floats apart, and there are `r` gains.
///
/// # Panics
/// When a slice is too short, or r is not 1 to 8.
pub fn add_shuffled(
    r: usize,
    base: &[f32],
    gain: &[f32],
    cells: &[f32],
    step: usize,
    out: &mut [f32],
) {
    assert!((1..=MOST).contains(&r) && gain.len() == r && out.len() == base.len());
    add_on(Isa::best(), r, base, gain, cells, step, out);
}

dispatch!(unshuffle_on, unshuffle_body, (r: usize, rows: &[f32], width: usize, whiten: (&[f32], &[f32]), cells: &mut [f32], step: usize));
dispatch!(add_on, add_body, (r: usize, base: &[f32], gain: &[f32], cells: &[f32], step: usize, out: &mut [f32]));

/// A multiplication and a sum are rounded each, whatever the instruction set.
#[inline(always)]
fn unshuffle_body<const FMA: bool>(
    r: usize,
    rows: &[f32],
    width: usize,
    (mean, scale): (&[f32], &[f32]),
    cells: &mut [f32],
    step: usize,
) {
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

#[inline(always)]
fn add_body<const FMA: bool>(
    r: usize,
    base: &[f32],
    gain: &[f32],
    cells: &[f32],
    step: usize,
    out: &mut [f32],
) {
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

/// `R` rows into cells of `C` = `R * R` channels.
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
    use crate::nn::lite::latent::{self, Grid, PlaneSlot};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_of_cells_are_those_of_the_whole_plane(
            r in 1usize..9, width in 1usize..70, before in 0usize..5, after in 0usize..20, seed: u32,
        ) {
            let step = before + r * r + after;
            let value = |i: usize| ((i as u32 ^ seed).wrapping_mul(2654435761) >> 8) as f32 / (1 << 24) as f32;
            let rows: Vec<f32> = (0..r * r * width).map(value).collect();
            let mean: Vec<f32> = (0..step).map(|i| value(i + 7)).collect();
            let std: Vec<f32> = (0..step).map(|i| 0.5 + value(i + 99)).collect();
            let slot = PlaneSlot { channel: before, r };
            let grid = Grid { width, height: 1, channels: step, margin: 0 };
            let mut want = vec![9.0; grid.len()];
            latent::unshuffle(&rows, r * width, slot, grid, &mean, &std, &mut want);
            let mut got = vec![9.0; grid.len()];
            let scale: Vec<f32> = std.iter().map(|s| 1.0 / s).collect();
            let part = before..before + r * r;
            unshuffle(r, &rows, r * width, (&mean[part.clone()], &scale[part.clone()]), &mut got[before..], step);
            prop_assert_eq!(&got, &want);

            let shorter = r * width - (seed as usize % r);
            for y in 0..r {
                let base = &rows[y * r * width..][..shorter];
                let mut out = vec![0.0; shorter];
                let channel = before + y * r;
                add_shuffled(r, base, &std[channel..channel + r], &got[channel..], step, &mut out);
                for (x, (out, base)) in out.iter().zip(base).enumerate() {
                    let want = base + std[channel + x % r] * got[x / r * step + channel + x % r];
                    prop_assert_eq!(*out, want);
                }
            }
        }
    }
}
