//! The ResShift networks (published as ResShift, SinSR and TAD-SR) on a frame.
//!
//! The frame becomes planes of R'G'B', is padded by reflection to what the networks take, enlarged by bicubic
//! interpolation and cut into tiles. Each tile is encoded, noise is added to its latent, the U-Net predicts the clean
//! latent, which is decoded; the tiles are blended and get the colours of the enlarged input. Then the way back to the
//! frame's own format begins, through the matrix it came by, without rounding in between.
//!
//! The result depends on the frame, the options and the model alone, not on the number of threads; with automatic
//! tiles, also on the memory that was free when the first frame of the size came.

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
use tiles::{Cut, crop, reflect_pad};

/// Three planes, R, G and B, of rows without padding.
pub type Planes = [Vec<f32>; 3];

/// A ResShift model ready for frames of any kind and size.
pub struct Runner {
    unet: Unet,
    autoencoder: Autoencoder,
    schedule: Schedule,
    geometry: Geometry,
    /// How frames of one size and these settings are cut: decided once, so that frames that are the same stay the same
    /// when the free memory changes.
    cuts: Option<(CutKey, [Cut; 2])>,
}

/// Width, height, tile and overlap.
type CutKey = (usize, usize, Tile, usize);

/// A picture on its way through the networks.
struct Picture {
    /// The input, padded, 0 to 1.
    lq: Planes,
    /// The padded input enlarged by bicubic interpolation.
    base: Planes,
    /// The sum of what the tiles made.
    sum: Planes,
    /// Across and down.
    cuts: [Cut; 2],
}

impl Runner {
    /// Takes networks over, which are on one device, and packs their weights, but for 16-bit maps on the CPU.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the configuration makes no sense.
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
            cuts: None,
        })
    }

    /// Sets the type of the networks' feature maps, which on the CPU stays f32, for which weights are packed.
    pub fn set_dtype(&mut self, dtype: DType) {
        self.unet.set_dtype(dtype);
        self.autoencoder.set_dtype(dtype);
    }

    /// The scale that the networks make.
    pub fn scale(&self) -> usize {
        self.geometry.scale
    }

    /// Steps of the schedule.
    pub fn steps(&self) -> usize {
        self.schedule.steps()
    }

    /// Returns the noise that a frame of `width` x `height` gets, before [`Options::noise`] weakens
    /// it.
    pub fn noise(&self, width: usize, height: usize, options: &Options) -> NoiseField {
        let [channels, h, w] = self.geometry.latent(width, height);
        match &options.noise_field {
            Some(field) => field.clone(),
            None => NoiseField::seeded(channels, h, w, options.seed),
        }
    }

    /// About how many bytes a frame of `width` x `height` takes at its peak, beside the weights and the frame itself.
    ///
    /// # Errors
    /// [`Error::Memory`] when there are not as many.
    pub fn memory(&mut self, width: usize, height: usize, options: &Options) -> Result<u64> {
        let cuts = self.cuts(width, height, options)?;
        Ok(self.geometry.frame_bytes(width, height) + self.geometry.tile_bytes(&cuts))
    }

    /// Upscales `src` into `dst`: the mean of bicubic interpolation and the networks' result,
    /// weighted by [`Options::strength`]. A `dst` that is smaller than the networks' scale makes it
    /// is shrunk from there. Alpha is interpolated. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Setting`] when the noise or the steps do not fit, [`Error::Memory`] when there is not enough for the
    /// tiles, [`Error::Cancelled`] when `observer` breaks.
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
        // Before anything is done for the frame.
        self.checked_cuts(from.width, from.height, options)?;
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

    /// What the networks make of planes of `width` samples in a row, 0 (black) to 1 (white): planes larger by their
    /// scale.
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
        let cuts = self.checked_cuts(width, height, options)?;
        let noise = self.noise(width, height, options);
        let mut picture = Picture::new(rgb, width, scale, cuts);
        let mut passes = Passes::new(observer, picture.tiles(), options.steps + 2);
        for tile in 0..picture.tiles() {
            let made = self.restore_tile(&picture, tile, &noise, options, &mut passes)?;
            picture.add(tile, &made, scale);
        }
        passes.next()?;
        Ok(picture.finish(options.color_fix, (width * scale, height * scale), scale))
    }

    /// Checks that the options fit a frame, and cuts it.
    fn checked_cuts(&mut self, width: usize, height: usize, options: &Options) -> Result<[Cut; 2]> {
        let expected = self.geometry.latent(width, height);
        if let Some(field) = &options.noise_field
            && field.shape() != expected
        {
            return Err(Error::Setting(format!(
                "noise of {:?} channels, rows and columns for a frame of {width}x{height}, which takes {expected:?}",
                field.shape()
            )));
        }
        if !(1..=self.steps()).contains(&options.steps) {
            return Err(Error::Setting(format!(
                "{} steps: the model takes 1 to {}",
                options.steps,
                self.steps()
            )));
        }
        self.cuts(width, height, options)
    }

    fn cuts(&mut self, width: usize, height: usize, options: &Options) -> Result<[Cut; 2]> {
        let key = (width, height, options.tile, options.tile_overlap);
        if let Some((known, cuts)) = &self.cuts
            && *known == key
        {
            return Ok(cuts.clone());
        }
        let planes = self.geometry.frame_bytes(width, height);
        let available = || memory::available_on(self.unet.device(), planes);
        let cuts = self.geometry.cuts(width, height, options, available)?;
        self.cuts = Some((key, cuts.clone()));
        Ok(cuts)
    }

    /// What the networks make of one tile: rows of R, G, B samples, -1 to 1.
    fn restore_tile(
        &self,
        picture: &Picture,
        tile: usize,
        noise: &NoiseField,
        options: &Options,
        passes: &mut Passes,
    ) -> Result<Vec<f32>> {
        let ([x, y], [w, h]) = picture.place(tile);
        let [_, top, left] = self.geometry.latent_at(x, y);
        let [channels, rows, columns] = self.geometry.latent_at(w, h);
        let noise = noise.part([top, left], [rows, columns], options.noise);
        let device = self.unet.device();
        let noise = Tensor::from_vec(noise, (1, rows, columns, channels), device)?;

        passes.next()?;
        let zy =
            self.autoencoder
                .encode(&picture.tensor(Layer::Base, tile, self.scale(), device)?)?;
        let z = self.schedule.prior(&zy, &noise)?;
        let lq = match self.unet.config().cond_lq {
            true => Some(picture.tensor(Layer::Lq, tile, 1, device)?),
            false => None,
        };
        let denoise = |z: &Tensor, t| {
            passes.next().map_err(candle_core::Error::wrap)?;
            self.unet.forward(z, &[t], lq.as_ref())
        };
        let z0 = diffusion::deterministic(&self.schedule, &zy, &z, options.steps, denoise);
        let z0 = passes.unless_stopped(z0)?;
        passes.next()?;
        // The codes that replace it would hide it.
        self.finite(&z0)?;
        self.finite(&self.autoencoder.decode(&z0, true)?)
    }

    /// The values, when all of them are numbers.
    fn finite(&self, t: &Tensor) -> Result<Vec<f32>> {
        let values: Vec<f32> = t.flatten_all()?.to_vec1()?;
        if values.iter().all(|v| v.is_finite()) {
            return Ok(values);
        }
        let hint = match self.unet.dtype() {
            DType::F16 => ": its numbers may be too large for f16, use precision bf16 or f32",
            _ => "",
        };
        let text = format!("what the model makes of the frame is not finite{hint}");
        Err(Error::Setting(text))
    }
}

/// Counts passes through the networks and tells the observer.
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

    /// Before a pass, and after the last.
    fn next(&mut self) -> Result<()> {
        self.progress.done += usize::from(self.started);
        self.started = true;
        if let Some(observer) = &mut self.observer {
            self.stopped = observer(self.progress).is_break();
        }
        match self.stopped {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }

    /// `result` of something that calls [`Self::next`] and cannot hand on its error.
    fn unless_stopped<T>(&self, result: candle_core::Result<T>) -> Result<T> {
        match self.stopped {
            true => Err(Error::Cancelled),
            false => Ok(result?),
        }
    }
}

#[derive(Clone, Copy)]
enum Layer {
    Lq,
    Base,
}

impl Picture {
    fn new(rgb: Planes, width: usize, scale: usize, cuts: [Cut; 2]) -> Self {
        let [across, down] = &cuts;
        let lq = rgb.map(|plane| reflect_pad(&plane, width, (across.len, down.len)));
        let axis = |cut: &Cut| {
            Axis::new(
                cut.len,
                cut.len * scale,
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
            cuts,
        }
    }

    fn tiles(&self) -> usize {
        self.cuts[0].starts.len() * self.cuts[1].starts.len()
    }

    /// First sample and size of a tile, each across and down, in samples of the input.
    fn place(&self, tile: usize) -> ([usize; 2], [usize; 2]) {
        let [across, down] = &self.cuts;
        let (column, row) = (tile % across.starts.len(), tile / across.starts.len());
        (
            [across.starts[column], down.starts[row]],
            [across.side, down.side],
        )
    }

    /// A tile of a layer with `scale` samples for one of the input: `[1, h, w, 3]`, -1 to 1.
    fn tensor(&self, layer: Layer, tile: usize, scale: usize, device: &Device) -> Result<Tensor> {
        let ([x, y], [w, h]) = self.place(tile);
        let (x, y, w, h) = (x * scale, y * scale, w * scale, h * scale);
        let width = self.cuts[0].len * scale;
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

    /// Adds what became of a tile: rows of R, G, B samples, -1 to 1, clamped to that.
    fn add(&mut self, tile: usize, made: &[f32], scale: usize) {
        let ([x, y], [w, _]) = self.place(tile);
        let (column, row) = (
            tile % self.cuts[0].starts.len(),
            tile / self.cuts[0].starts.len(),
        );
        let across = self.cuts[0].weights(column, scale);
        let down = self.cuts[1].weights(row, scale);
        let (width, w) = (self.cuts[0].len * scale, w * scale);
        for (c, plane) in self.sum.iter_mut().enumerate() {
            let rows = plane[y * scale * width..].par_chunks_mut(width);
            let made = made.par_chunks_exact(3 * w).zip(&down);
            rows.zip(made).for_each(|(sum, (made, down))| {
                let sum = sum[x * scale..].iter_mut().zip(&across);
                for ((s, weight), pixel) in sum.zip(made.as_chunks::<3>().0) {
                    *s += down * weight * (0.5 * pixel[c].clamp(-1.0, 1.0) + 0.5);
                }
            });
        }
    }

    /// The sum of all tiles, without the padding, with its colours put right.
    fn finish(self, fix: ColorFix, size: (usize, usize), scale: usize) -> Planes {
        let width = self.cuts[0].len * scale;
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

/// A component of `src` at the size of `to`, by bicubic interpolation.
fn interpolated(src: &FrameRef, component: Component, to: &FrameInfo) -> Result<Vec<f32>> {
    let (w, h) = (to.width, to.height);
    let kernel = Kernel::Bicubic;
    let resampler = Resampler::for_component(src.info(), component, w, h, kernel, false)?;
    let size = to.format.component_size(component, w, h);
    let mut plane = vec![0.0; size.0 * size.1];
    resampler.run(&src.read_plane(component)?, &mut plane);
    Ok(plane)
}

/// `planes` of size `from` at size `to`, which is no larger.
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
