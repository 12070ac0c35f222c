//! Terms of the loss of a student.

use candle_core::{DType, Device, Tensor};

use super::{CHANGE, FEATURES, PATTERN, StudentRun, TERMS, prepared::Prepared};
use crate::{
    Result,
    train::{
        adversary::{FeatureDiscriminator, mean_of_heads},
        lite::init::Judge,
        losses::{Term, hinge_generator, regression, score_direction, score_distillation},
    },
};

/// Scale of the Charbonnier loss `sqrt(d^2 + eps^2)`, in standard deviations of the residual.
const CHARBONNIER_EPS: f64 = 0.02;

/// Side of the squares of [`pattern`], in cells.
const SQUARE: usize = 4;

/// Change of the truth below which a sample counts as still.
const STILL: f32 = 0.03;

impl StudentRun {
    /// Returns the terms that have a share, in the order of [`TERMS`].
    pub(super) fn terms(
        &self,
        batch: &Prepared,
        z: &Tensor,
        shares: &[f64; TERMS.len()],
        discriminator: Option<&Judge>,
    ) -> Result<[Option<Term>; TERMS.len()]> {
        let d = &self.options.distillation;
        let mut terms = [const { None }; TERMS.len()];
        if shares[0] > 0.0 {
            terms[0] = Some(Term::at(z, |z| charbonnier(z, &batch.residual))?);
        }
        if shares[1] > 0.0 {
            let means = self.cell_means(z.device())?;
            let loss = |z: &Tensor| charbonnier(&low(z, &means)?, &low(&batch.residual, &means)?);
            terms[1] = Some(Term::at(z, loss)?);
        }
        if shares[PATTERN] > 0.0 {
            let loss = |z: &Tensor| charbonnier(&pattern(z)?, &pattern(&batch.residual)?);
            terms[PATTERN] = Some(Term::at(z, loss)?);
        }
        if let (Some(clips), true) = (&batch.clips, shares[CHANGE] > 0.0) {
            let still = self.still(batch, clips.frames)?;
            let loss = |z: &Tensor| change(z, &batch.residual, &still, clips.frames);
            terms[CHANGE] = Some(Term::at(z, loss)?);
        }
        if let (Some(teacher), Some(taught)) = (&self.teacher, &batch.taught)
            && (shares[2] > 0.0 || shares[3] > 0.0)
        {
            let goal = teacher.sample(&taught.view, batch.at.scale, &taught.prior)?;
            let seen = |z: &Tensor| teacher.residual(&taught.view, z);
            if shares[2] > 0.0 && d.low_pass {
                let means = self.cell_means(z.device())?;
                let loss = |z: &Tensor| regression(&low(&seen(z)?, &means)?, &low(&goal, &means)?);
                terms[2] = Some(Term::at(z, loss)?);
            } else if shares[2] > 0.0 {
                terms[2] = Some(Term::at(z, |z| regression(&seen(z)?, &goal))?);
            }
            if shares[3] > 0.0 {
                let perturbation = taught.perturbation(teacher, &taught.score);
                let guided = taught.guided(teacher, batch.at.scale);
                let weight = d.score_weight;
                let g = score_direction(&seen(z)?, &goal, &perturbation, weight, &guided)?;
                terms[3] = Some(Term::at(z, |z| score_distillation(&seen(z)?, &g))?);
            }
        }
        if let Some(discriminator) = discriminator {
            let loss = |z: &Tensor| {
                let (features, t) = self.judged(batch, z)?;
                let heads = discriminator.heads(&features, &t)?;
                mean_of_heads(heads.iter().map(hinge_generator))
            };
            terms[4] = Some(Term::at(z, loss)?);
        }
        if shares[FEATURES] > 0.0 {
            let (goal, _) = self.judged(batch, &batch.residual)?;
            let loss = |z: &Tensor| features(&self.judged(batch, z)?.0, &goal);
            terms[FEATURES] = Some(Term::at(z, loss)?);
        }
        Ok(terms)
    }

    /// Returns 1 for the samples of all frames but the first whose truth differs little from that
    /// of the frame before, and 0 for others.
    fn still(&self, batch: &Prepared, frames: usize) -> Result<Tensor> {
        let stats = &self.latent.stats;
        let of = |values: &[f32]| Tensor::new(values, batch.base.device());
        let truth = (batch.base.broadcast_mul(&of(&stats.input_std)?)?
            + batch.residual.broadcast_mul(&of(&stats.residual_std)?)?)?;
        let small = changes(&truth, frames)?.abs()?.lt(STILL)?;
        Ok(small.to_dtype(DType::F32)?)
    }

    /// Returns the matrix `[c, planes]` that maps a whitened residual `[.., c]` to the mean of each
    /// plane in a grid cell, in standard deviations of the first channel.
    fn cell_means(&self, device: &Device) -> Result<Tensor> {
        let (std, luma) = (&self.latent.stats.residual_std, self.latent.r.pow(2));
        let channels = std.len();
        let half = (channels - luma) / 2;
        let planes = if half == 0 { 1 } else { 3 };
        let mut map = vec![0f32; channels * planes];
        for (c, std_c) in std.iter().enumerate() {
            let (plane, count) = match c.checked_sub(luma) {
                None => (0, luma),
                Some(chroma) => (1 + chroma / half, half),
            };
            map[c * planes + plane] = std_c / std[0] / count as f32;
        }
        Ok(Tensor::from_vec(map, (channels, planes), device)?)
    }
}

/// Charbonnier loss `mean sqrt((z - goal)^2 + eps^2)`.
fn charbonnier(z: &Tensor, goal: &Tensor) -> candle_core::Result<Tensor> {
    let squares = ((z - goal)?.sqr()? + CHARBONNIER_EPS * CHARBONNIER_EPS)?;
    squares.sqrt()?.mean_all()
}

/// Returns the differences of the frames `[frames * n, h, w, c]` but the first from those before.
fn changes(z: &Tensor, frames: usize) -> candle_core::Result<Tensor> {
    let n = z.dim(0)? / frames;
    let rest = z.dim(0)? - n;
    z.narrow(0, n, rest)? - z.narrow(0, 0, rest)?
}

/// Charbonnier loss of the change of the error from frame to frame where `still` is 1.
fn change(z: &Tensor, goal: &Tensor, still: &Tensor, frames: usize) -> candle_core::Result<Tensor> {
    let squares = (changes(&(z - goal)?, frames)?.sqr()? + CHARBONNIER_EPS * CHARBONNIER_EPS)?;
    (squares.sqrt()? * still)?.mean_all()
}

/// Returns the means of each channel of `[n, h, w, c]` over squares of [`SQUARE`] cells: what is
/// alike in all cells of a square.
fn pattern(z: &Tensor) -> candle_core::Result<Tensor> {
    let (n, h, w, c) = z.dims4()?;
    let side = SQUARE.min(h).min(w);
    let (rows, columns) = (h / side, w / side);
    let whole = z.narrow(1, 0, rows * side)?.narrow(2, 0, columns * side)?;
    let squares = whole
        .reshape((n * rows, side, columns, side * c))?
        .mean(1)?;
    squares.reshape((n * rows, columns, side, c))?.mean(2)
}

/// Returns the mean absolute difference of feature maps from those of the truth, each relative to
/// the mean absolute value of the latter.
fn features(found: &[Tensor], truth: &[Tensor]) -> candle_core::Result<Tensor> {
    let relative = |(found, truth): (&Tensor, &Tensor)| {
        let size = truth.abs()?.mean_all()?;
        (found - truth)?.abs()?.mean_all()? / size
    };
    let maps = found.iter().zip(truth).map(relative);
    let maps = maps.collect::<candle_core::Result<Vec<_>>>()?;
    Tensor::stack(&maps, 0)?.mean_all()
}

/// Multiplies a residual `[n, h, w, c]` by `means` `[c, planes]`. Returns `[n h w, planes]`.
fn low(z: &Tensor, means: &Tensor) -> candle_core::Result<Tensor> {
    z.flatten_to(2)?.matmul(means)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(t: &Tensor) -> f32 {
        t.to_scalar().unwrap()
    }

    #[test]
    fn only_what_repeats_in_the_cells_of_a_square_is_a_pattern() {
        let (h, w, c) = (9, 8, 4);
        let of = |f: &dyn Fn(usize, usize, usize) -> f32| {
            let at = |i: usize| f(i / c / w, i / c % w, i % c);
            let values = (0..h * w * c).map(at).collect();
            Tensor::from_vec::<_, f32>(values, (1, h, w, c), &Device::Cpu).unwrap()
        };
        let dots = of(&|_, _, k| if k == 1 { 3.0 } else { 0.0 });
        let found = pattern(&dots).unwrap();
        assert_eq!(found.dims(), [2, 2, 4]);
        assert_eq!(
            found.get(1).unwrap().to_vec2::<f32>().unwrap()[1],
            [0.0, 3.0, 0.0, 0.0]
        );
        // Alternates from cell to cell.
        let texture = of(&|y, x, k| if (y + x + k) % 2 == 0 { 3.0 } else { -3.0 });
        let found = pattern(&texture).unwrap().abs().unwrap();
        assert_eq!(value(&found.max_all().unwrap()), 0.0);
        let loss = |z: &Tensor| value(&charbonnier(&pattern(z).unwrap(), &found).unwrap());
        assert!(loss(&dots) > 0.7 && loss(&texture) < 0.03);
    }

    #[test]
    fn the_difference_of_features_is_relative_to_the_size_of_each_map() {
        let map = |v: &[f32]| Tensor::new(v, &Device::Cpu).unwrap();
        let truth = [map(&[1.0, -3.0]), map(&[100.0, 300.0, 200.0])];
        let found = [map(&[1.0, -1.0]), map(&[100.0, 300.0, 500.0])];
        assert_eq!(value(&features(&truth, &truth).unwrap()), 0.0);
        assert_eq!(value(&features(&found, &truth).unwrap()), 0.5);
    }
}
