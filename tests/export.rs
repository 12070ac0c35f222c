//! `tadsr-train export` writes the file and an example of the engine, and refuses other models.
#![cfg(feature = "train")]

#[path = "support/yuv_model.rs"]
mod yuv_model;

use std::fs;

use assert_cmd::Command;
use candle_core::{Device, safetensors};

fn export(args: &[&str]) -> std::process::Output {
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.arg("export").args(args).output().unwrap()
}

#[test]
fn a_model_and_its_example_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (onnx, example) = (path("tiny.onnx"), path("tiny.safetensors"));
    for (ends, input, result) in [("planes", "y", "y_out"), ("latent", "latent", "residual")] {
        let args = [
            "--model",
            "tiny",
            "--scale",
            "3",
            "--onnx",
            &onnx,
            "--example",
            &example,
            "--ends",
            ends,
        ];
        let output = export(&args);
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("tiny-x4"), "the model for the scale: {said}");
        // 46 thousand parameters of four bytes and a small graph.
        let size = fs::metadata(&onnx).unwrap().len();
        assert!((184_000..200_000).contains(&size), "{size} bytes");
        let tensors = safetensors::load(&example, &Device::Cpu).unwrap();
        let rank4 = |name: &str| tensors[name].dims4().unwrap();
        let ((_, c, h, w), (_, c2, h2, w2)) = (rank4(input), rank4(result));
        assert!(c == c2 && h >= h2 && w >= w2, "{ends}");
    }
}

#[test]
fn a_network_from_picture_to_picture_has_sizes_of_the_picture() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (onnx, example) = (path("a.onnx"), path("a.safetensors"));
    let model = yuv_model::yuv_model(&dir).to_str().unwrap().to_string();
    for (scale, size, sizes) in [
        ("2", "45x31", [(45, 31), (90, 62), (23, 16), (45, 31)]),
        ("3", "9x7", [(9, 7), (27, 21), (5, 4), (14, 11)]),
    ] {
        let files = [
            "--onnx",
            &onnx,
            "--example",
            &example,
            "--example-size",
            size,
        ];
        let args = ["--model", &model, "--ends", "picture", "--scale", scale];
        let output = export(&[&args[..], &files].concat());
        assert!(output.status.success(), "{output:?}");
        let tensors = safetensors::load(&example, &Device::Cpu).unwrap();
        for (name, (w, h)) in ["y", "y_out", "u", "u_out"].into_iter().zip(sizes) {
            assert_eq!(tensors[name].dims4().unwrap(), (1, 1, h, w), "{name}");
        }
    }
    let args = [
        "--model", "tiny", "--ends", "picture", "--scale", "1.5", "--onnx", &onnx,
    ];
    let output = export(&args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("whole scale"),
        "{said}"
    );
}

#[test]
fn unknown_scales_and_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let onnx = dir.path().join("x.onnx");
    let onnx = onnx.to_str().unwrap();
    for (model, scale, reason) in [
        ("tiny", "5", "serves scales 1 to 4"),
        ("nothing", "2", "neither a file nor a bundled model"),
    ] {
        let output = export(&["--model", model, "--scale", scale, "--onnx", onnx]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(reason), "{said}");
        assert!(fs::metadata(onnx).is_err());
    }
}
