// SPDX-License-Identifier: MPL-2.0

//! What the element counts.

use std::{collections::VecDeque, time::Instant};

use tadsr::engine::Times;

/// What the property `stats` tells, since the element was started.
#[derive(Default)]
pub struct Stats {
    frames: u64,
    /// Frames that came too late to be shown and were left out.
    pub dropped: u64,
    /// Milliseconds from a frame's beginning to its end, of all frames together.
    total: f64,
    /// Of the latest frames.
    latest: VecDeque<f64>,
    /// When the first frame was done and the latest.
    span: Option<(Instant, Instant)>,
    /// On a CUDA device: how many frames it has upscaled, and what they spent together.
    device: (u64, Times),
    /// Bytes.
    pub device_memory: u64,
}

impl Stats {
    /// Frames that the 99th percentile is taken of.
    const LATEST: usize = 1000;

    /// A frame is done that was begun at `started`; `times` are those of a CUDA device.
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
            let (frames, sum) = &mut self.device;
            *frames += 1;
            sum.upload += times.upload;
            sum.compute += times.compute;
            sum.download += times.download;
        }
    }

    pub fn structure(&self) -> gst::Structure {
        let seconds = self
            .span
            .map_or(0.0, |(first, last)| (last - first).as_secs_f64());
        let per = |n: f64, of: f64| if of > 0.0 { n / of } else { 0.0 };
        let mut latest: Vec<f64> = self.latest.iter().copied().collect();
        latest.sort_by(f64::total_cmp);
        let p99 = latest.get((latest.len() * 99).div_ceil(100).saturating_sub(1));
        let mut stats = gst::Structure::builder("tadsr-stats")
            .field("frames", self.frames)
            .field("dropped", self.dropped)
            .field("fps", per(self.frames.saturating_sub(1) as f64, seconds))
            .field("mean-ms", per(self.total, self.frames as f64))
            .field("p99-ms", p99.copied().unwrap_or(0.0));
        if let (frames @ 1.., times) = self.device {
            let mean = |sum: f32| f64::from(sum) / frames as f64;
            stats = stats
                .field("upload-ms", mean(times.upload))
                .field("compute-ms", mean(times.compute))
                .field("download-ms", mean(times.download))
                .field("device-memory", self.device_memory);
        }
        stats.build()
    }
}
