//! Nearest-neighbour upsampling.

use candle_core::{Result, Tensor};

/// Every pixel of `x` `[n, h, w, c]` becomes a block of 2 x 2: `[n, 2h, 2w, c]`.
///
/// # Errors
/// When `x` has not four dimensions.
pub fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    x.reshape((n, h, 1, w, 1, c))?
        .broadcast_as((n, h, 2, w, 2, c))?
        .reshape((n, 2 * h, 2 * w, c))
}
