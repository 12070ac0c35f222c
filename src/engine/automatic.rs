//! The automatic position of the dial `denoise`, from the frames.

use candle_core::{Device, Tensor};

use crate::{
    Result,
    frame::{FrameRef, Luma},
    nn::lite::Estimator,
};

/// Side of the squares that are measured, in pixels. A multiple of 8, so that all have the same
/// position on the grid of a codec.
const SIDE: usize = 96;

/// Squares in a row and a column of the first frame.
const FIRST: usize = 4;

/// Squares of each frame after the first.
const LATER: usize = 2;

/// Share of a frame after the first in the running mean of the estimates: about a second at 25
/// frames per second.
const SHARE: f32 = 0.04;

/// Positions are multiples of this. A change folds new weights, and estimates differ in their last
/// bits among instruction sets.
const STEP: f32 = 1.0 / 32.0;

/// Mean difference between neighbouring samples, in 8-bit steps, below which a square is flat and
/// tells nothing.
const FLAT: f32 = 0.4;

/// The position of the dial, estimated from some squares of each frame and smoothed over time.
pub struct AutomaticDenoise {
    estimator: Estimator,
    /// Frames since the last reset.
    frames: usize,
    /// Running mean of the estimates.
    estimate: Option<f32>,
    position: Option<f32>,
}

impl AutomaticDenoise {
    /// Creates an estimate that knows no frames.
    pub fn new(estimator: Estimator) -> Self {
        Self {
            estimator,
            frames: 0,
            estimate: None,
            position: None,
        }
    }

    /// Returns the position of the dial, 0 to 1; `None` if the frames were flat or too small.
    pub fn position(&self) -> Option<f32> {
        self.position
    }

    /// Forgets previous frames.
    pub fn reset(&mut self) {
        (self.frames, self.estimate, self.position) = (0, None, None);
    }

    /// Takes the next frame into account.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] if the frame is not valid.
    pub fn observe(&mut self, frame: &FrameRef) -> Result<()> {
        let squares = self.squares(frame)?;
        self.frames += 1;
        let Some((_, side)) = squares.first().map(|s| (s, s.len().isqrt())) else {
            return Ok(());
        };
        let n = squares.len();
        let luma = Tensor::from_vec(squares.concat(), (n, side, side), &Device::Cpu)?;
        let mean = self
            .estimator
            .scores(&luma)?
            .mean_all()?
            .to_scalar::<f32>()?;
        let new = self.estimator.position(mean);
        let estimate = match self.estimate {
            None => new,
            Some(estimate) => estimate + SHARE * (new - estimate),
        };
        self.estimate = Some(estimate);
        if self.position.is_none_or(|p| (p - estimate).abs() >= STEP) {
            self.position = Some((estimate / STEP).round() * STEP);
        }
        Ok(())
    }

    /// Returns the luma of some squares of `frame` that are not flat.
    fn squares(&self, frame: &FrameRef) -> Result<Vec<Vec<f32>>> {
        let info = frame.info();
        let side = SIDE.min(info.width).min(info.height) / 8 * 8;
        if side < self.estimator.config().min_side() {
            return Ok(Vec::new());
        }
        let (columns, rows) = ((info.width - side) / 8 + 1, (info.height - side) / 8 + 1);
        let positions: Vec<(usize, usize)> = if self.estimate.is_none() {
            let at = |i: usize, count: usize| 8 * ((2 * i + 1) * count / (2 * FIRST));
            let all = (0..FIRST).flat_map(|y| (0..FIRST).map(move |x| (x, y)));
            let mut all: Vec<_> = all.map(|(x, y)| (at(x, columns), at(y, rows))).collect();
            all.dedup();
            all
        } else {
            // Additive recurrence with the plastic number covers the frame evenly.
            let share = |i: usize, step: f64| (0.5 + i as f64 * step).fract();
            let at = |i: usize| {
                let x = share(i, 0.754_877_666) * columns as f64;
                let y = share(i, 0.569_840_291) * rows as f64;
                (8 * x as usize, 8 * y as usize)
            };
            (0..LATER).map(|k| at(self.frames * LATER + k)).collect()
        };
        let luma = Luma::new(frame)?;
        let squares = positions.into_iter().map(|at| square(&luma, at, side));
        Ok(squares.filter(|square| !is_flat(square, side)).collect())
    }
}

/// Returns the square of `side` pixels at `x`, `y`.
fn square(luma: &Luma, (x, y): (usize, usize), side: usize) -> Vec<f32> {
    let (mut square, mut scratch) = (vec![0.0; side * side], Vec::new());
    for (row, y) in square.chunks_exact_mut(side).zip(y..) {
        luma.read(y, x..x + side, row, &mut scratch);
    }
    square
}

/// Returns `true` if there is almost nothing to see.
fn is_flat(square: &[f32], side: usize) -> bool {
    let rows = square.chunks_exact(side);
    let differences = rows.flat_map(|row| row.windows(2).map(|w| (w[1] - w[0]).abs()));
    let sum: f32 = differences.sum();
    255.0 * sum < FLAT * square.len() as f32
}
