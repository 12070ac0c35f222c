//! The losses of residual-shifting teachers and of one-step distillation: TAD-SR (He et al., arXiv 2408.07476).
//!
//! They take latents and features as tensors `[n, h, w, c]` and the teacher as a [`Teacher`], so they serve any network
//! on any latent. Every mean is over all elements.

use candle_core::{Result, Tensor, Var};
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::random::normal;
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

/// The Euclidean norm of all values, of f32.
pub(super) fn norm(t: &Tensor) -> Result<f64> {
    let norm = t.sqr()?.sum_all()?.sqrt()?;
    Ok(f64::from(norm.to_scalar::<f32>()?))
}

/// Standard normal numbers of the shape of `like`.
pub(super) fn normals(like: &Tensor, rng: &mut StdRng) -> Result<Tensor> {
    let values: Vec<f32> = (0..like.elem_count()).map(|_| normal(rng)).collect();
    Tensor::from_vec(values, like.shape(), like.device())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::nn::resshift::DiffusionConfig;

    fn schedule() -> Schedule {
        let config = DiffusionConfig {
            scale: 4,
            steps: 15,
            kappa: 2.0,
            power: 0.3,
            min_noise_level: 0.04,
            etas_end: 0.99,
        };
        Schedule::new(&config).unwrap()
    }

    fn random() -> Tensor {
        Tensor::randn(0f32, 1.0, (2, 3, 4, 5), &Device::Cpu).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn scalar(t: &Tensor) -> f64 {
        f64::from(t.to_scalar::<f32>().unwrap())
    }

    /// Sees a tenth of its input and a constant.
    struct Blurred;

    impl Teacher for Blurred {
        fn predict(&self, x: &Tensor, _: &[usize]) -> Result<Tensor> {
            x.affine(0.1, 0.7)
        }

        fn features(&self, x: &Tensor, _: &[usize]) -> Result<Vec<Tensor>> {
            Ok(vec![x.clone()])
        }
    }

    #[test]
    fn a_teachers_loss_is_the_mean_square_of_what_its_prediction_misses() {
        let (schedule, z0, zy, noise) = (schedule(), random(), random(), random());
        let t = [3, 14];
        let draw = Perturbation {
            schedule: &schedule,
            zy: &zy,
            t: &t,
            noise: &noise,
        };
        let perfect = denoising(&z0, &draw, |_, _| Ok(z0.clone())).unwrap();
        assert_eq!(scalar(&perfect), 0.0);
        let off = denoising(&z0, &draw, |_, _| &z0 + 0.5).unwrap();
        assert!((scalar(&off) - 0.25).abs() < 1e-5);
        // The network sees the scaled forward process at each sample's own time.
        let identity = denoising(&z0, &draw, |x, seen| {
            assert_eq!(seen, t);
            Ok(x.clone())
        });
        let mut want = 0.0;
        let all = [&z0, &zy, &noise].map(values);
        for i in 0..120 {
            let t = t[i / 60];
            let root = schedule.sqrt_eta()[t];
            let [z0, zy, noise] = [0, 1, 2].map(|k| f64::from(all[k][i]));
            let u = z0 + root * root * (zy - z0) + 2.0 * root * noise;
            let x = u / (4.0 * root * root + 1.0).sqrt();
            want += (x - z0).powi(2) / 120.0;
        }
        let got = scalar(&identity.unwrap());
        assert!((got - want).abs() < 1e-4 * want, "{got}, not {want}");
    }

    #[test]
    fn the_scores_direction_vanishes_at_the_teachers_result_and_ignores_its_error() {
        let (schedule, student, goal, zy, noise) =
            (schedule(), random(), random(), random(), random());
        let direction = |z: &Tensor, t: &[usize], weight| {
            let draw = Perturbation {
                schedule: &schedule,
                zy: &zy,
                t,
                noise: &noise,
            };
            values(&score_direction(z, &goal, &draw, weight, &Blurred).unwrap())
        };
        let none = direction(&goal, &[0, 2], ScoreWeight::Published);
        assert!(none.iter().all(|g| g.abs() < 1e-5));
        // By hand for this teacher: its constant error cancels.
        let apart = values(&(&student - &goal).unwrap());
        for weight in [ScoreWeight::Published, ScoreWeight::NoiseLevel] {
            let g = direction(&student, &[0, 2], weight);
            for (i, (g, apart)) in g.iter().zip(&apart).enumerate() {
                let t = [0, 2][i / 60];
                let level = 2.0 * schedule.sqrt_eta()[t];
                let eta = schedule.sqrt_eta()[t].powi(2);
                let moved = (1.0 - eta) * f64::from(*apart);
                let predicted = 0.1 * schedule.input_scale(t) * moved;
                let mut want = (moved - (1.0 - eta) * predicted) / level;
                if weight == ScoreWeight::NoiseLevel {
                    want *= level;
                }
                assert!((f64::from(*g) - want).abs() < 2e-3 * (1.0 + want.abs()));
            }
        }
    }

    #[test]
    fn the_score_loss_has_the_direction_as_its_gradient() {
        let (z, g) = (random(), random());
        let term = Term::at(&z, |z| score_distillation(z, &g)).unwrap();
        for (got, want) in values(&term.gradient).iter().zip(values(&g)) {
            assert!((got - want / 120.0).abs() < 1e-6);
        }
    }

    #[test]
    fn hinge_losses_are_flat_where_the_discriminator_is_sure() {
        let logits = |v: &[f32]| Tensor::new(v, &Device::Cpu).unwrap();
        let (real, fake) = (logits(&[2.0, 0.0]), logits(&[-3.0, 0.5]));
        let loss = hinge_discriminator(&real, &fake).unwrap();
        assert_eq!(scalar(&loss), 0.5 + 0.75);
        let gradient = Term::at(&real, |r| hinge_discriminator(r, &fake)).unwrap();
        assert_eq!(values(&gradient.gradient), [0.0, -0.5]);
        let generator = Term::at(&fake, hinge_generator).unwrap();
        assert_eq!(generator.value, 1.25);
        assert_eq!(values(&generator.gradient), [-0.5, -0.5]);
    }
}
