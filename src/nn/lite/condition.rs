//! Conditioning: weights of a layer as a function of a few numbers that change rarely.
//!
//! Each [`Input`] has a few features `f`, which are the same for all layers. A layer of kernel `W`
//! and bias `b` becomes `(1 + gain f) (W + sum_k f_k W_k)` and `b + shift f`. The result is a plain
//! layer, so that conditioning costs time only when a dial changes. Gain and shift are feature-wise
//! linear modulation (Perez et al., arXiv 1709.07871). Only `detail` has kernels `W_k`, the
//! difference between two trained networks: for `denoise` they were no better than gain and shift.
//! They can be products of two factors, in a model whose file would be too large with full ones.

use serde::{Deserialize, Serialize};

/// Inputs of the weights besides the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Conditioning {
    /// Degradation of the input.
    pub denoise: bool,
    /// Invented detail, from faithful to generative.
    pub detail: bool,
    /// Rank of the kernels of `detail`, 1 to 64; 0 for full kernels.
    #[serde(skip_serializing_if = "is_zero")]
    pub detail_rank: usize,
}

pub(super) fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// A number that weights depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    Scale,
    Denoise,
    Detail,
}

/// The values of all inputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Condition {
    /// Output size over input size, 1 to 4.
    pub scale: f64,
    /// 0 (clean input) to 1 (heavily compressed or noisy).
    pub denoise: f64,
    /// 0 (faithful) to 1 (generative).
    pub detail: f64,
}

impl Condition {
    /// Returns the condition of clean input and faithful output.
    pub fn at(scale: f64) -> Self {
        Self {
            scale,
            denoise: 0.0,
            detail: 0.0,
        }
    }
}

impl Conditioning {
    /// Returns `true` without dials: only the bias depends on the scale.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the inputs in the order of a layer's tensors.
    pub fn inputs(&self) -> impl Iterator<Item = Input> {
        let dials = [(Input::Denoise, self.denoise), (Input::Detail, self.detail)];
        let dials = dials.into_iter().filter(|(_, on)| *on).map(|(i, _)| i);
        std::iter::once(Input::Scale).chain(dials)
    }
}

impl Input {
    /// Returns its name in names of tensors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scale => "scale",
            Self::Denoise => "denoise",
            Self::Detail => "detail",
        }
    }

    /// Returns the number of features.
    pub fn count(self) -> usize {
        match self {
            Self::Scale => 2,
            Self::Denoise => 3,
            Self::Detail => 1,
        }
    }

    /// Returns the [`Self::count`] features of `at` for a grid cell of side `r`.
    pub fn features(self, at: &Condition, r: usize) -> Vec<f32> {
        match self {
            Self::Scale => scale_features(at.scale, r).into(),
            Self::Denoise => {
                let d = at.denoise as f32;
                // A network changes most between clean and slightly degraded input.
                vec![d, d * d, (-d / CLEAN).exp()]
            }
            Self::Detail => vec![at.detail as f32],
        }
    }
}

/// Width of the step from clean to degraded input, in units of `denoise`.
const CLEAN: f32 = 0.08;

/// Returns the features `[u, u^2]` of the scale with `u = log2(scale / r)`. They are 0 at scale
/// `r`.
pub fn scale_features(scale: f64, r: usize) -> [f32; 2] {
    let u = (scale / r as f64).log2() as f32;
    [u, u * u]
}

/// Returns the dial `denoise` for input that differs from its undegraded version by `rms` 8-bit
/// steps of luma (root mean square over typical content): 0 for 0, 0.39 for 3, 0.63 for 6.
pub fn denoise_of(rms: f64) -> f64 {
    1.0 - (-rms.max(0.0) / 6.0).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_features_vanish_at_scale_r() {
        assert_eq!(scale_features(4.0, 4), [0.0, 0.0]);
        assert_eq!(scale_features(1.0, 2), [-1.0, 1.0]);
    }

    #[test]
    fn every_input_has_its_number_of_features() {
        let all = Conditioning {
            denoise: true,
            detail: true,
            detail_rank: 0,
        };
        assert_eq!(all.inputs().count(), 3);
        assert_eq!(Conditioning::default().inputs().count(), 1);
        for input in all.inputs() {
            let features = input.features(&Condition::at(1.5), 2);
            assert_eq!(features.len(), input.count(), "{}", input.name());
        }
    }

    #[test]
    fn denoise_grows_from_0_to_1_with_the_degradation() {
        assert_eq!(denoise_of(0.0), 0.0);
        let values = [0.5, 3.0, 6.0, 30.0].map(denoise_of);
        assert!(values.is_sorted() && values[3] < 1.0, "{values:?}");
    }
}
