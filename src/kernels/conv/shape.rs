//! Shape and activation of a convolution.

/// Shape of a 2-d convolution on NHWC tensors with the same padding and stride in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Images in the batch.
    pub n: usize,
    /// Input height and width, in pixels.
    pub h: usize,
    pub w: usize,
    /// Input and output channels.
    pub ci: usize,
    pub co: usize,
    /// Kernel height and width.
    pub kh: usize,
    pub kw: usize,
    /// Distance of output pixels on the input grid.
    pub stride: usize,
    /// Rows and columns of zeros around the input.
    pub pad: usize,
}

/// Activation of an output before it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    #[default]
    None,
    /// `max(x, slope * x)`, 0 <= slope <= 1 (0 is the ReLU).
    LeakyRelu(f32),
    /// `x / (1 + exp(-x))`.
    Silu,
}

impl Activation {
    /// Returns the slope below 0 of a leaky ReLU; 1 for no activation.
    pub fn slope(self) -> Option<f32> {
        match self {
            Self::None => Some(1.0),
            Self::LeakyRelu(slope) => Some(slope),
            Self::Silu => None,
        }
    }

    /// Returns the value at `x`.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            Self::LeakyRelu(slope) => x.max(slope * x),
            Self::Silu => x / (1.0 + (-x).exp()),
        }
    }
}

impl ConvShape {
    /// Returns the output (height, width); (0, 0) if the kernel is larger than the padded input.
    pub fn output(&self) -> (usize, usize) {
        self.output_with(0)
    }

    /// Returns [`Self::output`] with `more` zeros below and to the right of the padding.
    pub fn output_with(&self, more: usize) -> (usize, usize) {
        let side = |len: usize, k: usize| {
            (len + 2 * self.pad + more)
                .checked_sub(k)
                .map_or(0, |d| d / self.stride + 1)
        };
        (side(self.h, self.kh), side(self.w, self.kw))
    }

    pub(in crate::kernels) fn input_len(&self) -> usize {
        product([self.n, self.h, self.w, self.ci])
    }

    pub(in crate::kernels) fn output_len(&self) -> usize {
        let (oh, ow) = self.output();
        product([self.n, oh, ow, self.co])
    }

    pub(in crate::kernels) fn weight_len(&self) -> usize {
        product([self.co, self.ci, self.kh, self.kw])
    }
}

/// Returns the number of elements of a tensor. Pointers of kernels rely on it, so it must not wrap.
///
/// # Panics
/// If it does not fit in a `usize`.
pub(in crate::kernels) fn product(sides: [usize; 4]) -> usize {
    let checked = sides.into_iter().try_fold(1usize, usize::checked_mul);
    checked.unwrap_or_else(|| panic!("a tensor of {sides:?} has no size"))
}
