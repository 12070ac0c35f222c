//! Names and shapes of a network's tensors, without their values.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

/// Names of tensors with their shapes.
type Shapes = Vec<(String, Vec<usize>)>;

/// Returns name and shape of every tensor that `build` requests from its [`VarBuilder`], in order.
pub fn record(build: impl FnOnce(VarBuilder)) -> Shapes {
    let names = Arc::new(Mutex::new(Shapes::new()));
    let recorder = Recorder(names.clone());
    build(VarBuilder::from_backend(
        Box::new(recorder),
        DType::F32,
        Device::Cpu,
    ));
    let mut names = names.lock().unwrap_or_else(|e| e.into_inner());
    std::mem::take(&mut *names)
}

/// Returns zeros of any shape that take no memory, and records the requests.
struct Recorder(Arc<Mutex<Shapes>>);

impl SimpleBackend for Recorder {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        let mut names = self.0.lock().unwrap_or_else(|e| e.into_inner());
        names.push((name.to_owned(), s.dims().to_vec()));
        Tensor::zeros((), dtype, dev)?.broadcast_as(s)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("'{name}' was requested without its shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
