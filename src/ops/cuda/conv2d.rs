//! Convolution for 16-bit maps, forward and backward pass.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result, Tensor, bail};

use super::{
    aligned,
    kernel_op::{KernelOp, Launch},
    op::Op,
    params::{Conv, Params, Shape, WeightGrad},
    suffix,
};
use crate::ops::Activation;

/// Threads and outputs of a block of the convolution (`kernels/layers.cu`).
const THREADS: u32 = 128;
const OUTPUTS: u32 = 128;
/// Patch elements of a block of the weight gradient, and the minimum number of outputs that it
/// sums.
const PATCH: u32 = 64;
const STEP: u32 = 1024;

impl Shape {
    /// Describes the convolution of `x`, upsampled by `2^up`, with a weight `[co, ci, kh, kw]`,
    /// `pad` zeros on every side and `more` below and to the right. Returns `None` if there is no
    /// kernel: channels must be multiples of 8, also those of the backward pass if it is required.
    fn new(
        x: &Tensor,
        [co, channels, kh, kw]: [usize; 4],
        stride: usize,
        [pad, more]: [usize; 2],
        up: usize,
        differentiable: bool,
    ) -> Option<Self> {
        let &[n, h, w, ci] = x.dims() else {
            return None;
        };
        let padded = |side: usize| (side << up) + 2 * pad + more;
        let fits = ci == channels
            && stride > 0
            && (1..=padded(h)).contains(&kh)
            && (1..=padded(w)).contains(&kw)
            && pad < kh.min(kw);
        // The padding of the gradient is one number, too.
        let back = co % 8 == 0 && kh == kw;
        if !super::reaches(x) || !fits || (differentiable && !back) {
            return None;
        }
        let [oh, ow] = [(padded(h), kh), (padded(w), kw)].map(|(side, k)| (side - k) / stride + 1);
        let small = |v: usize| u32::try_from(v).ok().filter(|v| *v < 1 << 30);
        small(n * oh * ow * co)?;
        Some(Self {
            n: small(n)?,
            h: small(h)?,
            w: small(w)?,
            ci: small(ci)?,
            oh: small(oh)?,
            ow: small(ow)?,
            co: small(co)?,
            kh: small(kh)?,
            kw: small(kw)?,
            stride: small(stride)?,
            pad: small(pad)?,
            up: small(up)?,
        })
    }

    fn output(&self) -> candle_core::Shape {
        let sides = [self.n, self.oh, self.ow, self.co];
        sides.map(|v| v as usize).to_vec().into()
    }

    fn outputs(&self) -> u32 {
        self.n * self.oh * self.ow
    }

    /// Returns the number of terms of an output.
    fn patch(&self) -> u32 {
        self.kh * self.kw * self.ci
    }

    /// Returns the output channels of a block.
    fn block(&self) -> u32 {
        match self.co {
            0..=16 => 16,
            17..=32 => 32,
            _ => 64,
        }
    }
}

impl Conv {
    fn new(shape: Shape, activation: Activation) -> Self {
        let (activation, slope) = super::activation(activation);
        Self {
            shape,
            activation,
            slope,
            ..Self::default()
        }
    }

    fn launch(&self, dtype: DType) -> Launch {
        let (shape, block) = (&self.shape, self.shape.block());
        Launch {
            kernel: format!("tadsr_conv{block}_{}", suffix(dtype)),
            grid: [
                shape.outputs().div_ceil(OUTPUTS),
                shape.co.div_ceil(block),
                1,
            ],
            threads: THREADS,
            params: self.words(),
        }
    }
}

/// Converts weights `[co, ci, kh, kw]` to the kernels' `[co, kh, kw, ci]` of type `dtype`.
fn arrange(weight: &Tensor, dtype: DType) -> Result<Tensor> {
    aligned(&weight.to_dtype(dtype)?.permute((0, 2, 3, 1))?)
}

/// Computes [`crate::ops::conv2d`] of `x` upsampled by `2^up`. Returns `None` if there is no
/// kernel.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stride: usize,
    pad: usize,
    up: usize,
    activation: Activation,
) -> Result<Option<Tensor>> {
    let tracked = [x, weight, bias].into_iter().any(Tensor::track_op);
    let sides = weight.dims4()?.into();
    let Some(shape) = Shape::new(x, sides, stride, [pad, 0], up, tracked) else {
        return Ok(None);
    };
    if bias.dims() != [sides[0]] {
        return Ok(None);
    }
    let op = Conv2d {
        conv: Conv::new(shape, activation),
        activation,
        dtype: x.dtype(),
    };
    let (weight, bias) = (arrange(weight, x.dtype())?, bias.to_dtype(DType::F32)?);
    let y = aligned(x)?.apply_op3(&weight, &bias.contiguous()?, Op(op))?;
    Ok(Some(y))
}

/// Inputs: the map, weights `[co, kh, kw, ci]` of its type, an f32 bias.
struct Conv2d {
    conv: Conv,
    activation: Activation,
    dtype: DType,
}

impl KernelOp for Conv2d {
    const NAME: &'static str = "conv2d-nhwc-cuda";

    fn output(&self) -> (candle_core::Shape, DType) {
        (self.conv.shape.output(), self.dtype)
    }

    fn launches(&self, inputs: &[u64], output: u64, _: u64) -> Vec<Launch> {
        let conv = Conv {
            x: inputs[0],
            weight: inputs[1],
            bias: inputs[2],
            y: output,
            ..self.conv
        };
        vec![conv.launch(self.dtype)]
    }

    fn gradients(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        output: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = match self.activation {
            Activation::None => aligned(grad)?,
            Activation::LeakyRelu(slope) if slope > 0.0 && slope <= 1.0 => {
                let less = (grad * f64::from(slope))?;
                output.detach().gt(0.0)?.where_cond(grad, &less)?
            }
            other => bail!("conv2d: no gradient through the fused activation {other:?}"),
        };
        let mut gradients = [None, None, None];
        if x.track_op() {
            gradients[0] = Some(self.input_gradient(&weight.detach(), &grad)?);
        }
        if weight.track_op() || bias.track_op() {
            let (dw, db) = self.weight_gradient(&x.detach(), &grad)?;
            gradients[1] = weight.track_op().then_some(dw);
            gradients[2] = bias.track_op().then_some(db);
        }
        Ok(gradients)
    }
}

impl Conv2d {
    /// Convolves the gradient, with `stride` - 1 zeros between its pixels, with the flipped
    /// weights.
    fn input_gradient(&self, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let s = self.conv.shape;
        let mut grad = grad.clone();
        let [n, h, w, ci, oh, ow, co] = [s.n, s.h, s.w, s.ci, s.oh, s.ow, s.co].map(|v| v as usize);
        if s.stride > 1 {
            let stride = s.stride as usize;
            grad = grad
                .reshape((n, oh, 1, ow, 1, co))?
                .pad_with_zeros(2, 0, stride - 1)?
                .pad_with_zeros(4, 0, stride - 1)?
                .reshape((n, oh * stride, ow * stride, co))?;
        }
        let shape = Shape {
            h: s.oh * s.stride,
            w: s.ow * s.stride,
            ci: s.co,
            oh: s.h << s.up,
            ow: s.w << s.up,
            co: s.ci,
            stride: 1,
            pad: s.kh - 1 - s.pad,
            up: 0,
            ..s
        };
        let weight = weight.permute((3, 1, 2, 0))?.contiguous()?;
        let bias = Tensor::zeros(ci, DType::F32, grad.device())?;
        let op = Conv2d {
            conv: Conv {
                reversed: 1,
                ..Conv::new(shape, Activation::None)
            },
            activation: Activation::None,
            dtype: self.dtype,
        };
        let dx = grad.apply_op3_no_bwd(&weight, &bias, &Op(op))?;
        match s.up {
            0 => Ok(dx),
            up => dx.reshape((n, h, 1 << up, w, 1 << up, ci))?.sum((2, 4)),
        }
    }

    /// Returns the gradients with respect to weights and bias.
    fn weight_gradient(&self, x: &Tensor, grad: &Tensor) -> Result<(Tensor, Tensor)> {
        let shape = self.conv.shape;
        let op = WeightGradient {
            shape,
            dtype: self.dtype,
        };
        let sums = x.apply_op2_no_bwd(grad, &Op(op))?.sum(0)?;
        let [co, kh, kw, ci] = [shape.co, shape.kh, shape.kw, shape.ci].map(|v| v as usize);
        let weights = co * kh * kw * ci;
        let dw = sums.narrow(0, 0, weights)?.reshape((co, kh, kw, ci))?;
        Ok((dw.to_dtype(self.dtype)?, sums.narrow(0, weights, co)?))
    }
}

/// Weights for inference, packed once for each type of maps.
#[derive(Debug)]
pub struct PackedConv {
    weight: Tensor,
    bias: Tensor,
    arranged: Mutex<Option<Tensor>>,
}

impl PackedConv {
    /// Packs `weight` `[co, ci, kh, kw]` and `bias` `[co]`.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let weight = weight.detach();
        Ok(Self {
            bias: bias.detach().to_dtype(DType::F32)?.contiguous()?,
            // bf16 is the default of ResShift models. Packing at once lets a query for free memory
            // count these weights.
            arranged: Mutex::new(match weight.dim(1)? % 8 {
                0 => Some(arrange(&weight, DType::F16)?),
                _ => None,
            }),
            weight,
        })
    }

    /// Returns the weights as passed to [`Self::new`] and the bias.
    pub fn plain(&self) -> (&Tensor, &Tensor) {
        (&self.weight, &self.bias)
    }

    /// Computes [`PackedConv2d::forward`](crate::ops::PackedConv2d::forward) of `x` upsampled by
    /// `2^up`. Returns `None` if there is no kernel.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        stride: usize,
        pad: [usize; 2],
        up: usize,
        activation: Activation,
    ) -> Result<Option<Tensor>> {
        let sides = self.weight.dims4()?.into();
        let Some(shape) = Shape::new(x, sides, stride, pad, up, false) else {
            return Ok(None);
        };
        let dtype = x.dtype();
        let op = ResidualConv2d {
            conv: Conv::new(shape, activation),
            dtype,
            constants: [self.arranged(dtype)?, self.bias.clone()],
        };
        let x = aligned(x)?;
        match residual {
            Some(residual) if residual.dtype() == dtype => {
                let residual = aligned(residual)?;
                x.apply_op2_no_bwd(&residual, &Op(op)).map(Some)
            }
            Some(_) => Ok(None),
            None => x.apply_op1_no_bwd(&Op(op)).map(Some),
        }
    }

    fn arranged(&self, dtype: DType) -> Result<Tensor> {
        let mut arranged = self.arranged.lock().unwrap_or_else(PoisonError::into_inner);
        match &*arranged {
            Some(weight) if weight.dtype() == dtype => Ok(weight.clone()),
            _ => Ok(arranged.insert(arrange(&self.weight, dtype)?).clone()),
        }
    }
}

/// Inputs: a map; optionally a residual.
struct ResidualConv2d {
    conv: Conv,
    dtype: DType,
    /// Packed weights, bias.
    constants: [Tensor; 2],
}

impl KernelOp for ResidualConv2d {
    const NAME: &'static str = "packed-conv2d-nhwc-cuda";

    fn output(&self) -> (candle_core::Shape, DType) {
        (self.conv.shape.output(), self.dtype)
    }

    fn constants(&self) -> &[Tensor] {
        &self.constants
    }

    fn launches(&self, inputs: &[u64], output: u64, _: u64) -> Vec<Launch> {
        let (inputs, constants) = inputs.split_at(inputs.len() - 2);
        let conv = Conv {
            x: inputs[0],
            weight: constants[0],
            bias: constants[1],
            residual: inputs.get(1).copied().unwrap_or(0),
            y: output,
            ..self.conv
        };
        vec![conv.launch(self.dtype)]
    }
}

/// Partial sums of the gradients with respect to weights and bias, `[sums, co kh kw ci + co]` of
/// f32. Inputs: the map, the gradient with respect to the output.
struct WeightGradient {
    shape: Shape,
    dtype: DType,
}

impl WeightGradient {
    /// Returns the outputs that a block sums. The result is at most 32 partial sums, the limit of
    /// candle's fast kernel for sums.
    fn step(&self) -> u32 {
        let step = self.shape.outputs().div_ceil(32).max(STEP);
        step.next_multiple_of(32)
    }

    fn sums(&self) -> u32 {
        self.shape.outputs().div_ceil(self.step())
    }
}

impl KernelOp for WeightGradient {
    const NAME: &'static str = "conv2d-nhwc-cuda-wgrad";

    fn output(&self) -> (candle_core::Shape, DType) {
        let s = &self.shape;
        let [sums, row] = [self.sums(), s.co * (s.patch() + 1)].map(|v| v as usize);
        ((sums, row).into(), DType::F32)
    }

    fn launches(&self, inputs: &[u64], output: u64, _: u64) -> Vec<Launch> {
        let (shape, block) = (self.shape, self.shape.block());
        let params = WeightGrad {
            x: inputs[0],
            dy: inputs[1],
            partials: output,
            shape,
            step: self.step(),
            unused: 0,
        };
        vec![Launch {
            kernel: format!("tadsr_wgrad{block}_{}", suffix(self.dtype)),
            grid: [
                shape.patch().div_ceil(PATCH),
                shape.co.div_ceil(block),
                self.sums(),
            ],
            threads: THREADS,
            params: params.words(),
        }]
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::{
        composed,
        cuda::{assert_close, device, emulated},
    };
    use crate::testing::normal;

    fn random(shape: &[usize]) -> Var {
        let values = normal(0.0, 1.0, shape).to_device(&device());
        Var::from_tensor(&values.unwrap()).unwrap()
    }

    /// Compares each kernel's source on the CPU with the composed operator in f32.
    #[test]
    fn values_and_gradients_are_those_of_f32() {
        // n, h, w, ci, co, k, stride, pad, up
        let cases = [
            [2, 7, 9, 16, 16, 3, 1, 1, 0],
            [1, 12, 11, 32, 24, 3, 1, 1, 0],
            [1, 6, 21, 48, 80, 3, 1, 1, 0],
            [2, 9, 8, 8, 64, 3, 2, 1, 0],
            [3, 5, 6, 40, 32, 1, 1, 0, 0],
            [1, 5, 6, 16, 16, 5, 1, 2, 0],
            [1, 4, 5, 24, 40, 3, 1, 1, 1],
            [1, 36, 33, 8, 8, 3, 1, 1, 0],
        ];
        for [n, h, w, ci, co, k, stride, pad, up] in cases {
            let (x, weight, b) = (
                random(&[n, h, w, ci]),
                random(&[co, ci, k, k]),
                random(&[co]),
            );
            for (dtype, limit) in [(DType::F16, 2e-3), (DType::BF16, 1.5e-2)] {
                let activation = match dtype {
                    DType::F16 => Activation::None,
                    _ => Activation::LeakyRelu(0.2),
                };
                let what =
                    format!("{dtype:?} {n}x{h}x{w}x{ci} to {co}, {k}x{k} / {stride}, up {up}");
                let rounded = |t: &Tensor| t.to_dtype(dtype).unwrap();
                let got = emulated(|| {
                    let y = conv2d(&rounded(&x), &weight, &b, stride, pad, up, activation);
                    y.unwrap().expect("a kernel")
                });
                // The reference starts with the same rounded numbers.
                let full = |t: &Tensor| rounded(t).to_dtype(DType::F32).unwrap();
                let grown = match up {
                    0 => full(&x),
                    _ => composed::upsample2x(&full(&x)).unwrap(),
                };
                let want =
                    composed::conv2d(&grown, &full(&weight), &b, stride, pad, activation).unwrap();
                assert_close(&got, &want, limit, &what);
                let pull = rounded(&normal(0.0, 1.0, got.shape()).to_device(&device()).unwrap());
                let got = (got * &pull)
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .backward()
                    .unwrap();
                let pull = pull.to_dtype(DType::F32).unwrap();
                let want = (want * pull)
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .backward()
                    .unwrap();
                for (name, var) in [("x", &x), ("weight", &weight), ("bias", &b)] {
                    let what = format!("{what}: gradient of {name}");
                    assert_close(got.get(var).unwrap(), want.get(var).unwrap(), limit, &what);
                }
            }
        }
    }

    #[test]
    fn odd_channels_uneven_padding_and_residuals_serve_inference() {
        let random = |shape: &[usize]| {
            let t = random(shape).detach();
            t.to_dtype(DType::F16).unwrap()
        };
        let x = random(&[1, 8, 6, 16]);
        let full = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        for (co, up) in [(3, 0), (16, 1)] {
            let (weight, b) = (random(&[co, 16, 3, 3]), random(&[co]));
            let packed = PackedConv::new(&weight, &b).unwrap();
            let (stride, pad, grown) = match up {
                0 => (2, [0, 1], full(&x)),
                _ => (1, [1, 0], composed::upsample2x(&full(&x)).unwrap()),
            };
            let padded = grown.pad_with_zeros(1, 0, pad[1]).unwrap();
            let padded = padded.pad_with_zeros(2, 0, pad[1]).unwrap();
            let (weight, b) = (full(&weight), full(&b));
            let silu = Activation::Silu;
            let want = composed::conv2d(&padded, &weight, &b, stride, pad[0], silu).unwrap();
            let residual = random(want.dims());
            let forward = |residual| {
                let y = emulated(|| packed.forward(&x, residual, stride, pad, up, silu));
                y.unwrap().expect("a kernel")
            };
            assert_close(&forward(None), &want, 2e-3, "alone");
            let want = (want + full(&residual)).unwrap();
            assert_close(&forward(Some(&residual)), &want, 2e-3, "onto another");
        }
    }

    /// A view of a map may begin at any address, and kernels load 16 bytes at once.
    #[test]
    fn maps_that_begin_anywhere_are_copied() {
        let all = random(&[3 + 4 * 4 * 8])
            .detach()
            .to_dtype(DType::F16)
            .unwrap();
        let x = all
            .narrow(0, 3, 4 * 4 * 8)
            .unwrap()
            .reshape((1, 4, 4, 8))
            .unwrap();
        assert_eq!(x.layout().start_offset(), 3);
        let (weight, b) = (random(&[8, 8, 3, 3]).detach(), random(&[8]).detach());
        let convolved = |x: &Tensor| {
            let y = emulated(|| conv2d(x, &weight, &b, 1, 1, 0, Activation::None));
            y.unwrap().unwrap().to_dtype(DType::F32).unwrap()
        };
        assert_close(
            &convolved(&x),
            &convolved(&x.force_contiguous().unwrap()),
            1e-9,
            "begun at 3",
        );
    }

    #[test]
    fn what_kernels_are_not_for_is_left_to_others() {
        let convolved = |x: &[usize], weight: &[usize], dtype| {
            let (x, weight) = (random(x), random(weight));
            let x = x.to_dtype(dtype).unwrap();
            let b = random(&weight.dims()[..1]);
            emulated(|| conv2d(&x, &weight, &b, 1, 1, 0, Activation::None).unwrap())
        };
        assert!(convolved(&[1, 4, 4, 8], &[8, 8, 3, 3], DType::F16).is_some());
        assert!(convolved(&[1, 4, 4, 8], &[8, 8, 3, 3], DType::F32).is_none());
        assert!(convolved(&[1, 4, 4, 6], &[8, 6, 3, 3], DType::F16).is_none());
        // Channels of its gradients are not multiples of 8.
        assert!(convolved(&[1, 4, 4, 8], &[6, 8, 3, 3], DType::F16).is_none());
        assert!(convolved(&[1, 1, 1, 8], &[8, 8, 5, 5], DType::F16).is_none());
        assert!(convolved(&[1, 4, 4, 8], &[8, 8, 3, 5], DType::F16).is_none());
        assert!(convolved(&[0, 4, 4, 8], &[8, 8, 3, 3], DType::F16).is_none());
    }
}
