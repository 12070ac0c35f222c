//! Initial weights of networks.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::random::normal;
/// Tensors by name.
pub type Tensors = HashMap<String, Tensor>;

/// Variables by name, sorted by name.
pub type Variables = Vec<(String, Var)>;

/// Power iterations of the spectral norms of a new discriminator.
pub(super) const POWER_ITERATIONS: usize = 30;

/// Returns the variables sorted by name, because the map has no order. They need seeded values,
/// because the random numbers of candle on the CPU have no seed.
pub(super) fn sorted(vars: &candle_nn::VarMap) -> Result<Variables> {
    let all = vars.data().lock();
    let all = all.map_err(|_| candle_core::Error::Msg("poisoned variables".into()))?;
    let mut variables: Variables = all.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(variables)
}

/// Sets the variables to random values of the seed, and to zero where `is_zero` holds for the name.
pub(super) fn set_random(
    variables: &Variables,
    seed: u64,
    is_zero: impl Fn(&str) -> bool,
) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let inputs = inputs(variables.iter().map(|(n, v)| (n.as_str(), v.dims())));
    for (name, var) in variables {
        let kind = match name.as_str() {
            n if is_zero(n) => Kind::Zero,
            n if n.ends_with("weight_u") || n.ends_with("weight_v") => Kind::Normal(1.0),
            _ => Kind::of(name, &inputs),
        };
        var.set(&kind.sample(var.dims(), &mut rng)?)?;
    }
    Ok(())
}

/// Distribution of initial weights.
pub(super) enum Kind {
    Zero,
    One,
    /// Normal with this standard deviation.
    Normal(f32),
    /// Uniform within plus and minus this.
    Uniform(f32),
}

/// Returns the number of inputs of each output of a layer, by the name of the layer; 1 for norms.
pub(super) fn inputs<'a>(
    shapes: impl Iterator<Item = (&'a str, &'a [usize])>,
) -> HashMap<String, usize> {
    let weights = shapes.filter_map(|(name, shape)| {
        let layer = name.strip_suffix(".weight_orig");
        let layer = layer.or_else(|| name.strip_suffix(".weight"))?;
        Some((layer.to_string(), shape.iter().skip(1).product()))
    });
    weights.collect()
}

impl Kind {
    /// Returns the distribution of PyTorch: uniform within `1 / sqrt(inputs)` for weights and
    /// biases, 1 and 0 for those of norms.
    pub(super) fn of(name: &str, inputs: &HashMap<String, usize>) -> Self {
        let (layer, what) = name.rsplit_once('.').unwrap_or(("", name));
        match (inputs.get(layer), what) {
            (Some(&n), _) if n > 1 => Self::Uniform((n as f32).sqrt().recip()),
            (_, "weight") => Self::One,
            _ => Self::Zero,
        }
    }

    pub(super) fn sample(&self, shape: &[usize], rng: &mut StdRng) -> Result<Tensor> {
        let values = (0..shape.iter().product()).map(|_| match self {
            Self::Zero => 0.0,
            Self::One => 1.0,
            Self::Normal(std) => std * normal(rng),
            Self::Uniform(max) => rng.random_range(-max..=*max),
        });
        Tensor::from_vec(values.collect::<Vec<f32>>(), shape, &Device::Cpu)
    }
}
