//! The origin of a teacher's diffusion: the result of a faithful student instead of the bicubic
//! base. The teacher then learns only what this student misses.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::Latent;
use crate::{
    Error, Result,
    model::LiteModel,
    nn::lite::{Condition, LatentStats, Student},
    train::init::Tensors,
};

/// Name of the model file in the tensors of a teacher.
const TENSOR: &str = "origin";

/// A trained student whose result is the origin, on a latent.
pub struct Origin {
    model: LiteModel,
    student: Student,
    conversion: Conversion,
    /// Standard deviation of a residual over that of the latent of the base, `[c]`.
    ratio: Tensor,
}

impl Origin {
    /// Loads `name`, a model file or the name of a bundled model, for a diffusion on `latent` with
    /// feature maps of `dtype`.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::Model`] and [`Error::Io`] for the file, [`Error::Setting`]
    /// for a model of another latent or scale.
    pub fn load(name: &str, latent: &Latent, device: &Device, dtype: DType) -> Result<Self> {
        let models = LiteModel::find(name)?;
        let [low, high] = latent.scales;
        let fits = |model: &LiteModel| {
            let (student, [from, to]) = (&model.metadata.student, model.metadata.scales);
            (student.latent, student.r) == (latent.kind, latent.r) && from <= low && high <= to
        };
        match models.into_iter().find(fits) {
            Some(model) => Self::new(model, latent, device, dtype),
            None => Err(Error::Setting(format!(
                "teacher: origin = '{name}': no model for {:?} with r = {} and scales {low} to \
                 {high}",
                latent.kind, latent.r
            ))),
        }
    }

    fn new(model: LiteModel, latent: &Latent, device: &Device, dtype: DType) -> Result<Self> {
        let vb = VarBuilder::from_tensors(model.tensors()?, DType::F32, device);
        let mut student = Student::new(model.metadata.student, vb)?;
        student.set_dtype(dtype);
        let stats = &latent.stats;
        Ok(Self {
            conversion: Conversion::new(stats, &model.stats, device)?,
            ratio: quotients(&stats.residual_std, &stats.input_std, device)?,
            student,
            model,
        })
    }

    /// Reads the origin from the `tensors` of a teacher in the file at `path`; `None` if it has
    /// none.
    ///
    /// # Errors
    /// [`Error::Model`] when it is damaged.
    pub fn restored(
        tensors: &Tensors,
        path: &Path,
        latent: &Latent,
        device: &Device,
        dtype: DType,
    ) -> Result<Option<Self>> {
        let Some(bytes) = tensors.get(TENSOR) else {
            return Ok(None);
        };
        let model = LiteModel::parse(&bytes.to_vec1::<u8>()?, path)?;
        Self::new(model, latent, device, dtype).map(Some)
    }

    /// Returns `true` if the model `name` exists and is not the one in the `tensors` of a teacher.
    ///
    /// # Errors
    /// [`Error::Model`] when a model cannot be read.
    pub fn differs(name: &str, tensors: &Tensors, latent: &Latent) -> Result<bool> {
        let Some(was) = tensors.get(TENSOR) else {
            return Ok(true);
        };
        let is = match Self::load(name, latent, &Device::Cpu, DType::F32) {
            Err(Error::UnknownModel(_)) => return Ok(false),
            loaded => loaded?.state()?.1,
        };
        Ok(was.to_vec1::<u8>()? != is.to_vec1::<u8>()?)
    }

    /// Returns the model for the file of the teacher.
    ///
    /// # Errors
    /// [`Error::Model`] when it cannot be written.
    pub fn state(&self) -> Result<(String, Tensor)> {
        let bytes = Tensor::new(self.model.to_bytes(false)?, &Device::Cpu)?;
        Ok((TENSOR.into(), bytes))
    }

    /// Returns `true` if the result depends on the degradation of the input.
    pub fn knows_degradation(&self) -> bool {
        self.model.metadata.student.conditioning.denoise
    }

    /// Returns the residual that the student predicts over `base`, `[n, h, w, c]`, at the faithful
    /// end of its dial `detail`, and the latent of its result.
    ///
    /// # Errors
    /// When a shape does not fit.
    pub fn predict(&self, base: &Tensor, at: &Condition) -> Result<[Tensor; 2]> {
        let at = Condition { detail: 0.0, ..*at };
        let residual = self.student.forward(&self.conversion.base(base)?, &at)?;
        let residual = self.conversion.residual_back(&residual)?.detach();
        let result = (base + residual.broadcast_mul(&self.ratio)?)?;
        Ok([residual, result])
    }
}

/// Conversion of latents from the statistics of one training to those of another.
pub struct Conversion {
    /// Factor and offset of the latent of the base, `[c]`.
    base: [Tensor; 2],
    /// Factor of a residual, `[c]`.
    residual: Tensor,
}

impl Conversion {
    /// Creates the conversion between two statistics of the same number of channels.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn new(from: &LatentStats, to: &LatentStats, device: &Device) -> Result<Self> {
        let means = from.input_mean.iter().zip(&to.input_mean);
        let differences: Vec<f32> = means.map(|(from, to)| from - to).collect();
        Ok(Self {
            base: [
                quotients(&from.input_std, &to.input_std, device)?,
                quotients(&differences, &to.input_std, device)?,
            ],
            residual: quotients(&from.residual_std, &to.residual_std, device)?,
        })
    }

    /// Converts the latent of a base.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn base(&self, base: &Tensor) -> Result<Tensor> {
        let [factor, offset] = &self.base;
        Ok(base.broadcast_mul(factor)?.broadcast_add(offset)?)
    }

    /// Converts a residual.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn residual(&self, residual: &Tensor) -> candle_core::Result<Tensor> {
        residual.broadcast_mul(&self.residual)
    }

    /// Converts a residual in the opposite direction.
    ///
    /// # Errors
    /// When the shape does not fit.
    pub fn residual_back(&self, residual: &Tensor) -> candle_core::Result<Tensor> {
        residual.broadcast_div(&self.residual)
    }
}

/// Returns `a / b`.
fn quotients(a: &[f32], b: &[f32], device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = a.iter().zip(b).map(|(a, b)| a / b).collect();
    Ok(Tensor::new(values, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{nn::lite::LatentKind, testing::normal};

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn near(a: &Tensor, b: &Tensor) {
        let worst = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        let worst = worst.to_scalar::<f32>().unwrap();
        assert!(worst < 1e-4, "{worst}");
    }

    /// On a latent with other statistics the origin is the same image.
    #[test]
    fn the_origin_is_the_result_of_the_model_on_any_latent() {
        let model = LiteModel::find("tiny-x4").unwrap().remove(0);
        let own = &model.stats;
        let device = Device::Cpu;
        let latent = |stats: &LatentStats| Latent {
            stats: stats.clone(),
            ..Latent::nominal(LatentKind::Luma, 4, [2.25, 4.0])
        };
        let other = LatentStats {
            input_mean: own.input_mean.iter().map(|v| v + 0.1).collect(),
            input_std: own.input_std.iter().map(|v| v * 1.2).collect(),
            residual_std: own.residual_std.iter().map(|v| v * 0.7).collect(),
        };
        let load = |latent: &Latent| Origin::load("tiny", latent, &device, DType::F32).unwrap();
        let base = normal(0.0, 1.0, (2, 6, 5, 16)).to_device(&device).unwrap();
        let at = Condition {
            denoise: 0.3,
            detail: 1.0,
            ..Condition::at(3.0)
        };
        let faithful = Condition { detail: 0.0, ..at };
        let want = model.student().unwrap().forward(&base, &faithful).unwrap();
        let [residual, result] = load(&latent(own)).predict(&base, &at).unwrap();
        near(&residual, &want);
        let to_other = Conversion::new(own, &other, &device).unwrap();
        let origin = load(&latent(&other));
        let [there, result_there] = origin.predict(&to_other.base(&base).unwrap(), &at).unwrap();
        near(&to_other.residual_back(&there).unwrap(), &want);
        near(&result_there, &to_other.base(&result).unwrap());
        // The result is the image with the residual added.
        let of = |values: &[f32]| Tensor::new(values, &device).unwrap();
        let image = |base: &Tensor| {
            let deviation = base.broadcast_mul(&of(&own.input_std)).unwrap();
            deviation.broadcast_add(&of(&own.input_mean)).unwrap()
        };
        let added = residual.broadcast_mul(&of(&own.residual_std)).unwrap();
        near(&image(&result), &(image(&base) + added).unwrap());
        // The file of a teacher contains the model.
        let tensors = Tensors::from([origin.state().unwrap()]);
        let path = Path::new("teacher");
        let read = Origin::restored(&tensors, path, &latent(&other), &device, DType::F32);
        let [again, _] = read.unwrap().unwrap().predict(&result_there, &at).unwrap();
        let [once, _] = origin.predict(&result_there, &at).unwrap();
        assert_eq!(values(&again), values(&once));
    }

    #[test]
    fn a_model_of_another_latent_or_scale_is_refused() {
        let refused = |r: usize, scales: [f64; 2]| {
            let latent = Latent::nominal(LatentKind::Luma, r, scales);
            let loaded = Origin::load("tiny-x4", &latent, &Device::Cpu, DType::F32);
            let text = loaded.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(text.contains("origin = 'tiny-x4'"), "{text}");
        };
        refused(2, [2.25, 4.0]);
        refused(4, [1.25, 4.0]);
    }
}
