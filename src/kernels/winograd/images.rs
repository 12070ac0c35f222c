//! Batches of whole images by [`Winograd`], forward and backward, for training.
//!
//! Tiles read the images in place; only those that reach beyond the sides of an image, or need
//! vectors beyond its last pixel, get a copy of their pixels. Results do not depend on the number
//! of threads.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    gradient_loops::{Images, Sums},
    layer::Winograd,
    sizes::{SIDE, TILE, lanes},
    tiles::{Input, Output},
    variant::Variant,
    weights::sums,
};
use crate::kernels::{
    conv::{ConvShape, Source, product},
    memory::SendPtr,
    simd::Isa,
};

/// Minimum number of tiles in a task.
const TASK: usize = 48;

/// Minimum number of tiles in a part of the weight gradient, and maximum number of parts. Parts are
/// summed one by one.
const PART: usize = 32;
const PARTS: usize = 16;

thread_local! {
    /// Memory for transforms.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Returns `true` if a convolution and its gradient with respect to the input can be computed this
/// way and are faster than directly: there are enough channels for the transforms of the inputs and
/// enough tiles for those of the weights.
pub fn pays(s: &ConvShape) -> bool {
    const CHANNELS: usize = 16;
    const TILES: usize = 32;
    let tiles = [s.n, s.h.div_ceil(TILE), s.w.div_ceil(TILE), 1];
    [s.kh, s.kw, s.stride, s.pad] == [3, 3, 1, 1]
        && s.ci.min(s.co) >= CHANNELS
        && s.h.min(s.w) >= TILE
        && product(tiles) >= TILES
}

/// Returns `true` if [`pays`] holds and the gradient with respect to the weights can be computed
/// this way: the sums of all parts take at most 64 MiB.
pub fn pays_for_weights(s: &ConvShape) -> bool {
    const FLOATS: usize = 16 << 20;
    pays(s) && product([s.co, s.ci, 9, PARTS]) <= FLOATS
}

/// Convolves `x` `[n, h, w, ci]` with `weights` `[co, ci, 3, 3]`, adds `bias` `[co]` and applies
/// the leaky ReLU `max(y, slope * y)`; a slope of 1 is no activation. The result `y`
/// `[n, h, w, co]` is within about 1e-5 of the direct sum, relative to the largest output.
///
/// # Panics
/// If [`pays`] is `false` for the shape or the length of a slice does not fit it.
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
    let conv = Winograd::new([s.co, s.ci], weights, bias, slope, Variant::F32(isa));
    conv.images([s.n, s.h, s.w], x, y);
}

/// Computes the gradient with respect to the input, as
/// [`conv::grad_input`](crate::kernels::conv::grad_input).
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
    let conv = Winograd::pack([s.ci, s.co], &from, &bias, 1.0, Variant::F32(isa));
    conv.images([s.n, s.h, s.w], gy, gx);
}

/// Computes the gradient with respect to the weights, as
/// [`conv::grad_weight`](crate::kernels::conv::grad_weight).
///
/// # Panics
/// If [`pays_for_weights`] is `false` for the shape or the length of a slice does not fit it.
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
            SCRATCH.with_borrow_mut(|scratch| unsafe { sums(&images, isa, scratch) })
        })
        .collect();
    Sums::write(&sums, gw);
}

impl Winograd {
    /// Convolves `x` `[n, h, w, ci]` into `y` `[n, h, w, co]`.
    fn images(&self, [n, h, w]: [usize; 3], x: &[f32], y: &mut [f32]) {
        let [co, ci] = self.channels();
        let map = Map::new([n, h, w], ci, x, self.isa());
        let len = product([n, h, w, co]);
        assert_eq!(y.len(), len, "output of {n}x{h}x{w} pixels");
        let (y, task) = (SendPtr(y.as_mut_ptr()), TASK.div_ceil(map.columns()));
        let tasks = (0..map.bands()).into_par_iter().step_by(task);
        tasks.for_each(|first| {
            let bands = first..(first + task).min(map.bands());
            let mut copies = Vec::new();
            let inputs = map.tiles::<SIDE>(bands.clone(), &mut copies);
            let mut beside = vec![0.0; self.beside(w) * bands.len()];
            let outputs = self.outputs(&map, bands.clone(), &y, &mut beside);
            // SAFETY: as many tiles of both, in rows as long as they need; the tasks' bands are
            // disjoint.
            SCRATCH.with_borrow_mut(|s| unsafe { self.run_all(&inputs, &outputs, s) });
            self.copy_last(&map, bands, &y, &beside);
        });
    }

    /// Returns the floats beside a band of images of `w` columns: a row, and the last tile.
    fn beside(&self, w: usize) -> usize {
        (w + TILE * TILE) * self.channels()[0]
    }

    /// Returns the places that the tiles of `bands` write: in `y` or, beyond the sides of an image,
    /// in `beside`. For each band `beside` has a row for all that is below the image, then the last
    /// tile.
    fn outputs(
        &self,
        map: &Map,
        bands: Range<usize>,
        y: &SendPtr,
        beside: &mut [f32],
    ) -> Vec<Output> {
        let ([co, _], whole) = (self.channels(), map.w / TILE);
        let mut outputs = Vec::with_capacity(2 * bands.len());
        for (band, beside) in bands.zip(beside.chunks_exact_mut(self.beside(map.w))) {
            let (below, last) = beside.split_at_mut(map.w * co);
            let (image, top) = map.place(band);
            let row = |r: usize| {
                if top + r < map.h {
                    // SAFETY: a row of the image.
                    unsafe { y.0.add((image * map.h + top + r) * map.w * co) }
                } else {
                    below.as_mut_ptr()
                }
            };
            outputs.push(Output {
                rows: [0, 1, 2, 3].map(row),
                skip: None,
                step: co,
                tiles: whole,
            });
            let tile = last.as_mut_ptr();
            outputs.push(Output {
                // SAFETY: there is room for the tile.
                rows: [0, 1, 2, 3].map(|r| unsafe { tile.add(r * TILE * co) }),
                skip: None,
                step: co,
                tiles: map.columns() - whole,
            });
        }
        outputs
    }

    /// Copies the pixels of last tiles that are inside the image to `y`.
    fn copy_last(&self, map: &Map, bands: Range<usize>, y: &SendPtr, beside: &[f32]) {
        let [co, _] = self.channels();
        let (whole, len) = (map.w / TILE * TILE, map.w % TILE * co);
        if len == 0 {
            return;
        }
        for (band, beside) in bands.zip(beside.chunks_exact(self.beside(map.w))) {
            let (image, top) = map.place(band);
            let rows = beside[map.w * co..].chunks_exact(TILE * co);
            for (row, from) in (top..map.h).zip(rows) {
                let to = ((image * map.h + row) * map.w + whole) * co;
                // SAFETY: the last pixels of a row of the bands of this task.
                unsafe { y.0.add(to).copy_from_nonoverlapping(from.as_ptr(), len) };
            }
        }
    }
}

/// Images that are cut into tiles. A band has as many rows as a tile, from side to side.
struct Map<'a> {
    n: usize,
    h: usize,
    w: usize,
    channels: usize,
    /// Floats that are read at a pixel: whole vectors.
    read: usize,
    values: &'a [f32],
    /// As long as a row and the pixels that its tiles read beyond it.
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

    /// Returns the number of bands of all images.
    fn bands(&self) -> usize {
        self.n * self.h.div_ceil(TILE)
    }

    /// Returns the number of tiles of a band.
    fn columns(&self) -> usize {
        self.w.div_ceil(TILE)
    }

    /// Returns the image and the first row of a band.
    fn place(&self, band: usize) -> (usize, usize) {
        let each = self.h.div_ceil(TILE);
        (band / each, band % each * TILE)
    }

    /// Returns the tiles of `bands`, each of `ROWS` by `ROWS` pixels: those that its outputs see,
    /// or only those at the places of its outputs. `copies` takes pixels that tiles cannot read in
    /// place.
    fn tiles<const ROWS: usize>(
        &self,
        bands: Range<usize>,
        copies: &mut Vec<f32>,
    ) -> Vec<Input<ROWS>> {
        let margin = (ROWS - TILE) / 2;
        // The pixels of the tile are inside the image, and the vectors of the last inside its row.
        let in_place = |tile: usize| {
            tile * TILE >= margin
                && (tile * TILE + ROWS - margin - 1) * self.channels + self.read
                    <= self.w * self.channels
        };
        let (first, end) = (
            (0..self.columns()).find(|&t| in_place(t)).unwrap_or(0),
            (0..self.columns())
                .rfind(|&t| in_place(t))
                .map_or(0, |t| t + 1),
        );
        let copied = self.columns() - (end - first);
        let size = ROWS * ROWS * self.read;
        copies.resize(bands.len() * copied * size, 0.0);
        let mut copies = copies.chunks_exact_mut(size);
        let mut tiles = Vec::with_capacity(bands.len() * (copied + 1));
        for band in bands {
            let (image, top) = self.place(band);
            // Row of the image from pixel `x` on.
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
    use crate::kernels::{
        conv::{self, Activation, reference},
        cpu::Cpu,
    };
    use proptest::prelude::*;

    /// Asserts that all are within 2e-5 of `want`, relative to its largest value.
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
            for isa in Isa::all(&Cpu::detected()) {
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
