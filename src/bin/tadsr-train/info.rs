//! `tadsr-train info`: content of a model file.

use std::{fmt::Display, fs};

use anyhow::Result;
use serde_json::Value;
use tadsr::{
    model::{LiteModel, Model, ResShiftModel},
    nn::lite::LatentKind,
};

/// Print what a model file contains.
///
/// Reads and checks the whole file. `models` measures the speed of a model.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train info tiny
  tadsr-train info runs/my-x2/model.safetensors")]
pub struct Args {
    /// Model file, or name of a bundled model or group
    #[arg(value_name = "FILE")]
    model: String,
}

pub fn run(args: &Args) -> Result<()> {
    let size = match fs::metadata(&args.model) {
        Ok(file) => format!("{} bytes", file.len()),
        Err(_) => "bundled".into(),
    };
    match Model::find(&args.model)? {
        Model::Lite(models) => {
            for (i, model) in models.iter().enumerate() {
                if i > 0 {
                    println!("");
                }
                lite(model, &size);
            }
        }
        Model::ResShift(model) => resshift(&model, &size),
    }
    Ok(())
}

fn row(name: &str, value: impl Display) {
    println!("{name:12} {value}");
}

fn lite(model: &LiteModel, size: &str) {
    let (metadata, student) = (&model.metadata, &model.metadata.student);
    let dials = match (student.conditioning.denoise, student.conditioning.detail) {
        (true, true) => "denoise, detail",
        (true, false) => "denoise",
        (false, true) => "detail",
        (false, false) => "none",
    };
    row("name", &metadata.name);
    row("family", "lite");
    let [low, high] = metadata.scales;
    row("scales", format!("above {low}, up to {high}"));
    let planes = match student.latent {
        LatentKind::Luma => "luma",
        LatentKind::Yuv => "luma, chroma",
    };
    row("planes", planes);
    row("dials", dials);
    if student.memory > 0 {
        row("memory", format!("{} channels", student.memory));
    }
    let architecture = format!("{:?}", student.architecture).to_lowercase();
    row(
        "shape",
        format!(
            "{architecture}, r {}, {} channels, depth {}",
            student.r, student.channels, student.depth
        ),
    );
    row("parameters", student.parameters());
    row(
        "calibration",
        if model.calibration.is_some() {
            "present, for int16 and int8"
        } else {
            "none; `tadsr-train quantize` adds it"
        },
    );
    row("file", size);
    row("licence", &metadata.licence);
    free_form("training", &metadata.training);
}

fn resshift(model: &ResShiftModel, size: &str) {
    let metadata = &model.metadata;
    let diffusion = &metadata.config.diffusion;
    let parameters: usize = model.tensors.values().map(|t| t.elem_count()).sum();
    row("name", &metadata.name);
    row("family", "resshift");
    row("scales", format!("native {}", diffusion.scale));
    row("planes", "RGB");
    row("steps", format!("up to {}", diffusion.steps));
    row("parameters", parameters);
    row("file", size);
    row("licence", &metadata.licence);
    free_form("source", &metadata.source);
}

/// Prints JSON as one line for each value.
fn free_form(name: &str, value: &Value) {
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(key, value)| free_form(&format!("{name}.{key}"), value)),
        Value::Null => {}
        value => println!("{name} = {value}"),
    }
}
