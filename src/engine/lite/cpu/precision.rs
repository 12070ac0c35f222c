//! Precisions of students on the CPU.

use crate::{
    Error, Precision, Result,
    model::LiteModel,
    ops::cpu::{int8::IntIsa, winograd::has_bf16},
};

impl Precision {
    /// Returns the precision in which this processor computes `model`: [`Self::F32`],
    /// [`Self::Bf16`] or [`Self::Int8`].
    ///
    /// # Errors
    /// [`Error::Setting`] for int8 if the model is not calibrated.
    pub fn resolve(self, model: &LiteModel) -> Result<Self> {
        let int8 = model.calibration.is_some() && IntIsa::best().is_fast();
        // Wide layers gain more from Winograd's transform, which integers do not use.
        let narrow = model.metadata.student.channels <= 16;
        match self {
            Self::Auto if int8 && narrow => Ok(Self::Int8),
            Self::Auto | Self::F16 if has_bf16() => Ok(Self::Bf16),
            Self::Auto | Self::F16 => Ok(Self::F32),
            Self::Int8 if model.calibration.is_none() => Err(Error::Setting(format!(
                "model '{}' is not calibrated for int8: 'tadsr-train quantize' does that",
                model.metadata.name
            ))),
            set => Ok(set),
        }
    }
}
