//! `tadsr-train report`: writes the report of a training run again.

use std::path::PathBuf;

use anyhow::Result;
use tadsr::train::report::{REPORT_FILE, Report};

/// Write the report of a training run, one HTML page.
///
/// The page has losses, samples, evaluation and settings. They come from files in the folder of the
/// run: losses.csv, recipe.toml or the settings in model.safetensors, samples, and eval.json.
/// Training writes the report at every checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train report runs/my-x2
  # With an evaluation:
  tadsr-train eval --data pictures --model runs/my-x2/model.safetensors --json runs/my-x2/eval.json
  tadsr-train report runs/my-x2 -o my-x2.html")]
pub struct Args {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    folder: PathBuf,
    /// HTML file to write [default: report.html in the folder of the run]
    #[arg(short, long, value_name = "HTML")]
    out: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let out = args.out.unwrap_or_else(|| args.folder.join(REPORT_FILE));
    Report::of_run(&args.folder)?.write(&out)?;
    println!("{}", out.display());
    Ok(())
}
