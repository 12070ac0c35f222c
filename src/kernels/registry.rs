//! All kernels, with every variant that a CPU can run and with their plain references, on small
//! problems. Tests compare the variants with the references, benchmarks time them.

mod bands;

use std::fmt;

use super::{
    attention::{self, AttentionShape},
    conv::{self, Activation, ConvShape, PackedConv, PackedUpConv},
    cpu::Cpu,
    elementwise, int8, int16,
    motion::{Field, MotionFrame},
    norm::{self, Affine, NormShape},
    resample::{self, LANES, WINDOW},
    shuffle,
    simd::Isa,
    temporal, upsample,
    winograd::{self, images},
};

/// A kernel at work on a problem; returns the result.
pub type Work = Box<dyn FnMut() -> Vec<f32>>;

/// One variant of a kernel.
pub struct Entry {
    /// Kernel and problem.
    pub kernel: &'static str,
    /// Instruction set or variant.
    pub variant: String,
    /// Maximum difference from the reference, relative to the largest value of the reference.
    pub tolerance: f32,
    prepare: Box<dyn Fn() -> Work>,
    reference: fn() -> Vec<f32>,
}

impl Entry {
    /// Prepares the problem; the returned work can be repeated.
    pub fn prepare(&self) -> Work {
        (self.prepare)()
    }

    /// Returns the result of the plain reference. For gradients of attention and group norm, for
    /// the GELU and for block motion, which have tests of their own, it is the result of the
    /// portable variant.
    pub fn reference(&self) -> Vec<f32> {
        (self.reference)()
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}, {}", self.kernel, self.variant)
    }
}

/// Returns all kernels with all variants that `cpu` can run. The portable one is always there.
pub fn all(cpu: &Cpu) -> Vec<Entry> {
    let mut all = Vec::new();
    let isas = Isa::all(cpu);
    let mut add = |kernel, tolerance, reference: fn() -> Vec<f32>, prepare: fn(Isa) -> Work| {
        all.extend(isas.iter().map(|&isa| Entry {
            kernel,
            variant: isa.name().into(),
            tolerance,
            prepare: Box::new(move || prepare(isa)),
            reference,
        }));
    };
    add("convolution 3x3", 1e-5, conv_reference, conv);
    add(
        "convolution 3x3, input gradient",
        1e-5,
        || conv_gradients().0,
        conv_grad_input,
    );
    add(
        "convolution 3x3, weight gradient",
        1e-5,
        || conv_gradients().1,
        conv_grad_weight,
    );
    add(
        "convolution 3x3 of an upsampled map",
        1e-5,
        up_conv_reference,
        up_conv,
    );
    add("Winograd, images", 2e-5, conv_reference, winograd_images);
    add(
        "Winograd, input gradient",
        2e-5,
        || conv_gradients().0,
        winograd_grad_input,
    );
    add(
        "Winograd, weight gradient",
        2e-5,
        || conv_gradients().1,
        winograd_grad_weight,
    );
    add("attention", 1e-5, attention_reference, attention_forward);
    add(
        "attention, gradients",
        2e-5,
        || attention_backward(Isa::Portable)(),
        attention_backward,
    );
    add("group norm and SiLU", 2e-6, norm_reference, norm_forward);
    add(
        "group norm and SiLU, gradients",
        1e-5,
        || norm_backward(Isa::Portable)(),
        norm_backward,
    );
    add(
        "sum",
        0.0,
        || zip(|a, b| a + b),
        |isa| map2(isa, elementwise::add),
    );
    add(
        "SiLU",
        1e-6,
        || zip(|x, _| x * sigmoid(x)),
        |isa| map1(isa, elementwise::silu),
    );
    add(
        "SiLU, gradient",
        1e-6,
        || zip(silu_gradient),
        |isa| map2(isa, elementwise::silu_grad),
    );
    add(
        "GELU",
        1e-6,
        || map1(Isa::Portable, elementwise::gelu)(),
        |isa| map1(isa, elementwise::gelu),
    );
    add(
        "GELU, gradient",
        1e-6,
        || map2(Isa::Portable, elementwise::gelu_grad)(),
        |isa| map2(isa, elementwise::gelu_grad),
    );
    add("samples to cells", 0.0, unshuffle_reference, unshuffle);
    add(
        "cells to samples",
        0.0,
        add_shuffled_reference,
        add_shuffled,
    );
    add("values to codes", 0.0, encode_reference, encode);
    add(
        "resampling, rows",
        1e-6,
        combine_rows_reference,
        combine_rows,
    );
    add(
        "resampling, one row",
        1e-6,
        combine_row_reference,
        combine_row,
    );
    add(
        "resampling, columns",
        1e-6,
        combine_columns_reference,
        combine_columns,
    );
    add("resampling, twofold", 1e-6, enlarge_reference, enlarge);
    add(
        "block motion",
        0.0,
        || block_motion(Isa::Portable)(),
        block_motion,
    );
    add("temporal filter, changes", 1e-5, changes_reference, changes);
    add("temporal filter, shares", 1e-5, shares_reference, shares);
    add("temporal filter, mix", 0.0, mix_reference, mix);
    all.extend(
        winograd::Variant::all(cpu)
            .into_iter()
            .map(|variant| Entry {
                kernel: "Winograd, band",
                variant: variant.name(),
                tolerance: if variant.is_bf16() { 0.1 } else { 2e-5 },
                prepare: Box::new(move || bands::winograd(variant)),
                reference: bands::reference,
            }),
    );
    all.extend(int8::Variant::all(cpu).into_iter().map(|variant| Entry {
        kernel: "int8, band",
        variant: variant.name().into(),
        tolerance: 0.0,
        prepare: Box::new(move || bands::int8(variant)),
        reference: bands::int8_reference,
    }));
    all.extend(int16::Variant::all(cpu).into_iter().map(|variant| Entry {
        kernel: "int16, band",
        variant: variant.name().into(),
        tolerance: 1e-2,
        prepare: Box::new(move || bands::int16(variant)),
        reference: bands::int16_reference,
    }));
    all
}

/// Returns values from -1 to 1 without pattern.
pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

const CONV: ConvShape = ConvShape {
    n: 2,
    h: 24,
    w: 33,
    ci: 32,
    co: 40,
    kh: 3,
    kw: 3,
    stride: 1,
    pad: 1,
};

const SLOPE: f32 = 0.1;

fn conv_input() -> Vec<f32> {
    values(CONV.n * CONV.h * CONV.w * CONV.ci, 1)
}

fn conv_weights() -> Vec<f32> {
    values(CONV.co * CONV.ci * 9, 2)
}

fn conv_bias() -> Vec<f32> {
    values(CONV.co, 3)
}

fn conv_gradient() -> Vec<f32> {
    values(CONV.n * CONV.h * CONV.w * CONV.co, 4)
}

fn conv_reference() -> Vec<f32> {
    let (x, w, bias) = (conv_input(), conv_weights(), conv_bias());
    conv::reference(&CONV, &x, &w, Some(&bias), Activation::LeakyRelu(SLOPE))
}

fn conv_gradients() -> (Vec<f32>, Vec<f32>) {
    conv::reference_gradients(&CONV, &conv_input(), &conv_weights(), &conv_gradient())
}

fn conv(isa: Isa) -> Work {
    let x = conv_input();
    let packed = PackedConv::new(&CONV, &conv_weights(), Some(&conv_bias()), isa);
    let len = conv_gradient().len();
    Box::new(move || {
        let mut y = vec![f32::NAN; len];
        packed.forward(&CONV, &x, Activation::LeakyRelu(SLOPE), &mut y);
        y
    })
}

fn conv_grad_input(isa: Isa) -> Work {
    let (g, w, len) = (conv_gradient(), conv_weights(), conv_input().len());
    Box::new(move || {
        let mut gx = vec![f32::NAN; len];
        conv::grad_input(&CONV, &g, &w, isa, &mut gx);
        gx
    })
}

fn conv_grad_weight(isa: Isa) -> Work {
    let (x, g, len) = (conv_input(), conv_gradient(), conv_weights().len());
    Box::new(move || {
        let mut gw = vec![f32::NAN; len];
        conv::grad_weight(&CONV, &x, &g, isa, &mut gw);
        gw
    })
}

fn up_conv_reference() -> Vec<f32> {
    let large = upsample::forward(CONV.w, CONV.ci, &conv_input());
    let shape = ConvShape {
        h: 2 * CONV.h,
        w: 2 * CONV.w,
        ..CONV
    };
    let (w, bias) = (conv_weights(), conv_bias());
    conv::reference(&shape, &large, &w, Some(&bias), Activation::None)
}

fn up_conv(isa: Isa) -> Work {
    let (x, len) = (conv_input(), 4 * conv_gradient().len());
    let packed = PackedUpConv::new(CONV.ci, CONV.co, &conv_weights(), &conv_bias(), isa);
    Box::new(move || {
        let mut y = vec![f32::NAN; len];
        packed.forward([CONV.n, CONV.h, CONV.w], &x, None, Activation::None, &mut y);
        y
    })
}

fn winograd_images(isa: Isa) -> Work {
    let (x, w, bias) = (conv_input(), conv_weights(), conv_bias());
    let len = conv_gradient().len();
    Box::new(move || {
        let mut y = vec![f32::NAN; len];
        images::forward(&CONV, &x, &w, &bias, SLOPE, isa, &mut y);
        y
    })
}

fn winograd_grad_input(isa: Isa) -> Work {
    let (g, w, len) = (conv_gradient(), conv_weights(), conv_input().len());
    Box::new(move || {
        let mut gx = vec![f32::NAN; len];
        images::grad_input(&CONV, &g, &w, isa, &mut gx);
        gx
    })
}

fn winograd_grad_weight(isa: Isa) -> Work {
    let (x, g, len) = (conv_input(), conv_gradient(), conv_weights().len());
    Box::new(move || {
        let mut gw = vec![f32::NAN; len];
        images::grad_weight(&CONV, &x, &g, isa, &mut gw);
        gw
    })
}

const ATTENTION: AttentionShape = AttentionShape {
    n: 1,
    h: 16,
    w: 24,
    heads: 2,
    d: 19,
    wh: 8,
    ww: 8,
    shift: 3,
};

/// Returns queries, keys and values, the bias, and a gradient of the result.
fn attention_inputs() -> [Vec<f32>; 3] {
    let s = ATTENTION;
    let len = s.n * s.h * s.w * s.heads * s.d;
    let window = s.wh * s.ww;
    [
        values(3 * len, 6),
        values(s.heads * window * window, 7),
        values(len, 8),
    ]
}

fn attention_reference() -> Vec<f32> {
    let [qkv, bias, _] = attention_inputs();
    attention::reference(&ATTENTION, &qkv, Some(&bias))
}

fn attention_forward(isa: Isa) -> Work {
    let [qkv, bias, g] = attention_inputs();
    Box::new(move || {
        let mut y = vec![f32::NAN; g.len()];
        attention::forward(&ATTENTION, &qkv, Some(&bias), isa, &mut y);
        y
    })
}

fn attention_backward(isa: Isa) -> Work {
    let [qkv, bias, g] = attention_inputs();
    let mut y = vec![f32::NAN; g.len()];
    let lse = attention::forward(&ATTENTION, &qkv, Some(&bias), isa, &mut y);
    Box::new(move || {
        let (mut all, bias) = attention::backward(&ATTENTION, &qkv, Some(&bias), &y, &lse, &g, isa);
        all.extend(bias.unwrap_or_default());
        all
    })
}

const NORM: NormShape = NormShape {
    n: 2,
    pixels: 1013,
    channels: 42,
    groups: 6,
};

const EPS: f64 = 1e-6;

/// Returns values, weight, bias, and a gradient of the result.
fn norm_inputs() -> [Vec<f32>; 4] {
    let len = NORM.n * NORM.pixels * NORM.channels;
    [
        values(len, 9),
        values(NORM.channels, 10),
        values(NORM.channels, 11),
        values(len, 12),
    ]
}

fn norm_reference() -> Vec<f32> {
    let [x, weight, bias, _] = norm_inputs();
    norm::reference(&NORM, &x, EPS, &weight, &bias, true)
}

fn norm_forward(isa: Isa) -> Work {
    let [x, weight, bias, _] = norm_inputs();
    Box::new(move || {
        let affine = Affine {
            weight: &weight,
            bias: &bias,
        };
        let moments = norm::moments(&NORM, &x, EPS, isa);
        norm::forward(&NORM, &x, &moments, &affine, true, isa)
    })
}

fn norm_backward(isa: Isa) -> Work {
    let [x, weight, bias, g] = norm_inputs();
    let moments = norm::moments(&NORM, &x, EPS, isa);
    Box::new(move || {
        let affine = Affine {
            weight: &weight,
            bias: &bias,
        };
        let gradients = norm::backward(&NORM, &x, &moments, &affine, true, &g, isa);
        // The sums over all pixels are larger than the gradient of the input.
        let mean = |v: &f32| v / NORM.pixels as f32;
        let sums = gradients.weight.iter().chain(&gradients.bias).map(mean);
        gradients.x.iter().copied().chain(sums).collect()
    })
}

/// Returns two inputs of element-wise kernels, -8 to 8.
fn pair() -> [Vec<f32>; 2] {
    [13, 14].map(|seed| values(20_011, seed).iter().map(|v| 8.0 * v).collect())
}

fn map1(isa: Isa, f: fn(&[f32], Isa) -> Vec<f32>) -> Work {
    let [x, _] = pair();
    Box::new(move || f(&x, isa))
}

fn map2(isa: Isa, f: fn(&[f32], &[f32], Isa) -> Vec<f32>) -> Work {
    let [x, g] = pair();
    Box::new(move || f(&x, &g, isa))
}

/// Applies a formula in f64 to both inputs.
fn zip(f: fn(f64, f64) -> f64) -> Vec<f32> {
    let [a, b] = pair();
    let pairs = a.iter().zip(&b);
    pairs.map(|(&a, &b)| f(a.into(), b.into()) as f32).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu_gradient(x: f64, g: f64) -> f64 {
    let s = sigmoid(x);
    g * s * (1.0 + x * (1.0 - s))
}

/// Side of a cell, and cells in a row.
const R: usize = 4;
const CELLS: usize = 301;

/// Returns `R` rows of samples, means, scales, and cells.
fn cells() -> [Vec<f32>; 4] {
    let len = R * R * CELLS;
    [
        values(len, 15),
        values(R * R, 16),
        values(R * R, 17),
        values(len, 18),
    ]
}

fn unshuffle_reference() -> Vec<f32> {
    let [rows, mean, scale, _] = cells();
    let sample = |i: usize| {
        let (cell, c) = (i / (R * R), i % (R * R));
        (rows[c / R * R * CELLS + cell * R + c % R] - mean[c]) * scale[c]
    };
    (0..rows.len()).map(sample).collect()
}

fn unshuffle(isa: Isa) -> Work {
    let [rows, mean, scale, cells] = cells();
    Box::new(move || {
        let mut out = vec![f32::NAN; cells.len()];
        shuffle::unshuffle(isa, R, &rows, R * CELLS, (&mean, &scale), &mut out, R * R);
        out
    })
}

fn add_shuffled_reference() -> Vec<f32> {
    let [rows, _, gain, cells] = cells();
    let sample = |x: usize| rows[x] + gain[x % R] * cells[x / R * R * R + x % R];
    (0..R * CELLS).map(sample).collect()
}

fn add_shuffled(isa: Isa) -> Work {
    let [rows, _, gain, cells] = cells();
    Box::new(move || {
        let mut out = vec![f32::NAN; R * CELLS];
        shuffle::add_shuffled(
            isa,
            R,
            &rows[..R * CELLS],
            &gain[..R],
            &cells,
            R * R,
            &mut out,
        );
        out
    })
}

/// Returns the changes between two rows, and their mean.
fn changes_reference() -> Vec<f32> {
    let [a, b, _] = change_rows();
    let mut out: Vec<f32> = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).collect();
    out.push(out.iter().sum::<f32>() / out.len() as f32);
    out
}

fn changes(isa: Isa) -> Work {
    let [a, b, _] = change_rows();
    Box::new(move || {
        let mut out = vec![f32::NAN; WIDTH];
        let sum = temporal::changes(isa, &a, &b, &mut out);
        out.push(sum / WIDTH as f32);
        out
    })
}

/// Size of frames with motion.
const MOTION: [usize; 2] = [97, 70];

fn block_motion(isa: Isa) -> Work {
    let [w, h] = MOTION;
    let mut frames = [26, 27].map(|seed| {
        let luma: Vec<f32> = values(w * h, seed).iter().map(|v| v.abs()).collect();
        (MotionFrame::new(w, h), luma)
    });
    Box::new(move || {
        for (frame, luma) in &mut frames {
            frame.set(luma, isa);
        }
        let mut field = Field::new(w, h);
        field.search(&frames[0].0, &frames[1].0, isa);
        let vectors = field
            .vectors
            .iter()
            .flat_map(|v| [f32::from(v.x), f32::from(v.y)]);
        vectors
            .chain(field.differences.iter().map(|d| *d as f32))
            .collect()
    })
}

/// Largest share, and limit of the change.
const SHARE: f32 = 0.6;
const LIMIT: f32 = 1.5;

/// Returns three rows of changes.
fn change_rows() -> [Vec<f32>; 3] {
    [23, 24, 25].map(|seed| values(WIDTH, seed).iter().map(|v| v.abs()).collect())
}

fn shares_reference() -> Vec<f32> {
    let rows = change_rows();
    let share = |x: usize| {
        let around = [x.saturating_sub(1), x, (x + 1).min(WIDTH - 1)];
        let sum: f32 = rows.iter().flat_map(|row| around.map(|x| row[x])).sum();
        SHARE * (1.0 - sum / 9.0 / LIMIT).max(0.0).powi(2)
    };
    (0..WIDTH).map(share).collect()
}

fn shares(isa: Isa) -> Work {
    let rows = change_rows();
    Box::new(move || {
        let mut out = vec![f32::NAN; WIDTH];
        let rows = rows.each_ref().map(Vec::as_slice);
        temporal::shares(isa, rows, LIMIT, SHARE, &mut out);
        out
    })
}

fn mix_reference() -> Vec<f32> {
    let [new, _, _, last] = cells();
    let [shares, ..] = change_rows();
    let mixed = new.iter().zip(&last).take(R * CELLS).enumerate();
    mixed
        .map(|(i, (new, last))| new + shares[i / R] * (last - new))
        .collect()
}

fn mix(isa: Isa) -> Work {
    let [new, _, _, last] = cells();
    let [shares, ..] = change_rows();
    Box::new(move || {
        let (mut values, mut last) = (new[..R * CELLS].to_vec(), last[..R * CELLS].to_vec());
        temporal::mix(isa, R, &shares[..CELLS], &mut values, &mut last);
        values
    })
}

/// Returns the range of values that are coded: the code of `v` is the integer nearest to
/// `255 (v + 0.9) / 1.8`.
const RANGE: [f32; 3] = [-0.9, 0.9, 0.0];

fn encode_reference() -> Vec<f32> {
    let step = (RANGE[1] - RANGE[0]) / 255.0;
    let (scale, offset) = (1.0 / step, -RANGE[0] / step);
    let code = |v: f32| (v * scale + offset).clamp(0.0, 255.0).round_ties_even();
    cells()[3].iter().map(|&v| code(v)).collect()
}

fn encode(isa: Isa) -> Work {
    let coding = int8::Coding::new(&[RANGE; R * R]);
    let [_, _, _, cells] = cells();
    Box::new(move || {
        let mut codes = vec![0; cells.len()];
        coding.encode(&cells, &mut codes, isa);
        codes.into_iter().map(f32::from).collect()
    })
}

/// Width of rows, taps of a filter.
const WIDTH: usize = 307;
const TAPS: usize = 6;

/// Returns as many rows as there are lanes, and filters for each sample.
fn rows() -> [Vec<f32>; 2] {
    [values(LANES * WIDTH, 19), values(WIDTH * TAPS, 20)]
}

fn starts() -> Vec<u32> {
    (0..WIDTH)
        .map(|i| (i * (WIDTH - TAPS) / WIDTH) as u32)
        .collect()
}

/// Returns row `r`, filtered along the row.
fn filtered(r: usize) -> impl Iterator<Item = f32> {
    let [rows, weights] = rows();
    starts().into_iter().enumerate().map(move |(j, start)| {
        let source = &rows[r * WIDTH + start as usize..][..TAPS];
        source
            .iter()
            .zip(&weights[j * TAPS..])
            .map(|(s, w)| s * w)
            .sum()
    })
}

fn combine_rows_reference() -> Vec<f32> {
    let [rows, weights] = rows();
    let sample = |x: usize| (0..TAPS).map(|k| rows[k * WIDTH + x] * weights[k]).sum();
    (0..WIDTH).map(sample).collect()
}

fn combine_rows(isa: Isa) -> Work {
    let [rows, weights] = rows();
    Box::new(move || {
        let mut out = vec![f32::NAN; WIDTH];
        resample::combine_rows(isa, &mut out, &rows, WIDTH, &weights[..TAPS]);
        out
    })
}

fn combine_row_reference() -> Vec<f32> {
    filtered(0).collect()
}

fn combine_row(isa: Isa) -> Work {
    let ([rows, weights], starts) = (rows(), starts());
    Box::new(move || {
        let mut out = vec![f32::NAN; WIDTH];
        resample::combine_row(isa, &mut out, &rows[..WIDTH], &starts, &weights, TAPS);
        out
    })
}

fn combine_columns_reference() -> Vec<f32> {
    (0..LANES).flat_map(filtered).collect()
}

fn combine_columns(isa: Isa) -> Work {
    let ([rows, weights], starts) = (rows(), starts());
    let mut columns = vec![[0.0; LANES]; WIDTH];
    Box::new(move || {
        let mut out = vec![f32::NAN; LANES * WIDTH];
        resample::transpose(isa, &mut columns, &rows);
        resample::combine_columns(isa, &mut out, &columns, &starts, &weights, TAPS);
        out
    })
}

fn windows() -> [[f32; WINDOW]; 2] {
    [21, 22].map(|seed| std::array::from_fn(|i| values(WINDOW, seed)[i]))
}

fn enlarge_reference() -> Vec<f32> {
    let ([rows, _], windows) = (rows(), windows());
    let sample = |j: usize| {
        let source = &rows[j / 2..][..WINDOW];
        source.iter().zip(windows[j % 2]).map(|(s, w)| s * w).sum()
    };
    (0..2 * WIDTH).map(sample).collect()
}

fn enlarge(isa: Isa) -> Work {
    let ([rows, _], windows) = (rows(), windows());
    Box::new(move || {
        let mut out = vec![f32::NAN; 2 * WIDTH];
        resample::enlarge2(isa, &mut out, &rows, &windows);
        out
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_variant_of_every_kernel_agrees_with_its_reference() {
        for entry in all(&Cpu::detected()) {
            let (want, mut work) = (entry.reference(), entry.prepare());
            for _ in 0..2 {
                let got = work();
                assert_eq!(got.len(), want.len(), "{entry:?}");
                let max = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let off = (got - want).abs();
                    assert!(
                        off <= entry.tolerance * max,
                        "{entry:?} at {i}: {got}, not {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_kernel_has_a_portable_variant() {
        let kernels = |cpu: &Cpu| -> BTreeSet<_> { all(cpu).iter().map(|e| e.kernel).collect() };
        assert_eq!(kernels(&Cpu::PORTABLE), kernels(&Cpu::detected()));
        for entry in all(&Cpu::PORTABLE) {
            assert!(entry.variant.contains("portable"), "{entry:?}");
        }
    }

    #[test]
    fn a_lowered_cpu_has_no_variant_above_its_level() {
        let cpu = Cpu::detected().lowered("avx2").unwrap_or(Cpu::PORTABLE);
        for entry in all(&cpu) {
            assert!(!entry.variant.contains("avx512"), "{entry:?}");
            assert!(!entry.variant.contains("vnni"), "{entry:?}");
        }
    }
}
