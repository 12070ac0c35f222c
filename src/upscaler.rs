//! The front door of the library.

use std::{ops::ControlFlow, sync::Arc};

use crate::{
    Device, Error, Result,
    engine::{
        cpu::Engine,
        official::{ColorFix, NoiseField, Options, Progress, Tile},
    },
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
    /// For published networks.
    options: Options,
    observer: Option<Observer>,
}

/// Called before every pass through a published network, and when the last is done; [`ControlFlow::Break`] stops the
/// frame with [`Error::Cancelled`].
pub type Observer = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

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

    /// How much noise the published networks start from: 0 none, 1 (the default) what they were trained with. Less noise
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
    pub fn noise_field(&self, _width: usize, _height: usize) -> Option<NoiseField> {
        None
    }

    /// Steps that the published networks take: 1 (the default), which is for models that were distilled to one step,
    /// or as many as [`Self::max_steps`] says. Other models take no notice.
    ///
    /// # Errors
    /// [`Error::Setting`] for any other number.
    pub fn set_steps(&mut self, steps: usize) -> Result<()> {
        let all = self.max_steps().unwrap_or(steps);
        if steps != 1 && steps != all {
            return Err(Error::Setting(format!(
                "{steps} steps: model '{}' takes 1 or {all}",
                self.active_model(self.max_scale())
            )));
        }
        self.options.steps = steps;
        Ok(())
    }

    /// Steps of the schedule that the model was trained with; `None` for a model that has none.
    pub fn max_steps(&self) -> Option<usize> {
        None
    }

    /// How large the pieces are that the published networks work on, [`Tile::Auto`] by default.
    pub fn set_tile(&mut self, tile: Tile) {
        self.options.tile = tile;
    }

    /// Pixels of the input that neighbouring tiles share at least, 16 by default.
    pub fn set_tile_overlap(&mut self, pixels: usize) {
        self.options.overlap = pixels;
    }

    /// How the colours of what the published networks make are brought back to those of the input,
    /// [`ColorFix::Wavelet`] by default.
    pub fn set_color_fix(&mut self, fix: ColorFix) {
        self.options.color_fix = fix;
    }

    /// Sets what is told how far a frame has come, and may stop it. Only published networks are slow enough to tell.
    pub fn set_observer(&mut self, observer: Option<Observer>) {
        self.observer = observer;
    }

    /// The scale that the network itself makes, for networks that have only one: what is smaller is shrunk from it,
    /// and costs as much. `None` for models that serve a range.
    pub fn native_scale(&self) -> Option<f64> {
        None
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
