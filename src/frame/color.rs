//! Colour: luma coefficients, quantisation range, chroma siting.

use super::{Component, PixelFormat};

/// Largest height that GStreamer treats as standard definition.
const LAST_SD_LINE: usize = 576;

/// The matrix between R'G'B' and Y'CbCr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Matrix {
    Bt601,
    Bt709,
    /// BT.2020 non-constant luminance.
    Bt2020,
}

/// The quantisation range of the samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Range {
    /// Luma 16..235 and chroma 16..240 at 8 bits.
    Limited,
    /// 0..255 at 8 bits.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Colorimetry {
    pub matrix: Matrix,
    pub range: Range,
}

/// Position of a chroma sample among the luma samples that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChromaSite {
    /// `true` on the left luma column (MPEG-2, default of H.264), `false` between two columns
    /// (JPEG).
    pub horizontal_cosited: bool,
    /// `true` on the upper luma row (DV, BT.2020 top-left), `false` between two rows.
    pub vertical_cosited: bool,
}

impl Matrix {
    /// Returns (Kr, Kg, Kb), the weights of R', G' and B' in luma. Sources: BT.601, BT.709,
    /// BT.2020.
    pub fn luma_weights(self) -> (f32, f32, f32) {
        let (kr, kb) = match self {
            Self::Bt601 => (0.299, 0.114),
            Self::Bt709 => (0.2126, 0.0722),
            Self::Bt2020 => (0.2627, 0.0593),
        };
        (kr, 1.0 - kr - kb, kb)
    }

    /// Returns the weights of R', G' and B' in Cb (`which` 0) or Cr (1).
    pub fn chroma_weights(self, which: usize) -> [f32; 3] {
        let (kr, kg, kb) = self.luma_weights();
        match which {
            0 => [-kr, -kg, 1.0 - kb].map(|k| 0.5 * k / (1.0 - kb)),
            _ => [1.0 - kr, -kg, -kb].map(|k| 0.5 * k / (1.0 - kr)),
        }
    }

    /// Returns the weights of Cb (`which` 0) or Cr (1) in R', G' and B'.
    pub fn inverse_chroma_weights(self, which: usize) -> [f32; 3] {
        let (kr, kg, kb) = self.luma_weights();
        match which {
            0 => [0.0, -2.0 * kb * (1.0 - kb) / kg, 2.0 * (1.0 - kb)],
            _ => [2.0 * (1.0 - kr), -2.0 * kr * (1.0 - kr) / kg, 0.0],
        }
    }

    /// Converts R', G', B' samples to Y', Cb, Cr in place: Cb = (B' - Y') / (2 (1 - Kb)),
    /// Cr = (R' - Y') / (2 (1 - Kr)) (BT.601-7 section 2.5.2, BT.709-6 section 3.3).
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn rgb_to_ycbcr(self, [r, g, b]: [&mut [f32]; 3]) {
        let (kr, kg, kb) = self.luma_weights();
        let (cb_scale, cr_scale) = (0.5 / (1.0 - kb), 0.5 / (1.0 - kr));
        assert!(r.len() == g.len() && r.len() == b.len());
        for ((r, g), b) in r.iter_mut().zip(g).zip(b) {
            let y = kr * *r + kg * *g + kb * *b;
            (*r, *g, *b) = (y, (*b - y) * cb_scale, (*r - y) * cr_scale);
        }
    }

    /// Converts Y', Cb, Cr samples to R', G', B' in place, the inverse of [`Matrix::rgb_to_ycbcr`].
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn ycbcr_to_rgb(self, [y, cb, cr]: [&mut [f32]; 3]) {
        let (kr, kg, kb) = self.luma_weights();
        let (b_scale, r_scale) = (2.0 * (1.0 - kb), 2.0 * (1.0 - kr));
        let (g_cb, g_cr) = (b_scale * kb / kg, r_scale * kr / kg);
        assert!(y.len() == cb.len() && y.len() == cr.len());
        for ((y, cb), cr) in y.iter_mut().zip(cb).zip(cr) {
            let g = *y - g_cb * *cb - g_cr * *cr;
            (*y, *cb, *cr) = (*y + r_scale * *cr, g, *y + b_scale * *cb);
        }
    }
}

impl Colorimetry {
    /// Returns GStreamer's default (`gst_video_info_set_format`): BT.601 up to 576 lines, BT.709
    /// above, limited range. Grey is full-range BT.601 at any size, RGB has full range. The matrix
    /// of RGB, which GStreamer leaves open, is that of Y'CbCr of the same height and used for luma.
    pub fn default_for(format: PixelFormat, height: usize) -> Self {
        let grey = format.is_gray();
        let matrix = if grey || height <= LAST_SD_LINE {
            Matrix::Bt601
        } else {
            Matrix::Bt709
        };
        let range = if grey || format.is_rgb() {
            Range::Full
        } else {
            Range::Limited
        };
        Self { matrix, range }
    }
}

impl ChromaSite {
    /// Horizontally cosited, vertically centred: MPEG-2, H.264, HEVC. GStreamer's `mpeg2`.
    pub const MPEG2: Self = Self {
        horizontal_cosited: true,
        vertical_cosited: false,
    };
    /// Centred in both directions: JPEG, MPEG-1. GStreamer's `jpeg`, also its `none`.
    pub const JPEG: Self = Self {
        horizontal_cosited: false,
        vertical_cosited: false,
    };

    /// Returns GStreamer's default (`gst_video_info_set_format`): [`ChromaSite::JPEG`] up to 576
    /// lines and for formats without chroma, [`ChromaSite::MPEG2`] above.
    pub fn default_for(format: PixelFormat, height: usize) -> Self {
        if height <= LAST_SD_LINE || format.component(Component::U).is_none() {
            Self::JPEG
        } else {
            Self::MPEG2
        }
    }

    /// Returns GStreamer's name of the site.
    pub fn name(self) -> &'static str {
        match (self.horizontal_cosited, self.vertical_cosited) {
            (false, false) => "jpeg",
            (true, false) => "mpeg2",
            (true, true) => "cosited",
            (false, true) => "v-cosited",
        }
    }
}

impl Default for ChromaSite {
    /// [`ChromaSite::MPEG2`].
    fn default() -> Self {
        Self::MPEG2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Matrix; 3] = [Matrix::Bt601, Matrix::Bt709, Matrix::Bt2020];

    fn sweep(n: usize) -> [Vec<f32>; 3] {
        let plane = |step: usize| (0..n).map(|i| (i * step % 256) as f32 / 255.0).collect();
        [plane(7), plane(31), plane(101)]
    }

    #[test]
    fn defaults_are_those_of_gstreamer() {
        use {Matrix::*, Range::*};
        // Printed by gst_video_info_set_format of GStreamer 1.22, except for the matrix of RGB.
        let cases = [
            (PixelFormat::I420, 1, Bt601, Limited, ChromaSite::JPEG),
            (PixelFormat::Nv12, 576, Bt601, Limited, ChromaSite::JPEG),
            (PixelFormat::Nv12, 577, Bt709, Limited, ChromaSite::MPEG2),
            (PixelFormat::Y444, 720, Bt709, Limited, ChromaSite::MPEG2),
            (PixelFormat::P010Le, 2160, Bt709, Limited, ChromaSite::MPEG2),
            (PixelFormat::Gray8, 240, Bt601, Full, ChromaSite::JPEG),
            (PixelFormat::Gray8, 2160, Bt601, Full, ChromaSite::JPEG),
            (PixelFormat::Bgra, 240, Bt601, Full, ChromaSite::JPEG),
            (PixelFormat::Rgbx, 1080, Bt709, Full, ChromaSite::JPEG),
        ];
        for (format, height, matrix, range, site) in cases {
            assert_eq!(
                Colorimetry::default_for(format, height),
                Colorimetry { matrix, range },
                "{format:?} {height}"
            );
            assert_eq!(
                ChromaSite::default_for(format, height),
                site,
                "{format:?} {height}"
            );
        }
    }

    #[test]
    fn primaries_have_the_textbook_ycbcr() {
        let [mut r, mut g, mut b] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]];
        Matrix::Bt601.rgb_to_ycbcr([&mut r, &mut g, &mut b]);
        let expected = [
            [0.299, 0.587, 0.114],
            [-0.168_736, -0.331_264, 0.5],
            [0.5, -0.418_688, -0.081_312],
        ];
        for (plane, expected) in [r, g, b].iter().zip(expected) {
            for (value, expected) in plane.iter().zip(expected) {
                assert!((value - expected).abs() < 1e-6, "{value} {expected}");
            }
        }
    }

    #[test]
    fn rgb_survives_the_round_trip_through_ycbcr() {
        for matrix in ALL {
            let [mut r, mut g, mut b] = sweep(1000);
            matrix.rgb_to_ycbcr([&mut r, &mut g, &mut b]);
            matrix.ycbcr_to_rgb([&mut r, &mut g, &mut b]);
            for (got, expected) in [r, g, b].iter().zip(sweep(1000)) {
                for (got, expected) in got.iter().zip(expected) {
                    assert!(
                        (got - expected).abs() < 1e-6,
                        "{matrix:?}: {got} {expected}"
                    );
                }
            }
        }
    }
}
