//! Inference of the architecture of a ResShift network from the names and shapes of its tensors.
//!
//! For inconsistent tensors the result may be wrong: the caller compares every name and shape with
//! those of the resulting configuration.

use std::collections::BTreeMap;

use crate::nn::resshift::{AutoencoderConfig, UnetConfig};

type Shapes = BTreeMap<String, Vec<usize>>;

/// Limit on levels and stages, more than any network has.
const MAX_LEVELS: usize = 8;

/// Returns the shape of a tensor of `N` dimensions, none of them 0.
fn dims<const N: usize>(shapes: &Shapes, name: &str) -> Result<[usize; N], String> {
    let shape = shapes
        .get(name)
        .ok_or_else(|| format!("there is no '{name}'"))?;
    let dims = <[usize; N]>::try_from(shape.as_slice()).ok();
    dims.filter(|d| !d.contains(&0))
        .ok_or_else(|| format!("'{name}' has shape {shape:?}, not {N} dimensions"))
}

/// Returns `a / b` if it is an integer.
fn ratio(what: &str, a: usize, b: usize) -> Result<usize, String> {
    if a.is_multiple_of(b) {
        Ok(a / b)
    } else {
        Err(format!("{what}: {a} is not a multiple of {b}"))
    }
}

/// Returns the number of tensors that are named with 0, 1, 2 ...
fn count(shapes: &Shapes, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| shapes.contains_key(&name(i))).count()
}

/// A level of the U-Net's encoder.
#[derive(Default)]
struct Level {
    channels: usize,
    blocks: usize,
    /// Name of its Swin layer.
    swin: Option<String>,
}

/// Infers the U-Net of these tensors.
pub(super) fn unet(shapes: &Shapes, image_size: Option<usize>) -> Result<UnetConfig, String> {
    let first = dims::<4>(shapes, "input_blocks.0.0.weight");
    let [base, inputs, ..] = first.map_err(|e| {
        let hint = if shapes.contains_key("encoder.conv_in.weight") {
            " it is an autoencoder: are --unet and --autoencoder swapped?"
        } else {
            ""
        };
        format!("not a U-Net of this family: {e}.{hint}")
    })?;
    let [out_channels, ..] = dims::<4>(shapes, "out.2.weight")?;
    let levels = levels(shapes)?;
    let swin = Swin::of(shapes, &levels)?;
    let stages = count(shapes, |i| format!("feature_extractor.{}.weight", 3 * i));
    if stages > MAX_LEVELS {
        return Err(format!("{stages} stages of a feature extractor"));
    }
    let image_size = image_size.or(swin.image_size).unwrap_or(64);
    let with_swin = levels.iter().enumerate().filter(|(_, l)| l.swin.is_some());
    let multiples = levels
        .iter()
        .map(|l| ratio("channels of a level", l.channels, base));
    Ok(UnetConfig {
        image_size,
        in_channels: out_channels,
        out_channels,
        model_channels: base,
        channel_mult: multiples.collect::<Result<_, _>>()?,
        num_res_blocks: levels.iter().map(|l| l.blocks).collect(),
        attention_resolutions: with_swin.map(|(i, _)| image_size >> i).collect(),
        num_head_channels: ratio("channels of a head", swin.embed, swin.heads)?,
        swin_depth: swin.depth,
        swin_embed_dim: swin.embed,
        window_size: swin.window,
        mlp_ratio: swin.mlp_ratio,
        cond_lq: inputs > out_channels,
        lq_size: image_size.saturating_mul(1 << stages),
    })
}

/// Returns the levels of the encoder. Convolutions of stride 2 separate them.
fn levels(shapes: &Shapes) -> Result<Vec<Level>, String> {
    let mut levels = vec![Level::default()];
    for i in 1.. {
        let block = format!("input_blocks.{i}");
        if shapes.contains_key(&format!("{block}.0.op.weight")) {
            levels.push(Level::default());
        } else if shapes.contains_key(&format!("{block}.0.out_layers.3.weight")) {
            let [channels, ..] = dims::<4>(shapes, &format!("{block}.0.out_layers.3.weight"))?;
            let Some(level) = levels.last_mut() else {
                break;
            };
            level.channels = channels;
            level.blocks += 1;
            let swin = format!("{block}.1");
            if shapes.contains_key(&format!("{swin}.patch_embed.proj.weight")) {
                level.swin = Some(swin);
            }
        } else {
            break;
        }
    }
    if levels.len() > MAX_LEVELS {
        return Err(format!("{} levels", levels.len()));
    }
    Ok(levels)
}

/// Common configuration of the Swin layers.
struct Swin {
    embed: usize,
    depth: usize,
    heads: usize,
    window: usize,
    mlp_ratio: usize,
    /// Side of the latent, if there is a mask.
    image_size: Option<usize>,
}

impl Swin {
    fn of(shapes: &Shapes, levels: &[Level]) -> Result<Self, String> {
        // The middle block always has one.
        let middle = "middle_block.1";
        let [embed, ..] = dims::<4>(shapes, &format!("{middle}.patch_embed.proj.weight"))?;
        let [hidden, ..] = dims::<4>(shapes, &format!("{middle}.blocks.0.mlp.fc1.weight"))?;
        let table = |site: &str| {
            let name = format!("{site}.blocks.0.attn.relative_position_bias_table");
            dims::<2>(shapes, &name)
        };
        let [offsets, heads] = table(middle)?;
        // A window shrinks to a smaller latent. The largest window is that of the configuration.
        let mut window = side_of_table(offsets);
        let mut image_size = None;
        for (i, site) in levels.iter().enumerate() {
            let Some(site) = &site.swin else { continue };
            window = window.max(side_of_table(table(site)?[0]));
            // Shifted blocks have a mask for every window of the latent.
            let mask = dims::<3>(shapes, &format!("{site}.blocks.1.attn_mask"));
            if let (Ok([windows, pixels, _]), None) = (mask, image_size) {
                let side = windows.isqrt().checked_mul(pixels.isqrt());
                image_size = side.and_then(|side| side.checked_mul(1 << i));
            }
        }
        Ok(Self {
            embed,
            depth: count(shapes, |i| format!("{middle}.blocks.{i}.norm1.weight")),
            heads,
            window,
            mlp_ratio: ratio("width of an MLP", hidden, embed)?,
            image_size,
        })
    }
}

/// Returns the side of a window whose table has (2 side - 1)^2 offsets.
fn side_of_table(offsets: usize) -> usize {
    offsets.isqrt().div_ceil(2)
}

/// Infers the autoencoder of these tensors.
pub(super) fn autoencoder(shapes: &Shapes) -> Result<AutoencoderConfig, String> {
    let first = dims::<4>(shapes, "encoder.conv_in.weight");
    let [ch, in_channels, ..] = first.map_err(|e| {
        let hint = if shapes.contains_key("input_blocks.0.0.weight") {
            " it is a U-Net: are --unet and --autoencoder swapped?"
        } else {
            ""
        };
        format!("not an autoencoder of this family: {e}.{hint}")
    })?;
    let [out_channels, ..] = dims::<4>(shapes, "decoder.conv_out.weight")?;
    let [z_channels, ..] = dims::<4>(shapes, "encoder.conv_out.weight")?;
    let [n_embed, embed_dim] = dims::<2>(shapes, "quantize.embedding.weight")?;
    let conv = |level: usize, i: usize| format!("encoder.down.{level}.block.{i}.conv1.weight");
    let levels = count(shapes, |level| conv(level, 0));
    let multiple = |level| {
        let [channels, ..] = dims::<4>(shapes, &conv(level, 0))?;
        ratio("channels of a level", channels, ch)
    };
    Ok(AutoencoderConfig {
        in_channels,
        out_channels,
        ch,
        ch_mult: (0..levels).map(multiple).collect::<Result<_, String>>()?,
        num_res_blocks: (0..levels)
            .map(|level| count(shapes, |i| conv(level, i)))
            .collect(),
        z_channels,
        embed_dim,
        n_embed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::resshift::ResShiftConfig;

    fn shapes(tensors: Vec<(String, Vec<usize>)>) -> Shapes {
        tensors.into_iter().collect()
    }

    #[test]
    fn every_resshift_architecture_is_inferred_from_its_shapes() {
        for config in [ResShiftConfig::realsr_x4(), ResShiftConfig::faceir()] {
            let found = unet(&shapes(config.unet.tensors()), None).unwrap();
            assert_eq!(found, config.unet);
            let found = autoencoder(&shapes(config.autoencoder.tensors())).unwrap();
            assert_eq!(found, config.autoencoder);
        }
    }

    #[test]
    fn other_widths_depths_and_sites_are_inferred() {
        let mut config = ResShiftConfig::realsr_x4().unet;
        config.model_channels = 64;
        config.channel_mult = vec![1, 3, 2];
        config.num_res_blocks = vec![1, 3, 2];
        config.attention_resolutions = vec![16];
        config.swin_depth = 3;
        config.swin_embed_dim = 96;
        config.num_head_channels = 24;
        config.window_size = 4;
        config.mlp_ratio = 2;
        config.image_size = 32;
        config.lq_size = 128;
        let mut tensors = shapes(config.tensors());
        assert_eq!(unet(&tensors, Some(32)).unwrap(), config);
        // 4 x 4 windows of 4 x 4 pixels at half the size.
        tensors.insert(
            "input_blocks.3.1.blocks.1.attn_mask".into(),
            vec![16, 16, 16],
        );
        assert_eq!(unet(&tensors, None).unwrap(), config);
        config.cond_lq = false;
        config.lq_size = 32;
        assert_eq!(unet(&shapes(config.tensors()), Some(32)).unwrap(), config);
    }

    #[test]
    fn tensors_of_other_networks_are_refused() {
        let config = ResShiftConfig::realsr_x4();
        let swapped = unet(&shapes(config.autoencoder.tensors()), None).unwrap_err();
        assert!(swapped.contains("swapped"), "{swapped}");
        let swapped = autoencoder(&shapes(config.unet.tensors())).unwrap_err();
        assert!(swapped.contains("swapped"), "{swapped}");
        let mut tensors = shapes(config.unet.tensors());
        for shape in [vec![], vec![0; 4], vec![usize::MAX; 4], vec![1; 5]] {
            for name in config.unet.tensors().iter().map(|(name, _)| name).take(40) {
                let good = tensors.insert(name.clone(), shape.clone());
                let _ = unet(&tensors, None);
                tensors.insert(name.clone(), good.unwrap());
            }
        }
    }
}
