//! A driver without a device, for tests. It fails where a test asks for it, and runs the kernels' own index arithmetic on memory
//! that knows its bounds; with `Fake::check_source` beside the kernels' source, which must make the same.
//!
//! What is put into a stream runs as late as the driver's promises allow: when somebody waits for it. A wait that is
//! missing so gives wrong pixels.

use std::{
    collections::{BTreeMap, VecDeque},
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use half::f16;

use crate::ops::cuda::Params;

use super::{
    driver::*,
    params::{Conv, Frame, NO_SLOT, Samples, Slot},
    program::{COLUMNS, ROWS},
};

/// Plain numbers that the kernels load and store.
trait Number: Copy {
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

/// The device's memory: allocations far apart, so that an address outside of one is in none. Fresh memory is full of
/// ones, which are NaN.
#[derive(Default)]
struct Ram(BTreeMap<u64, Vec<u8>>);

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

    fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        let (start, at) = self.find(address, len);
        &mut self.0.get_mut(&start).unwrap()[at..at + len]
    }

    fn get<T: Number>(&self, address: u64, index: usize) -> T {
        let size = size_of::<T>();
        let address = address + (index * size) as u64;
        assert!(address.is_multiple_of(size as u64), "misaligned");
        let (start, at) = self.find(address, size);
        T::from_bytes(&self.0[&start][at..at + size])
    }

    fn set<T: Number>(&mut self, address: u64, index: usize, value: T) {
        let size = size_of::<T>();
        let address = address + (index * size) as u64;
        assert!(address.is_multiple_of(size as u64), "misaligned");
        value.put(self.bytes(address, size));
    }
}

#[cfg(test)]
impl Ram {
    /// What the kernel's own source makes of this memory.
    fn made(&self, name: &str, shape: Shape, params: &[u64]) -> Self {
        let mut ram = Self(self.0.clone());
        let mut place = |address: &mut u64| {
            if *address != 0 {
                *address = ram.bytes(*address, 1).as_mut_ptr() as u64;
            }
        };
        let samples = |s: &mut Samples, place: &mut dyn FnMut(&mut u64)| {
            let fields = [
                &mut s.src,
                &mut s.x_starts,
                &mut s.x_weights,
                &mut s.y_starts,
                &mut s.y_weights,
            ];
            fields.into_iter().for_each(place);
        };
        let words = if name.starts_with("tadsr_conv") {
            let mut p = Conv::from_words(params);
            let fields = [
                &mut p.input,
                &mut p.weights,
                &mut p.bias,
                &mut p.skip,
                &mut p.output,
            ];
            fields.into_iter().for_each(place);
            p.words()
        } else {
            let mut f = Frame::from_words(params);
            for component in &mut f.components[..f.component_count as usize] {
                samples(&mut component.base, &mut place);
                place(&mut component.dst);
            }
            for source in &mut f.sources[..f.source_count as usize] {
                samples(&mut source.samples, &mut place);
            }
            let fields = [
                &mut f.x_starts,
                &mut f.x_weights,
                &mut f.y_starts,
                &mut f.y_weights,
                &mut f.mean,
                &mut f.inverse_std,
                &mut f.residual_std,
                &mut f.strength,
                &mut f.latent,
                &mut f.residual,
            ];
            fields.into_iter().for_each(place);
            f.words()
        };
        // SAFETY: the structure is the kernel's, and its pointers lead to `ram`.
        unsafe { crate::ops::cuda::host::launch(name, shape.grid, shape.block, &words) };
        ram
    }
}

#[derive(Clone)]
enum Op {
    Upload(u64, usize, usize),
    Download(usize, u64, usize),
    Copy(Rows, Rows, usize, usize),
    Launch(Function, Shape, Vec<u64>),
    Graph(u64),
    Record(u64, u64),
    Wait(u64, u64),
}

#[derive(Default)]
struct State {
    next: u64,
    ram: Ram,
    limit: usize,
    pinned: BTreeMap<usize, Box<[u64]>>,
    streams: BTreeMap<u64, VecDeque<Op>>,
    /// Of each event the stream of its last record, and how often it was recorded and reached.
    events: BTreeMap<u64, (u64, u64, u64)>,
    graphs: BTreeMap<u64, Vec<Op>>,
    modules: usize,
    names: Vec<String>,
    log: Vec<String>,
    fail: Option<(&'static str, usize, i32)>,
    spoilt: bool,
    guests: bool,
    #[cfg(test)]
    checked: bool,
}

/// Where memory of the process begins, above all of the device's.
const GUESTS: u64 = 1 << 44;

impl State {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn push(&mut self, stream: Stream, op: Op) {
        self.streams.get_mut(&stream.0).unwrap().push_back(op);
    }

    /// Runs a stream until it is empty, or `until` was reached.
    fn drain(&mut self, stream: u64, until: Option<(u64, u64)>) {
        while until.is_none_or(|(event, count)| self.events[&event].2 < count) {
            let Some(op) = self.streams.get_mut(&stream).unwrap().pop_front() else {
                return assert!(until.is_none(), "an event that no one records");
            };
            self.run(op);
        }
    }

    /// Bytes of the device's memory, or of another library's.
    fn reach(&mut self, address: u64, len: usize) -> &mut [u8] {
        if self.guests && address >= GUESTS {
            // SAFETY: the engine promises that it is allocated and left alone until now.
            return unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) };
        }
        self.ram.bytes(address, len)
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Upload(to, from, len) => {
                // SAFETY: the engine promises that the memory is pinned and left alone until now.
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
            Op::Launch(function, shape, params) => {
                #[cfg(test)]
                let made = self.checked.then(|| {
                    let name = &self.names[function.0 as usize];
                    self.ram.made(name, shape, &params)
                });
                self.launch(function, shape, &params);
                #[cfg(test)]
                if let Some(made) = made {
                    assert!(made.0 == self.ram.0, "the source makes something else");
                }
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

impl State {
    fn launch(&mut self, function: Function, shape: Shape, params: &[u64]) {
        match self.names[function.0 as usize].as_str() {
            "tadsr_unpack" => unpack(&mut self.ram, shape, &Frame::from_words(params)),
            "tadsr_pack" => pack(&mut self.ram, shape, &Frame::from_words(params)),
            name => {
                let channels = name["tadsr_conv".len()..].parse().unwrap();
                let mut p = Conv::from_words(params);
                if self.spoilt {
                    p.slope = 0.0;
                }
                convolve(&mut self.ram, shape, &p, channels);
            }
        }
    }
}

/// The emulated driver.
pub struct Fake {
    info: DeviceInfo,
    state: Mutex<State>,
}

/// Emulated devices that [`super::Context::open`] finds, by their numbers.
static PLUGGED: Mutex<BTreeMap<usize, Arc<Fake>>> = Mutex::new(BTreeMap::new());

pub(super) fn plugged(ordinal: usize) -> Option<Arc<Fake>> {
    let plugged = PLUGGED.lock().unwrap_or_else(PoisonError::into_inner);
    plugged.get(&ordinal).cloned()
}

impl Fake {
    /// A device of compute capability `capability` with `memory` bytes. Each has a number of its own.
    pub fn new(capability: (u32, u32), memory: usize) -> Arc<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(1000);
        let info = DeviceInfo {
            ordinal: NEXT.fetch_add(1, Ordering::Relaxed),
            name: "a fake".into(),
            capability,
            memory,
        };
        let state = State {
            limit: memory,
            next: 1,
            streams: BTreeMap::from([(Stream::DEFAULT.0, VecDeque::new())]),
            ..State::default()
        };
        Arc::new(Self {
            info,
            state: Mutex::new(state),
        })
    }

    /// Makes this the device of its number, for this process.
    pub fn plug(self: &Arc<Self>) {
        let mut plugged = PLUGGED.lock().unwrap_or_else(PoisonError::into_inner);
        plugged.insert(self.info.ordinal, self.clone());
    }

    /// Makes the convolutions lose what is below 0: a device that computes wrongly.
    pub fn spoil(&self) {
        self.lock().spoilt = true;
    }

    /// Compares every launch with what the kernels' own source makes of the same memory.
    #[cfg(test)]
    pub fn check_source(&self) {
        self.lock().checked = true;
    }

    /// Lets copies within the device reach the process's own memory: what an emulated driver elsewhere in the process takes
    /// for the device's.
    pub fn admit_guests(&self) {
        self.lock().guests = true;
    }

    /// Makes the call of that name fail with `code`, after it has worked `after` times.
    pub fn fail(&self, call: &'static str, after: usize, code: i32) {
        self.lock().fail = Some((call, after, code));
    }

    pub fn recover(&self) {
        self.lock().fail = None;
    }

    /// The calls since the last time.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().log)
    }

    /// What was made and not released.
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
        let mut state = self.lock();
        state.log.push(call.into());
        match &mut state.fail {
            Some((name, after, code)) if *name == call => match after.checked_sub(1) {
                None => {
                    return Err(Fault {
                        call,
                        code: *code,
                        text: "as asked".into(),
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
        assert!(bytes > 0, "the driver refuses to allocate nothing");
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
        assert!(rest.is_some_and(|ops| ops.is_empty()), "destroyed at work");
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        let failed = self.call("synchronize").map(drop);
        // A failing device does nothing any more: what waits is gone.
        let mut state = self.lock();
        match &failed {
            Ok(()) => state.drain(stream.0, None),
            Err(_) => state.streams.get_mut(&stream.0).unwrap().clear(),
        }
        failed
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

    fn synchronize_event(&self, event: Event) -> Result<()> {
        let mut state = self.call("synchronize_event")?;
        let (stream, count, _) = state.events[&event.0];
        if count > 0 {
            state.drain(stream, Some((event.0, count)));
        }
        Ok(())
    }

    fn elapsed(&self, from: Event, to: Event) -> Result<f32> {
        let state = self.call("elapsed")?;
        for event in [from, to] {
            let (_, recorded, reached) = state.events[&event.0];
            assert!(
                recorded > 0 && recorded == reached,
                "an event that has not come"
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
}

// ---- The kernels of student.cu, thread by thread ----

fn sample_at(ram: &Ram, c: &Samples, x: usize, y: usize) -> f32 {
    let corner = c.src
        + u64::from(ram.get::<u32>(c.y_starts, y)) * u64::from(c.stride)
        + u64::from(ram.get::<u32>(c.x_starts, x)) * u64::from(c.step)
        + u64::from(c.offset);
    let (x_taps, y_taps) = (c.x_taps as usize, c.y_taps as usize);
    let mut sum = 0.0;
    for j in 0..y_taps {
        let mut line = 0.0;
        for i in 0..x_taps {
            let at = corner + (j * c.stride as usize + i * c.step as usize) as u64;
            let word = match c.bytes {
                2 => u32::from(ram.get::<u16>(at, 0)),
                _ => u32::from(ram.get::<u8>(at, 0)),
            };
            line +=
                ram.get::<f32>(c.x_weights, x * x_taps + i) * ((word >> c.shift) & c.mask) as f32;
        }
        sum += ram.get::<f32>(c.y_weights, y * y_taps + j) * line;
    }
    (sum - c.zero) / c.scale
}

/// Calls `thread(block, thread)` for each.
fn threads(shape: Shape, mut thread: impl FnMut([usize; 3], [usize; 3])) {
    let [gx, gy, gz] = shape.grid.map(|n| n as usize);
    let [bx, by, bz] = shape.block.map(|n| n as usize);
    for block in (0..gx * gy * gz).map(|i| [i % gx, i / gx % gy, i / gx / gy]) {
        (0..bx * by * bz).for_each(|i| thread(block, [i % bx, i / bx % by, i / bx / by]));
    }
}

fn unpack(ram: &mut Ram, shape: Shape, f: &Frame) {
    threads(shape, |block, thread| {
        let (channel, x, y) = (
            thread[0],
            block[0] * shape.block[1] as usize + thread[1],
            block[1],
        );
        if x >= f.latent_width as usize {
            return;
        }
        let mut value = 0.0;
        for (s, slot) in f.slots[..f.slot_count as usize].iter().enumerate() {
            let (first, r) = (slot.channel as usize, slot.r as usize);
            if channel < first || channel - first >= r * r {
                continue;
            }
            let k = channel - first;
            let sx = (x as i32 - f.margin as i32) * r as i32 + (k % r) as i32;
            let sy = (y as i32 + f.latent_top) * r as i32 + (k / r) as i32;
            let (px, py) = (
                sx.max(0).min(slot.width as i32 - 1),
                sy.max(0).min(slot.height as i32 - 1),
            );
            for source in &f.sources[..f.source_count as usize] {
                if source.slot == s as u32 {
                    value +=
                        source.weight * sample_at(ram, &source.samples, px as usize, py as usize);
                }
            }
            value =
                (value - ram.get::<f32>(f.mean, channel)) * ram.get::<f32>(f.inverse_std, channel);
            break;
        }
        let at = (y * f.latent_width as usize + x) * f.channels as usize + channel;
        ram.set(f.latent, at, f16::from_f32(value));
    });
}

fn residual_at(ram: &Ram, f: &Frame, slot: &Slot, x: usize, y: usize) -> f32 {
    let r = slot.r as usize;
    let channel = slot.channel as usize + y % r * r + x % r;
    let row = usize::try_from((y / r) as i32 - f.residual_top).expect("a row above the residual");
    let column = x / r + f.residual_margin as usize;
    assert!(column < f.residual_width as usize);
    let at = (row * f.residual_width as usize + column) * f.channels as usize + channel;
    ram.get::<f32>(f.residual_std, channel) * ram.get::<f16>(f.residual, at).to_f32()
}

fn pack(ram: &mut Ram, shape: Shape, f: &Frame) {
    threads(shape, |block, thread| {
        let c = &f.components[block[2]];
        let (x, y) = (
            block[0] * shape.block[0] as usize + thread[0],
            c.top as usize + block[1],
        );
        if x >= c.width as usize || block[1] >= c.rows as usize {
            return;
        }
        let mut value = sample_at(ram, &c.base, x, y);
        let strength = ram.get::<f32>(f.strength, 0);
        if c.slot != NO_SLOT && strength > 0.0 {
            value += strength * residual_at(ram, f, &f.slots[c.slot as usize], x, y);
        }
        for which in 0..2 {
            if c.gains[which] == 0.0 || strength <= 0.0 {
                continue;
            }
            let mut sum = 0.0;
            let (x_taps, y_taps) = (f.x_taps as usize, f.y_taps as usize);
            for (j, i) in (0..y_taps).flat_map(|j| (0..x_taps).map(move |i| (j, i))) {
                let at = |starts, n| ram.get::<u32>(starts, n) as usize;
                sum += ram.get::<f32>(f.y_weights, y * y_taps + j)
                    * ram.get::<f32>(f.x_weights, x * x_taps + i)
                    * residual_at(
                        ram,
                        f,
                        &f.slots[1 + which],
                        at(f.x_starts, x) + i,
                        at(f.y_starts, y) + j,
                    );
            }
            value += strength * c.gains[which] * sum;
        }
        let base = &c.base;
        let code = (value * base.scale + base.zero)
            .max(0.0)
            .min(base.mask as f32);
        let word = (code.round_ties_even() as u32) << base.shift;
        let pixel = c.dst + (y * c.stride as usize + x * base.step as usize) as u64;
        match base.bytes {
            2 => ram.set(pixel + u64::from(base.offset), 0, word as u16),
            _ => ram.set(pixel + u64::from(base.offset), 0, word as u8),
        }
        if f.opaque != 0 && block[2] == 0 {
            ram.set(pixel, 3, 255u8);
        }
    });
}

const WIDTH: usize = COLUMNS + 2;
const STEP: usize = 24;

/// Two halves of shared memory.
fn pair_at(shared: &[f32], at: usize) -> [f32; 2] {
    [shared[at], shared[at + 1]]
}

/// `mma.m16n8k16` by the fragments' layouts in the PTX manual: lane l holds, with g = l / 4 and t = l % 4, of a the rows
/// g and g + 8 at columns 2t, 2t + 1 and those plus 8, of b column g at rows 2t, 2t + 1 and those plus 8, of d the rows g and
/// g + 8 at columns 2t, 2t + 1.
fn multiply(d: &mut [[f32; 4]; 32], a: &[[[f32; 2]; 4]; 32], b: &[[[f32; 2]; 2]; 32]) {
    let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        for e in 0..2 {
            left[g][2 * t + e] = a[lane][0][e];
            left[g + 8][2 * t + e] = a[lane][1][e];
            left[g][2 * t + 8 + e] = a[lane][2][e];
            left[g + 8][2 * t + 8 + e] = a[lane][3][e];
            right[2 * t + e][g] = b[lane][0][e];
            right[2 * t + 8 + e][g] = b[lane][1][e];
        }
    }
    for (lane, sums) in d.iter_mut().enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (i, sum) in sums.iter_mut().enumerate() {
            let (row, column) = (g + i / 2 * 8, 2 * t + i % 2);
            *sum += (0..16)
                .map(|k| left[row][k] * right[k][column])
                .sum::<f32>();
        }
    }
}

fn convolve(ram: &mut Ram, shape: Shape, p: &Conv, n: usize) {
    assert_eq!(shape.block, [32 * ROWS as u32, 1, 1]);
    let [gx, gy, gz] = shape.grid.map(|n| n as usize);
    for block in (0..gx * gy * gz).map(|i| [i % gx, i / gx % gy, i / gx / gy]) {
        convolve_block(ram, block, p, n);
    }
}

fn convolve_block(ram: &mut Ram, block: [usize; 3], p: &Conv, n: usize) {
    let [in_width, in_height, ci, co] = [p.in_width, p.in_height, p.ci, p.co].map(|n| n as usize);
    let (left, top, first) = (block[0] * COLUMNS, block[1] * ROWS, block[2] * n);
    let mut cells = vec![f32::NAN; (ROWS + 2) * WIDTH * STEP];
    let mut weights = vec![f32::NAN; 9 * n * STEP];
    let mut sums = vec![[[0.0; 4]; 32]; ROWS * 2 * (n / 8)];
    for chunk in 0..ci / 16 {
        for i in 0..(ROWS + 2) * WIDTH * 2 {
            let (cell, half) = (i / 2, i % 2 * 8);
            let (x, y) = (left + cell % WIDTH, top + cell / WIDTH);
            for e in 0..8 {
                let inside = x < in_width && y < in_height;
                let at = (y * in_width + x) * ci + chunk * 16 + half + e;
                cells[cell * STEP + half + e] = if inside {
                    ram.get::<f16>(p.input, at).to_f32()
                } else {
                    0.0
                };
            }
        }
        for i in 0..9 * n * 2 {
            let (row, half) = (i / 2, i % 2 * 8);
            let at = ((chunk * 9 + row / n) * co + first + row % n) * 16 + half;
            for e in 0..8 {
                weights[row * STEP + half + e] = ram.get::<f16>(p.weights, at + e).to_f32();
            }
        }
        for (warp, tap) in (0..ROWS).flat_map(|warp| (0..9).map(move |tap| (warp, tap))) {
            let (ky, kx) = (tap / 3, tap % 3);
            let a = [0, 1].map(|m| {
                std::array::from_fn(|lane| {
                    let (group, pair) = (lane / 4, lane % 4 * 2);
                    let at = ((warp + ky) * WIDTH + 16 * m + kx + group) * STEP + pair;
                    [at, at + 8 * STEP, at + 8, at + 8 * STEP + 8].map(|at| pair_at(&cells, at))
                })
            });
            for tile in 0..n / 8 {
                let b = std::array::from_fn(|lane| {
                    let (group, pair) = (lane / 4, lane % 4 * 2);
                    let at = ((3 * ky + kx) * n + 8 * tile + group) * STEP + pair;
                    [at, at + 8].map(|at| pair_at(&weights, at))
                });
                for (m, a) in a.iter().enumerate() {
                    multiply(&mut sums[(warp * 2 + m) * (n / 8) + tile], a, &b);
                }
            }
        }
    }
    store(ram, (left, top, first), p, n, &sums);
}

fn store(
    ram: &mut Ram,
    (left, top, first): (usize, usize, usize),
    p: &Conv,
    n: usize,
    sums: &[[[f32; 4]; 32]],
) {
    let (out_width, out_height, co) = (
        p.in_width as usize - 2,
        p.in_height as usize - 2,
        p.co as usize,
    );
    for (index, sums) in sums.iter().enumerate() {
        let (warp, m, tile) = (index / (n / 8) / 2, index / (n / 8) % 2, index % (n / 8));
        let y = top + warp;
        for (lane, i) in (0..32).flat_map(|lane| (0..4).map(move |i| (lane, i))) {
            let (group, pair) = (lane / 4, lane % 4 * 2);
            let x = left + 16 * m + i / 2 * 8 + group;
            if y >= out_height || x >= out_width {
                continue;
            }
            let channel = first + 8 * tile + pair + i % 2;
            let mut value = sums[lane][i] + ram.get::<f32>(p.bias, channel);
            value = if value > 0.0 { value } else { value * p.slope };
            if p.skip != 0 {
                let at = (y * p.skip_width as usize + x) * co + channel;
                value += ram.get::<f16>(p.skip, at).to_f32();
            }
            ram.set(
                p.output,
                (y * out_width + x) * co + channel,
                f16::from_f32(value),
            );
        }
    }
}
