// SPDX-License-Identifier: MPL-2.0

//! The decision to take a smaller model while the machine cannot keep up, and the way back.

use std::time::Duration;

/// Time over which the load is measured.
const WINDOW: Duration = Duration::from_millis(500);

/// Shortest time between two steps.
const REST: Duration = Duration::from_secs(2);

/// Share of the time between two frames above which the element is overloaded.
const MAX_LOAD: f64 = 0.95;

/// Share below which a smaller model would not help, if frames are dropped nevertheless.
const MIN_LOAD: f64 = 0.1;

/// Share below which a larger model is tried again.
const CALM: f64 = 0.5;

/// Time of calm before a larger model is tried, at first and at most. It doubles with each try that
/// fails.
const PATIENCE: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(300)];

/// A try has failed if the larger model is overloaded within this time.
const PROOF: Duration = Duration::from_secs(20);

/// Counts frames and moves between levels: 0 is the requested model, each further one is faster.
/// Times are since any fixed moment.
#[derive(Debug)]
pub(super) struct Governor {
    level: usize,
    last_level: usize,
    /// Time between two frames.
    interval: Duration,
    /// Start of the window, and what has happened in it.
    start: Option<Duration>,
    busy: Duration,
    longest: Duration,
    frames: u32,
    dropped: u32,
    /// Time of the last step.
    stepped: Option<Duration>,
    /// The last step was up.
    climbed: bool,
    calm_since: Option<Duration>,
    patience: Duration,
}

/// Load over a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Load {
    /// Mean share of the time between two frames that the element was busy.
    pub share: f64,
    /// Share of the frames that were dropped because they were late.
    pub dropped: f64,
    /// Longest time for a frame.
    pub longest: Duration,
}

impl Governor {
    /// Creates a governor at level 0 of `last_level`, for a stream with a frame every `interval`.
    pub fn new(last_level: usize, interval: Duration) -> Self {
        Self {
            level: 0,
            last_level,
            interval,
            start: None,
            busy: Duration::ZERO,
            longest: Duration::ZERO,
            frames: 0,
            dropped: 0,
            stepped: None,
            climbed: false,
            calm_since: None,
            patience: PATIENCE[0],
        }
    }

    pub fn level(&self) -> usize {
        self.level
    }

    /// Counts a frame that was completed at `now` after `busy`, or dropped. Returns the load at the
    /// end of a window.
    pub fn count(&mut self, now: Duration, busy: Option<Duration>) -> Option<Load> {
        let start = *self
            .start
            .get_or_insert(now.saturating_sub(busy.unwrap_or_default()));
        match busy {
            Some(busy) => {
                self.frames += 1;
                self.busy += busy;
                self.longest = self.longest.max(busy);
            }
            None => self.dropped += 1,
        }
        if now < start + WINDOW {
            return None;
        }
        let interval = self.interval.as_secs_f64();
        let load = Load {
            share: self.busy.as_secs_f64() / (f64::from(self.frames.max(1)) * interval),
            dropped: f64::from(self.dropped) / f64::from(self.frames + self.dropped),
            longest: self.longest,
        };
        (self.start, self.busy, self.longest) = (Some(now), Duration::ZERO, Duration::ZERO);
        (self.frames, self.dropped) = (0, 0);
        Some(load)
    }

    /// Returns the new level if `load`, measured until `now`, asks for a step.
    pub fn decide(&mut self, now: Duration, load: Load) -> Option<usize> {
        let since_step = self.stepped.map(|then| now - then);
        let overloaded = load.share > MAX_LOAD || (load.dropped > 0.05 && load.share > MIN_LOAD);
        let calm = load.share < CALM && load.dropped == 0.0;
        if !calm {
            self.calm_since = None;
        }
        if since_step.is_some_and(|time| time < REST) {
            return None;
        }
        if overloaded && self.level < self.last_level {
            if self.climbed && since_step.is_some_and(|time| time < PROOF) {
                self.patience = (2 * self.patience).min(PATIENCE[1]);
            }
            return Some(self.step(now, self.level + 1));
        }
        if !calm || self.level == 0 {
            return None;
        }
        let calm_since = *self.calm_since.get_or_insert(now);
        (now - calm_since >= self.patience).then(|| self.step(now, self.level - 1))
    }

    fn step(&mut self, now: Duration, level: usize) -> usize {
        self.climbed = level < self.level;
        self.level = level;
        self.stepped = Some(now);
        self.calm_since = None;
        level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(40);

    fn ms(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    /// Runs a stream whose frames take `times[level]` ms at a level, from `from` to `to` seconds.
    /// Frames that arrive too late are dropped. Returns the times of steps in seconds and the
    /// levels.
    fn run(governor: &mut Governor, times: &[u64], from: u64, to: u64) -> Vec<(f64, usize)> {
        let (mut steps, mut free) = (Vec::new(), ms(1000 * from));
        for frame in 25 * from..25 * to {
            let due = INTERVAL * frame as u32;
            let is_late = free > due + INTERVAL;
            let busy = (!is_late).then(|| ms(times[governor.level()]));
            let now = due.max(free) + busy.unwrap_or_default();
            free = free.max(if is_late { due } else { now });
            let load = governor.count(now, busy);
            if let Some(level) = load.and_then(|load| governor.decide(now, load)) {
                steps.push((now.as_secs_f64(), level));
            }
        }
        steps
    }

    #[test]
    fn a_stream_that_keeps_up_stays_at_its_level() {
        let mut governor = Governor::new(2, INTERVAL);
        assert_eq!(run(&mut governor, &[36, 10, 1], 0, 60), []);
    }

    #[test]
    fn an_overloaded_stream_steps_down_until_it_keeps_up_with_rests() {
        let mut governor = Governor::new(3, INTERVAL);
        let steps = run(&mut governor, &[400, 100, 20, 1], 0, 10);
        let levels: Vec<_> = steps.iter().map(|s| s.1).collect();
        assert_eq!(levels[..2], [1, 2], "{steps:?}");
        assert!(steps[0].0 < 1.5, "{steps:?}");
        assert!(steps[1].0 - steps[0].0 > 1.99, "{steps:?}");
    }

    #[test]
    fn the_last_level_stays_however_late_frames_are() {
        let mut governor = Governor::new(1, INTERVAL);
        let steps = run(&mut governor, &[400, 200], 0, 60);
        assert_eq!(steps.len(), 1, "{steps:?}");
        assert_eq!(governor.level(), 1);
    }

    #[test]
    fn a_stream_steps_up_again_after_a_time_of_calm() {
        let mut governor = Governor::new(1, INTERVAL);
        run(&mut governor, &[60, 10], 0, 4);
        assert_eq!(governor.level(), 1);
        let steps = run(&mut governor, &[15, 5], 4, 20);
        assert_eq!(steps.len(), 1, "{steps:?}");
        assert!((6.0..11.0).contains(&steps[0].0), "{steps:?}");
        assert_eq!(governor.level(), 0);
    }

    #[test]
    fn tries_that_fail_become_rare() {
        let mut governor = Governor::new(1, INTERVAL);
        let steps = run(&mut governor, &[60, 5], 0, 600);
        let ups: Vec<f64> = steps.iter().filter(|s| s.1 == 0).map(|s| s.0).collect();
        assert!((4..=8).contains(&ups.len()), "{ups:?}");
        let gaps: Vec<f64> = ups.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.is_sorted(), "{gaps:?}");
    }

    #[test]
    fn drops_that_a_faster_model_cannot_prevent_change_nothing() {
        let mut governor = Governor::new(2, INTERVAL);
        for frame in 0..1000 {
            let now = INTERVAL * frame;
            let busy = (frame % 2 == 0).then_some(ms(2));
            if let Some(load) = governor.count(now, busy) {
                assert_eq!(governor.decide(now, load), None);
            }
        }
    }
}
