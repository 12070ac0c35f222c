//! Weights in the order in which the tiles read them, and the forward convolution with them.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    direct::{Block, Placed, add},
    select::tiles,
    shape::{Activation, ConvShape, product},
    tile::blocks,
};
use crate::kernels::{
    memory::{SendPtr, zeros},
    simd::Isa,
};

/// Weights to pack. The weight of output channel `o`, input channel `i` and kernel position `k` is
/// at `o * output + i * input + k`; with `flip`, `k` counts from the end.
pub(in crate::kernels) struct Source<'a> {
    pub weights: &'a [f32],
    pub output: usize,
    pub input: usize,
    pub flip: bool,
}

impl Source<'_> {
    /// Writes the weights of some output channels to a block of `width`: by kernel position, input
    /// channel, output channel.
    fn fill(&self, outputs: Range<usize>, [ci, taps]: [usize; 2], width: usize, block: &mut [f32]) {
        // Input channels of a task: few, so that the output stays in the first-level cache.
        const INPUTS: usize = 16;
        assert_eq!(block.len(), ci * taps * width, "block of weights");
        assert!(outputs.len() <= width, "channels of a block");
        let block = SendPtr(block.as_mut_ptr());
        (0..ci).into_par_iter().step_by(INPUTS).for_each(|from| {
            let block = &block;
            for (lane, o) in outputs.clone().enumerate() {
                for i in from..(from + INPUTS).min(ci) {
                    let source = &self.weights[o * self.output + i * self.input..][..taps];
                    for (k, &weight) in source.iter().enumerate() {
                        let k = if self.flip { taps - 1 - k } else { k };
                        // SAFETY: inside the block, whose length is asserted; tasks differ in `i`.
                        unsafe { *block.0.add((k * ci + i) * width + lane) = weight };
                    }
                }
            }
        });
    }
}

/// Weights and bias, arranged for the tiles of one instruction set.
#[derive(Clone, Debug)]
pub struct PackedConv {
    isa: Isa,
    pub(super) co: usize,
    pub(super) ci: usize,
    kh: usize,
    kw: usize,
    /// Vectors in each block of output channels.
    blocks: Vec<usize>,
    weights: Vec<f32>,
    bias: Vec<f32>,
}

impl PackedConv {
    /// Packs `weights`, laid out `[co, ci, kh, kw]`, and `bias`, `[co]` (zero if none).
    ///
    /// # Panics
    /// If the length of a slice does not fit the shape.
    pub fn new(shape: &ConvShape, weights: &[f32], bias: Option<&[f32]>, isa: Isa) -> Self {
        assert_eq!(weights.len(), shape.weight_len(), "weights of {shape:?}");
        let (ci, taps) = (shape.ci, shape.kh * shape.kw);
        let from = Source {
            weights,
            output: ci * taps,
            input: taps,
            flip: false,
        };
        Self::pack(shape.co, ci, shape.kh, shape.kw, bias, isa, &from)
    }

    /// Packs the weights of the data gradient: channels swapped, kernel flipped.
    pub(super) fn transposed(shape: &ConvShape, weights: &[f32], isa: Isa) -> Self {
        assert_eq!(weights.len(), shape.weight_len(), "weights of {shape:?}");
        let taps = shape.kh * shape.kw;
        let from = Source {
            weights,
            output: taps,
            input: shape.ci * taps,
            flip: true,
        };
        Self::pack(shape.ci, shape.co, shape.kh, shape.kw, None, isa, &from)
    }

    fn pack(
        co: usize,
        ci: usize,
        kh: usize,
        kw: usize,
        bias: Option<&[f32]>,
        isa: Isa,
        from: &Source,
    ) -> Self {
        let tiles = tiles(isa);
        let vectors = co.div_ceil(tiles.lanes);
        let blocks = blocks(vectors, tiles.forward.len());
        let mut packed_bias = vec![0.0; vectors * tiles.lanes];
        if let Some(bias) = bias {
            assert_eq!(bias.len(), co, "bias of {co} channels");
            packed_bias[..co].copy_from_slice(bias);
        }
        let mut weights = zeros(vectors * tiles.lanes * kh * kw * ci);
        let (mut first, mut rest) = (0, &mut weights[..]);
        for &nv in &blocks {
            let width = nv * tiles.lanes;
            let (block, others) = rest.split_at_mut(width * kh * kw * ci);
            from.fill(first..(first + width).min(co), [ci, kh * kw], width, block);
            (first, rest) = (first + width, others);
        }
        Self {
            isa,
            co,
            ci,
            kh,
            kw,
            blocks,
            weights,
            bias: packed_bias,
        }
    }

    /// Convolves `x` `[n, h, w, ci]` into `y` `[n, oh, ow, co]`, spread over the current rayon
    /// pool.
    ///
    /// # Panics
    /// If the length of a slice or the packed weights do not fit the shape.
    pub fn forward(&self, shape: &ConvShape, x: &[f32], activation: Activation, y: &mut [f32]) {
        self.forward_onto(shape, 0, x, None, activation, y);
    }

    /// As [`Self::forward`], with `more` zeros below and to the right of the padding, and with
    /// `residual` added to the result.
    ///
    /// # Panics
    /// If the length of a slice or the packed weights do not fit the shape.
    pub fn forward_onto(
        &self,
        shape: &ConvShape,
        more: usize,
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        y: &mut [f32],
    ) {
        let (oh, ow) = shape.output_with(more);
        self.check(shape, x);
        let len = product([shape.n, oh, ow, shape.co]);
        assert_eq!(y.len(), len, "output of {shape:?}");
        if let Some(residual) = residual {
            assert_eq!(residual.len(), len, "residual of {shape:?}");
        }
        let placed = Placed {
            shape,
            oh,
            ow,
            top: shape.pad,
            left: shape.pad,
            step: 1,
        };
        self.run(&placed, x, residual, activation, y);
    }

    pub(super) fn check(&self, shape: &ConvShape, x: &[f32]) {
        assert_eq!(
            (self.co, self.ci, self.kh, self.kw),
            (shape.co, shape.ci, shape.kh, shape.kw),
            "packed weights of another shape than {shape:?}"
        );
        assert_eq!(x.len(), shape.input_len(), "input of {shape:?}");
    }

    pub(super) fn run(
        &self,
        p: &Placed,
        x: &[f32],
        residual: Option<&[f32]>,
        activation: Activation,
        y: &mut [f32],
    ) {
        if p.oh == 0 || p.ow == 0 {
            return;
        }
        let row = p.ow * self.co;
        let band = p.band();
        y.par_chunks_mut(band * row)
            .enumerate()
            .for_each_init(Vec::new, |scratch, (i, out)| {
                self.band(p, x, activation, i * band, out, scratch);
                if let Some(residual) = residual {
                    add(out, &residual[i * band * row..]);
                }
            });
    }

    /// Computes the output rows from `first` on, counted through the batch, into `out`, which
    /// begins with the first pixel of the first row and may end with the last pixel of the last.
    pub(super) fn band(
        &self,
        p: &Placed,
        x: &[f32],
        activation: Activation,
        first: usize,
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let tiles = tiles(self.isa);
        let (mut weights, mut channel) = (0, 0);
        for &nv in &self.blocks {
            let width = nv * tiles.lanes;
            let block = Block {
                weights: &self.weights[weights..][..width * self.kh * self.kw * self.ci],
                bias: &self.bias[channel..channel + width],
                channel,
                width,
                tail: (self.co - channel).min(width) - (width - tiles.lanes),
                tiles: tiles.forward[nv - 1],
                activation,
            };
            let row = p.step * p.step * p.ow * self.co;
            for (r, out) in out.chunks_mut(row).enumerate() {
                block.row(p, x, first + r, out, scratch);
            }
            weights += block.weights.len();
            channel += width;
        }
    }
}
