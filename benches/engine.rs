//! Speed of the whole engine, from frame to frame, compared with the limits of the machine.
//!
//! `cargo bench --bench engine [-- --threads N] [--time SECONDS] [--case NAME] [--json]`.
//! `benches/peers/engine.py` runs this, ONNX Runtime and OpenVINO in turn. The noise of a machine
//! only adds time, so the best of many runs is reported. `--models DIR` only writes the measured
//! networks to DIR and lists them.
//!
//! Two rates are printed, each also as a share of the machine's measured f32 peak on as many
//! threads:
//! - direct: two operations for each weight and cell of the direct convolutions, whichever
//!   algorithm the engine uses. Winograd's algorithm needs a quarter of the multiplications, so
//!   this rate may exceed the peak. It is comparable with other engines.
//! - done (f32 only): the products and both transforms of Winograd's algorithm for the cells of the
//!   frame. Cells beyond the frame's border, the interpolation and other work count only as time.

#[path = "support/students.rs"]
mod students;

use std::{
    fs,
    hint::black_box,
    path::Path,
    time::{Duration, Instant},
};

use rayon::prelude::*;
use tadsr::{
    Precision,
    engine::lite::cpu::{Patches, Runner, calibrate},
    frame::{Frame, FrameInfo, PixelFormat},
    kernels::{
        cpu::Cpu,
        winograd::{Band, Variant, Winograd},
    },
    model::LiteModel,
    nn::lite::{Condition, StudentConfig, latent::Grid},
};

use students::noise;

/// Returns the best time of `f` over at least `time` and three runs, in seconds.
fn best(time: Duration, mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best, mut runs) = (Instant::now(), Duration::MAX, 0);
    while start.elapsed() < time || runs < 3 {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed());
        runs += 1;
    }
    best.as_secs_f64()
}

/// Returns a student that is calibrated on noise.
fn model(student: StudentConfig) -> LiteModel {
    let mut model = students::model(student);
    let side = 32;
    let grid = Grid::new(
        student.latent,
        student.r,
        side * student.r,
        side * student.r,
    );
    let latents = noise(grid.len(), 3).map(|v| 2.0 * v).collect();
    let patches = Patches {
        at: Condition::at(student.r as f64),
        grid,
        inputs: latents,
    };
    model.calibration = Some(calibrate(&model, &[patches]));
    model
}

/// A model and the frames that it upscales.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    student: StudentConfig,
    from: (usize, usize),
    to: (usize, usize),
}

fn cases() -> [Case; 7] {
    let case = |name, student, from, to| Case {
        name,
        student,
        from,
        to,
    };
    [
        case("tiny x2", StudentConfig::tiny(2), (640, 360), (1280, 720)),
        case("tiny x2", StudentConfig::tiny(2), (960, 540), (1920, 1080)),
        case("tiny x4", StudentConfig::tiny(4), (320, 180), (1280, 720)),
        case("small x2", StudentConfig::small(2), (640, 360), (1280, 720)),
        case("small x4", StudentConfig::small(4), (320, 180), (1280, 720)),
        case("base x2", StudentConfig::base(2), (640, 360), (1280, 720)),
        case("base x4", StudentConfig::base(4), (320, 180), (1280, 720)),
    ]
}

impl Case {
    fn infos(&self) -> (FrameInfo, FrameInfo) {
        let src = FrameInfo::new(PixelFormat::I420, self.from.0, self.from.1);
        (src, src.with_size(self.to.0, self.to.1))
    }

    /// Returns the operations of the network's direct convolutions for a frame.
    fn flop(&self) -> f64 {
        let r = self.student.r;
        let cells = self.to.0.div_ceil(r) * self.to.1.div_ceil(r);
        let weights: usize = self.student.layers().iter().map(|l| l.ci * l.co * 9).sum();
        2.0 * (weights * cells) as f64
    }

    /// Returns the operations of Winograd's algorithm for a frame.
    fn done(&self) -> f64 {
        let r = self.student.r;
        let cells = self.to.0.div_ceil(r) * self.to.1.div_ceil(r);
        let layers = self.student.layers();
        layers.iter().map(|l| winograd(l.ci, l.co, cells)).sum()
    }

    /// Returns the minimum memory traffic of a frame in bytes: its planes read and written once.
    fn bytes(&self) -> f64 {
        let (src, dst) = self.infos();
        let bytes = |info: FrameInfo| -> usize {
            let plane = |p| info.format.plane_size(p, info.width, info.height);
            (0..info.format.planes())
                .map(|p| plane(p).0 * plane(p).1)
                .sum()
        };
        (bytes(src) + bytes(dst)) as f64
    }

    /// Returns the seconds for a frame: with the network, without it (bicubic interpolation only),
    /// and with the network and the temporal filter.
    fn run(&self, precision: Precision, time: Duration) -> tadsr::Result<[f64; 3]> {
        let (src, dst) = self.infos();
        let mut frame = Frame::new(src)?;
        for plane in 0..src.format.planes() {
            let bytes = frame.plane_mut(plane);
            let values = noise(bytes.len(), 7);
            bytes
                .iter_mut()
                .zip(values)
                .for_each(|(b, v)| *b = (128.0 + 90.0 * v) as u8);
        }
        let mut out = Frame::new(dst)?;
        let mut engine = Runner::new(&model(self.student), src, dst, precision)?;
        let mut seconds = |strength, share| {
            engine.set_share(share);
            best(time, || {
                let ran = engine.run(&frame.as_ref(), &mut out.as_mut(), strength);
                ran.expect("the engine is for these frames");
            })
        };
        Ok([(1.0, 0.0), (0.0, 0.0), (1.0, 0.6)].map(|(strength, share)| seconds(strength, share)))
    }
}

/// Returns the operations of Winograd's algorithm F(4x4, 3x3) for `cells` outputs. Each tile of 16
/// has products at 36 points. The input transform has 10 vectors (two columns are shared with the
/// neighbour) of 20 operations a channel. The output transform has 10 of 13, and bias and leaky
/// ReLU for each output.
fn winograd(ci: usize, co: usize, cells: usize) -> f64 {
    let tile = 2 * 36 * ci * co + 10 * 20 * ci + (10 * 13 + 16 * 3) * co;
    (tile * cells) as f64 / 16.0
}

/// Returns the seconds of each thread for a 3x3 layer on a band of [`BAND`] cells in the caches.
fn layer(channels: usize, threads: usize, time: Duration) -> f64 {
    let tiles = BAND / 16;
    let weights: Vec<f32> = noise(channels * channels * 9, 1).collect();
    let bias: Vec<f32> = noise(channels, 2).collect();
    let shape = [channels, channels];
    let conv = Winograd::new(shape, &weights, &bias, 0.1, Variant::f32(&Cpu::get()));
    let input: Vec<f32> = noise((BAND / 4 + 2) * conv.input_step(), 3).collect();
    let mut outputs = vec![vec![0.0f32; BAND * conv.output_step()]; threads];
    best(time, || {
        outputs.par_iter_mut().for_each(|output| {
            let mut scratch = Vec::new();
            for _ in 0..BANDS {
                let mut rows = output.chunks_exact_mut(BAND / 4 * conv.output_step());
                conv.run(
                    Band {
                        input: [&input; 6],
                        skip: None,
                        output: [(); 4].map(|_| rows.next().unwrap_or_default()),
                        out_step: conv.output_step(),
                        tiles,
                    },
                    &mut scratch,
                );
            }
        });
    }) / BANDS as f64
}

/// Cells of a band.
const BAND: usize = 4 * 240;
const BANDS: usize = 50;

/// Returns GFLOP/s of fused multiply-adds on all threads, and GB/s (read and written) of a sum of
/// two arrays far larger than the caches.
fn machine(threads: usize, time: Duration) -> (f64, f64) {
    const RUNS: usize = 1 << 18;
    let chains = || (0..threads).into_par_iter().map(|_| peak::chain(RUNS));
    let flop = best(time, || _ = black_box(chains().sum::<f32>()));
    let len = 1 << 24;
    let (a, b, mut c) = (vec![1.0f32; len], vec![2.0f32; len], vec![0.0f32; len]);
    let part = len / threads;
    let bytes = best(time, || {
        let rows = c
            .par_chunks_mut(part)
            .zip(a.par_chunks(part))
            .zip(b.par_chunks(part));
        rows.for_each(|((c, a), b)| {
            c.iter_mut()
                .zip(a)
                .zip(b)
                .for_each(|((c, a), b)| *c = a + b)
        });
    });
    let operations = (RUNS * peak::OPERATIONS * threads) as f64;
    (operations / flop / 1e9, (12 * len) as f64 / bytes / 1e9)
}

/// Peak rate of independent chains of multiply-adds, fused where the instruction set can.
mod peak {
    /// Number of vector chains: more than the latency times the number of units.
    const CHAINS: usize = 12;

    #[cfg(target_arch = "x86_64")]
    pub use x86::{OPERATIONS, chain};

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use std::arch::x86_64::*;

        use tadsr::kernels::simd::Isa;

        /// Operations of a run, with each width. Narrower ones need more instructions.
        pub const OPERATIONS: usize = super::CHAINS * 16 * 2;

        /// Performs `runs` runs. Returns the sum of the results.
        pub fn chain(runs: usize) -> f32 {
            match Isa::best() {
                // SAFETY: the value proves that the CPU has the features, here and below.
                Isa::Avx512(_) => unsafe { avx512(runs) },
                Isa::Avx2(_) => unsafe { avx2(runs) },
                _ => sse(runs),
            }
        }

        #[target_feature(enable = "avx512f")]
        fn avx512(runs: usize) -> f32 {
            let (a, b) = (
                _mm512_set1_ps(std::hint::black_box(0.999)),
                _mm512_set1_ps(0.001),
            );
            let mut x = [b; super::CHAINS];
            for _ in 0..runs {
                for x in &mut x {
                    *x = _mm512_fmadd_ps(*x, a, b);
                }
            }
            x.iter().map(|&x| _mm512_reduce_add_ps(x)).sum()
        }

        #[target_feature(enable = "avx2,fma")]
        fn avx2(runs: usize) -> f32 {
            let (a, b) = (
                _mm256_set1_ps(std::hint::black_box(0.999)),
                _mm256_set1_ps(0.001),
            );
            let mut x = [b; super::CHAINS];
            for _ in 0..2 * runs {
                for x in &mut x {
                    *x = _mm256_fmadd_ps(*x, a, b);
                }
            }
            x.iter()
                .map(|&x| _mm_cvtss_f32(_mm256_castps256_ps128(x)))
                .sum()
        }

        /// Multiplies and adds in two instructions, which every x86-64 has.
        fn sse(runs: usize) -> f32 {
            // SAFETY: the target has SSE.
            unsafe {
                let (a, b) = (_mm_set1_ps(std::hint::black_box(0.999)), _mm_set1_ps(0.001));
                let mut x = [b; super::CHAINS];
                for _ in 0..4 * runs {
                    for x in &mut x {
                        *x = _mm_add_ps(_mm_mul_ps(*x, a), b);
                    }
                }
                x.iter().map(|&x| _mm_cvtss_f32(x)).sum()
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub const OPERATIONS: usize = CHAINS * 4 * 2;

    #[cfg(not(target_arch = "x86_64"))]
    pub fn chain(runs: usize) -> f32 {
        let mut x = [0.001f32; CHAINS * 4];
        for _ in 0..runs {
            x.iter_mut().for_each(|x| *x = x.mul_add(0.999, 0.001));
        }
        x.iter().sum()
    }
}

impl Case {
    fn name(&self) -> String {
        let ((w, h), (dw, dh)) = (self.from, self.to);
        format!("{} {w}x{h} to {dw}x{dh}", self.name)
    }

    /// Writes the case's model to `folder`. Returns its description for a peer.
    fn write(&self, folder: &Path) -> tadsr::Result<serde_json::Value> {
        let (model, r) = (model(self.student), self.student.r);
        let path = folder
            .join(self.name.replace(' ', "-"))
            .with_extension("safetensors");
        let written = fs::write(&path, model.to_bytes(false)?);
        written.map_err(|cause| tadsr::Error::Io {
            path: path.clone(),
            cause,
        })?;
        Ok(serde_json::json!({
            "name": self.name(),
            "model": path,
            "scale": self.to.0 as f64 / self.from.0 as f64,
            "latent": [1, self.student.latent.channels(r), self.to.1.div_ceil(r), self.to.0.div_ceil(r)],
        }))
    }
}

/// Formats rates in GFLOP/s and as a share of the peak.
fn rates(direct: f64, done: Option<f64>, peak: f64) -> String {
    let rate = |v: f64| format!("{v:6.1} {:4.0} %", 100.0 * v / peak);
    format!(
        "{}  {}",
        rate(direct),
        done.map_or(format!("{:13}", ""), rate)
    )
}

fn main() -> tadsr::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().skip_while(|a| *a != name).nth(1);
    if let Some(folder) = option("--models") {
        let cases = cases().map(|case| case.write(Path::new(folder)));
        let cases = cases.into_iter().collect::<tadsr::Result<Vec<_>>>()?;
        println!("{}", serde_json::json!({ "cases": cases }));
        return Ok(());
    }
    let threads = option("--threads")
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let time = option("--time").and_then(|n| n.parse().ok()).unwrap_or(1.5);
    let time = Duration::from_secs_f64(time);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .expect("the first pool of the process");
    let json = args.iter().any(|a| a == "--json");
    let (flops, bandwidth) = machine(threads, time);
    let mut rows = Vec::new();
    if !json {
        println!(
            "{threads} thread(s): {flops:.0} GFLOP/s of multiply-adds, \
             {bandwidth:.1} GB/s of memory"
        );
        println!("\nLayers of 3x3 in f32, alone{:48}direct          done", "");
        for channels in [16, 32, 64] {
            let seconds = layer(channels, threads, time) / threads as f64;
            let direct = 18.0 * (channels * channels * BAND) as f64 / seconds / 1e9;
            let done = winograd(channels, channels, BAND) / seconds / 1e9;
            println!(
                "{channels} to {channels:60} {}",
                rates(direct, Some(done), flops)
            );
        }
        println!(
            "\nWhole frames: {:26} {:>9} {:>7} {:>9} {:>9} {:>20} {:>13}",
            "", "frame", "fps", "bicubic", "filter", "direct", "done"
        );
    }
    let wanted =
        |case: &Case| option("--case").is_none_or(|name| case.name().contains(name.as_str()));
    let precisions = [
        Precision::F32,
        Precision::Bf16,
        Precision::Int16,
        Precision::Int8,
    ];
    let cases = cases().into_iter().filter(wanted);
    for (case, precision) in cases.flat_map(|c| precisions.map(move |p| (c, p))) {
        let name = precision.to_string();
        let [seconds, base, filtered] = case.run(precision, time)?;
        let direct = case.flop() / seconds / 1e9;
        let done = (precision == Precision::F32).then(|| case.done() / seconds / 1e9);
        if !json {
            println!(
                "{:34} {name:5} {:6.2} ms {:7.1} {:6.2} ms {:+6.2} ms  {}  {:.1} MB in and out, \
                 {:.2} GB/s",
                case.name(),
                seconds * 1e3,
                1.0 / seconds,
                base * 1e3,
                (filtered - seconds) * 1e3,
                rates(direct, done, flops),
                case.bytes() / 1e6,
                case.bytes() / seconds / 1e9,
            );
        }
        rows.push(serde_json::json!({
            "name": case.name(), "precision": name, "ms": seconds * 1e3, "bicubic_ms": base * 1e3,
            "filtered_ms": filtered * 1e3,
            "flop": case.flop(), "done": case.done(), "bytes": case.bytes(),
        }));
    }
    if json {
        let report = serde_json::json!({"threads": threads, "gflops": flops, "gbs": bandwidth, "rows": rows});
        println!("{report}");
    }
    Ok(())
}
