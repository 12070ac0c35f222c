//! AdamW, Muon and the exponential moving average of weights, with state for checkpoints.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor, Var, backprop::GradStore};

/// Parameter and its name.
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
    /// Creates an optimiser of `parameters` with beta (0.9, 0.99), eps 1e-8 and no weight decay.
    ///
    /// # Errors
    /// When memory for the moments cannot be allocated.
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

    /// Returns the parameters.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Takes a step of learning rate `lr` for every parameter that has a gradient.
    ///
    /// # Errors
    /// When the shape of a gradient differs from that of its parameter.
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
            // A gradient may have a graph, which the moments must not keep in memory.
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

    /// Returns the moments by name, for a checkpoint.
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

    /// Restores the [`Self::state`] after `step` steps.
    ///
    /// # Errors
    /// When `get` fails.
    pub fn restore(&mut self, step: u64, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        for (i, (name, _)) in self.parameters.iter().enumerate() {
            self.first[i] = get(&format!("adam.first.{name}"))?;
            self.second[i] = get(&format!("adam.second.{name}"))?;
        }
        self.step = step;
        Ok(())
    }
}

/// Muon (Jordan, 2024, kellerjordan.github.io/posts/muon): momentum whose update is close to the
/// nearest matrix with orthonormal rows or columns, so that all directions of a kernel learn
/// equally fast. A parameter is the matrix of its first dimension by all others.
pub struct Muon {
    parameters: Vec<Parameter>,
    momenta: Vec<Tensor>,
}

/// Decay of the momentum of Muon.
const MOMENTUM: f64 = 0.95;

/// Steps of the Newton-Schulz iteration.
const NEWTON_SCHULZ: usize = 5;

impl Muon {
    /// Creates an optimiser of `parameters`, each of at least two dimensions.
    ///
    /// # Errors
    /// When memory for the momenta cannot be allocated.
    pub fn new(parameters: Vec<Parameter>) -> Result<Self> {
        let zeros = |(_, v): &Parameter| v.zeros_like();
        Ok(Self {
            momenta: parameters.iter().map(zeros).collect::<Result<_>>()?,
            parameters,
        })
    }

    /// Takes a step of learning rate `lr` for every parameter that has a gradient, with the
    /// gradients times `scale`.
    fn step_scaled(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        for ((_, var), momentum) in self.parameters.iter().zip(&mut self.momenta) {
            let Some(g) = grads.get(var) else { continue };
            // A gradient may have a graph, which the momentum must not keep in memory.
            let g = (g.detach() * scale)?;
            *momentum = ((&*momentum * MOMENTUM)? + (&g * (1.0 - MOMENTUM))?)?;
            let nesterov = ((g * (1.0 - MOMENTUM))? + (&*momentum * MOMENTUM)?)?;
            let rows = var.dim(0)?;
            let matrix = nesterov.reshape((rows, ()))?;
            let longer = (rows as f64 / matrix.dim(1)? as f64).max(1.0).sqrt();
            let update = (orthogonal(&matrix)? * (lr * longer))?.reshape(var.shape())?;
            var.set(&(var.as_tensor() - update)?.detach())?;
        }
        Ok(())
    }

    /// Returns the momenta by name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let pairs = self.parameters.iter().zip(&self.momenta);
        let named = |((name, _), t): (&Parameter, &Tensor)| (format!("muon.{name}"), t.clone());
        pairs.map(named).collect()
    }

    /// Restores the [`Self::state`].
    ///
    /// # Errors
    /// When `get` fails.
    pub fn restore(&mut self, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        for ((name, _), momentum) in self.parameters.iter().zip(&mut self.momenta) {
            *momentum = get(&format!("muon.{name}"))?;
        }
        Ok(())
    }
}

/// Returns a matrix with the singular vectors of `matrix` and singular values near 1 (0.7 to 1.2,
/// except those far below the largest), by a Newton-Schulz iteration of fifth order with the
/// coefficients of Jordan.
fn orthogonal(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    // The products are smaller along the shorter side.
    let turned = rows > columns;
    let x = if turned {
        matrix.t()?.contiguous()?
    } else {
        matrix.clone()
    };
    let norm = x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
    let mut x = (x / (f64::from(norm) + 1e-7))?;
    for _ in 0..NEWTON_SCHULZ {
        let a = x.matmul(&x.t()?.contiguous()?)?;
        let b = ((&a * -4.7750)? + (a.matmul(&a)? * 2.0315)?)?;
        x = ((&x * 3.4445)? + b.matmul(&x)?)?;
    }
    if turned { x.t()?.contiguous() } else { Ok(x) }
}

/// Exponential moving average of parameters: `average += (1 - decay) (value - average)`.
pub struct Ema {
    parameters: Vec<Parameter>,
    averages: Vec<Tensor>,
    decay: f64,
}

impl Ema {
    /// Creates averages that start at the values of the parameters.
    ///
    /// # Errors
    /// When memory for the averages cannot be allocated.
    pub fn new(parameters: Vec<Parameter>, decay: f64) -> Result<Self> {
        let copy = |(_, v): &Parameter| v.as_tensor().copy().map(|t| t.detach());
        Ok(Self {
            averages: parameters.iter().map(copy).collect::<Result<_>>()?,
            parameters,
            decay,
        })
    }

    /// Updates the averages after step `step`, from 1. Averages follow faster in the first steps:
    /// `decay = min(decay, step / (step + 10))`.
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

    /// Returns the averages by the names of the parameters.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let pair = |((name, _), t): (&Parameter, &Tensor)| (name.clone(), t.clone());
        self.parameters
            .iter()
            .zip(&self.averages)
            .map(pair)
            .collect()
    }

    /// Restores the [`Self::state`].
    ///
    /// # Errors
    /// When `get` fails.
    pub fn restore(&mut self, get: impl Fn(&str) -> Result<Tensor>) -> Result<()> {
        for (average, (name, _)) in self.averages.iter_mut().zip(&self.parameters) {
            *average = get(name)?;
        }
        Ok(())
    }
}

/// Parameters of a network in training, with optimiser and averages.
pub struct Trained {
    parameters: Vec<Parameter>,
    adam: AdamW,
    muon: Option<Muon>,
    ema: Ema,
    /// Maximum norm of a gradient, as a multiple of its running mean.
    clip: f64,
    /// Running mean of the norms of gradients; 0 before the first step.
    usual: f64,
}

/// Value of `clip` in [`Trained::new`] for the lite family.
pub const CLIP: f64 = 4.0;

impl Trained {
    /// Creates an optimiser of `parameters` whose second moments decay by `beta2`, and averages
    /// that decay by `decay`. A gradient whose norm is more than `clip` times its running mean is
    /// scaled down to that; infinity scales none.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn new(parameters: Vec<Parameter>, beta2: f64, decay: f64, clip: f64) -> Result<Self> {
        let mut adam = AdamW::new(parameters.clone())?;
        adam.beta2 = beta2;
        Ok(Self {
            ema: Ema::new(parameters.clone(), decay)?,
            adam,
            muon: None,
            parameters,
            clip,
            usual: 0.0,
        })
    }

    /// Uses [`Muon`] instead of AdamW for the parameters for which `is` holds. Call it before the
    /// first step.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn with_muon(mut self, is: impl Fn(&Parameter) -> bool) -> Result<Self> {
        let (inner, others): (Vec<_>, Vec<_>) = self.parameters.iter().cloned().partition(is);
        let beta2 = self.adam.beta2;
        self.adam = AdamW::new(others)?;
        self.adam.beta2 = beta2;
        self.muon = Some(Muon::new(inner)?);
        Ok(self)
    }

    /// Returns all parameters.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Removes the gradients of the parameters for whose names `is_frozen` holds.
    pub fn freeze(&self, grads: &mut GradStore, is_frozen: impl Fn(&str) -> bool) {
        for (_, var) in self.parameters.iter().filter(|(name, _)| is_frozen(name)) {
            grads.remove(var);
        }
    }

    /// Takes a step of learning rate `lr` and updates the averages. Returns the norm of the
    /// gradients before they are scaled down.
    ///
    /// # Errors
    /// When the shape of a gradient differs from that of its parameter.
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> Result<f64> {
        self.step_with(grads, lr, lr)
    }

    /// As [`Self::step`], with a separate learning rate for the parameters of [`Muon`].
    ///
    /// # Errors
    /// As there.
    pub fn step_with(&mut self, grads: &GradStore, lr: f64, muon: f64) -> Result<f64> {
        let mut squares = 0.0;
        for (_, var) in &self.parameters {
            if let Some(g) = grads.get(var) {
                squares += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let norm = squares.sqrt();
        let usual = if self.usual > 0.0 { self.usual } else { norm };
        let clipped = norm.min(self.clip * usual);
        let scale = if clipped < norm { clipped / norm } else { 1.0 };
        self.usual = 0.99 * usual + 0.01 * clipped;
        self.adam.step_scaled(grads, lr, scale)?;
        if let Some(optimiser) = &mut self.muon {
            optimiser.step_scaled(grads, muon, scale)?;
        }
        self.ema.update(self.adam.step)?;
        Ok(norm)
    }

    /// Returns the device of the parameters.
    fn device(&self) -> Device {
        let first = self.parameters.first();
        first.map_or(Device::Cpu, |(_, var)| var.device().clone())
    }

    /// Returns the averages by the names of the parameters.
    pub fn averages(&self) -> HashMap<String, Tensor> {
        self.ema.state().into_iter().collect()
    }

    /// Returns weights, averages and moments by name, for a checkpoint.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let weights = self.parameters.iter();
        let weights = weights.map(|(name, v)| (format!("weights.{name}"), v.as_tensor().clone()));
        let averages = self.ema.state().into_iter();
        let averages = averages.map(|(name, t)| (format!("ema.{name}"), t));
        let mut all: Vec<_> = weights.chain(averages).chain(self.adam.state()).collect();
        all.extend(self.muon.iter().flat_map(Muon::state));
        // A tensor, because numbers in JSON may lose their last digit.
        all.push(("usual".into(), Tensor::new(&[self.usual], &Device::Cpu)?));
        Ok(all)
    }

    /// Restores the [`Self::state`] after `step` steps.
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
        if let Some(muon) = &mut self.muon {
            muon.restore(get)?;
        }
        if let [usual] = get("usual")?.to_vec1::<f64>()?[..] {
            self.usual = usual;
        }
        self.ema.restore(|name| get(&format!("ema.{name}")))
    }

    /// Sets the weights to those of `tensors` by name, with new moments.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn begin(&mut self, tensors: &HashMap<String, Tensor>) -> Result<()> {
        let device = self.device();
        let weights = |name: &str| found(tensors, name, &device);
        for (name, var) in &self.parameters {
            var.set(&weights(name)?)?;
        }
        self.ema.restore(weights)
    }
}

/// Returns the tensor of this name, on `device`.
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

/// Returns the learning rate of step `step`, from 0, of `steps`: a linear warm-up, then a cosine
/// from `peak` to a hundredth of it.
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
    use crate::testing::normal;
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

    /// The first step of Adam is the learning rate times the sign of the gradient.
    #[test]
    fn the_first_step_has_the_size_of_the_learning_rate() {
        let var = Var::from_tensor(&Tensor::new(&[5f32], &Device::Cpu).unwrap()).unwrap();
        let mut adam = AdamW::new(vec![("x".into(), var.clone())]).unwrap();
        let loss = (var.as_tensor() * 7.0).unwrap().sum_all().unwrap();
        adam.step(&loss.backward().unwrap(), 0.01).unwrap();
        assert!((var.to_vec1::<f32>().unwrap()[0] - 4.99).abs() < 1e-6);
    }

    /// The published iteration, in f64 and plain loops.
    fn reference(matrix: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let product = |a: &[Vec<f64>], b: &[Vec<f64>]| -> Vec<Vec<f64>> {
            let entry = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, r)| x * r[j]).sum();
            let row = |r: &Vec<f64>| (0..b[0].len()).map(|j| entry(r, j)).collect();
            a.iter().map(row).collect()
        };
        let turn = |a: &[Vec<f64>]| -> Vec<Vec<f64>> {
            let column = |j: usize| a.iter().map(|row| row[j]).collect();
            (0..a[0].len()).map(column).collect()
        };
        let turned = matrix.len() > matrix[0].len();
        let mut x = if turned {
            turn(matrix)
        } else {
            matrix.to_vec()
        };
        let norm = x.iter().flatten().map(|v| v * v).sum::<f64>().sqrt();
        x.iter_mut().flatten().for_each(|v| *v /= norm + 1e-7);
        for _ in 0..5 {
            let a = product(&x, &turn(&x));
            let (aa, ax) = (product(&a, &a), product(&a, &x));
            let aax = product(&aa, &x);
            for (i, row) in x.iter_mut().enumerate() {
                for (j, v) in row.iter_mut().enumerate() {
                    *v = 3.4445 * *v - 4.7750 * ax[i][j] + 2.0315 * aax[i][j];
                }
            }
        }
        if turned { turn(&x) } else { x }
    }

    fn random(rows: usize, columns: usize) -> (Tensor, Vec<Vec<f64>>) {
        let t = normal(0.0, 1.0, (rows, columns));
        let values = t.to_vec2::<f32>().unwrap();
        let wide = |row: Vec<f32>| row.into_iter().map(f64::from).collect();
        (t, values.into_iter().map(wide).collect())
    }

    #[test]
    fn muons_update_is_that_of_the_reference_with_singular_values_near_1() {
        for (rows, columns) in [(4, 36), (16, 16), (48, 12)] {
            let (t, values) = random(rows, columns);
            let got = orthogonal(&t).unwrap().to_vec2::<f32>().unwrap();
            let want = reference(&values);
            let mut squares = 0.0;
            for (g, w) in got.iter().flatten().zip(want.iter().flatten()) {
                assert!((f64::from(*g) - w).abs() < 1e-4, "{g}, not {w}");
                squares += w * w;
            }
            let mean = squares / rows.min(columns) as f64;
            assert!(
                (0.5..1.5).contains(&mean),
                "mean squared singular value {mean}"
            );
        }
    }

    #[test]
    fn muons_steps_follow_the_formula_and_leave_the_others_to_adamw() {
        let (start, mut weights) = random(6, 20);
        let (goal, goals) = random(6, 20);
        let var = Var::from_tensor(&start).unwrap();
        let other = Var::from_tensor(&Tensor::new(&[5f32], &Device::Cpu).unwrap()).unwrap();
        let parameters = vec![("body".into(), var.clone()), ("bias".into(), other.clone())];
        let trained = Trained::new(parameters, 0.99, 0.9, f64::INFINITY).unwrap();
        let mut trained = trained.with_muon(|(name, _)| name == "body").unwrap();
        let mut momentum = vec![vec![0.0; 20]; 6];
        for _ in 0..3 {
            let loss = (var.as_tensor() - &goal).unwrap().sqr().unwrap().sum_all();
            let loss = (loss.unwrap() + other.as_tensor().sum_all().unwrap()).unwrap();
            let grads = loss.backward().unwrap();
            trained.step_with(&grads, 0.01, 0.02).unwrap();
            let mut nesterov = momentum.clone();
            for i in 0..6 {
                for j in 0..20 {
                    let g = 2.0 * (weights[i][j] - goals[i][j]);
                    momentum[i][j] = 0.95 * momentum[i][j] + 0.05 * g;
                    nesterov[i][j] = 0.05 * g + 0.95 * momentum[i][j];
                }
            }
            let update = reference(&nesterov);
            let pairs = weights.iter_mut().flatten().zip(update.iter().flatten());
            pairs.for_each(|(w, u)| *w -= 0.02 * u);
        }
        let got = var.to_vec2::<f32>().unwrap();
        for (g, w) in got.iter().flatten().zip(weights.iter().flatten()) {
            assert!((f64::from(*g) - w).abs() < 1e-4, "{g}, not {w}");
        }
        // Three steps of AdamW down a slope.
        assert!((other.to_vec1::<f32>().unwrap()[0] - 4.97).abs() < 1e-5);
    }

    #[test]
    fn a_restored_muon_continues_as_if_it_had_not_stopped() {
        let (start, _) = random(6, 20);
        let (goal, _) = random(6, 20);
        let open = || {
            let var = Var::from_tensor(&start).unwrap();
            let trained = Trained::new(vec![("w".into(), var.clone())], 0.99, 0.9, CLIP).unwrap();
            (var, trained.with_muon(|_| true).unwrap())
        };
        let step = |var: &Var, trained: &mut Trained| {
            let loss = (var.as_tensor() - &goal).unwrap().sqr().unwrap();
            let grads = loss.sum_all().unwrap().backward().unwrap();
            trained.step(&grads, 0.01).unwrap();
        };
        let (var, mut trained) = open();
        (0..4).for_each(|_| step(&var, &mut trained));
        let saved: HashMap<_, _> = trained.state().unwrap().into_iter().collect();
        let (other, mut resumed) = open();
        resumed.restore(4, &saved).unwrap();
        for _ in 0..4 {
            step(&var, &mut trained);
            step(&other, &mut resumed);
        }
        let [a, b] = [&var, &other].map(|v| v.to_vec2::<f32>().unwrap());
        assert_eq!(a, b);
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
