//! A made-up model of luma and chroma.

use std::path::PathBuf;

use tadsr::{
    model::{Layer, LiteModel, Metadata},
    nn::lite::{LatentStats, StudentConfig},
};

/// Writes a model of luma and chroma with a large residual. Returns the path.
pub fn yuv_model(dir: &tempfile::TempDir) -> PathBuf {
    let mut student = StudentConfig::chroma();
    (student.channels, student.depth) = (8, 1);
    let mut state = 1u32;
    let mut values = |n: usize, size: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
        };
        (0..n).map(|_| next()).collect()
    };
    let model = LiteModel {
        metadata: Metadata::lite("made-up", student, [1.0, 4.0]),
        stats: LatentStats::nominal(student.latent, student.r),
        layers: student
            .layers()
            .into_iter()
            .map(|spec| {
                Layer::new(
                    values(spec.co * spec.ci * 9, 0.25),
                    values(spec.co, 0.1),
                    values(spec.co * 2, 0.1),
                    spec,
                )
            })
            .collect(),
        calibration: None,
    };
    let path = dir.path().join("made-up.safetensors");
    std::fs::write(&path, model.to_bytes(false).unwrap()).unwrap();
    path
}
