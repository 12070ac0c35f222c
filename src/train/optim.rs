//! AdamW and the exponential moving average of the weights, with state that can be saved.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor, Var, backprop::GradStore};

/// A named parameter.
pub type Parameter = (String, Var);

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with bias correction.
pub struct AdamW {
    parameters: Vec<Parameter>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    /// Steps taken.
    step: u64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl AdamW {
    /// An optimiser of `parameters` with beta (0.9, 0.99), eps 1e-8 and no weight decay.
    ///
    /// # Errors
    /// When memory for the moments cannot be had.
    pub fn new(parameters: Vec<Parameter>) -> Result<Self> {
        let zeros = |(_, v): &Parameter| v.zeros_like();
        Ok(Self {
            first: parameters.iter().map(zeros).collect::<Result<_>>()?,
            second: parameters.iter().map(zeros).collect::<Result<_>>()?,
            parameters,
            step: 0,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.0,
        })
    }

    /// Moves every parameter that has a gradient by one step of learning rate `lr`.
    ///
    /// # Errors
    /// When a gradient's shape is not its parameter's.
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> Result<()> {
        self.step_scaled(grads, lr, 1.0)
    }

    /// As [`Self::step`], with the gradients times `scale`.
    fn step_scaled(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        self.step += 1;
        let correct1 = 1.0 - self.beta1.powf(self.step as f64);
        let correct2 = 1.0 - self.beta2.powf(self.step as f64);
        for (i, (_, var)) in self.parameters.iter().enumerate() {
            let Some(g) = grads.get(var) else { continue };
            // A gradient may carry its own history; the moments must not keep it alive.
            let g = (g.detach() * scale)?;
            self.first[i] = ((&self.first[i] * self.beta1)? + (&g * (1.0 - self.beta1))?)?;
            self.second[i] = ((&self.second[i] * self.beta2)? + (g.sqr()? * (1.0 - self.beta2))?)?;
            let denominator = ((&self.second[i] / correct2)?.sqrt()? + self.eps)?;
            let update = ((&self.first[i] / correct1)? / denominator)?;
            let decayed = (var.as_tensor() * (1.0 - lr * self.weight_decay))?;
            var.set(&(decayed - (update * lr)?)?.detach())?;
        }
        Ok(())
    }

    /// The moments by name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let named = |kind: &str, tensors: &[Tensor]| {
            let pair =
                |((name, _), t): (&Parameter, &Tensor)| (format!("{kind}.{name}"), t.clone());
            self.parameters
                .iter()
                .zip(tensors)
                .map(pair)
                .collect::<Vec<_>>()
        };
        let mut all = named("adam.first", &self.first);
        all.extend(named("adam.second", &self.second));
        all
    }

    /// Takes back what [`Self::state`] gave after `step` steps.
    ///
    /// # Errors
    /// When `get` does.
    pub fn restore(&mut self, step: u64, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        for (i, (name, _)) in self.parameters.iter().enumerate() {
            self.first[i] = get(&format!("adam.first.{name}"))?;
            self.second[i] = get(&format!("adam.second.{name}"))?;
        }
        self.step = step;
        Ok(())
    }
}

/// The exponential moving average of parameters: `average += (1 - decay) (value - average)`.
pub struct Ema {
    parameters: Vec<Parameter>,
    averages: Vec<Tensor>,
    decay: f64,
}

impl Ema {
    /// Averages that start at the parameters' values.
    ///
    /// # Errors
    /// When memory for the averages cannot be had.
    pub fn new(parameters: Vec<Parameter>, decay: f64) -> Result<Self> {
        let copy = |(_, v): &Parameter| v.as_tensor().copy().map(|t| t.detach());
        Ok(Self {
            averages: parameters.iter().map(copy).collect::<Result<_>>()?,
            parameters,
            decay,
        })
    }

    /// Moves the averages after step `step` (from 1): young averages follow faster, by `decay = min(decay,
    /// step / (step + 10))`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn update(&mut self, step: u64) -> Result<()> {
        let decay = self.decay.min(step as f64 / (step as f64 + 10.0));
        for (average, (_, var)) in self.averages.iter_mut().zip(&self.parameters) {
            *average = ((&*average * decay)? + (var.as_tensor() * (1.0 - decay))?)?.detach();
        }
        Ok(())
    }

    /// The averages by the parameters' names.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let pair = |((name, _), t): (&Parameter, &Tensor)| (name.clone(), t.clone());
        self.parameters
            .iter()
            .zip(&self.averages)
            .map(pair)
            .collect()
    }

    /// Takes back what [`Self::state`] gave.
    ///
    /// # Errors
    /// When `get` does.
    pub fn restore(&mut self, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        for (average, (name, _)) in self.averages.iter_mut().zip(&self.parameters) {
            *average = get(name)?;
        }
        Ok(())
    }
}

/// A network in training: its parameters, their optimiser and their averages.
pub struct Trained {
    parameters: Vec<Parameter>,
    adam: AdamW,
    ema: Ema,
    /// How many times its running mean a gradient's norm may be.
    clip: f64,
    /// Running mean of the gradients' norm; 0 before the first step.
    usual: f64,
}

/// What [`Trained::new`] takes as `clip` for the lite family.
pub const CLIP: f64 = 4.0;

impl Trained {
    /// `parameters` with an optimiser whose second moments decay by `beta2`, and averages that decay by `decay`. Gradients
    /// whose norm is more than `clip` times its running mean are scaled down to that; infinity leaves all as they are.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn new(parameters: Vec<Parameter>, beta2: f64, decay: f64, clip: f64) -> Result<Self> {
        let mut adam = AdamW::new(parameters.clone())?;
        adam.beta2 = beta2;
        Ok(Self {
            ema: Ema::new(parameters.clone(), decay)?,
            adam,
            parameters,
            clip,
            usual: 0.0,
        })
    }

    /// Takes one step of learning rate `lr`; the averages follow. Gives the norm of the gradients before they are scaled
    /// down: one odd batch must not undo what many have taught.
    ///
    /// # Errors
    /// When a gradient's shape is not its parameter's.
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> Result<f64> {
        let mut squares = 0.0;
        for (_, var) in &self.parameters {
            if let Some(g) = grads.get(var) {
                squares += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let norm = squares.sqrt();
        let usual = if self.usual > 0.0 { self.usual } else { norm };
        let kept = norm.min(self.clip * usual);
        let scale = if kept < norm { kept / norm } else { 1.0 };
        self.usual = 0.99 * usual + 0.01 * kept;
        self.adam.step_scaled(grads, lr, scale)?;
        self.ema.update(self.adam.step)?;
        Ok(norm)
    }

    /// Where the parameters are.
    fn device(&self) -> Device {
        let first = self.parameters.first();
        first.map_or(Device::Cpu, |(_, var)| var.device().clone())
    }

    /// The averages by the parameters' names.
    pub fn averages(&self) -> HashMap<String, Tensor> {
        self.ema.state().into_iter().collect()
    }

    /// Weights, averages and moments by name, for a checkpoint.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let weights = self.parameters.iter();
        let weights = weights.map(|(name, v)| (format!("weights.{name}"), v.as_tensor().clone()));
        let averages = self.ema.state().into_iter();
        let averages = averages.map(|(name, t)| (format!("ema.{name}"), t));
        let mut all: Vec<_> = weights.chain(averages).chain(self.adam.state()).collect();
        // As a tensor: numbers in JSON need not come back to the last digit.
        all.push(("usual".into(), Tensor::new(&[self.usual], &Device::Cpu)?));
        Ok(all)
    }

    /// Takes back what [`Self::state`] gave after `step` steps.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn restore(&mut self, step: u64, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let device = self.device();
        let get = |name: &str| found(tensors, name, &device);
        for (name, var) in &self.parameters {
            var.set(&get(&format!("weights.{name}"))?)?;
        }
        self.adam.restore(step, get)?;
        if let [usual] = get("usual")?.to_vec1::<f64>()?[..] {
            self.usual = usual;
        }
        self.ema.restore(|name| get(&format!("ema.{name}")))
    }

    /// Begins with the averaged weights of another run's checkpoint, with fresh moments.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn begin(&mut self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let device = self.device();
        let average = |name: &str| found(tensors, &format!("ema.{name}"), &device);
        for (name, var) in &self.parameters {
            var.set(&average(name)?)?;
        }
        self.ema.restore(average)
    }
}

/// The tensor of that name, on `device`.
pub(super) fn found(
    tensors: &HashMap<String, Tensor>,
    name: &str,
    device: &Device,
) -> Result<Tensor> {
    match tensors.get(name) {
        Some(tensor) => tensor.to_device(device),
        None => Err(candle_core::Error::Msg(format!("no tensor '{name}'"))),
    }
}

/// The learning rate of step `step` (from 0) of `steps`: linear warm-up, then a cosine from `peak` to a hundredth of it.
pub fn cosine(peak: f64, step: u64, steps: u64, warm_up: u64) -> f64 {
    if step < warm_up {
        return peak * (step + 1) as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (steps.saturating_sub(warm_up)).max(1) as f64;
    let floor = peak / 100.0;
    floor + (peak - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn adamw_finds_the_minimum_of_a_parabola() {
        let var = Var::from_tensor(&Tensor::new(&[5f32, -3.0], &Device::Cpu).unwrap()).unwrap();
        let mut adam = AdamW::new(vec![("x".into(), var.clone())]).unwrap();
        let goal = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        for step in 0..500 {
            let loss = (var.as_tensor() - &goal)
                .unwrap()
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap();
            adam.step(&loss.backward().unwrap(), cosine(0.1, step, 500, 10))
                .unwrap();
        }
        let found = var.to_vec1::<f32>().unwrap();
        assert!(
            (found[0] - 1.0).abs() < 1e-3 && (found[1] - 2.0).abs() < 1e-3,
            "{found:?}"
        );
    }

    /// The first step of Adam is the learning rate in the direction of the gradient's sign.
    #[test]
    fn the_first_step_has_the_size_of_the_learning_rate() {
        let var = Var::from_tensor(&Tensor::new(&[5f32], &Device::Cpu).unwrap()).unwrap();
        let mut adam = AdamW::new(vec![("x".into(), var.clone())]).unwrap();
        let loss = (var.as_tensor() * 7.0).unwrap().sum_all().unwrap();
        adam.step(&loss.backward().unwrap(), 0.01).unwrap();
        assert!((var.to_vec1::<f32>().unwrap()[0] - 4.99).abs() < 1e-6);
    }

    #[test]
    fn odd_gradients_are_shortened_unless_any_length_is_allowed() {
        let second_moment = |clip| {
            let var = Var::from_tensor(&Tensor::new(&[5f32], &Device::Cpu).unwrap()).unwrap();
            let mut trained =
                Trained::new(vec![("x".into(), var.clone())], 0.999, 0.9, clip).unwrap();
            for length in [1.0, 1000.0] {
                let loss = (var.as_tensor() * length).unwrap().sum_all().unwrap();
                let norm = trained.step(&loss.backward().unwrap(), 0.01).unwrap();
                assert_eq!(norm, length);
            }
            let state: HashMap<_, _> = trained.state().unwrap().into_iter().collect();
            state["adam.second.x"].to_vec1::<f32>().unwrap()[0]
        };
        assert!((second_moment(4.0) - 0.017).abs() < 1e-4);
        assert!((second_moment(f64::INFINITY) - 1000.0).abs() < 0.01);
    }

    #[test]
    fn the_schedule_warms_up_and_ends_at_a_hundredth() {
        assert!(cosine(1.0, 0, 100, 10) < 0.11);
        assert_eq!(cosine(1.0, 10, 100, 10), 1.0);
        assert!((cosine(1.0, 100, 100, 10) - 0.01).abs() < 1e-9);
    }
}
