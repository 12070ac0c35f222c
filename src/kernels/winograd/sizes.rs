//! Sizes of tiles, vectors and blocks, and the constants of the transform.

use crate::kernels::simd::Isa;

/// Rows and columns of outputs in a tile.
pub const TILE: usize = 4;

/// Maximum number of tiles in a band: products of lengths stay far from overflow.
pub(in crate::kernels) const MAX_TILES: usize = 1 << 24;

/// Rows and columns of inputs that a tile reads, and points of the transform on a side.
pub(super) const SIDE: usize = TILE + 2;
pub(super) const POINTS: usize = SIDE * SIDE;

/// Channels that a short vector holds.
pub(super) const FEW: usize = 4;

/// Transform G of the kernel (6x3).
pub(in crate::kernels) const G: [[f64; 3]; SIDE] = [
    [1.0 / 4.0, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// Rows of the transform that are computed together: all six do not fit in the registers.
pub(super) const PAIRS: [[usize; 2]; 3] = [[0, 5], [1, 2], [3, 4]];

/// Channels in a vector.
#[inline(always)]
pub(super) fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx512(_) => 16,
        _ => 8,
    }
}

/// Returns the floats from one pixel to the next: the channels padded to whole vectors, or to short
/// ones in layers at the ends of a network.
#[inline(always)]
pub(super) fn pixel_step(channels: usize, isa: Isa) -> usize {
    if channels <= FEW {
        FEW
    } else {
        channels.next_multiple_of(lanes(isa))
    }
}

/// Maximum number of vectors of output channels in a block: with the tiles of `run` they fill the
/// registers.
pub(super) fn max_vectors(isa: Isa) -> usize {
    match isa {
        Isa::Avx512(_) => 4,
        _ => 2,
    }
}
