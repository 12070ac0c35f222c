//! Degradation recipes: lists of stages, as in a TOML file.
//!
//! A file holds recipes. One is sampled for each image by its weight, and its stages apply in their
//! order:
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
    filters::KernelWeights,
    stages::{Blur, Jpeg, Noise, Stage},
};
use crate::{Error, Result, frame::resample::Kernel, train::patch::Patch};

/// Weighted degradation recipes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Degradation {
    #[serde(rename = "recipe")]
    pub recipes: Vec<DegradationRecipe>,
}

/// List of stages. Exactly one of them shrinks to the low resolution; a codec comes after it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DegradationRecipe {
    pub name: String,
    /// Weight of the recipe; weights need not sum to 1.
    pub weight: f64,
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

/// Degraded frames of low resolution.
#[derive(Clone, Debug, PartialEq)]
pub struct Degraded {
    pub frames: Vec<Patch>,
    /// Mean square of the change in luma by the stages after the one that shrinks, in squared 8-bit
    /// steps. For `real_world` it is the difference to plain shrinking.
    pub noise: f64,
}

/// Names of the presets of [`Degradation::preset`].
pub const PRESETS: [&str; 4] = ["streaming", "clean", "real-world", "stills"];

impl Degradation {
    /// Returns the preset of this name in [`PRESETS`].
    pub fn preset(name: &str) -> Option<Self> {
        match name {
            "streaming" => Some(Self::streaming()),
            "clean" => Some(Self::clean()),
            "real-world" => Some(Self::real_world()),
            "stills" => Some(Self::stills()),
            _ => None,
        }
    }

    /// Degradation of streams: more than half of the images are clean, more than a quarter frames of
    /// compressed clips.
    pub fn streaming() -> Self {
        let (blur, noise) = (Stage::Blur(some_blur(0.1)), Stage::Noise(some_noise(0.1)));
        let shrink = Stage::Shrink(KernelWeights::default());
        Self {
            recipes: vec![
                DegradationRecipe {
                    name: "codec".into(),
                    weight: 0.5,
                    stages: vec![
                        blur.clone(),
                        shrink.clone(),
                        noise.clone(),
                        Stage::Codec(Codecs::default()),
                    ],
                },
                DegradationRecipe {
                    name: "clean".into(),
                    weight: 1.0,
                    stages: vec![shrink.clone()],
                },
                DegradationRecipe {
                    name: "jpeg".into(),
                    weight: 0.2,
                    stages: vec![blur, shrink, noise, Stage::Jpeg(Jpeg::default())],
                },
                DegradationRecipe {
                    weight: 0.05,
                    ..DegradationRecipe::real_world()
                },
            ],
        }
    }

    /// [`DegradationRecipe::clean`].
    pub fn clean() -> Self {
        Self {
            recipes: vec![DegradationRecipe::clean()],
        }
    }

    /// [`DegradationRecipe::real_world`].
    pub fn real_world() -> Self {
        Self {
            recipes: vec![DegradationRecipe::real_world()],
        }
    }

    /// [`DegradationRecipe::stills`].
    pub fn stills() -> Self {
        Self {
            recipes: vec![DegradationRecipe::stills()],
        }
    }

    /// Reads recipes and checks them.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the line or the recipe, stage and value at fault.
    pub fn from_toml(text: &str) -> Result<Self> {
        let degradation: Self =
            toml::from_str(text).map_err(|e| Error::Setting(e.to_string().trim_end().into()))?;
        degradation.check()?;
        Ok(degradation)
    }

    /// Returns the recipes as a TOML file.
    pub fn to_toml(&self) -> String {
        // Tables of numbers and names cannot fail.
        toml::to_string(self).unwrap_or_default()
    }

    /// Checks the values.
    ///
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
        self.recipes.iter().try_for_each(DegradationRecipe::check)
    }

    /// Returns the recipes with a codec.
    pub fn coded(&self) -> impl Iterator<Item = &DegradationRecipe> {
        self.recipes
            .iter()
            .filter(|r| r.weight > 0.0 && r.codecs().is_some())
    }

    /// Returns the codecs with a weight above 0.
    pub fn kinds(&self) -> Vec<Kind> {
        let sampled = |kind: &Kind| {
            let mut codecs = self.coded().filter_map(DegradationRecipe::codecs);
            codecs.any(|c| c.weight(*kind) > 0.0)
        };
        Kind::ALL.into_iter().filter(sampled).collect()
    }

    /// Returns the recipes without `missing` codecs. Recipes that have no codec left are removed.
    pub fn without(&self, missing: &[Kind]) -> Self {
        let reduce = |recipe: &DegradationRecipe| {
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

    /// Samples a recipe by the weights.
    pub fn sample<R: Rng + ?Sized>(&self, rng: &mut R) -> Option<&DegradationRecipe> {
        sample(self.recipes.iter(), rng)
    }
}

/// Samples one of `recipes` by its weight.
pub(super) fn sample<'a, R: Rng + ?Sized>(
    recipes: impl Iterator<Item = &'a DegradationRecipe> + Clone,
    rng: &mut R,
) -> Option<&'a DegradationRecipe> {
    let mut left = rng.random::<f64>() * recipes.clone().map(|r| r.weight).sum::<f64>();
    let mut sampled = None;
    for recipe in recipes.filter(|r| r.weight > 0.0) {
        if left < 0.0 && sampled.is_some() {
            break;
        }
        sampled = Some(recipe);
        left -= recipe.weight;
    }
    sampled
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

impl DegradationRecipe {
    fn new(name: &str, stages: Vec<Stage>) -> Self {
        Self {
            name: name.into(),
            weight: 1.0,
            stages,
        }
    }

    /// Shrinking only, by a random kernel.
    pub fn clean() -> Self {
        Self::new("clean", vec![Stage::Shrink(KernelWeights::default())])
    }

    /// Two rounds of blur, resizing, noise and JPEG.
    pub fn real_world() -> Self {
        Self::new("real-world", vec![Stage::RealWorld(Box::default())])
    }

    /// Degradation of still images on the web: a third JPEG, a few slightly blurred or noisy.
    pub fn stills() -> Self {
        let jpeg = Jpeg {
            chance: 0.35,
            ..Jpeg::default()
        };
        let stages = vec![
            Stage::Blur(some_blur(0.05)),
            Stage::Shrink(KernelWeights::default()),
            Stage::Noise(some_noise(0.1)),
            Stage::Jpeg(jpeg),
        ];
        Self::new("stills", stages)
    }

    /// Recipe for evaluation: antialiased Catmull-Rom shrinking only, without random numbers.
    pub fn fixed() -> Self {
        Self::new("fixed", vec![Stage::Shrink(KernelWeights::catmull_rom())])
    }

    /// Recipe for evaluation: [`Self::fixed`], then JPEG of `quality`, without random numbers.
    pub fn jpeg(quality: u8) -> Self {
        let jpeg = Jpeg {
            quality: (quality, quality),
            shift: 0.0,
            ..Jpeg::default()
        };
        let mut recipe = Self::fixed();
        recipe.stages.push(Stage::Jpeg(jpeg));
        recipe
    }

    /// Returns the codecs of the recipe, if it has any.
    pub fn codecs(&self) -> Option<&Codecs> {
        self.stages.iter().find_map(|stage| match stage {
            Stage::Codec(codecs) => Some(codecs),
            _ => None,
        })
    }

    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the stage and value at fault.
    pub fn check(&self) -> Result<()> {
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

    /// Degrades the frames of `clip`, all of one size, to `width` x `height` pixels. The results
    /// hold 8-bit values (multiples of 1/255) and depend on the clip and `rng` only.
    ///
    /// # Errors
    /// When a side is 0 or above the limit of a stage, or GStreamer lacks the codec.
    pub fn apply<R: Rng + ?Sized>(
        &self,
        clip: Vec<Patch>,
        (width, height): (usize, usize),
        rng: &mut R,
    ) -> Result<Degraded> {
        let mut clip = clip;
        let mut clean = Vec::new();
        for stage in &self.stages {
            if let Stage::RealWorld(_) = stage {
                let kernel = Kernel::CatmullRom;
                let shrink = |p: &Patch| p.clone().resize(width, height, kernel);
                clean = clip.iter().map(shrink).collect::<Result<_>>()?;
            }
            clip = stage.apply(clip, (width, height), rng)?;
            if let Stage::Shrink(_) = stage {
                clean = clip.clone();
            }
        }
        let rounded = |p: &Patch| Patch::from_rgb8(p.width, p.height, &p.to_rgb8());
        let frames: Vec<_> = clip.iter().map(rounded).collect();
        let clean: Vec<_> = clean.iter().map(rounded).collect();
        let squares = frames.iter().zip(&clean).map(|(a, b)| a.luma_difference(b));
        Ok(Degraded {
            noise: squares.sum::<f64>() / frames.len().max(1) as f64,
            frames,
        })
    }

    /// As [`Self::apply`], for one image. Returns also [`Degraded::noise`].
    ///
    /// # Errors
    /// As there.
    pub fn picture<R: Rng + ?Sized>(
        &self,
        picture: &Patch,
        small: (usize, usize),
        rng: &mut R,
    ) -> Result<(Patch, f64)> {
        let mut degraded = self.apply(vec![picture.clone()], small, rng)?;
        let lost = || Error::Data(format!("recipe '{}' has lost the picture", self.name));
        let picture = degraded.frames.pop().ok_or_else(lost)?;
        Ok((picture, degraded.noise))
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::train::degradation::stages::tests::scene;

    #[test]
    fn presets_are_named_hold_and_come_back_from_toml() {
        for name in PRESETS {
            let preset = Degradation::preset(name).unwrap();
            preset.check().unwrap();
            assert_eq!(
                Degradation::from_toml(&preset.to_toml()).unwrap(),
                preset,
                "{name}"
            );
        }
        assert!(Degradation::preset("cinema").is_none());
    }

    #[test]
    fn mistakes_are_named_by_recipe_stage_and_value() {
        let fault = |stages: &str| {
            let head = "[[recipe]]\nname = 'mine'\nweight = 1\n";
            let text = stages.replace('#', "[[recipe.stage]]\nkind =");
            Degradation::from_toml(&format!("{head}{text}"))
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
        let none = Degradation::from_toml("recipe = []")
            .unwrap_err()
            .to_string();
        assert!(none.contains("weights"), "{none}");
    }

    #[test]
    fn noise_measures_compression_and_not_shrinking() {
        let scene = scene(96, 96);
        let noise = |recipe: &DegradationRecipe| {
            let mut rng = SmallRng::seed_from_u64(1);
            recipe.picture(&scene, (48, 48), &mut rng).unwrap().1
        };
        assert_eq!(noise(&DegradationRecipe::fixed()), 0.0);
        let [weak, strong] = [90, 20].map(|quality| noise(&DegradationRecipe::jpeg(quality)));
        assert!(0.0 < weak && weak < strong, "{weak} {strong}");
        let sigma = Noise {
            sigma: (4.0, 4.0),
            shot: 0.0,
            grey: 1.0,
            ..Noise::default()
        };
        let mut grainy = DegradationRecipe::fixed();
        grainy.stages.push(Stage::Noise(sigma));
        let grain = noise(&grainy);
        assert!((grain - 16.0).abs() < 2.0, "{grain}");
    }

    #[test]
    fn recipes_are_sampled_by_their_weights() {
        let degradation = Degradation::streaming();
        let mut rng = SmallRng::seed_from_u64(1);
        let mut sampled = [0; 4];
        for _ in 0..2000 {
            let recipe = degradation.sample(&mut rng).unwrap();
            let at = degradation
                .recipes
                .iter()
                .position(|r| r.name == recipe.name);
            sampled[at.unwrap()] += 1;
        }
        for (n, share) in sampled.into_iter().zip([0.286, 0.571, 0.114, 0.029]) {
            assert!((f64::from(n) / 2000.0 - share).abs() < 0.04, "{sampled:?}");
        }
    }

    #[test]
    fn without_a_codec_its_recipes_are_removed_and_the_others_stay() {
        let degradation = Degradation::streaming();
        assert_eq!(degradation.kinds(), Kind::ALL);
        let some = degradation.without(&[Kind::Av1, Kind::H264]);
        assert_eq!(
            (some.recipes.len(), some.kinds()),
            (4, vec![Kind::H265, Kind::Vp9])
        );
        let none = degradation.without(&Kind::ALL);
        assert!(none.recipes.len() == 3 && none.kinds().is_empty());
        none.check().unwrap();
    }

    #[test]
    fn a_preset_without_codecs_depends_on_its_seed_and_returns_8_bit_values() {
        let mut patch = Patch::new(40, 40);
        let values = patch.rgb.iter_mut().enumerate();
        values.for_each(|(i, v)| *v = (i * 31 % 97) as f32 / 97.0);
        for name in ["stills", "clean", "real-world"] {
            let recipe = &Degradation::preset(name).unwrap().recipes[0];
            let degraded = |seed| {
                let mut rng = SmallRng::seed_from_u64(seed);
                recipe.picture(&patch, (20, 10), &mut rng).unwrap().0
            };
            let low = degraded(1);
            assert_eq!((low.width, low.height), (20, 10));
            assert_eq!(low, degraded(1));
            let whole = |v: &f32| (v * 255.0 - (v * 255.0).round()).abs() < 1e-3;
            assert!(low.rgb.iter().all(whole), "{name}");
        }
    }

    fn apply(recipe: &DegradationRecipe, hr: &Patch, w: usize, h: usize, seed: u64) -> Patch {
        recipe
            .picture(hr, (w, h), &mut SmallRng::seed_from_u64(seed))
            .unwrap()
            .0
    }

    fn distance(a: &Patch, b: &Patch) -> f32 {
        let sum: f32 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| (a - b).abs()).sum();
        sum / a.rgb.len() as f32
    }

    fn always() -> DegradationRecipe {
        let stages = vec![
            Stage::Blur(some_blur(1.0)),
            Stage::Shrink(KernelWeights::default()),
            Stage::Noise(some_noise(1.0)),
            Stage::Jpeg(Jpeg {
                shift: 1.0,
                ..Jpeg::default()
            }),
        ];
        DegradationRecipe::new("always", stages)
    }

    #[test]
    fn same_seed_gives_the_same_picture_and_another_seed_another() {
        let hr = scene(61, 47);
        let first = apply(&always(), &hr, 24, 20, 1);
        assert_eq!(first, apply(&always(), &hr, 24, 20, 1));
        assert_ne!(first, apply(&always(), &hr, 24, 20, 2));
    }

    #[test]
    fn results_have_the_asked_size_and_8_bit_values() {
        for (w, h) in [(24, 20), (61, 47), (17, 1), (1, 1)] {
            for seed in 0..8 {
                let lr = apply(&always(), &scene(61, 47), w, h, seed);
                assert_eq!((lr.width, lr.height, lr.rgb.len()), (w, h, 3 * w * h));
                for v in lr.rgb {
                    let step = v * 255.0;
                    assert!((0.0..=255.0).contains(&step) && (step - step.round()).abs() < 1e-3);
                }
            }
        }
    }

    #[test]
    fn evaluation_presets_do_not_depend_on_the_random_numbers() {
        let hr = scene(64, 64);
        for preset in [DegradationRecipe::fixed(), DegradationRecipe::jpeg(60)] {
            assert_eq!(
                apply(&preset, &hr, 32, 32, 1),
                apply(&preset, &hr, 32, 32, 99)
            );
        }
    }

    #[test]
    fn a_flat_picture_stays_flat_through_blur_and_downscale() {
        let mut hr = Patch::new(50, 40);
        hr.rgb.fill(100.0 / 255.0);
        let mut only_blur = DegradationRecipe::clean();
        only_blur.stages.insert(0, Stage::Blur(some_blur(1.0)));
        for seed in 0..16 {
            let lr = apply(&only_blur, &hr, 20, 25, seed);
            assert!(lr.rgb.iter().all(|v| (v * 255.0).round() == 100.0));
        }
    }

    #[test]
    fn lower_jpeg_quality_loses_more() {
        let hr = scene(64, 64);
        let clean = apply(&DegradationRecipe::fixed(), &hr, 64, 64, 0);
        let loss = |q| distance(&clean, &apply(&DegradationRecipe::jpeg(q), &hr, 64, 64, 0));
        assert!(
            loss(20) > loss(60) && loss(60) > loss(98),
            "{} {} {}",
            loss(20),
            loss(60),
            loss(98)
        );
        assert!(loss(98) < 0.01);
    }

    #[test]
    fn noise_has_the_strength_asked_for_and_shot_noise_spares_black() {
        let noisy = |shot: f64| {
            let mut recipe = DegradationRecipe::fixed();
            recipe.stages.push(Stage::Noise(Noise {
                chance: 1.0,
                sigma: (4.0, 4.0),
                shot,
                grey: 0.0,
            }));
            recipe
        };
        let mut grey = Patch::new(64, 64);
        grey.rgb.fill(0.5);
        let out = apply(&noisy(0.0), &grey, 64, 64, 3);
        let n = out.rgb.len() as f32;
        let mean = out.rgb.iter().sum::<f32>() / n;
        let variance = out.rgb.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        assert!((variance.sqrt() * 255.0 - 4.0).abs() < 0.2);
        let black = apply(&noisy(1.0), &Patch::new(64, 64), 64, 64, 3);
        assert!(black.rgb.iter().all(|&v| v == 0.0));
    }
}
