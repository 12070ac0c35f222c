//! The plan that goes through a frame row by row: no plane is ever whole in memory but the frame's own.
//!
//! Each block of columns makes the base of its own columns as it is asked for the latent, keeps the rows until their
//! residual comes, and writes the sum to the output. Components that the network does not see are resampled alongside.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    Precision,
    network::{Ends, Network},
    scale,
};
use crate::{
    Result,
    frame::{
        Component::{self, *},
        FrameInfo, FrameMut, FrameRef, PixelFormat, Sink, Source,
        resample::{Kernel, Resampler, Stream},
    },
    model::LiteModel,
    nn::lite::{
        LatentKind,
        latent::{PlaneSlot, chroma_slot, luma_slot},
    },
    ops::cpu::shuffle::{add_shuffled, unshuffle},
};

/// Most components of a format.
const MOST: usize = 4;

pub(super) struct Video {
    network: Network,
    components: Vec<Plan>,
    slots: Vec<Slot>,
    /// Channels of the latent.
    channels: usize,
    mean: Vec<f32>,
    /// One over the standard deviation of the base.
    scale: Vec<f32>,
    residual_std: Vec<f32>,
    /// Strength times that, for the frame at hand.
    gain: Vec<f32>,
    blocks: Vec<Mutex<Block>>,
}

/// A plane of the latent: what it is made of and where it lies.
struct Slot {
    at: PlaneSlot,
    /// Components that its residual is added to, and how much of each is in the plane. None: the plane is 0.
    parts: Vec<(usize, f32)>,
    /// Rows of samples of the plane.
    height: usize,
}

/// A component of the frame.
struct Plan {
    component: Component,
    resampler: Resampler,
    /// The sample where cell n begins is `n * cell / shared`, rounded up, horizontally and vertically.
    cell: usize,
    shared: (usize, usize),
    seen: bool,
}

impl Plan {
    fn width(&self) -> usize {
        self.resampler.horizontal().dst_len()
    }

    fn height(&self) -> usize {
        self.resampler.vertical().dst_len()
    }

    fn columns(&self, cells: &Range<usize>) -> Range<usize> {
        let at = |cell: usize| (cell * self.cell).div_ceil(self.shared.0).min(self.width());
        at(cells.start)..at(cells.end)
    }

    fn rows(&self, cell: usize) -> Range<usize> {
        let at = |cell: usize| {
            (cell * self.cell)
                .div_ceil(self.shared.1)
                .min(self.height())
        };
        at(cell)..at(cell + 1)
    }
}

/// What a block keeps from row to row.
struct Block {
    /// Of each component the columns of the block.
    strips: Vec<Strip>,
    /// `r` rows on their way into cells, a row on its way out, and what is added to it.
    cells: Vec<f32>,
    line: Vec<f32>,
    residual: Vec<f32>,
}

/// Columns of a component's base.
struct Strip {
    stream: Stream,
    columns: Range<usize>,
    /// Samples that repeat the border to the left and to the right of the columns.
    left: usize,
    right: usize,
    /// The latest rows: row y at y modulo `capacity`.
    rows: Vec<f32>,
    capacity: usize,
    /// Rows made so far.
    made: usize,
}

impl Strip {
    fn len(&self) -> usize {
        self.left + self.columns.len() + self.right
    }

    /// Makes the rows up to `y`.
    fn reach(&mut self, y: usize, source: &Source) {
        while self.made <= y && !self.columns.is_empty() {
            let len = self.len();
            let row = &mut self.rows[self.made % self.capacity * len..][..len];
            let (left, rest) = row.split_at_mut(self.left);
            let (inside, right) = rest.split_at_mut(self.columns.len());
            let read = |y: usize, x: Range<usize>, row: &mut [f32]| source.read(y, x, row);
            self.stream.row(self.made, inside, read);
            left.fill(inside[0]);
            right.fill(inside[inside.len() - 1]);
            self.made += 1;
        }
    }

    /// Row `y`, border included; it is one of the last `capacity` that were made.
    fn row(&self, y: usize) -> &[f32] {
        &self.rows[y % self.capacity * self.len()..][..self.len()]
    }

    /// Row `y` without the border.
    fn inside(&self, y: usize) -> &[f32] {
        &self.row(y)[self.left..][..self.columns.len()]
    }
}

impl Video {
    /// Whether the latent of `model` has its planes at the sizes that they have in frames of `format`.
    pub fn serves(model: &LiteModel, format: PixelFormat) -> bool {
        let luma = model.metadata.student.latent == LatentKind::Luma;
        luma || format.chroma_shift() == (1, 1) || format == PixelFormat::Gray8
    }

    pub fn new(
        model: &LiteModel,
        src: &FrameInfo,
        dst: &FrameInfo,
        precision: Precision,
    ) -> Result<Self> {
        let student = &model.metadata.student;
        let (r, stats) = (student.r, &model.stats);
        let plan = |component| -> Result<Plan> {
            let (w, h) = (dst.width, dst.height);
            let (sx, sy) = match component {
                U | V => dst.format.chroma_shift(),
                _ => (0, 0),
            };
            Ok(Plan {
                component,
                resampler: Resampler::for_component(src, component, w, h, Kernel::Bicubic, false)?,
                cell: r,
                shared: (1 << sx, 1 << sy),
                seen: match component {
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

    /// Upscales `src` into `dst`, adding `strength` times the residual.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        self.divide();
        for (gain, std) in self.gain.iter_mut().zip(&self.residual_std) {
            *gain = strength * std;
        }
        let mut sources = [const { None }; MOST];
        for (source, plan) in sources.iter_mut().zip(&self.components) {
            *source = Some(Source::new(src, plan.component)?);
        }
        let Self {
            network,
            components,
            slots,
            ..
        } = self;
        let frame = Frame {
            components,
            slots,
            channels: self.channels,
            whiten: (&self.mean, &self.scale),
            gain: &self.gain,
            blocks: &self.blocks,
            sources,
            sinks: Sink::all(dst),
        };
        match strength > 0.0 {
            true => network.run(&frame),
            false => network.skip(|block, y, x| frame.finish(block, y, x, None)),
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
                strip.made = 0;
            }
        }
    }

    fn block(&self, block: usize) -> Block {
        let (cells, around) = (self.network.cells(block), self.network.latent_cells(block));
        let strip = |plan: &Plan| {
            let columns = plan.columns(&cells);
            let begin = |cell: isize| cell * (plan.cell / plan.shared.0) as isize;
            let (left, right, capacity) = match plan.seen {
                true => (
                    (columns.start as isize - begin(around.start)) as usize,
                    (begin(around.end) - columns.end as isize) as usize,
                    self.network.rows_in_flight() * (plan.cell / plan.shared.1),
                ),
                false => (0, 0, 1),
            };
            Strip {
                stream: Stream::new(&plan.resampler, columns.clone()),
                rows: vec![0.0; (left + columns.len() + right) * capacity],
                columns,
                left,
                right,
                capacity,
                made: 0,
            }
        };
        Block {
            strips: self.components.iter().map(strip).collect(),
            cells: Vec::new(),
            line: Vec::new(),
            residual: Vec::new(),
        }
    }
}

/// The planes of the latent of frames `dst`.
fn slots(dst: &FrameInfo, kind: LatentKind, r: usize, components: &[Plan]) -> Vec<Slot> {
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

/// A frame that is being upscaled.
struct Frame<'a> {
    components: &'a [Plan],
    slots: &'a [Slot],
    channels: usize,
    whiten: (&'a [f32], &'a [f32]),
    gain: &'a [f32],
    blocks: &'a [Mutex<Block>],
    sources: [Option<Source<'a>>; MOST],
    sinks: [Option<Sink<'a>>; MOST],
}

impl Ends for Frame<'_> {
    fn latent(&self, block: usize, y: isize, x: Range<isize>, out: &mut [f32], step: usize) {
        let block = &mut *self.block(block);
        for slot in self.slots {
            let PlaneSlot { channel, r } = slot.at;
            let width = x.len() * r;
            let rows = self.rows(slot, block, y, width);
            let channels = channel..channel + r * r;
            let whiten = (&self.whiten.0[channels.clone()], &self.whiten.1[channels]);
            unshuffle(r, rows, width, whiten, &mut out[channel..], step);
        }
    }

    fn residual(&self, block: usize, y: usize, x: Range<usize>, residual: &[f32]) {
        self.finish(block, y, x, Some(residual));
    }
}

impl Frame<'_> {
    fn block(&self, block: usize) -> MutexGuard<'_, Block> {
        // What a panic left behind is overwritten.
        self.blocks[block]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The `r` rows of a plane of the latent that cell row `y` is made of, `width` samples each.
    fn rows<'b>(&self, slot: &Slot, block: &'b mut Block, y: isize, width: usize) -> &'b [f32] {
        let r = slot.at.r;
        let (top, bottom) = (y * r as isize, slot.height - 1);
        let inside = |row: usize| (top + row as isize).clamp(0, bottom as isize) as usize;
        for &(index, _) in &slot.parts {
            if let Some(source) = &self.sources[index] {
                block.strips[index].reach(inside(r - 1), source);
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

    /// Writes what the cells `x` of row `y` hold of every component.
    fn finish(&self, block: usize, y: usize, x: Range<usize>, residual: Option<&[f32]>) {
        let block = &mut *self.block(block);
        for slot in self.slots.iter().filter(|slot| !slot.parts.is_empty()) {
            let r = slot.at.r;
            for row in 0..r.min(slot.height - y * r) {
                self.finish_row(slot, block, (y, row), x.start * r, residual);
            }
        }
        for (index, plan) in self.components.iter().enumerate().filter(|(_, p)| !p.seen) {
            let (Some(source), Some(sink)) = (&self.sources[index], &self.sinks[index]) else {
                continue;
            };
            let strip = &mut block.strips[index];
            for row in plan.rows(y) {
                strip.reach(row, source);
                // SAFETY: these columns are this block's alone.
                unsafe { sink.write(row, strip.columns.start, strip.inside(row)) };
            }
        }
    }

    /// Writes row `row` of cell row `y` of the components in a plane of the latent, from sample `start` on.
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
        let (line, sum) = (&mut block.line, &mut block.residual);
        if let (Some(cells), true) = (residual, slot.parts.len() > 1) {
            let len = block.strips[slot.parts[0].0].columns.len();
            line.clear();
            line.resize(len, 0.0);
            sum.resize(len, 0.0);
            add_shuffled(r, line, gain, &cells[channel..], self.channels, sum);
        }
        for &(index, _) in &slot.parts {
            let (Some(source), Some(sink)) = (&self.sources[index], &self.sinks[index]) else {
                continue;
            };
            block.strips[index].reach(sample, source);
            let base = block.strips[index].inside(sample);
            line.resize(base.len(), 0.0);
            match residual {
                None => line.copy_from_slice(base),
                Some(cells) if slot.parts.len() == 1 => {
                    add_shuffled(r, base, gain, &cells[channel..], self.channels, line);
                }
                Some(_) => {
                    let both = base.iter().zip(sum.iter());
                    line.iter_mut()
                        .zip(both)
                        .for_each(|(out, (b, s))| *out = b + s);
                }
            }
            // SAFETY: these columns are this block's alone.
            unsafe { sink.write(sample, start, line) };
        }
    }
}
