// SPDX-License-Identifier: MPL-2.0

//! Values of the read-only properties.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use tadsr::engine::Times;

/// Values of the read-only properties since the element was started.
#[derive(Default)]
pub(super) struct Status {
    /// Device that runs the model.
    pub device: Option<String>,
    /// Name of the model in use, or of the fallback that replaces it.
    pub model: Option<String>,
    /// Numeric precision of inference.
    pub precision: Option<String>,
    /// Output size over input size; 0 before the caps are set.
    pub scale: f64,
    pub stats: Stats,
    /// Time of the latest message with statistics.
    posted: Option<Instant>,
}

impl Status {
    /// Returns the statistics for a message, if none was returned in the last `interval`. The first
    /// call begins an interval.
    pub fn due(&mut self, interval: Duration) -> Option<gst::Structure> {
        if interval.is_zero() {
            self.posted = None;
            return None;
        }
        let now = Instant::now();
        if now - *self.posted.get_or_insert(now) < interval {
            return None;
        }
        self.posted = Some(now);
        let mut stats = self.stats.structure();
        stats.set("scale", self.scale);
        let texts = [
            ("model", &self.model),
            ("device", &self.device),
            ("precision", &self.precision),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                stats.set(name, text);
            }
        }
        Some(stats)
    }
}

/// Counters and timings behind the property `stats`.
#[derive(Default)]
pub(super) struct Stats {
    /// Frames upscaled.
    frames: u64,
    /// Late frames dropped by QoS.
    pub dropped: u64,
    /// Milliseconds in the element, summed over all frames.
    total: f64,
    /// Milliseconds in the element of the latest frames, oldest first.
    latest: VecDeque<f64>,
    /// Completion times of the first and the latest frame.
    span: Option<(Instant, Instant)>,
    /// Frames upscaled on a CUDA device.
    device_frames: u64,
    /// Times per stage, summed over the frames on a CUDA device.
    device_times: Times,
    /// CUDA device memory in bytes.
    pub device_memory: u64,
    /// Position of the dial `denoise`, if the model has it.
    pub denoise: Option<f32>,
    /// Position of the dial `detail`, if the model has it.
    pub detail: Option<f32>,
    /// Reason to use a CUDA device or not, under `device=auto`.
    pub cuda: Option<String>,
    /// Level of the model in use, if the stream is governed: 0 is the requested model.
    pub level: Option<u32>,
}

impl Stats {
    /// Number of frames that the 99th percentile covers.
    const LATEST: usize = 1000;

    /// Counts a completed frame that was started at `started`. `times` are those of a CUDA device.
    pub fn count(&mut self, started: Instant, times: Option<Times>) {
        let now = Instant::now();
        let spent = (now - started).as_secs_f64() * 1e3;
        self.frames += 1;
        self.total += spent;
        if self.latest.len() == Self::LATEST {
            self.latest.pop_front();
        }
        self.latest.push_back(spent);
        self.span = Some((self.span.map_or(now, |(first, _)| first), now));
        if let Some(times) = times {
            self.device_frames += 1;
            self.device_times.upload += times.upload;
            self.device_times.compute += times.compute;
            self.device_times.download += times.download;
        }
    }

    /// Returns the value of the property `stats`.
    pub fn structure(&self) -> gst::Structure {
        let seconds = self
            .span
            .map_or(0.0, |(first, last)| (last - first).as_secs_f64());
        let ratio = |n: f64, of: f64| if of > 0.0 { n / of } else { 0.0 };
        let mut stats = gst::Structure::builder("tadsr-stats")
            .field("frames", self.frames)
            .field("dropped", self.dropped)
            .field("fps", ratio(self.frames.saturating_sub(1) as f64, seconds))
            .field("mean-ms", ratio(self.total, self.frames as f64))
            .field("p99-ms", self.percentile_99());
        for (name, dial) in [("denoise", self.denoise), ("detail", self.detail)] {
            if let Some(position) = dial {
                stats = stats.field(name, f64::from(position));
            }
        }
        if let Some(reason) = &self.cuda {
            stats = stats.field("cuda", reason);
        }
        if let Some(level) = self.level {
            stats = stats.field("level", level);
        }
        if self.device_frames > 0 {
            let mean = |sum: f32| f64::from(sum) / self.device_frames as f64;
            stats = stats
                .field("upload-ms", mean(self.device_times.upload))
                .field("compute-ms", mean(self.device_times.compute))
                .field("download-ms", mean(self.device_times.download))
                .field("device-memory", self.device_memory);
        }
        stats.build()
    }

    fn percentile_99(&self) -> f64 {
        let mut latest: Vec<f64> = self.latest.iter().copied().collect();
        latest.sort_by(f64::total_cmp);
        let index = (latest.len() * 99).div_ceil(100).saturating_sub(1);
        latest.get(index).copied().unwrap_or(0.0)
    }
}
