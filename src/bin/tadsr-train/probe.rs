//! Decoding of a file's first frame in a child process, because some decoders crash.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Result;
use tadsr::video::Reader;

/// Decode the first frame of a video
#[derive(Debug, clap::Args)]
pub struct Args {
    input: PathBuf,
}

/// Name of the environment variable that is set in the child.
const CHILD: &str = "TADSR_PROBE";

pub fn run(args: &Args) -> Result<()> {
    Reader::open(&args.input)?;
    Ok(())
}

/// Runs this program as a child that decodes the start of `path`. Only a crash is an error. Other
/// failures occur again in this process, with a better message.
pub fn in_child(path: &Path) -> Result<(), String> {
    if env::var_os(CHILD).is_some() {
        return Ok(());
    }
    let Ok(program) = env::current_exe() else {
        return Ok(());
    };
    let child = Command::new(program)
        .arg("probe")
        .arg(path)
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // A process without an exit code was ended by a signal.
    if child.is_ok_and(|status| status.code().is_none()) {
        return Err(
            "its decoder crashes: GStreamer does not know its pixel format; convert it first"
                .into(),
        );
    }
    Ok(())
}
