//! Nearest-neighbour upsampling by two of NHWC maps, forward and backward.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::memory::filled;

/// Turns every pixel of `x` `[rows, w, c]` into a block of 2 x 2: `[2 rows, 2w, c]`. `rows` are
/// counted through the batch.
///
/// # Panics
/// If the length does not fit.
pub fn forward(w: usize, c: usize, x: &[f32]) -> Vec<f32> {
    if x.is_empty() {
        return Vec::new();
    }
    assert_eq!(x.len() % (w * c), 0, "map");
    // SAFETY: every row writes two rows, all of them.
    unsafe {
        filled(4 * x.len(), |y| {
            let rows = y.par_chunks_exact_mut(4 * w * c);
            rows.zip(x.par_chunks_exact(w * c)).for_each(|(y, x)| {
                for y in y.chunks_exact_mut(2 * w * c) {
                    for (pair, pixel) in y.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
                        let (left, right) = pair.split_at_mut(c);
                        for ((left, right), &v) in left.iter_mut().zip(right).zip(pixel) {
                            left.write(v);
                            right.write(v);
                        }
                    }
                }
            });
        })
    }
}

/// Returns the gradient of [`forward`]: the sum of every block of 2 x 2 pixels of `gy`
/// `[2 rows, 2w, c]`.
///
/// # Panics
/// If the length does not fit.
pub fn backward(w: usize, c: usize, gy: &[f32]) -> Vec<f32> {
    if gy.is_empty() {
        return Vec::new();
    }
    assert_eq!(gy.len() % (4 * w * c), 0, "gradient of the upsampled map");
    let pair_of_rows = |gx: &mut [MaybeUninit<f32>], gy: &[f32]| {
        let (top, bottom) = gy.split_at(2 * w * c);
        let pairs = top.chunks_exact(2 * c).zip(bottom.chunks_exact(2 * c));
        for (to, (top, bottom)) in gx.chunks_exact_mut(c).zip(pairs) {
            let (a, b) = top.split_at(c);
            let (d, e) = bottom.split_at(c);
            for (((to, a), b), (d, e)) in to.iter_mut().zip(a).zip(b).zip(d.iter().zip(e)) {
                to.write((a + b) + (d + e));
            }
        }
    };
    // SAFETY: every two rows of the gradient write one row, all of it.
    unsafe {
        filled(gy.len() / 4, |gx| {
            let rows = gx.par_chunks_exact_mut(w * c);
            rows.zip(gy.par_chunks_exact(4 * w * c))
                .for_each(|(gx, gy)| pair_of_rows(gx, gy));
        })
    }
}
