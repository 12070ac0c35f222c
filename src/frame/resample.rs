//! Separable resampling of f32 planes.
//!
//! Output sample j of an axis reads the source around position (j + c) * ratio - c, where ratio is source
//! samples per output sample and c says where the grids meet: 0.5 when both cover the same length with centred
//! samples, 0.25 for chroma that is cosited with every second luma sample (chroma sample i lies at luma
//! position 2i, so the luma grids meet at c = 0.5 and the chroma grids at half of that), 0 when the first
//! samples coincide.
//!
//! The result does not depend on the number of threads or on the processor: every output is the same sum in the
//! same order.

use std::{cell::RefCell, f64::consts::PI, ops::Range as Rows};

use rayon::prelude::*;

use super::{
    Component, FrameInfo,
    simd::{Level, per_level},
};
use crate::Result;

/// Rows that the general horizontal kernel handles at once.
const LANES: usize = 16;

/// Samples that make a task worth handing to another thread.
const SAMPLES_PER_TASK: usize = 1 << 16;

/// Rows below which a task repeats too much of its neighbours' horizontal work.
const MIN_TASK_ROWS: usize = 32;

/// The shape of an interpolation filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Cubic convolution with a = -0.75: PyTorch's `interpolate(mode="bicubic")`, OpenCV's `INTER_CUBIC`.
    Bicubic,
    /// Cubic convolution with a = -0.5: PIL's `BICUBIC`, also PyTorch's with `antialias=True`. Reproduces
    /// linear ramps.
    CatmullRom,
    /// Sinc windowed by a sinc, three lobes: PIL's `LANCZOS`.
    Lanczos3,
    /// Linear interpolation.
    Bilinear,
    /// The mean of the source over the output sample's area, at any ratio, antialiased or not.
    Area,
}

/// How the grids of an [`Axis`] lie on each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// When the axis shrinks, widen the kernel by the ratio; at the borders drop the taps outside and scale up
    /// the others, as PIL and PyTorch's `antialias=True` do. Without it, taps outside replicate the border
    /// sample and the kernel keeps its width.
    pub antialias: bool,
    /// Where the grids meet, in samples: 0.5 for centred samples, 0.25 for cosited subsampled chroma.
    pub centre: f64,
    /// Source samples per output sample; `None` for the ratio of the lengths. Chroma of odd-sized frames takes
    /// the luma's.
    pub ratio: Option<f64>,
}

impl Default for Options {
    /// Centred, not antialiased, the ratio of the lengths.
    fn default() -> Self {
        Self {
            antialias: false,
            centre: 0.5,
            ratio: None,
        }
    }
}

/// One direction of a resampler: for each output sample, which source samples it weighs and how.
#[derive(Clone, Debug)]
pub struct Axis {
    src_len: usize,
    /// Source samples that each output weighs.
    taps: usize,
    /// First source sample of each output; never decreases, and all taps lie in the source.
    starts: Vec<u32>,
    /// `taps` weights for each output.
    weights: Vec<f32>,
    /// Output j is source j.
    identity: bool,
    phases: Option<Phases>,
}

/// Source samples that one period of [`Phases`] reads.
const WINDOW: usize = 5;

/// The middle of an axis that enlarges by a whole factor: period p reads the window of `WINDOW` samples at
/// `source + p` and writes one output per phase, with weights that do not depend on p.
#[derive(Clone, Debug)]
struct Phases {
    /// First output of the first period.
    output: usize,
    /// First source sample of the first period.
    source: usize,
    periods: usize,
    /// Weights over the window, for each phase: 2 to 4 phases.
    weights: Vec<[f32; WINDOW]>,
}

/// Resamples planes from one size to another.
#[derive(Clone, Debug)]
pub struct Resampler {
    horizontal: Axis,
    vertical: Axis,
    /// Which direction goes first: the order that costs less.
    horizontal_first: bool,
}

impl Kernel {
    /// Half the width outside which the kernel is 0, for a kernel widened by `width` at `ratio`.
    fn support(self, width: f64, ratio: f64) -> f64 {
        match self {
            Self::Bicubic | Self::CatmullRom => 2.0 * width,
            Self::Lanczos3 => 3.0 * width,
            Self::Bilinear => width,
            Self::Area => (ratio + 1.0) / 2.0,
        }
    }

    /// The weight, not yet normalised, of the source sample at distance `d` from the output's position.
    fn weight(self, d: f64, width: f64, ratio: f64) -> f64 {
        let x = (d / width).abs();
        match self {
            Self::Bicubic => cubic_convolution(x, -0.75),
            Self::CatmullRom => cubic_convolution(x, -0.5),
            Self::Lanczos3 if x < 3.0 => sinc(x) * sinc(x / 3.0),
            Self::Lanczos3 => 0.0,
            Self::Bilinear => (1.0 - x).max(0.0),
            // The length that the source sample and the output sample share.
            Self::Area => {
                let half = ratio / 2.0;
                ((d + 0.5).min(half) - (d - 0.5).max(-half)).max(0.0)
            }
        }
    }
}

/// R. G. Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4 with free a.
fn cubic_convolution(x: f64, a: f64) -> f64 {
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        1.0
    } else {
        (PI * x).sin() / (PI * x)
    }
}

/// The geometry of an axis, before weights.
#[derive(Clone, Copy)]
struct Grid {
    src_len: usize,
    kernel: Kernel,
    /// Replicate the border rather than drop the taps outside.
    replicate: bool,
    centre: f64,
    ratio: f64,
    /// How much wider than at ratio 1 the kernel is.
    width: f64,
}

/// `x`, or the integer that it misses by rounding noise: where grids meet, noise must not bring in a neighbour.
fn snap(x: f64) -> f64 {
    let nearest = x.round();
    if (x - nearest).abs() < 1e-9 {
        nearest
    } else {
        x
    }
}

impl Grid {
    /// Source position of output `j`.
    fn position(&self, j: usize) -> f64 {
        snap((j as f64 + self.centre) * self.ratio - self.centre)
    }

    /// The source positions within reach of output `j`, (first, last + 1); they may lie outside the source.
    fn reach(&self, j: usize) -> (i64, i64) {
        let position = self.position(j);
        let support = self.kernel.support(self.width, self.ratio);
        (
            snap(position - support).floor() as i64 + 1,
            snap(position + support).ceil() as i64,
        )
    }

    /// The source positions that output `j` weighs: with a replicated border they may lie outside the source.
    fn window(&self, j: usize) -> (i64, i64) {
        let (low, high) = self.reach(j);
        if self.replicate {
            (low, high)
        } else {
            let len = self.src_len as i64;
            (low.clamp(0, len - 1), high.clamp(1, len))
        }
    }

    /// Adds up the normalised weights of output `j` in `sums`, whose first element is source sample `start`.
    fn weigh(&self, j: usize, start: usize, sums: &mut [f64]) {
        sums.fill(0.0);
        let position = self.position(j);
        let last = self.src_len as i64 - 1;
        let (low, high) = self.window(j);
        for i in low..high {
            let weight = self
                .kernel
                .weight(i as f64 - position, self.width, self.ratio);
            sums[i.clamp(0, last) as usize - start] += weight;
        }
        let total: f64 = sums.iter().sum();
        let whole = match self.kernel {
            Kernel::Area => self.ratio,
            _ => self.width,
        };
        if total < 0.1 * whole {
            // An output outside the source: what is in reach cancels out.
            let nearest = (position as i64).clamp(0, last) as usize;
            sums.fill(0.0);
            sums[nearest.saturating_sub(start).min(sums.len() - 1)] = 1.0;
        } else {
            sums.iter_mut().for_each(|w| *w /= total);
        }
    }
}

impl Axis {
    /// An axis from `src_len` to `dst_len` samples.
    ///
    /// # Panics
    /// When a length is 0 or beyond 2^31, the ratio is not positive or the centre not finite.
    pub fn new(src_len: usize, dst_len: usize, kernel: Kernel, options: Options) -> Self {
        let lengths = 1..=1 << 31;
        assert!(
            lengths.contains(&src_len) && lengths.contains(&dst_len),
            "{src_len} to {dst_len} samples"
        );
        let ratio = options.ratio.unwrap_or(src_len as f64 / dst_len as f64);
        assert!(
            ratio > 0.0 && ratio.is_finite() && options.centre.is_finite(),
            "{options:?}"
        );
        let grid = Grid {
            src_len,
            kernel,
            replicate: !options.antialias,
            centre: options.centre,
            ratio,
            width: if options.antialias {
                ratio.max(1.0)
            } else {
                1.0
            },
        };
        let widest = (0..dst_len).map(|j| grid.window(j)).map(|(a, b)| b - a);
        let taps = widest.max().unwrap_or(1).clamp(1, src_len as i64) as usize;
        let mut axis = Self {
            src_len,
            taps,
            starts: Vec::with_capacity(dst_len),
            weights: Vec::with_capacity(dst_len * taps),
            identity: ratio == 1.0 && src_len == dst_len,
            phases: None,
        };
        let mut sums = vec![0.0; taps];
        for j in 0..dst_len {
            let start = grid.window(j).0.clamp(0, (src_len - taps) as i64) as usize;
            grid.weigh(j, start, &mut sums);
            axis.starts.push(start as u32);
            push_rounded(&sums, &mut axis.weights);
        }
        axis.phases = Phases::find(&grid, &axis);
        axis
    }

    pub fn src_len(&self) -> usize {
        self.src_len
    }

    pub fn dst_len(&self) -> usize {
        self.starts.len()
    }

    /// The source samples that outputs `outputs` weigh.
    pub fn source_of(&self, outputs: Rows<usize>) -> Rows<usize> {
        match self.starts.get(outputs) {
            Some([first, .., last]) => *first as usize..*last as usize + self.taps,
            Some([only]) => *only as usize..*only as usize + self.taps,
            _ => 0..0,
        }
    }

    /// The axis of outputs `outputs` alone, and the source samples that are then its source.
    fn part(&self, outputs: Rows<usize>) -> (Self, Rows<usize>) {
        let mut source = self.source_of(outputs.clone());
        let phases = self.phases.as_ref().and_then(|p| p.part(outputs.clone()));
        if let Some(phases) = &phases {
            // A window may reach further than the taps.
            source.start = source.start.min(phases.source);
            source.end = source.end.max(phases.source + phases.periods - 1 + WINDOW);
        }
        let starts = &self.starts[outputs.clone()];
        let weights = &self.weights[outputs.start * self.taps..outputs.end * self.taps];
        let part = Self {
            src_len: source.len(),
            taps: self.taps,
            starts: starts.iter().map(|s| s - source.start as u32).collect(),
            weights: weights.to_vec(),
            identity: false,
            phases: phases.map(|p| Phases {
                output: p.output - outputs.start,
                source: p.source - source.start,
                ..p
            }),
        };
        (part, source)
    }

    /// The axis that does what this one and then `next` does.
    ///
    /// # Panics
    /// When `next` does not begin with as many samples as this ends with.
    pub(crate) fn then(&self, next: &Self) -> Self {
        assert_eq!(self.dst_len(), next.src_len);
        let source = |j: usize| {
            let first = next.start(j);
            self.source_of(first..first + next.taps)
        };
        let taps = (0..next.dst_len()).map(|j| source(j).len()).max();
        let taps = taps.unwrap_or(1);
        let mut both = Self {
            src_len: self.src_len,
            taps,
            starts: Vec::with_capacity(next.dst_len()),
            weights: Vec::with_capacity(next.dst_len() * taps),
            identity: false,
            phases: None,
        };
        let mut sums = vec![0.0; taps];
        for j in 0..next.dst_len() {
            let start = source(j).start.min(self.src_len - taps);
            sums.fill(0.0);
            for (&outer, i) in next.weights(j).iter().zip(next.start(j)..) {
                let first = self.start(i) - start;
                for (sum, &inner) in sums[first..].iter_mut().zip(self.weights(i)) {
                    *sum += f64::from(outer) * f64::from(inner);
                }
            }
            both.starts.push(start as u32);
            push_rounded(&sums, &mut both.weights);
        }
        both
    }

    /// For each output the first source sample that it weighs, as many weights for each as is said first, and these.
    pub(crate) fn table(&self) -> (usize, &[u32], &[f32]) {
        (self.taps, &self.starts, &self.weights)
    }

    fn start(&self, j: usize) -> usize {
        self.starts[j] as usize
    }

    fn weights(&self, j: usize) -> &[f32] {
        &self.weights[j * self.taps..][..self.taps]
    }
}

/// Appends `weights` rounded to f32; the largest takes up the rounding, so that they still add up to 1.
fn push_rounded(weights: &[f64], out: &mut Vec<f32>) {
    let at = out.len();
    out.extend(weights.iter().map(|&w| w as f32));
    let rounded = &mut out[at..];
    let excess: f64 = rounded.iter().map(|&w| f64::from(w)).sum::<f64>() - 1.0;
    if let Some(largest) = rounded.iter_mut().max_by(|a, b| a.total_cmp(b)) {
        *largest = (f64::from(*largest) - excess) as f32;
    }
}

impl Phases {
    /// The periodic middle of `axis`, if it has one that is worth it.
    fn find(grid: &Grid, axis: &Axis) -> Option<Self> {
        let count = (1.0 / grid.ratio).round() as usize;
        let whole = (1.0 / grid.ratio - count as f64).abs() < 1e-9;
        if !whole || !(2..=4).contains(&count) || axis.taps >= WINDOW {
            return None;
        }
        let low = |j: usize| grid.reach(j).0;
        let fits = |p: usize| {
            let source = low(p * count);
            let inside = source >= 0 && source as usize + WINDOW <= axis.src_len;
            inside && (1..count).all(|k| (0..=1).contains(&(low(p * count + k) - source)))
        };
        let mut candidates = 0..axis.dst_len() / count;
        let first = candidates.find(|&p| fits(p))?;
        let source = low(first * count) as usize;
        let follows = |p: usize| fits(p) && low(p * count) as usize == source + (p - first);
        let end = candidates.clone().find(|&p| !follows(p));
        let end = end.unwrap_or(candidates.end);
        let weights = (0..count).map(|k| {
            let j = first * count + k;
            let mut window = [0.0; WINDOW];
            window[axis.start(j) - source..][..axis.taps].copy_from_slice(axis.weights(j));
            window
        });
        Some(Self {
            output: first * count,
            source,
            periods: end - first,
            weights: weights.collect(),
        })
    }
}

impl Phases {
    /// The periods that lie in `outputs` as a whole, if there are any.
    fn part(&self, outputs: Rows<usize>) -> Option<Self> {
        let count = self.weights.len();
        let skipped = outputs.start.saturating_sub(self.output).div_ceil(count);
        let end = outputs.end.saturating_sub(self.output) / count;
        let periods = end
            .min(self.periods)
            .checked_sub(skipped)
            .filter(|&p| p > 0)?;
        Some(Self {
            output: self.output + skipped * count,
            source: self.source + skipped,
            periods,
            weights: self.weights.clone(),
        })
    }
}

thread_local! {
    /// Intermediate rows, kept for the thread's next call.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Resampler {
    pub fn new(horizontal: Axis, vertical: Axis) -> Self {
        let (sw, sh) = (horizontal.src_len(), vertical.src_len());
        let (dw, dh) = (horizontal.dst_len(), vertical.dst_len());
        let cost = |rows: usize, columns: usize| {
            (dw * rows) as f64 * horizontal.taps as f64
                + (columns * dh) as f64 * vertical.taps as f64
        };
        Self {
            horizontal_first: cost(sh, dw) <= cost(dh, sw),
            horizontal,
            vertical,
        }
    }

    /// The resampler for plane `component` of frames like `info` that become `width` x `height`: chroma keeps
    /// its site among the luma samples and moves by the luma's ratio.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when a side of either frame is out of range.
    pub fn for_component(
        info: &FrameInfo,
        component: Component,
        width: usize,
        height: usize,
        kernel: Kernel,
        antialias: bool,
    ) -> Result<Self> {
        info.check_sides()?;
        info.with_size(width, height).check_sides()?;
        let format = info.format;
        let (sw, sh) = format.component_size(component, info.width, info.height);
        let (dw, dh) = format.component_size(component, width, height);
        let chroma = matches!(component, Component::U | Component::V);
        let (sx, sy) = format.chroma_shift();
        let axis = |src, dst, luma_ratio, shift: u32, cosited| {
            let centre = if chroma && cosited {
                0.5 / f64::from(1 << shift)
            } else {
                0.5
            };
            let options = Options {
                antialias,
                centre,
                ratio: Some(luma_ratio),
            };
            Axis::new(src, dst, kernel, options)
        };
        let site = info.chroma_site;
        let (rx, ry) = (
            info.width as f64 / width as f64,
            info.height as f64 / height as f64,
        );
        Ok(Self::new(
            axis(sw, dw, rx, sx, site.horizontal_cosited),
            axis(sh, dh, ry, sy, site.vertical_cosited),
        ))
    }

    pub fn horizontal(&self) -> &Axis {
        &self.horizontal
    }

    pub fn vertical(&self) -> &Axis {
        &self.vertical
    }

    /// Resamples the plane `src` into `dst`, both without padding. Runs on the current rayon pool.
    ///
    /// # Panics
    /// When a plane has another length than its axes say.
    pub fn run(&self, src: &[f32], dst: &mut [f32]) {
        let (dw, dh) = (self.horizontal.dst_len(), self.vertical.dst_len());
        self.check(src, dst);
        let threads = rayon::current_num_threads();
        let rows = SAMPLES_PER_TASK
            .div_ceil(dw)
            .max(MIN_TASK_ROWS)
            .max(dh.div_ceil(4 * threads));
        if threads == 1 || rows >= dh {
            self.run_band(Level::best(), src, 0..dh, dst);
        } else {
            let bands = dst.par_chunks_mut(rows * dw).enumerate();
            bands.for_each(|(i, band)| {
                let top = i * rows;
                self.run_band(Level::best(), src, top..top + band.len() / dw, band);
            });
        }
    }

    fn check(&self, src: &[f32], dst: &[f32]) {
        let (sw, sh) = (self.horizontal.src_len(), self.vertical.src_len());
        let (dw, dh) = (self.horizontal.dst_len(), self.vertical.dst_len());
        assert_eq!(src.len(), sw * sh, "source samples of {sw}x{sh}");
        assert_eq!(dst.len(), dw * dh, "output samples of {dw}x{dh}");
    }

    /// The checked core: rows `rows` of the output.
    fn run_band(&self, level: Level, src: &[f32], rows: Rows<usize>, dst: &mut [f32]) {
        if rows.is_empty() {
            return;
        }
        let (horizontal, vertical) = (&self.horizontal, &self.vertical);
        let (sw, dw) = (horizontal.src_len(), horizontal.dst_len());
        match (horizontal.identity, vertical.identity) {
            (true, true) => dst.copy_from_slice(&src[rows.start * sw..rows.end * sw]),
            (true, false) => {
                for (y, dst) in rows.zip(dst.chunks_exact_mut(dw)) {
                    let src = &src[vertical.start(y) * sw..];
                    combine_rows(level, dst, src, sw, vertical.weights(y));
                }
            }
            (false, true) => SCRATCH.with_borrow_mut(|scratch| {
                let src = &src[rows.start * sw..rows.end * sw];
                horizontal.run_rows(level, src, dst, reserve(scratch, horizontal.scratch_len()));
            }),
            (false, false) if self.horizontal_first => {
                SCRATCH.with_borrow_mut(|s| self.horizontal_first(level, src, rows, dst, s));
            }
            (false, false) => {
                SCRATCH.with_borrow_mut(|s| self.vertical_first(level, src, rows, dst, s));
            }
        }
    }

    fn horizontal_first(
        &self,
        level: Level,
        src: &[f32],
        rows: Rows<usize>,
        dst: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (horizontal, vertical) = (&self.horizontal, &self.vertical);
        let (sw, dw) = (horizontal.src_len(), horizontal.dst_len());
        let capacity = vertical.taps + LANES;
        let scratch = reserve(scratch, capacity * dw + horizontal.scratch_len());
        let (kept, scratch) = scratch.split_at_mut(capacity * dw);
        let end = vertical.source_of(rows.clone()).end;
        // `kept` holds source rows `held`, horizontally resampled.
        let mut held = 0..0;
        for (y, dst) in rows.zip(dst.chunks_exact_mut(dw)) {
            let need = vertical.source_of(y..y + 1);
            if need.end > held.end {
                // As many rows as the horizontal kernel likes to do at once; drop old ones if they do not fit.
                let from = held.end.max(need.start);
                let to = need.end.max((from + horizontal.rows_at_once()).min(end));
                if from != held.end || to - held.start > capacity {
                    let keep = need.start.min(held.end) - held.start..held.len();
                    kept.copy_within(keep.start * dw..keep.end * dw, 0);
                    held.start = need.start;
                }
                let rows = &mut kept[(from - held.start) * dw..(to - held.start) * dw];
                horizontal.run_rows(level, &src[from * sw..to * sw], rows, scratch);
                held.end = to;
            }
            let rows = &kept[(need.start - held.start) * dw..];
            combine_rows(level, dst, rows, dw, vertical.weights(y));
        }
    }

    fn vertical_first(
        &self,
        level: Level,
        src: &[f32],
        rows: Rows<usize>,
        dst: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let (horizontal, vertical) = (&self.horizontal, &self.vertical);
        let (sw, dw) = (horizontal.src_len(), horizontal.dst_len());
        let scratch = reserve(scratch, LANES * sw + horizontal.scratch_len());
        let (block, scratch) = scratch.split_at_mut(LANES * sw);
        for (i, dst) in dst.chunks_mut(LANES * dw).enumerate() {
            let block = &mut block[..dst.len() / dw * sw];
            for (y, row) in (rows.start + i * LANES..).zip(block.chunks_exact_mut(sw)) {
                let src = &src[vertical.start(y) * sw..];
                combine_rows(level, row, src, sw, vertical.weights(y));
            }
            horizontal.run_rows(level, block, dst, scratch);
        }
    }
}

/// Some columns of a plane, resampled row by row from top to bottom: the same values as [`Resampler::run`] gives when
/// it works along the rows first.
pub(crate) struct Stream {
    horizontal: Axis,
    vertical: Axis,
    /// The source's columns that the output's columns weigh.
    columns: Rows<usize>,
    /// As many source rows as the horizontal kernel likes to do at once, and what it needs for them.
    source: Vec<f32>,
    scratch: Vec<f32>,
    /// The latest source rows, horizontally resampled: row i at i modulo `capacity`, the first of them again behind the
    /// last, so that the rows that an output weighs are always neighbours.
    kept: Vec<f32>,
    capacity: usize,
    /// Source rows read so far.
    read: usize,
}

impl Stream {
    /// Output columns `columns` of the planes that `resampler` makes.
    pub(crate) fn new(resampler: &Resampler, columns: Rows<usize>) -> Self {
        let (horizontal, source) = resampler.horizontal.part(columns);
        let vertical = resampler.vertical.clone();
        let (taps, at_once) = (vertical.taps, horizontal.rows_at_once());
        let capacity = (taps + at_once).next_multiple_of(at_once);
        Self {
            source: vec![0.0; at_once * source.len()],
            scratch: vec![0.0; horizontal.scratch_len()],
            kept: vec![0.0; (capacity + taps) * horizontal.dst_len()],
            capacity,
            columns: source,
            horizontal,
            vertical,
            read: 0,
        }
    }

    /// Goes back to the top.
    pub(crate) fn restart(&mut self) {
        self.read = 0;
    }

    /// Writes output row `y`, not above the last one since the top. `read` gives the asked columns of a source row.
    ///
    /// # Panics
    /// When there is no such row or `dst` is not as long as the columns.
    pub(crate) fn row(
        &mut self,
        y: usize,
        dst: &mut [f32],
        read: impl Fn(usize, Rows<usize>, &mut [f32]),
    ) {
        let level = Level::best();
        let (width, taps) = (self.horizontal.dst_len(), self.vertical.taps);
        let first = self.vertical.start(y);
        let at_once = self.horizontal.rows_at_once();
        while self.read < first + taps {
            // Where rows are left out, batches still begin at multiples: they never turn around in the buffer.
            let from = self.read.max(first / at_once * at_once);
            let to = (from + at_once).min(self.vertical.src_len());
            let source = &mut self.source[..(to - from) * self.columns.len()];
            let rows = source.chunks_exact_mut(self.columns.len());
            rows.zip(from..)
                .for_each(|(row, i)| read(i, self.columns.clone(), row));
            let slot = from % self.capacity;
            let kept = &mut self.kept[slot * width..][..(to - from) * width];
            self.horizontal
                .run_rows(level, source, kept, &mut self.scratch);
            let again = (slot + to - from).min(taps);
            if slot < again {
                let behind = (self.capacity + slot) * width;
                self.kept.copy_within(slot * width..again * width, behind);
            }
            self.read = to;
        }
        let rows = &self.kept[first % self.capacity * width..];
        combine_rows(level, dst, rows, width, self.vertical.weights(y));
    }
}

/// The first `len` elements of `scratch`, made longer if need be.
fn reserve(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}

impl Axis {
    /// Elements of scratch that [`Axis::run_rows`] needs.
    fn scratch_len(&self) -> usize {
        if self.phases.is_some() {
            0
        } else {
            self.src_len * LANES
        }
    }

    /// Rows that [`Axis::run_rows`] handles best at once.
    fn rows_at_once(&self) -> usize {
        if self.phases.is_some() { 1 } else { LANES }
    }

    /// Resamples each row of `src` into a row of `dst`.
    fn run_rows(&self, level: Level, src: &[f32], dst: &mut [f32], scratch: &mut [f32]) {
        let (sw, dw) = (self.src_len, self.dst_len());
        let (mut src, mut dst) = (src, dst);
        if self.phases.is_none() {
            let columns = scratch.as_chunks_mut::<LANES>().0;
            while dst.len() >= LANES * dw {
                let (src_block, src_rest) = src.split_at(LANES * sw);
                let (dst_block, dst_rest) = dst.split_at_mut(LANES * dw);
                transpose(level, columns, src_block);
                combine_columns(level, dst_block, columns, self);
                (src, dst) = (src_rest, dst_rest);
            }
        }
        for (src, dst) in src.chunks_exact(sw).zip(dst.chunks_exact_mut(dw)) {
            self.run_row(level, src, dst);
        }
    }

    fn run_row(&self, level: Level, src: &[f32], dst: &mut [f32]) {
        let Some(phases) = &self.phases else {
            return combine_row(level, dst, src, &self.starts, &self.weights, self.taps);
        };
        let (from, count) = (phases.output, phases.weights.len());
        let to = from + phases.periods * count;
        for outputs in [0..from, to..self.dst_len()] {
            let weights = &self.weights[outputs.start * self.taps..];
            let starts = &self.starts[outputs.clone()];
            combine_row(level, &mut dst[outputs], src, starts, weights, self.taps);
        }
        let (dst, src) = (&mut dst[from..to], &src[phases.source..]);
        match count {
            2 => enlarge2(level, dst, src, &phases.weights),
            3 => enlarge3(level, dst, src, &phases.weights),
            _ => enlarge4(level, dst, src, &phases.weights),
        }
    }
}

/// Adds (or, the first time, writes) the weighted sum of `N` rows of `src` to `dst`.
#[inline(always)]
fn add_rows<const N: usize>(
    dst: &mut [f32],
    src: &[f32],
    stride: usize,
    weights: &[f32],
    first: bool,
) {
    let n = dst.len();
    let rows: [&[f32]; N] = std::array::from_fn(|k| &src[k * stride..][..n]);
    let weights: [f32; N] = std::array::from_fn(|k| weights[k]);
    for (x, d) in dst.iter_mut().enumerate() {
        let mut sum = rows[0][x] * weights[0];
        for k in 1..N {
            sum += rows[k][x] * weights[k];
        }
        *d = if first { sum } else { *d + sum };
    }
}

/// `N` outputs for each step of one source sample.
#[inline(always)]
fn enlarge<const N: usize>(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
    let dst = dst.as_chunks_mut::<N>().0;
    let weights: [[f32; WINDOW]; N] = std::array::from_fn(|k| weights[k]);
    let windows: [&[f32]; WINDOW] = std::array::from_fn(|i| &src[i..][..dst.len()]);
    for (x, d) in dst.iter_mut().enumerate() {
        for (d, w) in d.iter_mut().zip(&weights) {
            let mut sum = windows[0][x] * w[0];
            for i in 1..WINDOW {
                sum += windows[i][x] * w[i];
            }
            *d = sum;
        }
    }
}

per_level! {
    /// One output row from consecutive rows of `src`, as many as there are weights.
    fn combine_rows(dst: &mut [f32], src: &[f32], stride: usize, weights: &[f32]) {
        for (i, weights) in weights.chunks(4).enumerate() {
            let src = &src[4 * i * stride..];
            match weights.len() {
                1 => add_rows::<1>(dst, src, stride, weights, i == 0),
                2 => add_rows::<2>(dst, src, stride, weights, i == 0),
                3 => add_rows::<3>(dst, src, stride, weights, i == 0),
                _ => add_rows::<4>(dst, src, stride, weights, i == 0),
            }
        }
    }

    /// One row, output by output: what `combine_columns` does for many rows.
    fn combine_row(dst: &mut [f32], src: &[f32], starts: &[u32], weights: &[f32], taps: usize) {
        let outputs = dst.iter_mut().zip(starts).zip(weights.chunks_exact(taps));
        for ((d, &start), weights) in outputs {
            let mut sum = 0.0;
            for (s, w) in src[start as usize..][..taps].iter().zip(weights) {
                sum += s * w;
            }
            *d = sum;
        }
    }

    /// Turns `LANES` rows into columns.
    fn transpose(columns: &mut [[f32; LANES]], src: &[f32]) {
        let n = columns.len();
        let rows: [&[f32]; LANES] = std::array::from_fn(|r| &src[r * n..][..n]);
        for (x, column) in columns.iter_mut().enumerate() {
            for r in 0..LANES {
                column[r] = rows[r][x];
            }
        }
    }

    /// `LANES` rows of `dst` from the source's columns.
    fn combine_columns(dst: &mut [f32], columns: &[[f32; LANES]], axis: &Axis) {
        let width = axis.starts.len();
        let mut tile = [[0.0f32; LANES]; LANES];
        for left in (0..width).step_by(LANES) {
            let n = LANES.min(width - left);
            for (i, out) in tile[..n].iter_mut().enumerate() {
                let mut sums = [0.0f32; LANES];
                let columns = &columns[axis.start(left + i)..][..axis.taps];
                for (column, &w) in columns.iter().zip(axis.weights(left + i)) {
                    for l in 0..LANES {
                        sums[l] += column[l] * w;
                    }
                }
                *out = sums;
            }
            for r in 0..LANES {
                let row = &mut dst[r * width + left..][..n];
                for (i, d) in row.iter_mut().enumerate() {
                    *d = tile[i][r];
                }
            }
        }
    }

    fn enlarge2(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
        enlarge::<2>(dst, src, weights);
    }

    fn enlarge3(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
        enlarge::<3>(dst, src, weights);
    }

    fn enlarge4(dst: &mut [f32], src: &[f32], weights: &[[f32; WINDOW]]) {
        enlarge::<4>(dst, src, weights);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PixelFormat;

    const KERNELS: [Kernel; 5] = [
        Kernel::Bicubic,
        Kernel::CatmullRom,
        Kernel::Lanczos3,
        Kernel::Bilinear,
        Kernel::Area,
    ];

    const PLAIN: Options = Options {
        antialias: false,
        centre: 0.5,
        ratio: None,
    };

    /// Any value in 0..1, without pattern.
    fn noise(n: usize) -> Vec<f32> {
        let hash = |i: usize| (i as u32 ^ 0x9e37).wrapping_mul(2_654_435_761) >> 8;
        (0..n)
            .map(|i| (hash(i).wrapping_mul(40_503) & 0xffff) as f32 / 65535.0)
            .collect()
    }

    fn line(kernel: Kernel, options: Options, src: &[f32], dst_len: usize) -> Vec<f32> {
        let mut dst = vec![f32::NAN; dst_len];
        let one = Axis::new(1, 1, kernel, PLAIN);
        Resampler::new(Axis::new(src.len(), dst_len, kernel, options), one).run(src, &mut dst);
        dst
    }

    /// One output straight from the definition, in f64: every source sample within reach is weighed.
    fn defined(src: &[f32], j: usize, dst_len: usize, kernel: Kernel, options: Options) -> f64 {
        let n = src.len() as i64;
        let ratio = options.ratio.unwrap_or(n as f64 / dst_len as f64);
        let p = ratio * (j as f64 + options.centre) - options.centre;
        let stretch = if options.antialias {
            ratio.max(1.0)
        } else {
            1.0
        };
        let cubic = |a: f64, x: f64| match x {
            x if x < 1.0 => (a + 2.0) * x.powi(3) - (a + 3.0) * x.powi(2) + 1.0,
            x if x < 2.0 => a * x.powi(3) - 5.0 * a * x.powi(2) + 8.0 * a * x - 4.0 * a,
            _ => 0.0,
        };
        let shape = |d: f64| match kernel {
            Kernel::Bicubic => cubic(-0.75, d.abs()),
            Kernel::CatmullRom => cubic(-0.5, d.abs()),
            Kernel::Bilinear => 1.0 - d.abs().min(1.0),
            Kernel::Lanczos3 if d.abs() < 1e-12 => 1.0,
            Kernel::Lanczos3 if d.abs() >= 3.0 => 0.0,
            Kernel::Lanczos3 => 3.0 * (PI * d).sin() * (PI * d / 3.0).sin() / (PI * d).powi(2),
            Kernel::Area => unreachable!("has its own test"),
        };
        let reach = 4 + (3.0 * stretch) as i64;
        let (mut sum, mut total) = (0.0, 0.0);
        for i in p.floor() as i64 - reach..=p.floor() as i64 + reach {
            if !options.antialias || (0..n).contains(&i) {
                let w = shape((i as f64 - p) / stretch);
                sum += w * f64::from(src[i.clamp(0, n - 1) as usize]);
                total += w;
            }
        }
        if total < 0.1 * stretch {
            return f64::from(src[(p as i64).clamp(0, n - 1) as usize]);
        }
        sum / total
    }

    #[test]
    fn lines_follow_the_definition_for_any_length_and_kernel() {
        for kernel in KERNELS.into_iter().filter(|&k| k != Kernel::Area) {
            for (from, to) in [
                (1, 1),
                (1, 5),
                (2, 3),
                (3, 2),
                (5, 1),
                (7, 14),
                (9, 27),
                (10, 40),
                (40, 60),
                (64, 45),
                (100, 13),
            ] {
                for antialias in [false, true] {
                    for (centre, ratio) in
                        [(0.5, None), (0.25, None), (0.25, Some(0.48)), (0.0, None)]
                    {
                        let options = Options {
                            antialias,
                            centre,
                            ratio,
                        };
                        let src = noise(from);
                        for (j, got) in line(kernel, options, &src, to).into_iter().enumerate() {
                            let expected = defined(&src, j, to, kernel, options);
                            assert!(
                                (f64::from(got) - expected).abs() < 2e-6,
                                "{kernel:?} {from}->{to} {options:?} [{j}]: {got}, not {expected}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn doubling_an_impulse_gives_the_bicubic_weights_by_hand() {
        let src = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        let dst = line(Kernel::Bicubic, PLAIN, &src, 14);
        // The kernel with a = -0.75 at 1.75, 1.25, 0.75, 0.25: exact in binary.
        let (w175, w125, w075, w025) = (-0.035_156_25, -0.105_468_75, 0.261_718_75, 0.878_906_25);
        let expected = [
            0.0, 0.0, 0.0, w175, w125, w075, w025, w025, w075, w125, w175, 0.0, 0.0, 0.0,
        ];
        assert_eq!(dst, expected);
    }

    #[test]
    fn doubling_replicates_the_border() {
        // Output 0 lies at -0.25: samples -2, -1, 0, 1 are 8, 8, 8, 16.
        let dst = line(Kernel::Bicubic, PLAIN, &[8.0, 16.0, 24.0, 0.0], 8);
        assert_eq!(dst[0], 8.0 - 8.0 * 0.105_468_75);
        // Output 7 lies at 3.25: samples 2, 3, 4, 5 are 24, 0, 0, 0.
        assert_eq!(dst[7], -24.0 * 0.105_468_75);
    }

    #[test]
    fn antialiased_halving_gives_the_weights_by_hand() {
        // Triangle of half-width 2 at +-0.5, +-1.5: 1 3 3 1, over 8; the border drops a tap: 3 3 1, over 7.
        let options = Options {
            antialias: true,
            ..PLAIN
        };
        let dst = line(
            Kernel::Bilinear,
            options,
            &[7.0, 14.0, 0.0, 8.0, 8.0, 0.0],
            3,
        );
        let expected = [63.0 / 7.0, (14.0 + 24.0 + 8.0) / 8.0, 32.0 / 7.0];
        for (got, expected) in dst.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-5, "{dst:?}");
        }
    }

    #[test]
    fn area_averages_exactly_the_covered_length() {
        let src = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
        assert_eq!(line(Kernel::Area, PLAIN, &src, 3), [1.5, 6.0, 24.0]);
        // 1.5 samples each: 1 and half of 2, half of 2 and 4.
        let dst = line(Kernel::Area, PLAIN, &src, 4);
        let expected = [2.0 / 1.5, 5.0 / 1.5, 16.0 / 1.5, 40.0 / 1.5];
        for (got, expected) in dst.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-5, "{dst:?}");
        }
        assert_eq!(
            line(Kernel::Area, PLAIN, &[3.0, 5.0], 4),
            [3.0, 3.0, 5.0, 5.0]
        );
    }

    #[test]
    fn ramps_stay_ramps_inside() {
        let src: Vec<f32> = (0..40).map(|i| i as f32).collect();
        for kernel in [Kernel::CatmullRom, Kernel::Bilinear] {
            for to in [80, 60, 120, 53] {
                let ratio = 40.0 / to as f64;
                for (j, got) in line(kernel, PLAIN, &src, to).into_iter().enumerate() {
                    let at = (j as f64 + 0.5) * ratio - 0.5;
                    if (2.0..37.0).contains(&at) {
                        assert!(
                            (f64::from(got) - at).abs() < 1e-5,
                            "{kernel:?} {to} [{j}]: {got}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn constants_stay_constant_into_the_corners() {
        for kernel in KERNELS {
            for antialias in [false, true] {
                for (from, to) in [
                    ((7, 5), (14, 10)),
                    ((33, 65), (8, 40)),
                    ((1, 9), (5, 2)),
                    ((640, 40), (31, 5)),
                ] {
                    let options = Options { antialias, ..PLAIN };
                    let resampler = Resampler::new(
                        Axis::new(from.0, to.0, kernel, options),
                        Axis::new(from.1, to.1, kernel, options),
                    );
                    let mut dst = vec![0.0; to.0 * to.1];
                    resampler.run(&vec![0.7; from.0 * from.1], &mut dst);
                    let worst = dst.iter().map(|v| (v - 0.7).abs()).fold(0.0, f32::max);
                    assert!(
                        worst < 1e-6,
                        "{kernel:?} {antialias} {from:?}->{to:?}: {worst}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_and_every_split_gives_the_same_bits() {
        for (from, to) in [
            ((37, 50), (74, 100)),
            ((33, 21), (99, 63)),
            ((19, 18), (76, 72)),
            ((50, 40), (77, 61)),
            ((90, 80), (31, 33)),
            ((30, 90), (90, 30)),
            ((90, 30), (30, 90)),
            ((40, 40), (40, 80)),
            ((40, 40), (80, 40)),
            ((5, 3), (2, 7)),
        ] {
            for (kernel, antialias) in [
                (Kernel::Bicubic, false),
                (Kernel::Lanczos3, true),
                (Kernel::Bilinear, true),
            ] {
                let options = Options { antialias, ..PLAIN };
                let resampler = Resampler::new(
                    Axis::new(from.0, to.0, kernel, options),
                    Axis::new(from.1, to.1, kernel, options),
                );
                let src = noise(from.0 * from.1);
                let mut expected = vec![f32::NAN; to.0 * to.1];
                resampler.run_band(Level::PORTABLE, &src, 0..to.1, &mut expected);
                for level in Level::all() {
                    for rows in [1, 3, 17, to.1] {
                        let mut got = vec![f32::NAN; to.0 * to.1];
                        for (i, band) in got.chunks_mut(rows * to.0).enumerate() {
                            let top = i * rows;
                            resampler.run_band(level, &src, top..top + band.len() / to.0, band);
                        }
                        assert!(
                            got == expected,
                            "{level:?} {from:?}->{to:?} by {rows} {kernel:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn two_directions_are_two_lines() {
        for (from, to) in [
            ((30, 12), (60, 24)),
            ((30, 12), (45, 20)),
            ((12, 30), (7, 50)),
            ((50, 40), (20, 11)),
        ] {
            let src = noise(from.0 * from.1);
            let mut dst = vec![0.0; to.0 * to.1];
            Resampler::new(
                Axis::new(from.0, to.0, Kernel::Lanczos3, PLAIN),
                Axis::new(from.1, to.1, Kernel::Lanczos3, PLAIN),
            )
            .run(&src, &mut dst);
            let rows: Vec<Vec<f32>> = src
                .chunks(from.0)
                .map(|row| line(Kernel::Lanczos3, PLAIN, row, to.0))
                .collect();
            for x in 0..to.0 {
                let column: Vec<f32> = rows.iter().map(|row| row[x]).collect();
                for (y, expected) in line(Kernel::Lanczos3, PLAIN, &column, to.1)
                    .into_iter()
                    .enumerate()
                {
                    let got = dst[y * to.0 + x];
                    assert!(
                        (got - expected).abs() < 2e-6,
                        "{from:?}->{to:?} at {x},{y}: {got} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_stream_of_some_columns_gives_the_same_bits_as_the_whole() {
        for (from, to) in [
            ((40, 30), (80, 60)),
            ((40, 30), (67, 41)),
            ((31, 9), (124, 36)),
            ((50, 40), (50, 80)),
            ((23, 50), (40, 17)),
        ] {
            for kernel in [Kernel::Bicubic, Kernel::Lanczos3] {
                let mut resampler = Resampler::new(
                    Axis::new(from.0, to.0, kernel, PLAIN),
                    Axis::new(from.1, to.1, kernel, PLAIN),
                );
                resampler.horizontal_first = true;
                let src = noise(from.0 * from.1);
                let mut whole = vec![f32::NAN; to.0 * to.1];
                resampler.run(&src, &mut whole);
                for columns in [0..to.0, 0..1, 3..30, 17..40] {
                    let mut stream = Stream::new(&resampler, columns.clone());
                    for step in [1, 3] {
                        stream.restart();
                        for y in (0..to.1).step_by(step) {
                            let mut row = vec![f32::NAN; columns.len()];
                            stream.row(y, &mut row, |y, x, row| {
                                row.copy_from_slice(&src[y * from.0..][x]);
                            });
                            let want = &whole[y * to.0..][columns.clone()];
                            assert!(
                                row == want,
                                "{from:?}->{to:?} {kernel:?} {columns:?} row {y}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn whole_factors_take_the_periodic_kernel() {
        let phases = |factor, centre| {
            let options = Options { centre, ..PLAIN };
            let axis = Axis::new(100, 100 * factor, Kernel::Bicubic, options);
            axis.phases.map(|p| (p.weights.len(), p.periods))
        };
        for factor in 2..=4 {
            for centre in [0.0, 0.25, 0.5] {
                let (count, periods) = phases(factor, centre).expect("periodic");
                assert_eq!(count, factor);
                assert!(periods > 93, "{periods} periods at {factor} {centre}");
            }
        }
        assert_eq!(phases(5, 0.5), None);
    }

    #[test]
    fn whole_factors_of_any_kernel_are_periodic_to_the_end() {
        for kernel in KERNELS {
            for factor in 2..=4 {
                let src = noise(217);
                let direct = line(kernel, PLAIN, &src, 217 * factor);
                let mut axis = Axis::new(217, 217 * factor, kernel, PLAIN);
                axis.phases = None;
                let mut general = vec![0.0; direct.len()];
                Resampler::new(axis, Axis::new(1, 1, kernel, PLAIN)).run(&src, &mut general);
                for (j, (a, b)) in direct.iter().zip(&general).enumerate() {
                    assert!((a - b).abs() < 1e-6, "{kernel:?} x{factor} [{j}]: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn chroma_keeps_its_site_and_the_lumas_ratio() {
        // 7 luma columns have 4 of chroma, 14 have 7: the ratio stays 1/2, and a cosited site stays a quarter.
        let mut info = FrameInfo::new(PixelFormat::I420, 7, 6);
        info.chroma_site.horizontal_cosited = true;
        info.chroma_site.vertical_cosited = false;
        let resampler = |component| {
            Resampler::for_component(&info, component, 14, 12, Kernel::Bilinear, false).unwrap()
        };
        let chroma = resampler(Component::U);
        let ramp: Vec<f32> = (0..12).map(|i| (i % 4 + 10 * (i / 4)) as f32).collect();
        let mut dst = vec![0.0; 7 * 6];
        chroma.run(&ramp, &mut dst);
        // Row 2 lies at 0.75, column 3 at 3.25 / 2 - 0.25 = 1.375.
        assert!(
            (dst[2 * 7 + 3] - (7.5 + 1.375)).abs() < 1e-5,
            "{}",
            dst[2 * 7 + 3]
        );
        let luma = resampler(Component::Y);
        assert_eq!(
            (luma.horizontal().src_len(), luma.horizontal().dst_len()),
            (7, 14)
        );
        assert!(Resampler::for_component(&info, Component::Y, 0, 12, Kernel::Area, true).is_err());
    }

    #[test]
    fn an_axis_after_another_does_what_both_do() {
        let kernels = [
            (Kernel::Bicubic, false),
            (Kernel::Area, true),
            (Kernel::Bilinear, false),
        ];
        let axis = |from, to, (kernel, antialias)| {
            let options = Options {
                antialias,
                ..Options::default()
            };
            Axis::new(from, to, kernel, options)
        };
        let column = |axis: &Axis, src: &[f32]| {
            let mut dst = vec![0.0; axis.dst_len()];
            Resampler::new(axis.clone(), axis_1()).run(src, &mut dst);
            dst
        };
        for (from, between, to) in [(23, 47, 24), (1, 2, 1), (2, 5, 3), (16, 40, 20), (9, 9, 5)] {
            let src: Vec<f32> = (0..from).map(|i| (i * 37 % 11) as f32).collect();
            for (first, second) in [(0, 1), (1, 2), (2, 0)] {
                let (first, second) = (
                    axis(from, between, kernels[first]),
                    axis(between, to, kernels[second]),
                );
                let want = column(&second, &column(&first, &src));
                let got = column(&first.then(&second), &src);
                let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
                assert!(far.fold(0.0, f32::max) < 1e-4, "{from} {between} {to}");
            }
        }
    }

    fn axis_1() -> Axis {
        Axis::new(1, 1, Kernel::Bilinear, Options::default())
    }

    #[test]
    fn the_source_of_outputs_is_what_they_read() {
        let axis = Axis::new(
            100,
            50,
            Kernel::Bilinear,
            Options {
                antialias: true,
                ..PLAIN
            },
        );
        assert_eq!(axis.source_of(10..12), 19..25);
        assert_eq!(axis.source_of(0..1), 0..4);
        assert_eq!(axis.source_of(5..5), 0..0);
    }
}
