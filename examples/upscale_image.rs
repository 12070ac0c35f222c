//! Upscales an image with the library.
//!
//! ```text
//! cargo run --release --example upscale_image -- IN.png OUT.png [SCALE [MODEL]]
//! ```

use std::env;

use anyhow::{Context, Result, bail};
use tadsr::{Device, Upscaler, frame::Frame};

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let (input, output, options) = match args.as_slice() {
        [input, output, options @ ..] if options.len() <= 2 => (input, output, options),
        _ => bail!("usage: upscale_image IN OUT [SCALE [MODEL]]"),
    };
    let scale = options.first().map_or("2", String::as_str);
    let scale = scale.parse().with_context(|| format!("scale '{scale}'"))?;
    let model = options.get(1).map_or("", String::as_str);

    let image = image::open(input).with_context(|| format!("'{input}'"))?;
    let (width, height) = (image.width() as usize, image.height() as usize);
    let frame = Frame::from_rgb8(width, height, image.to_rgb8().as_raw())?;

    let mut upscaler = Upscaler::load(model, Device::Auto)?;
    upscaler.set_scale(scale)?;
    let large = upscaler.upscale(&frame)?;

    let (width, height) = (large.info().width as u32, large.info().height as u32);
    image::save_buffer(
        output,
        &large.to_rgb8()?,
        width,
        height,
        image::ColorType::Rgb8,
    )
    .with_context(|| format!("'{output}'"))?;
    println!(
        "{output}: {width}x{height}, {}",
        upscaler.active_model(scale)
    );
    Ok(())
}
