//! The GELU with vector instructions. candle's operator uses a scalar error function.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{
    conv2d::{slice, with_slice},
    has_kernel,
};
use crate::kernels::{elementwise, simd::Isa};

/// Returns `x Phi(x)` with Phi the normal distribution, not its approximation by `tanh`. Any shape.
///
/// # Errors
/// If the tensor's type is not a float.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if !has_kernel(x) {
        return x.gelu_erf();
    }
    x.contiguous()?.apply_op1(Gelu)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = elementwise::gelu(slice(x, layout)?, Isa::best());
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let gx = with_slice(x, |x| {
            with_slice(&grad, |g| elementwise::gelu_grad(x, g, Isa::best()))
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
        let x = variable(0.0, 3.0, (3, 1000, 7));
        let weights = normal(0.0, 1.0, (3, 1000, 7));
        let both = [gelu(&x).unwrap(), x.gelu_erf().unwrap()].map(|y| {
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
        let x = Tensor::new(&[-1e30f32, -200.0, -15.0, 0.0, 15.0, 1e30], &Device::Cpu).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let y = gelu(&x).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        let y = y.to_vec1::<f32>().unwrap();
        assert!(y[..3].iter().all(|v| v.abs() < 1e-6), "{y:?}");
        assert_eq!(y[3..], [0.0, 15.0, 1e30]);
        let grad = grads.get(&x).unwrap().to_vec1::<f32>().unwrap();
        assert!(grad[..3].iter().all(|v| v.abs() < 1e-6), "{grad:?}");
        assert!((grad[3] - 0.5).abs() < 1e-6, "{grad:?}");
        assert_eq!(grad[4..], [1.0, 1.0]);
    }
}
