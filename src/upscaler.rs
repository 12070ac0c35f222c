//! The front door of the library.

use std::{ops::ControlFlow, sync::Arc};

use candle_core::DType;

use crate::{
    Device, Error, Result,
    engine::{
        lite::{
            cpu::{self, Precision},
            cuda::{self, Context, DevicePlanes, Times},
        },
        resshift::{self, ColorFix, NoiseField, Options, Progress, Tile},
    },
    frame::{Frame, FrameInfo, FrameMut, FrameRef},
    model::{LiteModel, Model, ResShiftModel},
};

/// A loaded model that upscales frames.
///
/// It keeps its plan and working memory from frame to frame; a frame of another size or kind makes a new plan.
/// On a CUDA device several frames may be on their way at a time, by [`Self::submit`] and [`Self::receive`].
/// The result for a frame depends on nothing but the frame: not on the frames before it, nor on the number of
/// threads. With a ResShift model it also depends on how the frame is cut into tiles, and [`Tile::Auto`] lets the free
/// memory decide that for each size of frames; a fixed tile gives the same result anywhere.
pub struct Upscaler {
    family: Family,
    device: Device,
    strength: f32,
    precision: Precision,
    scale: f64,
    pool: Option<Arc<rayon::ThreadPool>>,
    /// For ResShift networks.
    options: Options,
    observer: Option<Observer>,
}

enum Family {
    Lite(Box<Lite>),
    ResShift {
        name: String,
        engine: Box<resshift::Engine>,
    },
}

/// Students for real time.
struct Lite {
    /// In the order of their scales; not empty.
    models: Vec<LiteModel>,
    /// The plan in use and the index of its model; made for the precision that is set.
    plan: Option<(usize, Plan)>,
    /// The CUDA device; without it the CPU computes.
    context: Option<Arc<Context>>,
    /// Frames that may be in flight there.
    depth: usize,
    /// Whether they stay in its memory until they are received.
    resident: bool,
}

enum Plan {
    Cpu(Box<cpu::Engine>),
    Cuda(Box<cuda::Engine>),
}

/// Called before every pass through a ResShift network, and when the last is done; [`ControlFlow::Break`] stops the
/// frame with [`Error::Cancelled`].
pub type Observer = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

impl Upscaler {
    /// Loads `model`: the name of a bundled model or the path of a model file. The empty name is the default model.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::Model`] and [`Error::Io`] for the model, [`Error::Device`] for the device, which
    /// also has to compute a student rightly ([`Context::check`]), and for a ResShift model on a CUDA device in a build
    /// without the feature `cuda`; [`Error::Memory`] when that device has too little.
    pub fn load(model: &str, device: Device) -> Result<Self> {
        let model = Model::find(model)?;
        let context = match (&model, device) {
            (Model::Lite(_), Device::Cuda(ordinal)) => Some(Context::open(ordinal)?),
            _ => None,
        };
        Self::new(model, device, context)
    }

    /// As [`Self::load`], on the CUDA device that `context` is of, where frames in its memory can be upscaled
    /// ([`Self::submit_device`]).
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_in(model: &str, context: Arc<Context>) -> Result<Self> {
        let device = Device::Cuda(context.driver().info().ordinal);
        Self::new(Model::find(model)?, device, Some(context))
    }

    fn new(model: Model, device: Device, context: Option<Arc<Context>>) -> Result<Self> {
        let (family, scale) = match model {
            Model::Lite(models) => {
                if let Some(context) = &context {
                    models.iter().try_for_each(|model| context.check(model))?;
                }
                let largest = models.iter().map(|m| m.metadata.scales[1]);
                let scale = largest.fold(4.0, f64::min);
                let lite = Lite {
                    models,
                    plan: None,
                    context,
                    depth: 2,
                    resident: false,
                };
                (Family::Lite(Box::new(lite)), scale)
            }
            Model::ResShift(model) => {
                let name = model.metadata.name.clone();
                let engine = Box::new(model_engine(*model, device)?);
                let scale = engine.scale() as f64;
                (Family::ResShift { name, engine }, scale)
            }
        };
        let device = match device {
            Device::Auto => Device::Cpu,
            device => device,
        };
        Ok(Self {
            family,
            device,
            strength: 1.0,
            precision: Precision::default(),
            scale,
            pool: None,
            options: Options::default(),
            observer: None,
        })
    }

    /// Threads that one frame is spread over; 0 (the default) is one for every core.
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

    /// How much of the network's work is used: 0 is bicubic interpolation alone, 1 (the default) all of it. Values
    /// outside are clamped.
    pub fn set_strength(&mut self, strength: f32) {
        self.strength = if strength.is_nan() {
            1.0
        } else {
            strength.clamp(0.0, 1.0)
        };
    }

    /// In what numbers the model is computed, [`Precision::Auto`] by default. Published networks are computed in f32 on
    /// the CPU, whatever is set, and on CUDA devices in f16 where it is neither f32 nor bf16.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model or the device does not have the precision; the one before stays.
    pub fn set_precision(&mut self, precision: Precision) -> Result<()> {
        if precision == self.precision {
            return Ok(());
        }
        match &mut self.family {
            Family::Lite(lite) => {
                for model in &lite.models {
                    lite.resolve(precision, model)?;
                }
                // On a CUDA device there is one precision, and frames may be in flight.
                if lite.context.is_none() {
                    lite.plan = None;
                }
            }
            Family::ResShift { engine, .. } => {
                engine.set_dtype(dtype(resshift_precision(self.device, precision)));
            }
        }
        self.precision = precision;
        Ok(())
    }

    /// In what numbers frames are computed that grow by `scale`: never [`Precision::Auto`].
    pub fn active_precision(&self, scale: f64) -> Precision {
        match &self.family {
            Family::Lite(lite) => {
                let model = &lite.models[lite.model_for(scale)];
                let precision = lite.resolve(self.precision, model);
                precision.unwrap_or(Precision::F32)
            }
            Family::ResShift { .. } => resshift_precision(self.device, self.precision),
        }
    }

    /// How much noise the ResShift networks start from: 0 none, 1 (the default) what they were trained with. Less noise
    /// invents less detail. Values outside are clamped.
    pub fn set_noise(&mut self, noise: f32) {
        self.options.noise = if noise.is_nan() {
            1.0
        } else {
            noise.clamp(0.0, 1.0)
        };
    }

    /// What the noise is drawn from, 0 by default. Frames of one size get the same noise as long as the seed stays, so
    /// that a still picture stays still.
    pub fn set_seed(&mut self, seed: u64) {
        self.options.seed = seed;
    }

    /// Noise to use instead of a drawn one, for results that can be compared with other implementations; `None` goes
    /// back to the seed. A frame whose latent has another size than the field ends in [`Error::Setting`].
    pub fn set_noise_field(&mut self, field: Option<NoiseField>) {
        self.options.noise_field = field;
    }

    /// The noise that frames of `width` x `height` get before [`Self::set_noise`] weakens it: the one that was set, or
    /// the one that the seed gives. `None` for a model that starts from no noise.
    pub fn noise_field(&self, width: usize, height: usize) -> Option<NoiseField> {
        match &self.family {
            Family::Lite(_) => None,
            Family::ResShift { engine, .. } => Some(engine.noise(width, height, &self.options)),
        }
    }

    /// Steps that the ResShift networks take: 1 (the default), which is for models that were distilled to one step, up
    /// to [`Self::max_steps`], which is what others were trained with; the sampler is deterministic. Models without steps
    /// take no notice.
    ///
    /// # Errors
    /// [`Error::Setting`] for a number that the model does not take.
    pub fn set_steps(&mut self, steps: usize) -> Result<()> {
        let most = self.max_steps().unwrap_or(usize::MAX);
        if !(1..=most).contains(&steps) {
            return Err(Error::Setting(format!(
                "{steps} steps: model '{}' takes 1 to {most}",
                self.active_model(self.max_scale())
            )));
        }
        self.options.steps = steps;
        Ok(())
    }

    /// Steps of the schedule that the model was trained with; `None` for a model that has none.
    pub fn max_steps(&self) -> Option<usize> {
        match &self.family {
            Family::Lite(_) => None,
            Family::ResShift { engine, .. } => Some(engine.steps()),
        }
    }

    /// How large the pieces are that the ResShift networks work on, [`Tile::Auto`] by default.
    pub fn set_tile(&mut self, tile: Tile) {
        self.options.tile = tile;
    }

    /// Pixels of the input that neighbouring tiles share at least, 16 by default.
    pub fn set_tile_overlap(&mut self, pixels: usize) {
        self.options.overlap = pixels;
    }

    /// How the colours of what the ResShift networks make are brought back to those of the input,
    /// [`ColorFix::Wavelet`] by default.
    pub fn set_color_fix(&mut self, fix: ColorFix) {
        self.options.color_fix = fix;
    }

    /// Sets what is told how far a frame has come, and may stop it. Only ResShift networks are slow enough to tell.
    pub fn set_observer(&mut self, observer: Option<Observer>) {
        self.observer = observer;
    }

    /// The scale that the network itself makes, for networks that have only one: what is smaller is shrunk from it,
    /// and costs as much. `None` for models that serve a range.
    pub fn native_scale(&self) -> Option<f64> {
        match &self.family {
            Family::Lite(_) => None,
            Family::ResShift { engine, .. } => Some(engine.scale() as f64),
        }
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

    /// The scale that [`Self::upscale`] applies.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The largest scale that the model serves.
    pub fn max_scale(&self) -> f64 {
        match &self.family {
            Family::Lite(lite) => lite.models.last().map_or(1.0, |m| m.metadata.scales[1]),
            Family::ResShift { engine, .. } => engine.scale() as f64,
        }
    }

    /// The device in use.
    pub fn active_device(&self) -> Device {
        self.device
    }

    /// The name of the model that serves `scale`: a group such as `tiny` has one for each range of scales.
    pub fn active_model(&self, scale: f64) -> &str {
        match &self.family {
            Family::Lite(lite) => &lite.models[lite.model_for(scale)].metadata.name,
            Family::ResShift { name, .. } => name,
        }
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
        let scale = self.scale_of(&from, &to)?;
        let (strength, precision) = (self.strength, self.precision);
        let (options, family) = (&self.options, &mut self.family);
        let observer: resshift::Observer = match &mut self.observer {
            Some(observer) => Some(&mut **observer),
            None => None,
        };
        let run = || match family {
            Family::Lite(lite) => match lite.plan(scale, from, to, precision)? {
                Plan::Cpu(engine) => engine.run(src, dst, strength),
                Plan::Cuda(engine) => engine.run(src, dst, strength),
            },
            Family::ResShift { engine, .. } => engine.run(src, dst, strength, options, observer),
        };
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    /// Sets how many frames may be in flight on a CUDA device, 2 by default: with two or three, one is copied there
    /// or back while another is computed. Less than 1 is 1; frames in flight are forgotten.
    pub fn set_queue_depth(&mut self, depth: usize) {
        if let Family::Lite(lite) = &mut self.family {
            lite.depth = depth.max(1);
            lite.plan = None;
        }
    }

    /// Whether frames submitted to a CUDA device from here on stay in its memory until they are received, for
    /// [`Self::receive_device`]; otherwise (the default) they are on their way to the host as soon as they are computed.
    pub fn set_resident(&mut self, resident: bool) {
        if let Family::Lite(lite) = &mut self.family {
            lite.resident = resident;
        }
    }

    /// Whether frames go through [`Self::submit`] and [`Self::receive`]: those of students on a CUDA device.
    pub fn is_pipelined(&self) -> bool {
        matches!(&self.family, Family::Lite(lite) if lite.context.is_some())
    }

    /// Frames that [`Self::submit`] takes before one must be received; 1 on the CPU, which is for
    /// [`Self::upscale_into`].
    pub fn queue_depth(&self) -> usize {
        match &self.family {
            Family::Lite(lite) if lite.context.is_some() => lite.depth,
            _ => 1,
        }
    }

    /// Frames in flight.
    pub fn in_flight(&self) -> usize {
        self.cuda().map_or(0, cuda::Engine::in_flight)
    }

    /// Bytes of a CUDA device's memory that the plan in use takes.
    pub fn device_memory(&self) -> usize {
        self.cuda().map_or(0, cuda::Engine::memory)
    }

    fn cuda(&self) -> Option<&cuda::Engine> {
        match &self.family {
            Family::Lite(lite) => match &lite.plan {
                Some((_, Plan::Cuda(engine))) => Some(engine),
                _ => None,
            },
            Family::ResShift { .. } => None,
        }
    }

    fn cuda_mut(&mut self) -> Result<&mut cuda::Engine> {
        match &mut self.family {
            Family::Lite(lite) => match &mut lite.plan {
                Some((_, Plan::Cuda(engine))) => Some(&mut **engine),
                _ => None,
            },
            Family::ResShift { .. } => None,
        }
        .ok_or_else(|| Error::Setting("no frame is in flight".into()))
    }

    /// Sends `src` on its way to a frame `to` on a CUDA device; its samples are copied before this returns.
    ///
    /// # Errors
    /// As [`Self::upscale_into`], and [`Error::Setting`] on the CPU, when [`Self::queue_depth`] frames are in flight, or
    /// frames of another kind or size. When the device fails no frame is in flight any more.
    pub fn submit(&mut self, src: &FrameRef, to: FrameInfo) -> Result<()> {
        let strength = self.strength;
        self.engine_for(*src.info(), to)?.submit(src, strength)
    }

    /// As [`Self::submit`] for a frame `from` in the device's memory.
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
        let strength = self.strength;
        let engine = self.engine_for(from, to)?;
        // SAFETY: as the caller promises.
        unsafe { engine.submit_device(&from, planes, strength) }
    }

    /// The engine on a CUDA device for frames `from` that become frames `to`.
    fn engine_for(&mut self, from: FrameInfo, to: FrameInfo) -> Result<&mut cuda::Engine> {
        let scale = self.scale_of(&from, &to)?;
        if let Family::Lite(lite) = &mut self.family
            && lite.context.is_some()
        {
            let resident = lite.resident;
            if let Plan::Cuda(engine) = lite.plan(scale, from, to, self.precision)? {
                engine.set_resident(resident);
                return Ok(engine);
            }
        }
        Err(Error::Setting(
            "on the CPU no frames are in flight: they are upscaled one by one".into(),
        ))
    }

    /// Waits for the oldest frame in flight and copies it to `dst`. Returns where its time went.
    ///
    /// # Errors
    /// [`Error::Setting`] when no frame is in flight, [`Error::Frame`] when `dst` is not what it was submitted for,
    /// [`Error::Device`] when the device fails; then no frame is in flight any more.
    pub fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        self.cuda_mut()?.receive(dst)
    }

    /// As [`Self::receive`] for a frame `to` in the device's memory; it is complete when this returns.
    ///
    /// # Safety
    /// `planes` are those of a frame `to`, allocated in the context that the model was loaded in, and used by nobody else.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub unsafe fn receive_device(&mut self, to: FrameInfo, planes: DevicePlanes) -> Result<Times> {
        let engine = self.cuda_mut()?;
        // SAFETY: as the caller promises.
        unsafe { engine.receive_device(&to, planes) }
    }

    /// Forgets the frames in flight.
    pub fn flush(&mut self) {
        if let Ok(engine) = self.cuda_mut() {
            engine.flush();
        }
    }

    /// The larger scale of both directions from frames `from` to frames `to`.
    fn scale_of(&self, from: &FrameInfo, to: &FrameInfo) -> Result<f64> {
        if from.with_size(to.width, to.height) != *to {
            return Err(Error::Frame(format!(
                "the output frame is {} and the input frame {}: format, colour and chroma site must be the same",
                to.format.name(),
                from.format.name()
            )));
        }
        let (sx, sy) = (
            to.width as f64 / from.width as f64,
            to.height as f64 / from.height as f64,
        );
        if sx < 1.0 || sy < 1.0 {
            return Err(Error::Scale(format!(
                "{}x{} to {}x{} is smaller, this upscales",
                from.width, from.height, to.width, to.height
            )));
        }
        // Rounding a tiny frame's size may exceed the scale asked for by less than a pixel.
        let most = self.max_scale();
        let rounded = |from: usize, to: usize| (to as f64) < from as f64 * most + 1.0;
        if !rounded(from.width, to.width) || !rounded(from.height, to.height) {
            return Err(self.overscale(sx.max(sy)));
        }
        Ok(sx.max(sy))
    }

    fn overscale(&self, scale: f64) -> Error {
        let most = self.max_scale();
        Error::Scale(format!(
            "scale {scale:.3}: model '{}' serves 1 to {most}",
            self.active_model(most)
        ))
    }
}

impl Lite {
    /// The model whose range holds `scale`: the smallest below all ranges, the largest above.
    fn model_for(&self, scale: f64) -> usize {
        let serves = |m: &LiteModel| scale <= m.metadata.scales[1];
        let found = self.models.iter().position(serves);
        found.unwrap_or(self.models.len() - 1)
    }

    /// What `model` is computed in where this runs.
    fn resolve(&self, precision: Precision, model: &LiteModel) -> Result<Precision> {
        match self.context {
            None => precision.resolve(model),
            Some(_) => precision.resolve_on_cuda(),
        }
    }

    /// The plan for frames `from` that become frames `to`.
    fn plan(
        &mut self,
        scale: f64,
        from: FrameInfo,
        to: FrameInfo,
        precision: Precision,
    ) -> Result<&mut Plan> {
        let index = self.model_for(scale);
        let plan = match self.plan.take() {
            Some((i, plan)) if i == index && plan.fits(&from, &to) => plan,
            Some((i, Plan::Cuda(engine))) if engine.in_flight() > 0 => {
                self.plan = Some((i, Plan::Cuda(engine)));
                return Err(Error::Setting(
                    "frames of another size or kind are still in flight".into(),
                ));
            }
            old => {
                // Its memory is free again before the new one takes its own.
                drop(old);
                self.make(&self.models[index], from, to, precision)?
            }
        };
        Ok(&mut self.plan.insert((index, plan)).1)
    }

    fn make(
        &self,
        model: &LiteModel,
        from: FrameInfo,
        to: FrameInfo,
        precision: Precision,
    ) -> Result<Plan> {
        Ok(match &self.context {
            None => Plan::Cpu(Box::new(cpu::Engine::new(model, from, to, precision)?)),
            Some(context) => {
                let engine = cuda::Engine::new(context, model, from, to, self.depth)?;
                Plan::Cuda(Box::new(engine))
            }
        })
    }
}

impl Plan {
    fn fits(&self, from: &FrameInfo, to: &FrameInfo) -> bool {
        match self {
            Self::Cpu(engine) => engine.fits(from, to),
            Self::Cuda(engine) => engine.fits(from, to),
        }
    }
}

fn model_engine(model: ResShiftModel, device: Device) -> Result<resshift::Engine> {
    let place = device.to_candle()?;
    let (unet, autoencoder) = (model.unet(&place)?, model.autoencoder(&place)?);
    // The engine rearranges the weights; let them go where they were.
    let config = model.metadata.config;
    drop(model.tensors);
    let mut engine = resshift::Engine::new(&config, unet, autoencoder)?;
    engine.set_dtype(dtype(resshift_precision(device, Precision::default())));
    Ok(engine)
}

/// What a ResShift model is computed in on `device` where `asked` is set.
fn resshift_precision(device: Device, asked: Precision) -> Precision {
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

#[cfg(test)]
mod tests;
