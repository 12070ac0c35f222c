//! Weights divided by their largest singular value (Miyato et al., "Spectral Normalization", arXiv 1802.05957).

use candle_core::{Result, Tensor, Var};
use candle_nn::VarBuilder;

/// Whether a tensor of a network with spectral norms is trained; the rest are the norms' vectors.
pub fn is_parameter(name: &str) -> bool {
    !name.ends_with(".weight_u") && !name.ends_with(".weight_v")
}

/// A kernel `[co, ..]` and the singular vectors `u` `[co]` and `v` (the rest) that its largest singular value is estimated
/// by; `weight_orig`, `weight_u` and `weight_v`, as PyTorch names them.
#[derive(Clone, Debug)]
pub struct SpectralWeight {
    weight: Tensor,
    u: Var,
    v: Var,
}

impl SpectralWeight {
    /// # Errors
    /// When a tensor is missing or has another shape.
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

    /// The right singular vector as it is now.
    #[cfg(test)]
    pub fn right(&self) -> Tensor {
        self.v.as_detached_tensor()
    }

    /// Brings the vectors nearer to the singular ones; no gradient flows through them.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn power_iteration(&self) -> Result<()> {
        let matrix = self.weight.detach().flatten_from(1)?;
        let u = self.u.as_detached_tensor().unsqueeze(1)?;
        let v = unit(&matrix.t()?.matmul(&u)?)?;
        let u = unit(&matrix.matmul(&v)?)?;
        self.v.set(&v.squeeze(1)?)?;
        self.u.set(&u.squeeze(1)?)
    }

    /// The kernel over `u^T W v`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn normalised(&self) -> Result<Tensor> {
        // Copies: the graph must keep the values that the forward pass saw.
        let u = self.u.as_detached_tensor().unsqueeze(1)?.copy()?;
        let v = self.v.as_detached_tensor().unsqueeze(0)?.copy()?;
        let matrix = self.weight.flatten_from(1)?;
        let sigma = (matrix * u.matmul(&v)?)?.sum_all()?;
        self.weight.broadcast_div(&sigma)
    }

    /// The same weight, which no gradient flows into.
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
