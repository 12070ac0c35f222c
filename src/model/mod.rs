//! Model files: one safetensors file with JSON metadata, and the models that come with the library.

mod bundled;
mod file;
#[cfg(feature = "train")]
pub mod pth;

pub use bundled::{BUNDLED, Bundled, DEFAULT_MODEL};
pub use file::{FORMAT_VERSION, Layer, LiteModel, Metadata};
