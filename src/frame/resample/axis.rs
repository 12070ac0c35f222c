//! One direction of a resampler: source samples and weights of every output.

use std::ops::Range as Rows;

use super::kernel::Kernel;
use crate::kernels::resample::WINDOW;

/// Positions of the grids of an [`Axis`] relative to each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Widen the kernel by the ratio if the axis shrinks; at the borders drop the taps outside and
    /// scale up the others, as PIL and PyTorch's `antialias=True` do. Otherwise taps outside
    /// replicate the border sample and the kernel keeps its width.
    pub antialias: bool,
    /// Position where the grids meet, in samples: 0.5 for centred samples, 0.25 for cosited
    /// subsampled chroma.
    pub centre: f64,
    /// Source samples per output sample; `None` for the ratio of the lengths. Chroma of frames of
    /// odd size takes the ratio of the luma.
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

/// One direction of a resampler: source samples of each output sample and their weights.
#[derive(Clone, Debug)]
pub struct Axis {
    src_len: usize,
    /// Source samples of each output.
    pub(super) taps: usize,
    /// First source sample of each output; never decreases, and all taps lie in the source.
    pub(super) starts: Vec<u32>,
    /// `taps` weights for each output.
    pub(super) weights: Vec<f32>,
    /// Output j is source j.
    pub(super) identity: bool,
    pub(super) phases: Option<Phases>,
}

/// The middle of an axis that enlarges by a whole factor: period p reads the window of `WINDOW`
/// samples at `source + p` and writes one output per phase, with weights that do not depend on p.
#[derive(Clone, Debug)]
pub(super) struct Phases {
    /// First output of the first period.
    pub output: usize,
    /// First source sample of the first period.
    pub source: usize,
    pub periods: usize,
    /// Weights over the window, for each phase: 2 to 4 phases.
    pub weights: Vec<[f32; WINDOW]>,
}

/// Geometry of an axis, before weights.
#[derive(Clone, Copy)]
struct Grid {
    src_len: usize,
    kernel: Kernel,
    /// Replicate the border instead of dropping the taps outside.
    replicate: bool,
    centre: f64,
    ratio: f64,
    /// Factor by which the kernel is wider than at ratio 1.
    width: f64,
}

/// Returns `x`, or the integer that it misses by rounding noise: where grids meet, noise must not
/// add a neighbour.
fn snap(x: f64) -> f64 {
    let nearest = x.round();
    if (x - nearest).abs() < 1e-9 {
        nearest
    } else {
        x
    }
}

impl Grid {
    /// Returns the source position of output `j`.
    fn position(&self, j: usize) -> f64 {
        snap((j as f64 + self.centre) * self.ratio - self.centre)
    }

    /// Returns the source positions within reach of output `j`, (first, last + 1); they may lie
    /// outside the source.
    fn reach(&self, j: usize) -> (i64, i64) {
        let position = self.position(j);
        let support = self.kernel.support(self.width, self.ratio);
        (
            snap(position - support).floor() as i64 + 1,
            snap(position + support).ceil() as i64,
        )
    }

    /// Returns the source positions that output `j` weighs: with a replicated border they may lie
    /// outside the source.
    fn window(&self, j: usize) -> (i64, i64) {
        let (low, high) = self.reach(j);
        if self.replicate {
            (low, high)
        } else {
            let len = self.src_len as i64;
            (low.clamp(0, len - 1), high.clamp(1, len))
        }
    }

    /// Sums the normalised weights of output `j` in `sums`, whose first element is source sample
    /// `start`.
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
            // An output outside the source: the samples in reach cancel out.
            let nearest = (position as i64).clamp(0, last) as usize;
            sums.fill(0.0);
            sums[nearest.saturating_sub(start).min(sums.len() - 1)] = 1.0;
        } else {
            sums.iter_mut().for_each(|w| *w /= total);
        }
    }
}

impl Axis {
    /// Creates an axis from `src_len` to `dst_len` samples.
    ///
    /// # Panics
    /// If a length is 0 or beyond 2^31, the ratio is not positive or the centre not finite.
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

    /// Returns the source samples that outputs `outputs` weigh.
    pub fn source_of(&self, outputs: Rows<usize>) -> Rows<usize> {
        match self.starts.get(outputs) {
            Some([first, .., last]) => *first as usize..*last as usize + self.taps,
            Some([only]) => *only as usize..*only as usize + self.taps,
            _ => 0..0,
        }
    }

    /// Returns the axis of outputs `outputs` alone, and the source samples that it reads.
    pub(super) fn part(&self, outputs: Rows<usize>) -> (Self, Rows<usize>) {
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

    /// Returns the axis that combines this one with `next` after it.
    ///
    /// # Panics
    /// If `next` does not begin with as many samples as this ends with.
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

    /// Returns the number of weights of each output, its first source sample, and the weights.
    pub(crate) fn table(&self) -> (usize, &[u32], &[f32]) {
        (self.taps, &self.starts, &self.weights)
    }

    pub(super) fn start(&self, j: usize) -> usize {
        self.starts[j] as usize
    }

    pub(super) fn weights(&self, j: usize) -> &[f32] {
        &self.weights[j * self.taps..][..self.taps]
    }
}

/// Appends `weights` rounded to f32; the largest takes up the rounding errors, so that the sum is
/// 1.
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
    /// Returns the periodic middle of `axis`, if it has one that is worth it.
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

    /// Returns the periods that lie entirely in `outputs`, if there are any.
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
