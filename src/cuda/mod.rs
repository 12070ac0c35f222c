//! The NVIDIA driver, found at run time: what is made on a device and released with its owner, and
//! an emulated device for tests. It knows no network.

pub mod driver;
#[cfg(any(test, feature = "emulator"))]
pub mod emulator;
mod external;
pub(crate) mod owned;

pub use external::ExternalContext;

use driver::Rows;

/// The planes of a frame in the device's memory, in the order of its format.
pub type DevicePlanes<'a> = &'a [Rows];
