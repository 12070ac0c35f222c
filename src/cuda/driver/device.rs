//! A device in a context: memory, streams, events, modules and graphs.

use std::{
    ffi::{CString, c_int, c_void},
    ptr::{self, NonNull},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    fault::{Fault, HOST_ALLOC, OUT_OF_MEMORY, Result, TIMEOUT},
    interface::{
        Address, DeviceInfo, Driver, Event, Function, Graph, HostRows, Launch, Module, Rows, Stream,
    },
    library::{
        Code, Copy2d, EVENT, Handle, NON_BLOCKING, NOT_READY, Node, PORTABLE, Side, Table, table,
    },
};
use crate::Error;

/// Returns the devices of this machine.
///
/// # Errors
/// [`Error::Device`] with the reason if there is no driver or it does not work.
pub fn probe() -> crate::Result<Vec<DeviceInfo>> {
    let table = table()?;
    let devices = (0..table.count()?).map(|i| Ok(table.device(i)?.1));
    devices.collect()
}

/// Opens device `ordinal` in its primary context.
///
/// # Errors
/// [`Error::Device`] with the reason if there is no driver, it does not work, or it has no such
/// device.
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
        abandoned: AtomicBool::new(false),
    }))
}

/// Opens device `ordinal` in a `CUcontext` that lives at least as long as `keep`.
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
        abandoned: AtomicBool::new(false),
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
    /// The device does not complete its work.
    abandoned: AtomicBool,
}

/// The owner of a context.
enum Owner {
    /// The device's primary context, retained once.
    Primary(c_int),
    Other {
        _keep: Box<dyn Send + Sync>,
    },
    /// The value is being dropped.
    None,
}

// SAFETY: the driver's functions and handles may be used from any thread. Each call sets its
// context.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Drop for Device {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.owner, Owner::None) {
            // The driver would wait for the work of the device.
            owner if self.is_abandoned() => std::mem::forget(owner),
            // SAFETY: retained once, by `open`.
            Owner::Primary(device) => drop(unsafe { (self.table.release)(device) }),
            Owner::Other { .. } | Owner::None => {}
        }
    }
}

impl Device {
    /// Makes one call in this device's context and restores the thread's previous context.
    fn call(&self, name: &'static str, call: impl FnOnce(&Table) -> Code) -> Result<()> {
        if self.is_abandoned() {
            return Err(Fault {
                call: name,
                code: TIMEOUT,
                text: "the device did not complete its work".into(),
            });
        }
        // SAFETY: the context lives as long as `self`.
        let pushed = unsafe { (self.table.push)(self.context) };
        self.table.check("cuCtxPushCurrent", pushed)?;
        let code = call(self.table);
        let mut popped = ptr::null_mut();
        // SAFETY: pops the context that was pushed above.
        unsafe { (self.table.pop)(&mut popped) };
        self.table.check(name, code)
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    /// Copies `rows` rows of `row` bytes.
    ///
    /// # Safety
    /// As [`Driver::copy`].
    unsafe fn copy_rows(
        &self,
        (to, from): (Side, Side),
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()> {
        let copy = Copy2d {
            from,
            to,
            row,
            rows,
        };
        let stream = stream.0 as Handle;
        // SAFETY: as the caller promises.
        self.call("cuMemcpy2DAsync", |t| unsafe { (t.copy)(&copy, stream) })
    }

    /// Makes a call that returns `CUDA_ERROR_NOT_READY` for work in progress.
    fn query(&self, name: &'static str, call: impl FnOnce(&Table) -> Code) -> Result<bool> {
        match self.call(name, call) {
            Ok(()) => Ok(true),
            Err(fault) if fault.code == NOT_READY => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Makes a call that returns a handle through its last argument.
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

// Errors of releasing calls are ignored: the call that broke the device has reported its error.
// SAFETY (of every block below): the handles are of this driver and context and not destroyed, and
// the pointers are to locals. The callers of the trait's unsafe methods ensure the rest.
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

    fn is_idle(&self, stream: Stream) -> Result<bool> {
        self.query("cuStreamQuery", |t| unsafe {
            (t.stream_query)(stream.0 as Handle)
        })
    }

    fn event(&self) -> Result<Event> {
        self.make("cuEventCreate", |t, out| unsafe {
            (t.event_create)(out, EVENT)
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

    fn is_reached(&self, event: Event) -> Result<bool> {
        self.query("cuEventQuery", |t| unsafe {
            (t.event_query)(event.0 as Handle)
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
        unsafe { self.copy_rows((to.into(), from.into()), row, rows, stream) }
    }

    unsafe fn upload_rows(
        &self,
        to: Rows,
        from: HostRows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()> {
        unsafe { self.copy_rows((to.into(), from.into()), row, rows, stream) }
    }

    unsafe fn download_rows(
        &self,
        to: HostRows,
        from: Rows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()> {
        unsafe { self.copy_rows((to.into(), from.into()), row, rows, stream) }
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

    fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}
