use super::{
    sizes::{GROUP, PADDED, READ},
    *,
};
use crate::kernels::{
    conv::{Activation, ConvShape, reference},
    cpu::Cpu,
    simd::Isa,
    winograd::TILE,
};
use proptest::prelude::*;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn codes(len: usize, seed: u32) -> Vec<u8> {
    let code = |v: f32| (128.0 + 127.0 * v) as u8;
    values(len, seed).into_iter().map(code).collect()
}

/// Ranges of different widths and middles.
fn coding(channels: usize, seed: u32) -> Coding {
    let v = values(3 * channels, seed);
    let range = |c: usize| {
        let (low, width) = (v[3 * c], 1.2 + v[3 * c + 1]);
        [low, low + width, low + width * (0.5 + 0.4 * v[3 * c + 2])]
    };
    Coding::new(&(0..channels).map(range).collect::<Vec<_>>())
}

fn decoded(codes: &[u8], step: usize, coding: &Coding) -> Vec<f32> {
    let pixel = |pixel: &[u8]| {
        let channels = coding.low.iter().zip(&coding.step).zip(pixel);
        channels
            .map(|((low, step), &code)| low + step * f32::from(code))
            .collect::<Vec<_>>()
    };
    codes.chunks_exact(step).flat_map(pixel).collect()
}

fn all<const N: usize>(rows: &[u8]) -> [&[u8]; N] {
    let row = rows.len() / N;
    std::array::from_fn(|y| &rows[y * row..][..row])
}

fn all_mut<T>(rows: &mut [Vec<T>]) -> [&mut [T]; TILE] {
    let [a, b, c, d] = rows else {
        unreachable!("four rows")
    };
    [a, b, c, d].map(|r| &mut r[..])
}

/// A layer and a band for it.
#[derive(Debug, Clone)]
struct Case {
    ci: usize,
    co: usize,
    tiles: usize,
    weights: Vec<f32>,
    bias: Vec<f32>,
    slope: f32,
    input: Coding,
    first: bool,
    output: Coding,
    x: Vec<u8>,
    skip: Option<(Coding, Vec<u8>)>,
}

impl Case {
    fn layer(&self, codes: bool, variant: Variant) -> Int8 {
        let ends = Ends {
            input: &self.input,
            output: codes.then_some(&self.output),
            skip: self.skip.as_ref().map(|s| &s.0),
            first: self.first,
        };
        Int8::new(
            [self.co, self.ci],
            &self.weights,
            &self.bias,
            self.slope,
            ends,
            variant,
        )
    }

    fn codes(&self, variant: Variant) -> Vec<Vec<u8>> {
        let layer = self.layer(true, variant);
        // One more than the row has, to see that it is left alone.
        let mut rows = vec![vec![77; TILE * self.tiles * layer.output_step() + 1]; TILE];
        self.run(&layer, IntOutput::Codes(all_mut(&mut rows)));
        rows
    }

    fn values(&self, variant: Variant) -> Vec<Vec<f32>> {
        let layer = self.layer(false, variant);
        let mut rows = vec![vec![77.0; TILE * self.tiles * self.co + 1]; TILE];
        self.run(&layer, IntOutput::Values(all_mut(&mut rows)));
        rows
    }

    fn run(&self, layer: &Int8, output: IntOutput<u8>) {
        layer.run(IntBand {
            input: all(&self.x),
            skip: self.skip.as_ref().map(|s| all(&s.1)),
            output,
            tiles: self.tiles,
        });
    }

    fn by_the_formula(&self, codes: bool) -> Vec<f32> {
        let layer = self.layer(codes, Variant::Portable);
        // The reference has no padding in its input.
        let pixels = self.x.chunks_exact(layer.input_step());
        let x: Vec<u8> = pixels.flat_map(|p| &p[..self.ci]).copied().collect();
        let skip = self.skip.as_ref().map(|s| &s.1[..]);
        layer.reference(&self.weights, &self.input, &x, TILE * self.tiles + 2, skip)
    }
}

/// Numbers of input and output channels, a quarter of them as in the last layer at r = 2.
fn channels() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![3 => (1usize..70, 1usize..70), 1 => (1usize..17, Just(4))]
}

prop_compose! {
    fn cases()(
        (ci, co) in channels(), tiles in 1usize..14, first: bool, add: bool,
        slope in prop::sample::select(vec![0.0f32, 0.1, 1.0]), seed: u32,
    ) -> Case {
        let input_step = ci.next_multiple_of(if first { GROUP } else { PADDED });
        let width = TILE * tiles;
        let size = (2.0 / ci as f32).sqrt();
        let output_step = co.next_multiple_of(PADDED);
        Case {
            ci, co, tiles, slope, first,
            weights: values(co * ci * 9, seed ^ 1).iter().map(|v| v * size).collect(),
            bias: values(co, seed ^ 2),
            input: coding(ci, seed ^ 3),
            output: Coding::new(&vec![[-4.0, 5.0, 0.0]; co]),
            x: codes(READ * (width + 2) * input_step, seed),
            skip: add.then(|| (coding(co, seed ^ 4), codes(TILE * width * output_step, seed ^ 5))),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_formula(case in cases()) {
        let step = case.layer(true, Variant::Portable).output_step();
        let plain = Case { skip: None, ..case.clone() };
        let (want, floats) = (case.by_the_formula(true), plain.by_the_formula(false));
        let width = TILE * case.tiles;
        for variant in Variant::all(&Cpu::detected()) {
            let rows = case.codes(variant);
            for (i, want) in want.iter().enumerate() {
                let (y, x, c) = (i / case.co / width, i / case.co % width, i % case.co);
                let want = want.round_ties_even().clamp(0.0, 255.0) as u8;
                prop_assert_eq!(rows[y][x * step + c], want, "{:?} at {},{},{}", variant, y, x, c);
            }
            prop_assert!(rows.iter().all(|r| r.last() == Some(&77)), "{variant:?} writes beyond its rows");
            let rows = plain.values(variant);
            for (row, want) in rows.iter().zip(floats.chunks_exact(width * case.co)) {
                prop_assert_eq!(&row[..want.len()], want, "{:?}", variant);
                prop_assert_eq!(row.last(), Some(&77.0), "{:?} writes beyond its rows", variant);
            }
        }
    }

    /// A sum's error is that of the weights, half a step each, and where it becomes a code half a
    /// step of those.
    #[test]
    fn codes_are_close_to_what_floats_would_give(case in cases()) {
        let layer = case.layer(true, Variant::of(&Cpu::detected()));
        let (width, step) = (TILE * case.tiles, layer.output_step());
        let s = ConvShape { n: 1, h: READ, w: width + 2, ci: case.ci, co: case.co, kh: 3, kw: 3, stride: 1, pad: 0 };
        let x = decoded(&case.x, layer.input_step(), &case.input);
        let activation = Activation::LeakyRelu(case.slope);
        let mut want = reference(&s, &x, &case.weights, Some(&case.bias), activation);
        if let Some((coding, skip)) = &case.skip {
            let skip = decoded(skip, step, coding);
            want.iter_mut().zip(skip).for_each(|(y, s)| *y += s);
        }
        let rows = case.codes(Variant::of(&Cpu::detected()));
        let got = rows.iter().flat_map(|r| decoded(&r[..width * step], step, &case.output));
        let (mut error, mut most) = (0.0, 0.0f32);
        let count = want.len() as f64;
        for (got, want) in got.zip(&want) {
            let difference = got - want.clamp(-4.0, 5.0);
            error += f64::from(difference * difference);
            most = most.max(difference.abs());
        }
        // Codes of -4 to 5 have steps of 0.035.
        let error = (error / count).sqrt();
        prop_assert!(error < 0.03 && most < 0.2, "{error} on average, at most {most}");
    }

    #[test]
    fn values_become_the_nearest_code(channels in 1usize..40, pixels in 0usize..40, seed: u32) {
        let coding = coding(channels, seed);
        let step = channels.next_multiple_of(GROUP);
        let values = values(pixels * step, seed ^ 1);
        for isa in Isa::all(&Cpu::detected()) {
            let mut codes = vec![0; values.len()];
            coding.encode(&values, &mut codes, isa);
            for (values, codes) in values.chunks_exact(step).zip(codes.chunks_exact(step)) {
                for c in 0..channels {
                    let (low, step) = (coding.low[c], coding.step[c]);
                    let inside = values[c].clamp(low, low + 255.0 * step);
                    let error = (low + step * f32::from(codes[c]) - inside).abs();
                    prop_assert!(error < 0.5001 * step, "{} became {}", values[c], codes[c]);
                }
            }
        }
    }
}
