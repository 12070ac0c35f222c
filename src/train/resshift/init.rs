//! Initial weights of the ResShift family, and its discriminator in training.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    nn::resshift::{Discriminator, DiscriminatorConfig},
    train::{
        adversary::FeatureDiscriminator,
        init::{Kind, POWER_ITERATIONS, Tensors, Variables, inputs, set_random, sorted},
    },
};

/// Returns the variables of a U-Net with the tensors `shapes` (name and shape). A tensor of the
/// same name and shape in `like` is copied. All others are random, from the distributions of the
/// released code, with a seed.
///
/// # Errors
/// When a tensor cannot be made.
pub fn unet(
    shapes: &[(String, Vec<usize>)],
    like: &Tensors,
    seed: u64,
    device: &Device,
) -> Result<Variables> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut shapes = shapes.to_vec();
    shapes.sort();
    let inputs = inputs(shapes.iter().map(|(n, s)| (n.as_str(), s.as_slice())));
    let variable = |(name, shape): &(String, Vec<usize>)| {
        let of_teacher = like.get(name).filter(|t| t.dims() == shape);
        let value = match of_teacher {
            Some(t) => t.to_dtype(DType::F32)?.copy()?,
            None => {
                let zero = name.contains("out_layers.3.") || name.starts_with("out.2.");
                let kind = match name.as_str() {
                    _ if zero => Kind::Zero,
                    n if n.ends_with("relative_position_bias_table") => Kind::Normal(0.02),
                    _ => Kind::of(name, &inputs),
                };
                kind.sample(shape, &mut rng)?
            }
        };
        Ok((name.clone(), Var::from_tensor(&value.to_device(device)?)?))
    };
    shapes.iter().map(variable).collect()
}

/// Creates a discriminator and its variables, including the vectors of the spectral norms. The
/// first convolution of each branch is zero, so at first the features have no effect.
///
/// # Errors
/// As [`Discriminator::new`].
pub fn discriminator(
    config: &DiscriminatorConfig,
    seed: u64,
    device: &Device,
) -> Result<(Discriminator, Variables)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Discriminator::new(config, vb)?;
    let variables = sorted(&vars)?;
    set_random(&variables, seed, |name| name.starts_with("conv."))?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((made, variables))
}

/// All logits have the same weight, as in the released code.
impl FeatureDiscriminator for Discriminator {
    fn heads(&self, features: &[Tensor], t: &[usize]) -> Result<Vec<Tensor>> {
        Ok(vec![self.forward(features, t)?])
    }

    fn power_iteration(&self) -> Result<()> {
        Self::power_iteration(self)
    }

    fn frozen(&self) -> Self {
        Self::frozen(self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::testing::normal;

    fn mean_square(t: &Tensor) -> f32 {
        let mean = t.sqr().unwrap().mean_all().unwrap();
        mean.to_scalar().unwrap()
    }

    #[test]
    fn tensors_of_the_same_name_and_shape_are_copied_and_the_rest_is_random() {
        let shape = |name: &str, s: &[usize]| (name.to_string(), s.to_vec());
        let shapes = [
            shape("a.weight", &[8, 50, 3, 3]),
            shape("b.weight", &[8]),
            shape("b.bias", &[8]),
            shape("c.out_layers.3.weight", &[4, 4, 3, 3]),
            shape("d.weight", &[4, 4]),
        ];
        let d = Tensor::new(&[[7f32; 4]; 4], &Device::Cpu).unwrap();
        let like = HashMap::from([
            ("d.weight".to_string(), d.clone()),
            ("b.bias".to_string(), d),
        ]);
        let made: HashMap<_, _> = unet(&shapes, &like, 1, &Device::Cpu)
            .unwrap()
            .into_iter()
            .collect();
        // The mean square of a uniform number within 1/sqrt(450) is a third of 1/450.
        assert!((mean_square(&made["a.weight"]) * 1350.0 - 1.0).abs() < 0.1);
        assert_eq!(made["b.weight"].to_vec1::<f32>().unwrap(), [1.0; 8]);
        assert_eq!(made["b.bias"].to_vec1::<f32>().unwrap(), [0.0; 8]);
        assert_eq!(mean_square(&made["c.out_layers.3.weight"]), 0.0);
        assert_eq!(mean_square(&made["d.weight"]), 49.0);
        let again: HashMap<_, _> = unet(&shapes, &like, 1, &Device::Cpu)
            .unwrap()
            .into_iter()
            .collect();
        let apart = (made["a.weight"].as_tensor() - again["a.weight"].as_tensor()).unwrap();
        assert_eq!(mean_square(&apart), 0.0);
    }

    #[test]
    fn a_new_discriminator_returns_the_same_for_all_features() {
        let config = DiscriminatorConfig::new(vec![32, 64], 8);
        let (d, variables) = discriminator(&config, 3, &Device::Cpu).unwrap();
        let map = |c, std| normal(0.0, std, (1, 4, 4, c));
        let judge = |std| d.forward(&[map(32, std), map(64, std)], &[2]).unwrap();
        let apart = (judge(1.0) - judge(5.0)).unwrap();
        assert_eq!(mean_square(&apart), 0.0);
        assert!(mean_square(&judge(1.0)) > 0.0);
        assert!(
            variables
                .iter()
                .any(|(name, _)| name == "head.1.cls.weight_u")
        );
    }
}
