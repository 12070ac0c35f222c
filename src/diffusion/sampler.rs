//! Samplers from noise to a clean latent.
//!
//! `denoise` is the network: it predicts the clean latent from the scaled latent and the time of
//! all samples.

use candle_core::{Result, Tensor};

use super::Schedule;

/// Returns the network's prediction from the latent `z` at time T - 1, for distilled models.
///
/// # Errors
/// As `denoise`.
pub fn one_step(
    schedule: &Schedule,
    z: &Tensor,
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let t = schedule.steps() - 1;
    denoise(&(z * schedule.input_scale(t))?, t)
}

/// Runs the deterministic sampler of SinSR (Wang et al., arXiv 2311.14760) in `steps` steps from
/// the latent `z` at time T - 1, at the times of [`Schedule::times`].
///
/// # Errors
/// As `denoise` and [`Schedule::times`], or if the shapes differ.
pub fn deterministic(
    schedule: &Schedule,
    zy: &Tensor,
    z: &Tensor,
    steps: usize,
    denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    sample(schedule, z, steps, denoise, |z, x0, from, to| {
        schedule.deterministic_step(z, x0, zy, from, to)
    })
}

/// Runs the sampler of ResShift (Yue et al., arXiv 2307.12348) in `steps` steps from the latent `z`
/// at time T - 1, at the times of [`Schedule::times`]. `noise` returns new standard normal noise of
/// the latent's shape for every step but the last.
///
/// # Errors
/// As `denoise`, `noise` and [`Schedule::times`], or if the shapes differ.
pub fn ancestral(
    schedule: &Schedule,
    z: &Tensor,
    steps: usize,
    denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    mut noise: impl FnMut() -> Result<Tensor>,
) -> Result<Tensor> {
    sample(schedule, z, steps, denoise, |z, x0, from, to| {
        let posterior = schedule.posterior(from, to);
        let mean = ((z * posterior.latent)? + (x0 * posterior.clean)?)?;
        match to {
            Some(_) => mean + (noise()? * posterior.variance.sqrt())?,
            None => Ok(mean),
        }
    })
}

/// Runs from the latent `z` at time T - 1 to the clean latent. `step` takes the latent, its
/// predicted clean latent, its time and the next time.
fn sample(
    schedule: &Schedule,
    z: &Tensor,
    steps: usize,
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
    mut step: impl FnMut(&Tensor, &Tensor, usize, Option<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let times = schedule.times(steps)?;
    let mut z = z.clone();
    for (i, &t) in times.iter().enumerate() {
        let x0 = denoise(&(&z * schedule.input_scale(t))?, t)?;
        z = step(&z, &x0, t, times.get(i + 1).copied())?;
    }
    Ok(z)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::resshift::ResShiftConfig;
    use candle_core::Device;

    /// Returns one pixel with a channel for each of `values`.
    fn pixel(values: &[f64]) -> Tensor {
        let count = values.len();
        Tensor::from_slice(values, (1, 1, 1, count), &Device::Cpu).unwrap()
    }

    /// Returns the latents of the sampler for a network that always predicts `x0`.
    fn visited(x0: &Tensor, z: &Tensor, noise: impl FnMut() -> Result<Tensor>) -> Vec<Vec<f64>> {
        let schedule = Schedule::new(&ResShiftConfig::realsr_x4().diffusion).unwrap();
        let mut seen = Vec::new();
        let denoise = |scaled: &Tensor, t: usize| {
            let z = (scaled / schedule.input_scale(t))?;
            seen.push(z.flatten_all()?.to_vec1()?);
            Ok(x0.clone())
        };
        let last = ancestral(&schedule, z, 15, denoise, noise).unwrap();
        seen.push(last.flatten_all().unwrap().to_vec1().unwrap());
        seen
    }

    #[test]
    fn the_ancestral_samplers_mean_is_the_forward_processes() {
        let schedule = Schedule::new(&ResShiftConfig::realsr_x4().diffusion).unwrap();
        let (x0, zy) = (0.3, -0.8);
        let mean = |t: usize| x0 + schedule.sqrt_eta()[t].powi(2) * (zy - x0);
        let start = pixel(&[mean(14)]);
        let seen = visited(&pixel(&[x0]), &start, || Ok(pixel(&[0.0])));
        for (z, t) in seen.iter().zip((0..15).rev()) {
            assert!((z[0] - mean(t)).abs() < 1e-12, "{t}: {}", z[0]);
        }
        assert_eq!(seen[15], [x0]);
    }

    /// Every sample of noise has its own channel, so the squares add up to the variance.
    #[test]
    fn the_ancestral_samplers_variance_is_the_forward_processes() {
        let schedule = Schedule::new(&ResShiftConfig::realsr_x4().diffusion).unwrap();
        let unit = |i: usize| {
            pixel(&[0.0; 15]).slice_assign(&[0..1, 0..1, 0..1, i..i + 1], &pixel(&[1.0]))
        };
        let variance = |t: usize| -> f64 { 4.0 * schedule.sqrt_eta()[t].powi(2) };
        let start = (unit(0).unwrap() * variance(14).sqrt()).unwrap();
        let mut samples = 0;
        let noise = || {
            samples += 1;
            unit(samples)
        };
        let seen = visited(&pixel(&[0.0; 15]), &start, noise);
        for (z, t) in seen.iter().zip((0..15).rev()) {
            let squares: f64 = z.iter().map(|v| v * v).sum();
            assert!((squares - variance(t)).abs() < 1e-12, "{t}: {squares}");
        }
        assert_eq!(samples, 14);
    }
}
