//! Devices for inference and training, by name.

use std::{fmt, str::FromStr};

use crate::{Error, Result, cuda::driver};

/// Device for inference or training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The CPU, until a [`crate::trial`] finds a CUDA device that is faster.
    #[default]
    Auto,
    Cpu,
    /// CUDA device by index. Loading a lite model compares test frames on the device with the CPU,
    /// and fails if they differ. ResShift models need the feature `cuda`.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = Error;

    /// Reads `auto`, `cpu`, `cuda` or `cuda:N`.
    fn from_str(s: &str) -> Result<Self> {
        match s.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => Ok(Self::Cuda(index)),
            None if s == "auto" => Ok(Self::Auto),
            None if s == "cpu" => Ok(Self::Cpu),
            None if s == "cuda" => Ok(Self::Cuda(0)),
            _ => Err(Error::Device(format!(
                "'{s}' is not a device: use auto, cpu, cuda or cuda:N"
            ))),
        }
    }
}

impl Device {
    /// Returns the device for candle, which is the CPU for [`Self::Auto`].
    ///
    /// # Errors
    /// [`Error::Device`] for a CUDA device that cannot be used, and for any CUDA device in a build
    /// without the feature `cuda`.
    pub(crate) fn to_candle(self) -> Result<candle_core::Device> {
        let Self::Cuda(ordinal) = self else {
            return Ok(candle_core::Device::Cpu);
        };
        if !cfg!(feature = "cuda") {
            return Err(Error::Device(format!(
                "device '{self}': training and ResShift models need a build with --features cuda \
                 (docs/cuda.md), or the CPU"
            )));
        }
        // Opened only to report errors that are clearer than those of candle.
        driver::open(ordinal)?;
        // One stream for all threads, because work in the default streams of several threads is not
        // ordered.
        candle_core::Device::new_cuda_with_stream(ordinal)
            .map_err(|e| Error::Device(format!("device '{self}' cannot be used: {e}")))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}
