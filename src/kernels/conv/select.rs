//! Register tiles of every instruction set.

#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{portable, tile::Tiles};
use crate::kernels::simd::Isa;

/// Returns the tiles of `isa`.
pub(in crate::kernels) fn tiles(isa: Isa) -> &'static Tiles {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => &x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => &x86::AVX2,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon(_) => &neon::NEON,
        _ => &portable::PORTABLE,
    }
}
