//! Students on a CUDA device. Only the NVIDIA driver is needed.
//!
//! The kernels are embedded, compiled in advance for every generation since Turing
//! (`scripts/kernels.sh`). The launches for a frame are recorded once as a graph. Several frames
//! may be in flight, so that one is copied to or from the device while another is computed.
//!
//! The arithmetic is that of the CPU, with weights and feature maps in f16, summed in f32.

mod check;
#[cfg(any(test, feature = "emulator"))]
pub mod emulated;
mod engine;
mod params;
mod plan;
mod program;
#[cfg(any(test, feature = "emulator"))]
pub mod stages;
mod tiles;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, Weak},
};

pub use engine::CudaEngine;
use plan::Plan;
use program::Kernel;

use super::frame_mismatch;
#[cfg(any(test, feature = "emulator"))]
use crate::cuda::emulator;
use crate::{
    Error, Result,
    cuda::{
        DevicePlanes, ExternalContext, HostAllocator,
        driver::{self, Driver, Event, Fault, Function, Graph, HostRows, Rows, Stream},
        owned::{Memory, Owned, Pinned},
    },
    engine::Times,
    frame::{FrameInfo, FrameMut, FrameRef},
    model::LiteModel,
};

/// Compiled kernels, aligned as the driver requires.
#[repr(align(64))]
struct Binary<T: ?Sized>(T);

macro_rules! binary {
    ($name:literal) => {{
        static BINARY: &Binary<[u8]> = &Binary(*include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/prebuilt/cuda/student.",
            $name
        )));
        BINARY
    }};
}

/// Compute capability, major and minor.
type Capability = (u32, u32);

/// Machine code for devices of a compute capability, and of later ones with the same major number.
static CUBINS: [(Capability, &Binary<[u8]>); 7] = [
    ((7, 5), binary!("sm_75.cubin")),
    ((8, 0), binary!("sm_80.cubin")),
    ((8, 6), binary!("sm_86.cubin")),
    ((8, 9), binary!("sm_89.cubin")),
    ((9, 0), binary!("sm_90.cubin")),
    ((10, 0), binary!("sm_100.cubin")),
    ((12, 0), binary!("sm_120.cubin")),
];

/// Capabilities of Tegra devices, such as Jetson Orin and Thor. Machine code for other devices of
/// the same major number does not run on them.
const TEGRA: [Capability; 2] = [(8, 7), (10, 1)];

/// PTX for Tegra and all later devices, which the driver compiles when it loads it.
static PTX: &Binary<[u8]> = binary!("ptx");

/// Returns the best kernels for a device.
pub(crate) fn kernels((major, minor): Capability) -> &'static [u8] {
    if TEGRA.contains(&(major, minor)) {
        return &PTX.0;
    }
    let fits = CUBINS
        .iter()
        .rfind(|((m, min_minor), _)| *m == major && *min_minor <= minor);
    &fits.map_or(PTX, |(_, binary)| *binary).0
}

/// A device with the kernels loaded.
pub struct Context {
    driver: Arc<dyn Driver>,
    /// Kernels in the order of [`Kernel::ALL`].
    functions: Vec<Function>,
    /// Owner of the functions.
    _module: Owned<driver::Module>,
}

impl Context {
    /// Opens the device with the number `ordinal`. Calls for the same device share one context
    /// while it is in use.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason if there is no driver, no such device, or the device is
    /// too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        Self::shared(ordinal, 0, || driver::open(ordinal))
    }

    /// As [`Self::open`], in a context of another library, whose memory can then be read and
    /// written.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_in(external: ExternalContext) -> Result<Arc<Self>> {
        Self::shared(external.ordinal(), external.address(), || external.driver())
    }

    /// Returns the context in use for the device `ordinal` and the external context at the address
    /// `handle` (0 without one), or creates it.
    fn shared(
        ordinal: usize,
        handle: usize,
        driver: impl FnOnce() -> Result<Arc<dyn Driver>>,
    ) -> Result<Arc<Self>> {
        static OPEN: Mutex<BTreeMap<(usize, usize), Weak<Context>>> = Mutex::new(BTreeMap::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = open.get(&(ordinal, handle)).and_then(Weak::upgrade) {
            return Ok(context);
        }
        #[cfg(any(test, feature = "emulator"))]
        let driver = || match emulator::plugged(ordinal) {
            Some(fake) => Ok(fake as Arc<dyn Driver>),
            None => driver(),
        };
        let context = driver().and_then(Self::new).map_err(|e| {
            let text = format!("device 'cuda:{ordinal}' cannot be used: {e}");
            match e {
                Error::DeviceLost(_) => Error::DeviceLost(text),
                _ => Error::Device(text),
            }
        })?;
        open.retain(|_, context| context.strong_count() > 0);
        open.insert((ordinal, handle), Arc::downgrade(&context));
        Ok(context)
    }

    /// As [`Self::open`], with a context that is not shared and kernels that the driver compiles
    /// from PTX, as it does for devices newer than the machine code.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with_ptx(ordinal: usize) -> Result<Arc<Self>> {
        Self::with(driver::open(ordinal)?, &[&PTX.0])
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// [`Error::Device`] if the device is too old, or the driver refuses the kernels.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Arc<Self>> {
        let machine_code = kernels(driver.info().capability);
        Self::with(driver, &[machine_code, &PTX.0])
    }

    /// Loads the first of `binaries` that the driver accepts.
    fn with(driver: Arc<dyn Driver>, binaries: &[&[u8]]) -> Result<Arc<Self>> {
        let info = driver.info();
        let (major, minor) = info.capability;
        if info.capability < (7, 5) {
            return Err(Error::Device(format!(
                "{} has compute capability {major}.{minor}: 7.5 (Turing) or newer is needed",
                info.name
            )));
        }
        let mut loaded = Owned::module(&driver, binaries[0]);
        for binary in &binaries[1..] {
            if !loaded.as_ref().is_err_and(Fault::wrong_chip) {
                break;
            }
            loaded = Owned::module(&driver, binary);
        }
        let module = loaded?;
        let functions = Kernel::ALL.map(|kernel| driver.function(*module, kernel.name()));
        let functions: Result<_, Fault> = functions.into_iter().collect();
        Ok(Arc::new(Self {
            functions: functions?,
            _module: module,
            driver,
        }))
    }

    /// Runs `model` on small frames in RGB, NV12 and P010 and, twice, on an I420 frame that keeps
    /// the whole device busy, and compares the results with those of the CPU. This finds gross
    /// errors of a driver, a device or a compiler before the first frame.
    ///
    /// # Errors
    /// [`Error::Device`] if a sample differs by more than 2 codes of 8-bit video or between both
    /// runs, or the device fails, [`Error::Memory`] if its memory is too small.
    pub fn check(self: &Arc<Self>, model: &LiteModel) -> Result<()> {
        check::check(self, model)
    }

    /// Returns the driver of the device.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Returns an allocator of memory that the device accesses directly.
    pub fn host_allocator(&self) -> HostAllocator {
        HostAllocator::new(&self.driver)
    }
}

/// A model ready for frames of one kind and size, on one device.
pub struct Runner {
    src: FrameInfo,
    dst: FrameInfo,
    /// Frames in flight, oldest first.
    busy: VecDeque<usize>,
    idle: VecDeque<usize>,
    flights: Vec<Flight>,
    /// Frames stay on the device until they are received.
    resident: bool,
    /// The last frame was received in pinned memory, so the next is not downloaded earlier.
    receives_pinned: bool,
    upload: Owned<Stream>,
    compute: Owned<Stream>,
    download: Owned<Stream>,
    plan: Plan,
    /// Weights and tables.
    constants: Memory,
    /// Feature maps.
    maps: [Memory; 3],
    context: Arc<Context>,
}

/// Location of a frame that is submitted.
#[derive(Clone, Copy)]
enum Input<'a> {
    /// The flight's input.
    Staged,
    /// Pinned memory of the caller.
    Pinned(&'a [HostRows]),
    Device(DevicePlanes<'a>),
}

/// Buffers and events of one frame in flight.
struct Flight {
    input: Pinned,
    output: Pinned,
    device_input: Memory,
    device_output: Memory,
    begun: Owned<Event>,
    uploaded: Owned<Event>,
    /// Computation has begun.
    computing: Owned<Event>,
    computed: Owned<Event>,
    /// The download has begun.
    downloading: Owned<Event>,
    done: Owned<Event>,
    /// Earlier work of other libraries in the context is done.
    external: Owned<Event>,
    graph: Option<Owned<Graph>>,
    /// The copy to `output` was enqueued.
    downloads: bool,
}

impl Flight {
    fn new(driver: &Arc<dyn Driver>, plan: &Plan) -> Result<Self, Fault> {
        Ok(Self {
            input: Pinned::new(driver, plan.input.bytes)?,
            output: Pinned::new(driver, plan.output.bytes)?,
            device_input: Owned::memory(driver, plan.input.bytes)?,
            device_output: Owned::memory(driver, plan.output.bytes)?,
            begun: Owned::event(driver)?,
            uploaded: Owned::event(driver)?,
            computing: Owned::event(driver)?,
            computed: Owned::event(driver)?,
            downloading: Owned::event(driver)?,
            done: Owned::event(driver)?,
            external: Owned::event(driver)?,
            graph: None,
            downloads: false,
        })
    }
}

impl Runner {
    /// Prepares `model` for frames `src` that become frames `dst`, which differ in size only, with
    /// up to `depth` (at least 1) in flight. If the device lacks memory for a whole frame, frames
    /// are computed in bands of rows, with the same result.
    ///
    /// # Errors
    /// [`Error::Frame`] if a side is out of range, [`Error::Memory`] if even a small band does not
    /// fit, [`Error::Device`] if the device fails.
    pub fn new(
        context: &Arc<Context>,
        model: &LiteModel,
        src: FrameInfo,
        dst: FrameInfo,
        depth: usize,
    ) -> Result<Self> {
        let mut plan = Plan::new(model, &src, &dst)?;
        loop {
            match Self::build(context, &plan, (src, dst), depth.max(1)) {
                Ok(runner) => return Ok(runner),
                // Bands need less memory of the device, but not of the host.
                Err(fault) if fault.out_of_memory() && !fault.in_host_memory() => {
                    plan = plan.smaller().ok_or(fault)?
                }
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    /// Allocates all memory and records the graphs.
    fn build(
        context: &Arc<Context>,
        plan: &Plan,
        (src, dst): (FrameInfo, FrameInfo),
        depth: usize,
    ) -> Result<Self, Fault> {
        let driver = &context.driver;
        let map = || Owned::memory(driver, plan.map_bytes());
        let flights: Result<Vec<_>, Fault> =
            (0..depth).map(|_| Flight::new(driver, plan)).collect();
        let mut runner = Self {
            src,
            dst,
            busy: VecDeque::new(),
            idle: (0..depth).collect(),
            flights: flights?,
            resident: false,
            receives_pinned: false,
            upload: Owned::stream(driver)?,
            compute: Owned::stream(driver)?,
            download: Owned::stream(driver)?,
            constants: Owned::memory(driver, plan.constants.len())?,
            maps: [map()?, map()?, map()?],
            plan: plan.clone(),
            context: context.clone(),
        };
        runner.upload_constants()?;
        runner.record_graphs()?;
        Ok(runner)
    }

    /// Copies weights and tables to the device.
    fn upload_constants(&mut self) -> Result<(), Fault> {
        let driver = &self.context.driver;
        let mut staged = Pinned::new(driver, self.plan.constants.len())?;
        staged.bytes_mut().copy_from_slice(&self.plan.constants);
        // SAFETY: both are as long as the constants. The copy ends before `staged` is dropped: the
        // wait only fails if the device is lost.
        unsafe {
            driver.upload(
                *self.constants,
                staged.bytes().as_ptr(),
                staged.bytes().len(),
                *self.upload,
            )?;
        }
        driver.synchronize(*self.upload)
    }

    /// Records the graph of each flight.
    fn record_graphs(&mut self) -> Result<(), Fault> {
        let driver = &self.context.driver;
        for flight in &mut self.flights {
            let addresses = program::Addresses {
                constants: *self.constants,
                maps: [*self.maps[0], *self.maps[1], *self.maps[2]],
                input: *flight.device_input,
                output: *flight.device_output,
            };
            let launches: Vec<_> = program::launches(&self.plan, &addresses)
                .into_iter()
                .map(|launch| driver::Launch {
                    function: launch.kernel.function(&self.context),
                    shape: launch.shape,
                    params: launch.params,
                })
                .collect();
            // SAFETY: the parameters have the types of the kernels and address these allocations,
            // which outlive the graph.
            let graph = unsafe { driver.graph(&launches, *self.compute) }?;
            flight.graph = Some(Owned::graph(driver, graph));
        }
        Ok(())
    }

    /// Returns `true` for frames `src` that become frames `dst`.
    pub fn fits(&self, src: &FrameInfo, dst: &FrameInfo) -> bool {
        self.src == *src && self.dst == *dst
    }

    /// Returns the maximum number of frames in flight.
    pub fn depth(&self) -> usize {
        self.flights.len()
    }

    /// Returns the number of frames in flight.
    pub fn in_flight(&self) -> usize {
        self.busy.len()
    }

    /// Returns the number of bands of rows that a frame is computed in.
    pub fn bands(&self) -> usize {
        self.plan.bands().count()
    }

    /// Returns the device memory in use, in bytes.
    pub fn memory(&self) -> usize {
        let flight = self.plan.input.bytes + self.plan.output.bytes;
        self.plan.constants.len() + 3 * self.plan.map_bytes() + self.flights.len() * flight
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual.
    ///
    /// # Errors
    /// As [`Self::submit`] and [`Self::receive`], and [`Error::InFlight`] while frames are in
    /// flight.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        if *dst.info() != self.dst {
            return Err(frame_mismatch());
        }
        if !self.busy.is_empty() {
            return Err(Error::InFlight("frames are still in flight".into()));
        }
        self.receives_pinned = self.pinned_rows(dst).is_some();
        self.submit(src, strength)?;
        self.receive(dst)?;
        Ok(())
    }

    /// Submits a frame. Its samples are copied before this returns: to the device if they are in
    /// pinned memory of the device, otherwise to memory of the runner.
    ///
    /// # Errors
    /// [`Error::Frame`] if it is not of the kind and size prepared for, [`Error::InFlight`] if the
    /// maximum number of frames is in flight, [`Error::Device`], [`Error::DeviceLost`] or
    /// [`Error::Memory`] if the device fails; then no frame is in flight any more.
    pub fn submit(&mut self, src: &FrameRef, strength: f32) -> Result<()> {
        let index = self.begin(src.info())?;
        let input = &mut self.flights[index].input;
        self.plan.fill_strength(strength, input.bytes_mut());
        let planes = src.planes().iter().map(|plane| (plane.data, plane.stride));
        let Some(rows) = self.plan.input.host_rows(&self.context.driver, planes) else {
            self.plan.fill_input(src, input.bytes_mut());
            return self.flush_on_failure(|runner| runner.start(index, Input::Staged));
        };
        self.flush_on_failure(|runner| {
            runner.start(index, Input::Pinned(&rows))?;
            // The caller may change the frame when this returns.
            let uploaded = *runner.flights[index].uploaded;
            runner.context.driver.synchronize_event(uploaded)
        })
    }

    /// As [`Self::submit`], for a frame in device memory.
    ///
    /// # Safety
    /// `planes` hold a frame `src` in memory of the runner's context. Nothing writes or frees them
    /// until the frame is received or dropped.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub unsafe fn submit_device(
        &mut self,
        src: &FrameInfo,
        planes: DevicePlanes,
        strength: f32,
    ) -> Result<()> {
        if planes.len() != self.plan.input.planes() {
            return Err(frame_mismatch());
        }
        let index = self.begin(src)?;
        let input = &mut self.flights[index].input;
        self.plan.fill_strength(strength, input.bytes_mut());
        self.flush_on_failure(|runner| runner.start(index, Input::Device(planes)))
    }

    /// Moves the next idle flight to the busy ones, for a frame `src`. Returns its index.
    fn begin(&mut self, src: &FrameInfo) -> Result<usize> {
        if *src != self.src {
            return Err(frame_mismatch());
        }
        let Some(index) = self.idle.pop_front() else {
            return Err(Error::InFlight(format!(
                "{} frames are in flight already",
                self.depth()
            )));
        };
        self.busy.push_back(index);
        Ok(index)
    }

    /// Calls `call`. If it fails, drops the frames in flight.
    fn flush_on_failure<T>(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<T, Fault>,
    ) -> Result<T> {
        call(self).map_err(|fault| {
            self.flush();
            fault.into()
        })
    }

    /// Enqueues upload, computation and, unless it waits for [`Self::receive`], download of a
    /// flight.
    fn start(&mut self, index: usize, planes: Input) -> Result<(), Fault> {
        if matches!(planes, Input::Device(_)) {
            self.wait_for_external(index, *self.upload)?;
        }
        let (driver, flight) = (&self.context.driver, &self.flights[index]);
        let (upload, compute) = (*self.upload, *self.compute);
        let input = &flight.input;
        let bytes = match planes {
            Input::Staged => input.len(),
            Input::Pinned(_) | Input::Device(_) => self.plan.input.start(),
        };
        driver.record(*flight.begun, upload)?;
        // SAFETY: both sides are as long as the plan's input, and nothing else uses the buffers of
        // a frame in flight.
        unsafe { driver.upload(*flight.device_input, input.as_ptr(), bytes, upload)? };
        let own = self.plan.input.rows(*flight.device_input);
        for (plane, (to, row, rows)) in own.enumerate() {
            // SAFETY: both sides hold the planes of such a frame. The caller of this function waits
            // for copies from pinned memory, or for those of a failed device.
            unsafe {
                match planes {
                    Input::Staged => {}
                    Input::Pinned(from) => {
                        driver.upload_rows(to, from[plane], row, rows, upload)?
                    }
                    Input::Device(from) => driver.copy(to, from[plane], row, rows, upload)?,
                }
            }
        }
        driver.record(*flight.uploaded, upload)?;
        driver.wait(compute, *flight.uploaded)?;
        driver.record(*flight.computing, compute)?;
        if let Some(graph) = &flight.graph {
            driver.launch_graph(**graph, compute)?;
        }
        driver.record(*flight.computed, compute)?;
        self.flights[index].downloads = false;
        if self.resident || self.receives_pinned {
            Ok(())
        } else {
            self.start_download(index)
        }
    }

    /// Makes `stream` wait for the work that other libraries have enqueued in the context: they may
    /// still write the frame, or read the previous one in the same memory. By default, streams of a
    /// context wait for its default stream; those of the runner do not.
    fn wait_for_external(&self, index: usize, stream: Stream) -> Result<(), Fault> {
        let (driver, external) = (&self.context.driver, *self.flights[index].external);
        driver.record(external, Stream::DEFAULT)?;
        driver.wait(stream, external)
    }

    /// Enqueues the copy to the host, once.
    fn start_download(&mut self, index: usize) -> Result<(), Fault> {
        let (driver, flight) = (&self.context.driver, &mut self.flights[index]);
        if flight.downloads {
            return Ok(());
        }
        flight.downloads = true;
        let (output, stream) = (&flight.output, *self.download);
        driver.wait(stream, *flight.computed)?;
        driver.record(*flight.downloading, stream)?;
        // SAFETY: both sides are as long as the plan's output, and nothing else uses the buffers of
        // a frame in flight.
        unsafe { driver.download(output.as_ptr(), *flight.device_output, output.len(), stream)? };
        driver.record(*flight.done, stream)
    }

    /// Waits for the oldest frame in flight and copies it to `dst`: straight from the device if
    /// `dst` is in pinned memory of the device, except for the first frames.
    ///
    /// # Errors
    /// [`Error::Frame`] if `dst` is not of the kind and size prepared for, [`Error::InFlight`] if
    /// no frame is in flight, [`Error::Device`] or [`Error::DeviceLost`] if the device fails; then
    /// no frame is in flight any more.
    pub fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        let index = self.oldest(dst.info())?;
        let pinned = self.pinned_rows(dst);
        self.receives_pinned = pinned.is_some();
        if let Some(rows) = pinned
            && !self.flights[index].downloads
        {
            let times = self.flush_on_failure(|runner| {
                let computed = *runner.flights[index].computed;
                // A device that does not complete its work has no copy to `dst` in progress.
                runner.context.driver.synchronize_event(computed)?;
                runner.copy_out(index, |driver, plane, (from, row, count), stream| {
                    // SAFETY: both sides hold the planes of such a frame, and `dst` is borrowed
                    // until the copies are complete.
                    unsafe { driver.download_rows(rows[plane], from, row, count, stream) }
                })
            })?;
            self.release();
            return Ok(times);
        }
        let times = self.flush_on_failure(|runner| {
            runner.start_download(index)?;
            runner.wait(index)
        })?;
        self.plan
            .take_output(self.flights[index].output.bytes(), dst);
        self.release();
        Ok(times)
    }

    /// As [`Self::receive`], for a frame in device memory. It is complete when this returns.
    ///
    /// # Safety
    /// `planes` hold a frame `dst` in memory of the runner's context, which nothing else uses.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub unsafe fn receive_device(
        &mut self,
        dst: &FrameInfo,
        planes: DevicePlanes,
    ) -> Result<Times> {
        if planes.len() != self.plan.output.planes() {
            return Err(frame_mismatch());
        }
        let index = self.oldest(dst)?;
        let times = self.flush_on_failure(|runner| {
            runner.wait_for_external(index, *runner.download)?;
            runner.copy_out(index, |driver, plane, (from, row, rows), stream| {
                // SAFETY: both sides hold the planes of such a frame.
                unsafe { driver.copy(planes[plane], from, row, rows, stream) }
            })
        })?;
        self.release();
        Ok(times)
    }

    /// Calls `copy` for each plane of a flight's output, with its rows, their bytes and their
    /// number, and waits for the copies. Returns the times of the flight.
    fn copy_out(
        &self,
        index: usize,
        copy: impl Fn(&dyn Driver, usize, (Rows, usize, usize), Stream) -> Result<(), Fault>,
    ) -> Result<Times, Fault> {
        let (driver, flight, stream) =
            (&*self.context.driver, &self.flights[index], *self.download);
        driver.wait(stream, *flight.computed)?;
        driver.record(*flight.downloading, stream)?;
        let own = self.plan.output.rows(*flight.device_output);
        for (plane, rows) in own.enumerate() {
            copy(driver, plane, rows, stream)?;
        }
        driver.record(*flight.done, stream)?;
        self.wait(index)
    }

    /// Returns the rows of a frame if all are in pinned memory of the device.
    fn pinned_rows(&self, dst: &FrameMut) -> Option<Vec<HostRows>> {
        let planes = dst
            .planes()
            .iter()
            .map(|plane| (&*plane.data, plane.stride));
        self.plan.output.host_rows(&self.context.driver, planes)
    }

    /// Returns the index of the oldest frame in flight, to be received as a frame `dst`.
    fn oldest(&self, dst: &FrameInfo) -> Result<usize> {
        if *dst != self.dst {
            return Err(frame_mismatch());
        }
        let oldest = self.busy.front().copied();
        oldest.ok_or_else(|| Error::InFlight("no frame is in flight".into()))
    }

    /// Moves the oldest flight to the idle ones.
    fn release(&mut self) {
        self.idle.extend(self.busy.pop_front());
    }

    /// Waits for a flight. Returns the times of its stages.
    fn wait(&self, index: usize) -> Result<Times, Fault> {
        let (driver, flight) = (&self.context.driver, &self.flights[index]);
        driver.synchronize_event(*flight.done)?;
        Ok(Times {
            upload: driver.elapsed(*flight.begun, *flight.uploaded)?,
            compute: driver.elapsed(*flight.computing, *flight.computed)?,
            download: driver.elapsed(*flight.downloading, *flight.done)?,
        })
    }

    /// Sets whether frames submitted from now on stay in device memory until they are received, for
    /// [`Self::receive_device`]. Otherwise, which is the default, their copy to the host begins as
    /// soon as they are computed.
    pub fn set_resident(&mut self, resident: bool) {
        self.resident = resident;
    }

    /// Waits for the frames in flight and drops them.
    pub fn flush(&mut self) {
        for stream in [*self.upload, *self.compute, *self.download] {
            // A device that fails here does no more work, and the next frame reports the failure.
            let _ = self.context.driver.synchronize(stream);
        }
        self.idle.extend(self.busy.drain(..));
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests;
