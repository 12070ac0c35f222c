//! Kernel launches for a frame.

use super::{
    Context,
    params::{Component, Conv, Frame, Samples, Source},
    plan::{FEW, Plan},
    tiles,
};
use crate::{
    cuda::driver::{Address, Function, Shape},
    ops::cuda::Params,
};

/// Rows of a block of the convolution, one for each warp (`kernels/student.cu`).
pub(super) const ROWS: usize = 8;
/// Columns of a block of the convolution.
pub(super) const COLUMNS: usize = 32;
/// Threads of a block of the convolution.
const THREADS: u32 = 32 * ROWS as u32;

/// Threads of a block of the other kernels.
const BLOCK: usize = 256;

/// A kernel of `kernels/student.cu`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kernel {
    UnpackTiles,
    Unpack,
    /// Convolutions that compute so many channels at once.
    Conv8,
    Conv16,
    Conv32,
    Conv64,
    /// Convolutions of four channels.
    Conv16Of4,
    Conv32Of4,
    PackTiles,
    Pack,
}

impl Kernel {
    /// All kernels, in the order of the enum.
    pub const ALL: [Self; 10] = [
        Self::UnpackTiles,
        Self::Unpack,
        Self::Conv8,
        Self::Conv16,
        Self::Conv32,
        Self::Conv64,
        Self::Conv16Of4,
        Self::Conv32Of4,
        Self::PackTiles,
        Self::Pack,
    ];

    /// Returns the name in the source.
    pub fn name(self) -> &'static str {
        match self {
            Self::UnpackTiles => "tadsr_unpack_tiles",
            Self::Unpack => "tadsr_unpack",
            Self::Conv8 => "tadsr_conv8",
            Self::Conv16 => "tadsr_conv16",
            Self::Conv32 => "tadsr_conv32",
            Self::Conv64 => "tadsr_conv64",
            Self::Conv16Of4 => "tadsr_conv16_of4",
            Self::Conv32Of4 => "tadsr_conv32_of4",
            Self::PackTiles => "tadsr_pack_tiles",
            Self::Pack => "tadsr_pack",
        }
    }

    pub fn function(self, context: &Context) -> Function {
        context.functions[self as usize]
    }

    /// Returns the kernel of a layer and the number of channels that it computes at once.
    fn conv(ci: usize, co: usize) -> (Self, usize) {
        match (ci, co) {
            (FEW, co) if co.is_multiple_of(32) => (Self::Conv32Of4, 32),
            (FEW, _) => (Self::Conv16Of4, 16),
            (_, FEW) => (Self::Conv8, FEW),
            (_, co) if co.is_multiple_of(64) => (Self::Conv64, 64),
            (_, co) if co.is_multiple_of(32) => (Self::Conv32, 32),
            _ => (Self::Conv16, 16),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Launch {
    pub kernel: Kernel,
    pub shape: Shape,
    pub params: Vec<u64>,
}

/// Addresses of the plan's allocations on the device.
pub(super) struct Addresses {
    pub constants: Address,
    pub maps: [Address; 3],
    pub input: Address,
    pub output: Address,
}

fn shape(grid: [usize; 3], block: [u32; 3]) -> Shape {
    Shape {
        grid: grid.map(|n| n as u32),
        block,
    }
}

/// Returns the launches for a frame, band by band.
pub(super) fn launches(plan: &Plan, at: &Addresses) -> Vec<Launch> {
    let mut launches = Vec::new();
    for (top, rows) in plan.bands() {
        let maps = maps(plan);
        let (first, last) = (maps[0], maps[plan.layers.len()]);
        let frame = frame(plan, at, (top, rows), (at.maps[first], at.maps[last]));
        launches.extend(unpack(plan, &frame));
        for layer in 0..plan.layers.len() {
            launches.push(conv(plan, at, &maps, layer, rows));
        }
        launches.extend(pack(&frame));
    }
    launches
}

/// Returns the index of the feature map for each stage. It differs from the maps of the layer's
/// input and of the previous layer's input, which the second layer of a pair adds.
fn maps(plan: &Plan) -> Vec<usize> {
    let mut maps = vec![0];
    for layer in 0..plan.layers.len() {
        let taken = [maps[layer], maps[layer.saturating_sub(1)]];
        maps.extend((0..3).find(|map| !taken.contains(map)));
    }
    maps
}

fn frame(
    plan: &Plan,
    at: &Addresses,
    (top, rows): (usize, usize),
    (latent, residual): (Address, Address),
) -> Frame {
    let constant = |offset: usize| at.constants.0 + offset as u64;
    let margin = plan.layers.len() + plan.margin();
    let mut frame = Frame {
        gain: constant(plan.gain),
        bias: constant(plan.bias),
        residual_std: constant(plan.residual_std),
        strength: at.input.0,
        latent: latent.0,
        residual: residual.0,
        latent_width: plan.stage(0, rows).0 as u32,
        latent_height: plan.stage(0, rows).1 as u32,
        latent_top: top as i32 - margin as i32,
        margin: margin as u32,
        residual_width: plan.stage(plan.layers.len(), rows).0 as u32,
        residual_top: top as i32 - plan.margin() as i32,
        residual_margin: plan.margin() as u32,
        channels: plan.channels as u32,
        slot_count: plan.slots.len() as u32,
        component_count: plan.components.len() as u32,
        source_count: plan.sources.len() as u32,
        tiled_components: plan.tiled.0 as u32,
        tiled_sources: plan.tiled.1 as u32,
        filler: plan.filler,
        ..Frame::default()
    };
    for (to, slot) in frame.slots.iter_mut().zip(&plan.slots) {
        *to = *slot;
    }
    if let Some([x, y]) = &plan.grow {
        (frame.x_taps, frame.y_taps) = (x.taps as u32, y.taps as u32);
        (frame.x_starts, frame.x_weights) = (constant(x.starts), constant(x.weights));
        (frame.y_starts, frame.y_weights) = (constant(y.starts), constant(y.weights));
    }
    let placed = |samples: &Samples| Samples {
        src: samples.src + at.input.0,
        x_starts: samples.x_starts + at.constants.0,
        x_weights: samples.x_weights + at.constants.0,
        y_starts: samples.y_starts + at.constants.0,
        y_weights: samples.y_weights + at.constants.0,
        ..*samples
    };
    for (to, source) in frame.sources.iter_mut().zip(&plan.sources) {
        *to = Source {
            samples: placed(&source.samples),
            ..*source
        };
    }
    let components = plan.components.iter().enumerate();
    for (to, (index, component)) in frame.components.iter_mut().zip(components) {
        let (first, count) = plan.samples(index, top, rows);
        *to = Component {
            base: placed(&component.base),
            dst: component.dst + at.output.0,
            top: first as u32,
            rows: count as u32,
            ..*component
        };
    }
    frame
}

fn unpack(plan: &Plan, frame: &Frame) -> Vec<Launch> {
    let (width, height) = (frame.latent_width as usize, frame.latent_height as usize);
    let (tiled, general) = plan.sources.split_at(plan.tiled.1);
    let grids = tiled.iter().map(|source| {
        let (components, r) = tiles::instance(source.tile);
        let columns = (width * r).div_ceil(tiles::SAMPLES / components);
        [columns, (height * r).div_ceil(tiles::ROWS)]
    });
    let mut launches = Vec::new();
    launches.extend(tiles_launch(Kernel::UnpackTiles, grids.collect(), frame));
    let planes = plan.slots.iter().map(|slot| slot.r * slot.r);
    let is_padded = plan.channels > planes.sum::<u32>() as usize;
    if !general.is_empty() || is_padded {
        let cells = (BLOCK / plan.channels).max(1);
        launches.push(Launch {
            kernel: Kernel::Unpack,
            shape: shape(
                [width.div_ceil(cells), height, 1],
                [plan.channels as u32, cells as u32, 1],
            ),
            params: frame.words(),
        });
    }
    launches
}

/// Returns the launch that covers these numbers of tiles, if there are any.
fn tiles_launch(kernel: Kernel, grids: Vec<[usize; 2]>, frame: &Frame) -> Option<Launch> {
    let columns = grids.iter().map(|grid| grid[0]).max()?;
    let rows = grids.iter().map(|grid| grid[1]).max()?;
    Some(Launch {
        kernel,
        shape: shape([columns, rows, grids.len()], [BLOCK as u32, 1, 1]),
        params: frame.words(),
    })
}

fn conv(plan: &Plan, at: &Addresses, maps: &[usize], index: usize, rows: usize) -> Launch {
    let layer = &plan.layers[index];
    let (in_width, in_height) = plan.stage(index, rows);
    let (width, height) = plan.stage(index + 1, rows);
    let mut params = Conv {
        input: at.maps[maps[index]].0,
        weights: at.constants.0 + layer.weights as u64,
        bias: at.constants.0 + layer.bias as u64,
        output: at.maps[maps[index + 1]].0,
        in_width: in_width as u32,
        in_height: in_height as u32,
        ci: layer.ci as u32,
        co: layer.co as u32,
        slope: layer.slope,
        ..Conv::default()
    };
    if layer.adds_skip && index > 0 {
        // The input of the pair has two more cells on every side.
        let skip_width = plan.stage(index - 1, rows).0;
        let bytes = (2 * skip_width + 2) * layer.co * size_of::<half::f16>();
        params.skip = at.maps[maps[index - 1]].0 + bytes as u64;
        params.skip_width = skip_width as u32;
    }
    let (kernel, channels) = Kernel::conv(layer.ci, layer.co);
    Launch {
        kernel,
        shape: shape(
            [
                width.div_ceil(COLUMNS),
                height.div_ceil(ROWS),
                layer.co / channels,
            ],
            [THREADS, 1, 1],
        ),
        params: params.words(),
    }
}

fn pack(frame: &Frame) -> Vec<Launch> {
    let components = &frame.components[..frame.component_count as usize];
    let (tiled, general) = components.split_at(frame.tiled_components as usize);
    let grids = tiled.iter().map(|c| {
        let width = tiles::SAMPLES / tiles::instance(c.tile).0;
        let columns = (c.width as usize).div_ceil(width);
        [columns, (c.rows as usize).div_ceil(tiles::ROWS)]
    });
    let mut launches = Vec::new();
    launches.extend(tiles_launch(Kernel::PackTiles, grids.collect(), frame));
    let max = |side: fn(&Component) -> u32| general.iter().map(side).max().unwrap_or(0) as usize;
    if !general.is_empty() {
        launches.push(Launch {
            kernel: Kernel::Pack,
            shape: shape(
                [
                    max(|c| c.width).div_ceil(BLOCK),
                    max(|c| c.rows),
                    general.len(),
                ],
                [BLOCK as u32, 1, 1],
            ),
            params: frame.words(),
        });
    }
    launches
}
