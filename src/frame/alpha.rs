//! Colours of transparent pixels.

use super::{Component, Frame, FrameInfo, FrameMut, FrameRef, Source};
use crate::Result;

/// Sums of the visible colours, each weighted by its alpha, and of the weights, of a square of
/// pixels.
type Sum = [f32; 4];

/// A frame of sums.
struct Level {
    width: usize,
    height: usize,
    sums: Vec<Sum>,
}

impl Level {
    /// Sums squares of two by two.
    fn halved(&self) -> Self {
        let (width, height) = (self.width.div_ceil(2), self.height.div_ceil(2));
        let mut sums = vec![[0.0; 4]; width * height];
        for (y, row) in self.sums.chunks(self.width).enumerate() {
            for (x, sum) in row.iter().enumerate() {
                let to = &mut sums[y / 2 * width + x / 2];
                to.iter_mut().zip(sum).for_each(|(to, value)| *to += value);
            }
        }
        Self {
            width,
            height,
            sums,
        }
    }

    /// Takes sums without weight from a level of half the size.
    fn fill_from(&mut self, half: &Self) {
        for (y, row) in self.sums.chunks_mut(self.width).enumerate() {
            for (x, sum) in row.iter_mut().enumerate() {
                if sum[3] == 0.0 {
                    *sum = half.sums[y / 2 * half.width + x / 2];
                }
            }
        }
    }
}

/// Components of one size and the alpha of their samples.
struct Colours<'a> {
    components: Vec<Component>,
    sources: Vec<Source<'a>>,
    alpha: Source<'a>,
    info: FrameInfo,
    /// log2 of the horizontal and vertical subsampling.
    shift: (u32, u32),
    width: usize,
    height: usize,
}

impl<'a> Colours<'a> {
    fn new(frame: &FrameRef<'a>, components: &[Component], shift: (u32, u32)) -> Result<Self> {
        let info = *frame.info();
        let (width, height) = (info.format).component_size(components[0], info.width, info.height);
        let sources = components.iter().map(|&c| Source::new(frame, c));
        Ok(Self {
            sources: sources.collect::<Result<_>>()?,
            components: components.to_vec(),
            alpha: Source::new(frame, Component::A)?,
            info,
            shift,
            width,
            height,
        })
    }

    /// Returns the sums of the alpha of the pixels that the samples of row `y` cover.
    fn weights(&self, y: usize) -> Vec<f32> {
        let mut weights = vec![0.0; self.width];
        let mut line = vec![0.0; self.info.width];
        let rows = y << self.shift.1..((y + 1) << self.shift.1).min(self.info.height);
        for row in rows {
            self.alpha.read(row, 0..line.len(), &mut line);
            for (x, alpha) in line.iter().enumerate() {
                weights[x >> self.shift.0] += alpha;
            }
        }
        weights
    }

    /// Returns the sums of the samples.
    fn level(&self) -> Level {
        let mut sums = Vec::with_capacity(self.width * self.height);
        let mut line = vec![0.0; self.width];
        for y in 0..self.height {
            let first = sums.len();
            sums.extend(self.weights(y).into_iter().map(|w| [0.0, 0.0, 0.0, w]));
            for (i, source) in self.sources.iter().enumerate() {
                source.read(y, 0..self.width, &mut line);
                for (sum, value) in sums[first..].iter_mut().zip(&line) {
                    sum[i] = value * sum[3];
                }
            }
        }
        Level {
            width: self.width,
            height: self.height,
            sums,
        }
    }

    /// Writes the colours of nearby visible samples to those of `target` that are transparent.
    fn spread(&self, target: &mut FrameMut) -> Result<()> {
        let mut levels = vec![self.level()];
        while let Some(last) = levels.last()
            && last.sums.iter().any(|sum| sum[3] == 0.0)
        {
            let half = last.halved();
            levels.push(half);
        }
        while levels.len() > 1
            && let Some(half) = levels.pop()
            && let Some(level) = levels.last_mut()
        {
            level.fill_from(&half);
        }
        let mut line = vec![0.0; self.width];
        for (y, sums) in levels[0].sums.chunks_exact(self.width).enumerate() {
            let weights = self.weights(y);
            for (i, (source, &component)) in self.sources.iter().zip(&self.components).enumerate() {
                source.read(y, 0..self.width, &mut line);
                for ((value, sum), &weight) in line.iter_mut().zip(sums).zip(&weights) {
                    if weight == 0.0 {
                        *value = sum[i] / sum[3];
                    }
                }
                target.write_row(component, y, &line)?;
            }
        }
        Ok(())
    }
}

/// Returns `frame` with the colours of nearby visible pixels in those that are fully transparent;
/// `None` if nothing is fully transparent, or nothing is visible. Without this their colours,
/// mostly black, would show at the edges of an enlarged frame. A chroma sample changes if all its
/// pixels are transparent.
///
/// # Errors
/// As [`Frame::new`].
pub(crate) fn spread_colours(frame: &FrameRef) -> Result<Option<Frame>> {
    let info = *frame.info();
    if !info.format.has_alpha() {
        return Ok(None);
    }
    let alpha = Source::new(frame, Component::A)?;
    let mut line = vec![0.0; info.width];
    let transparent = |y| {
        alpha.read(y, 0..info.width, &mut line);
        line.iter().filter(|&&alpha| alpha == 0.0).count()
    };
    let transparent: usize = (0..info.height).map(transparent).sum();
    if transparent == 0 || transparent == info.width * info.height {
        return Ok(None);
    }
    let mut filled = Frame::new(info)?;
    for (i, plane) in frame.planes().iter().enumerate() {
        let (row, _) = info.format.plane_size(i, info.width, info.height);
        let rows = plane.data.chunks(plane.stride);
        for (to, from) in filled.plane_mut(i).chunks_exact_mut(row).zip(rows) {
            to.copy_from_slice(&from[..row]);
        }
    }
    let shift = info.format.chroma_shift();
    let groups: &[(&[Component], _)] = if info.format.is_rgb() {
        &[(&[Component::R, Component::G, Component::B], (0, 0))]
    } else {
        &[
            (&[Component::Y], (0, 0)),
            (&[Component::U, Component::V], shift),
        ]
    };
    for &(components, shift) in groups {
        Colours::new(frame, components, shift)?.spread(&mut filled.as_mut())?;
    }
    Ok(Some(filled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PixelFormat;
    use Component::*;

    fn sample(frame: &Frame, component: Component, x: usize, y: usize) -> f32 {
        let mut value = [0.0];
        let source = Source::new(&frame.as_ref(), component).unwrap();
        source.read(y, x..x + 1, &mut value);
        value[0]
    }

    #[test]
    fn transparent_pixels_take_the_colours_of_their_neighbours() {
        for format in PixelFormat::ALL.into_iter().filter(|f| f.has_alpha()) {
            let (width, height) = (33, 21);
            let info = FrameInfo::new(format, width, height);
            let mut frame = Frame::new(info).unwrap();
            assert!(spread_colours(&frame.as_ref()).unwrap().is_none());
            let (first, last) = if format.is_rgb() { (R, B) } else { (U, V) };
            // One colour on the left, another on the right, nothing visible between.
            let colour = |x: usize| match x {
                0..8 => [0.25, 0.0],
                8..24 => [0.4, 0.4],
                _ => [0.0, 0.25],
            };
            for (i, component) in [first, last].into_iter().enumerate() {
                let (w, h) = format.component_size(component, width, height);
                let scale = if w < width { 2 } else { 1 };
                let row: Vec<f32> = (0..w).map(|x| colour(scale * x)[i]).collect();
                for y in 0..h {
                    frame.as_mut().write_row(component, y, &row).unwrap();
                }
            }
            let alpha = |x: usize| if (8..24).contains(&x) { 0.0 } else { 0.8 };
            let alphas: Vec<f32> = (0..width).map(alpha).collect();
            for y in 0..height {
                frame.as_mut().write_row(A, y, &alphas).unwrap();
            }
            let filled = spread_colours(&frame.as_ref()).unwrap().unwrap();
            for component in [first, last] {
                let (w, h) = format.component_size(component, width, height);
                let scale = if w < width { 2 } else { 1 };
                for (x, y) in (0..w).flat_map(|x| (0..h).map(move |y| (x, y))) {
                    let from = match scale * x {
                        0..12 => 0,
                        20.. => w - 1,
                        _ => continue,
                    };
                    let want = sample(&frame, component, from, y);
                    let got = sample(&filled, component, x, y);
                    assert_eq!(got, want, "{format:?} {component:?} {x} {y}");
                }
            }
            for y in 0..height {
                for x in 0..width {
                    assert_eq!(sample(&filled, A, x, y), sample(&frame, A, x, y));
                }
            }
            for y in 0..height {
                frame.as_mut().write_row(A, y, &vec![0.01; width]).unwrap();
            }
            assert!(spread_colours(&frame.as_ref()).unwrap().is_none());
        }
    }

    #[test]
    fn visible_pixels_and_the_colours_that_they_share_do_not_change() {
        let info = FrameInfo::new(PixelFormat::A420, 6, 2);
        let mut frame = Frame::new(info).unwrap();
        frame
            .plane_mut(0)
            .copy_from_slice(&[10, 20, 30, 40, 50, 60, 11, 21, 31, 41, 51, 61]);
        frame.plane_mut(1).copy_from_slice(&[100, 110, 120]);
        frame.plane_mut(2).copy_from_slice(&[130, 140, 150]);
        // The second chroma sample has one visible pixel, the third has none.
        frame
            .plane_mut(3)
            .copy_from_slice(&[9, 9, 9, 0, 0, 0, 9, 9, 0, 0, 0, 0]);
        let filled = spread_colours(&frame.as_ref()).unwrap().unwrap();
        assert_eq!(filled.plane(0)[..3], [10, 20, 30]);
        // The mean of the first two by their visible pixels.
        assert_eq!(filled.plane(1), [100, 110, 102]);
        assert_eq!(filled.plane(2), [130, 140, 132]);
        assert_eq!(filled.plane(3), frame.plane(3));
    }
}
