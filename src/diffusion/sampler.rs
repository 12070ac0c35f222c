//! Ways from noise to a clean latent.
//!
//! `denoise` is the network: it takes the scaled latent and the time of all its samples and predicts the clean latent.

use candle_core::{Result, Tensor};

use super::Schedule;

/// The network's prediction from the latent `z` at time T - 1: what a distilled model does.
///
/// # Errors
/// Those of `denoise`.
pub fn one_step(
    schedule: &Schedule,
    z: &Tensor,
    mut denoise: impl FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let t = schedule.steps() - 1;
    denoise(&(z * schedule.input_scale(t))?, t)
}

/// The deterministic sampler of SinSR (Wang et al., arXiv 2311.14760) in `steps` steps, from the latent `z` at time
/// T - 1; for fewer steps than T it visits the times of [`Schedule::times`].
///
/// # Errors
/// Those of `denoise` and of [`Schedule::times`], or when the shapes differ.
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

/// The sampler of ResShift (Yue et al., arXiv 2307.12348) in `steps` steps, from the latent `z` at time T - 1; for fewer
/// steps than T it visits the times of [`Schedule::times`]. `noise` gives new standard normal noise of the latent's shape
/// for every step but the last.
///
/// # Errors
/// Those of `denoise`, `noise` and [`Schedule::times`], or when the shapes differ.
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

/// Goes from the latent `z` at time T - 1 to the clean one; `step` takes the latent, the clean latent predicted from it,
/// its time and the next one.
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
