//! Upscaling methods to compare.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    Device, Error, Result, Upscaler,
    engine::Setting,
    frame::{
        Frame,
        resample::{Kernel, Resampler},
    },
};

/// Plain interpolations by name.
pub const INTERPOLATIONS: [(&str, Kernel); 3] = [
    (super::REFERENCE, Kernel::Bicubic),
    ("catmull-rom", Kernel::CatmullRom),
    ("lanczos3", Kernel::Lanczos3),
];

/// Upscaling method and its name in tables.
pub struct Method {
    name: String,
    kind: Kind,
}

enum Kind {
    Interpolation(Kernel),
    Model(Streams),
}

/// Upscalers of one model for streams of frames that are upscaled in turn.
struct Streams {
    /// Name or path of the model, with settings.
    name: String,
    device: Device,
    /// Ends a frame of a slow model.
    stop: Arc<AtomicBool>,
    /// One for each stream if a result depends on previous frames, otherwise one for all. Not
    /// empty.
    upscalers: Vec<Upscaler>,
}

impl Method {
    /// Returns one of [`INTERPOLATIONS`].
    pub fn interpolation(name: &str) -> Option<Self> {
        let (name, kernel) = INTERPOLATIONS.into_iter().find(|i| i.0 == name)?;
        Some(Self {
            name: name.into(),
            kind: Kind::Interpolation(kernel),
        })
    }

    /// Loads a bundled model by name, or a model file by path, on `device`. Settings may follow, as
    /// in `tiny@denoise=0.4,precision=f32`: `denoise`, `detail`, `strength`, `temporal` and
    /// `precision`.
    ///
    /// # Errors
    /// Those of [`Upscaler::load`]; [`Error::Setting`] for a setting that is unknown or that the
    /// model lacks.
    pub fn model(name: &str, device: Device) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            kind: Kind::Model(Streams {
                name: name.into(),
                device,
                stop: Arc::default(),
                upscalers: vec![load(name, device)?],
            }),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks that the method serves `scales`.
    pub(super) fn check(&self, scales: &[f64]) -> Result<()> {
        let Kind::Model(streams) = &self.kind else {
            return Ok(());
        };
        let max = streams.upscalers[0].max_scale();
        match scales.iter().find(|s| **s > max) {
            Some(scale) => Err(Error::Scale(format!(
                "model '{}' serves scales up to {max}, not {scale}",
                self.name
            ))),
            None => Ok(()),
        }
    }

    /// Makes slow models stop within a frame once `stop` is set.
    pub(super) fn stop_when(&mut self, stop: &Arc<AtomicBool>) {
        if let Kind::Model(streams) = &mut self.kind {
            streams.stop = stop.clone();
        }
    }

    /// Begins `count` streams of frames, which are independent of each other and of all frames
    /// before.
    ///
    /// # Errors
    /// Those of [`Self::model`].
    pub(super) fn begin(&mut self, count: usize) -> Result<()> {
        let Kind::Model(streams) = &mut self.kind else {
            return Ok(());
        };
        let capabilities = streams.upscalers[0].capabilities();
        if capabilities.history || capabilities.has(Setting::Denoise) {
            while streams.upscalers.len() < count {
                let upscaler = load(&streams.name, streams.device)?;
                streams.upscalers.push(upscaler);
            }
        }
        for upscaler in &mut streams.upscalers {
            upscaler.reset();
            let stop = streams.stop.clone();
            upscaler.set_observer(Some(Box::new(move |_| {
                if stop.load(Ordering::SeqCst) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })));
        }
        Ok(())
    }

    /// Upscales `small`, the next frame of stream `stream`, to `width` x `height`, in its format.
    pub(super) fn upscale(
        &mut self,
        stream: usize,
        small: &Frame,
        (width, height): (usize, usize),
    ) -> Result<Frame> {
        match &mut self.kind {
            Kind::Interpolation(kernel) => resized(small, width, height, *kernel),
            Kind::Model(Streams { upscalers, .. }) => {
                let mut large = Frame::new(small.info().with_size(width, height))?;
                let last = upscalers.len() - 1;
                upscalers[stream.min(last)].upscale_into(&small.as_ref(), &mut large.as_mut())?;
                Ok(large)
            }
        }
    }
}

/// Loads a model with settings, see [`Method::model`].
fn load(name: &str, device: Device) -> Result<Upscaler> {
    let (model, settings) = match name.rsplit_once('@') {
        Some((model, settings)) if settings.contains('=') => (model, settings),
        _ => (name, ""),
    };
    let mut upscaler = Upscaler::load(model, device)?;
    for setting in settings.split(',').filter(|s| !s.is_empty()) {
        set(&mut upscaler, setting)?;
    }
    Ok(upscaler)
}

/// Applies `setting`, such as `denoise=0.4`.
fn set(upscaler: &mut Upscaler, setting: &str) -> Result<()> {
    let known = "denoise, detail or strength from 0 to 1, temporal or precision";
    let wrong = || Error::Setting(format!("'{setting}': use {known}, as in denoise=0.4"));
    let (key, text) = setting.split_once('=').ok_or_else(wrong)?;
    match key {
        "precision" => return upscaler.set_precision(text.parse()?),
        "temporal" => return upscaler.set_temporal(text.parse()?),
        _ => {}
    }
    let value: f32 = text.parse().map_err(|_| wrong())?;
    if !(0.0..=1.0).contains(&value) {
        return Err(wrong());
    }
    match key {
        "denoise" => upscaler.set_denoise(Some(value)),
        "detail" => upscaler.set_detail(Some(value)),
        "strength" => upscaler.set_strength(value),
        _ => Err(wrong()),
    }
}

/// Resizes `frame` component by component, with antialiasing if it shrinks.
pub(super) fn resized(frame: &Frame, width: usize, height: usize, kernel: Kernel) -> Result<Frame> {
    let info = frame.info();
    let mut out = Frame::new(info.with_size(width, height))?;
    let shrinks = width < info.width || height < info.height;
    for layout in info.format.components() {
        let component = layout.component;
        let (w, h) = info
            .format
            .component_size(component, info.width, info.height);
        let (to_w, to_h) = info.format.component_size(component, width, height);
        let (mut from, mut to) = (vec![0.0; w * h], vec![0.0; to_w * to_h]);
        frame.as_ref().read(component, &mut from)?;
        Resampler::for_component(info, component, width, height, kernel, shrinks)?
            .run(&from, &mut to);
        out.as_mut().write(component, &to)?;
    }
    Ok(out)
}
