//! Training: data, degradation, pairs, optimiser, checkpoints, loops.

pub mod adversary;
pub mod checkpoint;
#[cfg(feature = "video")]
pub mod clips;
pub mod codec;
pub mod corpus;
pub mod damage;
pub mod data;
pub mod degrade;
pub mod distill;
pub mod eval;
pub mod init;
pub mod lite;
pub mod loader;
pub mod losses;
pub mod motion;
pub mod optim;
pub mod pairs;
#[cfg(feature = "video")]
pub mod pool;
pub mod real_world;
pub mod recipe;
pub mod report;
pub mod stages;
pub mod tensorboard;
