//! Plan that processes whole planes, for latents whose chroma has another size than the frame's.
//!
//! The network sees RGB frames as luma and chroma. The residual of luma is added to R, G and B
//! alike, that of chroma by the inverse matrix.

use super::{Past, Precision, grid_io::GridIo, history::Filter, network::Network};
use crate::{
    Result,
    engine::lite::chroma,
    frame::{
        Component::{self, *},
        FrameInfo, FrameMut, FrameRef,
        resample::{Axis, Kernel, Resampler},
        zeros,
    },
    model::LiteModel,
    nn::lite::{
        LatentKind, LatentStats,
        latent::{Grid, PlaneSlot, chroma_slot, luma_slot, shuffle_add, unshuffle},
    },
};

/// A model ready for frames of one kind and size.
pub(super) struct PlanePlan {
    dst: FrameInfo,
    network: Network,
    stats: LatentStats,
    r: usize,
    grid: Grid,
    planes: Vec<ComponentPlan>,
    /// Samples of a plane of the input.
    input: Vec<f32>,
    /// Latent of the base, with a margin.
    z: Vec<f32>,
    /// Residual of the network, without a margin.
    residual: Vec<f32>,
    /// Factor of the residual for each channel.
    gain: Vec<f32>,
    /// Working memory for luma of RGB frames or a chroma plane, at the size of the output.
    full: Vec<f32>,
    /// `None` for latents without chroma.
    chroma: Option<ChromaPlan>,
}

/// A component: its resampler and its plane at the size of the output.
struct ComponentPlan {
    component: Component,
    resampler: Resampler,
    up: Vec<f32>,
}

/// Conversion between the chroma planes of the frame and of the latent.
struct ChromaPlan {
    /// Samples in a row of the latent's chroma planes.
    half_width: usize,
    /// Resamplers to half size and back; `None` if the chroma of the frame has that size.
    resamplers: Option<(Resampler, Resampler)>,
    /// A chroma plane of the latent.
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

    /// Resamples `plane` to half the size of luma.
    fn shrink(&mut self, plane: &[f32]) {
        match &self.resamplers {
            Some((shrink, _)) => shrink.run(plane, &mut self.half),
            None => self.half.copy_from_slice(plane),
        }
    }

    /// Resamples the half-size plane to the size of the frame's chroma.
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

impl PlanePlan {
    /// Prepares `model` for frames `src` that become frames `dst`, which differ in size only.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] if a side is out of range, [`crate::Error::Memory`] if there is not
    /// enough memory.
    pub fn new(
        model: &LiteModel,
        src: FrameInfo,
        dst: FrameInfo,
        precision: Precision,
    ) -> Result<Self> {
        let student = model.metadata.student;
        let plane = |component| -> Result<ComponentPlan> {
            let (w, h) = (dst.width, dst.height);
            let (width, height) = dst.format.component_size(component, w, h);
            let kernel = Kernel::Bicubic;
            Ok(ComponentPlan {
                component,
                resampler: Resampler::for_component(&src, component, w, h, kernel, false)?,
                up: zeros(width * height)?,
            })
        };
        let components = src.format.components().iter().map(|c| c.component);
        // With a margin as wide as the receptive field, no output depends on the zeros around the
        // feature maps, so a flat area stays flat up to the border of the frame.
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

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual. If that is above
    /// 0, luma passes the filter of `past`. Models whose planes are processed as a whole have no
    /// memory. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] if the frames have another format than the plan.
    pub fn run(
        &mut self,
        src: &FrameRef,
        dst: &mut FrameMut,
        strength: f32,
        past: &Past,
    ) -> Result<()> {
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
            let filter = match past {
                Past::Filter(filter) => Some(filter),
                _ => None,
            };
            self.add_residual(filter);
        }
        for plane in &self.planes {
            dst.write(plane.component, &plane.up)?;
        }
        Ok(())
    }

    /// Computes the latent of the base.
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
    fn add_residual(&mut self, filter: Option<&Filter>) {
        let Self {
            planes,
            full,
            grid,
            gain,
            ..
        } = self;
        let width = self.dst.width;
        let luma_weights = self.dst.colorimetry.matrix.luma_weights().into();
        self.network.divide();
        let cells = grid.with_margin(0);
        self.network
            .run(&GridIo::new(&self.z, *grid, &mut self.residual));
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
                if let Some(filter) = filter {
                    for (y, row) in planes[y].up.chunks_exact_mut(width).enumerate() {
                        // SAFETY: this is the only thread.
                        unsafe { filter.apply(y, 0, row) };
                    }
                }
            }
            (None, Some(rgb)) => {
                full.clear();
                full.resize(width * self.dst.height, 0.0);
                shuffle_add(residual, luma_slot(self.r), *grid, gain, full, width);
                if let Some(filter) = filter {
                    let (mut luma, mut scratch) = (Vec::new(), Vec::new());
                    mix(&mut luma, planes, rgb, luma_weights);
                    add(&mut luma, full, 1.0);
                    let rows = luma.chunks_exact_mut(width);
                    for (y, (luma, full)) in rows.zip(full.chunks_exact_mut(width)).enumerate() {
                        // SAFETY: this is the only thread.
                        unsafe { filter.apply_to_residual(y, 0, luma, full, &mut scratch) };
                    }
                }
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

fn find(planes: &[ComponentPlan], component: Component) -> Option<usize> {
    planes.iter().position(|p| p.component == component)
}

fn find_rgb(planes: &[ComponentPlan]) -> Option<[usize; 3]> {
    Some([find(planes, R)?, find(planes, G)?, find(planes, B)?])
}

/// Writes the sum of three planes with the weights `k` to `out`.
fn mix(out: &mut Vec<f32>, planes: &[ComponentPlan], rgb: [usize; 3], k: [f32; 3]) {
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
