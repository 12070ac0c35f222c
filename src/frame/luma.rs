//! Luma of frames of any format.

use std::ops::Range;

use super::{Component, FrameRef, Source};
use crate::Result;

/// Luma of a frame: its own plane, or the weighted sum of R, G and B.
pub(crate) struct Luma<'a> {
    /// Components and their weights in luma.
    parts: Vec<(Source<'a>, f32)>,
}

impl<'a> Luma<'a> {
    /// # Errors
    /// [`crate::Error::Frame`] if the frame is not valid.
    pub(crate) fn new(frame: &FrameRef<'a>) -> Result<Self> {
        let info = frame.info();
        let (kr, kg, kb) = info.colorimetry.matrix.luma_weights();
        let weights: &[_] = if info.format.is_rgb() {
            &[(Component::R, kr), (Component::G, kg), (Component::B, kb)]
        } else {
            &[(Component::Y, 1.0)]
        };
        let part = |&(component, weight)| Ok((Source::new(frame, component)?, weight));
        Ok(Self {
            parts: weights.iter().map(part).collect::<Result<_>>()?,
        })
    }

    /// Reads the samples `x` of row `y`. `scratch` is working memory.
    ///
    /// # Panics
    /// If the samples are outside of the frame, or `row` has the wrong length.
    pub(crate) fn read(&self, y: usize, x: Range<usize>, row: &mut [f32], scratch: &mut Vec<f32>) {
        if let [(source, _)] = &self.parts[..] {
            return source.read(y, x, row);
        }
        row.fill(0.0);
        scratch.resize(row.len(), 0.0);
        for (source, weight) in &self.parts {
            source.read(y, x.clone(), scratch);
            let samples = row.iter_mut().zip(scratch.iter());
            samples.for_each(|(v, s)| *v += weight * s);
        }
    }
}
