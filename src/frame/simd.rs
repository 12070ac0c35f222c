//! Kernels written once in plain Rust and compiled for several instruction sets, chosen at run time.
//!
//! The bodies are loops that the compiler vectorises. None of them contracts `a * b + c` into one rounding, so
//! every variant gives the same bits.

/// An instruction set that this processor has been seen to support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Level(Isa);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    pub(super) const PORTABLE: Level = Level(Isa::Portable);

    /// The widest instruction set of this processor.
    pub(super) fn best() -> Self {
        // The standard library caches the detection: this costs a few loads.
        #[cfg(target_arch = "x86_64")]
        if Self::has_avx512() {
            return Self(Isa::Avx512);
        } else if std::arch::is_x86_feature_detected!("avx2") {
            return Self(Isa::Avx2);
        }
        Self::PORTABLE
    }

    /// Every instruction set of this processor.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") {
                all.push(Self(Isa::Avx2));
            }
            if Self::has_avx512() {
                all.push(Self(Isa::Avx512));
            }
        }
        all
    }

    pub(super) fn isa(self) -> Isa {
        self.0
    }

    #[cfg(target_arch = "x86_64")]
    fn has_avx512() -> bool {
        use std::arch::is_x86_feature_detected as has;
        has!("avx2") && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
    }
}

/// Defines `fn name(level: Level, ...)` for each `fn name(...)`: the body compiled for each instruction set.
macro_rules! per_level {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        $(#[$meta])*
        fn $name(level: $crate::frame::simd::Level, $($arg: $ty),*) {
            use $crate::frame::simd::Isa;

            #[inline(always)]
            fn portable($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $ty),*) {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512($($arg: $ty),*) {
                portable($($arg),*)
            }

            match level.isa() {
                Isa::Portable => portable($($arg),*),
                // SAFETY: a `Level` beyond the portable one is only made after its features were detected.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    )*};
}
pub(super) use per_level;
