//! The interface of an operator that CUDA kernels compute.

use candle_core::{DType, Result, Shape, Tensor, bail};

/// The launch of a kernel.
pub struct Launch {
    pub kernel: String,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Words of its parameter structure.
    pub params: Vec<u64>,
}

/// An operator on contiguous tensors that kernels compute.
pub trait KernelOp {
    const NAME: &'static str;

    /// Returns the shape and type of the output.
    fn output(&self) -> (Shape, DType);

    /// Returns the number of floats of scratch memory.
    fn scratch(&self) -> usize {
        0
    }

    /// Returns the operands without gradients. They follow the inputs.
    fn constants(&self) -> &[Tensor] {
        &[]
    }

    /// Returns the launches in order, for the addresses of the inputs and constants, the output and
    /// the scratch memory.
    fn launches(&self, inputs: &[u64], output: u64, scratch: u64) -> Vec<Launch>;

    /// Returns the gradients with respect to three inputs.
    fn gradients(
        &self,
        _inputs: [&Tensor; 3],
        _output: &Tensor,
        _grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        bail!("{}: has no gradient", Self::NAME)
    }
}
