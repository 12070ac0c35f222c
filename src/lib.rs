//! Video super-resolution with small one-step networks.
//!
//! [`Upscaler`] loads a model and upscales frames.
//!
//! ```no_run
//! use tadsr::{Device, Upscaler, frame::{Frame, FrameInfo, PixelFormat}};
//!
//! let frame = Frame::new(FrameInfo::new(PixelFormat::I420, 640, 360))?;
//! let large = Upscaler::load("tiny", Device::Auto)?.upscale(&frame)?;
//! assert_eq!((large.info().width, large.info().height), (1280, 720));
//! # Ok::<(), tadsr::Error>(())
//! ```
//!
//! Modules from the bottom up: [`kernels`] (fast loops), [`cuda`] (the NVIDIA driver), [`frame`]
//! (video frames), [`ops`] (operators with fast kernels), [`nn`] (networks), [`diffusion`] (noise
//! schedule and samplers), [`model`] (model files), [`engine`] (inference on frames), [`ladder`]
//! (choice of a bundled model by speed), [`metrics`]. The feature `train` adds training (data,
//! losses, loops), the feature `video` adds video files through GStreamer.

mod cache;
pub mod cuda;
mod device;
pub mod diffusion;
pub mod engine;
mod error;
pub mod frame;
pub mod kernels;
pub mod ladder;
pub mod metrics;
pub mod model;
pub mod nn;
pub mod ops;
#[cfg(test)]
mod testing;
#[cfg(feature = "train")]
pub mod train;
pub mod trial;
mod upscaler;
#[cfg(feature = "video")]
pub mod video;

pub use device::Device;
pub use engine::Precision;
pub use error::{Error, Result};
pub use upscaler::{Observer, Upscaler};
