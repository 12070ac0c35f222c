//! Speed of the convolution: forward by shape, with every instruction set that the CPU has, and one
//! training step.
//!
//! `cargo bench --bench conv [-- --threads N] [--json]`. `benches/peers/conv.py` runs this and
//! PyTorch in turn; the JSON has the best instruction set only. The noise of a machine only adds
//! time, so the best of many runs is reported.

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor, Var};
use tadsr::{
    kernels::{
        conv::{ConvShape, PackedConv},
        cpu::Cpu,
        simd::Isa,
    },
    ops::{Activation, conv2d, silu},
};

/// Returns the best time of `f` over at least `TIME` and three runs.
fn best(mut f: impl FnMut()) -> Duration {
    const TIME: Duration = Duration::from_millis(1500);
    f();
    let (start, mut best, mut runs) = (Instant::now(), Duration::MAX, 0);
    while start.elapsed() < TIME || runs < 3 {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed());
        runs += 1;
    }
    best
}

fn noise(len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 7919 % 2003) as f32) / 2003.0 - 0.5)
        .collect()
}

/// Returns the milliseconds of one forward convolution with bias and SiLU.
fn forward([h, w, channels, k]: [usize; 4], isa: Isa) -> f64 {
    let shape = ConvShape {
        n: 1,
        h,
        w,
        ci: channels,
        co: channels,
        kh: k,
        kw: k,
        stride: 1,
        pad: k / 2,
    };
    let x = noise(h * w * channels);
    let weights = noise(channels * channels * k * k);
    let bias = noise(channels);
    let packed = PackedConv::new(&shape, &weights, Some(&bias), isa);
    let mut y = vec![0.0; x.len()];
    best(|| packed.forward(&shape, &x, Activation::Silu, &mut y)).as_secs_f64() * 1e3
}

/// Returns the milliseconds of forward and backward through eight 3x3 convolutions of 48 channels
/// with SiLU, batch 8, 64x64.
fn training_step() -> candle_core::Result<f64> {
    let device = Device::Cpu;
    let x = Tensor::randn(0f32, 1.0, (8, 64, 64, 48), &device)?;
    let layers = (0..8)
        .map(|_| {
            let weight = Var::randn(0f32, 0.07, (48, 48, 3, 3), &device)?;
            Ok((weight, Var::zeros(48, candle_core::DType::F32, &device)?))
        })
        .collect::<candle_core::Result<Vec<_>>>()?;
    let step = || -> candle_core::Result<()> {
        let mut y = x.clone();
        for (weight, bias) in &layers {
            y = silu(&conv2d(&y, weight, bias, 1, 1, Activation::None)?)?;
        }
        let grads = y.sqr()?.mean_all()?.backward()?;
        assert!(
            layers
                .iter()
                .all(|(w, b)| grads.get(w).is_some() && grads.get(b).is_some())
        );
        Ok(())
    };
    step()?;
    Ok(best(|| step().expect("the step has run before")).as_secs_f64() * 1e3)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let threads = args.iter().skip_while(|a| *a != "--threads").nth(1);
    let threads = threads.and_then(|n| n.parse().ok()).unwrap_or(1);
    // SAFETY: no other thread runs yet.
    unsafe { tadsr::ops::use_threads(threads) }.expect("the first pool of the process");
    let json = args.iter().any(|a| a == "--json");
    let mut rows = Vec::new();
    let shapes = [
        [270, 480, 48, 3],
        [180, 320, 64, 3],
        [256, 256, 128, 3],
        [64, 64, 256, 1],
    ];
    for [h, w, channels, k] in shapes {
        let flop = 2.0 * (h * w * channels * channels * k * k) as f64;
        let name = format!("{k}x{k} {channels}->{channels} {h}x{w}");
        let isas = Isa::all(&Cpu::get());
        rows.push((name.clone(), forward([h, w, channels, k], isas[0]), flop));
        if !json {
            rows.extend(isas[1..].iter().map(|&isa| {
                let ms = forward([h, w, channels, k], isa);
                (format!("{name}, {isa:?}"), ms, flop)
            }));
        }
    }
    // Forward, data gradient and weight gradient are products of the same size.
    let flop = 3.0 * 8.0 * 2.0 * (8 * 64 * 64 * 48 * 48 * 9) as f64;
    let step = training_step().expect("shapes fit");
    rows.push((
        "training step 8 x (3x3 48->48 + SiLU), batch 8, 64x64".into(),
        step,
        flop,
    ));
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, ms, flop)| serde_json::json!({"name": name, "ms": ms, "flop": flop}))
            .collect();
        println!(
            "{}",
            serde_json::json!({"threads": threads, "isa": format!("{:?}", Isa::best()), "rows": rows})
        );
        return;
    }
    println!("{:?}, {threads} thread(s)", Isa::best());
    for (name, ms, flop) in rows {
        let rate = flop / ms / 1e6;
        println!(
            "{name:56} {ms:9.2} ms {rate:7.1} GFLOP/s {:7.1} a thread",
            rate / threads as f64
        );
    }
}
