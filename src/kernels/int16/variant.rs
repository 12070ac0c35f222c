//! Variants of the kernel.

use std::fmt;

use crate::kernels::cpu::{Cpu, Feature, proof::Avx2};

/// A variant of the kernel that the CPU can run: a value proves it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    Avx2(Avx2),
    /// Plain Rust.
    Portable,
}

impl Variant {
    /// Returns the variants that `cpu` can run, best first. The last one is portable.
    pub fn all(cpu: &Cpu) -> Vec<Self> {
        let avx2 = Avx2::new(cpu).map(Self::Avx2);
        avx2.into_iter().chain([Self::Portable]).collect()
    }

    /// Returns the best variant that `cpu` can run.
    pub fn of(cpu: &Cpu) -> Self {
        Avx2::new(cpu).map_or(Self::Portable, Self::Avx2)
    }

    /// Returns `true` if measurements show that inference in it is faster on `cpu` than in f32.
    /// With AVX-512, vectors of f32 are twice as long as those of this kernel.
    pub fn is_fast(self, cpu: &Cpu) -> bool {
        matches!(self, Self::Avx2(_)) && !cpu.has(Feature::Avx512)
    }

    /// Returns the name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx2(_) => "avx2",
            Self::Portable => "portable",
        }
    }
}

impl fmt::Debug for Variant {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
