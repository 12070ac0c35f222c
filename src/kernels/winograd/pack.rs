//! Transformed weights, in the order in which the loops read them.

use half::bf16;
use rayon::prelude::*;

use super::{
    sizes::{G, POINTS, SIDE, lanes, max_vectors, pixel_step},
    variant::Variant,
};
use crate::kernels::{
    conv::{Source, blocks},
    memory::{AlignedCopy, SendPtr, zeros},
    simd::{Isa, dispatch},
};

/// Weights and constants of a layer, arranged for the loops.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    isa: Isa,
    pub ci: usize,
    pub co: usize,
    /// Vectors in each block of output channels.
    pub blocks: Vec<usize>,
    /// Weights by block, point, input channel (or pair of them): the output channels of the block.
    pub weights: AlignedCopy<f32>,
    pub bias: Vec<f32>,
    pub slope: f32,
}

impl Packed {
    /// Transforms and orders the weights.
    ///
    /// # Panics
    /// If the length of `bias` is not `co`.
    pub fn new(
        [co, ci]: [usize; 2],
        from: &Source,
        bias: &[f32],
        slope: f32,
        variant: Variant,
    ) -> Self {
        assert_eq!(bias.len(), co, "bias of {co} channels");
        let isa = variant.isa();
        let lanes = lanes(isa);
        let blocks = blocks(co.div_ceil(lanes), max_vectors(isa));
        let mut padded = bias.to_vec();
        padded.resize(co.next_multiple_of(lanes), 0.0);
        let mut weights = transform(co, ci, from, &blocks, isa);
        if variant.is_bf16() {
            let round = |w: &mut f32| *w = bf16::from_f32(*w).to_f32();
            weights.iter_mut().for_each(round);
        }
        if variant.multiplies_pairs() {
            weights = paired(&weights, ci, &blocks, lanes);
        }
        Self {
            isa,
            ci,
            co,
            blocks,
            weights: AlignedCopy::new(&weights),
            bias: padded,
            slope,
        }
    }

    /// Floats from one input pixel to the next. It is inlined, as the methods below, so that the
    /// compiler knows the step in the loops for few channels.
    #[inline(always)]
    pub fn input_step(&self) -> usize {
        pixel_step(self.ci, self.isa)
    }

    /// Floats of an output pixel with its padding.
    #[inline(always)]
    pub fn output_step(&self) -> usize {
        pixel_step(self.co, self.isa)
    }

    /// Floats of the products at a point: the output channels padded to whole vectors.
    #[inline(always)]
    pub fn product_step(&self) -> usize {
        self.bias.len()
    }

    /// Returns `true` if products replace the transformed inputs that they are made of: the data
    /// then fits better in the first-level cache.
    #[inline(always)]
    pub fn in_place(&self) -> bool {
        self.blocks.len() == 1 && self.product_step() <= self.input_step()
    }

    /// Tiles that are transformed before they are multiplied: few for narrow layers, so that they
    /// stay in the first-level cache; many for wide ones, so that weights are read less often.
    #[inline(always)]
    pub fn tiles_at_once(&self) -> usize {
        if self.ci <= 32 { 8 } else { 24 }
    }

    /// Floats of scratch memory for both transforms.
    pub fn scratch(&self) -> usize {
        self.tiles_at_once() * POINTS * (self.input_step() + self.product_step())
    }
}

/// Returns the transform `G g G^T` of the weights, ordered for the products.
fn transform(co: usize, ci: usize, from: &Source, blocks: &[usize], isa: Isa) -> Vec<f32> {
    let width = |vectors: &usize| vectors * lanes(isa);
    let mut packed = zeros(blocks.iter().map(width).sum::<usize>() * POINTS * ci);
    let (mut first, mut rest) = (0, &mut packed[..]);
    for width in blocks.iter().map(width) {
        let (block, others) = rest.split_at_mut(width * POINTS * ci);
        let block = SendPtr(block.as_mut_ptr());
        let outputs = first..(first + width).min(co);
        (0..ci).into_par_iter().with_min_len(8).for_each(|i| {
            let block = &block;
            let mut kernels = [[0.0; MAX_WIDTH]; 9];
            for (lane, o) in outputs.clone().enumerate() {
                let kernel = &from.weights[o * from.output + i * from.input..][..9];
                for (k, &weight) in kernel.iter().enumerate() {
                    let k = if from.flip { 8 - k } else { k };
                    kernels[k][lane] = f64::from(weight);
                }
            }
            let mut points = [[0.0; MAX_WIDTH]; POINTS];
            transform_kernels(isa, &kernels, &mut points);
            for (point, values) in points.iter().enumerate() {
                // SAFETY: inside the block; the places of each `i` are its own.
                let to = unsafe { block.0.add((point * ci + i) * width) };
                for (lane, &value) in values[..width].iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { *to.add(lane) = value };
                }
            }
        });
        (first, rest) = (first + width, others);
    }
    packed
}

/// Maximum number of output channels in a block.
const MAX_WIDTH: usize = 64;

dispatch! {
    /// Computes `G g G^T` of some kernels side by side, in f64, rounded once.
    fn transform_kernels(
        kernels: &[[f64; MAX_WIDTH]; 9],
        points: &mut [[f32; MAX_WIDTH]; POINTS],
    ) {
        for (x, gx) in G.iter().enumerate() {
            let mut half = [[0.0; MAX_WIDTH]; 3];
            for (half, row) in half.iter_mut().zip(kernels.as_chunks::<3>().0) {
                for (lane, half) in half.iter_mut().enumerate() {
                    *half = gx[0] * row[0][lane] + gx[1] * row[1][lane] + gx[2] * row[2][lane];
                }
            }
            for (y, gy) in G.iter().enumerate() {
                for (lane, point) in points[y * SIDE + x].iter_mut().enumerate() {
                    let sum = gy[0] * half[0][lane] + gy[1] * half[1][lane] + gy[2] * half[2][lane];
                    *point = sum as f32;
                }
            }
        }
    }
}

/// Returns packed weights with neighbouring input channels as two bfloat16 in the bits of a float,
/// the first in the lower half.
fn paired(packed: &[f32], ci: usize, blocks: &[usize], lanes: usize) -> Vec<f32> {
    let half = |w: f32| u32::from(bf16::from_f32(w).to_bits());
    let (mut paired, mut rest) = (Vec::new(), packed);
    for width in blocks.iter().map(|vectors| vectors * lanes) {
        let (block, after) = rest.split_at(POINTS * ci * width);
        for channels in block
            .chunks_exact(ci * width)
            .flat_map(|p| p.chunks(2 * width))
        {
            let (even, odd) = channels.split_at(width);
            let odd = odd.iter().copied().chain(std::iter::repeat(0.0));
            paired.extend(
                even.iter()
                    .zip(odd)
                    .map(|(&a, b)| f32::from_bits(half(a) | half(b) << 16)),
            );
        }
        rest = after;
    }
    paired
}
