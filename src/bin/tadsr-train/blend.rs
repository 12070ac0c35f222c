//! `tadsr-train blend`: a model between two.

use std::path::PathBuf;

use anyhow::Result;
use tadsr::{model::LiteModel, train::checkpoint::write_atomically};

/// Make a model whose weights lie between those of two, one of which was trained from the other.
///
/// A model that was trained with a discriminator is crisper than the one that it began with, and further from the truth in
/// PSNR and in time; in between there is a bit of both. The last layer's bias is set so that even areas keep their level. A
/// calibration for integers is lost: `tadsr-train quantize` makes it again.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tadsr-train blend runs/plain/model.safetensors runs/a/model.safetensors --share 0.8 --out blend.safetensors")]
pub struct Args {
    /// The model that the other one's training began with
    from: PathBuf,
    /// The other one, whose name the result has
    to: PathBuf,
    /// Of the other one, 0 to 1
    #[arg(long)]
    share: f32,
    /// The model file to write
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
