//! Numeric precision of inference.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// Numeric precision of inference.
///
/// The result for a frame does not depend on the number of threads. Between processors with
/// different instruction sets it may differ in the last bits, except with [`Self::Int8`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// The fastest precision that the processor has instructions for and that keeps flat areas
    /// within half a step of 8-bit video: int8 for calibrated students of up to 16 channels with
    /// AVX-512 VNNI or AVX-VNNI, else bf16 with AVX-512 BF16, else f32. It is always the same for a
    /// model and a processor. On CUDA devices it is f16.
    #[default]
    Auto,
    /// 32-bit floats. Students have it on the CPU only.
    F32,
    /// 16-bit floats (half precision) on CUDA devices. A CPU computes in [`Self::Bf16`] or
    /// [`Self::F32`] instead.
    F16,
    /// Products of 16-bit floats (bfloat16), summed in 32 bits. Without the instructions it is
    /// correct and not faster. Students have it on the CPU only, ResShift models on CUDA devices
    /// only.
    Bf16,
    /// Products of 8-bit integers, for calibrated students. Without the instructions it is correct
    /// and slower. CPU only.
    Int8,
}

impl Precision {
    /// All precisions with their names.
    pub const ALL: [(Self, &str); 5] = [
        (Self::Auto, "auto"),
        (Self::F32, "f32"),
        (Self::F16, "f16"),
        (Self::Bf16, "bf16"),
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
                "precision '{s}': there are auto, f32, f16, bf16 and int8"
            ))
        };
        found.map(|p| p.0).ok_or_else(names)
    }
}
