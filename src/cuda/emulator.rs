//! A driver without a device, for tests. It fails on request and runs kernels on memory with bounds
//! checks.
//!
//! Work in a stream runs as late as the driver API allows, on a wait for it. So a missing wait
//! gives wrong results.

use std::{
    collections::{BTreeMap, VecDeque},
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use half::f16;

use super::driver::*;

/// Runs the kernel of a name on the device's memory, with its parameters as words.
pub type Kernels = fn(&mut Ram, &str, Shape, &[u64]);

/// Numbers that kernels load and store.
pub trait Number: Copy {
    fn from_bytes(bytes: &[u8]) -> Self;
    fn put(self, bytes: &mut [u8]);
}

macro_rules! numbers {
    ($($type:ty)*) => {$(
        impl Number for $type {
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().unwrap())
            }
            fn put(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

numbers!(u8 u16 u32 f32 f16);

/// The device's memory. Allocations are far apart, so an address outside of one is in no other.
/// Every bit of new memory is set, so that floats are NaN.
#[derive(Clone, Default, PartialEq)]
pub struct Ram(BTreeMap<u64, Vec<u8>>);

impl Ram {
    fn find(&self, address: u64, len: usize) -> (u64, usize) {
        let (&start, bytes) = self
            .0
            .range(..=address)
            .next_back()
            .expect("an address below all allocations");
        let at = (address - start) as usize;
        assert!(
            at + len <= bytes.len(),
            "{len} bytes at {at} of {}",
            bytes.len()
        );
        (start, at)
    }

    pub fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        let (start, at) = self.find(address, len);
        &mut self.0.get_mut(&start).unwrap()[at..at + len]
    }

    pub fn get<T: Number>(&self, address: u64, index: usize) -> T {
        let size = size_of::<T>();
        let address = address + (index * size) as u64;
        assert!(address.is_multiple_of(size as u64), "misaligned");
        let (start, at) = self.find(address, size);
        T::from_bytes(&self.0[&start][at..at + size])
    }

    pub fn set<T: Number>(&mut self, address: u64, index: usize, value: T) {
        let size = size_of::<T>();
        let address = address + (index * size) as u64;
        assert!(address.is_multiple_of(size as u64), "misaligned");
        value.put(self.bytes(address, size));
    }
}

#[derive(Clone)]
enum Op {
    Upload(u64, usize, usize),
    Download(usize, u64, usize),
    Copy(Rows, Rows, usize, usize),
    UploadRows(Rows, HostRows, usize, usize),
    DownloadRows(HostRows, Rows, usize, usize),
    Launch(Function, Shape, Vec<u64>),
    Graph(u64),
    Record(u64, u64),
    Wait(u64, u64),
}

struct State {
    kernels: Kernels,
    next: u64,
    ram: Ram,
    limit: usize,
    pinned: BTreeMap<usize, Box<[u64]>>,
    streams: BTreeMap<u64, VecDeque<Op>>,
    /// The stream of each event's last record, and the counts of its records and arrivals.
    events: BTreeMap<u64, (u64, u64, u64)>,
    graphs: BTreeMap<u64, Vec<Op>>,
    modules: usize,
    names: Vec<String>,
    log: Vec<String>,
    fail: Option<(&'static str, usize, i32)>,
    block: Option<(&'static str, Duration)>,
    /// Work does not end.
    hangs: bool,
    abandoned: bool,
    guests: bool,
}

/// Start of the process's memory, above the addresses of the device.
const GUESTS: u64 = 1 << 44;

impl State {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn push(&mut self, stream: Stream, op: Op) {
        self.streams.get_mut(&stream.0).unwrap().push_back(op);
    }

    /// Runs a stream until it is empty or the record `until` is reached.
    fn drain(&mut self, stream: u64, until: Option<(u64, u64)>) {
        while until.is_none_or(|(event, count)| self.events[&event].2 < count) {
            let Some(op) = self.streams.get_mut(&stream).unwrap().pop_front() else {
                return assert!(until.is_none(), "an event that is never recorded");
            };
            self.run(op);
        }
    }

    /// Returns bytes of the device or of the process.
    fn reach(&mut self, address: u64, len: usize) -> &mut [u8] {
        if self.guests && address >= GUESTS {
            // SAFETY: the engine ensures that it is allocated and unused until now.
            return unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) };
        }
        self.ram.bytes(address, len)
    }

    /// Returns bytes of pinned memory.
    fn pinned(&mut self, address: usize, len: usize) -> &mut [u8] {
        let (&start, memory) = self.pinned.range_mut(..=address).next_back().unwrap();
        let end = start + 8 * memory.len();
        assert!(address + len <= end, "memory that is not pinned");
        // SAFETY: within the allocation, which the engine ensures is unused until now.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Upload(to, from, len) => {
                // SAFETY: the engine ensures that the memory is pinned and unused until now.
                let from = unsafe { std::slice::from_raw_parts(from as *const u8, len) };
                self.ram.bytes(to, len).copy_from_slice(from);
            }
            Op::Download(to, from, len) => {
                // SAFETY: as above.
                let to = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) };
                to.copy_from_slice(self.ram.bytes(from, len));
            }
            Op::Copy(to, from, row, rows) => {
                for y in 0..rows {
                    let at = |rows: Rows| rows.address.0 + (y * rows.stride) as u64;
                    let line = self.reach(at(from), row).to_vec();
                    self.reach(at(to), row).copy_from_slice(&line);
                }
            }
            Op::UploadRows(to, from, row, rows) => {
                for y in 0..rows {
                    let line = self.pinned(from.start + y * from.stride, row).to_vec();
                    let to = to.address.0 + (y * to.stride) as u64;
                    self.ram.bytes(to, row).copy_from_slice(&line);
                }
            }
            Op::DownloadRows(to, from, row, rows) => {
                for y in 0..rows {
                    let from = from.address.0 + (y * from.stride) as u64;
                    let line = self.ram.bytes(from, row).to_vec();
                    self.pinned(to.start + y * to.stride, row)
                        .copy_from_slice(&line);
                }
            }
            Op::Launch(function, shape, params) => {
                let name = &self.names[function.0 as usize];
                (self.kernels)(&mut self.ram, name, shape, &params);
            }
            Op::Graph(graph) => self.graphs[&graph]
                .clone()
                .into_iter()
                .for_each(|op| self.run(op)),
            Op::Record(event, count) => self.events.get_mut(&event).unwrap().2 = count,
            Op::Wait(event, count) => self.drain(self.events[&event].0, Some((event, count))),
        }
    }
}

/// The emulated driver.
pub struct Fake {
    info: DeviceInfo,
    state: Mutex<State>,
}

/// Emulated devices that replace real ones, by number.
static PLUGGED: Mutex<BTreeMap<usize, Arc<Fake>>> = Mutex::new(BTreeMap::new());

pub(crate) fn plugged(ordinal: usize) -> Option<Arc<Fake>> {
    let plugged = PLUGGED.lock().unwrap_or_else(PoisonError::into_inner);
    plugged.get(&ordinal).cloned()
}

/// Returns the emulated devices that replace real ones.
pub(crate) fn all() -> Vec<DeviceInfo> {
    let plugged = PLUGGED.lock().unwrap_or_else(PoisonError::into_inner);
    plugged.values().map(|fake| fake.info.clone()).collect()
}

impl Fake {
    /// Makes a device of compute capability `capability` with `memory` bytes, which runs `kernels`.
    /// Each device has its own number.
    pub fn new(kernels: Kernels, capability: (u32, u32), memory: usize) -> Arc<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(1000);
        let ordinal = NEXT.fetch_add(1, Ordering::Relaxed);
        let info = DeviceInfo {
            ordinal,
            name: "a fake".into(),
            capability,
            memory,
            multiprocessors: 1,
            uuid: (ordinal as u128).to_be_bytes(),
            version: 12000,
        };
        let state = State {
            kernels,
            next: 1,
            ram: Ram::default(),
            limit: memory,
            pinned: BTreeMap::new(),
            streams: BTreeMap::from([(Stream::DEFAULT.0, VecDeque::new())]),
            events: BTreeMap::new(),
            graphs: BTreeMap::new(),
            modules: 0,
            names: Vec::new(),
            log: Vec::new(),
            fail: None,
            block: None,
            hangs: false,
            abandoned: false,
            guests: false,
        };
        Arc::new(Self {
            info,
            state: Mutex::new(state),
        })
    }

    /// Sets the number of multiprocessors of a device that is not in use yet.
    pub fn with_multiprocessors(mut self: Arc<Self>, count: usize) -> Arc<Self> {
        let fake = Arc::get_mut(&mut self).expect("a device in use");
        fake.info.multiprocessors = count;
        self
    }

    /// Replaces the real device of this number in this process.
    pub fn plug(self: &Arc<Self>) {
        let mut plugged = PLUGGED.lock().unwrap_or_else(PoisonError::into_inner);
        plugged.insert(self.info.ordinal, self.clone());
    }

    /// Ends the effect of [`Self::plug`].
    pub fn unplug(&self) {
        let mut plugged = PLUGGED.lock().unwrap_or_else(PoisonError::into_inner);
        plugged.remove(&self.info.ordinal);
    }

    /// Replaces the kernels.
    pub fn set_kernels(&self, kernels: Kernels) {
        self.lock().kernels = kernels;
    }

    /// Lets copies within the device access the process's memory, which another emulated driver in
    /// the process uses as device memory.
    pub fn admit_guests(&self) {
        self.lock().guests = true;
    }

    /// Makes the call `call` fail with `code` after `after` successes.
    pub fn fail(&self, call: &'static str, after: usize, code: i32) {
        self.lock().fail = Some((call, after, code));
    }

    /// Makes the next call `call` block for `time`.
    pub fn block(&self, call: &'static str, time: Duration) {
        self.lock().block = Some((call, time));
    }

    /// Makes all work from now on never end.
    pub fn hang(&self) {
        self.lock().hangs = true;
    }

    /// Returns `true` if the device was given up.
    pub fn is_abandoned(&self) -> bool {
        self.lock().abandoned
    }

    pub fn recover(&self) {
        self.lock().fail = None;
    }

    /// Returns the calls since the previous `log`.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().log)
    }

    /// Returns the number of unreleased handles.
    pub fn alive(&self) -> usize {
        let s = self.lock();
        s.ram.0.len() + s.pinned.len() + s.streams.len() - 1
            + s.events.len()
            + s.graphs.len()
            + s.modules
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, call: &'static str) -> Result<MutexGuard<'_, State>> {
        let blocked = self.lock().block.take_if(|(name, _)| *name == call);
        if let Some((_, time)) = blocked {
            thread::sleep(time);
        }
        let mut state = self.lock();
        state.log.push(call.into());
        if state.abandoned {
            return Err(Fault {
                call,
                code: TIMEOUT,
                text: "given up".into(),
            });
        }
        match &mut state.fail {
            Some((name, after, code)) if *name == call => match after.checked_sub(1) {
                None => {
                    return Err(Fault {
                        call,
                        code: *code,
                        text: "requested by the test".into(),
                    });
                }
                Some(less) => *after = less,
            },
            _ => {}
        }
        Ok(state)
    }
}

impl Driver for Fake {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_memory(&self) -> Result<usize> {
        let state = self.call("free_memory")?;
        Ok(state.limit - state.ram.0.values().map(Vec::len).sum::<usize>())
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        assert!(bytes > 0, "the driver does not allocate 0 bytes");
        let mut state = self.call("alloc")?;
        if state.ram.0.values().map(Vec::len).sum::<usize>() + bytes > state.limit {
            return Err(Fault {
                call: "alloc",
                code: OUT_OF_MEMORY,
                text: "full".into(),
            });
        }
        let address = state.id() << 32;
        state.ram.0.insert(address, vec![0xff; bytes]);
        Ok(Address(address))
    }

    fn free(&self, address: Address) {
        assert!(
            self.lock().ram.0.remove(&address.0).is_some(),
            "freed twice"
        );
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        let mut memory = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        let start = NonNull::new(memory.as_mut_ptr().cast()).unwrap();
        self.call(HOST_ALLOC)?
            .pinned
            .insert(start.as_ptr() as usize, memory);
        Ok(start)
    }

    unsafe fn free_pinned(&self, memory: NonNull<u8>) {
        assert!(
            self.lock()
                .pinned
                .remove(&(memory.as_ptr() as usize))
                .is_some(),
            "freed twice"
        );
    }

    fn stream(&self) -> Result<Stream> {
        let mut state = self.call("stream")?;
        let id = state.id();
        state.streams.insert(id, VecDeque::new());
        Ok(Stream(id))
    }

    fn destroy_stream(&self, stream: Stream) {
        let rest = self.lock().streams.remove(&stream.0);
        assert!(
            rest.is_some_and(|ops| ops.is_empty()),
            "destroyed with work left"
        );
    }

    fn is_idle(&self, stream: Stream) -> Result<bool> {
        let failed = self.call("synchronize").map(drop);
        let mut state = self.lock();
        if state.hangs {
            return Ok(state.streams[&stream.0].is_empty());
        }
        // A failed device drops the work that is left.
        match failed {
            Ok(()) => state.drain(stream.0, None),
            Err(_) => state.streams.get_mut(&stream.0).unwrap().clear(),
        }
        failed.map(|()| true)
    }

    fn event(&self) -> Result<Event> {
        let mut state = self.call("event")?;
        let id = state.id();
        state.events.insert(id, (0, 0, 0));
        Ok(Event(id))
    }

    fn destroy_event(&self, event: Event) {
        assert!(
            self.lock().events.remove(&event.0).is_some(),
            "destroyed twice"
        );
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        let mut state = self.call("record")?;
        let entry = state.events.get_mut(&event.0).unwrap();
        entry.0 = stream.0;
        entry.1 += 1;
        let count = entry.1;
        state.push(stream, Op::Record(event.0, count));
        Ok(())
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        let mut state = self.call("wait")?;
        let count = state.events[&event.0].1;
        state.push(stream, Op::Wait(event.0, count));
        Ok(())
    }

    fn is_reached(&self, event: Event) -> Result<bool> {
        let mut state = self.call("synchronize_event")?;
        let (stream, count, reached) = state.events[&event.0];
        if state.hangs {
            return Ok(count == reached);
        }
        if count > 0 {
            state.drain(stream, Some((event.0, count)));
        }
        Ok(true)
    }

    fn elapsed(&self, from: Event, to: Event) -> Result<f32> {
        let state = self.call("elapsed")?;
        for event in [from, to] {
            let (_, recorded, reached) = state.events[&event.0];
            assert!(
                recorded > 0 && recorded == reached,
                "an event that is not reached"
            );
        }
        Ok(1.0)
    }

    unsafe fn upload(
        &self,
        to: Address,
        from: *const u8,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        self.call("upload")?
            .push(stream, Op::Upload(to.0, from as usize, bytes));
        Ok(())
    }

    unsafe fn download(
        &self,
        to: *mut u8,
        from: Address,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        self.call("download")?
            .push(stream, Op::Download(to as usize, from.0, bytes));
        Ok(())
    }

    unsafe fn copy(
        &self,
        to: Rows,
        from: Rows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()> {
        assert!(row <= to.stride && row <= from.stride);
        self.call("copy")?
            .push(stream, Op::Copy(to, from, row, rows));
        Ok(())
    }

    unsafe fn upload_rows(
        &self,
        to: Rows,
        from: HostRows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()> {
        assert!(row <= to.stride && row <= from.stride);
        self.call("upload_rows")?
            .push(stream, Op::UploadRows(to, from, row, rows));
        Ok(())
    }

    unsafe fn download_rows(
        &self,
        to: HostRows,
        from: Rows,
        row: usize,
        rows: usize,
        stream: Stream,
    ) -> Result<()> {
        assert!(row <= to.stride && row <= from.stride);
        self.call("download_rows")?
            .push(stream, Op::DownloadRows(to, from, row, rows));
        Ok(())
    }

    fn load(&self, image: &[u8]) -> Result<Module> {
        assert!(image.as_ptr().addr().is_multiple_of(8));
        self.call("load")?.modules += 1;
        Ok(Module(1))
    }

    fn unload(&self, _module: Module) {
        self.lock().modules -= 1;
    }

    fn function(&self, _module: Module, name: &str) -> Result<Function> {
        let mut state = self.call("function")?;
        state.names.push(name.into());
        Ok(Function(state.names.len() as u64 - 1))
    }

    unsafe fn graph(&self, launches: &[Launch], stream: Stream) -> Result<Graph> {
        let mut state = self.call("graph")?;
        assert!(state.streams.contains_key(&stream.0));
        let launches = launches.iter().map(|launch| {
            let Shape {
                grid: [gx, gy, gz],
                block: [bx, by, bz],
            } = launch.shape;
            let grid = gx > 0 && (1..65536).contains(&gy) && (1..65536).contains(&gz);
            let block = bz == 1 && (1..=1024).contains(&(bx * by));
            assert!(grid && block, "{:?}", launch.shape);
            Op::Launch(launch.function, launch.shape, launch.params.clone())
        });
        let ops = launches.collect();
        let id = state.id();
        state.graphs.insert(id, ops);
        Ok(Graph(id))
    }

    fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()> {
        self.call("launch_graph")?.push(stream, Op::Graph(graph.0));
        Ok(())
    }

    fn destroy_graph(&self, graph: Graph) {
        assert!(
            self.lock().graphs.remove(&graph.0).is_some(),
            "destroyed twice"
        );
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(if self.lock().hangs { 20 } else { 20_000 })
    }

    fn abandon(&self) {
        let mut state = self.lock();
        state.abandoned = true;
        state.streams.values_mut().for_each(VecDeque::clear);
    }
}
