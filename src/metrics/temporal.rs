//! Temporal stability of a video in comparison with the ground truth.

use super::{Flow, Gray};

/// Maximum luma difference in the neighbourhood of a pixel for still ground truth.
const STILL: f32 = 1.0;
/// Half the side of this neighbourhood.
const NEIGHBOURHOOD: usize = 2;
/// Maximum distance of a pixel from its start after motion forth and back. Others are occluded.
const ROUND_TRIP: f32 = 1.0;

/// Maximum mean difference of the warped ground truth within a scene. Above it is a cut.
const CUT: f64 = 20.0;

/// Change of the ground truth from one frame to the next, the reference for results of the later
/// frame.
pub struct Motion {
    /// Flow from the later frame to the previous one.
    back: Flow,
    /// Pixels of the later frame that are visible in the previous one.
    visible: Vec<bool>,
    /// Pixels whose neighbourhood does not change.
    still: Vec<bool>,
    /// The later frame minus the previous one.
    change: Vec<f32>,
    /// Squared difference along the motion, over visible pixels.
    warping: Mean,
    cut: bool,
}

/// Collects the scores of a video frame by frame.
#[derive(Default)]
pub struct Temporal {
    /// Result of the previous frame.
    last: Option<Gray>,
    warping: Mean,
    truth_warping: Mean,
    tof: Mean,
    flicker: Mean,
}

/// Means over a video's pairs of successive frames. A score without measured pixels is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct TemporalScores {
    /// Mean squared luma difference between a frame and the previous one warped by the motion of
    /// the ground truth, over visible pixels, minus that of the ground truth. In units of 0..255
    /// squared. 0 is as stable as the ground truth, lower is smoother. The first term is that of
    /// Lai et al., "Learning Blind Video Temporal Consistency", arXiv 1808.00449.
    pub warping_error: Option<f64>,
    /// Mean length of the difference between the motion of the result and of the ground truth, in
    /// pixels (tOF of Chu et al., arXiv 1811.09393, who add the absolute values of both
    /// directions).
    pub tof: Option<f64>,
    /// Mean absolute luma change from frame to frame in still areas, minus that of the ground
    /// truth. In units of 0..255.
    pub flicker: Option<f64>,
}

impl Motion {
    /// Estimates the motion from the frame `last` of the ground truth to the `next`.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn between(last: &Gray, next: &Gray) -> Self {
        let (back, forth) = (Flow::between(next, last), Flow::between(last, next));
        let warped = back.warp(last);
        let visible: Vec<bool> = (0..warped.len())
            .map(|i| warped[i].is_some() && returns(&back, &forth, i))
            .collect();
        let (mut warping, mut left) = (Mean::default(), Mean::default());
        for ((warped, next), visible) in warped.iter().zip(&next.data).zip(&visible) {
            let Some(warped) = warped else { continue };
            left.add(f64::from((next - warped).abs()));
            if *visible {
                warping.add(f64::from(next - warped).powi(2));
            }
        }
        let change: Vec<f32> = next
            .data
            .iter()
            .zip(&last.data)
            .map(|(n, l)| n - l)
            .collect();
        Self {
            still: still(&change, next.width),
            cut: left.get().is_none_or(|left| left > CUT),
            back,
            visible,
            change,
            warping,
        }
    }

    /// Returns `true` if the frames are of different scenes: no motion maps one to the other.
    pub fn is_cut(&self) -> bool {
        self.cut
    }
}

/// Returns `true` if pixel `i` returns to its position along `back` and then `forth`.
fn returns(back: &Flow, forth: &Flow, i: usize) -> bool {
    let [dx, dy] = back.vectors[i];
    let (x, y) = ((i % back.width) as f32 + dx, (i / back.width) as f32 + dy);
    let back_again = forth.at(x, y);
    back_again.is_some_and(|[fx, fy]| (dx + fx).hypot(dy + fy) <= ROUND_TRIP)
}

/// Returns the pixels whose neighbourhood does not change.
fn still(change: &[f32], width: usize) -> Vec<bool> {
    let height = change.len() / width.max(1);
    let around =
        |v: usize, len: usize| v.saturating_sub(NEIGHBOURHOOD)..(v + NEIGHBOURHOOD + 1).min(len);
    let changed: Vec<bool> = change.iter().map(|c| c.abs() >= STILL).collect();
    let at = |i: usize| {
        let (x, y) = (i % width, i / width);
        !around(y, height).any(|y| changed[y * width..][around(x, width)].contains(&true))
    };
    (0..change.len()).map(at).collect()
}

impl Temporal {
    /// Adds the result of the next frame. `motion` is that of the ground truth from the previous
    /// frame. Without it and across a cut nothing is measured.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn push(&mut self, motion: Option<&Motion>, result: Gray) {
        let last = self.last.replace(result);
        let motion = motion.filter(|m| !m.cut);
        if let (Some(motion), Some(last), Some(result)) = (motion, last, &self.last) {
            let moved = Flow::between(result, &last);
            for (a, b) in motion.back.vectors.iter().zip(&moved.vectors) {
                self.tof.add(f64::from((a[0] - b[0]).hypot(a[1] - b[1])));
            }
            self.truth_warping.merge(&motion.warping);
            let warped = motion.back.warp(&last).into_iter().zip(&motion.visible);
            for (result, warped) in result.data.iter().zip(warped) {
                if let (Some(warped), true) = warped {
                    self.warping.add(f64::from(result - warped).powi(2));
                }
            }
            let changes = result.data.iter().zip(&last.data).zip(&motion.change);
            for (((result, last), of_truth), still) in changes.zip(&motion.still) {
                if *still {
                    self.flicker
                        .add(f64::from((result - last - of_truth).abs()));
                }
            }
        }
    }

    /// Returns the scores of the frames since the last call. The previous frame is not forgotten.
    pub fn take_scores(&mut self) -> TemporalScores {
        let [warping, truth, tof, flicker] = [
            &mut self.warping,
            &mut self.truth_warping,
            &mut self.tof,
            &mut self.flicker,
        ]
        .map(|m| std::mem::take(m).get());
        TemporalScores {
            warping_error: warping.zip(truth).map(|(a, b)| a - b),
            tof,
            flicker,
        }
    }
}

#[derive(Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.count += other.count;
    }

    fn get(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: (usize, usize) = (96, 64);

    /// Returns a texture that moves by `shift` pixels to the right, plus `extra` for each pixel.
    fn frame(shift: f32, extra: impl Fn(usize, usize) -> f32) -> Gray {
        let (width, height) = SIZE;
        let at = |i: usize| {
            let (x, y) = (i % width, i / width);
            let u = x as f32 - shift;
            let v = y as f32;
            let wave = (0.3 * u + 0.11 * v).sin() * 40.0 + (0.19 * v - 0.13 * u).sin() * 40.0;
            128.0 + wave + extra(x, y)
        };
        Gray {
            width,
            height,
            data: (0..width * height).map(at).collect(),
        }
    }

    fn noise(x: usize, y: usize, t: usize) -> f32 {
        let mut n = ((x * 73_856_093) ^ (y * 19_349_663) ^ (t * 83_492_791)) as u32;
        n = (n ^ (n >> 13)).wrapping_mul(0x5bd1_e995);
        8.0 * (((n >> 16) & 0xff) as f32 / 255.0 - 0.5)
    }

    fn scores(speed: f32, result: impl Fn(usize, Gray) -> Gray) -> TemporalScores {
        let mut temporal = Temporal::default();
        let mut last = None;
        for t in 0..4 {
            let truth = frame(speed * t as f32, |_, _| 0.0);
            let motion = last.as_ref().map(|last| Motion::between(last, &truth));
            temporal.push(motion.as_ref(), result(t, truth.clone()));
            last = Some(truth);
        }
        temporal.take_scores()
    }

    #[test]
    fn the_truth_itself_is_perfect() {
        let s = scores(1.5, |_, truth| truth);
        assert_eq!((s.warping_error, s.tof), (Some(0.0), Some(0.0)));
        // No area is still, as everything moves.
        assert_eq!(s.flicker, None);
        assert_eq!(scores(0.0, |_, truth| truth).flicker, Some(0.0));
    }

    #[test]
    fn an_error_that_follows_the_motion_is_stable_and_noise_of_each_frame_is_not() {
        let along = scores(1.0, |t, _| {
            frame(t as f32, |x, y| noise((x + SIZE.0 - t) % SIZE.0, y, 0))
        });
        let fresh = scores(1.0, |t, _| frame(t as f32, |x, y| noise(x, y, t)));
        let (along, fresh) = (along.warping_error.unwrap(), fresh.warping_error.unwrap());
        // The difference of two independent errors has twice their variance, 2 x 64 / 12.
        assert!(
            along < 0.3 * fresh && (8.0..13.0).contains(&fresh),
            "{along} {fresh}"
        );
    }

    #[test]
    fn flicker_is_change_in_still_areas() {
        let bright = |t: usize| 3.0 * (t % 2) as f32;
        let s = scores(0.0, |t, _| frame(0.0, |_, _| bright(t)));
        assert!((s.flicker.unwrap() - 3.0).abs() < 1e-4, "{s:?}");
    }

    #[test]
    fn tof_measures_the_wrong_motion() {
        let s = scores(1.0, |t, _| frame(2.0 * t as f32, |_, _| 0.0));
        let tof = s.tof.unwrap();
        assert!((0.7..1.3).contains(&tof), "{tof}");
    }

    #[test]
    fn nothing_is_measured_across_a_cut() {
        let plain = |shift| frame(shift, |_, _| 0.0);
        let other = Gray {
            data: (0..SIZE.0 * SIZE.1)
                .map(|i| (i % SIZE.0) as f32 * 2.6)
                .collect(),
            ..plain(0.0)
        };
        let motion = Motion::between(&plain(0.0), &other);
        assert!(motion.is_cut() && !Motion::between(&plain(0.0), &plain(2.0)).is_cut());
        let mut temporal = Temporal::default();
        temporal.push(None, plain(0.0));
        temporal.push(Some(&motion), other);
        assert_eq!(temporal.take_scores(), TemporalScores::default());
    }

    #[test]
    fn scores_are_those_since_the_last_call() {
        let (a, b) = (frame(0.0, |_, _| 0.0), frame(0.0, |_, _| 3.0));
        let still = Motion::between(&a, &a);
        let mut temporal = Temporal::default();
        temporal.push(None, a.clone());
        temporal.push(Some(&still), b.clone());
        assert!((temporal.take_scores().flicker.unwrap() - 3.0).abs() < 1e-4);
        temporal.push(Some(&still), b);
        assert_eq!(temporal.take_scores().flicker, Some(0.0));
    }
}
