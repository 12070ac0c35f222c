//! Gradients of the direct convolution.

use rayon::prelude::*;

use super::{
    direct::Placed,
    packed::PackedConv,
    select::tiles,
    shape::{Activation, ConvShape},
    tile::{GradFn, GradTile, Tiles, blocks},
};
use crate::kernels::{memory::SendPtr, simd::Isa};

/// Computes the gradient with respect to the input, `gx` `[n, h, w, ci]`, from `gy`
/// `[n, oh, ow, co]` and weights `[co, ci, kh, kw]`.
///
/// # Panics
/// If the length of a slice does not fit the shape or the padding is as large as the kernel.
pub fn grad_input(shape: &ConvShape, gy: &[f32], weights: &[f32], isa: Isa, gx: &mut [f32]) {
    assert!(shape.pad < shape.kh.min(shape.kw), "padding of {shape:?}");
    assert_eq!(gy.len(), shape.output_len(), "output gradient of {shape:?}");
    assert_eq!(gx.len(), shape.input_len(), "input gradient of {shape:?}");
    let (oh, ow) = shape.output();
    let spread;
    let (gy, h, w) = if shape.stride == 1 {
        (gy, oh, ow)
    } else {
        spread = insert_zeros(shape, gy);
        let side = |o: usize| (o.max(1) - 1) * shape.stride + 1;
        (&spread[..], side(oh), side(ow))
    };
    let back = ConvShape {
        h,
        w,
        ci: shape.co,
        co: shape.ci,
        stride: 1,
        pad: 0,
        ..*shape
    };
    let placed = Placed {
        shape: &back,
        oh: shape.h,
        ow: shape.w,
        top: shape.kh - 1 - shape.pad,
        left: shape.kw - 1 - shape.pad,
        step: 1,
    };
    PackedConv::transposed(shape, weights, isa).run(&placed, gy, None, Activation::None, gx);
}

/// Returns `gy` with `stride - 1` zeros between neighbours: the data gradient is then that of a
/// convolution without stride.
fn insert_zeros(shape: &ConvShape, gy: &[f32]) -> Vec<f32> {
    let (oh, ow) = shape.output();
    let side = |o: usize| (o.max(1) - 1) * shape.stride + 1;
    let (h, w, c) = (side(oh), side(ow), shape.co);
    let mut out = vec![0.0; shape.n * h * w * c];
    // One row in `stride` has values; no rows of zeros follow the last one of an image.
    let rows = out.par_chunks_mut((w * c).max(1)).enumerate();
    rows.for_each(|(row, out)| {
        let (n, y) = (row / h, row % h);
        if y.is_multiple_of(shape.stride) {
            let from = &gy[(n * oh + y / shape.stride) * ow * c..][..ow * c];
            let cells = out.chunks_mut(shape.stride * c);
            for (cell, pixel) in cells.zip(from.chunks_exact(c)) {
                cell[..c].copy_from_slice(pixel);
            }
        }
    });
    out
}

/// Computes the gradient with respect to the weights, `gw` `[co, ci, kh, kw]`, from `x`
/// `[n, h, w, ci]` and `gy` `[n, oh, ow, co]`.
///
/// # Panics
/// If the length of a slice does not fit the shape.
pub fn grad_weight(shape: &ConvShape, x: &[f32], gy: &[f32], isa: Isa, gw: &mut [f32]) {
    assert_eq!(x.len(), shape.input_len(), "input of {shape:?}");
    assert_eq!(gy.len(), shape.output_len(), "output gradient of {shape:?}");
    assert_eq!(gw.len(), shape.weight_len(), "weight gradient of {shape:?}");
    let lanes = tiles(isa).lanes;
    // The channels that fill vectors better are those in vectors.
    let fill = |c: usize| c as f64 / c.next_multiple_of(lanes) as f64;
    let swapped = fill(shape.ci) > fill(shape.co);
    let (rows, cols) = if swapped {
        (shape.co, shape.ci)
    } else {
        (shape.ci, shape.co)
    };
    let padded = cols.next_multiple_of(lanes);
    let mut sums = vec![0.0f32; shape.kh * shape.kw * rows * padded];
    WeightGrad {
        shape,
        isa,
        output: shape.output(),
        swapped,
        rows,
        cols,
        padded,
    }
    .run(x, gy, &mut sums);
    for (k, sums) in sums.chunks_exact(rows * padded).enumerate() {
        for (r, line) in sums.chunks_exact(padded).enumerate() {
            for (c, &sum) in line[..cols].iter().enumerate() {
                let (o, i) = if swapped { (r, c) } else { (c, r) };
                gw[(o * shape.ci + i) * shape.kh * shape.kw + k] = sum;
            }
        }
    }
}

/// The weight gradient as the product of a matrix of `rows` channels and one of `cols`, summed over
/// pixels.
struct WeightGrad<'a> {
    shape: &'a ConvShape,
    isa: Isa,
    /// Height and width of the output.
    output: (usize, usize),
    /// Rows are output channels and columns input channels.
    swapped: bool,
    rows: usize,
    cols: usize,
    /// `cols`, padded to whole vectors.
    padded: usize,
}

/// A tile of the weight gradient: a kernel position, some rows, a block of columns.
#[derive(Clone, Copy)]
struct GradPlace {
    ky: usize,
    kx: usize,
    /// First output column whose input column exists, and number of such columns.
    first: usize,
    pixels: usize,
    row: usize,
    col: usize,
    tail: usize,
    kernel: GradFn,
    out: usize,
}

impl WeightGrad<'_> {
    fn run(&self, x: &[f32], gy: &[f32], sums: &mut [f32]) {
        let (oh, _) = self.output;
        let tiles = self.tiles();
        let out = SendPtr(sums.as_mut_ptr());
        // A thread takes some tiles through all bands; a band of rows stays in the second-level
        // cache while the tiles pass over it.
        let share = tiles.len().div_ceil(rayon::current_num_threads()).max(1);
        let row_bytes = 4 * (self.shape.w * self.shape.ci + self.shape.w * self.shape.co);
        let band = (384 * 1024 / row_bytes.max(1)).max(1);
        tiles.par_chunks(share).for_each(|tiles| {
            let out = &out;
            for n in 0..self.shape.n {
                for first in (0..oh).step_by(band) {
                    for tile in tiles {
                        for oy in first..(first + band).min(oh) {
                            self.tile_row(tile, n, oy, x, gy, out);
                        }
                    }
                }
            }
        });
    }

    /// Returns all tiles; they write disjoint parts of the sums.
    fn tiles(&self) -> Vec<GradPlace> {
        let Tiles { lanes, grads, .. } = tiles(self.isa);
        let mut tiles = Vec::new();
        for (ky, kx) in (0..self.shape.kh).flat_map(|y| (0..self.shape.kw).map(move |x| (y, x))) {
            // The input column of output column `ox` is `ox * stride + kx - pad`.
            let s = self.shape;
            let first = s.pad.saturating_sub(kx).div_ceil(s.stride);
            let end = (s.w + s.pad).saturating_sub(kx).div_ceil(s.stride);
            let end = end.min(self.output.1);
            if first >= end {
                continue;
            }
            let pixels = end - first;
            let mut col = 0;
            for nv in blocks(self.padded / lanes, grads.len()) {
                let width = nv * lanes;
                let mut row = 0;
                while row < self.rows {
                    let &(height, kernel) = grads[nv - 1]
                        .iter()
                        .find(|t| t.0 <= self.rows - row)
                        .expect("the last kernel has one row");
                    tiles.push(GradPlace {
                        ky,
                        kx,
                        first,
                        pixels,
                        row,
                        col,
                        tail: (self.cols - col).min(width) - (width - lanes),
                        kernel,
                        out: ((ky * self.shape.kw + kx) * self.rows + row) * self.padded + col,
                    });
                    row += height;
                }
                col += width;
            }
        }
        tiles
    }

    /// Adds output row `oy` of image `n` to a tile.
    fn tile_row(&self, t: &GradPlace, n: usize, oy: usize, x: &[f32], gy: &[f32], out: &SendPtr) {
        let s = self.shape;
        let (oh, ow) = self.output;
        let Some(iy) = (oy * s.stride + t.ky)
            .checked_sub(s.pad)
            .filter(|&y| y < s.h)
        else {
            return;
        };
        let xs = &x[((n * s.h + iy) * s.w + t.first * s.stride + t.kx - s.pad) * s.ci..];
        let gs = &gy[((n * oh + oy) * ow + t.first) * s.co..];
        let (a, a_step, b, b_step) = if self.swapped {
            (gs, s.co, xs, s.stride * s.ci)
        } else {
            (xs, s.stride * s.ci, gs, s.co)
        };
        let tile = GradTile {
            a: a[t.row..].as_ptr(),
            a_step,
            b: b[t.col..].as_ptr(),
            b_step,
            pixels: t.pixels,
            // SAFETY: the offset lies inside the sums.
            out: unsafe { out.0.add(t.out) },
            out_step: self.padded,
            tail: t.tail,
        };
        // SAFETY: for each pixel the slices hold the rows of `a` and the columns of `b` that the
        // tile reads (the last vector masked to `tail`); tiles write disjoint parts of the sums.
        unsafe { (t.kernel)(&tile) };
    }
}

/// Returns the gradient with respect to the bias: the sum of `gy` `[.., co]` over all pixels, in
/// f32 within a band of 256 pixels and in f64 from band to band.
pub fn grad_bias(co: usize, gy: &[f32]) -> Vec<f32> {
    let band = |pixels: &[f32]| {
        let mut sums = vec![0.0f32; co];
        for pixel in pixels.chunks_exact(co) {
            for (sum, g) in sums.iter_mut().zip(pixel) {
                *sum += g;
            }
        }
        sums
    };
    let bands: Vec<Vec<f32>> = gy.par_chunks(co * 256).map(band).collect();
    let mut total = vec![0.0f64; co];
    for sums in &bands {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += f64::from(*sum);
        }
    }
    total.into_iter().map(|s| s as f32).collect()
}
