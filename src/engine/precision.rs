//! Numeric precision of inference.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// Numeric precision of inference.
///
/// Results do not depend on the number of threads. On processors with other instruction sets they
/// may differ in the last bits, except with [`Self::Int16`] and [`Self::Int8`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// The fastest precision that the processor has instructions for: int8 for calibrated students
    /// of up to 16 channels with AVX-512 VNNI or AVX-VNNI, otherwise bf16 with AVX-512 BF16, int16
    /// for calibrated students with AVX2 but not AVX-512, otherwise f32. Each of them keeps flat
    /// areas within half a step of 8-bit video. On CUDA devices f16.
    #[default]
    Auto,
    /// 32-bit floats. For students on the CPU only.
    F32,
    /// 16-bit floats (half precision) on CUDA devices. The CPU uses [`Self::Bf16`] or [`Self::F32`]
    /// instead.
    F16,
    /// Products of 16-bit floats (bfloat16), summed in 32 bits. Not faster on a processor without
    /// the instructions. For students on the CPU only, for ResShift models on CUDA devices only.
    Bf16,
    /// Products of 16-bit integers by Winograd's algorithm, for calibrated students on the CPU. Much
    /// slower on a processor without AVX2.
    Int16,
    /// Products of 8-bit integers, for calibrated students on the CPU. Slower on a processor
    /// without the instructions.
    Int8,
}

impl Precision {
    /// All precisions with their names.
    pub const ALL: [(Self, &str); 6] = [
        (Self::Auto, "auto"),
        (Self::F32, "f32"),
        (Self::F16, "f16"),
        (Self::Bf16, "bf16"),
        (Self::Int16, "int16"),
        (Self::Int8, "int8"),
    ];
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
                "precision '{s}' is unknown: use auto, f32, f16, bf16, int16 or int8"
            ))
        };
        found.map(|p| p.0).ok_or_else(names)
    }
}
