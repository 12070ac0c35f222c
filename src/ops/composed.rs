//! The operators composed of candle's operators, for devices and types without kernels. Convolution
//! is a matrix product, forward and backward, which on CUDA runs in cuBLAS. The backward pass of
//! candle's convolution is too slow for training on CUDA.
//!
//! For maps in 16-bit floats, only products are in 16 bits. Sums of many values, norms and the
//! softmax are in f32.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::ops::softmax;

use super::Activation;

/// Maximum number of values in the patches of a convolution or the scores of attention at a time.
const VALUES: usize = 1 << 27;

/// Computes [`super::conv2d`].
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
        bail!("conv2d: {x:?} with {weight:?}, stride {stride} and padding {pad} do not fit");
    }
    let (oh, ow) = ((height - kh) / stride + 1, (width - kw) / stride + 1);
    let dtype = x.dtype();
    let x = match pad {
        0 => x.clone(),
        _ => x.pad_with_zeros(1, pad, pad)?.pad_with_zeros(2, pad, pad)?,
    };
    let weight = weight.permute((2, 3, 1, 0))?.reshape((kh * kw * ci, co))?;
    let weight = weight.to_dtype(dtype)?;
    // Every `stride`th position along a side from `from`.
    let every = |x: &Tensor, dim: usize, from: usize, count: usize| {
        if stride == 1 {
            return x.narrow(dim, from, count);
        }
        let at: Vec<u32> = (0..count).map(|i| (from + i * stride) as u32).collect();
        x.index_select(&Tensor::new(at, x.device())?, dim)
    };
    let rows = |first: usize, count: usize| {
        let mut taps = Vec::with_capacity(kh * kw);
        for ky in 0..kh {
            let rows = every(&x, 1, first * stride + ky, count)?;
            for kx in 0..kw {
                taps.push(every(&rows, 2, kx, ow)?);
            }
        }
        let columns = match &taps[..] {
            [one] => one.contiguous()?,
            taps => Tensor::cat(taps, D::Minus1)?,
        };
        let columns = columns.reshape((n * count * ow, kh * kw * ci))?;
        let y = columns.matmul(&weight)?.to_dtype(DType::F32)?;
        let y = activate(&y.broadcast_add(&bias.to_dtype(DType::F32)?)?, activation)?;
        y.to_dtype(dtype)?.reshape((n, count, ow, co))
    };
    in_blocks(oh, n * ow * kh * kw * ci, 1, rows)
}

/// Calls `part` for blocks of `count` items and concatenates its results along `dim`. An item takes
/// `each` values, a block at most [`VALUES`]. `part` takes the first item and the number of items.
fn in_blocks(
    count: usize,
    each: usize,
    dim: usize,
    part: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let block = (VALUES / each.max(1)).clamp(1, count);
    if block == count {
        return part(0, count);
    }
    let parts = (0..count).step_by(block);
    let parts: Vec<_> = parts
        .map(|first| part(first, block.min(count - first)))
        .collect::<Result<_>>()?;
    Tensor::cat(&parts, dim)
}

fn activate(y: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::None => Ok(y.clone()),
        Activation::Silu => y.silu(),
        // The maximum of y and slope * y, for slopes up to 1.
        Activation::LeakyRelu(slope) if slope > 0.0 && slope <= 1.0 => {
            y.maximum(&(y * f64::from(slope))?)
        }
        other => bail!("activation {other:?} is not supported on {:?}", y.device()),
    }
}

/// Computes [`super::group_norm`].
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
        bail!("group_norm: {c} channels cannot be divided into {groups} groups");
    }
    let dtype = x.dtype();
    // The mean over the pixels, then over the channels of a group.
    let mean = |x: &Tensor| x.mean_keepdim(1)?.mean_keepdim(3);
    let x = x.to_dtype(DType::F32)?;
    let x = x.reshape((n, h * w, groups, c / groups))?;
    let x = x.broadcast_sub(&mean(&x)?)?;
    let deviation = (mean(&x.sqr()?)? + eps)?.sqrt()?;
    let x = x.broadcast_div(&deviation)?.reshape((n, h, w, c))?;
    let map = |t: &Tensor| match t.rank() {
        1 => Ok(t.clone()),
        _ => t.reshape((n, 1, 1, c)),
    };
    let y = x.broadcast_mul(&map(weight)?)?.broadcast_add(&map(bias)?)?;
    activate(&y, activation)?.to_dtype(dtype)
}

/// Computes [`super::attention`] for arguments that fit.
pub fn attention(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    [wh, ww]: [usize; 2],
    shift: usize,
) -> Result<Tensor> {
    let (n, h, w, c3) = qkv.dims4()?;
    let (d, l) = (c3 / 3 / heads, wh * ww);
    let (rows, columns) = (h / wh, w / ww);
    let windows = rows * columns;
    let (dtype, by) = (qkv.dtype(), shift as i32);
    // [3, n windows, heads, l, d]
    let parts = qkv
        .roll(-by, 1)?
        .roll(-by, 2)?
        .reshape(vec![n, rows, wh, columns, ww, 3, heads, d])?
        .permute(vec![5, 0, 1, 3, 6, 2, 4, 7])?
        .reshape((3, n * windows, heads, l, d))?;
    let part = |i: usize| parts.narrow(0, i, 1)?.squeeze(0)?.contiguous();
    let (q, k, v) = ((part(0)? * (d as f64).powf(-0.5))?, part(1)?, part(2)?);
    let k = k.t()?.contiguous()?;
    let mask = match shift {
        0 => None,
        _ => Some(shift_mask([h, w], [wh, ww], shift, qkv.device())?),
    };
    let queries = |first: usize, count: usize| {
        let of = |t: &Tensor, dim: usize| t.narrow(dim, first, count);
        let scores = of(&q, 2)?.contiguous()?.matmul(&k)?;
        let mut scores = scores.to_dtype(DType::F32)?;
        if let Some(bias) = bias {
            scores = scores.broadcast_add(&of(bias, 1)?.to_dtype(DType::F32)?)?;
        }
        if let Some(mask) = &mask {
            scores = scores
                .reshape((n, windows, heads, count, l))?
                .broadcast_add(&of(mask, 3)?)?
                .reshape((n * windows, heads, count, l))?;
        }
        softmax(&scores, D::Minus1)?.to_dtype(dtype)?.matmul(&v)
    };
    in_blocks(l, n * windows * heads * l, 2, queries)?
        .reshape(vec![n, rows, columns, heads, wh, ww, d])?
        .permute(vec![0, 1, 4, 2, 5, 3, 6])?
        .reshape((n, h, w, heads * d))?
        .roll(by, 1)?
        .roll(by, 2)
}

/// Returns the mask `[1, windows, 1, l, l]`: -100 for masked pairs of pixels, otherwise 0.
fn shift_mask(
    [h, w]: [usize; 2],
    [wh, ww]: [usize; 2],
    shift: usize,
    device: &Device,
) -> Result<Tensor> {
    let l = wh * ww;
    let right = |pixel: usize| pixel % ww + shift >= ww;
    let lowest = (0..l * l).map(|i| {
        if right(i / l) == right(i % l) {
            0f32
        } else {
            -100.0
        }
    });
    let mut mask = vec![0.0; (h / wh - 1) * (w / ww) * l * l];
    for _ in 0..w / ww {
        mask.extend(lowest.clone());
    }
    Tensor::from_vec(mask, (1, (h / wh) * (w / ww), 1, l, l), device)
}

/// Computes [`super::upsample2x`].
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    x.reshape((n, h, 1, w, 1, c))?
        .broadcast_as((n, h, 2, w, 2, c))?
        .reshape((n, 2 * h, 2 * w, c))
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops;
    use crate::testing::{normal, variable};

    fn random(shape: &[usize]) -> Var {
        variable(0.0, 1.0, shape)
    }

    /// Asserts that two results and their gradients with respect to `vars` are equal.
    fn assert_same(got: &Tensor, want: &Tensor, vars: &[&Var]) {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let close = |a: &Tensor, b: &Tensor| {
            assert_eq!(a.dims(), b.dims());
            for (a, b) in values(a).into_iter().zip(values(b)) {
                assert!((a - b).abs() <= 2e-4 * (1.0 + b.abs()), "{a}, not {b}");
            }
        };
        close(got, want);
        let weights = normal(0.0, 1.0, got.shape());
        let [got, want] = [got, want].map(|y| {
            let loss = (y * &weights).unwrap().sum_all().unwrap();
            loss.backward().unwrap()
        });
        for var in vars {
            close(got.get(var).unwrap(), want.get(var).unwrap());
        }
    }

    #[test]
    fn convolutions_are_those_of_the_kernels() {
        let activations = [Activation::None, Activation::LeakyRelu(0.2)];
        for (stride, pad, k) in [(1, 1, 3), (2, 1, 3), (1, 0, 1), (1, 2, 5)] {
            for activation in activations {
                let (x, w, b) = (random(&[2, 9, 7, 5]), random(&[6, 5, k, k]), random(&[6]));
                let got = conv2d(&x, &w, &b, stride, pad, activation).unwrap();
                let want = ops::conv2d(&x, &w, &b, stride, pad, activation).unwrap();
                assert_same(&got, &want, &[&x, &w, &b]);
            }
        }
        let (x, w, b) = (random(&[1, 2, 2, 5]), random(&[6, 5, 3, 3]), random(&[6]));
        assert!(conv2d(&x, &w, &b, 1, 0, Activation::None).is_err());
    }

    #[test]
    fn norms_are_those_of_the_kernels() {
        for (affine, activation) in [(&[32][..], Activation::Silu), (&[2, 32], Activation::None)] {
            let (x, w, b) = (random(&[2, 5, 4, 32]), random(affine), random(affine));
            let got = group_norm(&x, 2, &w, &b, 1e-5, activation).unwrap();
            let want = ops::group_norm(&x, 2, &w, &b, 1e-5, activation).unwrap();
            assert_same(&got, &want, &[&x, &w, &b]);
        }
    }

    /// The tests of [`ops::attention`] compare it with this one. Here it is divided into blocks of
    /// queries.
    #[test]
    fn blocks_make_the_whole() {
        let x = random(&[2, 7, 3]);
        let part = |first, count| x.narrow(1, first, count)? * 2.0;
        for each in [1, VALUES / 3, VALUES, 2 * VALUES] {
            let y = in_blocks(7, each, 1, part).unwrap();
            assert_same(&y, &(x.as_tensor() * 2.0).unwrap(), &[&x]);
        }
    }

    /// In 16 bits, values and the gradients of f32 weights are those of f32, within the rounding of
    /// inputs and results.
    #[test]
    fn maps_of_16_bits_keep_their_type_and_values() {
        let (x, w) = (random(&[2, 8, 8, 48]), random(&[32, 48, 3, 3]));
        let (b, scale) = (random(&[32]), random(&[48]));
        let table = random(&[2, 16, 16]);
        let weights = normal(0.0, 1.0, (2, 8, 8, 48));
        let all = |dtype: DType| -> Result<(Vec<Tensor>, Vec<Tensor>)> {
            let x = x.to_dtype(dtype)?;
            let conv = ops::conv2d(&x, &w, &b, 1, 1, Activation::LeakyRelu(0.2))?;
            let norm = ops::group_norm(&x, 3, &scale, &scale, 1e-5, Activation::Silu)?;
            let results = vec![
                ops::attention(&x, Some(&table), 2, [4, 4], 2)?,
                ops::upsample2x_conv2d(&x, &w, &b)?,
                ops::add(&ops::silu(&x)?, &ops::gelu(&x)?)?,
                conv,
                norm.clone(),
            ];
            let loss = (norm.to_dtype(DType::F32)? * &weights)?.sum_all()?;
            let loss = (loss + results[3].to_dtype(DType::F32)?.sqr()?.sum_all()?)?;
            let grads = loss.backward()?;
            let grad = |v: &Var| grads.get(v).cloned().ok_or(candle_core::Error::msg("none"));
            Ok((results, vec![grad(&w)?, grad(&b)?, grad(&scale)?]))
        };
        let (want, want_grads) = all(DType::F32).unwrap();
        for (dtype, limit) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
            let (got, grads) = all(dtype).unwrap();
            assert!(got.iter().all(|y| y.dtype() == dtype));
            assert!(grads.iter().all(|g| g.dtype() == DType::F32));
            for (i, (a, b)) in got
                .iter()
                .chain(&grads)
                .zip(want.iter().chain(&want_grads))
                .enumerate()
            {
                let norm = |t: &Tensor| -> f32 {
                    t.sqr()
                        .unwrap()
                        .sum_all()
                        .unwrap()
                        .sqrt()
                        .unwrap()
                        .to_scalar()
                        .unwrap()
                };
                let off = norm(&(a.to_dtype(DType::F32).unwrap() - b).unwrap()) / norm(b);
                assert!(off > 0.0 && off < limit, "{dtype:?} {i}: {off}");
            }
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
