//! `tadsr-train run`: trains a model by a recipe.

use std::path::PathBuf;

use anyhow::{Result, bail};
use tadsr::train::Recipe;

use crate::{data_args::two, training};

/// Train a model by a recipe: teacher, then student.
///
/// The model is written to model.safetensors in the folder of the run. The element and the other
/// commands load this file. Completed stages are not repeated. Ctrl-C saves a checkpoint, and the
/// same command continues exactly from there. The folder also contains recipe.toml, from which the
/// run can be repeated.
/// docs/recipes.md describes the stages and all keys of a recipe.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  # Time and memory that a run needs:
  tadsr-train run models/recipes/tiny-x4-plain.toml --data photos --out runs/plain --dry-run
  # Train; the same command continues after Ctrl-C:
  tadsr-train run models/recipes/tiny-x4-plain.toml --data photos --out runs/plain
  # Begin with another model:
  tadsr-train run models/recipes/tiny-x4.toml --data photos --out runs/a \\
      --begin runs/plain/model.safetensors
  # Share a teacher that is already trained:
  tadsr-train run models/recipes/tiny-x4.toml --data photos --out runs/b \\
      --begin runs/plain/model.safetensors --teacher runs/a/teacher")]
pub struct Args {
    /// Recipe, a TOML file
    recipe: PathBuf,
    /// Folders or files with photos (JPEG, PNG) and videos, instead of those of the recipe
    #[arg(long, num_args = 1.., value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Two folders with the same images and videos in low and in high resolution, instead of --data
    #[arg(long, num_args = 2, value_names = ["LOW", "HIGH"], conflicts_with = "data")]
    pairs: Option<Vec<PathBuf>>,
    /// Folder of the run: checkpoint, model and logs
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of the training run of a teacher. Recipes with the same latent and data can share it
    /// [default: teacher in the folder of the run]
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    /// Model that the student begins with: a model file, the checkpoint of another run or the name
    /// of a bundled model [default: that of the recipe, or random weights]
    #[arg(long, value_name = "MODEL")]
    begin: Option<String>,
    /// Weights of LPIPS-squeeze (safetensors), to measure LPIPS on held-out data
    #[arg(long, value_name = "FILE")]
    lpips: Option<PathBuf>,
    /// Take some steps and print the time and memory that the run needs; write nothing
    #[arg(long)]
    dry_run: bool,
    /// Steps between checkpoints; each checkpoint includes a measurement on held-out data
    #[arg(long, default_value_t = 1000, value_name = "STEPS")]
    save_every: u64,
    #[command(flatten)]
    machine: training::Machine,
}

pub fn run(args: Args) -> Result<()> {
    let mut recipe = Recipe::read(&args.recipe)?;
    if !args.data.is_empty() {
        recipe.set_data(args.data);
    }
    match &mut recipe {
        Recipe::Lite(recipe) => {
            if let Some(pairs) = args.pairs {
                (recipe.data.dirs, recipe.data.pairs) = (Vec::new(), two(pairs));
            }
            if args.begin.is_some() {
                recipe.begin = args.begin;
            }
        }
        Recipe::ResShift(_) => {
            let given = [
                ("--teacher", args.teacher.is_some()),
                ("--begin", args.begin.is_some()),
                ("--lpips", args.lpips.is_some()),
                ("--pairs", args.pairs.is_some()),
            ];
            if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
                let path = args.recipe.display();
                bail!("'{path}' distils a ResShift model: {option} is for recipes of lite models");
            }
        }
    }
    let mut options = args.machine.options(&args.out)?;
    options.teacher = args.teacher;
    options.lpips = args.lpips;
    options.save_every = args.save_every;
    if args.dry_run {
        return training::estimate(&recipe, &options);
    }
    training::run(&recipe, &options, None)
}
