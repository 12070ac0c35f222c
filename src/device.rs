//! Where inference runs.

use std::{fmt, str::FromStr};

use crate::{Error, Result, cuda::driver};

/// The device that inference runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The CPU, for now: [`crate::engine::lite::cuda`] has not run on a GPU yet, let alone been
    /// measured.
    #[default]
    Auto,
    Cpu,
    /// A CUDA device by its index. It has to compute a small frame as the CPU does before a student runs there; published
    /// models run there where this was built with the feature `cuda`.
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

impl Device {
    /// The same as candle has it, the CPU for [`Self::Auto`].
    ///
    /// # Errors
    /// [`Error::Device`] when a CUDA device is asked for and cannot be used, or this was built without the feature `cuda`.
    pub(crate) fn to_candle(self) -> Result<candle_core::Device> {
        let Self::Cuda(ordinal) = self else {
            return Ok(candle_core::Device::Cpu);
        };
        if !cfg!(feature = "cuda") {
            return Err(Error::Device(format!(
                "device '{self}': training and ResShift models need a build with --features cuda there \
                 (docs/cuda.md); use the CPU"
            )));
        }
        // That says more clearly what is missing.
        driver::open(ordinal)?;
        // With a stream of its own, whichever thread uses it: tensors of the default streams of several threads have no order.
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
