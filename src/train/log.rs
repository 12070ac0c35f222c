//! Logs of a run: `losses.csv`, events for TensorBoard, samples and `report.html`.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use image::RgbImage;

use super::{
    checkpoint::write_atomically,
    observer::Measurement,
    report::{EventWriter, GRADIENT, REPORT_FILE, Report, SampleRow, save_samples},
};
use crate::{Error, Result};

/// Shortest time between two points of a curve in TensorBoard, in seconds.
const POINT_SECONDS: f64 = 1.0;

/// All logs in the folder of a run.
pub(super) struct RunLog {
    folder: PathBuf,
    losses: LossLog,
    events: EventWriter,
    /// Images in a step.
    images: usize,
    /// Time and step of the last point in TensorBoard.
    written: Instant,
    last: u64,
}

impl RunLog {
    /// Opens the logs in `folder` of a run that has done `done` steps of `images` images.
    pub fn open(folder: &Path, done: u64, images: usize) -> Result<Self> {
        Ok(Self {
            folder: folder.into(),
            losses: LossLog::open(folder, done)?,
            events: EventWriter::open(folder, done)?,
            images,
            written: Instant::now(),
            last: done,
        })
    }

    /// Adds the losses of a step.
    pub fn add(&mut self, step: u64, losses: &[(&'static str, f64)]) -> Result<()> {
        self.losses.add(step, losses)?;
        let seconds = self.written.elapsed().as_secs_f64();
        if seconds < POINT_SECONDS {
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

    /// Adds a measurement on held-out data.
    pub fn measured(&mut self, step: u64, measurement: &Measurement) -> Result<()> {
        self.events.scalars(step, &measurement.values)
    }

    /// Writes the losses to disk. Call it before a checkpoint is saved.
    pub fn flush(&mut self) -> Result<()> {
        self.losses.flush()
    }

    /// Writes samples and report. Returns the reason if the report cannot be written.
    pub fn report(&mut self, step: u64, samples: &[SampleRow]) -> Result<Option<Error>> {
        if !samples.is_empty() {
            save_samples(&self.folder, samples)?;
            for row in samples {
                let names: Vec<_> = row.images.iter().map(|(name, _)| name.as_str()).collect();
                let name = format!("{}: {}", row.label, names.join(" | "));
                self.events.picture(step, &name, &side_by_side(row))?;
            }
        }
        self.events.flush()?;
        let report = Report::of_run(&self.folder);
        let written = report.and_then(|r| r.write(&self.folder.join(REPORT_FILE)));
        Ok(written.err())
    }

    /// Mean values of the losses since the last [`Self::restart`].
    pub fn means(&self) -> Vec<(&'static str, f64)> {
        self.losses.means()
    }

    /// Forgets the losses so far in [`Self::means`].
    pub fn restart(&mut self) {
        self.losses.restart();
    }
}

/// The images of a row in one image.
fn side_by_side(row: &SampleRow) -> RgbImage {
    let images = row.images.iter().map(|(_, image)| image);
    let width = images.clone().map(RgbImage::width).sum();
    let height = images.clone().map(RgbImage::height).max().unwrap_or(0);
    let (mut strip, mut x) = (RgbImage::new(width, height), 0);
    for image in images {
        image::imageops::replace(&mut strip, image, x, 0);
        x += i64::from(image.width());
    }
    strip
}

/// Losses of all steps in `losses.csv`, and their means since the last checkpoint.
struct LossLog {
    path: PathBuf,
    file: BufWriter<File>,
    /// `true` if the file has its first line, the names.
    named: bool,
    sums: Vec<(&'static str, f64)>,
    steps: u32,
}

impl LossLog {
    /// Opens the log in `folder` and removes the steps after `done`, which the run takes again.
    fn open(folder: &Path, done: u64) -> Result<Self> {
        let path = folder.join("losses.csv");
        let old = fs::read_to_string(&path).unwrap_or_default();
        let step = |line: &&str| line.split(',').next()?.parse::<u64>().ok();
        let mut lines: Vec<_> = old.lines().take(1).collect();
        let steps = old.lines().skip(1);
        lines.extend(steps.take_while(|line| step(line).is_some_and(|s| s <= done)));
        let named = done > 0 && !lines.is_empty();
        let text: String = if named {
            lines.iter().flat_map(|line| [line, "\n"]).collect()
        } else {
            String::new()
        };
        write_atomically(&path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path);
        Ok(Self {
            file: BufWriter::new(file.map_err(Error::io(&path))?),
            path,
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
        written.map_err(Error::io(&self.path))
    }

    fn means(&self) -> Vec<(&'static str, f64)> {
        let steps = f64::from(self.steps.max(1));
        let mean = |(name, sum): &(&'static str, f64)| (*name, sum / steps);
        self.sums.iter().map(mean).collect()
    }

    fn restart(&mut self) {
        self.sums.clear();
        self.steps = 0;
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_forgets_the_steps_that_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LossLog::open(dir.path(), 0).unwrap();
        for step in 1..=5 {
            log.add(step, &[("a", step as f64), ("b", 0.5)]).unwrap();
        }
        log.flush().unwrap();
        assert_eq!(log.means(), [("a", 3.0), ("b", 0.5)]);
        let mut log = LossLog::open(dir.path(), 3).unwrap();
        let text = || fs::read_to_string(dir.path().join("losses.csv")).unwrap();
        // The other lines are on disk at once: a run that is killed loses none of them.
        assert_eq!(text().lines().count(), 4);
        log.add(4, &[("a", 9.0), ("b", 0.5)]).unwrap();
        log.flush().unwrap();
        let want = "step,a,b\n1,1e0,5e-1\n2,2e0,5e-1\n3,3e0,5e-1\n4,9e0,5e-1\n";
        assert_eq!(text(), want);
        // A new run in the same folder starts with an empty log.
        drop(LossLog::open(dir.path(), 0).unwrap());
        assert_eq!(text(), "");
    }
}
