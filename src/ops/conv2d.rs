//! 2-d convolution as a candle operator.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::{composed, cuda, has_kernel};
use crate::kernels::{
    conv::{self, Activation, ConvShape, PackedConv},
    elementwise::leaky_relu_grad,
    simd::Isa,
    winograd::images,
    zeros,
};

/// Convolves `x` `[n, h, w, ci]` with `weight` `[co, ci, kh, kw]`, adds `bias` `[co]` and applies
/// `activation`. Returns `[n, oh, ow, co]` with `oh = (h + 2 pad - kh) / stride + 1`.
///
/// On the CPU, 3x3 convolutions of 16 channels or more with stride and padding 1 and their
/// gradients use [Winograd's minimal filtering](images) where it is [faster](images::pays). Its
/// difference to the direct result is about 1e-5 of the largest value.
///
/// Differentiable in all three for [`Activation::None`] and for [`Activation::LeakyRelu`] with a
/// slope above 0 up to 1, whose output has the sign of its input. The backward pass of other
/// activations is an error.
///
/// # Errors
/// If shapes do not fit, the kernel is larger than the padded input, or the padding is as large as
/// the kernel.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stride: usize,
    pad: usize,
    activation: Activation,
) -> Result<Tensor> {
    if !has_kernel(x) {
        return match cuda::conv2d(x, weight, bias, stride, pad, 0, activation)? {
            Some(y) => Ok(y),
            None => composed::conv2d(x, weight, bias, stride, pad, activation),
        };
    }
    let op = Conv2d {
        stride,
        pad,
        activation,
    };
    x.contiguous()?
        .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

#[derive(Clone, Copy)]
struct Conv2d {
    stride: usize,
    pad: usize,
    activation: Activation,
}

impl Conv2d {
    fn shape(&self, x: &Shape, weight: &Shape, bias: &Shape) -> Result<ConvShape> {
        let (n, h, w, channels) = x.dims4()?;
        let (co, ci, kh, kw) = weight.dims4()?;
        if ci != channels || bias.dims1()? != co {
            bail!("conv2d: input {x:?}, weight {weight:?} and bias {bias:?} do not fit");
        }
        let shape = ConvShape {
            n,
            h,
            w,
            ci,
            co,
            kh,
            kw,
            stride: self.stride,
            pad: self.pad,
        };
        if self.stride == 0 || kh == 0 || kw == 0 || self.pad >= kh.min(kw) {
            bail!("conv2d: stride 0 or padding as large as the kernel: {shape:?}");
        }
        if shape.output().0 == 0 || shape.output().1 == 0 {
            bail!("conv2d: the kernel is larger than the padded input: {shape:?}");
        }
        Ok(shape)
    }

    /// Returns the gradient before the activation, or `None` if it is the same.
    fn before_activation(&self, res: &Tensor, grad: &Tensor) -> Result<Option<Vec<f32>>> {
        match self.activation {
            Activation::None => Ok(None),
            Activation::LeakyRelu(slope) if slope > 0.0 && slope <= 1.0 => {
                let changed =
                    with_slice(res, |y| with_slice(grad, |g| leaky_relu_grad(y, g, slope)))?;
                changed.map(Some)
            }
            other => bail!("conv2d: no gradient through the fused activation {other:?}"),
        }
    }

    /// Returns the required gradients with respect to `x`, `w` and `b`, for the gradient `gy`
    /// before the activation.
    fn gradients(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        gy: &[f32],
    ) -> Result<[Option<Tensor>; 3]> {
        let shape = self.shape(x.shape(), w.shape(), b.shape())?;
        let (device, isa) = (x.device(), Isa::best());
        let gx = if x.track_op() {
            let mut gx = zeros(x.elem_count());
            with_slice(w, |w| {
                if images::pays(&shape) {
                    images::grad_input(&shape, gy, w, isa, &mut gx)
                } else {
                    conv::grad_input(&shape, gy, w, isa, &mut gx)
                }
            })?;
            Some(Tensor::from_vec(gx, x.shape(), device)?)
        } else {
            None
        };
        let gw = if w.track_op() {
            let mut gw = vec![0.0f32; w.elem_count()];
            with_slice(x, |x| {
                if images::pays_for_weights(&shape) {
                    images::grad_weight(&shape, x, gy, isa, &mut gw)
                } else {
                    conv::grad_weight(&shape, x, gy, isa, &mut gw)
                }
            })?;
            Some(Tensor::from_vec(gw, w.shape(), device)?)
        } else {
            None
        };
        let gb = if b.track_op() {
            let gb = conv::grad_bias(shape.co, gy);
            Some(Tensor::from_vec(gb, b.shape(), device)?)
        } else {
            None
        };
        Ok([gx, gw, gb])
    }
}

impl CustomOp3 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d-nhwc"
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
        let shape = self.shape(x_layout.shape(), w_layout.shape(), b_layout.shape())?;
        let (oh, ow) = shape.output();
        let (x, w, b) = (
            slice(x, x_layout)?,
            slice(w, w_layout)?,
            slice(b, b_layout)?,
        );
        let mut y = zeros(shape.n * oh * ow * shape.co);
        match self.activation.slope() {
            Some(slope) if images::pays(&shape) => {
                images::forward(&shape, x, w, b, slope, Isa::best(), &mut y);
            }
            _ => PackedConv::new(&shape, w, Some(b), Isa::best()).forward(
                &shape,
                x,
                self.activation,
                &mut y,
            ),
        }
        Ok((CpuStorage::F32(y), (shape.n, oh, ow, shape.co).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let [gx, gw, gb] = match self.before_activation(res, &grad)? {
            Some(gy) => self.gradients(x, w, b, &gy)?,
            None => with_slice(&grad, |gy| self.gradients(x, w, b, gy))??,
        };
        Ok((gx, gw, gb))
    }
}

/// Returns the values of a contiguous f32 tensor in its storage.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let values: &[f32] = storage.as_slice()?;
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&values[from..to]),
        None => bail!("a contiguous tensor is required, not {layout:?}"),
    }
}

/// Runs `f` on the values of a contiguous f32 tensor in CPU memory.
pub(super) fn with_slice<T>(t: &Tensor, f: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(cpu) => Ok(f(slice(cpu, layout)?)),
        _ => bail!("this operator has no kernel for {:?}", t.device()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::variable;
    use candle_core::{Device, Var};

    fn random(shape: impl Into<Shape>) -> Var {
        variable(0.0, 1.0, shape)
    }

    /// Computes candle's convolution on the same layout.
    fn candle(x: &Tensor, w: &Tensor, b: &Tensor, stride: usize, pad: usize) -> Tensor {
        let y = x
            .permute((0, 3, 1, 2))
            .unwrap()
            .conv2d(w, pad, stride, 1, 1)
            .unwrap();
        y.permute((0, 2, 3, 1)).unwrap().broadcast_add(b).unwrap()
    }

    fn assert_close(a: &Tensor, b: &Tensor, what: &str) {
        let (a, b) = (
            a.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            b.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        );
        assert_eq!(a.len(), b.len(), "{what}");
        for (a, b) in a.iter().zip(&b) {
            assert!(
                (a - b).abs() <= 2e-4 * (1.0 + b.abs()),
                "{what}: {a}, not {b}"
            );
        }
    }

    #[test]
    fn values_and_gradients_are_candles() {
        for (stride, pad, k) in [(1, 1, 3), (2, 1, 3), (1, 0, 1), (1, 2, 5)] {
            // candle's gradient fails for stride 2 if height and width differ in parity.
            let (x, w, b) = (random((2, 9, 9, 5)), random((7, 5, k, k)), random(7));
            let got = conv2d(&x, &w, &b, stride, pad, Activation::None).unwrap();
            let want = candle(&x, &w, &b, stride, pad);
            assert_close(&got, &want, "values");
            let got = got.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let want = want.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            for (name, var) in [("x", &x), ("weight", &w), ("bias", &b)] {
                let (a, b) = (got.get(var).unwrap(), want.get(var).unwrap());
                assert_close(
                    a,
                    b,
                    &format!("gradient of {name}, stride {stride}, pad {pad}"),
                );
            }
        }
    }

    #[test]
    fn gradients_through_leaky_relu_are_finite_differences() {
        // The values are fixed: a kink of the activation within a step would distort the
        // difference.
        let fixed = |shape: &[usize], step: f32| {
            let len: usize = shape.iter().product();
            let values: Vec<f32> = (1..=len).map(|i| (i as f32 * step).sin()).collect();
            Var::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (x, w, b) = (
            fixed(&[1, 5, 6, 3], 1.7),
            fixed(&[4, 3, 3, 3], 2.3),
            fixed(&[4], 0.9),
        );
        let target = fixed(&[1, 5, 6, 4], 3.1);
        let loss = |x: &Tensor, w: &Tensor, b: &Tensor| {
            let y = conv2d(x, w, b, 1, 1, Activation::LeakyRelu(0.2)).unwrap();
            (y * target.as_tensor()).unwrap().sum_all().unwrap()
        };
        let grads = loss(&x, &w, &b).backward().unwrap();
        for var in [&x, &w, &b] {
            let grad = grads.get(var).unwrap();
            let direction = fixed(var.dims(), 5.3);
            let step = 1e-3;
            let moved = |sign: f64| {
                let to =
                    (var.as_tensor() + (direction.as_tensor() * (sign * step)).unwrap()).unwrap();
                let pick = |v: &Var| {
                    if v.id() == var.id() {
                        to.clone()
                    } else {
                        v.as_tensor().clone()
                    }
                };
                f64::from(
                    loss(&pick(&x), &pick(&w), &pick(&b))
                        .to_scalar::<f32>()
                        .unwrap(),
                )
            };
            let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            let predicted = (grad * direction.as_tensor()).unwrap().sum_all().unwrap();
            let predicted = f64::from(predicted.to_scalar::<f32>().unwrap());
            assert!(
                (slope - predicted).abs() < 0.03 * (10.0 + predicted.abs()),
                "{slope} {predicted}"
            );
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (x, b) = (random((1, 4, 4, 3)), random(2));
        for w in [
            random((2, 4, 3, 3)),
            random((3, 3, 3, 3)),
            random((2, 3, 7, 7)),
        ] {
            assert!(conv2d(&x, &w, &b, 1, 1, Activation::None).is_err());
        }
        let silu = conv2d(&x, &random((2, 3, 3, 3)), &b, 1, 1, Activation::Silu).unwrap();
        assert!(silu.sum_all().unwrap().backward().is_err());
    }
}
