//! A layer: transformed weights, and bands of rows through them.

#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{
    coding::Coding,
    loops::{Output, Packed, Rows, run},
    portable::Integers,
    sizes::{MAX_VECTORS, MAX_WEIGHTS, PADDED, POINTS, SIDE, SUMS},
    variant::Variant,
};
use crate::kernels::{
    conv::blocks,
    int8::{IntBand, IntOutput},
    memory::{AlignedCopy, aligned},
    winograd::{self, MAX_TILES, TILE},
};

/// Codings at the input and output of a layer.
pub struct Ends<'a> {
    /// Coding of the input channels.
    pub input: &'a Coding,
    /// Coding of the output channels; without it the output is floats.
    pub output: Option<&'a Coding>,
    /// Coding of the channels that are added to the output after the activation.
    pub skip: Option<&'a Coding>,
}

/// A convolution ready for bands.
#[derive(Clone, Debug)]
pub struct Int16 {
    variant: Variant,
    packed: Packed,
    /// The output is codes, not floats.
    codes: bool,
}

impl Int16 {
    /// Creates a layer of `weights` `[co, ci, 3, 3]`, `bias` `[co]` and the leaky ReLU
    /// `max(x, slope * x)`; a slope of 1 is no activation.
    ///
    /// # Panics
    /// If a length does not fit the channels.
    pub fn new(
        [co, ci]: [usize; 2],
        weights: &[f32],
        bias: &[f32],
        slope: f32,
        ends: Ends,
        variant: Variant,
    ) -> Self {
        assert_eq!(weights.len(), co * ci * 9, "weights {ci} to {co}");
        assert_eq!((bias.len(), ends.input.step.len()), (co, ci), "channels");
        let codes = ends.output.is_some();
        let padded = co.next_multiple_of(if codes { PADDED } else { SUMS });
        let mut packed = Packed {
            ci,
            co,
            blocks: blocks(padded / SUMS, MAX_VECTORS),
            weights: AlignedCopy::new(&[]),
            factor: vec![0.0; padded],
            bias: vec![0.0; padded],
            skip: vec![0.0; padded],
            negative: vec![0.0; padded],
            slope,
        };
        let mut transformed = Vec::with_capacity(co * ci * POINTS);
        for (o, kernels) in weights.chunks_exact(ci * 9).enumerate() {
            let factor = transform(kernels, ends.input, &mut transformed);
            let middle =
                |(i, w): (usize, &f32)| f64::from(*w) * f64::from(ends.input.middle[i / 9]);
            let constant = f64::from(bias[o]) + kernels.iter().enumerate().map(middle).sum::<f64>();
            let (step, middle) = match ends.output {
                Some(to) => (f64::from(to.step[o]), f64::from(to.middle[o])),
                None => (1.0, 0.0),
            };
            packed.factor[o] = (factor / step) as f32;
            // What is added after the activation; the slope applies to all that comes before it.
            let mut offset = -middle / step;
            if let Some(skip) = ends.skip {
                packed.skip[o] = (f64::from(skip.step[o]) / step) as f32;
                offset += f64::from(skip.middle[o]) / step;
            }
            packed.bias[o] = (constant / step + offset) as f32;
            packed.negative[o] = (offset * (1.0 - f64::from(slope))) as f32;
        }
        packed.weights = AlignedCopy::new(&pack(&packed, &transformed));
        Self {
            variant,
            packed,
            codes,
        }
    }

    /// Codes from one input pixel to the next.
    pub fn input_step(&self) -> usize {
        self.packed.input_step()
    }

    /// Codes of an output pixel with its padding.
    pub fn output_step(&self) -> usize {
        self.packed.output_step()
    }

    /// Convolves a band. `scratch` is reused from call to call.
    ///
    /// # Panics
    /// If a row is too short, the layer was made for the other kind of output, or rows are added to
    /// floats.
    pub fn run(&self, band: IntBand<i16>, scratch: &mut Vec<f32>) {
        let codes = matches!(band.output, IntOutput::Codes(_));
        assert!(codes == self.codes, "the other kind of output");
        assert!(band.tiles <= MAX_TILES, "{} tiles", band.tiles);
        let columns = TILE * band.tiles;
        let long = |rows: &[&[i16]], len: usize| rows.iter().all(|r| r.len() >= len);
        assert!(
            long(&band.input, (columns + 2) * self.input_step()),
            "input rows"
        );
        let codes = columns * self.output_step();
        if let Some(skip) = &band.skip {
            assert!(long(skip, codes), "rows to add");
        }
        let output = match band.output {
            IntOutput::Codes(rows) => {
                assert!(rows.iter().all(|r| r.len() >= codes), "output rows");
                Output::Codes {
                    output: rows.map(<[i16]>::as_mut_ptr),
                    skip: band.skip.map(|rows| rows.map(<[i16]>::as_ptr)),
                }
            }
            IntOutput::Values(rows) => {
                let len = columns * self.packed.co;
                assert!(band.skip.is_none(), "rows that are added to floats");
                assert!(rows.iter().all(|r| r.len() >= len), "output rows");
                Output::Values(rows.map(<[f32]>::as_mut_ptr))
            }
        };
        let rows = Rows {
            input: band.input.map(<[i16]>::as_ptr),
            output,
            tiles: band.tiles,
        };
        let (layer, scratch) = (&self.packed, aligned(scratch, self.packed.scratch()));
        // SAFETY: the rows are as long as the tiles need, as just checked; the scratch holds both
        // transforms; the variant proves the instruction set.
        unsafe {
            match self.variant {
                #[cfg(target_arch = "x86_64")]
                Variant::Avx2(_) => x86::run_avx2(layer, &rows, scratch),
                _ => run::<[i16; PADDED], Integers, 4, 4, 0>(layer, &rows, scratch),
            }
        }
    }
}

/// Appends the transformed weights `[ci, POINTS]` of an output channel, rounded to integers.
/// Returns the factor of the sums.
fn transform(kernels: &[f32], input: &Coding, transformed: &mut Vec<i16>) -> f64 {
    let points: Vec<[f64; POINTS]> = kernels
        .chunks_exact(9)
        .zip(&input.step)
        .map(|(kernel, &step)| transform_kernel(kernel, f64::from(step)))
        .collect();
    let mut factor = 0.0f64;
    for point in 0..POINTS {
        let weights = || points.iter().map(|p| p[point].abs());
        // Each weight is rounded by at most half.
        let sum = weights().sum::<f64>() / (MAX_WEIGHTS - 0.5 * points.len() as f64);
        let largest = weights().fold(0.0, f64::max) / f64::from(i16::MAX);
        factor = factor.max(sum).max(largest);
    }
    if factor == 0.0 {
        factor = 1.0;
    }
    let round = |w: &f64| (w / factor).round() as i16;
    transformed.extend(points.as_flattened().iter().map(round));
    factor
}

/// Returns `G g G^T` times `step`, with a quarter of the last row of G: the values are then of
/// similar size at all points. The transform of the sums makes up for it.
fn transform_kernel(kernel: &[f32], step: f64) -> [f64; POINTS] {
    let quarter = |y: usize| if y == SIDE - 1 { 0.25 } else { 1.0 };
    std::array::from_fn(|point| {
        let (y, x) = (point / SIDE, point % SIDE);
        let (gy, gx) = (winograd::G[y], winograd::G[x]);
        let terms = kernel.iter().enumerate();
        let sum = terms.map(|(k, w)| gy[k / 3] * gx[k % 3] * f64::from(*w));
        sum.sum::<f64>() * quarter(y) * quarter(x) * step
    })
}

/// Returns the transformed weights `[co, ci, POINTS]` in the order of the loops.
fn pack(packed: &Packed, transformed: &[i16]) -> Vec<i16> {
    let mut weights = Vec::new();
    for point in 0..POINTS {
        let mut first = 0;
        for width in packed.blocks.iter().map(|vectors| vectors * SUMS) {
            let outputs = |pair: usize| (first..first + width).map(move |o| (pair, o));
            for (pair, o) in (0..packed.pairs()).flat_map(outputs) {
                for i in [2 * pair, 2 * pair + 1] {
                    let inside = o < packed.co && i < packed.ci;
                    let at = (o * packed.ci + i) * POINTS + point;
                    weights.push(if inside { transformed[at] } else { 0 });
                }
            }
            first += width;
        }
    }
    weights
}
