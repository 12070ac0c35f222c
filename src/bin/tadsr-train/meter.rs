//! Progress: a bar on a terminal, a line from time to time elsewhere.

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

/// Time between two lines without a terminal.
const EVERY: Duration = Duration::from_secs(30);

/// Shows the progress of work.
#[derive(Clone)]
pub struct Meter {
    bar: ProgressBar,
    /// Name of the counted items, such as "frames"; `None` for passes through a network.
    what: Option<&'static str>,
    started: Instant,
    printed: Arc<Mutex<Instant>>,
    done: Arc<AtomicBool>,
}

impl Meter {
    /// Counts items called `what`, `total` if that is known. `unit` is the unit of their rate.
    pub fn new(what: &'static str, unit: &'static str, total: Option<u64>) -> Result<Self> {
        let rate = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // A rate that cannot be shown must not end the work.
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

    /// Counts the passes through a network for one image.
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
            printed: Arc::new(Mutex::new(now)),
            done: Arc::default(),
        }
    }

    /// Returns an observer that shows the progress within a frame and stops it when `stop` is set.
    pub fn observer(&self, stop: &Stop) -> Observer {
        let (meter, stop) = (self.clone(), stop.clone());
        Box::new(move |progress| {
            let (done, total) = (progress.done as u64, progress.total as u64);
            if meter.what.is_none() {
                meter.bar.set_length(total);
                meter.bar.set_position(done);
                meter.print_from_time_to_time();
            } else if total > 0 {
                meter.bar.set_message(format!("pass {done}/{total}"));
            }
            if stop.is_asked() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
    }

    /// Shows the name of the current item.
    pub fn name(&self, what: &str) {
        self.bar.set_message(what.to_string());
    }

    /// Counts one more item.
    pub fn advance(&self) {
        self.bar.inc(1);
        self.print_from_time_to_time();
    }

    /// Prints a line above the bar, or just prints it if there is no terminal.
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

    fn print_from_time_to_time(&self) {
        let mut printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.bar.is_hidden() || printed.elapsed() < EVERY {
            return;
        }
        *printed = Instant::now();
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
