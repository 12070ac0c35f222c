//! Recipes: all that determines the result of a run, as a TOML file or as a value.

use std::path::{Path, PathBuf};

use super::{
    lite,
    observer::Observer,
    resshift, toml_file,
    trainer::{Outcome, RunOptions, StageEstimate},
};
use crate::Result;

/// Recipe of a model of either family.
#[derive(Clone, Debug, PartialEq)]
pub enum Recipe {
    /// Measures the latent, trains a teacher if there is one, and trains the student.
    Lite(Box<lite::Recipe>),
    /// Distils a ResShift model into a student of one step.
    ResShift(Box<resshift::Recipe>),
}

impl From<lite::Recipe> for Recipe {
    fn from(recipe: lite::Recipe) -> Self {
        Self::Lite(Box::new(recipe))
    }
}

impl From<resshift::Recipe> for Recipe {
    fn from(recipe: resshift::Recipe) -> Self {
        Self::ResShift(Box::new(recipe))
    }
}

impl Recipe {
    /// Reads the recipe at `path` and the files that it names. The key `published`, which names the
    /// teacher, makes it a recipe of the ResShift family.
    ///
    /// # Errors
    /// [`crate::Error::Io`] for a file that cannot be read; [`crate::Error::Setting`] that names
    /// the file, the key or line, and the range of a value.
    pub fn read(path: &Path) -> Result<Self> {
        let table = toml_file::read_table(path)?;
        if table.contains_key("published") {
            return Ok(resshift::Recipe::read(path)?.into());
        }
        Ok(lite::Recipe::from_table(table, path)?.into())
    }

    /// Replaces the folders and files that the recipe trains on.
    pub fn set_data(&mut self, data: Vec<PathBuf>) {
        match self {
            Self::Lite(recipe) => (recipe.data.dirs, recipe.data.pairs) = (data, None),
            Self::ResShift(recipe) => recipe.data = data,
        }
    }

    /// Trains the model and writes it to `model.safetensors` in the folder of `options`. Completed
    /// stages are not repeated.
    ///
    /// # Errors
    /// [`crate::Error::Setting`] for a value that is out of range or data that is unfit,
    /// [`crate::Error::Training`] for a checkpoint that does not fit, [`crate::Error::Diverged`],
    /// [`crate::Error::Cancelled`] when `observer` stops the preparation of the data.
    pub fn run(&self, options: &RunOptions, observer: &dyn Observer) -> Result<Outcome> {
        match self {
            Self::Lite(recipe) => lite::run(recipe, options, observer),
            Self::ResShift(recipe) => resshift::run(recipe, options, observer),
        }
    }

    /// Measures the time of some steps of each stage. Writes nothing but clips in the cache.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn estimate(
        &self,
        options: &RunOptions,
        observer: &dyn Observer,
    ) -> Result<Vec<StageEstimate>> {
        match self {
            Self::Lite(recipe) => lite::estimate(recipe, options, observer),
            Self::ResShift(recipe) => resshift::estimate(recipe, options, observer),
        }
    }
}
