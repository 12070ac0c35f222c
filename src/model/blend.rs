//! Blending of two models, and levelling of a model's output on uniform areas.

use super::LiteModel;
use crate::{
    Error, Result,
    nn::lite::{Activated, Condition, LEAKY_SLOPE, LatentKind, Role, scale_features},
};

/// Number of grey levels from black to white in [`LiteModel::level`].
const LEVELS: usize = 21;

impl LiteModel {
    /// Interpolates the weights between `self` (share 0) and `other` (share 1). The result has the
    /// metadata of `other` and no calibration. It is useful if one was trained from the other:
    /// their errors then change gradually, too (network interpolation, X. Wang et al., ESRGAN,
    /// arXiv 1809.00219, section 3.4).
    ///
    /// # Errors
    /// [`Error::Setting`] if the models differ in shape, scales or latent, or `share` is not within
    /// 0 to 1.
    pub fn blend(&self, other: &Self, share: f32) -> Result<Self> {
        let wrong = |text: String| Err(Error::Setting(text));
        if !(0.0..=1.0).contains(&share) {
            return wrong(format!("share {share}: must be 0 to 1"));
        }
        let (a, b) = (&self.metadata, &other.metadata);
        if (a.student, a.scales) != (b.student, b.scales) || self.stats != other.stats {
            let (a, b) = (&a.name, &b.name);
            return wrong(format!(
                "'{a}' and '{b}' differ in shape, scales or latent: train one from the other"
            ));
        }
        let mut blended = other.clone();
        blended.calibration = None;
        let training = &mut blended.metadata.training;
        if !training.is_object() {
            *training = serde_json::json!({});
        }
        training["blend"] = serde_json::json!({ "share": share, "with": a.training });
        for (to, from) in blended.layers.iter_mut().zip(&self.layers) {
            let pairs = to.values_mut().into_iter().zip(from.tensors());
            for (to, (_, _, from)) in pairs {
                let values = to.iter_mut().zip(from);
                values.for_each(|(to, from)| *to = share * *to + (1.0 - share) * from);
            }
        }
        Ok(blended)
    }

    /// Sets the bias of the last layer so that the residuals of uniform areas, from black to white,
    /// are centred at 0 in every channel and at every scale. Training with a discriminator does not
    /// enforce it.
    pub fn level(&mut self) {
        let (r, [low, high]) = (self.metadata.student.r, self.metadata.scales);
        // Scales near 1 have almost no residual and are not trained.
        let low = low + ((high - low) / 2.0).min(0.25);
        let scales = [low, (low * high).sqrt(), high];
        let u = scales.map(|scale| f64::from(scale_features(scale, r)[0]));
        let [a, b, d] = scales.map(|scale| self.midpoint(scale));
        let Some(last) = self.layers.last_mut() else {
            return;
        };
        // The bias is quadratic in u. The polynomial through the three midpoints, in Newton's form,
        // is subtracted.
        for (c, ((a, b), d)) in a.into_iter().zip(b).zip(d).enumerate() {
            let m = [a, b, d];
            let (first, second) = ((m[1] - m[0]) / (u[1] - u[0]), (m[2] - m[1]) / (u[2] - u[1]));
            let square = (second - first) / (u[2] - u[0]);
            let slope = first - square * (u[0] + u[1]);
            let constant = m[0] - slope * u[0] - square * u[0] * u[0];
            last.bias[c] -= constant as f32;
            let scale = &mut last.conditions[0].shift;
            scale[2 * c] -= slope as f32;
            scale[2 * c + 1] -= square as f32;
        }
    }

    /// Returns the midpoint of each channel's whitened residuals of grey areas at `scale`.
    fn midpoint(&self, scale: f64) -> Vec<f64> {
        let model = self.without_memory();
        let added = (0..LEVELS).map(|i| model.added(i as f64 / (LEVELS - 1) as f64, scale));
        let ends = added.map(|all| all.into_iter().map(|v| [v, v]).collect::<Vec<_>>());
        let ends = ends.reduce(|a, b| {
            let both = a.into_iter().zip(b);
            both.map(|(a, b)| [a[0].min(b[0]), a[1].max(b[1])])
                .collect()
        });
        let ends = ends.unwrap_or_default();
        ends.iter().map(|[min, max]| (min + max) / 2.0).collect()
    }

    /// Returns the whitened residual of an infinite area of grey `level` (0 to 1), where the nine
    /// inputs of a kernel are equal.
    pub fn added(&self, level: f64, scale: f64) -> Vec<f64> {
        let student = &self.metadata.student;
        let luma = LatentKind::Luma.channels(student.r);
        let whiten = |(c, (mean, std)): (usize, (&f32, &f32))| {
            let value = if c < luma { level } else { 0.0 };
            (value - f64::from(*mean)) / f64::from(*std)
        };
        let stats = self.stats.input_mean.iter().zip(&self.stats.input_std);
        let mut x: Vec<f64> = stats.enumerate().map(whiten).collect();
        let mut skip = Vec::new();
        for layer in &self.layers {
            let (weight, bias) = layer.fold(&Condition::at(scale), student.r);
            let rows = weight.chunks_exact(layer.spec.ci * 9);
            let sum = |(row, bias): (&[f32], &f32)| -> f64 {
                let channels = row.chunks_exact(9).zip(&x);
                let channel = |(kernel, x): (&[f32], &f64)| {
                    kernel.iter().copied().map(f64::from).sum::<f64>() * x
                };
                f64::from(*bias) + channels.map(channel).sum::<f64>()
            };
            let mut y: Vec<f64> = rows.zip(&bias).map(sum).collect();
            if layer.spec.activated == Activated::Leaky {
                let slope = f64::from(LEAKY_SLOPE);
                y.iter_mut().for_each(|v| *v = v.max(slope * *v));
            }
            match layer.spec.role {
                Role::Chain => {}
                Role::PairFirst => skip = x,
                Role::PairSecond => y.iter_mut().zip(&skip).for_each(|(y, k)| *y += k),
            }
            x = y;
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Device, Upscaler,
        frame::{Component, Frame, FrameInfo, PixelFormat},
    };

    fn tiny() -> LiteModel {
        LiteModel::find("tiny-x2").unwrap().remove(0)
    }

    #[test]
    fn a_blend_lies_between_its_models() {
        let (a, mut b) = (tiny(), tiny());
        b.layers[0].weight.iter_mut().for_each(|w| *w += 1.0);
        let mut ends = [a.blend(&b, 0.0).unwrap(), a.blend(&b, 1.0).unwrap()];
        assert_eq!(
            ends.each_mut().map(|m| m.layers.clone()),
            [a.layers.clone(), b.layers.clone()]
        );
        let half = a.blend(&b, 0.5).unwrap();
        assert!((half.layers[0].weight[5] - a.layers[0].weight[5] - 0.5).abs() < 1e-5);
        assert!(half.calibration.is_none());
        let training = &half.metadata.training;
        assert_eq!(training["blend"]["share"], 0.5);
        assert_eq!(training["blend"]["with"], a.metadata.training);
        assert_eq!(training["steps_done"], b.metadata.training["steps_done"]);
        assert!(a.blend(&b, 1.5).is_err());
        b.metadata.scales = [1.0, 3.0];
        assert!(a.blend(&b, 0.5).unwrap_err().to_string().contains("scales"));
    }

    #[test]
    fn residuals_of_greys_are_centred_by_levelling_and_are_those_of_the_engine() {
        let mut model = tiny();
        let last = model.layers.len() - 1;
        model.layers[last].bias.iter_mut().for_each(|b| *b += 1.0);
        model.layers[last].conditions[0]
            .shift
            .iter_mut()
            .for_each(|b| *b += 0.3);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, model.to_bytes(false).unwrap()).unwrap();
        let mut upscaler = Upscaler::load(path.to_str().unwrap(), Device::Cpu).unwrap();
        upscaler.set_precision(crate::Precision::F32).unwrap();
        let mut frame = Frame::new(FrameInfo::new(PixelFormat::I420_10Le, 40, 40)).unwrap();
        frame.as_mut().write(Component::Y, &[0.4; 1600]).unwrap();
        let large = upscaler.upscale(&frame).unwrap();
        let luma = |frame: &Frame| {
            let mut luma = vec![0.0; frame.info().width * frame.info().height];
            frame.as_ref().read(Component::Y, &mut luma).unwrap();
            luma
        };
        let (flat, result) = (f64::from(luma(&frame)[0]), luma(&large));
        let want = model.added(flat, 2.0);
        for c in 0..4 {
            let (y, x) = (40 + c / 2, 40 + c % 2);
            let got = f64::from(result[y * 80 + x]) - flat;
            let want = want[c] * f64::from(model.stats.residual_std[c]);
            assert!((got - want).abs() < 1e-3, "channel {c}: {got}, not {want}");
        }
        for scale in [1.25, 1.25f64.sqrt() * 2f64.sqrt(), 2.0] {
            assert!(model.midpoint(scale).iter().any(|m| m.abs() > 0.5));
        }
        model.level();
        for scale in [1.25, 1.25f64.sqrt() * 2f64.sqrt(), 2.0] {
            assert!(model.midpoint(scale).iter().all(|m| m.abs() < 1e-4));
        }
    }
}
