//! The command line of the training tool: one file a subcommand.

mod blend;
mod corpus;
mod data;
mod distill;
mod dry_run;
mod eval;
mod export;
mod fit;
mod import;
mod meter;
mod quantize;
mod recipe;
mod report;
mod run;
mod stop;
mod upscale;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tadsr::kernels::cpu::Cpu;

/// Trains, measures and uses super-resolution models: those of the GStreamer element tadsrupscale.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(recipe::Args),
    Fit(fit::Args),
    Distill(distill::Args),
    Data(data::Args),
    Eval(eval::Args),
    Import(import::Args),
    Report(report::Args),
    Blend(blend::Args),
    Quantize(quantize::Args),
    Export(export::Args),
    Upscale(upscale::Args),
}

fn execute(command: Command) -> anyhow::Result<()> {
    Cpu::from_env()?;
    match command {
        Command::Run(args) => recipe::run(args),
        Command::Fit(args) => fit::run(args),
        Command::Distill(args) => distill::run(args),
        Command::Data(args) => data::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Import(args) => import::run(args),
        Command::Report(args) => report::run(args),
        Command::Blend(args) => blend::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Export(args) => export::run(args),
        Command::Upscale(args) => upscale::run(args),
    }
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        // As programs end that Ctrl-C ends.
        Err(error) if error.is::<stop::Stopped>() => {
            eprintln!("{error}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("tadsr-train: {error:#}");
            ExitCode::FAILURE
        }
    }
}
