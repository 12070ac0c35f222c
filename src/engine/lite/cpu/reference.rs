//! Plain formulas for whole frames, one layer and one plane at a time, that tests and fuzz targets
//! compare with.

use crate::{
    frame::{
        Component::{self, *},
        FrameInfo, FrameRef,
        resample::{Kernel, Resampler},
    },
    kernels::conv::{Activation, ConvShape, reference},
    model::LiteModel,
    nn::lite::{
        Activated, Condition, LEAKY_SLOPE, LatentKind, Role,
        latent::{Grid, chroma_slot, luma_slot, shuffle_add, unshuffle},
    },
};

/// Planes with their components.
pub type Bases = Vec<(Component, Vec<f32>)>;

/// A model for frames of one format that become larger ones.
pub struct Reference<'a> {
    model: &'a LiteModel,
    at: Condition,
    src: FrameInfo,
    dst: FrameInfo,
    strength: f32,
}

impl<'a> Reference<'a> {
    /// Creates a reference for frames `src` that become frames `dst`, which differ in size only,
    /// with dials `[denoise, detail]`.
    pub fn new(
        model: &'a LiteModel,
        [src, dst]: [FrameInfo; 2],
        [denoise, detail]: [f64; 2],
        strength: f32,
    ) -> Self {
        let scale = super::scale(&src, &dst);
        Self {
            model,
            at: Condition {
                scale,
                denoise,
                detail,
            },
            src,
            dst,
            strength,
        }
    }

    /// Returns the planes of the result before they are rounded.
    pub fn upscale(&self, frame: &FrameRef) -> Bases {
        let (model, dst) = (self.model, self.dst);
        let (grid, bases, z) = self.latent(frame, model.layers.len());
        let residual = inside(&network(model, &self.at, &z, grid), grid);
        let student = &model.metadata.student;
        let (r, cells) = (student.r, grid.with_margin(0));
        let std = model.stats.residual_std.iter();
        let gain: Vec<f32> = std.map(|s| s * self.strength).collect();
        let sum = |(c, mut plane): (Component, Vec<f32>)| {
            let slot = match (c, student.latent) {
                (A, _) | (U | V, LatentKind::Luma) => None,
                (U, _) => Some(chroma_slot(r, 0)),
                (V, _) => Some(chroma_slot(r, 1)),
                (Y | R | G | B, _) => Some(luma_slot(r)),
            };
            if let Some(slot) = slot {
                let width = dst.format.component_size(c, dst.width, dst.height).0;
                shuffle_add(&residual, slot, cells, &gain, &mut plane, width);
            }
            (c, plane)
        };
        bases.into_iter().map(sum).collect()
    }

    /// Returns every component enlarged by bicubic interpolation.
    fn bases(&self, frame: &FrameRef) -> Bases {
        let (src, dst) = (&self.src, &self.dst);
        let base = |c: Component| {
            let (w, h) = (dst.width, dst.height);
            let resampler = Resampler::for_component(src, c, w, h, Kernel::Bicubic, false);
            let size = |info: &FrameInfo| info.format.component_size(c, info.width, info.height);
            let ((sw, sh), (dw, dh)) = (size(src), size(dst));
            let (mut samples, mut plane) = (vec![f32::NAN; sw * sh], vec![0.0; dw * dh]);
            frame.read(c, &mut samples).unwrap();
            resampler.unwrap().run(&samples, &mut plane);
            (c, plane)
        };
        let components = src.format.components().iter();
        components.map(|layout| base(layout.component)).collect()
    }

    /// Returns the latent with a margin, and the bases.
    pub fn latent(&self, frame: &FrameRef, margin: usize) -> (Grid, Bases, Vec<f32>) {
        let student = &self.model.metadata.student;
        let (r, (w, h)) = (student.r, (self.dst.width, self.dst.height));
        let bases = self.bases(frame);
        let of = |c: Component| bases.iter().find(|b| b.0 == c).map(|b| &b.1);
        let grid = Grid::new(student.latent, r, w, h).with_margin(margin);
        let (mean, std) = (&self.model.stats.input_mean, &self.model.stats.input_std);
        let mut z = vec![0.0; grid.len()];
        let mut put =
            |plane: &[f32], width, slot| unshuffle(plane, width, slot, grid, mean, std, &mut z);
        put(&luma(&self.src, &bases), w, luma_slot(r));
        if student.latent == LatentKind::Yuv {
            let neutral = vec![0.0; w.div_ceil(2) * h.div_ceil(2)];
            for (which, c) in [U, V].into_iter().enumerate() {
                put(
                    of(c).unwrap_or(&neutral),
                    w.div_ceil(2),
                    chroma_slot(r, which),
                );
            }
        }
        (grid, bases, z)
    }
}

/// Returns the luma of some planes.
pub fn luma(info: &FrameInfo, planes: &Bases) -> Vec<f32> {
    let of = |c: Component| planes.iter().find(|p| p.0 == c).map(|p| &p.1);
    match (of(Y), of(R), of(G), of(B)) {
        (None, Some(red), Some(green), Some(blue)) => {
            let (kr, kg, kb) = info.colorimetry.matrix.luma_weights();
            let mix = |i: usize| kr * red[i] + kg * green[i] + kb * blue[i];
            (0..red.len()).map(mix).collect()
        }
        (luma, ..) => luma.unwrap().clone(),
    }
}

/// Computes one layer after the other on the whole grid.
pub fn network(model: &LiteModel, at: &Condition, z: &[f32], grid: Grid) -> Vec<f32> {
    let (mut x, mut skip) = (z.to_vec(), Vec::new());
    for layer in &model.layers {
        let spec = &layer.spec;
        let shape = ConvShape {
            n: 1,
            h: grid.height,
            w: grid.width,
            ci: spec.ci,
            co: spec.co,
            kh: 3,
            kw: 3,
            stride: 1,
            pad: 1,
        };
        let activation = match spec.activated {
            Activated::Leaky => Activation::LeakyRelu(LEAKY_SLOPE),
            Activated::No => Activation::None,
        };
        let (weight, bias) = layer.fold(at, model.metadata.student.r);
        let mut y = reference(&shape, &x, &weight, Some(&bias), activation);
        match spec.role {
            Role::Chain => {}
            Role::PairFirst => skip.clone_from(&x),
            Role::PairSecond => y.iter_mut().zip(&skip).for_each(|(y, x)| *y += x),
        }
        x = y;
    }
    x
}

/// Returns `values` on `grid` without the margin.
pub fn inside(values: &[f32], grid: Grid) -> Vec<f32> {
    let row = grid.width * grid.channels;
    let margin = grid.margin * grid.channels;
    let rows = values.chunks_exact(row).skip(grid.margin);
    let rows = rows.take(grid.height - 2 * grid.margin);
    rows.flat_map(|r| &r[margin..row - margin])
        .copied()
        .collect()
}
