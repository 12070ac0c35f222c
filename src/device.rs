//! Where inference runs.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// The device that inference runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The CPU, for now: [`crate::engine::cuda`] has not run on a GPU yet, let alone been measured.
    #[default]
    Auto,
    Cpu,
    /// A CUDA device by its index, for students. It has to compute a small frame as the CPU does before it is used.
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
