//! Convolutions for inference with weights that are packed once.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{Activation, composed, conv2d::with_slice, cuda};
use crate::kernels::{
    conv::{ConvShape, PackedConv, PackedUpConv},
    simd::Isa,
    zeros,
};

/// A 2-d convolution that owns its weights in the order of the kernels. [`conv2d`](super::conv2d)
/// packs them at every call, which for large weights on small maps takes longer than the
/// convolution. It supports f32 maps on the CPU and maps of any type on other devices, without
/// gradients.
#[derive(Debug)]
pub struct PackedConv2d {
    place: Place,
    /// log2 of the factor by which the input is upsampled.
    up: usize,
    co: usize,
    ci: usize,
    kernel: [usize; 2],
    stride: usize,
    pad: [usize; 2],
}

#[derive(Debug)]
enum Form {
    Direct(PackedConv),
    Upsampling(Box<PackedUpConv>),
}

#[derive(Debug)]
enum Place {
    Cpu(Form),
    Device(cuda::PackedConv),
}

impl PackedConv2d {
    /// Returns `true` if maps of this type on this device are supported.
    pub fn serves(device: &Device, dtype: DType) -> bool {
        !device.is_cpu() || dtype == DType::F32 || cuda::is_emulated()
    }

    /// Packs `weight` `[co, ci, kh, kw]` and `bias` `[co]`. The input is padded by `pad[0]` zeros
    /// on every side and by `pad[1]` more below and to the right.
    ///
    /// # Errors
    /// If shapes do not fit, the padding is as large as the kernel, or a tensor on the CPU is not
    /// f32.
    pub fn new(weight: &Tensor, bias: &Tensor, stride: usize, pad: [usize; 2]) -> Result<Self> {
        let (co, ci, kh, kw) = weight.dims4()?;
        let shape = ConvShape {
            n: 1,
            h: kh,
            w: kw,
            ci,
            co,
            kh,
            kw,
            stride,
            pad: pad[0],
        };
        if bias.dims1()? != co || stride == 0 || pad[0] + pad[1] >= kh.min(kw) {
            bail!("{weight:?} and {bias:?} with stride {stride}, padding {pad:?} do not fit");
        }
        let place = pack(weight, bias, |w, b| {
            Form::Direct(PackedConv::new(&shape, w, Some(b), Isa::best()))
        })?;
        Ok(Self {
            place,
            up: 0,
            co,
            ci,
            kernel: [kh, kw],
            stride,
            pad,
        })
    }

    /// Packs `weight` `[co, ci, 3, 3]` and `bias` `[co]` of a convolution with padding 1 that
    /// follows [`upsample2x`](super::upsample2x). Both together take four ninths of the
    /// multiplications.
    ///
    /// # Errors
    /// If shapes do not fit, or a tensor on the CPU is not f32.
    pub fn upsampling(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let (co, ci, kh, kw) = weight.dims4()?;
        if bias.dims1()? != co || (kh, kw) != (3, 3) {
            bail!("{weight:?} and {bias:?} are not those of a 3x3 convolution");
        }
        let place = pack(weight, bias, |w, b| {
            Form::Upsampling(Box::new(PackedUpConv::new(ci, co, w, b, Isa::best())))
        })?;
        Ok(Self {
            place,
            up: 1,
            co,
            ci,
            kernel: [3, 3],
            stride: 1,
            pad: [1, 0],
        })
    }

    /// Convolves `x` `[n, h, w, ci]`, applies `activation` and adds `residual` of the result's
    /// shape `[n, oh, ow, co]`.
    ///
    /// # Errors
    /// If a shape does not fit, the kernel is larger than the padded input, or `x` or `residual`
    /// requires a gradient.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        let (n, h, w, ci) = x.dims4()?;
        if ci != self.ci {
            bail!("a convolution of {} channels on {:?}", self.ci, x.shape());
        }
        if x.track_op() || residual.is_some_and(|r| r.track_op()) {
            bail!("a packed convolution has no gradient");
        }
        let shape = ConvShape {
            n,
            h,
            w,
            ci,
            co: self.co,
            kh: self.kernel[0],
            kw: self.kernel[1],
            stride: self.stride,
            pad: self.pad[0],
        };
        let (oh, ow) = match self.up {
            0 => shape.output_with(self.pad[1]),
            _ => (2 * h, 2 * w),
        };
        if oh == 0 || ow == 0 {
            bail!("the kernel is larger than the padded input: {shape:?}");
        }
        let dims = (n, oh, ow, self.co);
        if let Some(r) = residual.filter(|r| r.dims() != [n, oh, ow, self.co]) {
            bail!("a residual {:?} for a result {dims:?}", r.shape());
        }
        let form = match &self.place {
            Place::Cpu(form) => form,
            Place::Device(conv) => return self.forward_on_device(conv, x, residual, activation),
        };
        let mut y = zeros(n * oh * ow * self.co);
        let (x, residual) = (
            x.contiguous()?,
            residual.map(Tensor::contiguous).transpose()?,
        );
        let mut run = |residual: Option<&[f32]>| {
            with_slice(&x, |x| match form {
                Form::Direct(conv) => {
                    conv.forward_onto(&shape, self.pad[1], x, residual, activation, &mut y)
                }
                Form::Upsampling(conv) => conv.forward([n, h, w], x, residual, activation, &mut y),
            })
        };
        match &residual {
            Some(r) => with_slice(r, |r| run(Some(r)))??,
            None => run(None)?,
        }
        Tensor::from_vec(y, dims, x.device())
    }

    /// Runs a kernel, or candle's operators if there is none.
    fn forward_on_device(
        &self,
        conv: &cuda::PackedConv,
        x: &Tensor,
        residual: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        let y = conv.forward(x, residual, self.stride, self.pad, self.up, activation)?;
        if let Some(y) = y {
            return Ok(y);
        }
        let (weight, bias) = conv.plain();
        let [pad, more] = self.pad;
        let mut x = x.clone();
        for _ in 0..self.up {
            x = composed::upsample2x(&x)?;
        }
        x = x.pad_with_zeros(1, 0, more)?.pad_with_zeros(2, 0, more)?;
        let y = composed::conv2d(&x, weight, bias, self.stride, pad, activation)?;
        match residual {
            Some(residual) => residual + y,
            None => Ok(y),
        }
    }
}

fn pack(weight: &Tensor, bias: &Tensor, f: impl FnOnce(&[f32], &[f32]) -> Form) -> Result<Place> {
    if !weight.device().is_cpu() || cuda::is_emulated() {
        return Ok(Place::Device(cuda::PackedConv::new(weight, bias)?));
    }
    let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
    with_slice(&weight, |w| with_slice(&bias, |b| Place::Cpu(f(w, b))))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{conv2d, upsample2x};
    use crate::testing::normal;
    use candle_core::{Shape, Var};

    fn random(shape: impl Into<Shape>) -> Tensor {
        normal(0.0, 1.0, shape)
    }

    fn assert_close(a: &Tensor, b: &Tensor, what: &str) {
        assert_eq!(a.dims(), b.dims(), "{what}");
        let norm = |t: &Tensor| -> f32 {
            let sum = t.sqr().unwrap().sum_all().unwrap();
            sum.to_scalar::<f32>().unwrap().sqrt()
        };
        let off = norm(&(a - b).unwrap());
        assert!(off <= 1e-5 * norm(b), "{what}: {off} of {}", norm(b));
    }

    #[test]
    fn it_is_the_convolution() {
        for (k, stride, pad) in [
            (3, 1, [1, 0]),
            (3, 2, [0, 1]),
            (3, 2, [1, 0]),
            (1, 1, [0, 0]),
        ] {
            for (h, w, ci, co) in [(9, 12, 5, 70), (6, 33, 20, 3), (2, 2, 1, 17)] {
                let (x, weight, bias) = (random((2, h, w, ci)), random((co, ci, k, k)), random(co));
                let padded = x.pad_with_zeros(1, 0, pad[1]).unwrap();
                let padded = padded.pad_with_zeros(2, 0, pad[1]).unwrap();
                for activation in [Activation::None, Activation::Silu] {
                    let what = format!("{k} {stride} {pad:?} {h}x{w} {ci} {co} {activation:?}");
                    let want = conv2d(&padded, &weight, &bias, stride, pad[0], activation).unwrap();
                    let packed = PackedConv2d::new(&weight, &bias, stride, pad).unwrap();
                    let residual = random(want.shape());
                    let y = packed.forward(&x, None, activation).unwrap();
                    assert_close(&y, &want, &what);
                    let y = packed.forward(&x, Some(&residual), activation).unwrap();
                    assert_close(&y, &(want + residual).unwrap(), &what);
                }
            }
        }
    }

    #[test]
    fn upsampling_and_convolution_are_one() {
        for (h, w, ci, co) in [(1, 1, 3, 2), (5, 7, 4, 20), (3, 40, 17, 65)] {
            let (x, weight, bias) = (random((2, h, w, ci)), random((co, ci, 3, 3)), random(co));
            let large = upsample2x(&x).unwrap();
            let want = conv2d(&large, &weight, &bias, 1, 1, Activation::Silu).unwrap();
            let packed = PackedConv2d::upsampling(&weight, &bias).unwrap();
            let residual = random(want.shape());
            let y = packed.forward(&x, None, Activation::Silu).unwrap();
            assert_close(&y, &want, &format!("{h}x{w} {ci} {co}"));
            let y = packed
                .forward(&x, Some(&residual), Activation::Silu)
                .unwrap();
            assert_close(&y, &(want + residual).unwrap(), "with a residual");
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let (weight, bias) = (random((4, 3, 3, 3)), random(4));
        assert!(PackedConv2d::new(&weight, &random(3), 1, [1, 0]).is_err());
        assert!(PackedConv2d::new(&weight, &bias, 0, [1, 0]).is_err());
        assert!(PackedConv2d::new(&weight, &bias, 1, [2, 1]).is_err());
        assert!(PackedConv2d::upsampling(&random((4, 3, 1, 1)), &bias).is_err());
        let packed = PackedConv2d::new(&weight, &bias, 1, [1, 0]).unwrap();
        let (x, none) = (random((1, 5, 5, 3)), Activation::None);
        assert!(packed.forward(&random((1, 5, 5, 4)), None, none).is_err());
        assert!(
            packed
                .forward(&x, Some(&random((1, 5, 5, 3))), none)
                .is_err()
        );
        let tracked = Var::from_tensor(&x).unwrap();
        assert!(packed.forward(&tracked, None, none).is_err());
    }
}
