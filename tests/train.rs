//! Training from the command line.

#![cfg(feature = "train")]

#[path = "support/photos.rs"]
mod photos;

use std::{path::Path, process::Command};

use assert_cmd::cargo::CommandCargoExt;
use tadsr::{Device, Upscaler, model::LiteModel, nn::lite::Condition};

fn fit(data: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.args(["fit", "--batch", "2", "--patch", "32", "--name", "test"]);
    command
        .arg("--data")
        .arg(data)
        .arg("--out")
        .arg(out)
        .args(more);
    if !more.contains(&"--preset") {
        command.args(["--preset", "stills"]);
    }
    command
}

/// Runs the command. Returns its standard error.
fn run(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

fn fails(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    text
}

fn model(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn a_seed_makes_the_same_model_with_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = |name: &str| dir.path().join(name);
    let steps = |seed, threads| ["--steps", "12", "--seed", seed, "--threads", threads];
    run(fit(&data, &out("a"), &steps("7", "1")));
    // A run that was stopped before its first checkpoint leaves a latent, which this run must
    // ignore.
    std::fs::create_dir(out("b")).unwrap();
    std::fs::write(out("b").join("latent.json"), "another's").unwrap();
    run(fit(&data, &out("b"), &steps("7", "3")));
    assert!(model(&out("a")) == model(&out("b")), "the same seed");
    // The recipe that it leaves makes the same model.
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    let recipe = out("a").join("recipe.toml");
    command
        .arg("run")
        .arg(recipe)
        .arg("--out")
        .arg(out("again"));
    run(command);
    assert!(model(&out("a")) == model(&out("again")), "the same recipe");
    run(fit(&data, &out("c"), &steps("8", "1")));
    assert!(model(&out("a")) != model(&out("c")), "another seed");
}

/// Stops a run by Ctrl-C, continues it, and compares it with a run that was not stopped.
#[test]
#[cfg(unix)]
fn a_stopped_run_continues_to_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    let options = ["--steps", "300", "--save-every", "100"];
    run(fit(&data, &whole, &options));
    let mut child = fit(&data, &stopped, &options);
    let mut child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
    while !stopped.join("model.safetensors").exists() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "ended before its first checkpoint"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(
        text.contains("continue with the same command and --resume"),
        "{text}"
    );
    let refused = fails(fit(&data, &stopped, &options));
    assert!(refused.contains("--resume"), "{refused}");
    for (option, value) in [("--expand", "32"), ("--steps", "60")] {
        let other = fails(fit(&data, &stopped, &[option, value, "--resume"]));
        let named = other.contains("other options") && other.contains(&option[2..]);
        assert!(named, "{other}");
    }
    let lost = data.join("0.png");
    let original = std::fs::read(&lost).unwrap();
    std::fs::remove_file(&lost).unwrap();
    let resume = [&options[..], &["--resume"]].concat();
    let fewer = fails(fit(&data, &stopped, &resume));
    assert!(fewer.contains("other data"), "{fewer}");
    std::fs::write(&lost, original).unwrap();
    run(fit(&data, &stopped, &resume));
    assert!(
        model(&whole) == model(&stopped),
        "resumed and uninterrupted run differ"
    );
    let losses = |run: &Path| std::fs::read_to_string(run.join("losses.csv")).unwrap();
    assert_eq!(losses(&whole).lines().count(), 301);
    assert!(losses(&whole) == losses(&stopped), "their losses differ");
}

#[test]
fn a_finished_run_can_be_prolonged() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = dir.path().join("run");
    run(fit(&data, &out, &["--steps", "4"]));
    let first = model(&out);
    run(fit(&data, &out, &["--steps", "9", "--resume"]));
    assert!(model(&out) != first);
    let longer = LiteModel::read(&out.join("model.safetensors")).unwrap();
    assert_eq!(longer.metadata.training["steps_done"], 9);
}

#[test]
fn a_run_begins_with_any_model_of_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = |name: &str| dir.path().join(name);
    let read = |name: &str| LiteModel::read(&out(name).join("model.safetensors")).unwrap();
    run(fit(
        &data,
        &out("bundled"),
        &["--begin", "tiny-x2", "--steps", "1"],
    ));
    let bundled = LiteModel::find("tiny-x2").unwrap().remove(0);
    assert_eq!(read("bundled").stats, bundled.stats);
    assert_eq!(read("bundled").metadata.scales, bundled.metadata.scales);
    // A model file, with a dial that it lacks.
    run(fit(&data, &out("plain"), &["--steps", "1"]));
    let plain = out("plain").join("model.safetensors");
    let mut options = vec!["--begin", plain.to_str().unwrap(), "--denoise"];
    options.extend(["--steps", "2", "--save-every", "1"]);
    let text = run(fit(&data, &out("a"), &options));
    assert!(!text.contains("measuring the latent"), "{text}");
    assert_eq!(read("a").stats, read("plain").stats);
    assert!(read("a").metadata.student.conditioning.denoise);
    // The preset degrades, so training changes the dial.
    let dial = read("a").layers[1].conditions[1].clone();
    assert!(dial.shift.iter().any(|v| *v != 0.0) && dial.gain.iter().any(|v| *v != 0.0));
    // A model file, whose dial is preserved, and a checkpoint.
    let a = out("a");
    for (name, file) in [("b", "model.safetensors"), ("c", "checkpoint.safetensors")] {
        let begin = a.join(file);
        let options = ["--begin", begin.to_str().unwrap(), "--steps", "1"];
        run(fit(&data, &out(name), &options));
        assert_eq!(read(name).metadata.student, read("a").metadata.student);
    }
}

#[test]
fn a_model_that_a_run_cannot_begin_with_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let whole = LiteModel::find("tiny-x2")
        .unwrap()
        .remove(0)
        .to_bytes(true)
        .unwrap();
    let foreign =
        safetensors::serialize(Vec::<(&str, safetensors::tensor::TensorView)>::new(), None);
    for (name, bytes) in [
        ("cut", &whole[..whole.len() / 2]),
        ("foreign", &foreign.unwrap()),
    ] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    for (begin, more, words) in [
        (path("missing"), &[][..], "missing"),
        (path("cut"), &[][..], "cut"),
        (path("foreign"), &[][..], "foreign"),
        ("tiny".into(), &[][..], "tiny-x2 and tiny-x4"),
        (
            "tiny-x2".into(),
            &["--expand", "8"][..],
            "at least the 16 channels",
        ),
    ] {
        let options = [&["--steps", "1", "--begin", &begin][..], more].concat();
        let text = fails(fit(&data, &dir.path().join("run"), &options));
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn the_dial_detail_is_trained_at_1_and_keeps_the_model_at_0() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(
        &recipe,
        "name = 'a'\nsize = 'tiny'\nscale = 2.0\n\
         conditioning = { denoise = true, detail = true }\n\
         [data]\npreset = 'stills'\n[student]\nsteps = 3\nema = 0.0\n",
    )
    .unwrap();
    let command = |out: &str, more: &[&str]| {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.arg("run").arg(&recipe).arg("--data").arg(&data);
        command.arg("--out").arg(dir.path().join(out)).args(more);
        command
    };
    let text = fails(command("none", &[]));
    assert!(text.contains("needs a model to begin with"), "{text}");
    run(command("detail", &["--begin", "tiny-x2"]));
    let begin = LiteModel::find("tiny-x2").unwrap().remove(0);
    let path = dir.path().join("detail/model.safetensors");
    let trained = LiteModel::read(&path).unwrap();
    let weights = |model: &LiteModel, detail: f64| -> Vec<f32> {
        let at = Condition {
            denoise: 0.3,
            detail,
            ..Condition::at(2.0)
        };
        let layers = model.folded(&at).layers;
        layers.into_iter().flat_map(|layer| layer.weight).collect()
    };
    let (start, faithful) = (weights(&begin, 0.0), weights(&trained, 0.0));
    // The file is in f16.
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-3 * a.abs().max(0.05);
    assert!(start.iter().zip(&faithful).all(near));
    assert!(!start.iter().zip(&weights(&trained, 1.0)).all(near));
    // The faithful end is trained, and the dial stays as it is.
    let text = std::fs::read_to_string(&recipe).unwrap();
    std::fs::write(&recipe, text + "faithful = true\n").unwrap();
    run(command("faithful", &["--begin", path.to_str().unwrap()]));
    let model = LiteModel::read(&dir.path().join("faithful/model.safetensors")).unwrap();
    assert!(!faithful.iter().zip(&weights(&model, 0.0)).all(near));
    let dial = |model: &LiteModel| -> Vec<f32> {
        let layers = model.layers.iter();
        let conditions = layers.flat_map(|layer| layer.tensors());
        let of_dial = conditions.filter(|(name, ..)| name.contains(".detail."));
        of_dial.flat_map(|(_, _, values)| values.to_vec()).collect()
    };
    assert!(!dial(&trained).is_empty());
    assert!(dial(&trained).iter().zip(&dial(&model)).all(near));
    // Training continues without the dial from its faithful end.
    let begin = path.to_str().unwrap();
    run(fit(
        &data,
        &dir.path().join("on"),
        &["--begin", begin, "--steps", "1"],
    ));
    let on = LiteModel::read(&dir.path().join("on/model.safetensors")).unwrap();
    assert!(on.metadata.student.conditioning.denoise);
    assert!(!on.metadata.student.conditioning.detail);
}

/// A network with memory begins as the network that it is made of, and learns to use its memory.
#[test]
#[cfg(feature = "video")]
fn a_network_gets_a_memory() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (400, 400));
    let recipe = dir.path().join("recipe.toml");
    let cache = dir.path().join("cache");
    let command = |out: &str, begin: &str, more: &str| {
        let text = format!(
            "name = 'a'\nsize = 'tiny'\nscale = 2.0\nconditioning = {{ denoise = true }}\n{more}\n\
             [data]\ncache = '{}'\n[data.pool]\nclips = 8\n\
             [student]\nema = 0.0\nlearning_rate = 1e-4\nmuon_rate = 1e-4\nbatch = 2\npatch = 64\n\
             frames = 3\n",
            cache.display()
        );
        std::fs::write(&recipe, text).unwrap();
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.arg("run").arg(&recipe).arg("--data").arg(&data);
        command.arg("--out").arg(dir.path().join(out));
        command.args(["--begin", begin]);
        command
    };
    let steps = |steps: usize| {
        let text = std::fs::read_to_string(&recipe).unwrap();
        std::fs::write(&recipe, format!("{text}steps = {steps}\n")).unwrap();
    };
    let start = command("memory", "tiny-x2", "memory = 7");
    steps(4);
    let report = run(start);
    assert!(report.contains("h264 clips"), "{report}");
    let path = dir.path().join("memory/model.safetensors");
    let model = LiteModel::read(&path).unwrap();
    assert_eq!(model.metadata.student.memory, 7);
    // The head sees the latent as before, and the confidence is the last of its inputs.
    let inputs = |model: &LiteModel, inputs: std::ops::Range<usize>| -> Vec<f32> {
        let head = &model.layers[0];
        let kernels = head.weight.chunks_exact(9 * head.spec.ci);
        let used = kernels.flat_map(|kernel| &kernel[9 * inputs.start..9 * inputs.end]);
        used.copied().collect()
    };
    let begin = LiteModel::find("tiny-x2").unwrap().remove(0);
    let pairs = inputs(&begin, 0..4).into_iter().zip(inputs(&model, 0..4));
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 0.05, "{worst}");
    for (name, range) in [("result", 4..8), ("state", 8..15), ("confidence", 15..16)] {
        let learns = inputs(&model, range).iter().any(|v| *v != 0.0);
        assert!(learns, "the {name} has no effect");
    }
    let path = path.to_str().unwrap();
    let error = fails(command("none", path, ""));
    assert!(error.contains("it has memory, the run has none"), "{error}");
    let error = fails(command("many", "tiny-x2", "memory = 65"));
    assert!(error.contains("memory 65: 0 to 64"), "{error}");
    let long = command("long", "tiny-x2", "memory = 7");
    let text = std::fs::read_to_string(&recipe).unwrap();
    std::fs::write(&recipe, text.replace("frames = 3", "frames = 13")).unwrap();
    let error = fails(long);
    assert!(error.contains("at most the 12 frames"), "{error}");
}

#[test]
fn a_recipe_for_another_student_than_it_begins_with_is_refused_before_the_teacher_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let (recipe, out) = (dir.path().join("recipe.toml"), dir.path().join("run"));
    for scale in ["2.0", "4.0"] {
        let text = format!(
            "name = 'a'\nsize = 'tiny'\nscale = {scale}\n\
             conditioning = {{ denoise = true }}\nteacher = {{ widths = [16], blocks = 1 }}\n\
             [data]\npreset = 'stills'\n[student]\nexpand = 8\n"
        );
        std::fs::write(&recipe, text).unwrap();
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.arg("run").arg(&recipe).arg("--data").arg(&data);
        command.arg("--out").arg(&out).args(["--begin", "tiny-x2"]);
        let text = fails(command);
        let word = if scale == "2.0" {
            "at least the 16"
        } else {
            "r 2, now 4"
        };
        assert!(text.contains(word), "{text}");
        assert!(!out.join("teacher").exists());
    }
}

/// Trains on matched pairs of another program.
#[test]
fn matched_pairs_train_a_model_and_files_that_do_not_match_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let high = photos::photos(dir.path(), (160, 120));
    let low = dir.path().join("low");
    std::fs::create_dir(&low).unwrap();
    for entry in std::fs::read_dir(&high).unwrap() {
        let path = entry.unwrap().path();
        let picture = image::open(&path).unwrap();
        let small = picture.resize_exact(80, 60, image::imageops::FilterType::CatmullRom);
        small.save(low.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(low.join("alone.png"), "").unwrap();
    let out = dir.path().join("run");
    let pairs = |out: &Path, more: &[&str]| {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command.args([
            "fit", "--batch", "2", "--patch", "32", "--steps", "3", "--pairs",
        ]);
        command
            .arg(&low)
            .arg(&high)
            .arg("--out")
            .arg(out)
            .args(more);
        command
    };
    let text = run(pairs(&out, &[]));
    assert!(
        text.contains("pairs of scale 2") && text.contains("alone.png"),
        "{text}"
    );
    assert_eq!(
        LiteModel::parse(&model(&out), &out)
            .unwrap()
            .metadata
            .scales,
        [1.0, 2.0]
    );
    // The recipe that it leaves makes the same model.
    let mut again = Command::cargo_bin("tadsr-train").unwrap();
    again.arg("run").arg(out.join("recipe.toml"));
    again.arg("--out").arg(dir.path().join("again"));
    run(again);
    assert!(model(&out) == model(&dir.path().join("again")));
    let text = fails(pairs(&dir.path().join("x4"), &["--scale", "4"]));
    assert!(text.contains("the pairs have scale 2"), "{text}");
}

#[test]
fn training_beats_bicubic_and_the_model_loads() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = dir.path().join("run");
    let options = ["--steps", "150", "--preset", "clean", "--save-every", "150"];
    let text = run(fit(&data, &out, &options));
    let gain = text
        .split("clean ")
        .nth(1)
        .and_then(|t| t.split(' ').next())
        .unwrap();
    assert!(
        gain.parse::<f64>().unwrap() > 0.5,
        "gain over bicubic in {text}"
    );
    let path = out.join("model.safetensors");
    let model = LiteModel::read(&path).unwrap();
    assert_eq!(model.metadata.name, "test");
    assert_eq!(model.metadata.training["steps_done"], 150);
    Upscaler::load(path.to_str().unwrap(), Device::Auto).unwrap();

    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("150 steps logged") && page.contains("<svg"));
    assert!(page.contains("learning_rate"), "settings from the model");
    let names = std::fs::read_dir(&out).unwrap();
    let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
    assert!(
        names
            .into_iter()
            .any(|n| n.starts_with("events.out.tfevents."))
    );
    let again = dir.path().join("again.html");
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.arg("report").arg(&out).arg("-o").arg(&again);
    run(command);
    assert_eq!(std::fs::read_to_string(&again).unwrap(), page);
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.arg("report").arg(&data);
    assert!(fails(command).contains("no run of this tool"));
}

#[test]
fn a_small_student_trains_too() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = dir.path().join("run");
    run(fit(
        &data,
        &out,
        &["--student", "small", "--scale", "4", "--steps", "3"],
    ));
    let model = LiteModel::read(&out.join("model.safetensors")).unwrap();
    assert_eq!(model.metadata.student.channels, 48);
}

#[test]
fn mistakes_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = dir.path().join("run");
    let none = dir.path().join("none");
    std::fs::create_dir(&none).unwrap();
    for (data, options, word) in [
        (dir.path().join("missing"), &[][..], "missing"),
        (none.clone(), &[][..], "no usable photo"),
        (data.clone(), &["--scale", "9"][..], "--scale 9"),
        (data.clone(), &["--steps", "0"][..], "--steps"),
        (data.clone(), &["--lr", "0"][..], "--lr 0"),
        (data.clone(), &["--patch", "0"][..], "--patch 0"),
        (none, &["--patch", "30"][..], "multiple of 4"),
        (data, &["--resume"][..], "nothing to resume"),
    ] {
        let mut command = Command::cargo_bin("tadsr-train").unwrap();
        command
            .args(["fit", "--preset", "stills"])
            .arg("--data")
            .arg(data)
            .arg("--out")
            .arg(&out);
        command.args(options);
        let text = fails(command);
        assert!(text.contains(word), "{text}");
    }
}

/// A dangling link is skipped and named. A report that cannot be written does not end the run.
#[test]
#[cfg(unix)]
fn unreadable_photos_and_evaluations_do_not_end_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    std::os::unix::fs::symlink("/nowhere", data.join("x.jpg")).unwrap();
    let out = dir.path().join("run");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("eval.json"), "{").unwrap();
    let text = run(fit(&data, &out, &["--steps", "2"]));
    assert!(
        text.contains("x.jpg") && text.contains("no report"),
        "{text}"
    );
    assert!(out.join("model.safetensors").exists());
}

/// A damaged checkpoint is an error that names the file.
#[test]
fn a_damaged_checkpoint_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = photos::photos(dir.path(), (160, 120));
    let out = dir.path().join("run");
    run(fit(&data, &out, &["--steps", "2"]));
    let path = out.join("checkpoint.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let text = fails(fit(&data, &out, &["--steps", "2", "--resume"]));
    assert!(
        text.contains("checkpoint.safetensors") && text.contains("damaged"),
        "{text}"
    );
}
