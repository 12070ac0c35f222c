//! Students on a CUDA device: every format and size beside the CPU engine's result, and how long a frame takes.
//!
//! `benches/gpu.sh` builds a folder with this in it, for a machine that has the driver and nothing else. Ends with an error when
//! a result differs by more than f16 explains. Without a device it says so and ends well.
//! With `--compare` nothing is timed.

#[path = "support/students.rs"]
mod students;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tadsr::{
    engine::{
        cpu,
        cuda::{Context, Engine, Rows, Times},
    },
    frame::{Frame, FrameInfo, PixelFormat},
    nn::lite::StudentConfig,
};

use students::{model, noise};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Codes by which a sample may differ, at 8 bits.
const MOST: u32 = 1;

/// How long speed is measured for.
const TIME: Duration = Duration::from_secs(3);

fn frame(info: FrameInfo) -> Result<Frame> {
    let mut frame = Frame::new(info)?;
    for plane in 0..info.format.planes() {
        let bytes = frame.plane_mut(plane);
        let noise = noise(bytes.len(), 1).map(|v| (128.0 + 60.0 * v) as u8);
        bytes.iter_mut().zip(noise).for_each(|(byte, v)| *byte = v);
    }
    Ok(frame)
}

/// The largest difference of the samples of two 8-bit frames.
fn difference(a: &Frame, b: &Frame) -> u32 {
    let planes = 0..a.info().format.planes();
    let samples = planes.flat_map(|p| a.plane(p).iter().zip(b.plane(p)));
    samples
        .map(|(a, b)| u32::from(a.abs_diff(*b)))
        .max()
        .unwrap_or(0)
}

/// Compares results; whether all agree.
fn compare(context: &Arc<Context>) -> Result<bool> {
    println!("| student | format | from | to | strength | difference |\n|---|---|---|---|---|---|");
    let students = [
        ("tiny r 2", StudentConfig::tiny(2)),
        ("tiny r 4", StudentConfig::tiny(4)),
        ("small", StudentConfig::small()),
    ];
    let sizes = [
        ((64, 48), (128, 96)),
        ((101, 37), (233, 111)),
        ((640, 360), (1280, 720)),
    ];
    let mut good = true;
    for (name, student) in students {
        let model = model(student);
        let formats = PixelFormat::ALL.into_iter();
        for format in formats.filter(|f| f.depth() == 8) {
            for (from, to) in sizes {
                let src = frame(FrameInfo::new(format, from.0, from.1))?;
                let dst = src.info().with_size(to.0, to.1);
                let mut engine = Engine::new(context, &model, *src.info(), dst, 1)?;
                let mut reference =
                    cpu::Engine::new(&model, *src.info(), dst, cpu::Precision::F32)?;
                for strength in [0.0, 1.0] {
                    let (mut got, mut want) = (Frame::new(dst)?, Frame::new(dst)?);
                    engine.run(&src.as_ref(), &mut got.as_mut(), strength)?;
                    reference.run(&src.as_ref(), &mut want.as_mut(), strength)?;
                    let far = difference(&got, &want);
                    good &= far <= MOST;
                    println!(
                        "| {name} | {} | {from:?} | {to:?} | {strength} | {far} |",
                        format.name()
                    );
                }
            }
        }
    }
    Ok(good)
}

/// Frames a second, what the last one took, and the median time from a frame's submission to its end.
struct Speed {
    rate: f64,
    times: Times,
    latency: Duration,
}

/// Where frames come from and go to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Host,
    Device,
}

/// NV12 from 1920x1080 to 3840x2160.
fn uhd() -> (FrameInfo, FrameInfo) {
    let src = FrameInfo::new(PixelFormat::Nv12, 1920, 1080);
    (src, src.with_size(3840, 2160))
}

/// Memory of the device for a frame, and where its planes lie in it.
fn planes(context: &Arc<Context>, info: &FrameInfo) -> Result<Vec<Rows>> {
    let planes = (0..info.format.planes()).map(|plane| {
        let (row, rows) = info.format.plane_size(plane, info.width, info.height);
        Ok(Rows {
            address: context.driver().alloc(row * rows)?,
            stride: row,
        })
    });
    planes.collect()
}

fn speed(
    context: &Arc<Context>,
    student: StudentConfig,
    depth: usize,
    place: Place,
) -> Result<Speed> {
    let (from, to) = uhd();
    let src = frame(from)?;
    let mut engine = Engine::new(context, &model(student), from, to, depth)?;
    engine.set_resident(place == Place::Device);
    let mut out = Frame::new(to)?;
    let (input, output) = (planes(context, &from)?, planes(context, &to)?);
    let mut times = Times::default();
    let (mut submitted, mut latencies) = (VecDeque::new(), Vec::new());
    let start = Instant::now();
    while start.elapsed() < TIME {
        if engine.in_flight() == depth {
            times = match place {
                Place::Host => engine.receive(&mut out.as_mut())?,
                // SAFETY: the planes were allocated for such a frame, and nobody else uses them.
                Place::Device => unsafe { engine.receive_device(&to, &output)? },
            };
            let begun: Option<Instant> = submitted.pop_front();
            latencies.extend(begun.map(|begun| begun.elapsed()));
        }
        submitted.push_back(Instant::now());
        match place {
            Place::Host => engine.submit(&src.as_ref(), 1.0)?,
            // SAFETY: as above.
            Place::Device => unsafe { engine.submit_device(&from, &input, 1.0)? },
        }
    }
    let rate = latencies.len() as f64 / start.elapsed().as_secs_f64();
    drop(engine);
    for plane in input.iter().chain(&output) {
        context.driver().free(plane.address);
    }
    latencies.sort();
    Ok(Speed {
        rate,
        times,
        latency: latencies
            .get(latencies.len() / 2)
            .copied()
            .unwrap_or_default(),
    })
}

/// Operations of a student's convolutions on a frame that becomes `to`.
fn operations(student: &StudentConfig, to: &FrameInfo) -> f64 {
    let cells = to.width.div_ceil(student.r) * to.height.div_ceil(student.r);
    let layers = student.layers().into_iter().map(|l| 2 * 9 * l.ci * l.co);
    (layers.sum::<usize>() * cells) as f64
}

/// The least frames a second of `streams` streams at once, each 960x540 to 1920x1080 with a thread of its own.
fn streams(context: &Arc<Context>, student: StudentConfig, streams: usize) -> Result<f64> {
    let src = FrameInfo::new(PixelFormat::Nv12, 960, 540);
    let dst = src.with_size(1920, 1080);
    let stream = || -> Result<f64, tadsr::Error> {
        let model = model(student);
        let mut engine = Engine::new(context, &model, src, dst, 2)?;
        let (frame, mut out) = (Frame::new(src)?, Frame::new(dst)?);
        let (start, mut frames) = (Instant::now(), 0u32);
        while start.elapsed() < TIME {
            if engine.in_flight() == 2 {
                engine.receive(&mut out.as_mut())?;
                frames += 1;
            }
            engine.submit(&frame.as_ref(), 1.0)?;
        }
        Ok(f64::from(frames) / start.elapsed().as_secs_f64())
    };
    let rates: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..streams).map(|_| scope.spawn(stream)).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut least = f64::INFINITY;
    for rate in rates {
        least = least.min(rate.map_err(|_| "a stream has panicked")??);
    }
    Ok(least)
}

fn main() -> Result<()> {
    let context = match Context::open(0) {
        Ok(context) => context,
        Err(reason) => {
            println!("{reason}");
            return Ok(());
        }
    };
    println!("{:?}\n", context.driver().info());
    let good = compare(&context)?;
    if !good {
        return Err(format!("a result differs by more than {MOST}").into());
    }
    if std::env::args().any(|arg| arg == "--compare") {
        return Ok(());
    }
    println!(
        "\nNV12 1920x1080 to 3840x2160; frames in memory of the host or of the device. Milliseconds of the last frame by the \
         device's clock; latency: the median from submission to end; TFLOP/s: of the convolutions in the computation's time\n"
    );
    println!(
        "| student | frames in | in flight | frames/s | latency | upload | computation | download | TFLOP/s |\n\
         |---|---|---|---|---|---|---|---|---|"
    );
    for (name, student) in [
        ("tiny r 4", StudentConfig::tiny(4)),
        ("small", StudentConfig::small()),
    ] {
        let operations = operations(&student, &uhd().1);
        for place in [Place::Host, Place::Device] {
            for depth in 1..=3 {
                let Speed {
                    rate,
                    times,
                    latency,
                } = speed(&context, student, depth, place)?;
                println!(
                    "| {name} | {place:?} | {depth} | {rate:.1} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} |",
                    latency.as_secs_f64() * 1e3,
                    times.upload,
                    times.compute,
                    times.download,
                    operations / f64::from(times.compute) / 1e9
                );
            }
        }
    }
    println!("\nNV12 960x540 to 1920x1080, frames/s of the slowest of streams at once\n");
    println!("| student | streams | frames/s |\n|---|---|---|");
    for (name, student) in [
        ("tiny r 4", StudentConfig::tiny(4)),
        ("small", StudentConfig::small()),
    ] {
        for count in [1, 4, 16] {
            let rate = streams(&context, student, count)?;
            println!("| {name} | {count} | {rate:.1} |");
        }
    }
    Ok(())
}
