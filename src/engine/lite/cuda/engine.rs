//! Inference engine of students on a CUDA device.

use std::sync::Arc;

use half::f16;

use super::{Context, Runner};
use crate::{
    Error, Result,
    cuda::{DevicePlanes, HostAllocator},
    engine::{
        Capabilities, Engine, Observer, Options, Precision, Times, larger_scale,
        lite::{Models, condition, cpu, dials_differ, frame_mismatch},
        none_in_flight,
    },
    frame::{FrameInfo, FrameMut, FrameRef},
    model::LiteModel,
};

/// Inference engine of students on a CUDA device.
pub struct CudaEngine {
    models: Models,
    context: Arc<Context>,
    capabilities: Capabilities,
    options: Options,
    /// Index of the model in use, and its runner.
    runner: Option<(usize, Runner)>,
    /// `true` if a dial has changed since the runner was created. The frames in flight still use
    /// its weights.
    stale: bool,
}

impl CudaEngine {
    /// Creates an engine for `models`, which are not empty and in ascending order of their scales.
    /// Networks with memory run without it.
    ///
    /// # Errors
    /// As [`Context::check`].
    pub fn new(models: Vec<LiteModel>, context: Arc<Context>) -> Result<Self> {
        let models: Vec<_> = models.iter().map(LiteModel::without_memory).collect();
        models.iter().try_for_each(|model| context.check(model))?;
        let models = Models(models);
        Ok(Self {
            capabilities: models.capabilities(true, resolve),
            models,
            context,
            options: Options::default(),
            runner: None,
            stale: false,
        })
    }

    fn runner(&mut self) -> Option<&mut Runner> {
        self.runner.as_mut().map(|(_, runner)| runner)
    }
}

/// Returns the precision of students on a CUDA device, which is always [`Precision::F16`].
///
/// # Errors
/// [`Error::Setting`] for another precision.
fn resolve(precision: Precision, _: &LiteModel) -> Result<Precision> {
    match precision {
        Precision::Auto | Precision::F16 => Ok(Precision::F16),
        _ => Err(Error::Setting(format!(
            "precision '{precision}': CUDA devices compute in f16; use auto or f16, or device=cpu"
        ))),
    }
}

impl Engine for CudaEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn model(&self, scale: f64) -> &str {
        &self.models.serving(scale).metadata.name
    }

    fn precision(&self, _: f64) -> Precision {
        Precision::F16
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn set_options(&mut self, options: Options) -> Result<()> {
        self.models.check(options.precision, resolve)?;
        if options.queue_depth != self.options.queue_depth {
            self.runner = None;
        }
        self.stale |= dials_differ(&options, &self.options);
        self.options = options;
        Ok(())
    }

    fn prepare(&mut self, from: &FrameInfo, to: &FrameInfo) -> Result<()> {
        let index = self.models.index(larger_scale(from, to));
        match &self.runner {
            Some((i, runner))
                if *i == index
                    && runner.fits(from, to)
                    && (!self.stale || runner.in_flight() > 0) => {}
            Some((_, runner)) if runner.in_flight() > 0 => {
                return Err(Error::InFlight(
                    "frames of another size or format are still in flight".into(),
                ));
            }
            _ => {
                // Frees the memory of the old runner before the new one allocates.
                self.runner = None;
                let at = condition(&self.options, cpu::scale(from, to));
                let (model, depth) = (self.models.0[index].folded(&at), self.options.queue_depth);
                let mut weights = model.layers.iter().flat_map(|layer| &layer.weight);
                if weights.any(|&w| !f16::from_f32(w).is_finite()) {
                    let reason =
                        "with these dials, weights exceed the range of f16: use device=cpu";
                    return Err(Error::model(&model.metadata.name, reason));
                }
                let runner = Runner::new(&self.context, &model, *from, *to, depth)?;
                self.runner = Some((index, runner));
                self.stale = false;
            }
        }
        let resident = self.options.resident;
        if let Some(runner) = self.runner() {
            runner.set_resident(resident);
        }
        Ok(())
    }

    fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, _: Observer) -> Result<()> {
        let strength = self.options.strength;
        self.runner()
            .ok_or_else(frame_mismatch)?
            .run(src, dst, strength)
    }

    fn submit(&mut self, src: &FrameRef) -> Result<()> {
        let strength = self.options.strength;
        self.runner()
            .ok_or_else(frame_mismatch)?
            .submit(src, strength)
    }

    unsafe fn submit_device(&mut self, src: &FrameInfo, planes: DevicePlanes) -> Result<()> {
        let strength = self.options.strength;
        let runner = self.runner().ok_or_else(frame_mismatch)?;
        // SAFETY: as the caller promises.
        unsafe { runner.submit_device(src, planes, strength) }
    }

    fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        self.runner().ok_or_else(none_in_flight)?.receive(dst)
    }

    unsafe fn receive_device(&mut self, dst: &FrameInfo, planes: DevicePlanes) -> Result<Times> {
        let runner = self.runner().ok_or_else(none_in_flight)?;
        // SAFETY: as the caller promises.
        unsafe { runner.receive_device(dst, planes) }
    }

    fn in_flight(&self) -> usize {
        self.runner
            .as_ref()
            .map_or(0, |(_, runner)| runner.in_flight())
    }

    fn flush(&mut self) {
        if let Some(runner) = self.runner() {
            runner.flush();
        }
    }

    fn host_allocator(&self) -> Option<HostAllocator> {
        Some(self.context.host_allocator())
    }

    fn device_memory(&self) -> usize {
        self.runner
            .as_ref()
            .map_or(0, |(_, runner)| runner.memory())
    }
}
