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

/// Returns the gradients of [`reference`] without activation with respect to `x` and `weights`,
/// from `gy`, the gradient of the result.
pub fn reference_gradients(
    s: &ConvShape,
    x: &[f32],
    weights: &[f32],
    gy: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let (oh, ow) = s.output();
    let (mut gx, mut gw) = (vec![0.0; x.len()], vec![0.0; weights.len()]);
    for (i, gy) in gy.chunks_exact(s.co).enumerate() {
        let (n, oy, ox) = (i / (oh * ow), i / ow % oh, i % ow);
        for (ky, kx) in (0..s.kh).flat_map(|ky| (0..s.kw).map(move |kx| (ky, kx))) {
            let iy = (oy * s.stride + ky).wrapping_sub(s.pad);
            let ix = (ox * s.stride + kx).wrapping_sub(s.pad);
            if iy >= s.h || ix >= s.w {
                continue;
            }
            for c in 0..s.ci {
                let at = ((n * s.h + iy) * s.w + ix) * s.ci + c;
                for (o, &g) in gy.iter().enumerate() {
                    let weight = ((o * s.ci + c) * s.kh + ky) * s.kw + kx;
                    gx[at] += f64::from(g) * f64::from(weights[weight]);
                    gw[weight] += f64::from(g) * f64::from(x[at]);
                }
            }
        }
    }
    let round = |sums: Vec<f64>| sums.into_iter().map(|v| v as f32).collect();
    (round(gx), round(gw))
}
