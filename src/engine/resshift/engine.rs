//! Engine of the ResShift family.

use candle_core::DType;

use super::Runner;
use crate::{
    Device, Error, Result,
    engine::{Capabilities, Engine, NoiseField, Observer, Options, Precision, Setting},
    frame::{FrameInfo, FrameMut, FrameRef},
    model::ResShiftModel,
};

/// A ResShift model on any device.
pub struct ResShiftEngine {
    name: String,
    runner: Runner,
    device: Device,
    capabilities: Capabilities,
    options: Options,
}

impl ResShiftEngine {
    /// Loads the weights of `model` on `device`.
    ///
    /// # Errors
    /// [`Error::Device`] for a CUDA device in a build without the feature `cuda`, [`Error::Memory`]
    /// if the device has too little memory.
    pub fn new(model: ResShiftModel, device: Device) -> Result<Self> {
        let target = device.to_candle()?;
        let (unet, autoencoder) = (model.unet(&target)?, model.autoencoder(&target)?);
        let (name, config) = (model.metadata.name, model.metadata.config);
        // The runner packs the weights, so free the original ones first.
        drop(model.tensors);
        let mut runner = Runner::new(&config, unet, autoencoder)?;
        runner.set_dtype(dtype(resolve(device, Precision::Auto)));
        let scale = runner.scale() as f64;
        let precisions = match device {
            Device::Auto | Device::Cpu => vec![Precision::F32],
            Device::Cuda(_) => vec![Precision::F32, Precision::F16, Precision::Bf16],
        };
        let capabilities = Capabilities {
            scales: [1.0, scale],
            default_scale: scale,
            native_scale: Some(scale),
            precisions,
            settings: {
                let of_lite = [Setting::Denoise, Setting::Detail, Setting::Temporal];
                let all = Setting::ALL.into_iter().map(|(setting, _)| setting);
                all.filter(|setting| !of_lite.contains(setting)).collect()
            },
            max_steps: Some(runner.steps()),
            pipelined: false,
            history: false,
        };
        Ok(Self {
            name,
            runner,
            device,
            capabilities,
            options: Options::default(),
        })
    }
}

impl Engine for ResShiftEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn model(&self, _: f64) -> &str {
        &self.name
    }

    fn precision(&self, _: f64) -> Precision {
        resolve(self.device, self.options.precision)
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn set_options(&mut self, options: Options) -> Result<()> {
        let (precision, steps, max) = (options.precision, options.steps, self.runner.steps());
        if !(1..=max).contains(&steps) {
            return Err(Error::Setting(format!(
                "{steps} steps are not supported: model '{}' has 1 to {max}",
                self.name
            )));
        }
        if precision != self.options.precision {
            let resolved = resolve(self.device, precision);
            self.runner.set_dtype(dtype(resolved));
        }
        self.options = options;
        Ok(())
    }

    fn prepare(&mut self, from: &FrameInfo, _: &FrameInfo) -> Result<()> {
        // Bicubic interpolation alone uses no tiles.
        if self.options.strength > 0.0 {
            self.runner
                .checked_tiling(from.width, from.height, &self.options)?;
        }
        Ok(())
    }

    fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, observer: Observer) -> Result<()> {
        self.runner.run(src, dst, &self.options, observer)
    }

    fn noise_field(&self, width: usize, height: usize) -> Option<NoiseField> {
        Some(self.runner.noise(width, height, &self.options))
    }
}

/// Returns the precision on `device` that is closest to the requested one.
fn resolve(device: Device, requested: Precision) -> Precision {
    match (device, requested) {
        (Device::Auto | Device::Cpu, _) => Precision::F32,
        (Device::Cuda(_), Precision::F32 | Precision::Bf16) => requested,
        (Device::Cuda(_), _) => Precision::F16,
    }
}

fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
        _ => DType::F32,
    }
}
