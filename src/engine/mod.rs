//! A trained model at work: from the planes of a frame to the planes of a larger one.

pub mod lite;
pub mod resshift;
