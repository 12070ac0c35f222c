//! Sizes of bands, groups and blocks.

use crate::kernels::winograd::TILE;

/// Input rows that a band reads.
pub(super) const READ: usize = TILE + 2;

/// Input channels that are multiplied at once.
pub(super) const GROUP: usize = 4;

/// Output channels are padded to a multiple of this.
pub(super) const PADDED: usize = 16;

/// Maximum number of vectors of output channels in a block: the weights of a block stay in the
/// first-level cache.
pub(super) const MAX_VECTORS: usize = 2;
