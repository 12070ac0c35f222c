//! Runs of a recipe: latent, teacher, student.

use std::{
    fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
};

use candle_core::DType;

use super::{
    InitialWeights, Latent, TrainingData,
    recipe::{Recipe, train_scales},
    student::{self, Distillation, StudentRun, Target, initial_weights},
    teacher::{self, FrozenTeacher, TeacherRun},
};
use crate::{
    Error, Result,
    metrics::Lpips,
    train::{
        checkpoint::{Start, has_checkpoint, write_atomically},
        data::{corpus::Corpus, matched::Matched, spec::PoolSpec},
        observer::Observer,
        random::Fnv,
        ranks::{Ranks, shared},
        trainer::{
            self, Outcome, Plan, RunContext, RunOptions, StageEstimate, train_with_restarts,
        },
    },
};

/// Model file in the folder of a run.
const MODEL: &str = "model.safetensors";

/// Teacher's file in the folder of its run.
const TEACHER: &str = "teacher.safetensors";

/// File with the latent in the folder of the teacher.
const LATENT: &str = "latent.json";

/// Trains the teacher, if there is one, and the student of `recipe`, in the folder of `options`.
///
/// # Errors
/// As [`crate::train::Recipe::run`].
pub fn run(recipe: &Recipe, options: &RunOptions, observer: &dyn Observer) -> Result<Outcome> {
    let ranks = &*options.ranks;
    let recipe = &shared_recipe(recipe, ranks)?;
    // The other ranks find the clips and the latent that the first one makes.
    let run = ranks.first_then_others(|| Run::prepare(recipe, options, observer, false))?;
    ranks.check_same("data or options", run.fingerprint())?;
    trainer::create_folder(&options.folder)?;
    match run.train_teacher()? {
        Outcome::Completed => run.train_student(),
        stopped => Ok(stopped),
    }
}

/// Measures the time of some steps of each stage.
///
/// # Errors
/// As [`run`].
pub fn estimate(
    recipe: &Recipe,
    options: &RunOptions,
    observer: &dyn Observer,
) -> Result<Vec<StageEstimate>> {
    let ranks = &*options.ranks;
    let recipe = &shared_recipe(recipe, ranks)?;
    let run = ranks.first_then_others(|| Run::prepare(recipe, options, observer, true))?;
    run.estimate()
}

/// Returns the recipe with its batches shared among the ranks.
fn shared_recipe(recipe: &Recipe, ranks: &dyn Ranks) -> Result<Recipe> {
    let mut recipe = recipe.clone();
    let student = &mut recipe.student;
    (student.batch, student.accumulate) = shared(student.batch, student.accumulate, ranks.count())?;
    if let Some(teacher) = &mut recipe.teacher {
        (teacher.batch, teacher.accumulate) =
            shared(teacher.batch, teacher.accumulate, ranks.count())?;
    }
    Ok(recipe)
}

/// A recipe and all that its stages have in common.
struct Run<'a> {
    recipe: &'a Recipe,
    options: &'a RunOptions,
    observer: &'a dyn Observer,
    target: Target,
    begin: Option<InitialWeights>,
    data: TrainingData,
    latent: Latent,
    teacher_latent: Latent,
    teacher_folder: PathBuf,
    lpips: Option<Lpips>,
    device: candle_core::Device,
    dtype: DType,
}

impl<'a> Run<'a> {
    /// Checks and loads everything. A `dry` run writes nothing but clips in the cache.
    fn prepare(
        recipe: &'a Recipe,
        options: &'a RunOptions,
        observer: &'a dyn Observer,
        dry: bool,
    ) -> Result<Self> {
        options.check()?;
        recipe.check()?;
        let folder = &options.folder;
        // A run that continues has its own weights.
        let begin = recipe.begin.as_deref().filter(|_| !has_checkpoint(folder));
        let begin = begin.map(initial_weights).transpose()?;
        let teacher_folder = match (&options.teacher, &recipe.teacher) {
            (Some(teacher), _) => teacher.clone(),
            (None, Some(_)) => folder.join("teacher"),
            (None, None) => folder.clone(),
        };
        if recipe.teacher.is_some() && resolved(&teacher_folder)? == resolved(folder)? {
            return Err(Error::Setting(
                "the run and its teacher have the same folder: both write a checkpoint there"
                    .into(),
            ));
        }
        let (device, dtype) = options.open_device()?;
        let (student, lowest) = recipe.student_and_lowest()?;
        let target = Target {
            name: recipe.name.clone(),
            student,
            scales: [lowest, recipe.scale],
        };
        if let Some(begin) = &begin {
            begin.check_student(&target.student, recipe.student.expand)?;
        }
        let lpips = options.lpips.as_deref().map(Lpips::load).transpose()?;
        let data = training_data(recipe, &target, observer, dry)?;
        let latent = Latent::nominal(
            student.latent,
            student.r,
            train_scales(lowest, recipe.scale),
        );
        let mut run = Self {
            recipe,
            options,
            observer,
            teacher_latent: latent.clone(),
            latent,
            target,
            begin,
            data,
            teacher_folder,
            lpips,
            device,
            dtype,
        };
        run.teacher_latent = run.find_latent(dry)?;
        run.latent = run.students_latent(dry)?;
        Ok(run)
    }

    /// Returns the latent of the student: that of the model that it begins with, which is then in
    /// the folder of the run, or that of the teacher.
    fn students_latent(&self, dry: bool) -> Result<Latent> {
        let folder = &self.options.folder;
        let path = folder.join(LATENT);
        let latent = match &self.begin {
            Some(begin) => Latent {
                stats: begin.stats.clone(),
                ..self.teacher_latent.clone()
            },
            None if has_checkpoint(folder) && path.exists() => read_latent(&path)?,
            None => self.teacher_latent.clone(),
        };
        let outdated = latent != self.teacher_latent || path.exists();
        if outdated && !dry && self.options.ranks.is_first() {
            write_latent(&path, &latent)?;
        }
        Ok(latent)
    }

    /// Returns the latent in the folder of the teacher. Measures it if the folder has none that
    /// was trained with, and writes it there.
    fn find_latent(&self, dry: bool) -> Result<Latent> {
        let folder = &self.teacher_folder;
        let path = folder.join(LATENT);
        let expected = &self.latent;
        let ranks = &*self.options.ranks;
        // A latent that nothing was trained with may be of other data, if this run has not just
        // measured it.
        let used = has_checkpoint(folder) || folder.join(TEACHER).exists() || !ranks.is_first();
        if used && path.exists() {
            let found = read_latent(&path)?;
            let shape = |latent: &Latent| (latent.kind, latent.r, latent.scales);
            if shape(&found) != shape(expected) {
                let reason = "is for other scales or another kind of student: use another folder";
                return Err(Error::training(path, reason));
            }
            return Ok(found);
        }
        let latent = match &self.begin {
            // The network knows no other statistics.
            Some(begin) => Latent {
                stats: begin.stats.clone(),
                ..expected.clone()
            },
            None => {
                self.observer.message("measuring the latent");
                let patch = latent_patch(self.recipe, &self.target);
                expected.measured(&*self.data.source, patch)?
            }
        };
        if !dry && ranks.is_first() {
            write_latent(&path, &latent)?;
        }
        Ok(latent)
    }

    fn context<'b>(&self, folder: &'b Path, start: Start, halvings: i32) -> RunContext<'b> {
        RunContext {
            folder,
            start,
            data_threads: self.options.data_threads,
            device: self.device.clone(),
            dtype: self.dtype,
            halvings,
            ranks: self.options.ranks.clone(),
        }
    }

    fn open_teacher(&self, options: &teacher::Options, context: &RunContext) -> Result<TeacherRun> {
        TeacherRun::new(
            options.clone(),
            self.teacher_latent.clone(),
            &self.data,
            context,
        )
    }

    fn open_student(
        &self,
        options: &student::Options,
        teacher: Option<FrozenTeacher>,
        context: &RunContext,
    ) -> Result<StudentRun> {
        let mut run = StudentRun::new(
            options.clone(),
            self.target.clone(),
            self.latent.clone(),
            teacher,
            self.begin.as_ref(),
            &self.data,
            context,
        )?;
        if let Some(lpips) = &self.lpips {
            run.set_lpips(lpips.clone());
        }
        Ok(run)
    }

    /// Returns a hash of recipe and data.
    fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        self.data.fingerprint().hash(&mut hash);
        format!(
            "{:?} {:?} {:?}",
            self.recipe, self.latent, self.teacher_latent
        )
        .hash(&mut hash);
        hash.finish()
    }

    /// Writes the recipe to `recipe.toml` in the folder of the run, from which the run can be
    /// repeated. Call it once the run has accepted the recipe.
    fn record(&self) -> Result<()> {
        if !self.options.ranks.is_first() {
            return Ok(());
        }
        let path = self.options.folder.join("recipe.toml");
        let mut recipe = self.recipe.clone();
        recipe.make_absolute()?;
        if recipe.begin.is_none() && has_checkpoint(&self.options.folder) {
            // The run may have begun with a model that is not named again when it continues.
            recipe.begin = Recipe::read(&path).ok().and_then(|r| r.begin);
        }
        let text = toml::to_string(&recipe).map_err(|e| Error::training(&path, e.to_string()))?;
        write_atomically(&path, text.as_bytes())
    }

    fn train_teacher(&self) -> Result<Outcome> {
        let Some(options) = &self.recipe.teacher else {
            return Ok(Outcome::Completed);
        };
        let steps = options.steps;
        self.observer.message(&format!("teacher: {steps} steps"));
        let folder = &self.teacher_folder;
        if TeacherRun::is_done(options, &self.teacher_latent, &self.data, folder)? {
            let path = folder.join(TEACHER);
            self.observer.message(&format!("done: {}", path.display()));
            return Ok(Outcome::Completed);
        }
        let plan = Plan {
            steps,
            images: options.batch * options.accumulate,
            save_every: self.options.save_every,
            folder,
            product: TEACHER,
            ranks: &*self.options.ranks,
        };
        let open = |resume, halvings| {
            let context = self.context(folder, Start::of(resume), halvings);
            let run = self.open_teacher(options, &context)?;
            // The recipe of a student that has begun stays.
            if !has_checkpoint(&self.options.folder) {
                self.record()?;
            }
            Ok(run)
        };
        train_with_restarts(open, has_checkpoint(folder), &plan, self.observer)
    }

    fn train_student(&self) -> Result<Outcome> {
        let options = &self.recipe.student;
        let steps = options.steps;
        self.observer.message(&format!("student: {steps} steps"));
        let folder = &self.options.folder;
        let plan = Plan {
            steps,
            images: options.batch * options.accumulate,
            save_every: self.options.save_every,
            folder,
            product: MODEL,
            ranks: &*self.options.ranks,
        };
        let open = |resume, halvings| {
            let path = self.teacher_folder.join(TEACHER);
            let teacher = match self.recipe.teacher {
                Some(_) => Some(FrozenTeacher::read(&path, &self.device, self.dtype)?),
                None => None,
            };
            let context = self.context(folder, Start::of(resume), halvings);
            let run = self.open_student(options, teacher, &context)?;
            self.record()?;
            Ok(run)
        };
        train_with_restarts(open, self.options.resumes(), &plan, self.observer)
    }

    fn estimate(&self) -> Result<Vec<StageEstimate>> {
        let context = self.context(&self.options.folder, Start::Dry, 0);
        let mut options = self.recipe.student.clone();
        let distillation = options.distillation.clone();
        options.distillation = Distillation::none();
        let images = options.batch * options.accumulate;
        let measure = |name, run: &mut StudentRun, steps| {
            trainer::estimate(name, run, images, steps, self.observer)
        };
        let Some(teacher) = &self.recipe.teacher else {
            let mut run = self.open_student(&options, None, &context)?;
            return Ok(vec![measure("student", &mut run, options.steps)?]);
        };
        let mut run = self.open_teacher(teacher, &context)?;
        let batch = teacher.batch * teacher.accumulate;
        let first = trainer::estimate("teacher", &mut run, batch, teacher.steps, self.observer)?;
        let frozen = run.frozen()?;
        let supervised = (distillation.after * options.steps as f64).round() as u64;
        let mut run = self.open_student(&options, None, &context)?;
        let second = measure("student", &mut run, supervised)?;
        options.distillation = Distillation {
            after: 0.0,
            ..distillation
        };
        let mut run = self.open_student(&options, Some(frozen), &context)?;
        let third = measure("distillation", &mut run, options.steps - supervised)?;
        Ok(vec![first, second, third])
    }
}

/// Reads the latent at `path`.
fn read_latent(path: &Path) -> Result<Latent> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::training(path, format!("cannot be understood: {e}")))
}

/// Writes the latent to `path`, in a folder that may not exist yet.
fn write_latent(path: &Path, latent: &Latent) -> Result<()> {
    if let Some(folder) = path.parent() {
        trainer::create_folder(folder)?;
    }
    let json = serde_json::to_vec_pretty(latent);
    let json = json.map_err(|e| Error::training(path, e.to_string()))?;
    write_atomically(path, &json)
}

/// Absolute path of a folder that may not exist yet.
fn resolved(folder: &Path) -> Result<PathBuf> {
    let path = fs::canonicalize(folder).or_else(|_| std::path::absolute(folder));
    path.map_err(Error::io(folder))
}

/// Loads the training data of `recipe`.
fn training_data(
    recipe: &Recipe,
    target: &Target,
    observer: &dyn Observer,
    dry: bool,
) -> Result<TrainingData> {
    let mut spec = recipe.data.clone();
    if spec.dirs.is_empty() && spec.pairs.is_none() {
        return Err(Error::Setting(
            "nothing to train on: name folders by --data or --pairs, or in the recipe's data"
                .into(),
        ));
    }
    if dry {
        spec.pool.clips = PoolSpec::MIN_CLIPS;
    }
    spec.pool.successive = target.student.memory > 0;
    let teacher = recipe.teacher.as_ref().map_or(0, |t| t.patch);
    let patch = latent_patch(recipe, target)
        .max(teacher)
        .max(recipe.student.patch);
    if let Some([low, high]) = &spec.pairs {
        let mut pairs = matched(low, high, patch, target, spec.hold_out, observer)?;
        pairs.sampling = spec.sampling.clone();
        return Ok(TrainingData::matched(pairs, spec.hold_out));
    }
    let scales = train_scales(target.scales[0], target.scales[1]);
    let corpus = Corpus::load(&spec, patch, scales, &|progress| {
        observer.prepared(progress);
        !observer.is_stopped()
    });
    observer.ended();
    let corpus = corpus?;
    if observer.is_stopped() {
        return Err(Error::Cancelled);
    }
    for skipped in corpus.skipped() {
        observer.message(&skipped.to_string());
    }
    for note in corpus.notes() {
        observer.message(&format!("note: {note}"));
    }
    let student = &target.student;
    observer.message(&format!(
        "{}; {:?} with {} parameters",
        corpus.summary(),
        student.architecture,
        student.parameters()
    ));
    Ok(TrainingData::corpus(corpus))
}

/// Loads the matched pairs of two folders for patches of `patch` pixels.
fn matched(
    low: &Path,
    high: &Path,
    patch: usize,
    target: &Target,
    hold_out: usize,
    observer: &dyn Observer,
) -> Result<Matched> {
    let pairs = Matched::load(low, high, patch)?;
    for skipped in pairs.skipped() {
        observer.message(&skipped.to_string());
    }
    let (scale, [lowest, largest]) = (pairs.scale(), target.scales);
    if !(lowest < scale && scale <= largest) {
        return Err(Error::Setting(format!(
            "the pairs have scale {scale}, the model serves {lowest} to {largest}"
        )));
    }
    observer.message(&format!("{} pairs of scale {scale}", pairs.len()));
    let files = pairs.files();
    if files < hold_out {
        observer.message(&format!(
            "note: {files} files are too few to hold out one of {hold_out}: all are used for \
             training and for measurements"
        ));
    }
    Ok(pairs)
}

/// Side of the patches that the latent is measured on: the same for all students of a teacher.
fn latent_patch(recipe: &Recipe, target: &Target) -> usize {
    match (&recipe.teacher, recipe.student.patch) {
        (None, patch @ 1..) => patch,
        _ => 48 * target.student.r,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{
        lite::Size,
        ranks::{
            Alone, Ranks,
            threads::{difference, on_ranks, photos},
        },
    };

    /// Returns a recipe of a teacher and a student with all terms.
    fn recipe(folder: &Path) -> Recipe {
        photos(folder);
        let mut recipe = Recipe::new("small", Size::Tiny, 2.0);
        recipe.data.dirs = vec![folder.into()];
        recipe.data.preset = "stills".into();
        recipe.data.hold_out = 3;
        recipe.conditioning.denoise = true;
        recipe.teacher = Some(teacher::Options {
            widths: vec![16, 16],
            blocks: 1,
            steps: 10,
            batch: 2,
            patch: 32,
            ..teacher::Options::default()
        });
        recipe.student.steps = 50;
        recipe.student.batch = 2;
        recipe.student.accumulate = 2;
        recipe.student.patch = 32;
        recipe.student.distillation.after = 0.2;
        recipe.student.distillation.width = 16;
        recipe
    }

    fn options(folder: PathBuf, ranks: std::sync::Arc<dyn Ranks>) -> RunOptions {
        RunOptions {
            save_every: 20,
            data_threads: 1,
            ranks,
            ..RunOptions::new(folder)
        }
    }

    #[test]
    fn ranks_train_the_model_of_one_process_and_a_run_continues_on_one() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(dir.path());
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        let alone = |folder: &Path| options(folder.into(), std::sync::Arc::new(Alone));
        // The teacher is the same for one process and two ranks.
        let mut given = recipe.clone();
        given.teacher.as_mut().unwrap().accumulate = 2;
        assert_eq!(run(&given, &alone(&one), &()).unwrap(), Outcome::Completed);
        let outcomes = on_ranks(2, |ranks| run(&given, &options(two.clone(), ranks), &()));
        for outcome in outcomes {
            assert_eq!(outcome.unwrap(), Outcome::Completed);
        }
        for folder in ["", "teacher"] {
            let apart = difference(&one.join(folder), &two.join(folder));
            assert!(apart < 1e-6, "{folder}: {apart}");
        }
        let lines = |folder: &Path| {
            let text = fs::read_to_string(folder.join("losses.csv")).unwrap();
            text.lines().count()
        };
        assert_eq!([lines(&one), lines(&two)], [51, 51]);

        // The batches are those that two ranks were given, also for one process.
        given.student.steps = 60;
        assert_eq!(run(&given, &alone(&two), &()).unwrap(), Outcome::Completed);
        assert_eq!(lines(&two), 61);
        // A recipe without batches to share gets smaller ones.
        let three = dir.path().join("three");
        let mut whole = recipe;
        (whole.student.accumulate, whole.student.batch) = (1, 4);
        whole.student.steps = 2;
        let outcomes = on_ranks(2, |ranks| run(&whole, &options(three.clone(), ranks), &()));
        assert!(outcomes.into_iter().all(|outcome| outcome.is_ok()));
        let recorded = Recipe::read(&three.join("recipe.toml")).unwrap();
        assert_eq!(
            (recorded.student.batch, recorded.student.accumulate),
            (2, 2)
        );
    }

    #[test]
    fn ranks_with_other_data_refuse_to_train() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(dir.path());
        let errors = on_ranks(2, |ranks| {
            let mut recipe = recipe.clone();
            recipe.student.seed += ranks.rank() as u64;
            let out = dir.path().join("run");
            run(&recipe, &options(out, ranks), &())
                .unwrap_err()
                .to_string()
        });
        for error in errors {
            assert!(
                error.starts_with("rank 1 has other data or options than rank 0"),
                "{error}"
            );
        }
    }
}
