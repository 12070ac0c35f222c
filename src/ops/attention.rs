//! Multi-head attention within windows of a feature map.

use candle_core::{D, Result, Tensor, bail};

/// Attention of `heads` heads within windows of a feature map.
///
/// `qkv` `[n, h, w, 3c]` holds queries, keys and values one after the other, each with `c = heads x d` channels, head by
/// head. The map is cut into windows of `window` `[height, width]` pixels, which must divide it; with `shift` above 0 it
/// is rolled up and left by `shift` pixels before and back after, and pixels that only the roll brings together do not
/// see each other (Liu et al., "Swin Transformer", arXiv 2103.14030). `bias` `[heads, l, l]`, with `l` the pixels of a
/// window in row order, is added to `q . k / sqrt(d)` before the softmax over the keys. Gives `[n, h, w, c]`.
///
/// # Errors
/// When a shape does not fit or `shift` is not smaller than the window.
pub fn attention(
    qkv: &Tensor,
    bias: Option<&Tensor>,
    heads: usize,
    window: [usize; 2],
    shift: usize,
) -> Result<Tensor> {
    let (n, h, w, c3) = qkv.dims4()?;
    let [wh, ww] = window;
    if heads == 0 || c3 % (3 * heads) != 0 {
        bail!("attention: {c3} channels are not queries, keys and values of {heads} heads");
    }
    if wh == 0 || ww == 0 || h % wh != 0 || w % ww != 0 || shift >= wh.min(ww) {
        bail!("attention: windows of {window:?} shifted by {shift} do not cut a map of {h}x{w}");
    }
    let (d, l) = (c3 / 3 / heads, wh * ww);
    let (rows, columns) = (h / wh, w / ww);
    let qkv = match shift {
        0 => qkv.clone(),
        s => qkv.roll(-(s as i32), 1)?.roll(-(s as i32), 2)?,
    };
    // [3, n, rows, columns, heads, l, d]
    let parts = qkv
        .reshape(vec![n, rows, wh, columns, ww, 3, heads, d])?
        .permute(vec![5, 0, 1, 3, 6, 2, 4, 7])?
        .reshape((3, n * rows * columns, heads, l, d))?;
    let part = |i: usize| parts.narrow(0, i, 1)?.squeeze(0)?.contiguous();
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let mut scores = (q.matmul(&k.t()?)? * (d as f64).powf(-0.5))?;
    if let Some(bias) = bias {
        scores = scores.broadcast_add(bias)?;
    }
    if shift > 0 {
        let mask = shift_mask([h, w], window, shift);
        let mask = Tensor::from_vec(mask, (1, rows * columns, 1, l, l), qkv.device())?;
        scores = scores
            .reshape((n, rows * columns, heads, l, l))?
            .broadcast_add(&mask)?
            .reshape((n * rows * columns, heads, l, l))?;
    }
    let out = candle_nn::ops::softmax(&scores, D::Minus1)?
        .matmul(&v)?
        .reshape(vec![n, rows, columns, heads, wh, ww, d])?
        .permute(vec![0, 1, 4, 2, 5, 3, 6])?
        .reshape((n, h, w, heads * d))?;
    match shift {
        0 => Ok(out),
        s => out.roll(s as i32, 1)?.roll(s as i32, 2),
    }
}

/// `[windows, l, l]`: -100 between pixels of a rolled map that are no neighbours in the map itself, else 0.
fn shift_mask([h, w]: [usize; 2], [wh, ww]: [usize; 2], shift: usize) -> Vec<f32> {
    let band = |i: usize, len: usize, window: usize| match i {
        i if i < len - window => 0,
        i if i < len - shift => 1,
        _ => 2,
    };
    let mut mask = Vec::with_capacity(h * w * wh * ww);
    for (y0, x0) in (0..h)
        .step_by(wh)
        .flat_map(|y| (0..w).step_by(ww).map(move |x| (y, x)))
    {
        let region: Vec<usize> = (0..wh * ww)
            .map(|i| 3 * band(y0 + i / ww, h, wh) + band(x0 + i % ww, w, ww))
            .collect();
        for a in &region {
            mask.extend(region.iter().map(|b| if a == b { 0.0 } else { -100.0 }));
        }
    }
    mask
}
