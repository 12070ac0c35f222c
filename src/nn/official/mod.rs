//! The networks of the published ResShift, SinSR and TAD-SR checkpoints: a U-Net with Swin layers that predicts the
//! latent of the high-resolution image, and the vector-quantised autoencoder of that latent.
//!
//! Tensor names are those of the checkpoints. Feature maps are NHWC, as everywhere in this library.

mod config;

pub use config::{AutoencoderConfig, DiffusionConfig, OfficialConfig, UnetConfig};
