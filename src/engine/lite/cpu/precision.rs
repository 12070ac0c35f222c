//! What networks are computed in.

use std::{fmt, str::FromStr};

use crate::{
    Error, Result,
    model::LiteModel,
    ops::cpu::{int8::IntIsa, winograd::has_bf16},
};

/// In what numbers a student is computed.
///
/// The result for a frame is the same for a precision whatever the number of threads; between processors with
/// different instruction sets it may differ in the last bits, but for [`Self::Int8`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// The fastest of the others that this processor has instructions for and that keeps flat areas within half a step of
    /// 8-bit video: int8 for calibrated models of up to 16 channels with AVX-512 VNNI or AVX-VNNI, else bf16 with AVX-512 BF16, else
    /// f32. For a model and a processor it is always the same one.
    #[default]
    Auto,
    /// 32-bit floats. CPU only.
    F32,
    /// 16-bit floats (half precision), which CUDA devices compute in whatever the model. A CPU computes in
    /// [`Self::Bf16`] or [`Self::F32`] instead, as it has instructions.
    F16,
    /// Products of 16-bit floats (bfloat16), summed in 32 bits. Without the instructions it is correct and not faster. CPU only.
    Bf16,
    /// Products of 8-bit integers; of models that are calibrated for it. Without the instructions it is correct and
    /// slower. CPU only.
    Int8,
}

impl Precision {
    /// All, with their names.
    pub const ALL: [(Self, &str); 5] = [
        (Self::Auto, "auto"),
        (Self::F32, "f32"),
        (Self::F16, "f16"),
        (Self::Bf16, "bf16"),
        (Self::Int8, "int8"),
    ];

    /// What `model` is computed in on this processor: [`Self::F32`], [`Self::Bf16`] or [`Self::Int8`].
    ///
    /// # Errors
    /// [`Error::Setting`] when the model is not calibrated for integers.
    pub fn resolve(self, model: &LiteModel) -> Result<Self> {
        let int8 = model.calibration.is_some() && IntIsa::best().is_fast();
        // Wide layers gain more from the transform that saves multiplications of floats.
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

    /// What a CUDA device computes in: always [`Self::F16`].
    ///
    /// # Errors
    /// [`Error::Setting`] for the precisions that only CPUs have.
    pub fn resolve_on_cuda(self) -> Result<Self> {
        match self {
            Self::Auto | Self::F16 => Ok(Self::F16),
            _ => Err(Error::Setting(format!(
                "precision '{self}': CUDA devices compute in f16; use auto or f16, or device=cpu"
            ))),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = Self::ALL.iter().find(|p| p.0 == *self).map_or("", |p| p.1);
        f.write_str(name)
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|p| p.1 == s);
        let names = || {
            Error::Setting(format!(
                "precision '{s}': there are auto, f32, f16, bf16 and int8"
            ))
        };
        found.map(|p| p.0).ok_or_else(names)
    }
}
