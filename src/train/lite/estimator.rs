//! Training of the estimator of degradation for an automatic dial `denoise`.

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::TrainingData;
use crate::{
    Error, Result,
    nn::lite::{Estimator, EstimatorConfig, denoise_of},
    train::{
        data::{
            loader::Loader,
            pairs::{PairSource, Random},
        },
        init::{set_random, sorted},
        observer::{Measurement, Observer, Progress},
        optim::{CLIP, Trained, cosine},
        random::step_seed,
    },
};

/// Side of the ground truth of a square, in pixels.
pub const PATCH: usize = 192;

/// Scale between ground truth and squares.
const SCALE: usize = 2;

/// Side of a square in pixels.
const SIDE: usize = PATCH / SCALE;

/// Share of the losses of single squares.
const SINGLE: f64 = 0.2;

/// Steps from one measurement to the next.
const MEASURE_EVERY: u64 = 1000;

/// Frames of each held-out degradation that are measured.
const HELD_OUT: u64 = 16;

const WARM_UP: u64 = 200;

/// Decay of the averaged weights.
const EMA: f64 = 0.999;

/// Separates the random numbers of the held-out data from those of the training.
const MEASURED: u64 = 0x4d45_4153;

/// All that determines the result, besides the data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    pub steps: u64,
    /// Frames in a step, each with a degradation of its own.
    pub frames: usize,
    /// Squares of a frame.
    pub squares: usize,
    /// Peak learning rate, after a warm-up and before a cosine decay.
    pub learning_rate: f64,
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            steps: 40_000,
            frames: 4,
            squares: 8,
            learning_rate: 3e-3,
            seed: 1,
        }
    }
}

impl Options {
    fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(text));
        if self.steps == 0 {
            return wrong("steps = 0: at least 1".into());
        }
        for (name, value) in [("frames", self.frames), ("squares", self.squares)] {
            if !(1..=256).contains(&value) {
                return wrong(format!("{name} = {value}: 1 to 256"));
            }
        }
        if !(self.learning_rate > 0.0 && self.learning_rate <= 1.0) {
            let rate = self.learning_rate;
            return wrong(format!("learning_rate = {rate}: above 0, up to 1"));
        }
        Ok(())
    }
}

/// A trained estimator.
pub struct TrainedEstimator {
    pub config: EstimatorConfig,
    /// Averaged weights by name.
    pub tensors: HashMap<String, Tensor>,
    /// Mean estimate for the held-out data of the name `clean`, or 0 without such data.
    pub floor: f32,
    /// Steps taken, fewer than asked for if the observer stopped the training.
    pub steps: u64,
}

/// Squares of frames that are degraded alike.
struct Frames {
    /// Luma `[frames, squares, SIDE, SIDE]` in 8-bit steps, 0 to 1.
    luma: Vec<f32>,
    /// Position of the dial for each frame.
    targets: Vec<f32>,
}

/// Trains an estimator on the low-resolution images of `data`. Stops early if the observer asks for
/// it.
///
/// # Errors
/// [`Error::Setting`] for an option that is out of range, and those of the data.
pub fn train(
    data: &TrainingData,
    options: &Options,
    data_threads: usize,
    observer: &dyn Observer,
) -> Result<TrainedEstimator> {
    options.check()?;
    let config = EstimatorConfig::default();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let estimator = Estimator::new(config, vb)?;
    let parameters = sorted(&vars)?;
    set_random(&parameters, options.seed, |_| false)?;
    let mut trained = Trained::new(parameters, 0.99, EMA, CLIP)?;

    let (source, squares, count) = (data.source.clone(), options.squares, options.frames);
    let make = move |seed| Frames::draw(&source, seed, count, squares);
    let mut loader = Loader::start(make, options.seed, 0.., data_threads);
    let mut progress = Progress {
        done: 0,
        steps: options.steps,
        images: count * squares,
        losses: vec![("error", 0.0)],
    };
    observer.started(&progress);
    let (mut sum, mut since) = (0.0, 0);
    while progress.done < options.steps && !observer.is_stopped() {
        let frames = loader.next_batch()?;
        let (loss, error) = frames.loss(&estimator)?;
        let rate = cosine(options.learning_rate, progress.done, options.steps, WARM_UP);
        trained.step(&loss.backward()?, rate)?;
        progress.done += 1;
        (sum, since) = (sum + error, since + 1);
        progress.losses = vec![("error", sum / f64::from(since))];
        observer.stepped(&progress);
        if progress.done.is_multiple_of(MEASURE_EVERY) || progress.done == options.steps {
            observer.measured(&progress, &measure(data, config, trained.averages())?);
            (sum, since) = (0.0, 0);
        }
    }
    observer.ended();
    let tensors = trained.averages();
    let clean = measure(data, config, tensors.clone())?.values;
    let clean = clean.into_iter().find(|(name, _)| name == "clean");
    Ok(TrainedEstimator {
        config,
        tensors,
        floor: clean.map_or(0.0, |(_, mean)| mean.min(0.9) as f32),
        steps: progress.done,
    })
}

/// Measures the mean estimate and its mean error for each held-out degradation.
fn measure(
    data: &TrainingData,
    config: EstimatorConfig,
    tensors: HashMap<String, Tensor>,
) -> Result<Measurement> {
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let estimator = Estimator::new(config, vb)?;
    let mut measurement = Measurement::default();
    let mut texts = Vec::new();
    for (name, source) in &data.held_out {
        let (mut mean, mut error) = (0.0, 0.0);
        for i in 0..HELD_OUT {
            let frames = Frames::draw(source, step_seed(MEASURED, i), 1, 8)?;
            let estimate = frames
                .estimates(&estimator)?
                .0
                .mean_all()?
                .to_scalar::<f32>()?;
            mean += f64::from(estimate) / HELD_OUT as f64;
            error += f64::from((estimate - frames.targets[0]).abs()) / HELD_OUT as f64;
        }
        texts.push(format!("{name} {mean:.3}, error {error:.3}"));
        measurement.values.push((name.to_string(), mean));
        measurement.values.push((format!("{name}_error"), error));
    }
    measurement.text = format!("estimates: {}", texts.join("; "));
    Ok(measurement)
}

impl Frames {
    fn draw(source: &Arc<dyn PairSource>, seed: u64, count: usize, squares: usize) -> Result<Self> {
        let mut random = Random::new(seed, 0);
        let mut frames = Self {
            luma: Vec::with_capacity(count * squares * SIDE * SIDE),
            targets: Vec::with_capacity(count),
        };
        for _ in 0..count {
            let (kind, mut noise) = (random.content.random(), 0.0);
            for _ in 0..squares {
                random.degradation = StdRng::seed_from_u64(kind);
                let pair = source.pair(&mut random, PATCH, SIDE)?;
                let rounded = pair
                    .low
                    .luma()
                    .into_iter()
                    .map(|v| (255.0 * v).round() / 255.0);
                frames.luma.extend(rounded);
                noise += pair.noise / squares as f64;
            }
            frames.targets.push(denoise_of(noise.sqrt()) as f32);
        }
        Ok(frames)
    }

    /// Returns the estimates for the frames `[frames]` and for single squares `[frames, squares]`.
    fn estimates(&self, estimator: &Estimator) -> Result<(Tensor, Tensor)> {
        let n = self.luma.len() / (SIDE * SIDE);
        let luma = Tensor::from_slice(&self.luma, (n, SIDE, SIDE), &Device::Cpu)?;
        let scores = estimator.scores(&luma)?.reshape((self.targets.len(), ()))?;
        let sigmoid = |scores: &Tensor| candle_nn::ops::sigmoid(scores);
        Ok((sigmoid(&scores.mean(1)?)?, sigmoid(&scores)?))
    }

    /// Returns the loss and the mean error of the estimates for frames.
    fn loss(&self, estimator: &Estimator) -> Result<(Tensor, f64)> {
        let (of_frames, of_squares) = self.estimates(estimator)?;
        let targets = Tensor::new(self.targets.as_slice(), &Device::Cpu)?;
        let error = (&of_frames - &targets)?;
        let single = of_squares.broadcast_sub(&targets.reshape(((), 1))?)?;
        let loss = (error.sqr()?.mean_all()? + (single.sqr()?.mean_all()? * SINGLE)?)?;
        let error = error.abs()?.mean_all()?.to_scalar::<f32>()?;
        Ok((loss, error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{data::pairs::Pair, patch::Patch};

    /// Noise of random strength on grey.
    struct Noise;

    impl PairSource for Noise {
        fn pair(&self, random: &mut Random, side: usize, small: usize) -> Result<Pair> {
            let strength: f32 = random.degradation.random_range(0.0..0.1);
            let mut low = Patch::new(small, small);
            let area = small * small;
            for i in 0..area {
                let v = 0.5 + strength * random.content.random_range(-1.0..1.0_f32);
                (0..3).for_each(|c| low.rgb[c * area + i] = v);
            }
            Ok(Pair {
                truth: Patch::new(side, side),
                low,
                noise: f64::from(255.0 * strength).powi(2) / 3.0,
            })
        }

        fn fingerprint(&self) -> u64 {
            0
        }
    }

    #[test]
    fn an_estimator_learns_the_strength_of_noise() {
        let source: Arc<dyn PairSource> = Arc::new(Noise);
        let data = TrainingData {
            source: source.clone(),
            held_out: vec![("noise", source.clone())],
        };
        let options = Options {
            steps: 150,
            frames: 4,
            squares: 2,
            ..Options::default()
        };
        let trained = train(&data, &options, 1, &()).unwrap();
        assert_eq!(trained.steps, 150);
        let measured = measure(&data, trained.config, trained.tensors).unwrap();
        // A constant has an error of 0.2.
        assert!(measured.values[1].1 < 0.1, "{}", measured.text);
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for options in [
            Options {
                steps: 0,
                ..Options::default()
            },
            Options {
                frames: 0,
                ..Options::default()
            },
            Options {
                squares: 1000,
                ..Options::default()
            },
            Options {
                learning_rate: f64::NAN,
                ..Options::default()
            },
        ] {
            assert!(
                matches!(options.check(), Err(Error::Setting(_))),
                "{options:?}"
            );
        }
    }
}
