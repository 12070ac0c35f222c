//! Recipe of a student that is distilled from a ResShift model.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{InitialWeights, Options, Weights, narrowed};
use crate::{
    Error, Result,
    nn::resshift::{ResShiftConfig, UnetConfig},
    train::{
        degradation::{Degradation, DegradationRecipe},
        losses::ScoreWeight,
        toml_file,
    },
};

/// Presets of degradation that are one recipe without codecs.
const PRESETS: [&str; 3] = ["real-world", "stills", "clean"];

/// All that determines the result of a distillation. The defaults are the published settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Model file of the teacher.
    #[serde(rename = "published")]
    pub teacher: PathBuf,
    /// Folders and files with photos.
    #[serde(deserialize_with = "toml_file::one_or_many")]
    pub data: Vec<PathBuf>,
    /// Name of the model; `None` for that of the run's folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Model file that the student begins with, of any shape; `None` for the teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student: Option<PathBuf>,
    /// Channels of a narrower student at its first level, a multiple of 32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student_channels: Option<usize>,
    /// JSON file with the shape of the student, like `unet` in the metadata of a model file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub student_config: Option<PathBuf>,
    /// Random weights of the student instead of those of the teacher that fit.
    pub from_scratch: bool,
    /// Degradation: `real-world`, `stills` or `clean`.
    pub preset: String,
    pub steps: u64,
    /// Images that pass the networks at once.
    pub batch: usize,
    /// Batches whose gradients are averaged in a step.
    pub accumulate: usize,
    /// Side of a high-resolution patch in pixels; `None` for the size that the teacher was built
    /// for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<usize>,
    /// Learning rate of student and discriminator.
    #[serde(alias = "lr")]
    pub learning_rate: f64,
    /// Steps over which the learning rate rises to its value.
    pub warm_up: u64,
    /// Decay of the averaged weights.
    pub ema: f64,
    /// Weight of the distance to the result of the teacher.
    pub regression: f64,
    /// Weight of high-frequency score distillation; 0 leaves it out.
    pub score: f64,
    /// Weight of the adversarial loss; 0 leaves it out.
    pub adversarial: f64,
    /// Weights of the times in score distillation.
    pub score_weighting: ScoreWeight,
    /// Times of score distillation: 0 to below this.
    pub score_times: usize,
    /// Times that the student starts from; empty for the last alone.
    #[serde(deserialize_with = "toml_file::one_or_many")]
    pub starts: Vec<usize>,
    pub seed: u64,
}

impl Default for Recipe {
    fn default() -> Self {
        let Weights {
            regression,
            score,
            adversarial,
        } = Weights::default();
        Self {
            teacher: PathBuf::new(),
            data: Vec::new(),
            name: None,
            student: None,
            student_channels: None,
            student_config: None,
            from_scratch: false,
            preset: "real-world".into(),
            steps: 30_000,
            batch: 8,
            accumulate: 1,
            patch: None,
            learning_rate: 5e-5,
            warm_up: 5000,
            ema: 0.999,
            regression,
            score,
            adversarial,
            score_weighting: ScoreWeight::Published,
            score_times: 3,
            starts: Vec::new(),
            seed: 1,
        }
    }
}

impl Recipe {
    /// Reads the recipe at `path`. Paths in it are relative to its folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Setting`] that names the file and the line.
    pub fn read(path: &Path) -> Result<Self> {
        let mut recipe: Self = toml_file::read(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let files = [&mut recipe.student, &mut recipe.student_config];
        let paths = recipe.data.iter_mut().chain(files.into_iter().flatten());
        for path in paths.chain([&mut recipe.teacher]) {
            *path = folder.join(&path);
        }
        Ok(recipe)
    }

    /// Returns the options of a run in `folder` with a teacher of `config`.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range.
    pub fn options(
        &self,
        config: &ResShiftConfig,
        begin: &InitialWeights,
        folder: &Path,
    ) -> Result<Options> {
        let name = self.name.clone().or_else(|| {
            let name = folder.file_name()?;
            Some(name.to_string_lossy().into_owned())
        });
        let starts = if self.starts.is_empty() {
            vec![config.diffusion.steps - 1]
        } else {
            self.starts.clone()
        };
        let size = config.unet.image_size * config.autoencoder.factor();
        let options = Options {
            name: name.unwrap_or_else(|| "model".into()),
            student: self.shape(config, begin)?,
            degradation: self.degradation()?,
            steps: self.steps,
            batch: self.batch,
            accumulate: self.accumulate,
            patch: self.patch.unwrap_or(size),
            learning_rate: self.learning_rate,
            warm_up: self.warm_up,
            ema: self.ema,
            weights: Weights {
                regression: self.regression,
                score: self.score,
                adversarial: self.adversarial,
            },
            score_weight: self.score_weighting,
            score_times: self.score_times,
            starts,
            seed: self.seed,
        };
        options.check(config)?;
        Ok(options)
    }

    fn degradation(&self) -> Result<DegradationRecipe> {
        let known = PRESETS.contains(&&*self.preset);
        let preset = Degradation::preset(&self.preset).filter(|_| known);
        let recipe = preset.and_then(|preset| preset.recipes.into_iter().next());
        recipe.ok_or_else(|| {
            let presets = PRESETS.join(", ");
            Error::Setting(format!("preset = {}: one of {presets}", self.preset))
        })
    }

    /// Returns the shape of the student.
    fn shape(&self, config: &ResShiftConfig, begin: &InitialWeights) -> Result<UnetConfig> {
        let given = [
            self.student.is_some(),
            self.student_channels.is_some(),
            self.student_config.is_some(),
        ];
        if given.iter().filter(|given| **given).count() > 1 {
            let text = "student, student_channels and student_config exclude each other";
            return Err(Error::Setting(text.into()));
        }
        if self.student.is_some() && self.from_scratch {
            let text = "student and from_scratch exclude each other";
            return Err(Error::Setting(text.into()));
        }
        if let InitialWeights::Model(model) = begin {
            return Ok(model.metadata.config.unet.clone());
        }
        if let Some(path) = &self.student_config {
            let text = fs::read_to_string(path).map_err(Error::io(path))?;
            return serde_json::from_str(&text)
                .map_err(|e| toml_file::wrong(path, format!("no network's configuration: {e}")));
        }
        match self.student_channels {
            Some(n) if n == 0 || n > 4096 || !n.is_multiple_of(32) => Err(Error::Setting(format!(
                "student_channels = {n}: a multiple of 32 up to 4096"
            ))),
            Some(n) => Ok(narrowed(&config.unet, n)),
            None => Ok(config.unet.clone()),
        }
    }
}
