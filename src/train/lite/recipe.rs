//! Recipe of a model of the lite family.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Table;

use super::{student, teacher};
use crate::{
    Error, Result,
    nn::lite::{Architecture, Conditioning, LatentKind, StudentConfig},
    train::{
        data::spec::CorpusSpec,
        toml_file::{read_table, take, take_section, wrong},
    },
};

/// All that determines the result of a run of the lite family.
///
/// In a TOML file each of `data`, `teacher` and `student` is a table, or the name of a file with
/// that table beside the recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Name of the model.
    pub name: String,
    pub size: Size,
    /// Largest scale that the model serves, above 1 up to 4.
    pub scale: f64,
    /// Lowest scale that the model serves, from 1 to below `scale`; `None` for that of the size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lowest: Option<f64>,
    /// Shape of the student instead of that of the size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    /// Model that the student begins with: a model file, the checkpoint of another run, or the name
    /// of a bundled model; `None` for random weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begin: Option<String>,
    /// Inputs of the student's weights besides the scale.
    #[serde(skip_serializing_if = "Conditioning::is_none")]
    pub conditioning: Conditioning,
    /// Channels of the student's memory, see [`StudentConfig::memory`]; 0 for none.
    #[serde(skip_serializing_if = "is_zero")]
    pub memory: usize,
    pub data: CorpusSpec,
    /// `None` for supervision alone.
    pub teacher: Option<teacher::Options>,
    pub student: student::Options,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// Standard shape of a student.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// For any CPU: 10 k parameters for scales up to 2, 46 k above.
    #[default]
    Tiny,
    /// For CPUs with time to spare: 76 k parameters for scales up to 2, 159 k above.
    Small,
    /// For GPUs and large CPUs: 0.4 M parameters.
    Base,
}

/// Shape of a student, see [`StudentConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    pub architecture: Architecture,
    #[serde(default = "luma")]
    pub latent: LatentKind,
    pub r: usize,
    pub channels: usize,
    pub depth: usize,
}

fn luma() -> LatentKind {
    LatentKind::Luma
}

impl From<StudentConfig> for Shape {
    fn from(student: StudentConfig) -> Self {
        Self {
            architecture: student.architecture,
            latent: student.latent,
            r: student.r,
            channels: student.channels,
            depth: student.depth,
        }
    }
}

impl Size {
    /// Returns the student for scales up to `scale` and the lowest scale that it serves.
    ///
    /// # Errors
    /// [`Error::Setting`] for a scale that is out of range.
    pub fn student(self, scale: f64) -> Result<(StudentConfig, f64)> {
        if !(1.0 < scale && scale <= 4.0) {
            return Err(Error::Setting(format!("scale = {scale}: above 1, up to 4")));
        }
        let (r, lowest) = if scale <= 2.0 { (2, 1.0) } else { (4, 2.0) };
        let student = match self {
            Self::Tiny => StudentConfig::tiny(r),
            Self::Small => StudentConfig::small(r),
            Self::Base => StudentConfig::base(r),
        };
        Ok((student, lowest))
    }
}

/// Returns the range of scales that a model for scales from `low` to `high` is trained at. Near
/// scale 1 there is nothing to learn.
pub fn train_scales(low: f64, high: f64) -> [f64; 2] {
    [low + (high - low).min(0.25), high]
}

impl Recipe {
    /// Recipe of a supervised student of a standard size, with the default options. It needs
    /// training data in [`Recipe::data`].
    pub fn new(name: &str, size: Size, scale: f64) -> Self {
        Self {
            name: name.into(),
            size,
            scale,
            lowest: None,
            shape: None,
            begin: None,
            conditioning: Conditioning::default(),
            memory: 0,
            data: CorpusSpec::default(),
            teacher: None,
            student: student::Options {
                distillation: student::Distillation::none(),
                ..student::Options::default()
            },
        }
    }

    /// Reads the recipe at `path` and the files that it names.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read; [`Error::Setting`] that names the file, the
    /// key or line, and the range of a value.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_table(read_table(path)?, path)
    }

    /// As [`Self::read`], for the `table` of the file at `path`.
    pub(in crate::train) fn from_table(mut table: Table, path: &Path) -> Result<Self> {
        let missing = |what: &str| wrong(path, format!("no {what}"));
        let table = &mut table;
        let mut recipe = Self {
            name: take(table, "name", path)?.ok_or_else(|| missing("name"))?,
            size: take(table, "size", path)?.ok_or_else(|| missing("size: tiny, small or base"))?,
            scale: take(table, "scale", path)?.ok_or_else(|| missing("scale: above 1, up to 4"))?,
            lowest: take(table, "lowest", path)?,
            shape: take(table, "shape", path)?,
            begin: take(table, "begin", path)?,
            conditioning: take(table, "conditioning", path)?.unwrap_or_default(),
            memory: take(table, "memory", path)?.unwrap_or_default(),
            data: take_section(table, "data", path)?.ok_or_else(|| missing("data"))?,
            teacher: take_section(table, "teacher", path)?,
            student: take_section(table, "student", path)?.unwrap_or_default(),
        };
        if let Some((name, _)) = table.iter().next() {
            return Err(wrong(
                path,
                format!(
                    "'{name}' is none of name, size, scale, lowest, shape, begin, conditioning, \
                     memory, data, teacher, student"
                ),
            ));
        }
        if recipe.teacher.is_none() && !recipe.student.distillation.pixels {
            recipe.student.distillation = student::Distillation::none();
        }
        recipe.check().map_err(|e| wrong(path, e))?;
        recipe.resolve(path.parent().unwrap_or(Path::new("")));
        Ok(recipe)
    }

    /// Makes paths relative to `folder`.
    fn resolve(&mut self, folder: &Path) {
        for path in self.paths() {
            *path = folder.join(&path);
        }
        for model in self.models() {
            let file = folder.join(&model);
            if file.is_file() {
                *model = file.to_string_lossy().into_owned();
            }
        }
    }

    /// Makes paths absolute, so that the recipe can stand in any folder.
    ///
    /// # Errors
    /// [`Error::Io`] when the working directory cannot be read.
    pub(super) fn make_absolute(&mut self) -> Result<()> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(Error::io(path));
        for path in self.paths() {
            *path = absolute(path)?;
        }
        for model in self.models() {
            if Path::new(model).is_file() {
                *model = absolute(Path::new(model))?.to_string_lossy().into_owned();
            }
        }
        Ok(())
    }

    /// All names of models, which may be paths.
    fn models(&mut self) -> impl Iterator<Item = &mut String> {
        let origin = self.teacher.iter_mut().flat_map(|t| &mut t.origin);
        self.begin.iter_mut().chain(origin)
    }

    /// All folders of the data.
    fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let data = &mut self.data;
        let pairs = data.pairs.iter_mut().flatten();
        data.dirs.iter_mut().chain(pairs).chain(&mut data.cache)
    }

    /// Checks all values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the value that is out of range.
    pub fn check(&self) -> Result<()> {
        let (StudentConfig { latent, r, .. }, _) = self.student_and_lowest()?;
        self.student.check()?;
        let (frames, most) = (self.student.frames, self.data.pool.frames);
        if self.memory > 0 && frames > most {
            return Err(Error::Setting(format!(
                "student: frames = {frames}: at most the {most} frames of the pool's clips"
            )));
        }
        if self.memory > 0 && self.data.pairs.is_some() {
            return Err(Error::Setting(
                "memory needs clips of videos or photos: matched pairs have none".into(),
            ));
        }
        if let Some(teacher) = &self.teacher {
            teacher.check()?;
            let multiple = teacher.config(latent, r)?.multiple();
            teacher.patch_side(r, multiple)?;
            self.student.patch_side(r, multiple)?;
            let steps = teacher.diffusion.steps;
            self.student.distillation.check_times(steps)?;
        } else {
            self.student.patch_side(r, 1)?;
        }
        let data = self.data.check();
        data.map_err(|e| Error::Setting(format!("data: {e}")))
    }

    /// Returns the student and the lowest scale that it serves.
    ///
    /// # Errors
    /// [`Error::Setting`] for a scale or shape that is out of range.
    pub fn student_and_lowest(&self) -> Result<(StudentConfig, f64)> {
        let (mut student, lowest) = self.size.student(self.scale)?;
        if let Some(shape) = self.shape {
            student = StudentConfig {
                architecture: shape.architecture,
                latent: shape.latent,
                r: shape.r,
                channels: shape.channels,
                depth: shape.depth,
                conditioning: Conditioning::default(),
                memory: 0,
            };
            let checked = student.check();
            checked.map_err(|e| Error::Setting(format!("shape: {e}")))?;
        }
        student.conditioning = self.conditioning;
        student.memory = self.memory;
        student.check().map_err(Error::Setting)?;
        let lowest = self.lowest.unwrap_or(lowest);
        if !(1.0 <= lowest && lowest < self.scale) {
            return Err(Error::Setting(format!(
                "lowest = {lowest}: at least 1 and below the scale, {}",
                self.scale
            )));
        }
        Ok((student, lowest))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    fn recipe(text: &str) -> Result<Recipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        fs::write(&path, text).unwrap();
        fs::write(dir.path().join("t.toml"), "steps = 7\nblocks = 1\n").unwrap();
        Recipe::read(&path)
    }

    const HEAD: &str = "name = 'a'\nsize = 'tiny'\nscale = 4.0\n";

    #[test]
    fn sections_are_in_the_recipe_or_in_files_beside_it() {
        let text = format!(
            "{HEAD}teacher = 't.toml'\n[data]\ndirs = ['/photos']\ncache = 'clips'\n\
             [student]\nsteps = 9\n[student.distillation]\nscore = 0.0\n"
        );
        let read = recipe(&text).unwrap();
        assert_eq!(read.teacher.unwrap().steps, 7);
        assert_eq!(read.student.steps, 9);
        assert_eq!(read.student.distillation.score, 0.0);
        assert_eq!(read.student.distillation.adversarial, 0.3);
        assert_eq!(read.data.dirs, [PathBuf::from("/photos")]);
        assert!(read.data.cache.unwrap().is_absolute(), "beside the recipe");
        // Without a teacher there is supervision only.
        let alone = recipe(&format!("{HEAD}[data]\n")).unwrap();
        assert_eq!(alone.student.distillation, student::Distillation::none());
    }

    #[test]
    fn a_model_may_serve_fewer_scales_than_its_size() {
        let lowest = |text: &str| {
            let (_, lowest) = recipe(&format!("{HEAD}{text}[data]\n"))?.student_and_lowest()?;
            Ok::<_, Error>(lowest)
        };
        assert_eq!(lowest("").unwrap(), 2.0);
        assert_eq!(lowest("lowest = 3.0\n").unwrap(), 3.0);
        for none in ["0.5", "4.0", "nan"] {
            let fault = lowest(&format!("lowest = {none}\n")).unwrap_err();
            assert!(fault.to_string().contains("lowest"), "{fault}");
        }
    }

    #[test]
    fn mistakes_are_named_with_their_file() {
        let fault = |text: &str| recipe(text).unwrap_err().to_string();
        assert!(fault("name = 'a'\nsize = 'tiny'\n[data]\n").contains("scale"));
        assert!(fault(&format!("{HEAD}colour = 1\n[data]\n")).contains("colour"));
        let nested = fault(&format!("{HEAD}[data]\n[student]\nstep = 1\n"));
        assert!(
            nested.contains("student") && nested.contains("step"),
            "{nested}"
        );
        let file = fault(&format!("{HEAD}teacher = 'none.toml'\n[data]\n"));
        assert!(file.contains("none.toml"), "{file}");
        for (wrong, word) in [
            ("widths = [17]", "width 17"),
            ("blocks = 0", "blocks"),
            ("patch = 30", "patch = 30"),
        ] {
            let teacher = fault(&format!("{HEAD}[data]\n[teacher]\n{wrong}\n"));
            let named = teacher.contains("recipe.toml") && teacher.contains("teacher");
            assert!(named && teacher.contains(word), "{teacher}");
        }
        let scale = fault("name = 'a'\nsize = 'tiny'\nscale = 8.0\n[data]\n");
        assert!(scale.contains('8'), "{scale}");
    }
}
