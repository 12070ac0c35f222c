use super::*;
use crate::kernels::{cpu::Cpu, simd::Isa};
use proptest::prelude::*;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum()
}

fn norm(a: &[f32]) -> f64 {
    dot(a, a).sqrt()
}

prop_compose! {
    fn shapes()(
        n in 1usize..3, h in 1usize..12, w in 1usize..40, ci in 1usize..20, co in 1usize..70,
        kh in 1usize..6, kw in 1usize..6, stride in 1usize..3, pad in 0usize..3,
    ) -> ConvShape {
        let pad = pad.min(kh - 1).min(kw - 1);
        ConvShape { n, h: h.max(kh), w: w.max(kw), ci, co, kh, kw, stride, pad }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_kernel_agrees_with_the_formula(s in shapes(), seed: u32) {
        let (x, w) = (values(s.input_len(), seed), values(s.weight_len(), seed ^ 1));
        let bias = values(s.co, seed ^ 2);
        for activation in [Activation::None, Activation::LeakyRelu(0.1), Activation::Silu] {
            let expected = reference(&s, &x, &w, Some(&bias), activation);
            for isa in Isa::all(&Cpu::detected()) {
                let mut y = vec![f32::NAN; expected.len()];
                PackedConv::new(&s, &w, Some(&bias), isa).forward(&s, &x, activation, &mut y);
                for (i, (got, want)) in y.iter().zip(&expected).enumerate() {
                    prop_assert!(
                        (got - want).abs() <= 1e-4 * (1.0 + want.abs()),
                        "{isa:?} {activation:?} {s:?} at {i}: {got}, not {want}"
                    );
                }
            }
        }
    }

    // The convolution is linear in input and weights, so its gradients are its adjoints:
    // <conv(x, w), g> = <x, grad_input(g, w)> = <w, grad_weight(x, g)> for any x, w, g.
    #[test]
    fn gradients_are_the_adjoints(s in shapes(), seed: u32) {
        let (x, w) = (values(s.input_len(), seed), values(s.weight_len(), seed ^ 1));
        let g = values(s.output_len(), seed ^ 2);
        let y = reference(&s, &x, &w, None, Activation::None);
        let product = dot(&y, &g);
        let tolerance = 1e-5 * norm(&y) * norm(&g) + 1e-5;
        for isa in Isa::all(&Cpu::detected()) {
            let mut gx = vec![f32::NAN; x.len()];
            grad_input(&s, &g, &w, isa, &mut gx);
            prop_assert!((dot(&x, &gx) - product).abs() < tolerance, "{isa:?} input of {s:?}");
            let mut gw = vec![f32::NAN; w.len()];
            grad_weight(&s, &x, &g, isa, &mut gw);
            prop_assert!((dot(&w, &gw) - product).abs() < tolerance, "{isa:?} weights of {s:?}");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let s = ConvShape {
        n: 2,
        h: 37,
        w: 53,
        ci: 5,
        co: 19,
        kh: 3,
        kw: 3,
        stride: 1,
        pad: 1,
    };
    let (x, w) = (values(s.input_len(), 1), values(s.weight_len(), 2));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut y = vec![0.0; s.output_len()];
            PackedConv::new(&s, &w, None, Isa::best()).forward(&s, &x, Activation::Silu, &mut y);
            let (mut gx, mut gw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            grad_input(&s, &y, &w, Isa::best(), &mut gx);
            grad_weight(&s, &x, &y, Isa::best(), &mut gw);
            [y, gx, gw]
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn the_bias_gradient_is_the_sum_over_pixels() {
    let g = values(3 * 1000, 7);
    let sums = grad_bias(3, &g);
    for (c, sum) in sums.iter().enumerate() {
        let want: f64 = g.iter().skip(c).step_by(3).map(|&v| f64::from(v)).sum();
        assert!((f64::from(*sum) - want).abs() < 1e-3, "{sum}, not {want}");
    }
}
