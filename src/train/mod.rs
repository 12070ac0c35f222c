//! Training: data, degradation, pairs, optimiser, checkpoints, loops.

pub mod adversary;
pub mod checkpoint;
#[cfg(feature = "video")]
pub mod codec;
pub mod data;
pub mod degrade;
pub mod distill;
pub mod eval;
pub mod init;
pub mod lite;
pub mod loader;
pub mod losses;
pub mod optim;
pub mod pairs;
pub mod real_world;
pub mod recipe;
pub mod report;
pub mod tensorboard;
