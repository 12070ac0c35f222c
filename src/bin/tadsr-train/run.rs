//! What all training runs have in common: photos, progress, the log of the losses, checkpoints, Ctrl-C.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use clap::ValueEnum;
use image::RgbImage;
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use tadsr::{
    Device,
    train::{
        self,
        checkpoint::write_atomically,
        data::PhotoSet,
        report::{EventWriter, GRADIENT, REPORT_FILE, Report, SampleRow, save_samples},
    },
};

use crate::stop::Stopped;

/// Where networks are trained, and in what numbers.
#[derive(Clone, clap::Args)]
pub struct Compute {
    /// Where the networks are trained: cpu or cuda:N, the latter where this tool was built with the feature cuda
    #[arg(long, default_value = "cpu", value_parser = Device::from_str)]
    device: Device,
    /// Numbers of their feature maps; weights are f32 [default: f32 on the CPU, where bf16 is slow, bf16 on CUDA]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    Bf16,
}

impl Compute {
    /// The device and the type of feature maps.
    pub fn open(&self) -> tadsr::Result<(candle_core::Device, DType)> {
        let device = train::device(self.device)?;
        let usual = match device.is_cpu() {
            true => Precision::F32,
            false => Precision::Bf16,
        };
        let dtype = match self.precision.unwrap_or(usual) {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        };
        Ok((device, dtype))
    }
}

/// A training run as the command line drives it.
pub trait Training {
    /// Steps done.
    fn done(&self) -> u64;
    /// Takes one step; gives its losses and other numbers, the same ones in every step.
    fn step(&mut self) -> tadsr::Result<Vec<(&'static str, f64)>>;
    /// Writes checkpoint and model.
    fn save(&self) -> tadsr::Result<()>;
    /// What held-out photos say.
    fn validate(&self) -> tadsr::Result<HeldOut>;
    /// Pictures for the report.
    fn samples(&self) -> tadsr::Result<Vec<SampleRow>> {
        Ok(Vec::new())
    }
}

/// What a run measures on held-out photos.
#[derive(Default)]
pub struct HeldOut {
    /// In words.
    pub text: String,
    /// As curves: names and values.
    pub values: Vec<(String, f64)>,
}

/// How long a run is and what its log says.
pub struct Plan<'a> {
    pub steps: u64,
    /// Images in a step.
    pub images: usize,
    /// Steps between two checkpoints.
    pub save_every: u64,
    /// The run's folder. It gets `losses.csv` with a line for every step, TensorBoard's events, and at every checkpoint
    /// `report.html`.
    pub folder: &'a Path,
    /// The file in it that the run is for.
    pub product: &'a str,
    /// The option, if any, by which the same command goes on with a run that was stopped.
    pub go_on: Option<&'a str>,
}

/// Makes a run's folder.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("'{}' cannot be made", path.display()))
}

/// Lets the networks use `threads` threads, or one for each core; gives their number.
pub fn use_threads(threads: Option<usize>) -> Result<usize> {
    tadsr::train::keep_memory();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or(cores).max(1);
    // SAFETY: this comes first in a command, when nobody else reads the environment.
    unsafe { tadsr::ops::use_threads(threads)? };
    Ok(threads)
}

/// Decodes the photos below `data`, with progress; says which are left out.
fn load_photos(data: &[PathBuf], side: usize) -> Result<PhotoSet> {
    let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template(
        "decoding photos {bar:30} {pos}/{len}",
    )?);
    let photos = PhotoSet::load(data, side, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    for skipped in photos.skipped() {
        eprintln!("left out '{}': {}", skipped.path.display(), skipped.reason);
    }
    Ok(photos)
}

/// Every such photo is kept out of the training of [`photos`], to measure on it.
const HOLD_OUT: usize = 20;

/// The photos below `data` to train on, and those held out; says where that cannot be.
pub fn photos(data: &[PathBuf], side: usize) -> Result<[PhotoSet; 2]> {
    let mut photos = load_photos(data, side)?;
    if let Some(note) = photos.too_few(HOLD_OUT) {
        eprintln!("note: {note}");
    }
    let held_out = photos.hold_out(HOLD_OUT);
    Ok([photos, held_out])
}

/// How often in a row a run that diverges is taken up from its last checkpoint.
const PATIENCE: i32 = 5;

/// [`train`]s the run that `open` gives. Where it diverges, it is opened anew, from its last checkpoint and at half the
/// learning rate. `open` is told whether to go on with the checkpoint, and how often to halve the rate.
pub fn train_with_patience<R: Training>(
    mut open: impl FnMut(bool, i32) -> Result<R>,
    resume: bool,
    plan: &Plan,
    stop: &AtomicBool,
) -> Result<()> {
    let (mut run, mut slower) = (open(resume, 0)?, 0);
    loop {
        let begun = run.done();
        let Err(error) = train(&mut run, plan, stop) else {
            return Ok(());
        };
        let diverged = matches!(error.downcast_ref(), Some(tadsr::Error::Diverged { .. }));
        if !diverged || slower == PATIENCE {
            return Err(error);
        }
        drop(run);
        eprintln!("{error}; going back to the last checkpoint, at half the learning rate");
        let resume = plan.folder.join("checkpoint.safetensors").exists();
        slower += 1;
        run = open(resume, slower)?;
        if slower > 1 && run.done() > begun {
            // The checkpoint knows of the halvings before it.
            slower = 1;
            drop(run);
            run = open(resume, slower)?;
        }
    }
}

/// Steps until the end or until `stop`, which ends in [`Stopped`], with a line of numbers at every checkpoint and a last
/// checkpoint.
pub fn train(run: &mut impl Training, plan: &Plan, stop: &AtomicBool) -> Result<()> {
    let product = plan.folder.join(plan.product);
    if run.done() >= plan.steps && product.exists() {
        eprintln!("done: {}", product.display());
        return Ok(());
    }
    let bar = ProgressBar::new(plan.steps).with_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len} ETA {eta_precise} {msg}",
    )?);
    bar.set_position(run.done());
    bar.reset_eta();
    let (start, first) = (Instant::now(), run.done());
    let mut log = LossLog::open(plan.folder, first)?;
    let mut board = Board::open(plan, first)?;
    let (mut shown, mut saved) = (Instant::now(), None);
    while run.done() < plan.steps && !stop.load(Ordering::SeqCst) {
        let losses = run.step()?;
        log.add(run.done(), &losses)?;
        board.add(run.done(), &losses)?;
        bar.set_position(run.done());
        if shown.elapsed() > Duration::from_secs(1) {
            let rate = bar.per_sec() * plan.images as f64;
            bar.set_message(format!("{rate:.1} images/s, {}", log.means()));
            shown = Instant::now();
        }
        if run.done().is_multiple_of(plan.save_every) || run.done() == plan.steps {
            save(run, plan, &mut log, &mut board)?;
            saved = Some(run.done());
            let held_out = run.validate()?;
            board.events.scalars(run.done(), &held_out.values)?;
            let rate = (run.done() - first) as f64 / start.elapsed().as_secs_f64();
            let left = Duration::from_secs_f64((plan.steps - run.done()) as f64 / rate);
            let line = format!(
                "step {} of {}: {}; {}; {:.2} images/s, {} left",
                run.done(),
                plan.steps,
                log.means(),
                held_out.text,
                rate * plan.images as f64,
                HumanDuration(left)
            );
            print_above(&bar, &line);
            log.restart();
        }
    }
    if saved != Some(run.done()) {
        save(run, plan, &mut log, &mut board)?;
    }
    bar.finish_and_clear();
    let done = run.done();
    if done < plan.steps {
        let all = plan.steps;
        let option = plan.go_on.map_or(String::new(), |o| format!(" and {o}"));
        let text = format!("stopped at step {done} of {all}; go on with the same command{option}");
        return Err(Stopped(text).into());
    }
    eprintln!("done: {}", product.display());
    Ok(())
}

/// Writes checkpoint, model, logs and report.
fn save(run: &impl Training, plan: &Plan, log: &mut LossLog, board: &mut Board) -> Result<()> {
    log.flush()?;
    run.save()?;
    let samples = run.samples()?;
    if !samples.is_empty() {
        save_samples(plan.folder, &samples)?;
        board.add_samples(run.done(), &samples)?;
    }
    board.events.flush()?;
    // A run is worth more than its report.
    let report = Report::of_run(plan.folder);
    if let Err(error) = report.and_then(|r| r.write(&plan.folder.join(REPORT_FILE))) {
        eprintln!("no report: {error}");
    }
    Ok(())
}

/// TensorBoard's curves: the numbers of the steps, a second apart or more.
struct Board {
    events: EventWriter,
    images: usize,
    written: Instant,
    /// The step that was written last.
    last: u64,
}

impl Board {
    fn open(plan: &Plan, done: u64) -> Result<Self> {
        Ok(Self {
            events: EventWriter::open(plan.folder, done)?,
            images: plan.images,
            written: Instant::now(),
            last: done,
        })
    }

    fn add(&mut self, step: u64, losses: &[(&'static str, f64)]) -> Result<()> {
        let seconds = self.written.elapsed().as_secs_f64();
        if seconds < 1.0 {
            return Ok(());
        }
        let name = |name: &str| match name.strip_prefix(GRADIENT) {
            Some(term) => format!("gradient/{term}"),
            None => format!("loss/{name}"),
        };
        let mut values: Vec<_> = losses.iter().map(|(n, v)| (name(n), *v)).collect();
        let images = (step - self.last) as f64 * self.images as f64;
        values.push(("images per second".into(), images / seconds));
        self.events.scalars(step, &values)?;
        self.events.flush()?;
        (self.written, self.last) = (Instant::now(), step);
        Ok(())
    }

    /// Each row of samples as one picture, side by side.
    fn add_samples(&mut self, step: u64, rows: &[SampleRow]) -> Result<()> {
        for row in rows {
            let images = row.images.iter().map(|(_, image)| image);
            let width = images.clone().map(RgbImage::width).sum();
            let height = images.clone().map(RgbImage::height).max().unwrap_or(0);
            let (mut strip, mut x) = (RgbImage::new(width, height), 0);
            for image in images {
                image::imageops::replace(&mut strip, image, x, 0);
                x += i64::from(image.width());
            }
            let names: Vec<_> = row.images.iter().map(|(name, _)| name.as_str()).collect();
            let name = format!("{}: {}", row.label, names.join(" | "));
            self.events.picture(step, &name, &strip)?;
        }
        Ok(())
    }
}

/// Prints a line above the progress bar, or plainly where there is no terminal.
fn print_above(bar: &ProgressBar, line: &str) {
    if bar.is_hidden() {
        eprintln!("{line}");
    } else {
        bar.println(line);
    }
}

/// The numbers of every step in `losses.csv`, and their means since the last checkpoint.
struct LossLog {
    path: PathBuf,
    file: BufWriter<File>,
    /// Whether the file has its first line, the names.
    named: bool,
    sums: Vec<(&'static str, f64)>,
    steps: u32,
}

impl LossLog {
    /// The log in `folder`, cut to the steps up to `done`: a run that goes on from a checkpoint takes later ones again.
    fn open(folder: &Path, done: u64) -> Result<Self> {
        let path = folder.join("losses.csv");
        let old = fs::read_to_string(&path).unwrap_or_default();
        let step = |line: &&str| line.split(',').next()?.parse::<u64>().ok();
        let mut kept: Vec<_> = old.lines().take(1).collect();
        let steps = old.lines().skip(1);
        kept.extend(steps.take_while(|line| step(line).is_some_and(|s| s <= done)));
        let named = done > 0 && !kept.is_empty();
        let kept: String = match named {
            true => kept.iter().flat_map(|line| [line, "\n"]).collect(),
            false => String::new(),
        };
        write_atomically(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.with_context(|| format!("'{}' cannot be written", path.display()))?;
        Ok(Self {
            path,
            file: BufWriter::new(file),
            named,
            sums: Vec::new(),
            steps: 0,
        })
    }

    fn add(&mut self, step: u64, losses: &[(&'static str, f64)]) -> Result<()> {
        if self.sums.is_empty() {
            self.sums = losses.iter().map(|(name, _)| (*name, 0.0)).collect();
        }
        for ((_, sum), (_, value)) in self.sums.iter_mut().zip(losses) {
            *sum += value;
        }
        self.steps += 1;
        let mut text = String::new();
        if !self.named {
            let names: Vec<_> = losses.iter().map(|(name, _)| *name).collect();
            text = format!("step,{}\n", names.join(","));
            self.named = true;
        }
        let values: Vec<_> = losses.iter().map(|(_, v)| format!("{v:e}")).collect();
        text += &format!("{step},{}\n", values.join(","));
        let written = self.file.write_all(text.as_bytes());
        written.with_context(|| format!("'{}' cannot be written", self.path.display()))
    }

    fn means(&self) -> String {
        let mean = |(name, sum): &(&str, f64)| {
            let mean = sum / f64::from(self.steps.max(1));
            match mean.abs() {
                m if m == 0.0 || (1e-3..1e4).contains(&m) => format!("{name} {mean:.4}"),
                _ => format!("{name} {mean:.2e}"),
            }
        };
        self.sums.iter().map(mean).collect::<Vec<_>>().join(", ")
    }

    fn restart(&mut self) {
        self.sums.clear();
        self.steps = 0;
    }

    fn flush(&mut self) -> Result<()> {
        let done = self.file.flush();
        done.with_context(|| format!("'{}' cannot be written", self.path.display()))
    }
}

/// Checks what all runs take as arguments.
pub fn check_common(steps: u64, batch: usize, save_every: u64, lr: f64, ema: f64) -> Result<()> {
    if steps == 0 || batch == 0 || save_every == 0 {
        bail!("--steps, --batch and --save-every must be at least 1");
    }
    if batch > 1024 {
        bail!("--batch: at most 1024");
    }
    let rate = lr > 0.0 && lr < 1.0;
    if !rate || !(0.0..1.0).contains(&ema) {
        bail!("--lr must be within 0 and 1, --ema at least 0 and below 1");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// Diverges at a step as long as the learning rate is too high.
    struct Unstable {
        done: u64,
        saved: Rc<Cell<(u64, i32)>>,
        slowed: i32,
    }

    impl Training for Unstable {
        fn done(&self) -> u64 {
            self.done
        }

        fn step(&mut self) -> tadsr::Result<Vec<(&'static str, f64)>> {
            // From step 7 on once halved is enough, from step 23 on only twice.
            let need = i32::from(self.done >= 7) + i32::from(self.done >= 23);
            if self.slowed < need {
                return Err(tadsr::Error::Diverged {
                    path: "run".into(),
                    what: "loss".into(),
                    step: self.done,
                });
            }
            self.done += 1;
            Ok(vec![("loss", 1.0)])
        }

        fn save(&self) -> tadsr::Result<()> {
            self.saved.set((self.done, self.slowed));
            Ok(())
        }

        fn validate(&self) -> tadsr::Result<HeldOut> {
            Ok(HeldOut::default())
        }
    }

    #[test]
    fn a_run_that_diverges_goes_on_from_its_checkpoint_ever_slower() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("checkpoint.safetensors"), "").unwrap();
        let (saved, opened) = (Rc::new(Cell::new((0, 0))), Cell::new(0));
        let open = |resume: bool, slower| {
            let (done, slowed) = saved.get();
            opened.set(opened.get() + 1);
            assert!(resume);
            Ok(Unstable {
                done,
                saved: saved.clone(),
                slowed: slowed + slower,
            })
        };
        let plan = Plan {
            steps: 30,
            images: 1,
            save_every: 5,
            folder: dir.path(),
            product: "model.safetensors",
            go_on: None,
        };
        train_with_patience(open, true, &plan, &AtomicBool::new(false)).unwrap();
        assert_eq!(saved.get(), (30, 2));
        // Once for each time that it diverged, and to hear that the checkpoint knows of the halving before.
        assert_eq!(opened.get(), 4);
    }

    #[test]
    fn a_resumed_log_forgets_the_steps_that_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LossLog::open(dir.path(), 0).unwrap();
        for step in 1..=5 {
            log.add(step, &[("a", step as f64), ("b", 0.5)]).unwrap();
        }
        log.flush().unwrap();
        assert_eq!(log.means(), "a 3.0000, b 0.5000");
        let mut log = LossLog::open(dir.path(), 3).unwrap();
        let text = || fs::read_to_string(dir.path().join("losses.csv")).unwrap();
        // The others are there from the beginning: a run that is killed loses none of them.
        assert_eq!(text().lines().count(), 4);
        log.add(4, &[("a", 9.0), ("b", 0.5)]).unwrap();
        log.flush().unwrap();
        let want = "step,a,b\n1,1e0,5e-1\n2,2e0,5e-1\n3,3e0,5e-1\n4,9e0,5e-1\n";
        assert_eq!(text(), want);
        // A new run in the same folder starts anew.
        drop(LossLog::open(dir.path(), 0).unwrap());
        assert_eq!(text(), "");
    }
}
