//! Variants of the kernel.

use std::fmt;

use super::sizes::GROUP;
use crate::kernels::cpu::{
    Cpu,
    proof::{Avx2, Avx512Vnni, AvxVnni, Neon, NeonDot, NeonI8mm},
};

/// A variant of the kernel that the CPU can run: a value proves it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    Avx512Vnni(Avx512Vnni),
    /// Vectors of half the size: the code of [`Self::AvxVnni`] with its instruction in another
    /// encoding, so that machines without AVX-VNNI can test it.
    Avx512VnniShort(Avx512Vnni),
    AvxVnni(AvxVnni),
    /// Multiplies 16-bit integers.
    Avx2(Avx2),
    /// Multiplies unsigned codes by signed weights.
    NeonI8mm(NeonI8mm),
    NeonDot(NeonDot),
    /// Multiplies 8-bit integers and adds 16-bit ones.
    Neon(Neon),
    /// Plain Rust.
    Portable,
}

impl Variant {
    /// Returns the variants that `cpu` can run, best first. The last one is portable.
    pub fn all(cpu: &Cpu) -> Vec<Self> {
        let vnni = Avx512Vnni::new(cpu);
        let variants = [
            vnni.map(Self::Avx512Vnni),
            vnni.map(Self::Avx512VnniShort),
            AvxVnni::new(cpu).map(Self::AvxVnni),
            Avx2::new(cpu).map(Self::Avx2),
            NeonI8mm::new(cpu).map(Self::NeonI8mm),
            NeonDot::new(cpu).map(Self::NeonDot),
            Neon::new(cpu).map(Self::Neon),
            Some(Self::Portable),
        ];
        variants.into_iter().flatten().collect()
    }

    /// Returns the best variant that `cpu` can run.
    pub fn of(cpu: &Cpu) -> Self {
        Self::all(cpu).first().copied().unwrap_or(Self::Portable)
    }

    /// Returns `true` if measurements show that integers are so much faster than floats that int8
    /// inference pays off. There are none for AArch64.
    pub fn is_fast(self) -> bool {
        matches!(
            self,
            Self::Avx512Vnni(_) | Self::Avx512VnniShort(_) | Self::AvxVnni(_)
        )
    }

    /// Returns the name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Vnni(_) => "avx512-vnni",
            Self::Avx512VnniShort(_) => "avx512-vnni-256",
            Self::AvxVnni(_) => "avx-vnni",
            Self::Avx2(_) => "avx2",
            Self::NeonI8mm(_) => "neon-i8mm",
            Self::NeonDot(_) => "neon-dotprod",
            Self::Neon(_) => "neon",
            Self::Portable => "portable",
        }
    }

    /// Output channels in a vector.
    pub(super) fn lanes(self) -> usize {
        match self {
            Self::Avx512Vnni(_) => 16,
            _ => 8,
        }
    }

    pub(super) fn multiplies_16_bits(self) -> bool {
        matches!(self, Self::Avx2(_))
    }

    /// Input channels that are side by side in the weights of an output channel.
    pub(super) fn channels(self) -> usize {
        match self {
            Self::Avx2(_) | Self::Neon(_) => GROUP / 2,
            _ => GROUP,
        }
    }

    /// Returns `true` if 128 is subtracted from the codes of inputs.
    pub(super) fn moves_codes(self) -> bool {
        matches!(self, Self::NeonDot(_) | Self::Neon(_))
    }
}

impl fmt::Debug for Variant {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
