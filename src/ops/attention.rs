//! Multi-head attention within windows of a feature map.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{
    composed,
    conv2d::{slice, with_slice},
    cuda, has_kernel,
};
use crate::kernels::{
    attention::{self, AttentionShape},
    simd::Isa,
    zeros,
};

/// Computes attention of `heads` heads within windows of a feature map, differentiable in `qkv` and
/// `bias`. Returns `[n, h, w, c]`.
///
/// `qkv` `[n, h, w, 3c]` holds queries, keys and values, each with `c = heads x d` channels, head
/// by head. The map is divided into windows of `window` `[height, width]` pixels. With a `shift` it
/// is rolled up and left by `shift` pixels before, and back afterwards, as in Liu et al., "Swin
/// Transformer", arXiv 2103.14030. `bias` `[heads, l, l]`, with `l` the pixels of a window in row
/// order, is added to `q . k / sqrt(d)` before the softmax over the keys.
///
/// The mask is that of the published ResShift code, with which all checkpoints were trained. It
/// differs from the paper: only in the lowest row of windows, the left `width - shift` columns and
/// the right `shift` columns of a window are masked from each other.
///
/// Memory besides the result does not grow with `l`^2, so a window may be the whole map.
///
/// # Errors
/// If a shape does not fit, the windows do not divide the map, or `shift` is not smaller than the
/// window.
pub fn attention(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    window: [usize; 2],
    shift: usize,
) -> Result<Tensor> {
    let op = Attention {
        heads,
        window,
        shift,
        lse: OnceLock::new(),
    };
    if !has_kernel(qkv) {
        op.shape(qkv.shape(), bias.map(Tensor::shape))?;
        return match cuda::attention(qkv, bias, heads, window, shift)? {
            Some(y) => Ok(y),
            None => composed::attention(qkv, bias, heads, window, shift),
        };
    }
    let qkv = qkv.contiguous()?;
    match bias {
        Some(bias) => qkv.apply_op2(&bias.contiguous()?, op),
        None => qkv.apply_op1(op),
    }
}

struct Attention {
    heads: usize,
    window: [usize; 2],
    shift: usize,
    /// Values of the forward pass for the backward pass.
    lse: OnceLock<Vec<f32>>,
}

impl Attention {
    fn shape(&self, qkv: &Shape, bias: Option<&Shape>) -> Result<AttentionShape> {
        let (n, h, w, c3) = qkv.dims4()?;
        let (heads, [wh, ww], shift) = (self.heads, self.window, self.shift);
        if heads == 0 || c3 == 0 || c3 % (3 * heads) != 0 {
            bail!("attention: {c3} channels for queries, keys and values of {heads} heads");
        }
        let shape = AttentionShape {
            n,
            h,
            w,
            heads,
            d: c3 / 3 / heads,
            wh,
            ww,
            shift,
        };
        if !shape.is_valid() {
            bail!(
                "attention: windows of {:?} shifted by {shift} do not divide a map of {h}x{w}",
                self.window
            );
        }
        let l = wh * ww;
        if let Some(bias) = bias.filter(|b| b.dims() != [heads, l, l]) {
            bail!("attention: a bias of {bias:?} instead of [{heads}, {l}, {l}]");
        }
        Ok(shape)
    }

    fn forward(
        &self,
        (qkv, layout): (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let s = self.shape(layout.shape(), bias.map(|b| b.1.shape()))?;
        let bias = bias.map(|(b, layout)| slice(b, layout)).transpose()?;
        let mut y = zeros(s.n * s.h * s.w * s.heads * s.d);
        let lse = attention::forward(&s, slice(qkv, layout)?, bias, Isa::best(), &mut y);
        // A second run of the same operator gives the same values.
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(y), (s.n, s.h, s.w, s.heads * s.d).into()))
    }

    fn backward(
        &self,
        qkv: &Tensor,
        bias: Option<&Tensor>,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let s = self.shape(qkv.shape(), bias.map(Tensor::shape))?;
        let Some(lse) = self.lse.get() else {
            bail!("attention: backward without forward");
        };
        let grad = grad.contiguous()?;
        let run = |bias: Option<&[f32]>| {
            with_slice(qkv, |qkv| {
                with_slice(res, |y| {
                    with_slice(&grad, |gy| {
                        attention::backward(&s, qkv, bias, y, lse, gy, Isa::best())
                    })
                })
            })
        };
        let (gx, gb) = match bias {
            Some(bias) => with_slice(bias, |b| run(Some(b)))?,
            None => run(None),
        }???;
        let gx = Tensor::from_vec(gx, qkv.shape(), qkv.device())?;
        let gb = match (bias, gb) {
            (Some(bias), Some(gb)) => Some(Tensor::from_vec(gb, bias.shape(), bias.device())?),
            _ => None,
        };
        Ok((Some(gx), gb))
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "window-attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((qkv, layout), None)
    }

    fn bwd(&self, qkv: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.backward(qkv, None, res, grad)?.0)
    }
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        "window-attention-with-bias"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward((qkv, layout), Some((bias, bias_layout)))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        bias: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(qkv, Some(bias), res, grad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::variable;
    use candle_core::Var;

    fn random(shape: impl Into<Shape>) -> Var {
        variable(0.0, 1.0, shape)
    }

    fn assert_close(a: &Tensor, b: &Tensor, what: &str) {
        let norm = |t: &Tensor| -> f32 {
            let sum = t.sqr().unwrap().sum_all().unwrap();
            sum.to_scalar::<f32>().unwrap().sqrt()
        };
        let off = norm(&(a - b).unwrap());
        assert!(off <= 5e-6 * norm(b), "{what}: {off} of {}", norm(b));
    }

    #[test]
    fn values_and_gradients_are_those_of_the_definition() {
        // Maps, heads, channels of a head, windows, shift. The windows of the last two have several
        // blocks of queries and several blocks of keys.
        for (n, h, w, heads, d, window, shift) in [
            (1, 8, 8, 2, 4, [4, 4], 0),
            (2, 12, 9, 3, 5, [4, 3], 2),
            (2, 4, 4, 1, 17, [4, 4], 3),
            (1, 6, 14, 2, 32, [3, 7], 1),
            (2, 10, 22, 2, 3, [10, 11], 4),
            (1, 25, 24, 1, 20, [25, 24], 2),
        ] {
            let l = window[0] * window[1];
            let (qkv, bias) = (random((n, h, w, 3 * heads * d)), random((heads, l, l)));
            let weights = random((n, h, w, heads * d));
            for bias in [None, Some(&bias)] {
                let what = format!(
                    "{n} {h}x{w} {heads} {d} {window:?} {shift} {}",
                    bias.is_some()
                );
                let table = bias.map(|b| b.as_tensor());
                let got = attention(&qkv, table, heads, window, shift).unwrap();
                let want = composed::attention(&qkv, table, heads, window, shift).unwrap();
                assert_close(&got, &want, &what);
                let [got, want] = [got, want].map(|y| {
                    let loss = (y * weights.as_tensor()).unwrap().sum_all().unwrap();
                    loss.backward().unwrap()
                });
                assert_close(got.get(&qkv).unwrap(), want.get(&qkv).unwrap(), &what);
                if let Some(bias) = bias {
                    assert_close(got.get(bias).unwrap(), want.get(bias).unwrap(), &what);
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let qkv = random((1, 8, 8, 24));
        let bias = random((2, 16, 16));
        assert!(attention(&qkv, Some(&bias), 2, [4, 4], 2).is_ok());
        assert!(attention(&qkv, Some(&bias), 1, [4, 4], 2).is_err());
        for (heads, window, shift) in [
            (0, [4, 4], 0),
            (5, [4, 4], 0),
            (2, [3, 4], 0),
            (2, [4, 4], 4),
            (2, [4, 0], 0),
        ] {
            assert!(attention(&qkv, None, heads, window, shift).is_err());
        }
    }
}
