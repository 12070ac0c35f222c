//! The convolution by its formula, for tests.

use super::shape::{Activation, ConvShape};

/// Convolves `x` `[n, h, w, ci]` with `weights` `[co, ci, kh, kw]`, summed in f64.
pub fn reference(
    s: &ConvShape,
    x: &[f32],
    weights: &[f32],
    bias: Option<&[f32]>,
    activation: Activation,
) -> Vec<f32> {
    let (oh, ow) = s.output();
    let mut y = Vec::with_capacity(s.output_len());
    for i in 0..s.n * oh * ow {
        let (n, oy, ox) = (i / (oh * ow), i / ow % oh, i % ow);
        for o in 0..s.co {
            let mut sum = bias.map_or(0.0, |b| f64::from(b[o]));
            for (ky, kx) in (0..s.kh).flat_map(|ky| (0..s.kw).map(move |kx| (ky, kx))) {
                let iy = (oy * s.stride + ky).wrapping_sub(s.pad);
                let ix = (ox * s.stride + kx).wrapping_sub(s.pad);
                if iy >= s.h || ix >= s.w {
                    continue;
                }
                for c in 0..s.ci {
                    let value = x[((n * s.h + iy) * s.w + ix) * s.ci + c];
                    let weight = weights[((o * s.ci + c) * s.kh + ky) * s.kw + kx];
                    sum += f64::from(value) * f64::from(weight);
                }
            }
            y.push(activation.apply(sum as f32));
        }
    }
    y
}
