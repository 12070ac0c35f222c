//! Operators of kernels as candle operators.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(test)]
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

use super::kernel_op::KernelOp;

/// [`KernelOp`] as a candle operator.
pub struct Op<K>(pub K);

impl<K: KernelOp> Op<K> {
    /// Runs the source of the kernels on tensors in CPU memory, for tests.
    #[cfg(test)]
    fn on_cpu(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        use candle_core::{DType, Storage, WithDType};
        use half::{bf16, f16};

        use super::kernel_op::Launch;

        fn address<T: WithDType>(storage: &CpuStorage, layout: &Layout) -> Result<u64> {
            match layout.contiguous_offsets() {
                Some((from, to)) => Ok(storage.as_slice::<T>()?[from..to].as_ptr() as u64),
                None => bail!("a contiguous tensor is required"),
            }
        }

        fn run<T: WithDType>(op: &impl KernelOp, addresses: &[u64], count: usize) -> CpuStorage {
            let mut output = vec![T::from_f64(f64::NAN); count];
            let mut scratch = vec![f32::NAN; op.scratch()];
            let (to, between) = (output.as_mut_ptr() as u64, scratch.as_mut_ptr() as u64);
            for Launch {
                kernel,
                grid,
                threads,
                params,
            } in op.launches(addresses, to, between)
            {
                // SAFETY: the structure is that of the kernel, and its addresses are valid until it
                // ends.
                unsafe { super::host::launch(&kernel, grid, [threads, 1, 1], &params) };
            }
            T::to_cpu_storage_owned(output)
        }

        let constants = self.0.constants().iter().map(Tensor::storage_and_layout);
        let constants: Vec<_> = constants.collect();
        let constants = constants.iter().map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => Ok((storage, *layout)),
            _ => bail!("{}: a constant on another device", K::NAME),
        });
        let mut addresses = Vec::new();
        for operand in inputs.iter().copied().map(Ok).chain(constants) {
            let (storage, layout) = operand?;
            addresses.push(match storage.dtype() {
                DType::F16 => address::<f16>(storage, layout)?,
                DType::BF16 => address::<bf16>(storage, layout)?,
                _ => address::<f32>(storage, layout)?,
            });
        }
        let (shape, dtype) = self.0.output();
        let count = shape.elem_count();
        let storage = match dtype {
            DType::F16 => run::<f16>(&self.0, &addresses, count),
            DType::BF16 => run::<bf16>(&self.0, &addresses, count),
            _ => run::<f32>(&self.0, &addresses, count),
        };
        Ok((storage, shape))
    }

    #[cfg(not(test))]
    fn on_cpu(&self, _: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        bail!("{}: runs on CUDA devices only", K::NAME)
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self, inputs: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        super::device::run(&self.0, inputs)
    }
}

impl<K: KernelOp> CustomOp1 for Op<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(a, la)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, a: &CudaStorage, la: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, la)])
    }
}

impl<K: KernelOp> CustomOp2 for Op<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(a, la), (b, lb)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, la), (b, lb)])
    }
}

impl<K: KernelOp> CustomOp3 for Op<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        la: &Layout,
        b: &CpuStorage,
        lb: &Layout,
        c: &CpuStorage,
        lc: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(a, la), (b, lb), (c, lc)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
        c: &CudaStorage,
        lc: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, la), (b, lb), (c, lc)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.0.gradients([a, b, c], y, grad)?;
        Ok((a, b, c))
    }
}
