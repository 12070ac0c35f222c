//! Networks, as candle modules on NHWC feature maps.

pub mod discriminator;
mod embedding;
pub mod lite;
pub mod official;
mod spectral;
