//! Attention within windows for 16-bit maps, forward pass.

use candle_core::{DType, Result, Shape, Tensor};

use super::{
    aligned,
    kernel_op::{KernelOp, Launch},
    op::Op,
    params::{self, Params},
    suffix,
};

/// Threads of a block, and pixels of a window (`kernels/layers.cu`).
const THREADS: u32 = 128;
const PIXELS: usize = 64;

/// Computes [`crate::ops::attention`] for arguments that fit, without gradients. Returns `None` if
/// there is no kernel: windows must have 64 pixels, as in ResShift models, and heads 16 or 32
/// channels.
pub fn attention(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    window: [usize; 2],
    shift: usize,
) -> Result<Option<Tensor>> {
    let (n, h, w, c3) = qkv.dims4()?;
    let d = c3 / 3 / heads;
    let fits = super::reaches(qkv) && window[0] * window[1] == PIXELS && matches!(d, 16 | 32);
    if !fits || qkv.track_op() || bias.is_some_and(Tensor::track_op) {
        return Ok(None);
    }
    let op = Attention {
        d,
        dtype: qkv.dtype(),
        params: params::Attention {
            n: n as u32,
            h: h as u32,
            w: w as u32,
            heads: heads as u32,
            window_h: window[0] as u32,
            window_w: window[1] as u32,
            shift: shift as u32,
            scale: (d as f32).powf(-0.5),
            ..params::Attention::default()
        },
    };
    let qkv = aligned(qkv)?;
    let y = match bias {
        Some(bias) => {
            let bias = bias.to_dtype(DType::F32)?.contiguous()?;
            qkv.apply_op2_no_bwd(&bias, &Op(op))?
        }
        None => qkv.apply_op1_no_bwd(&Op(op))?,
    };
    Ok(Some(y))
}

/// Inputs: queries, keys and values; optionally a bias.
struct Attention {
    d: usize,
    dtype: DType,
    params: params::Attention,
}

impl KernelOp for Attention {
    const NAME: &'static str = "attention-nhwc-cuda";

    fn output(&self) -> (Shape, DType) {
        let p = &self.params;
        let [n, h, w, heads] = [p.n, p.h, p.w, p.heads].map(|v| v as usize);
        ((n, h, w, heads * self.d).into(), self.dtype)
    }

    fn launches(&self, inputs: &[u64], output: u64, _: u64) -> Vec<Launch> {
        let params = params::Attention {
            qkv: inputs[0],
            bias: inputs.get(1).copied().unwrap_or(0),
            y: output,
            ..self.params
        };
        let windows = params.n * (params.h / params.window_h) * (params.w / params.window_w);
        vec![Launch {
            kernel: format!("tadsr_attention{}_{}", self.d, suffix(self.dtype)),
            grid: [windows, params.heads, 1],
            threads: THREADS,
            params: params.words(),
        }]
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
        let random = |shape: &[usize]| normal(0.0, 1.0, shape).to_device(&device()).unwrap();
        for (size, window, heads, d, shift) in [
            ([2, 16, 24], [8, 8], 2, 32, 0),
            ([1, 16, 16], [8, 8], 3, 32, 4),
            ([1, 8, 32], [4, 16], 1, 16, 2),
            ([1, 8, 8], [8, 8], 2, 16, 0),
        ] {
            let [n, h, w] = size;
            let qkv = random(&[n, h, w, 3 * heads * d]);
            let bias = (shift > 0 || d == 32).then(|| random(&[heads, 64, 64]));
            for (dtype, limit) in [(DType::F16, 2e-3), (DType::BF16, 1.5e-2)] {
                let qkv = qkv.to_dtype(dtype).unwrap();
                let got = emulated(|| attention(&qkv, bias.as_ref(), heads, window, shift));
                let got = got.unwrap().expect("a kernel");
                let qkv = qkv.to_dtype(DType::F32).unwrap();
                let want = composed::attention(&qkv, bias.as_ref(), heads, window, shift).unwrap();
                assert_close(&got, &want, limit, &format!("{size:?} {dtype:?}"));
            }
        }
    }
}
