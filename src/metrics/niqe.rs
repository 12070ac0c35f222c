//! NIQE, the naturalness of a picture without a reference (Mittal, Soundararajan, Bovik, "Making a
//! Completely Blind Image Quality Analyzer", IEEE Signal Processing Letters 2013).

use std::{fs, io::Read, path::Path};

use super::Gray;
use crate::{
    Error, Result,
    frame::resample::{Axis, Kernel, Options, Resampler},
};

/// Side of a block of features at full size.
const BLOCK: usize = 96;
/// Number of features of a block: 18 at full size, 18 at half size.
const FEATURES: usize = 36;
/// Side and standard deviation of the window of local means.
const WINDOW: usize = 7;
const SIGMA: f64 = 7.0 / 6.0;

/// Statistics of natural pictures.
pub struct Niqe {
    mean: Vec<f64>,
    /// `FEATURES` x `FEATURES`
    covariance: Vec<f64>,
    shapes: Shapes,
}

impl Niqe {
    /// Loads the published model: an npz file with `mu_pris_param` (36 values) and `cov_pris_param`
    /// (36 x 36).
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Model`] if its content is invalid.
    pub fn load(path: &Path) -> Result<Self> {
        let file = fs::File::open(path).map_err(Error::io(path))?;
        let wrong = |reason: String| Error::model(path, reason);
        let mut archive =
            zip::ZipArchive::new(file).map_err(|e| wrong(format!("not an npz file ({e})")))?;
        let mut values = |name: &str, count: usize| {
            let entry = archive.by_name(&format!("{name}.npy"));
            let entry = entry.map_err(|e| wrong(format!("array '{name}': {e}")))?;
            array(entry, count).map_err(|e| wrong(format!("array '{name}': {e}")))
        };
        Ok(Self {
            mean: values("mu_pris_param", FEATURES)?,
            covariance: values("cov_pris_param", FEATURES * FEATURES)?,
            shapes: Shapes::new(),
        })
    }

    /// Returns the NIQE of a luma plane: 0 or more, lower is more natural. The plane is rounded to
    /// integers and cropped to whole blocks of 96x96, as in the published code. `None` for planes
    /// of fewer than two blocks.
    ///
    /// # Errors
    /// None for a valid plane.
    pub fn score(&self, plane: &Gray) -> Result<Option<f64>> {
        let (columns, rows) = (plane.width / BLOCK, plane.height / BLOCK);
        if columns * rows < 2 {
            return Ok(None);
        }
        let (width, height) = (columns * BLOCK, rows * BLOCK);
        let cut = plane.data.chunks_exact(plane.width).take(height);
        let full = Gray {
            width,
            height,
            data: cut
                .flat_map(|row| &row[..width])
                .map(|v| v.round())
                .collect(),
        };
        let half = halved(&full)?;
        let mut features = vec![Vec::with_capacity(FEATURES); columns * rows];
        for (plane, block) in [(&full, BLOCK), (&half, BLOCK / 2)] {
            let normal = normalised(plane);
            for (i, features) in features.iter_mut().enumerate() {
                let corner = (i / columns * block, i % columns * block);
                features.extend(self.shapes.features(&normal, plane.width, corner, block));
            }
        }
        Ok(Some(self.distance(&features)))
    }

    /// Returns the distance of the Gaussian fitted to `features` from that of natural pictures.
    fn distance(&self, features: &[Vec<f64>]) -> f64 {
        // Features of flat blocks are NaN. They do not count for mean and covariance.
        let mean: Vec<f64> = (0..FEATURES)
            .map(|k| {
                let known: Vec<f64> = features
                    .iter()
                    .map(|f| f[k])
                    .filter(|v| !v.is_nan())
                    .collect();
                known.iter().sum::<f64>() / known.len() as f64
            })
            .collect();
        let whole: Vec<&Vec<f64>> = features
            .iter()
            .filter(|f| f.iter().all(|v| !v.is_nan()))
            .collect();
        let count = whole.len() as f64;
        let centre: Vec<f64> = (0..FEATURES)
            .map(|k| whole.iter().map(|f| f[k]).sum::<f64>() / count)
            .collect();
        let mut pooled = vec![0.0; FEATURES * FEATURES];
        for (at, value) in pooled.iter_mut().enumerate() {
            let (i, j) = (at / FEATURES, at % FEATURES);
            let product = |f: &&Vec<f64>| (f[i] - centre[i]) * (f[j] - centre[j]);
            let own = whole.iter().map(product).sum::<f64>() / (count - 1.0);
            *value = 0.5 * (self.covariance[at] + own);
        }
        let difference: Vec<f64> = self.mean.iter().zip(&mean).map(|(a, b)| a - b).collect();
        quadratic_form_of_inverse(pooled, &difference).sqrt()
    }
}

/// Reads an npy file of `count` numbers of type f64. The order of rows and columns is ignored, as
/// the covariance is symmetric.
fn array(file: impl Read, count: usize) -> std::result::Result<Vec<f64>, String> {
    let mut bytes = Vec::new();
    let max = 8 * count as u64 + (1 << 16);
    file.take(max)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    let header = match &bytes[..] {
        [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, low, high, ..] => {
            10 + usize::from(u16::from_le_bytes([*low, *high]))
        }
        _ => return Err("not in the npy format, version 1".into()),
    };
    let text = bytes.get(..header).map(String::from_utf8_lossy);
    if !text.is_some_and(|t| t.contains("'<f8'")) {
        return Err("its type is not '<f8'".into());
    }
    let values: Vec<f64> = bytes[header..]
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
        .collect();
    if values.len() != count || values.iter().any(|v| !v.is_finite()) {
        return Err(format!("{} values, not {count} finite ones", values.len()));
    }
    Ok(values)
}

/// Shapes of generalised Gaussians with the moments that identify them.
struct Shapes {
    /// (shape a, `Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a))`), which grows with the shape.
    ratios: Vec<(f64, f64)>,
}

/// An asymmetric generalised Gaussian: shape, and scales of both sides.
struct Aggd {
    shape: f64,
    left: f64,
    right: f64,
}

impl Shapes {
    /// Makes the table of shapes from 0.2 to 10 in steps of 0.001.
    fn new() -> Self {
        let ratio =
            |a: f64| (2.0 * ln_gamma(2.0 / a) - ln_gamma(1.0 / a) - ln_gamma(3.0 / a)).exp();
        let shapes = (200..=10_000).map(|i| f64::from(i) / 1000.0);
        Self {
            ratios: shapes.map(|a| (a, ratio(a))).collect(),
        }
    }

    /// Fits by moments (Lasmar, Stitou, Berthoumieu 2009).
    fn fit(&self, samples: &[f64]) -> Aggd {
        let deviation = |keep: fn(f64) -> bool| {
            let side: Vec<f64> = samples.iter().copied().filter(|v| keep(*v)).collect();
            (side.iter().map(|v| v * v).sum::<f64>() / side.len() as f64).sqrt()
        };
        let (left, right) = (deviation(|v| v < 0.0), deviation(|v| v > 0.0));
        let count = samples.len() as f64;
        let absolute = samples.iter().map(|v| v.abs()).sum::<f64>() / count;
        let square = samples.iter().map(|v| v * v).sum::<f64>() / count;
        let g = left / right;
        let wanted =
            absolute * absolute / square * (g.powi(3) + 1.0) * (g + 1.0) / (g * g + 1.0).powi(2);
        let after = self
            .ratios
            .partition_point(|(_, r)| *r < wanted)
            .min(self.ratios.len() - 1);
        let near = |i: usize| (self.ratios[i].1 - wanted).abs();
        let best = if after > 0 && near(after - 1) <= near(after) {
            after - 1
        } else {
            after
        };
        let shape = self.ratios[best].0;
        let scale = (0.5 * (ln_gamma(1.0 / shape) - ln_gamma(3.0 / shape))).exp();
        Aggd {
            shape,
            left: left * scale,
            right: right * scale,
        }
    }

    /// Returns the features of the normalised samples and of their products with four neighbours.
    fn features(
        &self,
        normal: &[f64],
        width: usize,
        (top, left): (usize, usize),
        block: usize,
    ) -> Vec<f64> {
        let at = |y: usize, x: usize| normal[(top + y) * width + left + x];
        let positions = || (0..block).flat_map(|y| (0..block).map(move |x| (y, x)));
        let samples: Vec<f64> = positions().map(|(y, x)| at(y, x)).collect();
        let own = self.fit(&samples);
        let mut features = vec![own.shape, 0.5 * (own.left + own.right)];
        // The neighbour above, to the left or on a diagonal. Indices wrap around in the block.
        for (dy, dx) in [(0, 1), (1, 0), (1, 1), (1, block - 1)] {
            let product =
                |(y, x)| at(y, x) * at((y + block - dy) % block, (x + block - dx) % block);
            let products: Vec<f64> = positions().map(product).collect();
            let Aggd { shape, left, right } = self.fit(&products);
            let mean = (right - left) * (ln_gamma(2.0 / shape) - ln_gamma(1.0 / shape)).exp();
            features.extend([shape, mean, left, right]);
        }
        features
    }
}

/// Subtracts the local mean of every sample and divides by the local deviation plus 1.
fn normalised(plane: &Gray) -> Vec<f64> {
    let weights: Vec<f64> = (0..WINDOW)
        .map(|i| (-0.5 * ((i as f64 - 3.0) / SIGMA).powi(2)).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| w / sum).collect();
    let (w, h) = (plane.width, plane.height);
    let near = |v: usize, k: usize, len: usize| (v + k).saturating_sub(WINDOW / 2).min(len - 1);
    let blurred = |values: &[f64]| -> Vec<f64> {
        let filter = |values: &[f64], rows: bool| -> Vec<f64> {
            let at = |i: usize| {
                let (y, x) = (i / w, i % w);
                let tap = |k: usize| {
                    if rows {
                        values[y * w + near(x, k, w)]
                    } else {
                        values[near(y, k, h) * w + x]
                    }
                };
                (0..WINDOW).map(|k| weights[k] * tap(k)).sum()
            };
            (0..w * h).map(at).collect()
        };
        filter(&filter(values, true), false)
    };
    let values: Vec<f64> = plane.data.iter().map(|&v| f64::from(v)).collect();
    let squares: Vec<f64> = values.iter().map(|v| v * v).collect();
    let (means, squares) = (blurred(&values), blurred(&squares));
    let moments = means.iter().zip(&squares);
    let normal = |(v, (m, s)): (&f64, (&f64, &f64))| (v - m) / ((s - m * m).abs().sqrt() + 1.0);
    values.iter().zip(moments).map(normal).collect()
}

/// Halves the size by a cubic filter (a = -0.5), widened to the step. Samples at the border are
/// repeated.
fn halved(plane: &Gray) -> Result<Gray> {
    let axis = |len: usize| {
        let options = Options {
            antialias: true,
            ..Options::default()
        };
        Axis::new(len, len / 2, Kernel::CatmullRom, options)
    };
    let (width, height) = (plane.width / 2, plane.height / 2);
    let mut data = vec![0.0; width * height];
    Resampler::new(axis(plane.width), axis(plane.height)).run(&plane.data, &mut data);
    Ok(Gray {
        width,
        height,
        data,
    })
}

/// Returns `v^T M^+ v` for a symmetric `M` and its pseudo-inverse. Eigenvalues are from Jacobi
/// rotations. Those below 1e-15 of the largest are dropped.
fn quadratic_form_of_inverse(mut m: Vec<f64>, v: &[f64]) -> f64 {
    let n = v.len();
    let mut v = v.to_vec();
    for _ in 0..100 {
        let off: f64 = (0..n)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| m[i * n + j].powi(2))
            .sum();
        let diagonal: f64 = (0..n).map(|i| m[i * n + i].powi(2)).sum();
        if off <= 1e-32 * diagonal {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut m, &mut v, n, p, q);
            }
        }
    }
    let largest = (0..n).map(|i| m[i * n + i].abs()).fold(0.0, f64::max);
    let term = |i: usize| v[i] * v[i] / m[i * n + i];
    (0..n)
        .filter(|&i| m[i * n + i].abs() > 1e-15 * largest)
        .map(term)
        .sum()
}

/// Rotates `m` and `v` in the plane of axes `p` and `q` so that `m[p][q]` becomes 0.
fn rotate(m: &mut [f64], v: &mut [f64], n: usize, p: usize, q: usize) {
    let apq = m[p * n + q];
    if apq == 0.0 {
        return;
    }
    let theta = (m[q * n + q] - m[p * n + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    let turn = |m: &mut [f64], a: usize, b: usize| {
        (m[a], m[b]) = (c * m[a] - s * m[b], s * m[a] + c * m[b]);
    };
    for k in 0..n {
        turn(m, k * n + p, k * n + q);
    }
    for k in 0..n {
        turn(m, p * n + k, q * n + k);
    }
    turn(v, p, q);
}

/// Returns the logarithm of the gamma function for positive arguments, to about 1e-14, by
/// Stirling's series above 10 and by recurrence below.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut shift) = (x, 0.0);
    while x < 10.0 {
        shift += x.ln();
        x += 1.0;
    }
    let z = 1.0 / (x * x);
    let series =
        (1.0 / 12.0 - z * (1.0 / 360.0 - z * (1.0 / 1260.0 - z * (1.0 / 1680.0 - z / 1188.0)))) / x;
    (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series - shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gamma_function_has_its_known_values() {
        for (x, want) in [
            (1.0, 0.0),
            (0.5, 0.5 * std::f64::consts::PI.ln()),
            (5.0, 24f64.ln()),
            (11.0, 3_628_800f64.ln()),
        ] {
            assert!((ln_gamma(x) - want).abs() < 1e-12, "{x}");
        }
    }

    #[test]
    fn the_inverse_is_that_of_the_matrix() {
        // M = [4 1 0; 1 3 -1; 0 -1 2], v = M u with u = (1, 2, 3): v^T M^-1 v = v . u.
        let m = vec![4.0, 1.0, 0.0, 1.0, 3.0, -1.0, 0.0, -1.0, 2.0];
        assert!((quadratic_form_of_inverse(m, &[6.0, 4.0, 4.0]) - 26.0).abs() < 1e-10);
        // A direction in the null space does not count.
        let m = vec![2.0, 0.0, 0.0, 0.0];
        assert_eq!(quadratic_form_of_inverse(m, &[2.0, 5.0]), 2.0);
    }

    #[test]
    fn a_gaussian_and_a_laplacian_are_recognised() {
        let shapes = Shapes::new();
        // Quantiles of the distributions instead of random samples.
        let uniform = (0..40_000).map(|i| (f64::from(i) + 0.5) / 40_000.0);
        let laplace: Vec<f64> = uniform
            .map(|u| {
                if u < 0.5 {
                    3.0 * (2.0 * u).ln()
                } else {
                    -(2.0 - 2.0 * u).ln()
                }
            })
            .collect();
        let fit = shapes.fit(&laplace);
        assert!((fit.shape - 1.0).abs() < 0.35, "{}", fit.shape);
        assert!(fit.left > 2.0 * fit.right, "{} {}", fit.left, fit.right);
        let pairs =
            (0..200).flat_map(|i| (0..200).map(move |j| (f64::from(i) + 0.5, f64::from(j) + 0.5)));
        let gauss: Vec<f64> = pairs
            .map(|(i, j)| {
                (-2.0 * (i / 200.0).ln()).sqrt() * (j / 200.0 * std::f64::consts::TAU).cos()
            })
            .collect();
        let fit = shapes.fit(&gauss);
        assert!((fit.shape - 2.0).abs() < 0.05, "{}", fit.shape);
        assert!((fit.left - 2f64.sqrt()).abs() < 0.05, "{}", fit.left);
    }
}
