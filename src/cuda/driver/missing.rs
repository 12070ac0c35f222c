//! Stand-ins for platforms where the driver cannot be loaded. They return [`Error::Device`].

use std::{ffi::c_void, ptr::NonNull, sync::Arc};

use super::interface::{DeviceInfo, Driver};
use crate::{Error, Result};

fn unsupported<T>() -> Result<T> {
    Err(Error::Device(
        "CUDA is not supported on this platform".into(),
    ))
}

pub fn is_installed() -> bool {
    false
}

pub fn probe() -> Result<Vec<DeviceInfo>> {
    unsupported()
}

pub fn open(_ordinal: usize) -> Result<Arc<dyn Driver>> {
    unsupported()
}

/// # Safety
/// None is needed: the arguments are not used.
pub unsafe fn within(
    _ordinal: usize,
    _context: NonNull<c_void>,
    _keep: Box<dyn Send + Sync>,
) -> Result<Arc<dyn Driver>> {
    unsupported()
}
