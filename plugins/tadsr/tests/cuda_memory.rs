// SPDX-License-Identifier: MPL-2.0

//! Frames in CUDA memory: the real GstCuda on a fake driver (`libcuda.c`), and the library's
//! emulated device. A test binary of its own, because the process must load the fake driver before
//! GstCuda looks for a driver.

#![cfg(unix)]

mod common;

use std::{
    ffi::CString,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::Command,
    sync::{Arc, Once},
};

use common::*;
use gst::prelude::*;
use tadsr::{
    cuda::{driver::Driver, emulator::Fake},
    engine::lite::cuda::emulated,
};

const SIZE: (u32, u32) = (24, 18);

/// Builds the fake driver and loads it, so that GstCuda finds it under the name of the driver's
/// library.
fn load_driver() {
    static LOADED: Once = Once::new();
    LOADED.call_once(|| {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libcuda.so.1");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/libcuda.c");
        let built = Command::new("cc")
            .args([
                "-shared",
                "-fPIC",
                "-O1",
                "-w",
                "-Wl,-soname,libcuda.so.1",
                "-o",
            ])
            .args([&library, &source])
            .status();
        assert!(built.expect("a C compiler, cc").success());
        let name = CString::new(library.as_os_str().as_bytes()).unwrap();
        // SAFETY: the library does nothing when it is loaded.
        let loaded = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!loaded.is_null());
        // SAFETY: GStreamer's libraries can be loaded at any time.
        let gstcuda = unsafe { libc::dlopen(c"libgstcuda-1.0.so.0".as_ptr(), libc::RTLD_NOW) };
        assert!(
            !gstcuda.is_null(),
            "libgstcuda is missing: install gstreamer1.0-plugins-bad"
        );
    });
}

fn plug() -> Arc<Fake> {
    init();
    load_driver();
    let fake = emulated::device((8, 0), 1 << 30);
    fake.admit_guests();
    fake.plug();
    fake
}

fn device(fake: &Fake) -> String {
    format!("cuda:{}", fake.info().ordinal)
}

fn on_device(format: &str) -> String {
    raw(format, SIZE.0, SIZE.1).replace("video/x-raw", "video/x-raw(memory:CUDAMemory)")
}

/// Returns the samples of the `n`th frame. All frames differ.
fn sample(n: u64) -> impl Fn(usize, usize, usize) -> u16 {
    move |c, x, y| match c {
        0 => 60 + ((x * 3 + y * 5 + n as usize * 7) % 23) as u16 * 4,
        c => 100 + (c * 20 + x / 5) as u16,
    }
}

/// Returns the `n`th frame in system memory.
fn image(format: &str, n: u64) -> gst::Buffer {
    timed(frame(&info(&raw(format, SIZE.0, SIZE.1)), sample(n)), n)
}

/// Returns the pool that the element offers for frames in CUDA memory.
fn pool(rig: &Rig, format: &str) -> gst::BufferPool {
    let caps: gst::Caps = on_device(format).parse().unwrap();
    let mut query = gst::query::Allocation::new(Some(&caps), true);
    assert!(rig.element.static_pad("sink").unwrap().query(&mut query));
    let (pool, size, min, max) = query.allocation_pools().next().expect("a pool");
    let pool = pool.expect("a pool");
    let mut config = pool.config();
    config.set_params(Some(&caps), size, min, max);
    pool.set_config(config).unwrap();
    pool.set_active(true).unwrap();
    pool
}

/// Returns the `n`th frame in CUDA memory.
fn resident(pool: &gst::BufferPool, format: &str, n: u64) -> gst::Buffer {
    let buffer = pool.acquire_buffer(None).unwrap();
    assert!(is_resident(&buffer));
    let info = info(&raw(format, SIZE.0, SIZE.1));
    let mut mapped = gst_video::VideoFrame::from_buffer_writable(buffer, &info).unwrap();
    let source = gst_video::VideoFrame::from_buffer_readable(image(format, n), &info).unwrap();
    source.copy(&mut mapped).unwrap();
    timed(mapped.into_buffer(), n)
}

fn is_resident(buffer: &gst::Buffer) -> bool {
    buffer.n_memory() == 1 && buffer.peek_memory(0).is_type("gst.cuda.memory")
}

/// Asserts that `out` is the `n`th frame as the CPU upscales it.
fn assert_frame(rig: &Rig, out: &gst::Buffer, format: &str, n: u64) {
    let properties = [("device", "cpu"), ("scale", "2")];
    let mut cpu = Rig::raw(&properties, format, SIZE.0, SIZE.1);
    let want = cpu.harness.push_and_pull(image(format, n)).unwrap();
    assert_eq!(out.pts(), Some(FRAME * n));
    for component in 0..rig.out_info().n_components() as usize {
        let got = samples(out, &rig.out_info(), component);
        let want = samples(&want, &cpu.out_info(), component);
        assert_eq!(got.len(), want.len());
        let error = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(
            error.unwrap() <= 3,
            "{format}, frame {n}: wrong by {error:?}"
        );
    }
}

fn out_is_resident(rig: &Rig) -> bool {
    rig.out_caps()
        .features(0)
        .unwrap()
        .contains("memory:CUDAMemory")
}

#[test]
fn frames_stay_in_device_memory() {
    // Y42B comes from nvjpegdec.
    for format in ["NV12", "I420", "Y42B", "RGBA"] {
        let fake = plug();
        let properties = [("device", device(&fake)), ("scale", "2".into())];
        let properties = properties.each_ref().map(|(k, v)| (*k, v.as_str()));
        let mut rig = Rig::with_caps(&properties, &on_device(format));
        assert!(out_is_resident(&rig), "{}", rig.out_caps());
        // An upstream that supports both memories should prefer this one.
        let wanted = rig.element.static_pad("sink").unwrap().query_caps(None);
        assert!(wanted.features(0).unwrap().contains("memory:CUDAMemory"));
        let pool = pool(&rig, format);
        fake.log();
        for n in 0..4 {
            rig.harness.push(resident(&pool, format, n)).unwrap();
        }
        rig.harness.push_event(gst::event::Eos::new());
        let log = fake.log();
        assert!(!log.iter().any(|call| call == "download"));
        // Only the strength is uploaded per frame.
        assert_eq!(log.iter().filter(|call| *call == "upload").count(), 1 + 4);
        for n in 0..4 {
            let out = rig.harness.pull().unwrap();
            assert!(is_resident(&out));
            assert_frame(&rig, &out, format, n);
        }
        assert!(rig.message(gst::MessageType::Warning).is_none());
        drop(rig);
        assert_eq!(fake.alive(), 0, "released with the element");
    }
}

#[test]
fn frames_move_to_device_memory_and_back() {
    for (from, to) in [(false, true), (true, false)] {
        let fake = plug();
        let device = device(&fake);
        let properties = [("device", device.as_str()), ("scale", "2")];
        let mut rig = Rig::new(&properties);
        rig.harness.play();
        let sink = if to {
            "video/x-raw(memory:CUDAMemory)"
        } else {
            "video/x-raw"
        };
        rig.harness.set_sink_caps_str(sink);
        let source = if from {
            on_device("NV12")
        } else {
            raw("NV12", SIZE.0, SIZE.1)
        };
        rig.harness.set_src_caps_str(&source);
        assert_eq!(out_is_resident(&rig), to);
        for n in 0..3 {
            let buffer = if from {
                resident(&pool(&rig, "NV12"), "NV12", n)
            } else {
                image("NV12", n)
            };
            rig.harness.push(buffer).unwrap();
        }
        rig.harness.push_event(gst::event::Eos::new());
        for n in 0..3 {
            let out = rig.harness.pull().unwrap();
            assert_eq!(is_resident(&out), to);
            assert_frame(&rig, &out, "NV12", n);
        }
    }
}

#[test]
fn frames_of_another_context_and_after_a_failure_are_upscaled() {
    let (fake, other) = (plug(), plug());
    let (device, other) = (device(&fake), device(&other));
    let properties = [
        ("device", device.as_str()),
        ("scale", "2"),
        ("fallback", "cpu"),
    ];
    let mut rig = Rig::with_caps(&properties, &on_device("NV12"));
    let own = pool(&rig, "NV12");
    let properties = [("device", other.as_str()), ("scale", "2")];
    let owner = Rig::with_caps(&properties, &on_device("NV12"));
    let foreign = pool(&owner, "NV12");

    rig.harness.push(resident(&foreign, "NV12", 0)).unwrap();
    rig.harness.push(resident(&own, "NV12", 1)).unwrap();
    // CUDA_ERROR_OUT_OF_MEMORY: memory remains valid after this error.
    fake.fail("launch_graph", 0, 2);
    rig.harness.push(resident(&own, "NV12", 2)).unwrap();
    rig.harness.push_event(gst::event::Eos::new());
    for n in 0..3 {
        let out = rig.harness.pull().unwrap();
        assert!(is_resident(&out));
        assert_frame(&rig, &out, "NV12", n);
    }
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("running on the CPU"), "{warning}");
}

#[test]
fn another_device_takes_effect_at_the_next_start() {
    let (fake, other) = (plug(), plug());
    let (device, other) = (device(&fake), device(&other));
    let properties = [("device", device.as_str()), ("scale", "2")];
    let mut rig = Rig::with_caps(&properties, &on_device("NV12"));
    rig.element.set_property("device", &other);
    rig.element.set_property("model", "tiny-x4");
    let warning = rig.wait_for(gst::MessageType::Warning);
    assert!(warning.contains("next start"), "{warning}");
    let buffer = resident(&pool(&rig, "NV12"), "NV12", 0);
    rig.harness.push(buffer).unwrap();
    rig.harness.push_event(gst::event::Eos::new());
    let out = rig.harness.pull().unwrap();
    assert_frame(&rig, &out, "NV12", 0);

    for state in [gst::State::Null, gst::State::Playing] {
        rig.element.set_state(state).unwrap();
    }
    assert_eq!(rig.element.property::<String>("active-device"), other);
}

#[test]
fn formats_and_sizes_without_cuda_memory_stay_in_system_memory() {
    let fake = plug();
    let device = device(&fake);
    // An odd height, and a format that GstCuda does not support.
    for (scale, format) in [("1.5", "I420"), ("2", "GRAY8")] {
        let properties = [("device", device.as_str()), ("scale", scale)];
        let mut rig = Rig::raw(&properties, format, 24, 18);
        assert!(!out_is_resident(&rig), "{}", rig.out_caps());
        rig.harness.push(image(format, 0)).unwrap();
        rig.harness.push_event(gst::event::Eos::new());
        assert!(!is_resident(&rig.harness.pull().unwrap()));

        // Such frames cannot be moved to CUDA memory either.
        let mut rig = Rig::new(&properties);
        rig.harness.play();
        rig.harness
            .set_sink_caps_str("video/x-raw(memory:CUDAMemory)");
        rig.harness.set_src_caps_str(&raw(format, 24, 18));
        let pushed = rig.harness.push(image(format, 0));
        assert_eq!(pushed, Err(gst::FlowError::NotNegotiated), "{format}");
    }
}

#[test]
fn without_a_device_only_passthrough_accepts_device_memory() {
    load_driver();
    let mut rig = Rig::new(&[("device", "cpu"), ("scale", "2")]);
    rig.harness.play();
    let caps = rig.element.static_pad("sink").unwrap().query_caps(None);
    let has = |caps: &gst::Caps| {
        (0..caps.size()).any(|i| caps.features(i).unwrap().contains("memory:CUDAMemory"))
    };
    assert!(!has(&caps), "{caps}");

    let rig = Rig::with_caps(&[("device", "cpu"), ("scale", "1")], &on_device("NV12"));
    assert!(out_is_resident(&rig));
}

#[test]
fn a_pipeline_has_one_context() {
    let fake = plug();
    let device = device(&fake);
    let pipeline = gst::Pipeline::new();
    let make = |name: &str, scale: &str| {
        gst::ElementFactory::make("tadsrupscale")
            .name(name)
            .property_from_str("device", &device)
            .property_from_str("scale", scale)
            .build()
            .unwrap()
    };
    let source = gst::ElementFactory::make("videotestsrc")
        .property("num-buffers", 3)
        .build()
        .unwrap();
    let sink = gst::ElementFactory::make("fakesink").build().unwrap();
    let (one, two) = (make("one", "1.5"), make("two", "2"));
    pipeline.add_many([&source, &one, &two, &sink]).unwrap();
    let caps: gst::Caps = raw("NV12", 16, 12).parse().unwrap();
    source.link_filtered(&one, &caps).unwrap();
    let between: gst::Caps = "video/x-raw(memory:CUDAMemory)".parse().unwrap();
    one.link_filtered(&two, &between).unwrap();
    two.link(&sink).unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let bus = pipeline.bus().unwrap();
    let mut contexts = 0;
    for message in bus.iter_timed(gst::ClockTime::from_seconds(60)) {
        match message.view() {
            gst::MessageView::HaveContext(_) => contexts += 1,
            gst::MessageView::Eos(_) => break,
            gst::MessageView::Error(err) => panic!("{err:?}"),
            _ => {}
        }
    }
    pipeline.set_state(gst::State::Null).unwrap();
    assert_eq!(contexts, 1);
    assert_eq!(fake.alive(), 0);
}

#[test]
fn auto_shares_the_context_of_a_neighbour_and_creates_none() {
    // Without the neighbour, the first device would be used.
    let (first, fake) = (plug(), plug());
    let cache = tempfile::tempdir().unwrap();
    // SAFETY: no other test of this file reads these variables.
    unsafe {
        std::env::set_var("XDG_CACHE_HOME", cache.path());
        std::env::set_var("TADSR_CUDA_SPEEDUP", "0");
    }
    let neighbour = format!(
        "tadsrupscale model=tiny device={} scale=1.5 ! video/x-raw(memory:CUDAMemory)",
        device(&fake)
    );
    for (before, shares) in [(neighbour.as_str(), true), ("identity", false)] {
        let description = format!(
            "videotestsrc is-live=true ! {} ! {before} ! tadsrupscale name=auto model=tiny scale=2 ! \
             fakesink name=sink",
            raw("NV12", 16, 12)
        );
        let pipeline = gst::parse::launch(&description).unwrap();
        let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
        pipeline.set_state(gst::State::Playing).unwrap();
        let element = pipeline.by_name("auto").unwrap();
        let start = std::time::Instant::now();
        while element.property::<String>("active-device") == "cpu" {
            assert!(start.elapsed().as_secs() < 120, "CUDA has not taken over");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let used = if shares { &fake } else { &first };
        assert_eq!(element.property::<String>("active-device"), device(used));
        let pads = ["sink", "src"].map(|name| element.static_pad(name).unwrap());
        for pad in pads {
            let caps = pad.query_caps(None);
            let offered = caps
                .iter_with_features()
                .any(|(_, f)| f.contains("memory:CUDAMemory"));
            assert_eq!(offered, shares, "{caps}");
        }
        let caps = element.static_pad("sink").unwrap().current_caps().unwrap();
        let resident = caps.features(0).unwrap().contains("memory:CUDAMemory");
        assert_eq!(resident, shares, "{caps}");
        pipeline.send_event(gst::event::Eos::new());
        let bus = pipeline.bus().unwrap();
        let (mut contexts, mut ended) = (0, false);
        for message in bus.iter_timed(gst::ClockTime::from_seconds(60)) {
            match message.view() {
                gst::MessageView::HaveContext(_) => contexts += 1,
                gst::MessageView::Eos(_) => {
                    ended = true;
                    break;
                }
                gst::MessageView::Error(err) => panic!("{err:?}"),
                gst::MessageView::Warning(warning) => panic!("{warning:?}"),
                _ => {}
            }
        }
        assert!(ended, "no end of the stream");
        let stats: gst::Structure = element.property("stats");
        let frames: u64 = stats.get("frames").unwrap();
        let sink: gst::Structure = pipeline.by_name("sink").unwrap().property("stats");
        assert_eq!(sink.get::<u64>("rendered").unwrap(), frames);
        pipeline.set_state(gst::State::Null).unwrap();
        assert_eq!(contexts, u32::from(shares));
    }
    assert_eq!(fake.alive(), 0);
}
