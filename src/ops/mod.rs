//! Operators with fast kernels, forward and backward, as candle custom operators.
//!
//! Feature maps are NHWC ("channels last") throughout: a pixel's channels are contiguous, which is what the
//! convolution kernels, norms over channels and attention want. Convolution weights keep the checkpoints' layout
//! `[co, ci, kh, kw]`. The kernels are for f32 on the CPU, and for 16-bit floats on CUDA; for other maps the operators are
//! composed of candle's own. A result has its map's type, whatever the type of weights and biases: f32 weights serve
//! networks that are computed in bf16 or f16, and are learnt through them.

mod add;
mod attention;
mod composed;
mod conv2d;
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "launched on CUDA devices alone")
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

/// Lets all operators use `threads` threads: those with kernels, which run in rayon's global pool, and candle's own, which
/// have a pool of theirs, whose threads would otherwise spin beside ours. The environment's `CANDLE_NUM_THREADS` prevails.
/// The calling thread is one of them, so that operators which it runs need not wake another.
///
/// # Errors
/// When rayon's global pool is in use already.
///
/// # Safety
/// No other thread reads or writes the environment meanwhile: call it first in a program.
pub unsafe fn use_threads(threads: usize) -> Result<(), rayon::ThreadPoolBuildError> {
    // Without the second candle reads /proc/cpuinfo in every matrix product.
    for name in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        if std::env::var_os(name).is_none() {
            // SAFETY: by the caller's promise.
            unsafe { std::env::set_var(name, threads.to_string()) };
        }
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.use_current_thread().build_global()
}

/// Whether the kernels are for this map.
fn has_kernel(x: &candle_core::Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == candle_core::DType::F32
}
