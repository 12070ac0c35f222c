// SPDX-License-Identifier: MPL-2.0

//! `device=auto` with emulated CUDA devices: the trial in the background, the swap, and failures.

mod common;

use std::{
    env, fs,
    ops::Range,
    path::Path,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::*;
use gst::prelude::*;
use tadsr::{
    cuda::{
        driver::{Driver, Shape},
        emulator::{Fake, Ram},
        is_pinned,
    },
    engine::lite::cuda::emulated,
};
use tempfile::TempDir;

const SIZE: (u32, u32) = (24, 18);
/// `CUDA_ERROR_LAUNCH_FAILED`, after which the device is lost.
const LOST: i32 = 719;
/// Ratios of the times per frame that an emulated device always and never reaches.
const ALWAYS: &str = "0";
const NEVER: &str = "1e9";

/// Devices and a cache folder of one test. Tests run one after the other, because devices and
/// environment are those of the process.
struct Machine {
    devices: Vec<Arc<Fake>>,
    cache: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Machine {
    fn new(devices: usize, speedup: &str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        init();
        let cache = tempfile::tempdir().unwrap();
        set("XDG_CACHE_HOME", cache.path().to_str().unwrap());
        set("TADSR_CUDA_SPEEDUP", speedup);
        set("TADSR_CUDA", "1");
        let devices = (0..devices).map(|_| emulated::device((8, 0), 1 << 30));
        let devices: Vec<_> = devices.collect();
        devices.iter().for_each(|fake| fake.plug());
        Self {
            devices,
            cache,
            _alone: alone,
        }
    }

    /// Returns the stored verdicts, without that about the driver.
    fn verdicts(&self) -> Vec<String> {
        let folder = fs::read_dir(self.cache.path().join("tadsr/cuda"));
        let files = folder
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path());
        files
            .map(|path| fs::read_to_string(path).unwrap())
            .collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.devices.iter().for_each(|fake| fake.unplug());
    }
}

fn set(name: &str, value: &str) {
    // SAFETY: only the tests' threads, one at a time, and threads that have ended use the
    // environment.
    unsafe { env::set_var(name, value) };
}

fn rig(more: &[(&str, &str)]) -> Rig {
    let mut properties = vec![("device", "auto"), ("scale", "2")];
    properties.extend_from_slice(more);
    Rig::raw(&properties, "I420", SIZE.0, SIZE.1)
}

fn device(rig: &Rig) -> String {
    rig.element.property("active-device")
}

/// Returns the reason for the device in use, once there is one.
fn reason(rig: &Rig) -> String {
    let start = Instant::now();
    loop {
        let stats: gst::Structure = rig.element.property("stats");
        if let Ok(reason) = stats.get::<String>("cuda") {
            return reason;
        }
        assert!(start.elapsed() < Duration::from_secs(120), "no verdict");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asserts that `out` are all frames from the first on, as the CPU upscales them.
fn assert_frames(rig: &Rig, out: &[gst::Buffer]) {
    let exact = [("device", "cpu"), ("precision", "f32"), ("scale", "2")];
    let mut cpu = Rig::raw(&exact, "I420", SIZE.0, SIZE.1);
    for (n, buffer) in (0..).zip(out) {
        assert_eq!(buffer.pts(), Some(FRAME * n));
        let want = cpu.harness.push_and_pull(numbered(SIZE, n)).unwrap();
        let want = samples(&want, &cpu.out_info(), 0);
        let got = samples(buffer, &rig.out_info(), 0);
        let error = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max();
        // The first frames come from the CPU, possibly in 8-bit integers.
        assert!(error.unwrap() <= 5, "frame {n} is wrong by {error:?}");
    }
}

fn push(rig: &mut Rig, numbers: Range<u64>) {
    for n in numbers {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
}

fn pulled(rig: &mut Rig) -> Vec<gst::Buffer> {
    std::iter::from_fn(|| rig.harness.try_pull()).collect()
}

#[test]
fn a_device_that_is_right_and_fast_takes_over_between_two_frames() {
    let machine = Machine::new(1, ALWAYS);
    let cuda = format!("cuda:{}", machine.devices[0].info().ordinal);
    let mut rig = rig(&[]);
    assert_eq!(device(&rig), "cpu", "the start does not wait");
    rig.harness.push(numbered(SIZE, 0)).unwrap();
    assert!(reason(&rig).contains("ms per frame"), "{}", reason(&rig));
    assert_eq!(device(&rig), cuda);
    push(&mut rig, 1..5);
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    assert_eq!(out.len(), 5);
    assert_frames(&rig, &out);
    // Buffers are allocated again for the device.
    let pinned = |buffer: &gst::Buffer| is_pinned(&buffer.map_readable().unwrap());
    assert!(!pinned(&out[0]) && pinned(&out[4]));
    assert!(rig.message(gst::MessageType::Warning).is_none());
    assert!(machine.verdicts()[0].contains("\"fast\""));

    // Another element takes the verdict from the cache.
    drop(rig);
    set("TADSR_CUDA_SPEEDUP", ALWAYS);
    let again = self::rig(&[]);
    reason(&again);
    assert_eq!(device(&again), cuda);
    assert_eq!(machine.verdicts().len(), 1);
}

#[test]
fn a_slow_device_is_not_used_and_not_tried_again() {
    let machine = Machine::new(1, NEVER);
    let first = rig(&[]);
    assert!(reason(&first).contains("not 1000000000 times as fast"));
    assert_eq!(device(&first), "cpu");
    drop(first);
    machine.devices[0].log();
    let second = rig(&[]);
    assert!(reason(&second).contains("not 1000000000 times as fast"));
    assert_eq!(machine.devices[0].log(), Vec::<String>::new());
}

#[test]
fn a_device_that_computes_wrongly_or_never_ends_is_not_used() {
    for (hangs, word) in [(false, "wrongly"), (true, "no answer")] {
        let machine = Machine::new(1, ALWAYS);
        machine.devices[0].set_kernels(emulated::defective);
        if hangs {
            machine.devices[0].hang();
        }
        let mut rig = rig(&[]);
        assert!(reason(&rig).contains(word), "{}", reason(&rig));
        assert_eq!(device(&rig), "cpu");
        rig.harness.push(numbered(SIZE, 0)).unwrap();
        let out = pulled(&mut rig);
        assert_frames(&rig, &out);
        assert!(machine.verdicts()[0].contains("refused"));
    }
}

#[test]
fn a_device_that_is_lost_in_the_stream_is_replaced_by_the_cpu_for_good() {
    let machine = Machine::new(1, ALWAYS);
    let mut rig = rig(&[("fallback", "error")]);
    reason(&rig);
    push(&mut rig, 0..3);
    machine.devices[0].fail("synchronize_event", 0, LOST);
    push(&mut rig, 3..6);
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    assert_eq!(out.len(), 6, "no frame is lost");
    assert_frames(&rig, &out);
    assert_eq!(device(&rig), "cpu");
    let warning = rig.message(gst::MessageType::Warning).unwrap();
    assert!(warning.contains("running on the CPU"), "{warning}");
    drop(rig);
    machine.devices[0].recover();
    let next = self::rig(&[]);
    assert!(
        reason(&next).contains("failed in a stream"),
        "{}",
        reason(&next)
    );
    assert_eq!(device(&next), "cpu");
}

#[test]
fn of_two_devices_the_first_that_passes_is_used() {
    let machine = Machine::new(2, ALWAYS);
    machine.devices[0].set_kernels(emulated::defective);
    let rig = rig(&[]);
    reason(&rig);
    let second = machine.devices[1].info().ordinal;
    assert_eq!(device(&rig), format!("cuda:{second}"));
}

#[test]
fn the_environment_forbids_cuda() {
    let machine = Machine::new(1, ALWAYS);
    set("TADSR_CUDA", "0");
    let rig = rig(&[]);
    assert_eq!(reason(&rig), "TADSR_CUDA=0 forbids CUDA");
    assert_eq!(machine.devices[0].log(), Vec::<String>::new());
}

#[test]
fn the_latency_that_may_come_is_announced_from_the_start() {
    let machine = Machine::new(1, NEVER);
    let mut rig = rig(&[("queue-depth", "3")]);
    rig.harness.set_upstream_latency(FRAME * 5);
    assert_eq!(rig.harness.query_latency(), Some(FRAME * 7));
    reason(&rig);
    let start = Instant::now();
    while rig.harness.query_latency() != Some(FRAME * 5) {
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    drop(machine);
}

#[test]
fn a_stop_in_the_trial_leaves_no_verdict() {
    let machine = Machine::new(1, ALWAYS);
    let rig = rig(&[]);
    rig.element.set_state(gst::State::Null).unwrap();
    // The check of an emulated device may take longer than a stop waits.
    let start = Instant::now();
    while !machine.verdicts().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(rig);
    let again = self::rig(&[]);
    reason(&again);
    assert!(device(&again).starts_with("cuda"));
}

#[test]
fn a_crash_in_the_trial_keeps_later_programs_from_the_device() {
    let cache = tempfile::tempdir().unwrap();
    let run = |mode: &str| {
        Command::new(env::current_exe().unwrap())
            .args(["--exact", "one_trial_in_this_process", "--ignored"])
            .env("TADSR_TEST_TRIAL", mode)
            .env("XDG_CACHE_HOME", cache.path())
            .output()
            .unwrap()
    };
    let crash = run("crash");
    assert!(!crash.status.success(), "the child crashes");
    let left = fs::read_dir(cache.path().join("tadsr/cuda")).unwrap();
    let left: Vec<_> = left
        .map(|e| fs::read_to_string(e.unwrap().path()).unwrap())
        .collect();
    assert!(left.len() == 1 && left[0].contains("trying"), "{left:?}");
    let after = run("after");
    assert!(after.status.success(), "{after:?}");
}

/// Runs in a child process, which may crash.
#[test]
#[ignore = "run by another test"]
fn one_trial_in_this_process() {
    fn crash(_: &mut Ram, _: &str, _: Shape, _: &[u64]) {
        std::process::abort();
    }
    let mode = env::var("TADSR_TEST_TRIAL").expect("run by another test");
    let cache = env::var("XDG_CACHE_HOME").unwrap();
    let machine = Machine::new(1, ALWAYS);
    set("XDG_CACHE_HOME", &cache);
    if mode == "crash" {
        machine.devices[0].set_kernels(crash);
    }
    let rig = rig(&[]);
    assert!(reason(&rig).contains("crashed or hung"), "{}", reason(&rig));
    assert!(reason(&rig).contains(Path::new(&cache).to_str().unwrap()));
    assert_eq!(device(&rig), "cpu");
}
