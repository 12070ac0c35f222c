//! `tadsr-train run`: all stages of a recipe.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use tadsr::{
    metrics::Lpips,
    train::{
        checkpoint::{Start, write_atomically},
        data::{
            matched::Matched,
            spec::{CorpusSpec, PoolSpec},
        },
        lite::{
            Begin, Latent, Material, Place,
            student::{self, Distillation, Options as StudentOptions, StudentRun, Target},
            teacher::{FrozenTeacher, Options as TeacherOptions, TeacherRun},
        },
        recipe::{Recipe, train_scales},
    },
};

use crate::{
    corpus, distill, dry_run,
    run::{self, HeldOut, Plan, Training},
    stop::Stop,
};

/// Make a model by a recipe: measure the latent, train a teacher, distil it into a student.
///
/// The folder gets `model.safetensors`, the model that the element loads. Stages that are done are
/// not done again; Ctrl-C saves a checkpoint, and the same command goes on from it exactly. A
/// recipe whose teacher is a ResShift model distils that.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tadsr-train run models/recipes/tiny-x4-plain.toml --data photos --out runs/plain --dry-run   # how long, how much memory
  tadsr-train run models/recipes/tiny-x4-plain.toml --data photos --out runs/plain
  tadsr-train run models/recipes/tiny-x4-plain.toml --data photos --out runs/plain             # again: goes on after Ctrl-C
  tadsr-train run models/recipes/tiny-x4.toml --data photos --out runs/a --begin runs/plain/model.safetensors
  tadsr-train run models/recipes/tiny-x4.toml --data photos --out runs/b --begin runs/plain/model.safetensors \\
      --teacher runs/a/teacher                                                          # with a teacher that is there")]
pub struct Args {
    /// The recipe, a TOML file
    recipe: PathBuf,
    /// Folders (or files) to train on, instead of the recipe's
    #[arg(long, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Two folders instead: low resolution, and the same pictures and videos at high resolution
    #[arg(long, num_args = 2, value_names = ["LOW", "HIGH"], conflicts_with = "data")]
    pairs: Option<Vec<PathBuf>>,
    #[command(flatten)]
    told: Told,
}

/// What a command is told beside a recipe.
#[derive(clap::Args)]
pub struct Told {
    /// Folder of the run
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Folder of the teacher's run, which recipes with the same latent and data may share [default: teacher in the run's
    /// folder]
    #[arg(long, value_name = "DIR")]
    pub teacher: Option<PathBuf>,
    /// Model that the student begins with: a file, the checkpoint of another run or the name of a
    /// bundled model
    #[arg(long, value_name = "MODEL")]
    pub begin: Option<String>,
    /// Weights of LPIPS, to measure it on what is held out
    #[arg(long, value_name = "FILE")]
    pub lpips: Option<PathBuf>,
    /// Take some steps without writing into the run's folder, and say how long the run takes and how much memory it needs
    #[arg(long)]
    pub dry_run: bool,
    /// Steps between two checkpoints, each with a measurement on what is held out
    #[arg(long, default_value_t = 1000)]
    pub save_every: u64,
    #[command(flatten)]
    pub compute: run::Compute,
    /// Threads for the network; the data has as many again [default: one for each core]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Whether the student goes on with its checkpoint, as `--resume` says it; None: where there is one
    #[arg(skip)]
    pub resume: Option<bool>,
}

pub fn run(args: Args) -> Result<()> {
    if args.told.save_every == 0 {
        bail!("--save-every must be at least 1");
    }
    if let Some(published) = distill::of_recipe(&args.recipe, &args.data, &args.told)? {
        if args.pairs.is_some() {
            bail!("--pairs is not for recipes that distil a ResShift model");
        }
        return distill::run(published);
    }
    let mut recipe = Recipe::read(&args.recipe)?;
    if !args.data.is_empty() {
        (recipe.data.dirs, recipe.data.pairs) = (args.data, None);
    }
    if let Some(pairs) = args.pairs {
        (recipe.data.dirs, recipe.data.pairs) = (Vec::new(), corpus::two(pairs));
    }
    make(recipe, args.told)
}

/// Makes a model by `recipe`.
pub fn make(recipe: Recipe, told: Told) -> Result<()> {
    let threads = run::use_threads(told.threads)?;
    let stop = Stop::on_signals()?.flag();
    let job = Job::new(recipe, told, threads, &stop)?;
    if job.told.dry_run {
        return job.dry_run(&stop);
    }
    run::make_folder(&job.told.out)?;
    job.train_teacher(&stop)?;
    job.train_student(&stop)
}

/// A recipe and what its stages have in common.
struct Job {
    told: Told,
    recipe: Recipe,
    target: Target,
    begin: Option<Begin>,
    material: Material,
    latent: Latent,
    teacher_dir: PathBuf,
    lpips: Option<Lpips>,
    threads: usize,
    device: candle_core::Device,
    dtype: DType,
}

impl Job {
    fn new(recipe: Recipe, told: Told, threads: usize, stop: &AtomicBool) -> Result<Self> {
        let begin = match &told.begin {
            Some(begin) if !has_checkpoint(&told.out) => Some(student::begin(begin)?),
            _ => None,
        };
        let teacher_dir = match (&told.teacher, &recipe.teacher) {
            (Some(dir), _) => dir.clone(),
            (None, Some(_)) => told.out.join("teacher"),
            (None, None) => told.out.clone(),
        };
        let path = |dir: &Path| fs::canonicalize(dir).or_else(|_| std::path::absolute(dir));
        if recipe.teacher.is_some() && path(&teacher_dir)? == path(&told.out)? {
            bail!("--teacher and --out are the same folder: both stages keep a checkpoint there");
        }
        let (device, dtype) = told.compute.open()?;
        let (student, low) = recipe.student_and_lowest()?;
        let target = Target {
            name: recipe.name.clone(),
            student,
            scales: [low, recipe.scale],
        };
        if let Some(begin) = &begin {
            begin.check_student(&target.student, recipe.student.expand)?;
        }
        let lpips = told.lpips.as_deref().map(Lpips::load).transpose()?;
        let material = material(&told, &recipe, &target, stop)?;
        Ok(Self {
            latent: latent(
                &told,
                &recipe,
                &target,
                &material,
                begin.as_ref(),
                &teacher_dir,
            )?,
            begin,
            told,
            recipe,
            target,
            material,
            teacher_dir,
            lpips,
            threads,
            device,
            dtype,
        })
    }

    fn place<'a>(&self, dir: &'a Path, start: Start, slower: i32) -> Place<'a> {
        Place {
            dir,
            start,
            data_threads: self.threads,
            device: self.device.clone(),
            dtype: self.dtype,
            slower,
        }
    }

    fn plan<'a>(&'a self, folder: &'a Path, steps: u64, images: usize) -> Plan<'a> {
        Plan {
            steps,
            images,
            save_every: self.told.save_every,
            folder,
            product: match folder == self.told.out {
                true => "model.safetensors",
                false => "teacher.safetensors",
            },
            go_on: self.told.resume.map(|_| "--resume"),
        }
    }

    fn open_teacher(&self, options: &TeacherOptions, place: &Place) -> Result<TeacherRun> {
        let latent = self.latent.clone();
        Ok(TeacherRun::new(
            options.clone(),
            latent,
            &self.material,
            place,
        )?)
    }

    /// Writes what the run is made by into its folder, once it is sure that it goes on with that: a recipe that can be run
    /// again.
    fn record(&self) -> Result<()> {
        let mut recipe = self.recipe.clone();
        let pairs = recipe.data.pairs.iter_mut().flatten();
        for dir in recipe.data.dirs.iter_mut().chain(pairs) {
            *dir = std::path::absolute(&dir)?;
        }
        let cache = recipe.data.cache.map(std::path::absolute);
        recipe.data.cache = cache.transpose()?;
        let text = toml::to_string(&recipe)?;
        Ok(write_atomically(
            &self.told.out.join("recipe.toml"),
            text.as_bytes(),
        )?)
    }

    fn train_teacher(&self, stop: &AtomicBool) -> Result<()> {
        let Some(options) = &self.recipe.teacher else {
            return Ok(());
        };
        eprintln!("teacher: {} steps", options.steps);
        let dir = &self.teacher_dir;
        if TeacherRun::is_done(options, &self.latent, &self.material, dir)? {
            eprintln!("done: {}", dir.join("teacher.safetensors").display());
            return Ok(());
        }
        let plan = self.plan(dir, options.steps, options.batch * options.accumulate);
        let open = |resume, slower| {
            let run = self.open_teacher(options, &self.place(dir, Start::of(resume), slower))?;
            // A student that has begun has the last word.
            if !has_checkpoint(&self.told.out) {
                self.record()?;
            }
            Ok(run)
        };
        run::train_with_patience(open, has_checkpoint(dir), &plan, stop)
    }

    fn open_student(
        &self,
        options: &StudentOptions,
        teacher: Option<FrozenTeacher>,
        place: &Place,
    ) -> Result<StudentRun> {
        let (target, latent) = (self.target.clone(), self.latent.clone());
        let (begin, material) = (self.begin.as_ref(), &self.material);
        let options = options.clone();
        let mut run = StudentRun::new(options, target, latent, teacher, begin, material, place)?;
        if let Some(lpips) = &self.lpips {
            run.set_lpips(lpips.clone());
        }
        Ok(run)
    }

    fn train_student(&self, stop: &AtomicBool) -> Result<()> {
        let options = &self.recipe.student;
        eprintln!("student: {} steps", options.steps);
        let dir = &self.told.out;
        let plan = self.plan(dir, options.steps, options.batch * options.accumulate);
        let open = |resume, slower| {
            let path = self.teacher_dir.join("teacher.safetensors");
            let teacher = match self.recipe.teacher {
                Some(_) => Some(FrozenTeacher::read(&path, &self.device, self.dtype)?),
                None => None,
            };
            let run = self.open_student(
                options,
                teacher,
                &self.place(dir, Start::of(resume), slower),
            )?;
            self.record().map(|()| run)
        };
        let resume = self.told.resume.unwrap_or_else(|| has_checkpoint(dir));
        run::train_with_patience(open, resume, &plan, stop)
    }

    /// Takes steps of each kind and says what all of them take.
    fn dry_run(&self, stop: &AtomicBool) -> Result<()> {
        let nowhere = self.place(&self.told.out, Start::Dry, 0);
        let mut whole = Duration::ZERO;
        let mut teacher = None;
        if let Some(options) = &self.recipe.teacher {
            let mut run = self.open_teacher(options, &nowhere)?;
            whole += dry_run::stage("teacher", &mut run, options.steps, stop)?;
            teacher = Some(run.frozen()?);
        }
        let mut options = self.recipe.student.clone();
        let d = options.distillation.clone();
        let alone = match teacher.is_some() {
            true => (d.after * options.steps as f64).round() as u64,
            false => options.steps,
        };
        options.distillation = Distillation::none();
        let mut run = self.open_student(&options, None, &nowhere)?;
        whole += dry_run::stage("student", &mut run, alone, stop)?;
        if let Some(teacher) = teacher {
            options.distillation = Distillation { after: 0.0, ..d };
            let mut run = self.open_student(&options, Some(teacher), &nowhere)?;
            whole += dry_run::stage("distillation", &mut run, options.steps - alone, stop)?;
        }
        dry_run::summary(whole);
        Ok(())
    }
}

fn has_checkpoint(dir: &Path) -> bool {
    dir.join("checkpoint.safetensors").exists()
}

/// What is trained on: the folders of the command line, or those of the recipe.
fn material(told: &Told, recipe: &Recipe, target: &Target, stop: &AtomicBool) -> Result<Material> {
    let mut data = recipe.data.clone();
    if data.dirs.is_empty() && data.pairs.is_none() {
        bail!("nothing to train on: name folders by --data or --pairs, or in the recipe's data");
    }
    if told.dry_run {
        data.pool.clips = PoolSpec::LEAST;
    }
    let teacher = recipe.teacher.as_ref().map_or(0, |t| t.patch);
    let side = latent_side(recipe, target)
        .max(teacher)
        .max(recipe.student.patch);
    if let Some([low, high]) = &data.pairs {
        let pairs = matched(low, high, side, target, &data)?;
        return Ok(Material::matched(pairs, data.hold_out));
    }
    let scales = train_scales(target.scales[0], target.scales[1]);
    let corpus = corpus::load(&data, side, scales, stop)?;
    let student = &target.student;
    eprintln!(
        "{}; {:?} with {} parameters",
        corpus::describe(&corpus),
        student.architecture,
        student.parameters()
    );
    Ok(Material::corpus(corpus))
}

/// The pairs of two folders, for patches of `side` pixels; says what is left out.
fn matched(
    low: &Path,
    high: &Path,
    side: usize,
    target: &Target,
    data: &CorpusSpec,
) -> Result<Matched> {
    let mut pairs = Matched::load(low, high, side)?;
    for skipped in pairs.skipped() {
        eprintln!("left out '{}': {}", skipped.path.display(), skipped.reason);
    }
    let (scale, [lowest, largest]) = (pairs.scale(), target.scales);
    if !(lowest < scale && scale <= largest) {
        bail!("the pairs have scale {scale}, the model serves {lowest} to {largest}");
    }
    eprintln!("{} pairs of scale {scale}", pairs.len());
    if pairs.files() < data.hold_out {
        let (files, every) = (pairs.files(), data.hold_out);
        eprintln!(
            "note: {files} files are too few to hold one of {every} out: all are trained on and measured on"
        );
    }
    pairs.sampling = data.sampling.clone();
    Ok(pairs)
}

/// The side of the patches that the latent is measured on: the same for all students that a teacher may have.
fn latent_side(recipe: &Recipe, target: &Target) -> usize {
    match (&recipe.teacher, recipe.student.patch) {
        (None, patch @ 1..) => patch,
        _ => 48 * target.student.r,
    }
}

/// The latent that the teacher's folder has, or a newly measured one, which is then kept there.
fn latent(
    told: &Told,
    recipe: &Recipe,
    target: &Target,
    material: &Material,
    begin: Option<&Begin>,
    dir: &Path,
) -> Result<Latent> {
    let path = dir.join("latent.json");
    let student = target.student;
    let scales = train_scales(target.scales[0], target.scales[1]);
    // One that nothing was trained with may be of other data.
    let used = has_checkpoint(dir) || dir.join("teacher.safetensors").exists();
    if let (true, Ok(bytes)) = (used, fs::read(&path)) {
        let kept: Latent = serde_json::from_slice(&bytes)
            .with_context(|| format!("'{}' cannot be understood", path.display()))?;
        if (kept.kind, kept.r, kept.scales) != (student.latent, student.r, scales) {
            let path = path.display();
            bail!("'{path}' is for other scales or another kind of student: use another folder");
        }
        return Ok(kept);
    }
    let latent = match begin {
        // The network knows no other.
        Some(begin) => Latent {
            kind: student.latent,
            r: student.r,
            scales,
            stats: begin.stats.clone(),
        },
        None => {
            eprintln!("measuring the latent");
            let patch = latent_side(recipe, target);
            Latent::measure(student.latent, student.r, scales, &*material.source, patch)?
        }
    };
    if !told.dry_run {
        run::make_folder(dir)?;
        write_atomically(&path, &serde_json::to_vec_pretty(&latent)?)?;
    }
    Ok(latent)
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

    fn validate(&self) -> tadsr::Result<HeldOut> {
        let (mut text, mut values) = (Vec::new(), Vec::new());
        for (name, loss, gain) in Self::validate(self)? {
            text.push(format!("{name} {loss:.4} ({gain:+.3} dB)"));
            values.push((format!("held out {name}/loss"), loss));
            values.push((format!("held out {name}/gain"), gain));
        }
        let text = format!("held out {}", text.join(", "));
        Ok(HeldOut { text, values })
    }
}
