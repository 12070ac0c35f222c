//! Inference on frames: from the planes of a frame to the planes of a larger one.
//!
//! Every family of models implements [`Engine`]; [`open`] returns the engine of a model.

mod automatic;
pub mod lite;
pub(crate) mod noise;
mod options;
mod precision;
pub mod resshift;

pub(crate) use automatic::AutomaticDenoise;
pub use noise::NoiseField;
pub(crate) use options::AUTOMATIC_DENOISE;
pub use options::{ColorFix, Observer, Options, Progress, Setting, Temporal, Tile};
pub use precision::Precision;

use crate::{
    Device, Error, Result,
    cuda::{DevicePlanes, ExternalContext, HostAllocator},
    frame::{FrameInfo, FrameMut, FrameRef},
    kernels::cpu::Cpu,
    model::Model,
};

/// A model that upscales frames on a device.
///
/// [`Self::run`] upscales one frame. A [pipelined](Capabilities::pipelined) engine also takes
/// frames with [`Self::submit`] and returns them in the same order with [`Self::receive`].
pub trait Engine: Send {
    /// Returns scales, precisions and settings.
    fn capabilities(&self) -> &Capabilities;

    /// Returns the name of the model for `scale`.
    fn model(&self, scale: f64) -> &str;

    /// Returns the precision, never [`Precision::Auto`], for frames that grow by `scale`.
    fn precision(&self, scale: f64) -> Precision;

    /// Returns the options in force.
    fn options(&self) -> &Options;

    /// Replaces the options. Drops the frames in flight if the queue depth changes. Values of
    /// settings that the engine lacks have no effect.
    ///
    /// # Errors
    /// [`Error::Setting`] if the model or the device does not support a value. The previous options
    /// then stay in force.
    fn set_options(&mut self, options: Options) -> Result<()>;

    /// Prepares for frames `from` that become frames `to`, which differ in size only. Does nothing
    /// if frames and options are those of the last call.
    ///
    /// # Errors
    /// [`Error::Frame`], [`Error::Memory`] and [`Error::Device`] if such frames cannot be upscaled,
    /// [`Error::InFlight`] while frames of another kind or size are in flight.
    fn prepare(&mut self, from: &FrameInfo, to: &FrameInfo) -> Result<()>;

    /// Upscales `src`, of the kind and size prepared for, into `dst`. Runs on the current rayon
    /// pool.
    ///
    /// # Errors
    /// [`Error::Frame`] if a frame is not of the kind and size prepared for, [`Error::Setting`] if
    /// the options do not fit it, [`Error::Memory`] if there is not enough memory,
    /// [`Error::Device`] if the device fails, [`Error::Cancelled`] if `observer` breaks.
    fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, observer: Observer) -> Result<()>;

    /// Forgets previous frames, after a cut, a seek or a change of streams. Does nothing without
    /// [`Capabilities::history`], because then no frame depends on others.
    fn reset(&mut self) {}

    /// Returns the initial noise of frames of `width` x `height`; `None` for a model without noise.
    fn noise_field(&self, width: usize, height: usize) -> Option<NoiseField> {
        let _ = (width, height);
        None
    }

    /// Submits a frame of the kind and size prepared for. Its samples are copied before this
    /// returns.
    ///
    /// # Errors
    /// [`Error::InFlight`] if the engine is not pipelined or the maximum number of frames is in
    /// flight, [`Error::Frame`] if the frame is of another kind or size, [`Error::Device`] or
    /// [`Error::Memory`] if the device fails; then no frame is in flight any more.
    fn submit(&mut self, src: &FrameRef) -> Result<()> {
        let _ = src;
        Err(not_pipelined())
    }

    /// Submits a frame in device memory.
    ///
    /// # Safety
    /// `planes` hold a frame `src` in memory of the engine's context. Nothing writes or frees them
    /// until the frame is received or dropped.
    ///
    /// # Errors
    /// As [`Self::submit`].
    unsafe fn submit_device(&mut self, src: &FrameInfo, planes: DevicePlanes) -> Result<()> {
        let _ = (src, planes);
        Err(not_pipelined())
    }

    /// Waits for the oldest frame in flight and copies it to `dst`.
    ///
    /// # Errors
    /// [`Error::InFlight`] if no frame is in flight, [`Error::Frame`] if `dst` is of another kind
    /// or size, [`Error::Device`] or [`Error::DeviceLost`] if the device fails; then no frame is in
    /// flight any more.
    fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        let _ = dst;
        Err(none_in_flight())
    }

    /// Receives a frame in device memory. It is complete when this returns.
    ///
    /// # Safety
    /// `planes` hold a frame `dst` in memory of the engine's context, which nothing else uses.
    ///
    /// # Errors
    /// As [`Self::receive`].
    unsafe fn receive_device(&mut self, dst: &FrameInfo, planes: DevicePlanes) -> Result<Times> {
        let _ = (dst, planes);
        Err(none_in_flight())
    }

    /// Returns the number of frames in flight.
    fn in_flight(&self) -> usize {
        0
    }

    /// Drops the frames in flight.
    fn flush(&mut self) {}

    /// Returns an allocator of memory that the device accesses directly; `None` on the CPU.
    fn host_allocator(&self) -> Option<HostAllocator> {
        None
    }

    /// Returns the device memory in use, in bytes.
    fn device_memory(&self) -> usize {
        0
    }
}

fn not_pipelined() -> Error {
    Error::InFlight("the engine upscales one frame at a time: none can be in flight".into())
}

fn none_in_flight() -> Error {
    Error::InFlight("no frame is in flight".into())
}

/// Times of a frame's stages in milliseconds, by the clock of the device, without waits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    pub upload: f32,
    pub compute: f32,
    pub download: f32,
}

/// Abilities of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Capabilities {
    /// Smallest and largest scale.
    pub scales: [f64; 2],
    /// Scale that suits the model best.
    pub default_scale: f64,
    /// Scale of a network that has only one. Smaller outputs are shrunk from it and take as long.
    pub native_scale: Option<f64>,
    /// Precisions in which the engine computes. Others are refused or replaced by the closest one,
    /// see [`Precision`].
    pub precisions: Vec<Precision>,
    /// Settings that have an effect.
    pub settings: Vec<Setting>,
    /// Largest number of steps; `None` for a model without steps.
    pub max_steps: Option<usize>,
    /// Several frames may be in flight.
    pub pipelined: bool,
    /// The result for a frame may depend on previous frames, see [`Temporal`].
    pub history: bool,
}

impl Capabilities {
    /// Returns `true` if the engine has `setting`.
    pub fn has(&self, setting: Setting) -> bool {
        self.settings.contains(&setting)
    }
}

/// Opens the engine of `model` on `device`. A student on a CUDA device uses `context` if there is
/// one. This is the only function that knows all families.
///
/// # Errors
/// [`Error::Device`] if the device cannot be used or computes a student wrongly, or for a ResShift
/// model on a CUDA device in a build without the feature `cuda`; [`Error::Memory`] if the device
/// has too little memory; [`Error::Setting`] if the environment variable `TADSR_CPU` is invalid.
pub fn open(
    model: Model,
    device: Device,
    context: Option<ExternalContext>,
) -> Result<Box<dyn Engine>> {
    Cpu::from_env().map_err(|error| Error::Setting(error.to_string()))?;
    Ok(match (model, device) {
        (Model::Lite(models), Device::Cuda(ordinal)) => {
            let context = match context {
                Some(context) => lite::cuda::Context::open_in(context)?,
                None => lite::cuda::Context::open(ordinal)?,
            };
            Box::new(lite::cuda::CudaEngine::new(models, context)?)
        }
        (Model::Lite(models), _) => Box::new(lite::cpu::CpuEngine::new(models)),
        (Model::ResShift(model), _) => Box::new(resshift::ResShiftEngine::new(*model, device)?),
    })
}

/// Returns the scale from frames `from` to frames `to`, the larger one of both directions.
pub(crate) fn larger_scale(from: &FrameInfo, to: &FrameInfo) -> f64 {
    let x = to.width as f64 / from.width as f64;
    let y = to.height as f64 / from.height as f64;
    x.max(y)
}
