//! Clips of photos: a camera that pans, zooms and turns, at sub-pixel positions.

use std::f64::consts::TAU;

use rand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::photos::PhotoSet;
use crate::{Error, Result, train::patch::Patch};

/// Side of the part of a photo that a camera moves over, in sides of its image.
const ROOM: f64 = 1.75;
/// Scale from which interpolated pixels are about as sharp as those of the photo.
const SHARP: f64 = 1.25;

/// Motion of a camera over photos.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Motion {
    /// Probability that the camera stands still.
    pub still: f64,
    /// Maximum motion in pixels per frame.
    pub speed: f64,
    /// Probability of a zoom.
    pub zoom: f64,
    /// Maximum relative change of the scale per frame.
    pub zoom_rate: f64,
    /// Probability of a rotation.
    pub turn: f64,
    /// Maximum angle per frame in degrees.
    pub turn_rate: f64,
}

impl Default for Motion {
    fn default() -> Self {
        Self {
            still: 0.15,
            speed: 5.0,
            zoom: 0.3,
            zoom_rate: 0.01,
            turn: 0.3,
            turn_rate: 0.6,
        }
    }
}

/// Motion from one frame to the next.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Shift in pixels of the photo.
    x: f64,
    y: f64,
    /// Logarithm of the factor of the scale.
    zoom: f64,
    /// Angle in radians.
    turn: f64,
}

impl Motion {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        for (name, value, max) in [
            ("still", self.still, 1.0),
            ("speed", self.speed, 100.0),
            ("zoom", self.zoom, 1.0),
            ("zoom_rate", self.zoom_rate, 0.5),
            ("turn", self.turn, 1.0),
            ("turn_rate", self.turn_rate, 45.0),
        ] {
            if !(0.0..=max).contains(&value) {
                return Err(Error::Setting(format!(
                    "motion: {name} = {value}: 0 to {max}"
                )));
            }
        }
        Ok(())
    }

    /// Returns a clip of `len` square frames of `side` pixels from a camera that moves over a
    /// photo. The photo is shrunk as far as its size allows, up to two times, so that frames at
    /// sub-pixel positions are as sharp as the others.
    ///
    /// # Errors
    /// [`Error::Data`] when all photos are smaller than `side`.
    pub fn over<R: Rng + ?Sized>(
        &self,
        photos: &PhotoSet,
        rng: &mut R,
        side: usize,
        len: usize,
    ) -> Result<Vec<Patch>> {
        let photo = photos.square(rng, side, (ROOM * side as f64) as usize)?;
        let max = (0.9 * photo.width as f64 / side as f64).clamp(1.0, 2.0);
        let scale = rng.random_range(max.min(SHARP)..=max);
        let mut step = self.sample(rng, scale);
        // Motion that would leave the photo is slowed down. At the edge, pixels repeat.
        for _ in 0..8 {
            if extent((side, side), scale, step, len) <= photo.width as f64 / 2.0 {
                break;
            }
            step = Step {
                x: step.x / 2.0,
                y: step.y / 2.0,
                zoom: step.zoom / 2.0,
                turn: step.turn / 2.0,
            };
        }
        let middle = (len as f64 - 1.0) / 2.0;
        let frame = |t: usize| view(&photo, (side, side), scale, step, t as f64 - middle);
        Ok((0..len).into_par_iter().map(frame).collect())
    }

    fn sample<R: Rng + ?Sized>(&self, rng: &mut R, scale: f64) -> Step {
        let (still, zooms, turns) = (
            rng.random_bool(self.still),
            rng.random_bool(self.zoom),
            rng.random_bool(self.turn),
        );
        let mut signed = |max: f64| (2.0 * rng.random::<f64>() - 1.0) * max;
        let (zoom, turn) = (signed(self.zoom_rate), signed(self.turn_rate));
        let speed = rng.random::<f64>() * self.speed * scale;
        let (sin, cos) = (rng.random::<f64>() * TAU).sin_cos();
        let moves = if still { 0.0 } else { 1.0 };
        Step {
            x: moves * speed * cos,
            y: moves * speed * sin,
            zoom: if zooms { moves * zoom.ln_1p() } else { 0.0 },
            turn: if turns {
                moves * turn.to_radians()
            } else {
                0.0
            },
        }
    }
}

/// Returns the maximum distance of the view from the centre of the photo, in pixels of the photo.
fn extent((w, h): (usize, usize), scale: f64, step: Step, len: usize) -> f64 {
    let middle = (len as f64 - 1.0) / 2.0;
    let mut max: f64 = 0.0;
    for t in [-middle, middle] {
        for corner in [(-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0)] {
            let at = (corner.0 * w as f64 / 2.0, corner.1 * h as f64 / 2.0);
            let (x, y) = seen(at, scale, step, t);
            max = max.max(x.abs()).max(y.abs());
        }
    }
    max
}

/// Returns the position in the photo of the position `at` of the frame at time `t`, both relative
/// to the centre.
fn seen((x, y): (f64, f64), scale: f64, step: Step, t: f64) -> (f64, f64) {
    let scale = scale * (step.zoom * t).exp();
    let (sin, cos) = (step.turn * t).sin_cos();
    (
        scale * (cos * x - sin * y) + step.x * t,
        scale * (sin * x + cos * y) + step.y * t,
    )
}

/// Returns the frame at time `t` by Catmull-Rom interpolation, with antialiasing if the scale
/// shrinks.
fn view(photo: &Patch, (w, h): (usize, usize), scale: f64, step: Step, t: f64) -> Patch {
    let reach = (scale * (step.zoom * t).exp()).max(1.0);
    let mut out = Patch::new(w, h);
    let centre = |len: usize| (len as f64 - 1.0) / 2.0;
    let (area, source) = (w * h, photo.width * photo.height);
    let (mut wx, mut wy) = (Vec::new(), Vec::new());
    for y in 0..h {
        for x in 0..w {
            let at = (x as f64 - centre(w), y as f64 - centre(h));
            let (sx, sy) = seen(at, scale, step, t);
            taps(sx + centre(photo.width), reach, photo.width, &mut wx);
            taps(sy + centre(photo.height), reach, photo.height, &mut wy);
            for c in 0..3 {
                let plane = &photo.rgb[c * source..][..source];
                let mut sum = 0.0;
                for &(i, v) in &wy {
                    let row = &plane[i * photo.width..][..photo.width];
                    sum += v * wx.iter().map(|&(j, u)| u * row[j]).sum::<f32>();
                }
                out.rgb[c * area + y * w + x] = sum.clamp(0.0, 1.0);
            }
        }
    }
    out
}

/// Returns the pixels of a row of `len` pixels and their weights for the position `at`. Pixels
/// outside repeat the edge.
fn taps(at: f64, reach: f64, len: usize, out: &mut Vec<(usize, f32)>) {
    out.clear();
    let (first, last) = (
        (at - 2.0 * reach).ceil() as i64,
        (at + 2.0 * reach).floor() as i64,
    );
    let mut sum = 0.0;
    for i in first..=last {
        let weight = catmull_rom((i as f64 - at) / reach);
        let inside = i.clamp(0, len as i64 - 1) as usize;
        sum += weight;
        out.push((inside, weight as f32));
    }
    out.iter_mut().for_each(|(_, w)| *w /= sum as f32);
}

/// Catmull-Rom spline (Keys, 1981, with a = -0.5).
fn catmull_rom(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    const STILL: Step = Step {
        x: 0.0,
        y: 0.0,
        zoom: 0.0,
        turn: 0.0,
    };

    fn photos() -> (tempfile::TempDir, PhotoSet) {
        let dir = tempfile::tempdir().unwrap();
        let pixel = |x: u32, y: u32| {
            let v = (x / 2 * 73_856_093) ^ (y / 2 * 19_349_663);
            image::Rgb([v, v / 3, v / 7].map(|v| (40 + (v ^ (v >> 13)) % 170) as u8))
        };
        image::RgbImage::from_fn(100, 100, pixel)
            .save(dir.path().join("a.png"))
            .unwrap();
        let set = PhotoSet::load(&[dir.path().to_path_buf()], 32, |_, _| {}).unwrap();
        (dir, set)
    }

    fn clip(motion: &Motion, photos: &PhotoSet, seed: u64) -> Vec<Patch> {
        motion
            .over(photos, &mut SmallRng::seed_from_u64(seed), 32, 5)
            .unwrap()
    }

    #[test]
    fn a_camera_stands_still_or_moves_and_follows_the_seed() {
        let (_dir, photos) = photos();
        let still = Motion {
            still: 1.0,
            ..Motion::default()
        };
        let moving = Motion {
            still: 0.0,
            ..Motion::default()
        };
        let mut moved = 0;
        for seed in 0..10 {
            let frames = clip(&still, &photos, seed);
            assert!(
                frames
                    .iter()
                    .all(|p| *p == frames[0] && p.rgb.len() == 3 * 32 * 32)
            );
            let frames = clip(&moving, &photos, seed);
            assert_eq!(frames, clip(&moving, &photos, seed));
            moved += usize::from(frames.len() == 5 && frames[0] != frames[1]);
        }
        assert!(moved > 8);
        let mut rng = SmallRng::seed_from_u64(0);
        assert!(Motion::default().over(&photos, &mut rng, 101, 5).is_err());
    }

    #[test]
    fn a_step_of_a_pixel_and_a_half_is_a_shift_by_three_pixels_in_two_frames() {
        let (_dir, photos) = photos();
        let photo = photos
            .sample(&mut SmallRng::seed_from_u64(1), 32, 32)
            .unwrap();
        let step = Step { x: 1.5, ..STILL };
        let [a, b] = [0.0, 2.0].map(|t| view(&photo, (20, 20), 1.0, step, t));
        for y in 0..20 {
            let (a, b) = (&a.rgb[y * 20..][..20], &b.rgb[y * 20..][..20]);
            assert!(a[3..].iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    #[test]
    fn a_camera_that_does_not_move_copies_the_photo() {
        let mut photo = Patch::new(40, 40);
        photo
            .rgb
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v = (i * 37 % 101) as f32 / 101.0);
        let same = view(&photo, (40, 40), 1.0, STILL, 1.0);
        for (a, b) in same.rgb.iter().zip(&photo.rgb) {
            assert!((a - b).abs() < 1e-6);
        }
        // A quarter turn maps pixels to pixels.
        let turn = TAU / 4.0;
        let turned = view(&photo, (40, 40), 1.0, Step { turn, ..STILL }, 1.0);
        for (y, row) in turned.rgb.chunks(40).take(40).enumerate() {
            for (x, v) in row.iter().enumerate() {
                assert!((v - photo.rgb[x * 40 + 39 - y]).abs() < 1e-5, "{x} {y}");
            }
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        Motion::default().check().unwrap();
        let motion = Motion {
            speed: -1.0,
            ..Motion::default()
        };
        assert!(motion.check().unwrap_err().to_string().contains("speed"));
    }
}
