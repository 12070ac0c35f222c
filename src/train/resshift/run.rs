//! Runs of a distillation recipe.

use std::{path::Path, sync::Arc, time::Instant};

use super::{Distill, InitialWeights, recipe::Recipe};
use crate::{
    Error, Result,
    model::ResShiftModel,
    nn::resshift::UnetConfig,
    train::{
        checkpoint::Start,
        observer::{Observer, load_photos},
        ranks::shared,
        trainer::{
            Outcome, Plan, RunContext, RunOptions, StageEstimate, Training, create_folder, train,
        },
    },
};

/// Distils the teacher of `recipe` into a student, in the folder of `options`.
///
/// # Errors
/// As [`crate::train::Recipe::run`].
pub fn run(recipe: &Recipe, options: &RunOptions, observer: &dyn Observer) -> Result<Outcome> {
    let start = Start::of(options.resumes());
    let recipe = &shared_recipe(recipe, options)?;
    let mut run = open(recipe, options, observer, start)?;
    options
        .ranks
        .check_same("data or options", run.fingerprint())?;
    if run.done() == 0 {
        let text = run.validate()?.text;
        observer.message(&format!("before the first step: {text}"));
    }
    let plan = Plan {
        steps: recipe.steps,
        images: recipe.batch * recipe.accumulate,
        save_every: options.save_every,
        folder: &options.folder,
        product: "model.safetensors",
        ranks: &*options.ranks,
    };
    train(&mut run, &plan, observer)
}

/// Measures the time of one step, which is expensive.
///
/// # Errors
/// As [`run`].
pub fn estimate(
    recipe: &Recipe,
    options: &RunOptions,
    observer: &dyn Observer,
) -> Result<Vec<StageEstimate>> {
    let recipe = &shared_recipe(recipe, options)?;
    let mut run = open(recipe, options, observer, Start::Dry)?;
    let start = Instant::now();
    run.step()?;
    Ok(vec![StageEstimate {
        name: "distillation",
        images: recipe.batch * recipe.accumulate,
        step: start.elapsed(),
        steps: recipe.steps,
    }])
}

/// Returns the recipe with its batches shared among the ranks.
fn shared_recipe(recipe: &Recipe, options: &RunOptions) -> Result<Recipe> {
    let count = options.ranks.count();
    let (batch, accumulate) = shared(recipe.batch, recipe.accumulate, count)?;
    Ok(Recipe {
        batch,
        accumulate,
        ..recipe.clone()
    })
}

fn open(
    recipe: &Recipe,
    options: &RunOptions,
    observer: &dyn Observer,
    start: Start,
) -> Result<Distill> {
    options.check()?;
    if options.teacher.is_some() || options.lpips.is_some() {
        let text = "teacher and lpips are options of recipes of the lite family";
        return Err(Error::Setting(text.into()));
    }
    if recipe.data.is_empty() {
        let text = "nothing to train on: name folders by --data or in the recipe's data";
        return Err(Error::Setting(text.into()));
    }
    let (device, dtype) = options.open_device()?;
    let teacher = ResShiftModel::read(&recipe.teacher)?;
    let model = recipe.student.as_deref().map(ResShiftModel::read);
    let model = model.transpose()?;
    let begin = match &model {
        _ if recipe.from_scratch => InitialWeights::Random,
        Some(model) => InitialWeights::Model(model),
        None => InitialWeights::Teacher,
    };
    let folder: &Path = &options.folder;
    let run = recipe.options(&teacher.metadata.config, &begin, folder)?;
    if start != Start::Dry {
        create_folder(folder)?;
    }
    let [photos, held_out] = load_photos(&recipe.data, run.patch, observer)?;
    observer.message(&format!(
        "{} photos to train on, {} held out; teacher '{}' with {}, student with {} parameters",
        photos.len(),
        held_out.len(),
        teacher.metadata.name,
        parameters(&teacher.metadata.config.unet),
        parameters(&run.student),
    ));
    let context = RunContext {
        folder,
        start,
        data_threads: options.data_threads,
        device,
        dtype,
        halvings: 0,
        ranks: options.ranks.clone(),
    };
    Distill::new(run, teacher, begin, Arc::new(photos), &held_out, &context)
}

fn parameters(config: &UnetConfig) -> usize {
    let shapes = config.tensors();
    let sizes = shapes
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>());
    sizes.sum()
}
