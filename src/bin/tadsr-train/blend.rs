//! `tadsr-train blend`: interpolates between two models.

use std::path::PathBuf;

use anyhow::Result;
use tadsr::{model::LiteModel, train::checkpoint::write_atomically};

/// Interpolate between the weights of two models, one of which was trained from the other.
///
/// A model that was trained with a discriminator is sharper than the model that it began with, and
/// has a lower PSNR and less temporal stability. A model in between compromises. The bias of the
/// last layer is set so that flat areas keep their level. The calibration is removed; run
/// `tadsr-train quantize` on the result.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train blend runs/plain/model.safetensors runs/a/model.safetensors --share 0.8 \\
      --out blend.safetensors")]
pub struct Args {
    /// Model file that the training of TO began with
    from: PathBuf,
    /// Model file that was trained from FROM; the result has its name
    to: PathBuf,
    /// Share of TO in the result, 0 to 1
    #[arg(long)]
    share: f32,
    /// Model file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write the weights in f32 instead of f16
    #[arg(long)]
    full: bool,
}

pub fn run(args: Args) -> Result<()> {
    let [from, to] = [LiteModel::read(&args.from)?, LiteModel::read(&args.to)?];
    let mut model = from.blend(&to, args.share)?;
    model.level();
    write_atomically(&args.out, &model.to_bytes(!args.full)?)?;
    println!("{}: '{}'", model.metadata.name, args.out.display());
    Ok(())
}
