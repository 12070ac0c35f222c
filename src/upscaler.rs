//! The main interface of the library.

use std::{ops::ControlFlow, sync::Arc};

use crate::{
    Device, Error, Precision, Result,
    cuda::{DevicePlanes, ExternalContext, HostAllocator},
    engine::{
        self, AUTOMATIC_DENOISE, AutomaticDenoise, Capabilities, ColorFix, Engine, NoiseField,
        Options, Progress, Setting, Temporal, Tile, Times, larger_scale,
    },
    frame::{Frame, FrameInfo, FrameMut, FrameRef, spread_colours},
    model::Model,
    nn::lite::Estimator,
};

/// A loaded model that upscales frames.
///
/// It reuses its plan and working memory until a frame has another size or kind. On a CUDA device,
/// several frames may be in flight, see [`Self::submit`] and [`Self::receive`].
///
/// The result for a frame does not depend on the number of threads. It may depend on the frames
/// since [`Self::reset`]: an automatic [`Self::set_denoise`] is an estimate from all of them, and
/// [`Self::set_temporal`] mixes in the previous result. For a ResShift model it depends on the size
/// of the tiles, which [`Tile::Auto`] chooses by the free memory.
///
/// Models differ in their settings, see [`Self::capabilities`]. A setter of a setting that the
/// model lacks returns [`Error::Setting`] unless the value is the default.
pub struct Upscaler {
    engine: Box<dyn Engine>,
    /// Estimate for an automatic `denoise`, if the model has the setting.
    automatic: Option<AutomaticDenoise>,
    device: Device,
    scale: f64,
    pool: Option<Arc<rayon::ThreadPool>>,
    observer: Option<Observer>,
}

/// Callback before every pass through a ResShift network and after the last one.
/// [`ControlFlow::Break`] stops the frame with [`Error::Cancelled`].
pub type Observer = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

impl Upscaler {
    /// Loads `model`, the name of a bundled model or the path of a model file. An empty name stands
    /// for the default model.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::Model`] or [`Error::Io`] if the model cannot be read.
    /// [`Error::Device`] if the device cannot be used or computes a student wrongly, or for a
    /// ResShift model on a CUDA device in a build without the feature `cuda`. [`Error::Memory`] if
    /// the device has too little memory.
    pub fn load(model: &str, device: Device) -> Result<Self> {
        Self::new(Model::find(model)?, device, None)
    }

    /// As [`Self::load`], on a CUDA device in a context of another library. A student can upscale
    /// frames in memory of that context ([`Self::submit_device`]).
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_in(model: &str, context: ExternalContext) -> Result<Self> {
        let device = Device::Cuda(context.ordinal());
        Self::new(Model::find(model)?, device, Some(context))
    }

    fn new(model: Model, device: Device, context: Option<ExternalContext>) -> Result<Self> {
        let device = match device {
            Device::Auto => Device::Cpu,
            device => device,
        };
        Ok(Self::with_engine(
            engine::open(model, device, context)?,
            device,
        ))
    }

    /// Wraps an engine that runs on `device`, for engines outside of this library.
    pub fn with_engine(engine: Box<dyn Engine>, device: Device) -> Self {
        let has_dial = engine.capabilities().has(Setting::Denoise);
        let estimator = has_dial.then(|| Estimator::bundled().ok()).flatten();
        Self {
            scale: engine.capabilities().default_scale,
            engine,
            automatic: estimator.map(AutomaticDenoise::new),
            device,
            pool: None,
            observer: None,
        }
    }

    /// Returns scales, precisions and settings of the model.
    pub fn capabilities(&self) -> &Capabilities {
        self.engine.capabilities()
    }

    /// Checks that the model has a setting.
    ///
    /// # Errors
    /// [`Error::Setting`] if it does not.
    pub fn require(&self, setting: Setting) -> Result<()> {
        if self.capabilities().has(setting) {
            return Ok(());
        }
        let model = self.active_model(self.max_scale());
        let place = match self.device {
            Device::Cuda(_) => format!(" on {}", self.device),
            _ => String::new(),
        };
        Err(Error::Setting(format!(
            "model '{model}' has no setting '{setting}'{place}"
        )))
    }

    /// Forgets previous frames, before another image, after a seek or a change of streams.
    pub fn reset(&mut self) {
        if let Some(automatic) = &mut self.automatic {
            automatic.reset();
        }
        self.engine.reset();
    }

    /// Sets the number of threads for a frame. 0, the default, is one for every core.
    ///
    /// # Errors
    /// [`Error::Thread`] if the threads cannot be started.
    pub fn set_threads(&mut self, threads: usize) -> Result<()> {
        if threads == 0 {
            self.pool = None;
            return Ok(());
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("tadsr-{i}"))
            .build()
            .map_err(|e| Error::Thread(format!("{threads} threads cannot be started: {e}")))?;
        self.pool = Some(Arc::new(pool));
        Ok(())
    }

    /// Changes the engine's options.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks a setting with another value than the default, or does
    /// not support a value. The previous options then stay in force.
    fn set(&mut self, change: impl FnOnce(&mut Options)) -> Result<()> {
        let mut options = self.engine.options().clone();
        change(&mut options);
        let all = Setting::ALL.into_iter().map(|(setting, _)| setting);
        let mut changed = all.filter(|setting| !setting.is_default(&options));
        changed.try_for_each(|setting| self.require(setting))?;
        self.engine.set_options(options)
    }

    /// Sets the share of the residual that is added to the base, 0 (bicubic interpolation) to 1
    /// (the default). Values outside of the range are clamped.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_strength(&mut self, strength: f32) -> Result<()> {
        self.set(|options| options.strength = fraction(strength))
    }

    /// Sets the degradation of the input, 0 (clean) to 1 (heavily compressed or noisy). `None`, the
    /// default, estimates it from the frames, see [`Self::active_denoise`]. Values outside of the
    /// range are clamped. The value takes effect with the next frame; on a CUDA device, with the
    /// next frame that is submitted while none is in flight.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_denoise(&mut self, denoise: Option<f32>) -> Result<()> {
        let denoise = denoise.filter(|d| !d.is_nan()).map(|d| d.clamp(0.0, 1.0));
        self.set(|options| options.denoise = denoise)
    }

    /// Returns the degradation that the model assumes, 0 to 1; `None` if it lacks the setting. An
    /// automatic value is 0.4 until a frame has been upscaled that is neither flat nor smaller than
    /// 40 pixels. The first such frame decides, and later ones change it slowly. Frames in device
    /// memory do not.
    pub fn active_denoise(&self) -> Option<f32> {
        let has = self.capabilities().has(Setting::Denoise);
        has.then(|| self.engine.options().denoise())
    }

    /// Sets the amount of detail that the network may invent, 0 (faithful to the input) to 1
    /// (generative). `None`, the default, is 0.5 at scales above 2, otherwise 0. Values outside of
    /// the range are clamped. The value takes effect as that of [`Self::set_denoise`].
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_detail(&mut self, detail: Option<f32>) -> Result<()> {
        let detail = detail.filter(|d| !d.is_nan()).map(|d| d.clamp(0.0, 1.0));
        self.set(|options| options.detail = detail)
    }

    /// Returns the amount of detail that the network may invent, 0 to 1, in frames that grow by
    /// `scale`; `None` if the model lacks the setting.
    pub fn active_detail(&self, scale: f64) -> Option<f32> {
        let has = self.capabilities().has(Setting::Detail);
        has.then(|| self.engine.options().detail(scale))
    }

    /// Sets the use of previous frames, by default [`Temporal::Auto`]. Call [`Self::reset`] before
    /// a frame that does not continue the previous ones.
    ///
    /// # Errors
    /// [`Error::Setting`] for [`Temporal::Filter`] and [`Temporal::Memory`] if the model or the
    /// device lacks the setting: students on a CUDA device and ResShift models do; and for
    /// [`Temporal::Memory`] if the model is a network without memory.
    pub fn set_temporal(&mut self, temporal: Temporal) -> Result<()> {
        self.set(|options| options.temporal = temporal)
    }

    /// Sets the precision, by default [`Precision::Auto`]. ResShift models accept any: they compute
    /// in f32 on the CPU, and on CUDA devices in f32, bf16 or, for all other values, f16.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model or the device lacks the precision. The previous one then
    /// stays in force.
    pub fn set_precision(&mut self, precision: Precision) -> Result<()> {
        self.set(|options| options.precision = precision)
    }

    /// Returns the precision, never [`Precision::Auto`], for frames that grow by `scale`.
    pub fn active_precision(&self, scale: f64) -> Precision {
        self.engine.precision(scale)
    }

    /// Sets the share of the initial noise that the model was trained with, 0 to 1 (the default).
    /// Less noise invents less detail. Values outside of the range are clamped.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_noise(&mut self, noise: f32) -> Result<()> {
        self.set(|options| options.noise = fraction(noise))
    }

    /// Sets the seed of the initial noise, by default 0. With one seed, frames of one size start
    /// from the same noise, so a still image does not flicker.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_seed(&mut self, seed: u64) -> Result<()> {
        self.set(|options| options.seed = seed)
    }

    /// Replaces the seeded noise, for comparisons with other implementations. `None` restores it. A
    /// frame whose latent has another size than the field fails with [`Error::Setting`].
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_noise_field(&mut self, field: Option<NoiseField>) -> Result<()> {
        self.set(|options| options.noise_field = field)
    }

    /// Returns the initial noise of frames of `width` x `height`, without the factor of
    /// [`Self::set_noise`]. `None` for a model without noise.
    pub fn noise_field(&self, width: usize, height: usize) -> Option<NoiseField> {
        self.engine.noise_field(width, height)
    }

    /// Sets the number of sampling steps for a frame: 1 (the default) for models that are distilled
    /// to one step, up to [`Self::max_steps`] for others. The sampler is deterministic.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model does not support the number or lacks the setting.
    pub fn set_steps(&mut self, steps: usize) -> Result<()> {
        self.set(|options| options.steps = steps)
    }

    /// Returns the length of the model's training schedule; `None` for a model without steps.
    pub fn max_steps(&self) -> Option<usize> {
        self.capabilities().max_steps
    }

    /// Sets the size of the tiles that a frame is split into, by default [`Tile::Auto`].
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_tile(&mut self, tile: Tile) -> Result<()> {
        self.set(|options| options.tile = tile)
    }

    /// Sets the minimum overlap of neighbouring tiles in pixels of the input, by default 16.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_tile_overlap(&mut self, pixels: usize) -> Result<()> {
        self.set(|options| options.tile_overlap = pixels)
    }

    /// Sets the method that matches the colours of the result to those of the input, by default
    /// [`ColorFix::Wavelet`].
    ///
    /// # Errors
    /// [`Error::Setting`] if the model lacks the setting.
    pub fn set_color_fix(&mut self, fix: ColorFix) -> Result<()> {
        self.set(|options| options.color_fix = fix)
    }

    /// Sets the observer of a frame's progress, which may stop the frame. Only ResShift models call
    /// it.
    pub fn set_observer(&mut self, observer: Option<Observer>) {
        self.observer = observer;
    }

    /// Returns the scale of a network that has only one. Smaller outputs are shrunk from it and
    /// take as long. `None` for models with a range of scales.
    pub fn native_scale(&self) -> Option<f64> {
        self.capabilities().native_scale
    }

    /// Sets the scale of [`Self::upscale`], 1 to [`Self::max_scale`]. The default is the native
    /// scale, or else the smallest maximum scale of a model in the group (2 for the default model).
    ///
    /// # Errors
    /// [`Error::Scale`] if no model of the group supports the scale.
    pub fn set_scale(&mut self, scale: f64) -> Result<()> {
        if !(1.0..=self.max_scale()).contains(&scale) {
            return Err(self.overscale(scale));
        }
        self.scale = scale;
        Ok(())
    }

    /// Returns the scale of [`Self::upscale`].
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Returns the maximum scale of the model or group.
    pub fn max_scale(&self) -> f64 {
        self.capabilities().scales[1]
    }

    /// Returns the device in use.
    pub fn active_device(&self) -> Device {
        self.device
    }

    /// Returns the name of the model for `scale`. A group such as `tiny` has one for each range of
    /// scales.
    pub fn active_model(&self, scale: f64) -> &str {
        self.engine.model(scale)
    }

    /// Upscales `frame` by [`Self::scale`]. The size of the result is rounded to whole pixels.
    ///
    /// # Errors
    /// As [`Self::upscale_into`].
    pub fn upscale(&mut self, frame: &Frame) -> Result<Frame> {
        let info = frame.info();
        let side = |len: usize| (len as f64 * self.scale).round() as usize;
        let mut out = Frame::new(info.with_size(side(info.width), side(info.height)))?;
        self.upscale_into(&frame.as_ref(), &mut out.as_mut())?;
        Ok(out)
    }

    /// Upscales `src` into `dst`. The size of `dst` decides the scale of each direction, 1 to
    /// [`Self::max_scale`].
    ///
    /// # Errors
    /// [`Error::Frame`] if the frames differ in format or colours, [`Error::Scale`] if no model
    /// supports the scale, [`Error::Memory`] if there is not enough memory for frames of this size,
    /// [`Error::Setting`] if the noise field does not fit them, [`Error::Cancelled`] if the
    /// observer breaks.
    pub fn upscale_into(&mut self, src: &FrameRef, dst: &mut FrameMut) -> Result<()> {
        let (from, to) = (*src.info(), *dst.info());
        self.check_frames(&from, &to)?;
        let spread = spread_colours(src)?;
        let spread = spread.as_ref().map(Frame::as_ref);
        let src = spread.as_ref().unwrap_or(src);
        let (engine, automatic) = (&mut self.engine, &mut self.automatic);
        let observer: engine::Observer = match &mut self.observer {
            Some(observer) => Some(&mut **observer),
            None => None,
        };
        let run = || {
            observe(automatic, &mut **engine, src)?;
            engine.prepare(&from, &to)?;
            engine.run(src, dst, observer)
        };
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    /// Sets the maximum number of frames in flight on a CUDA device, at least 1, by default 2. With
    /// two or three, copies and computation overlap. A change drops the frames in flight. Without
    /// effect on the CPU and for ResShift models.
    pub fn set_queue_depth(&mut self, depth: usize) {
        // Every engine accepts any depth.
        let _ = self.set(|options| options.queue_depth = depth.max(1));
    }

    /// Sets whether frames submitted from now on stay in device memory until they are received, for
    /// [`Self::receive_device`]. Otherwise, which is the default, they are copied to the host as
    /// soon as they are computed.
    pub fn set_resident(&mut self, resident: bool) {
        // Every engine accepts both.
        let _ = self.set(|options| options.resident = resident);
    }

    /// Returns `true` if [`Self::submit`] and [`Self::receive`] are supported: for students on a
    /// CUDA device.
    pub fn is_pipelined(&self) -> bool {
        self.capabilities().pipelined
    }

    /// Returns the maximum number of frames in flight; 1 unless [`Self::is_pipelined`].
    pub fn queue_depth(&self) -> usize {
        if self.is_pipelined() {
            self.engine.options().queue_depth
        } else {
            1
        }
    }

    /// Returns the number of frames in flight.
    pub fn in_flight(&self) -> usize {
        self.engine.in_flight()
    }

    /// Returns an allocator of pinned memory, for frames that are copied once, straight between the
    /// memory and the CUDA device; `None` on the CPU and for ResShift models.
    pub fn host_allocator(&self) -> Option<HostAllocator> {
        self.engine.host_allocator()
    }

    /// Returns the memory in use on a CUDA device, in bytes.
    pub fn device_memory(&self) -> usize {
        self.engine.device_memory()
    }

    /// Submits `src`, to become a frame `to`, to a CUDA device. Its samples are copied before this
    /// returns.
    ///
    /// # Errors
    /// As [`Self::upscale_into`], and [`Error::InFlight`] if the engine is not pipelined, or if
    /// [`Self::queue_depth`] frames or frames of another kind or size are in flight. After
    /// [`Error::Device`] no frame is in flight any more.
    pub fn submit(&mut self, src: &FrameRef, to: FrameInfo) -> Result<()> {
        self.check_frames(src.info(), &to)?;
        observe(&mut self.automatic, &mut *self.engine, src)?;
        self.engine.prepare(src.info(), &to)?;
        let spread = spread_colours(src)?;
        self.engine
            .submit(spread.as_ref().map(Frame::as_ref).as_ref().unwrap_or(src))
    }

    /// As [`Self::submit`], for a frame in device memory.
    ///
    /// # Safety
    /// `planes` hold a frame `from` in memory of the context that the model was loaded in. Nothing
    /// writes or frees them until the frame is received or dropped.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub unsafe fn submit_device(
        &mut self,
        from: FrameInfo,
        planes: DevicePlanes,
        to: FrameInfo,
    ) -> Result<()> {
        self.check_frames(&from, &to)?;
        self.engine.prepare(&from, &to)?;
        // SAFETY: as the caller promises.
        unsafe { self.engine.submit_device(&from, planes) }
    }

    /// Waits for the oldest frame in flight and copies it to `dst`. Returns the times of its
    /// stages.
    ///
    /// # Errors
    /// [`Error::InFlight`] if no frame is in flight, [`Error::Frame`] if `dst` is of another kind
    /// or size than it was submitted for, [`Error::Device`] or [`Error::DeviceLost`] if the device
    /// fails; then no frame is in flight any more.
    pub fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        self.engine.receive(dst)
    }

    /// As [`Self::receive`], for a frame in device memory. It is complete when this returns.
    ///
    /// # Safety
    /// `planes` hold a frame `to` in memory of the context that the model was loaded in, which
    /// nothing else uses.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub unsafe fn receive_device(&mut self, to: FrameInfo, planes: DevicePlanes) -> Result<Times> {
        // SAFETY: as the caller promises.
        unsafe { self.engine.receive_device(&to, planes) }
    }

    /// Drops the frames in flight.
    pub fn flush(&mut self) {
        self.engine.flush();
    }

    /// Checks that frames `from` can become frames `to`.
    fn check_frames(&self, from: &FrameInfo, to: &FrameInfo) -> Result<()> {
        if from.with_size(to.width, to.height) != *to {
            return Err(Error::Frame(format!(
                "the output frame is {} and the input frame {}: format, colours and chroma site \
                 must be the same",
                to.format.name(),
                from.format.name()
            )));
        }
        if to.width < from.width || to.height < from.height {
            return Err(Error::Scale(format!(
                "{}x{} to {}x{}: the output must not be smaller than the input",
                from.width, from.height, to.width, to.height
            )));
        }
        // A rounded size may exceed the maximum scale by less than a pixel.
        let max = self.max_scale();
        let rounded = |from: usize, to: usize| (to as f64) < from as f64 * max + 1.0;
        if !rounded(from.width, to.width) || !rounded(from.height, to.height) {
            return Err(self.overscale(larger_scale(from, to)));
        }
        Ok(())
    }

    fn overscale(&self, scale: f64) -> Error {
        let max = self.max_scale();
        Error::Scale(format!(
            "scale {scale:.3} is not supported: model '{}' has 1 to {max}",
            self.active_model(max)
        ))
    }
}

/// Estimates an automatic `denoise` from `src`. Frames in flight keep the weights of an engine, so
/// that nothing is estimated meanwhile.
fn observe(
    automatic: &mut Option<AutomaticDenoise>,
    engine: &mut dyn Engine,
    src: &FrameRef,
) -> Result<()> {
    let options = engine.options();
    let Some(automatic) = automatic else {
        return Ok(());
    };
    if options.denoise.is_some() || options.strength == 0.0 || engine.in_flight() > 0 {
        return Ok(());
    }
    automatic.observe(src)?;
    let position = automatic.position().unwrap_or(AUTOMATIC_DENOISE);
    if position != options.automatic_denoise {
        let automatic_denoise = position;
        engine.set_options(Options {
            automatic_denoise,
            ..options.clone()
        })?;
    }
    Ok(())
}

/// Clamps `value` to 0 to 1. NaN becomes 1.
fn fraction(value: f32) -> f32 {
    if value.is_nan() {
        1.0
    } else {
        value.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests;
