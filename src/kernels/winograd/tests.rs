use super::{sizes::SIDE, *};
use crate::kernels::{
    conv::{Activation, ConvShape, reference},
    cpu::Cpu,
};
use proptest::prelude::*;

/// Returns `len` pseudo-random values from -1 to 1.
pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Splits `x`, pixels of `c` channels, into rows of `width` pixels. Each pixel is extended to
/// `step` floats with `padding`.
fn padded(x: &[f32], width: usize, c: usize, step: usize, padding: f32) -> Vec<Vec<f32>> {
    let pixel = |p: &[f32]| {
        let mut pixel = p.to_vec();
        pixel.resize(step, padding);
        pixel
    };
    let row = |row: &[f32]| row.chunks_exact(c).flat_map(pixel).collect();
    x.chunks_exact(width * c).map(row).collect()
}

fn row_slices<const N: usize>(rows: &[Vec<f32>]) -> [&[f32]; N] {
    std::array::from_fn(|y| &rows[y][..])
}

fn row_slices_mut(rows: &mut [Vec<f32>]) -> [&mut [f32]; TILE] {
    let [a, b, c, d] = rows else {
        unreachable!("four rows")
    };
    [a, b, c, d].map(|r| &mut r[..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_variant_agrees_with_direct_convolution(
        ci in 1usize..70, co in 1usize..90, tiles in 0usize..30, add: bool, dense: bool,
        slope in prop::sample::select(vec![0.0f32, 0.1, 1.0]), seed: u32,
    ) {
        let (w, h) = (TILE * tiles + 2, SIDE);
        let s = ConvShape { n: 1, h, w, ci, co, kh: 3, kw: 3, stride: 1, pad: 0 };
        let x = values(h * w * ci, seed);
        let scale = (1.0 / ci as f32).sqrt();
        let weights: Vec<_> = values(co * ci * 9, seed ^ 1).iter().map(|v| v * scale).collect();
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
            // The last float is beyond the row. It must stay NaN.
            let mut output = vec![vec![f32::NAN; row + 1]; TILE];
            let band = Band {
                input: row_slices(&input),
                skip: (add && tiles > 0).then(|| row_slices(&skip)),
                output: row_slices_mut(&mut output),
                out_step,
                tiles,
            };
            conv.run(band, &mut Vec::new());
            let (mut error, mut norm) = (0.0, 0.0);
            for (i, want) in expected.iter().enumerate() {
                let (pixel, channel) = (i / co, i % co);
                let (y, x) = (pixel / (TILE * tiles), pixel % (TILE * tiles));
                let got = output[y][x * out_step + channel];
                prop_assert!(
                    (got - want).abs() <= if bf16 { 0.6 } else { 1e-4 } * (1.0 + want.abs()),
                    "{variant:?} at {y},{x},{channel}: {got}, expected {want}"
                );
                error += f64::from((got - want) * (got - want));
                norm += f64::from(want * want);
            }
            // With few outputs the rounding to bf16 hardly averages. A wrong product is an error of
            // the size of the values.
            prop_assert!(
                error.sqrt() <= 0.1 * norm.sqrt(),
                "{variant:?}: squared error {error} of {norm}"
            );
            prop_assert!(
                output.iter().all(|r| r[row].is_nan()),
                "{variant:?} writes beyond its rows"
            );
        }
    }
}

/// The transform multiplies the outer input columns of a tile by zero for the inner output columns.
#[test]
fn outer_input_columns_change_no_bit_of_inner_output_columns() {
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
            input: row_slices(&input),
            skip: None,
            output: row_slices_mut(&mut output),
            out_step: 3,
            tiles: 1,
        };
        conv.run(band, &mut Vec::new());
        output.concat()
    };
    let (a, b) = (run(0.0, 0.0), run(1e3, -1e6));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let inner = (1..=2).contains(&(i / 3 % TILE));
        assert_eq!(a == b, inner, "column {}", i / 3 % TILE);
    }
}
