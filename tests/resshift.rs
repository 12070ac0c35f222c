//! The ResShift networks, compared with the authors' network code on small random weights.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Result, Tensor, pickle, safetensors};
use candle_nn::VarBuilder;
use serde_json::Value;
use tadsr::{
    diffusion::{self, Schedule},
    nn::resshift::{
        Autoencoder, AutoencoderConfig, DiffusionConfig, Unet, UnetConfig, upsample_bicubic,
    },
};

/// Fixture with every stage of the inference of a small model.
struct Fixture {
    tensors: HashMap<String, Tensor>,
    unet: Unet,
    autoencoder: Autoencoder,
    schedule: Schedule,
}

/// Returns the path of a file with reference values.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../shared/fixtures")
        .join(name)
}

/// Returns the JSON text under `key` in the metadata of a safetensors file.
fn metadata(name: &str, key: &str) -> Value {
    let bytes = std::fs::read(path(name)).unwrap();
    let (_, header) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let text = &header.metadata().as_ref().unwrap()[key];
    serde_json::from_str(text).unwrap()
}

fn number(v: &Value, key: &str) -> usize {
    v[key].as_u64().unwrap() as usize
}

fn numbers(v: &Value, key: &str) -> Vec<usize> {
    let list = v[key].as_array().unwrap();
    list.iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

fn unet_config() -> UnetConfig {
    let v = metadata("mini/io.safetensors", "unet");
    UnetConfig {
        image_size: number(&v, "image_size"),
        in_channels: number(&v, "in_channels"),
        out_channels: number(&v, "out_channels"),
        model_channels: number(&v, "model_channels"),
        channel_mult: numbers(&v, "channel_mult"),
        num_res_blocks: numbers(&v, "num_res_blocks"),
        attention_resolutions: numbers(&v, "attention_resolutions"),
        num_head_channels: number(&v, "num_head_channels"),
        swin_depth: number(&v, "swin_depth"),
        swin_embed_dim: number(&v, "swin_embed_dim"),
        window_size: number(&v, "window_size"),
        mlp_ratio: number(&v, "mlp_ratio"),
        cond_lq: v["cond_lq"].as_bool().unwrap(),
        lq_size: number(&v, "lq_size"),
    }
}

fn autoencoder_config() -> AutoencoderConfig {
    let v = metadata("mini/io.safetensors", "autoencoder");
    let dd = &v["ddconfig"];
    let ch_mult = numbers(dd, "ch_mult");
    AutoencoderConfig {
        in_channels: number(dd, "in_channels"),
        out_channels: number(dd, "out_ch"),
        ch: number(dd, "ch"),
        num_res_blocks: vec![number(dd, "num_res_blocks"); ch_mult.len()],
        ch_mult,
        z_channels: number(dd, "z_channels"),
        embed_dim: number(&v, "embed_dim"),
        n_embed: number(&v, "n_embed"),
    }
}

fn schedule() -> Schedule {
    let v = metadata("mini/io.safetensors", "diffusion");
    let config = DiffusionConfig {
        scale: number(&v, "sf"),
        steps: number(&v, "steps"),
        kappa: v["kappa"].as_f64().unwrap(),
        power: v["schedule_kwargs"]["power"].as_f64().unwrap(),
        min_noise_level: v["min_noise_level"].as_f64().unwrap(),
        etas_end: v["etas_end"].as_f64().unwrap(),
    };
    Schedule::new(&config).unwrap()
}

fn unet_weights() -> HashMap<String, Tensor> {
    let tensors = pickle::read_all_with_key(path("mini/unet.pth"), Some("state_dict"));
    tensors.unwrap().into_iter().collect()
}

fn autoencoder_weights() -> HashMap<String, Tensor> {
    let tensors = pickle::read_all(path("mini/autoencoder.pth"));
    tensors.unwrap().into_iter().collect()
}

fn builder(weights: HashMap<String, Tensor>) -> VarBuilder<'static> {
    VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu)
}

/// Returns each fixture with networks for training and with networks packed for inference.
fn fixtures() -> Vec<Fixture> {
    let load = |(folder, packed): (&str, bool)| {
        let file = path(&format!("{folder}/io.safetensors"));
        let mut unet = Unet::new(&unet_config(), builder(unet_weights())).unwrap();
        let weights = builder(autoencoder_weights());
        let mut autoencoder = Autoencoder::new(&autoencoder_config(), weights).unwrap();
        if packed {
            unet.pack().unwrap();
            autoencoder.pack().unwrap();
        }
        Fixture {
            tensors: safetensors::load(file, &Device::Cpu).unwrap(),
            unet,
            autoencoder,
            schedule: schedule(),
        }
    };
    ["mini", "mini_rect"]
        .into_iter()
        .flat_map(|folder| [(folder, false), (folder, true)])
        .map(load)
        .collect()
}

impl Fixture {
    fn get(&self, name: &str) -> Tensor {
        nhwc(&self.tensors[name])
    }

    /// Returns the network as a function for samplers.
    fn denoise(&self) -> impl Fn(&Tensor, usize) -> Result<Tensor> {
        let lq = self.get("lq");
        move |z, t| self.unet.forward(z, &vec![t; z.dim(0)?], Some(&lq))
    }

    fn last(&self) -> usize {
        self.schedule.steps() - 1
    }
}

fn nhwc(t: &Tensor) -> Tensor {
    match t.rank() {
        4 => t.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap(),
        _ => t.clone(),
    }
}

/// Returns the norm of the difference over the norm.
fn distance(got: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(got.dims(), wanted.dims());
    let norm = |t: &Tensor| {
        let t = t.to_dtype(DType::F64).unwrap();
        t.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
            .sqrt()
    };
    norm(&(got - wanted).unwrap()) / norm(wanted)
}

#[track_caller]
fn assert_near(got: &Tensor, wanted: &Tensor, most: f64, what: &str) {
    let distance = distance(got, wanted);
    println!("{what}: {distance:.1e}");
    assert!(distance <= most, "{what} is {distance:.1e} off");
}

/// Returns names and shapes of the weights, without computed tensors.
fn shapes(weights: &HashMap<String, Tensor>) -> Vec<(String, Vec<usize>)> {
    let computed =
        |name: &str| name.ends_with("relative_position_index") || name.ends_with("attn_mask");
    let weights = weights.iter().filter(|(name, _)| !computed(name));
    let mut shapes: Vec<_> = weights
        .map(|(name, t)| (name.clone(), t.dims().to_vec()))
        .collect();
    shapes.sort();
    shapes
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_schedule_is_the_published_one() {
    for f in fixtures() {
        let values = |name: &str| f.tensors[name].to_vec1::<f64>().unwrap();
        let (sqrt_etas, variances) = (values("sqrt_etas"), values("post_var"));
        assert_eq!(f.schedule.steps(), sqrt_etas.len());
        for (t, (&sqrt_eta, &variance)) in sqrt_etas.iter().zip(&variances).enumerate() {
            assert!((f.schedule.sqrt_eta()[t] - sqrt_eta).abs() < 1e-12);
            let posterior = f.schedule.posterior(t, t.checked_sub(1));
            // Instead of the variance at time 0, which is 0 and has no logarithm, the fixture has
            // that at time 1.
            let wanted = if t == 0 { 0.0 } else { variance };
            assert!((posterior.variance - wanted).abs() < 1e-12);
        }
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_way_to_the_networks_input_is_the_published_one() {
    for f in fixtures() {
        let (lq, noise, t) = (f.get("lq"), f.get("noise"), f.last());
        let bicubic = upsample_bicubic(&lq, 4).unwrap();
        assert_near(&bicubic, &f.get("bicubic"), 1e-6, "bicubic");
        let z_y = f.autoencoder.encode(&bicubic).unwrap();
        assert_near(&z_y, &f.get("z_y"), 1e-4, "z_y");
        let z_t = f.schedule.prior(&f.get("z_y"), &noise).unwrap();
        assert_near(&z_t, &f.get("z_T"), 1e-6, "z_T");
        let input = f.schedule.scale_input(&z_t, &[t]).unwrap();
        assert_near(&input, &f.get("unet_in"), 1e-6, "unet_in");
        let time = f.unet.embed_time(&[t]).unwrap();
        assert_near(&time, &f.get("temb"), 1e-5, "temb");
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn one_step_predicts_the_published_latent() {
    for f in fixtures() {
        let z0 = diffusion::one_step(&f.schedule, &f.get("z_T"), f.denoise()).unwrap();
        assert_near(&z0, &f.get("z0"), 1e-4, "z0");
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn codes_are_the_published_ones() {
    for f in fixtures() {
        let (quantized, indices) = f.autoencoder.quantize(&f.get("z0")).unwrap();
        let indices = indices.flatten_all().unwrap().to_dtype(DType::I64).unwrap();
        assert_eq!(
            indices.to_vec1::<i64>().unwrap(),
            f.tensors["indices"].to_vec1::<i64>().unwrap()
        );
        assert_near(&quantized, &f.get("quant"), 1e-6, "quant");
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn decoded_images_are_the_published_ones() {
    for f in fixtures() {
        for (name, quantize) in [("image", true), ("image_noquant", false)] {
            let image = f.autoencoder.decode(&f.get("z0"), quantize).unwrap();
            assert_near(&image, &f.get(name), 1e-4, name);
        }
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_whole_way_gives_the_published_image() {
    for f in fixtures() {
        let z_y = f
            .autoencoder
            .encode(&upsample_bicubic(&f.get("lq"), 4).unwrap())
            .unwrap();
        let z_t = f.schedule.prior(&z_y, &f.get("noise")).unwrap();
        let z0 = diffusion::one_step(&f.schedule, &z_t, f.denoise()).unwrap();
        let image = f.autoencoder.decode(&z0, true).unwrap();
        assert_near(&image, &f.get("image"), 1e-4, "image");
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_deterministic_trajectory_is_the_published_one() {
    for f in fixtures() {
        let denoise = f.denoise();
        let mut predictions = Vec::new();
        let recording = |z: &Tensor, t| {
            predictions.push(denoise(z, t)?);
            Ok(predictions[predictions.len() - 1].clone())
        };
        let (zy, z_t) = (f.get("z_y"), f.get("z_T"));
        let steps = f.schedule.steps();
        let z = diffusion::deterministic(&f.schedule, &zy, &z_t, steps, recording).unwrap();
        assert_eq!(predictions.len(), steps);
        assert_near(&predictions[0], &f.get("x0_first"), 1e-4, "x0_first");
        assert_near(&predictions[steps - 1], &f.get("x0_last"), 1e-4, "x0_last");
        assert_near(&z, &f.get("z_ddim"), 1e-4, "z_ddim");
    }
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn a_network_asks_for_exactly_the_tensors_of_a_checkpoint() {
    let weights = unet_weights();
    let mut tensors = unet_config().tensors();
    tensors.sort();
    assert_eq!(tensors, shapes(&weights));
    let mut tensors = autoencoder_config().tensors();
    tensors.sort();
    assert_eq!(tensors, shapes(&autoencoder_weights()));
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn features_are_those_that_the_discriminator_was_given() {
    let file = path("distill/step.safetensors");
    let step = safetensors::load(file, &Device::Cpu).unwrap();
    let teacher = safetensors::load(path("distill/teacher.safetensors"), &Device::Cpu);
    let student = safetensors::load(path("distill/student.safetensors"), &Device::Cpu);
    let (config, schedule) = (unet_config(), schedule());
    let (teacher, student) = (teacher.unwrap(), student.unwrap());
    let teacher = Unet::new(&config, builder(teacher)).unwrap();
    let student = Unet::new(&config, builder(student)).unwrap();
    let get = |name: &str| nhwc(&step[name]);
    let (zy, lq, last) = (get("z_y"), get("lq"), schedule.steps() - 1);

    let denoise = |z: &Tensor, t| student.forward(z, &[t; 2], Some(&lq));
    let z_student = diffusion::one_step(&schedule, &get("z_T"), denoise).unwrap();
    assert_near(&z_student, &get("z_student"), 1e-4, "z_student");

    let times = |name: &str| -> Vec<usize> {
        let times = step[name].to_vec1::<i64>().unwrap();
        times.into_iter().map(|t| t as usize).collect()
    };
    let t = times("t_disc");
    assert!(t.iter().all(|&t| t < last));
    for (which, z) in [("real", get("z_gt")), ("fake", get("z_student"))] {
        let u = schedule.perturb(&z, &zy, &t, &get("noise_disc")).unwrap();
        let input = schedule.scale_input(&u, &t).unwrap();
        let features = teacher.features(&input, &t, Some(&lq)).unwrap();
        assert_eq!(features.len(), 3);
        for (i, feature) in features.iter().enumerate() {
            let name = format!("feat_{which}.{i}");
            assert_near(feature, &get(&name), 1e-4, &name);
            assert_eq!(feature.dim(3).unwrap(), teacher.feature_channels()[i]);
        }
    }

    let t = times("t_hsd");
    for (which, z) in [("student", get("z_student")), ("teacher", get("z_teacher"))] {
        let u = schedule.perturb(&z, &zy, &t, &get("noise_hsd")).unwrap();
        let name = format!("x_{which}_hsd");
        assert_near(&u, &get(&name), 1e-6, &name);
        let input = schedule.scale_input(&u, &t).unwrap();
        let x0 = teacher.forward(&input, &t, Some(&lq)).unwrap();
        let eps = schedule.predicted_noise(&u, &x0, &zy, &t).unwrap();
        let name = format!("eps_{which}");
        assert_near(&eps, &get(&name), 1e-4, &name);
    }
}
