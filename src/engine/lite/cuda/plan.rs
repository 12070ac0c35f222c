//! Plan of a model for frames of one size, independent of a device: layout of the memory, constants
//! and bands.

use std::sync::Arc;

use half::f16;

use super::{
    params::{Component, NO_FILLER, NO_SLOT, Samples, Slot, Source},
    tiles,
};
use crate::{
    Result,
    cuda::{
        driver::{Address, Driver, HostRows, Rows},
        pinned_rows,
    },
    engine::lite::{chroma, cpu},
    frame::{
        Component::{self as Kind, *},
        ComponentLayout, FrameInfo, FrameMut, FrameRef, PixelFormat, Quant,
        resample::{Axis, Kernel, Resampler},
    },
    model::LiteModel,
    nn::lite::{
        Activated, Condition, LEAKY_SLOPE, LatentKind, Role,
        latent::{chroma_slot, luma_slot},
    },
};

/// Channels of a matrix instruction. Channels are padded with zeros to a multiple.
const CHANNELS: usize = 16;
/// Channels of the latent of a luma network with cells of 2 x 2 samples. It has no padding:
/// kernels of their own read and write it.
pub(super) const FEW: usize = 4;
/// Minimum number of output channels that weights and biases are padded to.
const ROWS_OF_WEIGHTS: usize = 8;

/// Minimum number of rows of cells in a band. In smaller bands, the margins dominate the work.
const MIN_ROWS: usize = 16;

/// Alignment in bytes of arrays and planes in an allocation.
const ALIGN: usize = 256;
/// Alignment in bytes of the rows of a plane.
const ROW_ALIGN: usize = 64;

/// Layout of a plane in an allocation.
#[derive(Clone, Copy, Debug)]
struct PlaneLayout {
    offset: usize,
    stride: usize,
    /// Bytes in a row, without padding.
    row: usize,
    rows: usize,
}

/// Layout of a frame in one allocation.
#[derive(Clone, Debug)]
pub(super) struct FrameLayout {
    pub bytes: usize,
    planes: Vec<PlaneLayout>,
}

impl FrameLayout {
    /// Creates the layout of a frame after the first `bytes` of the allocation.
    fn new(info: &FrameInfo, mut bytes: usize) -> Self {
        let planes = (0..info.format.planes()).map(|plane| {
            let (row, rows) = info.format.plane_size(plane, info.width, info.height);
            let (offset, stride) = (bytes, row.next_multiple_of(ROW_ALIGN));
            bytes += (stride * rows).next_multiple_of(ALIGN);
            PlaneLayout {
                offset,
                stride,
                row,
                rows,
            }
        });
        Self {
            planes: planes.collect(),
            bytes,
        }
    }

    /// Returns the number of planes.
    pub fn planes(&self) -> usize {
        self.planes.len()
    }

    /// Returns the rows of planes, given by their bytes and stride, if all are in pinned memory of
    /// `driver`.
    pub fn host_rows<'a>(
        &self,
        driver: &Arc<dyn Driver>,
        planes: impl Iterator<Item = (&'a [u8], usize)>,
    ) -> Option<Vec<HostRows>> {
        let planes = self.planes.iter().zip(planes);
        let planes =
            planes.map(|(at, (data, stride))| (data.as_ptr(), data.len(), stride, at.row, at.rows));
        pinned_rows(driver, planes)
    }

    /// Returns the number of bytes before the planes.
    pub fn start(&self) -> usize {
        self.planes.first().map_or(self.bytes, |plane| plane.offset)
    }

    /// Returns address and stride, bytes in a row and number of rows of each plane in the
    /// allocation at `address`.
    pub fn rows(&self, address: Address) -> impl Iterator<Item = (Rows, usize, usize)> {
        self.planes.iter().map(move |plane| {
            let rows = Rows {
                address: Address(address.0 + plane.offset as u64),
                stride: plane.stride,
            };
            (rows, plane.row, plane.rows)
        })
    }
}

/// A layer. Offsets are into the constants.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub ci: usize,
    pub co: usize,
    pub slope: f32,
    /// The input of the previous layer is added to the output.
    pub adds_skip: bool,
    pub weights: usize,
    pub bias: usize,
}

/// Table of a resampling axis. Offsets are into the constants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub taps: usize,
    pub starts: usize,
    pub weights: usize,
}

/// Plan of a model for frames of one size. Addresses are offsets into the constants or into the
/// allocation of the input or output.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Components of the frame. Those that are computed in tiles are first.
    pub components: Vec<Component>,
    /// Vertical (samples of luma per cell, subsampling, rows) of each component.
    row_maps: Vec<(usize, usize, usize)>,
    /// Components of the latent's planes. Those that are computed in tiles are first.
    pub sources: Vec<Source>,
    /// Numbers of components and sources that are computed in tiles.
    pub tiled: (usize, usize),
    pub slots: Vec<Slot>,
    /// Horizontal and vertical table from the latent's chroma to the frame's; `None` if the sizes
    /// are equal.
    pub grow: Option<[Table; 2]>,
    /// Size of the frame in cells.
    pub width: usize,
    pub height: usize,
    /// Channels of the latent, padding included.
    pub channels: usize,
    pub layers: Vec<Layer>,
    /// Factor and offset of each channel from weighted codes to the latent.
    pub gain: usize,
    pub bias: usize,
    pub residual_std: usize,
    pub constants: Vec<u8>,
    /// Strength as an f32, followed by the planes.
    pub input: FrameLayout,
    pub output: FrameLayout,
    /// Byte of a pixel that is 255, or [`NO_FILLER`].
    pub filler: u32,
    /// Rows of cells in a band.
    rows: usize,
}

impl Plan {
    pub fn new(model: &LiteModel, src: &FrameInfo, dst: &FrameInfo) -> Result<Self> {
        let student = &model.metadata.student;
        let (r, kind) = (student.r, student.latent);
        let (input, output) = (FrameLayout::new(src, ALIGN), FrameLayout::new(dst, 0));
        let mut constants = Constants::default();
        let mut components: Vec<Part<Component>> = Vec::new();
        let mut sources: Vec<Part<Source>> = Vec::new();
        let slots = slots(dst, kind, r);
        // Weighted codes of black in each plane of the latent.
        let mut zeros = [0.0; 3];
        let axes = match kind {
            LatentKind::Luma => None,
            LatentKind::Yuv => chroma::axes(dst),
        };
        for layout in dst.format.components() {
            let (width, height) = (dst.width, dst.height);
            let resampler = Resampler::for_component(
                src,
                layout.component,
                width,
                height,
                Kernel::Bicubic,
                false,
            )?;
            let (horizontal, vertical) = (resampler.horizontal(), resampler.vertical());
            let (from, to) = (input.planes[layout.plane], output.planes[layout.plane]);
            let tables = [constants.table(horizontal), constants.table(vertical)];
            let quant = Quant::new(dst, layout.component);
            let base = samples(dst, layout, &from, &tables);
            let shares = shares(dst, layout.component, kind);
            let mut component = Component {
                base,
                dst: to.offset as u64,
                stride: to.stride as u32,
                width: (to.row / layout.step) as u32,
                last: horizontal.dst_len() as u32 - 1,
                slots: [NO_SLOT; 2],
                scale: quant.scale,
                ..Component::default()
            };
            let rows = (
                r,
                1 << vertical_shift(dst.format, layout.component),
                vertical.dst_len(),
            );
            // If the chroma of the latent has another size, its tables interpolate and shrink in
            // one step.
            let mut shrunk = None;
            for share in &shares {
                let (slot, weight) = (share.slot as u32, share.weight);
                let samples = match &axes {
                    Some([[x, y], _]) if share.slot > 0 => *shrunk.get_or_insert_with(|| {
                        let tables = [
                            constants.table(&horizontal.then(x)),
                            constants.table(&vertical.then(y)),
                        ];
                        samples(dst, layout, &from, &tables)
                    }),
                    _ => base,
                };
                if weight != 0.0 {
                    zeros[share.slot] += weight * quant.offset / quant.scale;
                    let source = Source {
                        samples,
                        slots: [slot, NO_SLOT],
                        weight: weight / quant.scale,
                        tile: 0,
                    };
                    sources.push(Part::new(source, layout, rows));
                }
                match share.slot.checked_sub(1) {
                    Some(which) if axes.is_some() => component.gains[which] = share.gain,
                    _ => component.slots[0] = slot,
                }
            }
            components.push(Part::new(component, layout, rows));
        }
        let grow = axes.map(|[_, [x, y]]| [constants.table(&x), constants.table(&y)]);
        let channels = match kind.channels(r) {
            FEW => FEW,
            channels => channels.next_multiple_of(CHANNELS),
        };
        let mut padded = |values: &mut dyn Iterator<Item = f32>| {
            let mut values: Vec<f32> = values.collect();
            values.resize(channels, 0.0);
            constants.push(&values, f32::to_le_bytes)
        };
        let stats = &model.stats;
        let zero = |channel: usize| {
            let slot = slots
                .iter()
                .rposition(|slot| slot.channel <= channel as u32);
            zeros[slot.unwrap_or(0)]
        };
        let means = stats.input_mean.iter().zip(&stats.input_std).enumerate();
        let gain = padded(&mut stats.input_std.iter().map(|std| 1.0 / std));
        let bias = padded(&mut means.map(|(i, (mean, std))| -(mean + zero(i)) / std));
        let residual_std = padded(&mut stats.residual_std.iter().copied());
        let scale = cpu::scale(src, dst);
        let width = dst.width.div_ceil(r);
        let layers = layers(model, scale, channels, &mut constants);
        let starts = |samples: &Samples, len| constants.u32s(samples.x_starts as usize, len);
        let pairs = |first: &Component, second: Option<&Component>| {
            let starts = starts(&first.base, first.last as usize + 1);
            tiles::component(first, second, &slots, &starts)
        };
        let (components, tiled_components) = in_tiles(components, pairs, |_| true);
        let margins = (layers.len() + usize::from(grow.is_some()), width);
        let pairs = |first: &Source, second: Option<&Source>| {
            let len = slots[first.slots[0] as usize].width as usize;
            let starts = starts(&first.samples, len);
            tiles::source(first, second, &slots, margins, &starts)
        };
        let shared = |source: &Source| {
            let same = |other: &&Part<Source>| other.value.slots == source.slots;
            sources.iter().filter(same).count() > 1
        };
        let (sources, tiled_sources) = in_tiles(sources.clone(), pairs, |source| !shared(source));
        Ok(Self {
            row_maps: components.iter().map(|part| part.rows).collect(),
            components: components.into_iter().map(|part| part.value).collect(),
            sources: sources.into_iter().map(|part| part.value).collect(),
            tiled: (tiled_components, tiled_sources),
            grow,
            slots,
            width,
            height: dst.height.div_ceil(r),
            channels,
            layers,
            gain,
            bias,
            residual_std,
            constants: constants.0,
            input,
            output,
            filler: match dst.format.filler(0) {
                0 => NO_FILLER,
                bits => bits.trailing_zeros() / 8,
            },
            rows: dst.height.div_ceil(r),
        })
    }

    /// Returns the plan with bands of half the height; `None` if they would be too small.
    pub fn smaller(self) -> Option<Self> {
        let rows = self.rows.div_ceil(2);
        (rows >= MIN_ROWS).then_some(Self { rows, ..self })
    }

    /// Returns the first row and the number of rows of cells of each band.
    pub fn bands(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (height, rows) = (self.height, self.rows);
        (0..height)
            .step_by(rows)
            .map(move |top| (top, rows.min(height - top)))
    }

    /// Returns the margin of the residual in cells, which interpolation of chroma reads.
    pub fn margin(&self) -> usize {
        usize::from(self.grow.is_some())
    }

    /// Returns the cells in a row and the rows of a stage of a band of `rows` rows. Stage 0 is the
    /// latent, stage n the output of layer n - 1.
    pub fn stage(&self, stage: usize, rows: usize) -> (usize, usize) {
        let margins = 2 * (self.layers.len() - stage + self.margin());
        (self.width + margins, rows + margins)
    }

    /// Returns the maximum size in bytes of a stage of a band.
    pub fn map_bytes(&self) -> usize {
        let bytes = (0..=self.layers.len()).map(|stage| {
            let (width, height) = self.stage(stage, self.rows);
            let channels = match stage.checked_sub(1) {
                None => self.channels,
                Some(layer) => self.layers[layer].co,
            };
            width * height * channels * size_of::<f16>()
        });
        bytes.max().unwrap_or(0)
    }

    /// Returns the first row and the number of rows of component `index` in a band of `rows` rows
    /// of cells from `top` on.
    pub fn samples(&self, index: usize, top: usize, rows: usize) -> (usize, usize) {
        let (r, subsampling, height) = self.row_maps[index];
        let at = |cell: usize| (cell * r).div_ceil(subsampling).min(height);
        (at(top), at(top + rows) - at(top))
    }

    /// Writes the strength to `bytes`, the memory of the input.
    pub fn fill_strength(&self, strength: f32, bytes: &mut [u8]) {
        bytes[..4].copy_from_slice(&strength.to_le_bytes());
    }

    /// Writes the planes of `src` to `bytes`, the memory of the input.
    pub fn fill_input(&self, src: &FrameRef, bytes: &mut [u8]) {
        for (at, plane) in self.input.planes.iter().zip(src.planes()) {
            let to = bytes[at.offset..].chunks_mut(at.stride);
            let from = plane.data.chunks(plane.stride.max(1));
            for (to, from) in to.zip(from).take(at.rows) {
                to[..at.row].copy_from_slice(&from[..at.row]);
            }
        }
    }

    /// Copies the planes from `bytes`, the memory of the output, to `dst`.
    pub fn take_output(&self, bytes: &[u8], dst: &mut FrameMut) {
        for (at, plane) in self.output.planes.iter().zip(dst.planes_mut()) {
            let stride = plane.stride.max(1);
            let from = bytes[at.offset..].chunks(at.stride);
            for (from, to) in from.zip(plane.data.chunks_mut(stride)).take(at.rows) {
                to[..at.row].copy_from_slice(&from[..at.row]);
            }
        }
    }
}

/// A component or source with the plane of the frame and the byte of a pixel that it is in, and the
/// vertical geometry of the component.
#[derive(Clone)]
struct Part<T> {
    value: T,
    plane: usize,
    offset: usize,
    rows: (usize, usize, usize),
}

impl<T> Part<T> {
    fn new(value: T, layout: &ComponentLayout, rows: (usize, usize, usize)) -> Self {
        Self {
            value,
            plane: layout.plane,
            offset: layout.offset,
            rows,
        }
    }
}

/// Replaces the parts of each plane by one that is computed in tiles if `tiled` returns one for
/// them, in the order of their bytes. Returns those first, and their number. Only parts for which
/// `may` returns `true` are considered.
fn in_tiles<T: Clone>(
    parts: Vec<Part<T>>,
    tiled: impl Fn(&T, Option<&T>) -> Option<T>,
    may: impl Fn(&T) -> bool,
) -> (Vec<Part<T>>, usize) {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for plane in 0..4 {
        let of_plane = parts.iter().filter(|part| part.plane == plane);
        let mut of_plane: Vec<_> = of_plane.cloned().collect();
        of_plane.sort_by_key(|part| part.offset);
        let value = match &of_plane[..] {
            all if !all.iter().all(|part| may(&part.value)) => None,
            [one] => tiled(&one.value, None),
            [one, other] => tiled(&one.value, Some(&other.value)),
            _ => None,
        };
        match (value, of_plane.first()) {
            (Some(value), Some(part)) => first.push(Part {
                value,
                ..part.clone()
            }),
            _ => rest.extend(of_plane),
        }
    }
    let count = first.len();
    first.extend(rest);
    (first, count)
}

fn vertical_shift(format: PixelFormat, component: Kind) -> u32 {
    match component {
        U | V => format.chroma_shift().1,
        _ => 0,
    }
}

/// Returns the parameters for the samples of a component of the input.
fn samples(
    dst: &FrameInfo,
    layout: &ComponentLayout,
    plane: &PlaneLayout,
    [x, y]: &[Table; 2],
) -> Samples {
    let quant = Quant::new(dst, layout.component);
    Samples {
        src: plane.offset as u64,
        x_starts: x.starts as u64,
        x_weights: x.weights as u64,
        y_starts: y.starts as u64,
        y_weights: y.weights as u64,
        stride: plane.stride as u32,
        step: layout.step as u32,
        offset: layout.offset as u32,
        x_taps: x.taps as u32,
        y_taps: y.taps as u32,
        bytes: dst.format.sample_bytes() as u32,
        shift: dst.format.shift(),
        mask: quant.max as u32,
        groups: 0,
        reciprocal: 0,
    }
}

/// Share of a component in a plane of the latent.
struct Share {
    /// Index of the plane.
    slot: usize,
    /// Factor of the component in the plane.
    weight: f32,
    /// Factor of the plane's residual in the component.
    gain: f32,
}

/// Returns the shares of `component` in the planes of the latent.
fn shares(dst: &FrameInfo, component: Kind, kind: LatentKind) -> Vec<Share> {
    let share = |slot, weight, gain| Share { slot, weight, gain };
    let matrix = dst.colorimetry.matrix;
    let luma: [f32; 3] = matrix.luma_weights().into();
    let rgb = |c: usize| {
        let mut shares = vec![share(0, luma[c], 1.0)];
        if kind == LatentKind::Yuv {
            shares.extend([0, 1].map(|which| {
                let inverse = matrix.inverse_chroma_weights(which)[c];
                share(1 + which, matrix.chroma_weights(which)[c], inverse)
            }));
        }
        shares
    };
    match component {
        Y => vec![share(0, 1.0, 1.0)],
        U if kind == LatentKind::Yuv => vec![share(1, 1.0, 1.0)],
        V if kind == LatentKind::Yuv => vec![share(2, 1.0, 1.0)],
        R => rgb(0),
        G => rgb(1),
        B => rgb(2),
        U | V | A => Vec::new(),
    }
}

/// Returns the planes of the latent of frames `dst`.
fn slots(dst: &FrameInfo, kind: LatentKind, r: usize) -> Vec<Slot> {
    let slot = |at: crate::nn::lite::latent::PlaneSlot, shrink: usize| Slot {
        channel: at.channel as u32,
        r: at.r as u32,
        width: dst.width.div_ceil(shrink) as u32,
        height: dst.height.div_ceil(shrink) as u32,
    };
    let mut slots = vec![slot(luma_slot(r), 1)];
    if kind == LatentKind::Yuv {
        slots.extend([0, 1].map(|which| slot(chroma_slot(r, which), 2)));
    }
    slots
}

/// Returns the layers of a network whose latent has `channels` channels with padding.
fn layers(model: &LiteModel, scale: f64, channels: usize, constants: &mut Constants) -> Vec<Layer> {
    let last = model.layers.len() - 1;
    let layer = |(index, layer): (usize, &crate::model::Layer)| {
        let spec = &layer.spec;
        let padded = |n: usize, is_latent| {
            if is_latent {
                channels
            } else {
                n.next_multiple_of(CHANNELS)
            }
        };
        let (ci, co) = (padded(spec.ci, index == 0), padded(spec.co, index == last));
        let (weight, mut bias) = layer.fold(&Condition::at(scale), model.metadata.student.r);
        let rows = co.max(ROWS_OF_WEIGHTS);
        bias.resize(rows, 0.0);
        let weights = packed(&weight, (spec.ci, spec.co), (ci, rows));
        Layer {
            ci,
            co,
            slope: match spec.activated {
                Activated::Leaky => LEAKY_SLOPE,
                Activated::No => 1.0,
            },
            adds_skip: spec.role == Role::PairSecond,
            weights: constants.push(&weights, f16::to_le_bytes),
            bias: constants.push(&bias, f32::to_le_bytes),
        }
    };
    model.layers.iter().enumerate().map(layer).collect()
}

/// Returns weights `[co, ci, 3, 3]` in the kernel's order, padded with zeros:
/// `[ci / 16][9][co][16]`, and for [`FEW`] input channels `[3][co][4][4]` with the column before
/// the input channel.
pub(super) fn packed(
    weights: &[f32],
    (ci, co): (usize, usize),
    padded: (usize, usize),
) -> Vec<f16> {
    let few = padded.0 == FEW;
    let len = if few { 3 * CHANNELS } else { 9 * padded.0 };
    let mut out = vec![f16::ZERO; len * padded.1];
    for (index, &weight) in weights.iter().enumerate() {
        let (o, i, tap) = (index / (9 * ci), index / 9 % ci, index % 9);
        debug_assert!(o < co);
        let (row, at) = if few {
            (tap / 3, tap % 3 * FEW + i)
        } else {
            (i / CHANNELS * 9 + tap, i % CHANNELS)
        };
        out[(row * padded.1 + o) * CHANNELS + at] = f16::from_f32(weight);
    }
    out
}

/// Arrays that are uploaded once, one after the other.
#[derive(Default)]
struct Constants(Vec<u8>);

impl Constants {
    /// Appends an array. Returns its offset.
    fn push<T: Copy, const N: usize>(
        &mut self,
        values: &[T],
        bytes: impl Fn(T) -> [u8; N],
    ) -> usize {
        let at = self.0.len().next_multiple_of(ALIGN);
        self.0.resize(at, 0);
        self.0.extend(values.iter().flat_map(|&value| bytes(value)));
        at
    }

    /// Appends the table of an axis. Fewer taps than [`tiles::TAPS`] are padded with zeros if the
    /// source is long enough.
    fn table(&mut self, axis: &Axis) -> Table {
        let (taps, starts, weights) = axis.table();
        let padded = match axis.src_len() {
            0..tiles::TAPS => taps,
            _ => taps.max(tiles::TAPS),
        };
        let last = (axis.src_len() - padded) as u32;
        let moved: Vec<u32> = starts.iter().map(|&start| start.min(last)).collect();
        let mut wide = vec![0.0; starts.len() * padded];
        for (j, weights) in weights.chunks(taps).enumerate() {
            wide[j * padded + (starts[j] - moved[j]) as usize..][..taps].copy_from_slice(weights);
        }
        Table {
            taps: padded,
            starts: self.push(&moved, u32::to_le_bytes),
            weights: self.push(&wide, f32::to_le_bytes),
        }
    }

    /// Returns `len` numbers of the array at `offset`.
    fn u32s(&self, offset: usize, len: usize) -> Vec<u32> {
        let (numbers, _) = self.0[offset..][..4 * len].as_chunks::<4>();
        numbers
            .iter()
            .map(|&bytes| u32::from_le_bytes(bytes))
            .collect()
    }
}
