//! Handles of a device that are released when they are dropped.

use std::{ops::Deref, ptr::NonNull, sync::Arc};

use super::driver::{Address, Driver, Event, Graph, Module, Result, Stream};

/// A handle with the function that releases it.
pub struct Owned<T: Copy> {
    driver: Arc<dyn Driver>,
    handle: T,
    release: fn(&dyn Driver, T),
}

/// Memory of the device.
pub type Memory = Owned<Address>;

impl<T: Copy> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.handle
    }
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        (self.release)(&*self.driver, self.handle);
    }
}

impl<T: Copy> Owned<T> {
    fn new(driver: &Arc<dyn Driver>, handle: T, release: fn(&dyn Driver, T)) -> Self {
        Self {
            driver: driver.clone(),
            handle,
            release,
        }
    }
}

impl Memory {
    pub fn memory(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        Ok(Self::new(driver, driver.alloc(bytes)?, |driver, handle| {
            driver.free(handle)
        }))
    }
}

impl Owned<Stream> {
    pub fn stream(driver: &Arc<dyn Driver>) -> Result<Self> {
        Ok(Self::new(driver, driver.stream()?, |driver, handle| {
            driver.destroy_stream(handle)
        }))
    }
}

impl Owned<Event> {
    pub fn event(driver: &Arc<dyn Driver>) -> Result<Self> {
        Ok(Self::new(driver, driver.event()?, |driver, handle| {
            driver.destroy_event(handle)
        }))
    }
}

impl Owned<Graph> {
    pub fn graph(driver: &Arc<dyn Driver>, graph: Graph) -> Self {
        Self::new(driver, graph, |driver, handle| driver.destroy_graph(handle))
    }
}

impl Owned<Module> {
    pub fn module(driver: &Arc<dyn Driver>, image: &[u8]) -> Result<Self> {
        Ok(Self::new(driver, driver.load(image)?, |driver, handle| {
            driver.unload(handle)
        }))
    }
}

/// Pinned memory of the host, which the device accesses directly.
pub struct Pinned {
    driver: Arc<dyn Driver>,
    memory: NonNull<u8>,
    len: usize,
}

// SAFETY: this value owns the memory.
unsafe impl Send for Pinned {}
// SAFETY: as above. It is written through `&mut self`, or by the device while its owner does not
// use it.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates `len` zero bytes.
    pub fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let memory = driver.alloc_pinned(len)?;
        // SAFETY: allocated with this length.
        unsafe { memory.write_bytes(0, len) };
        Ok(Self {
            driver: driver.clone(),
            memory,
            len,
        })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Returns the bytes. No copy of the device may be writing them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and initialised with this length.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }

    /// Returns the bytes. No copy of the device may be reading or writing them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the memory is of this driver, and its owner has waited for all copies.
        unsafe { self.driver.free_pinned(self.memory) };
    }
}
