//! The NVIDIA driver, loaded at run time, with owned handles and an emulated device for tests. It
//! is independent of networks.

pub mod driver;
#[cfg(any(test, feature = "emulator"))]
pub mod emulator;
mod external;
mod host_memory;
pub(crate) mod owned;

pub use external::ExternalContext;
pub(crate) use host_memory::pinned_rows;
pub use host_memory::{HostAllocator, HostMemory, is_pinned};

use driver::Rows;

/// Planes of a frame in the device's memory, in the order of its format.
pub type DevicePlanes<'a> = &'a [Rows];
