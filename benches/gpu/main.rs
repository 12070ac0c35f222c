//! Students on a CUDA device: difference from the CPU engine in every format and size, and speed.
//!
//! `benches/gpu.sh` builds a folder with this program for a machine that has only the driver. Fails
//! if a result differs by more than the rounding of f16, or if there is no device. The options
//! select parts, without them `--compare`, `--speed` and `--streams` run:
//!
//! - `--compare`: every format and code path
//! - `--short`: a few small frames, for slow tools such as sanitizers
//! - `--speed`: times of single streams
//! - `--streams`: times of simultaneous streams
//! - `--frames N`: upscales N frames with each network, for a profiler
//! - `--bisect`: each kernel compared with its emulation
//! - `--ceilings FOLDER`: limits of the device, by the kernels in `FOLDER/ceilings.*`
//! - `--candidates FOLDER`: the kernels in `FOLDER/candidates.*` compared with a reference
//! - `--times`: those kernels also at the sizes of frames, with times
//! - `--ptx`: the driver compiles the kernels

mod candidates;
mod ceilings;
#[path = "../support/students.rs"]
mod students;

use std::{
    collections::VecDeque,
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use tadsr::{
    Precision,
    cuda::{
        HostMemory,
        driver::{Address, Rows, Stream},
    },
    engine::{
        Times,
        lite::{
            cpu,
            cuda::{Context, Runner, emulated},
        },
    },
    frame::{Frame, FrameInfo, FrameMut, FrameRef, PixelFormat, Plane, PlaneMut},
    nn::lite::StudentConfig,
};

use students::{model, noise};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Returns the maximum difference of a sample in codes.
fn most(format: PixelFormat) -> u32 {
    match format.depth() {
        8 => 1,
        depth => 3 << depth.saturating_sub(12),
    }
}

/// Duration of a speed measurement.
const TIME: Duration = Duration::from_millis(1500);

/// Networks with the factor by which frames are enlarged to measure their speed, those of the
/// default models first.
fn networks() -> [(&'static str, StudentConfig, usize); 6] {
    [
        ("tiny r 2", StudentConfig::tiny(2), 2),
        ("small r 2", StudentConfig::small(2), 2),
        ("base r 2", StudentConfig::base(2), 2),
        ("tiny r 4", StudentConfig::tiny(4), 4),
        ("small r 4", StudentConfig::small(4), 4),
        ("base r 4", StudentConfig::base(4), 4),
    ]
}

/// Returns the frame for `seed`.
fn frame(info: FrameInfo, seed: u32) -> Result<Frame> {
    let mut frame = Frame::new(info)?;
    let depth = info.format.depth();
    for plane in 0..info.format.planes() {
        let bytes = frame.plane_mut(plane);
        let noise = noise(bytes.len(), seed).map(|v| 128.0 + 60.0 * v);
        match depth {
            8 => bytes
                .iter_mut()
                .zip(noise)
                .for_each(|(byte, v)| *byte = v as u8),
            _ => {
                let scale = (1u32 << (depth - 8)) as f32;
                for (word, v) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(noise) {
                    let code = ((v * scale) as u16) << info.format.shift();
                    *word = code.to_le_bytes();
                }
            }
        }
    }
    Ok(frame)
}

/// Returns the largest difference between the samples of two frames, in codes.
fn difference(a: &Frame, b: &Frame) -> u32 {
    let format = a.info().format;
    let most = |plane: usize| {
        let (a, b) = (a.plane(plane), b.plane(plane));
        match format.depth() {
            8 => a
                .iter()
                .zip(b)
                .map(|(a, b)| u32::from(a.abs_diff(*b)))
                .max(),
            _ => {
                let code = |c: &[u8; 2]| u16::from_le_bytes(*c) >> format.shift();
                let (a, b) = (a.as_chunks().0.iter(), b.as_chunks().0.iter());
                a.zip(b)
                    .map(|(a, b)| u32::from(code(a).abs_diff(code(b))))
                    .max()
            }
        }
    };
    (0..format.planes()).filter_map(most).max().unwrap_or(0)
}

/// Planes of a frame in device memory. Rows are longer than those of the frame.
struct OnDevice {
    context: Arc<Context>,
    planes: Vec<Rows>,
    /// Bytes per row and number of rows of each plane.
    sizes: Vec<(usize, usize)>,
}

impl OnDevice {
    fn new(context: &Arc<Context>, info: &FrameInfo) -> Result<Self> {
        let sizes = (0..info.format.planes())
            .map(|plane| info.format.plane_size(plane, info.width, info.height));
        let sizes: Vec<_> = sizes.collect();
        let planes = sizes.iter().map(|&(row, rows)| {
            let stride = (row + 1).next_multiple_of(256);
            let address = context.driver().alloc(stride * rows)?;
            Ok(Rows { address, stride })
        });
        Ok(Self {
            planes: planes.collect::<Result<_>>()?,
            context: context.clone(),
            sizes,
        })
    }

    /// Calls `each` for every row with number of plane, address, offset in the plane and length.
    fn rows(&self, mut each: impl FnMut(usize, Address, usize, usize) -> Result<()>) -> Result<()> {
        for (plane, (rows, &(row, count))) in self.planes.iter().zip(&self.sizes).enumerate() {
            for y in 0..count {
                let address = Address(rows.address.0 + (y * rows.stride) as u64);
                each(plane, address, y * row, row)?;
            }
        }
        Ok(())
    }

    fn write(&self, frame: &Frame) -> Result<()> {
        let driver = self.context.driver();
        self.rows(|plane, address, at, len| {
            let line = &frame.plane(plane)[at..at + len];
            // SAFETY: both are `len` bytes long and live until the stream is synchronised.
            unsafe { driver.upload(address, line.as_ptr(), len, Stream::DEFAULT)? };
            Ok(())
        })?;
        Ok(driver.synchronize(Stream::DEFAULT)?)
    }

    fn read(&self, info: FrameInfo) -> Result<Frame> {
        let (driver, mut frame) = (self.context.driver(), Frame::new(info)?);
        self.rows(|plane, address, at, len| {
            let line = &mut frame.plane_mut(plane)[at..at + len];
            // SAFETY: as above.
            unsafe { driver.download(line.as_mut_ptr(), address, len, Stream::DEFAULT)? };
            Ok(())
        })?;
        driver.synchronize(Stream::DEFAULT)?;
        Ok(frame)
    }
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        for plane in &self.planes {
            self.context.driver().free(plane.address);
        }
    }
}

/// A frame in pinned memory.
struct PinnedFrame {
    info: FrameInfo,
    memory: HostMemory,
}

impl PinnedFrame {
    fn new(context: &Context, info: FrameInfo) -> Result<Self> {
        let bytes = Self::sizes(&info).map(|(row, rows)| row * rows).sum();
        let memory = context.host_allocator().allocate(bytes)?;
        Ok(Self { info, memory })
    }

    /// Returns the bytes per row and the number of rows of each plane.
    fn sizes(info: &FrameInfo) -> impl Iterator<Item = (usize, usize)> {
        let FrameInfo {
            format,
            width,
            height,
            ..
        } = *info;
        (0..format.planes()).map(move |plane| format.plane_size(plane, width, height))
    }

    fn as_ref(&self) -> FrameRef<'_> {
        let mut rest = self.memory.as_ref();
        let planes = Self::sizes(&self.info).map(|(stride, rows)| Plane {
            data: rest
                .split_off(..stride * rows)
                .expect("the memory of the frame"),
            stride,
        });
        FrameRef::new(self.info, planes.collect()).expect("planes of the frame")
    }

    fn as_mut(&mut self) -> FrameMut<'_> {
        let mut rest = self.memory.as_mut();
        let planes = Self::sizes(&self.info).map(|(stride, rows)| PlaneMut {
            data: rest
                .split_off_mut(..stride * rows)
                .expect("the memory of the frame"),
            stride,
        });
        FrameMut::new(self.info, planes.collect()).expect("planes of the frame")
    }

    /// Copies the samples of `frame`, which is of the same kind and size.
    fn write(&mut self, frame: &Frame) {
        for (to, from) in self
            .as_mut()
            .planes_mut()
            .iter_mut()
            .zip(frame.as_ref().planes())
        {
            to.data.copy_from_slice(from.data);
        }
    }

    fn read(&self) -> Result<Frame> {
        let mut frame = Frame::new(self.info)?;
        for (plane, from) in self.as_ref().planes().iter().enumerate() {
            frame.plane_mut(plane).copy_from_slice(from.data);
        }
        Ok(frame)
    }
}

/// Memory of the frames.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Host,
    /// Memory of the host that the device accesses directly.
    Pinned,
    Device,
}

/// Returns the results of `engine` for consecutive frames, submitted as fast as possible.
fn run(
    engine: &mut Runner,
    context: &Arc<Context>,
    frames: &[Frame],
    dst: FrameInfo,
    [from, to]: [Place; 2],
    strength: f32,
) -> Result<Vec<Frame>> {
    let src = *frames[0].info();
    let inputs = frames.iter().map(|frame| {
        let input = OnDevice::new(context, &src)?;
        input.write(frame)?;
        Ok(input)
    });
    let inputs: Vec<OnDevice> = inputs.collect::<Result<_>>()?;
    let output = OnDevice::new(context, &dst)?;
    let (mut pinned_input, mut pinned_output) = (
        PinnedFrame::new(context, src)?,
        PinnedFrame::new(context, dst)?,
    );
    engine.set_resident(to == Place::Device);
    let mut results = Vec::new();
    let mut receive = |engine: &mut Runner| -> Result<()> {
        let mut out = Frame::new(dst)?;
        match to {
            Place::Host => drop(engine.receive(&mut out.as_mut())?),
            Place::Pinned => {
                engine.receive(&mut pinned_output.as_mut())?;
                out = pinned_output.read()?;
            }
            Place::Device => {
                // SAFETY: the planes were allocated for such a frame and are not used elsewhere.
                unsafe { engine.receive_device(&dst, &output.planes)? };
                out = output.read(dst)?;
            }
        }
        results.push(out);
        Ok(())
    };
    for (frame, input) in frames.iter().zip(&inputs) {
        if engine.in_flight() == engine.depth() {
            receive(engine)?;
        }
        match from {
            Place::Host => engine.submit(&frame.as_ref(), strength)?,
            Place::Pinned => {
                // It has been uploaded when this returns.
                pinned_input.write(frame);
                engine.submit(&pinned_input.as_ref(), strength)?;
            }
            // SAFETY: as above; the inputs live until all frames are received.
            Place::Device => unsafe { engine.submit_device(&src, &input.planes, strength)? },
        }
    }
    while engine.in_flight() > 0 {
        receive(engine)?;
    }
    Ok(results)
}

/// Compares results and prints those that differ too much. Returns true if all agree.
fn compare(context: &Arc<Context>, short: bool) -> Result<bool> {
    let with_chroma = ("luma and chroma", StudentConfig::chroma(), 2);
    let sizes = [
        ((64, 48), (128, 96)),
        ((101, 37), (233, 111)),
        ((640, 360), (1280, 720)),
    ];
    let sizes = &sizes[..if short { 1 } else { sizes.len() }];
    let mut wrong = 0;
    for (name, student, _) in networks().into_iter().chain([with_chroma]) {
        let model = model(student);
        let (mut results, mut largest) = (0, 0);
        // The format concerns the first and last kernels alone, which the larger networks share.
        let large = name.starts_with("small") || name.starts_with("base");
        let step = if !short {
            1
        } else if large {
            usize::MAX
        } else {
            5
        };
        for format in PixelFormat::ALL.into_iter().step_by(step) {
            for &(from, to) in sizes {
                let src = FrameInfo::new(format, from.0, from.1);
                let dst = src.with_size(to.0, to.1);
                // More different frames than may be in flight, to detect mixed up or late ones.
                let frames = (1..=if short { 2 } else { 5 }).map(|seed| frame(src, seed));
                let frames: Vec<Frame> = frames.collect::<Result<_>>()?;
                let mut reference = cpu::Runner::new(&model, src, dst, Precision::F32)?;
                let mut engine = Runner::new(context, &model, src, dst, 3)?;
                let (host, pinned, device) = (Place::Host, Place::Pinned, Place::Device);
                let places = [
                    [host, host],
                    [device, device],
                    [pinned, pinned],
                    [host, device],
                    [device, host],
                ];
                let (strengths, places) = if short {
                    (&[1.0][..], &places[..2])
                } else {
                    (&[1.0, 0.0][..], &places[..])
                };
                for &strength in strengths {
                    let mut wanted = Vec::new();
                    for frame in &frames {
                        let mut want = Frame::new(dst)?;
                        reference.run(&frame.as_ref(), &mut want.as_mut(), strength)?;
                        wanted.push(want);
                    }
                    for &places in places {
                        let got = run(&mut engine, context, &frames, dst, places, strength)?;
                        let far = got.iter().zip(&wanted).map(|(a, b)| difference(a, b)).max();
                        let far = far.unwrap_or(u32::MAX);
                        (results, largest) = (results + 1, largest.max(far));
                        if far > most(format) || got.len() != wanted.len() {
                            wrong += 1;
                            println!(
                                "WRONG: {name}, {}, {from:?} to {to:?}, {places:?}, strength \
                                 {strength}: {} frames, difference {far}",
                                format.name(),
                                got.len()
                            );
                        }
                    }
                }
            }
        }
        println!("{name}: {results} comparisons, largest difference {largest}");
    }
    println!("{wrong} comparisons failed\n");
    Ok(wrong == 0)
}

/// Compares the result of each kernel with that of its emulation, for frames of several sizes.
/// Returns true if all agree.
fn bisect(context: &Arc<Context>) -> Result<bool> {
    // Accumulated rounding of f16.
    const TOLERANCE: f32 = 0.02;
    let emulated = Context::new(emulated::device(
        context.driver().info().capability,
        1 << 32,
    ))?;
    let mut good = true;
    for (name, student, scale) in networks() {
        let model = model(student);
        for (width, height) in [(16, 8), (71, 19), (200, 120)] {
            let src = FrameInfo::new(PixelFormat::Nv12, width, height);
            let dst = src.with_size(scale * width, scale * height);
            let input = frame(src, 1)?;
            let stages = |context| -> Result<_> {
                let mut runner = Runner::new(context, &model, src, dst, 1)?;
                Ok(runner.stages(&input.as_ref(), 1.0)?)
            };
            let (device, wanted) = (stages(context)?, stages(&emulated)?);
            let mut stages = device.iter().zip(&wanted).enumerate();
            let first = stages.find_map(|(at, (device, wanted))| {
                let ([x, y, channel], count) = device.difference(wanted, TOLERANCE)?;
                let cell = (y * device.width + x) * device.channels + channel;
                let values = [device, wanted].map(|stage| stage.values[cell]);
                Some(format!(
                    "kernel {at}, {}: {count} of {} values differ, first at column {x}, row {y}, \
                     channel {channel} of {}x{}x{}: {} instead of {}",
                    device.kernel,
                    device.values.len(),
                    device.width,
                    device.height,
                    device.channels,
                    values[0],
                    values[1]
                ))
            });
            good &= first.is_none();
            let first = first.unwrap_or("all kernels agree".into());
            println!("{name}, {width}x{height}: {first}");
        }
    }
    Ok(good)
}

/// Returns true if a frame is computed in bands, bit by bit the same, when device memory is low.
fn compare_bands(context: &Arc<Context>) -> Result<bool> {
    let model = model(StudentConfig::chroma());
    let (src, dst) = uhd(2);
    let input = frame(src, 1)?;
    let one = |engine: &mut Runner| -> Result<Frame> {
        let mut out = Frame::new(dst)?;
        engine.run(&input.as_ref(), &mut out.as_mut(), 1.0)?;
        Ok(out)
    };
    let mut whole = Runner::new(context, &model, src, dst, 1)?;
    let want = one(&mut whole)?;
    let needed = whole.memory();
    drop(whole);
    let driver = context.driver();
    let mut taken = Vec::new();
    // In blocks, because a contiguous block of that size may not exist.
    while driver.free_memory()? > needed + needed / 2 {
        let block = (driver.free_memory()? - needed).min(4 << 30);
        match driver.alloc(block) {
            Ok(address) => taken.push(address),
            Err(_) => break,
        }
    }
    let half = driver.free_memory()?.saturating_sub(needed / 2);
    taken.extend(driver.alloc(half.max(1)).ok());
    let banded = Runner::new(context, &model, src, dst, 1);
    let result = banded.map_err(Into::into).and_then(|mut engine| {
        let far = difference(&one(&mut engine)?, &want);
        println!("\nin {} bands: a difference of {far}", engine.bands());
        Ok(far == 0 && engine.bands() > 1)
    });
    taken.into_iter().for_each(|address| driver.free(address));
    result
}

/// Frames per second, median times of a frame's steps, and median time from submission to
/// completion.
struct Speed {
    rate: f64,
    times: Times,
    latency: Duration,
}

/// Returns NV12 that is enlarged `scale` times to 3840x2160.
fn uhd(scale: usize) -> (FrameInfo, FrameInfo) {
    let dst = FrameInfo::new(PixelFormat::Nv12, 3840, 2160);
    (dst.with_size(3840 / scale, 2160 / scale), dst)
}

/// Upscales `count` frames to 3840x2160 with each network.
fn frames(context: &Arc<Context>, count: usize) -> Result<()> {
    for (_, student, scale) in networks() {
        let (from, to) = uhd(scale);
        let mut engine = Runner::new(context, &model(student), from, to, 1)?;
        let (src, mut out) = (frame(from, 1)?, Frame::new(to)?);
        for _ in 0..count {
            engine.run(&src.as_ref(), &mut out.as_mut(), 1.0)?;
        }
    }
    Ok(())
}

fn speed(
    context: &Arc<Context>,
    student: StudentConfig,
    scale: usize,
    depth: usize,
    place: Place,
) -> Result<Speed> {
    let (from, to) = uhd(scale);
    let src = frame(from, 1)?;
    let mut engine = Runner::new(context, &model(student), from, to, depth)?;
    engine.set_resident(place == Place::Device);
    let mut out = Frame::new(to)?;
    let (input, output) = (OnDevice::new(context, &from)?, OnDevice::new(context, &to)?);
    input.write(&src)?;
    let (mut pinned_input, mut pinned_output) = (
        PinnedFrame::new(context, from)?,
        PinnedFrame::new(context, to)?,
    );
    pinned_input.write(&src);
    let (mut times, mut latencies) = ([vec![], vec![], vec![]], Vec::new());
    let mut submitted = VecDeque::new();
    let (mut start, mut warm) = (Instant::now(), false);
    while !warm || start.elapsed() < TIME {
        if !warm && start.elapsed() > TIME / 6 {
            (start, warm) = (Instant::now(), true);
            times.iter_mut().for_each(Vec::clear);
            latencies.clear();
        }
        if engine.in_flight() == depth {
            let Times {
                upload,
                compute,
                download,
            } = match place {
                Place::Host => engine.receive(&mut out.as_mut())?,
                Place::Pinned => engine.receive(&mut pinned_output.as_mut())?,
                // SAFETY: the planes were allocated for such a frame and are not used elsewhere.
                Place::Device => unsafe { engine.receive_device(&to, &output.planes)? },
            };
            for (all, time) in times.iter_mut().zip([upload, compute, download]) {
                all.push(time);
            }
            let begun: Option<Instant> = submitted.pop_front();
            latencies.extend(begun.map(|begun| begun.elapsed()));
        }
        submitted.push_back(Instant::now());
        match place {
            Place::Host => engine.submit(&src.as_ref(), 1.0)?,
            Place::Pinned => engine.submit(&pinned_input.as_ref(), 1.0)?,
            // SAFETY: as above.
            Place::Device => unsafe { engine.submit_device(&from, &input.planes, 1.0)? },
        }
    }
    let rate = latencies.len() as f64 / start.elapsed().as_secs_f64();
    engine.flush();
    latencies.sort();
    let median = |mut all: Vec<f32>| {
        all.sort_by(f32::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or_default()
    };
    let [upload, compute, download] = times.map(median);
    Ok(Speed {
        rate,
        times: Times {
            upload,
            compute,
            download,
        },
        latency: latencies
            .get(latencies.len() / 2)
            .copied()
            .unwrap_or_default(),
    })
}

/// Returns the operations of a student's convolutions for a frame of the size `to`.
fn operations(student: &StudentConfig, to: &FrameInfo) -> f64 {
    let cells = to.width.div_ceil(student.r) * to.height.div_ceil(student.r);
    let layers = student.layers().into_iter().map(|l| 2 * 9 * l.ci * l.co);
    (layers.sum::<usize>() * cells) as f64
}

/// Returns the lowest frame rate of `streams` simultaneous streams, each 960x540 to 1920x1080 on
/// its own thread.
fn streams(context: &Arc<Context>, student: StudentConfig, streams: usize) -> Result<f64> {
    let src = FrameInfo::new(PixelFormat::Nv12, 960, 540);
    let dst = src.with_size(1920, 1080);
    let ready = Barrier::new(streams);
    let stream = || -> Result<f64, tadsr::Error> {
        let engine = Runner::new(context, &model(student), src, dst, 2);
        // All start together. A stream that cannot start does not block the others.
        ready.wait();
        let mut engine = engine?;
        let (frame, mut out) = (frame(src, 1).expect("a frame"), Frame::new(dst)?);
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
        least = least.min(rate.map_err(|_| "a stream panicked")??);
    }
    Ok(least)
}

/// Prints the speed of each network.
fn speeds(context: &Arc<Context>) -> Result<()> {
    println!(
        "\nNV12 to 3840x2160; frames in ordinary or pinned memory of the host, or in memory of the \
         device. Milliseconds are medians by the device's clock. Latency is the median from \
         submission to completion. TFLOP/s are those of the convolutions during the computation. \
         Frames in ordinary memory are copied by the thread that submits and receives them; only \
         frames/s and latency include this.\n"
    );
    println!(
        "| network | scale | frames in | in flight | frames/s | latency | upload | computation \
         | download | TFLOP/s |\n|---|---|---|---|---|---|---|---|---|---|"
    );
    for (name, student, scale) in networks() {
        let operations = operations(&student, &uhd(scale).1);
        for (place, depth) in [
            (Place::Host, 2),
            (Place::Pinned, 2),
            (Place::Device, 2),
            (Place::Host, 1),
            (Place::Device, 1),
            (Place::Host, 3),
        ] {
            let Speed {
                rate,
                times,
                latency,
            } = speed(context, student, scale, depth, place)?;
            println!(
                "| {name} | {scale} | {place:?} | {depth} | {rate:.1} | {:.2} | {:.2} | {:.2} \
                 | {:.2} | {:.1} |",
                latency.as_secs_f64() * 1e3,
                times.upload,
                times.compute,
                times.download,
                operations / f64::from(times.compute) / 1e9
            );
        }
    }
    Ok(())
}

/// Prints the speed of simultaneous streams.
fn many_streams(context: &Arc<Context>) -> Result<()> {
    println!("\nNV12 960x540 to 1920x1080, frames/s of the slowest of simultaneous streams\n");
    println!("| network | streams | frames/s |\n|---|---|---|");
    for (name, student, scale) in networks() {
        for count in [1, 4, 16] {
            if scale == 2 {
                let rate = streams(context, student, count)?;
                println!("| {name} | {count} | {rate:.1} |");
            }
        }
    }
    Ok(())
}

/// Returns the kernels in `FOLDER/NAME.*`.
fn image(context: &Context, folder: &str, name: &str) -> Result<Vec<u8>> {
    // wgmma is in machine code for this capability alone.
    let kind = match context.driver().info().capability {
        (9, 0) => "sm_90a.cubin",
        _ => "ptx",
    };
    let path = std::path::Path::new(folder).join(format!("{name}.{kind}"));
    Ok(std::fs::read(path)?)
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| args.iter().any(|arg| arg == name);
    let all = args
        .iter()
        .all(|arg| ["--bench", "--ptx"].contains(&&**arg));
    let context = if asked("--ptx") {
        Context::open_with_ptx(0)
    } else {
        Context::open(0)
    };
    let context = match context {
        Ok(context) => context,
        // `cargo bench` runs all benchmarks, also on machines without a device.
        Err(reason) if asked("--bench") => {
            println!("{reason}");
            return Ok(());
        }
        Err(reason) => return Err(reason.into()),
    };
    println!("{:?}\n", context.driver().info());
    let mut good = true;
    if asked("--bisect") {
        good &= bisect(&context)?;
    }
    if all || asked("--short") || asked("--compare") {
        good &= compare(&context, asked("--short"))?;
    }
    if all || asked("--compare") {
        good &= compare_bands(&context)?;
    }
    if !good {
        return Err("a result differs by more than the rounding of f16".into());
    }
    if let Some(at) = args.iter().position(|arg| arg == "--frames") {
        let count = args.get(at + 1).and_then(|count| count.parse().ok());
        frames(&context, count.ok_or("--frames needs a number")?)?;
    }
    if let Some(at) = args.iter().position(|arg| arg == "--ceilings") {
        let folder = args.get(at + 1).ok_or("--ceilings needs a folder")?;
        ceilings::print(&context, &image(&context, folder, "ceilings")?)?;
    }
    if let Some(at) = args.iter().position(|arg| arg == "--candidates") {
        let folder = args.get(at + 1).ok_or("--candidates needs a folder")?;
        let image = image(&context, folder, "candidates")?;
        if !candidates::print(&context, &image, asked("--times"))? {
            return Err("a kernel differs from the reference".into());
        }
    }
    if all || asked("--speed") {
        speeds(&context)?;
    }
    if all || asked("--streams") {
        many_streams(&context)?;
    }
    Ok(())
}
