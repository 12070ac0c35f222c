// SPDX-License-Identifier: MPL-2.0

//! Pinned memory, which a CUDA device reads and writes directly, for buffers of other elements.

use std::sync::OnceLock;

use gst::{
    glib::{self, translate::*},
    prelude::*,
    subclass::prelude::*,
};
use tadsr::cuda::{HostAllocator, is_pinned};

glib::wrapper! {
    /// Allocates pinned memory for buffers, or system memory if the device fails.
    pub struct PinnedAllocator(ObjectSubclass<imp::PinnedAllocator>)
        @extends gst::Allocator, gst::Object;
}

impl PinnedAllocator {
    pub fn new(host: HostAllocator) -> Self {
        let allocator: Self = glib::Object::new();
        // The new object has no other.
        let _ = allocator.imp().0.set(host);
        allocator
    }
}

mod imp {
    use super::*;

    #[derive(Default)]
    pub struct PinnedAllocator(pub OnceLock<HostAllocator>);

    #[glib::object_subclass]
    impl ObjectSubclass for PinnedAllocator {
        const NAME: &'static str = "GstTadsrPinnedAllocator";
        type Type = super::PinnedAllocator;
        type ParentType = gst::Allocator;
    }

    impl ObjectImpl for PinnedAllocator {}

    impl GstObjectImpl for PinnedAllocator {}

    // SAFETY: the result is a new memory of this size and alignment.
    unsafe impl AllocatorImpl for PinnedAllocator {
        unsafe fn alloc(
            &self,
            size: usize,
            params: &gst::AllocationParams,
        ) -> *mut gst::ffi::GstMemory {
            let pinned = self.memory(size, params);
            let memory = pinned.unwrap_or_else(|| gst::Memory::with_size_and_params(size, params));
            memory.into_glib_ptr()
        }
    }

    impl PinnedAllocator {
        /// Returns pinned memory, which frees itself.
        fn memory(&self, size: usize, params: &gst::AllocationParams) -> Option<gst::Memory> {
            let around = [params.align(), params.prefix(), params.padding()];
            let len = around.iter().try_fold(size, |sum, n| sum.checked_add(*n))?;
            let host = self.0.get()?.allocate(len).ok()?;
            let start = host.as_ref().as_ptr() as usize;
            // The alignment is a mask.
            let first = (start.wrapping_neg() & params.align()) + params.prefix();
            let mut memory = gst::Memory::from_mut_slice(host);
            memory.get_mut()?.resize(first..first + size);
            Some(memory)
        }
    }
}

/// Adds the allocator to the answer to `query`, unless there is another.
pub(super) fn propose(query: &mut gst::query::Allocation, allocator: &PinnedAllocator) {
    if query.allocation_params().next().is_none() {
        // The alignment that GstVideoFilter proposes.
        let params = gst::AllocationParams::new(gst::MemoryFlags::empty(), 15, 0, 0);
        query.add_allocation_param(Some(allocator.upcast_ref::<gst::Allocator>()), params);
    }
}

/// Chooses the allocator for output buffers, unless downstream offers an allocator or a pool of its
/// own kind.
pub(super) fn decide(query: &mut gst::query::Allocation, allocator: &PinnedAllocator) {
    let plain = [
        gst::BufferPool::static_type(),
        gst_video::VideoBufferPool::static_type(),
    ];
    let mut pools = query.allocation_pools().filter_map(|(pool, ..)| pool);
    if pools.any(|pool| !plain.contains(&pool.type_())) {
        return;
    }
    let allocator = allocator.upcast_ref::<gst::Allocator>();
    let first = query.allocation_params().next();
    match first {
        None => query.add_allocation_param(Some(allocator), Default::default()),
        Some((None, params)) => query.set_nth_allocation_param(0, Some(allocator), params),
        Some((Some(_), _)) => {}
    }
}

/// Replaces a buffer that the device may still write, because it did not complete its work. The
/// memory is never used again.
pub(super) fn abandon(buffer: &mut gst::Buffer) {
    let Ok(map) = buffer.map_readable() else {
        return;
    };
    if !is_pinned(&map) {
        return;
    }
    drop(map);
    let mut other = gst::Buffer::with_size(buffer.size()).expect("the size of a buffer");
    let flags =
        gst::BufferCopyFlags::FLAGS | gst::BufferCopyFlags::TIMESTAMPS | gst::BufferCopyFlags::META;
    // Metas that cannot be copied are lost.
    let _ = buffer.copy_into(other.make_mut(), flags, ..);
    std::mem::forget(std::mem::replace(buffer, other));
}
