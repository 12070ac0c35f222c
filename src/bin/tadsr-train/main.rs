//! Command line of the training tool: one file for each subcommand.

/// Prints a line as the macro of the standard library, but does not panic if that fails.
macro_rules! println {
    ($($line:tt)*) => {
        crate::output::print(format_args!("{}\n", format_args!($($line)*)))
    };
}

mod blend;
mod data;
mod data_args;
mod distill;
mod estimator;
mod eval;
mod events;
mod export;
mod fit;
mod import;
mod info;
mod manual;
mod meter;
mod models;
mod output;
#[cfg(feature = "video")]
mod probe;
mod quantize;
mod report;
mod run;
mod stop;
mod training;
mod upscale;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tadsr::kernels::cpu::Cpu;

/// Train, measure and use the super-resolution models of the GStreamer element tadsrupscale.
#[derive(Parser)]
#[command(name = "tadsr-train", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Args),
    Fit(fit::Args),
    Distill(distill::Args),
    Estimator(estimator::Args),
    Data(data::Args),
    Eval(eval::Args),
    Import(import::Args),
    Report(report::Args),
    Blend(blend::Args),
    Quantize(quantize::Args),
    Export(export::Args),
    Upscale(upscale::Args),
    Models(models::Args),
    Info(info::Args),
    #[command(hide = true)]
    Manual(manual::Args),
    #[cfg(feature = "video")]
    #[command(hide = true)]
    Probe(probe::Args),
}

fn execute(command: Command) -> anyhow::Result<()> {
    Cpu::from_env()?;
    #[cfg(feature = "video")]
    tadsr::video::set_probe(probe::in_child);
    match command {
        Command::Run(args) => run::run(args),
        Command::Fit(args) => fit::run(args),
        Command::Distill(args) => distill::run(args),
        Command::Estimator(args) => estimator::run(args),
        Command::Data(args) => data::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Import(args) => import::run(args),
        Command::Report(args) => report::run(args),
        Command::Blend(args) => blend::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Export(args) => export::run(args),
        Command::Upscale(args) => upscale::run(args),
        Command::Models(args) => models::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Manual(args) => manual::run(&args, Cli::command()),
        #[cfg(feature = "video")]
        Command::Probe(args) => probe::run(&args),
    }
}

/// Makes a write beyond the limit on the size of files an error, instead of the end of the process.
fn outlive_file_limit() {
    #[cfg(unix)]
    // SAFETY: no handler is installed.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

fn main() -> ExitCode {
    outlive_file_limit();
    let result = execute(Cli::parse().command).and_then(|()| output::check());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The exit status of programs that Ctrl-C ends.
        Err(error) if error.is::<stop::Stopped>() => {
            let text = error.to_string();
            if !text.is_empty() {
                eprintln!("{text}");
            }
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("tadsr-train: {error:#}");
            ExitCode::FAILURE
        }
    }
}
