//! Choice of patches in images.

use image::RgbImage;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, train::patch::Patch};

/// Choice of patches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Candidates for a patch; the one with the most texture wins ...
    pub candidates: usize,
    /// ... with this probability; otherwise the first, so that flat areas are used, too.
    pub textured: f64,
    /// Probability of shrinking the image first, which removes compression artefacts of the source.
    pub shrink: f64,
    /// Smallest factor of that shrinking, 0 to 1.
    pub min_factor: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            candidates: 3,
            textured: 0.75,
            shrink: 0.9,
            min_factor: 0.25,
        }
    }
}

impl Sampling {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let shares = [
            ("textured", self.textured, 0.0),
            ("shrink", self.shrink, 0.0),
            ("min_factor", self.min_factor, 0.1),
        ];
        for (name, value, min) in shares {
            if !(min..=1.0).contains(&value) {
                let text = format!("sampling: {name} = {value}: {min} to 1");
                return Err(Error::Setting(text));
            }
        }
        if !(1..=100).contains(&self.candidates) {
            let text = format!("sampling: candidates = {}: 1 to 100", self.candidates);
            return Err(Error::Setting(text));
        }
        Ok(())
    }
}

impl Sampling {
    /// Returns one of the positions that `sample` returns: the one with the most `detail`, or the
    /// first.
    pub(super) fn choose<T: Copy, R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        mut sample: impl FnMut(&mut R) -> T,
        detail: impl Fn(T) -> u64,
    ) -> T {
        let first = sample(rng);
        let others: Vec<_> = (1..self.candidates).map(|_| sample(rng)).collect();
        if !rng.random_bool(self.textured) {
            return first;
        }
        let all = others.into_iter().chain([first]);
        all.max_by_key(|&position| detail(position))
            .unwrap_or(first)
    }
}

/// Returns the sum of absolute differences of neighbours in green, on every second pixel. Absolute
/// values rather than squares, so that a few hard edges do not outweigh fine texture.
pub(super) fn texture(photo: &RgbImage, (x0, y0): (usize, usize), (w, h): (usize, usize)) -> u64 {
    let stride = 3 * photo.width() as usize;
    let bytes = photo.as_raw();
    let mut sum = 0;
    for y in (y0..y0 + h - 1).step_by(2) {
        for x in (x0..x0 + w - 1).step_by(2) {
            let at = y * stride + 3 * x + 1;
            let v = bytes[at];
            sum += u64::from(v.abs_diff(bytes[at + 3])) + u64::from(v.abs_diff(bytes[at + stride]));
        }
    }
    sum
}

pub(super) fn cut(photo: &RgbImage, (x0, y0): (usize, usize), (w, h): (usize, usize)) -> Patch {
    let row = 3 * photo.width() as usize;
    let rows = photo.as_raw().chunks_exact(row).skip(y0).take(h);
    let bytes: Vec<u8> = rows
        .flat_map(|r| &r[3 * x0..3 * (x0 + w)])
        .copied()
        .collect();
    Patch::from_rgb8(w, h, &bytes)
}
