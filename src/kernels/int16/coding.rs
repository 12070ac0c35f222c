//! Codes of 9 bits and the values that they stand for.

use super::sizes::{LARGEST, PADDED};
use crate::kernels::simd::{Isa, dispatch};

/// Meaning of the codes of some channels: `value = middle + step * code` for codes -255 to 255.
#[derive(Clone, Debug, PartialEq)]
pub struct Coding {
    pub(super) middle: Vec<f32>,
    pub(super) step: Vec<f32>,
    /// Factor and offset from values to codes, for a pixel with its padding.
    pattern: [Vec<f32>; 2],
}

impl Coding {
    /// Creates the coding of channels by `[low, high, mean]` of their values. Values beyond the
    /// range are clamped.
    pub fn new(ranges: &[[f32; 3]]) -> Self {
        let widest = ranges.iter().map(|r| r[1] - r[0]).fold(0.0, f32::max);
        // A constant channel must not have a step of 0.
        let min = (widest * 1e-3).max(1e-6);
        let step = |r: &[f32; 3]| (r[1] - r[0]).max(min) / (2.0 * f32::from(LARGEST));
        let middle = |r: &[f32; 3]| 0.5 * (r[0] + r[1]);
        let pattern = |f: &dyn Fn(&[f32; 3]) -> f32| -> Vec<f32> {
            let pixel = ranges.len().next_multiple_of(PADDED);
            (0..pixel).map(|i| ranges.get(i).map_or(0.0, f)).collect()
        };
        Self {
            pattern: [
                pattern(&|r| 1.0 / step(r)),
                pattern(&|r| -middle(r) / step(r)),
            ],
            middle: ranges.iter().map(middle).collect(),
            step: ranges.iter().map(step).collect(),
        }
    }

    /// Codes `values`: pixels of as many floats as there are channels, padded like the codes.
    ///
    /// # Panics
    /// If they differ in length.
    pub fn encode(&self, values: &[f32], codes: &mut [i16], isa: Isa) {
        assert_eq!(values.len(), codes.len(), "a code for each value");
        let [scale, offset] = &self.pattern;
        encode_on(isa, scale, offset, values, codes);
    }
}

dispatch! {
    /// Codes values; `scale` and `offset` repeat along them.
    fn encode_on(scale: &[f32], offset: &[f32], values: &[f32], codes: &mut [i16]) {
        /// Adding this rounds to the nearest integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let most = f32::from(LARGEST);
        let pixels = values
            .chunks(scale.len())
            .zip(codes.chunks_mut(scale.len()));
        for (values, codes) in pixels {
            let constants = scale.iter().zip(offset);
            for ((v, code), (s, o)) in values.iter().zip(codes).zip(constants) {
                let z = (v * s + o).clamp(-most, most);
                *code = (z + ROUND).to_bits() as i16;
            }
        }
    }
}
