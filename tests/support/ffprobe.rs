//! Counts what is in a file by ffprobe, a second implementation.

use std::{path::Path, process::Command};

/// Runs ffprobe and returns its text, values separated by commas.
pub fn ffprobe(path: &Path, args: &[&str]) -> String {
    let output = Command::new("ffprobe")
        .args(["-v", "error", "-of", "csv=p=0"])
        .args(args)
        .arg(path)
        .output()
        .expect("ffprobe is installed");
    assert!(output.status.success(), "{path:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
