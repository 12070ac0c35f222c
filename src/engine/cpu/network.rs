//! A student's layers, fused over bands of rows and spread over blocks of columns.

use std::{
    mem,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    crew::Crew,
    program::{Op, Program, Slot, pool, reach},
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
    /// Writes the cells `x` of row `y` of the whitened latent, which may lie outside of the frame, `step` floats from one
    /// to the next.
    fn latent(&self, block: usize, y: isize, x: Range<isize>, out: &mut [f32], step: usize);

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
    /// Row buffers of the latent and of the feature maps.
    rows: [Rows; 2],
    crew: Crew,
    /// First column of each block, and the end of the last.
    cuts: Vec<usize>,
    scratch: Vec<Mutex<Scratch>>,
}

/// Row buffers one after the other.
struct Rows {
    /// Floats from one pixel to the next.
    step: usize,
    /// Floats in a buffer.
    len: usize,
    values: Vec<f32>,
}

impl Rows {
    /// Of `cells` pixels each.
    fn new(count: usize, cells: usize, step: usize) -> Result<Self> {
        // An odd number of cache lines: neighbouring rows fall into different sets of the cache.
        let len = 16 * ((cells * step).div_ceil(16) | 1);
        let values = zeros(count * len)?;
        Ok(Self { step, len, values })
    }
}

/// What a block needs for a step.
#[derive(Default)]
struct Scratch {
    /// Rows of the residual.
    residual: Vec<f32>,
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
        let steps = [layers[0].input_step(), layers[0].output_step()];
        let rows = |i: usize| Rows::new(program.slots[i], cells, steps[i]);
        Ok(Self {
            rows: [rows(0)?, rows(1)?],
            layers,
            program,
            width,
            height,
            channels: student.latent.channels(student.r),
            left,
            crew: Crew::new(0),
            cuts: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Divides the frame into blocks of columns, one for each thread of the current rayon pool; their number.
    pub fn divide(&mut self) -> usize {
        let tiles = self.width.div_ceil(TILE);
        let blocks = rayon::current_num_threads().min(tiles / LEAST_TILES).max(1);
        if self.crew.blocks() != blocks {
            self.crew = Crew::new(blocks);
            self.scratch.resize_with(blocks, Mutex::default);
            let cut = |i: usize| (TILE * (i * tiles / blocks)).min(self.width);
            self.cuts = (0..=blocks).map(cut).collect();
        }
        blocks
    }

    /// The frame's columns that are a block's.
    pub fn cells(&self, block: usize) -> Range<usize> {
        self.cuts[block]..self.cuts[block + 1]
    }

    /// The columns of the latent that are a block's: those and the margin beside them.
    pub fn latent_cells(&self, block: usize) -> Range<isize> {
        self.columns(0, block)
    }

    /// Rows from the top one that waits for its residual to the last one of the latent that has been asked for.
    pub fn rows_in_flight(&self) -> usize {
        reach(self.layers.len(), 0) + 2 * TILE
    }

    /// Runs the network from `ends` to `ends` on the blocks of the last [`Self::divide`].
    pub fn run(&mut self, ends: &impl Ends) {
        let rows = self.rows.each_mut();
        let rows = rows.map(|rows| (rows.values.as_mut_ptr(), rows.step, rows.len));
        let mut crew = mem::take(&mut self.crew);
        let frame = Frame {
            network: self,
            rows,
        };
        let program = &frame.network.program;
        crew.run(program.steps.len(), |block, step| {
            // What a panic left behind is overwritten.
            let scratch = frame.network.scratch[block].lock();
            let scratch = &mut *scratch.unwrap_or_else(PoisonError::into_inner);
            for op in &program.ops[program.steps[step].clone()] {
                frame.step(op, block, ends, scratch);
            }
        });
        self.crew = crew;
    }

    /// Calls `work(block, y, columns)` for each row of each block, without running the network.
    pub fn skip(&mut self, work: impl Fn(usize, usize, Range<usize>) + Sync) {
        let cuts = &self.cuts;
        let row = |block: usize, y| work(block, y, cuts[block]..cuts[block + 1]);
        self.crew.run(self.height, row);
    }

    /// The columns of a stage that a block computes: whole tiles.
    fn columns(&self, stage: usize, block: usize) -> Range<isize> {
        let margin = reach(self.layers.len(), stage).next_multiple_of(TILE) as isize;
        let start = match block {
            0 => -margin,
            _ => self.cuts[block] as isize,
        };
        let end = match block + 2 == self.cuts.len() {
            true => self.width.next_multiple_of(TILE) as isize + margin,
            false => self.cuts[block + 1] as isize,
        };
        start..end
    }
}

/// One run.
struct Frame<'a> {
    network: &'a Network,
    /// Of either pool: pointer, floats from pixel to pixel and from buffer to buffer.
    rows: [(*mut f32, usize, usize); 2],
}

// SAFETY: blocks write disjoint columns of the rows, and read columns of their neighbours that no one writes meanwhile:
// what a step writes, no operation of the same step reads, and a neighbour is at the same step.
unsafe impl Sync for Frame<'_> {}

impl Frame<'_> {
    fn step(&self, op: &Op, block: usize, ends: &impl Ends, scratch: &mut Scratch) {
        let x = self.network.columns(op.stage, block);
        let Some(layer) = op.stage.checked_sub(1).map(|i| &self.network.layers[i]) else {
            return self.latent(op, block, x, ends);
        };
        let tiles = x.len() / TILE;
        let around = x.start - 1..x.end + 1;
        // SAFETY: nothing writes these columns of these rows during this step.
        let input = op
            .input
            .map(|slot| unsafe { self.cells(op.stage - 1, slot, around.clone()) });
        if op.stage < self.network.layers.len() {
            // SAFETY: as above.
            let skip = |slot| unsafe { self.cells(op.stage, slot, x.clone()) };
            // SAFETY: only this block writes these columns, and nothing reads them during this step.
            let output = |slot| unsafe { self.cells_mut(op.stage, slot, x.clone()) };
            let band = Band {
                input,
                skip: op.skip.map(|slots| slots.map(skip)),
                output: op.output.map(output),
                out_step: layer.output_step(),
                tiles,
            };
            layer.run(band, &mut scratch.winograd);
            return self.clear_ends(op, block, &x);
        }
        let len = x.len() * self.network.channels;
        scratch.residual.resize(TILE * len, 0.0);
        let mut rows = scratch.residual.chunks_exact_mut(len.max(1));
        let mut row = || rows.next().unwrap_or_default();
        let band = Band {
            input,
            skip: None,
            output: [row(), row(), row(), row()],
            out_step: self.network.channels,
            tiles,
        };
        layer.run(band, &mut scratch.winograd);
        let x = x.start as usize..self.network.width.min(x.end as usize);
        for (y, row) in
            (op.y as usize..self.network.height).zip(scratch.residual.chunks_exact(len.max(1)))
        {
            ends.residual(block, y, x.clone(), &row[..x.len() * self.network.channels]);
        }
    }

    fn latent(&self, op: &Op, block: usize, x: Range<isize>, ends: &impl Ends) {
        for (y, &slot) in (op.y..).zip(&op.output) {
            // SAFETY: only this block writes these columns, and nothing reads them during this step.
            let row = unsafe { self.cells_mut(0, slot, x.clone()) };
            ends.latent(block, y, x.clone(), row, self.rows[0].1);
        }
        self.clear_ends(op, block, &x);
    }

    /// Zeros beside the first and the last column that are computed: the next layer's tiles reach one column further,
    /// and though no needed output depends on it, what is left there from other rows would change the last bit.
    fn clear_ends(&self, op: &Op, block: usize, x: &Range<isize>) {
        for slot in op.output {
            if block == 0 {
                // SAFETY: this column is the first block's.
                unsafe { self.cells_mut(op.stage, slot, x.start - 1..x.start) }.fill(0.0);
            }
            if block + 2 == self.network.cuts.len() {
                // SAFETY: this column is the last block's.
                unsafe { self.cells_mut(op.stage, slot, x.end..x.end + 1) }.fill(0.0);
            }
        }
    }

    /// The columns `x` of a row of a stage.
    ///
    /// # Safety
    /// Nothing writes them while they are in use.
    unsafe fn cells(&self, stage: usize, slot: Slot, x: Range<isize>) -> &[f32] {
        let (start, len) = self.place(stage, slot, x);
        // SAFETY: by the caller's promise.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// As [`Self::cells`], to be written.
    ///
    /// # Safety
    /// Nothing else reads or writes them while they are in use.
    #[allow(clippy::mut_from_ref)]
    unsafe fn cells_mut(&self, stage: usize, slot: Slot, x: Range<isize>) -> &mut [f32] {
        let (start, len) = self.place(stage, slot, x);
        // SAFETY: by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// Where the columns `x` of a row begin, and how many floats they are: all in the row's buffer.
    fn place(&self, stage: usize, slot: Slot, x: Range<isize>) -> (*mut f32, usize) {
        let (rows, step, row) = self.rows[pool(stage)];
        let (first, len) = (
            (x.start + self.network.left as isize) as usize * step,
            x.len() * step,
        );
        assert!(
            x.start + self.network.left as isize >= 0 && first + len <= row,
            "columns {x:?}"
        );
        assert!(
            usize::from(slot) < self.network.program.slots[pool(stage)],
            "row {slot}"
        );
        // SAFETY: inside of the allocation, as just checked.
        (unsafe { rows.add(usize::from(slot) * row + first) }, len)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::grids::Grids, *};
    use crate::{
        model::{Layer, Metadata},
        nn::lite::{Architecture, LatentKind, LatentStats, StudentConfig, latent::Grid},
        ops::{
            Activation,
            cpu::conv::{ConvShape, reference},
        },
    };
    use proptest::prelude::*;

    fn values(len: usize, size: f32, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
        };
        (0..len).map(|_| next()).collect()
    }

    /// A model of `student` with weights that keep the signal's size.
    fn model(student: StudentConfig, seed: u32) -> LiteModel {
        let layers = student.layers().into_iter().enumerate();
        let layers = layers.map(|(i, spec)| {
            let seed = seed.wrapping_add(3 * i as u32);
            Layer {
                weight: values(spec.co * spec.ci * 9, (0.5 / spec.ci as f32).sqrt(), seed),
                bias: values(spec.co, 0.1, seed + 1),
                scale: values(spec.co * 2, 0.1, seed + 2),
                spec,
            }
        });
        LiteModel {
            metadata: Metadata::lite("test", student, [1.0, 4.0]),
            stats: LatentStats::nominal(student.latent, student.r),
            layers: layers.collect(),
        }
    }

    /// The layers one after the other on the whole grid, by the formula.
    fn by_the_formula(model: &LiteModel, scale: f64, z: &[f32], grid: Grid) -> Vec<f32> {
        let (mut x, mut kept) = (z.to_vec(), Vec::new());
        for layer in &model.layers {
            let spec = &layer.spec;
            let shape = ConvShape {
                n: 1,
                h: grid.height,
                w: grid.width,
                ci: spec.ci,
                co: spec.co,
                kh: 3,
                kw: 3,
                stride: 1,
                pad: 1,
            };
            let activation = match spec.activated {
                Activated::Leaky => Activation::LeakyRelu(LEAKY_SLOPE),
                Activated::No => Activation::None,
            };
            let bias = layer.bias_at(scale, model.metadata.student.r);
            let mut y = reference(&shape, &x, &layer.weight, Some(&bias), activation);
            match spec.role {
                Role::Chain => {}
                Role::PairFirst => kept.clone_from(&x),
                Role::PairSecond => y.iter_mut().zip(&kept).for_each(|(y, x)| *y += x),
            }
            x = y;
        }
        x
    }

    prop_compose! {
        fn students()(
            plain: bool, luma: bool, r in 1usize..5, channels in 1usize..40, depth in 0usize..4,
        ) -> StudentConfig {
            let r = if luma { r } else { r.next_multiple_of(2) };
            StudentConfig {
                architecture: if plain { Architecture::Plain } else { Architecture::Residual },
                latent: if luma { LatentKind::Luma } else { LatentKind::Yuv },
                r,
                channels: channels.min(16 * r * r),
                depth,
            }
        }
    }

    fn run(network: &mut Network, threads: usize, z: &[f32], grid: Grid) -> Vec<f32> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let mut residual = vec![f32::NAN; grid.with_margin(0).len()];
        pool.install(|| {
            network.divide();
            network.run(&Grids::new(z, grid, &mut residual));
        });
        residual
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_network_on_any_grid_computes_the_formula_on_any_number_of_threads(
            student in students(), width in 1usize..50, height in 1usize..24, threads in 2usize..4, seed: u32,
        ) {
            let model = model(student, seed);
            let cells = Grid { width, height, channels: student.latent.channels(student.r), margin: 0 };
            let grid = cells.with_margin(student.layers().len());
            let z = values(grid.len(), 1.0, seed ^ 1);
            let mut network = Network::new(&model, 1.5, width, height).unwrap();
            let one = run(&mut network, 1, &z, grid);
            let many = run(&mut network, threads, &z, grid);
            prop_assert!(one == many, "{threads} threads change the result");
            prop_assert!(one == run(&mut network, 1, &z, grid), "the same again changes the result");

            let want = by_the_formula(&model, 1.5, &z, grid);
            let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let rows = want.chunks_exact(grid.width * grid.channels).skip(grid.margin);
            for (got, want) in one.chunks_exact(width * grid.channels).zip(rows) {
                let want = &want[grid.margin * grid.channels..];
                for (a, b) in got.iter().zip(want) {
                    prop_assert!((a - b).abs() <= 1e-4 * largest, "{a}, not {b}");
                }
            }
        }
    }
}
