//! Element-wise kernels, vectorised by the compiler. They run on the current rayon pool.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{
    math::{normal_tail, silu as silu_of, silu_slope},
    memory::filled,
    simd::{Isa, dispatch},
};

/// Values of a task: few enough for the first-level cache, many enough to be cheap.
const CHUNK: usize = 16 * 1024;

dispatch! {
    fn add_on(a: &[f32], b: &[f32], y: &mut [MaybeUninit<f32>]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            y.write(a + b);
        }
    }

    fn silu_on<const FMA: bool>(x: &[f32], y: &mut [MaybeUninit<f32>]) {
        for (y, &x) in y.iter_mut().zip(x) {
            y.write(silu_of::<FMA>(x));
        }
    }

    fn silu_grad_on<const FMA: bool>(x: &[f32], g: &[f32], gx: &mut [MaybeUninit<f32>]) {
        for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
            gx.write(g * silu_slope::<FMA>(x));
        }
    }

    fn gelu_on<const FMA: bool>(x: &[f32], y: &mut [MaybeUninit<f32>]) {
        for (y, &x) in y.iter_mut().zip(x) {
            let tail = normal_tail::<FMA>(x.abs()).0;
            y.write(x * if x > 0.0 { 1.0 - tail } else { tail });
        }
    }

    fn gelu_grad_on<const FMA: bool>(x: &[f32], g: &[f32], gx: &mut [MaybeUninit<f32>]) {
        const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
        for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
            let (tail, e) = normal_tail::<FMA>(x.abs());
            let phi = if x > 0.0 { 1.0 - tail } else { tail };
            // Where the exponential vanishes x must not overflow.
            gx.write(g * (phi + x.clamp(-20.0, 20.0) * DENSITY * e));
        }
    }
}

type Map = fn(Isa, &[f32], &mut [MaybeUninit<f32>]);
type Map2 = fn(Isa, &[f32], &[f32], &mut [MaybeUninit<f32>]);

/// Runs `on` over chunks of `x`.
fn map(isa: Isa, x: &[f32], on: Map) -> Vec<f32> {
    // SAFETY: the chunks cover all values and `on` writes all of a chunk.
    unsafe {
        filled(x.len(), |y| {
            let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
            chunks.for_each(|(y, x)| on(isa, x, y));
        })
    }
}

/// Runs `on` over chunks of `x` and `g`, of one length.
fn map2(isa: Isa, x: &[f32], g: &[f32], on: Map2) -> Vec<f32> {
    assert_eq!(x.len(), g.len(), "two inputs of one length");
    // SAFETY: as in `map`.
    unsafe {
        filled(x.len(), |gx| {
            let inputs = x.par_chunks(CHUNK).zip(g.par_chunks(CHUNK));
            let chunks = gx.par_chunks_mut(CHUNK).zip(inputs);
            chunks.for_each(|(gx, (x, g))| on(isa, x, g, gx));
        })
    }
}

/// Returns `a + b`.
///
/// # Panics
/// If they differ in length.
pub fn add(a: &[f32], b: &[f32], isa: Isa) -> Vec<f32> {
    map2(isa, a, b, add_on)
}

/// Returns `x / (1 + exp(-x))`.
pub fn silu(x: &[f32], isa: Isa) -> Vec<f32> {
    map(isa, x, silu_on)
}

/// Returns the gradient of [`silu`]: `g s (1 + x (1 - s))` with `s = 1 / (1 + exp(-x))`.
///
/// # Panics
/// If `x` and `g` differ in length.
pub fn silu_grad(x: &[f32], g: &[f32], isa: Isa) -> Vec<f32> {
    map2(isa, x, g, silu_grad_on)
}

/// Returns `x Phi(x)` with Phi of the normal distribution (Hendrycks and Gimpel, arXiv 1606.08415).
pub fn gelu(x: &[f32], isa: Isa) -> Vec<f32> {
    map(isa, x, gelu_on)
}

/// Returns the gradient of [`gelu`]: `g (Phi(x) + x Phi'(x))`.
///
/// # Panics
/// If `x` and `g` differ in length.
pub fn gelu_grad(x: &[f32], g: &[f32], isa: Isa) -> Vec<f32> {
    map2(isa, x, g, gelu_grad_on)
}

/// Returns the gradient of a leaky ReLU with a `slope` above 0. Its output `y` has the sign of its
/// input.
///
/// # Panics
/// If `y` and `g` differ in length.
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
    use crate::kernels::cpu::Cpu;

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

    /// The integral of the normal density from `-a` to `a`, by its series around 0 (converges
    /// everywhere, in f64 exact enough up to 6).
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
        for isa in Isa::all(&Cpu::detected()) {
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
        for isa in Isa::all(&Cpu::detected()) {
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
