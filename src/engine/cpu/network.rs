//! A student's layers on one grid.

use crate::{
    Error, Result,
    model::LiteModel,
    nn::lite::{Activated, LEAKY_SLOPE, Role, latent::Grid},
    ops::{
        Activation,
        cpu::{
            Isa,
            conv::{ConvShape, PackedConv},
        },
    },
};

/// `len` zeros.
///
/// # Errors
/// [`Error::Memory`] when there is not enough memory.
pub(super) fn zeros(len: usize) -> Result<Vec<f32>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| {
        let mib = (len >> 18) + 1;
        Error::Memory(format!("no {mib} MiB of memory for frames of this size"))
    })?;
    zeros.resize(len, 0.0);
    Ok(zeros)
}

/// The layers of a student with packed weights, the scale folded into the biases, and their feature maps.
pub(super) struct Network {
    layers: Vec<PackedLayer>,
    /// Feature maps: the current one, the next one, and the one that a residual pair keeps.
    maps: [Vec<f32>; 3],
}

struct PackedLayer {
    shape: ConvShape,
    conv: PackedConv,
    activation: Activation,
    role: Role,
}

impl Network {
    /// # Errors
    /// [`Error::Memory`] when the feature maps do not fit in memory.
    pub fn new(model: &LiteModel, scale: f64, grid: Grid) -> Result<Self> {
        let student = &model.metadata.student;
        let layers = model.layers.iter().map(|layer| {
            let shape = ConvShape {
                n: 1,
                h: grid.height,
                w: grid.width,
                ci: layer.spec.ci,
                co: layer.spec.co,
                kh: 3,
                kw: 3,
                stride: 1,
                pad: 1,
            };
            let bias = layer.bias_at(scale, student.r);
            PackedLayer {
                conv: PackedConv::new(&shape, &layer.weight, Some(&bias), Isa::best()),
                activation: match layer.spec.activated {
                    Activated::Leaky => Activation::LeakyRelu(LEAKY_SLOPE),
                    Activated::No => Activation::None,
                },
                role: layer.spec.role,
                shape,
            }
        });
        let layers: Vec<_> = layers.collect();
        let widest = layers.iter().map(|l| l.shape.co).max().unwrap_or(0);
        let map = || zeros(grid.width * grid.height * widest);
        let pairs = layers.iter().any(|l| l.role == Role::PairFirst);
        let kept = if pairs { map()? } else { Vec::new() };
        Ok(Self {
            layers,
            maps: [map()?, map()?, kept],
        })
    }

    /// The whitened residual of the whitened latent `z`.
    pub fn run(&mut self, z: &[f32]) -> &[f32] {
        let [now, next, kept] = &mut self.maps;
        for (i, layer) in self.layers.iter().enumerate() {
            let s = &layer.shape;
            next.resize(s.h * s.w * s.co, 0.0);
            let input = if i == 0 { z } else { &now[..] };
            layer.conv.forward(s, input, layer.activation, next);
            match layer.role {
                Role::Chain => std::mem::swap(now, next),
                Role::PairFirst => {
                    std::mem::swap(now, kept);
                    std::mem::swap(now, next);
                }
                Role::PairSecond => {
                    for (y, x) in next.iter_mut().zip(kept.iter()) {
                        *y += x;
                    }
                    std::mem::swap(now, next);
                }
            }
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Layer, Metadata},
        nn::lite::{LatentStats, StudentConfig},
    };
    use candle_core::{Device, Tensor};

    /// A model of `student` with weights that keep the signal's size.
    fn model(student: StudentConfig) -> LiteModel {
        let mut state = 1u32;
        let mut values = |n: usize, size: f32| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
            };
            (0..n).map(|_| next()).collect()
        };
        LiteModel {
            metadata: Metadata::lite("test", student, [1.0, 4.0]),
            stats: LatentStats::nominal(student.latent, student.r),
            layers: student
                .layers()
                .into_iter()
                .map(|spec| Layer {
                    weight: values(spec.co * spec.ci * 9, (0.5 / spec.ci as f32).sqrt()),
                    bias: values(spec.co, 0.1),
                    scale: values(spec.co * 2, 0.1),
                    spec,
                })
                .collect(),
        }
    }

    #[test]
    fn the_plan_computes_what_the_trained_network_does() {
        for (student, scale) in [
            (StudentConfig::tiny(2), 1.5),
            (StudentConfig::tiny(4), 3.0),
            (StudentConfig::small(), 4.0),
        ] {
            let model = model(student);
            let grid = Grid {
                width: 13,
                height: 9,
                channels: student.latent.channels(student.r),
                margin: 0,
            };
            let z: Vec<f32> = (0..grid.len()).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut network = Network::new(&model, scale, grid).unwrap();
            let ours = network.run(&z).to_vec();
            let shape = (1, grid.height, grid.width, grid.channels);
            let z = Tensor::from_vec(z, shape, &Device::Cpu).unwrap();
            let theirs = model.student().unwrap().forward(&z, scale).unwrap();
            let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let size = theirs.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(size > 0.01, "a network that does nothing proves nothing");
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() < 1e-4 * size, "{student:?}: {a}, not {b}");
            }
            assert_eq!(network.run(&vec![0.0; grid.len()]).len(), grid.len());
        }
    }
}
