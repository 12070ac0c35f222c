//! Batches with all that the terms of the loss need of them.

use candle_core::Tensor;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{NOISE, StudentRun};
use crate::{
    Result,
    nn::lite::{Condition, Student, memory::Clips},
    train::{
        data::pairs::Batch,
        lite::{
            Guided,
            teacher::{FrozenTeacher, View},
        },
        losses::{Perturbation, normals},
        random::{normal, step_seed},
    },
};

/// Standard deviation of the error in the dial `denoise` in half of the batches. Users and
/// estimators do not set it exactly, and the error fills the gaps between the degradations in the
/// data.
const BLUR: f64 = 0.1;

/// A batch with all random numbers that a step needs.
pub(super) struct Prepared {
    pub(super) base: Tensor,
    pub(super) residual: Tensor,
    /// Motion of the clips, for a network with memory.
    pub(super) clips: Option<Clips>,
    pub(super) at: Condition,
    pub(super) taught: Option<Taught>,
}

/// Parts of a batch for the terms of a teacher.
pub(super) struct Taught {
    pub(super) view: View,
    pub(super) zero: Tensor,
    /// Times and noise of score distillation and discriminator, and the noise that the teacher
    /// starts from.
    pub(super) score: (Vec<usize>, Tensor),
    pub(super) adversarial: (Vec<usize>, Tensor),
    pub(super) prior: Tensor,
}

impl StudentRun {
    pub(super) fn prepare(&self, batch: &Batch, index: u64) -> Result<Prepared> {
        let [base, residual] = self.latent.tensors(batch, self.patch, &self.device)?;
        let mut rng = StdRng::seed_from_u64(step_seed(self.options.seed ^ NOISE, index));
        let mut at = self.condition(batch);
        if self.target.student.conditioning.denoise && rng.random_bool(0.5) {
            at.denoise = (at.denoise + BLUR * f64::from(normal(&mut rng))).clamp(0.0, 1.0);
        }
        let clips = batch.motion.as_ref();
        let clips = clips.map(|motion| motion.tensors(&self.latent.stats, &self.device));
        let taught = self.teacher.as_ref();
        let taught =
            taught.map(|teacher| self.taught(teacher, &base, &batch.condition(), &mut rng));
        Ok(Prepared {
            clips: clips.transpose()?,
            taught: taught.transpose()?,
            base,
            residual,
            at,
        })
    }

    /// Prepares the terms of the teacher for the latent of a base, degraded as `at`.
    fn taught(
        &self,
        teacher: &FrozenTeacher,
        base: &Tensor,
        at: &Condition,
        rng: &mut StdRng,
    ) -> Result<Taught> {
        let (d, n) = (&self.options.distillation, base.dim(0)?);
        let mut noisy = |below: usize| -> Result<_> {
            let t = (0..n).map(|_| rng.random_range(0..below)).collect();
            Ok((t, normals(base, rng)?))
        };
        let zero = base.zeros_like()?;
        let score = noisy(d.score_times)?;
        // The last time is pure noise, which tells the discriminator nothing.
        let judge_times = match d.judge_times {
            0 => teacher.schedule.steps() - 1,
            times => times,
        };
        let mut adversarial = noisy(judge_times)?;
        if !d.time_aware {
            adversarial = (vec![0; n], zero.clone());
        }
        Ok(Taught {
            view: teacher.view(base, at)?,
            zero,
            score,
            adversarial,
            prior: noisy(1)?.1,
        })
    }

    /// Returns what the discriminator sees of `residual`, and the time of each sample: the features
    /// of the teacher, or the images.
    pub(super) fn judged(
        &self,
        batch: &Prepared,
        residual: &Tensor,
    ) -> candle_core::Result<(Vec<Tensor>, Vec<usize>)> {
        match (&self.teacher, &batch.taught) {
            (Some(teacher), Some(taught)) if !self.options.distillation.pixels => {
                let perturbation = taught.perturbation(teacher, &taught.adversarial);
                let guided = taught.guided(teacher, batch.at.scale);
                let residual = teacher.residual(&taught.view, residual)?;
                let features = perturbation.features(&residual, &guided)?;
                Ok((features, perturbation.t.to_vec()))
            }
            _ => Ok((vec![self.luma(&batch.base, residual)?], Vec::new())),
        }
    }

    /// Returns the luma images `[n, h, w, 1]` of residuals over `base`, from -1 to 1.
    fn luma(&self, base: &Tensor, residual: &Tensor) -> candle_core::Result<Tensor> {
        let (r, stats) = (self.latent.r, &self.latent.stats);
        let of = |values: &[f32]| Tensor::new(values, base.device());
        let sum = base
            .broadcast_mul(&of(&stats.input_std)?)?
            .broadcast_add(&of(&stats.input_mean)?)?
            .add(&residual.broadcast_mul(&of(&stats.residual_std)?)?)?;
        let (n, h, w, _) = sum.dims4()?;
        let cells = sum.narrow(3, 0, r * r)?.reshape((n, h, w, r, r))?;
        let image = cells.transpose(2, 3)?.reshape((n, h * r, w * r, 1))?;
        image.affine(2.0, -1.0)
    }
}

impl Prepared {
    /// Returns the result of `student`.
    pub(super) fn forward(&self, student: &Student) -> candle_core::Result<Tensor> {
        match &self.clips {
            Some(clips) => student.forward_clips(&self.base, &self.at, clips),
            None => student.forward(&self.base, &self.at),
        }
    }
}

impl Taught {
    pub(super) fn guided<'a>(&'a self, teacher: &'a FrozenTeacher, scale: f64) -> Guided<'a> {
        Guided {
            teacher: &teacher.net,
            schedule: &teacher.schedule,
            base: &self.view.base,
            scale,
        }
    }

    pub(super) fn perturbation<'a>(
        &'a self,
        teacher: &'a FrozenTeacher,
        (t, noise): &'a (Vec<usize>, Tensor),
    ) -> Perturbation<'a> {
        Perturbation {
            schedule: &teacher.schedule,
            zy: &self.zero,
            t,
            noise,
        }
    }
}
