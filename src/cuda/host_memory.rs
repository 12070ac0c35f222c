//! Pinned memory of the host for frames of an application, which the device reads and writes
//! directly.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use super::{
    driver::{Driver, HostRows},
    owned::Pinned,
};
use crate::Result;

/// Length and driver of the memories in use, by the address of their first byte.
static IN_USE: RwLock<BTreeMap<usize, (usize, DriverId)>> = RwLock::new(BTreeMap::new());

/// Identifies a driver while something holds it.
type DriverId = usize;

fn id(driver: &Arc<dyn Driver>) -> DriverId {
    Arc::as_ptr(driver).cast::<()>() as usize
}

/// Allocates pinned memory for frames of a CUDA device. A frame in it is copied once, straight
/// between the memory and the device; other frames are also copied on the host.
#[derive(Clone)]
pub struct HostAllocator(Arc<dyn Driver>);

impl HostAllocator {
    pub(crate) fn new(driver: &Arc<dyn Driver>) -> Self {
        Self(driver.clone())
    }

    /// Allocates `len` zero bytes, at least one.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) if there is not enough memory, other errors if the
    /// device fails.
    pub fn allocate(&self, len: usize) -> Result<HostMemory> {
        let memory = Pinned::new(&self.0, len.max(1))?;
        let range = (memory.len(), id(&self.0));
        let mut in_use = IN_USE.write().unwrap_or_else(PoisonError::into_inner);
        in_use.insert(memory.as_ptr() as usize, range);
        Ok(HostMemory(memory))
    }
}

impl fmt::Debug for HostAllocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostAllocator").field(&self.0).finish()
    }
}

/// Memory of a [`HostAllocator`]. It may outlive everything else of its device.
pub struct HostMemory(Pinned);

impl Drop for HostMemory {
    fn drop(&mut self) {
        let mut in_use = IN_USE.write().unwrap_or_else(PoisonError::into_inner);
        in_use.remove(&(self.0.as_ptr() as usize));
    }
}

impl AsRef<[u8]> for HostMemory {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl AsMut<[u8]> for HostMemory {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

/// Returns `true` if `data` begins in memory of a [`HostAllocator`].
pub fn is_pinned(data: &[u8]) -> bool {
    let in_use = IN_USE.read().unwrap_or_else(PoisonError::into_inner);
    let start = data.as_ptr() as usize;
    let memory = in_use.range(..=start).next_back();
    memory.is_some_and(|(&first, &(bytes, _))| start - first < bytes)
}

/// Returns the rows of planes, given by address, length, stride, bytes in a row and number of rows,
/// if all are in memory of `driver`.
pub(crate) fn pinned_rows(
    driver: &Arc<dyn Driver>,
    planes: impl Iterator<Item = (*const u8, usize, usize, usize, usize)>,
) -> Option<Vec<HostRows>> {
    let in_use = IN_USE.read().unwrap_or_else(PoisonError::into_inner);
    let rows = planes.map(|(start, len, stride, row, rows)| {
        let start = start as usize;
        let needed = rows.checked_sub(1)?.checked_mul(stride)?.checked_add(row)?;
        let (&first, &(bytes, owner)) = in_use.range(..=start).next_back()?;
        let inside = start - first + needed <= bytes && needed <= len && row <= stride;
        (inside && owner == id(driver)).then_some(HostRows { start, stride })
    });
    rows.collect()
}
