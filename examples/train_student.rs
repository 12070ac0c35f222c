//! Trains a model for scales up to 2 on photos and writes it to `model.safetensors` in a folder.
//!
//! ```text
//! cargo run --release --example train_student -- PHOTOS OUT [STEPS]
//! ```

use std::{env, path::Path};

use anyhow::{Context, Result};
use tadsr::train::{
    Measurement, Observer, Outcome, Progress, Recipe, RunOptions,
    lite::{self, Size},
};

/// Prints messages and measurements.
struct Console;

impl Observer for Console {
    fn message(&self, text: &str) {
        println!("{text}");
    }

    fn measured(&self, progress: &Progress, held_out: &Measurement) {
        println!(
            "step {} of {}: {}",
            progress.done, progress.steps, held_out.text
        );
    }
}

/// Trains for `steps` steps on the photos in a folder. Continues if `out` has a checkpoint.
pub fn train(photos: &Path, out: &Path, steps: u64) -> tadsr::Result<Outcome> {
    let mut recipe = lite::Recipe::new("mine-x2", Size::Tiny, 2.0);
    recipe.data.dirs = vec![photos.into()];
    recipe.data.preset = "stills".into();
    recipe.student.steps = steps;
    Recipe::from(recipe).run(&RunOptions::new(out), &Console)
}

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [photos, out, steps @ ..] = args.as_slice() else {
        anyhow::bail!("usage: train_student PHOTOS OUT [STEPS]");
    };
    let steps = steps.first().map_or("1000", String::as_str);
    let steps = steps.parse().with_context(|| format!("steps '{steps}'"))?;
    let outcome = train(Path::new(photos), Path::new(out), steps)?;
    println!("{outcome:?}");
    Ok(())
}
