//! The losses of residual-shifting teachers and of one-step distillation: TAD-SR (He et al., arXiv 2408.07476).
//!
//! They take latents and features as tensors `[n, h, w, c]` and the teacher as a [`Teacher`], so they serve any network
//! on any latent. Every mean is over all elements.

use candle_core::{Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::diffusion::Schedule;

/// A frozen teacher, as the losses see it. Its weights must not be variables, else their gradients are computed in vain.
pub trait Teacher {
    /// The clean latent that it predicts from the latent `x`, scaled for the network, at each sample's time of `t`.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn predict(&self, x: &Tensor, t: &[usize]) -> Result<Tensor>;

    /// What its encoder half makes of `x` and `t`: the feature maps that the discriminator sees.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn features(&self, x: &Tensor, t: &[usize]) -> Result<Vec<Tensor>>;
}

/// One draw of the forward process: `u_t(z) = z + eta_t (zy - z) + kappa sqrt(eta_t) eps`.
///
/// The same draw perturbs several latents, so that what differs afterwards differed before.
#[derive(Clone, Copy)]
pub struct Perturbation<'a> {
    pub schedule: &'a Schedule,
    /// The latent of the enlarged low-resolution image.
    pub zy: &'a Tensor,
    /// The time of each sample.
    pub t: &'a [usize],
    /// Standard normal, of the latents' shape.
    pub noise: &'a Tensor,
}

impl Perturbation<'_> {
    /// `u_t(z)`, scaled for the network.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn input(&self, z: &Tensor) -> Result<Tensor> {
        let u = self.schedule.perturb(z, self.zy, self.t, self.noise)?;
        self.schedule.scale_input(&u, self.t)
    }

    /// The noise that explains `u_t(z)` if the teacher's prediction from it is the clean latent:
    /// `(u_t - (1 - eta_t) x0_hat - eta_t zy) / (kappa sqrt(eta_t))`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn implied_noise(&self, z: &Tensor, teacher: &impl Teacher) -> Result<Tensor> {
        let u = self.schedule.perturb(z, self.zy, self.t, self.noise)?;
        let clean = teacher.predict(&self.schedule.scale_input(&u, self.t)?, self.t)?;
        self.schedule.predicted_noise(&u, &clean, self.zy, self.t)
    }

    /// What the teacher's encoder half sees in `u_t(z)`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn features(&self, z: &Tensor, teacher: &impl Teacher) -> Result<Vec<Tensor>> {
        teacher.features(&self.input(z)?, self.t)
    }
}

/// A loss and its gradient at a student's result. With several terms the frozen networks' graphs are built and dropped
/// one after the other, before the student's own: see [`stand_in`].
pub struct Term {
    pub value: f64,
    /// Of the result's shape.
    pub gradient: Tensor,
}

impl Term {
    /// The value and gradient of `loss` at `z`, whose own history does not matter.
    ///
    /// # Errors
    /// Those of `loss`.
    pub fn at(z: &Tensor, loss: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let z = Var::from_tensor(&z.detach())?;
        let loss = loss(&z)?;
        let gradient = match loss.backward()?.remove(&z) {
            Some(gradient) => gradient,
            None => z.zeros_like()?,
        };
        Ok(Self {
            value: f64::from(loss.to_scalar::<f32>()?),
            gradient,
        })
    }
}

/// A loss whose gradient at `z` is `gradient`: by the chain rule it gives the student's parameters the gradients of the
/// loss that `gradient` comes from.
///
/// # Errors
/// When the shapes differ.
pub fn stand_in(z: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    (z * gradient.detach())?.sum_all()
}

/// How the score's direction is weighted over the times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScoreWeight {
    /// 1, as published. A difference of latents weighs `(1 - eta_t) / (kappa sqrt(eta_t))`, so the least time dominates.
    Published,
    /// `kappa sqrt(eta_t)`, which takes that factor's denominator away.
    NoiseLevel,
}

/// The loss of a teacher that predicts the clean latent (ResShift, arXiv 2307.12348): `mean (z0 - f(u_t(z0), t))^2`,
/// where `predict` is the network `f` that is trained.
///
/// # Errors
/// When a shape does not fit.
pub fn denoising(
    z0: &Tensor,
    draw: &Perturbation,
    predict: impl FnOnce(&Tensor, &[usize]) -> Result<Tensor>,
) -> Result<Tensor> {
    regression(&predict(&draw.input(z0)?, draw.t)?, z0)
}

/// `mean (z - goal)^2`; no gradient flows into `goal`. In distillation the goal is the teacher's deterministic result
/// from the noise that the student started from.
///
/// # Errors
/// When the shapes differ.
pub fn regression(z: &Tensor, goal: &Tensor) -> Result<Tensor> {
    (z - goal.detach())?.sqr()?.mean_all()
}

/// The direction of high-frequency score distillation: `g = w_t (e(z_student) - e(z_teacher))` with `e` the
/// [implied noise](Perturbation::implied_noise), both from the same `draw` at small times. The teacher's own error,
/// which biases plain score distillation `e(z_student) - eps`, is in both and cancels. Has no gradient.
///
/// # Errors
/// When a shape does not fit.
pub fn score_direction(
    z_student: &Tensor,
    z_teacher: &Tensor,
    draw: &Perturbation,
    weight: ScoreWeight,
    teacher: &impl Teacher,
) -> Result<Tensor> {
    let student = draw.implied_noise(&z_student.detach(), teacher)?;
    let goal = draw.implied_noise(&z_teacher.detach(), teacher)?;
    let g = (student - goal)?.detach();
    match weight {
        ScoreWeight::Published => Ok(g),
        ScoreWeight::NoiseLevel => {
            let schedule = draw.schedule;
            let level = |&t: &usize| (schedule.kappa() * schedule.sqrt_eta()[t]) as f32;
            let levels: Vec<f32> = draw.t.iter().map(level).collect();
            let levels = Tensor::from_vec(levels, (draw.t.len(), 1, 1, 1), g.device())?;
            g.broadcast_mul(&levels)
        }
    }
}

/// High-frequency score distillation: `mean (g z)`, whose gradient is the direction `g` of [`score_direction`] over the
/// number of elements. Its value says nothing.
///
/// # Errors
/// When the shapes differ.
pub fn score_distillation(z_student: &Tensor, direction: &Tensor) -> Result<Tensor> {
    (z_student * direction.detach())?.mean_all()
}

/// The discriminator's hinge loss on its logits: `mean relu(1 - D(real)) + mean relu(1 + D(fake))`.
///
/// # Errors
/// When a tensor operation fails.
pub fn hinge_discriminator(real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    let real = real.affine(-1.0, 1.0)?.relu()?.mean_all()?;
    real + (fake + 1.0)?.relu()?.mean_all()?
}

/// The generator's hinge loss: `-mean D(fake)`.
///
/// # Errors
/// When a tensor operation fails.
pub fn hinge_generator(fake: &Tensor) -> Result<Tensor> {
    fake.mean_all()?.neg()
}
