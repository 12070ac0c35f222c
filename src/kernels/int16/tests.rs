use super::{
    sizes::{LARGEST, PADDED, SIDE},
    *,
};
use crate::kernels::{
    conv::{Activation, ConvShape, reference},
    cpu::Cpu,
    int8::{IntBand, IntOutput},
    registry::values,
    simd::Isa,
    winograd::TILE,
};
use proptest::prelude::*;

/// Codes of pixels of `channels`, with padding of zeros. If `extreme`, only the largest and the
/// smallest.
fn codes(pixels: usize, channels: usize, extreme: bool, seed: u32) -> Vec<i16> {
    let code = |v: f32| match extreme {
        true => LARGEST * v.signum() as i16,
        false => (f32::from(LARGEST) * v) as i16,
    };
    let step = channels.next_multiple_of(PADDED);
    let mut codes = vec![0; pixels * step];
    let values = values(pixels * channels, seed);
    for (pixel, values) in codes
        .chunks_exact_mut(step)
        .zip(values.chunks_exact(channels))
    {
        pixel
            .iter_mut()
            .zip(values)
            .for_each(|(c, &v)| *c = code(v));
    }
    codes
}

/// Ranges of different widths and middles.
fn coding(channels: usize, seed: u32) -> Coding {
    let v = values(3 * channels, seed);
    let range = |c: usize| [v[3 * c], v[3 * c] + 1.2 + v[3 * c + 1], v[3 * c]];
    Coding::new(&(0..channels).map(range).collect::<Vec<_>>())
}

fn decoded(codes: &[i16], step: usize, coding: &Coding) -> Vec<f32> {
    let pixel = |pixel: &[i16]| {
        let channels = coding.middle.iter().zip(&coding.step).zip(pixel);
        channels
            .map(|((middle, step), &code)| middle + step * f32::from(code))
            .collect::<Vec<_>>()
    };
    codes.chunks_exact(step).flat_map(pixel).collect()
}

fn all<const N: usize>(rows: &[i16]) -> [&[i16]; N] {
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
    output: Coding,
    x: Vec<i16>,
    skip: Option<(Coding, Vec<i16>)>,
}

impl Case {
    fn layer(&self, codes: bool, variant: Variant) -> Int16 {
        let ends = Ends {
            input: &self.input,
            output: codes.then_some(&self.output),
            skip: self.skip.as_ref().map(|s| &s.0),
        };
        let channels = [self.co, self.ci];
        Int16::new(
            channels,
            &self.weights,
            &self.bias,
            self.slope,
            ends,
            variant,
        )
    }

    fn codes(&self, variant: Variant) -> Vec<Vec<i16>> {
        let layer = self.layer(true, variant);
        // One more than the row has, to see that it is left alone.
        let mut rows = vec![vec![777; TILE * self.tiles * layer.output_step() + 1]; TILE];
        self.run(&layer, IntOutput::Codes(all_mut(&mut rows)));
        rows
    }

    fn values(&self, variant: Variant) -> Vec<Vec<f32>> {
        let layer = self.layer(false, variant);
        let mut rows = vec![vec![77.0; TILE * self.tiles * self.co + 1]; TILE];
        self.run(&layer, IntOutput::Values(all_mut(&mut rows)));
        rows
    }

    fn run(&self, layer: &Int16, output: IntOutput<i16>) {
        let band = IntBand {
            input: all(&self.x),
            skip: self.skip.as_ref().map(|s| all(&s.1)),
            output,
            tiles: self.tiles,
        };
        layer.run(band, &mut Vec::new());
    }

    /// Returns the output in f32 before it is coded, and the sum of the absolute products of each.
    fn by_the_formula(&self) -> [Vec<f32>; 2] {
        let width = TILE * self.tiles + 2;
        let [ci, co] = [self.ci, self.co];
        let s = ConvShape {
            n: 1,
            h: SIDE,
            w: width,
            ci,
            co,
            kh: 3,
            kw: 3,
            stride: 1,
            pad: 0,
        };
        let x = decoded(&self.x, ci.next_multiple_of(PADDED), &self.input);
        let activation = Activation::LeakyRelu(self.slope);
        let mut want = reference(&s, &x, &self.weights, Some(&self.bias), activation);
        if let Some((coding, skip)) = &self.skip {
            let skip = decoded(skip, co.next_multiple_of(PADDED), coding);
            want.iter_mut().zip(skip).for_each(|(y, s)| *y += s);
        }
        // Codes lie about their middle.
        let size = |i: usize| self.input.step[i / 9 % ci] * f32::from(LARGEST);
        let weights: Vec<_> = (0..)
            .zip(&self.weights)
            .map(|(i, w)| w.abs() * size(i))
            .collect();
        let ones = vec![1.0; x.len()];
        let sizes = reference(&s, &ones, &weights, None, Activation::LeakyRelu(1.0));
        [want, sizes]
    }
}

prop_compose! {
    fn cases()(
        ci in 1usize..70, co in 1usize..70, tiles in 1usize..30, add: bool, extreme: bool,
        slope in prop::sample::select(vec![0.0f32, 0.1, 1.0]), seed: u32,
    ) -> Case {
        let width = TILE * tiles;
        let size = (2.0 / ci as f32).sqrt();
        Case {
            ci, co, tiles, slope,
            weights: values(co * ci * 9, seed ^ 1).iter().map(|v| v * size).collect(),
            bias: values(co, seed ^ 2),
            input: coding(ci, seed ^ 3),
            output: Coding::new(&vec![[-4.0, 5.0, 0.0]; co]),
            x: codes(SIDE * (width + 2), ci, extreme, seed),
            skip: add.then(|| (coding(co, seed ^ 4), codes(TILE * width, co, extreme, seed ^ 5))),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The portable variant panics in tests if an integer overflows.
    #[test]
    fn every_instruction_set_gives_the_same_bits(case in cases()) {
        let plain = Case { skip: None, ..case.clone() };
        let (codes, values) = (case.codes(Variant::Portable), plain.values(Variant::Portable));
        prop_assert!(codes.iter().all(|r| r.last() == Some(&777)), "codes beyond the rows");
        prop_assert!(values.iter().all(|r| r.last() == Some(&77.0)), "values beyond the rows");
        for variant in Variant::all(&Cpu::detected()) {
            prop_assert!(case.codes(variant) == codes, "{variant:?}, codes");
            prop_assert!(plain.values(variant) == values, "{variant:?}, values");
        }
    }

    /// The rounding of the weights changes a sum by less than 0.3 % of its largest value. Codes of
    /// -4 to 5 have steps of 0.018.
    #[test]
    fn results_are_close_to_those_of_floats(case in cases()) {
        let variant = Variant::of(&Cpu::detected());
        let plain = Case { skip: None, ..case.clone() };
        let width = TILE * case.tiles;
        let [want, sizes] = plain.by_the_formula();
        let rows = plain.values(variant);
        let got = rows.iter().flat_map(|r| &r[..width * case.co]);
        for ((got, want), size) in got.zip(&want).zip(&sizes) {
            prop_assert!((got - want).abs() < 3e-3 * size, "{got}, not {want} of {size}");
        }
        let [want, sizes] = case.by_the_formula();
        let (rows, step) = (case.codes(variant), case.co.next_multiple_of(PADDED));
        let got = rows.iter().flat_map(|r| decoded(&r[..width * step], step, &case.output));
        for ((got, want), size) in got.zip(&want).zip(&sizes) {
            let want = want.clamp(-4.0, 5.0);
            prop_assert!((got - want).abs() < 0.01 + 3e-3 * size, "{got}, not {want} of {size}");
        }
        // Padding is the input of the next layer.
        for pixel in rows.iter().flat_map(|r| r.chunks_exact(step)) {
            prop_assert!(pixel[case.co..].iter().all(|&c| c == 0), "padding of {pixel:?}");
        }
    }

    #[test]
    fn values_become_the_nearest_code(channels in 1usize..40, pixels in 0usize..40, seed: u32) {
        let coding = coding(channels, seed);
        let step = channels.next_multiple_of(PADDED);
        let values = values(pixels * step, seed ^ 1);
        for isa in Isa::all(&Cpu::detected()) {
            let mut codes = vec![0; values.len()];
            coding.encode(&values, &mut codes, isa);
            for (values, codes) in values.chunks_exact(step).zip(codes.chunks_exact(step)) {
                for c in 0..channels {
                    let (middle, step) = (coding.middle[c], coding.step[c]);
                    let most = f32::from(LARGEST) * step;
                    let inside = values[c].clamp(middle - most, middle + most);
                    let error = (middle + step * f32::from(codes[c]) - inside).abs();
                    prop_assert!(error < 0.501 * step, "{} became {}", values[c], codes[c]);
                }
            }
        }
    }
}
