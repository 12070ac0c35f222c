//! Errors of the driver.

use crate::Error;

/// `CUDA_ERROR_OUT_OF_MEMORY`
pub const OUT_OF_MEMORY: i32 = 2;

/// `CUDA_ERROR_LAUNCH_TIMEOUT`
pub const TIMEOUT: i32 = 702;

/// The call that allocates pinned memory.
pub const HOST_ALLOC: &str = "cuMemHostAlloc";

pub type Result<T, E = Fault> = std::result::Result<T, E>;

/// A failed call of the driver.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{call}: {text} (CUDA error {code})")]
pub struct Fault {
    pub call: &'static str,
    /// `CUresult`
    pub code: i32,
    pub text: String,
}

impl Fault {
    /// Returns `true` if memory was too small. A smaller plan may fit.
    pub fn out_of_memory(&self) -> bool {
        self.code == OUT_OF_MEMORY
    }

    /// Returns `true` for machine code of another chip: `CUDA_ERROR_INVALID_IMAGE` or
    /// `CUDA_ERROR_NO_BINARY_FOR_GPU`.
    pub fn wrong_chip(&self) -> bool {
        matches!(self.code, 200 | 209)
    }

    /// Returns `true` if the call allocates pinned memory of the host.
    pub fn in_host_memory(&self) -> bool {
        self.call == HOST_ALLOC
    }

    /// Returns `true` if the device or the process's state on it is lost, so that every further
    /// call fails: deinitialised, unavailable, memory errors, illegal address or instruction,
    /// time-out, failed launch, unknown.
    pub fn lost(&self) -> bool {
        matches!(
            self.code,
            4 | 46 | 201 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 999
        )
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        if fault.out_of_memory() && fault.in_host_memory() {
            Self::Memory(format!(
                "not enough host memory that can be pinned for copies: {fault}"
            ))
        } else if fault.out_of_memory() {
            Self::Memory(format!("not enough CUDA memory: {fault}"))
        } else if fault.lost() {
            Self::DeviceLost(format!("the CUDA device was lost: {fault}"))
        } else {
            Self::Device(format!("the CUDA device failed: {fault}"))
        }
    }
}
