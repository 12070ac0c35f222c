//! Videos in segments, each of which is encoded on its own and stored as a file. After a crash only
//! the unfinished segment is lost, and several processes can make the segments of one video.
//!
//! A segment begins with a key frame of the input if there is one in time, and always with a key
//! frame of the output. The history of the upscaler begins anew with each segment, after some
//! frames before it, so results do not depend on which process makes which segments.

mod encode;
mod file;
mod folder;
mod join;
mod make;
mod plan;

pub use folder::{Access, MadeOf, Segments, State, segments_folder};
pub use make::{Made, Step};
pub use plan::{Plan, Segment};
