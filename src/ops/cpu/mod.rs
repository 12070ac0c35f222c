//! CPU kernels on plain f32 slices: one plain reference each, SIMD variants chosen at run time.

/// Compiles a body for each instruction set and picks at run time. The body's const parameter says whether the set has
/// fused multiply-add.
macro_rules! dispatch {
    ($name:ident, $body:ident, ($($arg:ident: $type:ty),*)) => {
        #[allow(clippy::too_many_arguments)]
        fn $name(isa: Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,fma")]
                fn avx512($($arg: $type),*) {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) {
                    $body::<true>($($arg),*)
                }
                match isa {
                    // SAFETY: the CPU has what `Isa::best` and `Isa::available` say.
                    Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $body::<false>($($arg),*)
        }
    };
}

pub mod attention;
pub mod conv;
mod conv_portable;
#[cfg(target_arch = "x86_64")]
mod conv_x86;
pub mod elementwise;
pub mod int8;
mod lanes;
mod matmul;
mod memory;
pub mod norm;
pub mod shuffle;
pub mod upsample;
pub mod winograd;

use memory::filled;
pub use memory::zeros;

use std::sync::OnceLock;

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F and FMA.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// Plain Rust, vectorised by the compiler for the target's baseline.
    Portable,
}

impl Isa {
    /// The instruction sets that this CPU has, best first.
    pub fn available() -> &'static [Isa] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let mut isas = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("fma") {
                    isas.push(Isa::Avx512);
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    isas.push(Isa::Avx2);
                }
            }
            isas.push(Isa::Portable);
            isas
        })
    }

    /// Passes on an instruction set that this CPU has.
    ///
    /// # Panics
    /// When the CPU has it not.
    fn checked(self) -> Isa {
        assert!(
            Self::available().contains(&self),
            "this CPU has no {self:?}"
        );
        self
    }

    /// The best instruction set that this CPU has.
    pub fn best() -> Isa {
        Self::available()[0]
    }
}

/// A pointer that threads share; they write disjoint parts.
struct SendPtr(*mut f32);
// SAFETY: see the type's promise.
unsafe impl Sync for SendPtr {}
