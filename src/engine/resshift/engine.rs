//! The engine of the ResShift family.

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
    /// Brings `model` to `device`.
    ///
    /// # Errors
    /// [`Error::Device`] for a CUDA device in a build without the feature `cuda`, [`Error::Memory`]
    /// when the device has too little memory.
    pub fn new(model: ResShiftModel, device: Device) -> Result<Self> {
        let place = device.to_candle()?;
        let (unet, autoencoder) = (model.unet(&place)?, model.autoencoder(&place)?);
        let (name, config) = (model.metadata.name, model.metadata.config);
        // The runner rearranges the weights; let them go where they were.
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
            settings: Setting::ALL.map(|(setting, _)| setting).into(),
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
        let (precision, steps, most) = (options.precision, options.steps, self.runner.steps());
        if !(1..=most).contains(&steps) {
            return Err(Error::Setting(format!(
                "{steps} steps: model '{}' takes 1 to {most}",
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
        // Interpolation alone takes no tiles.
        if self.options.strength > 0.0 {
            self.runner
                .checked_cuts(from.width, from.height, &self.options)?;
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

/// Returns the precision on `device` that comes closest to the one asked for.
fn resolve(device: Device, asked: Precision) -> Precision {
    match (device, asked) {
        (Device::Auto | Device::Cpu, _) => Precision::F32,
        (Device::Cuda(_), Precision::F32 | Precision::Bf16) => asked,
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
