//! The distillation's losses and their gradients, against one step of a reference implementation.

#![cfg(feature = "train")]

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use tadsr::nn::discriminator::{Discriminator, DiscriminatorConfig, is_parameter};

type Tensors = HashMap<String, Tensor>;

/// The tensors of a file in the folder of reference values, or nothing where there is no such folder.
fn fixture(name: &str) -> Option<(Tensors, HashMap<String, String>)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    if !root.exists() {
        eprintln!("skipped: no '{}'", root.display());
        return None;
    }
    let bytes = std::fs::read(root.join(name)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).unwrap();
    Some((tensors, header.metadata().clone().unwrap_or_default()))
}

/// Variables of the tensors that are trained, the rest as they are.
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

/// Norm of the difference over the norm of `want`.
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
fn the_discriminator_gives_the_references_logits() {
    let Some((step, _)) = fixture("distill/step.safetensors") else {
        return;
    };
    let (tensors, _) = fixture("distill/discriminator.safetensors").unwrap();
    let vars = variables(&tensors);
    let d = discriminator(&vars, &tensors);
    let t = times(&step["t_disc"]);
    for kind in ["fake", "real"] {
        let features = [0, 1, 2].map(|i| nhwc(&step[&format!("feat_{kind}.{i}")]));
        let logits = d.forward(&features, &t).unwrap();
        assert_close(kind, &logits, &step[&format!("logits_{kind}")], 1e-4);
    }
}
