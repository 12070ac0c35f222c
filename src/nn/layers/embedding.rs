//! Embedding of diffusion times.

use candle_core::{Device, Result, Tensor};

/// Longest period of the sinusoids.
const MAX_PERIOD: f64 = 10_000.0;

/// Returns cosines, then sines, of every time of `t` at `channels / 2` frequencies from 1 down to
/// almost 1 / [`MAX_PERIOD`], as `[n, channels]`. `channels` is even.
///
/// # Errors
/// If the tensor cannot be allocated.
pub fn sinusoids(t: &[usize], channels: usize, device: &Device) -> Result<Tensor> {
    let half = channels / 2;
    let angle = |t: usize, i: usize| t as f64 * MAX_PERIOD.powf(-(i as f64) / half as f64);
    let row = |&t: &usize| {
        let cosines = (0..half).map(move |i| angle(t, i).cos() as f32);
        cosines.chain((0..half).map(move |i| angle(t, i).sin() as f32))
    };
    let values: Vec<f32> = t.iter().flat_map(row).collect();
    Tensor::from_vec(values, (t.len(), 2 * half), device)
}
