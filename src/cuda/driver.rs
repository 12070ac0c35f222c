//! The CUDA driver API: the few functions that the engine needs, found in the driver's own library when they are first
//! asked for, so that one binary starts on machines with and without it. Nothing of the toolkit is needed at build or
//! at run time.
//!
//! Bound by hand, with `dlopen` from the `libc` crate that is in the tree anyway: the functions are some forty, while
//! cudarc takes long to build, binds all of CUDA, and refuses to be built with dynamic loading beside the copy of itself
//! that candle's `cuda` feature brings along with dynamic linking.

use std::{ffi::c_void, fmt, ptr::NonNull};

use crate::Error;

/// `CUDA_ERROR_OUT_OF_MEMORY`
pub const OUT_OF_MEMORY: i32 = 2;

/// The call that allocates pinned memory.
pub const HOST_ALLOC: &str = "cuMemHostAlloc";

/// What a call of the driver said when it failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{call}: {text} (CUDA error {code})")]
pub struct Fault {
    pub call: &'static str,
    /// `CUresult`
    pub code: i32,
    pub text: String,
}

impl Fault {
    /// Whether the memory was too small, which a smaller plan may cure.
    pub fn out_of_memory(&self) -> bool {
        self.code == OUT_OF_MEMORY
    }

    /// Whether it was machine code for another chip: `CUDA_ERROR_INVALID_IMAGE`, `CUDA_ERROR_NO_BINARY_FOR_GPU`.
    pub fn other_chip(&self) -> bool {
        matches!(self.code, 200 | 209)
    }

    /// Whether it was pinned memory of the host that could not be had.
    pub fn of_the_host(&self) -> bool {
        self.call == HOST_ALLOC
    }

    /// Whether the device or what the process has on it is gone, so that every call that follows fails too:
    /// deinitialised, unavailable, memory errors, illegal address or instruction, time-out, failed launch, unknown.
    pub fn lost(&self) -> bool {
        matches!(
            self.code,
            4 | 46 | 201 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 999
        )
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match (fault.out_of_memory(), fault.lost()) {
            (true, _) if fault.of_the_host() => Self::Memory(format!(
                "not enough memory of the host that can be pinned for copies: {fault}"
            )),
            (true, _) => Self::Memory(format!("not enough CUDA memory: {fault}")),
            (_, true) => Self::Device(format!("the CUDA device was lost: {fault}")),
            _ => Self::Device(format!("the CUDA device failed: {fault}")),
        }
    }
}

pub type Result<T, E = Fault> = std::result::Result<T, E>;

/// What a device is.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    pub ordinal: usize,
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: usize,
}

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u64);
    )*};
}

handles! {
    /// An address in the device's memory.
    Address
    /// Work in order.
    Stream
    /// A point in a stream.
    Event
    Module
    Function
    /// Recorded launches, ready to be launched at once.
    Graph
}

impl Stream {
    /// The context's default stream, which waits for all streams that are not non-blocking, and they for it.
    pub const DEFAULT: Self = Self(0);
}

/// A launch's blocks and threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
}

/// A kernel's run: of one whose only parameter is the structure that `params` holds, aligned to 8 bytes.
#[derive(Clone, Debug)]
pub struct Launch {
    pub function: Function,
    pub shape: Shape,
    pub params: Vec<u64>,
}

/// Where the rows of a picture lie in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows {
    pub address: Address,
    /// Bytes from row to row.
    pub stride: usize,
}

/// One device. All methods may be called from any thread; what is made is released by its caller.
pub trait Driver: Send + Sync {
    fn info(&self) -> &DeviceInfo;
    /// Bytes that are free.
    fn free_memory(&self) -> Result<usize>;

    fn alloc(&self, bytes: usize) -> Result<Address>;
    fn free(&self, address: Address);
    /// Memory of the host that the device copies from and to by itself.
    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>>;
    /// # Safety
    /// `memory` is from [`Self::alloc_pinned`] and no longer in use.
    unsafe fn free_pinned(&self, memory: NonNull<u8>);

    fn stream(&self) -> Result<Stream>;
    fn destroy_stream(&self, stream: Stream);
    fn synchronize(&self, stream: Stream) -> Result<()>;
    fn event(&self) -> Result<Event>;
    fn destroy_event(&self, event: Event);
    fn record(&self, event: Event, stream: Stream) -> Result<()>;
    /// What comes later in `stream` waits for `event` as it was last recorded.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;
    /// Blocks until what was last recorded is done; returns at once when nothing was.
    fn synchronize_event(&self, event: Event) -> Result<()>;
    /// Milliseconds from one event to another, both done.
    fn elapsed(&self, from: Event, to: Event) -> Result<f32>;

    /// Copies to the device when its turn in `stream` comes, which is waited for where the memory is not pinned.
    ///
    /// # Safety
    /// The `bytes` at `from` are neither written nor freed before that; those at `to` are allocated.
    unsafe fn upload(
        &self,
        to: Address,
        from: *const u8,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;
    /// Copies from the device when its turn in `stream` comes, which is waited for where the memory is not pinned.
    ///
    /// # Safety
    /// The `bytes` at `to` are not used or freed before that; those at `from` are allocated.
    unsafe fn download(
        &self,
        to: *mut u8,
        from: Address,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;

    /// Copies `rows` rows of `row` bytes within the device's memory when its turn in `stream` comes.
    ///
    /// # Safety
    /// All rows are allocated on both sides, reachable from this device's context; `from` is neither written nor freed,
    /// `to` neither used nor freed before that.
    unsafe fn copy(
        &self,
        to: Rows,
        from: Rows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()>;

    /// Loads a cubin, a fatbin, or PTX that ends in a zero byte.
    fn load(&self, image: &[u8]) -> Result<Module>;
    fn unload(&self, module: Module);
    fn function(&self, module: Module, name: &str) -> Result<Function>;
    /// Makes a graph of kernels that run one after the other, and brings it to the device in `stream`. (Made of nodes: a stream that
    /// is captured would fail whoever synchronises the context meanwhile, which may be shared.)
    ///
    /// # Safety
    /// Whenever the graph runs, the addresses in the launches' structures are allocated for all that the kernels read and write.
    unsafe fn graph(&self, launches: &[Launch], stream: Stream) -> Result<Graph>;
    fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()>;
    fn destroy_graph(&self, graph: Graph);
}

impl fmt::Debug for dyn Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.info().fmt(f)
    }
}

#[cfg(unix)]
pub use library::{open, probe, within};

/// Without a way to load the driver there is no device.
#[cfg(not(unix))]
pub fn probe() -> crate::Result<Vec<DeviceInfo>> {
    Err(Error::Device(
        "CUDA is not supported on this platform".into(),
    ))
}

/// Without a way to load the driver there is no device.
#[cfg(not(unix))]
pub unsafe fn within(
    _ordinal: usize,
    _context: NonNull<c_void>,
    _keep: Box<dyn Send + Sync>,
) -> crate::Result<std::sync::Arc<dyn Driver>> {
    Err(Error::Device(
        "CUDA is not supported on this platform".into(),
    ))
}

/// Without a way to load the driver there is no device.
#[cfg(not(unix))]
pub fn open(_ordinal: usize) -> crate::Result<std::sync::Arc<dyn Driver>> {
    Err(Error::Device(
        "CUDA is not supported on this platform".into(),
    ))
}

#[cfg(unix)]
mod library {
    use std::{
        ffi::{CStr, CString, c_char, c_int, c_uint},
        ptr,
        sync::{Arc, OnceLock},
    };

    use super::*;

    type Handle = *mut c_void;
    type Code = c_int;

    /// Declares the table of functions and how it is filled.
    macro_rules! table {
        ($($field:ident = $symbol:literal: ($($arg:ty),*);)*) => {
            struct Table { $($field: unsafe extern "C" fn($($arg),*) -> Code,)* }

            impl Table {
                fn load(library: Handle) -> Result<Self, String> {
                    Ok(Self {$(
                        $field: {
                            let symbol = find(library, $symbol)?;
                            // SAFETY: the driver's function of this name has this signature (cuda.h of CUDA 12 and 13).
                            unsafe { std::mem::transmute::<Handle, unsafe extern "C" fn($($arg),*) -> Code>(symbol) }
                        },
                    )*})
                }
            }
        };
    }

    table! {
        init = c"cuInit": (c_uint);
        version = c"cuDriverGetVersion": (*mut c_int);
        error_name = c"cuGetErrorName": (Code, *mut *const c_char);
        error_string = c"cuGetErrorString": (Code, *mut *const c_char);
        device_count = c"cuDeviceGetCount": (*mut c_int);
        device_get = c"cuDeviceGet": (*mut c_int, c_int);
        device_name = c"cuDeviceGetName": (*mut c_char, c_int, c_int);
        device_memory = c"cuDeviceTotalMem_v2": (*mut usize, c_int);
        device_attribute = c"cuDeviceGetAttribute": (*mut c_int, c_int, c_int);
        retain = c"cuDevicePrimaryCtxRetain": (*mut Handle, c_int);
        release = c"cuDevicePrimaryCtxRelease_v2": (c_int);
        push = c"cuCtxPushCurrent_v2": (Handle);
        pop = c"cuCtxPopCurrent_v2": (*mut Handle);
        memory_info = c"cuMemGetInfo_v2": (*mut usize, *mut usize);
        alloc = c"cuMemAlloc_v2": (*mut u64, usize);
        free = c"cuMemFree_v2": (u64);
        host_alloc = c"cuMemHostAlloc": (*mut Handle, usize, c_uint);
        host_free = c"cuMemFreeHost": (Handle);
        upload = c"cuMemcpyHtoDAsync_v2": (u64, *const c_void, usize, Handle);
        download = c"cuMemcpyDtoHAsync_v2": (Handle, u64, usize, Handle);
        copy = c"cuMemcpy2DAsync_v2": (*const Copy2d, Handle);
        stream_create = c"cuStreamCreate": (*mut Handle, c_uint);
        stream_destroy = c"cuStreamDestroy_v2": (Handle);
        stream_synchronize = c"cuStreamSynchronize": (Handle);
        stream_wait = c"cuStreamWaitEvent": (Handle, Handle, c_uint);
        event_create = c"cuEventCreate": (*mut Handle, c_uint);
        event_destroy = c"cuEventDestroy_v2": (Handle);
        event_record = c"cuEventRecord": (Handle, Handle);
        event_synchronize = c"cuEventSynchronize": (Handle);
        event_elapsed = c"cuEventElapsedTime": (*mut f32, Handle, Handle);
        module_load = c"cuModuleLoadData": (*mut Handle, *const c_void);
        module_unload = c"cuModuleUnload": (Handle);
        module_function = c"cuModuleGetFunction": (*mut Handle, Handle, *const c_char);
        graph_create = c"cuGraphCreate": (*mut Handle, c_uint);
        graph_add = c"cuGraphAddKernelNode_v2": (*mut Handle, Handle, *const Handle, usize, *const Node);
        graph_upload = c"cuGraphUpload": (Handle, Handle);
        graph_instantiate = c"cuGraphInstantiateWithFlags": (*mut Handle, Handle, u64);
        graph_launch = c"cuGraphLaunch": (Handle, Handle);
        graph_destroy = c"cuGraphDestroy": (Handle);
        graph_exec_destroy = c"cuGraphExecDestroy": (Handle);
    }

    /// The oldest driver that the kernels are for, as `cuDriverGetVersion` numbers them: they are compiled by CUDA 12, whose
    /// machine code every driver for CUDA 12.0 or newer takes.
    const CUDA: c_int = 12000;
    /// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`
    const CAPABILITY: [c_int; 2] = [75, 76];
    /// `CU_STREAM_NON_BLOCKING`: not ordered with the default stream of other libraries.
    const NON_BLOCKING: c_uint = 1;
    /// `CU_EVENT_BLOCKING_SYNC`: who waits sleeps, for there may be more streams than cores.
    const BLOCKING: c_uint = 1;
    /// `CU_MEMHOSTALLOC_PORTABLE`
    const PORTABLE: c_uint = 1;

    /// `CU_MEMORYTYPE_DEVICE`
    const DEVICE_MEMORY: c_uint = 2;

    /// `CUDA_MEMCPY2D`
    #[repr(C)]
    struct Copy2d {
        from: Side,
        to: Side,
        row: usize,
        rows: usize,
    }

    /// `CUDA_KERNEL_NODE_PARAMS`
    #[repr(C)]
    struct Node {
        function: Handle,
        grid: [c_uint; 3],
        block: [c_uint; 3],
        shared: c_uint,
        params: *mut Handle,
        extra: *mut Handle,
        kernel: Handle,
        context: Handle,
    }

    /// One side of a [`Copy2d`].
    #[repr(C)]
    struct Side {
        x: usize,
        y: usize,
        kind: c_uint,
        host: Handle,
        device: u64,
        array: Handle,
        pitch: usize,
    }

    impl From<Rows> for Side {
        fn from(rows: Rows) -> Self {
            Self {
                x: 0,
                y: 0,
                kind: DEVICE_MEMORY,
                host: ptr::null_mut(),
                device: rows.address.0,
                array: ptr::null_mut(),
                pitch: rows.stride,
            }
        }
    }

    fn last_error() -> String {
        // SAFETY: dlerror returns null or a string that lives until the thread's next dl call.
        unsafe {
            let text = libc::dlerror();
            match text.is_null() {
                true => "unknown error".into(),
                false => CStr::from_ptr(text).to_string_lossy().into_owned(),
            }
        }
    }

    fn find(library: Handle, name: &CStr) -> Result<Handle, String> {
        // SAFETY: the library stays open, the name is a C string.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
        match symbol.is_null() {
            false => Ok(symbol),
            true => Err(format!(
                "the NVIDIA driver is too old: it has no {} (version 525 or newer is needed)",
                name.to_string_lossy()
            )),
        }
    }

    /// The driver's functions, initialised; or why there are none.
    fn table() -> crate::Result<&'static Table> {
        static TABLE: OnceLock<Result<Table, String>> = OnceLock::new();
        let load = || {
            let open = |name: &CStr| {
                // SAFETY: the driver's library may be loaded at any time; it is never closed.
                unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }
            };
            let mut library = open(c"libcuda.so.1");
            if library.is_null() {
                library = open(c"libcuda.so");
            }
            if library.is_null() {
                return Err(format!("there is no NVIDIA driver ({})", last_error()));
            }
            let table = Table::load(library)?;
            // SAFETY: the flags must be 0.
            let code = unsafe { (table.init)(0) };
            if code != 0 {
                let fault = table.fault("cuInit", code);
                return Err(format!("the NVIDIA driver does not start: {fault}"));
            }
            let mut version = 0;
            // SAFETY: the pointer is to a local.
            let code = unsafe { (table.version)(&mut version) };
            match code == 0 && version < CUDA {
                true => Err(format!(
                    "the NVIDIA driver is too old: it is for CUDA {}.{}, and version 525 or newer, for CUDA 12, is needed",
                    version / 1000,
                    version % 1000 / 10
                )),
                false => Ok(table),
            }
        };
        let table = TABLE.get_or_init(load).as_ref();
        table.map_err(|reason| Error::Device(format!("CUDA cannot be used: {reason}")))
    }

    impl Table {
        fn fault(&self, call: &'static str, code: Code) -> Fault {
            let text = |get: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
                let mut text = ptr::null();
                // SAFETY: the driver writes a pointer to a string of its own, or null.
                unsafe {
                    let known = get(code, &mut text) == 0 && !text.is_null();
                    known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
                }
            };
            let text = match (text(self.error_name), text(self.error_string)) {
                (Some(name), Some(string)) => format!("{name}, {string}"),
                _ => "unknown error".into(),
            };
            Fault { call, code, text }
        }

        fn check(&self, call: &'static str, code: Code) -> Result<()> {
            match code {
                0 => Ok(()),
                _ => Err(self.fault(call, code)),
            }
        }

        fn count(&self) -> Result<usize> {
            let mut count = 0;
            // SAFETY: the pointer is to a local.
            self.check("cuDeviceGetCount", unsafe {
                (self.device_count)(&mut count)
            })?;
            Ok(count.max(0) as usize)
        }

        /// The handle of a device and what it is.
        fn device(&self, ordinal: usize) -> Result<(c_int, DeviceInfo)> {
            let (mut device, mut memory, mut capability) = (0, 0, [0; 2]);
            let mut name: [c_char; 128] = [0; 128];
            // SAFETY: the pointers are to locals of the lengths that are passed.
            unsafe {
                self.check(
                    "cuDeviceGet",
                    (self.device_get)(&mut device, ordinal as c_int),
                )?;
                let len = name.len() as c_int - 1;
                self.check(
                    "cuDeviceGetName",
                    (self.device_name)(name.as_mut_ptr(), len, device),
                )?;
                self.check(
                    "cuDeviceTotalMem",
                    (self.device_memory)(&mut memory, device),
                )?;
                for (value, attribute) in capability.iter_mut().zip(CAPABILITY) {
                    let code = (self.device_attribute)(value, attribute, device);
                    self.check("cuDeviceGetAttribute", code)?;
                }
            }
            // SAFETY: the last byte is still 0.
            let name = unsafe { CStr::from_ptr(name.as_ptr()) };
            let info = DeviceInfo {
                ordinal,
                name: name.to_string_lossy().into_owned(),
                capability: (capability[0] as u32, capability[1] as u32),
                memory,
            };
            Ok((device, info))
        }
    }

    /// The devices of this machine, none where the driver has none.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason when there is no driver or it does not work.
    pub fn probe() -> crate::Result<Vec<DeviceInfo>> {
        let table = table()?;
        let devices = (0..table.count()?).map(|i| Ok(table.device(i)?.1));
        devices.collect()
    }

    /// The device of that number, in its primary context.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason when there is no driver, it does not work, or it has no such device.
    pub fn open(ordinal: usize) -> crate::Result<Arc<dyn Driver>> {
        let table = table()?;
        let (device, info) = numbered(table, ordinal)?;
        let mut context = ptr::null_mut();
        // SAFETY: the device is there; the context is released when the value is dropped.
        let code = unsafe { (table.retain)(&mut context, device) };
        table.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(Arc::new(Device {
            table,
            context,
            info,
            owner: Owner::Primary(device),
        }))
    }

    /// The device of that number, in a `CUcontext` that lives as long as `keep`.
    ///
    /// # Safety
    /// `context` is a context of that device.
    ///
    /// # Errors
    /// As [`open`].
    pub unsafe fn within(
        ordinal: usize,
        context: NonNull<c_void>,
        keep: Box<dyn Send + Sync>,
    ) -> crate::Result<Arc<dyn Driver>> {
        let table = table()?;
        let (_, info) = numbered(table, ordinal)?;
        Ok(Arc::new(Device {
            table,
            context: context.as_ptr(),
            info,
            owner: Owner::Other { _keep: keep },
        }))
    }

    fn numbered(table: &Table, ordinal: usize) -> crate::Result<(c_int, DeviceInfo)> {
        let count = table.count()?;
        if ordinal >= count {
            return Err(Error::Device(format!(
                "this machine has {count} CUDA devices, numbered from 0"
            )));
        }
        Ok(table.device(ordinal)?)
    }

    struct Device {
        table: &'static Table,
        context: Handle,
        info: DeviceInfo,
        owner: Owner,
    }

    /// Whose the context is.
    enum Owner {
        /// The device's primary context, retained once.
        Primary(c_int),
        Other {
            _keep: Box<dyn Send + Sync>,
        },
    }

    // SAFETY: the driver's functions and handles may be used from any thread; the current context is set for each call.
    unsafe impl Send for Device {}
    // SAFETY: as above.
    unsafe impl Sync for Device {}

    impl Drop for Device {
        fn drop(&mut self) {
            if let Owner::Primary(device) = self.owner {
                // SAFETY: retained once, by `open`.
                unsafe { (self.table.release)(device) };
            }
        }
    }

    impl Device {
        /// Makes one call in this device's context and leaves the thread in the context that it was in.
        fn call(&self, name: &'static str, call: impl FnOnce(&Table) -> Code) -> Result<()> {
            // SAFETY: the context lives as long as `self`.
            let pushed = unsafe { (self.table.push)(self.context) };
            self.table.check("cuCtxPushCurrent", pushed)?;
            let code = call(self.table);
            let mut popped = ptr::null_mut();
            // SAFETY: what was pushed above.
            unsafe { (self.table.pop)(&mut popped) };
            self.table.check(name, code)
        }

        /// As [`Self::call`] for what makes a handle.
        fn make(
            &self,
            name: &'static str,
            call: impl FnOnce(&Table, &mut Handle) -> Code,
        ) -> Result<u64> {
            let mut handle = ptr::null_mut();
            self.call(name, |table| call(table, &mut handle))?;
            Ok(handle as u64)
        }
    }

    // What fails while something is released is not told: the call that broke the device has told it.
    // SAFETY (of every block below): the handles were made by this driver in this context and not destroyed, the
    // pointers are to locals, and for the rest the trait's callers promise what the driver asks.
    impl Driver for Device {
        fn info(&self) -> &DeviceInfo {
            &self.info
        }

        fn free_memory(&self) -> Result<usize> {
            let (mut free, mut total) = (0, 0);
            self.call("cuMemGetInfo", |t| unsafe {
                (t.memory_info)(&mut free, &mut total)
            })?;
            Ok(free)
        }

        fn alloc(&self, bytes: usize) -> Result<Address> {
            let mut address = 0;
            self.call("cuMemAlloc", |t| unsafe { (t.alloc)(&mut address, bytes) })?;
            Ok(Address(address))
        }

        fn free(&self, address: Address) {
            let _ = self.call("cuMemFree", |t| unsafe { (t.free)(address.0) });
        }

        fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
            let memory = self.make(HOST_ALLOC, |t, out| unsafe {
                (t.host_alloc)(out, bytes, PORTABLE)
            })?;
            NonNull::new(memory as *mut u8).ok_or(Fault {
                call: HOST_ALLOC,
                code: OUT_OF_MEMORY,
                text: "no address".into(),
            })
        }

        unsafe fn free_pinned(&self, memory: NonNull<u8>) {
            let _ = self.call("cuMemFreeHost", |t| unsafe {
                (t.host_free)(memory.as_ptr().cast())
            });
        }

        fn stream(&self) -> Result<Stream> {
            let stream = self.make("cuStreamCreate", |t, out| unsafe {
                (t.stream_create)(out, NON_BLOCKING)
            });
            stream.map(Stream)
        }

        fn destroy_stream(&self, stream: Stream) {
            let _ = self.call("cuStreamDestroy", |t| unsafe {
                (t.stream_destroy)(stream.0 as Handle)
            });
        }

        fn synchronize(&self, stream: Stream) -> Result<()> {
            self.call("cuStreamSynchronize", |t| unsafe {
                (t.stream_synchronize)(stream.0 as Handle)
            })
        }

        fn event(&self) -> Result<Event> {
            self.make("cuEventCreate", |t, out| unsafe {
                (t.event_create)(out, BLOCKING)
            })
            .map(Event)
        }

        fn destroy_event(&self, event: Event) {
            let _ = self.call("cuEventDestroy", |t| unsafe {
                (t.event_destroy)(event.0 as Handle)
            });
        }

        fn record(&self, event: Event, stream: Stream) -> Result<()> {
            let (event, stream) = (event.0 as Handle, stream.0 as Handle);
            self.call("cuEventRecord", |t| unsafe {
                (t.event_record)(event, stream)
            })
        }

        fn wait(&self, stream: Stream, event: Event) -> Result<()> {
            let (event, stream) = (event.0 as Handle, stream.0 as Handle);
            self.call("cuStreamWaitEvent", |t| unsafe {
                (t.stream_wait)(stream, event, 0)
            })
        }

        fn synchronize_event(&self, event: Event) -> Result<()> {
            self.call("cuEventSynchronize", |t| unsafe {
                (t.event_synchronize)(event.0 as Handle)
            })
        }

        fn elapsed(&self, from: Event, to: Event) -> Result<f32> {
            let mut time = 0.0;
            let (from, to) = (from.0 as Handle, to.0 as Handle);
            self.call("cuEventElapsedTime", |t| unsafe {
                (t.event_elapsed)(&mut time, from, to)
            })?;
            Ok(time)
        }

        unsafe fn upload(
            &self,
            to: Address,
            from: *const u8,
            bytes: usize,
            stream: Stream,
        ) -> Result<()> {
            let stream = stream.0 as Handle;
            self.call("cuMemcpyHtoDAsync", |t| unsafe {
                (t.upload)(to.0, from.cast(), bytes, stream)
            })
        }

        unsafe fn download(
            &self,
            to: *mut u8,
            from: Address,
            bytes: usize,
            stream: Stream,
        ) -> Result<()> {
            let stream = stream.0 as Handle;
            self.call("cuMemcpyDtoHAsync", |t| unsafe {
                (t.download)(to.cast(), from.0, bytes, stream)
            })
        }

        unsafe fn copy(
            &self,
            to: Rows,
            from: Rows,
            row: usize,
            rows: usize,
            stream: Stream,
        ) -> Result<()> {
            let copy = Copy2d {
                from: from.into(),
                to: to.into(),
                row,
                rows,
            };
            let stream = stream.0 as Handle;
            self.call("cuMemcpy2DAsync", |t| unsafe { (t.copy)(&copy, stream) })
        }

        fn load(&self, image: &[u8]) -> Result<Module> {
            let image = image.as_ptr().cast();
            self.make("cuModuleLoadData", |t, out| unsafe {
                (t.module_load)(out, image)
            })
            .map(Module)
        }

        fn unload(&self, module: Module) {
            let _ = self.call("cuModuleUnload", |t| unsafe {
                (t.module_unload)(module.0 as Handle)
            });
        }

        fn function(&self, module: Module, name: &str) -> Result<Function> {
            let (module, name) = (module.0 as Handle, CString::new(name).unwrap_or_default());
            let get = |t: &Table, out: &mut Handle| unsafe {
                (t.module_function)(out, module, name.as_ptr())
            };
            self.make("cuModuleGetFunction", get).map(Function)
        }

        unsafe fn graph(&self, launches: &[Launch], stream: Stream) -> Result<Graph> {
            let graph = self.make("cuGraphCreate", |t, out| unsafe {
                (t.graph_create)(out, 0)
            })? as Handle;
            let mut before: Option<Handle> = None;
            let added = launches.iter().try_for_each(|launch| {
                // The driver copies the parameters before it returns.
                let mut params = [launch.params.as_ptr() as Handle];
                let node = Node {
                    function: launch.function.0 as Handle,
                    grid: launch.shape.grid,
                    block: launch.shape.block,
                    shared: 0,
                    params: params.as_mut_ptr(),
                    extra: ptr::null_mut(),
                    kernel: ptr::null_mut(),
                    context: ptr::null_mut(),
                };
                let waits = before.as_slice();
                let added = self.make("cuGraphAddKernelNode", |t, out| unsafe {
                    (t.graph_add)(out, graph, waits.as_ptr(), waits.len(), &node)
                })?;
                before = Some(added as Handle);
                Ok(())
            });
            let exec = added.and_then(|()| {
                self.make("cuGraphInstantiate", |t, out| unsafe {
                    (t.graph_instantiate)(out, graph, 0)
                })
            });
            let _ = self.call("cuGraphDestroy", |t| unsafe { (t.graph_destroy)(graph) });
            let exec = Graph(exec?);
            let uploaded = self.call("cuGraphUpload", |t| unsafe {
                (t.graph_upload)(exec.0 as Handle, stream.0 as Handle)
            });
            if let Err(fault) = uploaded {
                self.destroy_graph(exec);
                return Err(fault);
            }
            Ok(exec)
        }

        fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()> {
            let (graph, stream) = (graph.0 as Handle, stream.0 as Handle);
            self.call("cuGraphLaunch", |t| unsafe {
                (t.graph_launch)(graph, stream)
            })
        }

        fn destroy_graph(&self, graph: Graph) {
            let _ = self.call("cuGraphExecDestroy", |t| unsafe {
                (t.graph_exec_destroy)(graph.0 as Handle)
            });
        }
    }
}
