//! Candidates for kernels: `benches/gpu/candidates.cu`.

use half::f16;

use super::*;
use crate::ops::cuda::host;

const SLOPE: f32 = 0.1;

/// Returns halves in memory with the alignment of a device. A multiple of 8 is expected.
fn aligned(values: &[f16]) -> Vec<u128> {
    let words = values.as_chunks::<8>().0.iter();
    words
        .map(|chunk| {
            chunk
                .iter()
                .rev()
                .fold(0, |word, v| word << 16 | u128::from(v.to_bits()))
        })
        .collect()
}

fn halves(words: &[u128]) -> Vec<f16> {
    let all = words
        .iter()
        .flat_map(|word| word.to_le_bytes().as_chunks().0.to_vec());
    all.map(f16::from_le_bytes).collect()
}

/// Computes a layer with zeros around the map. `weights` are `[channels / 16, 9, channels, 16]`.
fn layer(
    map: &[f16],
    [width, height, channels]: [usize; 3],
    weights: &[f16],
    bias: &[f32],
) -> Vec<f16> {
    let mut out = Vec::with_capacity(map.len());
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        for (channel, &bias) in bias.iter().enumerate() {
            let mut sum = bias;
            for tap in 0..9 {
                // Coordinates plus one.
                let (from_x, from_y) = (x + tap % 3, y + tap / 3);
                if (1..=width).contains(&from_x) && (1..=height).contains(&from_y) {
                    let cell = ((from_y - 1) * width + from_x - 1) * channels;
                    for chunk in 0..channels / 16 {
                        let row = ((chunk * 9 + tap) * channels + channel) * 16;
                        let cells = &map[cell + 16 * chunk..][..16];
                        for (a, b) in cells.iter().zip(&weights[row..row + 16]) {
                            sum += a.to_f32() * b.to_f32();
                        }
                    }
                }
            }
            out.push(f16::from_f32(if sum > 0.0 { sum } else { SLOPE * sum }));
        }
    }
    out
}

#[test]
fn candidates_for_kernels_compute_a_layer() {
    // Channels, layers, columns and threads of a block.
    for (name, channels, layers, columns, threads) in [
        ("direct", 16, 1, 16, 0),
        ("direct", 64, 1, 4, 0),
        ("row16", 16, 1, 128, 128),
        ("row32", 32, 1, 64, 128),
        ("fused16", 16, 2, 126, 256),
        ("group64", 64, 1, 50, 128),
    ] {
        // The last size has strips that are longer than the rows in shared memory.
        for (width, height, rows) in [(1, 1, 2), (1, 9, 4), (37, 1, 4), (131, 7, 4), (67, 17, 32)] {
            let size = [width, height, channels];
            let random = |len, scale, seed| -> Vec<f16> {
                values(len, scale, seed)
                    .into_iter()
                    .map(f16::from_f32)
                    .collect()
            };
            let weight = (0.5 / channels as f32).sqrt();
            let map = random(width * height * channels, 1.0, 1);
            let weights = random(layers * 9 * channels * channels, weight, 2);
            let bias = values(layers * channels, 0.5, 3);
            let mut wanted = map.clone();
            for (weights, bias) in weights
                .chunks(9 * channels * channels)
                .zip(bias.chunks(channels))
            {
                wanted = layer(&wanted, size, weights, bias);
            }

            let (map, weights) = (aligned(&map), aligned(&weights));
            let (grid, block) = match name {
                "direct" => ([width.div_ceil(columns), height], [channels, columns]),
                _ => (
                    [width.div_ceil(columns), height.div_ceil(rows)],
                    [threads, 1],
                ),
            };
            // The order of the threads alternates.
            for _ in 0..2 {
                let mut out = vec![u128::MAX; map.len()];
                let params = [
                    map.as_ptr() as u64,
                    weights.as_ptr() as u64,
                    bias.as_ptr() as u64,
                    out.as_mut_ptr() as u64,
                    width as u64 | (height as u64) << 32,
                    rows as u64 | u64::from(SLOPE.to_bits()) << 32,
                ];
                let [[grid_x, grid_y], [block_x, block_y]] =
                    [grid, block].map(|n| n.map(|n| n as u32));
                // SAFETY: the structure is that of the kernel, whose arrays have these sizes.
                unsafe { host::launch(name, [grid_x, grid_y, 1], [block_x, block_y, 1], &params) };
                // The order of additions differs, so values may be rounded to adjacent ones of f16,
                // also those between two layers.
                let second = (layers as f32 - 1.0) * 2f32.powi(-10);
                for (at, (a, b)) in halves(&out).into_iter().zip(&wanted).enumerate() {
                    let (a, b) = (a.to_f32(), b.to_f32());
                    let limit = b.abs() * 2f32.powi(-10) + 2f32.powi(-13) + second;
                    let (cell, channel) = (at / channels, at % channels);
                    let (x, y) = (cell % width, cell / width);
                    assert!(
                        (a - b).abs() <= limit,
                        "{name} {size:?}: {a} for {b} at {x}, {y}, {channel}"
                    );
                }
            }
        }
    }
}
