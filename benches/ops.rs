//! Speed of the operators other than convolution: group norm, attention, upsampling, GELU; forward
//! and with gradients. With `--kernels`: speed of every kernel in every variant that the CPU
//! supports, on small problems.
//!
//! `cargo bench --bench ops [-- --threads N] [--kernels] [--json]`. `benches/peers/ops.py` runs
//! this and PyTorch in turn. Times include the allocation of the result. The noise of a machine
//! only adds time, so the best of many runs is reported.

use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor, Var};
use tadsr::{
    kernels::{cpu::Cpu, registry},
    ops::{self, Activation},
};

/// Returns the best time of `f`, in milliseconds, over at least `TIME` and three runs.
fn best(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    const TIME: Duration = Duration::from_millis(1000);
    f()?;
    let (start, mut best, mut runs) = (Instant::now(), Duration::MAX, 0);
    while start.elapsed() < TIME || runs < 3 {
        let run = Instant::now();
        f()?;
        best = best.min(run.elapsed());
        runs += 1;
    }
    Ok(best.as_secs_f64() * 1e3)
}

/// Times `f` on random input, forward if not `train`, else with the gradients of all inputs.
fn time(shapes: &[&[usize]], train: bool, f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<f64> {
    let vars = shapes
        .iter()
        .map(|&s| Var::randn(0f32, 1.0, s, &Device::Cpu))
        .collect::<Result<Vec<_>>>()?;
    if train {
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        best(|| {
            let grads = f(&inputs)?.sum_all()?.backward()?;
            assert!(vars.iter().all(|v| grads.get(v).is_some()));
            Ok(())
        })
    } else {
        let inputs: Vec<Tensor> = vars.iter().map(|v| v.as_detached_tensor()).collect();
        best(|| f(&inputs).map(drop))
    }
}

fn rows() -> Result<Vec<(String, f64)>> {
    let mut rows = Vec::new();
    let mut row = |name: String, ms: Result<f64>| -> Result<()> {
        rows.push((name, ms?));
        Ok(())
    };
    for (n, side, c, train) in [
        (1, 256, 128, false),
        (1, 64, 512, false),
        (8, 64, 160, true),
    ] {
        let name = format!("group norm + SiLU {n}x{side}x{side}x{c}{}", with(train));
        let ms = time(&[&[n, side, side, c], &[c], &[c]], train, |t| {
            ops::group_norm(&t[0], 32, &t[1], &t[2], 1e-6, Activation::Silu)
        });
        row(name, ms)?;
    }
    for (n, shift, train) in [(1, 0, false), (1, 4, false), (8, 4, true)] {
        let name = format!(
            "attention {n}x64x64, 6 heads of 32, window 8, shift {shift}{}",
            with(train)
        );
        let shapes: [&[usize]; 2] = [&[n, 64, 64, 576], &[6, 64, 64]];
        let ms = time(&shapes, train, |t| {
            ops::attention(&t[0], Some(&t[1]), 6, [8, 8], shift)
        });
        row(name, ms)?;
    }
    for train in [false, true] {
        let name = format!("attention 1x64x64, 1 head of 512, whole map{}", with(train));
        let ms = time(&[&[1, 64, 64, 1536]], train, |t| {
            ops::attention(&t[0], None, 1, [64, 64], 0)
        });
        row(name, ms)?;
    }
    for (n, side, c, train) in [(1, 128, 256, false), (8, 32, 320, true)] {
        let name = format!("upsample 2x {n}x{side}x{side}x{c}{}", with(train));
        row(
            name,
            time(&[&[n, side, side, c]], train, |t| ops::upsample2x(&t[0])),
        )?;
    }
    for (n, c, train) in [(1, 768, false), (8, 768, true)] {
        let name = format!("GELU {n}x64x64x{c}{}", with(train));
        row(name, time(&[&[n, 64, 64, c]], train, |t| ops::gelu(&t[0])))?;
    }
    Ok(rows)
}

/// Times every kernel in every variant that the CPU supports and `TADSR_CPU` allows.
fn kernels() -> Result<Vec<(String, f64)>> {
    let time = |entry: registry::Entry| {
        let mut work = entry.prepare();
        let ms = best(|| {
            std::hint::black_box(work());
            Ok(())
        })?;
        Ok((format!("{}, {}", entry.kernel, entry.variant), ms))
    };
    registry::all(&Cpu::get()).into_iter().map(time).collect()
}

fn with(train: bool) -> &'static str {
    if train { ", with gradients" } else { "" }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let threads = args.iter().skip_while(|a| *a != "--threads").nth(1);
    let threads = threads.and_then(|n| n.parse().ok()).unwrap_or(1);
    // SAFETY: no other thread runs yet.
    unsafe { tadsr::ops::use_threads(threads) }.expect("the first pool of the process");
    let rows = if args.iter().any(|a| a == "--kernels") {
        kernels()?
    } else {
        rows()?
    };
    if args.iter().any(|a| a == "--json") {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, ms)| serde_json::json!({"name": name, "ms": ms}))
            .collect();
        println!("{}", serde_json::json!({"threads": threads, "rows": rows}));
    } else {
        println!("{threads} thread(s)");
        rows.iter()
            .for_each(|(name, ms)| println!("{name:72} {ms:9.3} ms"));
    }
    Ok(())
}
