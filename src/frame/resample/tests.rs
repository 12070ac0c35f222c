use std::f64::consts::PI;

use super::*;
use crate::{
    frame::{Component, FrameInfo, PixelFormat},
    kernels::{cpu::Cpu, simd::Isa},
};

const KERNELS: [Kernel; 5] = [
    Kernel::Bicubic,
    Kernel::CatmullRom,
    Kernel::Lanczos3,
    Kernel::Bilinear,
    Kernel::Area,
];

const PLAIN: Options = Options {
    antialias: false,
    centre: 0.5,
    ratio: None,
};

/// Any value in 0..1, without pattern.
fn noise(n: usize) -> Vec<f32> {
    let hash = |i: usize| (i as u32 ^ 0x9e37).wrapping_mul(2_654_435_761) >> 8;
    (0..n)
        .map(|i| (hash(i).wrapping_mul(40_503) & 0xffff) as f32 / 65535.0)
        .collect()
}

fn line(kernel: Kernel, options: Options, src: &[f32], dst_len: usize) -> Vec<f32> {
    let mut dst = vec![f32::NAN; dst_len];
    let one = Axis::new(1, 1, kernel, PLAIN);
    Resampler::new(Axis::new(src.len(), dst_len, kernel, options), one).run(src, &mut dst);
    dst
}

/// One output straight from the definition, in f64: every source sample within reach is weighed.
fn defined(src: &[f32], j: usize, dst_len: usize, kernel: Kernel, options: Options) -> f64 {
    let n = src.len() as i64;
    let ratio = options.ratio.unwrap_or(n as f64 / dst_len as f64);
    let p = ratio * (j as f64 + options.centre) - options.centre;
    let stretch = if options.antialias {
        ratio.max(1.0)
    } else {
        1.0
    };
    let cubic = |a: f64, x: f64| match x {
        x if x < 1.0 => (a + 2.0) * x.powi(3) - (a + 3.0) * x.powi(2) + 1.0,
        x if x < 2.0 => a * x.powi(3) - 5.0 * a * x.powi(2) + 8.0 * a * x - 4.0 * a,
        _ => 0.0,
    };
    let shape = |d: f64| match kernel {
        Kernel::Bicubic => cubic(-0.75, d.abs()),
        Kernel::CatmullRom => cubic(-0.5, d.abs()),
        Kernel::Bilinear => 1.0 - d.abs().min(1.0),
        Kernel::Lanczos3 if d.abs() < 1e-12 => 1.0,
        Kernel::Lanczos3 if d.abs() >= 3.0 => 0.0,
        Kernel::Lanczos3 => 3.0 * (PI * d).sin() * (PI * d / 3.0).sin() / (PI * d).powi(2),
        Kernel::Area => unreachable!("has its own test"),
    };
    let reach = 4 + (3.0 * stretch) as i64;
    let (mut sum, mut total) = (0.0, 0.0);
    for i in p.floor() as i64 - reach..=p.floor() as i64 + reach {
        if !options.antialias || (0..n).contains(&i) {
            let w = shape((i as f64 - p) / stretch);
            sum += w * f64::from(src[i.clamp(0, n - 1) as usize]);
            total += w;
        }
    }
    if total < 0.1 * stretch {
        return f64::from(src[(p as i64).clamp(0, n - 1) as usize]);
    }
    sum / total
}

#[test]
fn lines_follow_the_definition_for_any_length_and_kernel() {
    for kernel in KERNELS.into_iter().filter(|&k| k != Kernel::Area) {
        for (from, to) in [
            (1, 1),
            (1, 5),
            (2, 3),
            (3, 2),
            (5, 1),
            (7, 14),
            (9, 27),
            (10, 40),
            (40, 60),
            (64, 45),
            (100, 13),
        ] {
            for antialias in [false, true] {
                for (centre, ratio) in [(0.5, None), (0.25, None), (0.25, Some(0.48)), (0.0, None)]
                {
                    let options = Options {
                        antialias,
                        centre,
                        ratio,
                    };
                    let src = noise(from);
                    for (j, got) in line(kernel, options, &src, to).into_iter().enumerate() {
                        let expected = defined(&src, j, to, kernel, options);
                        assert!(
                            (f64::from(got) - expected).abs() < 2e-6,
                            "{kernel:?} {from}->{to} {options:?} [{j}]: {got}, not {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn doubling_an_impulse_gives_the_bicubic_weights_by_hand() {
    let src = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0];
    let dst = line(Kernel::Bicubic, PLAIN, &src, 14);
    // The kernel with a = -0.75 at 1.75, 1.25, 0.75, 0.25: exact in binary.
    let (w175, w125, w075, w025) = (-0.035_156_25, -0.105_468_75, 0.261_718_75, 0.878_906_25);
    let expected = [
        0.0, 0.0, 0.0, w175, w125, w075, w025, w025, w075, w125, w175, 0.0, 0.0, 0.0,
    ];
    assert_eq!(dst, expected);
}

#[test]
fn doubling_replicates_the_border() {
    // Output 0 lies at -0.25: samples -2, -1, 0, 1 are 8, 8, 8, 16.
    let dst = line(Kernel::Bicubic, PLAIN, &[8.0, 16.0, 24.0, 0.0], 8);
    assert_eq!(dst[0], 8.0 - 8.0 * 0.105_468_75);
    // Output 7 lies at 3.25: samples 2, 3, 4, 5 are 24, 0, 0, 0.
    assert_eq!(dst[7], -24.0 * 0.105_468_75);
}

#[test]
fn antialiased_halving_gives_the_weights_by_hand() {
    // Triangle of half-width 2 at +-0.5, +-1.5: 1 3 3 1, over 8; the border drops a tap: 3 3 1,
    // over 7.
    let options = Options {
        antialias: true,
        ..PLAIN
    };
    let dst = line(
        Kernel::Bilinear,
        options,
        &[7.0, 14.0, 0.0, 8.0, 8.0, 0.0],
        3,
    );
    let expected = [63.0 / 7.0, (14.0 + 24.0 + 8.0) / 8.0, 32.0 / 7.0];
    for (got, expected) in dst.iter().zip(expected) {
        assert!((got - expected).abs() < 1e-5, "{dst:?}");
    }
}

#[test]
fn area_averages_exactly_the_covered_length() {
    let src = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
    assert_eq!(line(Kernel::Area, PLAIN, &src, 3), [1.5, 6.0, 24.0]);
    // 1.5 samples each: 1 and half of 2, half of 2 and 4.
    let dst = line(Kernel::Area, PLAIN, &src, 4);
    let expected = [2.0 / 1.5, 5.0 / 1.5, 16.0 / 1.5, 40.0 / 1.5];
    for (got, expected) in dst.iter().zip(expected) {
        assert!((got - expected).abs() < 1e-5, "{dst:?}");
    }
    assert_eq!(
        line(Kernel::Area, PLAIN, &[3.0, 5.0], 4),
        [3.0, 3.0, 5.0, 5.0]
    );
}

#[test]
fn ramps_stay_ramps_inside() {
    let src: Vec<f32> = (0..40).map(|i| i as f32).collect();
    for kernel in [Kernel::CatmullRom, Kernel::Bilinear] {
        for to in [80, 60, 120, 53] {
            let ratio = 40.0 / to as f64;
            for (j, got) in line(kernel, PLAIN, &src, to).into_iter().enumerate() {
                let at = (j as f64 + 0.5) * ratio - 0.5;
                if (2.0..37.0).contains(&at) {
                    assert!(
                        (f64::from(got) - at).abs() < 1e-5,
                        "{kernel:?} {to} [{j}]: {got}"
                    );
                }
            }
        }
    }
}

#[test]
fn constants_stay_constant_into_the_corners() {
    for kernel in KERNELS {
        for antialias in [false, true] {
            for (from, to) in [
                ((7, 5), (14, 10)),
                ((33, 65), (8, 40)),
                ((1, 9), (5, 2)),
                ((640, 40), (31, 5)),
            ] {
                let options = Options { antialias, ..PLAIN };
                let resampler = Resampler::new(
                    Axis::new(from.0, to.0, kernel, options),
                    Axis::new(from.1, to.1, kernel, options),
                );
                let mut dst = vec![0.0; to.0 * to.1];
                resampler.run(&vec![0.7; from.0 * from.1], &mut dst);
                let worst = dst.iter().map(|v| (v - 0.7).abs()).fold(0.0, f32::max);
                assert!(
                    worst < 1e-6,
                    "{kernel:?} {antialias} {from:?}->{to:?}: {worst}"
                );
            }
        }
    }
}

#[test]
fn every_instruction_set_and_every_split_gives_the_same_bits() {
    for (from, to) in [
        ((37, 50), (74, 100)),
        ((33, 21), (99, 63)),
        ((19, 18), (76, 72)),
        ((50, 40), (77, 61)),
        ((90, 80), (31, 33)),
        ((30, 90), (90, 30)),
        ((90, 30), (30, 90)),
        ((40, 40), (40, 80)),
        ((40, 40), (80, 40)),
        ((5, 3), (2, 7)),
    ] {
        for (kernel, antialias) in [
            (Kernel::Bicubic, false),
            (Kernel::Lanczos3, true),
            (Kernel::Bilinear, true),
        ] {
            let options = Options { antialias, ..PLAIN };
            let resampler = Resampler::new(
                Axis::new(from.0, to.0, kernel, options),
                Axis::new(from.1, to.1, kernel, options),
            );
            let src = noise(from.0 * from.1);
            let mut expected = vec![f32::NAN; to.0 * to.1];
            resampler.run_band(Isa::Portable, &src, 0..to.1, &mut expected);
            for isa in Isa::all(&Cpu::detected()) {
                for rows in [1, 3, 17, to.1] {
                    let mut got = vec![f32::NAN; to.0 * to.1];
                    for (i, band) in got.chunks_mut(rows * to.0).enumerate() {
                        let top = i * rows;
                        resampler.run_band(isa, &src, top..top + band.len() / to.0, band);
                    }
                    assert!(
                        got == expected,
                        "{isa:?} {from:?}->{to:?} by {rows} {kernel:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn two_directions_are_two_lines() {
    for (from, to) in [
        ((30, 12), (60, 24)),
        ((30, 12), (45, 20)),
        ((12, 30), (7, 50)),
        ((50, 40), (20, 11)),
    ] {
        let src = noise(from.0 * from.1);
        let mut dst = vec![0.0; to.0 * to.1];
        Resampler::new(
            Axis::new(from.0, to.0, Kernel::Lanczos3, PLAIN),
            Axis::new(from.1, to.1, Kernel::Lanczos3, PLAIN),
        )
        .run(&src, &mut dst);
        let rows: Vec<Vec<f32>> = src
            .chunks(from.0)
            .map(|row| line(Kernel::Lanczos3, PLAIN, row, to.0))
            .collect();
        for x in 0..to.0 {
            let column: Vec<f32> = rows.iter().map(|row| row[x]).collect();
            for (y, expected) in line(Kernel::Lanczos3, PLAIN, &column, to.1)
                .into_iter()
                .enumerate()
            {
                let got = dst[y * to.0 + x];
                assert!(
                    (got - expected).abs() < 2e-6,
                    "{from:?}->{to:?} at {x},{y}: {got} {expected}"
                );
            }
        }
    }
}

#[test]
fn a_stream_of_some_columns_gives_the_same_bits_as_the_whole() {
    for (from, to) in [
        ((40, 30), (80, 60)),
        ((40, 30), (67, 41)),
        ((31, 9), (124, 36)),
        ((50, 40), (50, 80)),
        ((23, 50), (40, 17)),
    ] {
        for kernel in [Kernel::Bicubic, Kernel::Lanczos3] {
            let mut resampler = Resampler::new(
                Axis::new(from.0, to.0, kernel, PLAIN),
                Axis::new(from.1, to.1, kernel, PLAIN),
            );
            resampler.horizontal_first = true;
            let src = noise(from.0 * from.1);
            let mut whole = vec![f32::NAN; to.0 * to.1];
            resampler.run(&src, &mut whole);
            for columns in [0..to.0, 0..1, 3..30, 17..40] {
                let mut stream = Stream::new(&resampler, columns.clone());
                for step in [1, 3] {
                    stream.restart();
                    for y in (0..to.1).step_by(step) {
                        let mut row = vec![f32::NAN; columns.len()];
                        stream.row(y, &mut row, |y, x, row| {
                            row.copy_from_slice(&src[y * from.0..][x]);
                        });
                        let want = &whole[y * to.0..][columns.clone()];
                        assert!(
                            row == want,
                            "{from:?}->{to:?} {kernel:?} {columns:?} row {y}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn whole_factors_take_the_periodic_kernel() {
    let phases = |factor, centre| {
        let options = Options { centre, ..PLAIN };
        let axis = Axis::new(100, 100 * factor, Kernel::Bicubic, options);
        axis.phases.map(|p| (p.weights.len(), p.periods))
    };
    for factor in 2..=4 {
        for centre in [0.0, 0.25, 0.5] {
            let (count, periods) = phases(factor, centre).expect("periodic");
            assert_eq!(count, factor);
            assert!(periods > 93, "{periods} periods at {factor} {centre}");
        }
    }
    assert_eq!(phases(5, 0.5), None);
}

#[test]
fn whole_factors_of_any_kernel_are_periodic_to_the_end() {
    for kernel in KERNELS {
        for factor in 2..=4 {
            let src = noise(217);
            let direct = line(kernel, PLAIN, &src, 217 * factor);
            let mut axis = Axis::new(217, 217 * factor, kernel, PLAIN);
            axis.phases = None;
            let mut general = vec![0.0; direct.len()];
            Resampler::new(axis, Axis::new(1, 1, kernel, PLAIN)).run(&src, &mut general);
            for (j, (a, b)) in direct.iter().zip(&general).enumerate() {
                assert!((a - b).abs() < 1e-6, "{kernel:?} x{factor} [{j}]: {a} {b}");
            }
        }
    }
}

#[test]
fn chroma_keeps_its_site_and_the_lumas_ratio() {
    // 7 luma columns have 4 of chroma, 14 have 7: the ratio stays 1/2, and a cosited site stays a
    // quarter.
    let mut info = FrameInfo::new(PixelFormat::I420, 7, 6);
    info.chroma_site.horizontal_cosited = true;
    info.chroma_site.vertical_cosited = false;
    let resampler = |component| {
        Resampler::for_component(&info, component, 14, 12, Kernel::Bilinear, false).unwrap()
    };
    let chroma = resampler(Component::U);
    let ramp: Vec<f32> = (0..12).map(|i| (i % 4 + 10 * (i / 4)) as f32).collect();
    let mut dst = vec![0.0; 7 * 6];
    chroma.run(&ramp, &mut dst);
    // Row 2 lies at 0.75, column 3 at 3.25 / 2 - 0.25 = 1.375.
    assert!(
        (dst[2 * 7 + 3] - (7.5 + 1.375)).abs() < 1e-5,
        "{}",
        dst[2 * 7 + 3]
    );
    let luma = resampler(Component::Y);
    assert_eq!(
        (luma.horizontal().src_len(), luma.horizontal().dst_len()),
        (7, 14)
    );
    assert!(Resampler::for_component(&info, Component::Y, 0, 12, Kernel::Area, true).is_err());
}

#[test]
fn an_axis_after_another_does_what_both_do() {
    let kernels = [
        (Kernel::Bicubic, false),
        (Kernel::Area, true),
        (Kernel::Bilinear, false),
    ];
    let axis = |from, to, (kernel, antialias)| {
        let options = Options {
            antialias,
            ..Options::default()
        };
        Axis::new(from, to, kernel, options)
    };
    let column = |axis: &Axis, src: &[f32]| {
        let mut dst = vec![0.0; axis.dst_len()];
        Resampler::new(axis.clone(), axis_1()).run(src, &mut dst);
        dst
    };
    for (from, between, to) in [(23, 47, 24), (1, 2, 1), (2, 5, 3), (16, 40, 20), (9, 9, 5)] {
        let src: Vec<f32> = (0..from).map(|i| (i * 37 % 11) as f32).collect();
        for (first, second) in [(0, 1), (1, 2), (2, 0)] {
            let (first, second) = (
                axis(from, between, kernels[first]),
                axis(between, to, kernels[second]),
            );
            let want = column(&second, &column(&first, &src));
            let got = column(&first.then(&second), &src);
            let far = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
            assert!(far.fold(0.0, f32::max) < 1e-4, "{from} {between} {to}");
        }
    }
}

fn axis_1() -> Axis {
    Axis::new(1, 1, Kernel::Bilinear, Options::default())
}

#[test]
fn the_source_of_outputs_is_what_they_read() {
    let axis = Axis::new(
        100,
        50,
        Kernel::Bilinear,
        Options {
            antialias: true,
            ..PLAIN
        },
    );
    assert_eq!(axis.source_of(10..12), 19..25);
    assert_eq!(axis.source_of(0..1), 0..4);
    assert_eq!(axis.source_of(5..5), 0..0);
}
