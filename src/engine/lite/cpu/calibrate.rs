//! Calibration: ranges of the values in a network, for inference in integers.

use rayon::prelude::*;

use super::network::slope;
use crate::{
    kernels::{
        conv::{Activation, ConvShape, PackedConv},
        simd::Isa,
    },
    model::{Calibration, Layer, LiteModel},
    nn::lite::{Condition, Role, latent::Grid},
};

/// Bins of a channel's histogram.
const BINS: usize = 4096;

/// Share of a channel's values that may lie outside of its range on either side. A few outliers are
/// not worth a coarser step for all other values.
const OUTLIERS: f64 = 2e-6;

/// Share of a range that is added on both sides, for values that the patches do not contain.
const HEADROOM: f32 = 0.02;

/// Inputs of the network for some patches under one condition.
#[derive(Clone, Debug)]
pub struct Patches {
    pub at: Condition,
    /// Grid of one patch, with the channels of the network's input.
    pub grid: Grid,
    /// Inputs of the network for all patches, one after the other.
    pub inputs: Vec<f32>,
}

/// Returns the ranges of the values that `model` computes from `patches`.
///
/// # Panics
/// If there are no patches, or their grid has other channels than the model.
pub fn calibrate(model: &LiteModel, patches: &[Patches]) -> Calibration {
    let none = || -> Vec<Vec<Histogram>> {
        let first = model.layers.first().map_or(0, |l| l.spec.ci);
        let inner = model.layers.iter().rev().skip(1).rev();
        let channels = std::iter::once(first).chain(inner.map(|l| l.spec.co));
        channels.map(|n| vec![Histogram::default(); n]).collect()
    };
    // The first pass finds the extremes, the second counts the values between them.
    let extremes = patches.par_iter().map(|patches| {
        let mut seen = none();
        observe(model, patches, |stage, channel, v| {
            seen[stage][channel].widen(v)
        });
        seen
    });
    let extremes = extremes.reduce(none, |a, b| merged(a, b, Histogram::join));
    let counted = patches.par_iter().map(|patches| {
        let mut seen = extremes.clone();
        observe(model, patches, |stage, channel, v| {
            seen[stage][channel].count(v)
        });
        seen
    });
    let counted = counted.reduce(|| extremes.clone(), |a, b| merged(a, b, Histogram::add));
    let ranges = counted
        .iter()
        .map(|stage| stage.iter().map(Histogram::range).collect());
    Calibration {
        ranges: ranges.collect(),
    }
}

fn merged(
    mut a: Vec<Vec<Histogram>>,
    b: Vec<Vec<Histogram>>,
    with: impl Fn(&mut Histogram, &Histogram),
) -> Vec<Vec<Histogram>> {
    let both = a.iter_mut().flatten().zip(b.iter().flatten());
    both.for_each(|(a, b)| with(a, b));
    a
}

/// Extremes and histogram of a channel's values.
#[derive(Clone)]
struct Histogram {
    low: f32,
    high: f32,
    count: u64,
    /// Number of values in each bin between the extremes; empty in the first pass.
    bins: Vec<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            low: f32::INFINITY,
            high: f32::NEG_INFINITY,
            count: 0,
            bins: Vec::new(),
        }
    }
}

impl Histogram {
    fn widen(&mut self, v: f32) {
        (self.low, self.high) = (self.low.min(v), self.high.max(v));
    }

    fn join(&mut self, other: &Self) {
        self.widen(other.low);
        self.widen(other.high);
    }

    fn count(&mut self, v: f32) {
        self.bins.resize(BINS, 0);
        let position = (v - self.low) / (self.high - self.low).max(f32::MIN_POSITIVE);
        self.bins[((position * BINS as f32) as usize).min(BINS - 1)] += 1;
        self.count += 1;
    }

    fn add(&mut self, other: &Self) {
        self.bins.resize(BINS, 0);
        self.bins
            .iter_mut()
            .zip(&other.bins)
            .for_each(|(a, b)| *a += b);
        self.count += other.count;
    }

    /// Returns the lowest and highest value of the range, and the mean.
    fn range(&self) -> [f32; 3] {
        let width = (self.high - self.low) / BINS as f32;
        let outliers = (self.count as f64 * OUTLIERS) as u64;
        let outside = |bins: &mut dyn Iterator<Item = &u64>| {
            let mut sum = 0;
            let few = |n: &&u64| {
                sum += **n;
                sum <= outliers
            };
            bins.take_while(few).count() as f32
        };
        let below = outside(&mut self.bins.iter());
        let above = outside(&mut self.bins.iter().rev());
        let middle = |(i, n): (usize, &u64)| (i as f64 + 0.5) * *n as f64;
        let mean = self.bins.iter().enumerate().map(middle).sum::<f64>();
        let mean = self.low + width * (mean / self.count.max(1) as f64) as f32;
        let (low, high) = (self.low + below * width, self.high - above * width);
        let headroom = HEADROOM * (high - low);
        [low - headroom, high + headroom, mean.clamp(low, high)]
    }
}

/// Calls `visit(stage, channel, value)` for each value of the latent (stage 0) and of the output of
/// each layer but the last (stage n for layer n - 1). Leaves out the borders, which depend on the
/// zeros around the patch, unless the patch is too small.
fn observe(model: &LiteModel, patches: &Patches, mut visit: impl FnMut(usize, usize, f32)) {
    let Grid { width, height, .. } = patches.grid;
    let border = model.layers.len();
    let border = if 2 * border < width.min(height) {
        border
    } else {
        0
    };
    let mut visit_all = |stage: usize, channels: usize, values: &[f32]| {
        for (i, pixel) in values.chunks_exact(channels).enumerate() {
            let (x, y) = (i % width, i / width % height);
            if (border..width - border).contains(&x) && (border..height - border).contains(&y) {
                pixel
                    .iter()
                    .enumerate()
                    .for_each(|(c, &v)| visit(stage, c, v));
            }
        }
    };
    let (mut x, mut skip) = (patches.inputs.clone(), Vec::new());
    visit_all(0, patches.grid.channels, &x);
    let Some((_, inner)) = model.layers.split_last() else {
        return;
    };
    for (stage, layer) in (1..).zip(inner) {
        let y = forward(model, layer, patches, &x, &skip);
        match layer.spec.role {
            Role::PairFirst => skip = x,
            Role::Chain | Role::PairSecond => skip.clear(),
        }
        visit_all(stage, layer.spec.co, &y);
        x = y;
    }
}

/// Returns the output of `layer` for the input `x`, plus `skip` unless that is empty.
fn forward(
    model: &LiteModel,
    layer: &Layer,
    patches: &Patches,
    x: &[f32],
    skip: &[f32],
) -> Vec<f32> {
    let (spec, grid) = (&layer.spec, patches.grid);
    let shape = ConvShape {
        n: patches.inputs.len() / grid.len(),
        h: grid.height,
        w: grid.width,
        ci: spec.ci,
        co: spec.co,
        kh: 3,
        kw: 3,
        stride: 1,
        pad: 1,
    };
    let (weight, bias) = layer.fold(&patches.at, model.metadata.student.r);
    let conv = PackedConv::new(&shape, &weight, Some(&bias), Isa::best());
    let mut y = vec![0.0; shape.n * grid.width * grid.height * spec.co];
    conv.forward(&shape, x, Activation::LeakyRelu(slope(layer)), &mut y);
    y.iter_mut().zip(skip).for_each(|(y, x)| *y += x);
    y
}
