//! `tadsr-train eval`: what models reach on a directory of pictures, beside plain resampling.

use std::{
    fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args as ClapArgs;
use indicatif::{ProgressBar, ProgressStyle};
use rand::{SeedableRng, rngs::SmallRng};
use tadsr::{
    Device, Upscaler,
    frame::{Frame, resample::Kernel},
    metrics::{Lpips, LpipsFeatures, Niqe, Picture, Report, Row, ms_ssim, psnr, ssim},
    train::{
        data::{Patch, decode, image_files},
        degrade::Degradation,
    },
};

const EXAMPLES: &str = "\
Examples:
  tadsr-train eval --data val/Set5 val/BSD20 --model tiny
  tadsr-train eval --data val --model runs/a/model.safetensors --scale 2,3,4 \\
      --condition clean,jpeg30,jpeg60 --lpips lpips_squeeze.safetensors --json eval.json

Each picture is cut to a size that the scale divides, downscaled (Catmull-Rom, antialiased), perhaps
sent through JPEG, and upscaled again by bicubic (a = -0.75), Catmull-Rom, Lanczos and each model.
PSNR-Y, SSIM, MS-SSIM and NIQE are taken on BT.601 luma, LPIPS on RGB, all without a border of
ceil(scale) pixels. The first table shows means over the pictures, the second differences to bicubic
picture by picture with their 95 % confidence intervals.";

/// Measure models on pictures, beside bicubic and Lanczos
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Directories of pictures (JPEG, PNG; searched to their depths), or pictures; may be repeated
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Name of a bundled model or path of a model file; may be repeated
    #[arg(long, value_name = "NAME_OR_PATH")]
    model: Vec<String>,
    /// Scales, above 1 up to 4
    #[arg(long, value_delimiter = ',', default_value = "2,4", value_parser = scale)]
    scale: Vec<f64>,
    /// What is done to the small pictures: clean, or jpegQ with a quality Q of 1 to 100
    #[arg(long, value_delimiter = ',', default_value = "clean,jpeg60")]
    condition: Vec<Condition>,
    /// Weights of LPIPS-squeeze (safetensors); without them LPIPS is left out
    #[arg(long, value_name = "WEIGHTS")]
    lpips: Option<PathBuf>,
    /// Model of natural pictures for NIQE (npz); without it NIQE is left out
    #[arg(long, value_name = "MODEL")]
    niqe: Option<PathBuf>,
    /// Write means and the numbers of each picture to this file
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
}

/// What is done to the small pictures.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Condition {
    Clean,
    Jpeg(u8),
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let quality = s.strip_prefix("jpeg").map(str::parse);
        match quality {
            None if s == "clean" => Ok(Self::Clean),
            Some(Ok(q)) if (1..=100).contains(&q) => Ok(Self::Jpeg(q)),
            _ => Err("use clean, or jpegQ with a quality Q of 1 to 100, such as jpeg60".into()),
        }
    }
}

impl Condition {
    fn name(self) -> String {
        match self {
            Self::Clean => "clean".into(),
            Self::Jpeg(q) => format!("jpeg{q}"),
        }
    }

    fn degradation(self) -> Degradation {
        match self {
            Self::Clean => Degradation::fixed(),
            Self::Jpeg(q) => Degradation::jpeg(q),
        }
    }
}

fn scale(s: &str) -> Result<f64, String> {
    match s.parse() {
        Ok(v) if v > 1.0 && v <= 4.0 => Ok(v),
        _ => Err("a scale is a number above 1 up to 4".into()),
    }
}

/// A way to upscale, and its name in the table.
struct Method {
    name: String,
    kind: Kind,
}

enum Kind {
    Resample(Kernel),
    Model(Box<Upscaler>),
}

impl Method {
    /// The resamplers, then the models.
    fn all(models: &[String], scales: &[f64]) -> Result<Vec<Self>> {
        let resamplers = [
            ("bicubic", Kernel::Bicubic),
            ("catmull-rom", Kernel::CatmullRom),
            ("lanczos3", Kernel::Lanczos3),
        ];
        let mut methods: Vec<_> = resamplers
            .map(|(name, kernel)| Self {
                name: name.into(),
                kind: Kind::Resample(kernel),
            })
            .into();
        for model in models {
            let upscaler = Upscaler::load(model, Device::Auto)?;
            let max = upscaler.max_scale();
            if let Some(scale) = scales.iter().find(|s| **s > max) {
                bail!("model '{model}' serves scales up to {max}: leave {scale} out of --scale");
            }
            methods.push(Self {
                name: model.clone(),
                kind: Kind::Model(Box::new(upscaler)),
            });
        }
        Ok(methods)
    }

    /// Upscales `lr` to `width` x `height`, rounded to 8 bits.
    fn upscale(&mut self, lr: &Patch, width: usize, height: usize) -> Result<Picture> {
        let rgb = match &mut self.kind {
            Kind::Resample(kernel) => lr.clone().resize(width, height, *kernel)?.to_rgb8(),
            Kind::Model(upscaler) => {
                let frame = Frame::from_rgb8(lr.width, lr.height, &lr.to_rgb8())?;
                let mut large = Frame::new(frame.info().with_size(width, height))?;
                upscaler.upscale_into(&frame.as_ref(), &mut large.as_mut())?;
                large.to_rgb8()?
            }
        };
        Ok(Picture::new(width, height, rgb)?)
    }
}

/// The picture that an upscaler should have made, without its border, and its features.
struct Truth {
    picture: Picture,
    features: Option<LpipsFeatures>,
    border: usize,
}

impl Truth {
    fn new(hr: &Patch, scale: f64, lpips: Option<&Lpips>) -> Result<Self> {
        let border = scale.ceil() as usize;
        let picture = Picture::new(hr.width, hr.height, hr.to_rgb8())?.cropped(border);
        ensure!(
            picture.width() > 0 && picture.height() > 0,
            "nothing is left of {}x{} pixels at scale {scale} without a border of {border}",
            hr.width,
            hr.height
        );
        let features = lpips.map(|l| l.features(&picture)).transpose()?;
        Ok(Self {
            picture,
            features,
            border,
        })
    }

    /// The row of `result` but for what it was made by and from.
    fn judge(&self, result: &Picture, judges: &Judges) -> Result<Row> {
        let result = result.cropped(self.border);
        let (truth, luma) = (self.picture.luma(), result.luma());
        let distance = |l: &Lpips| match &self.features {
            Some(features) => l.distance(features, &l.features(&result)?).map(Some),
            None => Ok(None),
        };
        let natural = |n: &Niqe| n.score(&luma);
        Ok(Row {
            psnr_y: psnr(&truth, &luma),
            ssim: ssim(&truth, &luma),
            ms_ssim: ms_ssim(&truth, &luma),
            lpips: judges.lpips.as_ref().map(distance).transpose()?.flatten(),
            niqe: judges.niqe.as_ref().map(natural).transpose()?.flatten(),
            ..Row::default()
        })
    }
}

/// The metrics that need a file.
#[derive(Default)]
struct Judges {
    lpips: Option<Lpips>,
    niqe: Option<Niqe>,
}

pub fn run(args: Args) -> Result<()> {
    let files = image_files(&args.data)?;
    if files.is_empty() {
        let dirs: Vec<_> = args
            .data
            .iter()
            .map(|d| format!("'{}'", d.display()))
            .collect();
        bail!("no picture (.jpg, .jpeg, .png) in {}", dirs.join(", "));
    }
    let judges = Judges {
        lpips: args.lpips.as_deref().map(Lpips::load).transpose()?,
        niqe: args.niqe.as_deref().map(Niqe::load).transpose()?,
    };
    let mut methods = Method::all(&args.model, &args.scale)?;
    let mut report = Report::default();
    let mut skipped = Vec::new();
    let progress = progress_bar(files.len() * args.scale.len())?;
    for (i, file) in files.iter().enumerate() {
        progress.set_position((i * args.scale.len()) as u64);
        progress.set_message(file.display().to_string());
        match rows(file, &args, &judges, &mut methods, &progress) {
            Ok(rows) => rows.into_iter().for_each(|row| report.push(row)),
            Err(e) => skipped.push(format!("'{}': {e:#}", file.display())),
        }
    }
    progress.finish_and_clear();
    for line in &skipped {
        eprintln!("skipped {line}");
    }
    let measured = files.len() - skipped.len();
    ensure!(
        measured > 0,
        "none of {} pictures could be measured",
        files.len()
    );
    println!("{measured} pictures");
    print!("{report}");
    let differences = report.against_as_text("bicubic");
    if !differences.is_empty() {
        print!("\nagainst bicubic, with 95 % confidence:\n{differences}");
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report.to_json())?;
        fs::write(path, text + "\n")
            .with_context(|| format!("cannot write '{}'", path.display()))?;
    }
    Ok(())
}

/// Every method under every condition and scale on one picture; all or none.
fn rows(
    file: &Path,
    args: &Args,
    judges: &Judges,
    methods: &mut [Method],
    progress: &ProgressBar,
) -> Result<Vec<Row>> {
    let image = decode(file).map_err(|e| anyhow!(e))?;
    let (w, h) = (image.width() as usize, image.height() as usize);
    let full = Patch::from_rgb8(w, h, image.as_raw());
    let mut rows = Vec::new();
    for &scale in &args.scale {
        let ((lw, hw), (lh, hh)) = (fitting(w, scale), fitting(h, scale));
        ensure!(
            lw > 0 && lh > 0,
            "{w}x{h} pixels are too few for scale {scale}"
        );
        let hr = full.top_left(hw, hh);
        let truth = Truth::new(&hr, scale, judges.lpips.as_ref())?;
        for &condition in &args.condition {
            // The evaluation's degradations draw nothing that matters.
            let mut rng = SmallRng::seed_from_u64(0);
            let lr = condition.degradation().apply(&hr, lw, lh, &mut rng)?;
            for method in &mut *methods {
                let result = method.upscale(&lr, hw, hh)?;
                rows.push(Row {
                    method: method.name.clone(),
                    condition: condition.name(),
                    scale,
                    image: file.display().to_string(),
                    ..truth.judge(&result, judges)?
                });
            }
        }
        progress.inc(1);
    }
    Ok(rows)
}

/// The low-resolution length for a picture of `len` pixels, and the length that it becomes at `scale`: whole
/// pixels, at most `len`.
fn fitting(len: usize, scale: f64) -> (usize, usize) {
    let small = (len as f64 / scale + 1e-9).floor();
    (small as usize, (small * scale - 1e-9).ceil() as usize)
}

fn progress_bar(steps: usize) -> Result<ProgressBar> {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left {eta}) {wide_msg}")?;
    Ok(ProgressBar::new(steps as u64).with_style(style))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_cut_to_what_the_scale_fits() {
        assert_eq!(fitting(321, 2.0), (160, 320));
        assert_eq!(fitting(321, 4.0), (80, 320));
        assert_eq!(fitting(10, 1.5), (6, 9));
        assert_eq!(fitting(3, 4.0), (0, 0));
        for len in 1..200 {
            for scale in [1.1, 4.0 / 3.0, 1.5, 2.0, 2.25, 3.0, 3.7, 4.0] {
                let (small, large) = fitting(len, scale);
                assert!(large <= len && (large as f64 - small as f64 * scale).abs() < 1.0);
            }
        }
    }

    #[test]
    fn conditions_and_scales_are_checked() {
        assert_eq!("clean".parse(), Ok(Condition::Clean));
        assert_eq!("jpeg60".parse(), Ok(Condition::Jpeg(60)));
        for wrong in ["", "jpeg", "jpeg0", "jpeg101", "webp60"] {
            assert!(wrong.parse::<Condition>().is_err(), "{wrong}");
        }
        assert!(scale("2.5").is_ok() && scale("1").is_err() && scale("nan").is_err());
    }

    /// A picture with edges and texture that no resampler restores.
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

    /// What `eval` writes as JSON.
    fn measure(data: &[&Path], extra: &[&str]) -> serde_json::Value {
        let dir = tempfile::tempdir().unwrap();
        let json = dir.path().join("out.json");
        let extra = [extra, &["--json", json.to_str().unwrap()]].concat();
        run(args(data, &extra)).unwrap();
        serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap()
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
        let report = measure(&[dir.path()], &["--scale", "1.5,4"]);
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
        let report = measure(&[dir.path()], &["--scale", "4"]);
        for mean in list(&report, "means") {
            assert!(mean["images"] == 1 && mean["psnr_y"].is_number(), "{mean}");
        }
        let alone = args(&[&tiny], &["--scale", "4"]);
        let progress = ProgressBar::hidden();
        let mut methods = Method::all(&[], &alone.scale).unwrap();
        let error = rows(&tiny, &alone, &Judges::default(), &mut methods, &progress).unwrap_err();
        assert!(error.to_string().contains("8x8 pixels at scale 4"));
        assert!(run(alone).unwrap_err().to_string().contains("none of 1"));
    }

    #[test]
    fn a_model_makes_the_size_of_the_picture_at_fractional_scales() {
        let dir = tempfile::tempdir().unwrap();
        // 50 / 1.05 is 47 whole pixels, which become 49.35: a part of a pixel more than rounding keeps.
        scene(50, 41).save(dir.path().join("a.png")).unwrap();
        let report = measure(
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
    fn one_option_takes_several_directories_and_pictures() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for dir in &dirs {
            scene(30, 30).save(dir.path().join("a.png")).unwrap();
        }
        scene(30, 30).save(dirs[1].path().join("b.png")).unwrap();
        let data = [dirs[0].path(), &dirs[1].path().join("b.png")];
        let report = measure(&data, &["--scale", "2", "--condition", "clean"]);
        assert_eq!(report["means"][0]["images"], 2);
    }

    #[test]
    fn nothing_to_measure_is_an_error_that_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let message = |data: &Path| run(args(&[data], &[])).unwrap_err().to_string();
        assert!(message(dir.path()).contains(dir.path().to_str().unwrap()));
        assert!(message(&dir.path().join("nowhere")).contains("nowhere"));
        fs::write(dir.path().join("broken.png"), "no picture").unwrap();
        assert!(message(dir.path()).contains("none of 1"));
    }
}
