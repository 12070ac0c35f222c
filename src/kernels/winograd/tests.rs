use super::{sizes::SIDE, *};
use crate::kernels::{
    conv::{Activation, ConvShape, reference},
    cpu::Cpu,
};
use proptest::prelude::*;

pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Rows of pixels of `c` channels as rows of pixels of `step` floats.
fn padded(x: &[f32], width: usize, c: usize, step: usize, padding: f32) -> Vec<Vec<f32>> {
    let pixel = |p: &[f32]| {
        let mut pixel = p.to_vec();
        pixel.resize(step, padding);
        pixel
    };
    let row = |row: &[f32]| row.chunks_exact(c).flat_map(pixel).collect();
    x.chunks_exact(width * c).map(row).collect()
}

fn all<const N: usize>(rows: &[Vec<f32>]) -> [&[f32]; N] {
    std::array::from_fn(|y| &rows[y][..])
}

fn all_mut(rows: &mut [Vec<f32>]) -> [&mut [f32]; TILE] {
    let [a, b, c, d] = rows else {
        unreachable!("four rows")
    };
    [a, b, c, d].map(|r| &mut r[..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_instruction_set_agrees_with_the_formula(
        ci in 1usize..70, co in 1usize..90, tiles in 0usize..30, add: bool, dense: bool,
        slope in prop::sample::select(vec![0.0f32, 0.1, 1.0]), seed: u32,
    ) {
        let (w, h) = (TILE * tiles + 2, SIDE);
        let s = ConvShape { n: 1, h, w, ci, co, kh: 3, kw: 3, stride: 1, pad: 0 };
        let x = values(h * w * ci, seed);
        let size = (1.0 / ci as f32).sqrt();
        let weights: Vec<_> = values(co * ci * 9, seed ^ 1).iter().map(|v| v * size).collect();
        let bias = values(co, seed ^ 2);
        let skip = values(TILE * TILE * tiles * co, seed ^ 3);
        let mut expected = reference(&s, &x, &weights, Some(&bias), Activation::LeakyRelu(slope));
        if add {
            expected.iter_mut().zip(&skip).for_each(|(y, s)| *y += s);
        }
        for variant in Variant::all(&Cpu::detected()) {
            let bf16 = variant.is_bf16();
            let conv = Winograd::new([co, ci], &weights, &bias, slope, variant);
            let padding = if bf16 { 1e3 } else { f32::NAN };
            let input = padded(&x, w, ci, conv.input_step(), padding);
            let skip = padded(&skip, TILE * tiles.max(1), co, conv.output_step(), f32::NAN);
            let out_step = if dense { co } else { conv.output_step() };
            let row = TILE * tiles * out_step;
            // One float more than the row has, to see that it is left alone.
            let mut output = vec![vec![f32::NAN; row + 1]; TILE];
            let band = Band {
                input: all(&input),
                skip: (add && tiles > 0).then(|| all(&skip)),
                output: all_mut(&mut output),
                out_step,
                tiles,
            };
            conv.run(band, &mut Vec::new());
            let (mut error, mut size) = (0.0, 0.0);
            for (i, want) in expected.iter().enumerate() {
                let (pixel, channel) = (i / co, i % co);
                let (y, x) = (pixel / (TILE * tiles), pixel % (TILE * tiles));
                let got = output[y][x * out_step + channel];
                prop_assert!(
                    (got - want).abs() <= if bf16 { 0.6 } else { 1e-4 } * (1.0 + want.abs()),
                    "{variant:?} at {y},{x},{channel}: {got}, not {want}"
                );
                error += f64::from((got - want) * (got - want));
                size += f64::from(want * want);
            }
            prop_assert!(error.sqrt() <= 0.05 * size.sqrt(), "{variant:?}: {error} of {size}");
            prop_assert!(output.iter().all(|r| r[row].is_nan()), "{variant:?} writes beyond its rows");
        }
    }
}

/// The transform multiplies an input in a corner that an output does not see with zeros only.
#[test]
fn a_column_beside_the_window_changes_no_bit() {
    let (w, h) = (TILE + 2, SIDE);
    let (weights, bias) = (values(54, 1), values(3, 2));
    let conv = Winograd::new([3, 2], &weights, &bias, 0.1, Variant::f32(&Cpu::detected()));
    let run = |left: f32, right: f32| {
        let mut x = values(w * h * 2, 3);
        for row in x.chunks_exact_mut(w * 2) {
            row[..2].fill(left);
            row[w * 2 - 2..].fill(right);
        }
        let input = padded(&x, w, 2, conv.input_step(), f32::NAN);
        let mut output = vec![vec![0.0; 12]; TILE];
        let band = Band {
            input: all(&input),
            skip: None,
            output: all_mut(&mut output),
            out_step: 3,
            tiles: 1,
        };
        conv.run(band, &mut Vec::new());
        output.concat()
    };
    let (a, b) = (run(0.0, 0.0), run(1e3, -1e6));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let inside = (1..=2).contains(&(i / 3 % TILE));
        assert_eq!(a == b, inside, "column {}", i / 3 % TILE);
    }
}
