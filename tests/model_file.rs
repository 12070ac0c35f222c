//! Model files are untrusted input: every defect is an error with a reason.

use std::path::Path;

use candle_core::Tensor;
use proptest::prelude::*;
use tadsr::{
    Device, Error, Upscaler,
    model::{
        Calibration, FORMAT_VERSION, Layer, LayerCondition, LiteModel, MEMORY_VERSION, Metadata,
    },
    nn::lite::{Condition, Conditioning, LatentStats, LayerSpec, StudentConfig},
};

fn values(n: usize, seed: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7 + seed) % 13) as f32 / 64.0 - 0.1;
    (0..n).map(value).collect()
}

/// Returns a small model with arbitrary weights.
fn model() -> LiteModel {
    let mut student = StudentConfig::tiny(2);
    (student.channels, student.depth) = (5, 1);
    LiteModel {
        metadata: Metadata::lite("made-up", student, [1.0, 2.0]),
        stats: LatentStats::nominal(student.latent, student.r),
        layers: student
            .layers()
            .into_iter()
            .map(|spec| {
                Layer::new(
                    values(spec.co * spec.ci * 9, 1),
                    values(spec.co, 2),
                    values(spec.co * 2, 3),
                    spec,
                )
            })
            .collect(),
        calibration: None,
    }
}

fn reason(bytes: &[u8]) -> String {
    match LiteModel::parse(bytes, Path::new("some.safetensors")) {
        Err(e @ Error::Model { .. }) => e.to_string(),
        other => panic!("expected a model error, got {other:?}"),
    }
}

/// Returns the header of the file as JSON, and its data.
fn open(bytes: &[u8]) -> (serde_json::Value, Vec<u8>) {
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (
        serde_json::from_slice(&bytes[8..8 + n]).unwrap(),
        bytes[8 + n..].to_vec(),
    )
}

fn close(header: &serde_json::Value, data: &[u8]) -> Vec<u8> {
    let json = header.to_string().into_bytes();
    [&(json.len() as u64).to_le_bytes()[..], &json, data].concat()
}

/// Returns the file of the model with changed metadata.
fn with_metadata(change: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
    let (mut header, data) = open(&model().to_bytes(false).unwrap());
    let text = header["__metadata__"]["tadsr"].as_str().unwrap();
    let mut meta: serde_json::Value = serde_json::from_str(text).unwrap();
    change(&mut meta);
    header["__metadata__"]["tadsr"] = meta.to_string().into();
    close(&header, &data)
}

#[test]
fn a_written_model_is_read_back() {
    let model = model();
    let parse = |bytes: Vec<u8>| LiteModel::parse(&bytes, Path::new("x")).unwrap();
    assert_eq!(parse(model.to_bytes(false).unwrap()), model);
    let half = parse(model.to_bytes(true).unwrap());
    assert_eq!(half.metadata, model.metadata);
    for (a, b) in half.layers.iter().zip(&model.layers) {
        for (a, b) in a.weight.iter().zip(&b.weight) {
            assert!((a - b).abs() <= 1e-3 * b.abs().max(1e-3), "{a}, not {b}");
        }
    }
}

/// Returns the model with dials in all layers, with kernels of `detail_rank`.
fn conditioned(detail_rank: usize) -> LiteModel {
    let mut model = model();
    let student = StudentConfig {
        conditioning: Conditioning {
            denoise: true,
            detail: true,
            detail_rank,
        },
        ..model.metadata.student
    };
    model.metadata = Metadata::lite("made-up", student, [1.0, 2.0]);
    for (layer, seed) in model.layers.iter_mut().zip(10..) {
        let specs = layer.spec.conditions(&student.conditioning).into_iter();
        layer.conditions = specs.map(LayerCondition::zero).collect();
        for (i, tensor) in layer.values_mut().into_iter().enumerate() {
            *tensor = values(tensor.len(), seed + 100 * i);
        }
    }
    model
}

#[test]
fn a_model_with_dials_is_read_back_and_folds_to_the_same_network() {
    for detail_rank in [0, 3] {
        check_folding(&conditioned(detail_rank));
    }
    let error = reason(&with_metadata(|meta| {
        meta["format_version"] = 2.into();
        meta["student"]["conditioning"] = serde_json::json!({ "detail": true, "detail_rank": 65 });
    }));
    assert!(error.contains("detail_rank 65: 0 to 64"), "{error}");
}

fn check_folding(model: &LiteModel) {
    assert_eq!((model.metadata.format_version, FORMAT_VERSION), (2, 1));
    let bytes = model.to_bytes(false).unwrap();
    assert_eq!(&LiteModel::parse(&bytes, Path::new("x")).unwrap(), model);
    let at = Condition {
        scale: 1.5,
        denoise: 0.3,
        detail: 0.8,
    };
    let r = model.metadata.student.r;
    let fold = |layer: &Layer| {
        let (kernel, bias) = layer.fold(&at, r);
        Layer::new(
            kernel,
            bias,
            vec![0.0; 2 * layer.spec.co],
            layer.spec.clone(),
        )
    };
    let mut folded = model.clone();
    folded.layers = model.layers.iter().map(fold).collect();
    folded.metadata.student.conditioning = Conditioning::default();
    let z: Vec<f32> = values(4 * 4 * 4, 9).iter().map(|v| 0.1 * v).collect();
    let z = Tensor::from_vec(z, (1, 4, 4, 4), &candle_core::Device::Cpu).unwrap();
    let [a, b] = [model, &folded].map(|m| {
        let y = m.student().unwrap().forward(&z, &at).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    let size = a.iter().fold(0f32, |size, v| size.max(v.abs()));
    assert!(size > 1e-2);
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() < 1e-4 * size, "{a}, not {b}");
    }
}

#[test]
fn a_model_with_memory_is_read_back_and_computes_the_first_frame_without_it() {
    for detail_rank in [0, 3] {
        check_memory(conditioned(detail_rank));
    }
}

fn check_memory(mut model: LiteModel) {
    let student = StudentConfig {
        memory: 3,
        ..model.metadata.student
    };
    model.metadata = Metadata::lite("made-up", student, [1.0, 2.0]);
    let specs = student.layers().into_iter().zip(20..);
    let layer = |(spec, seed): (LayerSpec, usize)| {
        let conditions = spec.conditions(&student.conditioning).into_iter();
        let mut layer = Layer {
            weight: vec![0.0; 9 * spec.co * spec.ci],
            bias: vec![0.0; spec.co],
            conditions: conditions.map(LayerCondition::zero).collect(),
            spec,
        };
        for (i, tensor) in layer.values_mut().into_iter().enumerate() {
            *tensor = values(tensor.len(), seed + 100 * i);
        }
        layer
    };
    model.layers = specs.map(layer).collect();
    assert_eq!((model.metadata.format_version, MEMORY_VERSION), (3, 3));
    let bytes = model.to_bytes(false).unwrap();
    assert_eq!(LiteModel::parse(&bytes, Path::new("x")).unwrap(), model);
    let (mut header, data) = open(&bytes);
    let text = header["__metadata__"]["tadsr"].as_str().unwrap();
    let older = text.replace(r#""format_version":3"#, r#""format_version":2"#);
    header["__metadata__"]["tadsr"] = older.into();
    let older = close(&header, &data);
    assert!(reason(&older).contains("memory in a file of format version 2"));

    let without = model.without_memory();
    assert_eq!(without.metadata.student.memory, 0);
    let (first, last) = (
        &without.layers[0].spec,
        &without.layers[without.layers.len() - 1].spec,
    );
    assert_eq!((first.ci, last.co), (4, 4));
    // It is a model of its own.
    let bytes = without.to_bytes(false).unwrap();
    assert_eq!(
        LiteModel::parse(&bytes, Path::new("x")).unwrap().layers,
        without.layers
    );
    let at = Condition {
        scale: 1.5,
        denoise: 0.3,
        detail: 0.8,
    };
    let z: Vec<f32> = values(4 * 4 * 4, 9).iter().map(|v| 0.1 * v).collect();
    let z = Tensor::from_vec(z, (1, 4, 4, 4), &candle_core::Device::Cpu).unwrap();
    let [a, b] = [&model, &without].map(|m| {
        let y = m.student().unwrap().forward(&z, &at).unwrap();
        y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    assert!(a.iter().any(|v| v.abs() > 1e-3));
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{a}, not {b}");
    }
}

#[test]
fn a_calibration_is_read_back_and_a_wrong_one_refused() {
    let mut model = model();
    let ranges = |n: usize| {
        (0..n)
            .map(|i| [-1.0 - i as f32, 2.0, 0.5])
            .collect::<Vec<_>>()
    };
    // The latent, the head and the layer of the body.
    let stages = vec![ranges(4), ranges(5), ranges(5)];
    model.calibration = Some(Calibration { ranges: stages });
    for half in [false, true] {
        let bytes = model.to_bytes(half).unwrap();
        let back = LiteModel::parse(&bytes, Path::new("x")).unwrap();
        assert_eq!(back.calibration, model.calibration);
    }
    let mut wrong = model.clone();
    wrong.calibration.as_mut().unwrap().ranges[1][2] = [0.0, 1.0, 3.0];
    let reason = reason(&wrong.to_bytes(true).unwrap());
    assert!(reason.contains("head.range"), "{reason}");
    wrong.calibration.as_mut().unwrap().ranges.truncate(2);
    assert!(LiteModel::parse(&wrong.to_bytes(true).unwrap(), Path::new("x")).is_err());
}

#[test]
fn weights_that_do_not_fit_in_f16_are_refused() {
    let mut model = model();
    model.layers[0].bias[0] = 1e6;
    assert!(model.to_bytes(false).is_ok());
    assert!(
        model
            .to_bytes(true)
            .unwrap_err()
            .to_string()
            .contains("head.bias")
    );
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = model().to_bytes(true).unwrap();
    for n in (0..bytes.len()).step_by(17).chain([bytes.len() - 1]) {
        let text = reason(&bytes[..n]);
        assert!(
            text.contains("some.safetensors") && text.contains("truncated"),
            "{text}"
        );
    }
}

#[test]
fn foreign_files_are_named_as_such() {
    assert!(reason(b"PK\x03\x04 a zip").contains("not a safetensors file"));
    assert!(reason(&[0xff; 64]).contains("not a safetensors file"));
    let foreign = close(&serde_json::json!({}), &[]);
    assert!(
        reason(&foreign).contains("no 'tadsr' metadata"),
        "{}",
        reason(&foreign)
    );
}

#[test]
fn a_giant_shape_is_refused_before_memory_is_allocated() {
    let (mut header, data) = open(&model().to_bytes(false).unwrap());
    header["head.weight"]["shape"] = serde_json::json!([65536, 16384, 1, 1]);
    reason(&close(&header, &data));
    header["head.weight"]["data_offsets"] = serde_json::json!([0, 4u64 << 30]);
    reason(&close(&header, &data));
    header["head.weight"]["shape"] = serde_json::json!([u64::MAX, u64::MAX, 3, 3]);
    reason(&close(&header, &data));
    let text = reason(&with_metadata(|m| {
        m["student"]["channels"] = (1u64 << 40).into()
    }));
    assert!(text.contains("channels"), "{text}");
    let wide = |m: &mut serde_json::Value| {
        m["student"]["r"] = 1.into();
        m["student"]["channels"] = 1024.into();
    };
    assert!(reason(&with_metadata(wide)).contains("1024 channels"));
    let text = reason(&with_metadata(|m| m["student"]["depth"] = 1_000_000.into()));
    assert!(text.contains("depth"), "{text}");
}

#[test]
fn metadata_out_of_range_is_explained() {
    for (field, value, word) in [
        ("format_version", serde_json::json!(99), "version 99"),
        ("family", serde_json::json!("official"), "family"),
        ("scales", serde_json::json!([1.0, 400.0]), "scales"),
        ("scales", serde_json::json!([2.0, 1.0]), "scales"),
        ("scales", serde_json::json!("two"), "metadata"),
        ("name", serde_json::json!("nul\0"), "not printable"),
        ("name", serde_json::json!("n".repeat(1000)), "100 bytes"),
    ] {
        let text = reason(&with_metadata(|m| m[field] = value.clone()));
        assert!(text.contains(word), "{text}");
    }
    let text = reason(&with_metadata(|m| m["student"]["r"] = 0.into()));
    assert!(text.contains("r = 0"), "{text}");
}

#[test]
fn missing_and_unexpected_tensors_are_listed() {
    let bytes = model().to_bytes(false).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let rewrite = |keep: &dyn Fn(&str) -> Option<String>| {
        let views: Vec<_> = tensors
            .tensors()
            .into_iter()
            .filter_map(|(name, view)| Some((keep(&name)?, view)))
            .collect();
        safetensors::serialize(views, header.metadata().clone()).unwrap()
    };
    let text = reason(&rewrite(&|n| (n != "tail.bias").then(|| n.into())));
    assert!(text.contains("'tail.bias' is missing"), "{text}");
    let deeper = with_metadata(|m| m["student"]["depth"] = 0.into());
    assert!(reason(&deeper).contains("body.0"), "{}", reason(&deeper));
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let mut bad = model();
    bad.layers[1].weight[3] = f32::NAN;
    assert!(reason(&bad.to_bytes(false).unwrap()).contains("not finite"));
    let mut bad = model();
    bad.stats.residual_std[0] = 0.0;
    assert!(reason(&bad.to_bytes(false).unwrap()).contains("not positive"));
}

#[test]
fn unknown_names_and_paths_list_the_bundled_models() {
    let text = |name: &str| {
        Upscaler::load(name, Device::Cpu)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(text("huge").contains("'huge'") && text("huge").contains("tiny-x2"));
    assert!(text("/no/such/model.safetensors").contains("/no/such/model.safetensors"));
    assert!(text("/").contains("not a regular file"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.safetensors");
    std::fs::write(&path, "hello").unwrap();
    assert!(text(path.to_str().unwrap()).contains("text.safetensors"));
}

proptest! {
    #[test]
    fn no_damaged_byte_panics(at in 0usize..4000, value: u8) {
        let mut bytes = model().to_bytes(false).unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = LiteModel::parse(&bytes, Path::new("x"));
    }
}

#[test]
fn no_header_of_arbitrary_fields_panics() {
    // The safetensors crate refuses duplicates, overlaps and gaps in the data.
    let (header, data) = open(&model().to_bytes(false).unwrap());
    let names: Vec<String> = header.as_object().unwrap().keys().cloned().collect();
    for name in names.iter().filter(|n| *n != "__metadata__") {
        for dtype in ["I64", "BF16", "U8", "X99"] {
            let mut header = header.clone();
            header[name]["dtype"] = dtype.into();
            reason(&close(&header, &data));
        }
    }
}

/// Bundled models are from the end of a training run and document it.
#[test]
fn bundled_models_are_finished_and_documented() {
    for bundled in tadsr::model::BUNDLED {
        let models = LiteModel::find(bundled.name).unwrap();
        let [model] = &models[..] else {
            panic!("'{}' names one model", bundled.name);
        };
        assert_eq!(model.metadata.name, bundled.name);
        let training = &model.metadata.training;
        assert!(training["steps_done"].is_u64(), "{}", bundled.name);
        assert_eq!(
            training["steps_done"], training["options"]["steps"],
            "{}",
            bundled.name
        );
        let card = format!("{}/models/{}.md", env!("CARGO_MANIFEST_DIR"), bundled.name);
        let card = std::fs::read_to_string(&card).expect(&card);
        assert!(
            card.contains("LPIPS") && card.contains("DATA.md"),
            "{}",
            bundled.name
        );
    }
}
