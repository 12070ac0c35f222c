//! Inference of students on the CPU. The network computes a residual from the latent of the bicubic
//! base. The residual is added to the base.
//!
//! Y'CbCr frames are not converted to RGB. Most frames are processed row by row, so that
//! intermediate values stay in the caches. Planes are processed as a whole if the model has chroma
//! and the chroma of the frame is not 4:2:0.

mod calibrate;
mod engine;
mod grid_io;
mod history;
mod memory;
mod network;
mod plane_plan;
mod precision;
mod program;
#[cfg(any(test, fuzzing))]
pub mod reference;
mod row_plan;
#[cfg(test)]
mod tests;
mod wavefront;

pub use calibrate::{Patches, calibrate};
pub use engine::CpuEngine;

use grid_io::GridIo;
use history::{Filter, History};
use memory::{Memory, Recall};
use network::Network;
use plane_plan::PlanePlan;
use row_plan::RowPlan;

use super::frame_mismatch;
use crate::{
    Precision, Result,
    frame::{FrameInfo, FrameMut, FrameRef, zeros},
    model::LiteModel,
    nn::lite::latent::Grid,
};

/// A model that is prepared for frames of one format and size.
pub struct Runner {
    src: FrameInfo,
    dst: FrameInfo,
    precision: Precision,
    plan: Plan,
    history: History,
    /// Previous frame of a network with memory; `None` for other networks.
    memory: Option<Memory>,
    /// Largest share of the previous result; 0 without the temporal filter.
    share: f32,
}

/// Part of the previous frame in the result.
enum Past<'a> {
    None,
    Filter(Filter<'a>),
    Memory(Recall<'a>),
}

/// Order of work for a frame: row by row, or plane by plane.
enum Plan {
    Rows(Box<RowPlan>),
    Planes(Box<PlanePlan>),
}

impl Runner {
    /// Prepares `model` to upscale frames `src` to frames `dst`, which differ only in size.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] if a side is out of range, [`crate::Error::Memory`] if there is not
    /// enough memory, [`crate::Error::Setting`] if the model lacks the precision.
    pub fn new(
        model: &LiteModel,
        src: FrameInfo,
        dst: FrameInfo,
        precision: Precision,
    ) -> Result<Self> {
        let precision = precision.resolve(model)?;
        let plan = if RowPlan::serves(model, dst.format) {
            Plan::Rows(Box::new(RowPlan::new(model, &src, &dst, precision)?))
        } else {
            Plan::Planes(Box::new(PlanePlan::new(model, src, dst, precision)?))
        };
        Ok(Self {
            src,
            dst,
            precision,
            plan,
            history: History::new(&src, &dst, model.metadata.student.r),
            memory: (model.metadata.student.memory > 0).then(|| Memory::new(model, &src, &dst)),
            share: 0.0,
        })
    }

    /// Replaces the weights by those of `model`, which must have the same shape.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn set_weights(&mut self, model: &LiteModel) -> Result<()> {
        let scale = scale(&self.src, &self.dst);
        let network = match &mut self.plan {
            Plan::Rows(plan) => plan.network_mut(),
            Plan::Planes(plan) => plan.network_mut(),
        };
        network.set_weights(model, scale, self.precision)
    }

    /// Returns `true` if the runner is prepared for frames `src` and `dst`.
    pub fn fits(&self, src: &FrameInfo, dst: &FrameInfo) -> bool {
        self.src == *src && self.dst == *dst
    }

    /// Returns the resolved precision, which is never [`Precision::Auto`].
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Sets the largest share of the previous result that the temporal filter mixes into luma, 0
    /// (the default, no filter) to below 1. A network with memory needs no filter.
    pub fn set_share(&mut self, share: f32) {
        self.share = share;
    }

    /// Forgets the previous frame.
    pub fn forget(&mut self) {
        self.history.forget();
        if let Some(memory) = &mut self.memory {
            memory.forget();
        }
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual. Runs on the
    /// current rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] if the runner is not prepared for these frames,
    /// [`crate::Error::Memory`] if there is not enough memory for the previous frame.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        if !self.fits(src.info(), dst.info()) {
            return Err(frame_mismatch());
        }
        let past = match &mut self.memory {
            _ if strength == 0.0 => Past::None,
            Some(memory) => Past::Memory(memory.next(src, strength)?),
            None if self.share > 0.0 => Past::Filter(self.history.next(src, self.share)?),
            None => Past::None,
        };
        let remembers = !matches!(past, Past::None);
        match &mut self.plan {
            Plan::Rows(plan) => plan.run(src, dst, strength, &past)?,
            Plan::Planes(plan) => plan.run(src, dst, strength, &past)?,
        }
        match &mut self.memory {
            _ if !remembers => self.forget(),
            Some(memory) => memory.complete(),
            None => self.history.complete(),
        }
        Ok(())
    }
}

/// Returns the scale that a network is conditioned on for frames `src` and `dst`: the geometric
/// mean of the horizontal and the vertical scale.
pub(super) fn scale(src: &FrameInfo, dst: &FrameInfo) -> f64 {
    let (x, y) = (
        dst.width as f64 / src.width as f64,
        dst.height as f64 / src.height as f64,
    );
    (x * y).sqrt()
}

/// Runs the network alone, without memory, and returns its residual, whitened and without a margin.
///
/// `latent` is whitened and lies on `grid`. The margin of `grid` should have one cell per layer.
///
/// # Errors
/// [`crate::Error::Memory`] if there is not enough memory, [`crate::Error::Setting`] if the model
/// lacks the precision.
///
/// # Panics
/// If the length of `latent` is not that of `grid`.
pub fn residual_of(
    model: &LiteModel,
    scale: f64,
    latent: &[f32],
    grid: Grid,
    precision: Precision,
) -> Result<Vec<f32>> {
    let cells = grid.with_margin(0);
    let mut network = Network::new(
        &model.without_memory(),
        scale,
        (cells.width, cells.height),
        precision.resolve(model)?,
    )?;
    let mut residual = zeros(cells.len())?;
    network.divide();
    network.run(&GridIo::new(latent, grid, &mut residual));
    Ok(residual)
}
