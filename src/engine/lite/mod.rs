//! The lite family: students for real time, planned for frames of one kind and size.

mod chroma;
pub mod cpu;
pub mod cuda;

use super::{Capabilities, Options, Precision, Setting};
use crate::{Error, Result, model::LiteModel, nn::lite::Condition};

/// Returns the condition of a network for `options` and `scale`.
fn condition(options: &Options, scale: f64) -> Condition {
    Condition {
        scale,
        denoise: options.denoise().into(),
        detail: options.detail(scale).into(),
    }
}

/// Returns `true` if a dial, which folds into the weights, differs between two sets of options.
fn dials_differ(a: &Options, b: &Options) -> bool {
    (a.denoise(), a.detail) != (b.denoise(), b.detail)
}

/// Models in the order of their scales, each for a range of scales. Not empty.
struct Models(Vec<LiteModel>);

impl Models {
    /// Returns the index of the model whose range holds `scale`: the first below all ranges, the
    /// last above.
    fn index(&self, scale: f64) -> usize {
        let serves = |m: &LiteModel| scale <= m.metadata.scales[1];
        let found = self.0.iter().position(serves);
        found.unwrap_or(self.0.len() - 1)
    }

    /// Returns the model whose range holds `scale`.
    fn serving(&self, scale: f64) -> &LiteModel {
        &self.0[self.index(scale)]
    }

    /// Checks that `resolve` accepts `precision` for every model.
    fn check(
        &self,
        precision: Precision,
        resolve: impl Fn(Precision, &LiteModel) -> Result<Precision>,
    ) -> Result<()> {
        self.0
            .iter()
            .try_for_each(|model| resolve(precision, model).map(drop))
    }

    /// Returns the capabilities of an engine that is either pipelined or has a temporal filter.
    fn capabilities(
        &self,
        pipelined: bool,
        resolve: impl Fn(Precision, &LiteModel) -> Result<Precision>,
    ) -> Capabilities {
        let largest = self.0.iter().map(|m| m.metadata.scales[1]);
        let serves = |&precision: &Precision| {
            let is_own = |model| resolve(precision, model).is_ok_and(|p| p == precision);
            self.0.iter().all(is_own)
        };
        let precisions = Precision::ALL.into_iter().map(|(precision, _)| precision);
        let dials = self.0.iter().map(|m| m.metadata.student.conditioning);
        let has = [
            (Setting::Denoise, dials.clone().any(|c| c.denoise)),
            (Setting::Detail, dials.clone().any(|c| c.detail)),
            (Setting::Temporal, !pipelined),
        ];
        let more = has.into_iter().filter(|(_, has)| *has).map(|(s, _)| s);
        Capabilities {
            scales: [1.0, largest.clone().next_back().unwrap_or(1.0)],
            default_scale: largest.fold(4.0, f64::min),
            native_scale: None,
            precisions: precisions.filter(serves).collect(),
            settings: [Setting::Strength, Setting::Precision]
                .into_iter()
                .chain(more)
                .collect(),
            max_steps: None,
            pipelined,
            history: !pipelined,
        }
    }
}

fn frame_mismatch() -> Error {
    Error::Frame("the frame is not of the kind and size that the engine was prepared for".into())
}
