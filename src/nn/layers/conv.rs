//! Square convolutions, for training or packed for inference.

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;

use crate::ops::{self, Activation, PackedConv2d};

/// A square convolution. Its output has the size of the input, half of it, or twice.
pub struct Conv {
    weights: Weights,
    kind: Kind,
}

enum Weights {
    /// `weight` `[co, ci, k, k]`, or `[co, ci]` for 1x1, and `bias` `[co]`, as in checkpoints.
    Plain(Tensor, Tensor),
    Packed(PackedConv2d),
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Pads the input so that the output has its size.
    Same,
    /// Stride 2 with `[pad, more]` zeros: `pad` on every side, `more` below and to the right.
    Halving([usize; 2]),
    /// Convolves the input upsampled by 2.
    Upsampling,
}

impl Conv {
    /// Builds a `k` x `k` convolution from tensors `weight` `[co, ci, k, k]` and `bias` `[co]`.
    pub fn new(ci: usize, co: usize, k: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((co, ci, k, k), "weight")?;
        Ok(Self::of(weight, vb.get(co, "bias")?))
    }

    /// Builds a 1x1 convolution from the tensors of a fully connected layer, `weight` `[co, ci]`.
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

    /// Joins 1x1 convolutions of one input to one, whose output is the concatenation of theirs.
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

    /// Sets stride 2 and `[pad, more]` zeros: `pad` on every side, `more` below and to the right.
    pub fn halving(self, pad: [usize; 2]) -> Self {
        let kind = Kind::Halving(pad);
        Self { kind, ..self }
    }

    /// Makes it convolve the input upsampled by 2, nearest neighbour.
    pub fn upsampling(self) -> Self {
        let kind = Kind::Upsampling;
        Self { kind, ..self }
    }

    /// Replaces the weights by weights packed for inference.
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

    /// Returns `residual` plus the convolution of `x`.
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
