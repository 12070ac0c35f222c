//! `tadsr-train report`: the page of a training run, made again from its folder.

use std::path::PathBuf;

use anyhow::Result;
use tadsr::train::report::{REPORT_FILE, Report};

/// Write the report of a training run: one page of HTML with losses, samples, evaluation and settings
///
/// It is made from what the run's folder has: losses.csv, recipe.toml or the settings in model.safetensors, samples, and
/// eval.json as `eval --json RUN/eval.json` writes it. Training writes it by itself at every checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tadsr-train report runs/my-x2
  tadsr-train eval --data pictures --model runs/my-x2/model.safetensors --json runs/my-x2/eval.json
  tadsr-train report runs/my-x2 -o my-x2.html")]
pub struct Args {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    folder: PathBuf,
    /// Where the page goes [default: report.html in the run's folder]
    #[arg(short, long, value_name = "HTML")]
    out: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let out = args.out.unwrap_or_else(|| args.folder.join(REPORT_FILE));
    Report::of_run(&args.folder)?.write(&out)?;
    println!("{}", out.display());
    Ok(())
}
