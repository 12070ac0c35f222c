//! Nearest-neighbour upsampling.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{
    Activation, composed,
    conv2d::{slice, with_slice},
    cuda, has_kernel,
};
use crate::kernels::{
    conv::{self, ConvShape, PackedUpConv},
    simd::Isa,
    upsample, zeros,
};

/// Repeats every pixel of `x` `[n, h, w, c]` in a block of 2x2: `[n, 2h, 2w, c]`. Differentiable.
///
/// # Errors
/// If `x` does not have four dimensions.
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    if !has_kernel(x) {
        return composed::upsample2x(x);
    }
    x.contiguous()?.apply_op1(Upsample2x)
}

/// Computes the [`conv2d`](super::conv2d) of [`upsample2x`] of `x` `[n, h, w, ci]` with `weight`
/// `[co, ci, 3, 3]`, `bias` `[co]` and padding 1. The forward pass takes four ninths of the
/// multiplications of both. Returns `[n, 2h, 2w, co]`. Differentiable in all three.
///
/// # Errors
/// If shapes do not fit.
pub fn upsample2x_conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if !has_kernel(x) {
        if let Some(y) = cuda::conv2d(x, weight, bias, 1, 1, 1, Activation::None)? {
            return Ok(y);
        }
        let x = composed::upsample2x(x)?;
        return composed::conv2d(&x, weight, bias, 1, 1, Activation::None);
    }
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, UpsampleConv)
}

struct UpsampleConv;

/// Returns the shape of the convolution of the upsampled map.
fn conv_shape(x: &Shape, weight: &Shape, bias: &Shape) -> Result<ConvShape> {
    let (n, h, w, channels) = x.dims4()?;
    let (co, ci, kh, kw) = weight.dims4()?;
    if ci != channels || bias.dims1()? != co || (kh, kw) != (3, 3) {
        bail!("upsample2x_conv2d: input {x:?}, weight {weight:?} and bias {bias:?} do not fit");
    }
    Ok(ConvShape {
        n,
        h: 2 * h,
        w: 2 * w,
        ci,
        co,
        kh,
        kw,
        stride: 1,
        pad: 1,
    })
}

impl CustomOp3 for UpsampleConv {
    fn name(&self) -> &'static str {
        "upsample-2x-conv2d"
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
        let s = conv_shape(x_layout.shape(), w_layout.shape(), b_layout.shape())?;
        let (w, b) = (slice(w, w_layout)?, slice(b, b_layout)?);
        let packed = PackedUpConv::new(s.ci, s.co, w, b, Isa::best());
        let mut y = zeros(s.n * s.h * s.w * s.co);
        let map = [s.n, s.h / 2, s.w / 2];
        packed.forward(map, slice(x, x_layout)?, None, Activation::None, &mut y);
        Ok((CpuStorage::F32(y), (s.n, s.h, s.w, s.co).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = conv_shape(x.shape(), w.shape(), b.shape())?;
        let (device, isa, grad) = (x.device(), Isa::best(), grad.contiguous()?);
        let gx = if x.track_op() {
            let mut large = zeros(s.n * s.h * s.w * s.ci);
            with_slice(&grad, |gy| {
                with_slice(w, |w| conv::grad_input(&s, gy, w, isa, &mut large))
            })??;
            let gx = upsample::backward(s.w / 2, s.ci, &large);
            Some(Tensor::from_vec(gx, x.shape(), device)?)
        } else {
            None
        };
        let gw = if w.track_op() {
            let large = with_slice(x, |x| upsample::forward(s.w / 2, s.ci, x))?;
            let mut gw = zeros(w.elem_count());
            with_slice(&grad, |gy| conv::grad_weight(&s, &large, gy, isa, &mut gw))?;
            Some(Tensor::from_vec(gw, w.shape(), device)?)
        } else {
            None
        };
        let gb = with_slice(&grad, |gy| conv::grad_bias(s.co, gy))?;
        Ok((gx, gw, Some(Tensor::from_vec(gb, b.shape(), device)?)))
    }
}

struct Upsample2x;

impl CustomOp1 for Upsample2x {
    fn name(&self) -> &'static str {
        "upsample-2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, h, w, c) = layout.shape().dims4()?;
        let y = upsample::forward(w, c, slice(x, layout)?);
        Ok((CpuStorage::F32(y), (n, 2 * h, 2 * w, c).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, w, c) = x.dims4()?;
        let grad = grad.contiguous()?;
        let gx = with_slice(&grad, |g| upsample::backward(w, c, g))?;
        Ok(Some(Tensor::from_vec(gx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, variable};
    use candle_core::{Device, Var};

    #[test]
    fn values_and_gradients_are_those_of_the_definition() {
        for shape in [(1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 2, 64)] {
            let x = variable(0.0, 1.0, shape);
            let (n, h, w, c) = shape;
            let weights = normal(0.0, 1.0, (n, 2 * h, 2 * w, c));
            let composite = x
                .reshape((n, h, 1, w, 1, c))
                .and_then(|x| x.broadcast_as((n, h, 2, w, 2, c)))
                .and_then(|x| x.reshape((n, 2 * h, 2 * w, c)))
                .unwrap();
            let [ours, theirs] = [upsample2x(&x).unwrap(), composite].map(|y| {
                let loss = (&y * &weights).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (values(&y), values(grads.get(&x).unwrap()))
            });
            assert!(ours.0 == theirs.0);
            for (a, b) in ours.1.iter().zip(&theirs.1) {
                assert!((a - b).abs() < 1e-5, "{a}, not {b}");
            }
        }
    }

    #[test]
    fn the_convolution_of_it_is_that_of_the_two() {
        for (n, h, w, ci, co) in [(1, 1, 1, 1, 1), (2, 5, 3, 7, 20), (1, 4, 9, 33, 5)] {
            let var = |s: &[usize]| variable(0.0, 1.0, s);
            let (x, weight, bias) = (var(&[n, h, w, ci]), var(&[co, ci, 3, 3]), var(&[co]));
            let weights = var(&[n, 2 * h, 2 * w, co]);
            let one = upsample2x_conv2d(&x, &weight, &bias).unwrap();
            let large = upsample2x(&x).unwrap();
            let two = crate::ops::conv2d(&large, &weight, &bias, 1, 1, Activation::None).unwrap();
            let [ours, theirs] = [one, two].map(|y| {
                let loss = (&y * weights.as_tensor()).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let grad = |v: &Var| values(grads.get(v).unwrap());
                [values(&y), grad(&x), grad(&weight), grad(&bias)]
            });
            for (a, b) in ours.iter().flatten().zip(theirs.iter().flatten()) {
                assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a}, not {b}");
            }
        }
        let x = Tensor::zeros((1, 4, 4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let weight = Tensor::zeros((2, 3, 1, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
        let bias = Tensor::zeros(2, candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(upsample2x_conv2d(&x, &weight, &bias).is_err());
    }

    #[test]
    fn a_map_without_pixels_stays_one() {
        let x = Tensor::zeros((1, 0, 4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(upsample2x(&x).unwrap().dims(), [1, 0, 8, 3]);
    }
}
