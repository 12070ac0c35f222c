//! Nearest-neighbour upsampling.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    conv2d::{slice, with_slice},
    cpu::{upsample, zeros},
};

/// Every pixel of `x` `[n, h, w, c]` becomes a block of 2 x 2: `[n, 2h, 2w, c]`. Differentiable; f32.
///
/// # Errors
/// When `x` has not four dimensions.
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Upsample2x)
}

struct Upsample2x;

impl CustomOp1 for Upsample2x {
    fn name(&self) -> &'static str {
        "upsample-2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, h, w, c) = layout.shape().dims4()?;
        let mut y = zeros(4 * n * h * w * c);
        upsample::forward(w, c, slice(x, layout)?, &mut y);
        Ok((CpuStorage::F32(y), (n, 2 * h, 2 * w, c).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, w, c) = x.dims4()?;
        let mut gx = zeros(x.elem_count());
        let grad = grad.contiguous()?;
        with_slice(&grad, |g| upsample::backward(w, c, g, &mut gx))?;
        Ok(Some(Tensor::from_vec(gx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn values_and_gradients_are_those_of_the_definition() {
        for shape in [(1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 2, 64)] {
            let x = Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
            let (n, h, w, c) = shape;
            let weights = Tensor::randn(0f32, 1.0, (n, 2 * h, 2 * w, c), &Device::Cpu).unwrap();
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
    fn a_map_without_pixels_stays_one() {
        let x = Tensor::zeros((1, 0, 4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert_eq!(upsample2x(&x).unwrap().dims(), [1, 0, 8, 3]);
    }
}
