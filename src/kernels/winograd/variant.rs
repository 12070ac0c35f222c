//! Variants of the kernel.

use std::fmt;

use crate::kernels::{
    cpu::{
        Cpu,
        proof::{Avx512, Avx512Bf16, Neon, NeonBf16},
    },
    simd::Isa,
};

/// A variant of the kernel that the CPU can run: a value proves it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Multiplies f32.
    F32(Isa),
    /// Rounds transformed inputs and weights to bfloat16 and multiplies f32. The padding of the
    /// channels of the input must be finite.
    Rounded(Isa),
    /// Multiplies bfloat16, two channels at a time; otherwise as [`Self::Rounded`].
    Pairs(Avx512, Avx512Bf16),
    /// As [`Self::Pairs`], on AArch64.
    NeonPairs(Neon, NeonBf16),
}

impl Variant {
    /// Returns the variants that `cpu` can run.
    pub fn all(cpu: &Cpu) -> Vec<Self> {
        let isas = Isa::all(cpu);
        let (floats, rounded) = (
            isas.iter().map(|&i| Self::F32(i)),
            isas.iter().map(|&i| Self::Rounded(i)),
        );
        floats.chain(rounded).chain(Self::pairs(cpu)).collect()
    }

    /// Returns the best variant for products of f32.
    pub fn f32(cpu: &Cpu) -> Self {
        Self::F32(Isa::of(cpu))
    }

    /// Returns the best variant for products of bfloat16.
    pub fn bf16(cpu: &Cpu) -> Self {
        Self::pairs(cpu).unwrap_or(Self::Rounded(Isa::of(cpu)))
    }

    fn pairs(cpu: &Cpu) -> Option<Self> {
        let avx512 = Avx512::new(cpu).zip(Avx512Bf16::new(cpu));
        let neon = Neon::new(cpu).zip(NeonBf16::new(cpu));
        let avx512 = avx512.map(|(a, b)| Self::Pairs(a, b));
        avx512.or(neon.map(|(a, b)| Self::NeonPairs(a, b)))
    }

    /// Returns `true` if measurements show that it is faster than products of f32. There are none
    /// for AArch64.
    pub fn is_fast(self) -> bool {
        matches!(self, Self::Pairs(..))
    }

    /// Returns `true` if it multiplies bfloat16.
    pub fn is_bf16(self) -> bool {
        !matches!(self, Self::F32(_))
    }

    /// Returns `true` if it multiplies bfloat16 two channels at a time.
    pub(super) fn multiplies_pairs(self) -> bool {
        matches!(self, Self::Pairs(..) | Self::NeonPairs(..))
    }

    /// Returns the instruction set of all but the products.
    pub(super) fn isa(self) -> Isa {
        match self {
            Self::F32(isa) | Self::Rounded(isa) => isa,
            Self::Pairs(avx512, _) => Isa::Avx512(avx512),
            Self::NeonPairs(neon, _) => Isa::Neon(neon),
        }
    }

    /// Returns the name, for messages.
    pub fn name(self) -> String {
        match self {
            Self::F32(isa) => format!("f32 {}", isa.name()),
            Self::Rounded(isa) => format!("bf16 {}", isa.name()),
            Self::Pairs(..) => "bf16 avx512-bf16".into(),
            Self::NeonPairs(..) => "bf16 neon-bf16".into(),
        }
    }
}

impl fmt::Debug for Variant {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.name())
    }
}
