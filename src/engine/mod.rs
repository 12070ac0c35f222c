//! A trained student compiled to a fast plan: from the planes of a frame to the planes of a larger one.

pub mod cpu;
