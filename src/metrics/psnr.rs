//! Peak signal-to-noise ratio.

use super::Gray;

/// Returns the PSNR in dB for a peak of 255: `10 log10(255^2 / MSE)`. It is infinite for equal
/// planes and NaN for empty ones.
///
/// PSNR-Y of the literature is the PSNR of [`super::Picture::luma`] of pictures
/// [`super::Picture::cropped`] by the scale. The average over a set is the mean of the dB values.
///
/// # Panics
/// If the sizes differ.
pub fn psnr(a: &Gray, b: &Gray) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height), "sizes differ");
    let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
    let sum: f64 = a.data.iter().zip(&b.data).map(square).sum();
    10.0 * (255.0 * 255.0 * a.data.len() as f64 / sum).log10()
}

#[cfg(test)]
mod tests {
    use super::{super::Picture, *};

    fn gray(data: Vec<f32>) -> Gray {
        Gray {
            width: data.len(),
            height: 1,
            data,
        }
    }

    #[test]
    fn psnr_follows_its_formula() {
        // An error of 1 everywhere is 20 log10(255), and so is one of 2 in a quarter of the
        // samples.
        let zero = gray(vec![0.0; 4]);
        let want = 20.0 * 255f64.log10();
        assert!((psnr(&zero, &gray(vec![1.0; 4])) - want).abs() < 1e-9);
        assert!((psnr(&zero, &gray(vec![0.0, 2.0, 0.0, 0.0])) - want).abs() < 1e-9);
        assert_eq!(psnr(&zero, &zero), f64::INFINITY);
        assert!(psnr(&gray(vec![]), &gray(vec![])).is_nan());
    }

    #[test]
    fn luma_is_limited_range_bt601() {
        let colours = [0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 255, 0, 0, 0, 255];
        let luma = Picture::new(5, 1, colours.to_vec()).unwrap().luma();
        // The usual constants of BT.601.
        let want = [16.0, 235.0, 16.0 + 65.481, 16.0 + 128.553, 16.0 + 24.966];
        for (got, want) in luma.data.iter().zip(want) {
            assert!((got - want).abs() < 1e-3, "{got} is not {want}");
        }
    }

    #[test]
    fn cropping_removes_the_border_on_each_side() {
        let rgb = (0..5 * 4 * 3).collect();
        let cropped = Picture::new(5, 4, rgb).unwrap().cropped(1);
        assert_eq!((cropped.width(), cropped.height()), (3, 2));
        let rows: Vec<u8> = (18..27).chain(33..42).collect();
        assert_eq!(cropped.rgb(), rows);
        assert!(cropped.cropped(1).rgb().is_empty());
        assert!(Picture::new(2, 2, vec![0; 11]).is_err());
    }
}
