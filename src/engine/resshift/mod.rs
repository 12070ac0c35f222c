//! The ResShift family: networks of ResShift, SinSR and TAD-SR.
//!
//! A frame is converted to planes of R'G'B', padded by reflection to whole units of the networks,
//! enlarged by bicubic interpolation and split into tiles. Each tile is encoded, noise is added to
//! its latent, the U-Net predicts the clean latent, and that is decoded. The tiles are blended and
//! get the colours of the enlarged input. The result is converted back to the format of the frame
//! with the same matrix, without rounding in between.
//!
//! The result depends on the frame, the options and the model, not on the number of threads. With
//! automatic tiles it also depends on the memory that is free at the first frame of a size.

mod color_fix;
mod engine;
mod geometry;
mod memory;
#[cfg(test)]
mod tests;
mod tiles;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

pub use engine::ResShiftEngine;

use super::{ColorFix, NoiseField, Observer, Options, Progress, Tile};
use crate::{
    Error, Result,
    diffusion::{self, Schedule},
    frame::{
        Component, FrameInfo, FrameMut, FrameRef,
        resample::{self, Axis, Kernel, Resampler},
    },
    nn::resshift::{Autoencoder, ResShiftConfig, Unet},
    ops::PackedConv2d,
};
use geometry::Geometry;
use tiles::{TileAxis, crop, reflect_pad};

/// Planes of R, G and B with rows without padding.
pub type Planes = [Vec<f32>; 3];

/// A ResShift model ready for frames of any kind and size.
pub struct Runner {
    unet: Unet,
    autoencoder: Autoencoder,
    schedule: Schedule,
    geometry: Geometry,
    /// Tiles of frames of one size and settings. They are chosen once, so that equal frames have
    /// equal results when the free memory changes.
    tiling: Option<(TilingKey, [TileAxis; 2])>,
}

/// Width, height, tile and overlap.
type TilingKey = (usize, usize, Tile, usize);

/// State of a frame in the networks.
struct TiledImage {
    /// Padded input, 0 to 1.
    lq: Planes,
    /// Padded input, enlarged by bicubic interpolation.
    base: Planes,
    /// Weighted sum of the results of the tiles.
    sum: Planes,
    /// Tiles, horizontally and vertically.
    tiling: [TileAxis; 2],
}

impl Runner {
    /// Creates the runner of networks on one device. Packs their weights where operators with
    /// packed weights exist.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the configuration is invalid.
    pub fn new(
        config: &ResShiftConfig,
        mut unet: Unet,
        mut autoencoder: Autoencoder,
    ) -> Result<Self> {
        let mut geometry = Geometry::new(config);
        if PackedConv2d::serves(unet.device(), unet.dtype()) {
            unet.pack()?;
            autoencoder.pack()?;
        }
        if !unet.device().is_cpu() || unet.dtype() != DType::F32 {
            geometry.compose();
        }
        Ok(Self {
            unet,
            autoencoder,
            schedule: Schedule::new(&config.diffusion)?,
            geometry,
            tiling: None,
        })
    }

    /// Sets the type of the networks' feature maps. On the CPU it must stay f32, the type of the
    /// packed weights.
    pub fn set_dtype(&mut self, dtype: DType) {
        self.unet.set_dtype(dtype);
        self.autoencoder.set_dtype(dtype);
    }

    /// Returns the scale of the networks.
    pub fn scale(&self) -> usize {
        self.geometry.scale
    }

    /// Returns the number of steps of the schedule.
    pub fn steps(&self) -> usize {
        self.schedule.steps()
    }

    /// Returns the initial noise of frames of `width` x `height`, without the factor
    /// [`Options::noise`].
    pub fn noise(&self, width: usize, height: usize, options: &Options) -> NoiseField {
        let [channels, h, w] = self.geometry.latent(width, height);
        match &options.noise_field {
            Some(field) => field.clone(),
            None => NoiseField::seeded(channels, h, w, options.seed),
        }
    }

    /// Returns an estimate of the peak memory in bytes for a frame of `width` x `height`, without
    /// the weights and the frame itself.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is less memory.
    pub fn memory(&mut self, width: usize, height: usize, options: &Options) -> Result<u64> {
        let tiling = self.tiling(width, height, options)?;
        Ok(self.geometry.frame_bytes(width, height) + self.geometry.tile_bytes(&tiling))
    }

    /// Upscales `src` into `dst`. The result is the mean of bicubic interpolation and the networks'
    /// result, weighted by [`Options::strength`]. If `dst` is smaller than the networks' result,
    /// that is shrunk. Alpha is interpolated. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Setting`] if the noise or the steps do not fit, [`Error::Memory`] if there is not
    /// enough memory for the tiles, [`Error::Cancelled`] if `observer` breaks.
    pub fn run(
        &mut self,
        src: &FrameRef,
        dst: &mut FrameMut,
        options: &Options,
        observer: Observer,
    ) -> Result<()> {
        let strength = options.strength;
        let (from, to) = (*src.info(), *dst.info());
        let plain = |component| interpolated(src, component, &to);
        if strength <= 0.0 {
            for at in from.format.components() {
                dst.write(at.component, &plain(at.component)?)?;
            }
            return Ok(());
        }
        // Checks before the work begins.
        self.checked_tiling(from.width, from.height, options)?;
        let rgb = self.restore(src.to_rgb()?, from.width, options, observer)?;
        let native = (from.width * self.scale(), from.height * self.scale());
        let rgb = resized(rgb, native, (to.width, to.height));
        for (component, mut plane) in to.planes_of_rgb(rgb) {
            if strength < 1.0 {
                for (v, p) in plane.iter_mut().zip(plain(component)?) {
                    *v = p + strength * (*v - p);
                }
            }
            dst.write(component, &plane)?;
        }
        if to.format.has_alpha() {
            dst.write(Component::A, &plain(Component::A)?)?;
        }
        Ok(())
    }

    /// Upscales planes of `width` samples in a row, 0 (black) to 1 (white), by the scale of the
    /// networks.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn restore(
        &mut self,
        rgb: Planes,
        width: usize,
        options: &Options,
        observer: Observer,
    ) -> Result<Planes> {
        let scale = self.scale();
        let height = rgb[0].len() / width;
        let tiling = self.checked_tiling(width, height, options)?;
        let noise = self.noise(width, height, options);
        let mut image = TiledImage::new(rgb, width, scale, tiling);
        let mut passes = Passes::new(observer, image.tiles(), options.steps + 2);
        for tile in 0..image.tiles() {
            let result = self.restore_tile(&image, tile, &noise, options, &mut passes)?;
            image.add(tile, &result, scale);
        }
        passes.next()?;
        Ok(image.finish(options.color_fix, (width * scale, height * scale), scale))
    }

    /// Checks that the options fit a frame. Returns its tiles.
    fn checked_tiling(
        &mut self,
        width: usize,
        height: usize,
        options: &Options,
    ) -> Result<[TileAxis; 2]> {
        let expected = self.geometry.latent(width, height);
        if let Some(field) = &options.noise_field
            && field.shape() != expected
        {
            return Err(Error::Setting(format!(
                "the noise has {:?} channels, rows and columns, a frame of {width}x{height} needs \
                 {expected:?}",
                field.shape()
            )));
        }
        if !(1..=self.steps()).contains(&options.steps) {
            return Err(Error::Setting(format!(
                "{} steps are not supported: the model has 1 to {}",
                options.steps,
                self.steps()
            )));
        }
        self.tiling(width, height, options)
    }

    fn tiling(&mut self, width: usize, height: usize, options: &Options) -> Result<[TileAxis; 2]> {
        let key = (width, height, options.tile, options.tile_overlap);
        if let Some((known, tiling)) = &self.tiling
            && *known == key
        {
            return Ok(tiling.clone());
        }
        let planes = self.geometry.frame_bytes(width, height);
        let available = || memory::available_on(self.unet.device(), planes);
        let tiling = self.geometry.tiling(width, height, options, available)?;
        self.tiling = Some((key, tiling.clone()));
        Ok(tiling)
    }

    /// Returns the result of the networks for one tile: rows of R, G, B samples, -1 to 1.
    fn restore_tile(
        &self,
        image: &TiledImage,
        tile: usize,
        noise: &NoiseField,
        options: &Options,
        passes: &mut Passes,
    ) -> Result<Vec<f32>> {
        let ([x, y], [w, h]) = image.position(tile);
        let [_, top, left] = self.geometry.latent_at(x, y);
        let [channels, rows, columns] = self.geometry.latent_at(w, h);
        let noise = noise.part([top, left], [rows, columns], options.noise);
        let device = self.unet.device();
        let noise = Tensor::from_vec(noise, (1, rows, columns, channels), device)?;

        passes.next()?;
        let zy =
            self.autoencoder
                .encode(&image.tensor(Layer::Base, tile, self.scale(), device)?)?;
        let z = self.schedule.prior(&zy, &noise)?;
        let lq = if self.unet.config().cond_lq {
            Some(image.tensor(Layer::Lq, tile, 1, device)?)
        } else {
            None
        };
        let denoise = |z: &Tensor, t| {
            passes.next().map_err(candle_core::Error::wrap)?;
            self.unet.forward(z, &[t], lq.as_ref())
        };
        let z0 = diffusion::deterministic(&self.schedule, &zy, &z, options.steps, denoise);
        let z0 = passes.unless_stopped(z0)?;
        passes.next()?;
        // Quantisation in the decoder would hide values that are not finite.
        self.finite(&z0)?;
        self.finite(&self.autoencoder.decode(&z0, true)?)
    }

    /// Returns the values of `t`.
    ///
    /// # Errors
    /// [`Error::Setting`] if a value is not finite.
    fn finite(&self, t: &Tensor) -> Result<Vec<f32>> {
        let values: Vec<f32> = t.flatten_all()?.to_vec1()?;
        if values.iter().all(|v| v.is_finite()) {
            return Ok(values);
        }
        let hint = match self.unet.dtype() {
            DType::F16 => ": f16 may have overflowed, use precision bf16 or f32",
            _ => "",
        };
        let text = format!("the result of the model is not finite{hint}");
        Err(Error::Setting(text))
    }
}

/// Counter of passes through the networks, which calls the observer.
struct Passes<'a> {
    observer: Observer<'a>,
    progress: Progress,
    started: bool,
    stopped: bool,
}

impl<'a> Passes<'a> {
    fn new(observer: Observer<'a>, tiles: usize, passes: usize) -> Self {
        let total = tiles * passes;
        Self {
            observer,
            progress: Progress {
                done: 0,
                total,
                tiles,
            },
            started: false,
            stopped: false,
        }
    }

    /// Must be called before each pass and after the last one.
    ///
    /// # Errors
    /// [`Error::Cancelled`] if the observer breaks.
    fn next(&mut self) -> Result<()> {
        self.progress.done += usize::from(self.started);
        self.started = true;
        if let Some(observer) = &mut self.observer {
            self.stopped = observer(self.progress).is_break();
        }
        if self.stopped {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Converts the result of a function that calls [`Self::next`] and cannot return its error.
    fn unless_stopped<T>(&self, result: candle_core::Result<T>) -> Result<T> {
        if self.stopped {
            Err(Error::Cancelled)
        } else {
            Ok(result?)
        }
    }
}

/// Planes of a [`TiledImage`].
#[derive(Clone, Copy)]
enum Layer {
    Lq,
    Base,
}

impl TiledImage {
    fn new(rgb: Planes, width: usize, scale: usize, tiling: [TileAxis; 2]) -> Self {
        let [across, down] = &tiling;
        let lq = rgb.map(|plane| reflect_pad(&plane, width, (across.len, down.len)));
        let axis = |tiles: &TileAxis| {
            Axis::new(
                tiles.len,
                tiles.len * scale,
                Kernel::Bicubic,
                resample::Options::default(),
            )
        };
        let resampler = Resampler::new(axis(across), axis(down));
        let base = lq.each_ref().map(|plane| {
            let mut large = vec![0.0; plane.len() * scale * scale];
            resampler.run(plane, &mut large);
            large
        });
        let sum = base.each_ref().map(|plane| vec![0.0; plane.len()]);
        Self {
            lq,
            base,
            sum,
            tiling,
        }
    }

    fn tiles(&self) -> usize {
        self.tiling[0].starts.len() * self.tiling[1].starts.len()
    }

    /// Returns the first sample and the size of a tile, each horizontally and vertically, in
    /// samples of the input.
    fn position(&self, tile: usize) -> ([usize; 2], [usize; 2]) {
        let [across, down] = &self.tiling;
        let (column, row) = (tile % across.starts.len(), tile / across.starts.len());
        (
            [across.starts[column], down.starts[row]],
            [across.side, down.side],
        )
    }

    /// Returns a tile of a layer with `scale` samples for one of the input: `[1, h, w, 3]`, -1 to
    /// 1.
    fn tensor(&self, layer: Layer, tile: usize, scale: usize, device: &Device) -> Result<Tensor> {
        let ([x, y], [w, h]) = self.position(tile);
        let (x, y, w, h) = (x * scale, y * scale, w * scale, h * scale);
        let width = self.tiling[0].len * scale;
        let [r, g, b] = match layer {
            Layer::Lq => &self.lq,
            Layer::Base => &self.base,
        };
        let mut samples = vec![0.0; 3 * w * h];
        samples
            .par_chunks_exact_mut(3 * w)
            .enumerate()
            .for_each(|(i, row)| {
                let at = (y + i) * width + x;
                for (j, pixel) in row.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                    *pixel = [r, g, b].map(|plane| 2.0 * plane[at + j] - 1.0);
                }
            });
        Ok(Tensor::from_vec(samples, (1, h, w, 3), device)?)
    }

    /// Adds the result of a tile, rows of R, G, B samples, clamped to -1 to 1.
    fn add(&mut self, tile: usize, result: &[f32], scale: usize) {
        let ([x, y], [w, _]) = self.position(tile);
        let (column, row) = (
            tile % self.tiling[0].starts.len(),
            tile / self.tiling[0].starts.len(),
        );
        let across = self.tiling[0].weights(column, scale);
        let down = self.tiling[1].weights(row, scale);
        let (width, w) = (self.tiling[0].len * scale, w * scale);
        for (c, plane) in self.sum.iter_mut().enumerate() {
            let rows = plane[y * scale * width..].par_chunks_mut(width);
            let result = result.par_chunks_exact(3 * w).zip(&down);
            rows.zip(result).for_each(|(sum, (result, down))| {
                let sum = sum[x * scale..].iter_mut().zip(&across);
                for ((s, weight), pixel) in sum.zip(result.as_chunks::<3>().0) {
                    *s += down * weight * (0.5 * pixel[c].clamp(-1.0, 1.0) + 0.5);
                }
            });
        }
    }

    /// Returns the sum of all tiles without the padding, with corrected colours.
    fn finish(self, fix: ColorFix, size: (usize, usize), scale: usize) -> Planes {
        let width = self.tiling[0].len * scale;
        let mut bases = self.base.into_iter();
        self.sum.map(|plane| {
            let mut plane = crop(plane, width, size);
            if let Some(base) = bases.next() {
                color_fix::apply(fix, &mut plane, &crop(base, width, size), size.0);
            }
            plane
        })
    }
}

/// Returns a component of `src` at the size of `to`, by bicubic interpolation.
fn interpolated(src: &FrameRef, component: Component, to: &FrameInfo) -> Result<Vec<f32>> {
    let (w, h) = (to.width, to.height);
    let kernel = Kernel::Bicubic;
    let resampler = Resampler::for_component(src.info(), component, w, h, kernel, false)?;
    let size = to.format.component_size(component, w, h);
    let mut plane = vec![0.0; size.0 * size.1];
    resampler.run(&src.read_plane(component)?, &mut plane);
    Ok(plane)
}

/// Shrinks `planes` of size `from` to size `to`.
fn resized(planes: Planes, from: (usize, usize), to: (usize, usize)) -> Planes {
    if from == to {
        return planes;
    }
    let axis = |from, to| {
        let options = resample::Options {
            antialias: true,
            ..resample::Options::default()
        };
        Axis::new(from, to, Kernel::CatmullRom, options)
    };
    let resampler = Resampler::new(axis(from.0, to.0), axis(from.1, to.1));
    planes.map(|plane| {
        let mut small = vec![0.0; to.0 * to.1];
        resampler.run(&plane, &mut small);
        small
    })
}
