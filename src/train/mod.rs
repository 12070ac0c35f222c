//! Training: data, degradation, pairs, optimiser, checkpoints, loops.

pub mod checkpoint;
pub mod data;
pub mod degrade;
pub mod fit;
pub mod loader;
pub mod optim;
pub mod pairs;
pub mod real_world;
