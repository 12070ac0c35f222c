//! The sum of two maps on all threads. candle's operator uses one.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{conv2d::slice, has_kernel};
use crate::kernels::{elementwise, simd::Isa};

/// Returns `a + b` of one shape and type. Differentiable.
///
/// # Errors
/// If the shapes or types differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !has_kernel(a) {
        return a + b;
    }
    a.contiguous()?.apply_op2(&b.contiguous()?, Add)
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if a_layout.shape() != b_layout.shape() {
            bail!(
                "add: {:?} and {:?} differ in shape",
                a_layout.shape(),
                b_layout.shape()
            );
        }
        let y = elementwise::add(slice(a, a_layout)?, slice(b, b_layout)?, Isa::best());
        Ok((CpuStorage::F32(y), a_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(grad.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::variable;

    #[test]
    fn values_and_gradients_are_candles() {
        let var = || variable(0.0, 1.0, (3, 1000, 7));
        let (a, b, weights) = (var(), var(), var());
        let [got, want] = [
            add(&a, &b).unwrap(),
            (a.as_tensor() + b.as_tensor()).unwrap(),
        ]
        .map(|y| {
            let loss = (&y * weights.as_tensor()).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            [&y, grads.get(&a).unwrap(), grads.get(&b).unwrap()].map(values)
        });
        assert!(got == want);
        assert!(add(&a, &a.narrow(0, 0, 2).unwrap()).is_err());
    }
}
