//! The plan on the CPU: bicubic base, network on its latent, residual added.
//!
//! Y'CbCr frames never pass through RGB. Everything between the bytes of the input's planes and those of the output's
//! happens row by row, so that what is made is used while it is in the caches; but for models that see chroma on frames
//! whose chroma is not 4:2:0, for which whole planes are kept.

mod calibrate;
mod crew;
mod engine;
mod grids;
mod network;
mod planes;
mod precision;
mod program;
#[cfg(test)]
mod tests;
mod video;

pub use calibrate::{Patches, calibrate};
pub use engine::CpuEngine;

use grids::Grids;
use network::{Network, zeros};
use planes::Planes;
use video::Video;

use super::foreign;
use crate::{
    Precision, Result,
    frame::{FrameInfo, FrameMut, FrameRef},
    model::LiteModel,
    nn::lite::latent::Grid,
};

/// A model ready for frames of one kind and size.
pub struct Runner {
    src: FrameInfo,
    dst: FrameInfo,
    precision: Precision,
    way: Way,
}

enum Way {
    Video(Box<Video>),
    Planes(Box<Planes>),
}

impl Runner {
    /// Prepares `model` for frames `src` that become frames `dst`, which differ in size only.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when a side is out of range, [`crate::Error::Memory`] when there is not enough for it,
    /// [`crate::Error::Setting`] when the model does not have the precision.
    pub fn new(
        model: &LiteModel,
        src: FrameInfo,
        dst: FrameInfo,
        precision: Precision,
    ) -> Result<Self> {
        let precision = precision.resolve(model)?;
        let way = if Video::serves(model, dst.format) {
            Way::Video(Box::new(Video::new(model, &src, &dst, precision)?))
        } else {
            Way::Planes(Box::new(Planes::new(model, src, dst, precision)?))
        };
        Ok(Self {
            src,
            dst,
            precision,
            way,
        })
    }

    /// Replaces the weights by those of `model`, which has the shape of the one before.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn set_weights(&mut self, model: &LiteModel) -> Result<()> {
        let scale = scale(&self.src, &self.dst);
        let network = match &mut self.way {
            Way::Video(video) => video.network_mut(),
            Way::Planes(planes) => planes.network_mut(),
        };
        network.set_weights(model, scale, self.precision)
    }

    /// Returns `true` for frames `src` that become frames `dst`.
    pub fn fits(&self, src: &FrameInfo, dst: &FrameInfo) -> bool {
        self.src == *src && self.dst == *dst
    }

    /// Returns the precision, never [`Precision::Auto`].
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when the frames are not those that the plan is for.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        if !self.fits(src.info(), dst.info()) {
            return Err(foreign());
        }
        match &mut self.way {
            Way::Video(video) => video.run(src, dst, strength),
            Way::Planes(planes) => planes.run(src, dst, strength),
        }
    }
}

/// The scale that a network is told of frames that grow from `src` to `dst`: the mean of both directions.
pub(super) fn scale(src: &FrameInfo, dst: &FrameInfo) -> f64 {
    let (x, y) = (
        dst.width as f64 / src.width as f64,
        dst.height as f64 / src.height as f64,
    );
    (x * y).sqrt()
}

/// The network alone, for those who compare it: from the whitened `latent` on `grid`, whose margin should have as many
/// cells as there are layers, to the whitened residual without the margin.
///
/// # Errors
/// [`crate::Error::Memory`] when there is not enough, [`crate::Error::Setting`] when the model does not have the
/// precision.
///
/// # Panics
/// When `latent` has another length than its grid.
pub fn residual_of(
    model: &LiteModel,
    scale: f64,
    latent: &[f32],
    grid: Grid,
    precision: Precision,
) -> Result<Vec<f32>> {
    let cells = grid.with_margin(0);
    let mut network = Network::new(
        model,
        scale,
        (cells.width, cells.height),
        precision.resolve(model)?,
    )?;
    let mut residual = zeros(cells.len())?;
    network.divide();
    network.run(&Grids::new(latent, grid, &mut residual));
    Ok(residual)
}
