//! CUDA contexts of other libraries.

use std::{ffi::c_void, ptr::NonNull, sync::Arc};

use super::driver::{self, Driver};
use crate::Result;

/// A `CUcontext` of another library, such as GstCuda. Frames in its memory can be upscaled without
/// a copy to the host.
pub struct ExternalContext {
    ordinal: usize,
    handle: NonNull<c_void>,
    owner: Box<dyn Send + Sync>,
}

impl ExternalContext {
    /// Wraps the context `handle` of the device `ordinal`. `owner` is dropped when the context is
    /// no longer used.
    ///
    /// # Safety
    /// `handle` is a context of that device and lives as long as `owner`.
    pub unsafe fn new(
        ordinal: usize,
        handle: NonNull<c_void>,
        owner: Box<dyn Send + Sync>,
    ) -> Self {
        Self {
            ordinal,
            handle,
            owner,
        }
    }

    /// Returns the number of the device.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Returns the address of the context, which identifies it.
    pub(crate) fn address(&self) -> usize {
        self.handle.as_ptr() as usize
    }

    /// Opens the device in this context.
    ///
    /// # Errors
    /// As [`driver::open`].
    pub(crate) fn driver(self) -> Result<Arc<dyn Driver>> {
        // SAFETY: as the caller of `new` promised.
        unsafe { driver::within(self.ordinal, self.handle, self.owner) }
    }
}
