//! Losses of residual-shifting teachers and of distillation into one step: TAD-SR (He et al., arXiv
//! 2408.07476).
//!
//! Latents and features are tensors `[n, h, w, c]`, the teacher is a [`Teacher`], so the losses
//! serve any network on any latent. Every mean is over all elements.

use candle_core::{Result, Tensor, Var};
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

use super::random::normal;
use crate::diffusion::Schedule;

/// Frozen teacher. Its weights must not be variables, or their gradients are computed without use.
pub trait Teacher {
    /// Predicts the clean latent from the latent `x`, scaled for the network, at the time of each
    /// sample in `t`.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn predict(&self, x: &Tensor, t: &[usize]) -> Result<Tensor>;

    /// Returns the feature maps of the encoder half for `x` and `t`, the input of the
    /// discriminator.
    ///
    /// # Errors
    /// When a shape does not fit.
    fn features(&self, x: &Tensor, t: &[usize]) -> Result<Vec<Tensor>>;
}

/// Sample of the forward process: `u_t(z) = z + eta_t (zy - z) + kappa sqrt(eta_t) eps`.
///
/// The same sample perturbs several latents, so that their differences come from the latents only.
#[derive(Clone, Copy)]
pub struct Perturbation<'a> {
    pub schedule: &'a Schedule,
    /// Latent of the enlarged low-resolution image.
    pub zy: &'a Tensor,
    /// Time of each sample.
    pub t: &'a [usize],
    /// Standard normal noise of the shape of the latents.
    pub noise: &'a Tensor,
}

impl Perturbation<'_> {
    /// Returns `u_t(z)`, scaled for the network.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn input(&self, z: &Tensor) -> Result<Tensor> {
        let u = self.schedule.perturb(z, self.zy, self.t, self.noise)?;
        self.schedule.scale_input(&u, self.t)
    }

    /// Returns the noise that explains `u_t(z)` if the prediction of the teacher is the clean
    /// latent: `(u_t - (1 - eta_t) x0_hat - eta_t zy) / (kappa sqrt(eta_t))`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn implied_noise(&self, z: &Tensor, teacher: &impl Teacher) -> Result<Tensor> {
        let u = self.schedule.perturb(z, self.zy, self.t, self.noise)?;
        let clean = teacher.predict(&self.schedule.scale_input(&u, self.t)?, self.t)?;
        self.schedule.predicted_noise(&u, &clean, self.zy, self.t)
    }

    /// Returns the features of the teacher for `u_t(z)`.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn features(&self, z: &Tensor, teacher: &impl Teacher) -> Result<Vec<Tensor>> {
        teacher.features(&self.input(z)?, self.t)
    }
}

/// A loss and its gradient at the result of a student. With several terms, the graphs of the frozen
/// networks are built and dropped one after the other, before the graph of the student, see
/// [`stand_in`].
pub struct Term {
    pub value: f64,
    /// Gradient, of the shape of the result.
    pub gradient: Tensor,
}

impl Term {
    /// Returns value and gradient of `loss` at `z`, without the graph of `z`.
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

/// Returns a loss whose gradient at `z` is `gradient`. By the chain rule it has the same gradients
/// for the parameters of the student as the loss that `gradient` belongs to.
///
/// # Errors
/// When the shapes differ.
pub fn stand_in(z: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    (z * gradient.detach())?.sum_all()
}

/// Weights of the score's direction by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScoreWeight {
    /// Weight 1, as in the released code. A difference of latents has the factor `(1 - eta_t) /
    /// (kappa sqrt(eta_t))`, so the first time dominates.
    Published,
    /// Weight `kappa sqrt(eta_t)`, which removes the denominator of this factor.
    NoiseLevel,
}

/// Loss of a teacher that predicts the clean latent (ResShift, arXiv 2307.12348): `mean (z0 -
/// f(u_t(z0), t))^2`, where `predict` is the trained network `f`.
///
/// # Errors
/// When a shape does not fit.
pub fn denoising(
    z0: &Tensor,
    perturbation: &Perturbation,
    predict: impl FnOnce(&Tensor, &[usize]) -> Result<Tensor>,
) -> Result<Tensor> {
    regression(&predict(&perturbation.input(z0)?, perturbation.t)?, z0)
}

/// Regression loss `mean (z - goal)^2` without a gradient for `goal`. In distillation the goal is
/// the deterministic result of the teacher from the same noise.
///
/// # Errors
/// When the shapes differ.
pub fn regression(z: &Tensor, goal: &Tensor) -> Result<Tensor> {
    (z - goal.detach())?.sqr()?.mean_all()
}

/// Returns the direction of high-frequency score distillation: `g = w_t (e(z_student) -
/// e(z_teacher))` with `e` the [implied noise](Perturbation::implied_noise), both from the same
/// `draw` at small times. The error of the teacher, which biases plain score distillation
/// `e(z_student) - eps`, is in both and cancels. The direction has no gradient.
///
/// # Errors
/// When a shape does not fit.
pub fn score_direction(
    z_student: &Tensor,
    z_teacher: &Tensor,
    perturbation: &Perturbation,
    weight: ScoreWeight,
    teacher: &impl Teacher,
) -> Result<Tensor> {
    let student = perturbation.implied_noise(&z_student.detach(), teacher)?;
    let goal = perturbation.implied_noise(&z_teacher.detach(), teacher)?;
    let g = (student - goal)?.detach();
    match weight {
        ScoreWeight::Published => Ok(g),
        ScoreWeight::NoiseLevel => {
            let schedule = perturbation.schedule;
            let level = |&t: &usize| (schedule.kappa() * schedule.sqrt_eta()[t]) as f32;
            let levels: Vec<f32> = perturbation.t.iter().map(level).collect();
            let levels = Tensor::from_vec(levels, (perturbation.t.len(), 1, 1, 1), g.device())?;
            g.broadcast_mul(&levels)
        }
    }
}

/// Loss of high-frequency score distillation: `mean (g z)`. Its gradient is the direction `g` of
/// [`score_direction`] over the number of elements. Its value has no meaning.
///
/// # Errors
/// When the shapes differ.
pub fn score_distillation(z_student: &Tensor, direction: &Tensor) -> Result<Tensor> {
    (z_student * direction.detach())?.mean_all()
}

/// Hinge loss of the discriminator: `mean relu(1 - D(real)) + mean relu(1 + D(fake))`.
///
/// # Errors
/// When a tensor operation fails.
pub fn hinge_discriminator(real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    let real = real.affine(-1.0, 1.0)?.relu()?.mean_all()?;
    real + (fake + 1.0)?.relu()?.mean_all()?
}

/// Hinge loss of the generator: `-mean D(fake)`.
///
/// # Errors
/// When a tensor operation fails.
pub fn hinge_generator(fake: &Tensor) -> Result<Tensor> {
    fake.mean_all()?.neg()
}

/// Returns the Euclidean norm of all values of an f32 tensor.
pub(super) fn norm(t: &Tensor) -> Result<f64> {
    let norm = t.sqr()?.sum_all()?.sqrt()?;
    Ok(f64::from(norm.to_scalar::<f32>()?))
}

/// Returns standard normal numbers of the shape of `like`.
pub(super) fn normals(like: &Tensor, rng: &mut StdRng) -> Result<Tensor> {
    let values: Vec<f32> = (0..like.elem_count()).map(|_| normal(rng)).collect();
    Tensor::from_vec(values, like.shape(), like.device())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{nn::resshift::DiffusionConfig, testing::normal};

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
        normal(0.0, 1.0, (2, 3, 4, 5))
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn scalar(t: &Tensor) -> f64 {
        f64::from(t.to_scalar::<f32>().unwrap())
    }

    /// Predicts a tenth of its input and a constant.
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
    fn the_loss_of_a_teacher_is_the_mean_square_error_of_its_prediction() {
        let (schedule, z0, zy, noise) = (schedule(), random(), random(), random());
        let t = [3, 14];
        let perturbation = Perturbation {
            schedule: &schedule,
            zy: &zy,
            t: &t,
            noise: &noise,
        };
        let perfect = denoising(&z0, &perturbation, |_, _| Ok(z0.clone())).unwrap();
        assert_eq!(scalar(&perfect), 0.0);
        let off = denoising(&z0, &perturbation, |_, _| &z0 + 0.5).unwrap();
        assert!((scalar(&off) - 0.25).abs() < 1e-5);
        // The input is the scaled forward process at the time of each sample.
        let identity = denoising(&z0, &perturbation, |x, seen| {
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
            let perturbation = Perturbation {
                schedule: &schedule,
                zy: &zy,
                t,
                noise: &noise,
            };
            values(&score_direction(z, &goal, &perturbation, weight, &Blurred).unwrap())
        };
        let none = direction(&goal, &[0, 2], ScoreWeight::Published);
        assert!(none.iter().all(|g| g.abs() < 1e-5));
        // Computed by hand for this teacher: its constant error cancels.
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
