//! Untrained students for measurements.

use tadsr::{
    model::{Layer, LiteModel, Metadata},
    nn::lite::{LatentStats, StudentConfig},
};

/// Returns pseudo-random values from -1 to 1.
pub fn noise(len: usize, seed: u32) -> impl Iterator<Item = f32> {
    let mut state = seed;
    (0..len).map(move |_| {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Returns a model with weights that preserve the size of the signal.
pub fn model(student: StudentConfig) -> LiteModel {
    let layers = student.layers().into_iter().zip(0..);
    LiteModel {
        metadata: Metadata::lite("bench", student, [1.0, 4.0]),
        stats: LatentStats::nominal(student.latent, student.r),
        layers: layers
            .map(|(spec, seed)| {
                let size = (0.5 / spec.ci as f32).sqrt();
                let weights = noise(spec.co * spec.ci * 9, seed);
                Layer::new(
                    weights.map(|v| v * size).collect(),
                    noise(spec.co, seed).map(|v| v * 0.1).collect(),
                    vec![0.0; spec.co * 2],
                    spec,
                )
            })
            .collect(),
        calibration: None,
    }
}
