//! Nearest-neighbour upsampling by two of NHWC maps, forward and backward.

use rayon::prelude::*;

/// Every pixel of `x` `[rows, w, c]` becomes a block of 2 x 2 in `y` `[2 rows, 2w, c]`; `rows` go on through a batch.
///
/// # Panics
/// When a length does not fit.
pub fn forward(w: usize, c: usize, x: &[f32], y: &mut [f32]) {
    assert_eq!(y.len(), 4 * x.len(), "upsampled map");
    if x.is_empty() {
        return;
    }
    let rows = y.par_chunks_exact_mut(4 * w * c);
    rows.zip(x.par_chunks_exact(w * c)).for_each(|(y, x)| {
        let (top, bottom) = y.split_at_mut(2 * w * c);
        for (pair, pixel) in top.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
            let (left, right) = pair.split_at_mut(c);
            left.copy_from_slice(pixel);
            right.copy_from_slice(pixel);
        }
        bottom.copy_from_slice(top);
    });
}

/// The gradient of [`forward`]: the sum of every block of 2 x 2 pixels of `gy` in `gx`.
///
/// # Panics
/// When a length does not fit.
pub fn backward(w: usize, c: usize, gy: &[f32], gx: &mut [f32]) {
    assert_eq!(gy.len(), 4 * gx.len(), "gradient of the upsampled map");
    if gx.is_empty() {
        return;
    }
    let rows = gx.par_chunks_exact_mut(w * c);
    rows.zip(gy.par_chunks_exact(4 * w * c))
        .for_each(|(gx, gy)| {
            let (top, bottom) = gy.split_at(2 * w * c);
            let pairs = top.chunks_exact(2 * c).zip(bottom.chunks_exact(2 * c));
            for (to, (top, bottom)) in gx.chunks_exact_mut(c).zip(pairs) {
                let (a, b) = top.split_at(c);
                let (d, e) = bottom.split_at(c);
                for (((to, a), b), (d, e)) in to.iter_mut().zip(a).zip(b).zip(d.iter().zip(e)) {
                    *to = (a + b) + (d + e);
                }
            }
        });
}
