//! Evaluation of models beside plain interpolation: images and clips are shrunk, degraded, upscaled
//! by every method, and measured.
//!
//! `docs/evaluation.md` describes the procedure and the sources of the metrics.

#[cfg(feature = "video")]
mod clip;
mod condition;
mod method;
mod picture;

#[cfg(feature = "video")]
pub use clip::Clip;
pub use condition::Condition;
pub use method::{INTERPOLATIONS, Method};

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::data::{DataError, files, is_image, is_video};
use crate::{
    Error, Result,
    frame::{Component, FrameRef},
    metrics::{Gray, Lpips, LpipsFeatures, Niqe, Picture, ms_ssim, psnr, ssim},
};

/// Method that all others are compared with.
pub const REFERENCE: &str = "bicubic";

/// Returns the images and the clips below `paths`, each in sorted order. A file in `paths` is a
/// clip if it has the name of a video file, otherwise an image.
///
/// # Errors
/// [`DataError::Read`] for a directory that cannot be read.
pub fn media_files(paths: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<PathBuf>), DataError> {
    let found = files(paths, |path| is_image(path) || is_video(path))?;
    Ok(found.into_iter().partition(|path| !is_video(path)))
}

/// Metrics that need a file.
#[derive(Default)]
pub struct MetricModels {
    pub lpips: Option<Lpips>,
    pub niqe: Option<Niqe>,
}

impl MetricModels {
    /// Loads the metrics whose file is given.
    ///
    /// # Errors
    /// Those of [`Lpips::load`] and [`Niqe::load`].
    pub fn load(lpips: Option<&Path>, niqe: Option<&Path>) -> Result<Self> {
        Ok(Self {
            lpips: lpips.map(Lpips::load).transpose()?,
            niqe: niqe.map(Niqe::load).transpose()?,
        })
    }
}

/// Measurement of methods under conditions at scales.
pub struct Evaluation {
    methods: Vec<Method>,
    scales: Vec<f64>,
    conditions: Vec<Condition>,
    models: MetricModels,
    stop: Arc<AtomicBool>,
}

impl Evaluation {
    /// Creates an evaluation. It ends with [`Error::Cancelled`] soon after `stop` is set.
    ///
    /// # Errors
    /// [`Error::Scale`] when a method does not serve a scale.
    pub fn new(
        mut methods: Vec<Method>,
        scales: Vec<f64>,
        conditions: Vec<Condition>,
        models: MetricModels,
        stop: Arc<AtomicBool>,
    ) -> Result<Self> {
        for method in &mut methods {
            method.check(&scales)?;
            method.stop_when(&stop);
        }
        Ok(Self {
            methods,
            scales,
            conditions,
            models,
            stop,
        })
    }

    /// Number of scales, each of which measures every image and frame.
    pub fn passes(&self) -> usize {
        self.scales.len()
    }
}

fn check(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::SeqCst) {
        Err(Error::Cancelled)
    } else {
        Ok(())
    }
}

/// Image or frame without its border.
struct View {
    luma: Gray,
    rgb: Picture,
}

impl View {
    /// Takes `frame` without `border` pixels on each side. Luma is that of the frame, on the scale
    /// 16..235, or [`Picture::luma`] if the frame has none.
    fn of(frame: &FrameRef, border: usize) -> Result<Self> {
        let info = frame.info();
        let (width, height) = (info.width, info.height);
        let rgb = Picture::new(width, height, frame.to_rgb8()?)?.cropped(border);
        if rgb.rgb().is_empty() {
            return Err(Error::Data(format!(
                "nothing is left of {width}x{height} pixels without a border of {border}"
            )));
        }
        if info.format.component(Component::Y).is_none() {
            let luma = rgb.luma();
            return Ok(Self { luma, rgb });
        }
        let mut samples = vec![0.0; width * height];
        frame.read(Component::Y, &mut samples)?;
        let rows = samples.chunks_exact(width).skip(border).take(rgb.height());
        let luma = rows
            .flat_map(|row| &row[border..][..rgb.width()])
            .map(|y| 16.0 + 219.0 * y);
        let luma = Gray {
            width: rgb.width(),
            height: rgb.height(),
            data: luma.collect(),
        };
        Ok(Self { luma, rgb })
    }
}

/// Metrics of a single image or frame.
#[derive(Clone, Copy)]
struct Scores {
    psnr_y: f64,
    ssim: Option<f64>,
    ms_ssim: Option<f64>,
    lpips: Option<f64>,
    niqe: Option<f64>,
}

/// Ground truth and its features.
struct Truth {
    view: View,
    features: Option<LpipsFeatures>,
}

impl Truth {
    fn new(view: View, models: &MetricModels) -> Result<Self> {
        let features = models.lpips.as_ref().map(|l| l.features(&view.rgb));
        Ok(Self {
            features: features.transpose()?,
            view,
        })
    }

    fn score(&self, result: &View, models: &MetricModels) -> Result<Scores> {
        let (truth, luma) = (&self.view.luma, &result.luma);
        let lpips = match (&models.lpips, &self.features) {
            (Some(l), Some(f)) => Some(l.distance(f, &l.features(&result.rgb)?)?),
            _ => None,
        };
        let natural = |n: &Niqe| n.score(luma);
        Ok(Scores {
            psnr_y: psnr(truth, luma),
            ssim: ssim(truth, luma),
            ms_ssim: ms_ssim(truth, luma),
            lpips,
            niqe: models.niqe.as_ref().map(natural).transpose()?.flatten(),
        })
    }
}

/// Width of the border that is not measured.
fn border(scale: f64) -> usize {
    scale.ceil() as usize
}

/// Returns the low-resolution length for an image of `len` pixels, a multiple of `multiple`, and
/// the length that it becomes at `scale`: whole pixels, at most `len`.
fn fitting(len: usize, scale: f64, multiple: usize) -> (usize, usize) {
    let small = (len as f64 / scale + 1e-9).floor() as usize;
    let small = small - small % multiple;
    (small, (small as f64 * scale - 1e-9).ceil() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Frame, FrameInfo, PixelFormat};

    #[test]
    fn images_are_cut_to_a_size_that_the_scale_divides() {
        assert_eq!(fitting(321, 2.0, 1), (160, 320));
        assert_eq!(fitting(321, 4.0, 1), (80, 320));
        assert_eq!(fitting(10, 1.5, 1), (6, 9));
        assert_eq!(fitting(3, 4.0, 1), (0, 0));
        assert_eq!(fitting(359, 3.0, 2), (118, 354));
        for len in 1..200 {
            for scale in [1.1, 4.0 / 3.0, 1.5, 2.0, 2.25, 3.0, 3.7, 4.0] {
                for multiple in [1, 2] {
                    let (small, large) = fitting(len, scale, multiple);
                    assert!(large <= len && small % multiple == 0);
                    assert!((large as f64 - small as f64 * scale).abs() < 1.0);
                }
            }
        }
    }

    #[test]
    fn luma_of_video_is_that_of_its_own_plane_without_the_border() {
        let mut frame = Frame::new(FrameInfo::new(PixelFormat::I420, 6, 4)).unwrap();
        let codes = frame.plane_mut(0).iter_mut().enumerate();
        codes.for_each(|(i, v)| *v = 20 + i as u8);
        let view = View::of(&frame.as_ref(), 1).unwrap();
        assert_eq!((view.luma.width, view.luma.height), (4, 2));
        for (got, want) in view.luma.data.iter().zip([27, 28, 29, 30, 33]) {
            assert!((got - want as f32).abs() < 1e-3, "{got}, not {want}");
        }
        assert!(View::of(&frame.as_ref(), 2).is_err());
    }
}
