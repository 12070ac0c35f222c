use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tempfile::TempDir;

use super::*;
use crate::{
    Precision,
    engine::{Capabilities, Engine, Observer, Options},
    frame::{FrameMut, FrameRef, PixelFormat},
};

const LONG: Duration = Duration::from_secs(60);

fn ms(time: f64) -> Duration {
    Duration::from_secs_f64(time / 1e3)
}

/// An engine that takes a time per frame and computes nothing.
struct Slow {
    time: Duration,
    capabilities: Capabilities,
    options: Options,
}

impl Engine for Slow {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn model(&self, _: f64) -> &str {
        "slow"
    }

    fn precision(&self, _: f64) -> Precision {
        Precision::F32
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn set_options(&mut self, options: Options) -> Result<()> {
        self.options = options;
        Ok(())
    }

    fn prepare(&mut self, _: &FrameInfo, _: &FrameInfo) -> Result<()> {
        Ok(())
    }

    fn run(&mut self, _: &FrameRef, _: &mut FrameMut, _: Observer) -> Result<()> {
        thread::sleep(self.time);
        Ok(())
    }
}

fn slow(time: Duration, device: Device) -> Upscaler {
    let capabilities = Capabilities {
        scales: [1.0, 4.0],
        default_scale: 2.0,
        native_scale: None,
        precisions: vec![Precision::F32],
        settings: Vec::new(),
        max_steps: None,
        pipelined: false,
        history: false,
    };
    let engine = Slow {
        time,
        capabilities,
        options: Options::default(),
    };
    Upscaler::with_engine(Box::new(engine), device)
}

fn device() -> DeviceInfo {
    DeviceInfo {
        ordinal: 7,
        name: "a device".into(),
        capability: (8, 0),
        memory: 1 << 30,
        multiprocessors: 1,
        uuid: [1; 16],
        version: 12000,
    }
}

fn frames() -> [FrameInfo; 2] {
    let from = FrameInfo::new(PixelFormat::I420, 16, 16);
    [from, from.with_size(32, 32)]
}

/// A folder for records, and the number of times that a trial has loaded the model.
struct Bench {
    folder: TempDir,
    loads: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            loads: Arc::default(),
        }
    }

    /// Returns a trial of a device that takes the first time per frame; the CPU takes the second.
    fn trial(&self, cuda: f64, cpu: f64) -> Trial<usize> {
        let loads = self.loads.clone();
        let [from, to] = frames();
        Trial {
            model: "tiny-x2".into(),
            from,
            to,
            load: Box::new(move |device| {
                loads.fetch_add(1, Ordering::Relaxed);
                let time = ms(if device == Device::Cpu { cpu } else { cuda });
                Ok(slow(time, device))
            }),
            open: Box::new(|device| match device {
                Device::Cuda(ordinal) => Ok(ordinal),
                _ => unreachable!("only devices that pass are opened"),
            }),
            only: None,
            attempt: Attempt::default(),
        }
    }

    fn run<T: Send + 'static>(&self, trial: Trial<T>) -> Verdict<T> {
        self.run_for(trial, LONG)
    }

    fn run_for<T: Send + 'static>(&self, trial: Trial<T>, limit: Duration) -> Verdict<T> {
        trial.run_in(self.folder.path().into(), || Ok(vec![device()]), limit)
    }

    /// Returns the number of times that the model was loaded since the last call.
    fn loads(&self) -> usize {
        self.loads.swap(0, Ordering::Relaxed)
    }

    /// Returns the stored states.
    fn stored(&self) -> Vec<String> {
        let files = fs::read_dir(self.folder.path()).unwrap();
        files
            .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
            .collect()
    }
}

fn reason<T>(verdict: Verdict<T>) -> String {
    match verdict {
        Verdict::Use { .. } => panic!("the device is used"),
        Verdict::Stay(reason) | Verdict::Undecided(reason) => reason,
    }
}

fn is_used<T>(verdict: &Verdict<T>) -> bool {
    matches!(verdict, Verdict::Use { .. })
}

#[test]
fn a_device_must_be_faster_by_the_ratio() {
    for (cuda, cpu, good) in [
        (1.0, 1.29, false),
        (1.0, 1.31, true),
        (100.0, 131.0, true),
        (1.31, 1.0, false),
        (0.0, 0.0, false),
        (0.0, 1e-6, true),
        (1e-6, 0.0, false),
        (1e-6, 1.29e-6, false),
    ] {
        let result = compare(ms(cuda), ms(cpu), 1.3);
        assert_eq!(result.is_ok(), good, "{cuda} {cpu}: {result:?}");
    }
    let Err(reason) = compare(ms(2.0), ms(2.58), 1.3) else {
        panic!("too slow")
    };
    assert_eq!(
        reason,
        "2.00 ms per frame, 2.58 ms on the CPU, 1.29 times as fast: at least 1.3 is needed"
    );
}

#[test]
fn every_part_of_a_key_matters() {
    let (device, [from, to]) = (device(), frames());
    let model = vec![vec![1, 2, 3]];
    let of = |device: &DeviceInfo| key(device, b"kernels", &model, [from, to], 1.3);
    let same = of(&device);
    assert_eq!(same, of(&device));
    let other = DeviceInfo {
        version: 12010,
        ..device.clone()
    };
    let second = DeviceInfo {
        uuid: [2; 16],
        ..device.clone()
    };
    let wide = to.with_size(34, 32);
    let rgb = FrameInfo::new(PixelFormat::Rgb, 16, 16);
    for (what, key) in [
        ("driver", of(&other)),
        ("GPU", of(&second)),
        ("kernels", key(&device, b"other", &model, [from, to], 1.3)),
        (
            "model",
            key(&device, b"kernels", &[vec![1, 2]], [from, to], 1.3),
        ),
        ("size", key(&device, b"kernels", &model, [from, wide], 1.3)),
        ("format", key(&device, b"kernels", &model, [rgb, to], 1.3)),
        ("ratio", key(&device, b"kernels", &model, [from, to], 1.4)),
    ] {
        assert_ne!(key, same, "{what}");
    }
}

#[test]
fn a_verdict_is_stored_for_its_conditions() {
    let bench = Bench::new();
    let Verdict::Use { opened, reason, .. } = bench.run(bench.trial(1.0, 20.0)) else {
        panic!("the device is faster")
    };
    assert_eq!((opened, bench.loads()), (7, 2));
    assert!(reason.starts_with("a device: "), "{reason}");
    assert!(is_used(&bench.run(bench.trial(1.0, 20.0))));
    assert_eq!(bench.loads(), 0, "the verdict is known");

    let mut other = bench.trial(1.0, 20.0);
    other.model = "small-x2".into();
    assert!(is_used(&bench.run(other)));
    assert_eq!(bench.loads(), 2, "another model");

    let mut other = bench.trial(1.0, 20.0);
    other.to = other.to.with_size(34, 32);
    assert!(is_used(&bench.run(other)));
    assert_eq!(bench.loads(), 2, "another size");

    let newer = DeviceInfo {
        version: 13000,
        ..device()
    };
    let trial = bench.trial(1.0, 20.0);
    let verdict = trial.run_in(bench.folder.path().into(), || Ok(vec![newer]), LONG);
    assert!(is_used(&verdict));
    assert_eq!(bench.loads(), 2, "another driver");
}

#[test]
fn a_slow_device_is_refused_with_the_ratio() {
    let bench = Bench::new();
    let verdict = bench.run(bench.trial(20.0, 10.0));
    assert!(matches!(verdict, Verdict::Stay(_)));
    let first = reason(verdict);
    assert!(
        first.contains(", 0.") && first.contains("1.3 is needed"),
        "{first}"
    );
    bench.loads();
    assert!(reason(bench.run(bench.trial(20.0, 10.0))).contains("1.3 is needed"));
    assert_eq!(bench.loads(), 0, "the verdict is known");
}

#[test]
fn trying_is_stored_until_a_device_is_open_also_after_a_verdict() {
    let bench = Bench::new();
    let folder = bench.folder.path().to_owned();
    for (cuda, cpu, loads) in [(1.0, 20.0, 2), (20.0, 1.0, 0)] {
        let mut trial = bench.trial(cuda, cpu);
        let folder = folder.clone();
        trial.open = Box::new(move |_| {
            let files = fs::read_dir(&folder).unwrap();
            let texts: Vec<_> = files
                .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
                .collect();
            assert!(
                texts.len() == 1 && texts[0].contains("\"trying\""),
                "{texts:?}"
            );
            Ok(0)
        });
        assert!(is_used(&bench.run(trial)));
        assert_eq!(bench.loads(), loads);
        assert!(bench.stored()[0].contains("\"fast\""));
    }
}

#[test]
fn a_device_that_does_not_open_is_refused() {
    let bench = Bench::new();
    bench.run(bench.trial(1.0, 20.0));
    let mut trial = bench.trial(1.0, 20.0);
    trial.open = Box::new(|_| Err(Error::Device("broken".into())));
    assert!(reason(bench.run(trial)).contains("broken"));
    assert!(reason(bench.run(bench.trial(1.0, 20.0))).contains("broken"));
}

#[test]
fn a_late_answer_does_not_replace_the_refusal_of_a_trial_without_an_answer() {
    for known in [false, true] {
        let bench = Bench::new();
        if known {
            bench.run(bench.trial(1.0, 20.0));
        }
        // Closed when the thread of the trial ends.
        let (guard, ended) = mpsc::channel::<()>();
        let mut trial = bench.trial(1.0, 20.0);
        trial.open = Box::new(move |_| {
            let _guard = &guard;
            thread::sleep(ms(1500.0));
            Ok(0)
        });
        let verdict = bench.run_for(trial, ms(1000.0));
        assert!(matches!(verdict, Verdict::Stay(_)), "known: {known}");
        assert_eq!(reason(verdict), "the trial had no result after 1 s");
        assert!(bench.stored()[0].contains("no result after 1 s"));
        let end = ended.recv_timeout(LONG);
        assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected));
        assert_eq!(bench.stored().len(), 1);
        assert!(
            bench.stored()[0].contains("no result after 1 s"),
            "known: {known}"
        );
    }
}

#[test]
fn a_trial_that_is_cancelled_or_withdrawn_leaves_the_verdict_as_it_was() {
    for (withdraws, known) in [(false, false), (false, true), (true, false), (true, true)] {
        let bench = Bench::new();
        if known {
            bench.run(bench.trial(1.0, 20.0));
        }
        let before = bench.stored();
        let mut trial = bench.trial(1.0, 20.0);
        let attempt = trial.attempt.clone();
        let folder = bench.folder.path().to_owned();
        trial.open = Box::new(move |_| {
            if withdraws {
                attempt.withdraw();
                let files = fs::read_dir(&folder).unwrap();
                assert_eq!(files.count(), usize::from(known), "taken back at once");
            } else {
                attempt.cancel();
            }
            Err(Error::Cancelled)
        });
        assert!(matches!(bench.run(trial), Verdict::Undecided(_)));
        assert_eq!(bench.stored(), before);
        assert!(is_used(&bench.run(bench.trial(1.0, 20.0))));
    }
}

#[test]
fn errors_that_do_not_concern_the_device_are_not_stored() {
    let bench = Bench::new();
    for (error, undecided) in [
        (Error::Setting("precision".into()), false),
        (Error::Memory("full".into()), true),
    ] {
        let mut trial = bench.trial(1.0, 20.0);
        let error = Mutex::new(Some(error));
        trial.load = Box::new(move |_| Err(error.lock().unwrap().take().unwrap()));
        let verdict = bench.run(trial);
        assert_eq!(matches!(verdict, Verdict::Undecided(_)), undecided);
        reason(verdict);
        assert_eq!(bench.stored(), Vec::<String>::new());
    }
}

#[test]
fn a_refused_driver_is_not_touched() {
    let bench = Bench::new();
    let trial = bench.trial(1.0, 20.0);
    let folder = bench.folder.path().to_owned();
    let hang = || {
        thread::sleep(ms(300.0));
        Ok(vec![device()])
    };
    let verdict = trial.run_in(folder.clone(), hang, ms(100.0));
    assert!(reason(verdict).contains("no result after 0.1 s"));
    let touch = || panic!("the driver is touched");
    let verdict = bench.trial(1.0, 20.0).run_in(folder, touch, LONG);
    assert_eq!(reason(verdict), "the trial had no result after 0.1 s");
}

#[test]
#[cfg(target_os = "linux")]
fn a_trial_of_another_process_is_waited_for_and_forbids_nothing() {
    let bench = Bench::new();
    let driver = Record::new(bench.folder.path(), "driver", "the driver");
    // The first process of the system is always there.
    let trying = || driver.restore(Some(State::Trying { pid: 1 }));
    trying();
    let verdict = bench.run_for(bench.trial(1.0, 20.0), ms(100.0));
    assert!(matches!(verdict, Verdict::Undecided(_)));
    assert!(reason(verdict).contains("in progress (process 1,"));

    trying();
    let end = {
        let driver = driver.clone();
        thread::spawn(move || {
            thread::sleep(ms(200.0));
            driver.restore(None);
        })
    };
    assert!(is_used(&bench.run(bench.trial(1.0, 20.0))));
    end.join().unwrap();

    // No process has this number.
    driver.restore(Some(State::Trying { pid: u32::MAX }));
    let verdict = bench.run(bench.trial(1.0, 20.0));
    assert!(matches!(verdict, Verdict::Stay(_)));
    assert!(reason(verdict).contains("crashed or hung"));
}
