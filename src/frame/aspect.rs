//! Pixel aspect ratios.

/// Returns the factor for the width over height of a pixel that keeps the display aspect ratio of a
/// picture of the size `from` in the size `to`, in lowest terms. `None` if `to` is `from` times a
/// common scale, with both sides rounded by up to a pixel.
pub fn pixel_stretch(from: (usize, usize), to: (usize, usize)) -> Option<(u64, u64)> {
    let [w, h, to_w, to_h] = [from.0, from.1, to.0, to.1].map(|side| side as u64);
    let is_common = to_w.saturating_sub(1) * h <= (to_h + 1) * w
        && to_h.saturating_sub(1) * w <= (to_w + 1) * h;
    (!is_common).then(|| reduced(w * to_h, h * to_w))
}

/// Returns a fraction in lowest terms. If these have more than 16 bits, the limit of many files,
/// returns a near fraction.
pub fn reduced(num: u64, den: u64) -> (u64, u64) {
    let (mut divisor, mut rest) = (num, den);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    let (num, den) = (num / divisor.max(1), den / divisor.max(1));
    let excess = num.max(den).div_ceil(u64::from(u16::MAX)).max(1);
    ((num / excess).max(1), (den / excess).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_another_shape_stretch_pixels_and_rounded_ones_do_not() {
        for (from, to) in [
            ((64, 48), (128, 96)),
            ((854, 480), (1920, 1080)),
            ((33, 17), (34, 18)),
            ((33, 17), (98, 50)),
            ((1, 1), (4, 4)),
        ] {
            assert_eq!(pixel_stretch(from, to), None, "{from:?} {to:?}");
        }
        assert_eq!(pixel_stretch((100, 100), (200, 150)), Some((3, 4)));
        assert_eq!(pixel_stretch((64, 48), (128, 98)), Some((49, 48)));
        assert_eq!(pixel_stretch((720, 576), (1440, 1080)), Some((15, 16)));
    }

    #[test]
    fn long_fractions_become_near_ones_of_16_bits() {
        assert_eq!(reduced(8, 6), (4, 3));
        let (num, den) = reduced(1_000_003, 1_000_033);
        assert!(num <= 65_535 && den <= 65_535);
        assert!((num as f64 / den as f64 - 1_000_003.0 / 1_000_033.0).abs() < 1e-4);
    }
}
