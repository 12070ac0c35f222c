// SPDX-License-Identifier: MPL-2.0

//! Frames in the memory of CUDA devices, as NVIDIA's decoders and encoders have them.
//!
//! GstCuda is found at run time, so that one plugin runs with and without it. Of its interface only what has been the
//! same since GStreamer 1.22 is used, and what 1.24 added where it is there.

#[cfg(unix)]
use std::{ffi::CStr, mem};
use std::{
    ffi::{c_int, c_void},
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicPtr, Ordering},
    },
};

use gst::{
    ffi::{GstBufferPool, GstContext, GstElement, GstMapInfo, GstMemory, GstObject, GstQuery},
    glib::{ffi::gboolean, translate::*},
    prelude::*,
};
use gst_video::VideoInfo;
use tadsr::{
    Error,
    cuda::driver::{Address, Rows},
    engine::lite::cuda::Context as Device,
    frame::FrameInfo,
};

use super::planes::Layout;

/// The caps feature of such frames.
pub(super) const FEATURE: &str = "memory:CUDAMemory";

/// The formats of such frames that GstCuda and this element both have.
pub(super) const FORMATS: [gst_video::VideoFormat; 10] = [
    gst_video::VideoFormat::Nv12,
    gst_video::VideoFormat::I420,
    gst_video::VideoFormat::Yv12,
    gst_video::VideoFormat::Y444,
    gst_video::VideoFormat::P01010le,
    gst_video::VideoFormat::I42010le,
    gst_video::VideoFormat::Rgba,
    gst_video::VideoFormat::Bgra,
    gst_video::VideoFormat::Rgbx,
    gst_video::VideoFormat::Bgrx,
];

/// `GST_MAP_CUDA`: a mapping gives an address of the device.
const MAP_CUDA: u32 = 1 << 17;

/// Whether `features` are those of frames in a CUDA device's memory.
pub(super) fn is_feature(features: &gst::CapsFeaturesRef) -> bool {
    features.contains(FEATURE)
}

type Storage = *mut *mut GstObject;

type Sync = unsafe extern "C" fn(*mut GstMemory);

/// Declares the table of functions and how it is filled. A `GstCudaContext` is a [`GstObject`].
macro_rules! library {
    ($($field:ident = $symbol:literal: ($($arg:ty),*) $(-> $result:ty)?;)*) => {
        struct Library {
            $($field: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*
            /// Waits for what has been put into a memory's stream; since 1.24, before which producers wait themselves.
            sync: Option<Sync>,
        }

        impl Library {
            /// With the functions that `find` finds.
            #[cfg(unix)]
            fn new(find: impl Fn(&CStr) -> Option<*mut c_void>) -> Option<Self> {
                Some(Self {
                    $($field: {
                        let symbol = find($symbol)?;
                        // SAFETY: the function of this name has this signature (gst/cuda of GStreamer 1.22 to 1.26).
                        unsafe {
                            mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $result)?>(symbol)
                        }
                    },)*
                    // SAFETY: as above.
                    sync: find(c"gst_cuda_memory_sync")
                        .map(|symbol| unsafe { mem::transmute::<*mut c_void, Sync>(symbol) }),
                })
            }
        }
    };
}

library! {
    load = c"gst_cuda_load_library": () -> gboolean;
    init_memory = c"gst_cuda_memory_init_once": ();
    ensure = c"gst_cuda_ensure_element_context": (*mut GstElement, c_int, Storage) -> gboolean;
    set_context = c"gst_cuda_handle_set_context": (*mut GstElement, *mut GstContext, c_int, Storage) -> gboolean;
    answer = c"gst_cuda_handle_context_query": (*mut GstElement, *mut GstQuery, *mut GstObject) -> gboolean;
    handle = c"gst_cuda_context_get_handle": (*mut GstObject) -> *mut c_void;
    pool = c"gst_cuda_buffer_pool_new": (*mut GstObject) -> *mut GstBufferPool;
    is_memory = c"gst_is_cuda_memory": (*mut GstMemory) -> gboolean;
}

/// The beginning of a `GstCudaMemory`.
#[repr(C)]
struct CudaMemory {
    memory: GstMemory,
    context: *mut GstObject,
}

/// GstCuda, where it and the driver are there.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY.get_or_init(load).as_ref()
}

#[cfg(not(unix))]
fn load() -> Option<Library> {
    None
}

#[cfg(unix)]
fn load() -> Option<Library> {
    // SAFETY: GStreamer's libraries may be loaded at any time; this one is never closed.
    let library = unsafe {
        let name = c"libgstcuda-1.0.so.0".as_ptr();
        libc::dlopen(name, libc::RTLD_NOW | libc::RTLD_LOCAL)
    };
    let library = NonNull::new(library)?;
    let find = |name: &CStr| {
        // SAFETY: the library stays open, the name is a C string.
        let symbol = unsafe { libc::dlsym(library.as_ptr(), name.as_ptr()) };
        NonNull::new(symbol).map(NonNull::as_ptr)
    };
    let found = Library::new(find)?;
    // SAFETY: they may be called at any time; the first loads the driver, which the second takes for granted.
    unsafe {
        if (found.load)() == 0 {
            return None;
        }
        (found.init_memory)();
    }
    Some(found)
}

/// An element's part in the agreement of a pipeline on one CUDA context.
#[derive(Default)]
pub(super) struct Slot {
    /// Where GstCuda puts the context that it finds.
    found: AtomicPtr<GstObject>,
    context: Mutex<Option<Context>>,
}

impl Slot {
    /// Takes note of what the application or another element offers, if it is for device number `ordinal`.
    pub fn offer(&self, element: &gst::Element, offered: &gst::Context, ordinal: usize) {
        let (Some(library), Ok(ordinal)) = (library(), c_int::try_from(ordinal)) else {
            return;
        };
        // One that is in use stays.
        if self.lock().is_some() {
            return;
        }
        let mut object = ptr::null_mut();
        // SAFETY: the pointers are to objects that live, and to a place for a reference.
        unsafe {
            let (element, context) = (element.to_glib_none(), offered.to_glib_none());
            (library.set_context)(element.0, context.0, ordinal, &mut object);
        }
        if !object.is_null() {
            self.keep(object);
        }
    }

    /// Agrees with the pipeline on a context of device number `ordinal`, a new one if there is none. Leaves the slot empty
    /// where there is no GstCuda, no driver or no such device.
    pub fn start(&self, element: &gst::Element, ordinal: usize) {
        let (Some(library), Ok(id)) = (library(), c_int::try_from(ordinal)) else {
            return;
        };
        if let Some(given) = element.context("gst.cuda.context") {
            self.offer(element, &given, ordinal);
        }
        // What was found may be for another device, asked for before.
        for _ in 0..2 {
            // SAFETY: as above.
            unsafe { (library.ensure)(element.to_glib_none().0, id, self.found.as_ptr()) };
            if let Some(object) = self.keep(ptr::null_mut())
                && object.property::<u32>("cuda-device-id") as usize == ordinal
            {
                *self.lock() = Some(Context {
                    library,
                    object,
                    ordinal,
                });
                return;
            }
        }
    }

    pub fn stop(&self) {
        let context = self.lock().take();
        drop((context, self.keep(ptr::null_mut())));
    }

    /// Puts `object`, a reference of ours or null, where GstCuda looks, and returns what was there.
    fn keep(&self, object: *mut GstObject) -> Option<gst::Object> {
        // SAFETY: what is there is a reference of ours, or null.
        unsafe { from_glib_full(self.found.swap(object, Ordering::AcqRel)) }
    }

    pub fn get(&self) -> Option<Context> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Context>> {
        self.context.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A `GstCudaContext`.
#[derive(Clone)]
pub(super) struct Context {
    library: &'static Library,
    object: gst::Object,
    /// The number of its device.
    ordinal: usize,
}

impl Context {
    /// Device number `ordinal` in this context.
    ///
    /// # Errors
    /// As [`Device::within`], and when the context is of another device.
    pub fn device(&self, ordinal: usize) -> tadsr::Result<Arc<Device>> {
        if ordinal != self.ordinal {
            return Err(Error::Device(format!(
                "device 'cuda:{ordinal}' is used from the next start on: the pipeline is on 'cuda:{}'",
                self.ordinal
            )));
        }
        // SAFETY: the object is a GstCudaContext.
        let handle = unsafe { (self.library.handle)(self.as_ptr()) };
        let handle = NonNull::new(handle)
            .ok_or_else(|| Error::Device("GstCuda's context has no handle".into()))?;
        // SAFETY: the context is of that device, and lives as long as the object.
        unsafe { Device::within(ordinal, handle, Box::new(self.object.clone())) }
    }

    /// A pool of frames in this context's memory.
    pub fn pool(&self) -> Option<gst::BufferPool> {
        // SAFETY: the object is a GstCudaContext; the reference is the caller's.
        unsafe { from_glib_full((self.library.pool)(self.as_ptr())) }
    }

    /// Answers a query for the context; whether it was one.
    pub fn answer(&self, element: &gst::Element, query: &mut gst::QueryRef) -> bool {
        // SAFETY: all three live.
        unsafe {
            let element = element.to_glib_none();
            (self.library.answer)(element.0, query.as_mut_ptr(), self.as_ptr()) != 0
        }
    }

    /// The frame `frame` of `info` that `buffer` holds in this context's memory, to be read.
    ///
    /// # Errors
    /// Says what is wrong with the buffer. `None` when its memory is another.
    pub fn read<'a>(
        &self,
        buffer: &'a gst::BufferRef,
        info: &VideoInfo,
        frame: &FrameInfo,
    ) -> Result<Option<Mapped<'a>>, String> {
        // SAFETY: a buffer's memory may be mapped for reading.
        unsafe { self.map(buffer, info, frame, gst::ffi::GST_MAP_READ) }
    }

    /// As [`Self::read`], to be written.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write<'a>(
        &self,
        buffer: &'a mut gst::BufferRef,
        info: &VideoInfo,
        frame: &FrameInfo,
    ) -> Result<Option<Mapped<'a>>, String> {
        // SAFETY: the buffer is nobody else's.
        unsafe { self.map(buffer, info, frame, gst::ffi::GST_MAP_WRITE) }
    }

    /// # Safety
    /// To write, the buffer must be nobody else's.
    unsafe fn map<'a>(
        &self,
        buffer: &'a gst::BufferRef,
        info: &VideoInfo,
        frame: &FrameInfo,
        flags: u32,
    ) -> Result<Option<Mapped<'a>>, String> {
        if buffer.n_memory() != 1 {
            return Ok(None);
        }
        // SAFETY: the memory is there, and as long as the buffer; a GstCudaMemory begins as CudaMemory does.
        let mut mapped = unsafe {
            let memory = gst::ffi::gst_buffer_peek_memory(buffer.as_mut_ptr(), 0);
            if (self.library.is_memory)(memory) == 0
                || (*memory.cast::<CudaMemory>()).context != self.as_ptr()
            {
                return Ok(None);
            }
            let mut map = std::mem::zeroed::<GstMapInfo>();
            if gst::ffi::gst_memory_map(memory, &mut map, flags | MAP_CUDA) == 0 {
                return Err("the buffer's CUDA memory cannot be mapped".into());
            }
            // Mapping may have begun a copy.
            if let Some(sync) = self.library.sync {
                sync(memory);
            }
            Mapped {
                map,
                planes: Vec::new(),
                _buffer: buffer,
            }
        };
        let start = mapped.map.data as u64;
        let layout = Layout::of(buffer, info)?;
        let planes = layout.within(frame, mapped.map.size)?;
        mapped.planes = planes
            .iter()
            .map(|&(offset, stride)| Rows {
                address: Address(start + offset as u64),
                stride,
            })
            .collect();
        Ok(Some(mapped))
    }

    fn as_ptr(&self) -> *mut GstObject {
        self.object.as_ptr()
    }
}

/// A buffer's memory, mapped for the device.
pub(super) struct Mapped<'a> {
    map: GstMapInfo,
    planes: Vec<Rows>,
    _buffer: &'a gst::BufferRef,
}

impl Mapped<'_> {
    pub fn planes(&self) -> &[Rows] {
        &self.planes
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        // SAFETY: mapped once, of a memory that its buffer keeps.
        unsafe { gst::ffi::gst_memory_unmap(self.map.memory, &mut self.map) };
    }
}
