//! Progress display: a bar on a terminal, otherwise a line every 30 seconds.

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

/// Interval between two lines if there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// Progress display of a command. Clones share it.
#[derive(Clone)]
pub struct Meter {
    bar: ProgressBar,
    /// Name of the counted items, such as "frames"; `None` for passes through a network.
    items: Option<&'static str>,
    started: Instant,
    /// Time of the last line without a terminal.
    printed: Arc<Mutex<Instant>>,
    /// Set by [`Self::finish`].
    done: Arc<AtomicBool>,
}

impl Meter {
    /// Creates a display of the number of `items`, such as "frames". `unit` is the unit of their
    /// rate. `total` is the number of all items, if it is known.
    pub fn new(items: &'static str, unit: &'static str, total: Option<u64>) -> Result<Self> {
        let rate = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // A rate that cannot be formatted is left out.
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
        Ok(Self::with(bar.with_style(style), Some(items)))
    }

    /// Creates a display of the passes through a network for one image.
    pub fn passes() -> Result<Self> {
        let style = "{bar:30} pass {pos}/{len} ETA {eta_precise} {wide_msg}";
        let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template(style)?);
        Ok(Self::with(bar, None))
    }

    fn with(bar: ProgressBar, items: Option<&'static str>) -> Self {
        let now = Instant::now();
        Self {
            bar,
            items,
            started: now,
            printed: Arc::new(Mutex::new(now)),
            done: Arc::default(),
        }
    }

    /// Returns an observer that shows the progress within a frame, and cancels the frame if a stop
    /// is requested.
    pub fn observer(&self, stop: &Stop) -> Observer {
        let (meter, stop) = (self.clone(), stop.clone());
        Box::new(move |progress| {
            let (done, total) = (progress.done as u64, progress.total as u64);
            if meter.items.is_none() {
                meter.bar.set_length(total);
                meter.bar.set_position(done);
                meter.print_line_if_due();
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
    pub fn name(&self, name: &str) {
        self.bar.set_message(name.to_string());
    }

    /// Counts one more item.
    pub fn advance(&self) {
        self.bar.inc(1);
        self.print_line_if_due();
    }

    /// Prints a line on standard error, above the bar if there is one.
    pub fn log(&self, line: &str) {
        if self.bar.is_hidden() || self.done.load(Ordering::Relaxed) {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.done.store(true, Ordering::Relaxed);
        self.bar.finish_and_clear();
    }

    /// Returns the seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Prints a line if there is no terminal and [`LINE_INTERVAL`] has passed since the last one.
    fn print_line_if_due(&self) {
        let mut printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.bar.is_hidden() || printed.elapsed() < LINE_INTERVAL {
            return;
        }
        *printed = Instant::now();
        let (done, items) = (self.bar.position(), self.items.unwrap_or("passes"));
        let rate = done as f64 / self.seconds();
        let Some(total) = self.bar.length() else {
            eprintln!("{done} {items}, {rate:.2} per second");
            return;
        };
        let left = Duration::from_secs_f64(total.saturating_sub(done) as f64 / rate.max(1e-9));
        eprintln!(
            "{done} of {total} {items}, {rate:.2} per second, {} left",
            HumanDuration(left)
        );
    }
}
