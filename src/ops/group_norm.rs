//! Group normalisation with its affine map and activation.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{
    Activation, composed,
    conv2d::{slice, with_slice},
    cuda, has_kernel,
};
use crate::kernels::{
    norm::{self, Affine, Moments, NormShape},
    simd::Isa,
};

/// Normalises every group of `c / groups` channels of a sample of `x` `[n, h, w, c]` to mean 0 and
/// variance 1 (Wu and He, arXiv 1803.08494), multiplies by `weight`, adds `bias` and applies
/// `activation`. Differentiable in all three.
///
/// `weight` and `bias` are `[c]`, or `[n, c]` to modulate each sample.
///
/// # Errors
/// If `groups` does not divide the channels, a shape does not fit, or the activation is neither
/// [`Activation::None`] nor [`Activation::Silu`].
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    if !has_kernel(x) {
        return match cuda::group_norm(x, groups, weight, bias, eps, activation)? {
            Some(y) => Ok(y),
            None => composed::group_norm(x, groups, weight, bias, eps, activation),
        };
    }
    let silu = match activation {
        Activation::None => false,
        Activation::Silu => true,
        other => bail!("group_norm: activation {other:?} is not supported"),
    };
    let op = GroupNorm {
        groups,
        eps,
        silu,
        moments: OnceLock::new(),
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

struct GroupNorm {
    groups: usize,
    eps: f64,
    silu: bool,
    /// Values of the forward pass for the backward pass.
    moments: OnceLock<Moments>,
}

impl GroupNorm {
    fn shape(&self, x: &Shape, weight: &Shape, bias: &Shape) -> Result<NormShape> {
        let (n, h, w, c) = x.dims4()?;
        if self.groups == 0 || c == 0 || c % self.groups != 0 {
            bail!(
                "group_norm: {c} channels cannot be divided into {} groups",
                self.groups
            );
        }
        for (name, shape) in [("weight", weight), ("bias", bias)] {
            if shape.dims() != [c] && shape.dims() != [n, c] {
                bail!("group_norm: a {name} of {shape:?} for {n} samples of {c} channels");
            }
        }
        Ok(NormShape {
            n,
            pixels: h * w,
            channels: c,
            groups: self.groups,
        })
    }
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group-norm-nhwc"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let s = self.shape(x_layout.shape(), w_layout.shape(), b_layout.shape())?;
        let (x, isa) = (slice(x, x_layout)?, Isa::best());
        let affine = Affine {
            weight: slice(w, w_layout)?,
            bias: slice(b, b_layout)?,
        };
        let moments = norm::moments(&s, x, self.eps, isa);
        let y = norm::forward(&s, x, &moments, &affine, self.silu, isa);
        // A second run of the same operator gives the same values.
        let _ = self.moments.set(moments);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = self.shape(x.shape(), w.shape(), b.shape())?;
        let Some(moments) = self.moments.get() else {
            bail!("group_norm: backward without forward");
        };
        let grad = grad.contiguous()?;
        let run = |x: &[f32], weight: &[f32], bias: &[f32], gy: &[f32]| {
            let affine = Affine { weight, bias };
            norm::backward(&s, x, moments, &affine, self.silu, gy, Isa::best())
        };
        let grads = with_slice(x, |x| {
            with_slice(w, |w| {
                with_slice(b, |b| with_slice(&grad, |g| run(x, w, b, g)))
            })
        })????;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((
            Some(tensor(grads.x, x)?),
            Some(tensor(grads.weight, w)?),
            Some(tensor(grads.bias, b)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::variable;
    use candle_core::Var;

    /// Computes the definition by candle's operators.
    fn composite(x: &Tensor, groups: usize, w: &Tensor, b: &Tensor, silu: bool) -> Result<Tensor> {
        let (n, h, width, c) = x.dims4()?;
        let rows = x.reshape((n, h * width, groups, c / groups))?;
        let mean = rows.mean_keepdim(3)?.mean_keepdim(1)?;
        let centred = rows.broadcast_sub(&mean)?;
        let variance = centred.sqr()?.mean_keepdim(3)?.mean_keepdim(1)?;
        let normal = centred.broadcast_div(&(variance + 1e-5)?.sqrt()?)?;
        let affine = |t: &Tensor| t.reshape(((), 1, 1, c));
        let y = normal
            .reshape((n, h, width, c))?
            .broadcast_mul(&affine(w)?)?
            .broadcast_add(&affine(b)?)?;
        if silu { y.silu() } else { Ok(y) }
    }

    fn random(shape: impl Into<Shape>) -> Var {
        variable(0.3, 1.0, shape)
    }

    fn assert_close(a: &Tensor, b: &Tensor, what: &str) {
        let norm = |t: &Tensor| -> f32 {
            let sum = t.sqr().unwrap().sum_all().unwrap();
            sum.to_scalar::<f32>().unwrap().sqrt()
        };
        let off = norm(&(a - b).unwrap());
        assert!(off <= 1e-5 * norm(b), "{what}: {off} of {}", norm(b));
    }

    #[test]
    fn values_and_gradients_are_those_of_the_definition() {
        for (n, h, w, c, groups) in [
            (1, 5, 7, 6, 3),
            (3, 9, 4, 32, 8),
            (2, 33, 29, 48, 1),
            (1, 40, 50, 34, 17),
            (2, 1, 3, 5, 5),
        ] {
            let x = random((n, h, w, c));
            let weights = random((n, h, w, c));
            for (own, silu) in [(false, false), (false, true), (true, false), (true, true)] {
                let shape: Shape = if own { (n, c).into() } else { c.into() };
                let (weight, bias) = (random(shape.clone()), random(shape));
                let what = format!("{n} {h}x{w} {c} in {groups}, own {own}, silu {silu}");
                let activation = if silu {
                    Activation::Silu
                } else {
                    Activation::None
                };
                let ours = group_norm(&x, groups, &weight, &bias, 1e-5, activation).unwrap();
                let theirs = composite(&x, groups, &weight, &bias, silu).unwrap();
                assert_close(&ours, &theirs, &what);
                let [ours, theirs] = [ours, theirs].map(|y| {
                    let loss = (y * weights.as_tensor()).unwrap().sum_all().unwrap();
                    loss.backward().unwrap()
                });
                for (name, var) in [("x", &x), ("weight", &weight), ("bias", &bias)] {
                    let (a, b) = (ours.get(var).unwrap(), theirs.get(var).unwrap());
                    assert_close(a, b, &format!("{name} of {what}"));
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (x, c) = (random((2, 4, 4, 6)), random(6));
        let norm = |groups, w: &Tensor, b: &Tensor, a| group_norm(&x, groups, w, b, 1e-5, a);
        assert!(norm(3, &c, &random((2, 6)), Activation::None).is_ok());
        assert!(norm(0, &c, &c, Activation::None).is_err());
        assert!(norm(4, &c, &c, Activation::None).is_err());
        assert!(norm(3, &random(5), &c, Activation::None).is_err());
        assert!(norm(3, &c, &random((3, 6)), Activation::None).is_err());
        assert!(norm(3, &c, &c, Activation::LeakyRelu(0.1)).is_err());
    }
}
