//! Training with the library.

#![cfg(feature = "train")]

#[path = "support/photos.rs"]
mod photos;
#[path = "../examples/train_student.rs"]
#[allow(dead_code)]
mod train_student;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tadsr::{
    Device, Error, Upscaler,
    frame::Frame,
    train::{
        Measurement, Observer, Outcome, Progress, Recipe, RunOptions,
        lite::{self, Size},
        resshift,
    },
};

/// Returns a recipe of a few small steps.
fn small(photos: &Path) -> lite::Recipe {
    let mut recipe = lite::Recipe::new("small", Size::Tiny, 2.0);
    recipe.data.dirs = vec![photos.into()];
    recipe.data.preset = "clean".into();
    recipe.student.steps = 6;
    recipe.student.batch = 2;
    recipe.student.patch = 32;
    recipe.student.expand = 0;
    recipe
}

fn options(folder: PathBuf) -> RunOptions {
    RunOptions {
        save_every: 2,
        data_threads: 1,
        ..RunOptions::new(folder)
    }
}

/// Observer that stops at a step and counts measurements.
struct StopAt {
    step: u64,
    done: AtomicU64,
    measured: Mutex<Vec<u64>>,
}

impl StopAt {
    fn new(step: u64) -> Self {
        Self {
            step,
            done: AtomicU64::new(0),
            measured: Mutex::default(),
        }
    }
}

impl Observer for StopAt {
    fn stepped(&self, progress: &Progress) {
        assert!(progress.losses.iter().all(|(_, loss)| loss.is_finite()));
        self.done.store(progress.done, Ordering::Relaxed);
    }

    fn measured(&self, progress: &Progress, held_out: &Measurement) {
        assert!(!held_out.values.is_empty());
        self.measured.lock().unwrap().push(progress.done);
    }

    fn is_stopped(&self) -> bool {
        self.done.load(Ordering::Relaxed) >= self.step
    }
}

#[test]
fn the_example_trains_a_model_that_upscales() {
    let dir = tempfile::tempdir().unwrap();
    let photos = photos::photos(dir.path(), (160, 120));
    let out = dir.path().join("run");
    let outcome = train_student::train(&photos, &out, 3).unwrap();
    assert_eq!(outcome, Outcome::Completed);
    let model = out.join("model.safetensors");
    let mut upscaler = Upscaler::load(model.to_str().unwrap(), Device::Cpu).unwrap();
    upscaler.set_scale(2.0).unwrap();
    let frame = Frame::from_rgb8(16, 12, &[90; 3 * 16 * 12]).unwrap();
    let large = upscaler.upscale(&frame).unwrap();
    assert_eq!((large.info().width, large.info().height), (32, 24));
}

#[test]
fn an_observer_stops_a_run_that_then_continues_to_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::from(small(&photos::photos(dir.path(), (160, 120))));
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    let all = StopAt::new(u64::MAX);
    let outcome = recipe.run(&options(whole.clone()), &all).unwrap();
    assert_eq!(outcome, Outcome::Completed);
    assert_eq!(*all.measured.lock().unwrap(), [2, 4, 6]);
    let options = options(stopped.clone());
    let outcome = recipe.run(&options, &StopAt::new(3)).unwrap();
    assert_eq!(outcome, Outcome::Stopped { done: 3, steps: 6 });
    assert_eq!(recipe.run(&options, &()).unwrap(), Outcome::Completed);
    let model = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(model(&whole) == model(&stopped));
}

#[test]
fn the_folder_of_a_run_records_what_it_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let photos = photos::photos(dir.path(), (160, 120));
    let first = dir.path().join("first");
    let outcome = Recipe::from(small(&photos)).run(&options(first.clone()), &());
    assert_eq!(outcome.unwrap(), Outcome::Completed);
    let mut recipe = small(&photos);
    let model = first.join("model.safetensors");
    recipe.begin = Some(model.to_str().unwrap().into());
    let second = options(dir.path().join("second"));
    let _ = Recipe::from(recipe.clone())
        .run(&second, &StopAt::new(1))
        .unwrap();
    let recorded = || lite::Recipe::read(&second.folder.join("recipe.toml")).unwrap();
    assert_eq!(recorded(), recipe);
    // The model is preserved when the run continues without `begin`.
    recipe.begin = None;
    let _ = Recipe::from(recipe).run(&second, &()).unwrap();
    assert_eq!(recorded().begin.as_deref(), model.to_str());
}

#[test]
fn values_out_of_range_are_errors_that_name_them() {
    let dir = tempfile::tempdir().unwrap();
    let photos = photos::photos(dir.path(), (160, 120));
    let fault = |recipe: Recipe, options: RunOptions| match recipe.run(&options, &()) {
        Err(Error::Setting(text)) => text,
        other => panic!("{other:?}"),
    };
    let options = || options(dir.path().join("run"));
    let mut steps = small(&photos);
    steps.student.steps = 0;
    assert!(fault(steps.into(), options()).starts_with("steps = 0: "));
    let no_data = small(&photos);
    let mut no_data = lite::Recipe {
        data: Default::default(),
        ..no_data
    };
    no_data.data.preset = "clean".into();
    assert!(fault(no_data.into(), options()).contains("nothing to train on"));
    let never = RunOptions {
        save_every: 0,
        ..options()
    };
    assert!(fault(small(&photos).into(), never).starts_with("save_every = 0: "));
    let distillation = resshift::Recipe::default();
    assert!(fault(distillation.into(), options()).contains("nothing to train on"));
    assert!(!dir.path().join("run").exists());
}

#[test]
fn every_recipe_in_the_repository_can_be_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/recipes");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // Files with sections that recipes share.
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        if name == "data" || name.starts_with("teacher") {
            continue;
        }
        Recipe::read(&path).unwrap();
        count += 1;
    }
    assert!(count > 5);
}

#[test]
fn a_recipe_of_a_published_teacher_is_typed_and_its_mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.toml");
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        Recipe::read(&path)
    };
    let text = "published = 'teacher.safetensors'\ndata = 'photos'\nlr = 3e-4\nstarts = [1, 3]\n";
    let Recipe::ResShift(recipe) = read(text).unwrap() else {
        panic!("a recipe of another family");
    };
    assert_eq!(recipe.teacher, dir.path().join("teacher.safetensors"));
    assert_eq!(recipe.data, [dir.path().join("photos")]);
    assert_eq!(
        (recipe.learning_rate, &recipe.starts[..]),
        (3e-4, &[1, 3][..])
    );
    let steps = resshift::Recipe::default().steps;
    assert_eq!(recipe.steps, steps);
    for (line, words) in [
        ("stepps = 4", ["stepps", "line 5"]),
        ("steps = 'many'", ["steps = 'many'", "line 5"]),
    ] {
        let error = read(&format!("{text}{line}\n")).unwrap_err().to_string();
        let named = words.iter().all(|word| error.contains(word));
        assert!(named && error.contains("recipe.toml"), "{error}");
    }
}
