//! Operators on candle's CUDA devices.

use std::ffi::c_void;

use candle_core::{
    CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, WithDType,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::driver::{
            CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
            result::launch_kernel,
            sys::{
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, cuDeviceGetDefaultMemPool,
                cuMemPoolSetAttribute,
            },
        },
    },
};
use half::{bf16, f16};

use super::kernel_op::KernelOp;

const PTX: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/prebuilt/cuda/layers.ptx"
));

/// Returns `true` for compute capability 8.0 or newer.
pub fn serves(device: &CudaDevice) -> bool {
    let stream = device.cuda_stream();
    let major = stream
        .context()
        .attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    major.is_ok_and(|major| major >= 8)
}

/// Keeps freed memory in the device's pool. By default the driver releases it on every
/// synchronisation, so each training step would allocate it again.
pub fn keep_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let (mut pool, mut threshold) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: the device exists, and the pointers are to locals of the types that the driver
    // requires.
    unsafe {
        cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device())
            .result()
            .w()?;
        let attribute = CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast())
            .result()
            .w()
    }
}

/// Runs an operator's kernels on the device of its inputs.
pub fn run<K: KernelOp>(
    op: &K,
    inputs: &[(&CudaStorage, &Layout)],
) -> Result<(CudaStorage, Shape)> {
    let (shape, dtype) = op.output();
    let Some((first, _)) = inputs.first() else {
        bail!("{}: no inputs", K::NAME);
    };
    let device = first.device();
    let count = shape.elem_count();
    let storage = match dtype {
        DType::F16 => run_as::<K, f16>(op, inputs, count, device)?,
        DType::BF16 => run_as::<K, bf16>(op, inputs, count, device)?,
        _ => run_as::<K, f32>(op, inputs, count, device)?,
    };
    Ok((storage, shape))
}

fn run_as<K: KernelOp, T: CudaDType + DeviceRepr>(
    op: &K,
    inputs: &[(&CudaStorage, &Layout)],
    count: usize,
    device: &CudaDevice,
) -> Result<CudaStorage> {
    let stream = device.cuda_stream();
    // SAFETY: the kernels write all of it before it is read.
    let mut output = unsafe { device.alloc::<T>(count)? };
    let mut scratch = match op.scratch() {
        0 => None,
        // SAFETY: as above.
        floats => Some(unsafe { device.alloc::<f32>(floats)? }),
    };
    {
        let constants = op.constants().iter().map(Tensor::storage_and_layout);
        let constants: Vec<_> = constants.collect();
        let constants = constants.iter().map(|(storage, layout)| match &**storage {
            Storage::Cuda(storage) => Ok((storage, *layout)),
            _ => bail!("{}: a constant on another device", K::NAME),
        });
        let (mut addresses, mut guards) = (Vec::new(), Vec::new());
        for operand in inputs.iter().copied().map(Ok).chain(constants) {
            let (storage, layout) = operand?;
            if storage.device().id() != device.id() {
                bail!("{}: operands on several devices", K::NAME);
            }
            let (address, guard) = match storage.dtype() {
                DType::F16 => address::<f16>(storage, layout, &stream)?,
                DType::BF16 => address::<bf16>(storage, layout, &stream)?,
                _ => address::<f32>(storage, layout, &stream)?,
            };
            addresses.push(address);
            guards.push(guard);
        }
        let (to, _to) = output.device_ptr_mut(&stream);
        let between = scratch.as_mut().map(|s| s.device_ptr_mut(&stream));
        let between = between.as_ref().map_or(0, |(address, _)| *address);
        for launch in op.launches(&addresses, to, between) {
            let function = device.get_or_load_custom_func(&launch.kernel, "tadsr-layers", PTX)?;
            let [x, y, z] = launch.grid;
            let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
            // SAFETY: the structure is that of the kernel, and the memory that it points to is
            // allocated until the kernel has run.
            unsafe {
                launch_kernel(
                    function.cu_function(),
                    (x, y, z),
                    (launch.threads, 1, 1),
                    0,
                    stream.cu_stream(),
                    &mut params,
                )
                .w()?;
            }
        }
    }
    Ok(CudaStorage::wrap_cuda_slice(output, device.clone()))
}

fn address<'a, T: CudaDType + WithDType>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    let Some((from, _)) = layout.contiguous_offsets() else {
        bail!("a contiguous tensor is required, not {layout:?}");
    };
    let (address, guard) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
    Ok((address + (from * size_of::<T>()) as u64, guard))
}
