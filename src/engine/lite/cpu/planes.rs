//! The plan that keeps whole planes: for latents whose chroma has another size than the frame's.
//!
//! Of RGB frames the network sees luma and chroma; the luma's residual is added to R, G and B alike, a chroma residual
//! through the inverse matrix.

use super::{
    Precision,
    grids::Grids,
    network::{Network, zeros},
};
use crate::{
    Result,
    engine::lite::chroma,
    frame::{
        Component::{self, *},
        FrameInfo, FrameMut, FrameRef,
        resample::{Axis, Kernel, Resampler},
    },
    model::LiteModel,
    nn::lite::{
        LatentKind, LatentStats,
        latent::{Grid, PlaneSlot, chroma_slot, luma_slot, shuffle_add, unshuffle},
    },
};

/// A model ready for frames of one kind and size.
pub(super) struct Planes {
    dst: FrameInfo,
    network: Network,
    stats: LatentStats,
    r: usize,
    grid: Grid,
    planes: Vec<PlanePlan>,
    /// Samples of the plane that is being read.
    input: Vec<f32>,
    /// The base's latent, with a margin.
    z: Vec<f32>,
    /// The network's residual, without one.
    residual: Vec<f32>,
    /// What the residual is multiplied with, per channel.
    gain: Vec<f32>,
    /// A plane of the output's size: luma of RGB frames, a chroma plane on its way.
    full: Vec<f32>,
    /// For latents with chroma.
    chroma: Option<ChromaPlan>,
}

/// One component: its resampler and its plane at the output's size.
struct PlanePlan {
    component: Component,
    resampler: Resampler,
    up: Vec<f32>,
}

/// Between the frame's chroma planes and the latent's, which have half the luma's size.
struct ChromaPlan {
    /// Samples in a row of the latent's chroma planes.
    half_width: usize,
    /// Resamplers to half size and back, when the frame's chroma has another size.
    resamplers: Option<(Resampler, Resampler)>,
    half: Vec<f32>,
}

impl ChromaPlan {
    fn new(dst: &FrameInfo) -> Result<Self> {
        let (width, height) = chroma::half(dst);
        let resampler = |[horizontal, vertical]: [Axis; 2]| Resampler::new(horizontal, vertical);
        Ok(Self {
            half_width: width,
            resamplers: chroma::axes(dst).map(|axes| axes.map(resampler).into()),
            half: zeros(width * height)?,
        })
    }

    /// `plane` at half the luma's size.
    fn shrink(&mut self, plane: &[f32]) {
        match &self.resamplers {
            Some((shrink, _)) => shrink.run(plane, &mut self.half),
            None => self.half.copy_from_slice(plane),
        }
    }

    /// The half-size plane at the frame's size.
    fn grow(&self, plane: &mut Vec<f32>) {
        match &self.resamplers {
            Some((_, grow)) => {
                plane.resize(grow.horizontal().dst_len() * grow.vertical().dst_len(), 0.0);
                grow.run(&self.half, plane);
            }
            None => plane.clone_from(&self.half),
        }
    }
}

impl Planes {
    /// Prepares `model` for frames `src` that become frames `dst`, which differ in size only.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when a side is out of range, [`crate::Error::Memory`] when there is not enough for it.
    pub fn new(
        model: &LiteModel,
        src: FrameInfo,
        dst: FrameInfo,
        precision: Precision,
    ) -> Result<Self> {
        let student = model.metadata.student;
        let plane = |component| -> Result<PlanePlan> {
            let (w, h) = (dst.width, dst.height);
            let (width, height) = dst.format.component_size(component, w, h);
            let kernel = Kernel::Bicubic;
            Ok(PlanePlan {
                component,
                resampler: Resampler::for_component(&src, component, w, h, kernel, false)?,
                up: zeros(width * height)?,
            })
        };
        let components = src.format.components().iter().map(|c| c.component);
        // A margin as wide as the receptive field: no output sees the zeros around the feature maps, so that a flat
        // area stays flat up to the frame's border.
        let cells = Grid::new(student.latent, student.r, dst.width, dst.height);
        let grid = cells.with_margin(model.layers.len());
        let scale = super::scale(&src, &dst);
        Ok(Self {
            network: Network::new(model, scale, (cells.width, cells.height), precision)?,
            planes: components.map(plane).collect::<Result<_>>()?,
            z: zeros(grid.len())?,
            residual: zeros(cells.len())?,
            gain: model.stats.residual_std.clone(),
            stats: model.stats.clone(),
            r: student.r,
            chroma: match student.latent {
                LatentKind::Luma => None,
                LatentKind::Yuv => Some(ChromaPlan::new(&dst)?),
            },
            dst,
            grid,
            input: Vec::new(),
            full: Vec::new(),
        })
    }

    pub fn network_mut(&mut self) -> &mut Network {
        &mut self.network
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when the frames are not of the format that the plan is for.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        for plane in &mut self.planes {
            let axes = (plane.resampler.horizontal(), plane.resampler.vertical());
            self.input.resize(axes.0.src_len() * axes.1.src_len(), 0.0);
            src.read(plane.component, &mut self.input)?;
            plane.resampler.run(&self.input, &mut plane.up);
        }
        if strength > 0.0 {
            for (gain, std) in self.gain.iter_mut().zip(&self.stats.residual_std) {
                *gain = strength * std;
            }
            self.encode();
            self.add_residual();
        }
        for plane in &self.planes {
            dst.write(plane.component, &plane.up)?;
        }
        Ok(())
    }

    /// Writes the base's latent.
    fn encode(&mut self) {
        let Self {
            planes,
            full,
            z,
            grid,
            ..
        } = self;
        let (mean, std) = (&self.stats.input_mean, &self.stats.input_std);
        let mut put = |plane: &[f32], width: usize, slot: PlaneSlot| {
            unshuffle(plane, width, slot, *grid, mean, std, z);
        };
        let matrix = self.dst.colorimetry.matrix;
        let rgb = find_rgb(planes);
        match (find(planes, Y), rgb) {
            (Some(y), _) => put(&planes[y].up, self.dst.width, luma_slot(self.r)),
            (None, Some(rgb)) => {
                mix(full, planes, rgb, matrix.luma_weights().into());
                put(full, self.dst.width, luma_slot(self.r));
            }
            (None, None) => {}
        }
        let Some(chroma) = &mut self.chroma else {
            return;
        };
        for (which, component) in [U, V].into_iter().enumerate() {
            match (find(planes, component), rgb) {
                (Some(i), _) => chroma.shrink(&planes[i].up),
                (None, Some(rgb)) => {
                    mix(full, planes, rgb, matrix.chroma_weights(which));
                    chroma.shrink(full);
                }
                // Grey video has neutral chroma.
                (None, None) => chroma.half.fill(0.0),
            }
            put(&chroma.half, chroma.half_width, chroma_slot(self.r, which));
        }
    }

    /// Runs the network and adds its residual to the planes.
    fn add_residual(&mut self) {
        let Self {
            planes,
            full,
            grid,
            gain,
            ..
        } = self;
        let width = self.dst.width;
        self.network.divide();
        let cells = grid.with_margin(0);
        self.network
            .run(&Grids::new(&self.z, *grid, &mut self.residual));
        let (residual, grid) = (&self.residual[..], &cells);
        let rgb = find_rgb(planes);
        match (find(planes, Y), rgb) {
            (Some(y), _) => {
                shuffle_add(
                    residual,
                    luma_slot(self.r),
                    *grid,
                    gain,
                    &mut planes[y].up,
                    width,
                );
            }
            (None, Some(rgb)) => {
                full.clear();
                full.resize(width * self.dst.height, 0.0);
                shuffle_add(residual, luma_slot(self.r), *grid, gain, full, width);
                rgb.into_iter()
                    .for_each(|i| add(&mut planes[i].up, full, 1.0));
            }
            (None, None) => {}
        }
        let Some(chroma) = &mut self.chroma else {
            return;
        };
        for (which, component) in [U, V].into_iter().enumerate() {
            chroma.half.fill(0.0);
            let (slot, half_width) = (chroma_slot(self.r, which), chroma.half_width);
            shuffle_add(residual, slot, *grid, gain, &mut chroma.half, half_width);
            match (find(planes, component), rgb) {
                (Some(i), _) => {
                    chroma.grow(full);
                    add(&mut planes[i].up, full, 1.0);
                }
                (None, Some(rgb)) => {
                    chroma.grow(full);
                    let weights = self.dst.colorimetry.matrix.inverse_chroma_weights(which);
                    for (i, gain) in rgb.into_iter().zip(weights) {
                        add(&mut planes[i].up, full, gain);
                    }
                }
                (None, None) => {}
            }
        }
    }
}

fn find(planes: &[PlanePlan], component: Component) -> Option<usize> {
    planes.iter().position(|p| p.component == component)
}

fn find_rgb(planes: &[PlanePlan]) -> Option<[usize; 3]> {
    Some([find(planes, R)?, find(planes, G)?, find(planes, B)?])
}

/// The weighted sum of three planes.
fn mix(out: &mut Vec<f32>, planes: &[PlanePlan], rgb: [usize; 3], k: [f32; 3]) {
    let [r, g, b] = rgb.map(|i| planes[i].up.as_slice());
    out.clear();
    out.extend(
        r.iter()
            .zip(g)
            .zip(b)
            .map(|((r, g), b)| k[0] * r + k[1] * g + k[2] * b),
    );
}

fn add(dst: &mut [f32], src: &[f32], gain: f32) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d += gain * s;
    }
}
