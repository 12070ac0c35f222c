//! `tadsr-train upscale` in a folder of its own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use assert_cmd::Command;

pub struct Folder(pub tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the command in the folder. Returns success, standard output and standard error.
    pub fn upscale(&self, args: &[&str]) -> (bool, String, String) {
        self.upscale_with(args, &[])
    }

    pub fn upscale_with(
        &self,
        args: &[&str],
        environment: &[(&str, &str)],
    ) -> (bool, String, String) {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.current_dir(self.0.path()).arg("upscale").args(args);
        command.envs(environment.iter().copied());
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.success(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    pub fn succeeds(&self, args: &[&str]) -> String {
        let (success, out, err) = self.upscale(args);
        assert!(success, "{args:?}: {err}");
        out + &err
    }

    pub fn fails(&self, args: &[&str]) -> String {
        let (success, _, err) = self.upscale(args);
        assert!(!success, "{args:?} succeeded");
        err
    }

    /// Makes a file by ffmpeg in the folder, with arguments separated by spaces.
    pub fn ffmpeg(&self, args: &str) {
        let made = std::process::Command::new("ffmpeg")
            .current_dir(self.0.path())
            .args(["-v", "error", "-y"])
            .args(args.split_whitespace())
            .status();
        assert!(made.expect("ffmpeg is installed").success(), "{args}");
    }

    pub fn files(&self, folder: &str) -> Vec<String> {
        fn visit(root: &Path, at: &Path, files: &mut Vec<String>) {
            for entry in fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    visit(root, &path, files);
                } else {
                    let name = path.strip_prefix(root).unwrap();
                    files.push(name.to_str().unwrap().into());
                }
            }
        }
        let (root, mut files) = (self.path(folder), Vec::new());
        visit(&root, &root, &mut files);
        files.sort();
        files
    }
}
