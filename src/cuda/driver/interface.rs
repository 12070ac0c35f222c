//! The interface of a CUDA device, real or emulated, and its types.

use std::{
    fmt,
    ptr::NonNull,
    thread,
    time::{Duration, Instant},
};

use super::fault::{Fault, Result, TIMEOUT};

/// Time after which a device that does not complete its work counts as lost. The slowest frame on
/// the slowest supported device takes a small part of it.
const LIMIT: Duration = Duration::from_secs(20);

/// Shortest and longest time between two looks at work in progress.
const NAP: [Duration; 2] = [Duration::from_micros(20), Duration::from_micros(500)];

/// Name and limits of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    pub ordinal: usize,
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: usize,
    pub multiprocessors: usize,
    /// Identifies the device across processes and machines.
    pub uuid: [u8; 16],
    /// Version of the driver: 1000 times the major number of CUDA plus 10 times the minor one.
    pub version: i32,
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
    /// A queue of work that runs in order.
    Stream
    /// A point in a stream.
    Event
    Module
    Function
    /// Recorded launches that start with one call.
    Graph
}

impl Stream {
    /// The default stream of the context. It waits for all streams that are not non-blocking, and
    /// they wait for it.
    pub const DEFAULT: Self = Self(0);
}

/// Numbers of blocks and of threads in a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
}

/// The launch of a kernel whose only parameter is a structure, given by its words.
#[derive(Clone, Debug)]
pub struct Launch {
    pub function: Function,
    pub shape: Shape,
    pub params: Vec<u64>,
}

/// Rows of a plane in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows {
    pub address: Address,
    /// Bytes from one row to the next.
    pub stride: usize,
}

/// Rows of a plane in pinned memory of the host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostRows {
    /// Address of the first byte.
    pub start: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
}

/// One device. Methods may be called from any thread. The caller releases the handles that it gets.
pub trait Driver: Send + Sync {
    fn info(&self) -> &DeviceInfo;
    /// Returns the number of free bytes.
    fn free_memory(&self) -> Result<usize>;

    fn alloc(&self, bytes: usize) -> Result<Address>;
    fn free(&self, address: Address);
    /// Allocates pinned memory of the host, which the device accesses directly.
    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>>;
    /// # Safety
    /// `memory` is from [`Self::alloc_pinned`] and no longer in use.
    unsafe fn free_pinned(&self, memory: NonNull<u8>);

    fn stream(&self) -> Result<Stream>;
    fn destroy_stream(&self, stream: Stream);
    /// Returns `true` if all work in `stream` is complete.
    fn is_idle(&self, stream: Stream) -> Result<bool>;
    fn event(&self) -> Result<Event>;
    fn destroy_event(&self, event: Event);
    fn record(&self, event: Event, stream: Stream) -> Result<()>;
    /// Makes later work in `stream` wait for the last record of `event`.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;
    /// Returns `true` if the last record of `event` is reached, or if there is none.
    fn is_reached(&self, event: Event) -> Result<bool>;
    /// Returns the milliseconds between two events that are both reached.
    fn elapsed(&self, from: Event, to: Event) -> Result<f32>;

    /// Copies to the device in the order of `stream`. If the memory is not pinned, the call blocks
    /// until then.
    ///
    /// # Safety
    /// Until the copy is complete, the `bytes` at `from` are neither written nor freed, and those
    /// at `to` are allocated.
    unsafe fn upload(
        &self,
        to: Address,
        from: *const u8,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;
    /// Copies from the device in the order of `stream`. If the memory is not pinned, the call
    /// blocks until then.
    ///
    /// # Safety
    /// Until the copy is complete, the `bytes` at `to` are neither used nor freed, and those at
    /// `from` are allocated.
    unsafe fn download(
        &self,
        to: *mut u8,
        from: Address,
        bytes: usize,
        stream: Stream,
    ) -> Result<()>;

    /// Copies `rows` rows of `row` bytes within the device's memory in the order of `stream`.
    ///
    /// # Safety
    /// All rows are allocated and accessible from this device's context. Until the copy is
    /// complete, `from` is neither written nor freed, and `to` is neither used nor freed.
    unsafe fn copy(
        &self,
        to: Rows,
        from: Rows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()>;

    /// As [`Self::copy`], from pinned memory of the host.
    ///
    /// # Safety
    /// As [`Self::upload`], for all rows.
    unsafe fn upload_rows(
        &self,
        to: Rows,
        from: HostRows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()>;
    /// As [`Self::copy`], to pinned memory of the host.
    ///
    /// # Safety
    /// As [`Self::download`], for all rows.
    unsafe fn download_rows(
        &self,
        to: HostRows,
        from: Rows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()>;

    /// Loads a cubin, a fatbin, or PTX that ends in a zero byte.
    fn load(&self, image: &[u8]) -> Result<Module>;
    fn unload(&self, module: Module);
    fn function(&self, module: Module, name: &str) -> Result<Function>;
    /// Makes a graph of kernels that run one after the other, and uploads it in `stream`. The graph
    /// is built from nodes: capturing a stream would break synchronisation by other users of the
    /// context, which may be shared.
    ///
    /// # Safety
    /// Whenever the graph runs, the addresses in the launches' structures are allocated for all
    /// that the kernels read and write.
    unsafe fn graph(&self, launches: &[Launch], stream: Stream) -> Result<Graph>;
    fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()>;
    fn destroy_graph(&self, graph: Graph);

    /// Returns the time after which a wait fails.
    fn limit(&self) -> Duration {
        LIMIT
    }
    /// Gives the device up, which does not complete its work. Later calls fail at once. Nothing is
    /// released, because the driver would wait for the work.
    fn abandon(&self);

    /// Blocks until all work in `stream` is complete.
    ///
    /// # Errors
    /// Those of the device, and a time-out after [`Self::limit`], with which the device is lost.
    fn synchronize(&self, stream: Stream) -> Result<()> {
        poll(self, "cuStreamQuery", || self.is_idle(stream))
    }
    /// Blocks until the last record of `event` is reached. Returns at once if there is none.
    ///
    /// # Errors
    /// As [`Self::synchronize`].
    fn synchronize_event(&self, event: Event) -> Result<()> {
        poll(self, "cuEventQuery", || self.is_reached(event))
    }
}

/// Calls `is_done` until it returns `true`. The driver's own waits have no limit.
fn poll<D: Driver + ?Sized>(
    driver: &D,
    call: &'static str,
    is_done: impl Fn() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    while !is_done()? {
        let waited = start.elapsed();
        if waited > driver.limit() {
            driver.abandon();
            return Err(Fault {
                call,
                code: TIMEOUT,
                text: format!("no answer in {} s", driver.limit().as_secs_f32()),
            });
        }
        // Late by a small share of the wait.
        thread::sleep((waited / 16).clamp(NAP[0], NAP[1]));
    }
    Ok(())
}

impl fmt::Debug for dyn Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.info().fmt(f)
    }
}
