//! Students on a CUDA device: every format and size beside the CPU engine's result, and how long a frame takes.
//!
//! `benches/gpu.sh` builds a folder with this in it, for a machine that has the driver and nothing else. Ends with an error when
//! a result differs by more than f16 explains. Without a device it says so and ends well.
//! With `--compare` nothing is timed.

#[path = "support/students.rs"]
mod students;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tadsr::{
    engine::{
        cpu,
        cuda::{Context, Engine, Times},
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

/// Frames a second, and what the last one took.
fn speed(context: &Arc<Context>, student: StudentConfig, depth: usize) -> Result<(f64, Times)> {
    let src = frame(FrameInfo::new(PixelFormat::Nv12, 1920, 1080))?;
    let dst = src.info().with_size(3840, 2160);
    let mut engine = Engine::new(context, &model(student), *src.info(), dst, depth)?;
    let mut out = Frame::new(dst)?;
    let mut times = Times::default();
    let (start, mut frames) = (Instant::now(), 0u32);
    while start.elapsed() < TIME {
        if engine.in_flight() == depth {
            times = engine.receive(&mut out.as_mut())?;
            frames += 1;
        }
        engine.submit(&src.as_ref(), 1.0)?;
    }
    let rate = f64::from(frames) / start.elapsed().as_secs_f64();
    Ok((rate, times))
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
        "\nNV12 1920x1080 to 3840x2160 from and to memory of the host, milliseconds of the last frame\n"
    );
    println!(
        "| student | in flight | frames/s | upload | computation | download |\n|---|---|---|---|---|---|"
    );
    for (name, student) in [
        ("tiny r 4", StudentConfig::tiny(4)),
        ("small", StudentConfig::small()),
    ] {
        for depth in 1..=3 {
            let (
                rate,
                Times {
                    upload,
                    compute,
                    download,
                },
            ) = speed(&context, student, depth)?;
            println!(
                "| {name} | {depth} | {rate:.1} | {upload:.2} | {compute:.2} | {download:.2} |"
            );
        }
    }
    Ok(())
}
