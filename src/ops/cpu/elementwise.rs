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
fn exp(x: f32) -> f32 {
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

#[inline(always)]
fn silu_body(x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x / (1.0 + exp(-x));
    }
}

#[inline(always)]
fn silu_grad_body(x: &[f32], g: &[f32], gx: &mut [f32]) {
    for ((gx, &x), &g) in gx.iter_mut().zip(x).zip(g) {
        let s = 1.0 / (1.0 + exp(-x));
        // Beyond 126 ln 2 the product x (1 - s) is 0 or x e^x, both nothing: keep x from overflowing it.
        *gx = g * s * (1.0 + x.max(-126.0) * (1.0 - s));
    }
}

/// Compiles a body for each instruction set and picks at run time.
macro_rules! dispatch {
    ($name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        fn $name(isa: Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,fma")]
                fn avx512($($arg: $type),*) {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) {
                    $body($($arg),*)
                }
                match isa {
                    // SAFETY: the CPU has what `Isa::best` and `Isa::available` say.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}

dispatch!(silu_on, silu_body, (x: &[f32], y: &mut [f32]));
dispatch!(silu_grad_on, silu_grad_body, (x: &[f32], g: &[f32], gx: &mut [f32]));

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

#[cfg(test)]
mod tests {
    use super::*;

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
