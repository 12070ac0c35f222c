//! Element-wise kernels in plain Rust that the compiler vectorises, compiled for several instruction sets.

use rayon::prelude::*;

use super::Isa;

/// Values that one task takes: small enough for the first-level cache's neighbourhood, large enough to be cheap.
const CHUNK: usize = 16 * 1024;

/// 1/7!, 1/6!, .. 1/0!: the exponential's series from the highest power down.
pub(super) const TAYLOR: [f32; 8] = [
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// `exp(x)` for |x| up to 87, clamped beyond; relative error below 2e-7. `2^n 2^f` with |f| <= 0.5 by the Taylor
/// polynomial of degree 7 of `exp(f ln 2)`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let t = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = t + ROUND;
    let f = (t - (rounded - ROUND)) * std::f32::consts::LN_2;
    let mut e = TAYLOR[0];
    for c in &TAYLOR[1..] {
        e = e * f + c;
    }
    let power = (rounded.to_bits() << 23).wrapping_add(127 << 23);
    e * f32::from_bits(power)
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu_of(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// The slope of [`silu_of`] at `x`: `s (1 + x (1 - s))` with `s = 1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp(-x));
    // Beyond 126 ln 2 the product x (1 - s) is 0 or x e^x, both nothing: keep x from overflowing it.
    s * (1.0 + x.max(-126.0) * (1.0 - s))
}

#[inline(always)]
fn silu_body(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = silu_of(x);
    }
}

#[inline(always)]
fn silu_grad_body(x: &[f32], g: &[f32], gx: &mut [f32]) {
    for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
        *gx = g * silu_slope(x);
    }
}

/// The tail `1 - Phi(a)` of the normal distribution for `a >= 0`, as `t P(t) exp(-a^2 / 2)` with `t = 1 / (1 + q a)`, and
/// the exponential itself. The degree of P was chosen and its coefficients fitted to f64 values for the least relative
/// error: 6e-8 of the polynomial, 4e-7 with f32 rounding, and the exponential's `a^2 / 2` times the machine's epsilon.
#[inline(always)]
fn normal_tail(a: f32) -> (f32, f32) {
    const Q: f32 = 0.282_842_7;
    const P: [f32; 9] = [
        0.020_133_741,
        -0.067_735_51,
        0.036_921,
        0.049_864_873,
        0.035_754_1,
        0.098_481_536,
        0.100_479_29,
        0.113_287_86,
        0.112_813_15,
    ];
    let t = 1.0 / (1.0 + Q * a);
    let mut p = P[0];
    for c in &P[1..] {
        p = p * t + c;
    }
    let e = exp(-0.5 * a * a);
    (t * p * e, e)
}

#[inline(always)]
fn gelu_body(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        let tail = normal_tail(x.abs()).0;
        *y = x * if x > 0.0 { 1.0 - tail } else { tail };
    }
}

#[inline(always)]
fn gelu_grad_body(x: &[f32], g: &[f32], gx: &mut [f32]) {
    const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
        let (tail, e) = normal_tail(x.abs());
        let phi = if x > 0.0 { 1.0 - tail } else { tail };
        // Where the exponential is nothing x must not blow it up.
        *gx = g * (phi + x.clamp(-20.0, 20.0) * DENSITY * e);
    }
}

dispatch!(silu_on, silu_body, (x: &[f32], y: &mut [f32]));
dispatch!(silu_grad_on, silu_grad_body, (x: &[f32], g: &[f32], gx: &mut [f32]));

dispatch!(gelu_on, gelu_body, (x: &[f32], y: &mut [f32]));
dispatch!(gelu_grad_on, gelu_grad_body, (x: &[f32], g: &[f32], gx: &mut [f32]));

/// `y = x / (1 + exp(-x))`; `y` is resized. Runs on the current rayon pool.
pub fn silu(x: &[f32], y: &mut Vec<f32>) {
    y.resize(x.len(), 0.0);
    let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    chunks.for_each(|(y, x)| silu_on(Isa::best(), x, y));
}

/// The gradient of [`silu`]: `gx = g s (1 + x (1 - s))` with `s = 1 / (1 + exp(-x))`; `gx` is resized.
///
/// # Panics
/// When `x` and `g` differ in length.
pub fn silu_grad(x: &[f32], g: &[f32], gx: &mut Vec<f32>) {
    assert_eq!(x.len(), g.len(), "values and gradient");
    gx.resize(x.len(), 0.0);
    let inputs = x.par_chunks(CHUNK).zip(g.par_chunks(CHUNK));
    let chunks = gx.par_chunks_mut(CHUNK).zip(inputs);
    chunks.for_each(|(gx, (x, g))| silu_grad_on(Isa::best(), x, g, gx));
}

/// `y = x Phi(x)` with the normal distribution's Phi (Hendrycks and Gimpel, arXiv 1606.08415); `y` is resized. Runs on
/// the current rayon pool.
pub fn gelu(x: &[f32], y: &mut Vec<f32>) {
    y.resize(x.len(), 0.0);
    let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
    chunks.for_each(|(y, x)| gelu_on(Isa::best(), x, y));
}

/// The gradient of [`gelu`]: `gx = g (Phi(x) + x Phi'(x))`; `gx` is resized.
///
/// # Panics
/// When `x` and `g` differ in length.
pub fn gelu_grad(x: &[f32], g: &[f32], gx: &mut Vec<f32>) {
    assert_eq!(x.len(), g.len(), "values and gradient");
    gx.resize(x.len(), 0.0);
    let inputs = x.par_chunks(CHUNK).zip(g.par_chunks(CHUNK));
    let chunks = gx.par_chunks_mut(CHUNK).zip(inputs);
    chunks.for_each(|(gx, (x, g))| gelu_grad_on(Isa::best(), x, g, gx));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The integral of the normal density from `-a` to `a`, by its series around 0 (converges everywhere, in f64
    /// exact enough up to 6).
    fn within(a: f64) -> f64 {
        let (mut term, mut sum, mut k) = (a, a, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            term *= a * a / (2.0 * k + 1.0);
            sum += term;
            k += 1.0;
        }
        2.0 * sum * (-a * a / 2.0).exp() / std::f64::consts::TAU.sqrt()
    }

    #[test]
    fn gelu_agrees_with_f64_on_every_instruction_set() {
        let x: Vec<f32> = (-6000..6000).map(|i| i as f32 * 0.001).collect();
        let g = vec![1.0; x.len()];
        for &isa in Isa::available() {
            let (mut y, mut gx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            gelu_on(isa, &x, &mut y);
            gelu_grad_on(isa, &x, &g, &mut gx);
            for ((&x, &y), &gx) in x.iter().zip(&y).zip(&gx) {
                let x = f64::from(x);
                let phi = 0.5 * (1.0 + x.signum() * within(x.abs()));
                let density = (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
                assert!(
                    (f64::from(y) - x * phi).abs() <= 2e-6 * (x * phi).abs() + 1e-14,
                    "{isa:?} at {x}: {y}, not {}",
                    x * phi
                );
                assert!(
                    (f64::from(gx) - phi - x * density).abs() <= 5e-7,
                    "{isa:?} slope at {x}"
                );
            }
        }
    }

    #[test]
    fn every_instruction_set_agrees_with_f64() {
        let x: Vec<f32> = (-9000..9000).map(|i| i as f32 * 0.0123).collect();
        let g = vec![1.0; x.len()];
        for &isa in Isa::available() {
            let (mut y, mut gx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            silu_on(isa, &x, &mut y);
            silu_grad_on(isa, &x, &g, &mut gx);
            for ((&x, &y), &gx) in x.iter().zip(&y).zip(&gx) {
                let x = f64::from(x);
                let s = 1.0 / (1.0 + (-x).exp());
                let (want, slope) = (x * s, s * (1.0 + x * (1.0 - s)));
                assert!(
                    (f64::from(y) - want).abs() <= 1e-6 * (1e-3 + want.abs()),
                    "{isa:?} at {x}"
                );
                assert!(
                    (f64::from(gx) - slope).abs() <= 2e-6,
                    "{isa:?} slope at {x}: {gx}, not {slope}"
                );
            }
        }
    }
}
