//! Separable resampling of f32 planes.
