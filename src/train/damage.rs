//! Recipes of damage: what becomes of pictures on their way to the upscaler, as a TOML file says it.
//!
//! A file holds recipes; one is drawn for each picture by its weight, and its stages happen in their order:
//!
//! ```toml
//! [[recipe]]
//! name = "compressed"
//! weight = 0.5
//!
//! [[recipe.stage]]
//! kind = "shrink"
//!
//! [[recipe.stage]]
//! kind = "codec"
//! crf = [18, 38]
//! ```

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{
    codec::{Codecs, Kind},
    data::Patch,
    degrade::KernelWeights,
    stages::{Blur, Jpeg, Noise, Stage},
};
use crate::{Error, Result};

/// Weighted recipes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Damage {
    #[serde(rename = "recipe")]
    pub recipes: Vec<Recipe>,
}

/// Stages in their order. Exactly one of them brings the picture to the low resolution; a codec comes after it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub name: String,
    /// How often it is drawn; weights need not sum to 1.
    pub weight: f64,
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

/// The names of [`Damage::preset`].
pub const PRESETS: [&str; 4] = ["streaming", "clean", "real-world", "stills"];

impl Damage {
    /// The damage of this name in [`PRESETS`].
    pub fn preset(name: &str) -> Option<Self> {
        match name {
            "streaming" => Some(Self::streaming()),
            "clean" => Some(Self::clean()),
            "real-world" => Some(Self::real_world()),
            "stills" => Some(Self::stills()),
            _ => None,
        }
    }

    /// What streams look like: half of the pictures are frames of compressed clips.
    pub fn streaming() -> Self {
        let (blur, noise) = (Stage::Blur(some_blur(0.1)), Stage::Noise(some_noise(0.1)));
        let shrink = Stage::Shrink(KernelWeights::default());
        Self {
            recipes: vec![
                Recipe {
                    name: "codec".into(),
                    weight: 0.5,
                    stages: vec![
                        blur.clone(),
                        shrink.clone(),
                        noise.clone(),
                        Stage::Codec(Codecs::default()),
                    ],
                },
                Recipe {
                    name: "clean".into(),
                    weight: 0.25,
                    stages: vec![shrink.clone()],
                },
                Recipe {
                    name: "jpeg".into(),
                    weight: 0.2,
                    stages: vec![blur, shrink, noise, Stage::Jpeg(Jpeg::default())],
                },
                Recipe {
                    weight: 0.05,
                    ..real_world()
                },
            ],
        }
    }

    /// Downscaling alone, by any of the kernels.
    pub fn clean() -> Self {
        Self {
            recipes: vec![Recipe {
                name: "clean".into(),
                weight: 1.0,
                stages: vec![Stage::Shrink(KernelWeights::default())],
            }],
        }
    }

    /// Two rounds of everything.
    pub fn real_world() -> Self {
        Self {
            recipes: vec![real_world()],
        }
    }

    /// Pictures without codecs: a third JPEG, a few softly blurred or lightly noisy.
    pub fn stills() -> Self {
        Self {
            recipes: vec![Recipe {
                name: "stills".into(),
                weight: 1.0,
                stages: vec![
                    Stage::Blur(some_blur(0.05)),
                    Stage::Shrink(KernelWeights::default()),
                    Stage::Noise(some_noise(0.1)),
                    Stage::Jpeg(Jpeg {
                        chance: 0.35,
                        ..Jpeg::default()
                    }),
                ],
            }],
        }
    }

    /// Reads recipes and checks them.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the line or the recipe, stage and value at fault.
    pub fn from_toml(text: &str) -> Result<Self> {
        let damage: Self =
            toml::from_str(text).map_err(|e| Error::Setting(e.to_string().trim_end().into()))?;
        damage.check()?;
        Ok(damage)
    }

    /// As a TOML file.
    pub fn to_toml(&self) -> String {
        // Tables of numbers and names alone have no way to fail.
        toml::to_string(self).unwrap_or_default()
    }

    /// # Errors
    /// [`Error::Setting`] that names the recipe, stage and value at fault.
    pub fn check(&self) -> Result<()> {
        let sum: f64 = self.recipes.iter().map(|r| r.weight).sum();
        if self
            .recipes
            .iter()
            .any(|r| r.weight.is_nan() || r.weight < 0.0)
            || !(sum > 0.0 && sum.is_finite())
        {
            let text = "the recipes' weights are not negative and not all zero";
            return Err(Error::Setting(text.into()));
        }
        self.recipes.iter().try_for_each(Recipe::check)
    }

    /// The recipes with a codec in them.
    pub fn coded(&self) -> impl Iterator<Item = &Recipe> {
        self.recipes
            .iter()
            .filter(|r| r.weight > 0.0 && r.codecs().is_some())
    }

    /// The codecs that are drawn at all.
    pub fn kinds(&self) -> Vec<Kind> {
        let drawn = |kind: &Kind| {
            let mut codecs = self.coded().filter_map(Recipe::codecs);
            codecs.any(|c| c.weight(*kind) > 0.0)
        };
        Kind::ALL.into_iter().filter(drawn).collect()
    }

    /// The same without some codecs; recipes that have none left go, too. The rest is drawn the more often.
    pub fn without(&self, missing: &[Kind]) -> Self {
        let reduce = |recipe: &Recipe| {
            let mut recipe = recipe.clone();
            for stage in &mut recipe.stages {
                if let Stage::Codec(codecs) = stage {
                    *codecs = missing.iter().fold(codecs.clone(), |c, k| c.without(*k));
                    codecs.check().ok()?;
                }
            }
            Some(recipe)
        };
        Self {
            recipes: self.recipes.iter().filter_map(reduce).collect(),
        }
    }

    /// A recipe, drawn by the weights.
    pub fn draw<R: Rng + ?Sized>(&self, rng: &mut R) -> Option<&Recipe> {
        draw(self.recipes.iter(), rng)
    }
}

/// One of `recipes`, by its weight.
pub(super) fn draw<'a, R: Rng + ?Sized>(
    recipes: impl Iterator<Item = &'a Recipe> + Clone,
    rng: &mut R,
) -> Option<&'a Recipe> {
    let mut left = rng.random::<f64>() * recipes.clone().map(|r| r.weight).sum::<f64>();
    let mut drawn = None;
    for recipe in recipes.filter(|r| r.weight > 0.0) {
        if left < 0.0 && drawn.is_some() {
            break;
        }
        drawn = Some(recipe);
        left -= recipe.weight;
    }
    drawn
}

fn some_blur(chance: f64) -> Blur {
    Blur {
        chance,
        ..Blur::default()
    }
}

fn some_noise(chance: f64) -> Noise {
    Noise {
        chance,
        ..Noise::default()
    }
}

fn real_world() -> Recipe {
    Recipe {
        name: "real-world".into(),
        weight: 1.0,
        stages: vec![Stage::RealWorld(Box::default())],
    }
}

impl Recipe {
    /// Its codecs, if there are any in it.
    pub fn codecs(&self) -> Option<&Codecs> {
        self.stages.iter().find_map(|stage| match stage {
            Stage::Codec(codecs) => Some(codecs),
            _ => None,
        })
    }

    fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("recipe '{}': {text}", self.name)));
        for (stage, i) in self.stages.iter().zip(1..) {
            if let Err(e) = stage.check() {
                return wrong(format!("stage {i} ({}): {e}", stage.name()));
            }
        }
        let shrinks = self.stages.iter().filter(|s| s.shrinks()).count();
        if shrinks != 1 {
            return wrong(format!(
                "needs one stage that shrinks ('shrink' or 'real_world'), has {shrinks}"
            ));
        }
        let first = |wanted: fn(&Stage) -> bool| self.stages.iter().position(wanted);
        if let Some(codec) = first(|s| matches!(s, Stage::Codec(_))) {
            if first(|s| matches!(s, Stage::RealWorld(_))).is_some() {
                return wrong(
                    "'real_world' is for single pictures, 'codec' for clips: use one".into(),
                );
            }
            if first(Stage::shrinks).is_some_and(|shrink| codec < shrink) {
                return wrong("'codec' comes after 'shrink'".into());
            }
        }
        Ok(())
    }

    /// Damages the frames of `clip`, all of one size, to `width` x `height` pixels. The results hold 8-bit values
    /// (multiples of 1/255) and depend on the clip and `rng` alone.
    ///
    /// # Errors
    /// When a side is 0 or more than a stage's format can hold, or GStreamer lacks the codec.
    pub fn apply<R: Rng + ?Sized>(
        &self,
        clip: Vec<Patch>,
        (width, height): (usize, usize),
        rng: &mut R,
    ) -> Result<Vec<Patch>> {
        let mut clip = clip;
        for stage in &self.stages {
            clip = stage.apply(clip, (width, height), rng)?;
        }
        let rounded = |p: &Patch| Patch::from_rgb8(p.width, p.height, &p.to_rgb8());
        Ok(clip.iter().map(rounded).collect())
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn presets_are_named_hold_and_come_back_from_toml() {
        for name in PRESETS {
            let preset = Damage::preset(name).unwrap();
            preset.check().unwrap();
            assert_eq!(
                Damage::from_toml(&preset.to_toml()).unwrap(),
                preset,
                "{name}"
            );
        }
        assert!(Damage::preset("cinema").is_none());
    }

    #[test]
    fn faults_are_named_by_recipe_stage_and_value() {
        let fault = |stages: &str| {
            let head = "[[recipe]]\nname = 'mine'\nweight = 1\n";
            let text = stages.replace('#', "[[recipe.stage]]\nkind =");
            Damage::from_toml(&format!("{head}{text}"))
                .unwrap_err()
                .to_string()
        };
        for (stages, words) in [
            (
                "# 'shrink'\n# 'jpeg'\nquality = [90, 30]",
                ["mine", "stage 2 (jpeg)", "quality = 90..30"],
            ),
            (
                "# 'shrink'\n# 'codec'\ncrf = [10, 60]",
                ["mine", "stage 2 (codec)", "crf = 10..60"],
            ),
            (
                "# 'blur'\nchance = 1.5\n# 'shrink'",
                ["mine", "stage 1 (blur)", "chance = 1.5"],
            ),
            (
                "# 'shrink'\narea = -1",
                ["mine", "stage 1 (shrink)", "weights"],
            ),
            ("# 'jpeg'", ["mine", "shrinks", "has 0"]),
            ("# 'shrink'\n# 'real_world'", ["mine", "shrinks", "has 2"]),
            ("# 'codec'\n# 'shrink'", ["mine", "'codec' comes after", ""]),
            ("# 'real_world'\n# 'codec'", ["mine", "use one", ""]),
            (
                "# 'shrink'\n# 'noise'\nsigmas = [1, 2]",
                ["sigmas", "line", ""],
            ),
            ("# 'melt'", ["melt", "shrink", "line"]),
        ] {
            let text = fault(stages);
            assert!(words.iter().all(|w| text.contains(w)), "{stages}: {text}");
        }
        let none = Damage::from_toml("recipe = []").unwrap_err().to_string();
        assert!(none.contains("weights"), "{none}");
    }

    #[test]
    fn recipes_are_drawn_by_their_weights() {
        let damage = Damage::streaming();
        let mut rng = SmallRng::seed_from_u64(1);
        let mut drawn = [0; 4];
        for _ in 0..2000 {
            let recipe = damage.draw(&mut rng).unwrap();
            let at = damage.recipes.iter().position(|r| r.name == recipe.name);
            drawn[at.unwrap()] += 1;
        }
        for (n, share) in drawn.into_iter().zip([0.5, 0.25, 0.2, 0.05]) {
            assert!((f64::from(n) / 2000.0 - share).abs() < 0.04, "{drawn:?}");
        }
    }

    #[test]
    fn without_a_codec_its_recipes_go_and_the_others_stay() {
        let damage = Damage::streaming();
        assert_eq!(damage.kinds(), Kind::ALL);
        let some = damage.without(&[Kind::Av1, Kind::H264]);
        assert_eq!(
            (some.recipes.len(), some.kinds()),
            (4, vec![Kind::H265, Kind::Vp9])
        );
        let none = damage.without(&Kind::ALL);
        assert!(none.recipes.len() == 3 && none.kinds().is_empty());
        none.check().unwrap();
    }

    #[test]
    fn a_preset_without_codecs_damages_as_its_seed_says_to_8_bit_values() {
        let mut patch = Patch::new(40, 40);
        let values = patch.rgb.iter_mut().enumerate();
        values.for_each(|(i, v)| *v = (i * 31 % 97) as f32 / 97.0);
        for name in ["stills", "clean", "real-world"] {
            let recipe = &Damage::preset(name).unwrap().recipes[0];
            let damaged = |seed| {
                let mut rng = SmallRng::seed_from_u64(seed);
                let clip = recipe
                    .apply(vec![patch.clone()], (20, 10), &mut rng)
                    .unwrap();
                clip.into_iter().next().unwrap()
            };
            let low = damaged(1);
            assert_eq!((low.width, low.height), (20, 10));
            assert_eq!(low, damaged(1));
            let whole = |v: &f32| (v * 255.0 - (v * 255.0).round()).abs() < 1e-3;
            assert!(low.rgb.iter().all(whole), "{name}");
        }
    }
}
