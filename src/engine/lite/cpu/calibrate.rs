//! Measures what a network's values are, so that it can be computed in integers.

use rayon::prelude::*;

use super::network::slope;
use crate::{
    model::{Calibration, Layer, LiteModel},
    nn::lite::{Condition, Role, latent::Grid},
    ops::{
        Activation,
        cpu::{
            Isa,
            conv::{ConvShape, PackedConv},
        },
    },
};

/// Bins in which a channel's values are counted.
const BINS: usize = 4096;

/// Of a channel's values, how many may lie beyond its range on either side: the few outliers of the patches are not
/// worth a coarser step for all others.
const BEYOND: f64 = 2e-6;

/// How much wider than what was seen the ranges are made, for what was not.
const ROOM: f32 = 0.02;

/// Whitened latents of some patches under one condition.
#[derive(Clone, Debug)]
pub struct Patches {
    pub at: Condition,
    /// Of one patch.
    pub grid: Grid,
    /// Patch after patch.
    pub latents: Vec<f32>,
}

/// The ranges of what `model` makes of `patches`.
///
/// # Panics
/// When there are no patches, or their grid's channels are not the model's.
pub fn calibrate(model: &LiteModel, patches: &[Patches]) -> Calibration {
    let none = || -> Vec<Vec<Seen>> {
        let last = model.layers.last().map_or(0, |l| l.spec.co);
        let inner = model.layers.iter().rev().skip(1).rev();
        let channels = std::iter::once(last).chain(inner.map(|l| l.spec.co));
        channels.map(|n| vec![Seen::default(); n]).collect()
    };
    // First the extremes, then how the values are spread between them.
    let extremes = patches.par_iter().map(|patches| {
        let mut seen = none();
        observe(model, patches, |stage, channel, v| {
            seen[stage][channel].widen(v)
        });
        seen
    });
    let extremes = extremes.reduce(none, |a, b| merged(a, b, Seen::join));
    let counted = patches.par_iter().map(|patches| {
        let mut seen = extremes.clone();
        observe(model, patches, |stage, channel, v| {
            seen[stage][channel].count(v)
        });
        seen
    });
    let counted = counted.reduce(|| extremes.clone(), |a, b| merged(a, b, Seen::add));
    let ranges = counted
        .iter()
        .map(|stage| stage.iter().map(Seen::range).collect());
    Calibration {
        ranges: ranges.collect(),
    }
}

fn merged(
    mut a: Vec<Vec<Seen>>,
    b: Vec<Vec<Seen>>,
    with: impl Fn(&mut Seen, &Seen),
) -> Vec<Vec<Seen>> {
    let both = a.iter_mut().flatten().zip(b.iter().flatten());
    both.for_each(|(a, b)| with(a, b));
    a
}

/// A channel's values.
#[derive(Clone)]
struct Seen {
    low: f32,
    high: f32,
    count: u64,
    /// Values by their place between the extremes; empty before there are any.
    bins: Vec<u64>,
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            low: f32::INFINITY,
            high: f32::NEG_INFINITY,
            count: 0,
            bins: Vec::new(),
        }
    }
}

impl Seen {
    fn widen(&mut self, v: f32) {
        (self.low, self.high) = (self.low.min(v), self.high.max(v));
    }

    fn join(&mut self, other: &Self) {
        self.widen(other.low);
        self.widen(other.high);
    }

    fn count(&mut self, v: f32) {
        self.bins.resize(BINS, 0);
        let place = (v - self.low) / (self.high - self.low).max(f32::MIN_POSITIVE);
        self.bins[((place * BINS as f32) as usize).min(BINS - 1)] += 1;
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

    /// Lowest and highest value to be told apart, and the mean.
    fn range(&self) -> [f32; 3] {
        let width = (self.high - self.low) / BINS as f32;
        let beyond = (self.count as f64 * BEYOND) as u64;
        let outside = |bins: &mut dyn Iterator<Item = &u64>| {
            let mut sum = 0;
            let few = |n: &&u64| {
                sum += **n;
                sum <= beyond
            };
            bins.take_while(few).count() as f32
        };
        let below = outside(&mut self.bins.iter());
        let above = outside(&mut self.bins.iter().rev());
        let middle = |(i, n): (usize, &u64)| (i as f64 + 0.5) * *n as f64;
        let mean = self.bins.iter().enumerate().map(middle).sum::<f64>();
        let mean = self.low + width * (mean / self.count.max(1) as f64) as f32;
        let (low, high) = (self.low + below * width, self.high - above * width);
        let room = ROOM * (high - low);
        [low - room, high + room, mean.clamp(low, high)]
    }
}

/// Tells `see` of each value: its stage (0 is the latent, n the output of layer n - 1; not that of the last), its
/// channel and itself. The borders, where layers see the zeros around the patch, are left out if there is more.
fn observe(model: &LiteModel, patches: &Patches, mut see: impl FnMut(usize, usize, f32)) {
    let Grid { width, height, .. } = patches.grid;
    let border = model.layers.len();
    let border = if 2 * border < width.min(height) {
        border
    } else {
        0
    };
    let mut tell = |stage: usize, channels: usize, values: &[f32]| {
        for (i, pixel) in values.chunks_exact(channels).enumerate() {
            let (x, y) = (i % width, i / width % height);
            if (border..width - border).contains(&x) && (border..height - border).contains(&y) {
                pixel
                    .iter()
                    .enumerate()
                    .for_each(|(c, &v)| see(stage, c, v));
            }
        }
    };
    let (mut x, mut kept) = (patches.latents.clone(), Vec::new());
    tell(0, patches.grid.channels, &x);
    let Some((_, inner)) = model.layers.split_last() else {
        return;
    };
    for (stage, layer) in (1..).zip(inner) {
        let y = forward(model, layer, patches, &x, &kept);
        match layer.spec.role {
            Role::PairFirst => kept = x,
            Role::Chain | Role::PairSecond => kept.clear(),
        }
        tell(stage, layer.spec.co, &y);
        x = y;
    }
}

/// A layer's output; `kept` is added if there is any.
fn forward(
    model: &LiteModel,
    layer: &Layer,
    patches: &Patches,
    x: &[f32],
    kept: &[f32],
) -> Vec<f32> {
    let (spec, grid) = (&layer.spec, patches.grid);
    let shape = ConvShape {
        n: patches.latents.len() / grid.len(),
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
    y.iter_mut().zip(kept).for_each(|(y, x)| *y += x);
    y
}
