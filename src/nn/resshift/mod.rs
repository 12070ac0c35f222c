//! The networks of the published ResShift, SinSR and TAD-SR checkpoints: a U-Net with Swin layers that predicts the
//! latent of the high-resolution image, and the vector-quantised autoencoder of that latent.
//!
//! Tensor names are those of the checkpoints. Feature maps are NHWC, as everywhere in this library. What the checkpoints
//! keep beside weights (`relative_position_index`, `attn_mask`) is computed, not loaded.

mod autoencoder;
mod bicubic;
mod config;
mod discriminator;
mod swin;
mod unet;

pub use autoencoder::Autoencoder;
pub use bicubic::upsample_bicubic;
pub use config::{AutoencoderConfig, DiffusionConfig, ResShiftConfig, UnetConfig};
pub use discriminator::{Discriminator, DiscriminatorConfig};
pub use unet::Unet;
