//! The ladder of bundled models, and the largest of them that a machine runs in real time.

use std::time::{Duration, Instant};

use crate::{
    Error, Result, Upscaler,
    engine::larger_scale,
    frame::{Frame, FrameInfo},
    model::{LADDER, LiteModel},
};

/// Value of a setting `model` that stands for a choice from the ladder.
pub const AUTO: &str = "auto";

/// Time between two frames of a video that does not state its frame rate.
pub const DEFAULT_INTERVAL: Duration = Duration::from_nanos(1_000_000_000 / 30);

/// Share of a frame's duration that a model may take. The rest is for decoders, encoders and other
/// programs.
const SHARE: f64 = 0.6;

/// Minimum time of a measurement.
const TIME: Duration = Duration::from_millis(60);

/// A choice from the ladder.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Name of the group of models, such as `tiny`.
    pub model: &'static str,
    /// Models that were measured and their times per frame.
    pub times: Vec<(&'static str, Duration)>,
}

/// A group of the ladder that has a model for a scale.
struct Step {
    group: &'static str,
    /// Multiplications per input pixel.
    cost: f64,
}

/// Returns the steps of the ladder for `scale`, from the smallest.
fn steps(scale: f64) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for group in LADDER {
        for model in LiteModel::find(group)? {
            let [low, high] = model.metadata.scales;
            if scale <= high && (scale > low || low <= 1.0) {
                steps.push(Step {
                    group,
                    cost: model.multiplications(scale),
                });
                break;
            }
        }
    }
    Ok(steps)
}

/// Returns the largest group of the ladder for frames `from` that become frames `to` in any time.
///
/// # Errors
/// As [`LiteModel::find`].
pub fn largest(from: &FrameInfo, to: &FrameInfo) -> Result<&'static str> {
    Ok(steps(larger_scale(from, to))?
        .last()
        .map_or(LADDER[0], |step| step.group))
}

/// Chooses the largest group of the ladder whose time per frame is at most 0.6 of `interval`, the
/// time between two frames; the smallest if there is none. Frames `from` become frames `to`. `time`
/// returns the time per frame of a group. It is called for ever larger groups until one takes too
/// long or, by its number of multiplications, must take more than twice as long.
///
/// # Errors
/// Those of `time`.
pub fn choose<E: From<Error>>(
    from: &FrameInfo,
    to: &FrameInfo,
    interval: Duration,
    mut time: impl FnMut(&'static str) -> Result<Duration, E>,
) -> Result<Choice, E> {
    let steps = steps(larger_scale(from, to))?;
    let mut choice = Choice {
        model: LADDER[0],
        times: Vec::new(),
    };
    let limit = interval.mul_f64(SHARE);
    // Time per multiplication.
    let mut rate = 0.0;
    for step in &steps {
        if rate * step.cost > 2.0 * limit.as_secs_f64() {
            break;
        }
        let taken = time(step.group)?;
        choice.times.push((step.group, taken));
        if taken > limit {
            break;
        }
        choice.model = step.group;
        rate = taken.as_secs_f64() / step.cost;
    }
    Ok(choice)
}

/// Returns the time in which `upscaler` makes a frame `to` from a frame `from` of noise, after a
/// first one: the best of at least two frames, or the mean with as many frames in flight as
/// possible. No frame may be in flight. The history is reset.
///
/// # Errors
/// As [`Upscaler::upscale_into`].
pub fn frame_time(upscaler: &mut Upscaler, from: FrameInfo, to: FrameInfo) -> Result<Duration> {
    let mut frame = Frame::new(from)?;
    let mut state = 1u32;
    for plane in 0..from.format.planes() {
        for sample in frame.plane_mut(plane) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *sample = (state >> 24) as u8;
        }
    }
    let mut large = Frame::new(to)?;
    upscaler.upscale_into(&frame.as_ref(), &mut large.as_mut())?;
    if upscaler.is_pipelined() {
        return pipelined_time(upscaler, &frame, &mut large);
    }
    let (start, mut best, mut frames) = (Instant::now(), Duration::MAX, 0);
    while start.elapsed() < TIME || frames < 2 {
        let begin = Instant::now();
        upscaler.upscale_into(&frame.as_ref(), &mut large.as_mut())?;
        best = best.min(begin.elapsed());
        frames += 1;
    }
    upscaler.reset();
    Ok(best)
}

fn pipelined_time(upscaler: &mut Upscaler, frame: &Frame, large: &mut Frame) -> Result<Duration> {
    let to = *large.info();
    let depth = upscaler.queue_depth();
    for _ in 0..depth {
        upscaler.submit(&frame.as_ref(), to)?;
    }
    let (start, mut frames) = (Instant::now(), 0);
    while start.elapsed() < TIME || (frames as usize) < 2 * depth {
        upscaler.receive(&mut large.as_mut())?;
        upscaler.submit(&frame.as_ref(), to)?;
        frames += 1;
    }
    let mean = start.elapsed() / frames;
    upscaler.flush();
    upscaler.reset();
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{frame::PixelFormat, model::BUNDLED};

    const INTERVAL: Duration = Duration::from_millis(100);

    /// Returns frames that differ by `scale`.
    fn frames(scale: f64) -> [FrameInfo; 2] {
        let side = |len: f64| (len * scale) as usize;
        let from = FrameInfo::new(PixelFormat::I420, 64, 48);
        [from, from.with_size(side(64.0), side(48.0))]
    }

    /// Chooses for models of these times in ms, in the order of the ladder.
    fn choice(scale: f64, times: &[u64]) -> Choice {
        let time = |group: &str| {
            let i = LADDER.iter().position(|g| *g == group).unwrap();
            Ok::<_, Error>(Duration::from_millis(times[i]))
        };
        let [from, to] = frames(scale);
        choose(&from, &to, INTERVAL, time).unwrap()
    }

    #[test]
    fn the_largest_model_within_the_share_of_the_interval_is_chosen() {
        for scale in [1.0, 1.5, 2.0, 3.0, 4.0] {
            let groups: Vec<_> = steps(scale).unwrap().iter().map(|s| s.group).collect();
            assert_eq!(groups[..2], ["tiny", "small"], "{scale}");
            assert_eq!(choice(scale, &[1, 2, 3]).model, *groups.last().unwrap());
            assert_eq!(choice(scale, &[6, 60, 61]).model, "small", "{scale}");
            assert_eq!(choice(scale, &[6, 61, 61]).model, "tiny", "{scale}");
            let [from, to] = frames(scale);
            assert_eq!(largest(&from, &to).unwrap(), *groups.last().unwrap());
        }
    }

    #[test]
    fn the_smallest_model_is_chosen_if_none_is_fast_enough() {
        let choice = choice(2.0, &[90, 1, 1]);
        assert_eq!(choice.model, "tiny");
        let times = vec![("tiny", Duration::from_millis(90))];
        assert_eq!(choice.times, times, "others are not measured");
    }

    #[test]
    fn a_model_that_must_be_too_slow_is_not_measured() {
        let choice = choice(2.0, &[55, 1, 1]);
        assert_eq!(choice.times.len(), 1, "{choice:?}");
    }

    #[test]
    fn costs_grow_along_the_ladder() {
        for scale in [2.0, 4.0] {
            let steps = steps(scale).unwrap();
            assert!(steps.is_sorted_by(|a, b| a.cost < b.cost), "{scale}");
        }
    }

    #[test]
    fn every_group_of_the_ladder_is_bundled() {
        for group in LADDER {
            assert!(BUNDLED.iter().any(|b| b.name.starts_with(group)), "{group}");
        }
    }
}
