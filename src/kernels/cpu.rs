//! Instruction-set extensions that kernels may use: detected once, lowered by the environment
//! variable `TADSR_CPU`.

use std::{env, ffi::OsStr, fmt, sync::OnceLock};

/// Name of the environment variable that lowers the features.
pub const VARIABLE: &str = "TADSR_CPU";

/// An extension, or a set of extensions, that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Feature {
    /// x86-64: AVX2 and FMA.
    Avx2,
    /// x86-64: AVX-512 F, BW, DQ and VL, with [`Self::Avx2`].
    Avx512,
    /// x86-64: AVX-512 BF16, with [`Self::Avx512`].
    Avx512Bf16,
    /// x86-64: AVX-512 VNNI, with [`Self::Avx512`].
    Avx512Vnni,
    /// x86-64: AVX-VNNI, with [`Self::Avx2`].
    AvxVnni,
    /// AArch64: NEON.
    Neon,
    /// AArch64: dot products of 8-bit integers, with [`Self::Neon`].
    NeonDot,
    /// AArch64: dot products of unsigned and signed 8-bit integers, with [`Self::NeonDot`].
    NeonI8mm,
    /// AArch64: bfloat16, with [`Self::Neon`].
    NeonBf16,
}

use Feature::*;

const ALL: [Feature; 9] = [
    Avx2, Avx512, Avx512Bf16, Avx512Vnni, AvxVnni, Neon, NeonDot, NeonI8mm, NeonBf16,
];

/// Values of [`VARIABLE`], highest first: name, feature that it needs, features that it allows.
const LEVELS: [(&str, Option<Feature>, &[Feature]); 4] = [
    (
        "avx512",
        Some(Avx512),
        &[Avx2, Avx512, Avx512Bf16, Avx512Vnni, AvxVnni],
    ),
    ("avx2", Some(Avx2), &[Avx2]),
    ("neon", Some(Neon), &[Neon, NeonDot, NeonI8mm, NeonBf16]),
    ("portable", None, &[]),
];

/// The features that kernels may use. A feature in it is one that this machine has: values come
/// from detection and are lowered only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cpu(u16);

impl Cpu {
    /// No features: portable code only.
    pub const PORTABLE: Self = Self(0);

    /// Returns the features of this machine.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<Cpu> = OnceLock::new();
        *DETECTED.get_or_init(|| Self::of(&detect()))
    }

    /// Returns the features that kernels use: those of this machine, lowered by [`VARIABLE`]. A
    /// value that [`Self::from_env`] refuses lowers nothing.
    pub fn get() -> Self {
        static CPU: OnceLock<Cpu> = OnceLock::new();
        *CPU.get_or_init(|| Self::from_env().unwrap_or(Self::detected()))
    }

    /// Reads [`VARIABLE`].
    ///
    /// # Errors
    /// [`LevelError`] if its value is unknown or this machine lacks it.
    pub fn from_env() -> Result<Self, LevelError> {
        match env::var_os(VARIABLE) {
            Some(level) if !level.is_empty() => Self::detected().lowered(&level),
            _ => Ok(Self::detected()),
        }
    }

    /// Returns the features that `level` allows: `avx512`, `avx2`, `neon` or `portable`.
    ///
    /// # Errors
    /// [`LevelError`] if `level` is unknown or needs a feature that `self` lacks.
    pub fn lowered(self, level: impl AsRef<OsStr>) -> Result<Self, LevelError> {
        let level = level.as_ref();
        let available = self.levels().find(|l| l.0 == level);
        match available {
            Some((_, _, allowed)) => Ok(Self(self.0 & Self::of(allowed).0)),
            None => Err(LevelError {
                level: level.to_string_lossy().into_owned(),
                available: self.levels().map(|l| l.0).collect(),
            }),
        }
    }

    /// Returns `true` if kernels may use `feature`.
    pub fn has(self, feature: Feature) -> bool {
        self.0 & 1 << feature as u16 != 0
    }

    /// Returns the name of the highest level.
    pub fn level(self) -> &'static str {
        self.levels().next().map_or("portable", |l| l.0)
    }

    fn levels(
        self,
    ) -> impl Iterator<Item = &'static (&'static str, Option<Feature>, &'static [Feature])> {
        let available = move |needed: Option<Feature>| needed.is_none_or(|f| self.has(f));
        LEVELS.iter().filter(move |l| available(l.1))
    }

    fn of(features: &[Feature]) -> Self {
        Self(features.iter().fold(0, |set, f| set | 1 << *f as u16))
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_set()
            .entries(ALL.into_iter().filter(|&f| self.has(f)))
            .finish()
    }
}

/// A value of [`VARIABLE`] that is unknown or that this machine lacks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE}={level}: this CPU has {}", .available.join(", "))]
pub struct LevelError {
    pub level: String,
    /// Levels that this machine has, highest first.
    pub available: Vec<&'static str>,
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Feature> {
    use std::arch::is_x86_feature_detected as has;

    let mut found = Vec::new();
    if !(has!("avx2") && has!("fma")) {
        return found;
    }
    found.push(Avx2);
    if has!("avxvnni") {
        found.push(AvxVnni);
    }
    if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
        return found;
    }
    found.push(Avx512);
    if has!("avx512bf16") {
        found.push(Avx512Bf16);
    }
    if has!("avx512vnni") {
        found.push(Avx512Vnni);
    }
    found
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Vec<Feature> {
    use std::arch::is_aarch64_feature_detected as has;

    let mut found = Vec::new();
    if !has!("neon") {
        return found;
    }
    found.push(Neon);
    if has!("dotprod") {
        found.push(NeonDot);
        if has!("i8mm") {
            found.push(NeonI8mm);
        }
    }
    if has!("bf16") {
        found.push(NeonBf16);
    }
    found
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Vec<Feature> {
    Vec::new()
}

/// Defines a type for each feature whose value proves that the CPU has it.
macro_rules! proofs {
    ($($name:ident)*) => {
        /// Proofs that the CPU has a feature: code for it may run wherever there is a value.
        pub mod proof {
            use super::{Cpu, Feature};

            $(
                #[doc = concat!("The CPU has [`Feature::", stringify!($name), "`].")]
                #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
                pub struct $name(());

                impl $name {
                    /// Returns the proof, if `cpu` has the feature.
                    pub fn new(cpu: &Cpu) -> Option<Self> {
                        cpu.has(Feature::$name).then_some(Self(()))
                    }
                }
            )*
        }
    };
}

proofs!(Avx2 Avx512 Avx512Bf16 Avx512Vnni AvxVnni Neon NeonDot NeonI8mm NeonBf16);

#[cfg(test)]
mod tests {
    use super::*;

    /// Every set that a machine may have.
    fn machines() -> [Cpu; 9] {
        [
            Cpu::PORTABLE,
            Cpu::of(&[Avx2]),
            Cpu::of(&[Avx2, AvxVnni]),
            Cpu::of(&[Avx2, Avx512]),
            Cpu::of(&[Avx2, Avx512, Avx512Bf16, Avx512Vnni, AvxVnni]),
            Cpu::of(&[Neon]),
            Cpu::of(&[Neon, NeonDot]),
            Cpu::of(&[Neon, NeonDot, NeonBf16]),
            Cpu::of(&[Neon, NeonDot, NeonI8mm, NeonBf16]),
        ]
    }

    #[test]
    fn a_level_leaves_nothing_above_it_and_adds_nothing() {
        for machine in machines() {
            for (level, _, allowed) in LEVELS {
                let Ok(lowered) = machine.lowered(level) else {
                    continue;
                };
                for feature in ALL {
                    let want = machine.has(feature) && allowed.contains(&feature);
                    assert_eq!(
                        lowered.has(feature),
                        want,
                        "{machine:?} {level} {feature:?}"
                    );
                }
                assert_eq!(lowered.level(), level, "{machine:?}");
            }
            assert_eq!(machine.lowered("portable"), Ok(Cpu::PORTABLE));
        }
    }

    #[test]
    fn a_level_that_is_unknown_or_missing_is_an_error_that_names_the_others() {
        let cpu = Cpu::of(&[Avx2]);
        for level in ["avx512", "neon", "sse", "AVX2"] {
            let error = cpu.lowered(level).unwrap_err();
            assert_eq!(error.available, ["avx2", "portable"]);
            let message = format!("TADSR_CPU={level}: this CPU has avx2, portable");
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn a_proof_exists_where_the_feature_does() {
        for machine in machines() {
            assert_eq!(proof::Avx2::new(&machine).is_some(), machine.has(Avx2));
            assert_eq!(proof::Avx512::new(&machine).is_some(), machine.has(Avx512));
            assert_eq!(proof::Neon::new(&machine).is_some(), machine.has(Neon));
            assert_eq!(
                proof::NeonDot::new(&machine).is_some(),
                machine.has(NeonDot)
            );
        }
    }
}
