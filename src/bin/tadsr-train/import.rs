//! `tadsr-train import`: converts published PyTorch checkpoints to a model file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use tadsr::{
    model::{
        Precision, ResShiftMetadata,
        import::{self, Part},
    },
    nn::resshift::{DiffusionConfig, ResShiftConfig},
};

/// Licence that is recorded by default.
const LICENCE: &str = "that of the imported checkpoints, set by their authors; \
    ResShift and what is made from it: NTU S-Lab License 1.0, non-commercial use only";

/// Convert checkpoints of ResShift, SinSR or TAD-SR to a model file.
///
/// Takes the PyTorch checkpoints of the U-Net and of the autoencoder as their authors publish them,
/// recognises the architecture by the shapes of the tensors, and writes one model file. Checkpoints
/// are read as data: code in them is refused and never run. docs/resshift-models.md names the
/// sources of the checkpoints and their licences.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  tadsr-train import --unet TAD-SR.pth --autoencoder autoencoder_vq_f4.pth -o tad-sr.safetensors
  tadsr-train import --unet resshift_realsrx4_s15_v1.pth --autoencoder autoencoder_vq_f4.pth \\
      --dtype f16 -o teacher.safetensors
  tadsr-train import --unet resshift_realsrx4_s4_v3.pth --autoencoder autoencoder_vq_f4.pth \\
      --preset realsr-x4-s4 -o resshift-s4.safetensors
  tadsr-train import --unet TAD-faceir.pth --autoencoder ffhq512_vq_f8_dim8_face.pth \\
      -o faces.safetensors
  gst-launch-1.0 videotestsrc ! tadsrupscale model=tad-sr.safetensors ! autovideosink")]
pub struct Args {
    /// Checkpoint of the U-Net
    #[arg(long, value_name = "FILE")]
    unet: PathBuf,
    /// Checkpoint of the autoencoder
    #[arg(long, value_name = "FILE")]
    autoencoder: PathBuf,
    /// Model file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Published model that the checkpoint belongs to
    #[arg(long, value_enum, default_value = "auto")]
    preset: Preset,
    /// JSON file with the complete configuration, like the metadata of a model file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["preset", "image_size"])]
    config: Option<PathBuf>,
    /// Type of the weights in the model file
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Type,
    /// Name of the model [default: name of the model file]
    #[arg(long)]
    name: Option<String>,
    /// Licence to record in the model file [default: a note on the licence of ResShift]
    #[arg(long, value_name = "TEXT")]
    licence: Option<String>,
    /// Side of the latent that the U-Net was built for [default: from the masks in the checkpoint,
    /// or 64]
    #[arg(long, value_name = "CELLS")]
    image_size: Option<usize>,
    #[command(flatten)]
    schedule: ScheduleArgs,
}

/// Noise schedule of the training, which the shapes of tensors do not tell.
#[derive(clap::Args)]
#[command(next_help_heading = "Noise schedule [default: of the preset]")]
struct ScheduleArgs {
    /// Diffusion steps
    #[arg(long)]
    steps: Option<usize>,
    /// Standard deviation of the noise at eta = 1
    #[arg(long)]
    kappa: Option<f64>,
    /// Exponent of the growth
    #[arg(long)]
    power: Option<f64>,
    /// Noise level of the first step
    #[arg(long)]
    min_noise_level: Option<f64>,
    /// Square root of eta at the last step
    #[arg(long)]
    etas_end: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Preset {
    /// Architecture from the shapes; noise schedule of the preset that fits scale and file name
    Auto,
    /// Real-world x4, 15 steps: resshift_realsrx4_s15_v1 and v2, SinSR, TAD-SR
    RealsrX4,
    /// Real-world x4, 4 steps: resshift_realsrx4_s4_v3
    #[value(name = "realsr-x4-s4")]
    RealsrX4S4,
    /// Faces of 512 x 512, 4 steps: resshift_faceir_s4, TAD-faceir
    Faceir,
}

impl Preset {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::RealsrX4 => "realsr-x4",
            Self::RealsrX4S4 => "realsr-x4-s4",
            Self::Faceir => "faceir",
        }
    }

    fn config(self) -> Option<ResShiftConfig> {
        match self {
            Self::Auto => None,
            Self::RealsrX4 => Some(ResShiftConfig::realsr_x4()),
            Self::RealsrX4S4 => Some(ResShiftConfig::realsr_x4_s4()),
            Self::Faceir => Some(ResShiftConfig::faceir()),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::F16 => Precision::F16,
            Self::Bf16 => Precision::BF16,
        }
    }
}

impl ScheduleArgs {
    fn apply(&self, to: &mut DiffusionConfig) {
        to.steps = self.steps.unwrap_or(to.steps);
        to.kappa = self.kappa.unwrap_or(to.kappa);
        to.power = self.power.unwrap_or(to.power);
        to.min_noise_level = self.min_noise_level.unwrap_or(to.min_noise_level);
        to.etas_end = self.etas_end.unwrap_or(to.etas_end);
    }
}

pub fn run(args: Args) -> Result<()> {
    refuse_overwriting(&args)?;
    let mut unet = Part::open(&args.unet)?;
    let mut autoencoder = Part::open(&args.autoencoder)?;
    let (mut config, origin) = configuration(&args, &unet, &autoencoder)?;
    args.schedule.apply(&mut config.diffusion);
    runnable(&args.unet, config.check())?;

    let metadata = metadata(&args, config);
    let tensors = metadata.tensors();
    let parameters: usize = tensors
        .iter()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    let precision = args.dtype.precision();
    let bar = ProgressBar::new(parameters as u64).with_style(ProgressStyle::with_template(
        "importing {bar:30} {human_pos}/{human_len} parameters, {eta} left",
    )?);
    let progress = |done: usize| bar.set_position(done as u64);
    import::write(
        &args.out,
        &metadata,
        precision,
        &mut unet,
        &mut autoencoder,
        progress,
    )?;
    bar.finish_and_clear();
    print!("{}", summary(&args, &metadata, &origin, parameters));
    Ok(())
}

/// Adds the name of the checkpoint to a failed check of its configuration.
fn runnable(checkpoint: &Path, check: Result<(), String>) -> Result<()> {
    let context = || {
        format!(
            "'{}' is not a network that can be run",
            checkpoint.display()
        )
    };
    check.map_err(anyhow::Error::msg).with_context(context)
}

/// Refuses an output file that is one of the checkpoints.
fn refuse_overwriting(args: &Args) -> Result<()> {
    let Ok(out) = fs::canonicalize(&args.out) else {
        return Ok(());
    };
    for input in [&args.unet, &args.autoencoder] {
        if fs::canonicalize(input).is_ok_and(|input| input == out) {
            bail!(
                "--out '{}' is one of the checkpoints: choose another name",
                input.display()
            );
        }
    }
    Ok(())
}

/// Returns the configuration and a description of its origin.
fn configuration(args: &Args, unet: &Part, autoencoder: &Part) -> Result<(ResShiftConfig, String)> {
    if let Some(path) = &args.config {
        let shown = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("'{shown}'"))?;
        let config = serde_json::from_str(&text);
        let config = config.with_context(|| format!("'{shown}' is not a configuration"))?;
        return Ok((config, format!("all from '{shown}'")));
    }
    if let Some(config) = args.preset.config() {
        if args.image_size.is_some() {
            bail!("--image-size is for --preset auto; the others have theirs");
        }
        return Ok((
            config,
            format!("all from the preset {}", args.preset.name()),
        ));
    }
    let unet_config = unet.unet_config(args.image_size)?;
    let autoencoder_config = autoencoder.autoencoder_config()?;
    runnable(&args.unet, unet_config.check())?;
    runnable(&args.autoencoder, autoencoder_config.check())?;
    let side = unet_config.image_size * autoencoder_config.factor();
    if !side.is_multiple_of(unet_config.lq_size) {
        bail!(
            "'{}' makes images of {side}x{side} from {1}x{1}, which is no whole scale: do the two \
             checkpoints belong together?",
            args.unet.display(),
            unet_config.lq_size
        );
    }
    let scale = side / unet_config.lq_size;
    let file = args.unet.file_name().unwrap_or_default().to_string_lossy();
    let preset = match scale {
        1 => Preset::Faceir,
        _ if file.contains("_s4") => Preset::RealsrX4S4,
        _ => Preset::RealsrX4,
    };
    let published = preset.config().unwrap_or_else(ResShiftConfig::realsr_x4);
    let config = ResShiftConfig {
        unet: unet_config,
        autoencoder: autoencoder_config,
        diffusion: DiffusionConfig {
            scale,
            ..published.diffusion
        },
    };
    let origin = format!(
        "architecture from the shapes; noise schedule of the preset {}",
        preset.name()
    );
    Ok((config, origin))
}

fn metadata(args: &Args, config: ResShiftConfig) -> ResShiftMetadata {
    let stem = |path: &PathBuf| path.file_stem().map(|s| s.to_string_lossy().into_owned());
    let name = args.name.clone().or_else(|| stem(&args.out));
    let licence = args.licence.as_deref().unwrap_or(LICENCE);
    let mut metadata = ResShiftMetadata::new(&name.unwrap_or_default(), config, licence);
    let file = |path: &PathBuf| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    metadata.source = serde_json::json!({
        "imported": { "unet": file(&args.unet), "autoencoder": file(&args.autoencoder) }
    });
    metadata
}

/// Summary of the imported model, for the user to check.
fn summary(args: &Args, metadata: &ResShiftMetadata, origin: &str, parameters: usize) -> String {
    let ResShiftConfig {
        unet,
        autoencoder,
        diffusion,
    } = &metadata.config;
    let list = |values: &[usize]| {
        let text: Vec<String> = values.iter().map(usize::to_string).collect();
        text.join(" ")
    };
    let millions = |n: usize| n as f64 / 1e6;
    let count = |tensors: Vec<(String, Vec<usize>)>| {
        millions(
            tensors
                .iter()
                .map(|(_, s)| s.iter().product::<usize>())
                .sum(),
        )
    };
    let precision = args.dtype.precision();
    let lines = [
        format!(
            "{}: '{}', {:.1} M parameters in {precision}, {:.0} MB",
            args.out.display(),
            metadata.name,
            millions(parameters),
            millions(parameters * precision.size())
        ),
        format!(
            "  U-Net        {:.1} M: {} channels x {}, res blocks {}, Swin layers of {} channels \
             at {}, windows of {}; latent {}x{}x{}, low-resolution side {}",
            count(unet.tensors()),
            unet.model_channels,
            list(&unet.channel_mult),
            list(&unet.num_res_blocks),
            unet.swin_embed_dim,
            list(&unet.attention_resolutions),
            unet.window_size,
            unet.image_size,
            unet.image_size,
            unet.in_channels,
            unet.lq_size
        ),
        format!(
            "  autoencoder  {:.1} M: {} channels x {}, res blocks {}, 1/{} of the size, \
             {} codes of {}",
            count(autoencoder.tensors()),
            autoencoder.ch,
            list(&autoencoder.ch_mult),
            list(&autoencoder.num_res_blocks),
            autoencoder.factor(),
            autoencoder.n_embed,
            autoencoder.embed_dim
        ),
        format!(
            "  diffusion    scale {}, {} steps, kappa {}, power {}, noise from {}, eta up to {}",
            diffusion.scale,
            diffusion.steps,
            diffusion.kappa,
            diffusion.power,
            diffusion.min_noise_level,
            diffusion.etas_end
        ),
        format!("  origin       {origin}"),
        format!("  licence      {}", metadata.licence),
    ];
    lines.join("\n") + "\n"
}
