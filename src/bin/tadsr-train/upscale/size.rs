//! Exact size of the output.

use anyhow::{Result, ensure};
use tadsr::Upscaler;

/// Exact size of the output.
#[derive(Debug, clap::Args)]
pub struct Size {
    /// Width of the output in pixels, instead of --scale. Without --height, the height keeps the
    /// aspect ratio
    #[arg(long, value_name = "PIXELS", conflicts_with = "scale",
        value_parser = clap::value_parser!(u32).range(1..))]
    width: Option<u32>,
    /// Height of the output in pixels, instead of --scale. Without --width, the width keeps the
    /// aspect ratio
    #[arg(long, value_name = "PIXELS", conflicts_with = "scale",
        value_parser = clap::value_parser!(u32).range(1..))]
    height: Option<u32>,
}

impl Size {
    /// Returns width and height for an input of the size `from`; `None` if neither is set. Both are
    /// multiples of `step`, 1 or 2.
    ///
    /// # Errors
    /// If a side is not a multiple of `step`, or needs a scale that the model does not have.
    pub fn of(
        &self,
        from: (usize, usize),
        upscaler: &Upscaler,
        step: usize,
    ) -> Result<Option<(usize, usize)>> {
        let max = upscaler.max_scale();
        let sides = [
            ("--width", "widths", self.width, from.0),
            ("--height", "heights", self.height, from.1),
        ];
        for (option, sides, side, len) in sides {
            let Some(side) = side.map(|side| side as usize) else {
                continue;
            };
            let (low, high) = range(len, max, step);
            ensure!(
                (low..=high).contains(&side),
                "{option} {side} is out of range: from {}x{}, model '{}' (scale 1 to {max}) \
                 reaches {sides} of {low} to {high}",
                from.0,
                from.1,
                upscaler.active_model(max)
            );
            ensure!(
                side % step == 0,
                "{option} {side} is odd: the sides of a video are even, such as {} or {}",
                if side > low { side - 1 } else { side + 1 },
                if side < high { side + 1 } else { side - 1 }
            );
        }
        let other = |side: u32, len: usize, other: usize| {
            let exact = f64::from(side) * other as f64 / len as f64;
            let rounded = (exact / step as f64).round() as usize * step;
            let (low, high) = range(other, max, step);
            rounded.min(high).max(low)
        };
        Ok(match (self.width, self.height) {
            (None, None) => None,
            (Some(width), Some(height)) => Some((width as usize, height as usize)),
            (Some(width), None) => Some((width as usize, other(width, from.0, from.1))),
            (None, Some(height)) => Some((other(height, from.1, from.0), height as usize)),
        })
    }
}

/// Returns the lowest and the highest multiple of `step` from `len` to `len` times `max`.
fn range(len: usize, max: f64, step: usize) -> (usize, usize) {
    let high = (len as f64 * max).floor() as usize;
    (len.next_multiple_of(step), high - high % step)
}
