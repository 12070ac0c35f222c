//! Colour: luma coefficients, quantisation range, chroma siting.

use super::PixelFormat;

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

/// Where a chroma sample lies among the luma samples that it covers, per direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChromaSite {
    /// On the left luma column (MPEG-2, H.264 default) rather than between two columns (JPEG).
    pub horizontal_cosited: bool,
    /// On the upper luma row (DV, BT.2020 top-left) rather than between two rows.
    pub vertical_cosited: bool,
}

impl Matrix {
    /// (Kr, Kg, Kb): luma is their weighted sum of R', G', B'. Sources: BT.601, BT.709, BT.2020.
    pub fn luma_weights(self) -> (f32, f32, f32) {
        let (kr, kb) = match self {
            Self::Bt601 => (0.299, 0.114),
            Self::Bt709 => (0.2126, 0.0722),
            Self::Bt2020 => (0.2627, 0.0593),
        };
        (kr, 1.0 - kr - kb, kb)
    }
}

impl Colorimetry {
    /// What GStreamer assumes of video that does not say: BT.601 below 720 lines, BT.709 from there, limited
    /// range; full range for RGB and grey.
    pub fn default_for(format: PixelFormat, height: usize) -> Self {
        let matrix = if height >= 720 {
            Matrix::Bt709
        } else {
            Matrix::Bt601
        };
        let range = if format.is_rgb() {
            Range::Full
        } else {
            Range::Limited
        };
        Self { matrix, range }
    }
}

impl Default for ChromaSite {
    /// MPEG-2 siting: horizontally cosited, vertically centred.
    fn default() -> Self {
        Self {
            horizontal_cosited: true,
            vertical_cosited: false,
        }
    }
}
