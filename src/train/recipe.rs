//! Recipes: what a run of all stages is made of, as TOML.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use toml::{Table, Value};

use super::{
    data::spec::CorpusSpec,
    lite::{student, teacher},
};
use crate::{
    Error, Result,
    nn::lite::{Architecture, Conditioning, LatentKind, StudentConfig},
};

/// A recipe. Each section is a table or the name of a TOML file with that table, beside the recipe's own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Name of the model.
    pub name: String,
    pub size: Size,
    /// Largest scale that the model serves, above 1 up to 4.
    pub scale: f64,
    /// Lowest scale that it serves, from 1 to below `scale`; None: that of its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lowest: Option<f64>,
    /// The student's shape instead of its size's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    /// Inputs of the student's weights besides the scale.
    #[serde(skip_serializing_if = "Conditioning::is_none")]
    pub conditioning: Conditioning,
    pub data: CorpusSpec,
    /// None: the student learns from the truth alone.
    pub teacher: Option<teacher::Options>,
    pub student: student::Options,
}

/// The kind of student.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// For any CPU: 10 k parameters up to twice the size, 46 k above.
    Tiny,
    /// For CPUs with time to spare: 76 k parameters up to twice the size, 159 k above.
    Small,
    /// For GPUs and large CPUs: 0.4 M parameters.
    Base,
}

/// A student's shape; see [`StudentConfig`].
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
    /// The student for scales up to `scale`, and the lowest scale that it serves.
    ///
    /// # Errors
    /// [`Error::Setting`] for a scale out of range.
    pub fn student(self, scale: f64) -> Result<(StudentConfig, f64)> {
        if !(1.0 < scale && scale <= 4.0) {
            return Err(Error::Setting(format!("scale {scale}: above 1, up to 4")));
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

/// The scales that a model from `low` to `high` is trained at: near 1 there is nothing to learn.
pub fn train_scales(low: f64, high: f64) -> [f64; 2] {
    [low + (high - low).min(0.25), high]
}

impl Recipe {
    /// Reads a recipe and the files that it names.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Setting`] that names the file and the fault.
    pub fn read(path: &Path) -> Result<Self> {
        let mut table = read_table(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let wrong = |text: String| Error::Setting(format!("'{}': {text}", path.display()));
        let mut recipe = Self {
            name: value(&mut table, "name", path)?.ok_or_else(|| wrong("no name".into()))?,
            size: value(&mut table, "size", path)?
                .ok_or_else(|| wrong("no size: tiny, small or base".into()))?,
            scale: value(&mut table, "scale", path)?
                .ok_or_else(|| wrong("no scale: above 1, up to 4".into()))?,
            lowest: value(&mut table, "lowest", path)?,
            shape: value(&mut table, "shape", path)?,
            conditioning: value(&mut table, "conditioning", path)?.unwrap_or_default(),
            data: section(&mut table, "data", path)?.ok_or_else(|| wrong("no data".into()))?,
            teacher: section(&mut table, "teacher", path)?,
            student: section(&mut table, "student", path)?.unwrap_or_default(),
        };
        if let Some((name, _)) = table.iter().next() {
            return Err(wrong(format!(
                "'{name}' is none of name, size, scale, lowest, shape, conditioning, data, teacher, student"
            )));
        }
        recipe
            .student_and_lowest()
            .map_err(|e| wrong(e.to_string()))?;
        if recipe.teacher.is_none() {
            recipe.student.distillation = student::Distillation::none();
        }
        recipe.check_stages().map_err(|e| wrong(e.to_string()))?;
        recipe
            .data
            .check()
            .map_err(|e| wrong(format!("data: {e}")))?;
        let pairs = recipe.data.pairs.iter_mut().flatten();
        for dir in recipe.data.dirs.iter_mut().chain(pairs) {
            *dir = folder.join(&dir);
        }
        if let Some(cache) = &mut recipe.data.cache {
            *cache = folder.join(&cache);
        }
        Ok(recipe)
    }

    fn check_stages(&self) -> Result<()> {
        self.student.check()?;
        let StudentConfig { latent, r, .. } = self.student_and_lowest()?.0;
        let Some(teacher) = &self.teacher else {
            return self.student.patch_side(r, 1).map(|_| ());
        };
        teacher.check()?;
        let multiple = teacher.config(latent, r)?.multiple();
        teacher.patch_side(r, multiple)?;
        self.student.patch_side(r, multiple)?;
        self.student
            .distillation
            .check_times(teacher.diffusion.steps)
    }

    /// The student and the lowest scale that it serves.
    ///
    /// # Errors
    /// [`Error::Setting`] for a scale out of range.
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
            };
            let checked = student.check();
            checked.map_err(|e| Error::Setting(format!("shape: {e}")))?;
        }
        if self.conditioning.detail {
            let text = "conditioning: detail is not trained yet, only denoise";
            return Err(Error::Setting(text.into()));
        }
        student.conditioning = self.conditioning;
        let lowest = self.lowest.unwrap_or(lowest);
        if !(1.0 <= lowest && lowest < self.scale) {
            return Err(Error::Setting(format!(
                "lowest {lowest}: at least 1 and below the scale, {}",
                self.scale
            )));
        }
        Ok((student, lowest))
    }
}

fn read_table(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let wrong = |e: toml::de::Error| Error::Setting(format!("'{}': {e}", path.display()));
    text.parse().map_err(wrong)
}

/// Takes the value `key` out of `table`.
fn value<T: DeserializeOwned>(table: &mut Table, key: &str, path: &Path) -> Result<Option<T>> {
    let wrong = |e: toml::de::Error| {
        let reason = e.to_string();
        Error::Setting(format!("'{}': {key}: {}", path.display(), reason.trim()))
    };
    let value = table.remove(key).map(T::deserialize);
    value.transpose().map_err(wrong)
}

/// Takes the section `key` out of `table`, from another file where it names one.
fn section<T: DeserializeOwned>(table: &mut Table, key: &str, path: &Path) -> Result<Option<T>> {
    match table.get(key) {
        Some(Value::String(name)) => {
            let file = path.with_file_name(name);
            let wrong = |e: toml::de::Error| {
                let reason = e.to_string();
                Error::Setting(format!("'{}': {}", file.display(), reason.trim()))
            };
            let read = T::deserialize(read_table(&file)?).map_err(wrong)?;
            table.remove(key);
            Ok(Some(read))
        }
        _ => value(table, key, path),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
    fn sections_stand_in_the_recipe_or_in_files_beside_it() {
        let text = format!(
            "{HEAD}teacher = 't.toml'\n[data]\ndirs = ['/photos']\ncache = 'clips'\n[student]\nsteps = 9\n[student.distillation]\nscore = 0.0\n"
        );
        let read = recipe(&text).unwrap();
        assert_eq!(read.teacher.unwrap().steps, 7);
        assert_eq!(read.student.steps, 9);
        assert_eq!(read.student.distillation.score, 0.0);
        assert_eq!(read.student.distillation.adversarial, 0.3);
        assert_eq!(read.data.dirs, [PathBuf::from("/photos")]);
        assert!(read.data.cache.unwrap().is_absolute(), "beside the recipe");
        // Without a teacher only the truth teaches.
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
    fn faults_are_named_with_their_file() {
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
