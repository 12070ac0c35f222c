//! Reading and writing the samples of a frame as normalised f32 rows.
