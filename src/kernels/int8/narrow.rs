//! Layers from 16 input channels to four output channels, such as the last one of a student at
//! r = 2.
//!
//! The other loops fill a vector with output channels, of which three quarters would be padding
//! here. In these, a vector has all input channels of some pixels, and a sum for each group of
//! them. The four groups of a pixel are added last.

#[cfg(target_arch = "x86_64")]
pub(super) use loops::{PixelSums, run};

use super::sums::Packed;

/// Output channels of these layers, and groups of their input channels.
const CHANNELS: usize = 4;
/// Bytes of an input pixel.
const PIXEL: usize = 16;

/// Returns `true` if a layer from `ci` channels in pixels of `input_step` bytes to `co` channels of
/// floats is of this kind.
pub(super) fn suits(co: usize, input_step: usize) -> bool {
    (co, input_step) == (CHANNELS, PIXEL)
}

/// Returns the codes `[4, ci, 3, 3]` of the weights in their order for vectors of `lanes` sums, and
/// repeats the constants for them.
pub(super) fn pack(packed: &mut Packed, codes: &[i8], ci: usize, lanes: usize) -> Vec<u8> {
    let mut weights = Vec::new();
    for (k, o) in (0..9).flat_map(|k| (0..CHANNELS).map(move |o| (k, o))) {
        let pixel: [u8; PIXEL] = std::array::from_fn(|i| {
            let code = if i < ci {
                codes[(o * ci + i) * 9 + k]
            } else {
                0
            };
            code.to_le_bytes()[0]
        });
        weights.extend(pixel.repeat(lanes / CHANNELS));
    }
    for constants in [&mut packed.factor, &mut packed.bias, &mut packed.offset] {
        for i in CHANNELS..constants.len() {
            constants[i] = constants[i - CHANNELS];
        }
    }
    weights
}

#[cfg(target_arch = "x86_64")]
mod loops {
    use super::{
        super::sums::{Output, Packed, Rows, Sums},
        CHANNELS, PIXEL,
    };
    use crate::kernels::simd::Lanes;

    /// Vectors of which every four lanes hold the sums of a pixel.
    ///
    /// # Safety
    /// As [`Sums`].
    pub(in crate::kernels::int8) trait PixelSums:
        Sums<Inputs = <Self as Sums>::Weights>
    {
        /// Adds the four sums of each pixel. The lanes of a pixel are then its output channels.
        unsafe fn total(channels: [Self; CHANNELS]) -> Self;
    }

    /// Convolves a band, `T` vectors of pixels at a time.
    ///
    /// # Safety
    /// As [`super::super::sums::run`]; the layer was packed by [`super::pack`] for the lanes of `D`.
    #[inline(always)]
    pub(in crate::kernels::int8) unsafe fn run<D: PixelSums, const T: usize>(
        layer: &Packed,
        rows: &Rows,
    ) {
        let Output::Values(output) = &rows.output else {
            unreachable!("the layer was packed for floats")
        };
        let pixels = D::N / CHANNELS;
        for (y, &output) in output.iter().enumerate() {
            let input = &rows.input[y..y + 3];
            let mut x = 0;
            // SAFETY: by the caller's promise. The columns are a multiple of the pixels of a vector.
            unsafe {
                while x + T * pixels <= rows.columns {
                    columns::<D, T>(layer, input, x, output);
                    x += T * pixels;
                }
                while x < rows.columns {
                    columns::<D, 1>(layer, input, x, output);
                    x += pixels;
                }
            }
        }
    }

    /// Convolves `T` vectors of pixels of a row from column `x` on.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn columns<D: PixelSums, const T: usize>(
        layer: &Packed,
        input: &[*const u8],
        x: usize,
        output: *mut f32,
    ) {
        let pixels = D::N / CHANNELS;
        // SAFETY: by the caller's promise.
        unsafe {
            let mut sums = [[D::start(layer.start.as_ptr()); CHANNELS]; T];
            let mut weights = layer.weights.as_ptr();
            for row in input {
                for x in x..x + 3 {
                    let w: [D::Weights; CHANNELS] =
                        std::array::from_fn(|o| D::weights(weights.add(o * D::WEIGHTS)));
                    weights = weights.add(CHANNELS * D::WEIGHTS);
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let values = D::weights(row.add((x + t * pixels) * PIXEL));
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = sum.dot(values, w);
                        }
                    }
                }
            }
            let constant = |of: &[f32]| D::Floats::load(of.as_ptr());
            let [factor, bias, offset] =
                [&layer.factor, &layer.bias, &layer.offset].map(|c| constant(c));
            for (t, sums) in sums.into_iter().enumerate() {
                let value = D::fused(D::total(sums).floats(), factor, bias);
                let value = value.max(value.mul(D::Floats::splat(layer.slope)));
                value
                    .add(offset)
                    .store(output.add((x + t * pixels) * CHANNELS));
            }
        }
    }
}
