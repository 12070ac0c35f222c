//! The layers that both networks are made of.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use super::config::GROUPS;
use crate::ops::{self, Activation};

/// A square convolution that keeps the size, or halves it with `stride` 2.
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    pad: usize,
}

impl Conv {
    /// `k` x `k` with `k / 2` zeros around the input; tensors `weight` `[co, ci, k, k]` and `bias` `[co]`.
    pub fn new(ci: usize, co: usize, k: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get((co, ci, k, k), "weight")?,
            bias: vb.get(co, "bias")?,
            stride: 1,
            pad: k / 2,
        })
    }

    pub fn halving(self) -> Self {
        Self { stride: 2, ..self }
    }

    pub fn unpadded(self) -> Self {
        Self { pad: 0, ..self }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(
            x,
            &self.weight,
            &self.bias,
            self.stride,
            self.pad,
            Activation::None,
        )
    }

    /// The outputs of several convolutions of one shape one after the other, in one go.
    pub fn forward_joined(convs: &[Self; 3], x: &Tensor) -> Result<Tensor> {
        let [a, b, c] = convs;
        let weight = Tensor::cat(&[&a.weight, &b.weight, &c.weight], 0)?;
        let bias = Tensor::cat(&[&a.bias, &b.bias, &c.bias], 0)?;
        ops::conv2d(x, &weight, &bias, a.stride, a.pad, Activation::None)
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

    /// On every pixel of a map, `[n, h, w, inputs]`.
    pub fn forward_map(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        let weight = self.weight.reshape((outputs, inputs, 1, 1))?;
        ops::conv2d(x, &weight, &self.bias, 1, 0, Activation::None)
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
        candle_core::bail!("'{name}' was asked for without its shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
