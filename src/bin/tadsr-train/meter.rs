//! Progress display: a bar on a terminal, otherwise a line every 30 seconds, or JSON lines.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use tadsr::Observer;

use crate::{
    events::{Event, rounded},
    stop::Stop,
};

/// Interval between two lines if there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(30);
/// Interval between two JSON lines.
const JSON_INTERVAL: Duration = Duration::from_millis(500);

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
    /// Name of the unit of the rate in JSON lines; `None` without JSON lines.
    json: Option<&'static str>,
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
            json: None,
        }
    }

    /// Prints [events](Event) on standard output instead, if `json` is set.
    pub fn with_json(mut self, json: bool) -> Self {
        if json {
            self.bar.set_draw_target(ProgressDrawTarget::hidden());
            self.json = Some(if self.items == Some("frames") {
                "fps"
            } else {
                "per_second"
            });
        }
        self
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
        if self.json.is_some() {
            Event::Notice { message: line }.print();
        } else if self.bar.is_hidden() || self.done.load(Ordering::Relaxed) {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    /// Corrects the number of all items, which may have been an estimate.
    #[cfg(feature = "video")]
    pub fn set_total(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        let was_done = self.done.swap(true, Ordering::Relaxed);
        if let (Some(unit), false, 1..) = (self.json, was_done, self.bar.position()) {
            self.print_event(unit);
        }
        self.bar.finish_and_clear();
    }

    /// Returns the seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Prints the progress as an event.
    fn print_event(&self, unit: &'static str) {
        let (done, of) = (self.bar.position(), self.bar.length());
        let rate = done as f64 / self.seconds().max(1e-9);
        let left = of.map(|of| of.saturating_sub(done) as f64 / rate);
        let event = Event::Progress {
            items: BTreeMap::from([(self.items.unwrap_or("passes"), done)]),
            of,
            rate: BTreeMap::from([(unit, rounded(rate))]),
            eta_s: left.filter(|left| left.is_finite()).map(rounded),
        };
        event.print();
    }

    /// Prints a line if there is no terminal and [`LINE_INTERVAL`] has passed since the last one,
    /// or an event if [`JSON_INTERVAL`] has passed.
    fn print_line_if_due(&self) {
        let mut printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
        let interval = if self.json.is_some() {
            JSON_INTERVAL
        } else {
            LINE_INTERVAL
        };
        if !self.bar.is_hidden() || printed.elapsed() < interval {
            return;
        }
        *printed = Instant::now();
        if let Some(unit) = self.json {
            return self.print_event(unit);
        }
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
