// SPDX-License-Identifier: MPL-2.0

//! `device=auto` with emulated CUDA devices: the trial in the background, the swap, and failures.

mod common;

use std::{
    env, fs,
    ops::Range,
    process::{Command, Output},
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
/// Ratios of the times per frame that an emulated device always and never reaches, and no ratio,
/// which leaves the default of 1.3.
const ALWAYS: &str = "0";
const NEVER: &str = "1e9";
const DEFAULT: &str = "";

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
        // An emulated device is slow.
        set("TADSR_CUDA_LIMIT", "300");
        let devices = (0..devices).map(|_| emulated::device((8, 0), 1 << 30));
        let devices: Vec<_> = devices.collect();
        devices.iter().for_each(|fake| fake.plug());
        Self {
            devices,
            cache,
            _alone: alone,
        }
    }

    /// Returns the stored verdicts.
    fn verdicts(&self) -> Vec<String> {
        let folder = fs::read_dir(self.cache.path().join("tadsr/cuda"));
        let files = folder
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path());
        // A file may disappear meanwhile.
        files
            .filter_map(|path| fs::read_to_string(path).ok())
            .collect()
    }

    /// Waits until a trial tries the first device.
    fn wait_for_trial(&self) {
        let tries = |text: &String| text.contains("trying") && text.contains("model");
        wait("no trial", || self.verdicts().iter().any(tries));
    }
}

/// Waits until `done` returns true.
fn wait(otherwise: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(120), "{otherwise}");
        std::thread::sleep(Duration::from_millis(10));
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

fn stored_reason(rig: &Rig) -> Option<String> {
    let stats: gst::Structure = rig.element.property("stats");
    stats.get("cuda").ok()
}

/// Returns the reason for the device in use, once there is one.
fn reason(rig: &Rig) -> String {
    wait("no verdict", || stored_reason(rig).is_some());
    stored_reason(rig).unwrap()
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
    assert!(reason(&first).contains("at least 1000000000 is needed"));
    assert_eq!(device(&first), "cpu");
    drop(first);
    machine.devices[0].log();
    let second = rig(&[]);
    assert!(reason(&second).contains("at least 1000000000 is needed"));
    assert_eq!(machine.devices[0].log(), Vec::<String>::new());
}

#[test]
fn a_device_slower_than_the_cpu_is_not_used_by_default() {
    let machine = Machine::new(1, DEFAULT);
    let rig = rig(&[]);
    let reason = reason(&rig);
    assert_eq!(device(&rig), "cpu", "{reason}");
    // With the times swapped, the ratio would be above 1.3.
    let (before, after) = reason.split_once(" times as fast: ").expect(&reason);
    assert_eq!(after, "at least 1.3 is needed");
    let ratio: f64 = before.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(ratio < 1.0, "{reason}");
    let (_, stored) = reason.split_once("): ").unwrap();
    assert!(machine.verdicts()[0].contains(stored));
}

#[test]
fn a_device_that_blocks_for_longer_than_the_limit_is_not_used() {
    let machine = Machine::new(1, ALWAYS);
    set("TADSR_CUDA_LIMIT", "2");
    let fake = &machine.devices[0];
    fake.block("launch_graph", Duration::from_secs(5));
    let mut rig = rig(&[]);
    push(&mut rig, 0..2);
    assert_eq!(reason(&rig), "the trial had no result after 2 s");
    assert!(fake.alive() > 0, "the device still blocks");
    assert_eq!(device(&rig), "cpu");
    push(&mut rig, 2..4);
    let out = pulled(&mut rig);
    assert_eq!(out.len(), 4);
    assert_frames(&rig, &out);
    let stored = machine.verdicts();
    assert!(
        stored.len() == 1 && stored[0].contains("no result after 2 s"),
        "{stored:?}"
    );
    wait("no late answer", || fake.alive() == 0);
    assert_eq!(machine.verdicts(), stored, "the late answer counts");
    assert_eq!(device(&rig), "cpu");
}

#[test]
fn a_reload_during_a_trial_starts_one_for_the_new_model() {
    let machine = Machine::new(1, ALWAYS);
    machine.devices[0].block("launch_graph", Duration::from_secs(2));
    let rig = rig(&[("model", "tiny-x4")]);
    machine.wait_for_trial();
    rig.element.set_property("model", "tiny-x2");
    wait("CUDA has not taken over", || {
        device(&rig).starts_with("cuda")
    });
    assert_eq!(rig.element.property::<String>("active-model"), "tiny-x2");
    let stored = machine.verdicts();
    assert!(
        stored.len() == 1 && stored[0].contains("model tiny-x2,"),
        "{stored:?}"
    );
}

#[test]
fn new_caps_during_a_trial_start_one_for_the_new_size() {
    let machine = Machine::new(1, ALWAYS);
    machine.devices[0].block("launch_graph", Duration::from_secs(2));
    let mut rig = rig(&[]);
    machine.wait_for_trial();
    rig.harness.set_src_caps_str(&raw("I420", 32, 18));
    wait("CUDA has not taken over", || {
        device(&rig).starts_with("cuda")
    });
    let stored = machine.verdicts();
    assert!(
        stored.len() == 1 && stored[0].contains("32x18 to 64x36"),
        "{stored:?}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn new_caps_repeat_a_trial_without_a_verdict() {
    let machine = Machine::new(1, ALWAYS);
    set("TADSR_CUDA_LIMIT", "1");
    let folder = machine.cache.path().join("tadsr/cuda");
    fs::create_dir_all(&folder).unwrap();
    // The first process of the system is always there.
    let other = r#"{"what": "the driver", "state": "trying", "pid": 1}"#;
    fs::write(folder.join("driver.json"), other).unwrap();
    let mut rig = rig(&[]);
    assert!(
        reason(&rig).contains("in progress (process 1,"),
        "{}",
        reason(&rig)
    );
    assert_eq!(device(&rig), "cpu");
    fs::remove_file(folder.join("driver.json")).unwrap();
    set("TADSR_CUDA_LIMIT", "300");
    rig.harness.set_src_caps_str(&raw("I420", 32, 18));
    wait("CUDA has not taken over", || {
        device(&rig).starts_with("cuda")
    });
}

#[test]
fn every_outcome_is_one_line_of_the_log() {
    static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let lines = || std::mem::take(&mut *LINES.lock().unwrap());
    init();
    gst::log::set_threshold_for_name("tadsrupscale", gst::DebugLevel::Info);
    gst::log::add_log_function(|_, level, _, _, _, _, message| {
        let text = message.get().map(|text| text.to_string());
        let outcome = |text: &String| {
            text.starts_with("Staying on the CPU") || text.starts_with("Swapping to cuda:")
        };
        if level == gst::DebugLevel::Info {
            LINES.lock().unwrap().extend(text.filter(outcome));
        }
    });
    for (speedup, allowed, word) in [
        (ALWAYS, "1", "Swapping to cuda:"),
        (NEVER, "1", "Staying on the CPU: "),
        (ALWAYS, "0", "Staying on the CPU: "),
    ] {
        let machine = Machine::new(1, speedup);
        set("TADSR_CUDA", allowed);
        lines();
        let mut rig = rig(&[]);
        let reason = reason(&rig);
        let found = lines();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with(word) && found[0].ends_with(&reason),
            "{found:?}"
        );
        if word.starts_with("Swapping") {
            machine.devices[0].fail("synchronize_event", 0, LOST);
            push(&mut rig, 0..4);
            let found = lines();
            assert!(
                found.len() == 1 && found[0].contains("the CUDA device was lost"),
                "{found:?}"
            );
        }
    }
    let _machine = Machine::new(0, ALWAYS);
    if tadsr::trial::ruled_out().is_some() {
        let rig = rig(&[]);
        assert_eq!(lines(), ["Staying on the CPU: there is no NVIDIA driver"]);
        assert_eq!(reason(&rig), "there is no NVIDIA driver");
    }
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
    // Longer than a stop waits.
    machine.devices[0].block("launch_graph", Duration::from_secs(6));
    let rig = rig(&[]);
    machine.wait_for_trial();
    rig.element.set_state(gst::State::Null).unwrap();
    assert!(machine.devices[0].alive() > 0, "the device still blocks");
    // The program may end here.
    assert_eq!(machine.verdicts(), Vec::<String>::new());
    drop(rig);
    let again = self::rig(&[]);
    reason(&again);
    assert!(device(&again).starts_with("cuda"));
    assert_eq!(machine.verdicts().len(), 1);
}

/// Runs [`one_trial_in_this_process`] in a child process.
fn child(cache: &TempDir, mode: &str) -> Output {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "one_trial_in_this_process", "--ignored"])
        .env("TADSR_TEST_TRIAL", mode)
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .unwrap()
}

#[test]
fn a_crash_in_the_trial_keeps_later_programs_from_the_device() {
    // Also in the check after a good verdict.
    for passed_before in [false, true] {
        let cache = tempfile::tempdir().unwrap();
        let stored = || -> Vec<String> {
            let files = fs::read_dir(cache.path().join("tadsr/cuda")).unwrap();
            files
                .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
                .collect()
        };
        if passed_before {
            let good = child(&cache, "good");
            assert!(good.status.success(), "{good:?}");
            assert!(
                stored().len() == 1 && stored()[0].contains("fast"),
                "{:?}",
                stored()
            );
        }
        let crash = child(&cache, "crash");
        assert!(!crash.status.success(), "the child crashes");
        assert!(
            stored().len() == 1 && stored()[0].contains("trying"),
            "{:?}",
            stored()
        );
        let after = child(&cache, "after");
        assert!(after.status.success(), "{after:?}");
    }
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
    let reason = reason(&rig);
    if mode == "good" {
        assert!(device(&rig).starts_with("cuda"), "{reason}");
    } else {
        assert!(reason.contains("crashed or hung"), "{reason}");
        assert!(reason.contains(&cache), "{reason}");
        assert_eq!(device(&rig), "cpu");
    }
}
