//! Motion and confidence from frame to frame of a video, on luma.

use super::{
    motion::{Field, MotionFrame, Vector},
    simd::Isa,
};

/// Mean difference of the compensated windows, in 8-bit steps of a pixel, from which on a frame
/// begins another scene.
const CUT: u64 = 14;

/// Sum of nine differences that lowers the confidence to 1/e, in 8-bit steps.
const WIDTH: f32 = 9.0 * 2.5;

/// Follows the motion of a video.
pub struct Tracker {
    width: usize,
    frames: [MotionFrame; 2],
    /// The first of [`Self::frames`] is a frame.
    known: bool,
    field: Field,
    /// Differences of the moved previous frame.
    differences: Vec<u8>,
    confidence: Vec<f32>,
    /// Confidence for a sum of nine differences.
    table: Vec<f32>,
    isa: Isa,
}

impl Tracker {
    /// Creates a tracker of frames of `width` x `height` pixels.
    ///
    /// # Panics
    /// If a side is 0.
    pub fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            frames: [(); 2].map(|()| MotionFrame::new(width, height)),
            known: false,
            field: Field::new(width, height),
            differences: vec![0; width * height],
            confidence: vec![0.0; width * height],
            table: (0..=9 * 255)
                .map(|sum| (-(sum as f32) / WIDTH).exp())
                .collect(),
            isa: Isa::best(),
        }
    }

    /// Forgets all frames.
    pub fn forget(&mut self) {
        self.known = false;
        self.field.vectors.fill(Vector::default());
    }

    /// Takes the next frame, samples of 0 to 1. Returns `true` if the confidence is above 0
    /// somewhere.
    ///
    /// # Panics
    /// If the length does not fit.
    pub fn next(&mut self, luma: &[f32]) -> bool {
        self.frames.swap(0, 1);
        let [now, last] = &mut self.frames;
        now.set(luma, self.isa);
        let known = std::mem::replace(&mut self.known, true);
        if known {
            self.field.search(now, last, self.isa);
            let sum: u64 = self.field.differences.iter().map(|d| u64::from(*d)).sum();
            if sum < CUT * 256 * self.field.differences.len() as u64 {
                self.field.differ(now, last, &mut self.differences);
                self.trust();
                return true;
            }
            self.field.vectors.fill(Vector::default());
        }
        self.confidence.fill(0.0);
        false
    }

    /// Returns the confidence of each pixel in what has moved to it, 0 to 1.
    pub fn confidence(&self) -> &[f32] {
        &self.confidence
    }

    /// Returns the motion from the previous frame, which moves its planes.
    pub fn field(&self) -> &Field {
        &self.field
    }

    /// Computes the confidence from the differences in a square of nine pixels. The border repeats.
    fn trust(&mut self) {
        let (width, last) = (self.width, self.differences.len() / self.width - 1);
        let row = |y: usize| &self.differences[y * width..][..width];
        let mut sums = vec![0u16; width];
        for (y, out) in self.confidence.chunks_exact_mut(width).enumerate() {
            let [a, b, c] = [y.saturating_sub(1), y, last.min(y + 1)].map(row);
            for (sum, ((a, b), c)) in sums.iter_mut().zip(a.iter().zip(b).zip(c)) {
                *sum = u16::from(*a) + u16::from(*b) + u16::from(*c);
            }
            for (x, out) in out.iter_mut().enumerate() {
                let (left, right) = (x.saturating_sub(1), (width - 1).min(x + 1));
                *out = self.table[usize::from(sums[left] + sums[x] + sums[right])];
            }
        }
    }
}
