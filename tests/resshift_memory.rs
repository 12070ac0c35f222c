//! The memory estimate of a ResShift model is close to its real memory.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use tadsr::{
    engine::{Options, Tile, resshift::Runner},
    nn::resshift::{Autoencoder, ResShiftConfig, Unet},
};

/// System allocator that counts allocated bytes.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded unchanged to the system's allocator. The counters do not affect
// memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Returns the same small value for all weights, because the memory of a network does not depend on
/// them.
fn weights(tensors: Vec<(String, Vec<usize>)>) -> VarBuilder<'static> {
    let tensors = tensors.into_iter().map(|(name, shape)| {
        let tensor = Tensor::full(0.01f32, shape, &Device::Cpu).unwrap();
        (name, tensor)
    });
    let tensors: HashMap<_, _> = tensors.collect();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

fn engine(config: &ResShiftConfig) -> Runner {
    let unet = Unet::new(&config.unet, weights(config.unet.tensors())).unwrap();
    let autoencoder = &config.autoencoder;
    let autoencoder = Autoencoder::new(autoencoder, weights(autoencoder.tensors())).unwrap();
    Runner::new(config, unet, autoencoder).unwrap()
}

/// Upscales a frame in one tile. Returns the peak of additional memory in bytes, and the estimate.
fn peak(engine: &mut Runner, width: usize, height: usize) -> (f64, f64) {
    let options = Options {
        tile: Tile::Whole,
        ..Options::default()
    };
    let said = engine.memory(width, height, &options).unwrap();
    let rgb = [0, 1, 2].map(|_| vec![0.5; width * height]);
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    engine.restore(rgb, width, &options, None).unwrap();
    ((PEAK.load(Relaxed) - before) as f64, said as f64)
}

/// The network is narrower than published ones, but feature maps outweigh everything else.
#[test]
fn what_a_frame_is_said_to_take_is_little_more_than_it_takes() {
    for mut config in [ResShiftConfig::realsr_x4(), ResShiftConfig::faceir()] {
        let (unet, autoencoder) = (&mut config.unet, &mut config.autoencoder);
        unet.model_channels = 32;
        unet.num_res_blocks.fill(1);
        autoencoder.ch = 32;
        autoencoder.ch_mult.fill(1);
        autoencoder.num_res_blocks.fill(1);
        let mut engine = engine(&config);
        let unit = 64 * config.autoencoder.factor() / config.diffusion.scale;
        let (took, said) = peak(&mut engine, unit, unit);
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        let what = format!("{:.0} MiB, said {:.0} MiB", mib(took), mib(said));
        assert!(took <= said && said < 1.5 * took, "{what}");
    }
}
