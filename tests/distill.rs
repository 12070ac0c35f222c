//! Losses of distillation and their gradients, compared with one step of a reference
//! implementation.

#![cfg(feature = "train")]

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore};
use candle_nn::VarBuilder;
use tadsr::{
    diffusion::{Schedule, deterministic},
    nn::{
        layers::is_parameter,
        resshift::{DiffusionConfig, Discriminator, DiscriminatorConfig, Unet, UnetConfig},
    },
    train::losses::{
        Perturbation, ScoreWeight, Teacher, Term, hinge_discriminator, hinge_generator, regression,
        score_direction, score_distillation, stand_in,
    },
};

type Tensors = HashMap<String, Tensor>;

/// Returns the tensors of a file with reference values, and its metadata.
fn fixture(name: &str) -> (Tensors, HashMap<String, String>) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    let bytes = std::fs::read(root.join(name)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    (tensors, header.metadata().clone().unwrap_or_default())
}

/// Returns variables for the trained tensors, and the other tensors unchanged.
fn variables(tensors: &Tensors) -> HashMap<String, Var> {
    let trained = tensors.iter().filter(|(name, _)| is_parameter(name));
    trained
        .map(|(name, t)| (name.clone(), Var::from_tensor(t).unwrap()))
        .collect()
}

fn builder(tensors: &Tensors, variables: &HashMap<String, Var>) -> VarBuilder<'static> {
    let mut all = tensors.clone();
    for (name, var) in variables {
        all.insert(name.clone(), var.as_tensor().clone());
    }
    VarBuilder::from_tensors(all, DType::F32, &Device::Cpu)
}

fn nhwc(t: &Tensor) -> Tensor {
    t.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

/// Returns the norm of the difference over the norm of `want`.
fn difference(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let norm = |t: &Tensor| -> Result<f64> {
        let t = t.to_dtype(DType::F64)?;
        t.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt)
    };
    norm(&(got - want).unwrap()).unwrap() / norm(want).unwrap().max(1e-30)
}

#[track_caller]
fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let d = difference(got, want);
    eprintln!("{what}: {d:.2e}");
    assert!(d < tolerance, "{what} is {d:.2e} away");
}

fn discriminator(variables: &HashMap<String, Var>, tensors: &Tensors) -> Discriminator {
    let config = DiscriminatorConfig::new(vec![32, 64, 64], 32);
    Discriminator::new(&config, builder(tensors, variables)).unwrap()
}

fn times(t: &Tensor) -> Vec<usize> {
    let t = t.to_vec1::<i64>().unwrap();
    t.iter().map(|t| *t as usize).collect()
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_discriminator_gives_the_references_logits() {
    let (step, _) = fixture("distill/step.safetensors");
    let (tensors, _) = fixture("distill/discriminator.safetensors");
    let vars = variables(&tensors);
    let d = discriminator(&vars, &tensors);
    let t = times(&step["t_disc"]);
    for kind in ["fake", "real"] {
        let features = [0, 1, 2].map(|i| nhwc(&step[&format!("feat_{kind}.{i}")]));
        let logits = d.forward(&features, &t).unwrap();
        assert_close(kind, &logits, &step[&format!("logits_{kind}")], 1e-4);
    }
}

fn nchw(t: &Tensor) -> Tensor {
    t.permute((0, 3, 1, 2)).unwrap()
}

fn scalar(t: &Tensor) -> f64 {
    f64::from(t.to_scalar::<f32>().unwrap())
}

fn schedule(metadata: &HashMap<String, String>) -> Schedule {
    let json: serde_json::Value = serde_json::from_str(&metadata["diffusion"]).unwrap();
    let number = |v: &serde_json::Value| v.as_f64().unwrap();
    let config = DiffusionConfig {
        scale: number(&json["sf"]) as usize,
        steps: number(&json["steps"]) as usize,
        kappa: number(&json["kappa"]),
        power: number(&json["schedule_kwargs"]["power"]),
        min_noise_level: number(&json["min_noise_level"]),
        etas_end: number(&json["etas_end"]),
    };
    Schedule::new(&config).unwrap()
}

struct ResShiftTeacher<'a> {
    unet: &'a Unet,
    lq: &'a Tensor,
}

impl Teacher for ResShiftTeacher<'_> {
    fn predict(&self, x: &Tensor, t: &[usize]) -> Result<Tensor> {
        self.unet.forward(x, t, Some(self.lq))
    }

    fn features(&self, x: &Tensor, t: &[usize]) -> Result<Vec<Tensor>> {
        self.unet.features(x, t, Some(self.lq))
    }
}

/// Repetition of the reference step.
struct Step {
    /// Tensors of the reference and their metadata.
    want: Tensors,
    metadata: HashMap<String, String>,
    schedule: Schedule,
    config: UnetConfig,
    teacher: Unet,
    student: Tensors,
    lq: Tensor,
    zy: Tensor,
    start: Tensor,
}

impl Step {
    fn load() -> Self {
        let (want, metadata) = fixture("distill/step.safetensors");
        let config: UnetConfig = serde_json::from_str(&metadata["unet"]).unwrap();
        let (teacher, _) = fixture("distill/teacher.safetensors");
        let vb = VarBuilder::from_tensors(teacher, DType::F32, &Device::Cpu);
        Self {
            schedule: schedule(&metadata),
            teacher: Unet::new(&config, vb).unwrap(),
            student: fixture("distill/student.safetensors").0,
            lq: nhwc(&want["lq"]),
            zy: nhwc(&want["z_y"]),
            start: nhwc(&want["z_T"]),
            config,
            metadata,
            want,
        }
    }

    fn teacher(&self) -> ResShiftTeacher<'_> {
        ResShiftTeacher {
            unet: &self.teacher,
            lq: &self.lq,
        }
    }

    /// Returns the result of the student and the positions of the gradients.
    fn student(&self) -> (Tensor, HashMap<String, Var>) {
        let vars = variables(&self.student);
        let unet = Unet::new(&self.config, builder(&self.student, &vars)).unwrap();
        let t = [self.schedule.steps() - 1; 2];
        let input = self.schedule.scale_input(&self.start, &t).unwrap();
        (unet.forward(&input, &t, Some(&self.lq)).unwrap(), vars)
    }

    /// Returns the three losses of the student's result `z`.
    fn losses(&self, z: &Tensor) -> [Tensor; 3] {
        let goal = nhwc(&self.want["z_teacher"]);
        let (t, noise) = (times(&self.want["t_hsd"]), nhwc(&self.want["noise_hsd"]));
        let draw = self.draw(&t, &noise);
        let weight = ScoreWeight::Published;
        let g = score_direction(z, &goal, &draw, weight, &self.teacher()).unwrap();
        let (t, noise) = (times(&self.want["t_disc"]), nhwc(&self.want["noise_disc"]));
        let features = self.draw(&t, &noise).features(z, &self.teacher()).unwrap();
        let (tensors, _) = fixture("distill/discriminator.safetensors");
        let d = discriminator(&HashMap::new(), &tensors);
        let logits = d.forward(&features, &t).unwrap();
        [
            regression(z, &goal).unwrap(),
            score_distillation(z, &g).unwrap(),
            hinge_generator(&logits).unwrap(),
        ]
    }

    fn draw<'a>(&'a self, t: &'a [usize], noise: &'a Tensor) -> Perturbation<'a> {
        Perturbation {
            schedule: &self.schedule,
            zy: &self.zy,
            t,
            noise,
        }
    }
}

#[track_caller]
fn assert_scalar(what: &str, got: &Tensor, want: &Tensor) {
    let (got, want) = (scalar(got), scalar(want));
    let d = (got - want).abs() / want.abs();
    eprintln!("{what}: {got} is {d:.2e} from {want}");
    assert!(d < 1e-4, "{what}: {got}, not {want}");
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn results_of_student_and_teacher_are_the_references() {
    let step = Step::load();
    let last = step.schedule.steps();
    let start = step
        .schedule
        .prior(&step.zy, &nhwc(&step.want["noise"]))
        .unwrap();
    assert_close("start", &start, &step.start, 1e-6);
    let (z, _) = step.student();
    assert_close("student", &nchw(&z), &step.want["z_student"], 1e-4);
    let predict = |x: &Tensor, t| step.teacher().predict(x, &[t, t]);
    let z = deterministic(&step.schedule, &step.zy, &step.start, last, predict).unwrap();
    assert_close("teacher", &nchw(&z), &step.want["z_teacher"], 1e-4);
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn every_intermediate_of_the_losses_is_the_references() {
    let step = Step::load();
    let (t, noise) = (times(&step.want["t_hsd"]), nhwc(&step.want["noise_hsd"]));
    let draw = step.draw(&t, &noise);
    for who in ["student", "teacher"] {
        let z = nhwc(&step.want[&format!("z_{who}")]);
        let u = step.schedule.perturb(&z, &step.zy, &t, &noise).unwrap();
        let want = &step.want[&format!("x_{who}_hsd")];
        assert_close(&format!("perturbed {who}"), &nchw(&u), want, 1e-4);
        let e = draw.implied_noise(&z, &step.teacher()).unwrap();
        let want = &step.want[&format!("eps_{who}")];
        assert_close(&format!("noise from {who}"), &nchw(&e), want, 1e-4);
    }
    let (t, noise) = (times(&step.want["t_disc"]), nhwc(&step.want["noise_disc"]));
    let draw = step.draw(&t, &noise);
    for (z, kind) in [("z_student", "fake"), ("z_gt", "real")] {
        let features = draw
            .features(&nhwc(&step.want[z]), &step.teacher())
            .unwrap();
        assert_eq!(features.len(), 3);
        for (i, f) in features.iter().enumerate() {
            let name = format!("feat_{kind}.{i}");
            assert_close(&name, &nchw(f), &step.want[&name], 1e-4);
        }
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn losses_and_their_gradients_at_the_students_result_are_the_references() {
    let step = Step::load();
    let z = nhwc(&step.want["z_student"]);
    for (i, name) in ["reg", "hsd", "gan"].into_iter().enumerate() {
        let term = Term::at(&z, |z| Ok(step.losses(z)[i].clone())).unwrap();
        let value = if name == "gan" { "gan_g" } else { name };
        let want = scalar(&step.want[&format!("loss_{value}")]);
        assert!((term.value - want).abs() < 1e-4 * want.abs());
        let name = format!("grad_z_{name}");
        assert_close(&name, &nchw(&term.gradient), &step.want[&name], 1e-3);
    }
    let all = Term::at(&z, |z| Ok(total(&step.losses(z)))).unwrap();
    let want = scalar(&step.want["loss_total"]);
    assert!((all.value - want).abs() < 1e-4 * want.abs());
    let gradient = nchw(&all.gradient);
    assert_close("grad_z_total", &gradient, &step.want["grad_z_total"], 1e-3);
}

fn total([regression, score, generator]: &[Tensor; 3]) -> Tensor {
    let generator = (generator * 0.02).unwrap();
    ((regression + score).unwrap() + generator).unwrap()
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn gradients_of_all_the_students_parameters_are_the_references() {
    let step = Step::load();
    let (z, vars) = step.student();
    check_gradients(&step, &vars, &total(&step.losses(&z)).backward().unwrap());
    // As in training: first the gradient of the losses, then that of the student.
    let all = Term::at(&z, |z| Ok(total(&step.losses(z)))).unwrap();
    let loss = stand_in(&z, &all.gradient).unwrap();
    check_gradients(&step, &vars, &loss.backward().unwrap());
}

fn check_gradients(step: &Step, vars: &HashMap<String, Var>, grads: &GradStore) {
    let norms: HashMap<String, f64> = serde_json::from_str(&step.metadata["grad_norms"]).unwrap();
    let mut worst = (0.0, String::new());
    for (name, var) in vars {
        let Some(&want) = norms.get(name) else {
            assert!(grads.get(var).is_none(), "{name} should have no gradient");
            continue;
        };
        let g = grads
            .get(var)
            .unwrap_or_else(|| panic!("{name} has no gradient"));
        let got = scalar(&g.sqr().unwrap().sum_all().unwrap()).sqrt();
        // The gradient of a bias before a norm consists only of rounding errors.
        if want < 1e-6 {
            assert!(got < 1e-6, "{name}: norm {got}, not {want}");
            continue;
        }
        let d = (got - want).abs() / want;
        if d > worst.0 {
            worst = (d, name.clone());
        }
        assert!(d < 1e-3, "{name}: norm {got}, not {want}");
    }
    eprintln!("{} norms, worst {:.2e} ({})", norms.len(), worst.0, worst.1);
    assert!(norms.keys().all(|name| vars.contains_key(name)));
    let full = step.want.keys().filter(|n| n.starts_with("grad_student."));
    let mut compared = 0;
    for name in full {
        let gradient = grads
            .get(&vars[name.trim_start_matches("grad_student.")])
            .unwrap();
        assert_close(name, gradient, &step.want[name], 1e-3);
        compared += 1;
    }
    assert_eq!(compared, 4);
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_discriminators_loss_and_gradients_are_the_references() {
    let step = Step::load();
    let (tensors, _) = fixture("distill/discriminator.safetensors");
    let vars = variables(&tensors);
    let d = discriminator(&vars, &tensors);
    let (t, noise) = (times(&step.want["t_disc"]), nhwc(&step.want["noise_disc"]));
    let draw = step.draw(&t, &noise);
    let logits = |z: &str| {
        let features = draw
            .features(&nhwc(&step.want[z]), &step.teacher())
            .unwrap();
        d.forward(&features, &t).unwrap()
    };
    let loss = hinge_discriminator(&logits("z_gt"), &logits("z_student")).unwrap();
    assert_scalar("loss", &loss, &step.want["loss_gan_d"]);
    let grads = loss.backward().unwrap();
    let mut compared = 0;
    for (name, want) in &step.want {
        if let Some(of) = name.strip_prefix("grad_disc.") {
            assert_close(name, grads.get(&vars[of]).unwrap(), want, 1e-3);
            compared += 1;
        }
    }
    assert_eq!(compared, 10);
}
