//! Candidates for kernels: difference from a reference, and times beside the kernels in use.

use std::sync::Arc;

use half::f16;
use tadsr::{
    cuda::driver::{Address, Driver, Function, Launch, Shape, Stream},
    engine::lite::cuda::Context,
};

use super::{Result, ceilings::Rig, students::noise};

const SLOPE: f32 = 0.1;

/// Launches in a graph whose time is measured.
const LAUNCHES: usize = 20;

/// A kernel of `candidates.cu`.
struct Candidate {
    name: &'static str,
    channels: usize,
    layers: usize,
    /// Columns and threads of a block.
    columns: usize,
    threads: u32,
    /// Kernel in use for such a layer.
    current: &'static str,
}

const CANDIDATES: [Candidate; 4] = [
    Candidate {
        name: "row16",
        channels: 16,
        layers: 1,
        columns: 128,
        threads: 128,
        current: "tadsr_conv16",
    },
    Candidate {
        name: "row32",
        channels: 32,
        layers: 1,
        columns: 64,
        threads: 128,
        current: "tadsr_conv32",
    },
    Candidate {
        name: "fused16",
        channels: 16,
        layers: 2,
        columns: 126,
        threads: 256,
        current: "tadsr_conv16",
    },
    Candidate {
        name: "group64",
        channels: 64,
        layers: 1,
        columns: 50,
        threads: 128,
        current: "tadsr_conv64",
    },
];

/// Width, height, and rows of a block: maps smaller than a block, rows alone, columns alone, odd
/// sizes, and strips longer than the rows in shared memory.
const SMALL: [[usize; 3]; 5] = [[1, 1, 2], [67, 1, 2], [1, 9, 4], [131, 7, 4], [261, 23, 16]];

/// As above: more blocks than a device runs at once, and long strips.
const LARGE: [[usize; 3]; 2] = [[960, 540, 4], [960, 540, 128]];

/// Width and height of maps whose time is measured: frames of 1920x1080 and 3840x2160 in cells of
/// 2x2 samples.
const TIMED: [[usize; 2]; 2] = [[960, 540], [1920, 1080]];

fn pair(low: usize, high: u32) -> u64 {
    low as u64 | u64::from(high) << 32
}

/// Memory of the device.
struct Memory {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl Memory {
    fn new<T: Copy>(driver: &Arc<dyn Driver>, values: &[T]) -> Result<Self> {
        let memory = Self {
            driver: driver.clone(),
            address: driver.alloc(size_of_val(values))?,
            bytes: size_of_val(values),
        };
        memory.write(values)?;
        Ok(memory)
    }

    fn write<T: Copy>(&self, values: &[T]) -> Result<()> {
        assert_eq!(self.bytes, size_of_val(values));
        let from = values.as_ptr().cast();
        // SAFETY: both sides are as long and live until the stream is synchronised.
        unsafe {
            self.driver
                .upload(self.address, from, self.bytes, Stream::DEFAULT)?
        };
        Ok(self.driver.synchronize(Stream::DEFAULT)?)
    }

    fn read(&self) -> Result<Vec<f16>> {
        let mut values = vec![f16::ZERO; self.bytes / size_of::<f16>()];
        let to = values.as_mut_ptr().cast();
        // SAFETY: as above.
        unsafe {
            self.driver
                .download(to, self.address, self.bytes, Stream::DEFAULT)?
        };
        self.driver.synchronize(Stream::DEFAULT)?;
        Ok(values)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.free(self.address);
    }
}

/// Maps and weights for a candidate.
struct Case<'a> {
    rig: &'a Rig,
    candidate: &'a Candidate,
    width: usize,
    height: usize,
    input: Memory,
    /// The input with a margin of one cell with zeros.
    padded: Memory,
    weights: Memory,
    bias: Memory,
    output: Memory,
}

impl<'a> Case<'a> {
    fn new(rig: &'a Rig, candidate: &'a Candidate, [width, height]: [usize; 2]) -> Result<Self> {
        let &Candidate {
            channels, layers, ..
        } = candidate;
        let driver = &rig.driver;
        let random = |len, scale: f32, seed| -> Vec<f16> {
            noise(len, seed).map(|v| f16::from_f32(v * scale)).collect()
        };
        let input = random(width * height * channels, 1.0, 1);
        let mut padded = vec![f16::ZERO; (width + 2) * (height + 2) * channels];
        for (y, row) in input.chunks(width * channels).enumerate() {
            let at = ((y + 1) * (width + 2) + 1) * channels;
            padded[at..at + row.len()].copy_from_slice(row);
        }
        let scale = (0.5 / channels as f32).sqrt();
        let weights = random(layers * 9 * channels * channels, scale, 2);
        let bias: Vec<f32> = noise(layers * channels, 3).map(|v| v * 0.5).collect();
        Ok(Self {
            rig,
            candidate,
            width,
            height,
            output: Memory::new(driver, &input)?,
            input: Memory::new(driver, &input)?,
            padded: Memory::new(driver, &padded)?,
            weights: Memory::new(driver, &weights)?,
            bias: Memory::new(driver, &bias)?,
        })
    }

    /// Parameters of the kernels in `candidates.cu`, for a layer and those after it.
    fn params(&self, input: &Memory, output: &Memory, rows: usize, layer: usize) -> Vec<u64> {
        let channels = self.candidate.channels;
        vec![
            input.address.0,
            self.weights.address.0 + (layer * 9 * channels * channels * size_of::<f16>()) as u64,
            self.bias.address.0 + (layer * channels * size_of::<f32>()) as u64,
            output.address.0,
            pair(self.width, self.height as u32),
            pair(rows, SLOPE.to_bits()),
        ]
    }

    fn candidate(&self, function: Function, rows: usize) -> Launch {
        let blocks = [
            self.width.div_ceil(self.candidate.columns),
            self.height.div_ceil(rows),
            1,
        ];
        Launch {
            function,
            shape: Shape {
                grid: blocks.map(|n| n as u32),
                block: [self.candidate.threads, 1, 1],
            },
            params: self.params(&self.input, &self.output, rows, 0),
        }
    }

    /// Returns the launch of the kernel in use. It computes one layer.
    fn current(&self, function: Function) -> Launch {
        let channels = self.candidate.channels;
        Launch {
            function,
            shape: Shape {
                grid: [
                    self.width.div_ceil(32) as u32,
                    self.height.div_ceil(8) as u32,
                    1,
                ],
                block: [256, 1, 1],
            },
            // `Conv` of student.cu.
            params: vec![
                self.padded.address.0,
                self.weights.address.0,
                self.bias.address.0,
                0,
                self.output.address.0,
                pair(self.width + 2, self.height as u32 + 2),
                pair(channels, channels as u32),
                pair(0, SLOPE.to_bits()),
            ],
        }
    }

    fn run(&self, launch: Launch) -> Result<()> {
        let driver = &self.rig.driver;
        // SAFETY: the arrays of the launch live until the stream is synchronised.
        let graph = unsafe { driver.graph(&[launch], Stream::DEFAULT)? };
        driver.launch_graph(graph, Stream::DEFAULT)?;
        driver.synchronize(Stream::DEFAULT)?;
        driver.destroy_graph(graph);
        Ok(())
    }

    /// Returns the result of the reference.
    fn wanted(&self, direct: Function) -> Result<Vec<f16>> {
        let (channels, driver) = (self.candidate.channels, &self.rig.driver);
        let columns = 256 / channels;
        let mut maps = vec![Memory::new(driver, &self.input.read()?)?];
        for layer in 0..self.candidate.layers {
            let output = Memory::new(driver, &vec![f16::NAN; self.width * self.height * channels])?;
            self.run(Launch {
                function: direct,
                shape: Shape {
                    grid: [self.width.div_ceil(columns) as u32, self.height as u32, 1],
                    block: [channels as u32, columns as u32, 1],
                },
                params: self.params(&maps[layer], &output, 0, layer),
            })?;
            maps.push(output);
        }
        maps[self.candidate.layers].read()
    }

    /// Runs a kernel and prints the difference from the reference. Returns true if it is within
    /// the limit.
    fn compare(&self, name: &str, launch: Launch, wanted: &[f16]) -> Result<bool> {
        // A result of an earlier kernel cannot pass for that of this one.
        self.output.write(&vec![f16::NAN; wanted.len()])?;
        self.run(launch)?;
        let found = self.output.read()?;
        // The order of additions in f32 changes sums of a few units by less than 2^-13. Such sums
        // may be rounded to adjacent values of f16, which differ by up to 2^-10 of the value. A few
        // values of the input of a second layer may be rounded differently.
        let sums = if self.candidate.layers > 1 { -9 } else { -13 };
        let far = |a: f16, b: f16| {
            let (a, b) = (a.to_f32(), b.to_f32());
            let limit = b.abs() * 2f32.powi(-10) + 2f32.powi(sums);
            // Also if a value is not a number.
            (a - b)
                .abs()
                .partial_cmp(&limit)
                .is_none_or(|order| order.is_gt())
        };
        let pairs = || found.iter().zip(wanted);
        let count = pairs().filter(|(a, b)| far(**a, **b)).count();
        let size = format!("{name}, {}x{}", self.width, self.height);
        let Some(at) = pairs().position(|(a, b)| far(*a, *b)) else {
            let differences = pairs().map(|(a, b)| (a.to_f32() - b.to_f32()).abs());
            println!(
                "{size}: a difference of {:.5}",
                differences.fold(0.0, f32::max)
            );
            return Ok(true);
        };
        let (cell, channel) = (at / self.candidate.channels, at % self.candidate.channels);
        println!(
            "{size}: {count} of {} values differ, first at column {}, row {}, channel {channel}: \
             {} instead of {}",
            wanted.len(),
            cell % self.width,
            cell / self.width,
            found[at],
            wanted[at]
        );
        Ok(false)
    }

    /// Returns the lowest time of a candidate in milliseconds, and the rows of its blocks.
    fn best(&self, function: Function) -> Result<(f64, usize)> {
        let columns = self.width.div_ceil(self.candidate.columns);
        let mut best = (f64::INFINITY, 0);
        // Blocks for each multiprocessor.
        for blocks in [1, 2, 4, 8, 16] {
            let strips = (blocks * self.rig.driver.info().multiprocessors / columns).max(1);
            let rows = self.height.div_ceil(strips).next_multiple_of(2);
            let time = self
                .rig
                .launches(self.candidate(function, rows), LAUNCHES)?;
            if time < best.0 {
                best = (time, rows);
            }
        }
        Ok((best.0 / LAUNCHES as f64, best.1))
    }
}

/// Prints differences and, if `is_timed`, times of the kernels in `image`. Returns true if all
/// results are right.
pub fn print(context: &Context, image: &[u8], is_timed: bool) -> Result<bool> {
    let rig = Rig::new(context)?;
    let driver = &rig.driver;
    if driver.info().capability < (8, 0) {
        println!("candidates: not on this device, they need compute capability 8.0");
        return Ok(true);
    }
    let module = driver.load(image)?;
    let direct = driver.function(module, "direct")?;
    let mut good = true;
    let mut right = Vec::new();
    let sizes = SMALL.iter().chain(if is_timed { &LARGE[..] } else { &[] });
    for candidate in &CANDIDATES {
        let name = candidate.name;
        let Ok(function) = driver.function(module, name) else {
            println!("{name}: not on this device");
            continue;
        };
        let current = context.kernel(candidate.current).ok_or("no such kernel")?;
        let mut agrees = true;
        for &[width, height, rows] in sizes.clone() {
            let case = Case::new(&rig, candidate, [width, height])?;
            let wanted = case.wanted(direct)?;
            agrees &= case.compare(name, case.candidate(function, rows), &wanted)?;
            if candidate.layers == 1 {
                good &= case.compare(candidate.current, case.current(current), &wanted)?;
            }
        }
        good &= agrees;
        if agrees {
            right.push((candidate, function, current));
        }
    }
    if !is_timed {
        return Ok(good);
    }
    println!(
        "\nLowest times of a launch in ms, with the number of rows of a block that gives it. The \
         kernel in use is launched once for each layer.\n\n\
         | kernel | layers | cells | rows | ms | TFLOP/s | in use | ms | TFLOP/s |\n\
         |---|---|---|---|---|---|---|---|---|"
    );
    for (candidate, function, current) in right {
        for [width, height] in TIMED {
            let case = Case::new(&rig, candidate, [width, height])?;
            let Candidate {
                name,
                channels,
                layers,
                current: used,
                ..
            } = candidate;
            let operations = (2 * 9 * channels * channels * layers * width * height) as f64;
            let (time, rows) = case.best(function)?;
            let usual = rig.launches(case.current(current), LAUNCHES * layers)? / LAUNCHES as f64;
            let rate = |ms: f64| operations / ms / 1e9;
            println!(
                "| {name} | {layers} | {width}x{height} | {rows} | {time:.4} | {:.1} | {used} \
                 | {usual:.4} | {:.1} |",
                rate(time),
                rate(usual)
            );
        }
    }
    Ok(good)
}
