//! Stages of degradation, each a table in a TOML file.
//!
//! A stage samples its parameters once per clip, like a camera or an encoder. Only noise is new in
//! every frame.

use std::f32::consts::TAU;

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::{
    codec::Codecs,
    filters::{KernelWeights, content, convolve, jpeg_round_trip},
    real_world::RealWorld,
};
use crate::{
    Error, Result,
    train::{
        patch::Patch,
        random::{normal, step_seed},
    },
};

/// Stage of a degradation recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Stage {
    /// Gaussian blur.
    Blur(Blur),
    /// Shrinking to the low resolution, by one of several kernels. Every recipe has either this or
    /// `real_world`, once.
    Shrink(KernelWeights),
    /// Sensor noise.
    Noise(Noise),
    /// JPEG compression of single images.
    Jpeg(Jpeg),
    /// Compression of the clip by a video codec.
    Codec(Codecs),
    /// Two rounds of blur, resizing, noise and JPEG. It shrinks to the low resolution.
    RealWorld(Box<RealWorld>),
}

/// Gaussian blur.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blur {
    /// Probability of this stage.
    pub chance: f64,
    /// Range of the standard deviation in low-resolution pixels.
    pub sigma: (f32, f32),
    /// Probability of different widths in two perpendicular directions.
    pub anisotropic: f64,
}

/// Gaussian noise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Noise {
    /// Probability of this stage.
    pub chance: f64,
    /// Range of the standard deviation in 8-bit steps (at white for shot noise).
    pub sigma: (f32, f32),
    /// Probability of shot noise, whose variance is proportional to the brightness.
    pub shot: f64,
    /// Probability that noise is the same in R, G and B.
    pub grey: f64,
}

/// JPEG compression at 4:4:4.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Jpeg {
    /// Probability of this stage.
    pub chance: f64,
    /// Range of the quality, 1 to 100.
    pub quality: (u8, u8),
    /// Probability that the 8x8 blocks do not start at the corner of the image, as in a crop.
    pub shift: f64,
}

impl Default for Blur {
    fn default() -> Self {
        Self {
            chance: 1.0,
            sigma: (0.2, 0.8),
            anisotropic: 0.5,
        }
    }
}

impl Default for Noise {
    fn default() -> Self {
        Self {
            chance: 1.0,
            sigma: (0.5, 4.0),
            shot: 0.5,
            grey: 0.4,
        }
    }
}

impl Default for Jpeg {
    fn default() -> Self {
        Self {
            chance: 1.0,
            quality: (30, 95),
            shift: 0.5,
        }
    }
}

impl Stage {
    /// Returns the name in a TOML file.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Blur(_) => "blur",
            Self::Shrink(_) => "shrink",
            Self::Noise(_) => "noise",
            Self::Jpeg(_) => "jpeg",
            Self::Codec(_) => "codec",
            Self::RealWorld(_) => "real_world",
        }
    }

    /// Returns `true` if images have the low resolution after this stage.
    pub fn shrinks(&self) -> bool {
        matches!(self, Self::Shrink(_) | Self::RealWorld(_))
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let shares: &[(&str, f64)] = match self {
            Self::Blur(s) => &[("chance", s.chance), ("anisotropic", s.anisotropic)],
            Self::Noise(s) => &[("chance", s.chance), ("shot", s.shot), ("grey", s.grey)],
            Self::Jpeg(s) => &[("chance", s.chance), ("shift", s.shift)],
            Self::Shrink(kernels) => return kernels.check(),
            Self::Codec(codecs) => return codecs.check(),
            Self::RealWorld(recipe) => return recipe.check(),
        };
        for (name, value) in shares {
            if !(0.0..=1.0).contains(value) {
                let text = format!("{name} = {value}: a probability is 0 to 1");
                return Err(Error::Setting(text));
            }
        }
        let (name, (low, high), (min, max)) = match self {
            Self::Blur(s) => ("sigma", s.sigma, (0.0, 20.0)),
            Self::Noise(s) => ("sigma", s.sigma, (0.0, 255.0)),
            Self::Jpeg(Jpeg {
                quality: (l, h), ..
            }) => ("quality", (f32::from(*l), f32::from(*h)), (1.0, 100.0)),
            _ => return Ok(()),
        };
        if !(min <= low && low <= high && high <= max) {
            let text = format!("{name} = {low}..{high}: need {min} <= low <= high <= {max}");
            return Err(Error::Setting(text));
        }
        Ok(())
    }

    /// Applies the stage to the frames of `clip`, all of one size. `small` is the low resolution.
    /// The values must have been checked.
    ///
    /// # Errors
    /// When a side is 0 or above the limit of the stage, or GStreamer lacks the codec.
    pub fn apply<R: Rng + ?Sized>(
        &self,
        mut clip: Vec<Patch>,
        small: (usize, usize),
        rng: &mut R,
    ) -> Result<Vec<Patch>> {
        let Some(first) = clip.first() else {
            return Ok(clip);
        };
        let size = (first.width, first.height);
        match self {
            Self::Blur(blur) => {
                let scale = |large: usize, small: usize| large as f32 / small.max(1) as f32;
                let scale = (scale(size.0, small.0), scale(size.1, small.1));
                for taps in blur.sample(scale, rng) {
                    clip.iter_mut().for_each(|p| convolve(p, taps.clone()));
                }
                Ok(clip)
            }
            Self::Shrink(kernels) => {
                let kernel = kernels.sample(rng);
                let shrink = |p: Patch| p.resize(small.0, small.1, kernel);
                clip.into_iter().map(shrink).collect()
            }
            Self::Noise(noise) => {
                noise.add(&mut clip, rng);
                Ok(clip)
            }
            Self::Jpeg(jpeg) => jpeg.compress(clip, rng),
            Self::Codec(codecs) => codecs.sample(rng).compress(&clip),
            Self::RealWorld(recipe) => {
                let degradation = |p: Patch| recipe.apply(&p, small.0, small.1, rng);
                clip.into_iter().map(degradation).collect()
            }
        }
    }
}

/// Offsets from a pixel and their weights.
type Taps = Vec<(isize, isize, f32)>;

impl Blur {
    /// Returns the filters of a blur at `scale` high-resolution pixels per low-resolution pixel.
    fn sample<R: Rng + ?Sized>(&self, scale: (f32, f32), rng: &mut R) -> Vec<Taps> {
        if !rng.random_bool(self.chance) {
            return Vec::new();
        }
        let (low, high) = self.sigma;
        let sigma = rng.random_range(low..=high);
        if !rng.random_bool(self.anisotropic) {
            return along_axes(sigma * scale.0, sigma * scale.1).into();
        }
        let other = rng.random_range(low..=high);
        let (sin, cos) = rng.random_range(0.0..TAU).sin_cos();
        // Covariance of the two widths rotated by the angle, in low-resolution pixels, then scaled.
        let (a, b) = (sigma * sigma, other * other);
        let xx = (a * cos * cos + b * sin * sin) * scale.0 * scale.0;
        let yy = (a * sin * sin + b * cos * cos) * scale.1 * scale.1;
        let xy = (a - b) * sin * cos * scale.0 * scale.1;
        vec![turned([xx, xy, yy])]
    }
}

impl Noise {
    fn add<R: Rng + ?Sized>(&self, clip: &mut [Patch], rng: &mut R) {
        if !rng.random_bool(self.chance) {
            return;
        }
        let (low, high) = self.sigma;
        let sigma = rng.random_range(low..=high) / 255.0;
        let shot = rng.random_bool(self.shot);
        let grey = rng.random_bool(self.grey);
        let seed: u64 = rng.random();
        for (picture, t) in clip.iter_mut().zip(0..) {
            let area = picture.width * picture.height;
            let mut rng = StdRng::seed_from_u64(step_seed(seed ^ content(picture), t));
            let field: Vec<f32> = (0..if grey { area } else { 3 * area })
                .map(|_| normal(&mut rng))
                .collect();
            for (v, n) in picture.rgb.iter_mut().zip(field.iter().cycle()) {
                // The variance of counted photons is proportional to their mean. At these levels a
                // Poisson distribution is Gaussian.
                let deviation = if shot {
                    sigma * v.max(0.0).sqrt()
                } else {
                    sigma
                };
                *v += n * deviation;
            }
        }
    }
}

impl Jpeg {
    fn compress<R: Rng + ?Sized>(&self, clip: Vec<Patch>, rng: &mut R) -> Result<Vec<Patch>> {
        if !rng.random_bool(self.chance) {
            return Ok(clip);
        }
        let quality = rng.random_range(self.quality.0..=self.quality.1);
        let shift = if rng.random_bool(self.shift) {
            (rng.random_range(0..8), rng.random_range(0..8))
        } else {
            (0, 0)
        };
        let compress = |picture: Patch| {
            let (w, h) = (picture.width, picture.height);
            let bytes = jpeg_shifted(&picture.to_rgb8(), w, h, quality, shift)?;
            Ok(Patch::from_rgb8(w, h, &bytes))
        };
        clip.into_iter().map(compress).collect()
    }
}

/// Applies [`jpeg_round_trip`] with a shifted block grid: the image lies `shift` pixels inside a
/// larger one that repeats its first column and row.
fn jpeg_shifted(
    bytes: &[u8],
    width: usize,
    height: usize,
    quality: u8,
    shift: (usize, usize),
) -> Result<Vec<u8>> {
    if shift == (0, 0) {
        return jpeg_round_trip(bytes, width, height, quality);
    }
    let (dx, dy) = shift;
    let (w, h) = (width + dx, height + dy);
    let mut padded = Vec::with_capacity(3 * w * h);
    for y in 0..h {
        let row = &bytes[3 * width * y.saturating_sub(dy)..][..3 * width];
        for _ in 0..dx {
            padded.extend_from_slice(&row[..3]);
        }
        padded.extend_from_slice(row);
    }
    let coded = jpeg_round_trip(&padded, w, h, quality)?;
    let rows = coded.chunks_exact(3 * w).skip(dy);
    Ok(rows.flat_map(|row| &row[3 * dx..]).copied().collect())
}

/// Returns a Gaussian blur along the axes, with widths in pixels.
fn along_axes(sigma_x: f32, sigma_y: f32) -> [Taps; 2] {
    let line = |sigma: f32| {
        let reach = reach(sigma);
        (-reach..=reach).map(move |d| (d, (-0.5 * (d as f32 / sigma.max(1e-3)).powi(2)).exp()))
    };
    [
        line(sigma_x).map(|(d, k)| (d, 0, k)).collect(),
        line(sigma_y).map(|(d, k)| (0, d, k)).collect(),
    ]
}

/// Returns a Gaussian blur with covariance `[xx, xy, yy]` in square pixels.
fn turned([xx, xy, yy]: [f32; 3]) -> Taps {
    // A minimum width makes the covariance invertible.
    let (xx, yy) = (xx + 1e-3, yy + 1e-3);
    let determinant = xx * yy - xy * xy;
    let (rx, ry) = (reach(xx.sqrt()), reach(yy.sqrt()));
    let mut taps = Vec::new();
    for dy in -ry..=ry {
        for dx in -rx..=rx {
            let (x, y) = (dx as f32, dy as f32);
            let distance = (yy * x * x - 2.0 * xy * x * y + xx * y * y) / determinant;
            if distance < 12.0 {
                taps.push((dx, dy, (-0.5 * distance).exp()));
            }
        }
    }
    taps
}

/// Returns the radius in pixels of a Gaussian of width `sigma`.
fn reach(sigma: f32) -> isize {
    (3.0 * sigma).ceil() as isize
}

#[cfg(test)]
pub(in crate::train) mod tests {
    use super::*;

    /// Returns an image with an edge, a gradient and fine texture.
    pub fn scene(width: usize, height: usize) -> Patch {
        let mut patch = Patch::new(width, height);
        for (i, v) in patch.rgb.iter_mut().enumerate() {
            let (x, y, c) = (i % width, i / width % height, i / (width * height));
            let texture = ((x * 7 + y * 13 + c * 3) % 11) as f32 / 40.0;
            let edge = if x > width / 2 { 0.4 } else { 0.1 };
            *v = edge + texture + 0.2 * y as f32 / height as f32;
        }
        patch
    }

    #[test]
    fn a_shifted_jpeg_grid_does_not_move_the_image() {
        let bytes = scene(33, 29).to_rgb8();
        let plain = jpeg_round_trip(&bytes, 33, 29, 95).unwrap();
        let shifted = jpeg_shifted(&bytes, 33, 29, 95, (3, 5)).unwrap();
        assert_ne!(plain, shifted);
        let far = bytes
            .iter()
            .zip(&shifted)
            .filter(|(a, b)| a.abs_diff(**b) > 40);
        assert!(far.count() < 30);
    }

    #[test]
    fn noise_is_new_in_every_frame_and_every_picture() {
        let noise = Noise {
            chance: 1.0,
            ..Noise::default()
        };
        let mut other = scene(20, 20);
        other.rgb[0] += 0.5;
        let add = |mut clip: Vec<Patch>| {
            let clean = clip.clone();
            noise.add(&mut clip, &mut StdRng::seed_from_u64(3));
            let grain = clip.iter().zip(&clean);
            let grain = grain.map(|(a, b)| a.rgb[7] - b.rgb[7]);
            grain.collect::<Vec<_>>()
        };
        let still = add(vec![scene(20, 20), scene(20, 20)]);
        assert_ne!(still[0], still[1]);
        assert_eq!(still, add(vec![scene(20, 20), scene(20, 20)]));
        assert_ne!(still[0], add(vec![other])[0]);
    }

    #[test]
    fn blur_spreads_a_point_by_the_width_asked_for() {
        let variance = |turn: bool| {
            let mut dot = Patch::new(41, 41);
            for c in 0..3 {
                dot.rgb[c * 1681 + 20 * 41 + 20] = 1.0;
            }
            let taps = if turn {
                vec![turned([6.25, 2.0, 4.0])]
            } else {
                along_axes(2.5, 2.0).into()
            };
            taps.into_iter().for_each(|t| convolve(&mut dot, t));
            let plane = &dot.rgb[..1681];
            let moment = |f: &dyn Fn(f32, f32) -> f32| -> f32 {
                let at = |i: usize| ((i % 41) as f32 - 20.0, (i / 41) as f32 - 20.0);
                let terms = plane.iter().enumerate();
                terms.map(|(i, v)| v * f(at(i).0, at(i).1)).sum()
            };
            [
                moment(&|_, _| 1.0),
                moment(&|x, _| x * x),
                moment(&|x, y| x * y),
                moment(&|_, y| y * y),
            ]
        };
        for (turn, want) in [
            (false, [1.0, 6.25, 0.0, 4.0]),
            (true, [1.0, 6.25, 2.0, 4.0]),
        ] {
            for (got, want) in variance(turn).into_iter().zip(want) {
                // The missing tails cost a few percent.
                assert!(
                    (got - want).abs() < 0.04 * want.abs() + 1e-3,
                    "{got} is not {want}"
                );
            }
        }
    }
}
