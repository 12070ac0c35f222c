//! Dense optical flow by polynomial expansion (Farneback, "Two-Frame Motion Estimation Based on
//! Polynomial Expansion", SCIA 2003).

use rayon::prelude::*;

use super::Gray;

/// Half the side of a polynomial's neighbourhood, and the standard deviation of its weights.
const REACH: isize = 3;
const SIGMA: f32 = 1.5;
/// Half the side of the window of constant motion.
const WINDOW: isize = 7;
/// Iterations on each level of the pyramid.
const ITERATIONS: usize = 3;
/// Minimum side of a level of the pyramid.
const SMALLEST: usize = 24;

/// Motion between two planes: pixel (x, y) of the first is at (x + dx, y + dy) in the second.
#[derive(Clone, Debug, PartialEq)]
pub struct Flow {
    pub width: usize,
    pub height: usize,
    /// (dx, dy) in pixels, row-major.
    pub vectors: Vec<[f32; 2]>,
}

impl Flow {
    /// Estimates the motion from `first` to `second`. It is 0 without texture.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn between(first: &Gray, second: &Gray) -> Self {
        assert_eq!(
            (first.width, first.height),
            (second.width, second.height),
            "sizes differ"
        );
        let mut levels = vec![(first.clone(), second.clone())];
        while let Some((a, b)) = levels.last()
            && a.width.min(a.height) >= 2 * SMALLEST
        {
            levels.push((a.halved(), b.halved()));
        }
        let (coarsest, _) = &levels[levels.len() - 1];
        let mut flow = Self::zero(coarsest.width, coarsest.height);
        for (a, b) in levels.iter().rev() {
            flow = flow.enlarged(a.width, a.height);
            let (from, to) = (expand(a), expand(b));
            for _ in 0..ITERATIONS {
                flow = flow.refined(&from, &to);
            }
        }
        flow
    }

    /// Warps `plane` along the flow: bilinear samples at (x + dx, y + dy), or `None` outside.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn warp(&self, plane: &Gray) -> Vec<Option<f32>> {
        assert_eq!((self.width, self.height), (plane.width, plane.height));
        let at = |i: usize| {
            let [dx, dy] = self.vectors[i];
            let (x, y) = ((i % self.width) as f32 + dx, (i / self.width) as f32 + dy);
            sample(plane.width, plane.height, x, y, |i| [plane.data[i]]).map(|[v]| v)
        };
        (0..self.vectors.len()).into_par_iter().map(at).collect()
    }

    /// Interpolates the vector at a position, or `None` outside.
    pub fn at(&self, x: f32, y: f32) -> Option<[f32; 2]> {
        sample(self.width, self.height, x, y, |i| self.vectors[i])
    }

    fn zero(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            vectors: vec![[0.0; 2]; width * height],
        }
    }

    /// Upsamples the flow to a plane of about twice the size.
    fn enlarged(&self, width: usize, height: usize) -> Self {
        if (width, height) == (self.width, self.height) {
            return self.clone();
        }
        let vector = |i: usize| {
            let half = |v: usize, len: usize| (v as f32 / 2.0 - 0.25).clamp(0.0, (len - 1) as f32);
            let (x, y) = (half(i % width, self.width), half(i / width, self.height));
            self.at(x, y).map_or([0.0; 2], |v| v.map(|d| 2.0 * d))
        };
        Self {
            width,
            height,
            vectors: (0..width * height).into_par_iter().map(vector).collect(),
        }
    }

    /// Runs one iteration: the best displacement between both expansions in a window around each
    /// pixel.
    fn refined(&self, from: &[Polynomial], to: &[Polynomial]) -> Self {
        let (w, h) = (self.width, self.height);
        let normal = |i: usize| {
            let [dx, dy] = self.vectors[i];
            let (x, y) = ((i % w) as f32 + dx, (i / w) as f32 + dy);
            let a = from[i];
            // Pixels outside the second plane do not count.
            let Some(b) = sample(w, h, x, y, |i| to[i]) else {
                return [0.0; 5];
            };
            let mean = |k: usize| 0.5 * (a[k] + b[k]);
            let (xx, yy, xy) = (mean(2), mean(3), 0.5 * mean(4));
            // A d = -(b2 - b1) / 2 around the current displacement.
            let bx = -0.5 * (b[0] - a[0]) + xx * dx + xy * dy;
            let by = -0.5 * (b[1] - a[1]) + xy * dx + yy * dy;
            [
                xx * xx + xy * xy,
                xy * (xx + yy),
                yy * yy + xy * xy,
                xx * bx + xy * by,
                xy * bx + yy * by,
            ]
        };
        let sums: Vec<[f32; 5]> = (0..w * h).into_par_iter().map(normal).collect();
        let box_blur = |values: Vec<[f32; 5]>| -> Vec<[f32; 5]> {
            let ones = [1.0; 2 * WINDOW as usize + 1];
            filter(&filter(&values, w, h, &ones, true), w, h, &ones, false)
        };
        let solve = |[a, b, c, p, q]: [f32; 5]| {
            // A small multiple of the identity keeps flat areas at 0.
            let (a, c) = (a + 1e-3, c + 1e-3);
            let determinant = a * c - b * b;
            [(c * p - b * q) / determinant, (a * q - b * p) / determinant]
        };
        Self {
            width: w,
            height: h,
            vectors: box_blur(sums).into_iter().map(solve).collect(),
        }
    }
}

/// Coefficients of x, y, x^2, y^2 and xy around a pixel.
type Polynomial = [f32; 5];

/// Fits a quadratic polynomial to each pixel's neighbourhood with Gaussian weights.
fn expand(plane: &Gray) -> Vec<Polynomial> {
    let (w, h) = (plane.width, plane.height);
    let offsets = (-REACH..=REACH).map(|d| d as f32);
    let gauss: Vec<f32> = offsets
        .clone()
        .map(|d| (-0.5 * (d / SIGMA).powi(2)).exp())
        .collect();
    let sum: f32 = gauss.iter().sum();
    let kernel = |power: i32| -> Vec<f32> {
        let pair = offsets.clone().zip(&gauss);
        pair.map(|(d, g)| d.powi(power) * g / sum).collect()
    };
    let kernels = [kernel(0), kernel(1), kernel(2)];
    let moment = |p: i32| -> f32 {
        offsets
            .clone()
            .zip(&kernels[0])
            .map(|(d, g)| d.powi(p) * g)
            .sum()
    };
    let (m2, m4) = (moment(2), moment(4));
    let data: Vec<[f32; 1]> = plane.data.iter().map(|&v| [v]).collect();
    let columns = [0, 1, 2].map(|p| filter(&data, w, h, &kernels[p], false));
    let both = |px: usize, py: usize| filter(&columns[py], w, h, &kernels[px], true);
    let (one, x, y) = (both(0, 0), both(1, 0), both(0, 1));
    let (xx, yy, xy) = (both(2, 0), both(0, 2), both(1, 1));
    // The normal equations decouple: x, y and xy are independent. 1, x^2 and y^2 form a 3x3 system
    // of moments [1 m2 m2; m2 m4 m2^2; m2 m2^2 m4], whose solution for x^2 is (xx - m2 one) / (m4 -
    // m2^2), and the same for y^2.
    let variance = m4 - m2 * m2;
    (0..w * h)
        .map(|i| {
            let square = |s: f32| (s - m2 * one[i][0]) / variance;
            [
                x[i][0] / m2,
                y[i][0] / m2,
                square(xx[i][0]),
                square(yy[i][0]),
                xy[i][0] / (m2 * m2),
            ]
        })
        .collect()
}

/// Correlates rows or columns with `kernel`. Values at the border are repeated.
fn filter<const N: usize>(
    values: &[[f32; N]],
    w: usize,
    h: usize,
    kernel: &[f32],
    rows: bool,
) -> Vec<[f32; N]> {
    let reach = (kernel.len() / 2) as isize;
    let near = |at: usize, d: isize, len: usize| at.saturating_add_signed(d).min(len - 1);
    let mut out = vec![[0.0; N]; values.len()];
    out.par_chunks_mut(w).enumerate().for_each(|(y, out)| {
        for (d, k) in (-reach..=reach).zip(kernel) {
            let row = &values[w * if rows { y } else { near(y, d, h) }..][..w];
            for (x, out) in out.iter_mut().enumerate() {
                let from = row[if rows { near(x, d, w) } else { x }];
                for (o, v) in out.iter_mut().zip(from) {
                    *o += k * v;
                }
            }
        }
    });
    out
}

/// Interpolates `value` of row-major indices bilinearly, or `None` outside.
fn sample<const N: usize>(
    w: usize,
    h: usize,
    x: f32,
    y: f32,
    value: impl Fn(usize) -> [f32; N],
) -> Option<[f32; N]> {
    let inside = x >= 0.0 && y >= 0.0 && x <= (w - 1) as f32 && y <= (h - 1) as f32;
    if !inside {
        return None;
    }
    let (x0, y0) = (x as usize, y as usize);
    let (x1, y1) = ((x0 + 1).min(w - 1), (y0 + 1).min(h - 1));
    let (fx, fy) = (x - x0 as f32, y - y0 as f32);
    let corners = [(y0, x0), (y0, x1), (y1, x0), (y1, x1)].map(|(y, x)| value(y * w + x));
    let weights = [
        (1.0 - fx) * (1.0 - fy),
        fx * (1.0 - fy),
        (1.0 - fx) * fy,
        fx * fy,
    ];
    Some(std::array::from_fn(|k| {
        weights.iter().zip(&corners).map(|(w, c)| w * c[k]).sum()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a smooth texture at any position.
    fn texture(x: f32, y: f32) -> f32 {
        let wave = |a: f32, b: f32, c: f32| (a * x + b * y + c).sin();
        128.0
            + 30.0 * wave(0.31, 0.12, 0.0)
            + 25.0 * wave(-0.17, 0.35, 1.0)
            + 20.0 * wave(0.05, -0.08, 2.0)
    }

    fn plane(width: usize, height: usize, position: impl Fn(f32, f32) -> (f32, f32)) -> Gray {
        let at = |i: usize| {
            let (x, y) = position((i % width) as f32, (i / width) as f32);
            texture(x, y)
        };
        Gray {
            width,
            height,
            data: (0..width * height).map(at).collect(),
        }
    }

    /// Returns the mean error of pixels away from the border.
    fn error(flow: &Flow, want: impl Fn(f32, f32) -> [f32; 2]) -> f32 {
        let (mut sum, mut count) = (0.0, 0.0);
        for y in 12..flow.height - 12 {
            for x in 12..flow.width - 12 {
                let [dx, dy] = flow.vectors[y * flow.width + x];
                let [wx, wy] = want(x as f32, y as f32);
                sum += (dx - wx).hypot(dy - wy);
                count += 1.0;
            }
        }
        sum / count
    }

    #[test]
    fn shifts_are_found_to_a_fraction_of_a_pixel() {
        for (dx, dy) in [(0.0, 0.0), (0.4, -0.7), (3.0, 2.0), (-6.5, 4.25)] {
            let first = plane(121, 97, |x, y| (x, y));
            let second = plane(121, 97, |x, y| (x - dx, y - dy));
            let flow = Flow::between(&first, &second);
            let error = error(&flow, |_, _| [dx, dy]);
            assert!(error < 0.1, "({dx}, {dy}): {error}");
        }
    }

    #[test]
    fn a_rotation_is_found() {
        let turned = |angle: f32| {
            move |x: f32, y: f32| {
                let (x, y) = (x - 64.0, y - 48.0);
                let (sin, cos) = angle.sin_cos();
                (64.0 + cos * x - sin * y, 48.0 + sin * x + cos * y)
            }
        };
        let flow = Flow::between(
            &plane(128, 96, |x, y| (x, y)),
            &plane(128, 96, turned(0.03)),
        );
        // Pixel p of the first is at the rotated position in the second.
        let error = error(&flow, |x, y| {
            let (px, py) = turned(-0.03)(x, y);
            [px - x, py - y]
        });
        assert!(error < 0.1, "{error}");
    }

    #[test]
    fn warping_the_second_plane_gives_the_first() {
        let first = plane(100, 80, |x, y| (x, y));
        let second = plane(100, 80, |x, y| (x - 2.3, y + 1.6));
        let warped = Flow::between(&first, &second).warp(&second);
        let errors: Vec<f32> = warped
            .iter()
            .zip(&first.data)
            .filter_map(|(w, f)| Some((w.as_ref()? - f).abs()))
            .collect();
        let mean = errors.iter().sum::<f32>() / errors.len() as f32;
        assert!(mean < 1.0 && errors.len() > 80 * 100 * 9 / 10, "{mean}");
    }

    #[test]
    fn planes_of_any_size_and_without_texture_have_a_flow() {
        for (w, h) in [(1, 1), (2, 1), (3, 70), (64, 5)] {
            let flat = Gray {
                width: w,
                height: h,
                data: vec![77.0; w * h],
            };
            let flow = Flow::between(&flat, &flat);
            assert!(flow.vectors.iter().flatten().all(|v| v.abs() < 1e-3));
        }
    }
}
