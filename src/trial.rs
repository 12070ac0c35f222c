//! The trial of CUDA devices for `device=auto`: whether they compute a model correctly and faster
//! than the CPU.
//!
//! A verdict is stored in the user's cache folder, for one GPU, driver, model and frame size.
//! Before a device is touched, "trying" is stored. If the program crashes or hangs in the trial, no
//! later trial touches the device.

mod record;

use std::{
    env,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

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

/// Time after which a trial counts as hung.
const LIMIT: Duration = Duration::from_secs(60);

/// Loads the model on a device, with the settings of the caller.
pub type Load = dyn Fn(Device) -> Result<Upscaler> + Send + Sync;

/// A trial of CUDA devices with a lite model.
pub struct Trial {
    /// Name of a bundled model or path of a model file.
    pub model: String,
    pub from: FrameInfo,
    pub to: FrameInfo,
    pub load: Box<Load>,
    /// Number of the only device that may be used. `None` allows all.
    pub only: Option<usize>,
    /// Ends the trial early, without a verdict.
    pub cancel: Arc<AtomicBool>,
}

/// Result of a trial.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The device passes.
    Use {
        ordinal: usize,
        reason: String,
        /// Takes a later failure of the device.
        record: Record,
    },
    /// No device passes, for this reason.
    Stay(String),
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

impl Trial {
    /// Tries the devices in the order of their numbers, until one passes. Takes seconds, at most a
    /// minute. Trials of one process run one after the other.
    pub fn run(self) -> Verdict {
        if let Some(reason) = ruled_out() {
            return Verdict::Stay(reason);
        }
        let trying = Arc::new(Mutex::new(None));
        let (sender, receiver) = mpsc::channel();
        let current = trying.clone();
        let spawned = thread::Builder::new()
            .name("tadsr-trial".into())
            .spawn(move || sender.send(self.try_all(&current)));
        if let Err(error) = spawned {
            return Verdict::Stay(format!("no thread for the trial: {error}"));
        }
        match receiver.recv_timeout(LIMIT) {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(error)) => Verdict::Stay(error.to_string()),
            Err(error) => {
                let reason = match error {
                    mpsc::RecvTimeoutError::Timeout => {
                        format!("the trial had no result after {} s", LIMIT.as_secs())
                    }
                    mpsc::RecvTimeoutError::Disconnected => "the trial panicked".into(),
                };
                let record: Option<Record> = lock(&trying).take();
                if let Some(record) = record {
                    record.refuse(&reason);
                }
                Verdict::Stay(reason)
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Runs in a thread that may hang. `trying` is the record of what is being tried.
    fn try_all(&self, trying: &Mutex<Option<Record>>) -> Result<Verdict> {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = lock(&ONE);
        let folder = cache_folder().join("cuda");
        let driver = Record::new(&folder, "driver", "the driver of this machine");
        if let Some(reason) = driver.obstacle() {
            return Ok(Verdict::Stay(reason));
        }
        driver.begin()?;
        *lock(trying) = Some(driver.clone());
        let devices = devices();
        driver.remove();
        *lock(trying) = None;
        let mut reasons = Vec::new();
        let allowed = |device: &DeviceInfo| self.only.is_none_or(|only| device.ordinal == only);
        for device in devices?.iter().filter(|device| allowed(device)) {
            match self.try_device(device, &folder, trying)? {
                Verdict::Stay(reason) => {
                    reasons.push(format!(
                        "cuda:{} ({}): {reason}",
                        device.ordinal, device.name
                    ));
                }
                verdict => return Ok(verdict),
            }
        }
        if reasons.is_empty() {
            reasons.push("there is no CUDA device".into());
        }
        Ok(Verdict::Stay(reasons.join("; ")))
    }

    fn try_device(
        &self,
        device: &DeviceInfo,
        folder: &Path,
        trying: &Mutex<Option<Record>>,
    ) -> Result<Verdict> {
        let key = self.key(device)?;
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
        let ordinal = device.ordinal;
        match record.read() {
            Some(State::Fast { reason }) => {
                return Ok(Verdict::Use {
                    ordinal,
                    reason,
                    record,
                });
            }
            Some(State::Refused { reason }) => return Ok(Verdict::Stay(reason)),
            Some(State::Trying { .. }) | None => {}
        }
        if let Some(reason) = record.obstacle() {
            return Ok(Verdict::Stay(reason));
        }
        if self.is_cancelled() {
            return Ok(Verdict::Stay("the trial was cancelled".into()));
        }
        record.begin()?;
        *lock(trying) = Some(record.clone());
        let times = self.measure(ordinal);
        *lock(trying) = None;
        let [cuda, cpu] = match times {
            Ok(Some(times)) => times.map(|time| time.as_secs_f64() * 1e3),
            Ok(None) => {
                record.remove();
                return Ok(Verdict::Stay("the trial was cancelled".into()));
            }
            // Other programs may free memory.
            Err(error @ Error::Memory(_)) => {
                record.remove();
                return Ok(Verdict::Stay(error.to_string()));
            }
            Err(error) => {
                record.refuse(&error.to_string());
                return Ok(Verdict::Stay(error.to_string()));
            }
        };
        let least = min_speedup();
        let reason = format!("{cuda:.2} ms per frame, {cpu:.2} ms on the CPU");
        if cpu < least * cuda {
            let reason = format!("{reason}: not {least} times as fast");
            record.refuse(&reason);
            return Ok(Verdict::Stay(reason));
        }
        let reason = format!("{}: {reason}", device.name);
        record.accept(&reason);
        Ok(Verdict::Use {
            ordinal,
            reason,
            record,
        })
    }

    /// Returns the times per frame on a CUDA device and on the CPU, copies included; `None` if the
    /// trial is cancelled. Loading on the device checks its results.
    fn measure(&self, ordinal: usize) -> Result<Option<[Duration; 2]>> {
        let mut times = [Duration::ZERO; 2];
        for (time, device) in times.iter_mut().zip([Device::Cuda(ordinal), Device::Cpu]) {
            let mut upscaler = (self.load)(device)?;
            if self.is_cancelled() {
                return Ok(None);
            }
            *time = frame_time(&mut upscaler, self.from, self.to)?;
        }
        Ok(Some(times))
    }

    /// Returns a hash of everything that the verdict depends on.
    fn key(&self, device: &DeviceInfo) -> Result<u32> {
        let mut parts = Vec::new();
        parts.extend(device.uuid);
        parts.extend(device.version.to_le_bytes());
        parts.extend_from_slice(kernels(device.capability));
        for model in LiteModel::find(&self.model)? {
            parts.extend(model.to_bytes(true)?);
        }
        for frame in [self.from, self.to] {
            parts.extend(format!("{frame:?}").bytes());
        }
        parts.extend(min_speedup().to_le_bytes());
        Ok(crc32fast::hash(&parts))
    }
}

fn min_speedup() -> f64 {
    let given = env::var(SPEEDUP).ok().and_then(|text| text.parse().ok());
    given.filter(|ratio| *ratio >= 0.0).unwrap_or(MIN_SPEEDUP)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
