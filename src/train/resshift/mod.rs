//! Distillation of ResShift networks into one step.

mod distill;
mod images;
pub mod init;
mod options;

pub use distill::{Begin, Distill, Place, StepReport};
pub use options::{Options, Weights, narrowed, patch_multiple};
