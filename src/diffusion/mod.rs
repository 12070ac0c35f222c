//! Residual-shifting diffusion (ResShift, Yue et al., arXiv 2307.12348): noise schedule, forward
//! process and samplers.
//!
//! Times are 0 .. T - 1. z0 is the latent of the high-resolution image, zy that of the upsampled
//! low-resolution image. At time t the latent is `z0 + eta_t (zy - z0)` plus noise of standard
//! deviation `kappa sqrt(eta_t)`.

mod sampler;
mod schedule;

pub use sampler::{ancestral, deterministic, one_step};
pub use schedule::{Posterior, Schedule};
