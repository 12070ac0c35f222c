//! Group normalisation for 16-bit maps, forward pass.

use candle_core::{DType, Result, Shape, Tensor};

use super::{
    aligned,
    kernel_op::{KernelOp, Launch},
    op::Op,
    params::{Norm, Params},
    suffix,
};
use crate::ops::Activation;

/// Threads of a block (`kernels/layers.cu`): one for every 8 channels and one for every group.
const THREADS: usize = 256;

/// Computes [`crate::ops::group_norm`] without gradients. Returns `None` if there is no kernel.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activation: Activation,
) -> Result<Option<Tensor>> {
    let (n, h, w, c) = x.dims4()?;
    let tracked = [x, weight, bias].into_iter().any(Tensor::track_op);
    let affine = match (weight.dims(), bias.dims()) {
        (&[a], &[b]) if a == c && b == c => 0,
        (&[m, a], &[l, b]) if a == c && b == c && m == n && l == n => c,
        _ => return Ok(None),
    };
    let silu = matches!(activation, Activation::None | Activation::Silu);
    let fits = super::reaches(x) && silu && groups > 0 && c % groups == 0;
    if !fits || tracked || c > 8 * THREADS || groups > THREADS {
        return Ok(None);
    }
    let op = GroupNorm {
        shape: x.shape().clone(),
        dtype: x.dtype(),
        norm: Norm {
            n: n as u32,
            pixels: (h * w) as u32,
            c: c as u32,
            groups: groups as u32,
            chunks: (h * w).div_ceil(64).min(64) as u32,
            affine: affine as u32,
            activation: super::activation(activation).0,
            eps: eps as f32,
            ..Norm::default()
        },
    };
    let [weight, bias] = [weight, bias].map(|t| t.to_dtype(DType::F32)?.contiguous());
    let y = aligned(x)?.apply_op3_no_bwd(&weight?, &bias?, &Op(op))?;
    Ok(Some(y))
}

/// Inputs: the map, weight, bias.
struct GroupNorm {
    shape: Shape,
    dtype: DType,
    norm: Norm,
}

impl KernelOp for GroupNorm {
    const NAME: &'static str = "group-norm-nhwc-cuda";

    fn output(&self) -> (Shape, DType) {
        (self.shape.clone(), self.dtype)
    }

    fn scratch(&self) -> usize {
        let Norm {
            n, chunks, groups, ..
        } = self.norm;
        (2 * n * chunks * groups) as usize
    }

    fn launches(&self, inputs: &[u64], output: u64, scratch: u64) -> Vec<Launch> {
        let params = Norm {
            x: inputs[0],
            weight: inputs[1],
            bias: inputs[2],
            partials: scratch,
            y: output,
            ..self.norm
        };
        let vectors = (params.pixels * params.c / 8) as usize;
        let launch = |name: &str, blocks: u32| Launch {
            kernel: format!("tadsr_{name}_{}", suffix(self.dtype)),
            grid: [blocks, params.n, 1],
            threads: THREADS as u32,
            params: params.words(),
        };
        // A thread of the second kernel computes four vectors.
        let blocks = vectors.div_ceil(4 * THREADS) as u32;
        vec![launch("moments", params.chunks), launch("norm", blocks)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        composed,
        cuda::{assert_close, device, emulated},
    };
    use crate::testing::normal;

    #[test]
    fn it_is_that_of_f32() {
        let drawn = |mean: f32, std: f32, shape: &[usize]| {
            normal(mean, std, shape).to_device(&device()).unwrap()
        };
        let random = |shape: &[usize]| drawn(0.5, 1.0, shape);
        let cases = [
            ([2, 5, 4, 32], 32, false, Activation::Silu),
            ([2, 9, 13, 40], 8, true, Activation::None),
            ([1, 3, 2, 2048], 32, false, Activation::Silu),
            ([1, 70, 65, 8], 2, false, Activation::None),
        ];
        for (shape, groups, modulated, activation) in cases {
            let [n, .., c] = shape;
            let silu = activation == Activation::Silu;
            let affine: &[usize] = if modulated { &[n, c] } else { &[c] };
            // A mean far above the deviation, where a sum of squares would lose precision.
            let x = if silu {
                random(&shape)
            } else {
                drawn(64.0, 0.5, &shape)
            };
            let (w, b) = (random(affine), random(affine));
            for (dtype, limit) in [(DType::F16, 2e-3), (DType::BF16, 1.5e-2)] {
                let x = x.to_dtype(dtype).unwrap();
                let got = emulated(|| group_norm(&x, groups, &w, &b, 1e-5, activation)).unwrap();
                let got = got.expect("a kernel");
                let x = x.to_dtype(DType::F32).unwrap();
                let want = composed::group_norm(&x, groups, &w, &b, 1e-5, activation).unwrap();
                assert_close(&got, &want, limit, &format!("{shape:?} {dtype:?}"));
            }
        }
    }

    #[test]
    fn what_wants_gradients_is_left_to_others() {
        let x = Tensor::zeros((1, 2, 2, 16), DType::F16, &device()).unwrap();
        let one = Tensor::ones(16, DType::F32, &device()).unwrap();
        let norm = |weight: &Tensor, groups| {
            emulated(|| group_norm(&x, groups, weight, &one, 1e-5, Activation::None)).unwrap()
        };
        assert!(norm(&one, 2).is_some());
        assert!(norm(&one, 3).is_none());
        let learnt = candle_core::Var::from_tensor(&one).unwrap();
        assert!(norm(&learnt, 2).is_none());
    }
}
