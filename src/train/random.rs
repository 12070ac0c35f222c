//! Random numbers, seeds and hashes that are the same on every machine.

use std::{f32::consts::TAU, hash::Hasher};

use rand::Rng;

/// FNV-1a hash (Fowler, Noll, Vo), the same on every machine and in every version.
pub(super) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Returns the seed of step `step` of a run with `seed`, by the mixing function of SplitMix64.
pub fn step_seed(seed: u64, step: u64) -> u64 {
    let mut z = seed.wrapping_add((step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Returns a standard normal number by the Box-Muller transform.
pub(super) fn normal<R: Rng + ?Sized>(rng: &mut R) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (TAU * rng.random::<f32>()).cos()
}
