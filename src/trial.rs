//! The trial of CUDA devices for `device=auto`: whether they compute a model correctly and faster
//! than the CPU.
//!
//! A verdict is stored in the user's cache folder, for one GPU, driver, model and frame size.
//! Before a device is touched, "trying" is stored, until the caller has opened it for its frames,
//! also after an earlier verdict. If the program crashes or hangs meanwhile, no later trial touches
//! the device.

mod attempt;
mod record;

use std::{
    env,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, TryLockError, mpsc},
    thread,
    time::{Duration, Instant},
};

pub use attempt::Attempt;
pub use record::Record;
use record::State;

#[cfg(any(test, feature = "emulator"))]
use crate::cuda::emulator;
use crate::{
    Device, Error, Result, Upscaler,
    cache::cache_folder,
    cuda::driver::{self, DeviceInfo},
    engine::lite::cuda::kernels,
    frame::FrameInfo,
    ladder::frame_time,
    model::LiteModel,
};

/// Environment variable that forbids CUDA if it is 0.
const FORBID: &str = "TADSR_CUDA";

/// Environment variable with the least ratio of the times per frame, CPU to CUDA.
const SPEEDUP: &str = "TADSR_CUDA_SPEEDUP";

/// Default of [`SPEEDUP`].
const MIN_SPEEDUP: f64 = 1.3;

/// Environment variable with the time in seconds after which a trial counts as hung.
const LIMIT: &str = "TADSR_CUDA_LIMIT";

/// Default of [`LIMIT`].
const MAX_SECONDS: f64 = 60.0;

/// Time between two looks at another trial.
const NAP: Duration = Duration::from_millis(10);

/// Loads something on a device, with the settings of the caller.
pub type Load<T> = dyn Fn(Device) -> Result<T> + Send + Sync;

/// A trial of CUDA devices with a lite model.
pub struct Trial<T> {
    /// Name of a bundled model or path of a model file.
    pub model: String,
    pub from: FrameInfo,
    pub to: FrameInfo,
    /// Loads the model, to check and time it.
    pub load: Box<Load<Upscaler>>,
    /// Opens a device that passes, for the caller's frames.
    pub open: Box<Load<T>>,
    /// Number of the only device that may be used. `None` allows all.
    pub only: Option<usize>,
    pub attempt: Attempt,
}

/// Result of a trial.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict<T> {
    /// The device passes.
    Use {
        ordinal: usize,
        reason: String,
        /// Takes a later failure of the device.
        record: Record,
        /// Result of [`Trial::open`].
        opened: T,
    },
    /// No device passes, for this reason.
    Stay(String),
    /// For this reason there is no verdict. A later trial may have one.
    Undecided(String),
}

/// Returns a reason why there is nothing to try. Does not touch a device.
pub fn ruled_out() -> Option<String> {
    if env::var_os(FORBID).is_some_and(|value| value == "0") {
        return Some(format!("{FORBID}=0 forbids CUDA"));
    }
    #[cfg(any(test, feature = "emulator"))]
    if !emulator::all().is_empty() {
        return None;
    }
    (!driver::is_installed()).then(|| "there is no NVIDIA driver".into())
}

impl<T: Send + 'static> Trial<T> {
    /// Tries the devices in the order of their numbers, until one passes. Takes seconds. A trial
    /// without a result after a minute counts as hung. Trials of one process run one after the
    /// other.
    pub fn run(self) -> Verdict<T> {
        match ruled_out() {
            Some(reason) => Verdict::Stay(reason),
            None => self.run_in(cache_folder().join("cuda"), devices, limit()),
        }
    }

    /// As [`Self::run`], with the records in `folder`, for the devices that `devices` returns.
    fn run_in(
        self,
        folder: PathBuf,
        devices: impl FnOnce() -> Result<Vec<DeviceInfo>> + Send + 'static,
        limit: Duration,
    ) -> Verdict<T> {
        let attempt = self.attempt.clone();
        let Some(_turn) = turn(&attempt) else {
            return cancelled();
        };
        let (sender, receiver) = mpsc::channel();
        let spawned = thread::Builder::new()
            .name("tadsr-trial".into())
            .spawn(move || sender.send(self.try_all(&folder, devices, limit / 2)));
        if let Err(error) = spawned {
            return Verdict::Undecided(format!("no thread for the trial: {error}"));
        }
        match receiver.recv_timeout(limit) {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(Error::Cancelled)) => cancelled(),
            Ok(Err(error)) => Verdict::Stay(error.to_string()),
            Err(error) => {
                let reason = match error {
                    mpsc::RecvTimeoutError::Timeout => {
                        format!("the trial had no result after {} s", limit.as_secs_f32())
                    }
                    mpsc::RecvTimeoutError::Disconnected => "the trial panicked".into(),
                };
                if attempt.refuse(&reason) {
                    Verdict::Stay(reason)
                } else {
                    Verdict::Undecided(reason)
                }
            }
        }
    }

    /// Runs in a thread that may hang. Waits at most `patience` for trials of other processes.
    fn try_all(
        &self,
        folder: &Path,
        devices: impl FnOnce() -> Result<Vec<DeviceInfo>>,
        patience: Duration,
    ) -> Result<Verdict<T>> {
        let deadline = Instant::now() + patience;
        let driver = Record::new(folder, "driver", "the driver of this machine");
        if let Some(verdict) = self.stored(&driver, deadline).err() {
            return Ok(verdict);
        }
        self.attempt.begin(&driver)?;
        let devices = devices();
        self.attempt.end(|record, _| record.restore(None))?;
        let mut reasons = Vec::new();
        let mut undecided = false;
        let allowed = |device: &DeviceInfo| self.only.is_none_or(|only| device.ordinal == only);
        for device in devices?.iter().filter(|device| allowed(device)) {
            let reason = match self.try_device(device, folder, deadline)? {
                Verdict::Stay(reason) => reason,
                Verdict::Undecided(reason) => {
                    undecided = true;
                    reason
                }
                verdict @ Verdict::Use { .. } => return Ok(verdict),
            };
            let name = &device.name;
            reasons.push(format!("cuda:{} ({name}): {reason}", device.ordinal));
        }
        if reasons.is_empty() {
            reasons.push("there is no CUDA device".into());
        }
        let reason = reasons.join("; ");
        Ok(if undecided {
            Verdict::Undecided(reason)
        } else {
            Verdict::Stay(reason)
        })
    }

    /// Returns the stored reason to use a device, if there is a verdict. Waits until `deadline` for
    /// trials of other processes.
    ///
    /// # Errors
    /// A verdict that forbids a trial.
    fn stored(&self, record: &Record, deadline: Instant) -> Result<Option<String>, Verdict<T>> {
        let mut state = record.read();
        while state.as_ref().is_some_and(State::in_progress)
            && Instant::now() < deadline
            && self.attempt.check().is_ok()
        {
            thread::sleep(NAP);
            state = record.read();
        }
        let in_progress = state.as_ref().is_some_and(State::in_progress);
        match state {
            Some(State::Refused { reason }) => Err(Verdict::Stay(reason)),
            Some(State::Trying { pid }) if in_progress => {
                Err(Verdict::Undecided(record.obstacle(pid)))
            }
            Some(State::Trying { pid }) => Err(Verdict::Stay(record.obstacle(pid))),
            Some(State::Fast { reason }) => Ok(Some(reason)),
            None => Ok(None),
        }
    }

    fn try_device(
        &self,
        device: &DeviceInfo,
        folder: &Path,
        deadline: Instant,
    ) -> Result<Verdict<T>> {
        let models = LiteModel::find(&self.model)?;
        let models = models.iter().map(|model| model.to_bytes(true));
        let key = key(
            device,
            kernels(device.capability),
            &models.collect::<Result<Vec<_>>>()?,
            [self.from, self.to],
            min_speedup(),
        );
        let what = format!(
            "{}, driver {}, model {}, {}x{} to {}x{}",
            device.name,
            device.version,
            self.model,
            self.from.width,
            self.from.height,
            self.to.width,
            self.to.height
        );
        let record = Record::new(folder, &format!("{key:08x}"), &what);
        let known = match self.stored(&record, deadline) {
            Ok(known) => known,
            Err(verdict) => return Ok(verdict),
        };
        self.attempt.begin(&record)?;
        match self.pass(device, known) {
            Ok(Ok((reason, opened))) => {
                self.attempt.end(|record, _| record.accept(&reason))?;
                Ok(Verdict::Use {
                    ordinal: device.ordinal,
                    reason,
                    record,
                    opened,
                })
            }
            Ok(Err(reason)) => self.refuse(reason),
            Err(error @ (Error::Device(_) | Error::DeviceLost(_))) => {
                self.refuse(error.to_string())
            }
            // Nothing is known about the device then.
            Err(error) => {
                self.attempt.end(Record::restore)?;
                match error {
                    Error::Cancelled => Err(error),
                    // Other programs may free memory.
                    Error::Memory(_) => Ok(Verdict::Undecided(error.to_string())),
                    _ => Ok(Verdict::Stay(error.to_string())),
                }
            }
        }
    }

    fn refuse(&self, reason: String) -> Result<Verdict<T>> {
        self.attempt.end(|record, _| record.refuse(&reason))?;
        Ok(Verdict::Stay(reason))
    }

    /// Opens a device if it is fast, and returns the reason, which may be known, or why it is not
    /// used.
    fn pass(
        &self,
        device: &DeviceInfo,
        known: Option<String>,
    ) -> Result<Result<(String, T), String>> {
        let reason = match known {
            Some(reason) => reason,
            None => {
                let [cuda, cpu] = self.measure(device.ordinal)?;
                match compare(cuda, cpu, min_speedup()) {
                    Ok(reason) => format!("{}: {reason}", device.name),
                    Err(reason) => return Ok(Err(reason)),
                }
            }
        };
        self.attempt.check()?;
        let opened = (self.open)(Device::Cuda(device.ordinal))?;
        Ok(Ok((reason, opened)))
    }

    /// Returns the times per frame on a CUDA device and on the CPU, copies included. Loading on the
    /// device checks its results.
    fn measure(&self, ordinal: usize) -> Result<[Duration; 2]> {
        let mut times = [Duration::ZERO; 2];
        for (time, device) in times.iter_mut().zip([Device::Cuda(ordinal), Device::Cpu]) {
            let mut upscaler = (self.load)(device)?;
            self.attempt.check()?;
            *time = frame_time(&mut upscaler, self.from, self.to)?;
        }
        Ok(times)
    }
}

/// Waits for the turn of a trial; `None` if it is cancelled.
fn turn(attempt: &Attempt) -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    loop {
        attempt.check().ok()?;
        match ONE.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(error)) => return Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => thread::sleep(NAP),
        }
    }
}

fn cancelled<T>() -> Verdict<T> {
    Verdict::Undecided("the trial was cancelled".into())
}

/// Returns the reason to use a device with the time `cuda` per frame, which must be `least` times
/// as fast as the CPU.
///
/// # Errors
/// The reason not to use it.
fn compare(cuda: Duration, cpu: Duration, least: f64) -> Result<String, String> {
    let [cuda, cpu] = [cuda, cpu].map(|time| time.as_secs_f64() * 1e3);
    // Both may be 0.
    let ratio = if cpu == cuda { 1.0 } else { cpu / cuda };
    let reason =
        format!("{cuda:.2} ms per frame, {cpu:.2} ms on the CPU, {ratio:.2} times as fast");
    if ratio >= least {
        Ok(reason)
    } else {
        Err(format!("{reason}: at least {least} is needed"))
    }
}

/// Returns a hash of everything that a verdict depends on.
fn key(
    device: &DeviceInfo,
    kernels: &[u8],
    models: &[Vec<u8>],
    frames: [FrameInfo; 2],
    least: f64,
) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&device.uuid);
    hash.update(&device.version.to_le_bytes());
    hash.update(kernels);
    models.iter().for_each(|model| hash.update(model));
    hash.update(format!("{frames:?}").as_bytes());
    hash.update(&least.to_le_bytes());
    hash.finalize()
}

fn min_speedup() -> f64 {
    number(SPEEDUP).unwrap_or(MIN_SPEEDUP)
}

/// Returns the time after which a trial counts as hung.
fn limit() -> Duration {
    let given = number(LIMIT).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    given.unwrap_or(Duration::from_secs_f64(MAX_SECONDS))
}

/// Returns the number in an environment variable; `None` if it is negative.
fn number(name: &str) -> Option<f64> {
    let given = env::var(name).ok().and_then(|text| text.parse().ok());
    given.filter(|number| *number >= 0.0)
}

/// Returns the devices of this machine.
fn devices() -> Result<Vec<DeviceInfo>> {
    #[cfg(any(test, feature = "emulator"))]
    {
        let emulated = emulator::all();
        if !emulated.is_empty() {
            return Ok(emulated);
        }
    }
    driver::probe()
}

#[cfg(test)]
mod tests;
