//! The layers that both networks are made of.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use super::config::GROUPS;
use crate::ops::{self, Activation, PackedConv2d};

/// A square convolution that keeps the size, halves it, or follows an upsampling.
pub(super) struct Conv {
    weights: Weights,
    kind: Kind,
}

enum Weights {
    /// `weight` `[co, ci, k, k]`, or `[co, ci]` for 1x1, and `bias` `[co]`, as the checkpoints have them.
    Plain(Tensor, Tensor),
    Packed(PackedConv2d),
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// With as many zeros around the input as keep its size.
    Same,
    /// Stride 2 with `[pad, more]` zeros: `pad` all around, `more` below and to the right.
    Halving([usize; 2]),
    /// Of the input upsampled twofold.
    Upsampling,
}

impl Conv {
    /// `k` x `k`; tensors `weight` `[co, ci, k, k]` and `bias` `[co]`.
    pub fn new(ci: usize, co: usize, k: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((co, ci, k, k), "weight")?;
        Ok(Self::of(weight, vb.get(co, "bias")?))
    }

    /// 1x1 from the tensors of a fully connected layer: `weight` `[co, ci]`.
    pub fn linear(ci: usize, co: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((co, ci), "weight")?;
        Ok(Self::of(weight, vb.get(co, "bias")?))
    }

    fn of(weight: Tensor, bias: Tensor) -> Self {
        Self {
            weights: Weights::Plain(weight, bias),
            kind: Kind::Same,
        }
    }

    /// Several 1x1 convolutions of one input as one: their outputs one after the other.
    pub fn joined(convs: &[Self]) -> Result<Self> {
        let parts = convs.iter().map(|conv| match &conv.weights {
            Weights::Plain(weight, bias) => Ok((weight, bias)),
            Weights::Packed(_) => bail!("packed convolutions cannot be joined"),
        });
        let (weights, biases): (Vec<_>, Vec<_>) =
            parts.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        Ok(Self::of(
            Tensor::cat(&weights, 0)?,
            Tensor::cat(&biases, 0)?,
        ))
    }

    /// With stride 2 and `[pad, more]` zeros: `pad` all around, `more` below and to the right.
    pub fn halving(self, pad: [usize; 2]) -> Self {
        let kind = Kind::Halving(pad);
        Self { kind, ..self }
    }

    /// Of the input upsampled twofold to the nearest pixel.
    pub fn upsampling(self) -> Self {
        let kind = Kind::Upsampling;
        Self { kind, ..self }
    }

    /// Arranges the weights for inference, in place of those that can be trained.
    pub fn pack(&mut self) -> Result<()> {
        if let Weights::Plain(weight, bias) = &self.weights {
            let weight = four_dimensions(weight)?;
            let k = weight.dim(2)?;
            self.weights = Weights::Packed(match self.kind {
                Kind::Same => PackedConv2d::new(&weight, bias, 1, [k / 2, 0])?,
                Kind::Halving(pad) => PackedConv2d::new(&weight, bias, 2, pad)?,
                Kind::Upsampling => PackedConv2d::upsampling(&weight, bias)?,
            });
        }
        Ok(())
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = match &self.weights {
            Weights::Plain(weight, bias) => (four_dimensions(weight)?, bias),
            Weights::Packed(conv) => return conv.forward(x, None, Activation::None),
        };
        let conv = |x: &Tensor, stride: usize, pad: usize| {
            ops::conv2d(x, &weight, bias, stride, pad, Activation::None)
        };
        match self.kind {
            Kind::Same => conv(x, 1, weight.dim(2)? / 2),
            Kind::Halving([pad, 0]) => conv(x, 2, pad),
            Kind::Halving([pad, more]) => {
                let x = x.pad_with_zeros(1, 0, more)?.pad_with_zeros(2, 0, more)?;
                conv(&x, 2, pad)
            }
            Kind::Upsampling => ops::upsample2x_conv2d(x, &weight, bias),
        }
    }

    /// `residual` plus the convolution of `x`.
    pub fn forward_onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        match &self.weights {
            Weights::Plain(..) => ops::add(residual, &self.forward(x)?),
            Weights::Packed(conv) => conv.forward(x, Some(residual), Activation::None),
        }
    }
}

fn four_dimensions(weight: &Tensor) -> Result<Tensor> {
    match *weight.dims() {
        [co, ci] => weight.reshape((co, ci, 1, 1)),
        _ => Ok(weight.clone()),
    }
}

/// A fully connected layer: `weight` `[outputs, inputs]`, `bias` `[outputs]`.
pub(super) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    pub fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get((outputs, inputs), "weight")?,
            bias: vb.get(outputs, "bias")?,
        })
    }

    pub fn device(&self) -> &Device {
        self.weight.device()
    }

    /// On vectors, `[n, inputs]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }
}

/// Group norm with [`GROUPS`] groups.
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    pub fn new(channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get(channels, "weight")?,
            bias: vb.get(channels, "bias")?,
            eps,
        })
    }

    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        ops::group_norm(x, GROUPS, &self.weight, &self.bias, self.eps, activation)
    }

    /// Multiplies the normalised map by `1 + scale` and adds `shift`, both `[n, c]`, before the activation.
    pub fn forward_modulated(
        &self,
        x: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        activation: Activation,
    ) -> Result<Tensor> {
        let scale = (scale + 1.0)?;
        let weight = scale.broadcast_mul(&self.weight)?;
        let bias = (scale.broadcast_mul(&self.bias)? + shift)?;
        ops::group_norm(x, GROUPS, &weight, &bias, self.eps, activation)
    }
}

/// Names of tensors with their shapes.
type Shapes = Vec<(String, Vec<usize>)>;

/// The name and shape of every tensor that `build` asks of its [`VarBuilder`], in the order of asking.
pub(super) fn record(build: impl FnOnce(VarBuilder)) -> Shapes {
    let names = Arc::new(Mutex::new(Shapes::new()));
    let recorder = Recorder(names.clone());
    build(VarBuilder::from_backend(
        Box::new(recorder),
        DType::F32,
        Device::Cpu,
    ));
    let mut names = names.lock().unwrap_or_else(|e| e.into_inner());
    std::mem::take(&mut *names)
}

/// Gives zeros that take no memory, whatever their shape, and notes what was asked for.
struct Recorder(Arc<Mutex<Shapes>>);

impl SimpleBackend for Recorder {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        let mut names = self.0.lock().unwrap_or_else(|e| e.into_inner());
        names.push((name.to_owned(), s.dims().to_vec()));
        Tensor::zeros((), dtype, dev)?.broadcast_as(s)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("'{name}' was asked for without its shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
