//! How sizes of the input, the output and the latent go together, and how large tiles are.

use super::tiles::Cut;
use crate::{
    Error, Result,
    engine::{Options, Tile},
    nn::resshift::ResShiftConfig,
};

/// Sizes that belong to a model. All lengths are in pixels of the input unless they are said to be the latent's.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    pub scale: usize,
    /// Pixels of the output for one of the latent.
    factor: usize,
    /// Channels of the latent.
    channels: usize,
    /// A tile's sides are multiples of this.
    unit: usize,
    /// Tiles start at multiples of this, where pixels of the latent start.
    align: usize,
    /// Bytes that a tile needs for each pixel of the latent: attention takes no more for larger tiles.
    bytes: usize,
}

/// Pixels of the latent at which the autoencoder's attention, which grows with their square, costs as much time as
/// everything else. Counted for the real-world model: 2 x 4 x 512 operations for each pair of pixels against 273
/// million for each pixel.
const ATTENTION_PARITY: f64 = 66_000.0;

/// The part of the free memory that automatic tiles may take.
const SHARE: f64 = 0.5;

/// What a tile takes over the feature maps of the decoder's widest ResBlock: its input, the normalised input and what the
/// first convolution makes of it. Measured were 1.04 for the real-world model with 64x64 to 128x128 pixels of the input
/// (650 MiB) and for faces of 512x512 (335 MiB), 1.11 for a narrow model.
const OVER_MAPS: f64 = 1.2;

/// How much more candle's operators take than our kernels, counted for the widest norm in f32 and the patches of a
/// convolution; not measured on a device.
const COMPOSED: usize = 4;

/// Planes of f32 samples of the output's size that a frame needs beside the tile in work.
const PLANES: u64 = 9;

impl Geometry {
    pub fn new(config: &ResShiftConfig) -> Self {
        let (scale, factor) = (config.diffusion.scale, config.autoencoder.factor());
        // Pixels of the input that `latent` pixels of the latent make up, and as many more as it takes to be whole.
        let whole = |latent: usize| latent * factor / gcd(latent * factor, scale);
        let autoencoder = &config.autoencoder;
        let channels = |level: usize| autoencoder.ch * autoencoder.ch_mult[level];
        let last = autoencoder.ch_mult.len() - 1;
        // On the way up a level begins with the channels of the one below.
        let widest = (0..=last)
            .map(|i| (2 * channels((i + 1).min(last)) + channels(i)) * (factor >> i).pow(2))
            .max();
        let bytes = (4 * widest.unwrap_or(0)) as f64 * OVER_MAPS;
        Self {
            scale,
            factor,
            channels: autoencoder.embed_dim,
            unit: whole(config.unet.latent_multiple()),
            align: whole(1),
            bytes: bytes as usize,
        }
    }

    /// For networks of candle's operators, which keep more maps at a time; also where kernels on CUDA take the place of some, whose
    /// memory has not been measured.
    pub fn compose(&mut self) {
        self.bytes *= COMPOSED;
    }

    /// Channels, rows and columns of the latent of a frame, padded to what the networks take in one piece.
    pub fn latent(&self, width: usize, height: usize) -> [usize; 3] {
        let pad = |len: usize| len.next_multiple_of(self.unit);
        self.latent_at(pad(width), pad(height))
    }

    /// The same for a tile, or of its place.
    pub fn latent_at(&self, x: usize, y: usize) -> [usize; 3] {
        let at = |v: usize| v * self.scale / self.factor;
        [self.channels, at(y), at(x)]
    }

    /// How a frame of `width` x `height` is cut into tiles, across and down; `available` tells the bytes that are free.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough.
    pub fn cuts(
        &self,
        width: usize,
        height: usize,
        options: &Options,
        available: impl FnOnce() -> u64,
    ) -> Result<[Cut; 2]> {
        let pad = |len: usize| len.next_multiple_of(self.unit);
        let (whole_x, whole_y) = (pad(width), pad(height));
        let cut = |x: usize, y: usize| {
            let cut = |len, side| Cut::new(len, side, options.tile_overlap, self.align);
            [cut(width, x), cut(height, y)]
        };
        let frame = self.frame_bytes(width, height);
        let free = available().saturating_sub(frame);
        let cuts = match options.tile {
            Tile::Whole => cut(whole_x, whole_y),
            Tile::Side(side) => {
                let side = pad(side.clamp(1, whole_x.max(whole_y)));
                cut(side.min(whole_x), side.min(whole_y))
            }
            Tile::Auto => {
                let limit = (free as f64 * SHARE) as u64;
                // Narrow tiles would be all border.
                let sides = |whole: usize| {
                    let units = whole / self.unit;
                    (units.min(2)..=units).map(|n| n * self.unit)
                };
                let all = sides(whole_y).flat_map(|y| sides(whole_x).map(move |x| (x, y)));
                let fitting: Vec<_> = all
                    .map(|(x, y)| cut(x, y))
                    .filter(|c| self.tile_bytes(c) <= limit)
                    .collect();
                let works = fitting.iter().map(|c| self.work(c));
                let least = works.fold(f64::INFINITY, f64::min);
                // The larger the tiles, the more each sees.
                fitting
                    .into_iter()
                    .filter(|c| self.work(c) <= 1.1 * least)
                    .max_by_key(|c| self.pixels(c))
                    .unwrap_or_else(|| cut(self.unit, self.unit))
            }
        };
        let needed = self.tile_bytes(&cuts);
        if needed > free {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            return Err(Error::Memory(format!(
                "tiles of {}x{} of a frame of {width}x{height} need about {} MiB, {} MiB are free: \
                 use smaller tiles (no smaller than {}) or a smaller frame",
                cuts[0].side,
                cuts[1].side,
                mib(needed + frame),
                mib(free + frame),
                self.unit
            )));
        }
        Ok(cuts)
    }

    /// Bytes that the planes of a frame need.
    pub fn frame_bytes(&self, width: usize, height: usize) -> u64 {
        (width * height * self.scale * self.scale) as u64 * 4 * PLANES
    }

    /// Bytes that a tile needs at its peak, beside the planes of the frame and the weights.
    pub fn tile_bytes(&self, cuts: &[Cut; 2]) -> u64 {
        (self.pixels(cuts) * self.bytes) as u64
    }

    /// How long all tiles take, in units of a pixel of the latent without attention.
    fn work(&self, cuts: &[Cut; 2]) -> f64 {
        let tiles = (cuts[0].starts.len() * cuts[1].starts.len()) as f64;
        let pixels = self.pixels(cuts) as f64;
        tiles * pixels * (1.0 + pixels / ATTENTION_PARITY)
    }

    /// Pixels of the latent of a tile.
    fn pixels(&self, cuts: &[Cut; 2]) -> usize {
        let [_, h, w] = self.latent_at(cuts[0].side, cuts[1].side);
        h * w
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sides(tile: Tile, size: (usize, usize), available: u64) -> Result<(usize, usize)> {
        let geometry = Geometry::new(&ResShiftConfig::realsr_x4());
        let options = Options {
            tile,
            ..Options::default()
        };
        let cuts = geometry.cuts(size.0, size.1, &options, || available)?;
        Ok((cuts[0].side, cuts[1].side))
    }

    const PLENTY: u64 = 1 << 40;

    #[test]
    fn sides_are_multiples_of_what_the_networks_take() {
        for (tile, size, expected) in [
            (Tile::Whole, (480, 270), (512, 320)),
            (Tile::Whole, (1, 1), (64, 64)),
            (Tile::Side(100), (480, 270), (128, 128)),
            (Tile::Side(0), (480, 270), (64, 64)),
            (Tile::Side(usize::MAX), (480, 270), (512, 320)),
            (Tile::Side(300), (480, 64), (320, 64)),
        ] {
            assert_eq!(
                sides(tile, size, PLENTY).unwrap(),
                expected,
                "{tile:?} {size:?}"
            );
        }
        let faces = Geometry::new(&ResShiftConfig::faceir());
        assert_eq!((faces.unit, faces.align), (512, 8));
        assert_eq!(faces.latent(500, 513), [8, 128, 64]);
    }

    #[test]
    fn small_frames_are_one_tile_and_large_ones_are_cut_where_attention_would_cost_more() {
        for size in [(64, 64), (100, 60), (128, 128)] {
            let whole = sides(Tile::Whole, size, PLENTY).unwrap();
            assert_eq!(sides(Tile::Auto, size, PLENTY).unwrap(), whole);
        }
        let (x, y) = sides(Tile::Auto, (1920, 1080), PLENTY).unwrap();
        assert!(x * y <= 256 * 256 && x * y >= 128 * 128, "{x}x{y}");
    }

    #[test]
    fn tiles_become_smaller_with_the_memory_until_there_is_not_enough() {
        let size = (480, 270);
        let mut least = usize::MAX;
        for gib in [64, 16, 8, 4, 2] {
            let (x, y) = sides(Tile::Auto, size, gib << 30).unwrap();
            assert!(x * y <= least);
            least = x * y;
        }
        let Err(Error::Memory(reason)) = sides(Tile::Auto, size, 100 << 20) else {
            panic!("100 MiB are enough");
        };
        assert!(
            reason.contains("480x270") && reason.contains("100 MiB are free"),
            "{reason}"
        );
        assert!(sides(Tile::Whole, (8000, 8000), 16 << 30).is_err());
    }
}
