//! Group normalisation with the affine map and the activation that follow it.

use candle_core::{Result, Tensor, bail};

use super::{Activation, silu};

/// Normalises `x` `[n, h, w, c]` over every group of `c / groups` channels of a sample to mean 0 and variance 1
/// (Wu and He, arXiv 1803.08494), multiplies by `weight`, adds `bias` and applies `activation`.
///
/// `weight` and `bias` are `[c]`, or `[n, c]` for a modulation of each sample's own.
///
/// # Errors
/// When `groups` does not divide the channels, or a shape does not fit.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    activation: Activation,
) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    if groups == 0 || c % groups != 0 {
        bail!("group_norm: {c} channels cannot be cut into {groups} groups");
    }
    let rows = x.reshape((n, h * w, groups, c / groups))?;
    let mean = rows.mean_keepdim(3)?.mean_keepdim(1)?;
    let centred = rows.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim(3)?.mean_keepdim(1)?;
    let normal = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let affine = |t: &Tensor| t.reshape(((), 1, 1, c));
    let y = normal
        .reshape((n, h, w, c))?
        .broadcast_mul(&affine(weight)?)?
        .broadcast_add(&affine(bias)?)?;
    match activation {
        Activation::None => Ok(y),
        Activation::Silu => silu(&y),
        other => bail!("group_norm: no kernel with {other:?}"),
    }
}
