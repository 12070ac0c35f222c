//! `tadsr-train eval`: measures models on images and clips, beside plain interpolation.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Result, anyhow, bail, ensure};
use clap::Args as ClapArgs;
use tadsr::{
    Device, Error,
    metrics::{Report, Row},
    train::{
        checkpoint::write_atomically,
        eval::{
            Condition, Evaluation, INTERPOLATIONS, Method, MetricModels, REFERENCE, media_files,
        },
        report::{Report as HtmlReport, versions},
    },
};

use crate::{
    meter::Meter,
    stop::{Stop, Stopped},
};

const EXAMPLES: &str = "\
Examples:
  tadsr-train eval --data val/Set5 val/BSD20 --model tiny
  tadsr-train eval --data val --model runs/a/model.safetensors --scale 2,3,4 \\
      --condition clean,jpeg30,jpeg60 --lpips lpips_squeeze.safetensors --json eval.json
  tadsr-train eval --data clips --model tiny --frames 48 --condition clean,h264-23,vp9-32 \\
      --html eval.html

Each image or frame is cut to a size that the scale divides, downscaled (Catmull-Rom, antialiased),
degraded as the condition says, and upscaled by every method. PSNR-Y, SSIM, MS-SSIM and NIQE are
measured on luma, LPIPS on RGB, all without a border of ceil(scale) pixels. Clips also get warping
error (minus that of the ground truth), tOF and flicker.

The first tables show means, the second differences to bicubic, image by image. ± is half the 95 %
confidence interval over images and clips, in brackets that within the clips (parts of 12 frames).
The last table holds the targets of ResShift models. docs/evaluation.md describes all tables.";

/// Measure models on images and clips, beside bicubic and Lanczos interpolation.
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Folders (searched recursively), images (JPEG, PNG, WebP, TIFF) and videos that GStreamer
    /// plays; may be repeated
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Name of a bundled model or path of a model file, optionally with settings, as in
    /// tiny@denoise=0.4,precision=f32 (denoise, detail, strength, temporal, precision); may be
    /// repeated
    #[arg(long, value_name = "NAME_OR_PATH")]
    model: Vec<String>,
    /// Device of the models: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = Device::from_str)]
    device: Device,
    /// Interpolations to measure, besides bicubic, which is always measured
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "catmull-rom,lanczos3",
        value_parser = interpolation
    )]
    interpolation: Vec<String>,
    /// Scales, above 1 up to 4
    #[arg(long, value_delimiter = ',', default_value = "2,4", value_parser = scale)]
    scale: Vec<f64>,
    /// Degradation of the low-resolution input: clean; for images jpegQ with a quality Q of 1 to
    /// 100; for clips h264-C, h265-C, vp9-C or av1-C with a CRF C of 0 to 51
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "clean,jpeg60,h264-23,h264-32"
    )]
    condition: Vec<Condition>,
    /// Reference of the differences: an interpolation or a model that is measured
    #[arg(long, default_value = REFERENCE, value_name = "NAME_OR_PATH")]
    reference: String,
    /// Weights of LPIPS-squeeze (safetensors); without them LPIPS is not measured
    #[arg(long, value_name = "FILE")]
    lpips: Option<PathBuf>,
    /// Parameters of NIQE (npz); without them NIQE is not measured
    #[arg(long, value_name = "FILE")]
    niqe: Option<PathBuf>,
    /// Maximum number of frames to measure in a clip, at least 2
    #[arg(
        long,
        default_value_t = 96,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(2..)
    )]
    frames: u32,
    /// Time in a clip at which the measurement begins, in seconds
    #[arg(long, default_value_t = 0.0, value_name = "SECONDS", value_parser = seconds)]
    start: f64,
    /// JSON file for means, differences, targets and the values of each image and part of a clip
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// HTML file for the tables and plots of the differences
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn scale(s: &str) -> Result<f64, String> {
    match s.parse() {
        Ok(v) if v > 1.0 && v <= 4.0 => Ok(v),
        _ => Err("a scale is a number above 1 up to 4".into()),
    }
}

fn seconds(s: &str) -> Result<f64, String> {
    match s.parse() {
        Ok(v) if (0.0..1e6).contains(&v) => Ok(v),
        _ => Err("a time is a number of seconds".into()),
    }
}

fn interpolation(s: &str) -> Result<String, String> {
    let known = INTERPOLATIONS.map(|i| i.0);
    if known.contains(&s) {
        Ok(s.into())
    } else {
        Err(format!("use {}", known.join(", ")))
    }
}

impl Args {
    fn evaluation(&self, stop: &Stop) -> Result<Evaluation> {
        let others = self.interpolation.iter().map(String::as_str);
        let others: Vec<_> = others.filter(|name| *name != REFERENCE).collect();
        let names = [REFERENCE].into_iter().chain(others);
        let mut methods: Vec<_> = names.filter_map(Method::interpolation).collect();
        for model in &self.model {
            methods.push(Method::model(model, self.device)?);
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = methods.iter().find(|m| !seen.insert(m.name())) {
            bail!("'{}' is named twice", twice.name());
        }
        if !methods.iter().any(|m| m.name() == self.reference) {
            bail!(
                "--reference {}: no method of this name is measured",
                self.reference
            );
        }
        let metric_models = MetricModels::load(self.lpips.as_deref(), self.niqe.as_deref())?;
        let (scales, conditions) = (self.scale.clone(), self.condition.clone());
        Ok(Evaluation::new(
            methods,
            scales,
            conditions,
            metric_models,
            stop.flag(),
        )?)
    }
}

pub fn run(args: Args) -> Result<()> {
    measure(&args, &Stop::on_signals()?)
}

fn measure(args: &Args, stop: &Stop) -> Result<()> {
    let files = Files::find(args)?;
    let mut evaluation = args.evaluation(stop)?;
    let total = files.steps(args) * evaluation.passes();
    let meter = Meter::new("images and frames", "a second", Some(total as u64))?;
    let mut report = Report::default();
    let (mut measured, mut skipped) = (0, Vec::new());
    for file in files.all() {
        match file.measure(&mut evaluation, args, &meter) {
            Ok(rows) => {
                rows.into_iter().for_each(|row| report.push(row));
                measured += 1;
            }
            Err(Error::Cancelled) => break,
            Err(e) => skipped.push(format!("'{}': {e}", file.path().display())),
        }
    }
    meter.finish();
    for line in &skipped {
        eprintln!("skipped {line}");
    }
    let stopped = stop.is_asked();
    ensure!(
        measured > 0,
        "{} of {} images and clips could be measured",
        if stopped { "stopped: none" } else { "none" },
        files.len()
    );
    println!("{measured} images and clips\n");
    for table in report.all_tables(&args.reference) {
        println!("{table}");
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report.to_json())?;
        write_atomically(path, (text + "\n").as_bytes())?;
    }
    if let Some(path) = &args.html {
        let command: Vec<_> = std::env::args().collect();
        let page = HtmlReport {
            title: "Evaluation".into(),
            summary: vec![format!("{measured} images and clips")],
            config: command.join(" "),
            evaluation: Some(report),
            reference: args.reference.clone(),
            versions: versions(),
            ..HtmlReport::default()
        };
        page.write(path)?;
    }
    if stopped {
        let text = format!("stopped after {measured} of {}", files.len());
        return Err(Stopped(text).into());
    }
    Ok(())
}

/// Files to measure.
struct Files {
    pictures: Vec<PathBuf>,
    clips: Vec<PathBuf>,
}

enum File<'a> {
    Picture(&'a Path),
    Clip(&'a Path),
}

impl Files {
    fn find(args: &Args) -> Result<Self> {
        let (pictures, clips) = media_files(&args.data).map_err(|e| anyhow!(e))?;
        if !clips.is_empty() && !cfg!(feature = "video") {
            eprintln!(
                "{} videos are skipped: this tool was built without the feature video",
                clips.len()
            );
        }
        let files = Self {
            pictures,
            clips: if cfg!(feature = "video") {
                clips
            } else {
                Vec::new()
            },
        };
        if files.len() == 0 {
            let dirs = args.data.iter();
            let dirs: Vec<_> = dirs.map(|d| format!("'{}'", d.display())).collect();
            bail!(
                "no image (.jpg, .jpeg, .png, .webp, .tif, .tiff) and no video in {}",
                dirs.join(", ")
            );
        }
        let served = |of: fn(Condition) -> bool| args.condition.iter().any(|c| of(*c));
        ensure!(
            files.pictures.is_empty() || served(Condition::is_for_pictures),
            "--condition: none of these is for images"
        );
        ensure!(
            files.clips.is_empty() || served(Condition::is_for_clips),
            "--condition: none of these is for clips"
        );
        Ok(files)
    }

    fn len(&self) -> usize {
        self.pictures.len() + self.clips.len()
    }

    fn all(&self) -> impl Iterator<Item = File<'_>> {
        let pictures = self.pictures.iter().map(|p| File::Picture(p));
        pictures.chain(self.clips.iter().map(|c| File::Clip(c)))
    }

    /// Number of images and frames.
    fn steps(&self, args: &Args) -> usize {
        #[cfg(feature = "video")]
        let frames = |path: &PathBuf| clip(path, args).expected_frames().unwrap_or(1);
        #[cfg(not(feature = "video"))]
        let frames = |_: &PathBuf| args.frames as usize;
        self.pictures.len() + self.clips.iter().map(frames).sum::<usize>()
    }
}

#[cfg(feature = "video")]
fn clip(path: &Path, args: &Args) -> tadsr::train::eval::Clip {
    tadsr::train::eval::Clip {
        path: path.into(),
        start: std::time::Duration::from_secs_f64(args.start),
        frames: args.frames as usize,
    }
}

impl File<'_> {
    fn path(&self) -> &Path {
        match self {
            Self::Picture(path) | Self::Clip(path) => path,
        }
    }

    fn measure(
        &self,
        evaluation: &mut Evaluation,
        args: &Args,
        meter: &Meter,
    ) -> tadsr::Result<Vec<Row>> {
        meter.name(&self.path().display().to_string());
        match self {
            Self::Picture(path) => evaluation.picture(path, || meter.advance()),
            #[cfg(feature = "video")]
            Self::Clip(path) => evaluation.clip(&clip(path, args), || meter.advance()),
            #[cfg(not(feature = "video"))]
            Self::Clip(_) => {
                let _ = args;
                Ok(Vec::new())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn scales_times_and_interpolations_are_checked() {
        assert!(scale("2.5").is_ok() && scale("1").is_err() && scale("nan").is_err());
        assert!(seconds("1.5").is_ok() && seconds("-1").is_err() && seconds("inf").is_err());
        assert!(interpolation("lanczos3").is_ok() && interpolation("nearest").is_err());
    }

    /// Picture with edges and texture that no resampler restores.
    fn scene(width: u32, height: u32) -> image::RgbImage {
        image::RgbImage::from_fn(width, height, |x, y| {
            let bars = if (x / 5 + y / 7) % 2 == 0 { 60 } else { 180 };
            image::Rgb([bars, (x * 3 % 256) as u8, (y * 5 % 256) as u8])
        })
    }

    fn args(data: &[&Path], extra: &[&str]) -> Args {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            args: Args,
        }
        let data = data.iter().map(|d| d.to_str().unwrap());
        let line = ["eval", "--data"].into_iter().chain(data);
        <Cli as clap::Parser>::parse_from(line.chain(extra.iter().copied())).args
    }

    /// Returns the JSON output of `eval`.
    fn measured(data: &[&Path], extra: &[&str]) -> serde_json::Value {
        let dir = tempfile::tempdir().unwrap();
        let json = dir.path().join("out.json");
        let extra = [extra, &["--json", json.to_str().unwrap()]].concat();
        measure(&args(data, &extra), &Stop::default()).unwrap();
        serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap()
    }

    fn fails(data: &[&Path], extra: &[&str]) -> String {
        let error = measure(&args(data, extra), &Stop::default()).unwrap_err();
        error.to_string()
    }

    fn list<'a>(report: &'a serde_json::Value, key: &str) -> &'a [serde_json::Value] {
        report[key].as_array().unwrap()
    }

    #[test]
    fn every_method_is_measured_on_every_picture_that_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        scene(61, 47).save(dir.path().join("a.png")).unwrap();
        scene(50, 40).save(dir.path().join("b.jpg")).unwrap();
        fs::write(dir.path().join("broken.png"), "no picture").unwrap();
        scene(3, 40).save(dir.path().join("narrow.png")).unwrap();
        let report = measured(&[dir.path()], &["--scale", "1.5,4"]);
        assert_eq!(list(&report, "images").len(), 2 * 2 * 2 * 3);
        assert_eq!(list(&report, "means").len(), 2 * 2 * 3);
        for mean in list(&report, "means") {
            let psnr = mean["psnr_y"].as_f64().unwrap();
            assert!(mean["images"] == 2 && psnr > 10.0 && psnr < 60.0, "{mean}");
        }
    }

    #[test]
    fn a_picture_that_its_border_fills_is_left_out_of_the_means() {
        let dir = tempfile::tempdir().unwrap();
        scene(40, 40).save(dir.path().join("large.png")).unwrap();
        let tiny = dir.path().join("tiny.png");
        scene(10, 10).save(&tiny).unwrap();
        let report = measured(&[dir.path()], &["--scale", "4"]);
        for mean in list(&report, "means") {
            assert!(mean["images"] == 1 && mean["psnr_y"].is_number(), "{mean}");
        }
        assert!(fails(&[&tiny], &["--scale", "4"]).contains("none of 1"));
    }

    #[test]
    fn a_model_makes_the_size_of_the_picture_at_fractional_scales() {
        let dir = tempfile::tempdir().unwrap();
        // 50 / 1.05 is 47 whole pixels, which become 49.35 pixels.
        scene(50, 41).save(dir.path().join("a.png")).unwrap();
        let report = measured(
            &[dir.path()],
            &["--scale", "1.05,1.15,1.9,3.3", "--model", "tiny"],
        );
        let of_model = |m: &&serde_json::Value| m["method"] == "tiny";
        let means: Vec<_> = list(&report, "means").iter().filter(of_model).collect();
        assert_eq!(means.len(), 4 * 2);
        for mean in means {
            assert!(mean["psnr_y"].as_f64().unwrap() > 10.0, "{mean}");
        }
    }

    #[test]
    fn differences_are_to_any_method_that_takes_part() {
        let dir = tempfile::tempdir().unwrap();
        scene(40, 40).save(dir.path().join("a.png")).unwrap();
        scene(48, 44).save(dir.path().join("b.png")).unwrap();
        let page = dir.path().join("page.html");
        let html = ["--html", page.to_str().unwrap()];
        let options = [&["--scale", "2", "--reference", "lanczos3"][..], &html].concat();
        measure(&args(&[dir.path()], &options), &Stop::default()).unwrap();
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains("against lanczos3") && !page.contains("against bicubic"));
        let absent = fails(&[dir.path()], &["--scale", "2", "--reference", "tiny"]);
        assert!(absent.contains("--reference tiny"), "{absent}");
    }

    #[test]
    fn one_option_takes_several_directories_and_pictures() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for dir in &dirs {
            scene(30, 30).save(dir.path().join("a.png")).unwrap();
        }
        scene(30, 30).save(dirs[1].path().join("b.png")).unwrap();
        let data = [dirs[0].path(), &dirs[1].path().join("b.png")];
        let report = measured(&data, &["--scale", "2", "--condition", "clean"]);
        assert_eq!(report["means"][0]["images"], 2);
    }

    #[test]
    fn nothing_to_measure_is_an_error_that_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let message = |data: &Path| fails(&[data], &[]);
        assert!(message(dir.path()).contains(dir.path().to_str().unwrap()));
        assert!(message(&dir.path().join("nowhere")).contains("nowhere"));
        fs::write(dir.path().join("broken.png"), "no picture").unwrap();
        assert!(message(dir.path()).contains("none of 1"));
    }
}
