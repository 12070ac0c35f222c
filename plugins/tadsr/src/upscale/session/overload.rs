// SPDX-License-Identifier: MPL-2.0

//! `overload=adapt`: smaller models while the machine cannot keep up, and the announced latency.

use std::time::{Duration, Instant};

use gst::prelude::*;
use gst_base::{BaseTransform, prelude::*};
use tadsr::{Device, engine::Setting, model::LADDER};

use super::{
    super::{
        CAT, Overload,
        auto::Conditions,
        governor::{Governor, Load},
    },
    LoadedModel, Session, State, install, lock, notify_active,
};

/// Value of `active-model` and level below all models.
const BICUBIC: &str = "bicubic";

/// The governor of a stream, and the models of its levels.
pub(super) struct Governed {
    governor: Governor,
    /// Names of models from the requested one to the fastest.
    levels: Vec<String>,
    conditions: Conditions,
    device: Device,
    origin: Instant,
}

impl Governed {
    pub fn level(&self) -> usize {
        self.governor.level()
    }
}

/// Returns the names of `model` and of those that replace it while the machine cannot keep up.
fn levels(model: &str) -> Vec<String> {
    let group = LADDER.iter().position(|group| {
        let rest = model.strip_prefix(group);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("-x"))
    });
    let smaller = LADDER[..group.unwrap_or(0)].iter().rev();
    let names = [model].into_iter().chain(smaller.copied());
    names.chain([BICUBIC]).map(Into::into).collect()
}

/// Returns true if the source upstream is live.
fn is_live(element: &BaseTransform) -> bool {
    let mut query = gst::query::Latency::new();
    element.sink_pad().peer_query(&mut query) && query.result().0
}

impl State {
    /// Notes the model in use, which the levels begin with.
    pub(super) fn note_lite(&mut self, model: Option<&LoadedModel>) {
        // ResShift models lack this setting. They are never in real time.
        let lite = |m: &&LoadedModel| m.upscaler.capabilities().has(Setting::Strength);
        let model = model.filter(|m| !m.bicubic).filter(lite);
        self.lite = model.map(|m| (m.loaded.clone(), m.upscaler.active_device()));
    }
}

impl Session {
    /// Returns true if the model in use replaces the requested one in other conditions than now.
    pub(super) fn is_outdated(&self) -> bool {
        let conditions = self.conditions();
        let state = lock(&self.state);
        let governed = state.governed.as_ref();
        governed.is_some_and(|g| g.level() > 0 && Some(g.conditions) != conditions)
    }

    /// Begins to govern the stream with a model that has just taken over.
    pub(super) fn govern_anew(&self, element: &BaseTransform) {
        lock(&self.state).governed = None;
        self.govern(element);
    }

    /// Begins to govern the stream with the model in use, if its conditions are new.
    pub(super) fn govern(&self, element: &BaseTransform) {
        let overload = self.settings().overload;
        let live = is_live(element);
        let conditions = self.conditions();
        let mut state = lock(&self.state);
        state.announces = live && overload != Overload::Drop;
        let same = |g: &Governed| {
            let is_first = |(name, _): &(String, Device)| *name == g.levels[0];
            Some(g.conditions) == conditions
                && (g.level() > 0 || state.lite.as_ref().is_some_and(is_first))
        };
        if state.governed.as_ref().is_some_and(same) {
            return;
        }
        state.processing = Duration::ZERO;
        let adapts = overload == Overload::Adapt || (overload == Overload::Auto && live);
        state.governed = match (conditions, state.lite.clone()) {
            (Some(conditions), Some((model, device))) if adapts => {
                let levels = levels(&model);
                Some(Governed {
                    governor: Governor::new(levels.len() - 1, conditions.interval()),
                    levels,
                    conditions,
                    device,
                    origin: Instant::now(),
                })
            }
            _ => None,
        };
        state.status.stats.level = state.governed.as_ref().map(|_| 0);
    }

    /// Counts a frame that took `busy`, or was dropped because it was late. Takes a step if the
    /// load asks for one.
    pub(super) fn count_load(&self, element: &BaseTransform, busy: Option<Duration>) {
        let mut state = lock(&self.state);
        let Some(governed) = &mut state.governed else {
            return;
        };
        let now = governed.origin.elapsed();
        let Some(load) = governed.governor.count(now, busy) else {
            return;
        };
        let step = governed.governor.decide(now, load);
        let step = step.map(|level| (level, governed.levels[level].clone(), governed.device));
        let interval = governed.conditions.interval();
        // A stream whose frames take longer cannot keep up, and waiting does not help.
        let longest = load.longest.min(interval);
        let grows = state.announces && longest > state.processing;
        if grows {
            // Some more, so that it seldom changes.
            state.processing = longest.mul_f64(1.25).min(interval);
        }
        drop(state);
        if grows {
            self.update_latency(element);
        }
        if let Some((level, name, device)) = step {
            self.take_step(element, level, &name, device, load);
        }
    }

    /// Replaces the model by that of `level`, from the next frame on.
    fn take_step(
        &self,
        element: &BaseTransform,
        level: usize,
        name: &str,
        device: Device,
        load: Load,
    ) {
        let settings = self.settings();
        let generation = lock(&self.state).generation;
        let conditions = self.conditions();
        let model = if name == BICUBIC {
            self.load_bicubic(&settings)
        } else {
            self.load_named(element, &settings, name, device)
        };
        let model = match model {
            Ok(model) => LoadedModel {
                requested: settings.model.clone(),
                conditions,
                ..model
            },
            Err(err) => {
                gst::warning!(CAT, obj = element, "{err}; keeping the current model");
                return;
            }
        };
        let mut state = lock(&self.state);
        if state.generation != generation || state.governed.is_none() {
            return;
        }
        state.status.stats.level = Some(level as u32);
        install(state, Some(model));
        let reason = format!(
            "frames take {:.0} % of the time between two of them, {:.0} % were dropped",
            100.0 * load.share,
            100.0 * load.dropped
        );
        gst::info!(CAT, obj = element, "Level {level}, model {name}: {reason}");
        let structure = gst::Structure::builder("tadsrupscale-overload")
            .field("level", level as u32)
            .field("model", name)
            .field("reason", reason)
            .build();
        let message = gst::message::Element::builder(structure).src(element);
        // Fails without a bus.
        let _ = element.post_message(message.build());
        notify_active(element);
    }
}

#[cfg(test)]
mod tests {
    use super::levels;

    #[test]
    fn levels_are_the_smaller_models_of_the_ladder_and_bicubic() {
        assert_eq!(levels("tiny"), ["tiny", "bicubic"]);
        assert_eq!(levels("small-x2"), ["small-x2", "tiny", "bicubic"]);
        assert_eq!(
            levels("my/model.safetensors"),
            ["my/model.safetensors", "bicubic"]
        );
        assert_eq!(levels("tiny.safetensors"), ["tiny.safetensors", "bicubic"]);
    }
}
