//! CUDA kernels for maps of 16-bit floats: forward passes, and the backward pass of convolutions.
//!
//! `scripts/kernels.sh` compiles the source in `kernels/` to PTX, which the driver compiles for its
//! chip at first use. Tests run the source on the CPU (`host/`). The kernels of lite models are in
//! `engine/lite/cuda`.

mod attention;
mod conv2d;
#[cfg(feature = "cuda")]
mod device;
mod group_norm;
#[cfg(test)]
pub(crate) mod host;
mod kernel_op;
mod op;
mod params;

use candle_core::{DType, Result, Tensor};

use super::Activation;

pub use attention::attention;
pub use conv2d::{PackedConv, conv2d};
pub use group_norm::group_norm;
pub use params::Params;

/// Returns `true` if kernels support this map: 16-bit floats on a CUDA device of compute capability
/// 8.0 or newer, channels in multiples of 8, fewer than 2^30 elements.
fn reaches(x: &Tensor) -> bool {
    let channels = x.dims().last().copied().unwrap_or(0);
    matches!(x.dtype(), DType::F16 | DType::BF16)
        && channels % 8 == 0
        && (1..1 << 30).contains(&x.elem_count())
        && (is_emulated() || has_kernels(x.device()))
}

#[cfg(feature = "cuda")]
fn has_kernels(device: &candle_core::Device) -> bool {
    device.as_cuda_device().is_ok_and(device::serves)
}

#[cfg(not(feature = "cuda"))]
fn has_kernels(_: &candle_core::Device) -> bool {
    false
}

/// Keeps freed memory of a CUDA device in its pool for the next tensor.
///
/// # Errors
/// If the driver fails.
#[cfg_attr(not(feature = "train"), expect(dead_code, reason = "used by training"))]
pub fn keep_memory(device: &candle_core::Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Ok(device) = device.as_cuda_device() {
        device::keep_memory(device)?;
    }
    let _ = device;
    Ok(())
}

/// Returns the tensor contiguous and aligned to 16 bytes, which kernels load at once.
fn aligned(t: &Tensor) -> Result<Tensor> {
    let t = t.contiguous()?;
    match t.layout().start_offset() % 8 {
        0 => Ok(t),
        _ => t.force_contiguous(),
    }
}

/// Returns `true` in tests that run the kernels on maps in CPU memory.
pub fn is_emulated() -> bool {
    #[cfg(test)]
    return EMULATED.get();
    #[cfg(not(test))]
    false
}

#[cfg(test)]
thread_local! {
    static EMULATED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Calls `run` with the kernels' source for maps in CPU memory.
#[cfg(test)]
pub(crate) fn emulated<T>(run: impl FnOnce() -> T) -> T {
    EMULATED.set(true);
    let result = run();
    EMULATED.set(false);
    result
}

/// Returns the device of tests: the CPU, or that of TADSR_TEST_DEVICE in the environment.
#[cfg(test)]
fn device() -> candle_core::Device {
    let device = std::env::var("TADSR_TEST_DEVICE");
    let device: crate::Device = device.as_deref().unwrap_or("cpu").parse().unwrap();
    device.to_candle().unwrap()
}

/// Asserts that `got` is `want` within the rounding of 16 bits.
#[cfg(test)]
fn assert_close(got: &Tensor, want: &Tensor, limit: f32, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f32::sqrt);
    let got = got.to_dtype(DType::F32).unwrap();
    let off = norm(&(got - want).unwrap()).unwrap() / norm(want).unwrap();
    assert!(off < limit, "{what}: {off}");
}

/// Returns the kernels' number of the activation, and its slope.
fn activation(activation: Activation) -> (u32, f32) {
    match activation {
        Activation::None => (0, 0.0),
        Activation::LeakyRelu(slope) => (1, slope),
        Activation::Silu => (2, 0.0),
    }
}

/// Returns the suffix of the kernels' names for this type.
fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        _ => "bf16",
    }
}

#[cfg(test)]
mod tests {
    /// FNV-1a, 64 bits.
    fn hash(files: &[&[u8]]) -> String {
        let step = |value: u64, &byte: &u8| (value ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let bytes = files.iter().copied().flatten();
        format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325, step))
    }

    #[test]
    fn embedded_kernels_are_those_of_the_source() {
        macro_rules! prebuilt {
            ($name:expr) => {
                concat!(env!("CARGO_MANIFEST_DIR"), "/prebuilt/cuda/", $name)
            };
        }
        macro_rules! assert_embedded {
            ($source:literal, $name:literal, $($image:literal),*) => {
                let sources: [&[u8]; 2] = [include_bytes!($source), include_bytes!("kernels/warp.cuh")];
                let images: &[&[u8]] = &[$(include_bytes!(prebuilt!(concat!($name, $image)))),*];
                assert_eq!(
                    [hash(&sources), hash(images)].join(" "),
                    include_str!(prebuilt!(concat!($name, ".hash"))).trim(),
                    "{}: run scripts/kernels.sh",
                    $source
                );
            };
        }
        assert_embedded!(
            "../../engine/lite/cuda/kernels/student.cu",
            "student",
            ".sm_75.cubin",
            ".sm_80.cubin",
            ".sm_86.cubin",
            ".sm_89.cubin",
            ".sm_90.cubin",
            ".sm_100.cubin",
            ".sm_120.cubin",
            ".ptx"
        );
        assert_embedded!("kernels/layers.cu", "layers", ".ptx");
    }
}
