//! Conversion between frames and planes of R', G', B' in full resolution.

use super::{
    Component, FrameInfo, FrameRef,
    resample::{Axis, Kernel, Options, Resampler},
};
use crate::Result;

pub(super) const RGB: [Component; 3] = [Component::R, Component::G, Component::B];

impl FrameRef<'_> {
    /// Returns planes of R', G' and B' samples with the size of the frame. Subsampled chroma is
    /// interpolated from its site by a Catmull-Rom filter, and Y'CbCr is converted by the frame's
    /// matrix. Grey gives three equal planes. Alpha is dropped. Samples are not clamped: colours
    /// outside R'G'B' are below 0 or above 1.
    ///
    /// # Errors
    /// None for a valid frame.
    pub fn to_rgb(&self) -> Result<[Vec<f32>; 3]> {
        let info = self.info();
        let (w, h) = (info.width, info.height);
        if info.format.is_rgb() {
            let [r, g, b] = RGB.map(|c| self.read_plane(c));
            return Ok([r?, g?, b?]);
        }
        let mut y = self.read_plane(Component::Y)?;
        if info.format.component(Component::U).is_none() {
            return Ok([y.clone(), y.clone(), y]);
        }
        let upsampler = chroma_resampler(info, Direction::Up);
        let [mut u, mut v] = [vec![0.0; w * h], vec![0.0; w * h]];
        upsampler.run(&self.read_plane(Component::U)?, &mut u);
        upsampler.run(&self.read_plane(Component::V)?, &mut v);
        let matrix = info.colorimetry.matrix;
        matrix.ycbcr_to_rgb([&mut y, &mut u, &mut v]);
        Ok([y, u, v])
    }

    /// Returns all samples of `component`, rows without padding.
    ///
    /// # Errors
    /// As [`FrameRef::read`].
    pub(crate) fn read_plane(&self, component: Component) -> Result<Vec<f32>> {
        let info = self.info();
        let (w, h) = info
            .format
            .component_size(component, info.width, info.height);
        let mut plane = vec![0.0; w * h];
        self.read(component, &mut plane)?;
        Ok(plane)
    }
}

impl FrameInfo {
    /// Converts planes of R', G' and B' with the size of the frame to the components of this format
    /// without alpha, the inverse of [`FrameRef::to_rgb`]. Subsampled chroma is filtered to its
    /// site by a triangle filter.
    pub fn planes_of_rgb(
        &self,
        [mut r, mut g, mut b]: [Vec<f32>; 3],
    ) -> Vec<(Component, Vec<f32>)> {
        if self.format.is_rgb() {
            return RGB.into_iter().zip([r, g, b]).collect();
        }
        self.colorimetry
            .matrix
            .rgb_to_ycbcr([&mut r, &mut g, &mut b]);
        let mut planes = vec![(Component::Y, r)];
        for (component, plane) in [(Component::U, g), (Component::V, b)] {
            if self.format.component(component).is_none() {
                continue;
            }
            if self.format.chroma_shift() == (0, 0) {
                planes.push((component, plane));
                continue;
            }
            let (w, h) = self
                .format
                .component_size(component, self.width, self.height);
            let mut chroma = vec![0.0; w * h];
            chroma_resampler(self, Direction::Down).run(&plane, &mut chroma);
            planes.push((component, chroma));
        }
        planes
    }
}

#[derive(PartialEq)]
enum Direction {
    /// Luma grid to chroma grid.
    Down,
    /// Chroma grid to luma grid.
    Up,
}

/// Returns the resampler between the luma grid and the chroma grid of `info`. Chroma sample i is at
/// luma position 2i if cosited and 2i + 0.5 if centred: (i + c) * 2 - c with c = 0 and c = 0.5.
fn chroma_resampler(info: &FrameInfo, direction: Direction) -> Resampler {
    let (w, h) = (info.width, info.height);
    let (cw, ch) = info.format.component_size(Component::U, w, h);
    let (sx, sy) = info.format.chroma_shift();
    let axis = |luma, chroma, shift: u32, cosited| {
        let centre = if cosited { 0.0 } else { 0.5 };
        let factor = f64::from(1 << shift);
        let (src, dst, kernel, ratio) = match direction {
            Direction::Down => (luma, chroma, Kernel::Bilinear, factor),
            Direction::Up => (chroma, luma, Kernel::CatmullRom, 1.0 / factor),
        };
        let options = Options {
            antialias: direction == Direction::Down,
            centre,
            ratio: Some(ratio),
        };
        Axis::new(src, dst, kernel, options)
    };
    let site = info.chroma_site;
    Resampler::new(
        axis(w, cw, sx, site.horizontal_cosited),
        axis(h, ch, sy, site.vertical_cosited),
    )
}
