//! The training loop: steps, checkpoints, measurements and logs.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use candle_core::DType;

use super::{
    checkpoint::{Start, has_checkpoint},
    log::RunLog,
    observer::{Measurement, Observer, Progress},
    ranks::{Alone, Ranks},
    report::SampleRow,
};
use crate::{Device, Error, Result};

/// Restarts after divergence without progress in between before a run gives up.
const MAX_RESTARTS: i32 = 5;

/// Steps that an estimate measures, after one that it does not.
const ESTIMATE_STEPS: u32 = 3;

/// A training run that the loop drives.
pub trait Training {
    /// Returns the number of steps done.
    fn done(&self) -> u64;

    /// Takes one step, on all ranks. Returns names and values of the losses, the same names in every
    /// step.
    ///
    /// # Errors
    /// [`Error::Diverged`] when a loss or gradient is out of bounds; other errors of the step.
    fn step(&mut self) -> Result<Vec<(&'static str, f64)>>;

    /// Writes checkpoint and model.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be written.
    fn save(&self) -> Result<()>;

    /// Measures the run on held-out data, on all ranks.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn validate(&self) -> Result<Measurement>;

    /// Returns images for the report.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn samples(&self) -> Result<Vec<SampleRow>> {
        Ok(Vec::new())
    }
}

/// Settings of a run that do not change its result.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Folder of the run: checkpoint, model and logs.
    pub folder: PathBuf,
    /// Folder of the teacher's run, which recipes with the same latent and data may share; `None`
    /// for `teacher` in [`Self::folder`].
    pub teacher: Option<PathBuf>,
    /// File with weights of LPIPS, to measure it on held-out data.
    pub lpips: Option<PathBuf>,
    /// Continue with the checkpoint in the folder: `Some(true)` requires one, `Some(false)` refuses
    /// to overwrite one, `None` continues if there is one.
    pub resume: Option<bool>,
    /// Steps from one checkpoint, with a measurement on held-out data, to the next.
    pub save_every: u64,
    /// Device of the networks.
    pub device: Device,
    /// Type of feature maps: F32 or BF16; weights are F32. `None` for F32 on the CPU and BF16 on
    /// CUDA.
    pub dtype: Option<DType>,
    /// Threads that make training pairs.
    pub data_threads: usize,
    /// Processes that train together. They share the folders.
    pub ranks: Arc<dyn Ranks>,
}

impl RunOptions {
    /// Options for a run in `folder` on all cores of the CPU.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            teacher: None,
            lpips: None,
            resume: None,
            save_every: 1000,
            device: Device::Cpu,
            dtype: None,
            data_threads: std::thread::available_parallelism().map_or(1, usize::from),
            ranks: Arc::new(Alone),
        }
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range.
    pub fn check(&self) -> Result<()> {
        if self.save_every == 0 {
            return Err(Error::Setting("save_every = 0: at least 1".into()));
        }
        Ok(())
    }

    /// Returns `true` if the run continues with its checkpoint.
    pub(super) fn resumes(&self) -> bool {
        self.resume.unwrap_or_else(|| has_checkpoint(&self.folder))
    }

    /// Opens the device. Returns it with the type of feature maps.
    ///
    /// # Errors
    /// [`Error::Device`] as [`super::device`].
    pub fn open_device(&self) -> Result<(candle_core::Device, DType)> {
        let device = super::device(self.device)?;
        let usual = if device.is_cpu() {
            DType::F32
        } else {
            DType::BF16
        };
        Ok((device, self.dtype.unwrap_or(usual)))
    }
}

/// Folder, device and threads of one stage of a run.
#[derive(Clone, Debug)]
pub struct RunContext<'a> {
    /// Folder with checkpoint and model.
    pub folder: &'a Path,
    pub start: Start,
    /// Threads that make training pairs.
    pub data_threads: usize,
    /// Device of the networks. The lite family is measured on the CPU.
    pub device: candle_core::Device,
    /// Type of feature maps on the device; weights are F32.
    pub dtype: DType,
    /// Times that the learning rate is halved after divergence, besides those in the checkpoint.
    pub halvings: i32,
    /// Processes that train together.
    pub ranks: Arc<dyn Ranks>,
}

/// Checks the options that all runs have.
///
/// # Errors
/// [`Error::Setting`] that names the value that is out of range.
pub(super) fn check_common(
    steps: u64,
    batch: usize,
    accumulate: usize,
    learning_rate: f64,
    ema: f64,
) -> Result<()> {
    let wrong = |text: String| Err(Error::Setting(text));
    if steps == 0 {
        return wrong("steps = 0: at least 1".into());
    }
    for (name, value) in [("batch", batch), ("accumulate", accumulate)] {
        if !(1..=1024).contains(&value) {
            return wrong(format!("{name} = {value}: 1 to 1024"));
        }
    }
    if !(learning_rate > 0.0 && learning_rate.is_finite()) {
        return wrong(format!("learning_rate = {learning_rate}: above 0"));
    }
    if !(0.0..1.0).contains(&ema) {
        return wrong(format!("ema = {ema}: at least 0, below 1"));
    }
    Ok(())
}

/// Length of a stage and its files.
pub struct Plan<'a> {
    pub steps: u64,
    /// Images in a step.
    pub images: usize,
    /// Steps from one checkpoint to the next.
    pub save_every: u64,
    /// Folder of the run. It gets `losses.csv` with a line for every step, events for TensorBoard,
    /// and `report.html` at every checkpoint.
    pub folder: &'a Path,
    /// File in the folder that the stage makes.
    pub product: &'a str,
    /// Processes that train together. The first one logs and saves.
    pub ranks: &'a dyn Ranks,
}

/// Result of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    Completed,
    /// The observer has stopped the run; its checkpoint has `done` of `steps` steps.
    Stopped {
        done: u64,
        steps: u64,
    },
}

/// Time that a stage of a run takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageEstimate {
    pub name: &'static str,
    /// Images in a step.
    pub images: usize,
    /// Mean time of a step.
    pub step: Duration,
    pub steps: u64,
}

impl StageEstimate {
    /// Time of all steps.
    pub fn total(&self) -> Duration {
        self.step.mul_f64(self.steps as f64)
    }
}

/// Measures the time of some steps of a stage of `steps` steps, without saving anything.
///
/// # Errors
/// Those of the steps; [`Error::Cancelled`] when the observer stops it.
pub fn estimate(
    name: &'static str,
    run: &mut impl Training,
    images: usize,
    steps: u64,
    observer: &dyn Observer,
) -> Result<StageEstimate> {
    let mut step = || {
        if observer.is_stopped() {
            return Err(Error::Cancelled);
        }
        run.step().map(drop)
    };
    step()?;
    let start = Instant::now();
    for _ in 0..ESTIMATE_STEPS {
        step()?;
    }
    Ok(StageEstimate {
        name,
        images,
        step: start.elapsed() / ESTIMATE_STEPS,
        steps,
    })
}

/// Trains the run that `open` returns, see [`train`]. When the run diverges, it is opened again
/// from its last checkpoint, at half the learning rate.
///
/// `open` takes `true` to continue with the checkpoint, and the number of halvings of the learning
/// rate.
///
/// # Errors
/// Those of [`train`]; [`Error::Diverged`] after some restarts without progress.
pub fn train_with_restarts<R: Training>(
    mut open: impl FnMut(bool, i32) -> Result<R>,
    resume: bool,
    plan: &Plan,
    observer: &dyn Observer,
) -> Result<Outcome> {
    let (mut run, mut halvings) = (open(resume, 0)?, 0);
    loop {
        let begun = run.done();
        let error = match train(&mut run, plan, observer) {
            Err(error @ Error::Diverged { .. }) if halvings < MAX_RESTARTS => error,
            result => return result,
        };
        drop(run);
        observer.message(&format!(
            "{error}; going back to the last checkpoint, at half the learning rate"
        ));
        let resume = has_checkpoint(plan.folder);
        halvings += 1;
        run = open(resume, halvings)?;
        if halvings > 1 && run.done() > begun {
            // The checkpoint holds the halvings before it.
            halvings = 1;
            drop(run);
            run = open(resume, halvings)?;
        }
    }
}

/// Creates the folder of a run.
pub(super) fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io(path))
}

/// Takes steps until the end of the plan or until the observer stops the run. Saves a checkpoint
/// every [`Plan::save_every`] steps and at the end.
///
/// # Errors
/// Those of the run; [`Error::Io`] for a log that cannot be written.
pub fn train(run: &mut impl Training, plan: &Plan, observer: &dyn Observer) -> Result<Outcome> {
    let product = plan.folder.join(plan.product);
    let ranks = plan.ranks;
    // All have read the folder before the first one writes there, and the other way round below.
    let complete = run.done() >= plan.steps && product.exists();
    ranks.wait()?;
    let completed = || {
        observer.message(&format!("done: {}", product.display()));
        Ok(Outcome::Completed)
    };
    if complete {
        return completed();
    }
    let mut log = if ranks.is_first() {
        Some(RunLog::open(plan.folder, run.done(), plan.images)?)
    } else {
        None
    };
    let mut progress = Progress {
        done: run.done(),
        steps: plan.steps,
        images: plan.images,
        losses: Vec::new(),
    };
    observer.started(&progress);
    let mut saved = None;
    while progress.done < plan.steps && !ranks.any(observer.is_stopped())? {
        let losses = run.step()?;
        progress.done = run.done();
        if let Some(log) = &mut log {
            log.add(progress.done, &losses)?;
            progress.losses = log.means();
        }
        observer.stepped(&progress);
        if progress.done.is_multiple_of(plan.save_every) || progress.done == plan.steps {
            if let Some(log) = &mut log {
                save(run, log, observer)?;
            }
            saved = Some(progress.done);
            let held_out = run.validate()?;
            if let Some(log) = &mut log {
                log.measured(progress.done, &held_out)?;
                log.restart();
            }
            observer.measured(&progress, &held_out);
        }
    }
    if saved != Some(progress.done)
        && let Some(log) = &mut log
    {
        save(run, log, observer)?;
    }
    ranks.wait()?;
    observer.ended();
    if progress.done < plan.steps {
        let (done, steps) = (progress.done, plan.steps);
        return Ok(Outcome::Stopped { done, steps });
    }
    completed()
}

/// Writes checkpoint, model, logs and report.
fn save(run: &impl Training, log: &mut RunLog, observer: &dyn Observer) -> Result<()> {
    log.flush()?;
    run.save()?;
    // A report that cannot be written must not end the run.
    if let Some(error) = log.report(run.done(), &run.samples()?)? {
        observer.message(&format!("no report: {error}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// Diverges at some steps as long as the learning rate is too high.
    struct Unstable {
        done: u64,
        saved: Rc<Cell<(u64, i32)>>,
        halvings: i32,
    }

    impl Training for Unstable {
        fn done(&self) -> u64 {
            self.done
        }

        fn step(&mut self) -> Result<Vec<(&'static str, f64)>> {
            // One halving is enough from step 7 on, two from step 23 on.
            let needed = i32::from(self.done >= 7) + i32::from(self.done >= 23);
            if self.halvings < needed {
                return Err(Error::Diverged {
                    path: "run".into(),
                    what: "loss".into(),
                    step: self.done,
                });
            }
            self.done += 1;
            Ok(vec![("loss", 1.0)])
        }

        fn save(&self) -> Result<()> {
            self.saved.set((self.done, self.halvings));
            Ok(())
        }

        fn validate(&self) -> Result<Measurement> {
            Ok(Measurement::default())
        }
    }

    #[test]
    fn a_run_that_diverges_continues_from_its_checkpoint_ever_slower() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("checkpoint.safetensors"), "").unwrap();
        let (saved, opened) = (Rc::new(Cell::new((0, 0))), Cell::new(0));
        let open = |resume: bool, more| {
            let (done, halvings) = saved.get();
            opened.set(opened.get() + 1);
            assert!(resume);
            Ok(Unstable {
                done,
                saved: saved.clone(),
                halvings: halvings + more,
            })
        };
        let plan = Plan {
            steps: 30,
            images: 1,
            save_every: 5,
            folder: dir.path(),
            product: "model.safetensors",
            ranks: &Alone,
        };
        let outcome = train_with_restarts(open, true, &plan, &()).unwrap();
        assert_eq!(outcome, Outcome::Completed);
        assert_eq!(saved.get(), (30, 2));
        // Once at first, once for each divergence, and once because the checkpoint already holds
        // the first halving.
        assert_eq!(opened.get(), 4);
    }
}
