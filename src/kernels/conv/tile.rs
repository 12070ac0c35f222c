//! Register tiles: the interface between the convolution and the code of an architecture.

/// Register tile of the forward product; pointers are valid for as many values as the counts say.
pub(in crate::kernels) struct Tile {
    /// First input value of the first pixel's window.
    pub x: *const f32,
    /// Floats from one kernel row's run to the next.
    pub row_stride: usize,
    /// Floats from one pixel's window to the next pixel's.
    pub px_step: usize,
    /// Kernel rows, each a run of `len` floats.
    pub rows: usize,
    pub len: usize,
    /// Packed weights: `rows * len` groups of one block of output channels.
    pub w: *const f32,
    /// One block of biases.
    pub bias: *const f32,
    pub y: *mut f32,
    /// Floats from one output pixel to the next.
    pub y_step: usize,
    /// Output channels stored from the block's last vector, 1 to the number of lanes.
    pub tail: usize,
    /// Slope of the leaky ReLU (1 for no activation).
    pub slope: f32,
}

/// Register tile of the weight gradient:
/// `out[q][..] += sum over p of a[p * a_step + q] * b[p * b_step ..]`.
pub(in crate::kernels) struct GradTile {
    pub a: *const f32,
    pub a_step: usize,
    pub b: *const f32,
    pub b_step: usize,
    /// Pixels to sum over.
    pub pixels: usize,
    pub out: *mut f32,
    /// Floats from one row of `out` to the next.
    pub out_step: usize,
    /// Channels of `b` that may be read for the block's last vector.
    pub tail: usize,
}

pub(in crate::kernels) type TileFn = unsafe fn(&Tile);
pub(in crate::kernels) type GradFn = unsafe fn(&GradTile);

/// Tiles of one instruction set.
pub(in crate::kernels) struct Tiles {
    /// f32 values in a vector.
    pub lanes: usize,
    /// Tiles from wide to narrow as (pixels, without SiLU, with SiLU), by (vectors in a block - 1).
    pub forward: &'static [&'static [(usize, TileFn, TileFn)]],
    /// Tiles from tall to low as (rows of `out`, kernel), by (vectors in a block - 1). The last has
    /// one row.
    pub grads: &'static [&'static [(usize, GradFn)]],
}

/// Splits `vectors` into blocks of at most `max` vectors and as equal as possible.
pub(in crate::kernels) fn blocks(vectors: usize, max: usize) -> Vec<usize> {
    let count = vectors.div_ceil(max);
    (0..count)
        .map(|i| vectors / count + usize::from(i < vectors % count))
        .collect()
}
