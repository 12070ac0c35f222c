//! The CUDA driver API. Its functions are loaded from the driver's library at first use, so that
//! one binary starts on machines with and without the driver. Neither the build nor the program
//! needs the CUDA toolkit.
//!
//! The functions are bound by hand with `dlopen`. There are about forty of them. cudarc takes long
//! to build, binds all of CUDA, and cannot be built with dynamic loading next to the copy that
//! candle's feature `cuda` links.

#[cfg(unix)]
mod device;
mod fault;
mod interface;
#[cfg(unix)]
mod library;
#[cfg(not(unix))]
mod missing;

#[cfg(unix)]
pub use device::{open, probe, within};
pub use fault::{Fault, HOST_ALLOC, OUT_OF_MEMORY, Result, TIMEOUT};
pub use interface::{
    Address, DeviceInfo, Driver, Event, Function, Graph, HostRows, Launch, Module, Rows, Shape,
    Stream,
};
#[cfg(unix)]
pub use library::is_installed;
#[cfg(not(unix))]
pub use missing::{is_installed, open, probe, within};
