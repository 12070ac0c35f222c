//! Measurement of an image.

use std::path::Path;

use rand::{SeedableRng, rngs::SmallRng};

use super::{Evaluation, Scores, Truth, View, border, check, fitting};
use crate::{
    Error, Result,
    frame::Frame,
    metrics::Row,
    train::data::{Patch, decode},
};

impl Evaluation {
    /// Measures every method under every condition for images, at every scale, on the image at
    /// `path`. `step` is called after each scale.
    ///
    /// # Errors
    /// [`Error::Data`] when the file is not an image or too small, [`Error::Cancelled`], and those
    /// of the methods.
    pub fn picture(&mut self, path: &Path, mut step: impl FnMut()) -> Result<Vec<Row>> {
        let image = decode(path).map_err(Error::Data)?;
        let (w, h) = (image.width() as usize, image.height() as usize);
        let full = Patch::from_rgb8(w, h, image.as_raw());
        let mut rows = Vec::new();
        for scale in self.scales.clone() {
            let ((lw, hw), (lh, hh)) = (fitting(w, scale, 1), fitting(h, scale, 1));
            if lw == 0 || lh == 0 {
                return Err(Error::Data(format!(
                    "{w}x{h} pixels are too few for scale {scale}"
                )));
            }
            let hr = full.top_left(hw, hh);
            let frame = Frame::from_rgb8(hw, hh, &hr.to_rgb8())?;
            let truth = Truth::new(View::of(&frame.as_ref(), border(scale))?, &self.models)?;
            for condition in self.conditions.iter().filter(|c| c.is_for_pictures()) {
                // The recipes of an evaluation do not depend on random numbers.
                let mut rng = SmallRng::seed_from_u64(0);
                let (small, _) = condition.recipe().picture(&hr, (lw, lh), &mut rng)?;
                let small = Frame::from_rgb8(lw, lh, &small.to_rgb8())?;
                for method in &mut self.methods {
                    check(&self.stop)?;
                    method.begin(1)?;
                    let large = method.upscale(0, &small, (hw, hh))?;
                    let result = View::of(&large.as_ref(), border(scale))?;
                    rows.push(Row {
                        method: method.name().into(),
                        condition: condition.to_string(),
                        scale,
                        image: path.display().to_string(),
                        ..truth.score(&result, &self.models)?.into()
                    });
                }
            }
            step();
        }
        Ok(rows)
    }
}

impl From<Scores> for Row {
    fn from(s: Scores) -> Self {
        Self {
            exact: usize::from(s.psnr_y.is_infinite()),
            psnr_y: s.psnr_y,
            ssim: s.ssim,
            ms_ssim: s.ms_ssim,
            lpips: s.lpips,
            niqe: s.niqe,
            ..Self::default()
        }
    }
}
