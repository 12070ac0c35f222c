//! Distillation of ResShift networks into one step.

mod distill;
mod images;
pub mod init;
mod options;
mod recipe;
mod run;

pub use distill::{Distill, InitialWeights};
pub use options::{Options, Weights, narrowed, patch_multiple};
pub use recipe::Recipe;
pub use run::{estimate, run};
