//! Convolution of a map that is upsampled twofold, without making that map.

use rayon::prelude::*;

use super::{
    direct::{Placed, add},
    packed::PackedConv,
    shape::{Activation, ConvShape, product},
};
use crate::kernels::simd::Isa;

/// Weights of a 3x3 convolution with padding 1 of a map upsampled twofold to the nearest pixel:
/// four 2x2 convolutions of the map itself, one for each of the four pixels that a pixel becomes,
/// with 16 instead of 36 multiplications.
///
/// Two of the three kernel rows fall on the same row of the map: the last two for an upper pixel,
/// the first two for a lower one. Columns are alike.
#[derive(Clone, Debug)]
pub struct PackedUpConv {
    phases: [PackedConv; 4],
}

impl PackedUpConv {
    /// Packs `weights`, laid out `[co, ci, 3, 3]`, and `bias`, `[co]`.
    ///
    /// # Panics
    /// If the length of a slice does not fit.
    pub fn new(ci: usize, co: usize, weights: &[f32], bias: &[f32], isa: Isa) -> Self {
        assert_eq!(weights.len(), product([co, ci, 3, 3]), "weights");
        let phase = |phase: usize| {
            let at = |side: usize, low: bool| match (side, low) {
                (0, false) => 0..1,
                (1, false) => 1..3,
                (0, true) => 0..2,
                _ => 2..3,
            };
            let mut sums = vec![0.0; co * ci * 4];
            let kernels = sums.chunks_exact_mut(4).zip(weights.chunks_exact(9));
            kernels.for_each(|(sums, kernel)| {
                for (k, sum) in sums.iter_mut().enumerate() {
                    let (ys, xs) = (at(k / 2, phase / 2 == 1), at(k % 2, phase % 2 == 1));
                    *sum = ys
                        .flat_map(|y| xs.clone().map(move |x| kernel[3 * y + x]))
                        .sum();
                }
            });
            let shape = Self::shape([1, 1, 1], ci, co);
            PackedConv::new(&shape, &sums, Some(bias), isa)
        };
        Self {
            phases: [0, 1, 2, 3].map(phase),
        }
    }

    fn shape([n, h, w]: [usize; 3], ci: usize, co: usize) -> ConvShape {
        ConvShape {
            n,
            h,
            w,
            ci,
            co,
            kh: 2,
            kw: 2,
            stride: 1,
            pad: 1,
        }
    }

    /// Convolves `x` `[n, h, w, ci]` into `y` `[n, 2h, 2w, co]` and adds `residual`, spread over
    /// the current rayon pool.
    ///
    /// # Panics
    /// If the length of a slice does not fit.
    pub fn forward(
        &self,
        [n, h, w]: [usize; 3],
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        y: &mut [f32],
    ) {
        let (ci, co) = (self.phases[0].ci, self.phases[0].co);
        let shape = Self::shape([n, h, w], ci, co);
        self.phases[0].check(&shape, x);
        assert_eq!(y.len(), product([n, 2 * h, 2 * w, co]), "output");
        if let Some(residual) = residual {
            assert_eq!(residual.len(), y.len(), "residual");
        }
        if y.is_empty() {
            return;
        }
        let place = |phase: usize| Placed {
            shape: &shape,
            oh: h,
            ow: w,
            top: 1 - phase / 2,
            left: 1 - phase % 2,
            step: 2,
        };
        let band = place(0).band();
        let rows = band * 4 * w * co;
        y.par_chunks_mut(rows)
            .enumerate()
            .for_each_init(Vec::new, |scratch, (i, out)| {
                for (phase, packed) in self.phases.iter().enumerate() {
                    let out = &mut out[(phase / 2 * 2 * w + phase % 2) * co..];
                    packed.band(&place(phase), x, activation, i * band, out, scratch);
                }
                if let Some(residual) = residual {
                    add(out, &residual[i * rows..]);
                }
            });
    }
}
