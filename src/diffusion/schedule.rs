//! The noise schedule and its closed forms.

use candle_core::{DType, Result, Tensor, bail};

use crate::nn::resshift::DiffusionConfig;

/// The schedule of a model in f64.
#[derive(Clone, Debug)]
pub struct Schedule {
    kappa: f64,
    sqrt_eta: Vec<f64>,
}

/// The distribution of the latent at an earlier time, given the latent z at time t and z0. Its mean
/// is `latent * z + clean * z0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Posterior {
    pub latent: f64,
    pub clean: f64,
    pub variance: f64,
}

impl Schedule {
    /// Makes the exponential schedule of ResShift, equation 8, as in the published code: `etas_end`
    /// is the square root of the last eta.
    ///
    /// # Errors
    /// If the configuration fails [`DiffusionConfig::check`].
    pub fn new(config: &DiffusionConfig) -> Result<Self> {
        if let Err(reason) = config.check() {
            bail!("diffusion: {reason}");
        }
        let first = config.first_sqrt_eta();
        let last = (config.steps - 1) as f64;
        let growth = (config.etas_end / first).ln();
        let sqrt_eta = (0..config.steps)
            .map(|t| first * (growth * (t as f64 / last).powf(config.power)).exp())
            .collect();
        Ok(Self {
            kappa: config.kappa,
            sqrt_eta,
        })
    }

    /// Returns the number of steps T.
    pub fn steps(&self) -> usize {
        self.sqrt_eta.len()
    }

    /// Returns the standard deviation of the noise at eta = 1.
    pub fn kappa(&self) -> f64 {
        self.kappa
    }

    /// Returns the square root of eta at every time.
    pub fn sqrt_eta(&self) -> &[f64] {
        &self.sqrt_eta
    }

    /// Returns the times of a sampler in `steps` steps: evenly spaced, rounded, from T - 1 down to
    /// 0. One step is at T - 1.
    ///
    /// # Errors
    /// If `steps` is 0 or above T.
    pub fn times(&self, steps: usize) -> Result<Vec<usize>> {
        let last = self.steps() - 1;
        match steps {
            1 => Ok(vec![last]),
            2.. if steps <= self.steps() => {
                let gaps = steps - 1;
                Ok((0..steps)
                    .rev()
                    .map(|i| (2 * i * last + gaps) / (2 * gaps))
                    .collect())
            }
            _ => bail!("{steps} steps of a schedule with {}", self.steps()),
        }
    }

    /// Returns the factor that scales the latent at time `t` to a variance of about 1 for the
    /// network.
    ///
    /// # Panics
    /// If `t` is not below T, as in the following functions of a time.
    pub fn input_scale(&self, t: usize) -> f64 {
        (self.eta(t) * self.kappa * self.kappa + 1.0).sqrt().recip()
    }

    /// Scales each sample of `z` `[n, h, w, c]` for the network at its time of `t`.
    ///
    /// # Errors
    /// If `t` does not have one time below T for each sample.
    pub fn scale_input(&self, z: &Tensor, t: &[usize]) -> Result<Tensor> {
        z.broadcast_mul(&self.per_sample(z, t, |t| self.input_scale(t))?)
    }

    /// Returns the initial latent of sampling, at time T - 1, for standard normal `noise` of its
    /// shape.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn prior(&self, zy: &Tensor, noise: &Tensor) -> Result<Tensor> {
        zy + (noise * self.noise_level(self.steps() - 1))?
    }

    /// Runs the forward process of each sample of `z0` to its time of `t` with standard normal
    /// `noise`.
    ///
    /// # Errors
    /// If the shapes differ, or `t` does not have one time below T for each sample.
    pub fn perturb(&self, z0: &Tensor, zy: &Tensor, t: &[usize], noise: &Tensor) -> Result<Tensor> {
        let eta = self.per_sample(z0, t, |t| self.eta(t))?;
        let level = self.per_sample(z0, t, |t| self.noise_level(t))?;
        let shifted = (z0 + (zy - z0)?.broadcast_mul(&eta)?)?;
        shifted + noise.broadcast_mul(&level)?
    }

    /// Returns the noise that leads from the clean latent `x0` to the latent `u` at each sample's
    /// time of `t`, the inverse of [`Self::perturb`].
    ///
    /// # Errors
    /// If the shapes differ, or `t` does not have one time below T for each sample.
    pub fn predicted_noise(
        &self,
        u: &Tensor,
        x0: &Tensor,
        zy: &Tensor,
        t: &[usize],
    ) -> Result<Tensor> {
        let eta = self.per_sample(u, t, |t| self.eta(t))?;
        let level = self.per_sample(u, t, |t| self.noise_level(t).recip())?;
        let shifted = (x0 + (zy - x0)?.broadcast_mul(&eta)?)?;
        (u - shifted)?.broadcast_mul(&level)
    }

    /// Returns the posterior at time `to`, given the latent at the later time `from`. `None` is the
    /// clean latent.
    pub fn posterior(&self, from: usize, to: Option<usize>) -> Posterior {
        let (eta, earlier) = (self.eta(from), to.map_or(0.0, |t| self.eta(t)));
        let alpha = eta - earlier;
        Posterior {
            latent: earlier / eta,
            clean: alpha / eta,
            variance: self.kappa * self.kappa * earlier * alpha / eta,
        }
    }

    /// Runs the deterministic step of SinSR (Wang et al., arXiv 2311.14760, equation 8) from the
    /// latent `z` at time `from` to the earlier time `to`. `None` gives the clean latent `x0`.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn deterministic_step(
        &self,
        z: &Tensor,
        x0: &Tensor,
        zy: &Tensor,
        from: usize,
        to: Option<usize>,
    ) -> Result<Tensor> {
        let Some(to) = to else {
            return Ok(x0.clone());
        };
        let (eta, earlier) = (self.eta(from), self.eta(to));
        let keep = (earlier / eta).sqrt();
        let clean = (x0 * ((1.0 - earlier) - keep * (1.0 - eta)))?;
        let shift = (zy * (earlier - keep * eta))?;
        (z * keep)? + (clean + shift)?
    }

    fn eta(&self, t: usize) -> f64 {
        self.sqrt_eta[t] * self.sqrt_eta[t]
    }

    fn noise_level(&self, t: usize) -> f64 {
        self.kappa * self.sqrt_eta[t]
    }

    /// Returns `f` of each sample's time, with dimensions that broadcast over `like` `[n, ..]`.
    fn per_sample(&self, like: &Tensor, t: &[usize], f: impl Fn(usize) -> f64) -> Result<Tensor> {
        let n = like.dim(0)?;
        if t.len() != n || t.iter().any(|&t| t >= self.steps()) {
            bail!(
                "{n} samples at times {t:?} of a schedule with {} steps",
                self.steps()
            );
        }
        let values: Vec<f64> = t.iter().map(|&t| f(t)).collect();
        let mut shape = vec![1; like.rank()];
        shape[0] = n;
        Tensor::from_vec(values, shape, like.device())?.to_dtype(DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::resshift::ResShiftConfig;
    use crate::testing::normal;
    use candle_core::Device;

    #[test]
    fn fewer_steps_visit_times_spread_from_the_last_to_0() {
        let schedule = Schedule::new(&ResShiftConfig::realsr_x4().diffusion).unwrap();
        assert_eq!(schedule.times(1).unwrap(), [14]);
        assert_eq!(schedule.times(2).unwrap(), [14, 0]);
        assert_eq!(schedule.times(4).unwrap(), [14, 9, 5, 0]);
        assert_eq!(
            schedule.times(15).unwrap(),
            (0..15).rev().collect::<Vec<_>>()
        );
        assert!(schedule.times(0).is_err() && schedule.times(16).is_err());
    }

    #[test]
    fn the_predicted_noise_of_the_true_latent_is_the_noise() {
        let schedule = Schedule::new(&ResShiftConfig::faceir().diffusion).unwrap();
        let random = || normal(0.0, 1.0, (2, 3, 4, 8));
        let (z0, zy, noise) = (random(), random(), random());
        let u = schedule.perturb(&z0, &zy, &[0, 3], &noise).unwrap();
        let again = schedule.predicted_noise(&u, &z0, &zy, &[0, 3]).unwrap();
        let off = (again - noise).unwrap().abs().unwrap().max_all().unwrap();
        assert!(off.to_scalar::<f32>().unwrap() < 1e-4);
        assert!(schedule.perturb(&z0, &zy, &[0], &u).is_err());
        assert!(schedule.perturb(&z0, &zy, &[0, 4], &u).is_err());
    }

    #[test]
    fn both_samplers_steps_keep_the_forward_process() {
        // Both map the mean at a time, given the true clean latent, to the mean at an earlier time.
        let schedule = Schedule::new(&ResShiftConfig::realsr_x4().diffusion).unwrap();
        let (z0, zy) = (0.3, -0.8);
        let mean = |t: usize| z0 + schedule.eta(t) * (zy - z0);
        let tensor = |v: f64| Tensor::new(&[v], &Device::Cpu).unwrap();
        for (from, to) in [(14, 13), (9, 5), (1, 0)] {
            let p = schedule.posterior(from, Some(to));
            assert!((p.latent * mean(from) + p.clean * z0 - mean(to)).abs() < 1e-12);
            let (z, x0, zy) = (tensor(mean(from)), tensor(z0), tensor(zy));
            let z = schedule.deterministic_step(&z, &x0, &zy, from, Some(to));
            let z = z.unwrap().to_vec1::<f64>().unwrap()[0];
            assert!((z - mean(to)).abs() < 1e-12);
        }
    }
}
