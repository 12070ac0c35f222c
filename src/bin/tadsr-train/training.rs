//! Parts that all training commands share: options, progress bars, messages.

use std::{
    env,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use candle_core::DType;
use clap::ValueEnum;
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use tadsr::{
    Device, Error,
    train::{
        self, Measurement, Observer, Outcome, Progress, Recipe, RunOptions,
        data::Preparation,
        ranks::{Alone, Ranks},
    },
};

use crate::stop::{Stop, Stopped};

/// Device and threads of the networks.
#[derive(clap::Args)]
pub struct Machine {
    /// Device of the networks: cpu, cuda or cuda:N. CUDA needs a build with the feature cuda. With
    /// several processes, each takes the next GPU of its host
    #[arg(long, default_value = "cpu", value_parser = Device::from_str)]
    device: Device,
    /// Numeric precision of feature maps; weights are f32 [default: f32 on the CPU, bf16 on CUDA]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Threads for the networks; as many again make training pairs [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
}

impl Machine {
    /// Sets the number of threads of this process and returns options for a run in `folder`.
    pub fn options(&self, folder: &std::path::Path) -> Result<RunOptions> {
        let mut options = RunOptions::new(folder);
        options.device = self.device;
        options.dtype = self.precision.map(|precision| match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        });
        if let Some(threads) = self.threads {
            options.data_threads = threads.max(1);
        }
        train::keep_memory();
        // SAFETY: no other thread runs yet that could read the environment.
        unsafe { tadsr::ops::use_threads(options.data_threads)? };
        options.ranks = ranks()?;
        if let (Device::Cuda(first), 2..) = (self.device, options.ranks.count()) {
            options.device = Device::Cuda(first + number(&LOCAL_RANKS).unwrap_or(0));
        }
        Ok(options)
    }
}

/// Variables of MPI launchers with the number of processes: Open MPI; MPICH and Slurm.
const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// Variables with the number of the process on its host: Open MPI, MPICH, Slurm.
const LOCAL_RANKS: [&str; 3] = [
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
];

/// Returns the value of the first variable that is set to a number.
fn number(variables: &[&str]) -> Option<usize> {
    let value = |name: &&str| env::var(name).ok()?.parse().ok();
    variables.iter().find_map(value)
}

/// Joins the other processes if an MPI launcher has started this one.
fn ranks() -> Result<Arc<dyn Ranks>> {
    let size = number(&SIZES).unwrap_or(1);
    if size == 1 && env::var_os("PMIX_RANK").is_none() {
        return Ok(Arc::new(Alone));
    }
    #[cfg(feature = "mpi")]
    return Ok(Arc::new(train::ranks::Mpi::join()?));
    #[cfg(not(feature = "mpi"))]
    if size > 1 {
        anyhow::bail!(
            "this is one of {size} processes of an MPI launcher, but the program was built without \
             MPI: build it with --features mpi"
        );
    }
    #[cfg(not(feature = "mpi"))]
    Ok(Arc::new(Alone))
}

/// Trains by `recipe`. `resume` is the option, if any, that continues a run.
pub fn run(recipe: &Recipe, options: &RunOptions, resume: Option<&str>) -> Result<()> {
    let console = Console::new(Stop::on_signals()?, options.ranks.is_first());
    let outcome = recipe.run(options, &console);
    console.clear();
    match outcome {
        Err(error) if options.ranks.count() > 1 => {
            Err(abort(error, &*options.ranks, &console.stop))
        }
        Ok(Outcome::Completed) => Ok(()),
        Ok(Outcome::Stopped { .. }) if !options.ranks.is_first() => Err(Stopped::silently()),
        Ok(Outcome::Stopped { done, steps }) => {
            let resume = resume.map_or(String::new(), |option| format!(" and {option}"));
            let text = format!(
                "stopped at step {done} of {steps}; continue with the same command{resume}"
            );
            Err(Stopped(text).into())
        }
        Err(Error::Cancelled) => {
            let text = "stopped while preparing the data; the same command continues";
            Err(Stopped(text.into()).into())
        }
        Err(error) => Err(as_option(error)),
    }
}

/// Prints an error and ends all ranks.
fn abort(error: Error, ranks: &dyn Ranks, stop: &Stop) -> anyhow::Error {
    let error = as_option(error);
    if ranks.is_first() {
        eprintln!("tadsr-train: {error:#}");
    } else {
        // If the first rank has the same error, it prints it and stops this one.
        thread::sleep(Duration::from_secs(1));
        if !stop.is_asked() {
            eprintln!("tadsr-train: rank {}: {error:#}", ranks.rank());
        }
    }
    ranks.abort();
    error
}

/// Takes some steps of each stage of `recipe` and prints the time and memory that a run needs.
pub fn estimate(recipe: &Recipe, options: &RunOptions) -> Result<()> {
    let ranks = &*options.ranks;
    let console = Console::new(Stop::on_signals()?, ranks.is_first());
    let stages = recipe.estimate(options, &console);
    console.clear();
    let stages = match stages {
        Err(error) if ranks.count() > 1 => return Err(abort(error, ranks, &console.stop)),
        Ok(_) if !ranks.is_first() => return Ok(()),
        Err(Error::Cancelled) => return Err(Stopped("stopped".into()).into()),
        stages => stages.map_err(as_option)?,
    };
    for stage in &stages {
        println!(
            "{}: one step of {} images: {:.3} s; {} steps: about {}",
            stage.name,
            stage.images,
            stage.step.as_secs_f64(),
            stage.steps,
            HumanDuration(stage.total())
        );
    }
    let total: Duration = stages.iter().map(|stage| stage.total()).sum();
    println!("in all: about {}", HumanDuration(total));
    if let Some(peak) = peak_memory() {
        println!("peak memory: {}", HumanBytes(peak));
    }
    println!("nothing was written, except clips in the cache if there are videos or codecs");
    Ok(())
}

/// Returns the peak memory of this process in bytes, if the system reports it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kilobytes)
}

/// Turns a key of a recipe at the beginning of an error, as in `save_every = 0: at least 1`, into
/// an option: `--save-every 0: at least 1`.
pub fn as_option(error: Error) -> anyhow::Error {
    let Error::Setting(text) = &error else {
        return error.into();
    };
    let is_key = |key: &str| key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    match text.split_once(" = ") {
        Some((key, rest)) if is_key(key) => {
            let option = match key {
                "learning_rate" => "lr".into(),
                "muon_rate" => "muon-lr".into(),
                key => key.replace('_', "-"),
            };
            anyhow!("--{option} {rest}")
        }
        _ => error.into(),
    }
}

/// Progress and messages on standard error.
pub struct Console {
    stop: Stop,
    /// Prints, as the first of several processes does.
    prints: bool,
    state: Mutex<State>,
}

struct State {
    /// Current work and its bar.
    bar: Option<(&'static str, ProgressBar)>,
    /// Time and step at which training started.
    started: Instant,
    first: u64,
    /// Time of the last update of the text beside the bar.
    shown: Instant,
}

/// Name of the bar of a training.
const TRAINING: &str = "training";

impl Console {
    /// Shows progress on standard error if `prints`, and stops the work when `stop` asks for it.
    pub fn new(stop: Stop, prints: bool) -> Self {
        let now = Instant::now();
        Self {
            stop,
            prints,
            state: Mutex::new(State {
                bar: None,
                started: now,
                first: 0,
                shown: now,
            }),
        }
    }

    /// Removes the progress bar.
    pub fn clear(&self) {
        if let Some((_, bar)) = self.lock().bar.take() {
            bar.finish_and_clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the bar for `name`, a new one if another is shown.
    fn bar(&mut self, name: &'static str, template: &str) -> &ProgressBar {
        let bar = match self.bar.take() {
            Some((shown, bar)) if shown == name => bar,
            _ => {
                let bar = ProgressBar::no_length().with_prefix(name);
                // Templates are constants; a wrong one shows the default bar.
                match ProgressStyle::with_template(template) {
                    Ok(style) => bar.with_style(style),
                    Err(_) => bar,
                }
            }
        };
        &self.bar.insert((name, bar)).1
    }

    /// Prints a line above the bar, or just prints it if there is no terminal.
    fn print(&self, line: &str) {
        match &self.bar {
            Some((_, bar)) if !bar.is_hidden() => bar.println(line),
            _ => eprintln!("{line}"),
        }
    }
}

impl Observer for Console {
    fn message(&self, text: &str) {
        if self.prints {
            self.lock().print(text);
        }
    }

    fn prepared(&self, progress: Preparation) {
        if !self.prints {
            return;
        }
        let (name, done, all) = match progress {
            Preparation::Photos { done, all } => ("decoding photos", done as u64, all as u64),
            Preparation::Videos { done, all } => {
                ("cutting clips, seconds of video", done as u64, all as u64)
            }
            Preparation::Pool { done, all } => ("compressing clips", done as u64, all as u64),
        };
        let mut state = self.lock();
        let bar = state.bar(name, "{prefix} {bar:30} {pos}/{len} {per_sec} ETA {eta}");
        bar.set_length(all.max(done));
        bar.set_position(done);
    }

    fn started(&self, progress: &Progress) {
        let mut state = self.lock();
        state.bar = None;
        (state.started, state.first) = (Instant::now(), progress.done);
        if !self.prints {
            return;
        }
        let bar = state.bar(TRAINING, "{bar:30} {pos}/{len} ETA {eta_precise} {msg}");
        bar.set_length(progress.steps);
        bar.set_position(progress.done);
        bar.reset_eta();
    }

    fn stepped(&self, progress: &Progress) {
        let mut state = self.lock();
        let update = state.shown.elapsed() > Duration::from_secs(1);
        if let Some((_, bar)) = &state.bar {
            bar.set_position(progress.done);
            if update {
                let rate = bar.per_sec() * progress.images as f64;
                bar.set_message(format!("{rate:.1} images/s, {}", losses(progress)));
            }
        }
        if update {
            state.shown = Instant::now();
        }
    }

    fn measured(&self, progress: &Progress, held_out: &Measurement) {
        let state = self.lock();
        let steps = (progress.done - state.first) as f64;
        let rate = steps / state.started.elapsed().as_secs_f64();
        let left = Duration::from_secs_f64((progress.steps - progress.done) as f64 / rate);
        if !self.prints {
            return;
        }
        state.print(&format!(
            "step {} of {}: {}; {}; {:.2} images/s, {} left",
            progress.done,
            progress.steps,
            losses(progress),
            held_out.text,
            rate * progress.images as f64,
            HumanDuration(left)
        ));
    }

    fn ended(&self) {
        self.clear();
    }

    fn is_stopped(&self) -> bool {
        self.stop.is_asked()
    }
}

/// Returns the mean losses since the last checkpoint in one line.
fn losses(progress: &Progress) -> String {
    let loss = |(name, mean): &(&str, f64)| match mean.abs() {
        m if m == 0.0 || (1e-3..1e4).contains(&m) => format!("{name} {mean:.4}"),
        _ => format!("{name} {mean:.2e}"),
    };
    let losses = progress.losses.iter().map(loss);
    losses.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_option_instead_of_the_key() {
        let text = |key: &str| as_option(Error::Setting(key.into())).to_string();
        assert_eq!(
            text("save_every = 0: at least 1"),
            "--save-every 0: at least 1"
        );
        assert_eq!(text("learning_rate = 0: above 0"), "--lr 0: above 0");
        assert_eq!(text("teacher: batch = 0: 1"), "teacher: batch = 0: 1");
    }
}
