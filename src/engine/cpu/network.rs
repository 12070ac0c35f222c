//! A student's layers, fused over bands of rows and spread over blocks of columns.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    crew::Crew,
    program::{Op, Program, Slot, reach},
};
use crate::{
    Error, Result,
    model::LiteModel,
    nn::lite::{Activated, LEAKY_SLOPE, Role},
    ops::cpu::{
        Isa,
        winograd::{Band, TILE, Winograd},
    },
};

/// Tiles below which a block of columns is not worth a thread.
const LEAST_TILES: usize = 4;

/// `len` zeros.
///
/// # Errors
/// [`Error::Memory`] when there is not enough memory.
pub(super) fn zeros(len: usize) -> Result<Vec<f32>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).map_err(|_| {
        let mib = (len >> 18) + 1;
        Error::Memory(format!("no {mib} MiB of memory for frames of this size"))
    })?;
    zeros.resize(len, 0.0);
    Ok(zeros)
}

/// What a network reads and what becomes of what it computes, row by row. Blocks work side by side, each on columns
/// of its own and from top to bottom.
pub(super) trait Ends: Sync {
    /// Writes the cells `x` of row `y` of the whitened latent, which may lie outside of the frame, channels dense.
    fn latent(&self, block: usize, y: isize, x: Range<isize>, out: &mut [f32]);

    /// Takes the cells `x` of row `y` of the whitened residual, channels dense. All latent rows up to `y` and as many
    /// more as there are layers have been asked for by then.
    fn residual(&self, block: usize, y: usize, x: Range<usize>, residual: &[f32]);
}

/// The layers of a student with packed weights, the scale folded into the biases, and what a frame needs.
pub(super) struct Network {
    layers: Vec<Winograd>,
    program: Program,
    /// Cells of the frame.
    width: usize,
    height: usize,
    /// Channels of the latent.
    channels: usize,
    /// Cells in a row buffer to the left of the frame.
    left: usize,
    /// Floats in a row buffer.
    row: usize,
    rows: Vec<f32>,
    crew: Crew,
    /// First column of each block, and the end of the last.
    cuts: Vec<usize>,
    scratch: Vec<Mutex<Scratch>>,
}

/// What a block needs for a step.
#[derive(Default)]
struct Scratch {
    /// One row of the latent, or four of the residual.
    cells: Vec<f32>,
    winograd: Vec<f32>,
}

impl Network {
    /// For frames of `width` x `height` cells at `scale`.
    ///
    /// # Errors
    /// [`Error::Memory`] when the feature maps do not fit in memory.
    pub fn new(model: &LiteModel, scale: f64, width: usize, height: usize) -> Result<Self> {
        let student = &model.metadata.student;
        let layers = model.layers.iter().map(|layer| {
            let slope = match layer.spec.activated {
                Activated::Leaky => LEAKY_SLOPE,
                Activated::No => 1.0,
            };
            let bias = layer.bias_at(scale, student.r);
            let (co, ci) = (layer.spec.co, layer.spec.ci);
            Winograd::new(co, ci, &layer.weight, &bias, slope, Isa::best())
        });
        let layers: Vec<_> = layers.collect();
        let roles: Vec<Role> = model.layers.iter().map(|l| l.spec.role).collect();
        let program = Program::new(&roles, height, 1);
        let margin = reach(layers.len(), 0).next_multiple_of(TILE);
        let left = margin + 1;
        let cells = left + width.next_multiple_of(TILE) + margin + 1;
        let step = layers.iter().map(Winograd::input_step).max().unwrap_or(0);
        // An odd number of cache lines: neighbouring rows fall into different sets of the cache.
        let row = 16 * ((cells * step).div_ceil(16) | 1);
        Ok(Self {
            rows: zeros(row * program.slots)?,
            layers,
            program,
            width,
            height,
            channels: student.latent.channels(student.r),
            left,
            row,
            crew: Crew::new(0),
            cuts: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// The blocks of columns that the frame is divided into, each given by its first column and its end: one for each
    /// thread of the current rayon pool.
    pub fn divide(&mut self) -> &[usize] {
        let tiles = self.width.div_ceil(TILE);
        let blocks = rayon::current_num_threads().min(tiles / LEAST_TILES).max(1);
        if self.crew.blocks() != blocks {
            self.crew = Crew::new(blocks);
            self.scratch.resize_with(blocks, Mutex::default);
            let cut = |i: usize| (TILE * (i * tiles / blocks)).min(self.width);
            self.cuts = (0..=blocks).map(cut).collect();
        }
        &self.cuts
    }

    /// Runs the network from `ends` to `ends` on the blocks of the last [`Self::divide`].
    pub fn run(&mut self, ends: &impl Ends) {
        let frame = Frame {
            layers: &self.layers,
            program: &self.program,
            width: self.width,
            height: self.height,
            channels: self.channels,
            left: self.left,
            row: self.row,
            rows: self.rows.as_mut_ptr(),
            cuts: &self.cuts,
        };
        let scratch = &self.scratch;
        self.crew.run(self.program.steps.len(), |block, step| {
            // What a panic left behind is overwritten.
            let mut scratch = scratch[block]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            for op in &frame.program.ops[frame.program.steps[step].clone()] {
                frame.step(op, block, ends, &mut scratch);
            }
        });
    }
}

/// One run.
struct Frame<'a> {
    layers: &'a [Winograd],
    program: &'a Program,
    width: usize,
    height: usize,
    channels: usize,
    left: usize,
    row: usize,
    rows: *mut f32,
    cuts: &'a [usize],
}

// SAFETY: blocks write disjoint columns of the rows, and read columns of their neighbours that no one writes meanwhile:
// what a step writes, no operation of the same step reads, and a neighbour is at the same step.
unsafe impl Sync for Frame<'_> {}

impl Frame<'_> {
    fn step(&self, op: &Op, block: usize, ends: &impl Ends, scratch: &mut Scratch) {
        let x = self.columns(op.stage, block);
        let Some(layer) = op.stage.checked_sub(1).map(|i| &self.layers[i]) else {
            return self.latent(op, block, x, ends, scratch);
        };
        let (step, out_step) = (layer.input_step(), layer.output_step());
        let tiles = x.len() / TILE;
        let around = x.start - 1..x.end + 1;
        // SAFETY: nothing writes these columns of these rows during this step.
        let input = op
            .input
            .map(|slot| unsafe { self.cells(slot, around.clone(), step) });
        if op.stage < self.layers.len() {
            // SAFETY: as above.
            let row = |slot| unsafe { self.cells(slot, x.clone(), out_step) };
            let band = Band {
                input,
                skip: op.skip.map(|slots| slots.map(row)),
                // SAFETY: only this block writes these columns, and nothing reads them during this step.
                output: op
                    .output
                    .map(|slot| unsafe { self.cells_mut(slot, x.clone(), out_step) }),
                out_step,
                tiles,
            };
            layer.run(band, &mut scratch.winograd);
            return self.clear_ends(op, block, &x, out_step);
        }
        let len = x.len() * self.channels;
        scratch.cells.resize(TILE * len, 0.0);
        let mut rows = scratch.cells.chunks_exact_mut(len.max(1));
        let mut row = || rows.next().unwrap_or_default();
        let band = Band {
            input,
            skip: None,
            output: [row(), row(), row(), row()],
            out_step: self.channels,
            tiles,
        };
        layer.run(band, &mut scratch.winograd);
        let x = x.start as usize..self.width.min(x.end as usize);
        for (y, row) in (op.y as usize..self.height).zip(scratch.cells.chunks_exact(len.max(1))) {
            ends.residual(block, y, x.clone(), &row[..x.len() * self.channels]);
        }
    }

    fn latent(
        &self,
        op: &Op,
        block: usize,
        x: Range<isize>,
        ends: &impl Ends,
        scratch: &mut Scratch,
    ) {
        let step = self.layers[0].input_step();
        scratch.cells.resize(x.len() * self.channels, 0.0);
        for (y, &slot) in (op.y..).zip(&op.output) {
            ends.latent(block, y, x.clone(), &mut scratch.cells);
            // SAFETY: only this block writes these columns, and nothing reads them during this step.
            let row = unsafe { self.cells_mut(slot, x.clone(), step) };
            let cells = scratch.cells.chunks_exact(self.channels);
            for (to, from) in row.chunks_exact_mut(step).zip(cells) {
                to[..self.channels].copy_from_slice(from);
            }
        }
        self.clear_ends(op, block, &x, step);
    }

    /// The columns of a stage that a block computes: whole tiles.
    fn columns(&self, stage: usize, block: usize) -> Range<isize> {
        let margin = reach(self.layers.len(), stage).next_multiple_of(TILE) as isize;
        let (first, last) = (block == 0, block + 2 == self.cuts.len());
        let start = if first {
            -margin
        } else {
            self.cuts[block] as isize
        };
        let end = match last {
            true => self.width.next_multiple_of(TILE) as isize + margin,
            false => self.cuts[block + 1] as isize,
        };
        start..end
    }

    /// Zeros beside the first and the last column that are computed: the next layer's tiles reach one column further,
    /// and though no needed output depends on it, what is left there from other rows would change the last bit.
    fn clear_ends(&self, op: &Op, block: usize, x: &Range<isize>, step: usize) {
        for slot in op.output {
            if block == 0 {
                // SAFETY: this column is the first block's.
                unsafe { self.cells_mut(slot, x.start - 1..x.start, step) }.fill(0.0);
            }
            if block + 2 == self.cuts.len() {
                // SAFETY: this column is the last block's.
                unsafe { self.cells_mut(slot, x.end..x.end + 1, step) }.fill(0.0);
            }
        }
    }

    /// The columns `x` of a row of pixels of `step` floats.
    ///
    /// # Safety
    /// Nothing writes them while they are in use.
    unsafe fn cells(&self, slot: Slot, x: Range<isize>, step: usize) -> &[f32] {
        // SAFETY: see `offset`.
        unsafe {
            std::slice::from_raw_parts(self.rows.add(self.offset(slot, &x, step)), x.len() * step)
        }
    }

    /// As [`Self::cells`], to be written.
    ///
    /// # Safety
    /// Nothing else reads or writes them while they are in use.
    #[allow(clippy::mut_from_ref)]
    unsafe fn cells_mut(&self, slot: Slot, x: Range<isize>, step: usize) -> &mut [f32] {
        // SAFETY: see `offset`.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.rows.add(self.offset(slot, &x, step)),
                x.len() * step,
            )
        }
    }

    /// Where the columns `x` of a row begin; they lie in the row's buffer.
    fn offset(&self, slot: Slot, x: &Range<isize>, step: usize) -> usize {
        let start = (x.start + self.left as isize) as usize * step;
        assert!(x.start + self.left as isize >= 0 && start + x.len() * step <= self.row);
        assert!(usize::from(slot) < self.program.slots);
        usize::from(slot) * self.row + start
    }
}

#[cfg(test)]
mod tests {
    use super::{super::grids::Grids, *};
    use crate::{
        model::{Layer, Metadata},
        nn::lite::{LatentStats, StudentConfig, latent::Grid},
    };
    use candle_core::{Device, Tensor};

    /// A model of `student` with weights that keep the signal's size.
    fn model(student: StudentConfig) -> LiteModel {
        let mut state = 1u32;
        let mut values = |n: usize, size: f32| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
            };
            (0..n).map(|_| next()).collect()
        };
        LiteModel {
            metadata: Metadata::lite("test", student, [1.0, 4.0]),
            stats: LatentStats::nominal(student.latent, student.r),
            layers: student
                .layers()
                .into_iter()
                .map(|spec| Layer {
                    weight: values(spec.co * spec.ci * 9, (0.5 / spec.ci as f32).sqrt()),
                    bias: values(spec.co, 0.1),
                    scale: values(spec.co * 2, 0.1),
                    spec,
                })
                .collect(),
        }
    }

    #[test]
    fn the_plan_computes_what_the_trained_network_does() {
        for (student, scale, width, height) in [
            (StudentConfig::tiny(2), 1.5, 13, 9),
            (StudentConfig::tiny(4), 3.0, 37, 21),
            (StudentConfig::small(), 4.0, 24, 16),
        ] {
            let model = model(student);
            let cells = Grid {
                width,
                height,
                channels: student.latent.channels(student.r),
                margin: 0,
            };
            let grid = cells.with_margin(student.layers().len());
            let z: Vec<f32> = (0..grid.len()).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut network = Network::new(&model, scale, width, height).unwrap();
            let mut ours = vec![f32::NAN; cells.len()];
            network.divide();
            network.run(&Grids::new(&z, grid, &mut ours));
            let shape = (1, grid.height, grid.width, grid.channels);
            let z = Tensor::from_vec(z, shape, &Device::Cpu).unwrap();
            let theirs = model.student().unwrap().forward(&z, scale).unwrap();
            let theirs = theirs.narrow(1, grid.margin, height).unwrap();
            let theirs = theirs.narrow(2, grid.margin, width).unwrap();
            let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let size = theirs.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(size > 0.01, "a network that does nothing proves nothing");
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() < 1e-4 * size, "{student:?}: {a}, not {b}");
            }
        }
    }
}
