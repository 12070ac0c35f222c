//! Bicubic upsampling of images in tensors.

use candle_core::{Result, Tensor, bail};

use crate::frame::resample::{Axis, Kernel, Options, Resampler};

/// Upsamples `x` `[n, h, w, c]` (f32) to `[n, h scale, w scale, c]` like PyTorch's
/// `interpolate(mode="bicubic", align_corners=False)`: cubic convolution with a = -0.75, borders
/// replicated. Has no gradient.
///
/// # Errors
/// If `x` does not have four dimensions, is not f32, or `scale` is 0.
pub fn upsample_bicubic(x: &Tensor, scale: usize) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    if scale == 0 || h == 0 || w == 0 {
        bail!("upsample_bicubic: {:?} by {scale}", x.shape());
    }
    if scale == 1 {
        return Ok(x.detach());
    }
    let axis = |len: usize| Axis::new(len, len * scale, Kernel::Bicubic, Options::default());
    let resampler = Resampler::new(axis(w), axis(h));
    let planes = x.permute((0, 3, 1, 2))?.flatten_all()?.to_vec1::<f32>()?;
    let mut large = vec![0.0; planes.len() * scale * scale];
    for (src, dst) in planes
        .chunks_exact(h * w)
        .zip(large.chunks_exact_mut(h * w * scale * scale))
    {
        resampler.run(src, dst);
    }
    Tensor::from_vec(large, (n, c, h * scale, w * scale), x.device())?
        .permute((0, 2, 3, 1))?
        .contiguous()
}
