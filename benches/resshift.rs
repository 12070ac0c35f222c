//! One step of the real-world ResShift model, 64x64 to 256x256 pixels: time by stage, and memory.
//!
//! `cargo bench --bench resshift [-- --threads N] [--json] [--weights FILE] [--steps N] [--side N]
//! [--device cuda] [--cpu]`. The weights are random, or those of FILE. On a CUDA device feature
//! maps are f16. `--cpu` measures the processor time of all threads (Linux), which depends little
//! on other processes. `benches/peers/resshift.py` runs this and PyTorch in turn on the weights and
//! inputs of one file, and compares the results.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    str::FromStr,
    sync::Mutex,
    time::Instant,
};

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use serde_json::{Value, json};
use tadsr::{
    diffusion::Schedule,
    nn::resshift::{Autoencoder, ResShiftConfig, Unet, upsample_bicubic},
};

/// Reader of single tensors of a safetensors file, to avoid having the whole file in memory.
struct Weights {
    file: Mutex<File>,
    header: HashMap<String, Value>,
    data: u64,
}

impl Weights {
    fn open(path: &str) -> Result<Self> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header)?;
        Ok(Self {
            file: Mutex::new(file),
            header: serde_json::from_slice(&header).map_err(Error::wrap)?,
            data: 8 + length,
        })
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.header.get(name);
        let entry = entry.ok_or_else(|| Error::CannotFindTensor { path: name.into() }.bt())?;
        let numbers = |key: &str| -> Vec<usize> {
            let list = entry[key].as_array().into_iter().flatten();
            list.filter_map(|v| v.as_u64())
                .map(|v| v as usize)
                .collect()
        };
        let (shape, range) = (numbers("shape"), numbers("data_offsets"));
        let mut bytes = vec![0; range[1] - range[0]];
        let mut file = self.file.lock().expect("no thread has panicked");
        file.seek(SeekFrom::Start(self.data + range[0] as u64))?;
        file.read_exact(&mut bytes)?;
        Tensor::from_raw_buffer(&bytes, DType::F32, &shape, &Device::Cpu)
    }
}

impl SimpleBackend for &'static Weights {
    fn get(&self, s: Shape, name: &str, _: Init, _: DType, device: &Device) -> Result<Tensor> {
        self.tensor(name)?.reshape(s)?.to_device(device)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        self.tensor(name)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.header.contains_key(name)
    }
}

/// Random weights that preserve the size of the signal.
struct Random;

impl SimpleBackend for Random {
    fn get(&self, s: Shape, name: &str, _: Init, _: DType, dev: &Device) -> Result<Tensor> {
        match s.dims() {
            [n] if name.contains("norm") => Tensor::ones(*n, DType::F32, dev),
            [_] => Tensor::zeros(s, DType::F32, dev),
            dims => {
                let inputs: usize = dims[1..].iter().product();
                Tensor::randn(0f32, (1.0 / inputs as f32).sqrt(), s, dev)
            }
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("'{name}' without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

struct Networks {
    unet: Unet,
    autoencoder: Autoencoder,
    schedule: Schedule,
    device: Device,
}

impl Networks {
    fn new(weights: Option<&'static Weights>, device: &Device) -> Result<Self> {
        let config = ResShiftConfig::realsr_x4();
        let builder = |part: &str| match weights {
            None => VarBuilder::from_backend(Box::new(Random), DType::F32, device.clone()),
            Some(w) => VarBuilder::from_backend(Box::new(w), DType::F32, device.clone()).pp(part),
        };
        let mut unet = Unet::new(&config.unet, builder("unet"))?;
        unet.pack()?;
        let mut autoencoder = Autoencoder::new(&config.autoencoder, builder("autoencoder"))?;
        autoencoder.pack()?;
        if !device.is_cpu() {
            unet.set_dtype(DType::F16);
            autoencoder.set_dtype(DType::F16);
        }
        Ok(Self {
            device: device.clone(),
            unet,
            autoencoder,
            schedule: Schedule::new(&config.diffusion)?,
        })
    }

    /// Returns the name, the milliseconds by `clock` and the result of every stage.
    fn step(
        &self,
        lq: &Tensor,
        noise: &Tensor,
        clock: &dyn Fn() -> f64,
    ) -> Result<Vec<(&'static str, f64, Tensor)>> {
        let mut stages = Vec::new();
        let mut stage = |name, f: &dyn Fn() -> Result<Tensor>| {
            let start = clock();
            let result = f()?;
            self.device.synchronize()?;
            stages.push((name, clock() - start, result.clone()));
            Ok::<_, Error>(result)
        };
        let t = self.schedule.steps() - 1;
        let image = stage("bicubic", &|| upsample_bicubic(lq, 4))?;
        let z_y = stage("encode", &|| self.autoencoder.encode(&image))?;
        let z0 = stage("unet", &|| {
            let z = self.schedule.prior(&z_y, noise)?;
            let z = self.schedule.scale_input(&z, &[t])?;
            self.unet.forward(&z, &[t], Some(lq))
        })?;
        let quant = stage("quantize", &|| Ok(self.autoencoder.quantize(&z0)?.0))?;
        stage("decode", &|| self.autoencoder.decode(&quant, false))?;
        Ok(stages)
    }
}

/// Returns the processor time of the process in milliseconds, in units of 10 ms.
fn processor_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let times = fields.split_whitespace().skip(11).take(2);
    10.0 * times.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>()
}

/// Returns the value of `key` in `/proc/self/status`, converted from kB to MiB.
fn status(key: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with(key))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// Returns the norm of the difference over the norm.
fn distance(got: &Tensor, wanted: &Tensor) -> Result<f64> {
    let norm = |t: &Tensor| t.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>();
    Ok((norm(&(got - wanted)?)? / norm(wanted)?).sqrt())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().skip_while(|a| *a != name).nth(1);
    let number = |name: &str, default: usize| {
        let n = value(name).and_then(|n| n.parse().ok());
        n.unwrap_or(default)
    };
    let threads = number("--threads", 1);
    // SAFETY: no other thread runs yet.
    unsafe { tadsr::ops::use_threads(threads) }.expect("the first pool of the process");
    let weights = value("--weights").map(|p| Weights::open(p)).transpose()?;
    let weights: Option<&'static Weights> = weights.map(|w| &*Box::leak(Box::new(w)));
    let device = value("--device").map_or("cpu", String::as_str);
    let device = tadsr::Device::from_str(device).and_then(tadsr::train::device);
    let device = device.map_err(Error::wrap)?;
    let networks = Networks::new(weights, &device)?;
    let side = number("--side", 64);
    let input = |name: &str| match weights {
        Some(w) => w.tensor(name)?.permute((0, 2, 3, 1))?.contiguous(),
        None => Tensor::randn(0f32, 0.5, (1, side, side, 3), &Device::Cpu),
    };
    let input = |name: &str| input(name)?.to_device(&device);
    let (lq, noise) = (input("lq")?, input("noise")?);
    let before = status("VmRSS");
    let start = Instant::now();
    let clock: &dyn Fn() -> f64 = match args.iter().any(|a| a == "--cpu") {
        true => &processor_time,
        false => &|| start.elapsed().as_secs_f64() * 1e3,
    };
    let mut best: HashMap<&str, f64> = HashMap::new();
    let mut last = Vec::new();
    for _ in 0..number("--steps", 2) {
        last.clear();
        last = networks.step(&lq, &noise, clock)?;
        let total = last.iter().map(|s| s.1).sum();
        for (name, ms) in last.iter().map(|s| (s.0, s.1)).chain([("total", total)]) {
            let least = best.entry(name).or_insert(f64::INFINITY);
            *least = least.min(ms);
        }
    }
    let peak = status("VmHWM");
    let mut off = serde_json::Map::new();
    if let Some(w) = weights {
        for (name, _, got) in &last {
            let wanted = w.tensor(&format!("wanted.{name}"))?.permute((0, 2, 3, 1))?;
            off.insert(
                (*name).into(),
                json!(distance(&got.to_device(&Device::Cpu)?, &wanted)?),
            );
        }
    }
    let stages = last.iter().map(|s| s.0).chain(["total"]);
    if args.iter().any(|a| a == "--json") {
        let ms: Vec<_> = stages.map(|s| json!([s, best[s]])).collect();
        let memory = json!({"before_mib": before, "peak_mib": peak});
        println!(
            "{}",
            json!({"threads": threads, "ms": ms, "memory": memory, "off": off})
        );
        return Ok(());
    }
    println!("{threads} thread(s)");
    stages.for_each(|s| println!("{s:10} {:9.1} ms", best[s]));
    if let (Some(before), Some(peak)) = (before, peak) {
        println!("memory: {before:.0} MiB before the first step, {peak:.0} MiB at the peak");
    }
    Ok(())
}
