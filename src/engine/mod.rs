//! A model at work on frames: from the planes of a frame to the planes of a larger one.
//!
//! [`Engine`] is what a family of models offers; [`open`] turns a model into its engine.

pub mod lite;
mod noise;
mod options;
mod precision;
pub mod resshift;

use std::sync::Arc;

pub use noise::NoiseField;
pub use options::{ColorFix, Observer, Options, Progress, Setting, Tile};
pub use precision::Precision;

use crate::{
    Device, Error, Result,
    cuda::DevicePlanes,
    frame::{FrameInfo, FrameMut, FrameRef},
    model::Model,
};
use lite::cuda::Context;

/// A model that upscales frames on a device.
///
/// Frames of one kind go through [`Self::run`] one by one. An engine that is
/// [pipelined](Capabilities::pipelined) also takes them by [`Self::submit`] and gives them back, in
/// their order, by [`Self::receive`].
pub trait Engine: Send {
    fn capabilities(&self) -> &Capabilities;

    /// Returns the name of the model that serves `scale`.
    fn model(&self, scale: f64) -> &str;

    /// Returns the precision, never [`Precision::Auto`], for frames that grow by `scale`.
    fn precision(&self, scale: f64) -> Precision;

    fn options(&self) -> &Options;

    /// Replaces the options. Frames in flight are forgotten when the queue depth changes.
    ///
    /// # Errors
    /// [`Error::Setting`] when the model or the device does not take a value; the options before
    /// stay. Values of settings that the engine lacks have no effect.
    fn set_options(&mut self, options: Options) -> Result<()>;

    /// Gets ready for frames `from` that become frames `to`, which differ in size only. Without a
    /// change since the last call it does nothing.
    ///
    /// # Errors
    /// [`Error::Frame`], [`Error::Memory`] and [`Error::Device`] when such frames cannot be
    /// upscaled, [`Error::Setting`] while frames of another kind are in flight.
    fn prepare(&mut self, from: &FrameInfo, to: &FrameInfo) -> Result<()>;

    /// Upscales `src`, of the kind prepared for, into `dst`. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Frame`] when a frame is not of the kind prepared for, [`Error::Setting`] when the
    /// options do not fit it, [`Error::Memory`] when there is not enough for it, [`Error::Device`]
    /// when the device fails, [`Error::Cancelled`] when `observer` breaks.
    fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, observer: Observer) -> Result<()>;

    /// Forgets the frames seen so far, for a cut, a seek or another stream. Without
    /// [`Capabilities::history`] no frame depends on others, and this does nothing.
    fn reset(&mut self) {}

    /// Returns the noise that frames of `width` x `height` start from; `None` for models without
    /// noise.
    fn noise_field(&self, width: usize, height: usize) -> Option<NoiseField> {
        let _ = (width, height);
        None
    }

    /// Sends a frame of the kind prepared for on its way; its samples are copied before this
    /// returns.
    ///
    /// # Errors
    /// [`Error::Setting`] when the engine is not pipelined or as many frames are in flight as may
    /// be, [`Error::Frame`] when the frame is of another kind, [`Error::Device`] or
    /// [`Error::Memory`] when the device fails; then no frame is in flight any more.
    fn submit(&mut self, src: &FrameRef) -> Result<()> {
        let _ = src;
        Err(one_by_one())
    }

    /// Submits a frame `src` in the device's memory.
    ///
    /// # Safety
    /// `planes` are those of a frame `src`, allocated in the engine's context, written already, and
    /// neither written nor freed until the frame is received or forgotten.
    ///
    /// # Errors
    /// As [`Self::submit`].
    unsafe fn submit_device(&mut self, src: &FrameInfo, planes: DevicePlanes) -> Result<()> {
        let _ = (src, planes);
        Err(one_by_one())
    }

    /// Waits for the oldest frame in flight and copies it to `dst`.
    ///
    /// # Errors
    /// [`Error::Setting`] when no frame is in flight, [`Error::Frame`] when `dst` is of another
    /// kind, [`Error::Device`] when the device fails; then no frame is in flight any more.
    fn receive(&mut self, dst: &mut FrameMut) -> Result<Times> {
        let _ = dst;
        Err(none_in_flight())
    }

    /// Receives a frame `dst` in the device's memory; it is complete when this returns.
    ///
    /// # Safety
    /// `planes` are those of a frame `dst`, allocated in the engine's context, and used by nobody
    /// else.
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

    /// Forgets the frames in flight.
    fn flush(&mut self) {}

    /// Returns the bytes of the device's memory that are in use for frames of the kind prepared
    /// for.
    fn device_memory(&self) -> usize {
        0
    }
}

fn one_by_one() -> Error {
    Error::Setting("the engine has no frames in flight: it upscales them one by one".into())
}

fn none_in_flight() -> Error {
    Error::Setting("no frame is in flight".into())
}

/// Milliseconds that each of a frame's steps took by the device's own clock, without what they
/// waited for.
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
    /// Scale of the network itself, for networks that have only one: smaller frames are shrunk from
    /// it, and cost as much.
    pub native_scale: Option<f64>,
    /// Precisions in which the engine computes; others are refused or replaced by the closest, see
    /// [`Precision`].
    pub precisions: Vec<Precision>,
    /// Settings that take effect.
    pub settings: Vec<Setting>,
    /// Largest number of steps; `None` for a model without steps.
    pub max_steps: Option<usize>,
    /// Allows several frames in flight.
    pub pipelined: bool,
    /// Lets the result for a frame depend on the frames before it.
    pub history: bool,
}

impl Capabilities {
    /// Returns `true` if the engine has `setting`.
    pub fn has(&self, setting: Setting) -> bool {
        self.settings.contains(&setting)
    }
}

/// Opens the engine of `model` on `device`, or on the CUDA device that `context` belongs to. Every
/// family is registered here and nowhere else.
///
/// # Errors
/// [`Error::Device`] when the device cannot be used or computes a student wrongly, or for a
/// ResShift model on a CUDA device in a build without the feature `cuda`; [`Error::Memory`] when it
/// has too little memory.
pub fn open(
    model: Model,
    device: Device,
    context: Option<Arc<Context>>,
) -> Result<Box<dyn Engine>> {
    Ok(match (model, device) {
        (Model::Lite(models), Device::Cuda(ordinal)) => {
            let context = match context {
                Some(context) => context,
                None => Context::open(ordinal)?,
            };
            Box::new(lite::cuda::CudaEngine::new(models, context)?)
        }
        (Model::Lite(models), _) => Box::new(lite::cpu::CpuEngine::new(models)),
        (Model::ResShift(model), _) => Box::new(resshift::ResShiftEngine::new(*model, device)?),
    })
}

/// Returns the larger scale of both directions from frames `from` to frames `to`.
pub(crate) fn larger_scale(from: &FrameInfo, to: &FrameInfo) -> f64 {
    let x = to.width as f64 / from.width as f64;
    let y = to.height as f64 / from.height as f64;
    x.max(y)
}
