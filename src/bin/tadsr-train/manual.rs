//! `tadsr-train manual`: writes man pages and shell completions for packages.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap_complete::{Shell, generate_to};

/// Write man pages and shell completions.
///
/// The folders below DIR are those of an installation prefix: share/man and others.
#[derive(clap::Args)]
pub struct Args {
    /// Folder to write to
    #[arg(value_name = "DIR")]
    prefix: PathBuf,
}

pub fn run(args: &Args, command: clap::Command) -> Result<()> {
    let folder = |name: &str| -> Result<PathBuf> {
        let path = args.prefix.join("share").join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make '{}'", path.display()))?;
        Ok(path)
    };
    // Each `help` subcommand would have a page for every command.
    let mut command = command
        .disable_help_subcommand(true)
        .mut_subcommands(|subcommand| subcommand.disable_help_subcommand(true));
    for (shell, name) in [
        (Shell::Bash, "bash-completion/completions"),
        (Shell::Fish, "fish/vendor_completions.d"),
        (Shell::Zsh, "zsh/site-functions"),
    ] {
        let folder = folder(name)?;
        generate_to(shell, &mut command, "tadsr-train", &folder)
            .with_context(|| format!("cannot write to '{}'", folder.display()))?;
    }
    let folder = folder("man/man1")?;
    clap_mangen::generate_to(command, &folder)
        .with_context(|| format!("cannot write to '{}'", folder.display()))
}
