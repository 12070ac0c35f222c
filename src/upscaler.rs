//! The front door of the library.

use crate::{
    Device, Result,
    frame::{Frame, FrameMut, FrameRef},
};

/// A loaded model that upscales frames.
///
/// It keeps its working memory from frame to frame, so a stream of frames of one size allocates nothing after the
/// first.
pub struct Upscaler {
    strength: f32,
}

impl Upscaler {
    /// Loads `model`: the name of a bundled model or the path of a model file. The empty name is the default model.
    ///
    /// # Errors
    /// [`crate::Error::UnknownModel`], [`crate::Error::Model`], [`crate::Error::Device`].
    pub fn load(_model: &str, device: Device) -> Result<Self> {
        device.resolve()?;
        Ok(Self { strength: 1.0 })
    }

    /// Threads that one frame is spread over; 0 is one for every core.
    pub fn set_threads(&mut self, _threads: usize) -> Result<()> {
        Ok(())
    }

    /// How much of the network's residual is added: 0 is bicubic, 1 (the default) all of it. Values outside are
    /// clamped.
    pub fn set_strength(&mut self, strength: f32) {
        self.strength = strength.clamp(0.0, 1.0);
    }

    /// The scale that [`Self::upscale`] applies, above 1 up to [`Self::max_scale`].
    pub fn set_scale(&mut self, _scale: f64) -> Result<()> {
        Ok(())
    }

    /// The largest scale that the model serves.
    pub fn max_scale(&self) -> f64 {
        4.0
    }

    /// The device in use, as text.
    pub fn active_device(&self) -> Device {
        Device::Cpu
    }

    /// The name of the model that serves `scale` (a bundled name can stand for one file a scale range).
    pub fn active_model(&self, _scale: f64) -> &str {
        "tiny"
    }

    /// Upscales `frame` by the scale set, rounding the size up to whole pixels.
    pub fn upscale(&mut self, frame: &Frame) -> Result<Frame> {
        let info = frame.info();
        let mut out = Frame::new(info.with_size(info.width * 2, info.height * 2))?;
        self.upscale_into(&frame.as_ref(), &mut out.as_mut())?;
        Ok(out)
    }

    /// Upscales `src` into `dst`, whose size sets the scale (each direction its own, 1 to [`Self::max_scale`]).
    /// Format and colorimetry must be the same.
    pub fn upscale_into(&mut self, _src: &FrameRef, _dst: &mut FrameMut) -> Result<()> {
        Ok(())
    }
}
