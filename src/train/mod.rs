//! Training: data, degradation, losses, optimisers, checkpoints, the training loop.
//!
//! A [`Recipe`] holds all that determines a model: data, degradation, teacher, student.
//! [`Recipe::run`] trains the model in a folder and reports to an [`Observer`], which can stop it.
//! A run in a folder with a checkpoint continues exactly from there.
//!
//! ```no_run
//! use tadsr::train::{Recipe, RunOptions, lite::{self, Size}};
//!
//! let mut recipe = lite::Recipe::new("mine-x2", Size::Tiny, 2.0);
//! recipe.data.dirs = vec!["photos".into()];
//! recipe.student.steps = 10_000;
//! let outcome = Recipe::from(recipe).run(&RunOptions::new("runs/mine-x2"), &())?;
//! println!("{outcome:?}: runs/mine-x2/model.safetensors");
//! # Ok::<(), tadsr::Error>(())
//! ```

use crate::{Device, Result, ops};

pub mod adversary;
pub mod checkpoint;
pub mod data;
pub mod degradation;
pub mod eval;
pub mod init;
pub mod lite;
mod log;
pub mod losses;
mod observer;
pub mod optim;
mod patch;
mod random;
pub mod ranks;
mod recipe;
pub mod report;
pub mod resshift;
mod toml_file;
mod trainer;

pub use observer::{Measurement, Observer, Progress, load_photos};
pub use random::step_seed;
pub use recipe::Recipe;
pub use trainer::{
    Outcome, Plan, RunContext, RunOptions, StageEstimate, Training, train, train_with_restarts,
};

/// Opens `device` for training; [`Device::Auto`] is the CPU.
///
/// # Errors
/// [`crate::Error::Device`] when a CUDA device cannot be used, or the feature `cuda` is not built.
pub fn device(device: Device) -> Result<candle_core::Device> {
    let device = device.to_candle()?;
    ops::cuda::keep_memory(&device)?;
    Ok(device)
}

/// Keeps freed memory in the process for the next tensor, instead of returning it to the system.
///
/// Steps of training allocate and free the same megabytes again and again. By default glibc returns
/// large blocks, and every page of the next one is a fault: a fifth of the time of a step of a
/// small network. Call it once at the start of a program. It has an effect with glibc only.
pub fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;
        unsafe extern "C" {
            fn mallopt(param: c_int, value: c_int) -> c_int;
        }
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        // SAFETY: both calls only change when memory is returned. 32 MiB is the maximum of the
        // second. A value that is refused changes nothing.
        unsafe {
            mallopt(M_TRIM_THRESHOLD, c_int::MAX);
            mallopt(M_MMAP_THRESHOLD, 32 << 20);
        }
    }
}
