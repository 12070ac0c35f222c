//! The operators of training made of candle's own, for devices that our kernels are not for: convolution is one matrix
//! product, which on CUDA is cuBLAS's, forward and backward. (candle's own convolution has no backward that is fit for
//! training: on CUDA a naive kernel.)

use candle_core::{D, Result, Tensor, bail};

use super::Activation;

/// As [`super::conv2d`].
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stride: usize,
    pad: usize,
    activation: Activation,
) -> Result<Tensor> {
    let (n, h, w, ci) = x.dims4()?;
    let (co, _, kh, kw) = weight.dims4()?;
    let (height, width) = (h + 2 * pad, w + 2 * pad);
    if stride == 0 || kh == 0 || kw == 0 || kh > height || kw > width {
        bail!("conv2d: no convolution of {x:?} with {weight:?}, stride {stride} and padding {pad}");
    }
    let (oh, ow) = ((height - kh) / stride + 1, (width - kw) / stride + 1);
    let x = match pad {
        0 => x.clone(),
        _ => x.pad_with_zeros(1, pad, pad)?.pad_with_zeros(2, pad, pad)?,
    };
    // Every `stride`th of the positions along a side, from `from` on.
    let every = |x: &Tensor, dim: usize, from: usize, count: usize| {
        if stride == 1 {
            return x.narrow(dim, from, count);
        }
        let at: Vec<u32> = (0..count).map(|i| (from + i * stride) as u32).collect();
        x.index_select(&Tensor::new(at, x.device())?, dim)
    };
    let mut taps = Vec::with_capacity(kh * kw);
    for ky in 0..kh {
        let rows = every(&x, 1, ky, oh)?;
        for kx in 0..kw {
            taps.push(every(&rows, 2, kx, ow)?);
        }
    }
    let columns = match &taps[..] {
        [one] => one.contiguous()?,
        taps => Tensor::cat(taps, D::Minus1)?,
    };
    let columns = columns.reshape((n * oh * ow, kh * kw * ci))?;
    let weight = weight.permute((2, 3, 1, 0))?.reshape((kh * kw * ci, co))?;
    let y = columns.matmul(&weight)?.broadcast_add(bias)?;
    activate(&y.reshape((n, oh, ow, co))?, activation)
}

fn activate(y: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(y.clone()),
        Activation::Silu => y.silu(),
        // Of y and slope * y, both for a slope up to 1.
        Activation::LeakyRelu(slope) if slope > 0.0 && slope <= 1.0 => {
            y.maximum(&(y * f64::from(slope))?)
        }
        other => bail!("no activation {other:?} on {:?}", y.device()),
    }
}

/// As [`super::group_norm`].
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    if groups == 0 || c == 0 || c % groups != 0 {
        bail!("group_norm: {c} channels cannot be cut into {groups} groups");
    }
    // A mean over the pixels, then over a group's channels.
    let mean = |x: &Tensor| x.mean_keepdim(1)?.mean_keepdim(3);
    let x = x.reshape((n, h * w, groups, c / groups))?;
    let x = x.broadcast_sub(&mean(&x)?)?;
    let deviation = (mean(&x.sqr()?)? + eps)?.sqrt()?;
    let x = x.broadcast_div(&deviation)?.reshape((n, h, w, c))?;
    let map = |t: &Tensor| match t.rank() {
        1 => Ok(t.clone()),
        _ => t.reshape((n, 1, 1, c)),
    };
    let y = x.broadcast_mul(&map(weight)?)?.broadcast_add(&map(bias)?)?;
    activate(&y, activation)
}

/// As [`super::upsample2x`].
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    x.reshape((n, h, 1, w, 1, c))?
        .broadcast_as((n, h, 2, w, 2, c))?
        .reshape((n, 2 * h, 2 * w, c))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops;

    fn random(shape: &[usize]) -> Var {
        Var::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    /// Asserts that two results and their gradients with respect to `vars` are the same.
    fn assert_same(ours: &Tensor, theirs: &Tensor, vars: &[&Var]) {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let close = |a: &Tensor, b: &Tensor| {
            assert_eq!(a.dims(), b.dims());
            for (a, b) in values(a).into_iter().zip(values(b)) {
                assert!((a - b).abs() <= 2e-4 * (1.0 + b.abs()), "{a}, not {b}");
            }
        };
        close(ours, theirs);
        let weights = Tensor::randn(0f32, 1.0, ours.shape(), &Device::Cpu).unwrap();
        let [ours, theirs] = [ours, theirs].map(|y| {
            let loss = (y * &weights).unwrap().sum_all().unwrap();
            loss.backward().unwrap()
        });
        for var in vars {
            close(ours.get(var).unwrap(), theirs.get(var).unwrap());
        }
    }

    #[test]
    fn convolutions_are_those_of_the_kernels() {
        let activations = [Activation::None, Activation::LeakyRelu(0.2)];
        for (stride, pad, k) in [(1, 1, 3), (2, 1, 3), (1, 0, 1), (1, 2, 5)] {
            for activation in activations {
                let (x, w, b) = (random(&[2, 9, 7, 5]), random(&[6, 5, k, k]), random(&[6]));
                let ours = conv2d(&x, &w, &b, stride, pad, activation).unwrap();
                let theirs = ops::conv2d(&x, &w, &b, stride, pad, activation).unwrap();
                assert_same(&ours, &theirs, &[&x, &w, &b]);
            }
        }
        let (x, w, b) = (random(&[1, 2, 2, 5]), random(&[6, 5, 3, 3]), random(&[6]));
        assert!(conv2d(&x, &w, &b, 1, 0, Activation::None).is_err());
    }

    #[test]
    fn norms_are_those_of_the_kernels() {
        for (affine, activation) in [(&[32][..], Activation::Silu), (&[2, 32], Activation::None)] {
            let (x, w, b) = (random(&[2, 5, 4, 32]), random(affine), random(affine));
            let ours = group_norm(&x, 2, &w, &b, 1e-5, activation).unwrap();
            let theirs = ops::group_norm(&x, 2, &w, &b, 1e-5, activation).unwrap();
            assert_same(&ours, &theirs, &[&x, &w, &b]);
        }
    }

    #[test]
    fn upsampling_is_that_of_the_kernels() {
        let x = random(&[2, 3, 5, 7]);
        assert_same(
            &upsample2x(&x).unwrap(),
            &ops::upsample2x(&x).unwrap(),
            &[&x],
        );
    }
}
