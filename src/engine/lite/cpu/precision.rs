//! Selection of the precision of students on the CPU.

use crate::{
    Error, Precision, Result,
    kernels::{cpu::Cpu, int8, int16, winograd},
    model::LiteModel,
};

impl Precision {
    /// Returns the precision that this CPU uses for `model`: [`Self::F32`], [`Self::Bf16`],
    /// [`Self::Int16`] or [`Self::Int8`]. [`Self::Auto`] and [`Self::F16`] become one that is fast
    /// on this CPU.
    ///
    /// # Errors
    /// [`Error::Setting`] for integers if the model is not calibrated.
    pub fn resolve(self, model: &LiteModel) -> Result<Self> {
        let cpu = Cpu::get();
        let calibrated = model.calibration.is_some();
        // Wide layers gain more from Winograd's algorithm, which int8 does not use.
        let narrow = model.metadata.student.channels <= 16;
        let int8 = calibrated && narrow && int8::Variant::of(&cpu).is_fast();
        let int16 = calibrated && int16::Variant::of(&cpu).is_fast(&cpu);
        match self {
            Self::Auto if int8 => Ok(Self::Int8),
            Self::Auto | Self::F16 if winograd::Variant::bf16(&cpu).is_fast() => Ok(Self::Bf16),
            Self::Auto if int16 => Ok(Self::Int16),
            Self::Auto | Self::F16 => Ok(Self::F32),
            Self::Int8 | Self::Int16 if !calibrated => Err(Error::Setting(format!(
                "model '{}' is not calibrated for {self}: calibrate it with 'tadsr-train quantize'",
                model.metadata.name
            ))),
            supported => Ok(supported),
        }
    }
}
