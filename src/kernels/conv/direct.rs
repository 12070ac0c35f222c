//! Rows of the direct convolution, tile by tile.

use super::{
    shape::{Activation, ConvShape},
    tile::{Tile, TileFn},
};

/// A convolution whose output size and upper left padding are given, so that the data gradient fits
/// too.
pub(super) struct Placed<'a> {
    pub shape: &'a ConvShape,
    pub oh: usize,
    pub ow: usize,
    pub top: usize,
    pub left: usize,
    /// Distance of output pixels in the output map, across and down.
    pub step: usize,
}

impl Placed<'_> {
    /// Rows of a task: few tasks cost less, many balance the threads.
    pub fn band(&self) -> usize {
        (self.shape.n * self.oh / (rayon::current_num_threads() * 8)).clamp(1, 16)
    }
}

/// A block of output channels.
pub(super) struct Block<'a> {
    pub weights: &'a [f32],
    pub bias: &'a [f32],
    /// First output channel.
    pub channel: usize,
    /// Channels in the block, padded to whole vectors.
    pub width: usize,
    pub tail: usize,
    pub tiles: &'static [(usize, TileFn, TileFn)],
    pub activation: Activation,
}

impl Block<'_> {
    /// Computes the channels of the block in output row `r`, counted through the batch, into `out`.
    pub fn row(&self, p: &Placed, x: &[f32], r: usize, out: &mut [f32], scratch: &mut Vec<f32>) {
        let s = p.shape;
        let (image, oy) = (r / p.oh, r % p.oh);
        // Kernel rows inside the input.
        let y0 = (oy * s.stride) as isize - p.top as isize;
        let k0 = (-y0).clamp(0, s.kh as isize) as usize;
        let k1 = (s.h as isize - y0).clamp(k0 as isize, s.kh as isize) as usize;
        let (len, y_step) = (s.kw * s.ci, p.step * s.co);
        let first_row = image * s.h + (y0 + k0 as isize).max(0) as usize;
        let mut tile = Tile {
            x: x.as_ptr(),
            row_stride: s.w * s.ci,
            px_step: s.stride * s.ci,
            rows: k1 - k0,
            len,
            w: self.weights[k0 * len * self.width..].as_ptr(),
            bias: self.bias.as_ptr(),
            y: out.as_mut_ptr(),
            y_step,
            tail: self.tail,
            slope: self.activation.slope().unwrap_or(1.0),
        };
        let input = &x[(first_row * s.w * s.ci).min(x.len())..];
        let mut col = 0;
        while col < p.ow {
            let left = p.ow - col;
            // The widest tile that fits, or the narrowest that covers the rest.
            let &(px, plain, silu) = self
                .tiles
                .iter()
                .find(|t| t.0 <= left)
                .or(self.tiles.iter().rfind(|t| t.0 >= left))
                .expect("the tables are not empty");
            let kernel = if self.activation == Activation::Silu {
                silu
            } else {
                plain
            };
            let x0 = (col * s.stride) as isize - p.left as isize;
            let columns = (px - 1) * s.stride + s.kw;
            let inside = tile.rows > 0 && x0 >= 0 && x0 as usize + columns <= s.w;
            if inside {
                tile.x = input[x0 as usize * s.ci..].as_ptr();
                tile.row_stride = s.w * s.ci;
            } else {
                let patch = patch(s, input, tile.rows, x0, columns, scratch);
                tile.x = patch.as_ptr();
                tile.row_stride = columns * s.ci;
            }
            if px <= left {
                tile.y = out[col * y_step + self.channel..].as_mut_ptr();
                tile.y_step = y_step;
                // SAFETY: the input rows (or the patch) hold `rows` runs for `px` pixels, the
                // packed weights `rows * len` groups, the output `px` pixels, in which the channels
                // of the block are written.
                unsafe { kernel(&tile) };
            } else {
                self.overhang(kernel, px, left, &mut tile, &mut out[col * y_step..], s.co);
            }
            col += px;
        }
    }

    /// Runs a tile of `px` pixels, of which only `keep` exist.
    fn overhang(
        &self,
        kernel: TileFn,
        px: usize,
        keep: usize,
        tile: &mut Tile,
        out: &mut [f32],
        co: usize,
    ) {
        let y_step = tile.y_step;
        let mut buffer = vec![0.0f32; px * self.width];
        tile.y = buffer.as_mut_ptr();
        tile.y_step = self.width;
        // SAFETY: as in `row`; the buffer holds `px` pixels of the block.
        unsafe { kernel(tile) };
        let channels = (co - self.channel).min(self.width);
        for (to, from) in out
            .chunks_mut(y_step)
            .zip(buffer.chunks_exact(self.width))
            .take(keep)
        {
            to[self.channel..self.channel + channels].copy_from_slice(&from[..channels]);
        }
    }
}

/// Adds `residual` to `y`.
pub(super) fn add(y: &mut [f32], residual: &[f32]) {
    y.iter_mut().zip(residual).for_each(|(y, r)| *y += r);
}

/// Copies `columns` input columns from `x0` on of `rows` rows, with zeros beyond the input.
fn patch<'s>(
    s: &ConvShape,
    input: &[f32],
    rows: usize,
    x0: isize,
    columns: usize,
    scratch: &'s mut Vec<f32>,
) -> &'s [f32] {
    let row = columns * s.ci;
    scratch.clear();
    scratch.resize(rows * row, 0.0);
    let from = x0.clamp(0, s.w as isize) as usize;
    let to = (x0 + columns as isize).clamp(from as isize, s.w as isize) as usize;
    if to > from {
        let skip = (from as isize - x0) as usize * s.ci;
        for (r, line) in scratch.chunks_exact_mut(row).enumerate() {
            let source = &input[(r * s.w + from) * s.ci..(r * s.w + to) * s.ci];
            line[skip..skip + source.len()].copy_from_slice(source);
        }
    }
    scratch
}
