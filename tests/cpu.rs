//! The environment variable `TADSR_CPU` as users of the tool set it.
#![cfg(all(feature = "train", feature = "video"))]

use std::path::Path;

use assert_cmd::Command;
use image::{Rgb, RgbImage};
use tadsr::kernels::cpu::Cpu;

/// Upscales `low.png` in `folder` at a level. Returns the image or the error.
fn upscale(folder: &Path, level: &str, precision: &str) -> Result<RgbImage, String> {
    let out = format!("out-{level}-{precision}.png");
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.current_dir(folder).env("TADSR_CPU", level);
    command.args(["upscale", "low.png", &out, "--precision", precision]);
    let output = command.output().unwrap();
    if output.status.success() {
        Ok(image::open(folder.join(out)).unwrap().to_rgb8())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let image = RgbImage::from_fn(93, 58, |x, y| {
        let bars = if (x / 5 + y / 7) % 2 == 0 { 60 } else { 180 };
        Rgb([bars, (x * 3 % 256) as u8, (y * 5 % 256) as u8])
    });
    image.save(folder.path().join("low.png")).unwrap();
    folder
}

/// Returns the largest and the mean difference.
fn difference(a: &RgbImage, b: &RgbImage) -> (u8, f64) {
    let pairs = a.iter().zip(b.iter()).map(|(a, b)| a.abs_diff(*b));
    let sum: f64 = pairs.clone().map(f64::from).sum();
    (pairs.max().unwrap(), sum / a.len() as f64)
}

#[test]
fn every_level_gives_the_image_that_the_precision_promises() {
    let folder = folder();
    // An empty value is not a level: all features of the machine are used.
    let best = |precision| upscale(folder.path(), "", precision).unwrap();
    let [f32, bf16, int16, int8] = ["f32", "bf16", "int16", "int8"].map(best);
    for level in ["avx512", "avx2", "neon", "portable"] {
        if Cpu::detected().lowered(level).is_err() {
            continue;
        }
        let at = |precision| upscale(folder.path(), level, precision).unwrap();
        let (max, mean) = difference(&at("f32"), &f32);
        assert!(max <= 1 && mean < 0.01, "{level}, f32: {max}, {mean}");
        let (max, mean) = difference(&at("bf16"), &bf16);
        assert!(max <= 4 && mean < 0.1, "{level}, bf16: {max}, {mean}");
        assert!(at("int16") == int16, "{level}, int16");
        assert!(at("int8") == int8, "{level}, int8");
    }
}

#[test]
fn an_unknown_level_is_an_error_that_names_the_levels_of_the_machine() {
    let folder = folder();
    for level in ["avx9", "PORTABLE", "sse"] {
        let error = upscale(folder.path(), level, "f32").unwrap_err();
        let message = format!("TADSR_CPU={level}: this CPU has ");
        assert!(
            error.contains(&message) && error.contains("portable"),
            "{error}"
        );
    }
}
