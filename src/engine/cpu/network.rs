//! A student's layers on one grid.

use crate::{
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
    pub fn new(model: &LiteModel, scale: f64, grid: Grid) -> Self {
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
        Self {
            layers: layers.collect(),
            maps: [Vec::new(), Vec::new(), Vec::new()],
        }
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
