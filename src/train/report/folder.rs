//! Reports from the files in the folder of a run.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::{Curves, Report, SampleRow, versions};
use crate::{
    Error, Result, metrics,
    model::model_metadata,
    train::{checkpoint::write_atomically, data::decode},
};

/// Name of the report in the folder of a run.
pub const REPORT_FILE: &str = "report.html";

const SAMPLES: &str = "samples";
const INDEX: &str = "index.json";

/// Row in the index of the samples; the images are in files `ROW-COLUMN.png`.
#[derive(Serialize, Deserialize)]
struct Row {
    label: String,
    columns: Vec<String>,
}

/// Writes sample images into the folder `samples` of the run's folder `run`, where
/// [`Report::of_run`] finds them. They replace the images of the last checkpoint.
///
/// # Errors
/// [`Error::Io`], also for an image without pixels.
pub fn save_samples(run: &Path, rows: &[SampleRow]) -> Result<()> {
    let folder = run.join(SAMPLES);
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    for (i, row) in rows.iter().enumerate() {
        for (k, (_, image)) in row.images.iter().enumerate() {
            let mut png = std::io::Cursor::new(Vec::new());
            image
                .write_to(&mut png, image::ImageFormat::Png)
                .map_err(|e| Error::io(&picture(&folder, i, k))(io::Error::other(e)))?;
            write_atomically(&picture(&folder, i, k), png.get_ref())?;
        }
    }
    let index: Vec<Row> = rows
        .iter()
        .map(|row| Row {
            label: row.label.clone(),
            columns: row.images.iter().map(|(name, _)| name.clone()).collect(),
        })
        .collect();
    let text = serde_json::to_string_pretty(&index)
        .map_err(|e| Error::training(&folder, e.to_string()))?;
    // The index comes last, so it names only files that exist.
    write_atomically(&folder.join(INDEX), text.as_bytes())
}

/// Reads the samples of [`save_samples`], if there are any.
///
/// # Errors
/// [`Error::Training`] when the samples are damaged.
pub fn load_samples(run: &Path) -> Result<Vec<SampleRow>> {
    let folder = run.join(SAMPLES);
    let Some(text) = read_if(&folder.join(INDEX))? else {
        return Ok(Vec::new());
    };
    let damaged = |e: String| Error::training(&folder, format!("damaged samples ({e})"));
    let index: Vec<Row> = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    let read = |(i, row): (usize, Row)| {
        let images = row.columns.into_iter().enumerate().map(|(k, name)| {
            let image: RgbImage = decode(&picture(&folder, i, k)).map_err(damaged)?;
            Ok((name, image))
        });
        Ok(SampleRow {
            label: row.label,
            images: images.collect::<Result<_>>()?,
        })
    };
    index.into_iter().enumerate().map(read).collect()
}

fn picture(folder: &Path, row: usize, column: usize) -> PathBuf {
    folder.join(format!("{row}-{column}.png"))
}

impl Report {
    /// Makes the report of the run in `folder` from the files that exist: `losses.csv`,
    /// `recipe.toml` or the settings in `model.safetensors`, the samples of [`save_samples`], and
    /// `eval.json` of `tadsr-train eval`.
    ///
    /// # Errors
    /// [`Error::Training`] when there is neither a log nor a model, or a file is damaged;
    /// [`Error::Io`].
    pub fn of_run(folder: &Path) -> Result<Self> {
        let model = folder.join("model.safetensors");
        let log = folder.join("losses.csv");
        if !model.exists() && !log.exists() {
            let reason = "holds neither losses.csv nor model.safetensors: no run of this tool";
            return Err(Error::training(folder, reason));
        }
        let name = folder.canonicalize().unwrap_or_else(|_| folder.into());
        let name = name.file_name().map(|n| n.to_string_lossy().into_owned());
        let mut report = Self {
            title: name.unwrap_or_else(|| "training".into()),
            samples: load_samples(folder)?,
            versions: versions(),
            ..Self::default()
        };
        if log.exists() {
            report.curves = Curves::read(&log)?;
            if let Some(step) = report.curves.steps.last() {
                report.summary.push(format!("{step} steps logged"));
            }
        }
        if model.exists() {
            let metadata = model_metadata(&model)?;
            if let Some(name) = metadata["name"].as_str() {
                report.summary.push(format!("model '{name}'"));
            }
            let settings = match &metadata["training"] {
                serde_json::Value::Null => &metadata,
                training => training,
            };
            report.config = serde_json::to_string_pretty(settings)
                .map_err(|e| Error::training(&model, e.to_string()))?;
        }
        if let Some(recipe) = read_if(&folder.join("recipe.toml"))? {
            report.config = recipe;
        }
        let path = folder.join("eval.json");
        if let Some(text) = read_if(&path)? {
            let measured = metrics::Report::from_json(&text)
                .map_err(|e| Error::training(&path, format!("no evaluation ({e})")))?;
            report.evaluation = Some(measured);
        }
        Ok(report)
    }
}

/// Returns the text of the file at `path`, if it exists.
fn read_if(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_come_back_as_they_were_saved() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(load_samples(run.path()).unwrap(), []);
        let picture = |v: u8| RgbImage::from_pixel(3, 2, image::Rgb([v, 2, 3]));
        let row = |label: &str, names: [&str; 2]| SampleRow {
            label: label.into(),
            images: names
                .map(|n| (n.to_string(), picture(n.len() as u8)))
                .into(),
        };
        let rows = vec![
            row("../a", ["bicubic", "x/y"]),
            row("b", ["student", "truth"]),
        ];
        save_samples(run.path(), &rows).unwrap();
        assert_eq!(load_samples(run.path()).unwrap(), rows);
        fs::remove_file(run.path().join("samples/1-0.png")).unwrap();
        let error = load_samples(run.path()).unwrap_err().to_string();
        assert!(error.contains("damaged samples"), "{error}");
    }

    #[test]
    fn a_folder_that_holds_no_run_is_an_error_that_says_so() {
        let run = tempfile::tempdir().unwrap();
        let error = Report::of_run(run.path()).unwrap_err().to_string();
        assert!(error.contains("losses.csv"), "{error}");
        fs::write(run.path().join("losses.csv"), "step,loss\n1,2\n2,1\n").unwrap();
        fs::write(run.path().join("recipe.toml"), "steps = 2\n").unwrap();
        let report = Report::of_run(run.path()).unwrap();
        assert_eq!(
            (report.config.as_str(), report.curves.steps.len()),
            ("steps = 2\n", 2)
        );
        fs::write(run.path().join("eval.json"), "{}").unwrap();
        let error = Report::of_run(run.path()).unwrap_err().to_string();
        assert!(error.contains("eval.json"), "{error}");
    }
}
