//! The front door of the library.

use std::sync::Arc;

use crate::{
    Device, Error, Result,
    engine::cpu::Engine,
    frame::{Frame, FrameMut, FrameRef},
    model::LiteModel,
};

/// A loaded model that upscales frames.
///
/// It keeps its plan and working memory from frame to frame; a frame of another size or kind makes a new plan.
/// The result for a frame depends on nothing but the frame: not on the frames before it, nor on the number of
/// threads.
pub struct Upscaler {
    /// In the order of their scales.
    models: Vec<LiteModel>,
    device: Device,
    strength: f32,
    scale: f64,
    pool: Option<Arc<rayon::ThreadPool>>,
    /// The plan in use and the index of its model.
    plan: Option<(usize, Engine)>,
}

impl Upscaler {
    /// Loads `model`: the name of a bundled model or the path of a model file. The empty name is the default model.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::Model`] and [`Error::Io`] for the model, [`Error::Device`] for the device.
    pub fn load(model: &str, device: Device) -> Result<Self> {
        let device = device.resolve()?;
        let models = LiteModel::find(model)?;
        let scale = models
            .iter()
            .map(|m| m.metadata.scales[1])
            .fold(4.0, f64::min);
        Ok(Self {
            models,
            device,
            strength: 1.0,
            scale,
            pool: None,
            plan: None,
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

    /// How much of the network's residual is added: 0 is bicubic, 1 (the default) all of it. Values outside are
    /// clamped.
    pub fn set_strength(&mut self, strength: f32) {
        self.strength = if strength.is_nan() {
            1.0
        } else {
            strength.clamp(0.0, 1.0)
        };
    }

    /// Sets the scale that [`Self::upscale`] applies: 1 to [`Self::max_scale`]. Without it, the smallest of the models'
    /// largest scales (2 for the default model).
    ///
    /// # Errors
    /// [`Error::Scale`] when no model serves the scale.
    pub fn set_scale(&mut self, scale: f64) -> Result<()> {
        self.model_for(scale)?;
        self.scale = scale;
        Ok(())
    }

    /// The largest scale that the model serves.
    pub fn max_scale(&self) -> f64 {
        self.models.last().map_or(1.0, |m| m.metadata.scales[1])
    }

    /// The device in use.
    pub fn active_device(&self) -> Device {
        self.device
    }

    /// The name of the model that serves `scale`: a group such as `tiny` has one for each range of scales.
    pub fn active_model(&self, scale: f64) -> &str {
        let index = self.model_for(scale).unwrap_or(self.models.len() - 1);
        &self.models[index].metadata.name
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
    /// [`Error::Memory`] when there is not enough for frames of this size.
    pub fn upscale_into(&mut self, src: &FrameRef, dst: &mut FrameMut) -> Result<()> {
        let (from, to) = (*src.info(), *dst.info());
        if from.with_size(to.width, to.height) != to {
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
        let index = match self.model_for(sx.max(sy)) {
            Ok(index) => index,
            Err(_) if rounded(from.width, to.width) && rounded(from.height, to.height) => {
                self.models.len() - 1
            }
            Err(e) => return Err(e),
        };
        if !self
            .plan
            .as_ref()
            .is_some_and(|(i, e)| *i == index && e.fits(&from, &to))
        {
            self.plan = Some((index, Engine::new(&self.models[index], from, to)?));
        }
        let Some((_, engine)) = &mut self.plan else {
            return Ok(());
        };
        match &self.pool {
            Some(pool) => pool.install(|| engine.run(src, dst, self.strength)),
            None => engine.run(src, dst, self.strength),
        }
    }

    /// The model whose range holds `scale`. Scales below a model's range go to the smallest.
    fn model_for(&self, scale: f64) -> Result<usize> {
        let found = self
            .models
            .iter()
            .position(|m| scale <= m.metadata.scales[1]);
        found.filter(|_| scale >= 1.0).ok_or_else(|| {
            Error::Scale(format!(
                "scale {scale:.3}: model '{}' serves 1 to {}",
                self.models[self.models.len() - 1].metadata.name,
                self.max_scale()
            ))
        })
    }
}
