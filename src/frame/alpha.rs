//! Colours of transparent pixels.

use super::{Component, Frame, FrameRef};
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

/// Returns `frame` with the colours of nearby visible pixels in those that are fully transparent;
/// `None` if nothing is fully transparent, or nothing is visible. Without this their colours,
/// mostly black, would show at the edges of an enlarged frame.
///
/// # Errors
/// As [`Frame::new`].
pub(crate) fn spread_colours(frame: &FrameRef) -> Result<Option<Frame>> {
    let info = *frame.info();
    let Some(alpha) = info.format.component(Component::A) else {
        return Ok(None);
    };
    let (width, step) = (info.width, alpha.step);
    let plane = &frame.planes()[alpha.plane];
    let rows = || plane.data.chunks(plane.stride).take(info.height);
    let alphas = |row: &[u8]| {
        let pixels = row[..width * step].chunks_exact(step);
        pixels.filter(|pixel| pixel[alpha.offset] == 0).count()
    };
    let transparent: usize = rows().map(alphas).sum();
    if transparent == 0 || transparent == width * info.height {
        return Ok(None);
    }
    let colours: Vec<_> = info
        .format
        .components()
        .iter()
        .map(|c| c.offset)
        .take(3)
        .collect();
    let sum = |pixel: &[u8]| {
        let weight = f32::from(pixel[alpha.offset]);
        let colour = |i: usize| f32::from(pixel[colours[i]]) * weight;
        [colour(0), colour(1), colour(2), weight]
    };
    let pixels = rows().flat_map(|row| row[..width * step].chunks_exact(step).map(sum));
    let mut levels = vec![Level {
        width,
        height: info.height,
        sums: pixels.collect(),
    }];
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
    let mut filled = Frame::new(info)?;
    let target = filled.plane_mut(alpha.plane).chunks_exact_mut(width * step);
    for (to, from) in target.zip(rows()) {
        to.copy_from_slice(&from[..width * step]);
    }
    let pixels = filled.plane_mut(alpha.plane).chunks_exact_mut(step);
    for (pixel, sum) in pixels.zip(&levels[0].sums) {
        if pixel[alpha.offset] == 0 {
            for (i, offset) in colours.iter().enumerate() {
                pixel[*offset] = (sum[i] / sum[3]).round() as u8;
            }
        }
    }
    Ok(Some(filled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{FrameInfo, PixelFormat};

    #[test]
    fn transparent_pixels_take_the_colours_of_their_neighbours() {
        for format in PixelFormat::ALL.into_iter().filter(|f| f.has_alpha()) {
            let (width, height) = (33, 21);
            let mut frame = Frame::new(FrameInfo::new(format, width, height)).unwrap();
            assert!(spread_colours(&frame.as_ref()).unwrap().is_none());
            let offset = |c| format.component(c).unwrap().offset;
            let (red, blue, alpha) = (
                offset(Component::R),
                offset(Component::B),
                offset(Component::A),
            );
            // Red on the left, blue on the right, nothing visible between.
            for (i, pixel) in frame.plane_mut(0).chunks_exact_mut(4).enumerate() {
                let x = i % width;
                if !(8..24).contains(&x) {
                    pixel[alpha] = 200;
                    pixel[if x < 8 { red } else { blue }] = 250;
                }
            }
            let filled = spread_colours(&frame.as_ref()).unwrap().unwrap();
            let before = frame.plane(0).chunks_exact(4);
            for (i, (was, is)) in before.zip(filled.plane(0).chunks_exact(4)).enumerate() {
                assert_eq!(was[alpha], is[alpha]);
                let x = i % width;
                if was[alpha] > 0 {
                    assert_eq!(was, is);
                } else if x < 12 {
                    assert_eq!((is[red], is[blue]), (250, 0), "{x}");
                } else if x >= 20 {
                    assert_eq!((is[red], is[blue]), (0, 250), "{x}");
                }
            }
            frame
                .plane_mut(0)
                .chunks_exact_mut(4)
                .for_each(|p| p[alpha] = 1);
            assert!(spread_colours(&frame.as_ref()).unwrap().is_none());
        }
    }
}
