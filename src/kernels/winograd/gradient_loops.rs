//! The loops of the weight gradient: `G^T [sum over tiles of (B^T d B) . (A e A^T)] G` for the
//! inputs d and the output gradients e of the tiles, the adjoint of the formula of the convolution.
//! At each of the 36 points the sum is a product of matrices: input channels by tiles by output
//! channels.

use std::ops::Range;

use super::{
    loops::{Floats, input_transform},
    sizes::{G, PAIRS, SIDE, TILE},
    tiles::{Input, Walk},
};
use crate::kernels::simd::Lanes;

/// Tiles that are transformed before they are multiplied.
pub(super) const AT_ONCE: usize = 48;

/// Points of two rows of the transform: one of [`PAIRS`] after the other is transformed and
/// multiplied, so that the data stays in the second-level cache.
pub(super) const POINTS: usize = 2 * SIDE;

/// The tiles of some images.
pub(super) struct Images<'a> {
    pub inputs: &'a [Input<SIDE>],
    /// Gradients of the outputs.
    pub outputs: &'a [Input<TILE>],
    /// Input and output channels.
    pub channels: [usize; 2],
}

/// Gradients of the kernels.
pub(super) struct Sums {
    /// Rows are output channels and columns input channels.
    pub swapped: bool,
    pub rows: usize,
    /// Channels in vectors, and their number padded to whole vectors.
    pub cols: usize,
    pub padded: usize,
    /// `[9, rows, padded]`.
    pub values: Vec<f32>,
}

impl Sums {
    /// Writes the sum of one or more parts as `[co, ci, 3, 3]`.
    pub fn write(parts: &[Self], gw: &mut [f32]) {
        let (first, others) = parts.split_first().expect("there is a part");
        let (rows, padded) = (first.rows, first.padded);
        let (to_row, to_col) = if first.swapped {
            (first.cols * 9, 9)
        } else {
            (9, rows * 9)
        };
        let mut line = vec![0.0; padded];
        for (at, values) in first.values.chunks_exact(padded).enumerate() {
            line.copy_from_slice(values);
            for other in others {
                let values = &other.values[at * padded..][..padded];
                line.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
            }
            let (k, row) = (at / rows, at % rows);
            for (col, &sum) in line[..first.cols].iter().enumerate() {
                gw[row * to_row + col * to_col + k] = sum;
            }
        }
    }
}

/// Computes the gradients, by products of `R1` to `R4` rows by 1 to 4 vectors.
///
/// # Safety
/// There are as many tiles of inputs as of outputs; their rows are as long as the tiles need, in
/// vectors of the channels; `scratch` holds the sums and both transforms; the instruction set of
/// `L` is enabled.
#[inline(always)]
pub(super) unsafe fn gradients<
    L: Lanes,
    const R1: usize,
    const R2: usize,
    const R3: usize,
    const R4: usize,
>(
    images: &Images,
    sums: &mut Sums,
    vectors: &[usize],
    scratch: &mut [f32],
) {
    let [x_step, g_step] = images.channels.map(|c| c.next_multiple_of(L::N));
    let (rows, padded) = (sums.rows, sums.padded);
    let (totals, rest) = scratch.split_at_mut(POINTS * rows * padded);
    let (xs, gs) = rest.split_at_mut(POINTS * AT_ONCE * x_step);
    let (xs, gs) = (xs.as_mut_ptr(), gs.as_mut_ptr());
    let (a, a_step, b, b_step) = if sums.swapped {
        (gs, g_step, xs, x_step)
    } else {
        (xs, x_step, gs, g_step)
    };
    for pair in 0..PAIRS.len() {
        totals.fill(0.0);
        let (mut inputs, mut outputs) = (Walk::new(images.inputs), Walk::new(images.outputs));
        loop {
            let (mut tiles, mut done) = (0, 0);
            // SAFETY: by the caller's promise; there are transforms of `AT_ONCE` tiles, of which
            // `tiles` are multiplied.
            unsafe {
                while let Some((input, range)) = inputs.next(AT_ONCE - tiles) {
                    let to = [0, SIDE].map(|point| xs.add((point * AT_ONCE + tiles) * x_step));
                    tiles += range.len();
                    for at in (0..x_step).step_by(L::N) {
                        let (range, steps) = (range.clone(), [x_step, AT_ONCE * x_step]);
                        input_transform::<Floats, L>(input, range, pair, at, to, steps);
                    }
                }
                while let Some((output, range)) = outputs.next(AT_ONCE - done) {
                    let to = [0, SIDE].map(|point| gs.add((point * AT_ONCE + done) * g_step));
                    done += range.len();
                    output_gradients::<L>(output, range, pair, to, g_step);
                }
                if tiles == 0 {
                    break fold::<L>(pair, totals, sums);
                }
                for (point, totals) in totals.chunks_exact_mut(rows * padded).enumerate() {
                    let a = a.add(point * AT_ONCE * a_step).cast_const();
                    let b = b.add(point * AT_ONCE * b_step).cast_const();
                    let mut col = 0;
                    for &vectors in vectors {
                        let product = Product {
                            tiles,
                            rows,
                            a: (a, a_step),
                            b: (b.add(col), b_step),
                            to: (totals[col..].as_mut_ptr(), padded),
                        };
                        match vectors {
                            1 => product.add::<L, R1, 1>(),
                            2 => product.add::<L, R2, 2>(),
                            3 => product.add::<L, R3, 3>(),
                            _ => product.add::<L, R4, 4>(),
                        }
                        col += vectors * L::N;
                    }
                }
            }
        }
    }
}

/// Writes two rows of `A e A^T` of tiles `tiles`: the first to `out[0]`, the second to `out[1]`,
/// with `step` floats from one tile to the next and `AT_ONCE` as many from one point to the next.
///
/// # Safety
/// The tiles lie in the output, `out` holds the points of each, the instruction set of `L` is
/// enabled.
#[inline(always)]
unsafe fn output_gradients<L: Lanes>(
    output: &Input<TILE>,
    tiles: Range<usize>,
    pair: usize,
    out: [*mut f32; 2],
    step: usize,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let (two, four) = (L::splat(2.0), L::splat(4.0));
        for channel in (0..step).step_by(L::N) {
            for (i, tile) in tiles.clone().enumerate() {
                let (mut a, mut b) = ([two; TILE], [two; TILE]);
                for x in 0..TILE {
                    let at = (tile * TILE + x) * output.step + channel;
                    let (e0, e1) = (
                        L::load(output.rows[0].add(at)),
                        L::load(output.rows[1].add(at)),
                    );
                    let (e2, e3) = (
                        L::load(output.rows[2].add(at)),
                        L::load(output.rows[3].add(at)),
                    );
                    (a[x], b[x]) = match pair {
                        0 => (e0, e3),
                        1 => {
                            let (even, odd) = (e0.add(e2), e1.add(e3));
                            (even.add(odd), even.sub(odd))
                        }
                        _ => {
                            let (even, odd) = (e2.mul_add(four, e0), e3.mul_add(four, e1));
                            (odd.mul_add(two, even), odd.neg_mul_add(two, even))
                        }
                    };
                }
                for (row, out) in [a, b].into_iter().zip(out) {
                    let (even, odd) = (row[0].add(row[2]), row[1].add(row[3]));
                    let even4 = row[2].mul_add(four, row[0]);
                    let odd4 = row[3].mul_add(four, row[1]);
                    let points = [
                        row[0],
                        even.add(odd),
                        even.sub(odd),
                        odd4.mul_add(two, even4),
                        odd4.neg_mul_add(two, even4),
                        row[3],
                    ];
                    for (x, point) in points.into_iter().enumerate() {
                        point.store(out.add((x * AT_ONCE + i) * step + channel));
                    }
                }
            }
        }
    }
}

/// The product `to[row] += sum over tiles of a[tile][row] * b[tile]`: pointers, and floats from one
/// row or tile to the next.
struct Product {
    tiles: usize,
    rows: usize,
    a: (*const f32, usize),
    b: (*const f32, usize),
    to: (*mut f32, usize),
}

impl Product {
    /// Adds the product, by `R` rows and `V` vectors of `b` at a time.
    ///
    /// # Safety
    /// The pointers are valid for as many values; the instruction set of `L` is enabled.
    #[inline(always)]
    unsafe fn add<L: Lanes, const R: usize, const V: usize>(&self) {
        let mut row = 0;
        macro_rules! by {
            ($r:expr) => {
                while self.rows - row >= $r {
                    // SAFETY: by the caller's promise.
                    unsafe { self.add_rows::<L, { $r }, V>(row) };
                    row += $r;
                }
            };
        }
        by!(R);
        by!(4);
        by!(1);
    }

    /// # Safety
    /// As [`Self::add`]; there are `R` rows from `row` on.
    #[inline(always)]
    unsafe fn add_rows<L: Lanes, const R: usize, const V: usize>(&self, row: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            let to = self.to.0.add(row * self.to.1);
            let mut sums = [[L::splat(0.0); V]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = L::load(to.add(r * self.to.1 + v * L::N));
                }
            }
            for tile in 0..self.tiles {
                let a = self.a.0.add(tile * self.a.1 + row);
                let mut b = [L::splat(0.0); V];
                for (v, b) in b.iter_mut().enumerate() {
                    *b = L::load(self.b.0.add(tile * self.b.1 + v * L::N));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = L::splat(*a.add(r));
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = a.mul_add(b, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    sum.store(to.add(r * self.to.1 + v * L::N));
                }
            }
        }
    }
}

/// Adds to `sums` the part of `G^T m G` that comes from two rows of the sums m over tiles: `totals`
/// `[2, 6, rows, padded]`.
///
/// # Safety
/// The instruction set of `L` is enabled.
#[inline(always)]
unsafe fn fold<L: Lanes>(pair: usize, totals: &[f32], sums: &mut Sums) {
    let len = sums.rows * sums.padded;
    for at in (0..len).step_by(L::N) {
        // SAFETY: `at` begins a vector in `len` floats; `totals` has 12 times `len`, `sums` 9
        // times.
        unsafe {
            let mut kernel = [L::splat(0.0); 9];
            for (k, sum) in kernel.iter_mut().enumerate() {
                *sum = L::load(sums.values[k * len + at..].as_ptr());
            }
            for (half, &row) in PAIRS[pair].iter().enumerate() {
                let mut line = [L::splat(0.0); 3];
                for x in 0..SIDE {
                    let total = L::load(totals[(half * SIDE + x) * len + at..].as_ptr());
                    for (k, sum) in line.iter_mut().enumerate() {
                        *sum = total.mul_add(L::splat(G[x][k] as f32), *sum);
                    }
                }
                for (k, sum) in kernel.iter_mut().enumerate() {
                    *sum = line[k % 3].mul_add(L::splat(G[row][k / 3] as f32), *sum);
                }
            }
            for (k, sum) in kernel.iter().enumerate() {
                sum.store(sums.values[k * len + at..].as_mut_ptr());
            }
        }
    }
}
