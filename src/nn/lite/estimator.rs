//! A network that estimates the degradation of frames, for an automatic dial `denoise`.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::student::LEAKY_SLOPE;
use crate::ops::{Activation, conv2d};

/// Factor between luma and the network's input.
const GAIN: f64 = 8.0;

/// Architecture of an estimator, which determines its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EstimatorConfig {
    /// Side of a grid cell in pixels of the frame.
    pub r: usize,
    pub channels: usize,
    /// Number of 3x3 convolutions.
    pub depth: usize,
}

impl Default for EstimatorConfig {
    fn default() -> Self {
        Self {
            r: 4,
            channels: 24,
            depth: 4,
        }
    }
}

impl EstimatorConfig {
    /// Checks the range of every field.
    ///
    /// # Errors
    /// A text with the invalid field.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { r, channels, depth } = *self;
        for (name, value, max) in [
            ("r", r, 8),
            ("channels", channels, 256),
            ("depth", depth, 16),
        ] {
            if !(1..=max).contains(&value) {
                return Err(format!("{name} = {value}: 1 to {max}"));
            }
        }
        Ok(())
    }

    /// Returns the smallest side of a square of luma that the network takes, in pixels.
    pub fn min_side(&self) -> usize {
        self.r * (2 * self.depth + 1)
    }

    /// Returns names and shapes of the tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let kernel = |i: usize| {
            let ci = if i == 0 {
                self.r * self.r
            } else {
                self.channels
            };
            (format!("body.{i}.weight"), vec![self.channels, ci, 3, 3])
        };
        let bias = |i: usize| (format!("body.{i}.bias"), vec![self.channels]);
        let body = (0..self.depth).flat_map(|i| [kernel(i), bias(i)]);
        body.chain([
            ("tail.weight".into(), vec![1, self.channels]),
            ("tail.bias".into(), vec![1]),
        ])
        .collect()
    }
}

/// Convolutions of squares of luma, without padding, whose mean is mapped to one number.
pub struct Estimator {
    config: EstimatorConfig,
    /// Mean estimate for clean input.
    floor: f32,
    /// Kernel `[co, ci, 3, 3]` and bias `[co]` of each layer.
    body: Vec<(Tensor, Tensor)>,
    /// Weight `[1, channels]` and bias `[1]`.
    tail: (Tensor, Tensor),
}

impl Estimator {
    /// Builds the network from the tensors of [`EstimatorConfig::tensors`].
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(config: EstimatorConfig, vb: VarBuilder) -> Result<Self> {
        let mut tensors = Vec::new();
        for (name, shape) in config.tensors() {
            tensors.push(vb.get(shape, &name)?);
        }
        let mut pairs = tensors
            .chunks_exact(2)
            .map(|pair| (pair[0].clone(), pair[1].clone()));
        Ok(Self {
            config,
            floor: 0.0,
            body: pairs.by_ref().take(config.depth).collect(),
            tail: pairs
                .next()
                .ok_or(candle_core::Error::Msg("no tail".into()))?,
        })
    }

    pub fn config(&self) -> &EstimatorConfig {
        &self.config
    }

    /// Sets the mean estimate for clean input, 0 (at first) to below 1. It is above 0 because an
    /// estimate cannot err below 0.
    pub fn with_floor(self, floor: f32) -> Self {
        Self { floor, ..self }
    }

    /// Returns the position of the dial, 0 to 1, for the mean score of the squares of a frame.
    pub fn position(&self, score: f32) -> f32 {
        let estimate = 1.0 / (1.0 + (-score).exp());
        ((estimate - self.floor) / (1.0 - self.floor)).max(0.0)
    }

    /// Returns the score of each square of luma `[n, side, side]`, 0 (black) to 1 (white), as
    /// `[n]`. The sides are at least [`EstimatorConfig::min_side`]. The sigmoid of a mean of scores
    /// is the estimate of the degradation, see [`super::denoise_of`].
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn scores(&self, luma: &Tensor) -> Result<Tensor> {
        let (n, height, width) = luma.dims3()?;
        let r = self.config.r;
        let (h, w) = (height / r, width / r);
        let luma = luma.narrow(1, 0, h * r)?.narrow(2, 0, w * r)?;
        let cells = luma.contiguous()?.reshape(&[n, h, r, w, r][..])?;
        let cells = cells.permute(&[0, 1, 3, 2, 4][..])?.contiguous()?;
        let cells = cells.reshape((n, h, w, r * r))?;
        let mut x = (cells.broadcast_sub(&cells.mean_keepdim(3)?)? * GAIN)?;
        let activation = Activation::LeakyRelu(LEAKY_SLOPE);
        for (weight, bias) in &self.body {
            x = conv2d(&x, weight, bias, 1, 0, activation)?;
        }
        let (weight, bias) = &self.tail;
        let mean = x.mean((1, 2))?;
        mean.matmul(&weight.t()?)?.broadcast_add(bias)?.squeeze(1)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use candle_nn::VarMap;

    use super::*;

    fn estimator(config: EstimatorConfig) -> Estimator {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
        Estimator::new(config, vb).unwrap()
    }

    #[test]
    fn a_score_depends_on_its_square_and_not_on_brightness() {
        let config = EstimatorConfig::default();
        let estimator = estimator(config);
        let side = config.min_side() + 3;
        let luma = Tensor::rand(0.0_f32, 1.0, (3, side, side), &Device::Cpu).unwrap();
        let scores: Vec<f32> = estimator.scores(&luma).unwrap().to_vec1().unwrap();
        let alone = estimator.scores(&luma.narrow(0, 2, 1).unwrap()).unwrap();
        let alone: Vec<f32> = alone.to_vec1().unwrap();
        assert!((alone[0] - scores[2]).abs() < 1e-5, "{alone:?} {scores:?}");
        let brighter = estimator.scores(&(luma + 0.25).unwrap()).unwrap();
        let brighter: Vec<f32> = brighter.to_vec1().unwrap();
        for (a, b) in scores.iter().zip(&brighter) {
            assert!((a - b).abs() < 1e-4, "{scores:?} {brighter:?}");
        }
    }

    #[test]
    fn positions_go_from_0_for_the_estimate_of_clean_input_to_1() {
        let estimator = estimator(EstimatorConfig::default()).with_floor(0.2);
        let score = |estimate: f32| (estimate / (1.0 - estimate)).ln();
        for (estimate, position) in [(0.1, 0.0), (0.2, 0.0), (0.6, 0.5), (0.9999, 1.0)] {
            let found = estimator.position(score(estimate));
            assert!((found - position).abs() < 1e-3, "{estimate}: {found}");
        }
    }

    #[test]
    fn squares_below_the_smallest_side_are_refused() {
        let config = EstimatorConfig::default();
        let estimator = estimator(config);
        let scores = |side: usize| {
            let luma = Tensor::zeros((1, side, side), DType::F32, &Device::Cpu).unwrap();
            estimator.scores(&luma)
        };
        assert!(scores(config.min_side()).is_ok());
        assert!(scores(config.min_side() - 1).is_err());
    }
}
