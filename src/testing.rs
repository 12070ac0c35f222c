//! Random tensors for tests, the same in every run.

use std::cell::Cell;

use candle_core::{Device, Shape, Tensor, Var};

use crate::engine::noise::{mix, normal as from_bits};

thread_local! {
    /// Values drawn in this thread, and so in this test.
    static DRAWN: Cell<u64> = const { Cell::new(0) };
}

/// Returns normal values with this mean and deviation, other ones at each call.
pub fn normal(mean: f32, deviation: f32, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let first = DRAWN.get();
    let end = first + shape.elem_count() as u64;
    DRAWN.set(end);
    let values: Vec<f32> = (first..end)
        .map(|i| mean + deviation * from_bits(mix(i)))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Returns a variable with values of [`normal`].
pub fn variable(mean: f32, deviation: f32, shape: impl Into<Shape>) -> Var {
    Var::from_tensor(&normal(mean, deviation, shape)).unwrap()
}
