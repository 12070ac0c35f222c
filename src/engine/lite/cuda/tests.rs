use std::{
    ptr::NonNull,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::*;
use crate::{
    Precision,
    cuda::{
        driver::{Address, Rows, Shape},
        emulator::{Fake, Kernels, Ram},
    },
    engine::{Engine, Options, lite::cpu},
    frame::{Component, Frame, PixelFormat},
    model::{Layer, LayerCondition, Metadata},
    nn::lite::{Architecture, LatentKind, LatentStats, StudentConfig},
    ops::cuda::Params,
};

mod candidates;
mod pinned;
mod tiles;

const PLENTY: usize = 1 << 30;

fn values(len: usize, size: f32, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2654435761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..len).map(|_| next()).collect()
}

/// Returns a model with a residual that is large enough to measure.
fn model(
    architecture: Architecture,
    latent: LatentKind,
    r: usize,
    channels: usize,
    depth: usize,
) -> LiteModel {
    let student = StudentConfig {
        architecture,
        latent,
        r,
        channels,
        depth,
        conditioning: Default::default(),
        memory: 0,
    };
    let layers = student.layers().into_iter().zip(1..).map(|(spec, seed)| {
        Layer::new(
            values(spec.co * spec.ci * 9, (0.5 / spec.ci as f32).sqrt(), seed),
            values(spec.co, 0.1, seed + 100),
            values(spec.co * 2, 0.1, seed + 200),
            spec,
        )
    });
    LiteModel {
        metadata: Metadata::lite("test", student, [1.0, 4.0]),
        stats: LatentStats::nominal(latent, r),
        layers: layers.collect(),
        calibration: None,
    }
}

fn small() -> LiteModel {
    model(Architecture::Residual, LatentKind::Yuv, 4, 32, 1)
}

fn context(fake: &Arc<Fake>) -> Arc<Context> {
    Context::new(fake.clone()).unwrap()
}

/// Returns a frame of soft noise around the middle of the range.
fn frame(format: PixelFormat, width: usize, height: usize, seed: u32) -> Frame {
    let mut frame = Frame::new(FrameInfo::new(format, width, height)).unwrap();
    for &layout in format.components() {
        let (w, h) = format.component_size(layout.component, width, height);
        let middle = match layout.component {
            Component::U | Component::V => 0.0,
            _ => 0.5,
        };
        let samples: Vec<f32> = values(w * h, 0.25, seed)
            .iter()
            .map(|v| v + middle)
            .collect();
        frame.as_mut().write(layout.component, &samples).unwrap();
    }
    frame
}

fn by_cpu(model: &LiteModel, src: &Frame, dst: FrameInfo, strength: f32) -> Frame {
    let mut out = Frame::new(dst).unwrap();
    let mut runner = cpu::Runner::new(model, *src.info(), dst, Precision::F32).unwrap();
    runner
        .run(&src.as_ref(), &mut out.as_mut(), strength)
        .unwrap();
    out
}

/// Returns the maximum difference of the samples of two frames, in codes.
fn difference(a: &Frame, b: &Frame) -> u32 {
    let format = a.info().format;
    let codes = |frame: &Frame| -> Vec<u32> {
        let bytes = (0..format.planes()).flat_map(|plane| frame.plane(plane).to_vec());
        let bytes: Vec<u8> = bytes.collect();
        match format.depth() {
            8 => bytes.into_iter().map(u32::from).collect(),
            _ => {
                let words = bytes
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|&b| u16::from_le_bytes(b));
                words.map(|w| u32::from(w >> format.shift())).collect()
            }
        }
    };
    codes(a)
        .into_iter()
        .zip(codes(b))
        .map(|(a, b)| a.abs_diff(b))
        .max()
        .unwrap()
}

#[test]
fn every_format_is_upscaled_as_by_the_cpu() {
    let plain = context(&emulated::device((8, 0), PLENTY));
    // The source is slow, so it runs at one strength of each format.
    let fake = emulated::device((8, 0), PLENTY);
    fake.set_kernels(emulated::checked);
    let by_source = context(&fake);
    let luma = model(Architecture::Plain, LatentKind::Luma, 2, 16, 2);
    let yuv = small();
    for (i, format) in PixelFormat::ALL.into_iter().enumerate() {
        for model in [&luma, &yuv] {
            let src = frame(format, 11, 7, 7);
            let dst = src.info().with_size(23, 14);
            let mut runners = [&plain, &by_source]
                .map(|context| Runner::new(context, model, *src.info(), dst, 1).unwrap());
            for (s, strength) in [1.0, 0.3, 0.0].into_iter().enumerate() {
                let runner = &mut runners[usize::from(s == i % 3)];
                let want = by_cpu(model, &src, dst, strength);
                let mut got = Frame::new(dst).unwrap();
                runner
                    .run(&src.as_ref(), &mut got.as_mut(), strength)
                    .unwrap();
                // The error of f16 is a small part of a code for a residual of about ten codes,
                // plus rounding.
                let max = match format.depth() {
                    8 => 1,
                    depth => 2 << depth.saturating_sub(12),
                };
                let error = difference(&got, &want);
                assert!(
                    error <= max,
                    "{format:?} {:?} {strength}: {error}",
                    model.metadata.student
                );
            }
            let bicubic = by_cpu(model, &src, dst, 0.0);
            let change = difference(&by_cpu(model, &src, dst, 1.0), &bicubic);
            assert!(
                change > 4,
                "{format:?}: the residual is too small to measure"
            );
        }
    }
}

#[test]
fn networks_of_all_widths_compute_as_the_cpu() {
    let fake = emulated::device((7, 5), PLENTY);
    fake.set_kernels(emulated::checked);
    let context = context(&fake);
    let cases = [
        (Architecture::Residual, LatentKind::Yuv, 4, 64, 2),
        (Architecture::Plain, LatentKind::Yuv, 4, 48, 3),
        (Architecture::Residual, LatentKind::Yuv, 2, 5, 2),
        (Architecture::Plain, LatentKind::Yuv, 6, 33, 0),
        // Those of the bundled models at scale 2, whose latent has four channels.
        (Architecture::Plain, LatentKind::Luma, 2, 32, 2),
        (Architecture::Residual, LatentKind::Luma, 2, 64, 2),
    ];
    for (architecture, latent, r, channels, depth) in cases {
        let model = model(architecture, latent, r, channels, depth);
        let src = frame(PixelFormat::Nv12, 35, 11, 3);
        let dst = src.info().with_size(140, 43);
        let mut runner = Runner::new(&context, &model, *src.info(), dst, 1).unwrap();
        let mut got = Frame::new(dst).unwrap();
        runner.run(&src.as_ref(), &mut got.as_mut(), 1.0).unwrap();
        let error = difference(&got, &by_cpu(&model, &src, dst, 1.0));
        assert!(
            error <= 1,
            "{architecture:?} {latent:?} r {r}, {channels} channels: {error}"
        );
    }
}

#[test]
fn frames_in_flight_are_returned_in_order() {
    let fake = emulated::device((8, 0), PLENTY);
    let (context, model) = (context(&fake), small());
    let frames: Vec<Frame> = (0..5)
        .map(|seed| frame(PixelFormat::I420, 24, 16, seed))
        .collect();
    let (src, dst) = (*frames[0].info(), frames[0].info().with_size(48, 32));
    let mut runner = Runner::new(&context, &model, src, dst, 3).unwrap();
    let mut alone = Runner::new(&context, &model, src, dst, 1).unwrap();
    let mut got = Vec::new();
    for frame in &frames {
        if runner.in_flight() == runner.depth() {
            assert!(
                runner.submit(&frame.as_ref(), 1.0).is_err(),
                "more than the queue depth"
            );
            got.push(receive(&mut runner, dst));
        }
        runner.submit(&frame.as_ref(), 1.0).unwrap();
    }
    while runner.in_flight() > 0 {
        got.push(receive(&mut runner, dst));
    }
    for (frame, got) in frames.iter().zip(&got) {
        let mut want = Frame::new(dst).unwrap();
        alone.run(&frame.as_ref(), &mut want.as_mut(), 1.0).unwrap();
        assert_eq!(difference(got, &want), 0);
    }
    assert_eq!(got.len(), frames.len());
}

fn receive(runner: &mut Runner, dst: FrameInfo) -> Frame {
    let mut out = Frame::new(dst).unwrap();
    runner.receive(&mut out.as_mut()).unwrap();
    out
}

#[test]
fn a_frame_costs_a_copy_each_way_and_one_graph() {
    let fake = emulated::device((9, 0), PLENTY);
    let (context, model, src) = (context(&fake), small(), frame(PixelFormat::Nv12, 24, 16, 1));
    let dst = src.info().with_size(48, 32);
    let mut runner = Runner::new(&context, &model, *src.info(), dst, 2).unwrap();
    let setup = fake.log();
    let count = |log: &[String], call: &str| log.iter().filter(|c| *c == call).count();
    // One for each flight.
    assert_eq!(count(&setup, "graph"), 2);
    for _ in 0..3 {
        let mut out = Frame::new(dst).unwrap();
        runner.run(&src.as_ref(), &mut out.as_mut(), 1.0).unwrap();
        let calls = "record upload record wait record launch_graph record wait record download \
                     record synchronize_event elapsed elapsed elapsed";
        assert_eq!(fake.log().join(" "), calls);
    }
}

#[test]
fn too_little_memory_means_bands_with_the_same_result() {
    // Interpolation of 4:4:4 chroma reads across the borders of bands.
    for (format, medium, small_memory) in [
        (PixelFormat::I420, 340_000, 240_000),
        (PixelFormat::Y444, 420_000, 320_000),
    ] {
        let (model, src) = (small(), frame(format, 20, 130, 1));
        let dst = src.info().with_size(40, 260);
        let mut results = Vec::new();
        for memory in [PLENTY, medium, small_memory] {
            let fake = emulated::device((8, 6), memory);
            let mut runner = Runner::new(&context(&fake), &model, *src.info(), dst, 1).unwrap();
            let mut out = Frame::new(dst).unwrap();
            runner.run(&src.as_ref(), &mut out.as_mut(), 1.0).unwrap();
            assert!(runner.memory() <= memory);
            results.push((runner.bands(), out));
        }
        let bands: Vec<usize> = results.iter().map(|(bands, _)| *bands).collect();
        assert!(
            bands[0] == 1 && bands[1] > 1 && bands[2] > bands[1],
            "{format:?} {bands:?}"
        );
        let (_, whole) = &results[0];
        assert!(results.iter().all(|(_, out)| difference(out, whole) == 0));
    }

    let (model, src) = (small(), frame(PixelFormat::I420, 20, 130, 1));
    let dst = src.info().with_size(40, 260);
    let fake = emulated::device((8, 6), 50_000);
    let error = Runner::new(&context(&fake), &model, *src.info(), dst, 1)
        .err()
        .unwrap();
    assert!(
        matches!(&error, Error::Memory(text) if text.contains("alloc")),
        "{error}"
    );
}

/// Runs the binding of the driver with a stub of its library, in one process for each version,
/// because the library is loaded once in a process.
#[test]
#[cfg(unix)]
fn the_driver_library_is_used_as_documented() {
    const VERSION: &str = "TADSR_DRIVER_VERSION";
    const NAME: &str = "engine::lite::cuda::tests::the_driver_library_is_used_as_documented";
    let Ok(version) = std::env::var(VERSION) else {
        for (version, other_chip) in [("12000", false), ("12000", true), ("11080", false)] {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child
                .args(["--exact", NAME, "--nocapture"])
                .env(VERSION, version);
            if other_chip {
                // The driver refuses the machine code and compiles the PTX.
                child.env("TADSR_DRIVER_OTHER_CHIP", "1");
            }
            let child = child.output().unwrap();
            let output = String::from_utf8_lossy(&child.stdout);
            assert!(
                child.status.success() && output.contains("1 passed"),
                "{child:?}"
            );
        }
        return;
    };
    let allocated = crate::ops::cuda::host::load_driver();
    let opened = Context::open(0);
    if version == "11080" {
        let error = opened.err().unwrap().to_string();
        assert!(
            error.contains("CUDA 11.8") && error.contains("525"),
            "{error}"
        );
        return;
    }
    let context = opened.unwrap();
    drop(Context::open_with_ptx(0).unwrap());
    assert_eq!(driver::probe().unwrap(), [context.driver().info().clone()]);
    assert_eq!(context.driver().info().capability, (8, 6));
    let error = Context::open(1).err().unwrap().to_string();
    assert!(error.contains("1 CUDA devices"), "{error}");

    let (model, src) = (small(), frame(PixelFormat::Nv12, 24, 16, 1));
    context.check(&model).unwrap();
    let dst = src.info().with_size(48, 32);
    let want = by_cpu(&model, &src, dst, 1.0);
    let mut runner = Runner::new(&context, &model, *src.info(), dst, 2).unwrap();
    for _ in 0..2 {
        runner.submit(&src.as_ref(), 1.0).unwrap();
    }
    for _ in 0..2 {
        let mut got = Frame::new(dst).unwrap();
        runner.receive(&mut got.as_mut()).unwrap();
        assert!(difference(&got, &want) <= 1);
    }

    // Planes in device memory, here that of the process, with other strides.
    runner.set_resident(true);
    let (mut input, at) = spread(src.info());
    for (plane, &[start, stride, row, rows]) in at.iter().enumerate() {
        for y in 0..rows {
            input[start + y * stride..][..row].copy_from_slice(&src.plane(plane)[y * row..][..row]);
        }
    }
    let (mut output, to) = spread(&dst);
    let (from, into) = (rows_of(&mut input, &at), rows_of(&mut output, &to));
    // SAFETY: the planes are as large as the frames, and live until they are received.
    unsafe {
        runner.submit_device(src.info(), &from, 1.0).unwrap();
        runner.receive_device(&dst, &into).unwrap();
    }
    for (plane, &[start, stride, row, rows]) in to.iter().enumerate() {
        for y in 0..rows {
            let got = &output[start + y * stride..][..row];
            let want = &want.plane(plane)[y * row..][..row];
            assert!(got.iter().zip(want).all(|(a, b)| a.abs_diff(*b) <= 1));
        }
    }
    drop(runner);
    drop(context);
    // SAFETY: it reads a number.
    assert_eq!(unsafe { allocated() }, 0);
}

#[test]
fn too_little_host_memory_is_an_error_without_a_try_in_bands() {
    let fake = emulated::device((8, 6), PLENTY);
    let context = context(&fake);
    fake.fail(driver::HOST_ALLOC, 1, driver::OUT_OF_MEMORY);
    let src = FrameInfo::new(PixelFormat::I420, 20, 130);
    let dst = src.with_size(40, 260);
    let error = Runner::new(&context, &small(), src, dst, 1).err().unwrap();
    assert!(
        matches!(&error, Error::Memory(text) if text.contains("host")),
        "{error}"
    );
    let tries = fake.log();
    let tries = tries.iter().filter(|call| *call == driver::HOST_ALLOC);
    assert_eq!(tries.count(), 2);
}

/// Devices since Turing get the newest machine code of their generation that they can run, and
/// Tegra and later devices PTX.
#[test]
fn every_device_gets_kernels_that_it_can_run() {
    let cubin = |capability| {
        let found = CUBINS
            .iter()
            .find(|(_, i)| std::ptr::eq(&i.0, kernels(capability)));
        found.map(|(minimum, _)| *minimum)
    };
    for (device, minimum) in [
        ((7, 5), (7, 5)),
        ((8, 0), (8, 0)),
        ((8, 6), (8, 6)),
        ((8, 9), (8, 9)),
        ((9, 0), (9, 0)),
        ((10, 3), (10, 0)),
        ((12, 1), (12, 0)),
    ] {
        assert_eq!(cubin(device), Some(minimum));
    }
    for device in [(8, 7), (10, 1), (11, 0), (13, 0)] {
        assert_eq!(cubin(device), None, "{device:?}");
    }
    assert!(PTX.0.ends_with(&[0]) && PTX.0.starts_with(b"//"));
    assert!(CUBINS.iter().all(|(_, i)| i.0.starts_with(b"\x7fELF")));
}

#[test]
fn every_failure_is_reported_and_leaks_nothing() {
    let calls = [
        "load",
        "function",
        "alloc",
        driver::HOST_ALLOC,
        "stream",
        "event",
        "upload",
        "synchronize",
        "graph",
        "record",
        "wait",
        "launch_graph",
        "download",
        "synchronize_event",
        "elapsed",
    ];
    let (model, src) = (small(), frame(PixelFormat::Nv12, 24, 16, 1));
    let dst = src.info().with_size(48, 32);
    for call in calls {
        for after in 0..3 {
            let fake = emulated::device((8, 0), PLENTY);
            fake.fail(call, after, 719);
            let run = || -> Result<()> {
                let context = Context::new(fake.clone())?;
                let mut runner = Runner::new(&context, &model, *src.info(), dst, 2)?;
                let mut out = Frame::new(dst)?;
                runner.run(&src.as_ref(), &mut out.as_mut(), 1.0)
            };
            match run() {
                Ok(()) => assert!(after > 0, "{call} was never called"),
                Err(error) => {
                    assert!(
                        matches!(&error, Error::DeviceLost(text) if text.contains(call)),
                        "{error}"
                    );
                }
            }
            assert_eq!(fake.alive(), 0, "{call} after {after}");
        }
    }
}

#[test]
fn work_that_never_ends_is_a_lost_device_within_the_limit() {
    let (model, src) = (small(), frame(PixelFormat::Nv12, 24, 16, 1));
    let dst = src.info().with_size(48, 32);
    let fake = emulated::device((8, 0), PLENTY);
    let context = context(&fake);
    let mut runner = Runner::new(&context, &model, *src.info(), dst, 2).unwrap();
    runner.submit(&src.as_ref(), 1.0).unwrap();
    runner.submit(&src.as_ref(), 1.0).unwrap();
    fake.hang();
    let mut out = Frame::new(dst).unwrap();
    let error = runner.receive(&mut out.as_mut()).unwrap_err();
    assert!(
        matches!(&error, Error::DeviceLost(text) if text.contains("no answer")),
        "{error}"
    );
    assert!(fake.is_abandoned());
    assert_eq!(runner.in_flight(), 0);
    let next = runner.submit(&src.as_ref(), 1.0);
    assert!(matches!(next, Err(Error::DeviceLost(_))), "{next:?}");
}

#[test]
fn a_device_with_changing_results_is_refused() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    static LAST: AtomicUsize = AtomicUsize::new(usize::MAX);
    /// Runs a kernel of a device that computes the last convolution of a check wrongly.
    fn unstable(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
        emulated::kernels(ram, name, shape, params);
        if CALLS.fetch_add(1, Ordering::Relaxed) + 2 == LAST.load(Ordering::Relaxed) {
            ram.bytes(params::Conv::from_words(params).output, 2)
                .fill(0x45);
        }
    }
    let fake = emulated::device((8, 0), PLENTY);
    fake.set_kernels(unstable);
    context(&fake).check(&small()).unwrap();
    LAST.store(CALLS.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    let error = context(&fake).check(&small()).unwrap_err();
    assert!(error.to_string().contains("two results"), "{error}");
}

/// Runs a kernel, and damages the second byte of the planes that `has` is true for.
fn damage(
    ram: &mut Ram,
    name: &str,
    shape: Shape,
    params: &[u64],
    has: impl Fn(&params::Component) -> bool,
) {
    emulated::kernels(ram, name, shape, params);
    if name.starts_with("tadsr_pack") {
        let frame = params::Frame::from_words(params);
        let components = &frame.components[..frame.component_count as usize];
        for component in components.iter().filter(|component| has(component)) {
            ram.bytes(component.dst, 2)[1] ^= 0x80;
        }
    }
}

/// Returns `true` for a plane of both chroma components.
fn is_pair(component: &params::Component) -> bool {
    component.slots[1] != params::NO_SLOT
}

/// Number of blocks of more than one wave on a device of eight multiprocessors.
const WAVE: u32 = 64;

#[test]
fn a_device_with_a_single_kind_of_defect_is_refused() {
    fn words(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
        damage(ram, name, shape, params, |c| c.base.bytes == 2);
    }
    fn pairs(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
        damage(ram, name, shape, params, |c| {
            c.base.bytes == 1 && is_pair(c)
        });
    }
    /// Does not compute the last block of a grid that the device does not run at once.
    fn second_wave(ram: &mut Ram, name: &str, shape: Shape, params: &[u64]) {
        if !name.starts_with("tadsr_conv") || shape.grid.iter().product::<u32>() <= WAVE {
            return emulated::kernels(ram, name, shape, params);
        }
        let conv = params::Conv::from_words(params);
        let cells = (conv.in_width - 2) * (conv.in_height - 2);
        let last = conv.output + u64::from((cells - 1) * conv.co * 2);
        let before = ram.bytes(last, 2 * conv.co as usize).to_vec();
        emulated::kernels(ram, name, shape, params);
        ram.bytes(last, before.len()).copy_from_slice(&before);
    }
    for (kernels, place) in [
        (words as Kernels, "P010_10LE frame of 71x19"),
        (pairs, "NV12 frame of 71x19"),
        (second_wave, "I420 frame"),
    ] {
        let fake = emulated::device((8, 0), PLENTY).with_multiprocessors(8);
        fake.set_kernels(kernels);
        let error = context(&fake).check(&small()).unwrap_err().to_string();
        assert!(
            error.contains("wrongly") && error.contains(place),
            "{error}"
        );
        assert!(!error.contains("I420 frame of 71x19"), "{error}");
    }
}

#[test]
fn after_a_failed_frame_the_next_one_can_be_submitted() {
    let fake = emulated::device((8, 0), PLENTY);
    let (context, model, src) = (context(&fake), small(), frame(PixelFormat::Nv12, 24, 16, 1));
    let dst = src.info().with_size(48, 32);
    let mut runner = Runner::new(&context, &model, *src.info(), dst, 2).unwrap();
    let mut out = Frame::new(dst).unwrap();
    runner.submit(&src.as_ref(), 1.0).unwrap();
    fake.fail("launch_graph", 0, 1);
    let error = runner.submit(&src.as_ref(), 1.0).unwrap_err();
    assert!(
        matches!(&error, Error::Device(text) if text.contains("failed")),
        "{error}"
    );
    assert_eq!(runner.in_flight(), 0);
    fake.recover();
    for _ in 0..3 {
        runner.run(&src.as_ref(), &mut out.as_mut(), 1.0).unwrap();
    }
    assert!(difference(&out, &by_cpu(&model, &src, dst, 1.0)) <= 1);
}

#[test]
fn old_devices_and_other_frames_are_refused_with_a_reason() {
    let fake = emulated::device((7, 0), PLENTY);
    let error = Context::new(fake).err().unwrap();
    assert!(error.to_string().contains("7.5"), "{error}");

    let context = context(&emulated::device((8, 0), PLENTY));
    let src = frame(PixelFormat::I420, 8, 8, 0);
    let mut runner = Runner::new(
        &context,
        &small(),
        *src.info(),
        src.info().with_size(16, 16),
        1,
    )
    .unwrap();
    let mut wrong = Frame::new(src.info().with_size(16, 18)).unwrap();
    assert!(runner.run(&src.as_ref(), &mut wrong.as_mut(), 1.0).is_err());
    assert_eq!(runner.in_flight(), 0);
    assert!(runner.submit(&wrong.as_ref(), 1.0).is_err());
}

#[test]
fn a_device_is_shared_and_closed_by_its_last_user() {
    let fake = emulated::device((8, 0), PLENTY);
    fake.plug();
    let ordinal = fake.info().ordinal;
    let open = || Context::open(ordinal).unwrap();
    let (a, b) = (open(), open());
    assert!(Arc::ptr_eq(&a, &b));
    assert_eq!(fake.alive(), 1, "the kernels, once");
    drop((a, b));
    assert_eq!(fake.alive(), 0);
    open();
}

#[test]
fn an_external_context_is_shared_by_address_and_released_by_its_last_user() {
    let fake = emulated::device((8, 0), PLENTY);
    fake.plug();
    let ordinal = fake.info().ordinal;
    let mut contexts = [0u8; 2];
    let [one, two] = contexts.each_mut().map(|c| NonNull::from(c).cast());
    let open_in = |context| {
        // SAFETY: the emulated device does not use the context.
        let external = unsafe { ExternalContext::new(ordinal, context, Box::new(())) };
        Context::open_in(external).unwrap()
    };
    let (a, b, c) = (open_in(one), open_in(one), open_in(two));
    assert!(Arc::ptr_eq(&a, &b) && !Arc::ptr_eq(&a, &c));
    assert!(!Arc::ptr_eq(&a, &Context::open(ordinal).unwrap()));
    drop((a, b, c));
    assert_eq!(fake.alive(), 0);
}

/// Returns memory for a frame with padding between rows and before the first, and the offset,
/// stride, row length and number of rows of each plane.
fn spread(info: &FrameInfo) -> (Vec<u8>, Vec<[usize; 4]>) {
    let mut len = 5;
    let planes = (0..info.format.planes()).map(|plane| {
        let (row, rows) = info.format.plane_size(plane, info.width, info.height);
        let (offset, stride) = (len, row + 13 + plane);
        len += stride * rows;
        [offset, stride, row, rows]
    });
    let planes = planes.collect();
    (vec![0xee; len], planes)
}

fn rows_of(block: &mut [u8], planes: &[[usize; 4]]) -> Vec<Rows> {
    let start = block.as_mut_ptr() as u64;
    let rows = planes.iter().map(|&[offset, stride, ..]| Rows {
        address: Address(start + offset as u64),
        stride,
    });
    rows.collect()
}

#[test]
fn frames_in_device_memory_are_upscaled_as_those_of_the_host() {
    let fake = emulated::device((8, 0), PLENTY);
    fake.admit_guests();
    let context = context(&fake);
    for format in PixelFormat::ALL {
        let src = frame(format, 13, 7, 7);
        let dst = src.info().with_size(27, 14);
        let mut runner = Runner::new(&context, &small(), *src.info(), dst, 2).unwrap();
        let mut want = Frame::new(dst).unwrap();
        runner.run(&src.as_ref(), &mut want.as_mut(), 0.8).unwrap();

        let (mut input, planes) = spread(src.info());
        let frame_ref = src.as_ref();
        for (&[offset, stride, row, rows], plane) in planes.iter().zip(frame_ref.planes()) {
            for y in 0..rows {
                input[offset + y * stride..][..row]
                    .copy_from_slice(&plane.data[y * plane.stride..][..row]);
            }
        }
        let from = rows_of(&mut input, &planes);
        let (mut output, planes) = spread(&dst);
        let to = rows_of(&mut output, &planes);
        // SAFETY: both allocations hold such frames, and nothing else uses them.
        unsafe {
            assert!(runner.submit_device(src.info(), &from[1..], 0.8).is_err());
            assert!(runner.submit_device(&dst, &from, 0.8).is_err());
            // From device memory to device memory.
            runner.set_resident(true);
            fake.log();
            runner.submit_device(src.info(), &from, 0.8).unwrap();
            runner
                .submit(&frame(format, 13, 7, 8).as_ref(), 0.8)
                .unwrap();
            assert!(runner.receive_device(src.info(), &to).is_err());
            runner.receive_device(&dst, &to).unwrap();
            assert!(!fake.log().iter().any(|call| call == "download"));
        }
        let frame_ref = want.as_ref();
        for (&[offset, stride, row, rows], plane) in planes.iter().zip(frame_ref.planes()) {
            for y in 0..rows {
                let line = &output[offset + y * stride..][..stride];
                assert_eq!(
                    line[..row],
                    plane.data[y * plane.stride..][..row],
                    "{format:?}"
                );
                assert!(
                    line[row..].iter().all(|&b| b == 0xee),
                    "{format:?}: padding is overwritten"
                );
            }
        }
        runner.flush();

        // From device memory to the host, for both values of the setting.
        for resident in [true, false] {
            runner.set_resident(resident);
            let mut got = Frame::new(dst).unwrap();
            // SAFETY: as above.
            unsafe { runner.submit_device(src.info(), &from, 0.8).unwrap() };
            runner.receive(&mut got.as_mut()).unwrap();
            assert_eq!(difference(&got, &want), 0, "{format:?}");
        }
    }
}

#[test]
fn a_missing_device_is_an_error_with_the_reason() {
    let error = Context::open(99).err().unwrap();
    let text = error.to_string();
    assert!(
        matches!(error, Error::Device(_)) && text.contains("cuda:99"),
        "{text}"
    );
}

#[test]
fn weights_that_overflow_f16_at_a_dial_are_an_error_with_the_remedy() {
    let mut model = small();
    model.metadata.student.conditioning.denoise = true;
    let conditioning = model.metadata.student.conditioning;
    for layer in &mut model.layers {
        let conditions = layer.spec.conditions(&conditioning).into_iter();
        layer.conditions = conditions.map(LayerCondition::zero).collect();
    }
    // Gain of the first feature of the dial, which is 0 for clean input.
    model.layers[0].conditions[1].gain[0] = 1e9;
    let fake = emulated::device((8, 0), PLENTY);
    let mut engine = CudaEngine::new(vec![model], context(&fake)).unwrap();
    let (src, dst) = (
        FrameInfo::new(PixelFormat::I420, 16, 16),
        FrameInfo::new(PixelFormat::I420, 32, 32),
    );
    let mut prepare = |denoise| {
        let options = Options {
            denoise: Some(denoise),
            ..Options::default()
        };
        engine.set_options(options).unwrap();
        engine.prepare(&src, &dst)
    };
    prepare(0.0).unwrap();
    let error = prepare(1.0).unwrap_err();
    assert!(matches!(&error, Error::Model { .. }), "{error}");
    assert!(error.to_string().contains("device=cpu"), "{error}");
}

#[test]
fn stages_show_the_first_kernel_that_is_wrong() {
    let model = model(Architecture::Plain, LatentKind::Luma, 2, 16, 4);
    let src = frame(PixelFormat::Nv12, 50, 30, 1);
    let dst = src.info().with_size(100, 60);
    let stages = |fake: Arc<Fake>| {
        let mut runner = Runner::new(&context(&fake), &model, *src.info(), dst, 1).unwrap();
        let stages = runner.stages(&src.as_ref(), 1.0).unwrap();
        // The runner still works.
        let mut out = Frame::new(dst).unwrap();
        runner.run(&src.as_ref(), &mut out.as_mut(), 1.0).unwrap();
        stages
    };
    let right = stages(emulated::device((8, 0), PLENTY));
    let defective = stages(Fake::new(emulated::defective, (8, 0), PLENTY));
    assert_eq!(right.len(), 7);
    let kernels: Vec<_> = right.iter().map(|stage| stage.kernel).collect();
    assert_eq!(kernels[..2], ["tadsr_unpack_tiles", "tadsr_conv16_of4"]);
    let (last, latent) = (&right[6], &right[0]);
    assert_eq!((last.width, last.height, last.channels), (50, 30, 4));
    assert_eq!((latent.width, latent.height), (62, 42));
    let first = right
        .iter()
        .zip(&defective)
        .map(|(a, b)| b.difference(a, 0.01));
    let first: Vec<_> = first.collect();
    assert!(first[0].is_none(), "{first:?}");
    let ([x, y, channel], count) = first[1].unwrap();
    assert!(x < 60 && y < 40 && channel < 16 && count > 1);
    let at = (y * 60 + x) * 16 + channel;
    assert!(right[1].values[at].to_f32() < 0.0 && defective[1].values[at].to_f32() == 0.0);
}
