//! Correction of the colours of a generated image to those of its input.

use rayon::prelude::*;

use crate::engine::ColorFix;

/// Levels of the à-trous transform. Structures of 2^5 pixels of the output or more count as colour.
const LEVELS: u32 = 5;

/// Minimum standard deviation in a division, a hundredth of an 8-bit step.
const MIN_DEVIATION: f64 = 0.01 / 255.0;

/// Matches the colours of the plane `result` to those of `base` with the method `fix`. Both have
/// rows of `width` samples.
pub(super) fn apply(fix: ColorFix, result: &mut [f32], base: &[f32], width: usize) {
    match fix {
        ColorFix::Wavelet => wavelet(result, base, width),
        ColorFix::Adain => adain(result, base),
        ColorFix::None => {}
    }
}

/// Replaces the low frequencies of `result` by those of `base`, as in StableSR (arXiv 2305.07015).
///
/// The transform is that of Holschneider et al., "A real-time algorithm for signal analysis with
/// the help of the wavelet transform", 1989: successive low-pass filters of radius 1, 2, 4, 8 and
/// 16, with a total radius of 31 pixels. The filters are linear, so they run once on the
/// difference.
fn wavelet(result: &mut [f32], base: &[f32], width: usize) {
    let mut low: Vec<f32> = base.iter().zip(&*result).map(|(b, r)| b - r).collect();
    let mut passed = vec![0.0; low.len()];
    for level in 0..LEVELS {
        let radius = 1 << level;
        blur_rows(&low, &mut passed, width, radius);
        blur_columns(&passed, &mut low, width, radius);
    }
    for (r, l) in result.iter_mut().zip(&low) {
        *r += l;
    }
}

/// Filters rows with (1, 2, 1) / 4, the taps `radius` apart, with replicated borders.
fn blur_rows(src: &[f32], dst: &mut [f32], width: usize, radius: usize) {
    let rows = dst
        .par_chunks_exact_mut(width)
        .zip(src.par_chunks_exact(width));
    rows.for_each(|(dst, src)| {
        for (x, d) in dst.iter_mut().enumerate() {
            let (left, right) = (x.saturating_sub(radius), (x + radius).min(width - 1));
            *d = 0.25 * (src[left] + src[right]) + 0.5 * src[x];
        }
    });
}

/// As [`blur_rows`], for columns.
fn blur_columns(src: &[f32], dst: &mut [f32], width: usize, radius: usize) {
    let last = src.len() / width - 1;
    let row = |y: usize| &src[y * width..][..width];
    dst.par_chunks_exact_mut(width)
        .enumerate()
        .for_each(|(y, dst)| {
            let (above, below) = (row(y.saturating_sub(radius)), row((y + radius).min(last)));
            for (((d, a), b), s) in dst.iter_mut().zip(above).zip(below).zip(row(y)) {
                *d = 0.25 * (a + b) + 0.5 * s;
            }
        });
}

/// Matches mean and standard deviation of `result` to those of `base` (Huang and Belongie, arXiv
/// 1703.06868, equation 8).
fn adain(result: &mut [f32], base: &[f32]) {
    let ((mean, deviation), (base_mean, base_deviation)) = (moments(result), moments(base));
    let gain = base_deviation / deviation.max(MIN_DEVIATION);
    for r in result {
        *r = ((f64::from(*r) - mean) * gain + base_mean) as f32;
    }
}

/// Returns mean and standard deviation.
fn moments(plane: &[f32]) -> (f64, f64) {
    let n = plane.len().max(1) as f64;
    let mean = plane.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square = |&v: &f32| (f64::from(v) - mean).powi(2);
    (mean, (plane.iter().map(square).sum::<f64>() / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIXES: [ColorFix; 2] = [ColorFix::Wavelet, ColorFix::Adain];

    /// Returns waves that are broad enough to count as colour.
    fn broad(width: usize, height: usize) -> Vec<f32> {
        let at = |x: usize, y: usize| 0.5 + 0.3 * (x as f32 / 70.0).sin() * (y as f32 / 90.0).cos();
        (0..width * height)
            .map(|i| at(i % width, i / width))
            .collect()
    }

    /// Returns sample `i` of a texture with a period of two pixels.
    fn fine(width: usize, i: usize) -> f32 {
        if (i % width + i / width).is_multiple_of(2) {
            0.03
        } else {
            -0.03
        }
    }

    fn max_error(a: &[f32], b: &[f32]) -> f32 {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    }

    #[test]
    fn a_flat_result_gets_the_colour_of_a_flat_input() {
        for fix in FIXES {
            for (w, h) in [(1, 1), (1, 9), (50, 3), (64, 64)] {
                let base = vec![0.7; w * h];
                let mut result = vec![0.2; w * h];
                apply(fix, &mut result, &base, w);
                assert!(max_error(&result, &base) < 1e-6, "{fix:?} {w}x{h}");
            }
        }
    }

    #[test]
    fn a_colour_cast_is_removed_and_texture_stays() {
        let (w, h) = (200, 160);
        let base = broad(w, h);
        let truth: Vec<f32> = base
            .iter()
            .enumerate()
            .map(|(i, b)| b + fine(w, i))
            .collect();
        for fix in FIXES {
            let mut result: Vec<f32> = truth.iter().map(|v| v + 0.15).collect();
            apply(fix, &mut result, &base, w);
            // Adain does not separate the variance of texture and waves, so both get slightly
            // weaker.
            let tolerance = if fix == ColorFix::Wavelet {
                0.005
            } else {
                0.03
            };
            assert!(
                max_error(&result, &truth) < tolerance,
                "{fix:?}: {}",
                max_error(&result, &truth)
            );
        }
    }

    #[test]
    fn wavelet_removes_a_cast_that_varies_over_the_image() {
        let (w, h) = (400, 300);
        let base = broad(w, h);
        let truth: Vec<f32> = base
            .iter()
            .enumerate()
            .map(|(i, b)| b + fine(w, i))
            .collect();
        let cast = |i: usize| 0.2 * (i % w) as f32 / w as f32 - 0.1;
        let mut result: Vec<f32> = truth.iter().enumerate().map(|(i, v)| v + cast(i)).collect();
        apply(ColorFix::Wavelet, &mut result, &base, w);
        assert!(
            max_error(&result, &truth) < 0.01,
            "{}",
            max_error(&result, &truth)
        );
    }

    #[test]
    fn adain_matches_mean_and_deviation() {
        let base = broad(90, 70);
        let mut result: Vec<f32> = (0..90 * 70).map(|i| 0.3 * fine(90, i) + 0.9).collect();
        apply(ColorFix::Adain, &mut result, &base, 90);
        let (got, want) = (moments(&result), moments(&base));
        assert!(
            (got.0 - want.0).abs() < 1e-6 && (got.1 - want.1).abs() < 1e-6,
            "{got:?} {want:?}"
        );
    }

    #[test]
    fn wavelet_filters_add_up_to_one_and_reach_31_pixels() {
        let (w, h) = (81, 81);
        let mut base = vec![0.0; w * h];
        base[40 * w + 40] = 1.0;
        let mut result = vec![0.0; w * h];
        apply(ColorFix::Wavelet, &mut result, &base, w);
        assert!((result.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        let reach = |i: usize| (i % w).abs_diff(40).max((i / w).abs_diff(40));
        let max_radius = (0..w * h).filter(|&i| result[i] != 0.0).map(reach).max();
        assert_eq!(max_radius, Some(31));
        assert_eq!(result[3 * w + 40], 0.0);
        assert_eq!(result[40 * w + 9], result[9 * w + 40]);
    }
}
