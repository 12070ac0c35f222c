//! Kernels of `kernels/student.cu` for the emulated device, thread by thread.

use std::sync::Arc;

use half::f16;

use super::{
    params::{Conv, Frame, NO_FILLER, NO_SLOT, Samples, Slot},
    program::{COLUMNS, ROWS},
    tiles,
};
use crate::{
    cuda::{
        driver::Shape,
        emulator::{Fake, Ram},
    },
    ops::cuda::Params,
};

/// Creates an emulated device with the kernels, of compute capability `capability` and with
/// `memory` bytes.
pub fn device(capability: (u32, u32), memory: usize) -> Arc<Fake> {
    Fake::new(kernels, capability, memory)
}

/// Runs a kernel.
pub(super) fn kernels(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
    match name {
        "tadsr_unpack_tiles" => unpack_tiles(ram, shape, &Frame::from_words(params)),
        "tadsr_unpack" => unpack(ram, shape, &Frame::from_words(params)),
        "tadsr_pack_tiles" => pack_tiles(ram, shape, &Frame::from_words(params)),
        "tadsr_pack" => pack(ram, shape, &Frame::from_words(params)),
        _ => convolve(ram, shape, &Conv::from_words(params), channels(name)),
    }
}

/// Runs a kernel of a defective device: convolutions clamp negative results to 0.
pub fn defective(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
    if !name.starts_with("tadsr_conv") {
        return kernels(ram, name, shape, params);
    }
    let conv = Conv {
        slope: 0.0,
        ..Conv::from_words(params)
    };
    convolve(ram, shape, &conv, channels(name));
}

/// Runs a kernel and asserts that its source, compiled for the CPU, computes the same.
#[cfg(test)]
pub fn checked(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
    let expected = by_source(ram, name, shape, params);
    kernels(ram, name, shape, params);
    assert!(expected == *ram, "the source computes another result");
}

/// Returns the numbers of input and output channels that a convolution computes at once, from its
/// name.
fn channels(name: &str) -> (usize, usize) {
    let numbers = &name["tadsr_conv".len()..];
    let (co, ci) = numbers.split_once("_of").unwrap_or((numbers, "16"));
    (ci.parse().unwrap(), co.parse().unwrap())
}

/// Returns the memory after a run of the kernel's source.
#[cfg(test)]
fn by_source(ram: &Ram, name: &str, shape: Shape, params: &[u64]) -> Ram {
    let mut ram = ram.clone();
    let mut to_host = |address: &mut u64| {
        if *address != 0 {
            *address = ram.bytes(*address, 1).as_mut_ptr() as u64;
        }
    };
    let samples = |s: &mut Samples, to_host: &mut dyn FnMut(&mut u64)| {
        let fields = [
            &mut s.src,
            &mut s.x_starts,
            &mut s.x_weights,
            &mut s.y_starts,
            &mut s.y_weights,
        ];
        fields.into_iter().for_each(to_host);
    };
    let words = if name.starts_with("tadsr_conv") {
        let mut p = Conv::from_words(params);
        let fields = [
            &mut p.input,
            &mut p.weights,
            &mut p.bias,
            &mut p.skip,
            &mut p.output,
        ];
        fields.into_iter().for_each(to_host);
        p.words()
    } else {
        let mut f = Frame::from_words(params);
        for component in &mut f.components[..f.component_count as usize] {
            samples(&mut component.base, &mut to_host);
            to_host(&mut component.dst);
        }
        for source in &mut f.sources[..f.source_count as usize] {
            samples(&mut source.samples, &mut to_host);
        }
        let fields = [
            &mut f.x_starts,
            &mut f.x_weights,
            &mut f.y_starts,
            &mut f.y_weights,
            &mut f.gain,
            &mut f.bias,
            &mut f.residual_std,
            &mut f.strength,
            &mut f.latent,
            &mut f.residual,
        ];
        fields.into_iter().for_each(to_host);
        f.words()
    };
    // SAFETY: the structure is that of the kernel, and its pointers point to `ram`.
    unsafe { crate::ops::cuda::host::launch(name, shape.grid, shape.block, &words) };
    ram
}

/// Returns `sum` plus the code of the resampled sample at (x, y) of component `index` of a plane.
fn add_sample(ram: &Ram, c: &Samples, index: usize, (x, y): (usize, usize), mut sum: f32) -> f32 {
    let corner = c.src
        + u64::from(ram.get::<u32>(c.y_starts, y)) * u64::from(c.stride)
        + u64::from(ram.get::<u32>(c.x_starts, x)) * u64::from(c.step)
        + u64::from(c.offset)
        + index as u64 * u64::from(c.bytes);
    let (x_taps, y_taps) = (c.x_taps as usize, c.y_taps as usize);
    for i in 0..x_taps {
        let mut column = 0.0;
        for j in 0..y_taps {
            let at = corner + (j * c.stride as usize + i * c.step as usize) as u64;
            let word = match c.bytes {
                2 => u32::from(ram.get::<u16>(at, 0)),
                _ => u32::from(ram.get::<u8>(at, 0)),
            };
            column +=
                ram.get::<f32>(c.y_weights, y * y_taps + j) * ((word >> c.shift) & c.mask) as f32;
        }
        sum += ram.get::<f32>(c.x_weights, x * x_taps + i) * column;
    }
    sum
}

/// Stores the word of a code of component `index` of a plane.
fn store_code(ram: &mut Ram, c: &Samples, pixel: u64, index: usize, code: f32) {
    let clamped = code.max(0.0).min(c.mask as f32);
    let word = (clamped.round_ties_even() as u32) << c.shift;
    let at = pixel + u64::from(c.offset) + index as u64 * u64::from(c.bytes);
    match c.bytes {
        2 => ram.set(at, 0, word as u16),
        _ => ram.set(at, 0, word as u8),
    }
}

/// Calls `cell(x, y, z)` for the first sample of each cell of tiles with these components and side.
fn cells(shape: Shape, z: usize, tile: u32, mut cell: impl FnMut(usize, usize)) {
    assert_eq!(shape.block, [256, 1, 1]);
    let (components, r) = tiles::instance(tile);
    let [width, height] = [shape.grid[0], shape.grid[1]].map(|n| n as usize);
    assert!(z < shape.grid[2] as usize);
    for y in (0..height * tiles::ROWS).step_by(r) {
        (0..width * tiles::SAMPLES / components)
            .step_by(r)
            .for_each(|x| cell(x, y));
    }
}

fn unpack_tiles(ram: &mut Ram, shape: Shape, f: &Frame) {
    for (z, source) in f.sources[..f.tiled_sources as usize].iter().enumerate() {
        cells(shape, z, source.tile, |x, y| {
            let (components, r) = tiles::instance(source.tile);
            let (cell_x, cell_y) = (x / r, y / r);
            if cell_x >= f.latent_width as usize || cell_y >= f.latent_height as usize {
                return;
            }
            for (index, k) in (0..components).flat_map(|i| (0..r * r).map(move |k| (i, k))) {
                let slot = &f.slots[source.slots[index] as usize];
                let sx = (x + k % r) as i32 - f.margin as i32 * r as i32;
                let sy = (y + k / r) as i32 + f.latent_top * r as i32;
                let px = sx.clamp(0, slot.width as i32 - 1) as usize;
                let py = sy.clamp(0, slot.height as i32 - 1) as usize;
                let sum = add_sample(ram, &source.samples, index, (px, py), 0.0);
                let channel = slot.channel as usize + k;
                let gain = source.weight * ram.get::<f32>(f.gain, channel);
                let value = sum * gain + ram.get::<f32>(f.bias, channel);
                let cell = cell_y * f.latent_width as usize + cell_x;
                let at = cell * f.channels as usize + channel;
                ram.set(f.latent, at, f16::from_f32(value));
            }
        });
    }
}

fn pack_tiles(ram: &mut Ram, shape: Shape, f: &Frame) {
    let strength = ram.get::<f32>(f.strength, 0);
    for (z, c) in f.components[..f.tiled_components as usize]
        .iter()
        .enumerate()
    {
        let factor = strength * c.scale;
        cells(shape, z, c.tile, |x, y| {
            if x >= c.width as usize {
                return;
            }
            let (components, r) = tiles::instance(c.tile);
            for (index, k) in (0..components).flat_map(|i| (0..r * r).map(move |k| (i, k))) {
                if y + k / r >= c.rows as usize {
                    continue;
                }
                let (column, y) = (x + k % r, c.top as usize + y + k / r);
                let sum = match f.slots.get(c.slots[index] as usize) {
                    Some(slot) if strength > 0.0 => {
                        let (std, half) = residual_at(ram, f, slot, column, y);
                        factor * std * half
                    }
                    _ => 0.0,
                };
                let at = (column.min(c.last as usize), y);
                let code = add_sample(ram, &c.base, index, at, sum);
                let pixel = c.dst + (y * c.stride as usize + column * c.base.step as usize) as u64;
                store_code(ram, &c.base, pixel, index, code);
            }
        });
    }
}

/// Calls `thread(block, thread)` for each thread.
fn threads(shape: Shape, mut thread: impl FnMut([usize; 3], [usize; 3])) {
    let [gx, gy, gz] = shape.grid.map(|n| n as usize);
    let [bx, by, bz] = shape.block.map(|n| n as usize);
    for block in (0..gx * gy * gz).map(|i| [i % gx, i / gx % gy, i / gx / gy]) {
        (0..bx * by * bz).for_each(|i| thread(block, [i % bx, i / bx % by, i / bx / by]));
    }
}

fn unpack(ram: &mut Ram, shape: Shape, f: &Frame) {
    threads(shape, |block, thread| {
        let (channel, x, y) = (
            thread[0],
            block[0] * shape.block[1] as usize + thread[1],
            block[1],
        );
        if x >= f.latent_width as usize {
            return;
        }
        let tiled = f.sources[..f.tiled_sources as usize].iter();
        let mut slots = tiled
            .flat_map(|source| source.slots)
            .filter(|&s| s != NO_SLOT);
        if slots.any(|s| {
            let slot = &f.slots[s as usize];
            let first = slot.channel as usize;
            (first..first + (slot.r * slot.r) as usize).contains(&channel)
        }) {
            return;
        }
        let mut value = 0.0;
        for (s, slot) in f.slots[..f.slot_count as usize].iter().enumerate() {
            let (first, r) = (slot.channel as usize, slot.r as usize);
            if channel < first || channel - first >= r * r {
                continue;
            }
            let k = channel - first;
            let sx = (x as i32 - f.margin as i32) * r as i32 + (k % r) as i32;
            let sy = (y as i32 + f.latent_top) * r as i32 + (k / r) as i32;
            let (px, py) = (
                sx.max(0).min(slot.width as i32 - 1),
                sy.max(0).min(slot.height as i32 - 1),
            );
            for source in &f.sources[f.tiled_sources as usize..f.source_count as usize] {
                if source.slots[0] == s as u32 {
                    let at = (px as usize, py as usize);
                    value += source.weight * add_sample(ram, &source.samples, 0, at, 0.0);
                }
            }
            value = value * ram.get::<f32>(f.gain, channel) + ram.get::<f32>(f.bias, channel);
            break;
        }
        let at = (y * f.latent_width as usize + x) * f.channels as usize + channel;
        ram.set(f.latent, at, f16::from_f32(value));
    });
}

/// Returns the scale and the value of the residual of a plane of the latent at its sample (x, y).
fn residual_at(ram: &Ram, f: &Frame, slot: &Slot, x: usize, y: usize) -> (f32, f32) {
    let r = slot.r as usize;
    let channel = slot.channel as usize + y % r * r + x % r;
    let row = usize::try_from((y / r) as i32 - f.residual_top).expect("a row above the residual");
    let column = x / r + f.residual_margin as usize;
    assert!(column < f.residual_width as usize);
    let at = (row * f.residual_width as usize + column) * f.channels as usize + channel;
    (
        ram.get::<f32>(f.residual_std, channel),
        ram.get::<f16>(f.residual, at).to_f32(),
    )
}

fn pack(ram: &mut Ram, shape: Shape, f: &Frame) {
    threads(shape, |block, thread| {
        let c = &f.components[f.tiled_components as usize + block[2]];
        let (column, y) = (
            block[0] * shape.block[0] as usize + thread[0],
            c.top as usize + block[1],
        );
        if column >= c.width as usize || block[1] >= c.rows as usize {
            return;
        }
        let x = column.min(c.last as usize);
        let mut value = add_sample(ram, &c.base, 0, (x, y), 0.0);
        let strength = ram.get::<f32>(f.strength, 0);
        let factor = strength * c.scale;
        let residual_at = |slot, x, y| {
            let (std, value) = residual_at(ram, f, slot, x, y);
            std * value
        };
        if c.slots[0] != NO_SLOT && strength > 0.0 {
            value += factor * residual_at(&f.slots[c.slots[0] as usize], x, y);
        }
        for which in 0..2 {
            if c.gains[which] == 0.0 || strength <= 0.0 {
                continue;
            }
            let mut sum = 0.0;
            let (x_taps, y_taps) = (f.x_taps as usize, f.y_taps as usize);
            for (j, i) in (0..y_taps).flat_map(|j| (0..x_taps).map(move |i| (j, i))) {
                let at = |starts, n| ram.get::<u32>(starts, n) as usize;
                sum += ram.get::<f32>(f.y_weights, y * y_taps + j)
                    * ram.get::<f32>(f.x_weights, x * x_taps + i)
                    * residual_at(
                        &f.slots[1 + which],
                        at(f.x_starts, x) + i,
                        at(f.y_starts, y) + j,
                    );
            }
            value += factor * c.gains[which] * sum;
        }
        let pixel = c.dst + (y * c.stride as usize + column * c.base.step as usize) as u64;
        store_code(ram, &c.base, pixel, 0, value);
        if f.filler != NO_FILLER && block[2] == 0 {
            ram.set(pixel, f.filler as usize, 255u8);
        }
    });
}

const STEP: usize = 24;

/// Returns two halves of shared memory.
fn pair_at(shared: &[f32], at: usize) -> [f32; 2] {
    [shared[at], shared[at + 1]]
}

/// Computes `mma.m16n8k16` with the fragment layouts of the PTX manual. With g = l / 4 and t = l %
/// 4, lane l holds:
/// - of `a`, rows g and g + 8 at columns 2t, 2t + 1, 2t + 8 and 2t + 9;
/// - of `b`, column g at rows 2t, 2t + 1, 2t + 8 and 2t + 9;
/// - of `d`, rows g and g + 8 at columns 2t and 2t + 1.
fn multiply(d: &mut [[f32; 4]; 32], a: &[[[f32; 2]; 4]; 32], b: &[[[f32; 2]; 2]; 32]) {
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for e in 0..2 {
            left[g][2 * t + e] = a[lane][0][e];
            left[g + 8][2 * t + e] = a[lane][1][e];
            left[g][2 * t + 8 + e] = a[lane][2][e];
            left[g + 8][2 * t + 8 + e] = a[lane][3][e];
            right[2 * t + e][g] = b[lane][0][e];
            right[2 * t + 8 + e][g] = b[lane][1][e];
        }
    }
    for (lane, sums) in d.iter_mut().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (i, sum) in sums.iter_mut().enumerate() {
            let (row, column) = (g + i / 2 * 8, 2 * t + i % 2);
            *sum += (0..16)
                .map(|k| left[row][k] * right[k][column])
                .sum::<f32>();
        }
    }
}

fn convolve(ram: &mut Ram, shape: Shape, p: &Conv, channels: (usize, usize)) {
    assert_eq!(shape.block, [32 * ROWS as u32, 1, 1]);
    let [gx, gy, gz] = shape.grid.map(|n| n as usize);
    for block in (0..gx * gy * gz).map(|i| [i % gx, i / gx % gy, i / gx / gy]) {
        convolve_block(ram, block, p, channels);
    }
}

fn convolve_block(ram: &mut Ram, block: [usize; 3], p: &Conv, (chunk, n): (usize, usize)) {
    let [in_width, in_height, ci, co] = [p.in_width, p.in_height, p.ci, p.co].map(|n| n as usize);
    let (left, top, first) = (block[0] * COLUMNS, block[1] * ROWS, block[2] * n);
    // Products of a row of three weights, halves of a cell and cells of a row in shared memory.
    let (products, step, width) = match chunk {
        4 => (1, 4, COLUMNS + 4),
        _ => (3, STEP, COLUMNS + 2),
    };
    let mut cells = vec![f32::NAN; (ROWS + 2) * width * step];
    let mut weights = vec![f32::NAN; 3 * products * n * STEP];
    let mut sums = vec![[[0.0; 4]; 32]; ROWS * 2 * (n / 8)];
    for index in 0..ci / chunk {
        for cell in 0..(ROWS + 2) * width {
            let (x, y) = (left + cell % width, top + cell / width);
            for e in 0..chunk {
                let inside = x < in_width && y < in_height;
                let at = (y * in_width + x) * ci + index * chunk + e;
                cells[cell * step + e] = if inside {
                    ram.get::<f16>(p.input, at).to_f32()
                } else {
                    0.0
                };
            }
        }
        for row in 0..3 * products * n {
            let at = (index * 3 * products + row / n) * co.max(n) + first + row % n;
            for e in 0..16 {
                weights[row * STEP + e] = ram.get::<f16>(p.weights, at * 16 + e).to_f32();
            }
        }
        let taps = (0..ROWS).flat_map(|warp| (0..3 * products).map(move |tap| (warp, tap)));
        for (warp, tap) in taps {
            let (ky, kx) = (tap / products, tap % products);
            let a = [0, 1].map(|m| {
                std::array::from_fn(|lane| {
                    let (group, pair) = (lane / 4, lane % 4 * 2);
                    let at = ((warp + ky) * width + 16 * m + kx + group) * step + pair;
                    [at, at + 8 * step, at + 8, at + 8 * step + 8].map(|at| pair_at(&cells, at))
                })
            });
            for tile in 0..n / 8 {
                let b = std::array::from_fn(|lane| {
                    let (group, pair) = (lane / 4, lane % 4 * 2);
                    let at = (tap * n + 8 * tile + group) * STEP + pair;
                    [at, at + 8].map(|at| pair_at(&weights, at))
                });
                for (m, a) in a.iter().enumerate() {
                    multiply(&mut sums[(warp * 2 + m) * (n / 8) + tile], a, &b);
                }
            }
        }
    }
    store(ram, (left, top, first), p, n, &sums);
}

fn store(
    ram: &mut Ram,
    (left, top, first): (usize, usize, usize),
    p: &Conv,
    n: usize,
    sums: &[[[f32; 4]; 32]],
) {
    let (out_width, out_height, co) = (
        p.in_width as usize - 2,
        p.in_height as usize - 2,
        p.co as usize,
    );
    for (index, sums) in sums.iter().enumerate() {
        let (warp, m, tile) = (index / (n / 8) / 2, index / (n / 8) % 2, index % (n / 8));
        let y = top + warp;
        for (lane, i) in (0..32).flat_map(|lane| (0..4).map(move |i| (lane, i))) {
            let (group, pair) = (lane / 4, lane % 4 * 2);
            let x = left + 16 * m + i / 2 * 8 + group;
            if y >= out_height || x >= out_width {
                continue;
            }
            let channel = first + 8 * tile + pair + i % 2;
            if channel >= co {
                continue;
            }
            let mut value = sums[lane][i] + ram.get::<f32>(p.bias, channel);
            value = if value > 0.0 { value } else { value * p.slope };
            if p.skip != 0 {
                let at = (y * p.skip_width as usize + x) * co + channel;
                value += ram.get::<f16>(p.skip, at).to_f32();
            }
            ram.set(
                p.output,
                (y * out_width + x) * co + channel,
                f16::from_f32(value),
            );
        }
    }
}
