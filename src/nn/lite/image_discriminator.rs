//! A discriminator on images, which needs no teacher: strided, spectrally normalised convolutions
//! to a logit for each patch (PatchGAN, Isola et al., arXiv 1611.07004). The discriminator on the
//! features of a teacher is compared with it.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::discriminator::{Conv, SLOPE};
use crate::ops::Activation;

/// Five convolutions, three of which halve the image.
#[derive(Clone, Debug)]
pub struct ImageDiscriminator {
    convs: [Conv; 5],
}

impl ImageDiscriminator {
    /// Builds the network of `width` to `4 * width` channels from the tensors `{0,1,2,3,4}.*` of
    /// `vb`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(width: usize, vb: VarBuilder) -> Result<Self> {
        let w = width;
        Ok(Self {
            convs: [
                Conv::new([w, 1, 4, 4], 2, &vb.pp(0))?,
                Conv::new([2 * w, w, 4, 4], 2, &vb.pp(1))?,
                Conv::new([2 * w, 2 * w, 3, 3], 1, &vb.pp(2))?,
                Conv::new([4 * w, 2 * w, 4, 4], 2, &vb.pp(3))?,
                Conv::new([1, 4 * w, 3, 3], 1, &vb.pp(4))?,
            ],
        })
    }

    /// Returns the logits `[n, h / 8, w / 8, 1]`, rounded down, of luma images `[n, h, w, 1]` from
    /// -1 to 1.
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let [inner @ .., last] = &self.convs;
        let mut x = image.clone();
        for conv in inner {
            x = conv.forward(&x, Activation::LeakyRelu(SLOPE))?;
        }
        last.forward(&x, Activation::None)
    }

    /// Runs one power iteration of every spectral norm. Required before each use in training.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn power_iteration(&self) -> Result<()> {
        self.convs.iter().try_for_each(Conv::power_iteration)
    }

    /// Returns the discriminator with weights that get no gradient, for the student's loss.
    pub fn frozen(&self) -> Self {
        Self {
            convs: self.convs.clone().map(Conv::frozen),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use candle_nn::VarMap;

    use super::*;
    use crate::nn::layers::is_parameter;
    use crate::testing::normal;

    #[test]
    fn a_logit_belongs_to_a_patch_and_gradients_reach_all_parameters() {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let network = ImageDiscriminator::new(8, vb).unwrap();
        for var in vars.all_vars() {
            let value = normal(0.0, 1.0, var.shape());
            var.set(&value).unwrap();
        }
        network.power_iteration().unwrap();
        let image = normal(0.0, 0.5, (2, 96, 64, 1));
        let logits = network.forward(&image).unwrap();
        assert_eq!(logits.dims(), [2, 12, 8, 1]);
        // The left half of the image does not reach the logits at its right edge.
        let half = Tensor::zeros((2, 96, 24, 1), DType::F32, &Device::Cpu).unwrap();
        let other = Tensor::cat(&[&half, &image.narrow(2, 24, 40).unwrap()], 2).unwrap();
        let other = network.forward(&other).unwrap();
        let column = |logits: &Tensor, x| -> Vec<f32> {
            let column = logits.narrow(2, x, 1).unwrap();
            column.flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(column(&logits, 7), column(&other, 7));
        assert_ne!(column(&logits, 0), column(&other, 0));
        let grads = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let frozen = network.frozen().forward(&image).unwrap();
        let none = frozen.sum_all().unwrap().backward().unwrap();
        for (name, var) in vars.data().lock().unwrap().iter() {
            assert_eq!(grads.get(var).is_some(), is_parameter(name), "{name}");
            assert!(none.get(var).is_none(), "{name}");
        }
    }
}
