//! Parameters of the kernels. The structures and fields are those of `kernels/student.cu`.

use crate::ops::cuda::Params;

/// Value of the slots of a source or component beyond those that it has.
pub const NO_SLOT: u32 = u32::MAX;

/// Value of [`Frame::filler`] if all bytes of a pixel belong to a component.
pub const NO_FILLER: u32 = u32::MAX;

/// Maximum number of sources of a latent: R, G and B for each of its planes.
pub const SOURCES: usize = 9;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Samples {
    pub src: u64,
    pub x_starts: u64,
    pub x_weights: u64,
    pub y_starts: u64,
    pub y_weights: u64,
    pub stride: u32,
    pub step: u32,
    pub offset: u32,
    pub x_taps: u32,
    pub y_taps: u32,
    pub bytes: u32,
    pub shift: u32,
    pub mask: u32,
    pub groups: u32,
    pub reciprocal: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Source {
    pub samples: Samples,
    pub slots: [u32; 2],
    pub weight: f32,
    pub tile: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Component {
    pub base: Samples,
    pub dst: u64,
    pub stride: u32,
    pub width: u32,
    pub top: u32,
    pub rows: u32,
    pub slots: [u32; 2],
    pub gains: [f32; 2],
    pub scale: f32,
    pub last: u32,
    pub tile: u32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    pub channel: u32,
    pub r: u32,
    pub width: u32,
    pub height: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame {
    pub components: [Component; 4],
    pub sources: [Source; SOURCES],
    pub slots: [Slot; 3],
    pub x_starts: u64,
    pub x_weights: u64,
    pub y_starts: u64,
    pub y_weights: u64,
    pub gain: u64,
    pub bias: u64,
    pub residual_std: u64,
    pub strength: u64,
    pub latent: u64,
    pub residual: u64,
    pub latent_width: u32,
    pub latent_height: u32,
    pub latent_top: i32,
    pub margin: u32,
    pub residual_width: u32,
    pub residual_top: i32,
    pub residual_margin: u32,
    pub channels: u32,
    pub slot_count: u32,
    pub component_count: u32,
    pub source_count: u32,
    pub tiled_components: u32,
    pub tiled_sources: u32,
    pub x_taps: u32,
    pub y_taps: u32,
    pub filler: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Conv {
    pub input: u64,
    pub weights: u64,
    pub bias: u64,
    pub skip: u64,
    pub output: u64,
    pub in_width: u32,
    pub in_height: u32,
    pub ci: u32,
    pub co: u32,
    pub skip_width: u32,
    pub slope: f32,
}

// SAFETY: all fields are numbers, and there is no padding: the sizes are checked below.
unsafe impl Params for Frame {}
// SAFETY: as above.
unsafe impl Params for Conv {}

// `student.cu` asserts the same sizes.
const _: () = assert!(
    size_of::<Samples>() == 80
        && size_of::<Source>() == 96
        && size_of::<Component>() == 136
        && size_of::<Frame>() == 1600
        && size_of::<Conv>() == 64
);
