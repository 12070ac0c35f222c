//! Recipes from the command line: teacher and student, stopped and resumed.

#![cfg(feature = "train")]

#[path = "support/photos.rs"]
mod photos;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use assert_cmd::cargo::CommandCargoExt;
use tadsr::{Device, Upscaler, model::LiteModel};

const RECIPE: &str = "
name = 'test'
size = 'tiny'
scale = 2.0
teacher = 'teacher.toml'
[data]
dirs = ['photos']
preset = 'clean'
hold_out = 3
[student]
steps = 12
batch = 2
patch = 32
expand = 0
[student.distillation]
after = 0.25
regression = 0.1
score = 0.1
width = 16
";

const TEACHER: &str = "
widths = [16, 16]
blocks = 1
steps = 8
batch = 2
patch = 32
accumulate = 2
";

/// Makes a folder with a recipe and textured images.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    photos::photos(dir.path(), (160, 120));
    fs::write(dir.path().join("recipe.toml"), RECIPE).unwrap();
    fs::write(dir.path().join("teacher.toml"), TEACHER).unwrap();
    let recipe = dir.path().join("recipe.toml");
    (dir, recipe)
}

fn run(recipe: &Path, out: &Path, more: &[&str]) -> (bool, String) {
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.arg("run").arg(recipe).arg("--out").arg(out);
    let output = command.args(more).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), text)
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(str::to_string).collect()
}

#[test]
fn one_command_makes_a_teacher_and_a_student_that_loads() {
    let (dir, recipe) = folder();
    let out = dir.path().join("run");
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(done, "{text}");
    let model = LiteModel::read(&out.join("model.safetensors")).unwrap();
    assert_eq!(model.metadata.name, "test");
    assert_eq!(model.metadata.training["steps_done"], 12);
    let path = out.join("model.safetensors");
    Upscaler::load(path.to_str().unwrap(), Device::Auto).unwrap();
    assert_eq!(lines(&out.join("teacher/losses.csv")).len(), 9);
    let losses = lines(&out.join("losses.csv"));
    assert_eq!(losses.len(), 13);
    let names: Vec<_> = losses[0].split(',').collect();
    let column = |step: usize, name: &str| -> f64 {
        let at = names.iter().position(|n| *n == name).unwrap();
        losses[step].split(',').nth(at).unwrap().parse().unwrap()
    };
    // The teacher's terms begin after a quarter of the steps.
    for term in ["grad_regression", "grad_score", "discriminator"] {
        assert_eq!(column(3, term), 0.0, "{term}");
        assert!(column(5, term) > 0.0, "{term}");
    }
    assert!(column(12, "grad_adversarial") > 0.0);
    // Gradients have their shares: those of regression and score are equal.
    let share = column(8, "grad_regression") / column(8, "grad_score");
    assert!((0.5..2.0).contains(&share), "{share}");
    // Another student of the same teacher.
    let (other, teacher) = (dir.path().join("other"), out.join("teacher"));
    let (done, text) = run(&recipe, &other, &["--teacher", teacher.to_str().unwrap()]);
    assert!(done && other.join("model.safetensors").exists(), "{text}");
    assert!(!other.join("teacher").exists());
    // The teacher is used without its checkpoint, too, and does not change.
    let bare = dir.path().join("bare");
    fs::create_dir(&bare).unwrap();
    for file in ["teacher.safetensors", "latent.json"] {
        fs::copy(teacher.join(file), bare.join(file)).unwrap();
    }
    let served = dir.path().join("served");
    let (done, text) = run(&recipe, &served, &["--teacher", bare.to_str().unwrap()]);
    assert!(done && !bare.join("losses.csv").exists(), "{text}");
    // A complete run is not repeated.
    let written = || {
        fs::metadata(out.join("model.safetensors"))
            .unwrap()
            .modified()
            .unwrap()
    };
    let before = written();
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(done && lines(&out.join("losses.csv")) == losses, "{text}");
    assert_eq!(written(), before);
    // A student continues only with the teacher and the recipe with which it began.
    let other_seed = TEACHER.replace("steps = 8", "steps = 8\nseed = 2");
    fs::write(dir.path().join("teacher.toml"), other_seed).unwrap();
    let third = dir.path().join("third");
    assert!(run(&recipe, &third, &[]).0);
    let teacher = third.join("teacher");
    let (done, text) = run(&recipe, &out, &["--teacher", teacher.to_str().unwrap()]);
    assert!(!done && text.contains("another teacher"), "{text}");
    let recorded = fs::read(out.join("recipe.toml")).unwrap();
    fs::write(dir.path().join("teacher.toml"), TEACHER).unwrap();
    fs::write(&recipe, RECIPE.replace("steps = 12", "steps = 11")).unwrap();
    let teacher = out.join("teacher");
    let (done, text) = run(&recipe, &out, &["--teacher", teacher.to_str().unwrap()]);
    assert!(!done && text.contains("steps 12, now 11"), "{text}");
    assert!(fs::read(out.join("recipe.toml")).unwrap() == recorded);
    // The recorded recipe can be used again and contains the paths of the folders.
    let (again, recorded) = (dir.path().join("again"), out.join("recipe.toml"));
    let (done, text) = run(&recorded, &again, &["--teacher", teacher.to_str().unwrap()]);
    assert!(done, "{text}");
    assert_eq!(lines(&again.join("losses.csv")).len(), losses.len());
}

/// A teacher may start from the result of a model, which its file contains, and teach students with
/// other statistics of the latent.
#[test]
fn a_teacher_starts_from_the_result_of_a_model() {
    let (dir, recipe) = folder();
    let model = dir.path().join("begin.safetensors");
    let tiny = LiteModel::find("tiny-x2").unwrap().remove(0);
    fs::write(&model, tiny.to_bytes(true).unwrap()).unwrap();
    let teacher = format!("origin = 'begin.safetensors'\nmuon_rate = 0.01\n{TEACHER}");
    fs::write(dir.path().join("teacher.toml"), &teacher).unwrap();
    let out = dir.path().join("run");
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(done && text.contains("origin +"), "{text}");
    // The file of the model is not needed any more. Another one is not taken silently.
    fs::remove_file(&model).unwrap();
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(done, "{text}");
    let other = teacher.replace("begin.safetensors", "small-x2");
    fs::write(dir.path().join("teacher.toml"), other).unwrap();
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(
        !done && text.contains("origin 'small-x2' has changed"),
        "{text}"
    );
    let trained = out.join("teacher");
    let conditioned = RECIPE.replace("[data]", "conditioning = { denoise = true }\n[data]");
    fs::write(&recipe, conditioned).unwrap();
    fs::write(dir.path().join("teacher.toml"), &teacher).unwrap();
    let other = dir.path().join("other");
    let more = ["--teacher", trained.to_str().unwrap(), "--begin", "tiny-x2"];
    let (done, text) = run(&recipe, &other, &more);
    assert!(done, "{text}");
    let model = LiteModel::read(&other.join("model.safetensors")).unwrap();
    assert_eq!(model.stats, tiny.stats);
    assert_ne!(
        fs::read(other.join("latent.json")).unwrap(),
        fs::read(trained.join("latent.json")).unwrap()
    );
    // The student continues on its latent.
    let longer = fs::read_to_string(&recipe)
        .unwrap()
        .replace("steps = 12", "steps = 13");
    fs::write(&recipe, longer).unwrap();
    let (done, text) = run(&recipe, &other, &more[..2]);
    assert!(done, "{text}");
    assert_eq!(
        LiteModel::read(&other.join("model.safetensors"))
            .unwrap()
            .stats,
        tiny.stats
    );
}

/// The adversarial term on images needs no teacher.
#[test]
fn a_discriminator_on_images_needs_no_teacher() {
    let (dir, recipe) = folder();
    let text = RECIPE.replace("teacher = 'teacher.toml'\n", "");
    let text = text.replace("regression = 0.1\nscore = 0.1\n", "pixels = true\n");
    fs::write(&recipe, text).unwrap();
    let out = dir.path().join("run");
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(done, "{text}");
    let losses = lines(&out.join("losses.csv"));
    let names: Vec<_> = losses[0].split(',').collect();
    let at = names.iter().position(|n| *n == "grad_adversarial").unwrap();
    let gradient =
        |step: usize| -> f64 { losses[step].split(',').nth(at).unwrap().parse().unwrap() };
    assert_eq!(gradient(3), 0.0);
    assert!(gradient(12) > 0.0);
    let model = LiteModel::read(&out.join("model.safetensors")).unwrap();
    assert_eq!(
        model.metadata.training["options"]["distillation"]["pixels"],
        true
    );
    // The other terms do.
    let text = fs::read_to_string(&recipe).unwrap();
    fs::write(&recipe, text.clone() + "score = 0.1\n").unwrap();
    let (done, said) = run(&recipe, &dir.path().join("none"), &[]);
    assert!(!done && said.contains("needs a teacher"), "{said}");
    fs::write(&recipe, text + "features = 0.1\n").unwrap();
    let (done, said) = run(&recipe, &dir.path().join("none"), &[]);
    assert!(!done && said.contains("not with pixels"), "{said}");
}

#[test]
fn the_features_of_the_teacher_and_the_pattern_of_cells_need_no_discriminator() {
    let (dir, recipe) = folder();
    let terms = "adversarial = 0.0\nfeatures = 0.6\npattern = 0.3\n";
    let text = RECIPE.replace("regression = 0.1\nscore = 0.1\n", terms);
    fs::write(&recipe, text).unwrap();
    let out = dir.path().join("run");
    let (done, text) = run(&recipe, &out, &["--threads", "1"]);
    assert!(done, "{text}");
    let losses = lines(&out.join("losses.csv"));
    let names: Vec<_> = losses[0].split(',').collect();
    assert!(!names.contains(&"discriminator"), "{names:?}");
    let column = |step: usize, name: &str| -> f64 {
        let at = names.iter().position(|n| *n == name).unwrap();
        losses[step].split(',').nth(at).unwrap().parse().unwrap()
    };
    // Features begin with the other terms of the teacher, the pattern with the first step.
    assert_eq!(column(3, "grad_features"), 0.0);
    assert!(column(3, "grad_pattern") > 0.0 && column(12, "grad_features") > 0.0);
}

/// With feature maps in bf16, as on CUDA, the losses of all networks and terms are those of f32
/// within a few percent.
#[test]
fn in_bf16_the_losses_are_nearly_those_in_f32() {
    let (dir, recipe) = folder();
    let losses = |precision: &str| {
        let out = dir.path().join(precision);
        let (done, text) = run(&recipe, &out, &["--threads", "1", "--precision", precision]);
        assert!(done, "{text}");
        ["teacher/losses.csv", "losses.csv"].map(|file| {
            let values = |line: &String| {
                let values = line.split(',').skip(1).map(|v| v.parse::<f64>());
                values.collect::<Result<Vec<_>, _>>().unwrap()
            };
            lines(&out.join(file))[1..]
                .iter()
                .map(values)
                .collect::<Vec<_>>()
                .concat()
        })
    };
    let (f32, bf16) = (losses("f32"), losses("bf16"));
    assert_ne!(f32, bf16);
    for (a, b) in f32.iter().flatten().zip(bf16.iter().flatten()) {
        assert!((a - b).abs() < 0.05 * a.abs() + 0.01, "{a} and {b}");
    }
}

/// After Ctrl-C in the training of teacher and student, the model is that of a run that was not
/// stopped.
#[test]
#[cfg(unix)]
fn a_stopped_recipe_continues_to_the_same_model() {
    let (dir, recipe) = folder();
    let text = RECIPE.replace("steps = 12", "steps = 40");
    fs::write(&recipe, text).unwrap();
    let teacher = TEACHER.replace("steps = 8", "steps = 30");
    fs::write(dir.path().join("teacher.toml"), teacher).unwrap();
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    let options = ["--threads", "1", "--save-every", "5"];
    let (done, text) = run(&recipe, &whole, &options);
    assert!(done, "{text}");
    for first in ["teacher/checkpoint.safetensors", "checkpoint.safetensors"] {
        let mut child = Command::cargo_bin("tadsr-train").unwrap();
        child.arg("run").arg(&recipe).arg("--out").arg(&stopped);
        let child = child.args(options).stderr(std::process::Stdio::piped());
        let mut child = child.spawn().unwrap();
        while !stopped.join(first).exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let pid = child.id().to_string();
        let _ = Command::new("kill").args(["-INT", &pid]).status();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // The run may be complete before it receives the signal.
        assert!(matches!(output.status.code(), Some(0 | 130)), "{text}");
    }
    let (done, text) = run(&recipe, &stopped, &options);
    assert!(done, "{text}");
    for file in ["teacher/losses.csv", "losses.csv"] {
        assert!(
            lines(&whole.join(file)) == lines(&stopped.join(file)),
            "{file} differs"
        );
    }
    let model = |run: &Path| fs::read(run.join("model.safetensors")).unwrap();
    assert!(model(&whole) == model(&stopped));
}

/// A checkpoint at the last step implies that teacher and model exist, because they are written
/// before it.
#[test]
fn an_incomplete_save_is_made_again() {
    let (dir, recipe) = folder();
    let out = dir.path().join("run");
    for (folder, product) in [
        (out.join("teacher"), "teacher.safetensors"),
        (out.clone(), "model.safetensors"),
    ] {
        // A file cannot be written where a folder with its name exists.
        let way = folder.join("checkpoint.safetensors.part");
        fs::create_dir_all(&way).unwrap();
        let (done, text) = run(&recipe, &out, &[]);
        assert!(!done && text.contains("checkpoint.safetensors"), "{text}");
        assert!(folder.join(product).exists(), "{product}");
        fs::remove_dir(&way).unwrap();
    }
    let (done, text) = run(&recipe, &out, &[]);
    assert!(done, "{text}");
    LiteModel::read(&out.join("model.safetensors")).unwrap();
}

#[test]
fn a_run_that_diverges_for_good_ends_with_an_error_after_some_restarts() {
    let (dir, recipe) = folder();
    let text = RECIPE.replace("expand = 0", "expand = 0\nlearning_rate = 1e30");
    fs::write(&recipe, text).unwrap();
    let (done, text) = run(&recipe, &dir.path().join("run"), &[]);
    assert!(!done && text.contains("out of bounds"), "{text}");
    assert_eq!(text.matches("half the learning rate").count(), 5, "{text}");
}

#[test]
fn a_dry_run_prints_time_and_memory_and_writes_nothing() {
    let (dir, recipe) = folder();
    let out = dir.path().join("run");
    // The working directory was not given as a folder of the run.
    fs::write(dir.path().join("checkpoint.safetensors"), "another's").unwrap();
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    command.arg("run").arg(&recipe).arg("--out").arg(&out);
    command.current_dir(dir.path());
    let output = command.arg("--dry-run").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    for word in [
        "teacher: ",
        "student: ",
        "distillation: ",
        "in all: about",
        "memory",
    ] {
        assert!(text.contains(word), "no '{word}' in {text}");
    }
    assert!(!out.exists());
}

#[test]
fn mistakes_are_explained() {
    let (dir, recipe) = folder();
    let out = dir.path().join("run");
    for (was, is, word) in [
        ("teacher.toml", "none.toml", "none.toml"),
        ("steps = 12", "stepps = 12", "stepps"),
        ("after = 0.25", "after = 2.0", "after"),
        ("patch = 32", "patch = 30", "patch"),
        ("batch = 2", "batch = 0", "batch"),
        ("expand = 0", "ema = 1.0", "ema"),
        ("expand = 0", "expand = 100000000000", "expand"),
        ("width = 16", "score_times = 99", "score_times"),
        (
            "width = 16",
            "discriminator_rate = nan",
            "discriminator_rate",
        ),
        (
            "width = 16",
            "discriminator_rate = 0.0",
            "discriminator_rate",
        ),
        ("dirs = ['photos']", "", "--data"),
    ] {
        fs::write(&recipe, RECIPE.replace(was, is)).unwrap();
        let (done, text) = run(&recipe, &out, &[]);
        assert!(!done && text.contains(word), "{word}: {text}");
        assert!(
            !out.join("teacher/losses.csv").exists(),
            "{word}: trained before the mistake was named"
        );
        let _ = fs::remove_dir_all(&out);
    }
    fs::write(&recipe, RECIPE).unwrap();
    let (done, text) = run(&recipe, &out, &["--begin", "nowhere.safetensors"]);
    assert!(
        !done && text.contains("nowhere.safetensors") && !out.exists(),
        "{text}"
    );
    let (done, text) = run(&recipe, &out, &["--teacher", out.to_str().unwrap()]);
    assert!(!done && text.contains("same folder"), "{text}");
    // Builds with and without CUDA lack such a device.
    for device in ["cuda:99", "gpu"] {
        let (done, text) = run(&recipe, &out, &["--device", device]);
        assert!(!done && text.contains(device), "{device}: {text}");
        assert!(!out.exists());
    }
    for (was, is) in [("steps = 8", "steps = 0"), ("patch = 32", "patch = 30")] {
        fs::write(dir.path().join("teacher.toml"), TEACHER.replace(was, is)).unwrap();
        let (done, text) = run(&recipe, &out, &[]);
        assert!(!done && text.contains(&is[..5]), "{is}: {text}");
        let _ = fs::remove_dir_all(&out);
    }
}
