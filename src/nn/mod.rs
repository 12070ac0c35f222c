//! Networks, as candle modules on NHWC feature maps.

pub mod layers;
pub mod lite;
pub mod resshift;
