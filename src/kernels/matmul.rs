//! Products of matrices in cache, by the register tiles of the convolution.

use super::{
    conv::{GradTile, Tile, blocks, tiles},
    memory::SendPtr,
    simd::Isa,
};

/// Columns in the widest block of any instruction set.
const WIDEST: usize = 64;

/// Right side of a product, `k` rows and `n` columns, arranged for the tiles of one instruction
/// set.
pub(super) struct Packed {
    isa: Isa,
    k: usize,
    n: usize,
    /// Blocks of columns one after the other, each `k` rows of its width.
    values: Vec<f32>,
}

impl Packed {
    /// Packs the matrix whose row `i` is `row(i)`.
    pub fn from_rows<'a>(isa: Isa, k: usize, n: usize, row: impl Fn(usize) -> &'a [f32]) -> Self {
        Self::pack(isa, k, n, |first, columns, width, block| {
            for (i, line) in block.chunks_exact_mut(width).enumerate() {
                line[..columns].copy_from_slice(&row(i)[first..first + columns]);
            }
        })
    }

    /// Packs the matrix whose column `j` is `column(j)`.
    pub fn from_columns<'a>(
        isa: Isa,
        k: usize,
        n: usize,
        column: impl Fn(usize) -> &'a [f32],
    ) -> Self {
        Self::pack(isa, k, n, |first, columns, width, block| {
            // A few columns at a time: a line of the block then stays in the first-level cache.
            for quad in (0..columns).step_by(8) {
                let count = (columns - quad).min(8);
                let sources: [&[f32]; 8] =
                    std::array::from_fn(|i| &column(first + quad + i.min(count - 1))[..k]);
                for (i, line) in block.chunks_exact_mut(width).enumerate() {
                    for (to, source) in line[quad..quad + count].iter_mut().zip(sources) {
                        *to = source[i];
                    }
                }
            }
        })
    }

    /// Lets `fill(first column, columns that exist, width, block)` write each block of zeros.
    fn pack(isa: Isa, k: usize, n: usize, fill: impl Fn(usize, usize, usize, &mut [f32])) -> Self {
        let tiles = tiles(isa);
        let vectors = n.div_ceil(tiles.lanes);
        let mut values = vec![0.0; vectors * tiles.lanes * k];
        let (mut first, mut rest) = (0, &mut values[..]);
        for nv in blocks(vectors, tiles.forward.len()) {
            let width = nv * tiles.lanes;
            let (block, others) = rest.split_at_mut(width * k);
            fill(first, (n - first).min(width), width, block);
            (first, rest) = (first + width, others);
        }
        Self { isa, k, n, values }
    }

    /// Computes `out = a self` for `rows` rows of `a`, `a_step` floats apart; the rows of `out` are
    /// `out_step` apart.
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn product(&self, rows: usize, a: &[f32], a_step: usize, out: &mut [f32], out_step: usize) {
        if rows == 0 || self.n == 0 {
            return;
        }
        assert!(a.len() >= (rows - 1) * a_step + self.k, "left side");
        assert!(out.len() >= (rows - 1) * out_step + self.n, "product");
        let tiles = tiles(self.isa);
        let zeros = [0.0f32; WIDEST];
        let (mut first, mut values) = (0, &self.values[..]);
        for nv in blocks(self.n.div_ceil(tiles.lanes), tiles.forward.len()) {
            let width = nv * tiles.lanes;
            let (block, others) = values.split_at(width * self.k);
            let mut tile = Tile {
                x: a.as_ptr(),
                row_stride: 0,
                px_step: a_step,
                rows: 1,
                len: self.k,
                w: block.as_ptr(),
                bias: zeros.as_ptr(),
                y: out.as_mut_ptr(),
                y_step: out_step,
                tail: (self.n - first).min(width) - (width - tiles.lanes),
                slope: 1.0,
            };
            let forward = tiles.forward[nv - 1];
            let mut row = 0;
            while row < rows {
                let Some(&(height, kernel, _)) = forward.iter().find(|t| t.0 <= rows - row) else {
                    break;
                };
                tile.x = a[row * a_step..].as_ptr();
                tile.y = out[row * out_step + first..].as_mut_ptr();
                // SAFETY: `height` rows of `k` values can be read and, in the columns of this
                // block, written, as asserted; the block holds `k` groups of its width, and there
                // are as many zeros.
                unsafe { kernel(&tile) };
                row += height;
            }
            if row < rows {
                let &(height, kernel, _) = forward.last().expect("the tables are not empty");
                let mut left = vec![0.0; height * self.k];
                let mut right = vec![0.0; height * width];
                for (i, line) in left
                    .chunks_exact_mut(self.k.max(1))
                    .enumerate()
                    .take(rows - row)
                {
                    line.copy_from_slice(&a[(row + i) * a_step..][..self.k]);
                }
                (tile.x, tile.px_step) = (left.as_ptr(), self.k);
                (tile.y, tile.y_step) = (right.as_mut_ptr(), width);
                // SAFETY: as above, on copies of the full height of the tile.
                unsafe { kernel(&tile) };
                let columns = (self.n - first).min(width);
                for (i, line) in right.chunks_exact(width).enumerate().take(rows - row) {
                    out[(row + i) * out_step + first..][..columns]
                        .copy_from_slice(&line[..columns]);
                }
            }
            (first, values) = (first + width, others);
        }
    }
}

/// Returns the distance of rows in the result of [`add_transposed`] for `n` columns.
pub(super) fn padded(isa: Isa, n: usize) -> usize {
    n.next_multiple_of(tiles(isa).lanes)
}

/// Computes `out += transpose(a) b`. `a` has `rows` rows of `m` values and `b` as many of `n`,
/// without gaps; the `m` rows of `out` are [`padded`] to whole vectors.
///
/// # Panics
/// If the length of a slice does not fit.
pub(super) fn add_transposed(
    isa: Isa,
    [rows, m, n]: [usize; 3],
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
) {
    let (tiles, step) = (tiles(isa), padded(isa, n));
    assert!(a.len() == rows * m && b.len() == rows * n && out.len() == m * step);
    if rows == 0 {
        return;
    }
    let out = SendPtr(out.as_mut_ptr());
    let mut col = 0;
    for nv in blocks(step / tiles.lanes, tiles.grads.len()) {
        let width = nv * tiles.lanes;
        let mut row = 0;
        while row < m {
            let &(height, kernel) = tiles.grads[nv - 1]
                .iter()
                .find(|t| t.0 <= m - row)
                .expect("the last kernel has one row");
            let tile = GradTile {
                a: a[row..].as_ptr(),
                a_step: m,
                b: b[col..].as_ptr(),
                b_step: n,
                pixels: rows,
                // SAFETY: inside `out`, whose rows are padded to whole vectors.
                out: unsafe { out.0.add(row * step + col) },
                out_step: step,
                tail: (n - col).min(width) - (width - tiles.lanes),
            };
            // SAFETY: each row of `a` has the rows of the tile, each row of `b` its columns up to
            // `tail`.
            unsafe { kernel(&tile) };
            row += height;
        }
        col += width;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;
    use proptest::prelude::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0)
            .collect()
    }

    fn close(got: f32, want: f64) -> bool {
        (f64::from(got) - want).abs() <= 1e-5 * (1.0 + want.abs())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_product_is_the_sum_it_stands_for(rows in 1usize..20, k in 1usize..30, n in 1usize..140) {
            let (a, b) = (values(rows * (k + 3), 1), values(k * n, 2));
            let transposed: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            let (left, right) = (values(rows * k, 3), values(rows * n, 4));
            for isa in Isa::all(&Cpu::detected()) {
                let packs = [
                    Packed::from_rows(isa, k, n, |i| &b[i * n..][..n]),
                    Packed::from_columns(isa, k, n, |j| &transposed[j * k..][..k]),
                ];
                for packed in packs {
                    let mut out = vec![f32::NAN; rows * (n + 2)];
                    packed.product(rows, &a, k + 3, &mut out, n + 2);
                    for (r, c) in (0..rows).flat_map(|r| (0..n).map(move |c| (r, c))) {
                        let at = |i| f64::from(a[r * (k + 3) + i]) * f64::from(b[i * n + c]);
                        let want: f64 = (0..k).map(at).sum();
                        prop_assert!(close(out[r * (n + 2) + c], want), "{isa:?} {r} {c}");
                    }
                    prop_assert!(out[n].is_nan(), "{isa:?} writes beyond a row");
                }
                let step = padded(isa, n);
                let mut out = vec![1.0; k * step];
                add_transposed(isa, [rows, k, n], &left, &right, &mut out);
                for (r, c) in (0..k).flat_map(|r| (0..n).map(move |c| (r, c))) {
                    let at = |i| f64::from(left[i * k + r]) * f64::from(right[i * n + c]);
                    let want: f64 = 1.0 + (0..rows).map(at).sum::<f64>();
                    prop_assert!(close(out[r * step + c], want), "{isa:?} transposed {r} {c}");
                }
            }
        }
    }
}
