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

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{
        model::{Precision, ResShiftMetadata},
        nn::resshift::ResShiftConfig,
        train::ranks::{
            Alone, Ranks,
            threads::{difference, on_ranks, photos},
        },
    };

    /// Writes a small teacher with random weights.
    fn teacher(path: &Path) {
        let mut config = ResShiftConfig::realsr_x4();
        let (unet, autoencoder) = (&mut config.unet, &mut config.autoencoder);
        unet.model_channels = 32;
        unet.channel_mult = vec![1, 1];
        unet.num_res_blocks = vec![1, 1];
        (unet.image_size, unet.window_size, unet.lq_size) = (8, 4, 8);
        unet.attention_resolutions = vec![4];
        (unet.swin_embed_dim, unet.num_head_channels) = (32, 16);
        (autoencoder.ch, autoencoder.ch_mult) = (32, vec![1; 3]);
        (autoencoder.num_res_blocks, autoencoder.n_embed) = (vec![1; 3], 16);
        config.diffusion.steps = 4;
        let mut rng = StdRng::seed_from_u64(1);
        let values = |name: &str, shape: &[usize]| {
            let inputs: usize = shape.iter().skip(1).product();
            let spread = match shape.len() {
                1 => 0.1,
                _ => 0.5 / (inputs as f32).sqrt(),
            };
            let mean = f32::from(shape.len() == 1 && name.ends_with("weight"));
            let values =
                (0..shape.iter().product()).map(|_| mean + spread * rng.random_range(-1.0..1.0));
            Ok(values.collect())
        };
        let metadata = ResShiftMetadata::new("teacher", config, "none");
        metadata.write(path, Precision::F32, values).unwrap();
    }

    #[test]
    fn ranks_distil_the_student_of_one_process() {
        let dir = tempfile::tempdir().unwrap();
        photos(dir.path());
        let [path, one, two] = ["t.safetensors", "one", "two"].map(|name| dir.path().join(name));
        teacher(&path);
        let recipe = Recipe {
            teacher: path,
            data: vec![dir.path().into()],
            steps: 6,
            batch: 1,
            accumulate: 2,
            ..Recipe::default()
        };
        let train = |folder: &Path, ranks: Arc<dyn Ranks>| {
            let options = RunOptions {
                data_threads: 1,
                ranks,
                ..RunOptions::new(folder)
            };
            run(&recipe, &options, &()).unwrap()
        };
        assert_eq!(train(&one, Arc::new(Alone)), Outcome::Completed);
        let outcomes = on_ranks(2, |ranks| train(&two, ranks));
        assert_eq!(outcomes, [Outcome::Completed; 2]);
        let apart = difference(&one, &two);
        assert!(apart < 1e-6, "{apart}");
    }
}
