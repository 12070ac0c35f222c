//! `tadsr-train import` end to end: it converts checkpoints to a model file with the same weights,
//! which runs.
#![cfg(feature = "train")]

#[path = "support/checkpoint.rs"]
mod checkpoint;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use assert_cmd::Command;
use candle_core::{DType, Device, Tensor};
use checkpoint::{dict, of_pickle, pickle};
use tadsr::{
    diffusion,
    model::{LiteModel, Model, Precision, ResShiftMetadata, ResShiftModel, pth::Checkpoint},
    nn::resshift::{ResShiftConfig, upsample_bicubic},
};

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Returns a small model of the architecture: one level with a Swin layer, one without.
fn config() -> ResShiftConfig {
    let mut config = ResShiftConfig::realsr_x4();
    let unet = &mut config.unet;
    unet.image_size = 16;
    unet.lq_size = 16;
    unet.model_channels = 32;
    unet.channel_mult = vec![1, 2];
    unet.num_res_blocks = vec![1, 2];
    unet.attention_resolutions = vec![16];
    unet.swin_embed_dim = 32;
    unet.num_head_channels = 16;
    let autoencoder = &mut config.autoencoder;
    autoencoder.ch = 32;
    autoencoder.ch_mult = vec![1, 1, 2];
    autoencoder.num_res_blocks = vec![1, 1, 1];
    autoencoder.n_embed = 64;
    config
}

/// Returns arbitrary weights for these tensors.
fn weights(tensors: Vec<(String, Vec<usize>)>) -> Tensors {
    let value = |i: usize| (i * 7 % 23) as f32 / 64.0 - 0.15;
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let n = shape.iter().product();
        (name, shape, (0..n).map(value).collect())
    };
    tensors.into_iter().map(tensor).collect()
}

fn unet_weights() -> Tensors {
    let mut tensors = weights(config().unet.tensors());
    // A mask for each of 2x2 windows: the latent has 16x16 pixels.
    let mask = "input_blocks.1.1.blocks.1.attn_mask";
    tensors.push((mask.into(), vec![4, 64, 64], vec![0.0; 4 * 64 * 64]));
    tensors
}

fn autoencoder_weights() -> Tensors {
    weights(config().autoencoder.tensors())
}

/// A folder with the two checkpoints.
struct Import {
    dir: tempfile::TempDir,
}

impl Import {
    fn new(unet: &[u8], autoencoder: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("u.pth"), unet).unwrap();
        fs::write(dir.path().join("a.pth"), autoencoder).unwrap();
        Self { dir }
    }

    fn of(unet: &Tensors) -> Self {
        let unet = checkpoint::checkpoint(Some("state_dict"), unet);
        Self::new(&unet, &checkpoint::checkpoint(None, &autoencoder_weights()))
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out.safetensors")
    }

    fn run(&self, more: &[&str]) -> Output {
        import(
            &self.dir.path().join("u.pth"),
            &self.dir.path().join("a.pth"),
            &self.out(),
            more,
        )
    }

    fn imported(&self, more: &[&str]) -> ResShiftModel {
        let output = self.run(more);
        assert!(output.status.success(), "{}", text(&output.stderr));
        ResShiftModel::read(&self.out()).unwrap()
    }

    /// Returns the reason of the refusal and checks that no file remains.
    fn refused(&self, more: &[&str]) -> String {
        let output = self.run(more);
        assert!(!output.status.success());
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 2);
        text(&output.stderr)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn import(unet: &Path, autoencoder: &Path, out: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tadsr-train"))
        .arg("import")
        .args([
            "--unet".as_ref(),
            unet,
            "--autoencoder".as_ref(),
            autoencoder,
        ])
        .args(["-o".as_ref(), out])
        .args(more)
        .output()
        .unwrap()
}

/// Asserts that a model has these weights within `error`.
fn assert_holds(model: &ResShiftModel, part: &str, tensors: &Tensors, error: f32) {
    for (name, shape, values) in tensors.iter().filter(|(n, ..)| !n.ends_with("attn_mask")) {
        let found = &model.tensors[&format!("{part}.{name}")];
        assert_eq!(found.dims(), shape, "{name}");
        let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= error * b.abs();
        assert!(found.iter().zip(values).all(near), "{name}");
    }
}

#[test]
fn architecture_and_weights_are_those_of_the_checkpoints() {
    let import = Import::of(&unet_weights());
    let model = import.imported(&[]);
    assert_eq!(model.metadata.config, config());
    assert_eq!(model.metadata.name, "out");
    assert!(model.metadata.licence.contains("non-commercial"));
    assert_eq!(model.metadata.source["imported"]["unet"], "u.pth");
    assert_holds(&model, "unet", &unet_weights(), 0.0);
    assert_holds(&model, "autoencoder", &autoencoder_weights(), 0.0);
    let said = text(
        &import
            .run(&["--name", "mine", "--licence", "my own"])
            .stdout,
    );
    for word in [
        "'mine'",
        "15 steps",
        "32 channels x 1 2",
        "realsr-x4",
        "my own",
    ] {
        assert!(said.contains(word), "no {word} in {said}");
    }
}

#[test]
fn weights_can_be_stored_in_half_the_bytes() {
    let import = Import::of(&unet_weights());
    let full = import.imported(&[]);
    let size = || fs::metadata(import.out()).unwrap().len();
    let parameters: usize = full.tensors.values().map(Tensor::elem_count).sum();
    assert!(size() > 4 * parameters as u64);
    for (dtype, error) in [("f16", 1e-3), ("bf16", 8e-3)] {
        let half = import.imported(&["--dtype", dtype]);
        assert!(size() < 4 * parameters as u64);
        assert_holds(&half, "unet", &unet_weights(), error);
    }
    let mut large = unet_weights();
    large[3].2[0] = 1e6;
    let import = Import::of(&large);
    let refused = import.refused(&["--dtype", "f16"]);
    assert!(
        refused.contains(&large[3].0) && refused.contains("f16"),
        "{refused}"
    );
    import.imported(&["--dtype", "bf16"]);
    large[3].2[0] = f32::NAN;
    assert!(Import::of(&large).refused(&[]).contains("not finite"));
}

#[test]
fn names_of_parallel_training_and_compilation_are_unwrapped() {
    for prefix in [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
    ] {
        let mut wrapped = unet_weights();
        wrapped
            .iter_mut()
            .for_each(|(name, ..)| *name = format!("{prefix}{name}"));
        let model = Import::of(&wrapped).imported(&[]);
        assert_eq!(model.metadata.config, config());
    }
    let mut twice = unet_weights();
    twice.push(("module.out.2.bias".into(), vec![3], vec![0.0; 3]));
    let refused = Import::of(&twice).refused(&[]);
    assert!(refused.contains("module.out.2.bias"), "{refused}");
}

#[test]
fn tensors_that_do_not_fit_are_listed_by_name() {
    let mut wrong = unet_weights();
    let at = |wrong: &Tensors, name| wrong.iter().position(|(n, ..)| n == name).unwrap();
    let bias = at(&wrong, "middle_block.0.in_layers.2.bias");
    (wrong[bias].1, wrong[bias].2) = (vec![63], vec![0.0; 63]);
    let missing = at(&wrong, "out.0.weight");
    wrong.remove(missing);
    wrong.push(("extra.weight".into(), vec![1], vec![0.0]));
    let refused = Import::of(&wrong).refused(&[]);
    for part in [
        "u.pth",
        "1 missing: out.0.weight",
        "1 unexpected: extra.weight",
        "1 of another shape: middle_block.0.in_layers.2.bias [63] instead of [64]",
    ] {
        assert!(refused.contains(part), "no '{part}' in {refused}");
    }
    for preset in ["realsr-x4", "realsr-x4-s4", "faceir"] {
        let refused = Import::of(&unet_weights()).refused(&["--preset", preset]);
        assert!(
            refused.contains(" missing: ") && refused.contains(" unexpected: "),
            "{refused}"
        );
        assert!(refused.contains("instead of [160,"), "{refused}");
    }
}

#[test]
fn settings_that_shapes_do_not_determine_are_options() {
    let mut bare = unet_weights();
    bare.retain(|(name, ..)| !name.ends_with("attn_mask"));
    let import = Import::of(&bare);
    // Without a mask and an option, the side is that of the ResShift models of the authors.
    assert_eq!(import.imported(&[]).metadata.config.unet.image_size, 64);
    let model = import.imported(&[
        "--image-size",
        "16",
        "--steps",
        "4",
        "--min-noise-level",
        "0.2",
    ]);
    let mut expected = config();
    expected.diffusion = ResShiftConfig::realsr_x4_s4().diffusion;
    assert_eq!(model.metadata.config, expected);

    let json = import.dir.path().join("config.json");
    expected.diffusion.kappa = 1.5;
    fs::write(&json, serde_json::to_string(&expected).unwrap()).unwrap();
    let model = import.imported(&["--config", json.to_str().unwrap()]);
    assert_eq!(model.metadata.config, expected);
    for (wrong, word) in [
        ("--steps=1", "steps = 1"),
        ("--kappa=-1", "kappa"),
        ("--kappa=NaN", "kappa"),
        ("--image-size=15", "image_size"),
        ("--image-size=0", "image_size"),
        ("--config=/no/such.json", "/no/such.json"),
    ] {
        let output = import.run(&[wrong]);
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(word), "{said}");
    }
}

#[test]
fn swapped_foreign_or_missing_files_are_named() {
    let (unet, autoencoder) = (
        checkpoint::checkpoint(None, &unet_weights()),
        checkpoint::checkpoint(None, &autoencoder_weights()),
    );
    assert!(
        Import::new(&autoencoder, &unet)
            .refused(&[])
            .contains("swapped")
    );
    assert!(Import::new(&unet, &unet).refused(&[]).contains("swapped"));
    let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.and what follows";
    assert!(
        Import::new(legacy, &autoencoder)
            .refused(&[])
            .contains("torch.save")
    );
    let code = of_pickle(&pickle(&dict(&[(
        "state_dict",
        b"cos\nsystem\n(X\x02\0\0\0idtR".to_vec(),
    )])));
    let refused = Import::new(&code, &autoencoder).refused(&[]);
    assert!(
        refused.contains("u.pth") && refused.contains("'os.system'"),
        "{refused}"
    );
    let missing = import(
        "/no/u.pth".as_ref(),
        "/no/a.pth".as_ref(),
        "/no/out".as_ref(),
        &[],
    );
    assert!(text(&missing.stderr).contains("/no/u.pth"));
}

#[test]
fn a_checkpoint_is_never_overwritten() {
    let import_ = Import::of(&unet_weights());
    let (unet, autoencoder) = (
        import_.dir.path().join("u.pth"),
        import_.dir.path().join("a.pth"),
    );
    let before = fs::read(&unet).unwrap();
    let output = import(&unet, &autoencoder, &unet, &[]);
    assert!(!output.status.success() && text(&output.stderr).contains("u.pth"));
    assert!(fs::read(&unet).unwrap() == before);
}

#[test]
fn a_saved_model_is_read_back() {
    let import = Import::of(&unet_weights());
    let model = import.imported(&[]);
    model.save(&import.out(), Precision::F32).unwrap();
    let Model::ResShift(again) = Model::read(&import.out()).unwrap() else {
        panic!("the family is written");
    };
    assert_eq!(again.metadata, model.metadata);
    assert_holds(&again, "unet", &unet_weights(), 0.0);
    model.unet(&Device::Cpu).unwrap();
    model.autoencoder(&Device::Cpu).unwrap();
    assert_eq!(model.schedule().unwrap().steps(), 15);
    let error = LiteModel::read(&import.out()).unwrap_err().to_string();
    assert!(
        error.contains("'official'") && error.contains("'lite'"),
        "{error}"
    );
}

/// Returns the header of a model file as JSON, and its data.
fn split(bytes: &[u8]) -> (serde_json::Value, &[u8]) {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (
        serde_json::from_slice(&bytes[8..8 + n]).unwrap(),
        &bytes[8 + n..],
    )
}

#[test]
fn an_inconsistent_model_file_is_refused_before_memory_is_allocated() {
    let import = Import::of(&unet_weights());
    import.imported(&["--dtype", "f16"]);
    let bytes = fs::read(import.out()).unwrap();
    let (header, data) = split(&bytes);
    let reason = |header: &serde_json::Value| {
        let json = header.to_string().into_bytes();
        let bytes = [&(json.len() as u64).to_le_bytes()[..], &json, data].concat();
        ResShiftModel::parse(&bytes, "m".as_ref())
            .unwrap_err()
            .to_string()
    };
    let metadata = |change: &dyn Fn(&mut ResShiftMetadata)| {
        let mut header = header.clone();
        let text = header["__metadata__"]["tadsr"].as_str().unwrap();
        let mut metadata: ResShiftMetadata = serde_json::from_str(text).unwrap();
        change(&mut metadata);
        header["__metadata__"]["tadsr"] = serde_json::to_string(&metadata).unwrap().into();
        reason(&header)
    };
    assert!(metadata(&|m| m.format_version = 2).contains("version 2"));
    assert!(metadata(&|m| m.family = "lite".into()).contains("'lite'"));
    assert!(metadata(&|m| m.name = "a\nb".into()).contains("not printable"));
    assert!(metadata(&|m| m.config.unet.model_channels = 1 << 40).contains("channels"));
    assert!(metadata(&|m| m.config.unet.channel_mult = vec![1; 60]).contains("channel_mult"));
    assert!(
        metadata(&|m| m.config.autoencoder.n_embed = 1 << 16).contains("quantize.embedding.weight")
    );
    assert!(metadata(&|m| m.config.unet.num_res_blocks[0] = 16).contains("missing"));
    let name = "unet.out.2.weight";
    let changed = |field: &str, value: serde_json::Value| {
        let mut header = header.clone();
        header[name][field] = value;
        reason(&header)
    };
    assert!(changed("shape", serde_json::json!([3, 9, 32])).contains(name));
    assert!(changed("dtype", "I16".into()).contains(name));
    changed("shape", serde_json::json!([1u64 << 62, 4]));
    changed("data_offsets", serde_json::json!([0, 1u64 << 50]));
    for n in (0..bytes.len()).step_by(bytes.len() / 50) {
        let cut = ResShiftModel::parse(&bytes[..n], "m".as_ref());
        assert!(cut.unwrap_err().to_string().contains("truncated"));
    }
    let mut nan = bytes.clone();
    let last = nan.len() - 2;
    nan[last..].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let nan = ResShiftModel::parse(&nan, "m".as_ref())
        .unwrap_err()
        .to_string();
    assert!(nan.contains("not finite"), "{nan}");
}

fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures/mini");
    folder.join(name)
}

/// Returns the folder of the imported fixture, and the model.
fn imported_fixture() -> (tempfile::TempDir, ResShiftModel) {
    let (unet, autoencoder) = (fixture("unet.pth"), fixture("autoencoder.pth"));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("mini.safetensors");
    let output = import(&unet, &autoencoder, &out, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    (dir, ResShiftModel::read(&out).unwrap())
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn checkpoints_of_the_authors_code_are_imported_completely() {
    let (_dir, model) = imported_fixture();
    let unet = &model.metadata.config.unet;
    assert_eq!(
        (unet.image_size, unet.lq_size, unet.window_size),
        (16, 16, 8)
    );
    assert_eq!(
        (&unet.attention_resolutions, unet.num_head_channels),
        (&vec![16, 8], 16)
    );
    let mut count = 0;
    for part in ["unet", "autoencoder"] {
        let mut stored = Checkpoint::open(&fixture(&format!("{part}.pth"))).unwrap();
        let names: Vec<String> = stored.shapes().map(|(name, _)| name.to_string()).collect();
        let buffers = ["relative_position_index", "attn_mask"];
        for name in names
            .iter()
            .filter(|n| !buffers.iter().any(|b| n.ends_with(b)))
        {
            let wanted = stored.read(name).unwrap();
            let found = &model.tensors[&format!("{part}.{name}")];
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(
                found.dims() == wanted.dims() && values(found) == values(&wanted),
                "{name}"
            );
            count += 1;
        }
    }
    assert_eq!(count, model.tensors.len());
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn the_imported_model_gives_the_authors_image() {
    let (_dir, model) = imported_fixture();
    let io = fixture("io.safetensors");
    let io: HashMap<String, Tensor> = candle_core::safetensors::load(io, &Device::Cpu).unwrap();
    let get = |name: &str| {
        io[name]
            .permute((0, 2, 3, 1))
            .unwrap()
            .contiguous()
            .unwrap()
    };
    let (unet, autoencoder) = (
        model.unet(&Device::Cpu).unwrap(),
        model.autoencoder(&Device::Cpu).unwrap(),
    );
    let schedule = model.schedule().unwrap();
    let lq = get("lq");
    let scale = model.metadata.config.diffusion.scale;
    let zy = autoencoder
        .encode(&upsample_bicubic(&lq, scale).unwrap())
        .unwrap();
    let z = schedule.prior(&zy, &get("noise")).unwrap();
    let z0 = diffusion::one_step(&schedule, &z, |z, t| unet.forward(z, &[t], Some(&lq))).unwrap();
    let image = autoencoder.decode(&z0, true).unwrap();
    let furthest = (image - get("image")).unwrap().abs().unwrap();
    let furthest = furthest.flatten_all().unwrap().max(0).unwrap();
    let furthest = furthest
        .to_dtype(DType::F32)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(furthest < 1e-3, "{furthest}");
}
