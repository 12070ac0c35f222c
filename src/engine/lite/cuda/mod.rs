//! The plan on a CUDA device, with nothing but the NVIDIA driver.
//!
//! The kernels are compiled beforehand for every generation since Turing (`scripts/kernels.sh`) and
//! embedded. What a frame goes through is made once as a graph; several frames may be in flight,
//! copied to and from the device while another one is computed.
//!
//! The arithmetic is that of the CPU's plan but for f16 weights and feature maps, summed in f32.

mod check;
#[cfg(any(test, feature = "emulator"))]
pub mod emulated;
mod engine;
mod params;
mod plan;
mod program;

use std::{
    collections::{BTreeMap, VecDeque},
    ffi::c_void,
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError, Weak},
};

pub use engine::CudaEngine;
use plan::Plan;

use super::foreign;
#[cfg(any(test, feature = "emulator"))]
use crate::cuda::emulator;
use crate::{
    Error, Result,
    cuda::{
        DevicePlanes,
        driver::{self, Driver, Event, Fault, Function, Graph, Stream},
        owned::{Memory, Owned, Pinned},
    },
    engine::Times,
    frame::{FrameInfo, FrameMut, FrameRef},
    model::LiteModel,
};

/// Compiled kernels, aligned as the driver wants them.
#[repr(align(64))]
struct Image<T: ?Sized>(T);

macro_rules! image {
    ($name:literal) => {{
        static IMAGE: &Image<[u8]> = &Image(*include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/prebuilt/cuda/student.",
            $name
        )));
        IMAGE
    }};
}

/// Compute capability, major and minor.
type Capability = (u32, u32);

/// For chips of this compute capability and of the later ones with the same first number.
static IMAGES: [(Capability, &Image<[u8]>); 7] = [
    ((7, 5), image!("sm_75.cubin")),
    ((8, 0), image!("sm_80.cubin")),
    ((8, 6), image!("sm_86.cubin")),
    ((8, 9), image!("sm_89.cubin")),
    ((9, 0), image!("sm_90.cubin")),
    ((10, 0), image!("sm_100.cubin")),
    ((12, 0), image!("sm_120.cubin")),
];

/// PTX for all later chips, which the driver compiles when it loads it.
static PTX: &Image<[u8]> = image!("ptx");

/// The best kernels for a chip.
fn image((major, minor): Capability) -> &'static [u8] {
    let fits = IMAGES
        .iter()
        .rfind(|((m, least), _)| *m == major && *least <= minor);
    &fits.map_or(PTX, |(_, image)| *image).0
}

/// A device with the kernels loaded.
pub struct Context {
    driver: Arc<dyn Driver>,
    unpack: Function,
    /// For 16, 32 and 64 channels at once.
    convs: [Function; 3],
    pack: Function,
    /// Keeps the functions.
    _module: Owned<driver::Module>,
}

impl Context {
    /// Opens the device of that number. All who have it open share one context.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason when there is no driver, no such device, or one that is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        Self::shared(ordinal, 0, || driver::open(ordinal))
    }

    /// Opens the device of that number in a `CUcontext` of another library, so that its memory can be read and written
    /// here. `keep` is dropped when the last who has it open lets go: until then the context must live.
    ///
    /// # Safety
    /// `context` is a context of that device, and lives as long as `keep`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub unsafe fn within(
        ordinal: usize,
        context: NonNull<c_void>,
        keep: Box<dyn Send + Sync>,
    ) -> Result<Arc<Self>> {
        let handle = context.as_ptr() as usize;
        // SAFETY: as the caller promises.
        Self::shared(ordinal, handle, || unsafe {
            driver::within(ordinal, context, keep)
        })
    }

    /// The one that is open already, by the number of the device and the context's address, or a new one.
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
        let context = driver()
            .and_then(Self::new)
            .map_err(|e| Error::Device(format!("device 'cuda:{ordinal}' cannot be used: {e}")))?;
        open.retain(|_, context| context.strong_count() > 0);
        open.insert((ordinal, handle), Arc::downgrade(&context));
        Ok(context)
    }

    /// As [`Self::open`] with a context of its own, and kernels that the driver compiles for the device, as it does for chips that
    /// are newer than they are.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_compiled_there(ordinal: usize) -> Result<Arc<Self>> {
        Self::with(driver::open(ordinal)?, &[&PTX.0])
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is older than the kernels' oldest, or the driver refuses them.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Arc<Self>> {
        let machine_code = image(driver.info().capability);
        Self::with(driver, &[machine_code, &PTX.0])
    }

    /// With the first of `images` that the driver takes.
    fn with(driver: Arc<dyn Driver>, images: &[&[u8]]) -> Result<Arc<Self>> {
        let info = driver.info();
        let (major, minor) = info.capability;
        if info.capability < (7, 5) {
            return Err(Error::Device(format!(
                "{} has compute capability {major}.{minor}: 7.5 (Turing) or newer is needed",
                info.name
            )));
        }
        let mut loaded = Owned::module(&driver, images[0]);
        for image in &images[1..] {
            if !loaded.as_ref().is_err_and(Fault::other_chip) {
                break;
            }
            loaded = Owned::module(&driver, image);
        }
        let module = loaded?;
        let function = |name: &str| driver.function(*module, name);
        let convs = [
            function("tadsr_conv16")?,
            function("tadsr_conv32")?,
            function("tadsr_conv64")?,
        ];
        let (unpack, pack) = (function("tadsr_unpack")?, function("tadsr_pack")?);
        Ok(Arc::new(Self {
            unpack,
            convs,
            pack,
            _module: module,
            driver,
        }))
    }

    /// Runs `model` on two small frames, I420 and RGB, and compares the results with the CPU's: what a driver, a chip or a
    /// compiler does grossly wrong is found before frames that anybody sees.
    ///
    /// # Errors
    /// [`Error::Device`] when a sample differs by more than 2 of 255, or the device fails, [`Error::Memory`] when its memory
    /// is too small.
    pub fn check(self: &Arc<Self>, model: &LiteModel) -> Result<()> {
        check::check(self, model)
    }

    /// The device.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
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
    /// Whether frames stay on the device until they are received.
    resident: bool,
    upload: Owned<Stream>,
    compute: Owned<Stream>,
    download: Owned<Stream>,
    plan: Plan,
    /// What the graphs read and write.
    constants: Memory,
    maps: [Memory; 3],
    context: Arc<Context>,
}

/// What one frame in flight has for itself.
struct Flight {
    input: Pinned,
    output: Pinned,
    device_input: Memory,
    device_output: Memory,
    begun: Owned<Event>,
    uploaded: Owned<Event>,
    /// Its turn to be computed has come.
    computing: Owned<Event>,
    computed: Owned<Event>,
    /// Its turn to be downloaded has come.
    downloading: Owned<Event>,
    done: Owned<Event>,
    /// What others had put into the context before.
    others: Owned<Event>,
    graph: Option<Owned<Graph>>,
    /// Whether its copy to `output` is on its way.
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
            others: Owned::event(driver)?,
            graph: None,
            downloads: false,
        })
    }
}

impl Runner {
    /// Prepares `model` for frames `src` that become frames `dst`, which differ in size only, up to `depth` at a time
    /// (at least 1). Where the device has not enough memory for a frame at once, it is computed in bands of rows, with
    /// the same result.
    ///
    /// # Errors
    /// [`Error::Frame`] when a side is out of range, [`Error::Memory`] when even a small band does not fit, [`Error::Device`] when the device fails.
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
                Ok(engine) => return Ok(engine),
                // Bands take less of the device's memory, not of the host's.
                Err(fault) if fault.out_of_memory() && !fault.of_the_host() => {
                    plan = plan.smaller().ok_or(fault)?
                }
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    /// With everything allocated and recorded.
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
        let mut engine = Self {
            src,
            dst,
            busy: VecDeque::new(),
            idle: (0..depth).collect(),
            flights: flights?,
            resident: false,
            upload: Owned::stream(driver)?,
            compute: Owned::stream(driver)?,
            download: Owned::stream(driver)?,
            constants: Owned::memory(driver, plan.constants.len())?,
            maps: [map()?, map()?, map()?],
            plan: plan.clone(),
            context: context.clone(),
        };
        engine.fill()?;
        engine.record()?;
        Ok(engine)
    }

    /// Copies weights and tables to the device.
    fn fill(&mut self) -> Result<(), Fault> {
        let driver = &self.context.driver;
        let mut staged = Pinned::new(driver, self.plan.constants.len())?;
        staged.bytes_mut().copy_from_slice(&self.plan.constants);
        // SAFETY: both are as long as the constants, and the copy ends before `staged` does: were the wait to fail, the
        // device would be gone.
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

    /// Makes the graph of each frame in flight.
    fn record(&mut self) -> Result<(), Fault> {
        let driver = &self.context.driver;
        for flight in &mut self.flights {
            let place = program::Place {
                constants: *self.constants,
                maps: [*self.maps[0], *self.maps[1], *self.maps[2]],
                input: *flight.device_input,
                output: *flight.device_output,
            };
            let launches: Vec<_> = program::launches(&self.plan, &place)
                .into_iter()
                .map(|launch| driver::Launch {
                    function: launch.kernel.function(&self.context),
                    shape: launch.shape,
                    params: launch.params,
                })
                .collect();
            // SAFETY: the parameters are of the kernels' types, made for these allocations, which outlive the graph.
            let graph = unsafe { driver.graph(&launches, *self.compute) }?;
            flight.graph = Some(Owned::graph(driver, graph));
        }
        Ok(())
    }

    /// Returns `true` for frames `src` that become frames `dst`.
    pub fn fits(&self, src: &FrameInfo, dst: &FrameInfo) -> bool {
        self.src == *src && self.dst == *dst
    }

    /// Frames that may be in flight at a time.
    pub fn depth(&self) -> usize {
        self.flights.len()
    }

    /// Frames in flight.
    pub fn in_flight(&self) -> usize {
        self.busy.len()
    }

    /// Bands of rows that a frame is computed in.
    pub fn bands(&self) -> usize {
        self.plan.bands().count()
    }

    /// Bytes of the device's memory that are in use.
    pub fn memory(&self) -> usize {
        let flight = self.plan.input.bytes + self.plan.output.bytes;
        self.plan.constants.len() + 3 * self.plan.map_bytes() + self.flights.len() * flight
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual.
    ///
    /// # Errors
    /// As [`Self::submit`] and [`Self::receive`]; [`Error::Setting`] while frames are in flight.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        if *dst.info() != self.dst {
            return Err(foreign());
        }
        if !self.busy.is_empty() {
            return Err(Error::Setting("frames are still in flight".into()));
        }
        self.submit(src, strength)?;
        self.receive(dst)?;
        Ok(())
    }

    /// Sends a frame on its way; its samples are copied before this returns.
    ///
    /// # Errors
    /// [`Error::Frame`] when it is not of the kind and size that the plan is for, [`Error::Setting`] when as many
    /// frames are in flight as may be, [`Error::Device`] or [`Error::Memory`] when the device fails; then no frame is in
    /// flight any more.
    pub fn submit(&mut self, src: &FrameRef, strength: f32) -> Result<()> {
        let index = self.take(src.info())?;
        let input = &mut self.flights[index].input;
        self.plan.fill_strength(strength, input.bytes_mut());
        self.plan.fill_input(src, input.bytes_mut());
        self.guard(|engine| engine.start(index, None))
    }

    /// As [`Self::submit`] for a frame `src` in the device's memory.
    ///
    /// # Safety
    /// `planes` are those of a frame `src`, allocated in the context that the engine is in, written already, and neither
    /// written nor freed until the frame is received or forgotten.
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
            return Err(foreign());
        }
        let index = self.take(src)?;
        let input = &mut self.flights[index].input;
        self.plan.fill_strength(strength, input.bytes_mut());
        self.guard(|engine| engine.start(index, Some(planes)))
    }

    /// Puts the next idle flight among the busy ones, for a frame `src`.
    fn take(&mut self, src: &FrameInfo) -> Result<usize> {
        if *src != self.src {
            return Err(foreign());
        }
        let Some(index) = self.idle.pop_front() else {
            return Err(Error::Setting(format!(
                "{} frames are in flight already",
                self.depth()
            )));
        };
        self.busy.push_back(index);
        Ok(index)
    }

    /// After a failure no frame is in flight any more.
    fn guard<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T> {
        call(self).map_err(|fault| {
            self.flush();
            fault.into()
        })
    }

    /// With `planes` of the device, or those that are in the flight's input.
    fn start(&mut self, index: usize, planes: Option<DevicePlanes>) -> Result<(), Fault> {
        if planes.is_some() {
            self.after_others(index, *self.upload)?;
        }
        let (driver, flight) = (&self.context.driver, &self.flights[index]);
        let (upload, compute) = (*self.upload, *self.compute);
        let input = &flight.input;
        let bytes = match planes {
            None => input.len(),
            Some(_) => self.plan.input.first(),
        };
        driver.record(*flight.begun, upload)?;
        // SAFETY: both sides are as long as the plan's input; the frame is in flight, so that nothing else uses them.
        unsafe { driver.upload(*flight.device_input, input.as_ptr(), bytes, upload)? };
        let own = self.plan.input.rows(*flight.device_input);
        for ((to, row, rows), &from) in own.zip(planes.unwrap_or_default()) {
            // SAFETY: the flight's memory holds the plan's planes, and the caller's is a frame of them.
            unsafe { driver.copy(to, from, row, rows, upload)? };
        }
        driver.record(*flight.uploaded, upload)?;
        driver.wait(compute, *flight.uploaded)?;
        driver.record(*flight.computing, compute)?;
        if let Some(graph) = &flight.graph {
            driver.launch_graph(**graph, compute)?;
        }
        driver.record(*flight.computed, compute)?;
        self.flights[index].downloads = false;
        match self.resident {
            true => Ok(()),
            false => self.fetch(index),
        }
    }

    /// Lets `stream` wait for what others have put into the context, who rely on its streams waiting for each other by
    /// default: a frame may be written still, or the one that lay in the same memory may be read. Ours do not.
    fn after_others(&self, index: usize, stream: Stream) -> Result<(), Fault> {
        let (driver, others) = (&self.context.driver, *self.flights[index].others);
        driver.record(others, Stream::DEFAULT)?;
        driver.wait(stream, others)
    }

    /// Lets the copy to the host follow, once.
    fn fetch(&mut self, index: usize) -> Result<(), Fault> {
        let (driver, flight) = (&self.context.driver, &mut self.flights[index]);
        if flight.downloads {
            return Ok(());
        }
        flight.downloads = true;
        let (output, download) = (&flight.output, *self.download);
        driver.wait(download, *flight.computed)?;
        driver.record(*flight.downloading, download)?;
        // SAFETY: both sides are as long as the plan's output; the frame is in flight, so that nothing else uses them.
        unsafe {
            driver.download(
                output.as_ptr(),
                *flight.device_output,
                output.len(),
                download,
            )?
        };
        driver.record(*flight.done, download)
    }

    /// Waits for the oldest frame in flight and copies it to `dst`.
    ///
    /// # Errors
    /// [`Error::Frame`] when `dst` is not of the kind and size that the plan is for, [`Error::Setting`] when no frame is
    /// in flight, [`Error::Device`] when the device fails; then no frame is in flight any more.
    pub fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        let index = self.oldest(dst.info())?;
        let times = self.guard(|engine| {
            engine.fetch(index)?;
            engine.finish(index)
        })?;
        self.plan
            .take_output(self.flights[index].output.bytes(), dst);
        self.release();
        Ok(times)
    }

    /// As [`Self::receive`] for a frame `dst` in the device's memory; it is complete when this returns.
    ///
    /// # Safety
    /// `planes` are those of a frame `dst`, allocated in the context that the engine is in, and used by nobody else.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub unsafe fn receive_device(
        &mut self,
        dst: &FrameInfo,
        planes: DevicePlanes,
    ) -> Result<Times> {
        if planes.len() != self.plan.output.planes() {
            return Err(foreign());
        }
        let index = self.oldest(dst)?;
        let times = self.guard(|engine| {
            let (driver, flight) = (&engine.context.driver, &engine.flights[index]);
            let stream = *engine.download;
            engine.after_others(index, stream)?;
            driver.wait(stream, *flight.computed)?;
            driver.record(*flight.downloading, stream)?;
            let own = engine.plan.output.rows(*flight.device_output);
            for ((from, row, rows), &to) in own.zip(planes) {
                // SAFETY: the flight's memory holds the plan's planes, and the caller's is a frame of them.
                unsafe { driver.copy(to, from, row, rows, stream)? };
            }
            driver.record(*flight.done, stream)?;
            engine.finish(index)
        })?;
        self.release();
        Ok(times)
    }

    /// The oldest frame in flight, which is to become a frame `dst`.
    fn oldest(&self, dst: &FrameInfo) -> Result<usize> {
        if *dst != self.dst {
            return Err(foreign());
        }
        let oldest = self.busy.front().copied();
        oldest.ok_or_else(|| Error::Setting("no frame is in flight".into()))
    }

    fn release(&mut self) {
        self.idle.extend(self.busy.pop_front());
    }

    fn finish(&self, index: usize) -> Result<Times, Fault> {
        let (driver, flight) = (&self.context.driver, &self.flights[index]);
        driver.synchronize_event(*flight.done)?;
        Ok(Times {
            upload: driver.elapsed(*flight.begun, *flight.uploaded)?,
            compute: driver.elapsed(*flight.computing, *flight.computed)?,
            download: driver.elapsed(*flight.downloading, *flight.done)?,
        })
    }

    /// Whether frames submitted from here on stay in the device's memory until they are received, for
    /// [`Self::receive_device`]; otherwise (the default) their copy to the host begins as soon as they are computed.
    pub fn set_resident(&mut self, resident: bool) {
        self.resident = resident;
    }

    /// Waits for the frames in flight and forgets them.
    pub fn flush(&mut self) {
        for stream in [*self.upload, *self.compute, *self.download] {
            // A device that fails here does nothing any more, and the next frame tells of it.
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
