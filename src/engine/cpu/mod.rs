//! The plan on the CPU: bicubic base, network on its latent, residual added, everything on f32 planes.
//!
//! Y'CbCr frames never pass through RGB. For RGB frames the luma's residual is added to R, G and B alike (chroma
//! stays as it is), and a chroma residual through the inverse matrix.

mod network;

use network::Network;

use crate::{
    Result,
    frame::{
        Component::{self, *},
        FrameInfo, FrameMut, FrameRef, Matrix,
        resample::{Axis, Kernel, Options, Resampler},
    },
    model::LiteModel,
    nn::lite::{
        LatentKind,
        latent::{Grid, PlaneSlot, shuffle_add, unshuffle},
    },
};

/// A model ready for frames of one kind and size.
pub struct Engine {
    src: FrameInfo,
    dst: FrameInfo,
    network: Network,
    latent: LatentKind,
    r: usize,
    grid: Grid,
    stats: crate::nn::lite::LatentStats,
    planes: Vec<PlanePlan>,
    /// Samples of the plane that is being read.
    input: Vec<f32>,
    z: Vec<f32>,
    /// Luma of RGB frames.
    luma: Vec<f32>,
    /// Chroma at the latent's resolution.
    chroma: [Vec<f32>; 2],
    gain: Vec<f32>,
}

/// One component: its resampler and its plane at the output's size.
struct PlanePlan {
    component: Component,
    resampler: Resampler,
    width: usize,
    up: Vec<f32>,
}

impl Engine {
    /// Prepares `model` for frames `src` that become frames `dst`, which differ in size only.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when a side is out of range.
    pub fn new(model: &LiteModel, src: FrameInfo, dst: FrameInfo) -> Result<Self> {
        let student = model.metadata.student;
        let scale = ((dst.width as f64 / src.width as f64)
            * (dst.height as f64 / src.height as f64))
            .sqrt();
        let plane = |component| -> Result<PlanePlan> {
            let (width, height) = dst.format.component_size(component, dst.width, dst.height);
            Ok(PlanePlan {
                component,
                resampler: Resampler::for_component(
                    &src,
                    component,
                    dst.width,
                    dst.height,
                    Kernel::Bicubic,
                    false,
                )?,
                width,
                up: vec![0.0; width * height],
            })
        };
        let components = src.format.components().iter().map(|c| c.component);
        let grid = Grid::new(student.latent, student.r, dst.width, dst.height);
        Ok(Self {
            network: Network::new(model, scale, grid),
            planes: components.map(plane).collect::<Result<_>>()?,
            z: vec![0.0; grid.len()],
            gain: model.stats.residual_std.clone(),
            stats: model.stats.clone(),
            latent: student.latent,
            r: student.r,
            src,
            dst,
            grid,
            input: Vec::new(),
            luma: Vec::new(),
            chroma: [Vec::new(), Vec::new()],
        })
    }

    /// Whether this plan is for frames `src` that become frames `dst`.
    pub fn fits(&self, src: &FrameInfo, dst: &FrameInfo) -> bool {
        self.src == *src && self.dst == *dst
    }

    /// Upscales `src` into `dst`, adding `strength` (0 to 1) times the residual. Runs on the current rayon pool.
    ///
    /// # Errors
    /// [`crate::Error::Frame`] when the frames are not those that the plan is for.
    pub fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, strength: f32) -> Result<()> {
        if !self.fits(src.info(), dst.info()) {
            return Err(crate::Error::Frame(
                "the frame is not the one that the engine was built for".into(),
            ));
        }
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
            if self.src.format.is_rgb() {
                self.add_residual_rgb();
            } else {
                self.add_residual_yuv();
            }
        }
        for plane in &self.planes {
            dst.write(plane.component, &plane.up)?;
        }
        Ok(())
    }

    fn index(&self, component: Component) -> Option<usize> {
        self.planes.iter().position(|p| p.component == component)
    }

    fn luma_slot(&self) -> PlaneSlot {
        PlaneSlot {
            channel: 0,
            r: self.r,
        }
    }

    fn chroma_slot(&self, which: usize) -> PlaneSlot {
        let r = self.r / 2;
        PlaneSlot {
            channel: self.r * self.r + which * r * r,
            r,
        }
    }

    fn half_width(&self) -> usize {
        self.dst.width.div_ceil(2)
    }

    fn add_residual_yuv(&mut self) {
        let Some(luma) = self.index(Y) else { return };
        let (width, grid) = (self.dst.width, self.grid);
        let (mean, std) = (&self.stats.input_mean, &self.stats.input_std);
        let slot = self.luma_slot();
        unshuffle(
            &self.planes[luma].up,
            width,
            slot,
            grid,
            mean,
            std,
            &mut self.z,
        );
        let chroma = [self.index(U), self.index(V)];
        if self.latent == LatentKind::Yuv {
            for (which, plane) in chroma.iter().enumerate() {
                let slot = self.chroma_slot(which);
                match plane {
                    Some(i) => {
                        let plane = &self.planes[*i];
                        let (half, w) = (self.half_width(), plane.width);
                        let small = shrink(&plane.up, w, self.dst, &mut self.chroma[which]);
                        unshuffle(small, half, slot, grid, mean, std, &mut self.z);
                    }
                    // Grey video has neutral chroma.
                    None => {
                        self.chroma[which].clear();
                        let half_height = self.dst.height.div_ceil(2);
                        self.chroma[which].resize(self.half_width() * half_height, 0.0);
                        let plane = &self.chroma[which];
                        unshuffle(plane, self.half_width(), slot, grid, mean, std, &mut self.z);
                    }
                }
            }
        }
        let residual = self.network.run(&self.z);
        shuffle_add(
            residual,
            slot,
            grid,
            &self.gain,
            &mut self.planes[luma].up,
            width,
        );
        if self.latent == LatentKind::Yuv {
            for (which, plane) in chroma.iter().enumerate() {
                let Some(i) = *plane else { continue };
                let half = self.dst.width.div_ceil(2);
                let slot = PlaneSlot {
                    channel: self.r * self.r + which * (self.r / 2) * (self.r / 2),
                    r: self.r / 2,
                };
                let plane = &mut self.planes[i];
                if plane.up.len() == half * self.dst.height.div_ceil(2) {
                    shuffle_add(residual, slot, grid, &self.gain, &mut plane.up, half);
                } else {
                    let delta = &mut self.chroma[which];
                    delta.fill(0.0);
                    shuffle_add(residual, slot, grid, &self.gain, delta, half);
                    let large = grow(delta, half, plane.width, plane.up.len() / plane.width);
                    add(&mut plane.up, &large, 1.0);
                }
            }
        }
    }

    fn add_residual_rgb(&mut self) {
        let (Some(r), Some(g), Some(b)) = (self.index(R), self.index(G), self.index(B)) else {
            return;
        };
        let (width, height, grid) = (self.dst.width, self.dst.height, self.grid);
        let matrix = self.src.colorimetry.matrix;
        let weights = matrix.luma_weights();
        self.luma.resize(width * height, 0.0);
        let rgb = [r, g, b].map(|i| self.planes[i].up.as_slice());
        mix(&mut self.luma, rgb, [weights.0, weights.1, weights.2]);
        let (mean, std) = (&self.stats.input_mean, &self.stats.input_std);
        unshuffle(
            &self.luma,
            width,
            self.luma_slot(),
            grid,
            mean,
            std,
            &mut self.z,
        );
        if self.latent == LatentKind::Yuv {
            for which in 0..2 {
                let mut full = vec![0.0; width * height];
                mix(&mut full, rgb, chroma_weights(matrix, which));
                let slot = self.chroma_slot(which);
                let (half, dst) = (self.half_width(), self.dst);
                let small = shrink(&full, width, dst, &mut self.chroma[which]);
                unshuffle(small, half, slot, grid, mean, std, &mut self.z);
            }
        }
        let residual = self.network.run(&self.z);
        self.luma.fill(0.0);
        let luma_slot = PlaneSlot {
            channel: 0,
            r: self.r,
        };
        shuffle_add(residual, luma_slot, grid, &self.gain, &mut self.luma, width);
        for i in [r, g, b] {
            add(&mut self.planes[i].up, &self.luma, 1.0);
        }
        if self.latent == LatentKind::Yuv {
            let half = self.dst.width.div_ceil(2);
            for which in 0..2 {
                let slot = PlaneSlot {
                    channel: self.r * self.r + which * (self.r / 2) * (self.r / 2),
                    r: self.r / 2,
                };
                let delta = &mut self.chroma[which];
                delta.fill(0.0);
                shuffle_add(residual, slot, grid, &self.gain, delta, half);
                let large = grow(delta, half, width, height);
                for (i, gain) in [r, g, b].into_iter().zip(inverse_weights(matrix, which)) {
                    add(&mut self.planes[i].up, &large, gain);
                }
            }
        }
    }
}

/// Weights of (R, G, B) in Cb (`which` 0) or Cr (1).
fn chroma_weights(matrix: Matrix, which: usize) -> [f32; 3] {
    let (kr, kg, kb) = matrix.luma_weights();
    match which {
        0 => [-kr, -kg, 1.0 - kb].map(|k| 0.5 * k / (1.0 - kb)),
        _ => [1.0 - kr, -kg, -kb].map(|k| 0.5 * k / (1.0 - kr)),
    }
}

/// What a unit of Cb (`which` 0) or Cr (1) adds to (R, G, B).
fn inverse_weights(matrix: Matrix, which: usize) -> [f32; 3] {
    let (kr, kg, kb) = matrix.luma_weights();
    match which {
        0 => [0.0, -2.0 * kb * (1.0 - kb) / kg, 2.0 * (1.0 - kb)],
        _ => [2.0 * (1.0 - kr), -2.0 * kr * (1.0 - kr) / kg, 0.0],
    }
}

fn mix(dst: &mut [f32], rgb: [&[f32]; 3], k: [f32; 3]) {
    for (((d, r), g), b) in dst.iter_mut().zip(rgb[0]).zip(rgb[1]).zip(rgb[2]) {
        *d = k[0] * r + k[1] * g + k[2] * b;
    }
}

fn add(dst: &mut [f32], src: &[f32], gain: f32) {
    for (d, s) in dst.iter_mut().zip(src) {
        *d += gain * s;
    }
}

/// A chroma plane of `width` samples a row brought to half the luma's size, by averaging; itself if it has it.
fn shrink<'a>(
    plane: &'a [f32],
    width: usize,
    frame: FrameInfo,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    let (half_w, half_h) = (frame.width.div_ceil(2), frame.height.div_ceil(2));
    let height = plane.len() / width;
    scratch.resize(half_w * half_h, 0.0);
    if (width, height) == (half_w, half_h) {
        return plane;
    }
    let options = Options {
        antialias: true,
        ..Options::default()
    };
    Resampler::new(
        Axis::new(width, half_w, Kernel::Area, options),
        Axis::new(height, half_h, Kernel::Area, options),
    )
    .run(plane, scratch);
    scratch
}

/// A plane of half the luma's size brought to `width` x `height`.
fn grow(plane: &[f32], half_width: usize, width: usize, height: usize) -> Vec<f32> {
    let mut out = vec![0.0; width * height];
    let axis = |src, dst| Axis::new(src, dst, Kernel::Bilinear, Options::default());
    let half_height = plane.len() / half_width;
    Resampler::new(axis(half_width, width), axis(half_height, height)).run(plane, &mut out);
    out
}
