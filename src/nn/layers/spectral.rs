//! Spectral normalisation: weights divided by their largest singular value (Miyato et al., arXiv
//! 1802.05957).

use candle_core::{Result, Tensor, Var};
use candle_nn::VarBuilder;

/// Returns `true` for trained tensors, `false` for the singular vectors of spectral norms.
pub fn is_parameter(name: &str) -> bool {
    !name.ends_with(".weight_u") && !name.ends_with(".weight_v")
}

/// A kernel `[co, ..]` with the singular vectors `u` `[co]` and `v` (the other dimensions) that
/// estimate its largest singular value. PyTorch's names are `weight_orig`, `weight_u` and
/// `weight_v`.
#[derive(Clone, Debug)]
pub struct SpectralWeight {
    weight: Tensor,
    u: Var,
    v: Var,
}

impl SpectralWeight {
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(shape: &[usize], vb: &VarBuilder) -> Result<Self> {
        let inputs: usize = shape[1..].iter().product();
        Ok(Self {
            weight: vb.get(shape, "weight_orig")?,
            u: Var::from_tensor(&vb.get(shape[0], "weight_u")?)?,
            v: Var::from_tensor(&vb.get(inputs, "weight_v")?)?,
        })
    }

    pub fn dims(&self) -> &[usize] {
        self.weight.dims()
    }

    /// Returns the current right singular vector.
    #[cfg(test)]
    pub fn right(&self) -> Tensor {
        self.v.as_detached_tensor()
    }

    /// Runs one power iteration on the vectors, which get no gradient.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn power_iteration(&self) -> Result<()> {
        let matrix = self.weight.detach().flatten_from(1)?;
        let u = self.u.as_detached_tensor().unsqueeze(1)?;
        let v = unit(&matrix.t()?.matmul(&u)?)?;
        let u = unit(&matrix.matmul(&v)?)?;
        self.v.set(&v.squeeze(1)?)?;
        self.u.set(&u.squeeze(1)?)
    }

    /// Returns the kernel divided by `u^T W v`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn normalised(&self) -> Result<Tensor> {
        // The graph needs copies of the values in the forward pass.
        let u = self.u.as_detached_tensor().unsqueeze(1)?.copy()?;
        let v = self.v.as_detached_tensor().unsqueeze(0)?.copy()?;
        let matrix = self.weight.flatten_from(1)?;
        let sigma = (matrix * u.matmul(&v)?)?.sum_all()?;
        self.weight.broadcast_div(&sigma)
    }

    /// Returns the kernel with weights that get no gradient.
    pub fn frozen(&self) -> Self {
        Self {
            weight: self.weight.detach(),
            u: self.u.clone(),
            v: self.v.clone(),
        }
    }
}

fn unit(v: &Tensor) -> Result<Tensor> {
    let norm = v.sqr()?.sum_all()?.sqrt()?;
    v.broadcast_div(&norm.maximum(1e-12)?)
}
