//! `tadsr-train models`: bundled models with their cost, quality and speed on this machine.

use anyhow::{Result, bail, ensure};
use serde::Serialize;
use tadsr::{
    Device, Upscaler,
    frame::{FrameInfo, PixelFormat},
    ladder,
    model::{BUNDLED, LiteModel},
    nn::lite::LatentKind,
};

/// PSNR-Y in dB on Set5 and 20 images of BSD100 at the largest scale: clean, JPEG quality 60. By
/// `tadsr-train eval` in f32 with the default dials.
const QUALITY: [(&str, [f64; 2]); 6] = [
    ("tiny-x2", [32.76, 29.52]),
    ("tiny-x4", [27.99, 26.20]),
    ("small-x2", [32.97, 29.65]),
    ("small-x4", [28.11, 26.27]),
    ("base-x2", [33.08, 29.72]),
    ("base-x4", [28.16, 26.30]),
];

/// List the bundled models with their cost, quality and speed on this machine.
///
/// The cost is in thousands of multiplications per input pixel at the largest scale of the model.
/// The quality is PSNR-Y in dB at that scale, on clean images and JPEG of quality 60; the cards of
/// the models have more. The speed is measured on frames of noise.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train models
  # Speed of one model for 960x540 on one core:
  tadsr-train models small-x2 --size 960x540 --threads 1
  tadsr-train models --json")]
pub struct Args {
    /// Names of models or groups, or model files [default: all bundled models]
    #[arg(value_name = "NAME_OR_PATH")]
    models: Vec<String>,
    /// Size of the frames that are upscaled
    #[arg(long, value_name = "WxH", default_value = "640x360", value_parser = size)]
    size: (usize, usize),
    /// Threads [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// Print a JSON object for each model, one per line
    #[arg(long)]
    json: bool,
}

/// Properties of a model.
#[derive(Serialize)]
struct Row {
    name: String,
    /// The model is for scales above the first, up to the second.
    scales: [f64; 2],
    planes: &'static str,
    dials: Vec<&'static str>,
    parameters: usize,
    /// Thousands of multiplications per input pixel at the largest scale.
    cost: f64,
    /// PSNR-Y in dB on clean images and JPEG of quality 60; `None` for a model file.
    psnr_y: Option<[f64; 2]>,
    precision: String,
    fps: f64,
}

pub fn run(args: &Args) -> Result<()> {
    let all: Vec<String> = BUNDLED.iter().map(|b| b.name.into()).collect();
    let names = if args.models.is_empty() {
        &all
    } else {
        &args.models
    };
    let mut models = Vec::new();
    for name in names {
        models.extend(LiteModel::find(name)?.into_iter().map(|m| (name, m)));
    }
    if !args.json {
        let (width, height) = args.size;
        println!(
            "{:14} {:>9}  {:12} {:>10} {:>7}  {:13}  frames per second from {width}x{height}",
            "model", "scales", "planes", "parameters", "cost", "PSNR-Y",
        );
    }
    for (name, model) in models {
        let row = row(name, &model, args)?;
        if args.json {
            println!("{}", serde_json::to_string(&row)?);
        } else {
            print(&row);
        }
    }
    Ok(())
}

fn row(requested: &str, model: &LiteModel, args: &Args) -> Result<Row> {
    let (metadata, student) = (&model.metadata, &model.metadata.student);
    let name = metadata.name.clone();
    let scale = metadata.scales[1];
    let dials = [
        ("denoise", student.conditioning.denoise),
        ("detail", student.conditioning.detail),
    ];
    let mut upscaler = Upscaler::load(requested, Device::Cpu)?;
    upscaler.set_threads(args.threads)?;
    upscaler.set_scale(scale)?;
    Ok(Row {
        scales: metadata.scales,
        planes: match student.latent {
            LatentKind::Luma => "luma",
            LatentKind::Yuv => "luma, chroma",
        },
        dials: dials.into_iter().filter(|d| d.1).map(|d| d.0).collect(),
        parameters: student.parameters(),
        cost: model.multiplications(scale) / 1000.0,
        psnr_y: QUALITY.iter().find(|q| q.0 == name).map(|q| q.1),
        precision: upscaler.active_precision(scale).to_string(),
        fps: fps(&mut upscaler, args.size)?,
        name,
    })
}

/// Returns the frames per second from frames of a size.
fn fps(upscaler: &mut Upscaler, (width, height): (usize, usize)) -> Result<f64> {
    let from = FrameInfo::new(PixelFormat::I420, width, height);
    let side = |len: usize| (len as f64 * upscaler.scale()).round() as usize;
    let to = from.with_size(side(width), side(height));
    let time = ladder::frame_time(upscaler, from, to)?;
    Ok(1.0 / time.as_secs_f64().max(1e-9))
}

fn print(row: &Row) {
    let [low, high] = row.scales;
    let quality = row.psnr_y.map_or("not measured".into(), |[clean, jpeg]| {
        format!("{clean:.2} / {jpeg:.2}")
    });
    let dials = match row.dials.join(", ") {
        dials if dials.is_empty() => dials,
        dials => format!(", dial {dials}"),
    };
    println!(
        "{:14} {:>9}  {:12} {:>10} {:>5.0} k  {quality:13}  {:.1} (x{high}, {}{dials})",
        row.name,
        format!("{low} to {high}"),
        row.planes,
        row.parameters,
        row.cost,
        row.fps,
        row.precision,
    );
}

/// Parses a size such as `640x360`.
fn size(text: &str) -> Result<(usize, usize)> {
    let sides = text
        .split_once('x')
        .and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    let Some((width, height)) = sides else {
        bail!("width and height, as in 640x360");
    };
    let range = 16..=8192;
    ensure!(
        range.contains(&width) && range.contains(&height),
        "sides of 16 to 8192 pixels"
    );
    Ok((width, height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bundled_model_has_a_measured_quality() {
        let names = BUNDLED.iter().map(|b| b.name);
        assert!(names.eq(QUALITY.iter().map(|q| q.0)));
    }
}
