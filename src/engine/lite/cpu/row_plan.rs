//! Plan that processes a frame row by row, without whole planes in memory besides those of the
//! frame.
//!
//! When the network reads a row of the latent, each block of columns computes the rows of the base
//! that it needs. It retains them until the network writes their residual, and then writes the sum
//! to the output. Components that the network does not see are resampled at the same time.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    Past, Precision,
    memory::Scratch,
    network::{Network, NetworkIo},
    scale,
};
use crate::{
    Result,
    frame::{
        Component::{self, *},
        FrameInfo, FrameMut, FrameRef, PixelFormat, Sink, Source,
        resample::{Kernel, Resampler, Stream},
    },
    kernels::{
        shuffle::{add_shuffled, unshuffle},
        simd::Isa,
    },
    model::LiteModel,
    nn::lite::{
        LatentKind,
        latent::{PlaneSlot, chroma_slot, luma_slot},
    },
};

/// Maximum number of components of a format.
const MAX_COMPONENTS: usize = 4;

pub(super) struct RowPlan {
    network: Network,
    components: Vec<ComponentPlan>,
    slots: Vec<Slot>,
    /// Channels of the latent.
    channels: usize,
    mean: Vec<f32>,
    /// Reciprocal of the standard deviation of the base.
    scale: Vec<f32>,
    residual_std: Vec<f32>,
    /// Strength of the current frame times `residual_std`.
    gain: Vec<f32>,
    blocks: Vec<Mutex<Block>>,
}

/// A plane of the latent: its position and its components.
struct Slot {
    at: PlaneSlot,
    /// Indices of the components that the residual is added to, and their shares in the plane. The
    /// plane is 0 without any.
    parts: Vec<(usize, f32)>,
    /// Rows of samples of the plane.
    height: usize,
}

/// A component of the frame.
struct ComponentPlan {
    component: Component,
    resampler: Resampler,
    /// Cell n begins at sample `n * cell / subsampling`, rounded up.
    cell: usize,
    /// Horizontal and vertical subsampling.
    subsampling: (usize, usize),
    /// True if the component is part of the latent.
    in_latent: bool,
}

impl ComponentPlan {
    fn width(&self) -> usize {
        self.resampler.horizontal().dst_len()
    }

    fn height(&self) -> usize {
        self.resampler.vertical().dst_len()
    }

    /// Returns the samples of a row in the columns `cells`.
    fn columns(&self, cells: &Range<usize>) -> Range<usize> {
        let at = |cell: usize| {
            (cell * self.cell)
                .div_ceil(self.subsampling.0)
                .min(self.width())
        };
        at(cells.start)..at(cells.end)
    }

    /// Returns the rows of samples in the row `cell` of cells.
    fn rows(&self, cell: usize) -> Range<usize> {
        let at = |cell: usize| {
            (cell * self.cell)
                .div_ceil(self.subsampling.1)
                .min(self.height())
        };
        at(cell)..at(cell + 1)
    }
}

/// State of a block of columns.
struct Block {
    /// The columns of each component.
    strips: Vec<Strip>,
    /// `r` rows of samples that become a row of cells.
    cells: Vec<f32>,
    /// A row of the output.
    line: Vec<f32>,
    /// The residual of that row.
    residual: Vec<f32>,
    /// Luma of that row of R, G and B.
    luma: Vec<f32>,
    memory: Scratch,
}

/// Columns of a component's base.
struct Strip {
    stream: Stream,
    columns: Range<usize>,
    /// Samples to the left and to the right of the columns, which repeat the border.
    left: usize,
    right: usize,
    /// The latest rows; row y is at y modulo `capacity`.
    rows: Vec<f32>,
    capacity: usize,
    /// Number of rows computed so far.
    computed: usize,
}

impl Strip {
    fn len(&self) -> usize {
        self.left + self.columns.len() + self.right
    }

    /// Computes the rows up to `y`.
    fn advance_to(&mut self, y: usize, source: &Source) {
        while self.computed <= y && !self.columns.is_empty() {
            let len = self.len();
            let row = &mut self.rows[self.computed % self.capacity * len..][..len];
            let (left, rest) = row.split_at_mut(self.left);
            let (inside, right) = rest.split_at_mut(self.columns.len());
            let read = |y: usize, x: Range<usize>, row: &mut [f32]| source.read(y, x, row);
            self.stream.row(self.computed, inside, read);
            left.fill(inside[0]);
            right.fill(inside[inside.len() - 1]);
            self.computed += 1;
        }
    }

    /// Returns row `y` with the border. It is one of the latest `capacity` rows.
    fn row(&self, y: usize) -> &[f32] {
        &self.rows[y % self.capacity * self.len()..][..self.len()]
    }

    /// Returns row `y` without the border.
    fn inside(&self, y: usize) -> &[f32] {
        &self.row(y)[self.left..][..self.columns.len()]
    }
}

impl RowPlan {
    /// Returns `true` if the planes in the latent of `model` have the sizes of those in frames of
    /// `format`, and blocks of columns have no byte in common.
    pub fn serves(model: &LiteModel, format: PixelFormat) -> bool {
        let student = &model.metadata.student;
        let sizes = student.latent == LatentKind::Luma
            || format.chroma_shift() == (1, 1)
            || format.is_gray();
        // Cells of odd width divide groups of two pixels.
        sizes && !(format.is_packed_subsampled() && student.r % 2 == 1)
    }

    pub fn new(
        model: &LiteModel,
        src: &FrameInfo,
        dst: &FrameInfo,
        precision: Precision,
    ) -> Result<Self> {
        let student = &model.metadata.student;
        let (r, stats) = (student.r, &model.stats);
        let plan = |component| -> Result<ComponentPlan> {
            let (w, h) = (dst.width, dst.height);
            let (sx, sy) = match component {
                U | V => dst.format.chroma_shift(),
                _ => (0, 0),
            };
            Ok(ComponentPlan {
                component,
                resampler: Resampler::for_component(src, component, w, h, Kernel::Bicubic, false)?,
                cell: r,
                subsampling: (1 << sx, 1 << sy),
                in_latent: match component {
                    Y | R | G | B => true,
                    U | V => student.latent == LatentKind::Yuv,
                    A => false,
                },
            })
        };
        let components = dst.format.components().iter().map(|c| plan(c.component));
        let components = components.collect::<Result<Vec<_>>>()?;
        let (width, height) = (dst.width.div_ceil(r), dst.height.div_ceil(r));
        Ok(Self {
            network: Network::new(model, scale(src, dst), (width, height), precision)?,
            slots: slots(dst, student.latent, r, &components),
            components,
            channels: stats.input_mean.len(),
            mean: stats.input_mean.clone(),
            scale: stats.input_std.iter().map(|std| 1.0 / std).collect(),
            residual_std: stats.residual_std.clone(),
            gain: stats.residual_std.clone(),
            blocks: Vec::new(),
        })
    }

    pub fn network_mut(&mut self) -> &mut Network {
        &mut self.network
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual. If that is above
    /// 0, `past` takes part.
    pub fn run(
        &mut self,
        src: &FrameRef,
        dst: &mut FrameMut,
        strength: f32,
        past: &Past,
    ) -> Result<()> {
        self.divide();
        for (gain, std) in self.gain.iter_mut().zip(&self.residual_std) {
            *gain = strength * std;
        }
        let mut sources = [const { None }; MAX_COMPONENTS];
        for (source, plan) in sources.iter_mut().zip(&self.components) {
            *source = Some(Source::new(src, plan.component)?);
        }
        let Self {
            network,
            components,
            slots,
            ..
        } = self;
        let io = FrameIo {
            components,
            slots,
            channels: self.channels,
            whiten: (&self.mean, &self.scale),
            gain: &self.gain,
            past,
            blocks: &self.blocks,
            sources,
            sinks: Sink::all(dst),
        };
        if strength > 0.0 {
            network.run(&io);
        } else {
            network.skip(|block, y, x| io.finish(block, y, x, None));
        }
        Ok(())
    }

    /// Prepares the blocks of columns for the current rayon pool.
    fn divide(&mut self) {
        let count = self.network.divide();
        if self.blocks.len() != count {
            self.blocks = (0..count).map(|b| Mutex::new(self.block(b))).collect();
        }
        for block in &mut self.blocks {
            for strip in &mut block
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner)
                .strips
            {
                strip.stream.restart();
                strip.computed = 0;
            }
        }
    }

    fn block(&self, block: usize) -> Block {
        let (cells, around) = (self.network.cells(block), self.network.latent_cells(block));
        let strip = |plan: &ComponentPlan| {
            let columns = plan.columns(&cells);
            let begin = |cell: isize| cell * (plan.cell / plan.subsampling.0) as isize;
            let (left, right, capacity) = if plan.in_latent {
                (
                    (columns.start as isize - begin(around.start)) as usize,
                    (begin(around.end) - columns.end as isize) as usize,
                    self.network.rows_in_flight() * (plan.cell / plan.subsampling.1),
                )
            } else {
                (0, 0, 1)
            };
            Strip {
                stream: Stream::new(&plan.resampler, columns.clone()),
                rows: vec![0.0; (left + columns.len() + right) * capacity],
                columns,
                left,
                right,
                capacity,
                computed: 0,
            }
        };
        Block {
            strips: self.components.iter().map(strip).collect(),
            cells: Vec::new(),
            line: Vec::new(),
            residual: Vec::new(),
            luma: Vec::new(),
            memory: Scratch::default(),
        }
    }
}

/// Returns the planes of the latent of frames `dst`.
fn slots(dst: &FrameInfo, kind: LatentKind, r: usize, components: &[ComponentPlan]) -> Vec<Slot> {
    let find = |c: Component| components.iter().position(|p| p.component == c);
    let rgb = || {
        let weights = dst.colorimetry.matrix.luma_weights();
        let weights: [f32; 3] = weights.into();
        let parts = [R, G, B].map(find).into_iter().zip(weights);
        parts
            .filter_map(|(index, weight)| Some((index?, weight)))
            .collect()
    };
    let one = |c: Component| Some(vec![(find(c)?, 1.0)]);
    let mut slots = vec![Slot {
        at: luma_slot(r),
        parts: one(Y).unwrap_or_else(rgb),
        height: dst.height,
    }];
    if kind == LatentKind::Yuv {
        slots.extend(
            [U, V]
                .into_iter()
                .enumerate()
                .map(|(which, component)| Slot {
                    at: chroma_slot(r, which),
                    // Grey video has neutral chroma.
                    parts: one(component).unwrap_or_default(),
                    height: dst.height.div_ceil(2),
                }),
        );
    }
    slots
}

/// A frame that is upscaled, as input and output of the network.
struct FrameIo<'a> {
    components: &'a [ComponentPlan],
    slots: &'a [Slot],
    channels: usize,
    whiten: (&'a [f32], &'a [f32]),
    gain: &'a [f32],
    past: &'a Past<'a>,
    blocks: &'a [Mutex<Block>],
    sources: [Option<Source<'a>>; MAX_COMPONENTS],
    sinks: [Option<Sink<'a>>; MAX_COMPONENTS],
}

impl NetworkIo for FrameIo<'_> {
    fn latent(&self, block: usize, y: isize, x: Range<isize>, out: &mut [f32], step: usize) {
        let block = &mut *self.block(block);
        let mut scratch = std::mem::take(&mut block.memory);
        for slot in self.slots {
            let PlaneSlot { channel, r } = slot.at;
            let width = x.len() * r;
            let rows = self.rows(slot, block, y, width);
            if let Past::Memory(recall) = self.past {
                // SAFETY: only this block does so for these columns.
                unsafe { recall.inputs(y, x.clone(), rows, out, step, &mut scratch) };
            }
            let channels = channel..channel + r * r;
            let whiten = (&self.whiten.0[channels.clone()], &self.whiten.1[channels]);
            unshuffle(
                Isa::best(),
                r,
                rows,
                width,
                whiten,
                &mut out[channel..],
                step,
            );
        }
        block.memory = scratch;
    }

    fn residual(&self, block: usize, y: usize, x: Range<usize>, residual: &[f32]) {
        let Past::Memory(recall) = self.past else {
            return self.finish(block, y, x, Some(residual));
        };
        let mut scratch = std::mem::take(&mut self.block(block).memory);
        // SAFETY: only this block does so for these columns.
        let residual = unsafe { recall.outputs(y, &x, residual, &mut scratch) };
        self.finish(block, y, x, Some(residual));
        self.block(block).memory = scratch;
    }
}

impl FrameIo<'_> {
    fn block(&self, block: usize) -> MutexGuard<'_, Block> {
        // Values that a panic left behind are overwritten.
        self.blocks[block]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the `r` rows of samples, `width` each, in row `y` of a latent plane's cells.
    fn rows<'b>(&self, slot: &Slot, block: &'b mut Block, y: isize, width: usize) -> &'b [f32] {
        let r = slot.at.r;
        let (top, bottom) = (y * r as isize, slot.height - 1);
        let inside = |row: usize| (top + row as isize).clamp(0, bottom as isize) as usize;
        for &(index, _) in &slot.parts {
            if let Some(source) = &self.sources[index] {
                block.strips[index].advance_to(inside(r - 1), source);
            }
        }
        let whole = top >= 0 && inside(r - 1) - inside(0) == r - 1;
        if let ([(index, _)], true) = (&slot.parts[..], whole) {
            let strip = &block.strips[*index];
            return &strip.rows[inside(0) % strip.capacity * width..][..r * width];
        }
        block.cells.clear();
        block.cells.resize(r * width, 0.0);
        for (row, out) in block.cells.chunks_exact_mut(width).enumerate() {
            for &(index, weight) in &slot.parts {
                let row = block.strips[index].row(inside(row));
                out.iter_mut()
                    .zip(row)
                    .for_each(|(out, v)| *out += weight * v);
            }
        }
        &block.cells
    }

    /// Writes the samples of every component in the cells `x` of row `y`.
    fn finish(&self, block: usize, y: usize, x: Range<usize>, residual: Option<&[f32]>) {
        let block = &mut *self.block(block);
        for slot in self.slots.iter().filter(|slot| !slot.parts.is_empty()) {
            let r = slot.at.r;
            for row in 0..r.min(slot.height - y * r) {
                self.finish_row(slot, block, (y, row), x.start * r, residual);
            }
        }
        for (index, plan) in self
            .components
            .iter()
            .enumerate()
            .filter(|(_, p)| !p.in_latent)
        {
            let (Some(source), Some(sink)) = (&self.sources[index], &self.sinks[index]) else {
                continue;
            };
            let strip = &mut block.strips[index];
            for row in plan.rows(y) {
                strip.advance_to(row, source);
                // SAFETY: only this block writes these columns.
                unsafe { sink.write(row, strip.columns.start, strip.inside(row)) };
            }
        }
    }

    /// Writes row `row` in row `y` of cells, from sample `start` on, of the components in a plane
    /// of the latent.
    fn finish_row(
        &self,
        slot: &Slot,
        block: &mut Block,
        (y, row): (usize, usize),
        start: usize,
        residual: Option<&[f32]>,
    ) {
        let PlaneSlot { channel, r } = slot.at;
        let (sample, channel) = (y * r + row, channel + row * r);
        let gain = &self.gain[channel..channel + r];
        let past = if slot.at.channel == 0 {
            self.past
        } else {
            &Past::None
        };
        let (line, sum) = (&mut block.line, &mut block.residual);
        if let (Some(cells), true) = (residual, slot.parts.len() > 1) {
            let len = block.strips[slot.parts[0].0].columns.len();
            line.clear();
            line.resize(len, 0.0);
            sum.resize(len, 0.0);
            add_shuffled(
                Isa::best(),
                r,
                line,
                gain,
                &cells[channel..],
                self.channels,
                sum,
            );
            if !matches!(past, Past::None) {
                let luma = &mut block.luma;
                luma.clone_from(sum);
                for &(index, weight) in &slot.parts {
                    let base = block.strips[index].inside(sample);
                    let samples = luma.iter_mut().zip(base);
                    samples.for_each(|(v, b)| *v += weight * b);
                }
                let base = luma.iter().zip(sum.iter()).map(|(v, s)| v - s);
                // SAFETY: only this block does so for these columns.
                unsafe {
                    match past {
                        Past::None => {}
                        Past::Memory(recall) => recall.store(sample, start, luma, base),
                        Past::Filter(filter) => {
                            filter.apply_to_residual(sample, start, luma, sum, line);
                        }
                    }
                }
            }
        }
        for &(index, _) in &slot.parts {
            let (Some(source), Some(sink)) = (&self.sources[index], &self.sinks[index]) else {
                continue;
            };
            block.strips[index].advance_to(sample, source);
            let base = block.strips[index].inside(sample);
            line.resize(base.len(), 0.0);
            match residual {
                None => line.copy_from_slice(base),
                Some(cells) if slot.parts.len() == 1 => {
                    add_shuffled(
                        Isa::best(),
                        r,
                        base,
                        gain,
                        &cells[channel..],
                        self.channels,
                        line,
                    );
                    // SAFETY: only this block does so for these columns.
                    unsafe {
                        match past {
                            Past::None => {}
                            Past::Memory(recall) => {
                                recall.store(sample, start, line, base.iter().copied());
                            }
                            Past::Filter(filter) => filter.apply(sample, start, line),
                        }
                    }
                }
                Some(_) => {
                    let both = base.iter().zip(sum.iter());
                    line.iter_mut()
                        .zip(both)
                        .for_each(|(out, (b, s))| *out = b + s);
                }
            }
            // SAFETY: only this block writes these columns.
            unsafe { sink.write(sample, start, line) };
        }
    }
}
