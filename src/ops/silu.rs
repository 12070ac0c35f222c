//! The SiLU. The gradient of candle's operator takes six passes over memory.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    conv2d::{slice, with_slice},
    has_kernel,
};
use crate::kernels::{elementwise, simd::Isa};

/// Returns `x / (1 + exp(-x))`. Any shape.
///
/// # Errors
/// If the tensor's type is not a float.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if !has_kernel(x) {
        return x.silu();
    }
    x.contiguous()?.apply_op1(Silu)
}

struct Silu;

impl CustomOp1 for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = elementwise::silu(slice(x, layout)?, Isa::best());
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let gx = with_slice(x, |x| {
            with_slice(&grad, |g| elementwise::silu_grad(x, g, Isa::best()))
        })??;
        Ok(Some(Tensor::from_vec(gx, x.shape(), x.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{normal, variable};
    use candle_core::{Device, Var};

    #[test]
    fn values_and_gradients_are_candles() {
        let x = variable(0.0, 4.0, (3, 1000, 7));
        let weights = normal(0.0, 1.0, (3, 1000, 7));
        let both = [silu(&x).unwrap(), x.silu().unwrap()].map(|y| {
            let loss = (&y * &weights).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (values(&y), values(grads.get(&x).unwrap()))
        });
        let [(ours, our_grad), (theirs, their_grad)] = both;
        for (a, b) in ours
            .iter()
            .zip(&theirs)
            .chain(our_grad.iter().zip(&their_grad))
        {
            assert!((a - b).abs() <= 2e-6 * (1.0 + b.abs()), "{a}, not {b}");
        }
    }

    #[test]
    fn extremes_stay_finite() {
        let x = Tensor::new(
            &[-1e30f32, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30],
            &Device::Cpu,
        )
        .unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = silu(&x).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap()[3..], [0.0, 88.0, 200.0, 1e30]);
        let grad = grads.get(&x).unwrap().to_vec1::<f32>().unwrap();
        assert!(grad.iter().all(|g| g.is_finite()), "{grad:?}");
        assert_eq!((grad[3], grad[6]), (0.5, 1.0));
    }
}
