//! Limits of a device: what copies, matrix products and launches cost at least.

use std::sync::Arc;

use tadsr::{
    cuda::driver::{Address, Driver, Launch, Shape, Stream},
    engine::lite::cuda::Context,
};

use super::Result;

/// Bytes of a copy within the device and to it.
const COPIED: usize = 256 << 20;
/// Bytes of the array that fits in the L2 cache.
const CACHED: usize = 16 << 20;
/// Empty kernels in a graph.
const LAUNCHES: usize = 200;
const THREADS: u32 = 256;

/// Device with two streams and timing. Memory and handles are released with the process.
pub struct Rig {
    pub driver: Arc<dyn Driver>,
    streams: [Stream; 2],
}

impl Rig {
    pub fn new(context: &Context) -> Result<Self> {
        let driver = context.driver().clone();
        let streams = [driver.stream()?, driver.stream()?];
        Ok(Self { driver, streams })
    }

    /// Returns the lowest of several times of `work` in milliseconds.
    fn time(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let [begin, end] = [self.driver.event()?, self.driver.event()?];
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            self.driver.record(begin, self.streams[0])?;
            work()?;
            self.driver.record(end, self.streams[0])?;
            self.driver.synchronize_event(end)?;
            best = best.min(self.driver.elapsed(begin, end)?.into());
        }
        Ok(best)
    }

    /// Returns the lowest time of `count` consecutive launches of a kernel in a graph.
    pub fn launches(&self, launch: Launch, count: usize) -> Result<f64> {
        let launches = vec![launch; count];
        // SAFETY: the arrays of the launches are never freed.
        let graph = unsafe { self.driver.graph(&launches, self.streams[0])? };
        self.time(|| Ok(self.driver.launch_graph(graph, self.streams[0])?))
    }
}

/// Prints the limits. `image` has the kernels of `ceilings.cu`.
pub fn print(context: &Context, image: &[u8]) -> Result<()> {
    let rig = Rig::new(context)?;
    let driver = &rig.driver;
    let [to, from] = [driver.alloc(COPIED)?, driver.alloc(COPIED)?];
    println!("| limit | |\n|---|---|");

    let gb = |bytes: usize, ms: f64| bytes as f64 / ms / 1e6;
    let [up, down] = [driver.alloc_pinned(COPIED)?, driver.alloc_pinned(COPIED)?];
    let upload = || -> Result<()> {
        // SAFETY: both sides are as long and never freed.
        unsafe { driver.upload(to, up.as_ptr(), COPIED, rig.streams[0])? };
        Ok(())
    };
    let download = |stream: Stream| -> Result<()> {
        // SAFETY: as above.
        unsafe { driver.download(down.as_ptr(), from, COPIED, stream)? };
        Ok(())
    };
    let ms = rig.time(upload)?;
    println!("| upload, pinned memory | {:.1} GB/s |", gb(COPIED, ms));
    let ms = rig.time(|| download(rig.streams[0]))?;
    println!("| download, pinned memory | {:.1} GB/s |", gb(COPIED, ms));
    let downloaded = driver.event()?;
    let ms = rig.time(|| {
        download(rig.streams[1])?;
        driver.record(downloaded, rig.streams[1])?;
        upload()?;
        Ok(driver.wait(rig.streams[0], downloaded)?)
    })?;
    println!("| both at the same time | {:.1} GB/s |", gb(2 * COPIED, ms));
    driver.synchronize(rig.streams[1])?;

    let module = driver.load(image)?;
    let multiprocessors = driver.info().multiprocessors as u32;
    let launch = |name: &str, bytes: usize, repeats: u32, threads: u32| -> Result<_> {
        let (Address(to), Address(from)) = (to, from);
        let counts = (bytes / 16) as u64 | u64::from(repeats) << 32;
        Ok(Launch {
            function: driver.function(module, name)?,
            shape: Shape {
                grid: [8 * multiprocessors, 1, 1],
                block: [threads, 1, 1],
            },
            params: vec![to, from, counts],
        })
    };
    let threads = f64::from(8 * multiprocessors * THREADS);
    let one = rig.launches(launch("nothing", 0, 0, THREADS)?, 1)?;
    let many = rig.launches(launch("nothing", 0, 0, THREADS)?, LAUNCHES)?;
    let gap = (many - one) / (LAUNCHES - 1) as f64;
    println!("| empty kernel in a graph | {:.2} us |", 1e3 * gap);
    let ms = rig.launches(launch("copy", COPIED, 0, THREADS)?, 1)?;
    println!(
        "| copy in device memory, read and write | {:.0} GB/s |",
        gb(2 * COPIED, ms)
    );
    let repeats = 1 << 12;
    let ms = rig.launches(launch("read", CACHED, repeats, THREADS)?, 1)?;
    let bytes = 16.0 * f64::from(repeats) * threads;
    println!("| read from L2 | {:.0} GB/s |", bytes / ms / 1e6);
    let repeats = 1 << 14;
    let ms = rig.launches(launch("products", 0, repeats, THREADS)?, 1)?;
    let operations = 2.0 * (16 * 8 * 16 * 8) as f64 * f64::from(repeats) * threads / 32.0;
    println!(
        "| mma.sync m16n8k16, f16 | {:.0} TFLOP/s |",
        operations / ms / 1e9
    );
    match launch("group_products", 0, repeats, THREADS / 2) {
        Ok(launch) => {
            let ms = rig.launches(launch, 1)?;
            let groups = f64::from(8 * multiprocessors);
            let operations = 2.0 * (64 * 64 * 16 * 2) as f64 * f64::from(repeats) * groups;
            println!(
                "| wgmma m64n64k16, f16 | {:.0} TFLOP/s |",
                operations / ms / 1e9
            );
        }
        Err(_) => println!("| wgmma | not on this device |"),
    }
    Ok(())
}
