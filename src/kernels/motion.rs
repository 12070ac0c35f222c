//! Block motion from one frame to the next, on luma.
//!
//! Every block of 8x8 pixels gets the vector that makes the window of 16x16 pixels around it most
//! alike. Candidates come from neighbouring blocks, the previous field, and a coarse search on
//! boxes of 4x4 pixels. The best is refined by whole pixels, then by half pixels. Standing still
//! and the motion of the neighbours are preferred, so that noise does not move blocks.
//!
//! The result is the same on all instruction sets.

use super::simd::{Isa, dispatch};

/// Side of a block in pixels.
pub const BLOCK: usize = 8;

/// Side of the window that is compared.
const WINDOW: usize = 16;

/// Distance of the window from its block.
const AROUND: usize = (WINDOW - BLOCK) / 2;

/// Pixels beyond the frame, which repeat its border.
const PAD: usize = 56;

/// Side of a box of the coarse search, and pixels beyond the frame in boxes.
const BOX: usize = 4;
const BOX_PAD: usize = PAD / BOX;

/// Side of the blocks of the coarse search, in boxes.
const COARSE_BLOCK: usize = 8;

/// Largest displacement of the coarse search, in boxes.
const COARSE_REACH: i16 = 6;

/// Costs in sums of absolute differences: for half a pixel of difference from the motion of the
/// neighbours, for a box of displacement in the coarse search, and the discount for no motion.
const NEIGHBOUR_COST: u32 = 8;
const COARSE_COST: u32 = 3;
const STILL_DISCOUNT: u32 = 96;

/// Steps of whole pixels at most.
const STEPS: usize = 3;

/// Longest component of a vector, in half pixels.
const LONGEST: usize = 4096;

/// Displacement in half pixels, from a position in a frame to that in the previous frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vector {
    pub x: i16,
    pub y: i16,
}

impl Vector {
    fn plus(self, x: i16, y: i16) -> Self {
        Self {
            x: self.x + x,
            y: self.y + y,
        }
    }

    /// Returns the sum of the absolute differences of both components.
    fn distance(self, other: Self) -> u32 {
        u32::from(self.x.abs_diff(other.x)) + u32::from(self.y.abs_diff(other.y))
    }
}

/// Plane of 8-bit samples with a border.
struct Padded {
    stride: usize,
    samples: Vec<u8>,
}

impl Padded {
    fn new(width: usize, height: usize, pad: usize) -> Self {
        let stride = width + 2 * pad;
        Self {
            stride,
            samples: vec![0; stride * (height + 2 * pad)],
        }
    }
}

/// Luma of a frame, prepared for the search.
pub struct MotionFrame {
    width: usize,
    height: usize,
    /// The frame at whole pixels, half a pixel to the right, half a pixel below, and both.
    phases: [Padded; 4],
    /// Means of boxes.
    boxes: Padded,
}

impl MotionFrame {
    /// Creates a black frame.
    ///
    /// # Panics
    /// If a side is 0.
    pub fn new(width: usize, height: usize) -> Self {
        assert!(width > 0 && height > 0, "{width}x{height}");
        let (columns, rows) = (width.div_ceil(BOX), height.div_ceil(BOX));
        Self {
            width,
            height,
            phases: [(); 4].map(|()| Padded::new(width, height, PAD)),
            boxes: Padded::new(columns, rows, BOX_PAD),
        }
    }

    /// Replaces the frame by `luma`, samples of 0 to 1.
    ///
    /// # Panics
    /// If the length does not fit.
    pub fn set(&mut self, luma: &[f32], isa: Isa) {
        assert_eq!(luma.len(), self.width * self.height, "luma");
        let [whole, right, below, both] = &mut self.phases;
        let stride = whole.stride;
        for (y, row) in luma.chunks_exact(self.width).enumerate() {
            let padded = &mut whole.samples[(PAD + y) * stride..][..stride];
            encode(isa, row, &mut padded[PAD..][..self.width]);
            let (first, last) = (padded[PAD], padded[PAD + self.width - 1]);
            padded[..PAD].fill(first);
            padded[PAD + self.width..].fill(last);
        }
        let row = |y: usize| y * stride..(y + 1) * stride;
        for y in 0..PAD {
            whole.samples.copy_within(row(PAD), y * stride);
            let last = PAD + self.height - 1;
            whole
                .samples
                .copy_within(row(last), (last + 1 + y) * stride);
        }
        halve(isa, &whole.samples, 1, &mut right.samples);
        halve(isa, &whole.samples, stride, &mut below.samples);
        halve(isa, &right.samples, stride, &mut both.samples);

        let (rows, columns) = (
            self.boxes.samples.len() / self.boxes.stride,
            self.boxes.stride,
        );
        let last = (whole.samples.len() / stride - BOX, stride - BOX);
        for y in 0..rows {
            let from = &whole.samples[(y * BOX).min(last.0) * stride..];
            let to = &mut self.boxes.samples[y * columns..][..columns];
            for (x, to) in to.iter_mut().enumerate() {
                let from = &from[(x * BOX).min(last.1)..];
                let rows = (0..BOX).map(|y| &from[y * stride..][..BOX]);
                let sum: u16 = rows.flatten().map(|v| u16::from(*v)).sum();
                *to = ((sum + 8) >> 4) as u8;
            }
        }
    }
}

/// Motion of the blocks of a frame.
pub struct Field {
    /// Blocks in a row.
    pub columns: usize,
    pub vectors: Vec<Vector>,
    /// Sums of absolute differences of the windows, in 8-bit steps of 256 pixels.
    pub differences: Vec<u32>,
    /// Vectors of the coarse search.
    coarse: Vec<Vector>,
    coarse_columns: usize,
}

impl Field {
    /// Creates a field without motion for frames of a size.
    pub fn new(width: usize, height: usize) -> Self {
        let (columns, rows) = (width.div_ceil(BLOCK), height.div_ceil(BLOCK));
        let side = BOX * COARSE_BLOCK;
        let coarse = (width.div_ceil(side), height.div_ceil(side));
        Self {
            columns,
            vectors: vec![Vector::default(); columns * rows],
            differences: vec![0; columns * rows],
            coarse: vec![Vector::default(); coarse.0 * coarse.1],
            coarse_columns: coarse.0,
        }
    }

    /// Searches the motion from `frame` to the `last` one. The vectors of this field, which are
    /// those of the frame before, are among the candidates.
    ///
    /// # Panics
    /// If the frames or the field are of different sizes.
    pub fn search(&mut self, frame: &MotionFrame, last: &MotionFrame, isa: Isa) {
        let size = (frame.width, frame.height);
        assert_eq!(size, (last.width, last.height), "two frames");
        assert_eq!(self.columns, size.0.div_ceil(BLOCK), "field");
        assert_eq!(
            self.vectors.len(),
            self.columns * size.1.div_ceil(BLOCK),
            "field"
        );
        search_coarsely(isa, frame, last, self);
        search(isa, frame, last, self);
    }

    /// Writes the differences of each pixel of `frame` from where it was in the `last` one, in
    /// 8-bit steps.
    ///
    /// # Panics
    /// If the frames, the field or the length of `out` are of different sizes.
    pub fn differ(&self, frame: &MotionFrame, last: &MotionFrame, out: &mut [u8]) {
        let (width, stride) = (frame.width, frame.phases[0].stride);
        assert_eq!(out.len(), width * frame.height, "differences");
        for (y, out) in out.chunks_exact_mut(width).enumerate() {
            let row = (PAD + y) * stride + PAD;
            for (column, out) in out.chunks_mut(BLOCK).enumerate() {
                let v = self.vectors[y / BLOCK * self.columns + column];
                let at = row + column * BLOCK;
                let now = &frame.phases[0].samples[at..];
                let last =
                    &last.phases[phase(v)].samples[(at as isize + offset(v, stride)) as usize..];
                for ((out, a), b) in out.iter_mut().zip(now).zip(last) {
                    *out = a.abs_diff(*b);
                }
            }
        }
    }

    /// Moves the blocks of a plane of the previous frame to where they are in this frame. The plane
    /// has pixels of `channels` values, `width` in a row, and `side` on a side of a block.
    /// Displacements are rounded to whole pixels, half of one away from 0. The border repeats
    /// beyond the frame.
    ///
    /// # Panics
    /// If the plane is empty or larger than its blocks, or the lengths differ.
    pub fn warp(&self, last: &[f32], width: usize, channels: usize, side: usize, to: &mut [f32]) {
        assert_eq!(last.len(), to.len(), "planes of one size");
        for (y, to) in to.chunks_exact_mut(width * channels).enumerate() {
            self.warp_row(last, width, channels, side, (0, y), to);
        }
    }

    /// As [`Self::warp`], for the pixels of `to` in row `y` from column `x` on.
    ///
    /// # Panics
    /// If the plane is empty or larger than its blocks, or the pixels are outside of it.
    pub fn warp_row(
        &self,
        last: &[f32],
        width: usize,
        channels: usize,
        side: usize,
        (x, y): (usize, usize),
        to: &mut [f32],
    ) {
        let (row, height) = (width * channels, last.len() / (width * channels));
        let blocks = |len: usize| len.div_ceil(side);
        let rows = self.vectors.len() / self.columns;
        assert!(
            blocks(width) <= self.columns && blocks(height) <= rows,
            "{width}x{height}"
        );
        assert!(x + to.len() / channels <= width && y < height, "{x}, {y}");
        let moved = |v: i16| (f32::from(v) * side as f32 / (2 * BLOCK) as f32).round() as isize;
        let inside = |v: isize, len: usize| v.clamp(0, len as isize - 1) as usize;
        let (mut x, mut to) = (x, to);
        while !to.is_empty() {
            let vector = self.vectors[y / side * self.columns + x / side];
            let count = (side - x % side).min(to.len() / channels);
            let (block, rest) = to.split_at_mut(count * channels);
            let from = inside(y as isize + moved(vector.y), height) * row;
            let from = &last[from..from + row];
            let start = x as isize + moved(vector.x);
            if start >= 0 && start as usize * channels + block.len() <= row {
                block.copy_from_slice(&from[start as usize * channels..][..block.len()]);
            } else {
                for (x, to) in (start..).zip(block.chunks_exact_mut(channels)) {
                    to.copy_from_slice(&from[inside(x, width) * channels..][..channels]);
                }
            }
            (x, to) = (x + count, rest);
        }
    }
}

/// Returns the index of the plane that a vector reads.
#[inline(always)]
fn phase(v: Vector) -> usize {
    usize::from(v.y & 1 != 0) * 2 + usize::from(v.x & 1 != 0)
}

/// Returns the distance to the sample that a vector reads, in planes of `stride`.
#[inline(always)]
fn offset(v: Vector, stride: usize) -> isize {
    isize::from(v.y >> 1) * stride as isize + isize::from(v.x >> 1)
}

dispatch! {
    fn encode(luma: &[f32], codes: &mut [u8]) {
        for (code, v) in codes.iter_mut().zip(luma) {
            *code = (v * 255.0 + 0.5) as u8;
        }
    }

    /// Interpolates between each sample and the one `step` behind it, with the weights -1, 9, 9 and
    /// -1 of cubic convolution. Repeats the sample where the four do not exist.
    fn halve(from: &[u8], step: usize, to: &mut [u8]) {
        let n = from.len();
        to.copy_from_slice(from);
        let inner = n.saturating_sub(3 * step);
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| &from[(i * step).min(n)..][..inner]);
        for (x, to) in to[step.min(n)..].iter_mut().take(inner).enumerate() {
            let near = i32::from(b[x]) + i32::from(c[x]);
            let far = i32::from(a[x]) + i32::from(d[x]);
            *to = ((9 * near - far + 8) >> 4).clamp(0, 255) as u8;
        }
    }

    fn search_coarsely(frame: &MotionFrame, last: &MotionFrame, field: &mut Field) {
        let stride = frame.boxes.stride;
        let (columns, rows) = (frame.width.div_ceil(BOX), frame.height.div_ceil(BOX));
        for (i, vector) in field.coarse.iter_mut().enumerate() {
            // The last blocks of a row or column overlap others.
            let at = |block: usize, len: usize| {
                (block * COARSE_BLOCK).min(len.saturating_sub(COARSE_BLOCK)) + BOX_PAD
            };
            let x = at(i % field.coarse_columns, columns);
            let y = at(i / field.coarse_columns, rows);
            let block = &frame.boxes.samples[y * stride + x..];
            let mut best = u32::MAX;
            for dy in -COARSE_REACH..=COARSE_REACH {
                for dx in -COARSE_REACH..=COARSE_REACH {
                    let from = (y as isize + dy as isize) * stride as isize;
                    let from = (from + x as isize + dx as isize) as usize;
                    let other = &last.boxes.samples[from..];
                    let displaced = u32::from(dx.unsigned_abs() + dy.unsigned_abs());
                    let cost = difference::<COARSE_BLOCK>(block, other, stride)
                        + COARSE_COST * displaced;
                    if cost < best {
                        let side = 2 * BOX as i16;
                        (best, *vector) = (cost, Vector { x: side * dx, y: side * dy });
                    }
                }
            }
        }
    }

    fn search(frame: &MotionFrame, last: &MotionFrame, field: &mut Field) {
        for block in 0..field.vectors.len() {
            let (vector, difference) = Search::new(frame, last, field, block).run(field, block);
            field.vectors[block] = vector;
            field.differences[block] = difference;
        }
    }
}

/// Returns the sum of absolute differences of two squares with `N` samples on a side.
#[inline(always)]
fn difference<const N: usize>(a: &[u8], b: &[u8], stride: usize) -> u32 {
    let mut sum = 0;
    for y in 0..N {
        let (a, b) = (&a[y * stride..][..N], &b[y * stride..][..N]);
        for x in 0..N {
            sum += u32::from(a[x].abs_diff(b[x]));
        }
    }
    sum
}

/// Search for the vector of a block.
struct Search<'a> {
    last: &'a MotionFrame,
    /// The window, and its position in the padded plane.
    window: &'a [u8],
    at: usize,
    /// Vectors that keep the window in the padded plane.
    min: Vector,
    max: Vector,
    /// Motion that the neighbours predict.
    predicted: Vector,
    best: Vector,
    cost: u32,
}

impl<'a> Search<'a> {
    #[inline(always)]
    fn new(frame: &'a MotionFrame, last: &'a MotionFrame, field: &Field, block: usize) -> Self {
        let (x, y) = (block % field.columns, block / field.columns);
        // Position of the window in the padded plane.
        let place = |block: usize| block * BLOCK + PAD - AROUND;
        let (left, top) = (place(x), place(y));
        let room = |at: usize, len: usize| len + 2 * PAD - WINDOW - 1 - at;
        let half_pixels = |pixels: usize| (2 * pixels).min(LONGEST) as i16;
        let whole = &frame.phases[0];
        let at = top * whole.stride + left;
        Self {
            last,
            window: &whole.samples[at..],
            at,
            min: Vector {
                x: -half_pixels(left),
                y: -half_pixels(top),
            },
            max: Vector {
                x: half_pixels(room(left, frame.width)),
                y: half_pixels(room(top, frame.height)),
            },
            predicted: predicted(field, x, y),
            best: Vector::default(),
            cost: u32::MAX,
        }
    }

    #[inline(always)]
    fn run(mut self, field: &Field, block: usize) -> (Vector, u32) {
        let (x, y) = (block % field.columns, block / field.columns);
        self.attempt(Vector::default());
        self.attempt(self.predicted);
        neighbours(field, x, y)
            .into_iter()
            .flatten()
            .for_each(|v| self.attempt(v));
        let side = BOX * COARSE_BLOCK / BLOCK;
        self.attempt(field.coarse[y / side * field.coarse_columns + x / side]);
        self.attempt(field.vectors[block]);
        for _ in 0..STEPS {
            let centre = self.best;
            for (x, y) in [(-2, 0), (2, 0), (0, -2), (0, 2)] {
                self.attempt(centre.plus(x, y));
            }
            if self.best == centre {
                break;
            }
        }
        let centre = self.best;
        for y in -1..=1 {
            for x in -1..=1 {
                self.attempt(centre.plus(x, y));
            }
        }
        (self.best, self.difference(self.best))
    }

    /// Makes `vector`, limited to the padded plane, the best one if it is.
    #[inline(always)]
    fn attempt(&mut self, vector: Vector) {
        let vector = Vector {
            x: vector.x.clamp(self.min.x, self.max.x),
            y: vector.y.clamp(self.min.y, self.max.y),
        };
        if vector == self.best && self.cost != u32::MAX {
            return;
        }
        let mut cost = self.difference(vector) + NEIGHBOUR_COST * vector.distance(self.predicted);
        if vector == Vector::default() {
            cost = cost.saturating_sub(STILL_DISCOUNT);
        }
        if cost < self.cost {
            (self.best, self.cost) = (vector, cost);
        }
    }

    #[inline(always)]
    fn difference(&self, v: Vector) -> u32 {
        let plane = &self.last.phases[phase(v)];
        let other = &plane.samples[(self.at as isize + offset(v, plane.stride)) as usize..];
        difference::<WINDOW>(self.window, other, plane.stride)
    }
}

/// Returns the vectors to the left of a block, above it, and above to the right, which are known.
#[inline(always)]
fn neighbours(field: &Field, x: usize, y: usize) -> [Option<Vector>; 3] {
    let block = y * field.columns + x;
    let above = (y > 0).then(|| &field.vectors[block - field.columns..]);
    let right = above.filter(|_| x + 1 < field.columns);
    [
        (x > 0).then(|| field.vectors[block - 1]),
        above.map(|row| row[0]),
        right.map(|row| row[1]),
    ]
}

/// Returns the median of the neighbours, where those that do not exist stand still, or the only
/// neighbour in the first row.
#[inline(always)]
fn predicted(field: &Field, x: usize, y: usize) -> Vector {
    let all = neighbours(field, x, y);
    if y == 0 {
        return all[0].unwrap_or_default();
    }
    let [a, b, c] = all.map(Option::unwrap_or_default);
    let median = |a: i16, b: i16, c: i16| a.max(b).min(a.min(b).max(c));
    Vector {
        x: median(a.x, b.x, c.x),
        y: median(a.y, b.y, c.y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;

    /// Returns texture without repetition at a position in pixels: random values, interpolated
    /// between points of two grids.
    fn texture(x: f32, y: f32) -> f32 {
        let value = |x: f32, y: f32| {
            let n = (x as i32).wrapping_mul(374_761_393) ^ (y as i32).wrapping_mul(668_265_263);
            let n = (n ^ (n >> 13)).wrapping_mul(1_274_126_177);
            ((n ^ (n >> 16)) & 0xff) as f32 / 255.0
        };
        let smooth = |side: f32| {
            let (x, y) = (x / side, y / side);
            let (left, top) = (x.floor(), y.floor());
            let ease = |t: f32| t * t * (3.0 - 2.0 * t);
            let (u, v) = (ease(x - left), ease(y - top));
            let row = |y: f32| value(left, y) * (1.0 - u) + value(left + 1.0, y) * u;
            row(top) * (1.0 - v) + row(top + 1.0) * v
        };
        0.6 * smooth(23.0) + 0.35 * smooth(5.0)
    }

    /// Returns a frame of texture that has moved by `dx`, `dy` pixels.
    fn frame(size: (usize, usize), dx: f32, dy: f32, isa: Isa) -> MotionFrame {
        let at = |i: usize| texture((i % size.0) as f32 - dx, (i / size.0) as f32 - dy);
        let luma: Vec<f32> = (0..size.0 * size.1).map(at).collect();
        let mut frame = MotionFrame::new(size.0, size.1);
        frame.set(&luma, isa);
        frame
    }

    fn noise(size: (usize, usize), amount: f32, seed: u32, isa: Isa) -> MotionFrame {
        let hash = |i: usize| (i as u32 ^ seed.wrapping_mul(40_503)).wrapping_mul(2_654_435_761);
        let random = |i: usize| (hash(i) >> 8) as f32 / (1 << 24) as f32 - 0.5;
        let at = |i: usize| {
            let picture = texture((i % size.0) as f32, (i / size.0) as f32);
            picture + amount * random(i)
        };
        let luma: Vec<f32> = (0..size.0 * size.1).map(at).collect();
        let mut frame = MotionFrame::new(size.0, size.1);
        frame.set(&luma, isa);
        frame
    }

    /// Returns a sample of the frame, whose border repeats.
    fn sample(frame: &MotionFrame, x: isize, y: isize) -> i32 {
        let inside = |v: isize, len: usize| v.clamp(0, len as isize - 1) as usize;
        let (x, y) = (inside(x, frame.width), inside(y, frame.height));
        let whole = &frame.phases[0];
        whole.samples[(y + PAD) * whole.stride + x + PAD].into()
    }

    /// Returns a sample at a position in half pixels: cubic convolution along x, then along y.
    fn half_sample(frame: &MotionFrame, x: isize, y: isize) -> i32 {
        let between = |v: [i32; 4]| ((9 * (v[1] + v[2]) - v[0] - v[3] + 8) >> 4).clamp(0, 255);
        let along = |y: isize| match x & 1 {
            0 => sample(frame, x >> 1, y),
            _ => between([-1, 0, 1, 2].map(|i| sample(frame, (x >> 1) + i, y))),
        };
        match y & 1 {
            0 => along(y >> 1),
            _ => between([-1, 0, 1, 2].map(|i| along((y >> 1) + i))),
        }
    }

    /// Returns the difference of the window of block `x`, `y` from that at a vector.
    fn plain_difference(
        frame: &MotionFrame,
        last: &MotionFrame,
        (x, y): (usize, usize),
        v: Vector,
    ) -> u32 {
        let start = |block: usize| (block * BLOCK) as isize - AROUND as isize;
        let pixels = (0..WINDOW * WINDOW).map(|i| {
            let x = start(x) + (i % WINDOW) as isize;
            let y = start(y) + (i / WINDOW) as isize;
            let moved = half_sample(last, 2 * x + v.x as isize, 2 * y + v.y as isize);
            sample(frame, x, y).abs_diff(moved)
        });
        pixels.sum()
    }

    fn all() -> Vec<Isa> {
        Isa::all(&Cpu::detected())
    }

    #[test]
    fn differences_are_those_of_the_plain_formula_in_frames_of_any_size() {
        for size in [(1, 1), (3, 70), (9, 5), (41, 17), (66, 40)] {
            for isa in all() {
                let (now, last) = (frame(size, 2.5, 1.0, isa), frame(size, 0.0, 0.0, isa));
                let mut field = Field::new(size.0, size.1);
                field.search(&now, &last, isa);
                for (i, (v, difference)) in field.vectors.iter().zip(&field.differences).enumerate()
                {
                    let block = (i % field.columns, i / field.columns);
                    let want = plain_difference(&now, &last, block, *v);
                    assert_eq!(*difference, want, "{size:?} {isa:?} {block:?} {v:?}");
                }
            }
        }
    }

    #[test]
    fn the_search_is_nearly_as_good_as_that_of_all_vectors() {
        let (size, isa) = ((72, 56), Isa::best());
        for (dx, dy) in [(1.0, 0.0), (-2.5, 1.5), (6.0, -3.0)] {
            let (now, last) = (frame(size, dx, dy, isa), frame(size, 0.0, 0.0, isa));
            let mut field = Field::new(size.0, size.1);
            field.search(&now, &last, isa);
            let (mut found, mut least) = (0, 0);
            for (i, difference) in field.differences.iter().enumerate() {
                let block = (i % field.columns, i / field.columns);
                let reach = -16..=16;
                let vectors = reach
                    .clone()
                    .flat_map(|y| reach.clone().map(move |x| Vector { x, y }));
                let best = vectors
                    .map(|v| plain_difference(&now, &last, block, v))
                    .min();
                least += best.unwrap();
                found += difference;
            }
            assert!(
                found <= least + least / 4 + 2000,
                "{dx} {dy}: {found}, not {least}"
            );
        }
    }

    #[test]
    fn texture_that_moves_has_its_motion() {
        let (size, isa) = ((128, 96), Isa::best());
        for (dx, dy) in [
            (0.0, 0.0),
            (3.0, -2.0),
            (0.5, 0.0),
            (-1.5, 2.5),
            (14.0, 9.0),
        ] {
            let (now, last) = (frame(size, dx, dy, isa), frame(size, 0.0, 0.0, isa));
            let mut field = Field::new(size.0, size.1);
            field.search(&now, &last, isa);
            let want = Vector {
                x: (-2.0 * dx) as i16,
                y: (-2.0 * dy) as i16,
            };
            // What enters at the border has no motion.
            let inner = field.vectors.iter().enumerate().filter(|(i, _)| {
                let (x, y) = (i % field.columns, i / field.columns);
                (3..13).contains(&x) && (3..9).contains(&y)
            });
            for (i, v) in inner {
                assert_eq!(*v, want, "block {i} of {dx} {dy}");
            }
        }
    }

    #[test]
    fn a_plane_is_warped_by_the_vectors_of_its_blocks() {
        let size = (40, 22);
        let mut field = Field::new(size.0, size.1);
        let vectors = [(0, 0), (3, -5), (-80, 1), (7, 90), (-2, 2)];
        for (i, vector) in field.vectors.iter_mut().enumerate() {
            let (x, y) = vectors[i % vectors.len()];
            *vector = Vector { x, y };
        }
        // Pixels of the frame, of twice and of four times its size, and more channels.
        for (scale, channels) in [(1, 8), (2, 1), (4, 1)] {
            let (w, h, side) = (size.0 * scale, size.1 * scale, BLOCK * scale);
            let last: Vec<f32> = (0..w * h * channels).map(|i| i as f32).collect();
            let mut warped = vec![f32::NAN; last.len()];
            field.warp(&last, w, channels, side, &mut warped);
            for (i, value) in warped.into_iter().enumerate() {
                let (x, y, c) = (i / channels % w, i / channels / w, i % channels);
                let v = field.vectors[y / side * field.columns + x / side];
                let at = |at: usize, v: i16, len: usize| {
                    let moved = at as f64 + (f64::from(v) * scale as f64 / 2.0).round();
                    moved.clamp(0.0, (len - 1) as f64) as usize
                };
                let want = last[(at(y, v.y, h) * w + at(x, v.x, w)) * channels + c];
                assert_eq!(value, want, "x{scale} at {x} {y}");
            }
        }
    }

    #[test]
    fn a_warped_frame_is_the_next_one() {
        let (size, isa) = ((128, 96), Isa::best());
        let luma = |dx: f32, dy: f32| -> Vec<f32> {
            let at = |i: usize| texture((i % size.0) as f32 - dx, (i / size.0) as f32 - dy);
            (0..size.0 * size.1).map(at).collect()
        };
        let (now, last) = (luma(4.0, -3.0), luma(0.0, 0.0));
        let mut field = Field::new(size.0, size.1);
        let [mut a, mut b] = [(); 2].map(|()| MotionFrame::new(size.0, size.1));
        a.set(&now, isa);
        b.set(&last, isa);
        field.search(&a, &b, isa);
        let mut warped = vec![0.0; last.len()];
        field.warp(&last, size.0, 1, BLOCK, &mut warped);
        let error = |plane: &[f32]| {
            let inner = (24 * size.0)..(72 * size.0);
            let pairs = plane[inner.clone()].iter().zip(&now[inner]);
            pairs.map(|(a, b)| (a - b).abs()).sum::<f32>()
        };
        assert!(error(&warped) < 0.1 * error(&last));
    }

    #[test]
    fn noise_does_not_move_a_still_picture() {
        let (size, isa) = ((96, 64), Isa::best());
        let mut field = Field::new(size.0, size.1);
        for seed in 0..4 {
            let [now, last] = [seed + 1, seed].map(|seed| noise(size, 0.03, seed, isa));
            field.search(&now, &last, isa);
            assert!(
                field.vectors.iter().all(|v| *v == Vector::default()),
                "{seed}"
            );
        }
    }

    #[test]
    fn the_widest_frame_has_motion_at_both_ends() {
        let (size, isa) = ((32_768, 24), Isa::best());
        let (now, last) = (frame(size, 3.0, 0.0, isa), frame(size, 0.0, 0.0, isa));
        let mut field = Field::new(size.0, size.1);
        field.search(&now, &last, isa);
        for x in [5, 2000, 4090] {
            assert_eq!(
                field.vectors[field.columns + x],
                Vector { x: -6, y: 0 },
                "block {x}"
            );
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same_field() {
        let size = (90, 50);
        let fields = all().into_iter().map(|isa| {
            let mut field = Field::new(size.0, size.1);
            for seed in 0..3 {
                let shift = seed as f32;
                let (now, last) = (noise(size, 0.1, seed, isa), frame(size, shift, -shift, isa));
                field.search(&now, &last, isa);
            }
            (field.vectors, field.differences)
        });
        let fields: Vec<_> = fields.collect();
        assert!(fields.iter().all(|field| *field == fields[0]));
    }
}
