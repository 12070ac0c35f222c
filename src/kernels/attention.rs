//! Multi-head attention within windows of an NHWC map, forward and backward.
//!
//! Pixels are fetched from the map by their index, so windows and their shift cost nothing. Scores
//! exist for a block of queries against a block of keys only; the softmax is carried from block to
//! block by its running maximum and sum (Dao et al., "FlashAttention", arXiv 2205.14135). The
//! backward pass recomputes the scores from the logarithm of that sum. Results do not depend on the
//! number of threads.

use rayon::prelude::*;

use super::{
    math::exp,
    matmul::{Packed, add_transposed, padded},
    memory::{SendPtr, zeros},
    simd::{Isa, dispatch},
};

/// Queries and keys of one block of scores; with heads of up to 512 channels its matrices fit the
/// second-level cache.
const QUERIES: usize = 96;
const KEYS: usize = 512;

/// Added to the score of pixels that do not see each other.
const FAR: f32 = -100.0;

/// Tasks that share the sum of the gradient of the bias.
const BIAS_TASKS: usize = 16;

/// Windows of `wh x ww` pixels in `n` maps of `h x w`, rolled by `shift`, with `heads` heads of `d`
/// channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub n: usize,
    pub h: usize,
    pub w: usize,
    pub heads: usize,
    pub d: usize,
    pub wh: usize,
    pub ww: usize,
    pub shift: usize,
}

impl AttentionShape {
    /// Returns `true` if the windows divide the map and the shift is smaller than them.
    pub fn is_valid(&self) -> bool {
        let cut = |side: usize, window: usize| window > 0 && side.is_multiple_of(window);
        let nothing = self.heads == 0 || self.d == 0;
        !nothing
            && cut(self.h, self.wh)
            && cut(self.w, self.ww)
            && self.shift < self.wh.min(self.ww)
    }

    fn channels(&self) -> usize {
        self.heads * self.d
    }

    /// Returns the pixels of a window.
    fn window(&self) -> usize {
        self.wh * self.ww
    }

    fn windows(&self) -> usize {
        self.n * (self.h / self.wh) * (self.w / self.ww)
    }

    fn scale(&self) -> f32 {
        (self.d as f64).powf(-0.5) as f32
    }

    fn check(&self, qkv: &[f32], bias: Option<&[f32]>) {
        assert!(self.is_valid(), "windows of {self:?}");
        let pixels = [self.h, self.w, 3 * self.channels()];
        let len = pixels.iter().try_fold(self.n, |a, &b| a.checked_mul(b));
        assert_eq!(Some(qkv.len()), len, "queries, keys and values of {self:?}");
        if let Some(bias) = bias {
            let len = self.heads * self.window() * self.window();
            assert_eq!(bias.len(), len, "bias of {self:?}");
        }
    }
}

/// One window of one sample.
#[derive(Clone)]
struct Window {
    /// Index of each pixel in the map, counted through the batch.
    pixels: Vec<usize>,
    /// Regions: pixels of different regions do not see each other. Empty if all do.
    regions: Vec<f32>,
}

impl Window {
    fn new(s: &AttentionShape, index: usize) -> Self {
        let (rows, columns) = (s.h / s.wh, s.w / s.ww);
        let (sample, row, column) = (
            index / (rows * columns),
            index / columns % rows,
            index % columns,
        );
        let places = || {
            let ys = row * s.wh..(row + 1) * s.wh;
            ys.flat_map(|y| (column * s.ww..(column + 1) * s.ww).map(move |x| (y, x)))
        };
        let pixels = places()
            .map(|(y, x)| (sample * s.h + (y + s.shift) % s.h) * s.w + (x + s.shift) % s.w)
            .collect();
        // The mask of the ResShift networks: in the lowest windows, by columns.
        let regions = if s.shift > 0 && row + 1 == rows {
            let right = |i: usize| f32::from(u8::from(i % s.ww + s.shift >= s.ww));
            (0..s.window()).map(right).collect()
        } else {
            Vec::new()
        };
        Self { pixels, regions }
    }
}

/// One head of one window, and the map that it reads.
#[derive(Clone, Copy)]
struct Unit<'a> {
    s: &'a AttentionShape,
    isa: Isa,
    qkv: &'a [f32],
    bias: Option<&'a [f32]>,
    window: &'a Window,
    head: usize,
}

/// The keys of a block, as columns.
struct Keys {
    first: usize,
    count: usize,
    columns: Packed,
}

impl<'a> Unit<'a> {
    /// Returns the query (`part` 0), key (1) or value (2) of window pixel `i`.
    fn vector(&self, part: usize, i: usize) -> &'a [f32] {
        let c = self.s.channels();
        &self.qkv[self.window.pixels[i] * 3 * c + part * c + self.head * self.s.d..][..self.s.d]
    }

    /// Returns the channels of the head at window pixel `i`, in a map of the shape of the result.
    fn of_result(&self, map: &'a [f32], i: usize) -> &'a [f32] {
        &map[self.place(i)..][..self.s.d]
    }

    fn place(&self, i: usize) -> usize {
        self.window.pixels[i] * self.s.channels() + self.head * self.s.d
    }

    /// Returns the place of the logarithm of the softmax sum of window pixel `i`.
    fn lse_place(&self, i: usize) -> usize {
        self.window.pixels[i] * self.s.heads + self.head
    }

    fn blocks(&self, size: usize) -> impl Iterator<Item = (usize, usize)> + Clone + 'a {
        let l = self.s.window();
        (0..l)
            .step_by(size)
            .map(move |first| (first, (l - first).min(size)))
    }

    /// Writes scaled queries, without gaps.
    fn queries(&self, first: usize, count: usize, into: &mut Vec<f32>) {
        into.clear();
        let scale = self.s.scale();
        for i in first..first + count {
            into.extend(self.vector(0, i).iter().map(|v| v * scale));
        }
    }

    fn keys(&self, first: usize, count: usize) -> Keys {
        let columns =
            Packed::from_columns(self.isa, self.s.d, count, |j| self.vector(1, first + j));
        Keys {
            first,
            count,
            columns,
        }
    }

    /// Returns row `i` of the bias for a block of keys; empty without bias.
    fn bias_row(&self, i: usize, keys: &Keys) -> &'a [f32] {
        let l = self.s.window();
        self.bias.map_or(&[], |b| {
            &b[(self.head * l + i) * l + keys.first..][..keys.count]
        })
    }

    /// Computes the scores of scaled queries against a block of keys, with bias and mask.
    fn scores(&self, first: usize, queries: &[f32], keys: &Keys, scores: &mut Vec<f32>) {
        let count = queries.len() / self.s.d;
        scores.resize(count * keys.count, 0.0);
        let (d, step) = (self.s.d, keys.count);
        keys.columns.product(count, queries, d, scores, step);
        if self.bias.is_none() && self.window.regions.is_empty() {
            return;
        }
        for (i, row) in scores.chunks_exact_mut(keys.count).enumerate() {
            for (score, bias) in row.iter_mut().zip(self.bias_row(first + i, keys)) {
                *score += bias;
            }
            if let Some(&own) = self.window.regions.get(first + i) {
                let others = &self.window.regions[keys.first..][..keys.count];
                for (score, &other) in row.iter_mut().zip(others) {
                    *score += if other == own { 0.0 } else { FAR };
                }
            }
        }
    }
}

/// Computes attention into `y` `[n, h, w, heads d]` from `qkv` `[n, h, w, 3 heads d]` and `bias`
/// `[heads, l, l]` for windows of `l` pixels. Returns for every pixel and head the logarithm of the
/// softmax sum, which [`backward`] needs.
///
/// # Panics
/// If a length does not fit the shape.
pub fn forward(
    s: &AttentionShape,
    qkv: &[f32],
    bias: Option<&[f32]>,
    isa: Isa,
    y: &mut [f32],
) -> Vec<f32> {
    s.check(qkv, bias);
    assert_eq!(3 * y.len(), qkv.len(), "result of {s:?}");
    let mut lse = vec![0.0; s.n * s.h * s.w * s.heads];
    let (y, lse_out) = (SendPtr(y.as_mut_ptr()), SendPtr(lse.as_mut_ptr()));
    let windows: Vec<Window> = (0..s.windows()).map(|i| Window::new(s, i)).collect();
    (0..windows.len() * s.heads).into_par_iter().for_each(|i| {
        let unit = Unit {
            s,
            isa,
            qkv,
            bias,
            window: &windows[i / s.heads],
            head: i % s.heads,
        };
        let keys: Vec<(usize, usize)> = unit.blocks(KEYS).collect();
        let keys: Vec<(Keys, Packed)> = keys
            .into_par_iter()
            .map(|(first, count)| {
                let value = |j| unit.vector(2, first + j);
                let values = Packed::from_rows(isa, count, s.d, value);
                (unit.keys(first, count), values)
            })
            .collect();
        let blocks: Vec<(usize, usize)> = unit.blocks(QUERIES).collect();
        blocks
            .into_par_iter()
            .for_each_init(Block::default, |block, (first, count)| {
                block.attend(&unit, first, count, &keys);
                for i in 0..count {
                    let (y, lse) = (&y, &lse_out);
                    let row = &block.sums[i * s.d..][..s.d];
                    // SAFETY: every window pixel and head has its own place in both, within the
                    // lengths above.
                    unsafe {
                        let to = y.0.add(unit.place(first + i));
                        std::ptr::copy_nonoverlapping(row.as_ptr(), to, s.d);
                        let lse_of = block.max[i] + block.sum[i].ln();
                        *lse.0.add(unit.lse_place(first + i)) = lse_of;
                    }
                }
            });
    });
    lse
}

/// Returns the result of [`forward`] by its formula, in f64.
pub fn reference(s: &AttentionShape, qkv: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    s.check(qkv, bias);
    let (c, l) = (s.channels(), s.window());
    let mut y = vec![0.0; qkv.len() / 3];
    let windows = (0..s.windows()).map(|i| Window::new(s, i));
    for (window, head) in windows.flat_map(|w| (0..s.heads).map(move |head| (w.clone(), head))) {
        let vector =
            |part: usize, i: usize| &qkv[window.pixels[i] * 3 * c + part * c + head * s.d..][..s.d];
        for i in 0..l {
            let score = |j: usize| {
                let pairs = vector(0, i).iter().zip(vector(1, j));
                let dot: f64 = pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                let bias = bias.map_or(0.0, |b| f64::from(b[(head * l + i) * l + j]));
                let hidden = window.regions.get(i) != window.regions.get(j);
                let mask = if hidden { f64::from(FAR) } else { 0.0 };
                dot / (s.d as f64).sqrt() + bias + mask
            };
            let scores: Vec<f64> = (0..l).map(score).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
            let weights: Vec<f64> = scores.iter().map(|v| (v - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for k in 0..s.d {
                let terms = weights.iter().enumerate();
                let sum: f64 = terms.map(|(j, w)| w * f64::from(vector(2, j)[k])).sum();
                y[window.pixels[i] * c + head * s.d + k] = (sum / total) as f32;
            }
        }
    }
    y
}

/// State of one block of queries while it goes over the keys.
#[derive(Default)]
struct Block {
    queries: Vec<f32>,
    scores: Vec<f32>,
    /// Sum of values weighted by `exp(score - max)`, and the part of one block of keys.
    sums: Vec<f32>,
    added: Vec<f32>,
    /// Greatest score so far, and the sum of `exp(score - max)`.
    max: Vec<f32>,
    sum: Vec<f32>,
}

impl Block {
    /// Leaves the softmax-weighted means of the values in `sums`.
    fn attend(&mut self, unit: &Unit, first: usize, count: usize, keys: &[(Keys, Packed)]) {
        let (isa, d) = (unit.isa, unit.s.d);
        unit.queries(first, count, &mut self.queries);
        self.max.clear();
        self.max.resize(count, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(count, 0.0);
        self.sums.resize(count * d, 0.0);
        self.added.resize(count * d, 0.0);
        for (i, (keys, values)) in keys.iter().enumerate() {
            unit.scores(first, &self.queries, keys, &mut self.scores);
            let sums = if i == 0 {
                &mut self.sums
            } else {
                &mut self.added
            };
            let rows = self.scores.chunks_exact_mut(keys.count);
            let state = self.max.iter_mut().zip(&mut self.sum);
            // Factors by which the sums so far shrink.
            let mut shrink = [1.0f32; QUERIES];
            for ((row, (max, sum)), shrink) in rows.zip(state).zip(&mut shrink) {
                softmax_on(isa, row, max, sum, shrink);
            }
            values.product(count, &self.scores, keys.count, sums, d);
            if i > 0 {
                let rows = self.sums.chunks_exact_mut(d);
                for ((row, added), shrink) in rows.zip(self.added.chunks_exact(d)).zip(shrink) {
                    for (sum, added) in row.iter_mut().zip(added) {
                        *sum = *sum * shrink + added;
                    }
                }
            }
        }
        for (row, sum) in self.sums.chunks_exact_mut(d).zip(&self.sum) {
            let factor = sum.recip();
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

/// Lanes of a reduction, which the compiler keeps in vectors.
const LANES: usize = 16;

dispatch! {
    /// Turns a row of scores into `exp(score - max)` with the greatest score so far, and adds the
    /// row to `sum`. `shrink` is the factor from the old maximum to the new one.
    fn softmax_on<const FMA: bool>(
        row: &mut [f32],
        max: &mut f32,
        sum: &mut f32,
        shrink: &mut f32,
    ) {
        let mut greatest = [*max; LANES];
        let chunks = row.chunks_exact(LANES);
        for (&v, g) in chunks.remainder().iter().zip(&mut greatest) {
            *g = if v > *g { v } else { *g };
        }
        for chunk in chunks {
            for (&v, g) in chunk.iter().zip(&mut greatest) {
                *g = if v > *g { v } else { *g };
            }
        }
        let new = greatest.into_iter().fold(*max, f32::max);
        *shrink = exp::<FMA>(*max - new);
        let mut sums = [0.0f32; LANES];
        let mut chunks = row.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (v, sum) in chunk.iter_mut().zip(&mut sums) {
                *v = exp::<FMA>(*v - new);
                *sum += *v;
            }
        }
        for (v, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
            *v = exp::<FMA>(*v - new);
            *sum += *v;
        }
        *sum = *sum * *shrink + sums.into_iter().sum::<f32>();
        *max = new;
    }
}

/// Returns the gradients of [`forward`] with respect to `qkv` and to `bias`, if there is one, from
/// `gy`, the gradient of the result `y`. `lse` is the result of [`forward`].
///
/// # Panics
/// If a length does not fit the shape.
pub fn backward(
    s: &AttentionShape,
    qkv: &[f32],
    bias: Option<&[f32]>,
    y: &[f32],
    lse: &[f32],
    gy: &[f32],
    isa: Isa,
) -> (Vec<f32>, Option<Vec<f32>>) {
    s.check(qkv, bias);
    let fits = 3 * y.len() == qkv.len() && y.len() == gy.len() && y.len() == lse.len() * s.d;
    assert!(fits, "results and gradient of {s:?}");
    let mut grad = zeros(qkv.len());
    let windows: Vec<Window> = (0..s.windows()).map(|i| Window::new(s, i)).collect();
    let out = SendPtr(grad.as_mut_ptr());
    let table = s.window() * s.window();
    // A task takes one head of some windows, in order, and sums the gradient of the bias over them.
    let share = windows.len().div_ceil(BIAS_TASKS).max(1);
    let tasks: Vec<(&[Window], usize)> = windows
        .chunks(share)
        .flat_map(|w| (0..s.heads).map(move |head| (w, head)))
        .collect();
    let sums: Vec<Vec<f32>> = tasks
        .into_par_iter()
        .map(|(windows, head)| {
            let mut sum = vec![0.0; if bias.is_some() { table } else { 0 }];
            for window in windows {
                let unit = Unit {
                    s,
                    isa,
                    qkv,
                    bias,
                    window,
                    head,
                };
                let pass = Pass { unit, y, lse, gy };
                pass.run(&out, &mut sum);
            }
            sum
        })
        .collect();
    let bias = bias.map(|bias| {
        let mut total = vec![0.0f32; bias.len()];
        for (i, sum) in sums.iter().enumerate() {
            let head = i % s.heads;
            for (t, v) in total[head * table..][..table].iter_mut().zip(sum) {
                *t += v;
            }
        }
        total
    });
    (grad, bias)
}

/// Backward pass of one head of one window.
struct Pass<'a> {
    unit: Unit<'a>,
    y: &'a [f32],
    lse: &'a [f32],
    gy: &'a [f32],
}

/// A block of queries in the backward pass.
struct Rows {
    first: usize,
    queries: Vec<f32>,
    /// Gradient of the result.
    grad: Vec<f32>,
    lse: Vec<f32>,
    /// Sum over the channels of result times gradient; equals the sum over the keys of softmax
    /// times its gradient.
    mean: Vec<f32>,
}

/// A block of keys in the backward pass.
struct Columns {
    keys: Keys,
    /// The keys as rows.
    rows: Packed,
    /// The values as columns.
    values: Packed,
}

/// Softmax and gradient of one block of scores, and the gradient of a block of queries.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    g: Vec<f32>,
    queries: Vec<f32>,
    added: Vec<f32>,
}

dispatch! {
    fn softmax_grad_on<const FMA: bool>(lse: f32, mean: f32, p: &mut [f32], g: &mut [f32]) {
        for (p, g) in p.iter_mut().zip(g) {
            *p = exp::<FMA>(*p - lse);
            *g = *p * (*g - mean);
        }
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

impl Pass<'_> {
    fn rows(&self, (first, count): (usize, usize)) -> Rows {
        let mut queries = Vec::with_capacity(count * self.unit.s.d);
        self.unit.queries(first, count, &mut queries);
        let all = first..first + count;
        let of = |map, i| self.unit.of_result(map, i);
        let mean = |i| dot(of(self.y, i), of(self.gy, i));
        Rows {
            first,
            queries,
            grad: all.clone().flat_map(|i| of(self.gy, i)).copied().collect(),
            lse: all
                .clone()
                .map(|i| self.lse[self.unit.lse_place(i)])
                .collect(),
            mean: all.map(mean).collect(),
        }
    }

    fn columns(&self, (first, count): (usize, usize)) -> Columns {
        let (unit, d) = (&self.unit, self.unit.s.d);
        Columns {
            keys: unit.keys(first, count),
            rows: Packed::from_rows(unit.isa, count, d, |j| unit.vector(1, first + j)),
            values: Packed::from_columns(unit.isa, d, count, |j| unit.vector(2, first + j)),
        }
    }

    /// Computes the softmax of a block and the gradient of its scores.
    fn block(&self, rows: &Rows, columns: &Columns, scratch: &mut Scratch) {
        let (unit, count) = (&self.unit, columns.keys.count);
        let (p, g) = (&mut scratch.p, &mut scratch.g);
        unit.scores(rows.first, &rows.queries, &columns.keys, p);
        g.resize(p.len(), 0.0);
        let (n, d) = (rows.lse.len(), unit.s.d);
        columns.values.product(n, &rows.grad, d, g, count);
        let lines = p.chunks_exact_mut(count).zip(g.chunks_exact_mut(count));
        for ((p, g), (lse, mean)) in lines.zip(rows.lse.iter().zip(&rows.mean)) {
            softmax_grad_on(unit.isa, *lse, *mean, p, g);
        }
    }

    /// Adds the part of a block of scores to the gradient of its queries and, unless that is empty,
    /// of its rows of the bias.
    fn add_queries(&self, columns: &Columns, scratch: &mut Scratch, bias: &mut [f32]) {
        let (l, d) = (self.unit.s.window(), self.unit.s.d);
        let Keys { first, count, .. } = columns.keys;
        let n = scratch.g.len() / count;
        scratch.added.resize(n * d, 0.0);
        columns
            .rows
            .product(n, &scratch.g, count, &mut scratch.added, d);
        add(&mut scratch.queries, &scratch.added);
        let lines = bias.chunks_exact_mut(l);
        for (line, g) in lines.zip(scratch.g.chunks_exact(count)) {
            add(&mut line[first..first + count], g);
        }
    }

    /// Writes the gradient of queries, keys or values from window pixel `first` on; rows are `step`
    /// apart.
    fn store(
        &self,
        part: usize,
        first: usize,
        rows: &[f32],
        step: usize,
        scale: f32,
        out: &SendPtr,
    ) {
        let (c, d) = (self.unit.s.channels(), self.unit.s.d);
        for (i, row) in rows.chunks_exact(step).enumerate() {
            let place = self.unit.window.pixels[first + i] * 3 * c + part * c + self.unit.head * d;
            for (j, v) in row[..d].iter().enumerate() {
                // SAFETY: every window pixel, head and part has its own place within the map.
                unsafe { *out.0.add(place + j) = v * scale };
            }
        }
    }

    /// Writes the gradients of the queries, keys and values of the window, and adds that of the
    /// bias to `bias` unless it is empty.
    fn run(&self, out: &SendPtr, bias: &mut [f32]) {
        let (l, d, scale) = (self.unit.s.window(), self.unit.s.d, self.unit.s.scale());
        let keys: Vec<_> = self.unit.blocks(KEYS).collect();
        let queries: Vec<_> = self.unit.blocks(QUERIES).collect();
        let mut parts: Vec<&mut [f32]> = queries.iter().map(|_| Default::default()).collect();
        for (part, bias) in parts.iter_mut().zip(bias.chunks_mut(QUERIES * l)) {
            *part = bias;
        }
        let query_grad = |rows: &Rows, columns: &[Columns], s: &mut Scratch, bias: &mut [f32]| {
            s.queries.clear();
            s.queries.resize(rows.queries.len(), 0.0);
            for columns in columns {
                // With one block of keys the caller has computed it.
                if l > KEYS {
                    self.block(rows, columns, s);
                }
                self.add_queries(columns, s, bias);
            }
            self.store(0, rows.first, &s.queries, d, scale, out);
        };
        if l <= KEYS {
            let columns = [self.columns((0, l))];
            let mut sums = KeySums::new(&self.unit, l);
            let mut scratch = Scratch::default();
            for (place, bias) in queries.into_iter().zip(parts) {
                let rows = self.rows(place);
                self.block(&rows, &columns[0], &mut scratch);
                sums.add(&rows, &scratch);
                query_grad(&rows, &columns, &mut scratch, bias);
            }
            sums.store(self, 0, out);
            return;
        }
        let columns: Vec<Columns> = keys.into_par_iter().map(|k| self.columns(k)).collect();
        columns.par_iter().for_each(|columns| {
            let mut sums = KeySums::new(&self.unit, columns.keys.count);
            let mut scratch = Scratch::default();
            for &place in &queries {
                let rows = self.rows(place);
                self.block(&rows, columns, &mut scratch);
                sums.add(&rows, &scratch);
            }
            sums.store(self, columns.keys.first, out);
        });
        let tasks = queries.into_par_iter().zip(parts);
        tasks.for_each_init(Scratch::default, |scratch, (place, bias)| {
            query_grad(&self.rows(place), &columns, scratch, bias);
        });
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Gradients of a block of keys and of their values, in rows padded for [`add_transposed`].
struct KeySums {
    isa: Isa,
    count: usize,
    d: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KeySums {
    fn new(unit: &Unit, count: usize) -> Self {
        let (isa, d) = (unit.isa, unit.s.d);
        let zeros = vec![0.0; count * padded(isa, d)];
        Self {
            isa,
            count,
            d,
            keys: zeros.clone(),
            values: zeros,
        }
    }

    fn add(&mut self, rows: &Rows, block: &Scratch) {
        let size = [rows.lse.len(), self.count, self.d];
        add_transposed(self.isa, size, &block.g, &rows.queries, &mut self.keys);
        add_transposed(self.isa, size, &block.p, &rows.grad, &mut self.values);
    }

    fn store(&self, pass: &Pass, first: usize, out: &SendPtr) {
        let step = padded(self.isa, self.d);
        pass.store(1, first, &self.keys, step, 1.0, out);
        pass.store(2, first, &self.values, step, 1.0, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 500.7 - 2.0)
            .collect()
    }

    struct Case {
        s: AttentionShape,
        qkv: Vec<f32>,
        bias: Vec<f32>,
        gy: Vec<f32>,
    }

    impl Case {
        fn new(s: AttentionShape) -> Self {
            let y = s.n * s.h * s.w * s.heads * s.d;
            let table = s.window() * s.window();
            Self {
                s,
                qkv: values(3 * y, 1),
                bias: values(s.heads * table, 2),
                gy: values(y, 3),
            }
        }

        /// Result and gradients of `qkv` and bias.
        fn run(&self, isa: Isa) -> [Vec<f32>; 3] {
            let (s, bias) = (&self.s, Some(&self.bias[..]));
            let mut y = vec![f32::NAN; self.gy.len()];
            let lse = forward(s, &self.qkv, bias, isa, &mut y);
            let (gx, gb) = backward(s, &self.qkv, bias, &y, &lse, &self.gy, isa);
            [y, gx, gb.expect("there is a bias")]
        }
    }

    fn cases() -> [Case; 2] {
        let windows = AttentionShape {
            n: 2,
            h: 12,
            w: 15,
            heads: 3,
            d: 7,
            wh: 4,
            ww: 5,
            shift: 2,
        };
        // Two blocks of keys.
        let map = AttentionShape {
            n: 1,
            h: 24,
            w: 23,
            heads: 1,
            d: 9,
            wh: 24,
            ww: 23,
            shift: 0,
        };
        [windows, map].map(Case::new)
    }

    #[test]
    fn every_instruction_set_gives_the_same() {
        for case in cases() {
            let want = case.run(Isa::Portable);
            for isa in Isa::all(&Cpu::detected()) {
                for (got, want) in case.run(isa).iter().flatten().zip(want.iter().flatten()) {
                    let off = (got - want).abs();
                    assert!(
                        off < 2e-5 * (1.0 + want.abs()),
                        "{isa:?}: {got}, not {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        for case in cases() {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                pool.unwrap().install(|| case.run(Isa::best()))
            };
            let one = run(1);
            for threads in [2, 3, 7] {
                assert!(run(threads) == one, "{threads} threads");
            }
        }
    }

    #[test]
    fn huge_scores_stay_finite() {
        let mut case = cases().into_iter().next().expect("two cases");
        case.qkv.iter_mut().for_each(|v| *v *= 1e4);
        for isa in Isa::all(&Cpu::detected()) {
            assert!(
                case.run(isa).iter().flatten().all(|v| v.is_finite()),
                "{isa:?}"
            );
        }
    }
}
