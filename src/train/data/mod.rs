//! Training data: photos, videos and rendered images, and the pairs that are made of them.

#[cfg(feature = "video")]
pub mod clips;
pub mod corpus;
pub mod files;
pub mod loader;
pub mod matched;
pub mod motion;
pub mod pairs;
pub mod photos;
#[cfg(feature = "video")]
pub mod pool;
pub mod sampling;
pub mod spec;
pub mod synthetic;

pub use files::{
    DataError, Skipped, check_size, decode, files, image_files, is_image, is_video, jpeg_is_whole,
    picture_format, read_picture,
};
pub use photos::PhotoSet;
pub use sampling::Sampling;
pub use spec::Preparation;

pub use super::patch::Patch;
