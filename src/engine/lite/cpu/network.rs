//! A student's layers, fused over bands of rows and spread over blocks of columns.

use std::{
    mem,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    Precision,
    crew::Crew,
    program::{Op, Program, READ, Slot, pool, reach},
};
use crate::{
    Error, Result,
    model::{self, Calibration, LiteModel},
    nn::lite::{Activated, Condition, LEAKY_SLOPE, Role},
    ops::cpu::{
        Isa,
        int8::{Coding, Ends as Codings, Int8, IntBand, IntIsa, IntOutput},
        winograd::{Band, Products, TILE, Winograd},
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
    layers: Vec<Layer>,
    /// Of the latent, where the layers work on codes.
    coding: Option<Coding>,
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

/// A layer, and with it what feature maps hold.
enum Layer {
    /// f32.
    Floats(Winograd),
    /// u8.
    Codes(Int8),
}

/// Row buffers one after the other.
struct Rows {
    /// Bytes from one pixel to the next.
    step: usize,
    /// Bytes in a buffer.
    len: usize,
    /// In floats for the alignment's sake.
    memory: Vec<f32>,
}

impl Rows {
    /// Of `cells` pixels each.
    fn new(count: usize, cells: usize, step: usize) -> Result<Self> {
        // An odd number of cache lines: neighbouring rows fall into different sets of the cache.
        let len = 64 * ((cells * step).div_ceil(64) | 1);
        let memory = zeros(count * len / size_of::<f32>())?;
        Ok(Self { step, len, memory })
    }
}

/// What a block needs for a step.
#[derive(Default)]
struct Scratch {
    /// Rows of the residual.
    residual: Vec<f32>,
    /// A row of the latent on its way to codes.
    latent: Vec<f32>,
    winograd: Vec<f32>,
}

impl Network {
    /// For frames of `width` x `height` cells at `scale`.
    ///
    /// # Errors
    /// [`Error::Memory`] when the feature maps do not fit in memory, [`Error::Setting`] for integers without calibration.
    pub fn new(
        model: &LiteModel,
        scale: f64,
        (width, height): (usize, usize),
        precision: Precision,
    ) -> Result<Self> {
        let student = &model.metadata.student;
        let channels = student.latent.channels(student.r);
        let (layers, coding) = layers(model, scale, precision.resolve(model)?);
        // Of a pixel of the latent and of the feature maps, in bytes.
        let steps = match &layers[0] {
            Layer::Floats(head) => {
                [head.input_step(), head.output_step()].map(|n| n * size_of::<f32>())
            }
            Layer::Codes(head) => [head.input_step(), head.output_step()],
        };
        let roles: Vec<Role> = model.layers.iter().map(|l| l.spec.role).collect();
        let program = Program::new(&roles, height, 1);
        let margin = reach(layers.len(), 0).next_multiple_of(TILE);
        let left = margin + 1;
        let cells = left + width.next_multiple_of(TILE) + margin + 1;
        let rows = |i: usize| Rows::new(program.slots[i], cells, steps[i]);
        Ok(Self {
            rows: [rows(0)?, rows(1)?],
            layers,
            coding,
            program,
            width,
            height,
            channels,
            left,
            crew: Crew::new(0),
            cuts: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Replaces the weights by those of `model`, which has the shape of the one before.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn set_weights(
        &mut self,
        model: &LiteModel,
        scale: f64,
        precision: Precision,
    ) -> Result<()> {
        (self.layers, self.coding) = layers(model, scale, precision.resolve(model)?);
        Ok(())
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
        let rows = rows.map(|rows| (rows.memory.as_mut_ptr().cast(), rows.step, rows.len));
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

/// The layers, and the latent's coding where they compute in integers.
fn layers(model: &LiteModel, scale: f64, precision: Precision) -> (Vec<Layer>, Option<Coding>) {
    match (precision, &model.calibration) {
        (Precision::Int8, Some(calibration)) => {
            let (layers, coding) = integers(model, scale, calibration);
            (layers, Some(coding))
        }
        (Precision::Bf16, _) => (floats(model, scale, Products::Bf16), None),
        _ => (floats(model, scale, Products::F32), None),
    }
}

/// The layers for feature maps of floats.
fn floats(model: &LiteModel, scale: f64, products: Products) -> Vec<Layer> {
    let layer = |layer: &model::Layer| {
        let (weight, bias) = layer.fold(&Condition::at(scale), model.metadata.student.r);
        let (channels, slope) = ([layer.spec.co, layer.spec.ci], slope(layer));
        let isa = Isa::best();
        let layer = Winograd::new(channels, &weight, &bias, slope, products, isa);
        Layer::Floats(layer)
    };
    model.layers.iter().map(layer).collect()
}

/// The layers for feature maps of codes, and the latent's coding.
fn integers(model: &LiteModel, scale: f64, calibration: &Calibration) -> (Vec<Layer>, Coding) {
    // Of the latent and of each layer's output, but for the last.
    let codings: Vec<Coding> = calibration.ranges.iter().map(|r| Coding::new(r)).collect();
    let layer = |(i, layer): (usize, &model::Layer)| {
        let (weight, bias) = layer.fold(&Condition::at(scale), model.metadata.student.r);
        let (channels, slope) = ([layer.spec.co, layer.spec.ci], slope(layer));
        let ends = Codings {
            input: &codings[i],
            output: codings.get(i + 1),
            skip: (layer.spec.role == Role::PairSecond).then(|| &codings[i - 1]),
            first: i == 0,
        };
        let isa = IntIsa::best();
        Layer::Codes(Int8::new(channels, &weight, &bias, slope, ends, isa))
    };
    let layers = model.layers.iter().enumerate().map(layer).collect();
    (layers, codings[0].clone())
}

/// The slope of a layer's leaky ReLU below 0.
pub(super) fn slope(layer: &model::Layer) -> f32 {
    match layer.spec.activated {
        Activated::Leaky => LEAKY_SLOPE,
        Activated::No => 1.0,
    }
}

/// One run.
struct Frame<'a> {
    network: &'a Network,
    /// Of either pool: pointer, bytes from pixel to pixel and from buffer to buffer.
    rows: [(*mut u8, usize, usize); 2],
}

// SAFETY: blocks write disjoint columns of the rows, and read columns of their neighbours that no one writes meanwhile:
// what a step writes, no operation of the same step reads, and a neighbour is at the same step.
unsafe impl Sync for Frame<'_> {}

impl Frame<'_> {
    fn step(&self, op: &Op, block: usize, ends: &impl Ends, scratch: &mut Scratch) {
        let x = self.network.columns(op.stage, block);
        let Some(index) = op.stage.checked_sub(1) else {
            return self.latent(op, block, x, ends, scratch);
        };
        let last = op.stage == self.network.layers.len();
        let len = x.len() * self.network.channels;
        if last {
            scratch.residual.resize(TILE * len, 0.0);
        }
        let mut residual = scratch.residual.chunks_exact_mut(len.max(1));
        let mut residual = || residual.next().unwrap_or_default();
        let tiles = x.len() / TILE;
        // SAFETY: of the rows' columns that are read nothing writes any during this step, and only this block writes
        // those that are written, which nothing reads.
        unsafe {
            match &self.network.layers[index] {
                Layer::Floats(layer) => {
                    let (output, out_step) = match last {
                        true => (op.output.map(|_| residual()), self.network.channels),
                        false => (self.output(op, &x), layer.output_step()),
                    };
                    let band = Band {
                        input: self.input(op, &x),
                        skip: self.skip(op, &x),
                        output,
                        out_step,
                        tiles,
                    };
                    layer.run(band, &mut scratch.winograd);
                }
                Layer::Codes(layer) => layer.run(IntBand {
                    input: self.input(op, &x),
                    skip: self.skip(op, &x),
                    output: match last {
                        true => IntOutput::Values(op.output.map(|_| residual())),
                        false => IntOutput::Codes(self.output(op, &x)),
                    },
                    tiles,
                }),
            }
        }
        if !last {
            return self.clear_ends(op, block, &x);
        }
        let x = x.start as usize..self.network.width.min(x.end as usize);
        let rows = scratch.residual.chunks_exact(len.max(1));
        for (y, row) in (op.y as usize..self.network.height).zip(rows) {
            ends.residual(block, y, x.clone(), &row[..x.len() * self.network.channels]);
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
        let step = self.rows[0].1;
        for (y, &slot) in (op.y..).zip(&op.output) {
            // SAFETY: only this block writes these columns, and nothing reads them during this step.
            unsafe {
                match &self.network.coding {
                    None => {
                        let row = self.cells_mut(0, slot, x.clone());
                        ends.latent(block, y, x.clone(), row, step / size_of::<f32>());
                    }
                    Some(coding) => {
                        scratch.latent.resize(x.len() * step, 0.0);
                        ends.latent(block, y, x.clone(), &mut scratch.latent, step);
                        coding.encode(&scratch.latent, self.cells_mut(0, slot, x.clone()));
                    }
                }
            }
        }
        self.clear_ends(op, block, &x);
    }

    /// Zeros beside the first and the last column that are computed: the next layer's tiles reach one column further,
    /// and though no needed output depends on it, what is left there from other rows would change the last bit.
    fn clear_ends(&self, op: &Op, block: usize, x: &Range<isize>) {
        for slot in op.output {
            if block == 0 {
                // SAFETY: this column is the first block's.
                unsafe { self.cells_mut::<u8>(op.stage, slot, x.start - 1..x.start) }.fill(0);
            }
            if block + 2 == self.network.cuts.len() {
                // SAFETY: this column is the last block's.
                unsafe { self.cells_mut::<u8>(op.stage, slot, x.end..x.end + 1) }.fill(0);
            }
        }
    }

    /// What the columns `x` of an operation read of the stage before, and one column more on both sides.
    ///
    /// # Safety
    /// As of [`Self::cells`].
    unsafe fn input<T: Sample>(&self, op: &Op, x: &Range<isize>) -> [&[T]; READ] {
        let around = x.start - 1..x.end + 1;
        // SAFETY: by the caller's promise.
        op.input
            .map(|slot| unsafe { self.cells(op.stage - 1, slot, around.clone()) })
    }

    /// What is added to the columns `x` of an operation's result.
    ///
    /// # Safety
    /// As of [`Self::cells`].
    unsafe fn skip<T: Sample>(&self, op: &Op, x: &Range<isize>) -> Option<[&[T]; TILE]> {
        // SAFETY: by the caller's promise.
        let row = |slot| unsafe { self.cells(op.stage, slot, x.clone()) };
        op.skip.map(|slots| slots.map(row))
    }

    /// Where the columns `x` of an operation's result go.
    ///
    /// # Safety
    /// As of [`Self::cells_mut`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn output<T: Sample>(&self, op: &Op, x: &Range<isize>) -> [&mut [T]; TILE] {
        // SAFETY: by the caller's promise; an operation's rows are different ones.
        op.output
            .map(|slot| unsafe { self.cells_mut(op.stage, slot, x.clone()) })
    }

    /// The columns `x` of a row of a stage.
    ///
    /// # Safety
    /// Nothing writes them while they are in use.
    unsafe fn cells<T: Sample>(&self, stage: usize, slot: Slot, x: Range<isize>) -> &[T] {
        let (start, len) = self.place(stage, slot, x);
        // SAFETY: by the caller's promise; the memory is initialised, aligned for floats and any bits are a sample.
        unsafe { std::slice::from_raw_parts(start.cast(), len / size_of::<T>()) }
    }

    /// As [`Self::cells`], to be written.
    ///
    /// # Safety
    /// Nothing else reads or writes them while they are in use.
    #[allow(clippy::mut_from_ref)]
    unsafe fn cells_mut<T: Sample>(&self, stage: usize, slot: Slot, x: Range<isize>) -> &mut [T] {
        let (start, len) = self.place(stage, slot, x);
        // SAFETY: as in `cells`.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), len / size_of::<T>()) }
    }

    /// Where the columns `x` of a row begin, and how many bytes they are: all in the row's buffer.
    fn place(&self, stage: usize, slot: Slot, x: Range<isize>) -> (*mut u8, usize) {
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

/// What a feature map holds: f32 or u8.
///
/// # Safety
/// Any bits are a value, and the alignment is at most that of f32; pixels are whole numbers of them.
unsafe trait Sample {}
// SAFETY: as the trait asks.
unsafe impl Sample for f32 {}
// SAFETY: as the trait asks.
unsafe impl Sample for u8 {}
