//! Batches of whole images by [`Winograd`]: what training convolves, forward and backward.
//!
//! Tiles read the images where they lie; only those that reach beyond the sides of an image, or need vectors beyond its
//! last pixel, get a copy of their pixels. Results do not depend on the number of threads.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    Input, Output, Products, SIDE, SendPtr, Source, TILE, Winograd, lanes,
    weights::{Images, Sums},
};
use crate::ops::cpu::{
    Isa,
    conv::{ConvShape, product},
};

/// Tiles of a task, at least, where there are as many.
const TASK: usize = 48;

/// Tiles of a part of the weight gradient, at least, and parts, at most: they are summed up one by one.
const PART: usize = 32;
const PARTS: usize = 16;

thread_local! {
    /// What tiles are transformed in.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Whether a convolution and its gradient with respect to the input can be done this way, and are then faster than directly:
/// there have to be enough channels for the transforms and enough tiles for those of the weights.
pub fn pays(s: &ConvShape) -> bool {
    const CHANNELS: usize = 16;
    const TILES: usize = 32;
    let tiles = [s.n, s.h.div_ceil(TILE), s.w.div_ceil(TILE), 1];
    [s.kh, s.kw, s.stride, s.pad] == [3, 3, 1, 1]
        && s.ci.min(s.co) >= CHANNELS
        && s.h.min(s.w) >= TILE
        && product(tiles) >= TILES
}

/// As [`pays`], for the gradient with respect to the weights: there must not be so many of these that the parts' sums, which
/// threads make side by side, take more than 64 MiB together.
pub fn pays_for_weights(s: &ConvShape) -> bool {
    const FLOATS: usize = 16 << 20;
    pays(s) && product([s.co, s.ci, 9, PARTS]) <= FLOATS
}

/// Convolves `x` `[n, h, w, ci]` with `weights` `[co, ci, 3, 3]`, adds `bias` `[co]` and applies the leaky ReLU
/// `max(y, slope * y)`; 1 is none. Gives `y` `[n, h, w, co]`, within about 1e-5 of the direct sum, measured in the largest
/// output.
///
/// # Panics
/// When [`pays`] is not true of the shape or a slice's length does not fit it.
pub fn forward(
    s: &ConvShape,
    x: &[f32],
    weights: &[f32],
    bias: &[f32],
    slope: f32,
    isa: Isa,
    y: &mut [f32],
) {
    assert!(pays(s), "{s:?}");
    let conv = Winograd::new([s.co, s.ci], weights, bias, slope, Products::F32, isa);
    conv.images([s.n, s.h, s.w], x, y);
}

/// Gradient with respect to the input, as [`conv::grad_input`](crate::ops::cpu::conv::grad_input) gives it.
///
/// # Panics
/// As [`forward`].
pub fn grad_input(s: &ConvShape, gy: &[f32], weights: &[f32], isa: Isa, gx: &mut [f32]) {
    assert!(pays(s), "{s:?}");
    assert_eq!(
        weights.len(),
        product([s.co, s.ci, 3, 3]),
        "weights of {s:?}"
    );
    let from = Source {
        weights,
        output: 9,
        input: s.ci * 9,
        flip: true,
    };
    let bias = vec![0.0; s.ci];
    let conv = Winograd::pack([s.ci, s.co], &from, &bias, 1.0, Products::F32, isa);
    conv.images([s.n, s.h, s.w], gy, gx);
}

/// Gradient with respect to the weights, as [`conv::grad_weight`](crate::ops::cpu::conv::grad_weight) gives it.
///
/// # Panics
/// When [`pays_for_weights`] is not true of the shape or a slice's length does not fit it.
pub fn grad_weight(s: &ConvShape, x: &[f32], gy: &[f32], isa: Isa, gw: &mut [f32]) {
    assert!(pays_for_weights(s), "{s:?}");
    assert_eq!(gw.len(), s.co * s.ci * 9, "weight gradient of {s:?}");
    let (inputs, outputs) = (
        Map::new([s.n, s.h, s.w], s.ci, x, isa),
        Map::new([s.n, s.h, s.w], s.co, gy, isa),
    );
    let parts = (inputs.bands() * inputs.columns() / PART).clamp(1, PARTS);
    let part = inputs.bands().div_ceil(parts);
    let sums: Vec<Sums> = (0..inputs.bands().div_ceil(part))
        .into_par_iter()
        .map(|i| {
            let bands = i * part..((i + 1) * part).min(inputs.bands());
            let (mut near, mut far) = (Vec::new(), Vec::new());
            let images = Images {
                inputs: &inputs.tiles::<SIDE>(bands.clone(), &mut near),
                outputs: &outputs.tiles::<TILE>(bands, &mut far),
                channels: [s.ci, s.co],
            };
            // SAFETY: as many tiles of both, in rows as long as they need.
            SCRATCH.with_borrow_mut(|scratch| unsafe { images.sums(isa, scratch) })
        })
        .collect();
    Sums::write(&sums, gw);
}

impl Winograd {
    /// Convolves `x` `[n, h, w, ci]` into `y` `[n, h, w, co]`.
    fn images(&self, [n, h, w]: [usize; 3], x: &[f32], y: &mut [f32]) {
        let map = Map::new([n, h, w], self.ci, x, self.isa);
        let len = product([n, h, w, self.co]);
        assert_eq!(y.len(), len, "output of {n}x{h}x{w} pixels");
        let (y, task) = (SendPtr(y.as_mut_ptr()), TASK.div_ceil(map.columns()));
        let tasks = (0..map.bands()).into_par_iter().step_by(task);
        tasks.for_each(|first| {
            let bands = first..(first + task).min(map.bands());
            let mut copies = Vec::new();
            let inputs = map.tiles::<SIDE>(bands.clone(), &mut copies);
            let mut beside = vec![0.0; self.beside(w) * bands.len()];
            let outputs = self.outputs(&map, bands.clone(), &y, &mut beside);
            // SAFETY: as many tiles of both, in rows as long as they need; the tasks' bands are disjoint.
            SCRATCH.with_borrow_mut(|s| unsafe { self.run_all(&inputs, &outputs, s) });
            self.keep(&map, bands, &y, &beside);
        });
    }

    /// Floats that a band of images of `w` columns has beside them: a row, and the last tile.
    fn beside(&self, w: usize) -> usize {
        (w + TILE * TILE) * self.co
    }

    /// Where the tiles of `bands` write: to `y` or, what lies beyond the sides of an image, to `beside`. Of each band that
    /// has first a row, which takes whatever is below the image, and then the last tile.
    fn outputs(
        &self,
        map: &Map,
        bands: Range<usize>,
        y: &SendPtr,
        beside: &mut [f32],
    ) -> Vec<Output> {
        let whole = map.w / TILE;
        let mut outputs = Vec::with_capacity(2 * bands.len());
        for (band, beside) in bands.zip(beside.chunks_exact_mut(self.beside(map.w))) {
            let (below, last) = beside.split_at_mut(map.w * self.co);
            let (image, top) = map.place(band);
            let row = |r: usize| match top + r < map.h {
                // SAFETY: a row of the image.
                true => unsafe { y.0.add((image * map.h + top + r) * map.w * self.co) },
                false => below.as_mut_ptr(),
            };
            outputs.push(Output {
                rows: [0, 1, 2, 3].map(row),
                skip: None,
                step: self.co,
                tiles: whole,
            });
            let tile = last.as_mut_ptr();
            outputs.push(Output {
                // SAFETY: there is room for the tile.
                rows: [0, 1, 2, 3].map(|r| unsafe { tile.add(r * TILE * self.co) }),
                skip: None,
                step: self.co,
                tiles: map.columns() - whole,
            });
        }
        outputs
    }

    /// Brings the pixels of last tiles to `y`, as far as they are inside the image.
    fn keep(&self, map: &Map, bands: Range<usize>, y: &SendPtr, beside: &[f32]) {
        let (whole, len) = (map.w / TILE * TILE, map.w % TILE * self.co);
        if len == 0 {
            return;
        }
        for (band, beside) in bands.zip(beside.chunks_exact(self.beside(map.w))) {
            let (image, top) = map.place(band);
            let rows = beside[map.w * self.co..].chunks_exact(TILE * self.co);
            for (row, from) in (top..map.h).zip(rows) {
                let to = ((image * map.h + row) * map.w + whole) * self.co;
                // SAFETY: the last pixels of a row of this task's bands.
                unsafe { y.0.add(to).copy_from_nonoverlapping(from.as_ptr(), len) };
            }
        }
    }
}

/// Images of whose pixels tiles are made, in bands: as many rows as a tile, from side to side.
struct Map<'a> {
    n: usize,
    h: usize,
    w: usize,
    channels: usize,
    /// Floats that are read of a pixel: whole vectors.
    read: usize,
    values: &'a [f32],
    /// As long as a row and what its tiles read beyond.
    zeros: Vec<f32>,
}

impl<'a> Map<'a> {
    fn new([n, h, w]: [usize; 3], channels: usize, values: &'a [f32], isa: Isa) -> Self {
        let len = product([n, h, w, channels]);
        assert_eq!(values.len(), len, "{n}x{h}x{w} pixels of {channels}");
        let read = channels.next_multiple_of(lanes(isa));
        Self {
            n,
            h,
            w,
            channels,
            read,
            values,
            zeros: vec![0.0; (w + SIDE) * read],
        }
    }

    /// Bands of all images.
    fn bands(&self) -> usize {
        self.n * self.h.div_ceil(TILE)
    }

    /// Tiles of a band.
    fn columns(&self) -> usize {
        self.w.div_ceil(TILE)
    }

    /// Of a band, the image and the first row.
    fn place(&self, band: usize) -> (usize, usize) {
        let each = self.h.div_ceil(TILE);
        (band / each, band % each * TILE)
    }

    /// The tiles of `bands` one by one, each of `ROWS` by `ROWS` pixels: those that its outputs see, or just those at its
    /// outputs' places. `copies` takes pixels that tiles cannot read where they lie.
    fn tiles<const ROWS: usize>(
        &self,
        bands: Range<usize>,
        copies: &mut Vec<f32>,
    ) -> Vec<Input<ROWS>> {
        let margin = (ROWS - TILE) / 2;
        // Where a tile's pixels are inside the image, and the vectors of the last inside its row.
        let lies = |tile: usize| {
            tile * TILE >= margin
                && (tile * TILE + ROWS - margin - 1) * self.channels + self.read
                    <= self.w * self.channels
        };
        let (first, end) = (
            (0..self.columns()).find(|&t| lies(t)).unwrap_or(0),
            (0..self.columns()).rfind(|&t| lies(t)).map_or(0, |t| t + 1),
        );
        let copied = self.columns() - (end - first);
        let size = ROWS * ROWS * self.read;
        copies.resize(bands.len() * copied * size, 0.0);
        let mut copies = copies.chunks_exact_mut(size);
        let mut tiles = Vec::with_capacity(bands.len() * (copied + 1));
        for band in bands {
            let (image, top) = self.place(band);
            // A row of the image from pixel `x` on.
            let row = |r: usize, x: usize| {
                let y = (top + r).checked_sub(margin).filter(|&y| y < self.h)?;
                Some(&self.values[((image * self.h + y) * self.w + x) * self.channels..])
            };
            let mut copy = |tile: usize| {
                let copy = copies.next().expect("as many as are copied");
                let x = (tile * TILE).saturating_sub(margin);
                let skip = margin.saturating_sub(tile * TILE);
                let pixels = (ROWS - skip).min(self.w - x);
                for (r, line) in copy.chunks_exact_mut(ROWS * self.read).enumerate() {
                    let Some(row) = row(r, x) else { continue };
                    let to = line.chunks_exact_mut(self.read).skip(skip);
                    for (to, from) in to.zip(row.chunks_exact(self.channels).take(pixels)) {
                        to[..self.channels].copy_from_slice(from);
                    }
                }
                Input {
                    rows: std::array::from_fn(|r| copy[r * ROWS * self.read..].as_ptr()),
                    step: self.read,
                    tiles: 1,
                }
            };
            tiles.extend((0..first).map(&mut copy));
            if first < end {
                let x = first * TILE - margin;
                tiles.push(Input {
                    rows: std::array::from_fn(|r| row(r, x).unwrap_or(&self.zeros).as_ptr()),
                    step: self.channels,
                    tiles: end - first,
                });
            }
            tiles.extend((end..self.columns()).map(&mut copy));
        }
        tiles
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::values, *};
    use crate::ops::cpu::conv::{self, Activation, reference};
    use proptest::prelude::*;

    /// Asserts that all are within 2e-5 of what they should be, measured in the largest of that.
    fn assert_near(got: &[f32], want: &[f32], what: &str) -> Result<(), TestCaseError> {
        let most = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            prop_assert!(
                (got - want).abs() <= 2e-5 * most,
                "{} at {}: {}, not {}",
                what,
                i,
                got,
                want
            );
        }
        Ok(())
    }

    prop_compose! {
        fn shapes()(
            n in 1usize..4, h in 4usize..21, w in 4usize..40, ci in 16usize..70, co in 16usize..90,
        ) -> ConvShape {
            // Enough tiles.
            let n = n.max(32usize.div_ceil(h.div_ceil(TILE) * w.div_ceil(TILE)));
            ConvShape { n, h, w, ci, co, kh: 3, kw: 3, stride: 1, pad: 1 }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn images_and_gradients_are_those_of_the_formula(s in shapes(), seed: u32) {
            let pixels = s.n * s.h * s.w;
            let (x, g) = (values(pixels * s.ci, seed), values(pixels * s.co, seed ^ 1));
            let (w, bias) = (values(s.co * s.ci * 9, seed ^ 2), values(s.co, seed ^ 3));
            let wanted = reference(&s, &x, &w, Some(&bias), Activation::LeakyRelu(0.1));
            let (mut gx, mut gw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            conv::grad_input(&s, &g, &w, Isa::Portable, &mut gx);
            conv::grad_weight(&s, &x, &g, Isa::Portable, &mut gw);
            for &isa in Isa::available() {
                let mut got = [vec![f32::NAN; g.len()], vec![f32::NAN; x.len()], vec![f32::NAN; w.len()]];
                let [y, x_grad, w_grad] = &mut got;
                forward(&s, &x, &w, &bias, 0.1, isa, y);
                grad_input(&s, &g, &w, isa, x_grad);
                grad_weight(&s, &x, &g, isa, w_grad);
                for (what, (got, want)) in got.iter().zip([&wanted, &gx, &gw]).enumerate() {
                    let what = ["output", "input gradient", "weight gradient"][what];
                    assert_near(got, want, &format!("{isa:?} {s:?}, {what}"))?;
                }
            }
        }
    }

    #[test]
    #[should_panic = "has no size"]
    fn shapes_that_no_memory_holds_are_refused() {
        let s = ConvShape {
            n: 1,
            h: 4,
            w: (1 << 60) + 16,
            ci: 16,
            co: 16,
            kh: 3,
            kw: 3,
            stride: 1,
            pad: 1,
        };
        let (mut y, bias) = (vec![0.0; 1024], [0.0; 16]);
        forward(
            &s,
            &[0.0; 1024],
            &[0.0; 2304],
            &bias,
            1.0,
            Isa::best(),
            &mut y,
        );
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let s = ConvShape {
            n: 5,
            h: 37,
            w: 53,
            ci: 24,
            co: 19,
            kh: 3,
            kw: 3,
            stride: 1,
            pad: 1,
        };
        let pixels = s.n * s.h * s.w;
        let (x, w) = (values(pixels * s.ci, 1), values(s.co * s.ci * 9, 2));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                let isa = Isa::best();
                let mut y = vec![0.0; pixels * s.co];
                forward(&s, &x, &w, &[0.5; 19], 0.1, isa, &mut y);
                let (mut gx, mut gw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
                grad_input(&s, &y, &w, isa, &mut gx);
                grad_weight(&s, &x, &y, isa, &mut gw);
                [y, gx, gw]
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}
