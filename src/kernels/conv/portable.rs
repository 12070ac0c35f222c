//! Register tiles in plain Rust, vectorised by the compiler.

use super::tile::{GradTile, Tile, Tiles};

const LANES: usize = 8;

pub(super) static PORTABLE: Tiles = Tiles {
    lanes: LANES,
    forward: &[&[
        (4, tile::<4, false>, tile::<4, true>),
        (1, tile::<1, false>, tile::<1, true>),
    ]],
    grads: &[&[(4, grad::<4>), (1, grad::<1>)]],
};

/// # Safety
/// The tile's pointers are valid for `PX` pixels and one block of 8 channels.
unsafe fn tile<const PX: usize, const SILU: bool>(t: &Tile) {
    // SAFETY: by the caller's promise, here and below.
    unsafe {
        let mut acc = [*t.bias.cast::<[f32; LANES]>(); PX];
        let mut w = t.w;
        for r in 0..t.rows {
            let x = t.x.add(r * t.row_stride);
            for c in 0..t.len {
                let weights = *w.cast::<[f32; LANES]>();
                for (q, acc) in acc.iter_mut().enumerate() {
                    let value = *x.add(q * t.px_step + c);
                    for (a, w) in acc.iter_mut().zip(weights) {
                        *a += value * w;
                    }
                }
                w = w.add(LANES);
            }
        }
        for (q, acc) in acc.iter().enumerate() {
            for (c, &a) in acc.iter().enumerate().take(t.tail) {
                *t.y.add(q * t.y_step + c) = if SILU {
                    a / (1.0 + (-a).exp())
                } else {
                    a.max(a * t.slope)
                };
            }
        }
    }
}

/// # Safety
/// The tile's pointers are valid for `Q` rows and one block of 8 channels.
unsafe fn grad<const Q: usize>(t: &GradTile) {
    // SAFETY: by the caller's promise, here and below.
    unsafe {
        let mut acc = [[0.0f32; LANES]; Q];
        for p in 0..t.pixels {
            let b = t.b.add(p * t.b_step);
            let mut values = [0.0f32; LANES];
            if t.tail == LANES {
                values = *b.cast::<[f32; LANES]>();
            } else {
                for (c, value) in values.iter_mut().enumerate().take(t.tail) {
                    *value = *b.add(c);
                }
            }
            for (q, acc) in acc.iter_mut().enumerate() {
                let a = *t.a.add(p * t.a_step + q);
                for (sum, b) in acc.iter_mut().zip(values) {
                    *sum += a * b;
                }
            }
        }
        for (q, acc) in acc.iter().enumerate() {
            for (c, a) in acc.iter().enumerate() {
                *t.out.add(q * t.out_step + c) += a;
            }
        }
    }
}
