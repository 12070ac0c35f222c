//! Group normalisation of NHWC maps with its affine map and SiLU, forward and backward.
//!
//! Every pass goes over the map in chunks of pixels that do not depend on the number of threads;
//! within a chunk sums are f32, from chunk to chunk f64 in a fixed order. So results do not depend
//! on the number of threads.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{
    math::{silu as silu_of, silu_slope},
    memory::filled,
    simd::{Isa, dispatch},
};

/// Values of a task.
const CHUNK: usize = 16 * 1024;

/// Shape of a map: `n` samples of `pixels` pixels with `channels` channels in `groups` groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormShape {
    pub n: usize,
    pub pixels: usize,
    pub channels: usize,
    pub groups: usize,
}

impl NormShape {
    fn sample(&self) -> usize {
        self.pixels * self.channels
    }

    /// Returns the values of a chunk: whole pixels, at most one sample.
    fn chunk(&self) -> usize {
        (CHUNK / self.channels).min(self.pixels).max(1) * self.channels
    }

    fn check(&self, values: &[f32]) {
        let fits =
            self.groups > 0 && self.channels > 0 && self.channels.is_multiple_of(self.groups);
        assert!(fits, "groups of {self:?}");
        let len = self.sample().checked_mul(self.n);
        assert_eq!(Some(values.len()), len, "values of {self:?}");
    }
}

/// Mean and reciprocal standard deviation of every group of every sample.
#[derive(Clone, Debug)]
pub struct Moments(Vec<[f64; 2]>);

/// `count`, mean and sum of squared deviations from it.
type Partial = [f64; 3];

/// Joins the moments of two sets (Chan, Golub and LeVeque, "Updating formulae and a pairwise
/// algorithm").
fn join([n, mean, squares]: Partial, [m, other, more]: Partial) -> Partial {
    let (total, delta) = (n + m, other - mean);
    if total == 0.0 {
        return [n, mean, squares];
    }
    [
        total,
        mean + delta * m / total,
        squares + more + delta * delta * n * m / total,
    ]
}

/// Returns the moments of `x` `[n, pixels, channels]`; `eps` is added to the variance.
///
/// # Panics
/// If the length does not fit the shape.
pub fn moments(s: &NormShape, x: &[f32], eps: f64, isa: Isa) -> Moments {
    s.check(x);
    let width = s.channels / s.groups;
    let groups = x.par_chunks(s.sample().max(1)).flat_map_iter(|sample| {
        let chunks = sample.par_chunks(s.chunk());
        let parts: Vec<Vec<Partial>> = chunks
            .map_init(
                || vec![0.0f32; 2 * s.channels],
                |sums, chunk| {
                    sums.fill(0.0);
                    deviations_on(isa, chunk, s.channels, sums);
                    chunk_moments(&chunk[..s.channels], sums, chunk.len() / s.channels, width)
                },
            )
            .collect();
        (0..s.groups).map(move |g| {
            let [count, mean, squares] = parts.iter().map(|p| p[g]).fold([0.0; 3], join);
            [mean, (squares / count + eps).sqrt().recip()]
        })
    });
    Moments(groups.collect())
}

dispatch! {
    /// Sums, for each channel, `x - shift` and its square over the pixels of a chunk. The shift is
    /// the first pixel: close enough to the mean to avoid cancellation.
    fn deviations_on(x: &[f32], channels: usize, sums: &mut [f32]) {
        let shift = &x[..channels];
        let (sum, square) = sums.split_at_mut(channels);
        let mut quads = x.chunks_exact(4 * channels);
        for quad in &mut quads {
            let (a, rest) = quad.split_at(channels);
            let (b, rest) = rest.split_at(channels);
            let (c, d) = rest.split_at(channels);
            let sums = sum.iter_mut().zip(square.iter_mut()).zip(shift);
            let values = a.iter().zip(b).zip(c.iter().zip(d));
            for (((sum, square), k), ((a, b), (c, d))) in sums.zip(values) {
                let (a, b, c, d) = (a - k, b - k, c - k, d - k);
                *sum += (a + b) + (c + d);
                *square += (a * a + b * b) + (c * c + d * d);
            }
        }
        for pixel in quads.remainder().chunks_exact(channels) {
            let sums = sum.iter_mut().zip(square.iter_mut());
            for (((sum, square), k), v) in sums.zip(shift).zip(pixel) {
                let v = v - k;
                *sum += v;
                *square += v * v;
            }
        }
    }
}

/// Returns the moments of each group of `width` channels in one chunk, from the sums of
/// [`deviations_on`].
fn chunk_moments(shift: &[f32], sums: &[f32], pixels: usize, width: usize) -> Vec<Partial> {
    let (sum, square) = sums.split_at(shift.len());
    let pixels = pixels as f64;
    let channel = |c: usize| -> Partial {
        let (sum, square) = (f64::from(sum[c]), f64::from(square[c]));
        let squares = (square - sum * sum / pixels).max(0.0);
        [pixels, f64::from(shift[c]) + sum / pixels, squares]
    };
    (0..shift.len())
        .step_by(width)
        .map(|first| (first..first + width).map(channel).fold([0.0; 3], join))
        .collect()
}

/// Affine map that follows the normalisation: `weight` and `bias` are `[channels]`, or
/// `[n, channels]` if each sample has its own.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    pub weight: &'a [f32],
    pub bias: &'a [f32],
}

/// Returns the values of a sample, or those of all samples.
fn of_sample(values: &[f32], channels: usize, sample: usize) -> &[f32] {
    let from = if values.len() == channels {
        0
    } else {
        sample * channels
    };
    &values[from..from + channels]
}

impl Affine<'_> {
    fn check(&self, s: &NormShape) {
        for values in [self.weight, self.bias] {
            let len = values.len();
            let fits = len == s.channels || len == s.n * s.channels;
            assert!(fits, "weight and bias of {s:?}");
        }
    }

    /// Returns normalisation and affine map of one sample as `scale x + offset` by channel.
    fn fold(&self, s: &NormShape, m: &Moments, sample: usize) -> (Vec<f32>, Vec<f32>) {
        let weight = of_sample(self.weight, s.channels, sample);
        let bias = of_sample(self.bias, s.channels, sample);
        let width = s.channels / s.groups;
        (0..s.channels)
            .map(|c| {
                let [mean, rstd] = m.0[sample * s.groups + c / width];
                let scale = f64::from(weight[c]) * rstd;
                (scale as f32, (f64::from(bias[c]) - mean * scale) as f32)
            })
            .unzip()
    }
}

/// Returns `f(weight (x - mean) rstd + bias)`; `f` is the SiLU if `silu`, else the identity.
///
/// # Panics
/// If a length does not fit the shape.
pub fn forward(
    s: &NormShape,
    x: &[f32],
    m: &Moments,
    affine: &Affine,
    silu: bool,
    isa: Isa,
) -> Vec<f32> {
    s.check(x);
    affine.check(s);
    let run = |y: &mut [MaybeUninit<f32>]| {
        let len = s.sample().max(1);
        let samples = y.par_chunks_mut(len).zip(x.par_chunks(len));
        samples.enumerate().for_each(|(i, (y, x))| {
            let (scale, offset) = affine.fold(s, m, i);
            let chunks = y.par_chunks_mut(s.chunk()).zip(x.par_chunks(s.chunk()));
            chunks.for_each(|(y, x)| apply_on(isa, x, &scale, &offset, silu, y));
        });
    };
    // SAFETY: the samples cover all values and their chunks, whole pixels, all of a sample.
    unsafe { filled(x.len(), run) }
}

dispatch! {
    fn apply_on<const FMA: bool>(
        x: &[f32],
        scale: &[f32],
        offset: &[f32],
        silu: bool,
        y: &mut [MaybeUninit<f32>],
    ) {
        let channels = scale.len();
        for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
            let coefficients = scale.iter().zip(offset);
            let values = y.iter_mut().zip(x).zip(coefficients);
            if silu {
                values.for_each(|((y, x), (a, b))| _ = y.write(silu_of::<FMA>(x * a + b)));
            } else {
                values.for_each(|((y, x), (a, b))| _ = y.write(x * a + b));
            }
        }
    }
}

/// Returns the result of [`moments`] and [`forward`] by their formula, in f64. `weight` and `bias`
/// are `[channels]`.
pub fn reference(
    s: &NormShape,
    x: &[f32],
    eps: f64,
    weight: &[f32],
    bias: &[f32],
    silu: bool,
) -> Vec<f32> {
    s.check(x);
    let width = s.channels / s.groups;
    let mut y = Vec::with_capacity(x.len());
    for sample in x.chunks_exact(s.sample()) {
        let moments = (0..s.groups).map(|group| {
            let pixels = sample.chunks_exact(s.channels);
            let all = pixels
                .flat_map(|p| &p[group * width..][..width])
                .map(|&v| f64::from(v));
            let count = (s.pixels * width) as f64;
            let mean = all.clone().sum::<f64>() / count;
            let variance = all.map(|v| (v - mean).powi(2)).sum::<f64>() / count;
            [mean, (variance + eps).sqrt().recip()]
        });
        let moments: Vec<_> = moments.collect();
        y.extend(sample.iter().enumerate().map(|(i, &v)| {
            let c = i % s.channels;
            let [mean, rstd] = moments[c / width];
            let u = (f64::from(v) - mean) * rstd;
            let z = u * f64::from(weight[c]) + f64::from(bias[c]);
            let factor = if silu { 1.0 / (1.0 + (-z).exp()) } else { 1.0 };
            (z * factor) as f32
        }));
    }
    y
}

/// Gradients of [`forward`].
pub struct Gradients {
    pub x: Vec<f32>,
    /// As long as [`Affine::weight`] and [`Affine::bias`].
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
}

/// Returns the gradients with respect to input, weight and bias from `gy`, the gradient of the
/// result.
///
/// Let `g` be the gradient before the activation and `u` the normalised values of a channel. The
/// bias has the gradient `sum g` and the weight `sum g u`; with `m` values in a group, `gx = rstd
/// (w g - (sum over group of w g) / m - u (sum over group of w g u) / m)`.
///
/// # Panics
/// If a length does not fit the shape.
pub fn backward(
    s: &NormShape,
    x: &[f32],
    m: &Moments,
    affine: &Affine,
    silu: bool,
    gy: &[f32],
    isa: Isa,
) -> Gradients {
    s.check(x);
    s.check(gy);
    affine.check(s);
    let mut sums: Vec<Sums> = Vec::new();
    let run = |gx: &mut [MaybeUninit<f32>]| {
        let len = s.sample().max(1);
        let inputs = x.par_chunks(len).zip(gy.par_chunks(len));
        let samples = gx.par_chunks_mut(len).zip(inputs).enumerate();
        let of_each = samples.map(|(i, (gx, (x, gy)))| {
            let sample = Sample { s, m, sample: i };
            sample.backward(affine, silu, isa, x, gy, gx)
        });
        sums = of_each.collect();
    };
    // SAFETY: the samples cover all values, and each writes all of its own.
    let gx = unsafe { filled(x.len(), run) };
    let gather = |len: usize, part: fn(&Sums) -> &[f64]| -> Vec<f32> {
        let mut total = vec![0.0f64; len];
        for (i, sums) in sums.iter().enumerate() {
            let at = if len == s.channels { 0 } else { i * s.channels };
            for (t, v) in total[at..].iter_mut().zip(part(sums)) {
                *t += v;
            }
        }
        total.into_iter().map(|v| v as f32).collect()
    };
    Gradients {
        x: gx,
        weight: gather(affine.weight.len(), |s| &s.moment),
        bias: gather(affine.bias.len(), |s| &s.plain),
    }
}

/// Sums of a sample by channel, in f64: `sum g` and `sum g (x - mean)`, later `sum g u`.
struct Sums {
    plain: Vec<f64>,
    moment: Vec<f64>,
}

/// Coefficients of one sample by channel.
struct Folded {
    scale: Vec<f32>,
    offset: Vec<f32>,
    mean: Vec<f32>,
    silu: bool,
}

/// Moments of one sample by channel.
struct Sample<'a> {
    s: &'a NormShape,
    m: &'a Moments,
    sample: usize,
}

impl Sample<'_> {
    /// Writes the gradient of the input and returns the sums for weight and bias.
    fn backward(
        &self,
        affine: &Affine,
        silu: bool,
        isa: Isa,
        x: &[f32],
        gy: &[f32],
        gx: &mut [MaybeUninit<f32>],
    ) -> Sums {
        let (scale, offset) = affine.fold(self.s, self.m, self.sample);
        let mean = self.means();
        let f = Folded {
            scale,
            offset,
            mean,
            silu,
        };
        let sums = channel_sums(self.s, &f, x, gy, isa);
        let weight = of_sample(affine.weight, self.s.channels, self.sample);
        let (slope, constant) = self.group_terms(weight, &sums);
        let chunk = self.s.chunk();
        let inputs = x.par_chunks(chunk).zip(gy.par_chunks(chunk));
        let chunks = gx.par_chunks_mut(chunk).zip(inputs);
        chunks.for_each(|(gx, (x, gy))| input_on(isa, x, gy, &f, &slope, &constant, gx));
        self.normalised(sums)
    }

    fn of(&self, channel: usize) -> [f64; 2] {
        let width = self.s.channels / self.s.groups;
        self.m.0[self.sample * self.s.groups + channel / width]
    }

    fn means(&self) -> Vec<f32> {
        (0..self.s.channels).map(|c| self.of(c)[0] as f32).collect()
    }

    /// Returns, by channel, the factor of `x - mean` and the constant in the gradient of the input.
    fn group_terms(&self, weight: &[f32], sums: &Sums) -> (Vec<f32>, Vec<f32>) {
        let width = self.s.channels / self.s.groups;
        let count = (self.s.pixels * width) as f64;
        (0..self.s.channels)
            .map(|c| {
                let rstd = self.of(c)[1];
                let group = c / width * width..(c / width + 1) * width;
                let over = |part: &[f64]| -> f64 {
                    group.clone().map(|i| f64::from(weight[i]) * part[i]).sum()
                };
                let slope = -rstd.powi(3) * over(&sums.moment) / count;
                (slope as f32, (-rstd * over(&sums.plain) / count) as f32)
            })
            .unzip()
    }

    /// Turns `sum g (x - mean)` into `sum g u`.
    fn normalised(&self, mut sums: Sums) -> Sums {
        for (c, moment) in sums.moment.iter_mut().enumerate() {
            *moment *= self.of(c)[1];
        }
        sums
    }
}

fn channel_sums(s: &NormShape, f: &Folded, x: &[f32], gy: &[f32], isa: Isa) -> Sums {
    let chunks = x.par_chunks(s.chunk()).zip(gy.par_chunks(s.chunk()));
    let parts: Vec<Vec<f32>> = chunks
        .map(|(x, gy)| {
            let mut sums = vec![0.0; 2 * s.channels];
            sums_on(isa, x, gy, f, &mut sums);
            sums
        })
        .collect();
    let mut total = vec![0.0f64; 2 * s.channels];
    for part in parts {
        for (t, v) in total.iter_mut().zip(part) {
            *t += f64::from(v);
        }
    }
    let moment = total.split_off(s.channels);
    Sums {
        plain: total,
        moment,
    }
}

dispatch! {
    fn sums_on<const FMA: bool>(x: &[f32], gy: &[f32], f: &Folded, sums: &mut [f32]) {
        let channels = f.scale.len();
        let (plain, moment) = sums.split_at_mut(channels);
        for (x, gy) in x.chunks_exact(channels).zip(gy.chunks_exact(channels)) {
            let sums = plain.iter_mut().zip(moment.iter_mut());
            let coefficients = f.scale.iter().zip(&f.offset).zip(&f.mean);
            let values = sums.zip(x.iter().zip(gy)).zip(coefficients);
            if f.silu {
                for (((plain, moment), (x, gy)), ((a, b), mean)) in values {
                    let g = gy * silu_slope::<FMA>(x * a + b);
                    *plain += g;
                    *moment += g * (x - mean);
                }
            } else {
                for (((plain, moment), (x, g)), (_, mean)) in values {
                    *plain += g;
                    *moment += g * (x - mean);
                }
            }
        }
    }
}

dispatch! {
    fn input_on<const FMA: bool>(
        x: &[f32],
        gy: &[f32],
        f: &Folded,
        slope: &[f32],
        constant: &[f32],
        gx: &mut [MaybeUninit<f32>],
    ) {
        let channels = f.scale.len();
        let pixels = x.chunks_exact(channels).zip(gy.chunks_exact(channels));
        for (gx, (x, gy)) in gx.chunks_exact_mut(channels).zip(pixels) {
            let forward = f.scale.iter().zip(&f.offset).zip(&f.mean);
            let coefficients = forward.zip(slope.iter().zip(constant));
            let values = gx.iter_mut().zip(x.iter().zip(gy)).zip(coefficients);
            if f.silu {
                for ((gx, (x, gy)), (((a, b), mean), (slope, constant))) in values {
                    let g = gy * silu_slope::<FMA>(x * a + b);
                    gx.write(g * a + ((x - mean) * slope + constant));
                }
            } else {
                for ((gx, (x, g)), (((a, _), mean), (slope, constant))) in values {
                    gx.write(g * a + ((x - mean) * slope + constant));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::Cpu;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len)
            .map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0)
            .collect()
    }

    const SHAPE: NormShape = NormShape {
        n: 2,
        pixels: 1013,
        channels: 42,
        groups: 6,
    };

    /// Mean and variance of a group in two passes.
    fn formula(s: &NormShape, x: &[f32], sample: usize, group: usize) -> (f64, f64) {
        let width = s.channels / s.groups;
        let sample = &x[sample * s.sample()..][..s.sample()];
        let pixels = sample.chunks_exact(s.channels);
        let all: Vec<f64> = pixels
            .flat_map(|p| &p[group * width..][..width])
            .map(|&v| f64::from(v))
            .collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let squares: f64 = all.iter().map(|v| (v - mean).powi(2)).sum();
        (mean, squares / all.len() as f64)
    }

    #[test]
    fn every_instruction_set_gives_the_formula() {
        let s = SHAPE;
        let x = values(s.n * s.sample(), 1);
        let (weight, bias) = (values(s.n * s.channels, 2), values(s.channels, 3));
        let affine = Affine {
            weight: &weight,
            bias: &bias,
        };
        for isa in Isa::all(&Cpu::detected()) {
            let m = moments(&s, &x, 1e-6, isa);
            let y = forward(&s, &x, &m, &affine, true, isa);
            for (i, (&x_i, &got)) in x.iter().zip(&y).enumerate().step_by(97) {
                let (sample, c) = (i / s.sample(), i % s.channels);
                let (mean, variance) = formula(&s, &x, sample, c / (s.channels / s.groups));
                let u = (f64::from(x_i) - mean) / (variance + 1e-6).sqrt();
                let z = u * f64::from(weight[sample * s.channels + c]) + f64::from(bias[c]);
                let want = z / (1.0 + (-z).exp());
                assert!(
                    (f64::from(got) - want).abs() < 2e-6,
                    "{isa:?}: {got}, not {want}"
                );
            }
        }
    }

    #[test]
    fn a_large_mean_costs_no_digits_of_the_variance() {
        let s = SHAPE;
        let mut x = values(s.n * s.sample(), 1);
        x.iter_mut()
            .for_each(|v| *v = 1000.0 + (*v * 64.0).round() / 64.0);
        for isa in Isa::all(&Cpu::detected()) {
            let m = moments(&s, &x, 0.0, isa);
            for (i, [mean, rstd]) in m.0.into_iter().enumerate() {
                let (want, variance) = formula(&s, &x, i / s.groups, i % s.groups);
                assert!((mean - want).abs() < 1e-6, "{isa:?}: {mean}, not {want}");
                let off = rstd * variance.sqrt() - 1.0;
                assert!(off.abs() < 1e-6, "{isa:?}: off by {off}");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_gradients() {
        let s = SHAPE;
        let (x, gy) = (values(s.n * s.sample(), 1), values(s.n * s.sample(), 4));
        let (weight, bias) = (values(s.channels, 2), values(s.n * s.channels, 3));
        let affine = Affine {
            weight: &weight,
            bias: &bias,
        };
        let run = |isa| {
            let m = moments(&s, &x, 1e-6, isa);
            let g = backward(&s, &x, &m, &affine, true, &gy, isa);
            [g.x, g.weight, g.bias]
        };
        let want = run(Isa::Portable);
        for isa in Isa::all(&Cpu::detected()) {
            for (got, want) in run(isa).iter().flatten().zip(want.iter().flatten()) {
                assert!(
                    (got - want).abs() < 1e-5 * (1.0 + want.abs()),
                    "{isa:?}: {got}, not {want}"
                );
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let s = NormShape {
            pixels: 5000,
            ..SHAPE
        };
        let (x, gy) = (values(s.n * s.sample(), 1), values(s.n * s.sample(), 4));
        let (weight, bias) = (values(s.channels, 2), values(s.channels, 3));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap().install(|| {
                let affine = Affine {
                    weight: &weight,
                    bias: &bias,
                };
                let m = moments(&s, &x, 1e-6, Isa::best());
                let y = forward(&s, &x, &m, &affine, false, Isa::best());
                let g = backward(&s, &x, &m, &affine, false, &gy, Isa::best());
                [y, g.x, g.weight, g.bias]
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{threads} threads");
        }
    }
}
