//! Layers of a student, fused over bands of rows and parallel over blocks of columns.

use std::{
    mem,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    Precision,
    program::{BufferIndex, Op, Program, READ, pool, reach},
    wavefront::Wavefront,
};
use crate::{
    Result,
    frame::zeros,
    kernels::{
        Line,
        cpu::Cpu,
        int8::{self, Int8, IntBand, IntOutput},
        int16::{self, Int16},
        simd::Isa,
        winograd::{self, Band, TILE, Winograd},
    },
    model::{self, Calibration, LiteModel},
    nn::lite::{Activated, Condition, LEAKY_SLOPE, LayerSpec, Role},
};

/// Minimum width of a block of columns in tiles. A narrower one is not worth a thread.
const MIN_TILES: usize = 4;

/// Input and output of a network, row by row. Blocks of columns run in parallel, each from top to
/// bottom.
pub(super) trait NetworkIo: Sync {
    /// Writes the cells `x` of row `y` of the whitened latent to `out`, one every `step` floats.
    /// The cells may lie outside of the frame.
    fn latent(&self, block: usize, y: isize, x: Range<isize>, out: &mut [f32], step: usize);

    /// Takes the cells `x` of row `y` of the whitened residual, without padding. The block has read
    /// all rows of the latent up to `y` plus the number of layers.
    fn residual(&self, block: usize, y: usize, x: Range<usize>, residual: &[f32]);
}

/// Layers of a student with packed weights and the scale folded into the biases, and the buffers
/// for a frame.
pub(super) struct Network {
    layers: Vec<Layer>,
    /// Coding of the latent, if the layers compute in integers.
    coding: Option<Coding>,
    program: Program,
    /// Cells of the frame.
    width: usize,
    height: usize,
    /// Channels of the output.
    channels: usize,
    /// Cells in a row buffer to the left of the frame.
    left: usize,
    /// Row buffers of the latent and of the feature maps.
    rows: [Rows; 2],
    wavefront: Wavefront,
    /// First column of each block, and the end of the last.
    bounds: Vec<usize>,
    scratch: Vec<Mutex<Scratch>>,
}

/// A layer.
enum Layer {
    /// Feature maps of f32.
    Floats(Winograd),
    /// Feature maps of u8 codes.
    Codes(Int8),
    /// Feature maps of i16 codes.
    Words(Int16),
}

/// Coding of the latent, if the layers compute in integers.
enum Coding {
    Codes(int8::Coding),
    Words(int16::Coding),
}

/// Row buffers, one after the other.
struct Rows {
    /// Bytes from one pixel to the next.
    step: usize,
    /// Bytes in a buffer.
    len: usize,
    memory: Vec<Line>,
}

impl Rows {
    /// Allocates `count` buffers of `cells` pixels, each of `step` bytes.
    fn new(count: usize, cells: usize, step: usize) -> Result<Self> {
        // With an odd number of cache lines, neighbouring rows use different sets of the cache.
        let lines = (cells * step).div_ceil(size_of::<Line>()) | 1;
        let memory = zeros(count * lines)?;
        let len = lines * size_of::<Line>();
        Ok(Self { step, len, memory })
    }
}

/// Working memory of a block.
#[derive(Default)]
struct Scratch {
    /// Rows of the residual.
    residual: Vec<f32>,
    /// A row of the latent before it is coded.
    latent: Vec<f32>,
    winograd: Vec<f32>,
}

impl Network {
    /// Prepares `model` for frames of `width` x `height` cells at `scale`.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if the feature maps do not fit in memory, [`crate::Error::Setting`]
    /// for integers without calibration.
    pub fn new(
        model: &LiteModel,
        scale: f64,
        (width, height): (usize, usize),
        precision: Precision,
    ) -> Result<Self> {
        let student = &model.metadata.student;
        let channels = student.outputs();
        let (layers, coding) = layers(model, scale, precision.resolve(model)?);
        // Bytes of a pixel of the latent and of the feature maps.
        let steps = match &layers[0] {
            Layer::Floats(head) => {
                [head.input_step(), head.output_step()].map(|n| n * size_of::<f32>())
            }
            Layer::Codes(head) => [head.input_step(), head.output_step()],
            Layer::Words(head) => {
                [head.input_step(), head.output_step()].map(|n| n * size_of::<i16>())
            }
        };
        let roles: Vec<Role> = model.layers.iter().map(|l| l.spec.role).collect();
        let program = Program::new(&roles, height, 1);
        let margin = reach(layers.len(), 0).next_multiple_of(TILE);
        let left = margin + 1;
        let cells = left + width.next_multiple_of(TILE) + margin + 1;
        let rows = |i: usize| Rows::new(program.buffers[i], cells, steps[i]);
        Ok(Self {
            rows: [rows(0)?, rows(1)?],
            layers,
            coding,
            program,
            width,
            height,
            channels,
            left,
            wavefront: Wavefront::new(0),
            bounds: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Replaces the weights by those of `model`, which has the same shape.
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

    /// Divides the frame into blocks of columns, at most one for each thread of the current rayon
    /// pool. Returns their number.
    pub fn divide(&mut self) -> usize {
        let tiles = self.width.div_ceil(TILE);
        let blocks = rayon::current_num_threads().min(tiles / MIN_TILES).max(1);
        if self.wavefront.blocks() != blocks {
            self.wavefront = Wavefront::new(blocks);
            self.scratch.resize_with(blocks, Mutex::default);
            let bound = |i: usize| (TILE * (i * tiles / blocks)).min(self.width);
            self.bounds = (0..=blocks).map(bound).collect();
        }
        blocks
    }

    /// Returns the columns of the frame that belong to `block`.
    pub fn cells(&self, block: usize) -> Range<usize> {
        self.bounds[block]..self.bounds[block + 1]
    }

    /// Returns the columns of the latent that belong to `block`: those of [`Self::cells`] in whole
    /// tiles, and the margin of the first and the last block.
    pub fn latent_cells(&self, block: usize) -> Range<isize> {
        self.columns(0, block)
    }

    /// Returns the maximum distance in rows from the first that lacks its residual to the last that
    /// the network has read, both included.
    pub fn rows_in_flight(&self) -> usize {
        reach(self.layers.len(), 0) + 2 * TILE
    }

    /// Runs the network on the blocks of the last [`Self::divide`].
    pub fn run(&mut self, io: &impl NetworkIo) {
        let rows = self.rows.each_mut();
        let rows = rows.map(|rows| (rows.memory.as_mut_ptr().cast(), rows.step, rows.len));
        let mut wavefront = mem::take(&mut self.wavefront);
        let pass = Pass {
            network: self,
            rows,
        };
        let program = &pass.network.program;
        wavefront.run(program.steps.len(), |block, step| {
            // Values that a panic left behind are overwritten.
            let scratch = pass.network.scratch[block].lock();
            let scratch = &mut *scratch.unwrap_or_else(PoisonError::into_inner);
            for op in &program.ops[program.steps[step].clone()] {
                pass.step(op, block, io, scratch);
            }
        });
        self.wavefront = wavefront;
    }

    /// Calls `work(block, y, columns)` for each row of each block, without running the network.
    pub fn skip(&mut self, work: impl Fn(usize, usize, Range<usize>) + Sync) {
        let bounds = &self.bounds;
        let row = |block: usize, y| work(block, y, bounds[block]..bounds[block + 1]);
        self.wavefront.run(self.height, row);
    }

    /// Returns the columns of a stage that a block computes, in whole tiles.
    fn columns(&self, stage: usize, block: usize) -> Range<isize> {
        let margin = reach(self.layers.len(), stage).next_multiple_of(TILE) as isize;
        let start = if block == 0 {
            -margin
        } else {
            self.bounds[block] as isize
        };
        let end = if block + 2 == self.bounds.len() {
            self.width.next_multiple_of(TILE) as isize + margin
        } else {
            self.bounds[block + 1] as isize
        };
        start..end
    }
}

/// Returns the layers of `model`, and the coding of the latent if they compute in integers.
fn layers(model: &LiteModel, scale: f64, precision: Precision) -> (Vec<Layer>, Option<Coding>) {
    match (precision, &model.calibration) {
        (Precision::Int8, Some(calibration)) => {
            let (layers, coding) = codes(model, scale, calibration);
            (layers, Some(Coding::Codes(coding)))
        }
        (Precision::Int16, Some(calibration)) => {
            let (layers, coding) = words(model, scale, calibration);
            (layers, Some(Coding::Words(coding)))
        }
        (Precision::Bf16, _) => (
            floats(model, scale, winograd::Variant::bf16(&Cpu::get())),
            None,
        ),
        _ => (
            floats(model, scale, winograd::Variant::f32(&Cpu::get())),
            None,
        ),
    }
}

/// Returns the layers for feature maps of floats.
fn floats(model: &LiteModel, scale: f64, variant: winograd::Variant) -> Vec<Layer> {
    let layer = |_, spec: &LayerSpec, weight: &[f32], bias: &[f32], slope: f32| {
        Layer::Floats(Winograd::new(
            [spec.co, spec.ci],
            weight,
            bias,
            slope,
            variant,
        ))
    };
    folded(model, scale, layer)
}

/// Returns the layers for feature maps of u8 codes, and the coding of the latent.
fn codes(model: &LiteModel, scale: f64, calibration: &Calibration) -> (Vec<Layer>, int8::Coding) {
    let variant = int8::Variant::of(&Cpu::get());
    let codings = codings(calibration, int8::Coding::new);
    let layer = |i: usize, spec: &LayerSpec, weight: &[f32], bias: &[f32], slope: f32| {
        let ends = int8::Ends {
            input: &codings[i],
            output: codings.get(i + 1),
            skip: (spec.role == Role::PairSecond).then(|| &codings[i - 1]),
            first: i == 0,
        };
        Layer::Codes(Int8::new(
            [spec.co, spec.ci],
            weight,
            bias,
            slope,
            ends,
            variant,
        ))
    };
    (folded(model, scale, layer), codings[0].clone())
}

/// Returns the layers for feature maps of i16 codes, and the coding of the latent.
fn words(model: &LiteModel, scale: f64, calibration: &Calibration) -> (Vec<Layer>, int16::Coding) {
    let variant = int16::Variant::of(&Cpu::get());
    let codings = codings(calibration, int16::Coding::new);
    let layer = |i: usize, spec: &LayerSpec, weight: &[f32], bias: &[f32], slope: f32| {
        let ends = int16::Ends {
            input: &codings[i],
            output: codings.get(i + 1),
            skip: (spec.role == Role::PairSecond).then(|| &codings[i - 1]),
        };
        Layer::Words(Int16::new(
            [spec.co, spec.ci],
            weight,
            bias,
            slope,
            ends,
            variant,
        ))
    };
    (folded(model, scale, layer), codings[0].clone())
}

/// Returns the codings of the latent and of the output of each layer but the last.
fn codings<C>(calibration: &Calibration, coding: impl Fn(&[[f32; 3]]) -> C) -> Vec<C> {
    calibration.ranges.iter().map(|r| coding(r)).collect()
}

/// Calls `layer` for each layer with its index, weights, bias and slope.
fn folded(
    model: &LiteModel,
    scale: f64,
    layer: impl Fn(usize, &LayerSpec, &[f32], &[f32], f32) -> Layer,
) -> Vec<Layer> {
    let fold = |(i, l): (usize, &model::Layer)| {
        let (weight, bias) = l.fold(&Condition::at(scale), model.metadata.student.r);
        layer(i, &l.spec, &weight, &bias, slope(l))
    };
    model.layers.iter().enumerate().map(fold).collect()
}

/// Returns the slope below 0 of a layer's activation.
pub(super) fn slope(layer: &model::Layer) -> f32 {
    match layer.spec.activated {
        Activated::Leaky => LEAKY_SLOPE,
        Activated::No => 1.0,
    }
}

/// A pass of a frame through the network.
struct Pass<'a> {
    network: &'a Network,
    /// Row buffers of each pool: pointer, bytes from pixel to pixel and from buffer to buffer.
    rows: [(*mut u8, usize, usize); 2],
}

// SAFETY: blocks write disjoint columns. They read columns of their neighbours, which are at the
// same step, and no operation of a step reads what another one of the same step writes.
unsafe impl Sync for Pass<'_> {}

impl Pass<'_> {
    /// Runs an operation on the columns of `block`.
    fn step(&self, op: &Op, block: usize, io: &impl NetworkIo, scratch: &mut Scratch) {
        let x = self.network.columns(op.stage, block);
        let Some(index) = op.stage.checked_sub(1) else {
            return self.latent(op, block, x, io, scratch);
        };
        let last = op.stage == self.network.layers.len();
        let len = x.len() * self.network.channels;
        if last {
            scratch.residual.resize(TILE * len, 0.0);
        }
        let mut residual = scratch.residual.chunks_exact_mut(len.max(1));
        let mut residual = || residual.next().unwrap_or_default();
        let tiles = x.len() / TILE;
        // SAFETY: nothing writes the columns that are read during this step. Only this block writes
        // the columns that are written, and nothing reads them.
        unsafe {
            match &self.network.layers[index] {
                Layer::Floats(layer) => {
                    let (output, out_step) = if last {
                        (op.output.map(|_| residual()), self.network.channels)
                    } else {
                        (self.output(op, &x), layer.output_step())
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
                Layer::Codes(layer) => {
                    let values = last.then(|| op.output.map(|_| residual()));
                    layer.run(self.band(op, &x, values));
                }
                Layer::Words(layer) => {
                    let values = last.then(|| op.output.map(|_| residual()));
                    layer.run(self.band(op, &x, values), &mut scratch.winograd);
                }
            }
        }
        if !last {
            return self.clear_ends(op, block, &x);
        }
        let x = x.start as usize..self.network.width.min(x.end as usize);
        let rows = scratch.residual.chunks_exact(len.max(1));
        for (y, row) in (op.y as usize..self.network.height).zip(rows) {
            io.residual(block, y, x.clone(), &row[..x.len() * self.network.channels]);
        }
    }

    /// Reads the rows of the latent of an operation.
    fn latent(
        &self,
        op: &Op,
        block: usize,
        x: Range<isize>,
        io: &impl NetworkIo,
        scratch: &mut Scratch,
    ) {
        for (y, &buffer) in (op.y..).zip(&op.output) {
            let read = |row: &mut [f32], step| io.latent(block, y, x.clone(), row, step);
            // SAFETY: only this block writes these columns, and nothing reads them during this
            // step.
            unsafe {
                match &self.network.coding {
                    None => {
                        let row = self.cells_mut(0, buffer, x.clone());
                        read(row, self.rows[0].1 / size_of::<f32>());
                    }
                    Some(Coding::Codes(coding)) => {
                        let codes = self.cells_mut::<u8>(0, buffer, x.clone());
                        let values = &mut scratch.latent;
                        read_into(values, codes.len(), x.len(), read);
                        coding.encode(values, codes, Isa::best());
                    }
                    Some(Coding::Words(coding)) => {
                        let codes = self.cells_mut::<i16>(0, buffer, x.clone());
                        let values = &mut scratch.latent;
                        read_into(values, codes.len(), x.len(), read);
                        coding.encode(values, codes, Isa::best());
                    }
                }
            }
        }
        self.clear_ends(op, block, &x);
    }

    /// Writes zeros beside the first and the last computed column. The tiles of the next layer read
    /// one column more. No needed output depends on it, but values left there by other rows would
    /// change the last bit.
    fn clear_ends(&self, op: &Op, block: usize, x: &Range<isize>) {
        for buffer in op.output {
            if block == 0 {
                // SAFETY: this column belongs to the first block.
                unsafe { self.cells_mut::<u8>(op.stage, buffer, x.start - 1..x.start) }.fill(0);
            }
            if block + 2 == self.network.bounds.len() {
                // SAFETY: this column belongs to the last block.
                unsafe { self.cells_mut::<u8>(op.stage, buffer, x.end..x.end + 1) }.fill(0);
            }
        }
    }

    /// Returns the band of codes of an operation. `values` are the rows of its result if it is that
    /// of the last layer.
    ///
    /// # Safety
    /// As [`Self::cells`] and [`Self::cells_mut`].
    unsafe fn band<'a, T: Sample>(
        &'a self,
        op: &Op,
        x: &Range<isize>,
        values: Option<[&'a mut [f32]; TILE]>,
    ) -> IntBand<'a, T> {
        // SAFETY: as the caller promises.
        unsafe {
            IntBand {
                input: self.input(op, x),
                skip: self.skip(op, x),
                output: match values {
                    Some(values) => IntOutput::Values(values),
                    None => IntOutput::Codes(self.output(op, x)),
                },
                tiles: x.len() / TILE,
            }
        }
    }

    /// Returns the columns `x` of an operation's input, with one more on both sides.
    ///
    /// # Safety
    /// As [`Self::cells`].
    unsafe fn input<T: Sample>(&self, op: &Op, x: &Range<isize>) -> [&[T]; READ] {
        let around = x.start - 1..x.end + 1;
        // SAFETY: as the caller promises.
        op.input
            .map(|buffer| unsafe { self.cells(op.stage - 1, buffer, around.clone()) })
    }

    /// Returns the columns `x` of the rows that are added to an operation's result.
    ///
    /// # Safety
    /// As [`Self::cells`].
    unsafe fn skip<T: Sample>(&self, op: &Op, x: &Range<isize>) -> Option<[&[T]; TILE]> {
        // SAFETY: as the caller promises.
        let row = |buffer| unsafe { self.cells(op.stage, buffer, x.clone()) };
        op.skip.map(|buffers| buffers.map(row))
    }

    /// Returns the columns `x` of an operation's result.
    ///
    /// # Safety
    /// As [`Self::cells_mut`].
    #[allow(clippy::mut_from_ref)]
    unsafe fn output<T: Sample>(&self, op: &Op, x: &Range<isize>) -> [&mut [T]; TILE] {
        // SAFETY: as the caller promises; the rows of an operation are in different buffers.
        op.output
            .map(|buffer| unsafe { self.cells_mut(op.stage, buffer, x.clone()) })
    }

    /// Returns the columns `x` of a row of a stage.
    ///
    /// # Safety
    /// Nothing writes them while the slice lives.
    unsafe fn cells<T: Sample>(&self, stage: usize, buffer: BufferIndex, x: Range<isize>) -> &[T] {
        let (start, len) = self.span(stage, buffer, x);
        // SAFETY: as the caller promises. The memory is initialised and aligned, and any bits are a
        // sample.
        unsafe { std::slice::from_raw_parts(start.cast(), len / size_of::<T>()) }
    }

    /// As [`Self::cells`], for writing.
    ///
    /// # Safety
    /// Nothing else reads or writes them while the slice lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn cells_mut<T: Sample>(
        &self,
        stage: usize,
        buffer: BufferIndex,
        x: Range<isize>,
    ) -> &mut [T] {
        let (start, len) = self.span(stage, buffer, x);
        // SAFETY: as in `cells`.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), len / size_of::<T>()) }
    }

    /// Returns the address and length in bytes of the columns `x` of a row.
    ///
    /// # Panics
    /// If the columns lie outside of the row's buffer.
    fn span(&self, stage: usize, buffer: BufferIndex, x: Range<isize>) -> (*mut u8, usize) {
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
            usize::from(buffer) < self.network.program.buffers[pool(stage)],
            "buffer {buffer}"
        );
        // SAFETY: the range is inside of the allocation, as just checked.
        (unsafe { rows.add(usize::from(buffer) * row + first) }, len)
    }
}

/// Fills `values` with `len` values of `cells` cells that `read` writes, given their distance.
fn read_into(
    values: &mut Vec<f32>,
    len: usize,
    cells: usize,
    read: impl FnOnce(&mut [f32], usize),
) {
    values.resize(len, 0.0);
    read(values, len / cells.max(1));
}

/// Value of a feature map: f32, u8 or i16.
///
/// # Safety
/// Any bits are a value, the alignment is at most that of f32, and the size divides that of a
/// pixel.
unsafe trait Sample {}
// SAFETY: as the trait requires.
unsafe impl Sample for f32 {}
// SAFETY: as the trait requires.
unsafe impl Sample for u8 {}
// SAFETY: as the trait requires.
unsafe impl Sample for i16 {}
