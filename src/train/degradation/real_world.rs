//! Two-stage degradation for real-world super-resolution: Real-ESRGAN (Wang et al., arXiv
//! 2107.10833, section 3) with the ranges of ResShift (arXiv 2307.12348) for scale 4.

use std::f32::consts::PI;

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::filters::{content, convolve, jpeg_round_trip};
use crate::{
    Error, Result,
    frame::resample::{Axis, Kernel, Options, Resampler},
    train::{patch::Patch, random::normal},
};

/// Two rounds of blur, resize, noise and JPEG. At the end the image is brought to its size, with
/// ringing and JPEG in either order.
///
/// Three differences to the published code: JPEG is the codec itself at 4:4:4 instead of a
/// differentiable model at 4:2:0, borders repeat instead of mirror, and the level of Poisson noise
/// is always 256.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RealWorld {
    pub first: Stage,
    pub second: Stage,
    /// Probability of blur, resize and noise in the second round; its JPEG always happens.
    pub second_order: f64,
    /// Probability of the final low-pass filter, whose cutoff is 1/3 to 1 of the sampling limit.
    pub ringing: f64,
}

/// One round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Probability of a blur.
    pub blur: f64,
    /// Maximum side of its kernel in pixels, odd; the side is an odd number from 7.
    pub kernel: usize,
    /// Range of the standard deviation in pixels, in each of two perpendicular directions.
    pub sigma: (f32, f32),
    /// Probability that a blur is a low-pass filter with ringing (a circular sinc).
    pub sinc: f64,
    /// Range of the exponent of a generalised Gaussian: below 1 and above 1 equally often.
    pub generalised: (f32, f32),
    /// Range of the exponent of a plateau, likewise.
    pub plateau: (f32, f32),
    /// Weights of enlarging, shrinking and an unchanged size.
    pub resize: [f64; 3],
    /// Range of the factor of the size.
    pub factor: (f32, f32),
    /// Probability that noise is Gaussian; otherwise it is Poisson noise.
    pub gaussian: f64,
    /// Range of the standard deviation of Gaussian noise in 8-bit steps.
    pub noise: (f32, f32),
    /// Range of the strength of Poisson noise, as a multiple of that of 256 photons at white.
    pub poisson: (f32, f32),
    /// Probability that noise is the same in R, G and B.
    pub grey: f64,
    /// Range of the JPEG quality, 1 to 100.
    pub jpeg: (u8, u8),
}

impl Default for RealWorld {
    fn default() -> Self {
        let first = Stage {
            blur: 1.0,
            kernel: 21,
            sigma: (0.2, 3.0),
            sinc: 0.1,
            generalised: (0.5, 4.0),
            plateau: (1.0, 2.0),
            resize: [0.2, 0.7, 0.1],
            factor: (0.15, 1.5),
            gaussian: 0.5,
            noise: (1.0, 30.0),
            poisson: (0.05, 3.0),
            grey: 0.4,
            jpeg: (30, 95),
        };
        let second = Stage {
            blur: 0.8,
            kernel: 15,
            sigma: (0.2, 1.5),
            resize: [0.3, 0.4, 0.3],
            factor: (0.3, 1.2),
            noise: (1.0, 25.0),
            poisson: (0.05, 2.5),
            ..first.clone()
        };
        Self {
            first,
            second,
            second_order: 0.5,
            ringing: 0.8,
        }
    }
}

impl RealWorld {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let share = |name: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                Ok(())
            } else {
                Err(wrong(format!("{name} = {value}: a probability is 0 to 1")))
            }
        };
        share("second_order", self.second_order)?;
        share("ringing", self.ringing)?;
        for stage in [&self.first, &self.second] {
            share("blur", stage.blur)?;
            share("sinc", stage.sinc)?;
            share("gaussian", stage.gaussian)?;
            share("grey", stage.grey)?;
            stage.check()?;
        }
        Ok(())
    }

    /// Degrades `hr` to `width` x `height` pixels. The result holds 8-bit values (multiples of
    /// 1/255) and depends on the input and `rng` only.
    ///
    /// # Errors
    /// [`Error::Frame`] when a side is 0 or above the limit of JPEG (65535), [`Error::Setting`]
    /// when a setting is out of range.
    pub fn apply<R: Rng + ?Sized>(
        &self,
        hr: &Patch,
        width: usize,
        height: usize,
        rng: &mut R,
    ) -> Result<Patch> {
        self.check()?;
        let mut picture = self.first.blur_resize_noise(hr.clone(), hr, rng)?;
        picture = jpeg(&picture, self.first.jpeg, rng)?;
        if rng.random_bool(self.second_order) {
            // Factors of the second round are relative to the final size.
            let size = Patch::new(width, height);
            picture = self.second.blur_resize_noise(picture, &size, rng)?;
        }
        let finish = |picture: Patch, rng: &mut R| -> Result<Patch> {
            let kernel = any_kernel(rng);
            let mut picture = interpolate(&picture, width, height, kernel)?;
            if rng.random_bool(self.ringing) {
                let side = odd(rng, 21);
                let cutoff = rng.random_range(PI / 3.0..PI);
                convolve(&mut picture, sinc(side, cutoff));
            }
            clamp(&mut picture);
            Ok(picture)
        };
        let compressed_last = rng.random::<bool>();
        if !compressed_last {
            picture = jpeg(&picture, self.second.jpeg, rng)?;
        }
        picture = finish(picture, rng)?;
        if compressed_last {
            picture = jpeg(&picture, self.second.jpeg, rng)?;
        }
        Ok(Patch::from_rgb8(width, height, &picture.to_rgb8()))
    }
}

impl Stage {
    fn check(&self) -> Result<()> {
        let ranges = [
            ("sigma", self.sigma, 100.0),
            ("generalised", self.generalised, 16.0),
            ("plateau", self.plateau, 16.0),
            ("factor", self.factor, 4.0),
            ("noise", self.noise, 255.0),
            ("poisson", self.poisson, 255.0),
        ];
        for (name, (low, high), max) in ranges {
            if !(0.01 <= low && low <= high && high <= max) {
                return Err(wrong(format!(
                    "{name} = {low}..{high}: need 0.01 <= low <= high <= {max}"
                )));
            }
        }
        let (low, high) = self.jpeg;
        if !(1 <= low && low <= high && high <= 100) {
            let text = format!("jpeg = {low}..{high}: need 1 <= low <= high <= 100");
            return Err(wrong(text));
        }
        if self.kernel.is_multiple_of(2) || !(7..=63).contains(&self.kernel) {
            return Err(wrong(format!("kernel = {}: odd, 7 to 63", self.kernel)));
        }
        let sum: f64 = self.resize.iter().sum();
        if self.resize.iter().any(|w| *w < 0.0) || !(sum > 0.0 && sum.is_finite()) {
            let text = "resize: frequencies are not negative and not all zero";
            return Err(wrong(text.into()));
        }
        Ok(())
    }

    /// Applies all filters but JPEG. Factors are relative to the size of `reference`.
    fn blur_resize_noise<R: Rng + ?Sized>(
        &self,
        mut picture: Patch,
        reference: &Patch,
        rng: &mut R,
    ) -> Result<Patch> {
        if rng.random_bool(self.blur) {
            let taps = self.blur_kernel(rng);
            convolve(&mut picture, taps);
        }
        let factor = self.factor(rng);
        let side = |len: usize| ((len as f32 * factor) as usize).max(1);
        let (width, height) = (side(reference.width), side(reference.height));
        let mut picture = interpolate(&picture, width, height, any_kernel(rng))?;
        let grey = rng.random_bool(self.grey);
        // The number of random numbers for the noise depends on the image. Later stages must not
        // depend on it.
        let mut grain = StdRng::seed_from_u64(rng.random::<u64>() ^ content(&picture));
        if rng.random_bool(self.gaussian) {
            let sigma = within(rng, self.noise) / 255.0;
            add_noise(&mut picture, grey, |_| sigma * normal(&mut grain));
        } else {
            let strength = within(rng, self.poisson);
            add_noise(&mut picture, grey, |v| {
                let mean = v.clamp(0.0, 1.0) * PHOTONS;
                strength * (poisson(&mut grain, mean) - mean) / PHOTONS
            });
        }
        clamp(&mut picture);
        Ok(picture)
    }

    fn factor<R: Rng + ?Sized>(&self, rng: &mut R) -> f32 {
        let [up, down, keep] = self.resize;
        let sampled = rng.random::<f64>() * (up + down + keep);
        let (low, high) = self.factor;
        if sampled < up {
            within(rng, (1.0, high.max(1.0)))
        } else if sampled < up + down {
            within(rng, (low.min(1.0), 1.0))
        } else {
            1.0
        }
    }

    /// Returns a random kernel: a sinc, or a Gaussian, generalised Gaussian or plateau, round or
    /// elongated.
    fn blur_kernel<R: Rng + ?Sized>(&self, rng: &mut R) -> Taps {
        let side = odd(rng, self.kernel);
        if rng.random_bool(self.sinc) {
            let lowest = if side < 13 { PI / 3.0 } else { PI / 5.0 };
            return sinc(side, rng.random_range(lowest..PI));
        }
        // Round and elongated kernels in turn: Gaussian, generalised, plateau.
        let mut left = rng.random::<f64>();
        let sampled = KERNELS.iter().position(|share| {
            left -= share;
            left < 0.0
        });
        let sampled = sampled.unwrap_or(0);
        let sigma = within(rng, self.sigma);
        let covariance = if sampled % 2 == 0 {
            [sigma * sigma, 0.0, sigma * sigma]
        } else {
            let other = within(rng, self.sigma);
            let (sin, cos) = rng.random_range(-PI..PI).sin_cos();
            let (a, b) = (sigma * sigma, other * other);
            [
                a * cos * cos + b * sin * sin,
                (a - b) * sin * cos,
                a * sin * sin + b * cos * cos,
            ]
        };
        match sampled / 2 {
            0 => shaped(side, covariance, |d| (-0.5 * d).exp()),
            1 => {
                let beta = exponent(rng, self.generalised);
                shaped(side, covariance, |d| (-0.5 * d.powf(beta)).exp())
            }
            _ => {
                let beta = exponent(rng, self.plateau);
                shaped(side, covariance, |d| 1.0 / (1.0 + d.powf(beta)))
            }
        }
    }
}

type Taps = Vec<(isize, isize, f32)>;

/// Photons at white for Poisson noise of strength 1.
const PHOTONS: f32 = 256.0;

/// Probability of each shape of blur: round and elongated Gaussian, generalised Gaussian, plateau.
const KERNELS: [f64; 6] = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03];

fn wrong(text: String) -> Error {
    Error::Setting(format!("degradation: {text}"))
}

fn within<R: Rng + ?Sized>(rng: &mut R, (low, high): (f32, f32)) -> f32 {
    rng.random_range(low..=high)
}

/// Returns a number below 1 and above 1 equally often.
fn exponent<R: Rng + ?Sized>(rng: &mut R, (low, high): (f32, f32)) -> f32 {
    if rng.random::<bool>() {
        within(rng, (low.min(1.0), 1.0))
    } else {
        within(rng, (1.0, high.max(1.0)))
    }
}

/// Returns an odd number from 7 to `max`.
fn odd<R: Rng + ?Sized>(rng: &mut R, max: usize) -> usize {
    2 * rng.random_range(3..=max / 2) + 1
}

fn any_kernel<R: Rng + ?Sized>(rng: &mut R) -> Kernel {
    [Kernel::Area, Kernel::Bilinear, Kernel::Bicubic][rng.random_range(0..3)]
}

fn offsets(side: usize) -> impl Iterator<Item = (isize, isize)> {
    let reach = (side / 2) as isize;
    (-reach..=reach).flat_map(move |y| (-reach..=reach).map(move |x| (x, y)))
}

/// Returns a kernel of the squared Mahalanobis distance, by the function `shape`.
fn shaped(side: usize, [xx, xy, yy]: [f32; 3], shape: impl Fn(f32) -> f32) -> Taps {
    let determinant = (xx * yy - xy * xy).max(1e-6);
    let tap = |(dx, dy)| {
        let (x, y) = (dx as f32, dy as f32);
        let distance = (yy * x * x - 2.0 * xy * x * y + xx * y * y) / determinant;
        (dx, dy, shape(distance.max(0.0)))
    };
    offsets(side).map(tap).collect()
}

/// Returns the ideal low-pass filter of radial frequency `cutoff` (pi is the sampling limit), cut
/// to a square, which causes ringing.
fn sinc(side: usize, cutoff: f32) -> Taps {
    let tap = |(dx, dy): (isize, isize)| {
        let r = (dx as f32).hypot(dy as f32);
        let value = match (dx, dy) {
            (0, 0) => cutoff * cutoff / (4.0 * PI),
            _ => cutoff * bessel_j1(cutoff * r) / (2.0 * PI * r),
        };
        (dx, dy, value)
    };
    offsets(side).map(tap).collect()
}

/// Bessel function of the first kind and order 1, from its integral `1/pi int_0^pi cos(a - x sin a)
/// da`. The midpoint rule is exact to rounding for `x` below the number of its points.
fn bessel_j1(x: f32) -> f32 {
    const POINTS: usize = 128;
    let term = |i: usize| {
        let a = (i as f32 + 0.5) * PI / POINTS as f32;
        (a - x * a.sin()).cos()
    };
    (0..POINTS).map(term).sum::<f32>() / POINTS as f32
}

/// Resamples like `interpolate` of PyTorch: without antialiasing, except for the area kernel.
fn interpolate(picture: &Patch, width: usize, height: usize, kernel: Kernel) -> Result<Patch> {
    if width == 0 || height == 0 || picture.rgb.is_empty() {
        let text = format!(
            "{}x{} pixels cannot become {width}x{height}",
            picture.width, picture.height
        );
        return Err(wrong(text));
    }
    let axis = |from, to| {
        let options = Options {
            antialias: kernel == Kernel::Area && to < from,
            ..Options::default()
        };
        Axis::new(from, to, kernel, options)
    };
    let resampler = Resampler::new(axis(picture.width, width), axis(picture.height, height));
    let mut out = Patch::new(width, height);
    let planes = picture.rgb.chunks_exact(picture.width * picture.height);
    for (src, dst) in planes.zip(out.rgb.chunks_exact_mut(width * height)) {
        resampler.run(src, dst);
    }
    Ok(out)
}

/// Adds `noise(value)` to every sample, or `noise(luma)` of a pixel to all its samples.
fn add_noise(picture: &mut Patch, grey: bool, mut noise: impl FnMut(f32) -> f32) {
    if !grey {
        picture.rgb.iter_mut().for_each(|v| *v += noise(*v));
        return;
    }
    let area = picture.width * picture.height;
    for i in 0..area {
        let [r, g, b] = [0, 1, 2].map(|c| picture.rgb[c * area + i]);
        let n = noise(0.299 * r + 0.587 * g + 0.114 * b);
        for c in 0..3 {
            picture.rgb[c * area + i] += n;
        }
    }
}

/// Returns a Poisson number by counting exponential waiting times. From a mean of 32 it is a
/// rounded normal number, which makes no difference in 8-bit images.
fn poisson<R: Rng + ?Sized>(rng: &mut R, mean: f32) -> f32 {
    if mean >= 32.0 {
        return (mean + mean.sqrt() * normal(rng)).round().max(0.0);
    }
    let (limit, mut product, mut count) = ((-mean).exp(), 1.0, 0.0);
    loop {
        product *= rng.random::<f32>();
        if product <= limit {
            return count;
        }
        count += 1.0;
    }
}

fn jpeg<R: Rng + ?Sized>(picture: &Patch, (low, high): (u8, u8), rng: &mut R) -> Result<Patch> {
    let quality = rng.random_range(low..=high);
    let (w, h) = (picture.width, picture.height);
    let bytes = jpeg_round_trip(&picture.to_rgb8(), w, h, quality)?;
    Ok(Patch::from_rgb8(w, h, &bytes))
}

fn clamp(picture: &mut Patch) {
    picture.rgb.iter_mut().for_each(|v| *v = v.clamp(0.0, 1.0));
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    fn scene(side: usize) -> Patch {
        let mut patch = Patch::new(side, side);
        for (i, v) in patch.rgb.iter_mut().enumerate() {
            let (x, y) = (i % side, i / side % side);
            *v = 0.2 + 0.5 * ((x / 5 + y / 7) % 2) as f32 + 0.1 * (x as f32 / side as f32);
        }
        patch
    }

    fn apply(recipe: &RealWorld, hr: &Patch, side: usize, seed: u64) -> Patch {
        recipe
            .apply(hr, side, side, &mut SmallRng::seed_from_u64(seed))
            .unwrap()
    }

    #[test]
    fn the_seed_decides_and_results_are_8_bit_pictures_of_the_asked_size() {
        let (recipe, hr) = (RealWorld::default(), scene(64));
        for seed in 0..20 {
            let low = apply(&recipe, &hr, 16, seed);
            assert_eq!((low.width, low.height, low.rgb.len()), (16, 16, 768));
            for v in &low.rgb {
                let step = v * 255.0;
                assert!((0.0..=255.0).contains(&step) && (step - step.round()).abs() < 1e-3);
            }
            assert_eq!(low, apply(&recipe, &hr, 16, seed));
            assert_ne!(low, apply(&recipe, &hr, 16, seed + 100));
        }
    }

    #[test]
    fn a_flat_picture_keeps_its_brightness_on_average() {
        let mut hr = Patch::new(64, 64);
        hr.rgb.fill(0.5);
        let recipe = RealWorld::default();
        let mean = |p: Patch| p.rgb.iter().sum::<f32>() / p.rgb.len() as f32;
        let means: Vec<f32> = (0..40).map(|s| mean(apply(&recipe, &hr, 16, s))).collect();
        let all = means.iter().sum::<f32>() / means.len() as f32;
        assert!((all - 0.5).abs() < 0.01, "{all}");
        assert!(means.iter().all(|m| (m - 0.5).abs() < 0.1), "{means:?}");
    }

    #[test]
    fn kernels_keep_the_sum_and_have_the_width_asked_for() {
        let variance = |taps: &Taps, axis: fn(&(isize, isize, f32)) -> isize| {
            let sum: f32 = taps.iter().map(|t| t.2).sum();
            let moment = |t: &(isize, isize, f32)| (axis(t) as f32).powi(2) * t.2;
            taps.iter().map(moment).sum::<f32>() / sum
        };
        let taps = shaped(21, [4.0, 0.0, 2.25], |d| (-0.5 * d).exp());
        assert!((variance(&taps, |t| t.0) - 4.0).abs() < 0.01);
        assert!((variance(&taps, |t| t.1) - 2.25).abs() < 0.01);
        // Rotated by 45 degrees, both axes have the same width.
        let taps = shaped(21, [2.5, 1.5, 2.5], |d| (-0.5 * d).exp());
        assert!((variance(&taps, |t| t.0) - variance(&taps, |t| t.1)).abs() < 1e-4);
        assert!((variance(&taps, |t| t.0 + t.1) - 8.0).abs() < 0.02);
        let taps = sinc(21, PI / 3.0);
        assert!(taps.iter().any(|t| t.2 < 0.0), "no ringing");
        // A low-pass filter passes a constant: its sum is 1 in the limit of a large kernel.
        let sum: f32 = sinc(63, PI / 3.0).iter().map(|t| t.2).sum();
        assert!((sum - 1.0).abs() < 0.05, "{sum}");
    }

    #[test]
    fn the_bessel_function_has_its_known_values() {
        let known = [
            (0.0, 0.0),
            (1.0, 0.440_050_6),
            (10.0, 0.043_472_75),
            (44.0, -0.082_803_36),
        ];
        for (x, want) in known {
            let got = bessel_j1(x);
            assert!((got - want).abs() < 1e-5, "J1({x}) = {got}");
        }
    }

    #[test]
    fn poisson_numbers_have_their_mean_as_variance() {
        let mut rng = SmallRng::seed_from_u64(3);
        for mean in [0.0, 3.0, 31.0, 60.0] {
            let sampled: Vec<f32> = (0..20_000).map(|_| poisson(&mut rng, mean)).collect();
            let n = sampled.len() as f32;
            let average = sampled.iter().sum::<f32>() / n;
            let variance = sampled.iter().map(|v| (v - average).powi(2)).sum::<f32>() / n;
            assert!((average - mean).abs() < 0.02 * mean + 1e-6, "{average}");
            assert!((variance - mean).abs() < 0.05 * mean + 1e-6, "{variance}");
        }
    }

    #[test]
    fn a_wrong_key_or_value_is_named() {
        let wrong = serde_json::from_str::<RealWorld>(r#"{"rining": 0.5}"#).unwrap_err();
        assert!(wrong.to_string().contains("rining"));
        let mut bad = RealWorld::default();
        bad.second.noise = (30.0, 1.0);
        assert!(bad.check().unwrap_err().to_string().contains("noise"));
        assert!(RealWorld::default().check().is_ok());
    }
}
