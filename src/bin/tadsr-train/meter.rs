//! Progress: a bar on a terminal, a line now and then elsewhere.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};
use tadsr::Observer;

use crate::stop::Stop;

/// How often a line is printed where there is no terminal.
const EVERY: Duration = Duration::from_secs(30);

/// Shows how far the work has come.
#[derive(Clone)]
pub struct Meter {
    bar: ProgressBar,
    /// What is counted, such as "frames"; `None` for the passes through a network.
    what: Option<&'static str>,
    started: Instant,
    said: Arc<Mutex<Instant>>,
    done: Arc<AtomicBool>,
}

impl Meter {
    /// Counts `what`, of which there are `total` if that is known; `unit` is their rate's.
    pub fn new(what: &'static str, unit: &'static str, total: Option<u64>) -> Result<Self> {
        let rate = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // A terminal that cannot be written to shows nothing anyway.
            let _ = write!(text, "{:.2} {unit}", state.per_sec());
        };
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{bar:30} {pos}/{len} {rate} ETA {eta_precise} {wide_msg}",
            ),
            None => (
                ProgressBar::no_length(),
                "{spinner} {pos} {rate} {elapsed_precise} {wide_msg}",
            ),
        };
        let style = ProgressStyle::with_template(template)?.with_key("rate", rate);
        Ok(Self::with(bar.with_style(style), Some(what)))
    }

    /// Counts the passes through a network that one picture takes.
    pub fn passes() -> Result<Self> {
        let style = "{bar:30} pass {pos}/{len} ETA {eta_precise} {wide_msg}";
        let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template(style)?);
        Ok(Self::with(bar, None))
    }

    fn with(bar: ProgressBar, what: Option<&'static str>) -> Self {
        let now = Instant::now();
        Self {
            bar,
            what,
            started: now,
            said: Arc::new(Mutex::new(now)),
            done: Arc::default(),
        }
    }

    /// What tells an upscaler's progress in a frame here, and stops the frame when `stop` asks for it.
    pub fn observer(&self, stop: &Stop) -> Observer {
        let (meter, stop) = (self.clone(), stop.clone());
        Box::new(move |progress| {
            let (done, total) = (progress.done as u64, progress.total as u64);
            if meter.what.is_none() {
                meter.bar.set_length(total);
                meter.bar.set_position(done);
                meter.say_now_and_then();
            } else if total > 0 {
                meter.bar.set_message(format!("pass {done}/{total}"));
            }
            match stop.is_asked() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })
    }

    /// Says what is worked on.
    pub fn name(&self, what: &str) {
        self.bar.set_message(what.to_string());
    }

    /// One more is done.
    pub fn advance(&self) {
        self.bar.inc(1);
        self.say_now_and_then();
    }

    /// Prints a line above the bar, or plainly where there is no terminal.
    pub fn log(&self, line: &str) {
        if self.bar.is_hidden() || self.done.load(Ordering::Relaxed) {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    pub fn finish(&self) {
        self.done.store(true, Ordering::Relaxed);
        self.bar.finish_and_clear();
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn say_now_and_then(&self) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.bar.is_hidden() || said.elapsed() < EVERY {
            return;
        }
        *said = Instant::now();
        let (done, what) = (self.bar.position(), self.what.unwrap_or("passes"));
        let rate = done as f64 / self.seconds();
        let Some(total) = self.bar.length() else {
            eprintln!("{done} {what}, {rate:.2} a second");
            return;
        };
        let left = Duration::from_secs_f64(total.saturating_sub(done) as f64 / rate.max(1e-9));
        eprintln!(
            "{done} of {total} {what}, {rate:.2} a second, {} left",
            HumanDuration(left)
        );
    }
}
