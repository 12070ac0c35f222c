//! Instruction sets for which kernels are compiled, and the macro that compiles for all of them.

use std::fmt;

use crate::kernels::cpu::{
    Cpu,
    proof::{Avx2, Avx512, Neon},
};

/// An instruction set that the CPU has: a value proves it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    Avx512(Avx512),
    Avx2(Avx2),
    Neon(Neon),
    /// Plain Rust, vectorised by the compiler for the baseline of the target.
    Portable,
}

impl Isa {
    /// Returns the instruction sets that `cpu` has, best first. The last one is portable.
    pub fn all(cpu: &Cpu) -> Vec<Self> {
        let sets = [
            Avx512::new(cpu).map(Self::Avx512),
            Avx2::new(cpu).map(Self::Avx2),
            Neon::new(cpu).map(Self::Neon),
            Some(Self::Portable),
        ];
        sets.into_iter().flatten().collect()
    }

    /// Returns the best instruction set that `cpu` has.
    pub fn of(cpu: &Cpu) -> Self {
        let best = Avx512::new(cpu).map(Self::Avx512);
        best.or(Avx2::new(cpu).map(Self::Avx2))
            .or(Neon::new(cpu).map(Self::Neon))
            .unwrap_or(Self::Portable)
    }

    /// Returns the best instruction set that kernels may use, see [`Cpu::get`].
    pub fn best() -> Self {
        Self::of(&Cpu::get())
    }

    /// Returns the value of `TADSR_CPU` that allows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512(_) => "avx512",
            Self::Avx2(_) => "avx2",
            Self::Neon(_) => "neon",
            Self::Portable => "portable",
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Defines `fn name(isa: Isa, ...)` for each `fn name(...)`: the body is compiled for each
/// instruction set and run for the one of the argument. With `fn name<const FMA: bool>(...)` the
/// body may fuse multiplications and additions where `FMA` is `true`; the compiler never does that
/// by itself, so all other bodies give the same bits on every instruction set.
macro_rules! dispatch {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<const $fma:ident: bool>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block
    )*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::kernels::simd::Isa, $($arg: $ty),*) {
            use $crate::kernels::simd::Isa;

            #[inline(always)]
            fn body<$(const $fma: bool)?>($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $ty),*) {
                body::<$({ const $fma: bool = true; $fma })?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                body::<$({ const $fma: bool = true; $fma })?>($($arg),*)
            }

            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            fn neon($($arg: $ty),*) {
                body::<$({ const $fma: bool = true; $fma })?>($($arg),*)
            }

            match isa {
                // SAFETY: the value proves that the CPU has the features, here and below.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512(_) => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2(_) => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                Isa::Neon(_) => unsafe { neon($($arg),*) },
                _ => body::<$({ const $fma: bool = false; $fma })?>($($arg),*),
            }
        }
    )*};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_set_is_the_first_and_the_portable_one_is_last() {
        let cpu = Cpu::detected();
        for level in ["avx512", "avx2", "neon", "portable"] {
            let Ok(cpu) = cpu.lowered(level) else {
                continue;
            };
            let all = Isa::all(&cpu);
            assert_eq!((all[0], all[0].name()), (Isa::of(&cpu), level));
            assert_eq!(all.last(), Some(&Isa::Portable));
        }
    }
}
