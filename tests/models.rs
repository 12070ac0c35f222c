//! `tadsr-train quantize` adds calibration to a model and keeps everything else, and
//! `models` and `info` describe models.
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
    // PSNR that it prints for each precision.
    let said = String::from_utf8(output.stdout).unwrap();
    let decibels = |name: &str| -> f64 {
        let line = said.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    for name in ["bf16", "int16", "int8"] {
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
    assert_eq!(small["dials"], serde_json::json!(["denoise", "detail"]));
    // The dial detail nearly doubles them.
    assert_eq!(small["parameters"], 155_860);
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

fn info(model: &str) -> std::process::Output {
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.args(["info", model]).output().unwrap()
}

#[test]
fn info_describes_a_model_file_and_each_model_of_a_group() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-x4.safetensors");
    let size = std::fs::metadata(file).unwrap().len().to_string();
    let output = info(file);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for promised in [
        "tiny-x4",
        "above 2, up to 4",
        "luma",
        "denoise, detail",
        "plain, r 4, 32 channels, depth 4",
        "for int16 and int8",
        &size,
        "training.options.batch = 8",
    ] {
        assert!(text.contains(promised), "{promised} in {text}");
    }
    let group = String::from_utf8(info("small").stdout).unwrap();
    assert!(group.contains("small-x2") && group.contains("small-x4"));
}

/// `tadsr-train info tiny | head -1` ends without an error, and a full disk is one.
#[test]
#[cfg(target_os = "linux")]
fn a_closed_or_full_standard_output_does_not_panic() {
    let run = |output: std::process::Stdio| {
        let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin("tadsr-train"));
        command.args(["info", "tiny"]).stdout(output);
        let result = command
            .stderr(std::process::Stdio::piped())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        (result.status.code(), said)
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(run(writer.into()), (Some(0), String::new()));
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let (status, said) = run(full.into());
    assert!(
        status == Some(1) && said.contains("standard output: No space"),
        "{said}"
    );
}

#[test]
fn info_names_a_file_that_is_no_model_and_lists_the_valid_names() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("picture.png");
    std::fs::write(&file, b"not a model").unwrap();
    let estimator = concat!(env!("CARGO_MANIFEST_DIR"), "/models/estimator.safetensors");
    for (model, reason) in [
        (file.to_str().unwrap(), "not a safetensors file"),
        (estimator, "lite-estimator"),
        (
            "nosuch",
            "tiny, small, base, tiny-x2, tiny-x4, small-x2, small-x4, base-x2, base-x4",
        ),
    ] {
        let output = info(model);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.stdout.is_empty());
        assert!(said.contains(model) && said.contains(reason), "{said}");
    }
}

#[test]
fn manual_writes_a_page_and_completions_for_every_subcommand() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    let output = command.arg("manual").arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let read = |name: &str| std::fs::read_to_string(dir.path().join("share").join(name)).unwrap();
    let mut help = Command::cargo_bin("tadsr-train").unwrap();
    let help = String::from_utf8(help.arg("--help").output().unwrap().stdout).unwrap();
    let commands = help.split_once("Commands:").unwrap().1;
    let commands = commands.split_once("Options:").unwrap().0;
    let names = commands
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<&str> = names
        .map(|line| line.split_whitespace().next().unwrap())
        .filter(|name| *name != "help")
        .collect();
    assert!(names.contains(&"upscale") && names.contains(&"info"));
    for name in names {
        let page = read(&format!("man/man1/tadsr-train-{name}.1"));
        assert!(page.contains(".SH OPTIONS"), "{page}");
        for completions in [
            "bash-completion/completions/tadsr-train.bash",
            "fish/vendor_completions.d/tadsr-train.fish",
            "zsh/site-functions/_tadsr-train",
        ] {
            assert!(read(completions).contains(name), "{name} in {completions}");
        }
    }
}
