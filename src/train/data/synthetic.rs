//! Rendered images: dead leaves and text.
//!
//! Dead leaves are overlapping discs of random size and colour, a model of the statistics of
//! natural images (A. Lee, D. Mumford, J. Huang, "Occlusion Models for Natural Images", IJCV 2001).
//! They have edges of all directions and contrasts, and need no licence. Text is rare in photos and
//! frequent in video. The element `clockoverlay` of GStreamer renders it: its time format may be
//! any text, and it has a single input.

use image::{Rgb, RgbImage};
use rand::{Rng, SeedableRng, rngs::StdRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};
#[cfg(feature = "video")]
use crate::{
    frame::{Frame, FrameInfo, PixelFormat},
    video::{StreamInfo, through},
};

/// Numbers of rendered images: the table `[data.synthetic]` of a recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Synthetic {
    /// Images of dead leaves.
    pub dead_leaves: usize,
    /// Images of text on dead leaves of low contrast.
    pub text: usize,
    /// Seed of the images.
    pub seed: u64,
}

/// Minimum side of an image in pixels.
const SIDE: u32 = 640;

/// Range of radii in pixels. The number of leaves falls with the cube of the radius, which makes
/// the statistics the same at all scales.
const RADII: (f32, f32) = (2.0, 200.0);

/// Lines of text in an image.
#[cfg(feature = "video")]
const LINES: usize = 12;

impl Synthetic {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("dead_leaves", self.dead_leaves), ("text", self.text)] {
            if value > 10_000 {
                let text = format!("synthetic: {name} = {value}: pictures, 0 to 10000");
                return Err(Error::Setting(text));
            }
        }
        Ok(())
    }

    /// Renders the images, with sides of at least `min_side` pixels. They depend on the seed and on
    /// the fonts of the machine.
    ///
    /// # Errors
    /// [`Error::Setting`] when GStreamer cannot render text.
    pub fn render(&self, min: usize) -> Result<Vec<RgbImage>> {
        let side = SIDE.max(u32::try_from(min).unwrap_or(u32::MAX));
        let render = |i: usize| {
            let mut rng = self.rng(i);
            if i < self.dead_leaves {
                Ok(dead_leaves(&mut rng, side))
            } else {
                text(&mut rng, side)
            }
        };
        let all = 0..self.dead_leaves + self.text;
        all.into_par_iter().map(render).collect()
    }

    /// Random numbers of image `i`.
    fn rng(&self, i: usize) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ (i as u64) << 32)
    }
}

/// Renders a square of discs, from bottom to top, with soft edges of one pixel and some noise.
pub fn dead_leaves(rng: &mut impl Rng, side: u32) -> RgbImage {
    let mut picture = RgbImage::from_pixel(side, side, Rgb(rng.random()));
    // Enough to cover the image about twice.
    let leaves = (side * side) as usize / 60;
    let (min, max) = (RADII.0.powi(-2), RADII.1.powi(-2));
    for _ in 0..leaves {
        let radius = (max + rng.random::<f32>() * (min - max)).sqrt().recip();
        let mut position = || rng.random_range(-radius..side as f32 + radius);
        let (cx, cy) = (position(), position());
        let (color, grain): ([u8; 3], f32) = (rng.random(), rng.random_range(0.0..12.0));
        let rows =
            |c: f32| ((c - radius - 1.0).max(0.0) as u32)..side.min((c + radius + 2.0) as u32);
        for (y, x) in rows(cy).flat_map(|y| rows(cx).map(move |x| (y, x))) {
            let cover = (radius + 0.5 - (x as f32 - cx).hypot(y as f32 - cy)).clamp(0.0, 1.0);
            if cover > 0.0 {
                let grain = grain * (rng.random::<f32>() - 0.5);
                let pixel = picture.get_pixel_mut(x, y);
                for (p, c) in pixel.0.iter_mut().zip(color) {
                    let new = f32::from(c) + grain;
                    *p = (f32::from(*p) + cover * (new - f32::from(*p))).round() as u8;
                }
            }
        }
    }
    picture
}

/// Renders lines of random letters in random fonts, sizes and colours over dead leaves of low
/// contrast.
#[cfg(feature = "video")]
fn text(rng: &mut impl Rng, side: u32) -> Result<RgbImage> {
    let ground = ground(rng, side);
    let mut line = |i: usize| {
        let words = rng.random_range(1..6);
        let words: Vec<String> = (0..words).map(|_| word(rng)).collect();
        let font = ["Sans", "Serif", "Monospace"][rng.random_range(0..3)];
        let style = ["", "Bold", "Italic"][rng.random_range(0..3)];
        format!(
            "clockoverlay time-format=\"{}\" font-desc=\"{font} {style} {}px\" color={} \
             outline-color={} draw-shadow={} draw-outline={} halignment=position \
             valignment=position xpos={:.3} ypos={:.3} auto-resize=false",
            words.join(" "),
            rng.random_range(10..48),
            0xff00_0000 | rng.random::<u32>(),
            0xff00_0000 | rng.random::<u32>(),
            rng.random::<bool>(),
            rng.random::<bool>(),
            rng.random::<f32>(),
            (i as f32 + 0.5) / LINES as f32,
        )
    };
    let lines: Vec<String> = (0..LINES).map(&mut line).collect();
    let info = FrameInfo::new(PixelFormat::Rgb, side as usize, side as usize);
    let frame = Frame::from_rgb8_as(info, &ground)?;
    let stream = StreamInfo::new(info, Some((25, 1)))?;
    let made = through(&stream, &[frame], &lines.join(" ! ")).map_err(|e| {
        let needs = "clockoverlay (gstreamer1.0-x) and a font";
        Error::Setting(format!("synthetic: text needs {needs}: {e}"))
    })?;
    let rgb = made.first().map(Frame::to_rgb8).transpose()?;
    rgb.and_then(|rgb| RgbImage::from_raw(side, side, rgb))
        .ok_or_else(|| Error::Setting("synthetic: text gave no picture".into()))
}

/// Renders dead leaves with a quarter of their contrast.
#[cfg(feature = "video")]
fn ground(rng: &mut impl Rng, side: u32) -> RgbImage {
    let tone: u8 = rng.random();
    let mut ground = dead_leaves(rng, side);
    for v in ground.iter_mut() {
        *v = ((u16::from(*v) + 3 * u16::from(tone)) / 4) as u8;
    }
    ground
}

#[cfg(not(feature = "video"))]
fn text(_: &mut impl Rng, _: u32) -> Result<RgbImage> {
    let text =
        "synthetic: text needs GStreamer, and this program is built without it (feature 'video')";
    Err(Error::Setting(text.into()))
}

/// Returns letters, digits and punctuation that need no escape in a launch line.
#[cfg(feature = "video")]
fn word(rng: &mut impl Rng) -> String {
    const LETTERS: &[u8] =
        b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:-+?/()";
    let len = rng.random_range(1..10);
    (0..len)
        .map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the mean absolute difference of neighbours in a row.
    fn contrast(picture: &RgbImage) -> f64 {
        let pairs = picture
            .rows()
            .flat_map(|row| row.clone().zip(row.skip(1)))
            .map(|(a, b)| f64::from(a.0[1].abs_diff(b.0[1])));
        pairs.sum::<f64>() / f64::from(picture.width() * picture.height())
    }

    #[test]
    fn leaves_have_edges_at_all_scales_and_depend_on_the_seed_only() {
        let render = |seed| dead_leaves(&mut StdRng::seed_from_u64(seed), 256);
        let (a, b) = (render(1), render(2));
        assert_eq!(a, render(1));
        assert_ne!(a, b);
        let half = image::imageops::resize(&a, 128, 128, image::imageops::FilterType::Triangle);
        for picture in [&a, &b, &half] {
            assert!(
                (4.0..60.0).contains(&contrast(picture)),
                "{}",
                contrast(picture)
            );
        }
    }

    #[test]
    #[cfg(feature = "video")]
    fn text_is_set_over_leaves() {
        let spec = Synthetic {
            dead_leaves: 1,
            text: 2,
            seed: 3,
        };
        let rendered = spec.render(64).unwrap();
        assert_eq!(rendered.len(), 3);
        assert!(rendered.iter().all(|p| p.dimensions() == (SIDE, SIDE)));
        assert_ne!(rendered[1], rendered[2]);
        // The image differs from the background only where letters are.
        let ground = ground(&mut spec.rng(1), SIDE);
        let pixels = rendered[1].pixels().zip(ground.pixels());
        let far = pixels.filter(|(a, b)| (0..3).any(|c| a.0[c].abs_diff(b.0[c]) > 20));
        let share = far.count() as f64 / f64::from(SIDE * SIDE);
        assert!((0.005..0.7).contains(&share), "{share}");
        assert_eq!(rendered, spec.render(64).unwrap());
    }

    #[test]
    fn too_many_pictures_are_refused() {
        let spec = Synthetic {
            text: 10_001,
            ..Synthetic::default()
        };
        assert!(spec.check().unwrap_err().to_string().contains("text"));
    }
}
