//! Degradation of images and clips on their way to low resolution.

pub mod codec;
pub mod filters;
pub mod real_world;
pub mod recipes;
pub mod stages;

pub use recipes::{Degradation, DegradationRecipe, Degraded, PRESETS};
