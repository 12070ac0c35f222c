//! Initial noise for the latent of a frame.

use std::f64::consts::TAU;

use crate::{Error, Result};

/// Noise for every position and channel of a frame's latent. Seeded noise is standard normal.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseField {
    channels: usize,
    height: usize,
    width: usize,
    values: Vec<f32>,
}

impl NoiseField {
    /// Creates a field of `values`: one plane of `height` rows of `width` for each channel.
    ///
    /// # Errors
    /// [`Error::Setting`] if the number of values is wrong, or one is not finite.
    pub fn new(channels: usize, height: usize, width: usize, values: Vec<f32>) -> Result<Self> {
        let len = channels
            .checked_mul(height)
            .and_then(|n| n.checked_mul(width));
        if len != Some(values.len()) {
            return Err(Error::Setting(format!(
                "noise of {channels} channels, {height} rows and {width} columns does not have {} \
                 values",
                values.len()
            )));
        }
        if !values.iter().all(|v| v.is_finite()) {
            return Err(Error::Setting(
                "the noise has values that are not finite".into(),
            ));
        }
        Ok(Self {
            channels,
            height,
            width,
            values,
        })
    }

    /// Samples standard normal noise. A value depends only on `seed`, channel, row and column, so a
    /// larger field contains the smaller ones.
    pub fn seeded(channels: usize, height: usize, width: usize, seed: u64) -> Self {
        let mut values = Vec::with_capacity(channels * height * width);
        for c in 0..channels as u64 {
            for y in 0..height as u64 {
                let row = mix(mix(seed ^ mix(c)) ^ y);
                values.extend((0..width as u64).map(|x| normal(mix(row ^ x))));
            }
        }
        Self {
            channels,
            height,
            width,
            values,
        }
    }

    /// Returns the number of channels, rows and columns.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    /// Returns the planes one after the other, with rows without padding.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Returns the part of `h` rows and `w` columns from row `y` and column `x` on, times `gain`,
    /// in the order `[h, w, channels]`.
    ///
    /// # Panics
    /// If the part exceeds the field.
    pub fn part(&self, [y, x]: [usize; 2], [h, w]: [usize; 2], gain: f32) -> Vec<f32> {
        let plane = self.height * self.width;
        let mut part = Vec::with_capacity(h * w * self.channels);
        for i in y..y + h {
            for j in x..x + w {
                let at = i * self.width + j;
                part.extend((0..self.channels).map(|c| gain * self.values[c * plane + at]));
            }
        }
        part
    }
}

/// Returns the output of SplitMix64 for the state after `x` (Steele, Lea and Flood, "Fast
/// splittable pseudorandom number generators", 2014).
pub(crate) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Converts uniform bits to a standard normal value (Box and Muller, 1958). The upper half gives
/// the radius, the lower one the angle.
pub(crate) fn normal(bits: u64) -> f32 {
    let unit = |half: u64| (half as f64 + 0.5) / f64::from(1u32 << 31) / 2.0;
    let (radius, angle) = (unit(bits >> 32), unit(bits & 0xffff_ffff));
    ((-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_standard_normal_and_uncorrelated() {
        let (h, w) = (256, 256);
        let field = NoiseField::seeded(3, h, w, 7);
        let v: Vec<f64> = field.values().iter().map(|&v| f64::from(v)).collect();
        let n = v.len() as f64;
        let moment = |k: i32| v.iter().map(|x| x.powi(k)).sum::<f64>() / n;
        // Standard errors of the moments: 0.002, 0.003, 0.009, 0.02.
        for (k, expected, tolerance) in [
            (1, 0.0, 0.01),
            (2, 1.0, 0.015),
            (3, 0.0, 0.04),
            (4, 3.0, 0.1),
        ] {
            assert!(
                (moment(k) - expected).abs() < tolerance,
                "moment {k}: {}",
                moment(k)
            );
        }
        for lag in [1, w, h * w, w + 1] {
            let product = v.iter().zip(&v[lag..]).map(|(a, b)| a * b).sum::<f64>();
            assert!((product / n).abs() < 0.015, "lag {lag}: {}", product / n);
        }
    }

    #[test]
    fn a_seed_gives_the_same_noise_at_the_same_position_in_any_size() {
        let (small, large) = (
            NoiseField::seeded(2, 5, 7, 3),
            NoiseField::seeded(2, 9, 8, 3),
        );
        assert_eq!(
            small.part([1, 2], [4, 5], 1.0),
            large.part([1, 2], [4, 5], 1.0)
        );
        assert_ne!(small, NoiseField::seeded(2, 5, 7, 4));
    }

    #[test]
    fn parts_have_their_channels_side_by_side() {
        let field = NoiseField::new(2, 2, 2, (0..8).map(|i| i as f32).collect()).unwrap();
        assert_eq!(field.part([0, 1], [2, 1], 2.0), [2.0, 10.0, 6.0, 14.0]);
    }

    #[test]
    fn values_of_another_number_or_not_finite_are_refused() {
        assert!(NoiseField::new(2, 2, 2, vec![0.0; 7]).is_err());
        assert!(NoiseField::new(usize::MAX, 2, 2, vec![0.0; 7]).is_err());
        assert!(NoiseField::new(1, 1, 1, vec![f32::NAN]).is_err());
    }
}
