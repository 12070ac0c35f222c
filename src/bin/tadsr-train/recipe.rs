//! `tadsr-train run`: all stages of a recipe.

use std::{fs, path::PathBuf, sync::atomic::Ordering};

use anyhow::{Context, Result, bail};
use tadsr::{
    metrics::Lpips,
    train::{
        checkpoint::write_atomically,
        lite::{
            Latent, Material, Place,
            student::{StudentRun, Target},
            teacher::{FrozenTeacher, TeacherRun},
        },
        recipe::{Recipe, train_scales},
    },
};

use crate::run::{self, Plan, Training};

/// Make a model by a recipe: measure the latent, train a teacher, distil it into a student.
///
/// The folder gets `model.safetensors`, the model that the element loads. Stages that are done are not done again; Ctrl-C
/// saves a checkpoint, and the same command goes on from it exactly.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tadsr-train run recipes/tiny-x4.toml --data photos --out runs/tiny-x4
  tadsr-train run recipes/tiny-x4.toml --out runs/tiny-x4                     # goes on after Ctrl-C
  tadsr-train run recipes/tiny-x4.toml --out runs/b --teacher runs/tiny-x4/teacher  # with a teacher that is there")]
pub struct Args {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Folders (or files) to train on, instead of the recipe's
    #[arg(long, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of the teacher's run, which recipes with the same latent may share [default: teacher in the run's folder]
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    /// Checkpoint of another student's run whose weights this one begins with
    #[arg(long, value_name = "FILE")]
    begin: Option<PathBuf>,
    /// Weights of LPIPS, to measure it on what is held out
    #[arg(long, value_name = "FILE")]
    lpips: Option<PathBuf>,
    /// Steps between two checkpoints, each with a measurement on what is held out
    #[arg(long, default_value_t = 1000)]
    save_every: u64,
    /// Threads for the network; the data has as many again [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
}

pub fn run(args: Args) -> Result<()> {
    let recipe = Recipe::read(&args.recipe)?;
    let (student, low) = recipe.size.student(recipe.scale)?;
    if args.save_every == 0 {
        bail!("--save-every must be at least 1");
    }
    let threads = run::use_threads(args.threads)?;
    run::make_folder(&args.out)?;
    let stop = run::stop_flag()?;
    let lpips = args.lpips.as_deref().map(Lpips::load).transpose()?;
    let dirs = match args.data.is_empty() {
        true => &recipe.data.dirs,
        false => &args.data,
    };
    if dirs.is_empty() {
        bail!("nothing to train on: name folders by --data or by dirs in the recipe's data");
    }
    let patches = [
        recipe.student.patch,
        recipe.teacher.as_ref().map_or(0, |t| t.patch),
        48 * student.r,
    ];
    let side = patches.into_iter().max().unwrap_or_default();
    let mut photos = run::load_photos(dirs, side)?;
    let held_out = photos.hold_out(recipe.data.hold_out);
    eprintln!(
        "{} photos to train on, {} held out",
        photos.len(),
        held_out.len()
    );
    let material = Material::photos(photos, held_out, recipe.data.preset.degradation());
    let teacher_dir = args.teacher.unwrap_or_else(|| args.out.join("teacher"));
    let shared = match recipe.teacher {
        Some(_) => &teacher_dir,
        None => &args.out,
    };
    run::make_folder(shared)?;
    let latent = {
        let path = shared.join("latent.json");
        let scales = train_scales(low, recipe.scale);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("'{}' cannot be understood", path.display()))?,
            Err(_) => {
                eprintln!("measuring the latent");
                let (kind, r) = (student.latent, student.r);
                let latent = Latent::measure(kind, r, scales, &*material.source, 48 * r)?;
                write_atomically(&path, &serde_json::to_vec_pretty(&latent)?)?;
                latent
            }
        }
    };
    if let Some(options) = &recipe.teacher {
        eprintln!("teacher: {} steps", options.steps);
        let plan = Plan {
            steps: options.steps,
            images: options.batch * options.accumulate,
            save_every: args.save_every,
            folder: &teacher_dir,
            product: "teacher.safetensors",
        };
        let open = |resume, slower| {
            let place = Place {
                dir: &teacher_dir,
                resume,
                data_threads: threads,
                slower,
            };
            Ok(TeacherRun::new(
                options.clone(),
                latent.clone(),
                &material,
                &place,
            )?)
        };
        let resume = teacher_dir.join("checkpoint.safetensors").exists();
        run::train_with_patience(open, resume, &plan, &stop)?;
        if stop.load(Ordering::SeqCst) {
            return Ok(());
        }
    }
    let target = Target {
        name: recipe.name.clone(),
        student,
        scales: [low, recipe.scale],
    };
    let options = &recipe.student;
    eprintln!("student: {} steps", options.steps);
    let plan = Plan {
        steps: options.steps,
        images: options.batch * options.accumulate,
        save_every: args.save_every,
        folder: &args.out,
        product: "model.safetensors",
    };
    let open = |resume, slower| {
        let teacher = match recipe.teacher {
            Some(_) => Some(FrozenTeacher::read(
                &teacher_dir.join("teacher.safetensors"),
            )?),
            None => None,
        };
        let place = Place {
            dir: &args.out,
            resume,
            data_threads: threads,
            slower,
        };
        let (target, latent) = (target.clone(), latent.clone());
        let begin = args.begin.as_deref();
        let mut run = StudentRun::new(
            options.clone(),
            target,
            latent,
            teacher,
            begin,
            &material,
            &place,
        )?;
        if let Some(lpips) = &lpips {
            run.set_lpips(lpips.clone());
        }
        Ok(run)
    };
    let resume = args.out.join("checkpoint.safetensors").exists();
    run::train_with_patience(open, resume, &plan, &stop)
}

impl Training for TeacherRun {
    fn done(&self) -> u64 {
        Self::done(self)
    }

    fn step(&mut self) -> tadsr::Result<Vec<(&'static str, f64)>> {
        Ok(vec![("loss", Self::step(self)?)])
    }

    fn save(&self) -> tadsr::Result<()> {
        Self::save(self)
    }

    fn validate(&self) -> tadsr::Result<String> {
        let all = Self::validate(self)?;
        let text = all
            .iter()
            .map(|(name, loss, gain)| format!("{name} {loss:.4} ({gain:+.3} dB)"));
        let text: Vec<_> = text.collect();
        Ok(format!("held out {}", text.join(", ")))
    }
}
