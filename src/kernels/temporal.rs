//! Loops of the temporal filter: change of the input from frame to frame, share of the previous
//! result by that change, and the mix. All instruction sets give the same bits.

use super::simd::{Isa, dispatch};

/// Partial sums of a row, so that the compiler vectorises them.
const SUMS: usize = 16;

/// Writes `|a - b|` to `out`, and returns its sum.
///
/// # Panics
/// If the slices differ in length.
pub(crate) fn changes(isa: Isa, a: &[f32], b: &[f32], out: &mut [f32]) -> f32 {
    assert!(a.len() == b.len() && a.len() == out.len(), "two rows");
    let mut sums = [0.0; SUMS];
    changes_on(isa, a, b, out, &mut sums);
    sums.iter().sum()
}

/// Writes `max * (1 - d / limit)^2` to `out`, or 0 where d exceeds `limit`. d is the mean of a
/// neighbourhood of 3x3 in `rows`: the row above, the row itself, and the row below. The ends of
/// the rows are repeated.
///
/// # Panics
/// If a row is shorter than `out`.
pub(crate) fn shares(isa: Isa, rows: [&[f32]; 3], limit: f32, max: f32, out: &mut [f32]) {
    shares_on(isa, rows, 1.0 / (9.0 * limit), max, out);
}

/// Adds to each value its share of the difference to the value in `last`, and writes the result to
/// both. Each of `shares` is for the next `r` values.
///
/// # Panics
/// If the lengths differ, there are too few shares, or r is 0.
pub(crate) fn mix(isa: Isa, r: usize, shares: &[f32], values: &mut [f32], last: &mut [f32]) {
    assert!(values.len() == last.len() && shares.len() * r >= values.len());
    mix_on(isa, r, shares, values, last);
}

dispatch! {
    fn changes_on(a: &[f32], b: &[f32], out: &mut [f32], sums: &mut [f32; SUMS]) {
        let (a, a_end) = a.as_chunks::<SUMS>();
        let (b, b_end) = b.as_chunks::<SUMS>();
        let (out, out_end) = out.as_chunks_mut::<SUMS>();
        for ((a, b), out) in a.iter().zip(b).zip(out) {
            for i in 0..SUMS {
                out[i] = (a[i] - b[i]).abs();
                sums[i] += out[i];
            }
        }
        for (i, ((a, b), out)) in a_end.iter().zip(b_end).zip(out_end).enumerate() {
            *out = (a - b).abs();
            sums[i] += *out;
        }
    }

    fn shares_on(rows: [&[f32]; 3], factor: f32, max: f32, out: &mut [f32]) {
        let n = out.len();
        let rows = rows.map(|row| &row[..n]);
        let column = |x: usize| rows[0][x] + rows[1][x] + rows[2][x];
        let share = |sum: f32| {
            let left = (1.0 - sum * factor).max(0.0);
            max * left * left
        };
        for x in [0, n.saturating_sub(1)].into_iter().take(n) {
            let (left, right) = (x.saturating_sub(1), (x + 1).min(n - 1));
            out[x] = share(column(left) + column(x) + column(right));
        }
        let inner = n.saturating_sub(2);
        let [left, middle, right] = [0, 1, 2].map(|i| rows.map(|row| &row[i.min(n)..][..inner]));
        for (x, out) in out.iter_mut().skip(1).take(inner).enumerate() {
            let column = |rows: &[&[f32]; 3]| rows[0][x] + rows[1][x] + rows[2][x];
            *out = share(column(&left) + column(&middle) + column(&right));
        }
    }

    fn mix_on(r: usize, shares: &[f32], values: &mut [f32], last: &mut [f32]) {
        match r {
            1 => mix_by::<1>(shares, values, last),
            2 => mix_by::<2>(shares, values, last),
            4 => mix_by::<4>(shares, values, last),
            _ => {
                let cells = values.chunks_mut(r).zip(last.chunks_mut(r));
                cells.zip(shares).for_each(|((v, l), s)| mix_cell(*s, v, l));
            }
        }
    }
}

#[inline(always)]
fn mix_by<const R: usize>(shares: &[f32], values: &mut [f32], last: &mut [f32]) {
    let (values, values_end) = values.as_chunks_mut::<R>();
    let (last, last_end) = last.as_chunks_mut::<R>();
    let cells = values.len();
    for ((v, l), s) in values.iter_mut().zip(last).zip(shares) {
        mix_cell(*s, v, l);
    }
    if let Some(s) = shares.get(cells) {
        mix_cell(*s, values_end, last_end);
    }
}

#[inline(always)]
fn mix_cell(share: f32, values: &mut [f32], last: &mut [f32]) {
    for (v, l) in values.iter_mut().zip(last) {
        *v += share * (*l - *v);
        *l = *v;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;
    use proptest::prelude::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let hash = |i: usize| (i as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8;
        (0..len)
            .map(|i| hash(i) as f32 / (1 << 24) as f32)
            .collect()
    }

    proptest! {
        #[test]
        fn every_instruction_set_computes_the_formulas_at_any_length(
            n in 0usize..80, r in 1usize..6, cut in 0usize..5, seed: u32,
        ) {
            let [a, b, c] = [1, 2, 3].map(|i| values(n, seed ^ i));
            let samples = (n * r).saturating_sub(cut.min(r - 1));
            let [new, old] = [4, 5].map(|i| values(samples, seed ^ i));
            for isa in Isa::all(&Cpu::detected()) {
                let mut out = vec![f32::NAN; n];
                let sum = changes(isa, &a, &b, &mut out);
                let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).collect();
                prop_assert_eq!(&out, &want);
                prop_assert!((sum - want.iter().sum::<f32>()).abs() < 1e-4);

                shares(isa, [&a, &b, &c], 0.7, 0.6, &mut out);
                for (x, share) in out.iter().enumerate() {
                    let around = [x.saturating_sub(1), x, (x + 1).min(n - 1)];
                    let d: f32 = around.iter().map(|&i| (a[i] + b[i] + c[i]) / 9.0).sum();
                    let want = 0.6 * (1.0 - d / 0.7).max(0.0).powi(2);
                    prop_assert!((share - want).abs() < 1e-5, "{:?} at {}", isa, x);
                }

                let (mut mixed, mut last) = (new.clone(), old.clone());
                mix(isa, r, &a, &mut mixed, &mut last);
                for x in 0..samples {
                    prop_assert_eq!(mixed[x], new[x] + a[x / r] * (old[x] - new[x]));
                }
                prop_assert_eq!(mixed, last);
            }
        }
    }
}
