//! Element-wise kernels in plain Rust that the compiler vectorises, compiled for several instruction sets.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{Isa, filled};

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

/// `a b + c`, with one rounding where that is one instruction.
#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `exp(x)` for |x| up to 87, clamped beyond; relative error below 2e-7. `2^n 2^f` with |f| <= 0.5 by the Taylor
/// polynomial of degree 7 of `exp(f ln 2)`.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    let t = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = t + ROUND;
    let f = (t - (rounded - ROUND)) * std::f32::consts::LN_2;
    let mut e = TAYLOR[0];
    for c in &TAYLOR[1..] {
        e = fma::<FMA>(e, f, *c);
    }
    let power = (rounded.to_bits() << 23).wrapping_add(127 << 23);
    e * f32::from_bits(power)
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu_of<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// The slope of [`silu_of`] at `x`: `s (1 + x (1 - s))` with `s = 1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn silu_slope<const FMA: bool>(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp::<FMA>(-x));
    // Beyond 126 ln 2 the product x (1 - s) is 0 or x e^x, both nothing: keep x from overflowing it.
    s * (1.0 + x.max(-126.0) * (1.0 - s))
}

#[inline(always)]
fn silu_body<const FMA: bool>(x: &[f32], y: &mut [MaybeUninit<f32>]) {
    for (y, &x) in y.iter_mut().zip(x) {
        y.write(silu_of::<FMA>(x));
    }
}

#[inline(always)]
fn silu_grad_body<const FMA: bool>(x: &[f32], g: &[f32], gx: &mut [MaybeUninit<f32>]) {
    for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
        gx.write(g * silu_slope::<FMA>(x));
    }
}

/// The tail `1 - Phi(a)` of the normal distribution for `a >= 0`, as `t P(t) exp(-a^2 / 2)` with `t = 1 / (1 + q a)`, and
/// the exponential itself. The degree of P was chosen and its coefficients fitted to f64 values for the least relative
/// error: 6e-8 of the polynomial, 4e-7 with f32 rounding, and the exponential's `a^2 / 2` times the machine's epsilon.
#[inline(always)]
fn normal_tail<const FMA: bool>(a: f32) -> (f32, f32) {
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
        p = fma::<FMA>(p, t, *c);
    }
    let e = exp::<FMA>(-0.5 * a * a);
    (t * p * e, e)
}

#[inline(always)]
fn gelu_body<const FMA: bool>(x: &[f32], y: &mut [MaybeUninit<f32>]) {
    for (y, &x) in y.iter_mut().zip(x) {
        let tail = normal_tail::<FMA>(x.abs()).0;
        y.write(x * if x > 0.0 { 1.0 - tail } else { tail });
    }
}

#[inline(always)]
fn gelu_grad_body<const FMA: bool>(x: &[f32], g: &[f32], gx: &mut [MaybeUninit<f32>]) {
    const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
        let (tail, e) = normal_tail::<FMA>(x.abs());
        let phi = if x > 0.0 { 1.0 - tail } else { tail };
        // Where the exponential is nothing x must not blow it up.
        gx.write(g * (phi + x.clamp(-20.0, 20.0) * DENSITY * e));
    }
}

#[inline(always)]
fn add_body<const FMA: bool>(a: &[f32], b: &[f32], y: &mut [MaybeUninit<f32>]) {
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        y.write(a + b);
    }
}

dispatch!(add_on, add_body, (a: &[f32], b: &[f32], y: &mut [MaybeUninit<f32>]));
dispatch!(silu_on, silu_body, (x: &[f32], y: &mut [MaybeUninit<f32>]));
dispatch!(silu_grad_on, silu_grad_body, (x: &[f32], g: &[f32], gx: &mut [MaybeUninit<f32>]));

dispatch!(gelu_on, gelu_body, (x: &[f32], y: &mut [MaybeUninit<f32>]));
dispatch!(gelu_grad_on, gelu_grad_body, (x: &[f32], g: &[f32], gx: &mut [MaybeUninit<f32>]));

type Map = fn(Isa, &[f32], &mut [MaybeUninit<f32>]);
type Map2 = fn(Isa, &[f32], &[f32], &mut [MaybeUninit<f32>]);

/// Runs `on` over chunks of `x`.
fn map(x: &[f32], on: Map) -> Vec<f32> {
    // SAFETY: the chunks cover all values and `on` writes all of a chunk.
    unsafe {
        filled(x.len(), |y| {
            let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
            chunks.for_each(|(y, x)| on(Isa::best(), x, y));
        })
    }
}

/// Runs `on` over chunks of `x` and `g`, of one length.
fn map2(x: &[f32], g: &[f32], on: Map2) -> Vec<f32> {
    assert_eq!(x.len(), g.len(), "two inputs of one length");
    // SAFETY: as in `map`.
    unsafe {
        filled(x.len(), |gx| {
            let inputs = x.par_chunks(CHUNK).zip(g.par_chunks(CHUNK));
            let chunks = gx.par_chunks_mut(CHUNK).zip(inputs);
            chunks.for_each(|(gx, (x, g))| on(Isa::best(), x, g, gx));
        })
    }
}

/// `a + b`.
///
/// # Panics
/// When they differ in length.
pub fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    map2(a, b, add_on)
}

/// `x / (1 + exp(-x))`. Runs on the current rayon pool, as all here.
pub fn silu(x: &[f32]) -> Vec<f32> {
    map(x, silu_on)
}

/// The gradient of [`silu`]: `g s (1 + x (1 - s))` with `s = 1 / (1 + exp(-x))`.
///
/// # Panics
/// When `x` and `g` differ in length.
pub fn silu_grad(x: &[f32], g: &[f32]) -> Vec<f32> {
    map2(x, g, silu_grad_on)
}

/// `x Phi(x)` with the normal distribution's Phi (Hendrycks and Gimpel, arXiv 1606.08415).
pub fn gelu(x: &[f32]) -> Vec<f32> {
    map(x, gelu_on)
}

/// The gradient of [`gelu`]: `g (Phi(x) + x Phi'(x))`.
///
/// # Panics
/// When `x` and `g` differ in length.
pub fn gelu_grad(x: &[f32], g: &[f32]) -> Vec<f32> {
    map2(x, g, gelu_grad_on)
}

/// The gradient of a leaky ReLU with a `slope` above 0, by its output `y`, whose sign is the input's.
///
/// # Panics
/// When `y` and `g` differ in length.
pub fn leaky_relu_grad(y: &[f32], g: &[f32], slope: f32) -> Vec<f32> {
    assert_eq!(y.len(), g.len(), "two inputs of one length");
    // SAFETY: the chunks cover all values, and every value of a chunk is written.
    unsafe {
        filled(y.len(), |gx| {
            let inputs = y.par_chunks(CHUNK).zip(g.par_chunks(CHUNK));
            let chunks = gx.par_chunks_mut(CHUNK).zip(inputs);
            chunks.for_each(|(gx, (y, g))| {
                for ((gx, y), g) in gx.iter_mut().zip(y).zip(g) {
                    gx.write(if *y > 0.0 { *g } else { slope * g });
                }
            });
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values and slopes by one instruction set.
    fn on(isa: Isa, x: &[f32], forward: Map, slope: Map2) -> [Vec<f32>; 2] {
        let ones = vec![1.0; x.len()];
        // SAFETY: both write as many values as there are in `x`.
        unsafe {
            [
                filled(x.len(), |y| forward(isa, x, y)),
                filled(x.len(), |gx| slope(isa, x, &ones, gx)),
            ]
        }
    }

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
        for &isa in Isa::available() {
            let [y, gx] = on(isa, &x, gelu_on, gelu_grad_on);
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
        for &isa in Isa::available() {
            let [y, gx] = on(isa, &x, silu_on, silu_grad_on);
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
