//! How stable a video is in time, beside the ground truth.

use super::{Flow, Gray};

/// Luma differences below this, on the scale 0..255, in the whole neighbourhood of a pixel: the ground truth is still.
const STILL: f32 = 1.0;
/// Half the side of that neighbourhood.
const NEIGHBOURHOOD: usize = 2;
/// Pixels that there and back again end further away than this were hidden or came into view.
const ROUND_TRIP: f32 = 1.0;

/// Collects the scores of a video frame by frame.
#[derive(Default)]
pub struct Temporal {
    /// Truth and result of the frame before.
    last: Option<(Gray, Gray)>,
    warping: Mean,
    truth_warping: Mean,
    tof: Mean,
    flicker: Mean,
}

/// Means over a video's pairs of successive frames; a score that no pixel could be measured for is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct TemporalScores {
    /// Mean squared luma difference between a frame and the frame before brought along the ground truth's motion,
    /// where nothing was hidden, minus the same of the ground truth itself. Scale 0..255 squared; 0 is as stable as the
    /// truth, lower is smoother than it (Lai et al., "Learning Blind Video Temporal Consistency", arXiv 1808.00449, measure
    /// the first part).
    pub warping_error: Option<f64>,
    /// Mean length of the difference between the result's motion and the truth's, in pixels (tOF of Chu et al.,
    /// arXiv 1811.09393, who sum both directions' absolute values).
    pub tof: Option<f64>,
    /// Mean absolute luma change from frame to frame beyond the truth's own where that is still: what flickers although
    /// nothing moves. Scale 0..255.
    pub flicker: Option<f64>,
}

impl Temporal {
    /// Takes the next frame: luma of the ground truth and of the result.
    ///
    /// # Panics
    /// When the sizes differ from each other or from the frame's before.
    pub fn push(&mut self, truth: Gray, result: Gray) {
        let size = |g: &Gray| (g.width, g.height);
        assert_eq!(size(&truth), size(&result), "sizes differ");
        if let Some((last_truth, last_result)) = self.last.take() {
            assert_eq!(size(&truth), size(&last_truth), "sizes differ");
            let back = Flow::between(&truth, &last_truth);
            let forth = Flow::between(&last_truth, &truth);
            self.warp(
                &back,
                &forth,
                (&truth, &last_truth),
                (&result, &last_result),
            );
            let moved = Flow::between(&result, &last_result);
            for (a, b) in back.vectors.iter().zip(&moved.vectors) {
                self.tof.add(f64::from((a[0] - b[0]).hypot(a[1] - b[1])));
            }
            self.flicker((&truth, &last_truth), (&result, &last_result));
        }
        self.last = Some((truth, result));
    }

    /// Forgets the frame before, as at a cut.
    pub fn cut(&mut self) {
        self.last = None;
    }

    pub fn scores(&self) -> TemporalScores {
        let difference = |(a, b): (f64, f64)| a - b;
        TemporalScores {
            warping_error: self
                .warping
                .get()
                .zip(self.truth_warping.get())
                .map(difference),
            tof: self.tof.get(),
            flicker: self.flicker.get(),
        }
    }

    fn warp(&mut self, back: &Flow, forth: &Flow, truth: (&Gray, &Gray), result: (&Gray, &Gray)) {
        let (warped_truth, warped) = (back.warp(truth.1), back.warp(result.1));
        for (i, (t, r)) in warped_truth.iter().zip(&warped).enumerate() {
            let (Some(t), Some(r)) = (t, r) else { continue };
            let [dx, dy] = back.vectors[i];
            let (x, y) = ((i % back.width) as f32 + dx, (i / back.width) as f32 + dy);
            let Some([fx, fy]) = forth.at(x, y) else {
                continue;
            };
            if (dx + fx).hypot(dy + fy) > ROUND_TRIP {
                continue;
            }
            self.truth_warping
                .add(f64::from(truth.0.data[i] - t).powi(2));
            self.warping.add(f64::from(result.0.data[i] - r).powi(2));
        }
    }

    fn flicker(&mut self, truth: (&Gray, &Gray), result: (&Gray, &Gray)) {
        let (w, h) = (truth.0.width, truth.0.height);
        let changed = |i: usize| (truth.0.data[i] - truth.1.data[i]).abs() >= STILL;
        let around = |v: usize, len: usize| {
            v.saturating_sub(NEIGHBOURHOOD)..=(v + NEIGHBOURHOOD).min(len - 1)
        };
        for y in 0..h {
            for x in 0..w {
                let moves = || around(y, h).any(|y| around(x, w).any(|x| changed(y * w + x)));
                let i = y * w + x;
                if !changed(i) && !moves() {
                    let of_truth = truth.0.data[i] - truth.1.data[i];
                    let of_result = result.0.data[i] - result.1.data[i];
                    self.flicker.add(f64::from((of_result - of_truth).abs()));
                }
            }
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

    fn get(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: (usize, usize) = (96, 64);

    /// A texture that moves by `shift` pixels to the right, plus what `extra` adds to a pixel.
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
        for t in 0..4 {
            let truth = frame(speed * t as f32, |_, _| 0.0);
            let result = result(t, truth.clone());
            temporal.push(truth, result);
        }
        temporal.scores()
    }

    #[test]
    fn the_truth_itself_is_perfect() {
        let s = scores(1.5, |_, truth| truth);
        assert_eq!((s.warping_error, s.tof), (Some(0.0), Some(0.0)));
        // Nothing is still while everything moves.
        assert_eq!(s.flicker, None);
        assert_eq!(scores(0.0, |_, truth| truth).flicker, Some(0.0));
    }

    #[test]
    fn an_error_that_moves_along_is_stable_and_noise_of_each_frame_is_not() {
        let along = scores(1.0, |t, _| {
            frame(t as f32, |x, y| noise((x + SIZE.0 - t) % SIZE.0, y, 0))
        });
        let fresh = scores(1.0, |t, _| frame(t as f32, |x, y| noise(x, y, t)));
        let (along, fresh) = (along.warping_error.unwrap(), fresh.warping_error.unwrap());
        // The difference of two independent errors has twice their variance: 2 x 64 / 12.
        assert!(
            along < 0.3 * fresh && (8.0..13.0).contains(&fresh),
            "{along} {fresh}"
        );
    }

    #[test]
    fn flicker_is_what_changes_where_nothing_does() {
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
        let mut temporal = Temporal::default();
        temporal.push(frame(0.0, |_, _| 0.0), frame(0.0, |_, _| 0.0));
        temporal.cut();
        temporal.push(frame(30.0, |_, _| 0.0), frame(30.0, |_, _| 0.0));
        assert_eq!(temporal.scores(), TemporalScores::default());
    }
}
