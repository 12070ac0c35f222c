//! Sizes of input, output, latent and tiles.

use super::tiles::TileAxis;
use crate::{
    Error, Result,
    engine::{Options, Tile},
    nn::resshift::ResShiftConfig,
};

/// Sizes that a model requires. Lengths are in pixels of the input unless stated otherwise.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    pub scale: usize,
    /// Pixels of the output per pixel of the latent.
    factor: usize,
    /// Channels of the latent.
    channels: usize,
    /// Divisor of the sides of a tile.
    unit: usize,
    /// Divisor of the start of a tile, so that a pixel of the latent starts there.
    align: usize,
    /// Bytes that a tile needs per pixel of the latent. Attention adds nothing for larger tiles.
    bytes: usize,
}

/// Pixels of the latent at which the autoencoder's attention, whose work is quadratic, takes as
/// long as the rest. Counted for the real-world model: 2 x 4 x 512 operations for each pair of
/// pixels against 273 million for each pixel.
const ATTENTION_PARITY: f64 = 66_000.0;

/// Share of the free memory that automatic tiles may use.
const SHARE: f64 = 0.5;

/// Memory of a tile relative to the feature maps of the decoder's widest ResBlock: its input, the
/// normalised input and the output of the first convolution. Measured: 1.04 for the real-world
/// model with 64x64 to 128x128 pixels of the input (650 MiB) and for faces of 512x512 (335 MiB),
/// 1.11 for a narrow model.
const OVER_MAPS: f64 = 1.2;

/// Memory of candle's operators relative to this project's kernels. Counted for the widest norm in
/// f32 and the patches of a convolution, not measured on a device.
const COMPOSED: usize = 4;

/// Planes of f32 samples of the output's size that a frame needs besides the current tile.
const PLANES: u64 = 9;

impl Geometry {
    pub fn new(config: &ResShiftConfig) -> Self {
        let (scale, factor) = (config.diffusion.scale, config.autoencoder.factor());
        // Smallest number of whole pixels of the input that covers a multiple of `latent` pixels of
        // the latent.
        let whole = |latent: usize| latent * factor / gcd(latent * factor, scale);
        let autoencoder = &config.autoencoder;
        let channels = |level: usize| autoencoder.ch * autoencoder.ch_mult[level];
        let last = autoencoder.ch_mult.len() - 1;
        // In the decoder, a level begins with the channels of the level below.
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

    /// Accounts for candle's operators, which hold more feature maps at a time. Also used with the
    /// CUDA kernels, whose memory has not been measured.
    pub fn compose(&mut self) {
        self.bytes *= COMPOSED;
    }

    /// Returns channels, rows and columns of the latent of a frame that is padded to whole units.
    pub fn latent(&self, width: usize, height: usize) -> [usize; 3] {
        let pad = |len: usize| len.next_multiple_of(self.unit);
        self.latent_at(pad(width), pad(height))
    }

    /// Returns channels, rows and columns of the latent for the size or the position of a tile.
    pub fn latent_at(&self, x: usize, y: usize) -> [usize; 3] {
        let at = |v: usize| v * self.scale / self.factor;
        [self.channels, at(y), at(x)]
    }

    /// Splits a frame of `width` x `height` into tiles, horizontally and vertically. `available`
    /// returns the free memory in bytes.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is not enough memory.
    pub fn tiling(
        &self,
        width: usize,
        height: usize,
        options: &Options,
        available: impl FnOnce() -> u64,
    ) -> Result<[TileAxis; 2]> {
        let pad = |len: usize| len.next_multiple_of(self.unit);
        let (whole_x, whole_y) = (pad(width), pad(height));
        let split = |x: usize, y: usize| {
            let axis = |len, side| TileAxis::new(len, side, options.tile_overlap, self.align);
            [axis(width, x), axis(height, y)]
        };
        let frame = self.frame_bytes(width, height);
        let free = available().saturating_sub(frame);
        let tiling = match options.tile {
            Tile::Whole => split(whole_x, whole_y),
            Tile::Side(side) => {
                let side = pad(side.clamp(1, whole_x.max(whole_y)));
                split(side.min(whole_x), side.min(whole_y))
            }
            Tile::Auto => {
                let limit = (free as f64 * SHARE) as u64;
                // Narrow tiles would consist of border.
                let sides = |whole: usize| {
                    let units = whole / self.unit;
                    (units.min(2)..=units).map(|n| n * self.unit)
                };
                let all = sides(whole_y).flat_map(|y| sides(whole_x).map(move |x| (x, y)));
                let fitting: Vec<_> = all
                    .map(|(x, y)| split(x, y))
                    .filter(|c| self.tile_bytes(c) <= limit)
                    .collect();
                let work = fitting.iter().map(|c| self.work(c));
                let min_work = work.fold(f64::INFINITY, f64::min);
                // Larger tiles give the networks more context.
                fitting
                    .into_iter()
                    .filter(|c| self.work(c) <= 1.1 * min_work)
                    .max_by_key(|c| self.pixels(c))
                    .unwrap_or_else(|| split(self.unit, self.unit))
            }
        };
        let needed = self.tile_bytes(&tiling);
        if needed > free {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            return Err(Error::Memory(format!(
                "tiles of {}x{} of a frame of {width}x{height} need about {} MiB, {} MiB are free: \
                 use smaller tiles (no smaller than {}) or a smaller frame",
                tiling[0].side,
                tiling[1].side,
                mib(needed + frame),
                mib(free + frame),
                self.unit
            )));
        }
        Ok(tiling)
    }

    /// Returns the bytes that the planes of a frame need.
    pub fn frame_bytes(&self, width: usize, height: usize) -> u64 {
        (width * height * self.scale * self.scale) as u64 * 4 * PLANES
    }

    /// Returns the peak memory of a tile in bytes, without the planes of the frame and the weights.
    pub fn tile_bytes(&self, tiling: &[TileAxis; 2]) -> u64 {
        (self.pixels(tiling) * self.bytes) as u64
    }

    /// Returns the work for all tiles, in units of the work for a pixel of the latent without
    /// attention.
    fn work(&self, tiling: &[TileAxis; 2]) -> f64 {
        let tiles = (tiling[0].starts.len() * tiling[1].starts.len()) as f64;
        let pixels = self.pixels(tiling) as f64;
        tiles * pixels * (1.0 + pixels / ATTENTION_PARITY)
    }

    /// Returns the number of pixels in the latent of a tile.
    fn pixels(&self, tiling: &[TileAxis; 2]) -> usize {
        let [_, h, w] = self.latent_at(tiling[0].side, tiling[1].side);
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
        let tiling = geometry.tiling(size.0, size.1, &options, || available)?;
        Ok((tiling[0].side, tiling[1].side))
    }

    const PLENTY: u64 = 1 << 40;

    #[test]
    fn sides_are_multiples_of_the_unit_of_the_networks() {
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
    fn small_frames_are_one_tile_and_large_ones_are_split_where_attention_would_cost_more() {
        for size in [(64, 64), (100, 60), (128, 128)] {
            let whole = sides(Tile::Whole, size, PLENTY).unwrap();
            assert_eq!(sides(Tile::Auto, size, PLENTY).unwrap(), whole);
        }
        let (x, y) = sides(Tile::Auto, (1920, 1080), PLENTY).unwrap();
        assert!(x * y <= 256 * 256 && x * y >= 128 * 128, "{x}x{y}");
    }

    #[test]
    fn tiles_shrink_with_the_memory_until_there_is_not_enough() {
        let size = (480, 270);
        let mut previous = usize::MAX;
        for gib in [64, 16, 8, 4, 2] {
            let (x, y) = sides(Tile::Auto, size, gib << 30).unwrap();
            assert!(x * y <= previous);
            previous = x * y;
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
