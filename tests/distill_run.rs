//! `tadsr-train distill` on a small teacher with random weights.

#![cfg(feature = "train")]

#[path = "support/photos.rs"]
mod photos;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
};

use assert_cmd::cargo::CommandCargoExt;
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tadsr::{
    model::{Precision, ResShiftMetadata, ResShiftModel},
    nn::resshift::{AutoencoderConfig, DiffusionConfig, ResShiftConfig, UnetConfig},
};

/// Returns a network of the ResShift family for latents of 8 x 8 that samples in `steps` steps.
fn config(channels: usize, steps: usize) -> ResShiftConfig {
    ResShiftConfig {
        unet: UnetConfig {
            image_size: 8,
            in_channels: 3,
            out_channels: 3,
            model_channels: channels,
            channel_mult: vec![1, 1],
            num_res_blocks: vec![1, 1],
            attention_resolutions: vec![4],
            num_head_channels: 16,
            swin_depth: 2,
            swin_embed_dim: 32,
            window_size: 4,
            mlp_ratio: 2,
            cond_lq: true,
            lq_size: 8,
        },
        autoencoder: AutoencoderConfig {
            in_channels: 3,
            out_channels: 3,
            ch: 32,
            ch_mult: vec![1, 1, 1],
            num_res_blocks: vec![1, 1, 1],
            z_channels: 3,
            embed_dim: 3,
            n_embed: 16,
        },
        diffusion: DiffusionConfig {
            scale: 4,
            steps,
            kappa: 2.0,
            power: 0.3,
            min_noise_level: 0.2,
            etas_end: 0.99,
        },
    }
}

/// Last layers of the branches parallel to skip connections.
const BRANCHES: [&str; 4] = ["out_layers.3", "attn.proj", "mlp.fc2", "unembed.proj"];

/// Writes a model with random weights.
fn teacher(path: &Path, config: ResShiftConfig) {
    let metadata = ResShiftMetadata::new("teacher", config, "MIT");
    let mut rng = StdRng::seed_from_u64(4);
    let mut tensor = |(name, shape): (String, Vec<usize>)| {
        let inputs: usize = shape.iter().skip(1).product();
        let values = (0..shape.iter().product()).map(|_| match shape.len() {
            1 if name.ends_with("weight") => 1.0,
            1 => 0.0,
            _ => rng.random_range(-1.0..1.0) * (3.0 / inputs as f32).sqrt(),
        });
        let mut values: Vec<f32> = values.collect();
        match name.as_str() {
            // [co, latent and picture, 3, 3].
            "unet.input_blocks.0.0.weight" => {
                for co in values.chunks_exact_mut(2 * 27) {
                    co[..27].iter_mut().for_each(|v| *v *= 0.005);
                }
            }
            // Time and branches have little effect. The result of one step then resembles that of
            // all steps, and few training steps have a visible effect.
            // all steps are alike, and few training steps show.
            n if n.ends_with("emb_layers.1.weight") => values.iter_mut().for_each(|v| *v *= 0.02),
            n if BRANCHES.iter().any(|b| n.contains(b)) => {
                values.iter_mut().for_each(|v| *v *= 0.2);
            }
            _ => {}
        }
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    let tensors: HashMap<_, _> = metadata.tensors().into_iter().map(&mut tensor).collect();
    let model = ResShiftModel { metadata, tensors };
    model.save(path, Precision::F32).unwrap();
}

struct Folder {
    dir: tempfile::TempDir,
    data: PathBuf,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = photos::photos(dir.path(), (96, 80));
        teacher(&dir.path().join("teacher.safetensors"), config(32, 4));
        Self { dir, data }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn distill(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.arg("distill").arg("--teacher");
        command.arg(self.at("teacher.safetensors"));
        command.arg("--data").arg(&self.data);
        command.arg("-o").arg(self.at(out));
        command
            .args(["--batch", "2", "--lr", "3e-4", "--warm-up", "5"])
            .args(more);
        command
    }

    /// Returns the columns of the losses of a run by name.
    fn losses(&self, out: &str) -> HashMap<String, Vec<f64>> {
        let text = std::fs::read_to_string(self.at(out).join("losses.csv")).unwrap();
        let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
        let names = lines.next().unwrap();
        let rows: Vec<_> = lines.collect();
        let column = |i: usize| rows.iter().map(|row| row[i].parse().unwrap()).collect();
        let columns = names.iter().enumerate();
        columns
            .map(|(i, name)| (name.to_string(), column(i)))
            .collect()
    }
}

/// Runs the command. Returns its standard output and error.
fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

fn fails(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    text
}

/// Returns the held-out distances to the result of the teacher that a run printed.
fn distances(text: &str) -> Vec<f64> {
    let parts = text.split("held out ").skip(1);
    parts
        .map(|p| p.split(' ').next().unwrap().parse().unwrap())
        .collect()
}

/// Returns the file names in a folder.
fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A recipe makes the same model as the options of the command, and continues without an option.
#[test]
fn a_recipe_with_a_published_teacher_is_the_same_run() {
    let folder = Folder::new();
    run(folder.distill(
        "line",
        &["--steps", "4", "--starts", "1,3", "--name", "student"],
    ));
    let recipe = folder.at("recipe.toml");
    let text = "published = 'teacher.safetensors'\ndata = ['photos']\nsteps = 4\nbatch = 2\nlr = 3e-4\nwarm_up = 5\n\
                starts = [1, 3]\nname = 'student'\n";
    std::fs::write(&recipe, text).unwrap();
    let command = |more: &[&str]| {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command
            .arg("run")
            .arg(&recipe)
            .arg("--out")
            .arg(folder.at("recipe"));
        command.args(more);
        command
    };
    run(command(&[]));
    let model = |run: &str| std::fs::read(folder.at(run).join("model.safetensors")).unwrap();
    assert!(model("line") == model("recipe"));
    // The run is complete. Folders in the options replace those of the recipe.
    assert!(run(command(&[])).contains("done"));
    assert!(fails(command(&["--data", "/nowhere"])).contains("nowhere"));
    assert!(run(command(&["--dry-run"])).contains("one step of 2 images"));
    for option in ["--teacher", "--begin", "--lpips"] {
        assert!(fails(command(&[option, "there"])).contains(option));
    }
    std::fs::write(&recipe, format!("{text}stepps = 4\n")).unwrap();
    assert!(fails(command(&[])).contains("stepps"));
}

#[test]
fn the_student_comes_closer_to_the_teachers_result() {
    let folder = Folder::new();
    // A copy of the teacher with a fifth of its output's contrast.
    let mut lost = ResShiftModel::read(&folder.at("teacher.safetensors")).unwrap();
    let output = lost.tensors.get_mut("unet.out.2.weight").unwrap();
    *output = (&*output * 0.2).unwrap();
    lost.metadata.name = "lost".into();
    lost.metadata.licence = "NTU S-Lab 1.0".into();
    let path = folder.at("student.safetensors");
    lost.save(&path, Precision::F32).unwrap();
    let options = [
        "--steps",
        "60",
        "--save-every",
        "60",
        "--ema",
        "0.8",
        "--student",
    ];
    let mut command = folder.distill("run", &options);
    command.arg(path);
    let text = run(command);
    let losses = folder.losses("run");
    for (name, column) in &losses {
        assert_eq!(column.len(), 60);
        assert!(column.iter().all(|v| v.is_finite()), "{name}: {column:?}");
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let regression = &losses["regression"];
    let fall = mean(&regression[50..]) / mean(&regression[..10]);
    let d = distances(&text);
    eprintln!("{} to {}; regression falls to {fall}", d[0], d[1]);
    assert!(
        fall < 0.75,
        "the regression only fell to {fall} of what it was"
    );
    assert!(
        d[1] < 0.8 * d[0],
        "{} from the teacher's result, then {}",
        d[0],
        d[1]
    );
    // The sources of the model are recorded.
    let made = ResShiftModel::read(&folder.at("run/model.safetensors")).unwrap();
    assert_eq!(made.metadata.licence, "MIT AND NTU S-Lab 1.0");
    assert_eq!(made.metadata.source["teacher"]["name"], "teacher");
    assert_eq!(made.metadata.source["begun_with"]["name"], "lost");
    // At the start the discriminator cannot distinguish anything.
    assert!((losses["discriminator"][0] - 2.0).abs() < 0.1);
}

/// Feature maps in bf16 and weights in f32, as on CUDA. On the CPU the operators of candle compute
/// them.
#[test]
fn losses_in_bf16_are_those_in_f32_except_for_rounding() {
    let folder = Folder::new();
    for precision in ["f32", "bf16"] {
        let options = [
            "--steps",
            "3",
            "--save-every",
            "3",
            "--precision",
            precision,
        ];
        run(folder.distill(precision, &options));
    }
    let [full, short] = ["f32", "bf16"].map(|out| folder.losses(out));
    for name in ["regression", "discriminator"] {
        for (a, b) in full[name].iter().zip(&short[name]) {
            // The initial loss of the discriminator is the same in every precision.
            assert!(a != b || name == "discriminator", "{name}: as in f32");
            assert!((a - b).abs() < 0.1 * a.abs().max(0.1), "{name}: {a}, {b}");
        }
    }
    let model = ResShiftModel::read(&folder.at("bf16/model.safetensors")).unwrap();
    let weights = &model.tensors["unet.out.2.weight"];
    let rounded = weights.to_dtype(candle_core::DType::BF16).unwrap();
    let off = (weights - rounded.to_dtype(candle_core::DType::F32).unwrap()).unwrap();
    assert!(
        off.abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            > 0.0
    );
}

/// Stops a run by Ctrl-C, continues it, and compares it with a run that was not stopped.
#[test]
#[cfg(unix)]
fn a_stopped_run_continues_to_the_same_losses_and_model() {
    let folder = Folder::new();
    let options = [
        "--name",
        "same",
        "--steps",
        "14",
        "--save-every",
        "2",
        "--accumulate",
        "2",
        "--starts",
        "1,3",
    ];
    run(folder.distill("whole", &options));
    let mut child = folder.distill("stopped", &options);
    let mut child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
    while !folder.at("stopped/model.safetensors").exists() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "ended before its first checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    let kill = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(
        text.contains("continue with the same command and --resume"),
        "{text}"
    );
    let resume = [&options[..], &["--resume"]].concat();
    // Another teacher, other options and a new run in the same folder are refused.
    let refused = fails(folder.distill("stopped", &options));
    assert!(refused.contains("--resume"), "{refused}");
    let other = fails(folder.distill("stopped", &[&resume[..], &["--score", "0.5"]].concat()));
    assert!(other.contains("other options"), "{other}");
    let file = folder.at("teacher.safetensors");
    let original = std::fs::read(&file).unwrap();
    let mut another = ResShiftModel::read(&file).unwrap();
    let bias = another.tensors.get_mut("unet.out.2.bias").unwrap();
    *bias = (&*bias + 0.1).unwrap();
    another.save(&file, Precision::F32).unwrap();
    let other = fails(folder.distill("stopped", &resume));
    assert!(other.contains("another teacher"), "{other}");
    std::fs::write(&file, original).unwrap();
    run(folder.distill("stopped", &resume));
    let read = |run: &str, name: &str| std::fs::read(folder.at(run).join(name)).unwrap();
    let losses = |run| String::from_utf8(read(run, "losses.csv")).unwrap();
    assert_eq!(losses("whole").lines().count(), 15);
    assert_eq!(losses("whole"), losses("stopped"));
    let same = read("whole", "model.safetensors") == read("stopped", "model.safetensors");
    assert!(same, "resumed and uninterrupted run differ");
}

#[test]
fn a_narrower_student_is_a_model_of_the_family_and_a_dry_run_writes_nothing() {
    let folder = Folder::new();
    teacher(&folder.at("teacher.safetensors"), config(64, 3));
    let options = [
        "--steps",
        "3",
        "--student-channels",
        "32",
        "--name",
        "narrow",
    ];
    let text = run(folder.distill("dry", &[&options[..], &["--dry-run"]].concat()));
    assert!(
        text.contains("one step of 2 images") && text.contains("3 steps"),
        "{text}"
    );
    assert!(!folder.at("dry").exists());
    let text = run(folder.distill("run", &options));
    assert!(text.contains("3 photos are too few"), "{text}");
    let mut names = files(&folder.at("run"));
    // The name of TensorBoard's file contains time and process.
    names.retain(|name| !name.starts_with("events.out.tfevents."));
    let expected = [
        "checkpoint.safetensors",
        "losses.csv",
        "model.safetensors",
        "report.html",
    ];
    assert_eq!(names, expected);
    let student = ResShiftModel::read(&folder.at("run/model.safetensors")).unwrap();
    assert_eq!(student.metadata.name, "narrow");
    assert_eq!(student.metadata.config.unet.model_channels, 32);
    assert_eq!(student.metadata.source["steps_done"], 3);
    // The file converts a latent of the teacher's autoencoder to another one.
    let z = Tensor::zeros((1, 8, 8, 3), DType::F32, &Device::Cpu).unwrap();
    let unet = student.unet(&Device::Cpu).unwrap();
    let z = unet.forward(&z, &[2], Some(&z)).unwrap();
    let image = student
        .autoencoder(&Device::Cpu)
        .unwrap()
        .decode(&z, true)
        .unwrap();
    assert_eq!(image.dims(), [1, 32, 32, 3]);
}

#[test]
fn losses_of_weight_zero_are_left_out() {
    let folder = Folder::new();
    let options = ["--steps", "2", "--score", "0", "--adversarial", "0"];
    run(folder.distill("run", &options));
    let losses = folder.losses("run");
    for name in [
        "score",
        "generator",
        "discriminator",
        "grad_score",
        "grad_generator",
    ] {
        assert_eq!(losses[name], [0.0, 0.0]);
    }
    assert!(losses["regression"].iter().all(|l| *l > 0.0));
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_names_the_remedy() {
    let folder = Folder::new();
    let file = folder.at("teacher.safetensors");
    let mut model = ResShiftModel::read(&file).unwrap();
    let bias = model.tensors.get_mut("unet.out.2.bias").unwrap();
    *bias = (&*bias + 1e30).unwrap();
    model.save(&file, Precision::F32).unwrap();
    let options = ["--steps", "4", "--from-scratch", "--adversarial", "0"];
    let text = fails(folder.distill("run", &options));
    assert!(
        text.contains("at step 0") && text.contains("lower learning rate"),
        "{text}"
    );
    assert!(!folder.at("run/checkpoint.safetensors").exists());
}

#[test]
fn mistakes_are_explained() {
    let folder = Folder::new();
    for (options, word) in [
        (&["--patch", "40"][..], "--patch 40"),
        (&["--patch", "320"], "no usable photo"),
        (&["--starts", "4"], "starts [4]"),
        (&["--student-channels", "33"], "--student-channels 33"),
        (&["--score", "-1"], "unexpected argument"),
        (&["--score=-1"], "weights of the losses"),
        (&["--score-times", "9"], "--score-times 9"),
        (&["--student-config", "nowhere.json"], "nowhere.json"),
        (&["--student", "nowhere.safetensors"], "nowhere.safetensors"),
        (&["--resume"], "nothing to resume"),
    ] {
        let output = folder.distill("run", options).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(word), "{text}");
    }
    let lite = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/tiny-x4.safetensors");
    std::fs::copy(lite, folder.at("teacher.safetensors")).unwrap();
    let text = fails(folder.distill("run", &[]));
    assert!(text.contains("teacher.safetensors"), "{text}");
}
