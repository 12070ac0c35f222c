//! The networks of the published ResShift, SinSR and TAD-SR checkpoints: a U-Net with Swin layers
//! that predicts the latent of the high-resolution image, and the vector-quantised autoencoder of
//! the latent.
//!
//! Names of tensors are those of the checkpoints. Feature maps are NHWC, as in the whole library.
//! The constant buffers of the checkpoints (`relative_position_index`, `attn_mask`) are computed.

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
