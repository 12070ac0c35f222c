//! Selection of the precision of students on the CPU.

use crate::{
    Error, Precision, Result,
    kernels::{cpu::Cpu, int8, winograd},
    model::LiteModel,
};

impl Precision {
    /// Returns the precision that this CPU uses for `model`: [`Self::F32`], [`Self::Bf16`] or
    /// [`Self::Int8`]. [`Self::Auto`] and [`Self::F16`] become one that is fast on this CPU.
    ///
    /// # Errors
    /// [`Error::Setting`] for int8 if the model is not calibrated.
    pub fn resolve(self, model: &LiteModel) -> Result<Self> {
        let cpu = Cpu::get();
        let int8 = model.calibration.is_some() && int8::Variant::of(&cpu).is_fast();
        // Wide layers gain more from Winograd's algorithm, which int8 does not use.
        let narrow = model.metadata.student.channels <= 16;
        match self {
            Self::Auto if int8 && narrow => Ok(Self::Int8),
            Self::Auto | Self::F16 if winograd::Variant::bf16(&cpu).is_fast() => Ok(Self::Bf16),
            Self::Auto | Self::F16 => Ok(Self::F32),
            Self::Int8 if model.calibration.is_none() => Err(Error::Setting(format!(
                "model '{}' is not calibrated for int8: calibrate it with 'tadsr-train quantize'",
                model.metadata.name
            ))),
            supported => Ok(supported),
        }
    }
}
