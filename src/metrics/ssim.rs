//! Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), on one scale and on five (Wang,
//! Simoncelli, Bovik 2003).

use rayon::prelude::*;

use super::Gray;

const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;
const C1: f32 = (0.01 * 255.0) * (0.01 * 255.0);
const C2: f32 = (0.03 * 255.0) * (0.03 * 255.0);

/// Exponents of the five scales of MS-SSIM, the finest first.
const EXPONENTS: [f64; 5] = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333];

/// Returns the mean SSIM of two planes: Gaussian window of 11x11 with standard deviation 1.5,
/// K1 = 0.01, K2 = 0.03, at all positions where the window fits. `None` for planes smaller than the
/// window.
///
/// # Panics
/// If the sizes differ.
pub fn ssim(a: &Gray, b: &Gray) -> Option<f64> {
    Some(means(a, b)?.0)
}

/// Returns the MS-SSIM of two planes: contrast and structure on four scales and SSIM on the fifth,
/// each to the power of its weight, with the windows of [`ssim`]. Each scale averages 2x2 pixels of
/// the previous one and drops an odd last row or column. Negative means count as 0. `None` for
/// sides below 176 pixels, where the fifth scale is smaller than the window.
///
/// # Panics
/// If the sizes differ.
pub fn ms_ssim(a: &Gray, b: &Gray) -> Option<f64> {
    let (mut a, mut b) = (a.clone(), b.clone());
    let mut product = 1.0;
    for (scale, exponent) in EXPONENTS.into_iter().enumerate() {
        let (ssim, structure) = means(&a, &b)?;
        let last = scale + 1 == EXPONENTS.len();
        product *= if last { ssim } else { structure }.max(0.0).powf(exponent);
        if !last {
            (a, b) = (a.halved(), b.halved());
        }
    }
    Some(product)
}

/// Returns the means of SSIM and of its factor for contrast and structure over all windows.
fn means(a: &Gray, b: &Gray) -> Option<(f64, f64)> {
    assert_eq!((a.width, a.height), (b.width, b.height), "sizes differ");
    if a.width < WINDOW || a.height < WINDOW {
        return None;
    }
    let (columns, rows) = (a.width - WINDOW + 1, a.height - WINDOW + 1);
    let window = window();
    // Adding in the order of the rows makes the last bits independent of the threads.
    let sums: Vec<(f64, f64)> = (0..rows)
        .into_par_iter()
        .map_init(
            || Moments::new(a.width),
            |moments, y| {
                moments.gather(a, b, y, &window);
                moments.sum(&window)
            },
        )
        .collect();
    let windows = (rows * columns) as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| sums.iter().map(of).sum::<f64>() / windows;
    Some((mean(|s| s.0), mean(|s| s.1)))
}

/// Vertically filtered rows of a, b, a^2 + b^2 and ab.
struct Moments([Vec<f32>; 4]);

impl Moments {
    fn new(width: usize) -> Self {
        Self(std::array::from_fn(|_| vec![0.0; width]))
    }

    fn gather(&mut self, a: &Gray, b: &Gray, top: usize, window: &[f32; WINDOW]) {
        let [ma, mb, squares, products] = &mut self.0;
        for m in [&mut *ma, mb, squares, products] {
            m.fill(0.0);
        }
        for (k, y) in window.iter().zip(top..) {
            let row = y * a.width..(y + 1) * a.width;
            for (x, (&a, &b)) in a.data[row.clone()].iter().zip(&b.data[row]).enumerate() {
                // Centring at mid-grey avoids differences of large numbers in the variances.
                let (a, b) = (a - 128.0, b - 128.0);
                ma[x] += k * a;
                mb[x] += k * b;
                squares[x] += k * (a * a + b * b);
                products[x] += k * a * b;
            }
        }
    }

    /// Returns the sums of SSIM and of its factor for contrast and structure over a row of windows.
    fn sum(&self, window: &[f32; WINDOW]) -> (f64, f64) {
        let columns = self.0[0].len() - WINDOW + 1;
        let at = |m: &[f32], x: usize| -> f32 {
            window
                .iter()
                .zip(&m[x..x + WINDOW])
                .map(|(k, v)| k * v)
                .sum()
        };
        (0..columns)
            .map(|x| {
                let [a, b, squares, products] = [0, 1, 2, 3].map(|i| at(&self.0[i], x));
                let variances = squares - a * a - b * b;
                let covariance = products - a * b;
                let (a, b) = (a + 128.0, b + 128.0);
                let luminance = (2.0 * a * b + C1) / (a * a + b * b + C1);
                let structure = (2.0 * covariance + C2) / (variances + C2);
                (f64::from(luminance * structure), f64::from(structure))
            })
            .fold((0.0, 0.0), |sum, s| (sum.0 + s.0, sum.1 + s.1))
    }
}

fn window() -> [f32; WINDOW] {
    let weights: [f64; WINDOW] = std::array::from_fn(|i| {
        let distance = i as f64 - (WINDOW / 2) as f64;
        (-0.5 * (distance / SIGMA).powi(2)).exp()
    });
    let sum: f64 = weights.iter().sum();
    weights.map(|w| (w / sum) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(width: usize, height: usize, seed: u32) -> Gray {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as f32
        };
        Gray {
            width,
            height,
            data: (0..width * height).map(|_| next()).collect(),
        }
    }

    /// Computes the definition in f64: SSIM, and its factor for contrast and structure.
    fn definition(a: &Gray, b: &Gray) -> (f64, f64) {
        let gauss = |i: usize| (-((i as f64 - 5.0) / 1.5).powi(2) / 2.0).exp();
        let norm: f64 = (0..11).map(gauss).sum();
        let (mut sum, mut structures, mut count) = (0.0, 0.0, 0.0);
        for y in 0..=a.height - 11 {
            for x in 0..=a.width - 11 {
                let mut m = [0.0; 5];
                for j in 0..11 {
                    for i in 0..11 {
                        let k = gauss(i) * gauss(j) / norm / norm;
                        let at = (y + j) * a.width + x + i;
                        let (p, q) = (f64::from(a.data[at]), f64::from(b.data[at]));
                        for (m, v) in m.iter_mut().zip([p, q, p * p, q * q, p * q]) {
                            *m += k * v;
                        }
                    }
                }
                let [p, q, pp, qq, pq] = m;
                let (c1, c2) = (2.55 * 2.55, 7.65 * 7.65);
                let structure = (2.0 * (pq - p * q) + c2) / (pp - p * p + qq - q * q + c2);
                sum += (2.0 * p * q + c1) / (p * p + q * q + c1) * structure;
                structures += structure;
                count += 1.0;
            }
        }
        (sum / count, structures / count)
    }

    #[test]
    fn ssim_agrees_with_its_definition() {
        for (w, h) in [(11, 11), (23, 17), (12, 40)] {
            let a = noise(w, h, 1);
            let mut b = noise(w, h, 2);
            for (b, a) in b.data.iter_mut().zip(&a.data) {
                *b = 0.7 * a + 0.2 * *b;
            }
            let (got, want) = (ssim(&a, &b).unwrap(), definition(&a, &b).0);
            assert!((got - want).abs() < 1e-5, "{w}x{h}: {got} is not {want}");
        }
    }

    #[test]
    fn ms_ssim_agrees_with_its_definition() {
        let a = noise(190, 177, 1);
        let mut b = noise(190, 177, 2);
        for (b, a) in b.data.iter_mut().zip(&a.data) {
            *b = 0.9 * a + 0.1 * *b;
        }
        let (mut x, mut y, mut want) = (a.clone(), b.clone(), 1.0f64);
        for (i, exponent) in EXPONENTS.into_iter().enumerate() {
            let (both, structure) = definition(&x, &y);
            want *= if i == 4 { both } else { structure }.powf(exponent);
            (x, y) = (x.halved(), y.halved());
        }
        let got = ms_ssim(&a, &b).unwrap();
        assert!((got - want).abs() < 1e-5, "{got} is not {want}");
        assert!((ms_ssim(&a, &a).unwrap() - 1.0).abs() < 1e-6);
        assert_eq!(ms_ssim(&noise(175, 300, 1), &noise(175, 300, 1)), None);
    }

    #[test]
    fn ssim_is_the_same_to_the_last_bit_on_any_number_of_threads() {
        let pairs: Vec<_> = (0..10)
            .map(|i| (noise(40, 300, i), noise(40, 300, 100 + i)))
            .collect();
        let on = |threads| -> Vec<_> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let all = || pairs.iter().map(|(a, b)| ssim(a, b)).collect();
            pool.build().unwrap().install(all)
        };
        assert_eq!(on(1), on(4));
    }

    #[test]
    fn ssim_is_one_for_equal_planes_and_none_below_the_window() {
        let a = noise(30, 20, 3);
        assert!((ssim(&a, &a).unwrap() - 1.0).abs() < 1e-6);
        assert_eq!(ssim(&noise(10, 40, 1), &noise(10, 40, 1)), None);
    }
}
