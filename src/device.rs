//! Where inference runs.

use std::{fmt, str::FromStr};

use crate::{Error, Result, engine::cuda::Context};

/// The device that inference runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The best that is there.
    #[default]
    Auto,
    Cpu,
    /// A CUDA device by its index.
    Cuda(usize),
}

impl Device {
    /// The device that will really run.
    ///
    /// # Errors
    /// [`Error::Device`] when a CUDA device is asked for, with what keeps it from being used. [`crate::engine::cuda`] has
    /// not run on a GPU yet, so that even a device that is there is left alone.
    pub fn resolve(self) -> Result<Self> {
        match self {
            Self::Auto | Self::Cpu => Ok(Self::Cpu),
            Self::Cuda(index) => {
                let context = Context::open(index)?;
                Err(Error::Device(format!(
                    "device '{self}' ({}) is there, but inference on CUDA has not been proven on a GPU yet; \
                     use device=cpu or device=auto",
                    context.driver().info().name
                )))
            }
        }
    }
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
                "'{s}' is no device: use auto, cpu, cuda or cuda:N"
            ))),
        }
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
