//! Sizes of codes, vectors and blocks, and the limit of the sums.

use crate::kernels::winograd::TILE;

/// Input rows that a band reads, and points of the transform on a side.
pub(super) const SIDE: usize = TILE + 2;
pub(super) const POINTS: usize = SIDE * SIDE;

/// The largest code; the smallest is its negative.
pub(super) const LARGEST: i16 = 255;

/// The largest sum of the absolute weights of an output channel at a point: the transform of codes
/// is at most 100 times as large as they are.
pub(super) const MAX_WEIGHTS: f64 = (i32::MAX / (100 * LARGEST as i32)) as f64;

/// Channels of an input or output pixel are padded to a multiple of this, the size of a vector.
pub(super) const PADDED: usize = 16;

/// Output channels in a vector of sums.
pub(super) const SUMS: usize = 8;

/// Maximum number of vectors of output channels in a block.
pub(super) const MAX_VECTORS: usize = 2;

/// Tiles that are transformed before they are multiplied: their transforms stay in the caches.
pub(super) const TILES: usize = 12;
