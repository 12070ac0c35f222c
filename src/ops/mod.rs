//! Operators with fast kernels, forward and backward, as candle custom operators.
//!
//! All feature maps are NHWC ("channels last"): the channels of a pixel are contiguous, which suits
//! convolutions, norms over channels and attention. Convolution weights have the layout of
//! checkpoints, `[co, ci, kh, kw]`. There are kernels for f32 on the CPU and for 16-bit floats on
//! CUDA. For other maps the operators are composed of candle's operators. A result has the type of
//! its map, for any type of weights and biases. So networks with f32 weights run and train in bf16
//! or f16.

mod add;
mod attention;
mod composed;
mod conv2d;
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "launched on CUDA devices only")
)]
pub(crate) mod cuda;
mod gelu;
mod group_norm;
mod packed;
mod silu;
mod upsample;

pub use crate::kernels::conv::Activation;
pub use add::add;
pub use attention::attention;
pub use conv2d::conv2d;
pub use gelu::gelu;
pub use group_norm::group_norm;
pub use packed::PackedConv2d;
pub use silu::silu;
pub use upsample::{upsample2x, upsample2x_conv2d};

/// Sets the number of threads of all operators: those with kernels, which run in rayon's global
/// pool, and those of candle, which has its own pool. `CANDLE_NUM_THREADS` in the environment takes
/// precedence for candle. The calling thread joins the pool, so its operators need not wake
/// another.
///
/// # Errors
/// If rayon's global pool is already in use.
///
/// # Safety
/// No other thread reads or writes the environment at the same time. Call it first in a program.
pub unsafe fn use_threads(threads: usize) -> Result<(), rayon::ThreadPoolBuildError> {
    // Without RAYON_NUM_THREADS candle reads /proc/cpuinfo in every matrix product.
    for name in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if std::env::var_os(name).is_none() {
            // SAFETY: the caller ensures it.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.use_current_thread().build_global()
}

/// Returns `true` if the CPU kernels support this map.
fn has_kernel(x: &candle_core::Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == candle_core::DType::F32
}
