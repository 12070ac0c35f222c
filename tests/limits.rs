//! The tool when the system refuses memory or limits the size of files.

#![cfg(all(feature = "train", target_os = "linux"))]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::CommandCargoExt;

/// Runs the tool, with a limit in the form of `prlimit`, such as `--as=200000000`.
fn run(limit: Option<&str>, args: &[&str]) -> (bool, String) {
    let tool = Command::cargo_bin("tadsr-train").unwrap();
    let mut command = match limit {
        Some(limit) => {
            let mut command = Command::new("prlimit");
            command.arg(limit).arg(tool.get_program());
            command
        }
        None => tool,
    };
    let Output { status, stderr, .. } = command.args(args).output().unwrap();
    (status.success(), String::from_utf8_lossy(&stderr).into())
}

struct Run {
    photos: PathBuf,
    out: PathBuf,
}

impl Run {
    fn new(dir: &Path, name: &str) -> Self {
        let photos = dir.join("photos");
        if !photos.exists() {
            fs::create_dir(&photos).unwrap();
            (0..3).for_each(|n| large_picture(&photos.join(format!("{n}.png")), n));
        }
        let out = dir.join(name);
        Self { photos, out }
    }

    fn fit(&self, limit: Option<&str>, more: &[&str]) -> (bool, String) {
        let fixed =
            "fit --preset clean --batch 2 --patch 32 --threads 1 --save-every 3 --name model";
        let mut args: Vec<&str> = fixed.split(' ').collect();
        args.extend(["--data", self.photos.to_str().unwrap()]);
        args.extend(["--out", self.out.to_str().unwrap()]);
        args.extend(more);
        run(limit, &args)
    }

    fn file(&self, name: &str) -> Vec<u8> {
        fs::read(self.out.join(name)).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(&self.out).unwrap();
        names
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// Writes a picture that takes 36 MB in memory.
fn large_picture(path: &Path, n: u8) {
    let picture = image::RgbImage::from_pixel(4000, 3000, image::Rgb([9, 99, 200 + n]));
    picture.save(path).unwrap();
}

/// A limit, and what is said when it is met.
type Limit = (&'static str, &'static str);
const MEMORY: Limit = ("--as=100000000", "memory");
const FILE_SIZE: Limit = ("--fsize=20000", "File too large");

#[test]
fn a_training_that_meets_a_limit_keeps_its_checkpoint_and_continues_to_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let whole = Run::new(dir.path(), "whole");
    assert!(whole.fit(None, &["--steps", "3"]).0);
    assert!(whole.fit(None, &["--steps", "6", "--resume"]).0);
    let run = Run::new(dir.path(), "run");
    assert!(run.fit(None, &["--steps", "3"]).0);
    let checkpoint = run.file("checkpoint.safetensors");
    for (limit, reason) in [MEMORY, FILE_SIZE] {
        let (done, said) = run.fit(Some(limit), &["--steps", "6", "--resume"]);
        assert!(!done && said.contains(reason), "{limit}: {said}");
        assert!(run.file("checkpoint.safetensors") == checkpoint, "{limit}");
    }
    let (done, said) = run.fit(None, &["--steps", "6", "--resume"]);
    assert!(done, "{said}");
    assert!(run.file("model.safetensors") == whole.file("model.safetensors"));
    assert!(!run.files().iter().any(|name| name.ends_with(".part")));
}

#[test]
fn other_commands_that_meet_a_limit_leave_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("large.png");
    large_picture(&picture, 0);
    let clip = dir.path().join("clip.mp4");
    let made = Command::new("ffmpeg")
        .args("-v error -f lavfi -i testsrc2=s=320x240:r=25:d=1 -c:v libx264".split(' '))
        .arg(&clip)
        .status();
    assert!(made.unwrap().success());
    let [picture, clip] = [&picture, &clip].map(|path| path.to_str().unwrap());
    let out = dir.path().join("out");
    for (name, args, (limit, reason)) in [
        (
            "a.onnx",
            vec!["export", "--model", "tiny", "--scale", "2", "--onnx"],
            FILE_SIZE,
        ),
        (
            "a.png",
            vec!["upscale", picture, "--scale", "1.1"],
            FILE_SIZE,
        ),
        ("a.png", vec!["upscale", picture, "--scale", "2"], MEMORY),
        ("a.mp4", vec!["upscale", clip, "--scale", "2"], FILE_SIZE),
    ] {
        fs::create_dir(&out).unwrap();
        let path = out.join(name);
        let args = [&args[..], &[path.to_str().unwrap()]].concat();
        let (done, said) = run(Some(limit), &args);
        assert!(!done && said.contains(reason), "{name} {limit}: {said}");
        assert!(!path.exists(), "{name} {limit}: {said}");
        fs::remove_dir_all(&out).unwrap();
    }
}
