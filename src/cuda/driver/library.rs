//! The driver's library: its functions, loaded once, and the C structures and constants that they
//! take.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
    sync::OnceLock,
};

use super::{
    fault::{Fault, Result},
    interface::{DeviceInfo, HostRows, Rows},
};
use crate::Error;

pub type Handle = *mut c_void;
pub type Code = c_int;

/// Declares the table of functions and its constructor.
macro_rules! table {
    ($($field:ident = $symbol:literal: ($($arg:ty),*);)*) => {
        pub struct Table { $(pub $field: unsafe extern "C" fn($($arg),*) -> Code,)* }

        impl Table {
            fn load(library: Handle) -> Result<Self, String> {
                Ok(Self {$(
                    $field: {
                        let symbol = find(library, $symbol)?;
                        // SAFETY: the driver's function has this signature (cuda.h of CUDA 12 and
                        // 13).
                        unsafe {
                            std::mem::transmute::<
                                Handle,
                                unsafe extern "C" fn($($arg),*) -> Code,
                            >(symbol)
                        }
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
    device_uuid = c"cuDeviceGetUuid_v2": (*mut u8, c_int);
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
    stream_query = c"cuStreamQuery": (Handle);
    stream_wait = c"cuStreamWaitEvent": (Handle, Handle, c_uint);
    event_create = c"cuEventCreate": (*mut Handle, c_uint);
    event_destroy = c"cuEventDestroy_v2": (Handle);
    event_record = c"cuEventRecord": (Handle, Handle);
    event_query = c"cuEventQuery": (Handle);
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

/// Oldest supported driver in the numbers of `cuDriverGetVersion`. The kernels are compiled by CUDA
/// 12, and every driver for CUDA 12.0 or newer accepts its machine code.
const MIN_VERSION: c_int = 12000;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`, `_MULTIPROCESSOR_COUNT`
const ATTRIBUTES: [c_int; 3] = [75, 76, 16];
/// `CU_STREAM_NON_BLOCKING`: not ordered with the default stream of other libraries.
pub const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DEFAULT`: with timestamps.
pub const EVENT: c_uint = 0;
/// `CUDA_ERROR_NOT_READY`
pub const NOT_READY: Code = 600;
/// `CU_MEMHOSTALLOC_PORTABLE`
pub const PORTABLE: c_uint = 1;

/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`
const HOST_MEMORY: c_uint = 1;
const DEVICE_MEMORY: c_uint = 2;

/// `CUDA_MEMCPY2D`
#[repr(C)]
pub struct Copy2d {
    pub from: Side,
    pub to: Side,
    pub row: usize,
    pub rows: usize,
}

/// `CUDA_KERNEL_NODE_PARAMS`
#[repr(C)]
pub struct Node {
    pub function: Handle,
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared: c_uint,
    pub params: *mut Handle,
    pub extra: *mut Handle,
    pub kernel: Handle,
    pub context: Handle,
}

/// One side of a [`Copy2d`].
#[repr(C)]
pub struct Side {
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

impl From<HostRows> for Side {
    fn from(rows: HostRows) -> Self {
        Self {
            x: 0,
            y: 0,
            kind: HOST_MEMORY,
            host: rows.start as Handle,
            device: 0,
            array: ptr::null_mut(),
            pitch: rows.stride,
        }
    }
}

fn last_error() -> String {
    // SAFETY: dlerror returns null or a string that lives until the thread's next dl call.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "unknown error".into()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

fn find(library: Handle, name: &CStr) -> Result<Handle, String> {
    // SAFETY: the library stays open, the name is a C string.
    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
    if symbol.is_null() {
        return Err(format!(
            "the NVIDIA driver is too old: it has no {} (version 525 or newer is needed)",
            name.to_string_lossy()
        ));
    }
    Ok(symbol)
}

/// Opens the driver's library, which does not touch a device. Returns null if there is none.
fn open() -> Handle {
    let open = |name: &CStr| {
        // SAFETY: the driver's library may be loaded at any time; it is never closed.
        unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }
    };
    // The first is that of Windows Subsystem for Linux, which is not always in the search path.
    let names = [
        c"/usr/lib/wsl/lib/libcuda.so.1",
        c"libcuda.so.1",
        c"libcuda.so",
    ];
    let mut libraries = names.into_iter().map(open);
    libraries
        .find(|library| !library.is_null())
        .unwrap_or(ptr::null_mut())
}

/// Returns `true` if this machine has an NVIDIA driver. Does not touch a device.
pub fn is_installed() -> bool {
    !open().is_null()
}

/// Returns the functions of the initialised driver.
///
/// # Errors
/// [`Error::Device`] with the reason if there is no driver or it does not work.
pub fn table() -> crate::Result<&'static Table> {
    static TABLE: OnceLock<Result<Table, String>> = OnceLock::new();
    let load = || {
        let library = open();
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
        if code == 0 && version < MIN_VERSION {
            return Err(format!(
                "the NVIDIA driver is too old: it is for CUDA {}.{}, and version 525 or newer, \
                 for CUDA 12, is needed",
                version / 1000,
                version % 1000 / 10
            ));
        }
        Ok(table)
    };
    let table = TABLE.get_or_init(load).as_ref();
    table.map_err(|reason| Error::Device(format!("CUDA cannot be used: {reason}")))
}

impl Table {
    pub fn fault(&self, call: &'static str, code: Code) -> Fault {
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

    pub fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == 0 {
            Ok(())
        } else {
            Err(self.fault(call, code))
        }
    }

    pub fn count(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the pointer is to a local.
        self.check("cuDeviceGetCount", unsafe {
            (self.device_count)(&mut count)
        })?;
        Ok(count.max(0) as usize)
    }

    /// Returns the handle, name and limits of a device.
    pub fn device(&self, ordinal: usize) -> Result<(c_int, DeviceInfo)> {
        let (mut device, mut memory, mut attributes, mut version) = (0, 0, [0; 3], 0);
        let mut name: [c_char; 128] = [0; 128];
        let mut uuid = [0; 16];
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
            self.check(
                "cuDeviceGetUuid",
                (self.device_uuid)(uuid.as_mut_ptr(), device),
            )?;
            self.check("cuDriverGetVersion", (self.version)(&mut version))?;
            for (value, attribute) in attributes.iter_mut().zip(ATTRIBUTES) {
                let code = (self.device_attribute)(value, attribute, device);
                self.check("cuDeviceGetAttribute", code)?;
            }
        }
        // SAFETY: the last byte is still 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let info = DeviceInfo {
            ordinal,
            name: name.to_string_lossy().into_owned(),
            capability: (attributes[0] as u32, attributes[1] as u32),
            memory,
            multiprocessors: attributes[2].max(1) as usize,
            uuid,
            version,
        };
        Ok((device, info))
    }
}
