//! Training and other commands on a full disk.

#![cfg(all(feature = "train", target_os = "linux"))]

#[path = "support/photos.rs"]
mod photos;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use assert_cmd::cargo::CommandCargoExt;

/// A file system of 16 MiB, unmounted when dropped.
struct Disk {
    folder: PathBuf,
}

impl Disk {
    fn mount(folder: &Path) -> Self {
        fs::create_dir(folder).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]);
        assert!(mount.arg(folder).status().unwrap().success());
        let folder = folder.into();
        Self { folder }
    }

    /// Leaves `bytes` bytes free.
    fn fill(&self, bytes: usize) {
        let path = self.folder.join("ballast");
        // The last write takes what is left.
        let _ = fs::write(&path, vec![0; 32 << 20]);
        let file = fs::File::options().write(true).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        file.set_len(size - bytes as u64).unwrap();
    }

    fn empty(&self) {
        fs::remove_file(self.folder.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.folder).status();
    }
}

/// Runs the tool. Returns its success and its messages.
fn run(args: &[&str]) -> (bool, String) {
    let output = Command::cargo_bin("tadsr-train")
        .unwrap()
        .args(args)
        .output();
    let output = output.unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Returns a folder for a test, photos in it, and a disk in it.
fn folder() -> (tempfile::TempDir, PathBuf, Disk) {
    let dir = tempfile::tempdir().unwrap();
    let photos = photos::photos(dir.path(), (160, 120));
    let disk = Disk::mount(&dir.path().join("disk"));
    (dir, photos, disk)
}

#[test]
#[ignore = "mounts a file system, which needs root"]
fn a_full_disk_ends_a_training_that_then_continues_to_the_same_model() {
    let (dir, photos, disk) = folder();
    let fit = |out: &Path, more: &[&str]| {
        let fixed = [
            "--preset",
            "clean",
            "--batch",
            "2",
            "--patch",
            "32",
            "--threads",
            "1",
        ];
        let mut args = vec![
            "fit",
            "--data",
            photos.to_str().unwrap(),
            "--save-every",
            "3",
        ];
        args.extend(fixed);
        args.extend([
            "--name",
            "model",
            "--steps",
            "6",
            "--out",
            out.to_str().unwrap(),
        ]);
        run(&[&args[..], more].concat())
    };
    let (whole, out) = (dir.path().join("whole"), disk.folder.join("run"));
    assert!(fit(&whole, &[]).0);
    let size = |name: &str| fs::metadata(whole.join(name)).unwrap().len() as usize;
    // Without space for a model, for a checkpoint, and for the second checkpoint.
    for free in [1 << 12, size("model.safetensors") + (1 << 14)] {
        disk.fill(free);
        let (done, said) = fit(&out, &[]);
        disk.empty();
        assert!(!done && said.contains("No space left"), "{free}: {said}");
        assert!(said.contains(out.to_str().unwrap()), "{said}");
        assert!(!out.join("checkpoint.safetensors").exists());
        fs::remove_dir_all(&out).unwrap();
    }
    let all = size("model.safetensors") + size("checkpoint.safetensors");
    disk.fill(all + all / 4);
    let (done, said) = fit(&out, &[]);
    disk.empty();
    assert!(!done && said.contains("No space left"), "{said}");
    let (done, said) = fit(&out, &["--resume"]);
    assert!(done, "{said}");
    let model = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(model(&whole) == model(&out));
}

#[test]
#[ignore = "mounts a file system, which needs root"]
fn other_commands_leave_no_file_on_a_full_disk() {
    let (_dir, photos, disk) = folder();
    disk.fill(1 << 12);
    let path = |name: &str| disk.folder.join(name).to_str().unwrap().to_string();
    let picture = photos.join("0.png");
    let picture = picture.to_str().unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-x2.safetensors");
    let commands: [(&str, Vec<&str>); 4] = [
        (
            "a.onnx",
            vec!["export", "--model", "tiny", "--scale", "2", "--onnx"],
        ),
        ("a.png", vec!["upscale", picture, "--scale", "2"]),
        ("a.jpg", vec!["upscale", picture, "--scale", "2"]),
        (
            "a.safetensors",
            vec!["blend", model, model, "--share", "0.5", "--out"],
        ),
    ];
    for (name, args) in &commands {
        let out = path(name);
        let (done, said) = run(&[&args[..], &[&out]].concat());
        assert!(!done && said.contains("No space left"), "{name}: {said}");
        assert!(said.contains(&out), "{name}: {said}");
    }
    let left = fs::read_dir(&disk.folder)
        .unwrap()
        .map(|e| e.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["ballast"]);
}
