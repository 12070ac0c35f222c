//! `tadsr-train quantize` adds calibration for int8 to a model and keeps everything else, and `models`
//! lists models.
#![cfg(feature = "train")]

use std::path::Path;

use assert_cmd::Command;
use image::{Rgb, RgbImage};
use tadsr::model::LiteModel;

/// Makes photos of one kind: ramps, edges, noise.
fn photos(folder: &Path) {
    for i in 0..24u32 {
        let pixel = |x: u32, y: u32| {
            let wave = ((x * (1 + i % 5) + y * (i % 7)) as f32 * 0.05).sin() * 80.0;
            let edge = if (x / (9 + i) + y / 14).is_multiple_of(2) {
                40.0
            } else {
                0.0
            };
            let noise = ((x * 31 + y * 17 + x * y) % 13) as f32;
            let v = (110.0 + wave + edge + noise) as u8;
            Rgb([v, v.saturating_add(9), v.saturating_sub(20)])
        };
        let photo = RgbImage::from_fn(140, 130, pixel);
        photo.save(folder.join(format!("{i}.png"))).unwrap();
    }
}

fn quantize(model: &str, data: &Path, out: &Path) -> std::process::Output {
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.args(["quantize", "--batches", "4", "--model", model, "--data"]);
    command.arg(data).arg("--out").arg(out);
    command.args(["--name", "calibrated"]).output().unwrap()
}

#[test]
fn a_model_is_calibrated_and_otherwise_stays() {
    let dir = tempfile::tempdir().unwrap();
    photos(dir.path());
    let out = dir.path().join("calibrated.safetensors");
    let output = quantize("tiny-x2", dir.path(), &out);
    assert!(output.status.success(), "{output:?}");
    let (mut before, after) = (
        LiteModel::find("tiny-x2").unwrap().remove(0),
        LiteModel::read(&out).unwrap(),
    );
    before.metadata.name = "calibrated".into();
    assert_eq!(after.layers, before.layers);
    assert_eq!(after.metadata, before.metadata);
    let ranges = after.calibration.unwrap().ranges;
    assert_eq!(
        ranges.iter().map(Vec::len).collect::<Vec<_>>(),
        [4, 16, 16, 16, 16, 16]
    );
    // PSNR that it prints for f32, bf16 and int8.
    let said = String::from_utf8(output.stdout).unwrap();
    let decibels = |name: &str| -> f64 {
        let line = said.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    for name in ["bf16", "int8"] {
        assert!((decibels("f32") - decibels(name)).abs() < 0.1, "{said}");
    }
}

#[test]
fn a_group_of_models_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = quantize("tiny", dir.path(), &dir.path().join("out"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("tiny-x2"),
        "{said}"
    );
}

#[test]
fn the_bundled_models_are_listed_with_cost_quality_and_speed() {
    let list = |args: &[&str]| {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.arg("models").args(args).output().unwrap()
    };
    let output = list(&["--size", "32x24", "--threads", "1", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    let bundled: Vec<_> = tadsr::model::BUNDLED.iter().map(|b| b.name).collect();
    assert_eq!(names, bundled);
    for row in &rows {
        assert!(row["fps"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["psnr_y"][0].as_f64().unwrap() > 20.0, "{row}");
    }
    let small = rows.iter().find(|row| row["name"] == "small-x2").unwrap();
    assert_eq!(small["dials"][0], "denoise");
    assert_eq!(small["parameters"], 79_244);
    // Two of its ten layers join 4 and 32 channels, the others 32 and 32. A cell is an input pixel.
    let products = 9 * (2 * 4 * 32 + 8 * 32 * 32);
    assert_eq!(
        small["cost"].as_f64().unwrap(),
        f64::from(products) / 1000.0
    );
    for wrong in [&["nosuchmodel"][..], &["--size", "640"], &["--size", "1x1"]] {
        let output = list(wrong);
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
    }
}
