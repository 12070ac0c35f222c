//! Training: data, degradation, pairs, optimiser, checkpoints, loops.

use crate::{Device, Result, ops};

pub mod adversary;
pub mod checkpoint;
pub mod data;
pub mod degradation;
pub mod eval;
pub mod init;
pub mod lite;
pub mod losses;
pub mod optim;
mod patch;
mod random;
pub mod recipe;
pub mod report;
pub mod resshift;

pub use random::step_seed;

/// The device that `device` names, for training: the CPU for [`Device::Auto`].
///
/// # Errors
/// [`crate::Error::Device`] when a CUDA device is asked for and cannot be used, or this was built without the feature `cuda`.
pub fn device(device: Device) -> Result<candle_core::Device> {
    let device = device.to_candle()?;
    ops::cuda::keep_memory(&device)?;
    Ok(device)
}

/// Lets freed memory stay with the process, for the next tensor, instead of going back to the system.
///
/// Steps of training allocate and free the same megabytes over and over. By default glibc gives each large block back,
/// and every page of the next one is a fault: a fifth of a step of a small network. Call it once, at the start of a
/// program that trains; elsewhere than with glibc it does nothing.
pub fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        unsafe extern "C" {
            fn mallopt(param: c_int, value: c_int) -> c_int;
        }
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        // SAFETY: both only change when memory is returned. 32 MiB is the most that the second takes; a value that is
        // refused changes nothing.
        unsafe {
            mallopt(M_TRIM_THRESHOLD, c_int::MAX);
            mallopt(M_MMAP_THRESHOLD, 32 << 20);
        }
    }
}
