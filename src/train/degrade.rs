//! What happens to a picture before it reaches the upscaler: blur, downscaling, noise, compression.

use std::{f32::consts::TAU, io::Cursor};

use image::{ExtendedColorType, ImageFormat, ImageReader, codecs::jpeg::JpegEncoder};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{
    data::Patch,
    stages::{Blur, Jpeg, Noise, Stage},
};
use crate::{Error, Result, frame::resample::Kernel};

/// A random degradation from a clean picture to a low-resolution one.
///
/// Order: blur, downscale, noise, rounding to 8 bits, JPEG. The default is [`Self::stills`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Degradation {
    /// Probability of a Gaussian blur before the downscale.
    pub blur: f64,
    /// Range of its standard deviation in low-resolution pixels.
    pub blur_sigma: (f32, f32),
    /// Probability that a blur has its own width in two perpendicular directions.
    pub anisotropic: f64,
    /// How often each downscale kernel is drawn.
    pub kernels: KernelWeights,
    /// Probability of noise.
    pub noise: f64,
    /// Range of its standard deviation in 8-bit steps (at white for shot noise).
    pub noise_sigma: (f32, f32),
    /// Probability that noise is shot noise, whose variance is proportional to the brightness.
    pub shot: f64,
    /// Probability that noise is the same in R, G and B.
    pub grey: f64,
    /// Probability of a JPEG round trip.
    pub jpeg: f64,
    /// Range of the JPEG quality, 1 to 100.
    pub jpeg_quality: (u8, u8),
    /// Probability that the JPEG's 8x8 blocks do not start at the patch's corner, as in a cut-out.
    pub jpeg_shift: f64,
}

/// Relative frequencies of the downscale kernels; they need not sum to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KernelWeights {
    pub catmull_rom: f64,
    pub area: f64,
    pub bilinear: f64,
    pub lanczos3: f64,
}

/// Mostly the sharp kernels that encoders' scalers use by default. Each softer kernel in the mixture costs gain on all
/// others, since a small network cannot tell them apart.
impl Default for KernelWeights {
    fn default() -> Self {
        Self {
            catmull_rom: 0.6,
            area: 0.1,
            bilinear: 0.0,
            lanczos3: 0.3,
        }
    }
}

impl KernelWeights {
    /// # Errors
    /// [`Error::Frame`] for weights that are negative or all zero.
    pub(super) fn check(&self) -> Result<()> {
        let weights = [self.catmull_rom, self.area, self.bilinear, self.lanczos3];
        let sum: f64 = weights.iter().sum();
        if weights.iter().any(|w| *w < 0.0) || !(sum > 0.0 && sum.is_finite()) {
            let text = "kernels: weights are not negative and not all zero";
            return Err(Error::Frame(text.into()));
        }
        Ok(())
    }

    pub(super) fn draw<R: Rng + ?Sized>(&self, rng: &mut R) -> Kernel {
        let weighted = [
            (Kernel::CatmullRom, self.catmull_rom),
            (Kernel::Area, self.area),
            (Kernel::Bilinear, self.bilinear),
            (Kernel::Lanczos3, self.lanczos3),
        ];
        let mut left = rng.random::<f64>() * weighted.iter().map(|w| w.1).sum::<f64>();
        for (kernel, weight) in weighted {
            left -= weight;
            if left < 0.0 {
                return kernel;
            }
        }
        Kernel::CatmullRom
    }
}

impl Default for Degradation {
    fn default() -> Self {
        Self::stills()
    }
}

impl Degradation {
    /// Downscaling alone, by any of the kernels.
    pub fn clean() -> Self {
        Self {
            blur: 0.0,
            blur_sigma: (0.2, 0.8),
            anisotropic: 0.5,
            kernels: KernelWeights::default(),
            noise: 0.0,
            noise_sigma: (0.5, 4.0),
            shot: 0.5,
            grey: 0.4,
            jpeg: 0.0,
            jpeg_quality: (30, 95),
            jpeg_shift: 0.5,
        }
    }

    /// What pictures go through that are shared: a third compressed, a few softly blurred or lightly noisy.
    pub fn stills() -> Self {
        Self {
            blur: 0.05,
            noise: 0.1,
            jpeg: 0.35,
            ..Self::clean()
        }
    }

    /// For evaluation: one kernel (Catmull-Rom), then JPEG of `quality`; independent of the random numbers.
    pub fn jpeg(quality: u8) -> Self {
        Self {
            jpeg: 1.0,
            jpeg_quality: (quality, quality),
            ..Self::fixed()
        }
    }

    /// For evaluation: the antialiased Catmull-Rom downscale alone; independent of the random numbers.
    pub fn fixed() -> Self {
        Self {
            kernels: KernelWeights {
                catmull_rom: 1.0,
                area: 0.0,
                bilinear: 0.0,
                lanczos3: 0.0,
            },
            jpeg_shift: 0.0,
            ..Self::clean()
        }
    }

    /// # Errors
    /// [`Error::Frame`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Frame(format!("degradation: {text}")));
        let shares = [
            ("blur", self.blur),
            ("anisotropic", self.anisotropic),
            ("noise", self.noise),
            ("shot", self.shot),
            ("grey", self.grey),
            ("jpeg", self.jpeg),
            ("jpeg_shift", self.jpeg_shift),
        ];
        for (name, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return wrong(format!("{name} = {value}: a probability is 0 to 1"));
            }
        }
        let widths = [
            ("blur_sigma", self.blur_sigma),
            ("noise_sigma", self.noise_sigma),
        ];
        for (name, (low, high)) in widths {
            if !(0.0 <= low && low <= high && high <= 255.0) {
                return wrong(format!(
                    "{name} = {low}..{high}: need 0 <= low <= high <= 255"
                ));
            }
        }
        let (low, high) = self.jpeg_quality;
        if !(1 <= low && low <= high && high <= 100) {
            return wrong(format!(
                "jpeg_quality = {low}..{high}: need 1 <= low <= high <= 100"
            ));
        }
        self.kernels.check()
    }

    fn stages(&self) -> [Stage; 4] {
        [
            Stage::Blur(Blur {
                chance: self.blur,
                sigma: self.blur_sigma,
                anisotropic: self.anisotropic,
            }),
            Stage::Shrink(self.kernels.clone()),
            Stage::Noise(Noise {
                chance: self.noise,
                sigma: self.noise_sigma,
                shot: self.shot,
                grey: self.grey,
            }),
            Stage::Jpeg(Jpeg {
                chance: self.jpeg,
                quality: self.jpeg_quality,
                shift: self.jpeg_shift,
            }),
        ]
    }

    /// Degrades `hr` to `width` x `height` pixels; each direction has its own scale. The result holds 8-bit
    /// values (multiples of 1/255) and depends on the input and `rng` alone.
    ///
    /// # Errors
    /// [`Error::Frame`] when a side is 0 or larger than JPEG can hold (65535), or a setting is out of range.
    pub fn apply<R: Rng + ?Sized>(
        &self,
        hr: &Patch,
        width: usize,
        height: usize,
        rng: &mut R,
    ) -> Result<Patch> {
        self.check()?;
        let mut clip = vec![hr.clone()];
        for stage in self.stages() {
            clip = stage.apply(clip, (width, height), rng)?;
        }
        let bytes = clip.swap_remove(0).to_rgb8();
        Ok(Patch::from_rgb8(width, height, &bytes))
    }
}

/// Encodes interleaved 8-bit R'G'B' as a baseline 4:4:4 JPEG of `quality` (1 to 100) and decodes it again.
///
/// # Errors
/// [`Error::Frame`] when a side is 0 or above 65535, or `bytes` has another length than the sides say.
pub fn jpeg_round_trip(bytes: &[u8], width: usize, height: usize, quality: u8) -> Result<Vec<u8>> {
    let failed = |why: String| Error::Frame(format!("JPEG of {width}x{height} pixels: {why}"));
    let (Ok(w), Ok(h)) = (u16::try_from(width), u16::try_from(height)) else {
        return Err(failed("a side is above 65535".into()));
    };
    if bytes.len() != 3 * width * height {
        return Err(failed(format!("{} bytes given", bytes.len())));
    }
    let mut file = Vec::new();
    JpegEncoder::new_with_quality(&mut file, quality)
        .encode(bytes, w.into(), h.into(), ExtendedColorType::Rgb8)
        .map_err(|e| failed(e.to_string()))?;
    let decoded = ImageReader::with_format(Cursor::new(file), ImageFormat::Jpeg)
        .decode()
        .map_err(|e| failed(e.to_string()))?;
    Ok(decoded.into_rgb8().into_raw())
}

/// A standard normal number by the Box-Muller transform.
pub(crate) fn normal<R: Rng + ?Sized>(rng: &mut R) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (TAU * rng.random::<f32>()).cos()
}

/// Weighted sum over `taps` (dx, dy, weight), weights brought to a sum of 1, border repeated.
pub(super) fn convolve(picture: &mut Patch, mut taps: Vec<(isize, isize, f32)>) {
    let (w, h) = (picture.width, picture.height);
    let sum: f32 = taps.iter().map(|t| t.2).sum();
    taps.iter_mut().for_each(|t| t.2 /= sum);
    let rx = taps.iter().map(|t| t.0.unsigned_abs()).max().unwrap_or(0);
    let padded_w = w + 2 * rx;
    for plane in picture.rgb.chunks_exact_mut(w * h) {
        let mut src = Vec::with_capacity(padded_w * h);
        for row in plane.chunks_exact(w) {
            src.extend(std::iter::repeat_n(row[0], rx));
            src.extend_from_slice(row);
            src.extend(std::iter::repeat_n(row[w - 1], rx));
        }
        plane.fill(0.0);
        for (y, dst) in plane.chunks_exact_mut(w).enumerate() {
            for &(dx, dy, k) in &taps {
                let row = y.saturating_add_signed(dy).min(h - 1) * padded_w;
                let from = (row + rx).saturating_add_signed(dx);
                for (d, s) in dst.iter_mut().zip(&src[from..][..w]) {
                    *d += k * s;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    /// A picture with an edge, a gradient and fine texture.
    fn scene(width: usize, height: usize) -> Patch {
        let mut patch = Patch::new(width, height);
        for (i, v) in patch.rgb.iter_mut().enumerate() {
            let (x, y, c) = (i % width, i / width % height, i / (width * height));
            let texture = ((x * 7 + y * 13 + c * 3) % 11) as f32 / 40.0;
            let edge = if x > width / 2 { 0.4 } else { 0.1 };
            *v = edge + texture + 0.2 * y as f32 / height as f32;
        }
        patch
    }

    fn apply(d: &Degradation, hr: &Patch, w: usize, h: usize, seed: u64) -> Patch {
        d.apply(hr, w, h, &mut SmallRng::seed_from_u64(seed))
            .unwrap()
    }

    fn distance(a: &Patch, b: &Patch) -> f32 {
        let sum: f32 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| (a - b).abs()).sum();
        sum / a.rgb.len() as f32
    }

    fn always() -> Degradation {
        Degradation {
            blur: 1.0,
            noise: 1.0,
            jpeg: 1.0,
            jpeg_shift: 1.0,
            ..Degradation::stills()
        }
    }

    #[test]
    fn same_seed_gives_the_same_picture_and_another_seed_another() {
        let hr = scene(61, 47);
        let first = apply(&always(), &hr, 24, 20, 1);
        assert_eq!(first, apply(&always(), &hr, 24, 20, 1));
        assert_ne!(first, apply(&always(), &hr, 24, 20, 2));
    }

    #[test]
    fn results_have_the_asked_size_and_8_bit_values() {
        for (w, h) in [(24, 20), (61, 47), (17, 1), (1, 1)] {
            for seed in 0..8 {
                let lr = apply(&always(), &scene(61, 47), w, h, seed);
                assert_eq!((lr.width, lr.height, lr.rgb.len()), (w, h, 3 * w * h));
                for v in lr.rgb {
                    let step = v * 255.0;
                    assert!((0.0..=255.0).contains(&step) && (step - step.round()).abs() < 1e-3);
                }
            }
        }
    }

    #[test]
    fn evaluation_presets_do_not_depend_on_the_random_numbers() {
        let hr = scene(64, 64);
        for preset in [Degradation::fixed(), Degradation::jpeg(60)] {
            assert_eq!(
                apply(&preset, &hr, 32, 32, 1),
                apply(&preset, &hr, 32, 32, 99)
            );
        }
    }

    #[test]
    fn a_flat_picture_stays_flat_through_blur_and_downscale() {
        let mut hr = Patch::new(50, 40);
        hr.rgb.fill(100.0 / 255.0);
        let only_blur = Degradation {
            blur: 1.0,
            ..Degradation::clean()
        };
        for seed in 0..16 {
            let lr = apply(&only_blur, &hr, 20, 25, seed);
            assert!(lr.rgb.iter().all(|v| (v * 255.0).round() == 100.0));
        }
    }

    #[test]
    fn lower_jpeg_quality_loses_more() {
        let hr = scene(64, 64);
        let clean = apply(&Degradation::fixed(), &hr, 64, 64, 0);
        let loss = |q| distance(&clean, &apply(&Degradation::jpeg(q), &hr, 64, 64, 0));
        assert!(
            loss(20) > loss(60) && loss(60) > loss(98),
            "{} {} {}",
            loss(20),
            loss(60),
            loss(98)
        );
        assert!(loss(98) < 0.01);
    }

    #[test]
    fn noise_has_the_strength_asked_for_and_shot_noise_spares_black() {
        let noisy = |shot: f64| Degradation {
            noise: 1.0,
            noise_sigma: (4.0, 4.0),
            shot,
            grey: 0.0,
            ..Degradation::fixed()
        };
        let mut grey = Patch::new(64, 64);
        grey.rgb.fill(0.5);
        let out = apply(&noisy(0.0), &grey, 64, 64, 3);
        let n = out.rgb.len() as f32;
        let mean = out.rgb.iter().sum::<f32>() / n;
        let variance = out.rgb.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        assert!((variance.sqrt() * 255.0 - 4.0).abs() < 0.2);
        let black = apply(&noisy(1.0), &Patch::new(64, 64), 64, 64, 3);
        assert!(black.rgb.iter().all(|&v| v == 0.0));
    }

    #[test]
    fn a_preset_survives_json_and_a_wrong_key_or_value_is_named() {
        let text = serde_json::to_string(&Degradation::stills()).unwrap();
        let back: Degradation = serde_json::from_str(&text).unwrap();
        assert_eq!(back, Degradation::stills());
        let wrong = serde_json::from_str::<Degradation>(r#"{"blurr": 0.5}"#).unwrap_err();
        assert!(wrong.to_string().contains("blurr"));
        let bad = Degradation {
            jpeg_quality: (0, 50),
            ..Degradation::default()
        };
        assert!(
            bad.check()
                .unwrap_err()
                .to_string()
                .contains("jpeg_quality")
        );
        assert!(Degradation::stills().check().is_ok());
    }
}
