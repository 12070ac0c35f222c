//! The engine of students on the CPU.

use super::{Runner, scale};
use crate::{
    Error, Result,
    engine::{
        Capabilities, Engine, Observer, Options, Precision, Temporal, larger_scale,
        lite::{Models, condition, dials_differ, frame_mismatch},
    },
    frame::{FrameInfo, FrameMut, FrameRef},
    model::LiteModel,
};

/// Share of the previous result where the input stands still.
const SHARE: f32 = 0.7;

/// Position of the dial `denoise` from which on the share is the largest. It falls to 0 at 0.
const DEGRADED: f32 = 0.2;

/// Students on the CPU.
pub struct CpuEngine {
    models: Models,
    capabilities: Capabilities,
    options: Options,
    /// Runner in use and index of its model.
    runner: Option<(usize, Runner)>,
    /// The weights of the runner are those of other options.
    stale: bool,
}

impl CpuEngine {
    /// Creates the engine of `models`, at least one, in the order of their scales.
    pub fn new(models: Vec<LiteModel>) -> Self {
        let models = Models(models);
        Self {
            capabilities: models.capabilities(false, Precision::resolve),
            models,
            options: Options::default(),
            runner: None,
            stale: false,
        }
    }

    /// Returns `true` if the model `index` remembers the previous frame.
    fn remembers(&self, index: usize) -> bool {
        let memory = self.models.0[index].metadata.student.memory > 0;
        memory && matches!(self.options.temporal, Temporal::Auto | Temporal::Memory)
    }

    /// Returns the largest share of the previous result for the model `index`.
    fn share(&self, index: usize) -> f32 {
        let has_dial = self.models.0[index].metadata.student.conditioning.denoise;
        match (self.options.temporal, has_dial) {
            (Temporal::Off | Temporal::Memory, _) | (Temporal::Auto, false) => 0.0,
            (Temporal::Filter, false) => SHARE,
            (_, true) => SHARE * (self.options.denoise() / DEGRADED).min(1.0),
        }
    }
}

/// Returns `true` if two sets of options make different results of a frame, other than by the
/// automatic `denoise`, which changes in small steps.
fn results_differ(a: &Options, b: &Options) -> bool {
    (a.strength, a.denoise, a.detail) != (b.strength, b.denoise, b.detail)
}

impl Engine for CpuEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn model(&self, scale: f64) -> &str {
        &self.models.serving(scale).metadata.name
    }

    fn precision(&self, scale: f64) -> Precision {
        let resolved = self.options.precision.resolve(self.models.serving(scale));
        // `set_options` refuses precisions that do not resolve.
        resolved.unwrap_or(Precision::F32)
    }

    fn options(&self) -> &Options {
        &self.options
    }

    fn set_options(&mut self, options: Options) -> Result<()> {
        let memory = |m: &LiteModel| m.metadata.student.memory > 0;
        if options.temporal == Temporal::Memory && !self.models.0.iter().any(memory) {
            let name = &self.models.0[0].metadata.name;
            return Err(Error::Setting(format!(
                "temporal 'memory': model '{name}' is a network without memory; use auto, off or \
                 filter"
            )));
        }
        if options.precision != self.options.precision {
            self.models.check(options.precision, Precision::resolve)?;
            self.runner = None;
        }
        if options.temporal != self.options.temporal && self.models.0.iter().any(memory) {
            // Another network.
            self.runner = None;
        }
        if results_differ(&options, &self.options) {
            self.reset();
        }
        self.stale |= dials_differ(&options, &self.options);
        self.options = options;
        Ok(())
    }

    fn prepare(&mut self, from: &FrameInfo, to: &FrameInfo) -> Result<()> {
        let index = self.models.index(larger_scale(from, to));
        let remembers = self.remembers(index);
        let folded = || {
            let at = condition(&self.options, scale(from, to));
            let folded = self.models.0[index].folded(&at);
            if remembers {
                folded
            } else {
                folded.without_memory()
            }
        };
        match &mut self.runner {
            Some((i, runner)) if *i == index && runner.fits(from, to) => {
                if self.stale {
                    runner.set_weights(&folded())?;
                }
            }
            _ => {
                // Frees its memory before the new runner allocates.
                self.runner = None;
                let runner = Runner::new(&folded(), *from, *to, self.options.precision)?;
                self.runner = Some((index, runner));
            }
        }
        self.stale = false;
        Ok(())
    }

    fn run(&mut self, src: &FrameRef, dst: &mut FrameMut, _: Observer) -> Result<()> {
        let index = self.runner.as_ref().ok_or_else(frame_mismatch)?.0;
        let share = self.share(index);
        let (_, runner) = self.runner.as_mut().ok_or_else(frame_mismatch)?;
        runner.set_share(share);
        runner.run(src, dst, self.options.strength)
    }

    fn reset(&mut self) {
        if let Some((_, runner)) = &mut self.runner {
            runner.forget();
        }
    }
}
