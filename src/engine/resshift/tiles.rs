//! Overlapping tiles of an image, and weights that blend them without seams.

use std::f64::consts::PI;

/// Tiles along one axis of a padded image, all of one length.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TileAxis {
    /// Samples of the padded image.
    pub len: usize,
    /// Samples of a tile.
    pub side: usize,
    /// First sample of each tile. The first tile begins at 0, the last one ends with the padded
    /// image.
    pub starts: Vec<usize>,
    /// Samples over which neighbouring tiles are blended.
    overlap: usize,
}

impl TileAxis {
    /// Splits `len` samples into the minimum number of evenly spaced tiles of `side` samples that
    /// overlap by at least `overlap` samples, or half a tile if that is less. Tiles start at
    /// multiples of `align`, which divides `side`. An image shorter than a tile is padded to one.
    pub fn new(len: usize, side: usize, overlap: usize, align: usize) -> Self {
        let max_overlap = side / 2 / align * align;
        let overlap = overlap.min(max_overlap).next_multiple_of(align);
        let len = len.next_multiple_of(align).max(side);
        let steps = (len - side).div_ceil((side - overlap).max(1));
        let start = |i: usize| (len - side) * i / steps.max(1) / align * align;
        Self {
            len,
            side,
            starts: (0..=steps).map(start).collect(),
            overlap,
        }
    }

    /// Returns the weights of the `scale * side` output samples of tile `i` in the sum of all
    /// tiles. At every position the weights of all tiles add up to 1.
    ///
    /// In the middle of an overlap, one tile fades into the next along a raised cosine of the
    /// length of the requested overlap. Everywhere else the output comes from the inside of one
    /// tile.
    pub fn weights(&self, i: usize, scale: usize) -> Vec<f32> {
        let at = |k: usize| (self.starts[i] * scale + k) as f64 + 0.5;
        let total = |x: f64| {
            (0..self.starts.len())
                .map(|j| self.window(j, x, scale))
                .sum::<f64>()
        };
        (0..self.side * scale)
            .map(|k| (self.window(i, at(k), scale) / total(at(k))) as f32)
            .collect()
    }

    /// Returns the weight of tile `i` at position `x` of the output, before normalisation.
    fn window(&self, i: usize, x: f64, scale: usize) -> f64 {
        let (first, last) = (i == 0, i + 1 == self.starts.len());
        let from = if first {
            1.0
        } else {
            self.fade(i - 1, x, scale)
        };
        let to = if last { 0.0 } else { self.fade(i, x, scale) };
        from * (1.0 - to)
    }

    /// Returns the progress of the fade from tile `i` to the next at position `x`, 0 to 1.
    fn fade(&self, i: usize, x: f64, scale: usize) -> f64 {
        let centre = (self.starts[i] + self.side + self.starts[i + 1]) as f64 / 2.0;
        let beyond = x - centre * scale as f64;
        if self.overlap == 0 {
            return f64::from(beyond > 0.0);
        }
        let along = (beyond / (self.overlap * scale) as f64 + 0.5).clamp(0.0, 1.0);
        0.5 - 0.5 * (PI * along).cos()
    }
}

/// Pads `plane`, which has `width` samples in a row, to the size `to` by reflection to the right
/// and downwards, without repeating the border. The padding may be larger than the plane.
pub(super) fn reflect_pad(plane: &[f32], width: usize, to: (usize, usize)) -> Vec<f32> {
    let height = plane.len() / width;
    let columns: Vec<usize> = (0..to.0).map(|x| reflected(x, width)).collect();
    (0..to.1)
        .map(|y| &plane[reflected(y, height) * width..][..width])
        .flat_map(|row| columns.iter().map(|&x| row[x]))
        .collect()
}

/// Returns the index of the sample of `len` at position `i` of their repeated reflection.
fn reflected(i: usize, len: usize) -> usize {
    let period = (2 * (len - 1)).max(1);
    let i = i % period;
    i.min(period - i).min(len - 1)
}

/// Returns the upper left part of `plane` with the size `to`.
pub(super) fn crop(mut plane: Vec<f32>, width: usize, to: (usize, usize)) -> Vec<f32> {
    if width != to.0 {
        for y in 0..to.1 {
            plane.copy_within(y * width..y * width + to.0, y * to.0);
        }
    }
    plane.truncate(to.0 * to.1);
    plane
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn padding_reflects_without_the_border_as_often_as_needed() {
        let row = |len: usize, to: usize| {
            let plane: Vec<f32> = (0..len).map(|i| i as f32).collect();
            reflect_pad(&plane, len, (to, 1))
        };
        assert_eq!(row(4, 6), [0.0, 1.0, 2.0, 3.0, 2.0, 1.0]);
        assert_eq!(row(3, 9), [0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0]);
        assert_eq!(row(2, 5), [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(row(1, 4), [0.0; 4]);
        let square = reflect_pad(&[1.0, 2.0, 3.0, 4.0], 2, (3, 4));
        assert_eq!(
            square,
            [1.0, 2.0, 1.0, 3.0, 4.0, 3.0, 1.0, 2.0, 1.0, 3.0, 4.0, 3.0]
        );
    }

    #[test]
    fn cropping_undoes_padding() {
        let plane: Vec<f32> = (0..35).map(|i| i as f32).collect();
        assert_eq!(crop(reflect_pad(&plane, 5, (16, 16)), 16, (5, 7)), plane);
    }

    #[test]
    fn an_image_that_is_not_longer_than_a_tile_is_one_tile() {
        let axis = TileAxis::new(50, 64, 16, 1);
        assert_eq!((axis.len, &axis.starts[..]), (64, &[0][..]));
        assert!(axis.weights(0, 4).iter().all(|&w| w == 1.0));
    }

    #[test]
    fn tiles_have_equal_weights_in_the_middle_of_the_overlap_and_one_tile_elsewhere() {
        let axis = TileAxis::new(112, 64, 16, 1);
        assert_eq!(axis.starts, [0, 48]);
        let (a, b) = (axis.weights(0, 2), axis.weights(1, 2));
        assert!(a[..96].iter().all(|&w| w == 1.0));
        assert!((a[112] - 0.5).abs() < 0.06 && (b[16] - 0.5).abs() < 0.06);
        // Tiles that overlap more than requested are blended over the requested overlap.
        let axis = TileAxis::new(80, 64, 16, 1);
        let blended = axis
            .weights(0, 2)
            .iter()
            .filter(|&&w| w > 0.0 && w < 1.0)
            .count();
        assert_eq!(blended, 32);
    }

    proptest! {
        #[test]
        fn tiles_cover_the_image_overlap_and_have_weights_that_add_up_to_one(
            len in 1usize..900, units in 1usize..6, overlap in 0usize..100, align_log in 0u32..4,
            scale in 1usize..5,
        ) {
            let (align, side) = (1 << align_log, 16 * units);
            let axis = TileAxis::new(len, side, overlap, align);
            prop_assert!(axis.len >= len && axis.len < len.max(side) + align);
            prop_assert_eq!(axis.starts[0], 0);
            prop_assert!(axis.starts.iter().all(|s| s % align == 0));
            prop_assert_eq!(axis.starts[axis.starts.len() - 1] + side, axis.len);
            let mut sum = vec![0.0f32; axis.len * scale];
            for (i, &start) in axis.starts.iter().enumerate() {
                if let Some(next) = axis.starts.get(i + 1) {
                    let min_overlap = overlap.min(side / 2 / align * align);
                    prop_assert!(start < *next && start + side >= next + min_overlap);
                }
                for (k, w) in axis.weights(i, scale).into_iter().enumerate() {
                    prop_assert!((0.0..=1.0).contains(&w));
                    sum[start * scale + k] += w;
                }
            }
            prop_assert!(sum.iter().all(|s| (s - 1.0).abs() < 1e-5), "{:?}", sum);
        }
    }
}
