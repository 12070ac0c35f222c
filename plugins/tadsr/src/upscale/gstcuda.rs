// SPDX-License-Identifier: MPL-2.0

//! Frames in CUDA memory, as NVIDIA's decoders and encoders use it.
//!
//! GstCuda is loaded at run time, so that the plugin also works without it. Only functions that
//! have not changed since GStreamer 1.22 are used, and `gst_cuda_memory_sync` of 1.24 if it exists.

#[cfg(unix)]
use std::{ffi::CStr, mem};
use std::{
    ffi::{c_int, c_void},
    ptr::{self, NonNull},
    sync::{
        Mutex, OnceLock,
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
    cuda::{
        ExternalContext,
        driver::{Address, Rows},
    },
    frame::FrameInfo,
};

use super::{lock, planes::Layout};

/// Caps feature of frames in CUDA memory.
pub(super) const FEATURE: &str = "memory:CUDAMemory";

/// Type of a `GstContext` with a `GstCudaContext`.
const CONTEXT: &str = "gst.cuda.context";

/// Formats that both GstCuda and this element support.
pub(super) const FORMATS: [gst_video::VideoFormat; 11] = [
    gst_video::VideoFormat::Nv12,
    gst_video::VideoFormat::I420,
    gst_video::VideoFormat::Yv12,
    gst_video::VideoFormat::Y42b,
    gst_video::VideoFormat::Y444,
    gst_video::VideoFormat::P01010le,
    gst_video::VideoFormat::I42010le,
    gst_video::VideoFormat::Rgba,
    gst_video::VideoFormat::Bgra,
    gst_video::VideoFormat::Rgbx,
    gst_video::VideoFormat::Bgrx,
];

/// `GST_MAP_CUDA`: maps memory to an address of the device.
const MAP_CUDA: u32 = 1 << 17;

type Storage = *mut *mut GstObject;

type Sync = unsafe extern "C" fn(*mut GstMemory);

/// Declares the table of functions and its constructor. A `GstCudaContext` is a [`GstObject`].
macro_rules! library {
    ($($field:ident = $symbol:literal: ($($arg:ty),*) $(-> $result:ty)?;)*) => {
        struct Library {
            $($field: unsafe extern "C" fn($($arg),*) $(-> $result)?,)*
            /// Waits for the stream of a memory. Exists since 1.24; before, producers wait
            /// themselves.
            sync: Option<Sync>,
        }

        impl Library {
            /// Looks up all functions with `find`.
            #[cfg(unix)]
            fn new(find: impl Fn(&CStr) -> Option<*mut c_void>) -> Option<Self> {
                Some(Self {
                    $($field: {
                        let symbol = find($symbol)?;
                        // SAFETY: the function of this name has this signature (gst/cuda of
                        // GStreamer 1.22 to 1.26).
                        unsafe {
                            mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($arg),*) $(-> $result)?,
                            >(symbol)
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
    set_context = c"gst_cuda_handle_set_context":
        (*mut GstElement, *mut GstContext, c_int, Storage) -> gboolean;
    answer = c"gst_cuda_handle_context_query":
        (*mut GstElement, *mut GstQuery, *mut GstObject) -> gboolean;
    handle = c"gst_cuda_context_get_handle": (*mut GstObject) -> *mut c_void;
    pool = c"gst_cuda_buffer_pool_new": (*mut GstObject) -> *mut GstBufferPool;
    is_memory = c"gst_is_cuda_memory": (*mut GstMemory) -> gboolean;
}

/// First fields of a `GstCudaMemory`.
#[repr(C)]
struct CudaMemory {
    memory: GstMemory,
    context: *mut GstObject,
}

/// Returns GstCuda if it and the driver are installed.
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
    // SAFETY: GStreamer's libraries can be loaded at any time; this one is never closed.
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
    // SAFETY: both can be called at any time; the first loads the driver, which the second
    // requires.
    unsafe {
        if (found.load)() == 0 {
            return None;
        }
        (found.init_memory)();
    }
    Some(found)
}

/// CUDA context that an element shares with its pipeline.
#[derive(Default)]
pub(super) struct SharedContext {
    /// Storage for the context that GstCuda finds.
    found: AtomicPtr<GstObject>,
    /// Context in use, while the element is started.
    context: Mutex<Option<Context>>,
}

impl SharedContext {
    /// Stores a context that the application or another element offers, if it belongs to device
    /// `ordinal`.
    pub fn offer(&self, element: &gst::Element, offered: &gst::Context, ordinal: usize) {
        let (Some(library), Ok(ordinal)) = (library(), c_int::try_from(ordinal)) else {
            return;
        };
        // A context in use is not replaced.
        if lock(&self.context).is_some() {
            return;
        }
        let mut object = ptr::null_mut();
        // SAFETY: the pointers are valid objects, and storage for a reference.
        unsafe {
            let (element, context) = (element.to_glib_none(), offered.to_glib_none());
            (library.set_context)(element.0, context.0, ordinal, &mut object);
        }
        if !object.is_null() {
            self.replace_found(object);
        }
    }

    /// Gets a context of device `ordinal` from the pipeline, or creates one. Stores none without
    /// GstCuda, driver or device.
    pub fn start(&self, element: &gst::Element, ordinal: usize) {
        let (Some(library), Ok(id)) = (library(), c_int::try_from(ordinal)) else {
            return;
        };
        if let Some(given) = element.context(CONTEXT) {
            self.offer(element, &given, ordinal);
        }
        // The stored context may belong to a device that was requested before.
        for _ in 0..2 {
            // SAFETY: as above.
            unsafe { (library.ensure)(element.to_glib_none().0, id, self.found.as_ptr()) };
            if let Some(object) = self.replace_found(ptr::null_mut())
                && object.property::<u32>("cuda-device-id") as usize == ordinal
            {
                *lock(&self.context) = Some(Context {
                    library,
                    object,
                    ordinal,
                });
                return;
            }
        }
    }

    /// Takes the context of the pipeline or of a neighbour of `element`, of any device. Creates
    /// none.
    pub fn join(&self, element: &gst::Element) {
        let Some(library) = library() else {
            return;
        };
        let Some(shared) = element.context(CONTEXT).or_else(|| ask_neighbours(element)) else {
            return;
        };
        let mut object = ptr::null_mut();
        // SAFETY: the pointers are valid objects, and storage for a reference; -1 accepts all
        // devices.
        let object: Option<gst::Object> = unsafe {
            let (element, context) = (element.to_glib_none(), shared.to_glib_none());
            (library.set_context)(element.0, context.0, -1, &mut object);
            from_glib_full(object)
        };
        if let Some(object) = object {
            let ordinal = object.property::<u32>("cuda-device-id") as usize;
            lock(&self.context).get_or_insert(Context {
                library,
                object,
                ordinal,
            });
        }
    }

    /// Releases the context.
    pub fn stop(&self) {
        let context = lock(&self.context).take();
        drop((context, self.replace_found(ptr::null_mut())));
    }

    /// Stores `object`, an owned reference or null, for GstCuda to find, and returns the previous
    /// one.
    fn replace_found(&self, object: *mut GstObject) -> Option<gst::Object> {
        // SAFETY: the storage holds an owned reference, or null.
        unsafe { from_glib_full(self.found.swap(object, Ordering::AcqRel)) }
    }

    /// Returns the context in use.
    pub fn get(&self) -> Option<Context> {
        lock(&self.context).clone()
    }
}

/// Returns the CUDA context of an element linked to `element`, if one has a context.
fn ask_neighbours(element: &gst::Element) -> Option<gst::Context> {
    element.pads().iter().find_map(|pad| {
        let mut query = gst::query::Context::new(CONTEXT);
        pad.peer_query(&mut query)
            .then(|| query.context_owned())
            .flatten()
    })
}

impl Drop for SharedContext {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A `GstCudaContext`.
#[derive(Clone)]
pub(super) struct Context {
    library: &'static Library,
    object: gst::Object,
    /// Number of its device.
    ordinal: usize,
}

impl Context {
    /// Returns the number of its device.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Returns the context for a model on device `ordinal`.
    ///
    /// # Errors
    /// Fails if the context belongs to another device.
    pub fn external(&self, ordinal: usize) -> tadsr::Result<ExternalContext> {
        if ordinal != self.ordinal {
            return Err(Error::Device(format!(
                "device 'cuda:{ordinal}' takes effect at the next start: the pipeline uses \
                 'cuda:{}'",
                self.ordinal
            )));
        }
        // SAFETY: the object is a GstCudaContext.
        let handle = unsafe { (self.library.handle)(self.as_ptr()) };
        let handle = NonNull::new(handle).ok_or_else(|| {
            Error::Device("the CUDA context of the pipeline has no handle".into())
        })?;
        // SAFETY: the context belongs to that device, and lives as long as the object.
        Ok(unsafe { ExternalContext::new(ordinal, handle, Box::new(self.object.clone())) })
    }

    /// Creates a pool of buffers for `caps` in this context's memory. Returns it with the size of a
    /// buffer.
    pub fn pool(&self, caps: &gst::Caps) -> Option<(gst::BufferPool, u32)> {
        let size = VideoInfo::from_caps(caps).ok()?.size() as u32;
        // SAFETY: the object is a GstCudaContext; the returned reference is owned.
        let pool: gst::BufferPool =
            unsafe { Option::from_glib_full((self.library.pool)(self.as_ptr())) }?;
        let mut config = pool.config();
        config.set_params(Some(caps), size, 0, 0);
        config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
        pool.set_config(config).ok()?;
        // The pool pads rows.
        let size = pool.config().params().map_or(size, |(_, size, ..)| size);
        Some((pool, size))
    }

    /// Answers a query for the context. Returns false for other queries.
    pub fn answer(&self, element: &gst::Element, query: &mut gst::QueryRef) -> bool {
        // SAFETY: all three are valid.
        unsafe {
            let element = element.to_glib_none();
            (self.library.answer)(element.0, query.as_mut_ptr(), self.as_ptr()) != 0
        }
    }

    /// Maps the frame `frame` of `info` in `buffer` for reading; `None` if it is not in this
    /// context's memory.
    ///
    /// # Errors
    /// Describes why the buffer does not hold the frame.
    pub fn read<'a>(
        &self,
        buffer: &'a gst::BufferRef,
        info: &VideoInfo,
        frame: &FrameInfo,
    ) -> Result<Option<Mapped<'a>>, String> {
        // SAFETY: any memory can be mapped for reading.
        unsafe { self.map(buffer, info, frame, gst::ffi::GST_MAP_READ) }
    }

    /// As [`Self::read`], for writing.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write<'a>(
        &self,
        buffer: &'a mut gst::BufferRef,
        info: &VideoInfo,
        frame: &FrameInfo,
    ) -> Result<Option<Mapped<'a>>, String> {
        // SAFETY: the buffer is borrowed exclusively.
        unsafe { self.map(buffer, info, frame, gst::ffi::GST_MAP_WRITE) }
    }

    /// # Safety
    /// For writing, the buffer must be borrowed exclusively.
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
        // SAFETY: the memory exists as long as the buffer; a GstCudaMemory starts with the fields
        // of CudaMemory.
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
            // Mapping may start an asynchronous copy.
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

/// CUDA memory of a buffer, mapped on the device.
pub(super) struct Mapped<'a> {
    map: GstMapInfo,
    planes: Vec<Rows>,
    _buffer: &'a gst::BufferRef,
}

impl Mapped<'_> {
    /// Addresses and strides of the planes.
    pub fn planes(&self) -> &[Rows] {
        &self.planes
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        // SAFETY: the memory is mapped exactly once, and its buffer outlives it.
        unsafe { gst::ffi::gst_memory_unmap(self.map.memory, &mut self.map) };
    }
}
