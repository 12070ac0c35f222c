//! The front door of the library.

use std::{ops::ControlFlow, sync::Arc};

use crate::{
    Device, Error, Precision, Result,
    cuda::DevicePlanes,
    engine::{
        self, Capabilities, ColorFix, Engine, NoiseField, Options, Progress, Setting, Tile, Times,
        larger_scale, lite::cuda::Context,
    },
    frame::{Frame, FrameInfo, FrameMut, FrameRef},
    model::Model,
};

/// A loaded model that upscales frames.
///
/// It keeps its plan and working memory from frame to frame; a frame of another size or kind makes
/// a new plan. On a CUDA device several frames may be in flight at a time, by [`Self::submit`] and
/// [`Self::receive`]. The result for a frame depends on the frame alone: neither on the frames
/// before it nor on the number of threads. With a ResShift model it also depends on how the frame
/// is cut into tiles, and [`Tile::Auto`] lets the free memory decide that for each size of frames;
/// a fixed tile gives the same result anywhere.
///
/// Models differ in their settings, see [`Self::capabilities`]. Setting one that a model lacks is
/// [`Error::Setting`], except to its default value.
pub struct Upscaler {
    engine: Box<dyn Engine>,
    device: Device,
    scale: f64,
    pool: Option<Arc<rayon::ThreadPool>>,
    observer: Option<Observer>,
}

/// Called before every pass through a ResShift network, and when the last is done;
/// [`ControlFlow::Break`] stops the frame with [`Error::Cancelled`].
pub type Observer = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

impl Upscaler {
    /// Loads `model`: the name of a bundled model or the path of a model file. The empty name is the default model.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::Model`] and [`Error::Io`] for the model, [`Error::Device`]
    /// for the device, which also has to compute a student rightly ([`Context::check`]), and for a
    /// ResShift model on a CUDA device in a build without the feature `cuda`; [`Error::Memory`]
    /// when that device has too little.
    pub fn load(model: &str, device: Device) -> Result<Self> {
        Self::new(Model::find(model)?, device, None)
    }

    /// Loads `model` as [`Self::load`] does, on the CUDA device that `context` belongs to, where
    /// frames in its memory can be upscaled ([`Self::submit_device`]).
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_in(model: &str, context: Arc<Context>) -> Result<Self> {
        let device = Device::Cuda(context.driver().info().ordinal);
        Self::new(Model::find(model)?, device, Some(context))
    }

    fn new(model: Model, device: Device, context: Option<Arc<Context>>) -> Result<Self> {
        let device = match device {
            Device::Auto => Device::Cpu,
            device => device,
        };
        let engine = engine::open(model, device, context)?;
        Ok(Self {
            scale: engine.capabilities().default_scale,
            engine,
            device,
            pool: None,
            observer: None,
        })
    }

    /// Returns the model's scales, precisions and settings.
    pub fn capabilities(&self) -> &Capabilities {
        self.engine.capabilities()
    }

    /// Checks that the model has a setting.
    ///
    /// # Errors
    /// [`Error::Setting`] when it does not.
    pub fn require(&self, setting: Setting) -> Result<()> {
        if self.capabilities().has(setting) {
            return Ok(());
        }
        let model = self.active_model(self.max_scale());
        Err(Error::Setting(format!(
            "model '{model}' has no setting '{setting}'"
        )))
    }

    /// Forgets the frames upscaled so far, for a cut, a seek or another stream. It does nothing for
    /// models whose [`Capabilities::history`] is `false`.
    pub fn reset(&mut self) {
        self.engine.reset();
    }

    /// Sets the threads that one frame is spread over; 0 (the default) is one for every core.
    ///
    /// # Errors
    /// [`Error::Device`] when the threads cannot be started.
    pub fn set_threads(&mut self, threads: usize) -> Result<()> {
        if threads == 0 {
            self.pool = None;
            return Ok(());
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("tadsr-{i}"))
            .build()
            .map_err(|e| Error::Device(format!("{threads} threads cannot be started: {e}")))?;
        self.pool = Some(Arc::new(pool));
        Ok(())
    }

    /// Changes the engine's options.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks a setting that is not at its default then, or does
    /// not take its value; the options before stay.
    fn set(&mut self, change: impl FnOnce(&mut Options)) -> Result<()> {
        let mut options = self.engine.options().clone();
        change(&mut options);
        let all = Setting::ALL.into_iter().map(|(setting, _)| setting);
        let mut changed = all.filter(|setting| !setting.is_default(&options));
        changed.try_for_each(|setting| self.require(setting))?;
        self.engine.set_options(options)
    }

    /// Sets the share of the network's work in the result: 0 is bicubic interpolation alone, 1 (the
    /// default) all of it. Values outside are clamped.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_strength(&mut self, strength: f32) -> Result<()> {
        self.set(|options| options.strength = fraction(strength))
    }

    /// Sets how degraded the input is: 0 (clean) to 1 (heavily compressed or noisy), or `None` (the
    /// default), which is automatic. Values outside are clamped. It takes effect with the next
    /// frame; on a CUDA device with the next one while none is in flight.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_denoise(&mut self, denoise: Option<f32>) -> Result<()> {
        let denoise = denoise.filter(|d| !d.is_nan()).map(|d| d.clamp(0.0, 1.0));
        self.set(|options| options.denoise = denoise)
    }

    /// Sets how much detail the network may invent: 0 (the default) is faithful to the input, 1
    /// generative. Values outside are clamped. It takes effect as [`Self::set_denoise`].
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_detail(&mut self, detail: f32) -> Result<()> {
        let detail = if detail.is_nan() {
            0.0
        } else {
            detail.clamp(0.0, 1.0)
        };
        self.set(|options| options.detail = detail)
    }

    /// Sets the precision, [`Precision::Auto`] by default. ResShift models take any: they compute
    /// in f32 on the CPU, and on CUDA devices in f16 unless it is f32 or bf16.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model or the device does not have the precision; the one before stays.
    pub fn set_precision(&mut self, precision: Precision) -> Result<()> {
        self.set(|options| options.precision = precision)
    }

    /// Returns the precision, never [`Precision::Auto`], for frames that grow by `scale`.
    pub fn active_precision(&self, scale: f64) -> Precision {
        self.engine.precision(scale)
    }

    /// Sets the share of the noise that the model was trained to start from: 0 to 1 (the default).
    /// Less noise invents less detail. Values outside are clamped.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_noise(&mut self, noise: f32) -> Result<()> {
        self.set(|options| options.noise = fraction(noise))
    }

    /// Sets the seed of the noise, 0 by default. Frames of one size get the same noise as long as
    /// the seed stays, so that a still picture stays still.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_seed(&mut self, seed: u64) -> Result<()> {
        self.set(|options| options.seed = seed)
    }

    /// Sets noise to use instead of the seeded one, for results that can be compared with other
    /// implementations; `None` goes back to the seed. A frame whose latent has another size than
    /// the field ends in [`Error::Setting`].
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_noise_field(&mut self, field: Option<NoiseField>) -> Result<()> {
        self.set(|options| options.noise_field = field)
    }

    /// Returns the noise that frames of `width` x `height` get before [`Self::set_noise`] weakens
    /// it: the one that was set, or the one that the seed gives. `None` for a model that starts
    /// from no noise.
    pub fn noise_field(&self, width: usize, height: usize) -> Option<NoiseField> {
        self.engine.noise_field(width, height)
    }

    /// Sets the sampler's steps for a frame: 1 (the default), which is for models that were
    /// distilled to one step, up to [`Self::max_steps`], which is what others were trained with.
    /// The sampler is deterministic.
    ///
    /// # Errors
    /// [`Error::Setting`] for a number that the model does not take, or when it lacks the setting.
    pub fn set_steps(&mut self, steps: usize) -> Result<()> {
        self.set(|options| options.steps = steps)
    }

    /// Returns the steps of the schedule that the model was trained with; `None` for a model that
    /// has none.
    pub fn max_steps(&self) -> Option<usize> {
        self.capabilities().max_steps
    }

    /// Sets the size of the tiles that a frame is cut into, [`Tile::Auto`] by default.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_tile(&mut self, tile: Tile) -> Result<()> {
        self.set(|options| options.tile = tile)
    }

    /// Sets the minimum number of input pixels that neighbouring tiles share, 16 by default.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_tile_overlap(&mut self, pixels: usize) -> Result<()> {
        self.set(|options| options.tile_overlap = pixels)
    }

    /// Sets the correction of the result's colours towards those of the input,
    /// [`ColorFix::Wavelet`] by default.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model lacks it.
    pub fn set_color_fix(&mut self, fix: ColorFix) -> Result<()> {
        self.set(|options| options.color_fix = fix)
    }

    /// Sets the observer of a frame's progress, which may stop the frame. Only ResShift models are
    /// slow enough to call it.
    pub fn set_observer(&mut self, observer: Option<Observer>) {
        self.observer = observer;
    }

    /// Returns the scale of the network itself, for networks that have only one: smaller frames are
    /// shrunk from it, and cost as much. `None` for models that serve a range.
    pub fn native_scale(&self) -> Option<f64> {
        self.capabilities().native_scale
    }

    /// Sets the scale that [`Self::upscale`] applies: 1 to [`Self::max_scale`]. Without it, the smallest of the models'
    /// largest scales (2 for the default model), or [`Self::native_scale`].
    ///
    /// # Errors
    /// [`Error::Scale`] when no model serves the scale.
    pub fn set_scale(&mut self, scale: f64) -> Result<()> {
        if !(1.0..=self.max_scale()).contains(&scale) {
            return Err(self.overscale(scale));
        }
        self.scale = scale;
        Ok(())
    }

    /// Returns the scale that [`Self::upscale`] applies.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Returns the largest scale that the model serves.
    pub fn max_scale(&self) -> f64 {
        self.capabilities().scales[1]
    }

    /// Returns the device in use.
    pub fn active_device(&self) -> Device {
        self.device
    }

    /// Returns the name of the model that serves `scale`: a group such as `tiny` has one for each
    /// range of scales.
    pub fn active_model(&self, scale: f64) -> &str {
        self.engine.model(scale)
    }

    /// Upscales `frame` by the scale set, sizes rounded to whole pixels.
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

    /// Upscales `src` into `dst`, whose size sets the scale: each direction its own, 1 to [`Self::max_scale`].
    ///
    /// # Errors
    /// [`Error::Frame`] when the frames differ in format or colour, [`Error::Scale`] when no model serves the scale,
    /// [`Error::Memory`] when there is not enough for frames of this size, [`Error::Setting`] when the noise that was set
    /// does not fit them, [`Error::Cancelled`] when the observer breaks.
    pub fn upscale_into(&mut self, src: &FrameRef, dst: &mut FrameMut) -> Result<()> {
        let (from, to) = (*src.info(), *dst.info());
        self.check_frames(&from, &to)?;
        let engine = &mut self.engine;
        let observer: engine::Observer = match &mut self.observer {
            Some(observer) => Some(&mut **observer),
            None => None,
        };
        let run = || {
            engine.prepare(&from, &to)?;
            engine.run(src, dst, observer)
        };
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    /// Sets the frames that may be in flight on a CUDA device, 2 by default: with two or three, one
    /// is copied there or back while another is computed. Less than 1 is 1. Another depth forgets
    /// the frames in flight. Engines that upscale frames one by one ignore it.
    pub fn set_queue_depth(&mut self, depth: usize) {
        // Every engine takes any depth.
        let _ = self.set(|options| options.queue_depth = depth.max(1));
    }

    /// Leaves frames submitted to a CUDA device from here on in its memory until they are received,
    /// for [`Self::receive_device`]; otherwise (the default) they are copied to the host as soon as
    /// they are computed.
    pub fn set_resident(&mut self, resident: bool) {
        // Every engine takes both.
        let _ = self.set(|options| options.resident = resident);
    }

    /// Returns `true` if frames go through [`Self::submit`] and [`Self::receive`]: those of
    /// students on a CUDA device.
    pub fn is_pipelined(&self) -> bool {
        self.capabilities().pipelined
    }

    /// Returns the number of frames that [`Self::submit`] takes before one must be received; 1 on
    /// the CPU, which is for [`Self::upscale_into`].
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

    /// Returns the bytes of a CUDA device's memory that the plan in use takes.
    pub fn device_memory(&self) -> usize {
        self.engine.device_memory()
    }

    /// Sends `src` on its way to a frame `to` on a CUDA device; its samples are copied before this returns.
    ///
    /// # Errors
    /// As [`Self::upscale_into`], and [`Error::Setting`] on the CPU, when [`Self::queue_depth`] frames are in flight, or
    /// frames of another kind or size. When the device fails no frame is in flight any more.
    pub fn submit(&mut self, src: &FrameRef, to: FrameInfo) -> Result<()> {
        self.check_frames(src.info(), &to)?;
        self.engine.prepare(src.info(), &to)?;
        self.engine.submit(src)
    }

    /// Submits a frame `from` in the device's memory, as [`Self::submit`] does.
    ///
    /// # Safety
    /// `planes` are those of a frame `from`, allocated in the context that the model was loaded in, written already, and
    /// neither written nor freed until the frame is received or forgotten.
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

    /// Waits for the oldest frame in flight and copies it to `dst`. Returns where its time went.
    ///
    /// # Errors
    /// [`Error::Setting`] when no frame is in flight, [`Error::Frame`] when `dst` is not what it was submitted for,
    /// [`Error::Device`] when the device fails; then no frame is in flight any more.
    pub fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        self.engine.receive(dst)
    }

    /// Receives a frame `to` in the device's memory, as [`Self::receive`] does; it is complete when
    /// this returns.
    ///
    /// # Safety
    /// `planes` are those of a frame `to`, allocated in the context that the model was loaded in, and used by nobody else.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub unsafe fn receive_device(&mut self, to: FrameInfo, planes: DevicePlanes) -> Result<Times> {
        // SAFETY: as the caller promises.
        unsafe { self.engine.receive_device(&to, planes) }
    }

    /// Forgets the frames in flight.
    pub fn flush(&mut self) {
        self.engine.flush();
    }

    /// Checks that frames `from` can become frames `to`.
    fn check_frames(&self, from: &FrameInfo, to: &FrameInfo) -> Result<()> {
        if from.with_size(to.width, to.height) != *to {
            return Err(Error::Frame(format!(
                "the output frame is {} and the input frame {}: format, colour and chroma site must be the same",
                to.format.name(),
                from.format.name()
            )));
        }
        if to.width < from.width || to.height < from.height {
            return Err(Error::Scale(format!(
                "{}x{} to {}x{} is smaller, this upscales",
                from.width, from.height, to.width, to.height
            )));
        }
        // Rounding a tiny frame's size may exceed the scale asked for by less than a pixel.
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
            "scale {scale:.3}: model '{}' serves 1 to {max}",
            self.active_model(max)
        ))
    }
}

/// Clamps to 0 to 1; what is not a number becomes 1.
fn fraction(value: f32) -> f32 {
    if value.is_nan() {
        1.0
    } else {
        value.clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests;
