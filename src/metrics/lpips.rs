//! LPIPS with the SqueezeNet 1.1 backbone (Zhang, Isola, Efros, Shechtman, Wang 2018).

use std::{collections::HashMap, path::Path};

use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

use super::Picture;
use crate::{
    Error, Result,
    ops::{Activation, conv2d},
};

/// Minimum side of a picture in pixels. Below it the deepest features are empty.
const MIN_SIDE: usize = 32;

/// Index, squeeze width and expand width (of each half) of the fire modules.
const FIRES: [(usize, usize, usize); 8] = [
    (3, 16, 64),
    (4, 16, 64),
    (6, 32, 128),
    (7, 32, 128),
    (9, 48, 192),
    (10, 48, 192),
    (11, 64, 256),
    (12, 64, 256),
];

/// Fire modules after a max pooling, and fire modules whose output is compared.
const POOL_BEFORE: [usize; 3] = [3, 6, 9];
const TAPS: [usize; 6] = [4, 7, 9, 10, 11, 12];

/// The LPIPS distance: lower is more similar, 0 for equal pictures.
#[derive(Clone)]
pub struct Lpips {
    stem: Conv,
    fires: Vec<Fire>,
    /// Weights of the channels of each compared map.
    heads: Vec<Vec<f32>>,
    shift: Tensor,
    scale: Tensor,
}

/// Features of a picture that [`Lpips`] compares.
pub struct LpipsFeatures {
    size: (usize, usize),
    /// Maps with the channels innermost, scaled to unit length.
    taps: Vec<Vec<f32>>,
}

#[derive(Clone)]
struct Conv {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

#[derive(Clone)]
struct Fire {
    index: usize,
    squeeze: Conv,
    expand1x1: Conv,
    expand3x3: Conv,
}

impl Lpips {
    /// Loads backbone and heads from a safetensors file. Its names are
    /// `features.N[.squeeze|.expand1x1|.expand3x3].{weight,bias}` of torchvision's squeezenet1_1
    /// and `linK.model.1.weight` for the seven heads.
    ///
    /// # Errors
    /// [`Error::Model`] if the file cannot be read, a tensor is missing or has another shape.
    pub fn load(path: &Path) -> Result<Self> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)
            .map_err(|e| Error::model(path, e.to_string()))?;
        Self::from_tensors(&tensors).map_err(|reason| Error::model(path, reason))
    }

    fn from_tensors(tensors: &HashMap<String, Tensor>) -> Result<Self, String> {
        let stem = Conv::new(tensors, "features.0", [64, 3, 3, 3], 2, 0)?;
        let (mut fires, mut heads) = (Vec::new(), vec![head(tensors, 0, 64)?]);
        let mut channels = 64;
        for (index, squeeze, expand) in FIRES {
            let at = |part, shape, padding| {
                Conv::new(
                    tensors,
                    &format!("features.{index}.{part}"),
                    shape,
                    1,
                    padding,
                )
            };
            fires.push(Fire {
                index,
                squeeze: at("squeeze", [squeeze, channels, 1, 1], 0)?,
                expand1x1: at("expand1x1", [expand, squeeze, 1, 1], 0)?,
                expand3x3: at("expand3x3", [expand, squeeze, 3, 3], 1)?,
            });
            channels = 2 * expand;
            if TAPS.contains(&index) {
                heads.push(head(tensors, heads.len(), channels)?);
            }
        }
        // The published normalisation of inputs in -1..1.
        let constant = |v: [f32; 3]| Tensor::new(&v, &Device::Cpu).map_err(|e| e.to_string());
        Ok(Self {
            stem,
            fires,
            heads,
            shift: constant([-0.030, -0.088, -0.188])?,
            scale: constant([0.458, 0.448, 0.450])?,
        })
    }

    /// Returns the features of `picture`, for comparison with several others.
    ///
    /// # Errors
    /// [`Error::Frame`] if a side is below 32 pixels.
    pub fn features(&self, picture: &Picture) -> Result<LpipsFeatures> {
        let size = (picture.width(), picture.height());
        if size.0.min(size.1) < MIN_SIDE {
            return Err(Error::Frame(format!(
                "LPIPS requires pictures of at least {MIN_SIDE}x{MIN_SIDE} pixels, not {}x{}",
                size.0, size.1
            )));
        }
        let taps = self.taps(picture)?;
        Ok(LpipsFeatures { size, taps })
    }

    /// Returns the distance of two pictures from their features.
    ///
    /// # Errors
    /// [`Error::Frame`] if the pictures differ in size.
    pub fn distance(&self, a: &LpipsFeatures, b: &LpipsFeatures) -> Result<f64> {
        if a.size != b.size {
            let ((aw, ah), (bw, bh)) = (a.size, b.size);
            return Err(Error::Frame(format!(
                "pictures of {aw}x{ah} and {bw}x{bh} pixels cannot be compared"
            )));
        }
        let taps = a.taps.iter().zip(&b.taps).zip(&self.heads);
        Ok(taps.map(|((a, b), head)| distance(a, b, head)).sum())
    }

    /// Returns the compared feature maps with the channels innermost.
    fn taps(&self, picture: &Picture) -> candle_core::Result<Vec<Vec<f32>>> {
        let shape = (1, picture.height(), picture.width(), 3);
        let input = Tensor::from_slice(picture.rgb(), shape, &Device::Cpu)?
            .to_dtype(DType::F32)?
            .affine(2.0 / 255.0, -1.0)?;
        let input = input
            .broadcast_sub(&self.shift)?
            .broadcast_div(&self.scale)?;
        let mut x = self.stem.forward(&input)?;
        let mut taps = vec![unit(&x)?];
        for fire in &self.fires {
            if POOL_BEFORE.contains(&fire.index) {
                x = pool(&x)?;
            }
            x = fire.forward(&x)?;
            if TAPS.contains(&fire.index) {
                taps.push(unit(&x)?);
            }
        }
        Ok(taps)
    }
}

impl Conv {
    fn new(
        tensors: &HashMap<String, Tensor>,
        name: &str,
        shape: [usize; 4],
        stride: usize,
        padding: usize,
    ) -> Result<Self, String> {
        Ok(Self {
            weight: tensor(tensors, &format!("{name}.weight"), &shape)?,
            bias: tensor(tensors, &format!("{name}.bias"), &shape[..1])?,
            stride,
            padding,
        })
    }

    /// Applies the convolution and a ReLU, as in the whole network.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let relu = Activation::LeakyRelu(0.0);
        conv2d(x, &self.weight, &self.bias, self.stride, self.padding, relu)
    }
}

impl Fire {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.squeeze.forward(x)?;
        Tensor::cat(
            &[self.expand1x1.forward(&x)?, self.expand3x3.forward(&x)?],
            3,
        )
    }
}

/// Applies max pooling 3x3 with stride 2. The last window may exceed the edge.
fn pool(x: &Tensor) -> candle_core::Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let (oh, ow) = (pooled(h), pooled(w));
    let mut out = vec![f32::NEG_INFINITY; n * oh * ow * c];
    let rows = out.par_chunks_exact_mut((ow * c).max(1)).enumerate();
    rows.for_each(|(row, out)| {
        let (image, oy) = (row / oh, row % oh);
        for y in 2 * oy..(2 * oy + 3).min(h) {
            let line = &values[(image * h + y) * w * c..][..w * c];
            for (ox, out) in out.chunks_exact_mut(c).enumerate() {
                for cell in line.chunks_exact(c).take(2 * ox + 3).skip(2 * ox) {
                    for (o, v) in out.iter_mut().zip(cell) {
                        *o = o.max(*v);
                    }
                }
            }
        }
    });
    Tensor::from_vec(out, (n, oh, ow, c), x.device())
}

/// Returns the output length of [`pool`] for `len`, at least 2.
fn pooled(len: usize) -> usize {
    len.saturating_sub(3).div_ceil(2) + 1
}

/// Scales the channels at each position to unit length.
fn unit(x: &Tensor) -> candle_core::Result<Vec<f32>> {
    let channels = x.dim(D::Minus1)?;
    let mut values = x.flatten_all()?.to_vec1::<f32>()?;
    values.par_chunks_exact_mut(channels).for_each(|cell| {
        let length = cell.iter().map(|v| v * v).sum::<f32>().sqrt() + 1e-10;
        cell.iter_mut().for_each(|v| *v /= length);
    });
    Ok(values)
}

/// Returns the weighted sum of squared differences, averaged over all positions.
fn distance(a: &[f32], b: &[f32], head: &[f32]) -> f64 {
    let square = |((a, b), k): ((&f32, &f32), &f32)| (a - b) * (a - b) * k;
    let squared = |(a, b): (&[f32], &[f32])| {
        let sum: f32 = a.iter().zip(b).zip(head).map(square).sum();
        f64::from(sum)
    };
    let channels = head.len();
    let positions = a.chunks_exact(channels).zip(b.chunks_exact(channels));
    positions.map(squared).sum::<f64>() / (a.len() / channels) as f64
}

fn head(
    tensors: &HashMap<String, Tensor>,
    index: usize,
    channels: usize,
) -> Result<Vec<f32>, String> {
    let name = format!("lin{index}.model.1.weight");
    let weight = tensor(tensors, &name, &[1, channels, 1, 1])?;
    let values = weight.flatten_all().and_then(|w| w.to_vec1());
    values.map_err(|e| e.to_string())
}

fn tensor(
    tensors: &HashMap<String, Tensor>,
    name: &str,
    shape: &[usize],
) -> Result<Tensor, String> {
    let t = tensors.get(name).ok_or_else(|| {
        format!("tensor '{name}' is missing: these are not LPIPS-squeeze weights")
    })?;
    if t.dims() != shape {
        return Err(format!(
            "tensor '{name}' has shape {:?}, not {shape:?}",
            t.dims()
        ));
    }
    t.to_dtype(DType::F32).map_err(|e| e.to_string())
}
