//! Weights of networks before training.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::degrade::normal;
use crate::nn::{
    lite::{self, Teacher, TeacherConfig},
    resshift::{Discriminator, DiscriminatorConfig},
};

/// Tensors by name.
pub type Tensors = HashMap<String, Tensor>;

/// Variables by name, in the names' order.
pub type Variables = Vec<(String, Var)>;

/// Power iterations that a new discriminator's spectral norms begin with.
const POWER_ITERATIONS: usize = 30;

/// The variables of a U-Net with the tensors `shapes` (name and shape): from `like` where that has a tensor of the name
/// and shape; else as the published code draws them, but seeded.
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
                kind.draw(shape, &mut rng)?
            }
        };
        Ok((name.clone(), Var::from_tensor(&value.to_device(device)?)?))
    };
    shapes.iter().map(variable).collect()
}

/// A new discriminator and its variables, the spectral norms' vectors among them. The first convolution of each branch
/// is zero: at first it sees nothing of its features.
///
/// # Errors
/// As [`Discriminator::new`].
pub fn discriminator(
    config: &DiscriminatorConfig,
    seed: u64,
    device: &Device,
) -> Result<(Discriminator, Variables)> {
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Discriminator::new(config, vb)?;
    let variables = sorted(&vars)?;
    draw(&variables, seed, |name| name.starts_with("conv."))?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((made, variables))
}

/// A new teacher of the lite family and its variables. The second convolution of each block and the last of all are zero:
/// at first it predicts no residual.
///
/// # Errors
/// As [`Teacher::new`].
pub fn teacher(config: &TeacherConfig, seed: u64, device: &Device) -> Result<(Teacher, Variables)> {
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = Teacher::new(config.clone(), vb)?;
    let variables = sorted(&vars)?;
    draw(&variables, seed, |name| {
        name.ends_with("conv2.weight") || name.starts_with("tail.")
    })?;
    Ok((made, variables))
}

/// A new discriminator for the lite family's teacher and its variables, the spectral norms' vectors among them.
///
/// # Errors
/// As [`lite::Discriminator::new`].
pub fn lite_discriminator(
    config: &lite::DiscriminatorConfig,
    seed: u64,
    device: &Device,
) -> Result<(lite::Discriminator, Variables)> {
    let vars = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let made = lite::Discriminator::new(config.clone(), vb)?;
    let variables = sorted(&vars)?;
    draw(&variables, seed, |_| false)?;
    for _ in 0..POWER_ITERATIONS {
        made.power_iteration()?;
    }
    Ok((made, variables))
}

/// The variables in their names' order: the map has none of its own, and candle's CPU random numbers no seed.
pub(super) fn sorted(vars: &candle_nn::VarMap) -> Result<Variables> {
    let all = vars.data().lock();
    let all = all.map_err(|_| candle_core::Error::Msg("poisoned variables".into()))?;
    let mut variables: Variables = all.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(variables)
}

fn draw(variables: &Variables, seed: u64, is_zero: impl Fn(&str) -> bool) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let inputs = inputs(variables.iter().map(|(n, v)| (n.as_str(), v.dims())));
    for (name, var) in variables {
        let kind = match name.as_str() {
            n if is_zero(n) => Kind::Zero,
            n if n.ends_with("weight_u") || n.ends_with("weight_v") => Kind::Normal(1.0),
            _ => Kind::of(name, &inputs),
        };
        var.set(&kind.draw(var.dims(), &mut rng)?)?;
    }
    Ok(())
}

/// A distribution of initial weights.
enum Kind {
    Zero,
    One,
    /// Of this standard deviation.
    Normal(f32),
    /// Within plus and minus this.
    Uniform(f32),
}

/// How many numbers each output of a layer is a sum of, by the layer's name; 1 for norms.
fn inputs<'a>(shapes: impl Iterator<Item = (&'a str, &'a [usize])>) -> HashMap<String, usize> {
    let weights = shapes.filter_map(|(name, shape)| {
        let layer = name.strip_suffix(".weight_orig");
        let layer = layer.or_else(|| name.strip_suffix(".weight"))?;
        Some((layer.to_string(), shape.iter().skip(1).product()))
    });
    weights.collect()
}

impl Kind {
    /// PyTorch's bound `1 / sqrt(inputs)` for weights and biases, and 1 and 0 for those of norms.
    fn of(name: &str, inputs: &HashMap<String, usize>) -> Self {
        let (layer, what) = name.rsplit_once('.').unwrap_or(("", name));
        match (inputs.get(layer), what) {
            (Some(&n), _) if n > 1 => Self::Uniform((n as f32).sqrt().recip()),
            (_, "weight") => Self::One,
            _ => Self::Zero,
        }
    }

    fn draw(&self, shape: &[usize], rng: &mut StdRng) -> Result<Tensor> {
        let values = (0..shape.iter().product()).map(|_| match self {
            Self::Zero => 0.0,
            Self::One => 1.0,
            Self::Normal(std) => std * normal(rng),
            Self::Uniform(most) => rng.random_range(-most..=*most),
        });
        Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_square(t: &Tensor) -> f32 {
        let mean = t.sqr().unwrap().mean_all().unwrap();
        mean.to_scalar().unwrap()
    }

    #[test]
    fn tensors_of_the_same_name_and_shape_are_taken_over_and_the_rest_is_drawn() {
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
        // A uniform number within 1/sqrt(450) has a third of 1/450 as mean square.
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
    fn a_new_discriminator_says_the_same_of_everything() {
        let config = DiscriminatorConfig::new(vec![32, 64], 8);
        let (d, variables) = discriminator(&config, 3, &Device::Cpu).unwrap();
        let map = |c, std| Tensor::randn(0f32, std, (1, 4, 4, c), &Device::Cpu).unwrap();
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
