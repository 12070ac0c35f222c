//! Measurements and samples on held-out data.

use candle_core::{Device, Tensor};
use image::RgbImage;
use rand::{SeedableRng, rngs::StdRng};

use super::{NOISE, StudentRun};
use crate::{
    Error, Result,
    metrics::{Lpips, Picture},
    nn::lite::latent::{Grid, luma_slot, shuffle_add},
    train::{
        lite::{HeldOut, gain},
        losses::normals,
        report::SampleRow,
    },
};

/// Number of sample images of each degradation.
const SAMPLES: usize = 4;

/// Measurement of a held-out batch.
#[derive(Clone, Debug)]
pub struct Validation {
    /// Name of the degradation.
    pub name: &'static str,
    /// Gain in PSNR over the bicubic base, in dB.
    pub gain: f64,
    /// LPIPS of luma, of the student and of the base, if its weights are loaded.
    pub lpips: Option<[f64; 2]>,
}

impl StudentRun {
    /// Measures the averaged student on held-out images, for each degradation.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn measure(&self) -> Result<Vec<Validation>> {
        let student = self.model()?.student()?;
        let measure = |(_, batch): &HeldOut| {
            let [base, residual] = self.latent.tensors(batch, self.patch, &Device::Cpu)?;
            let at = self.condition(batch);
            let result = match &batch.motion {
                Some(motion) => {
                    let clips = motion.tensors(&self.latent.stats, &Device::Cpu)?;
                    student.forward_clips(&base, &at, &clips)?
                }
                None => student.forward(&base, &at)?,
            };
            let left = (&result - &residual)?;
            let lpips = self.lpips.as_ref().map(|lpips| {
                let truth = self.pictures(&base, &residual)?;
                let of =
                    |residual: &Tensor| distance(lpips, &self.pictures(&base, residual)?, &truth);
                Ok::<_, Error>([of(&result)?, of(&residual.zeros_like()?)?])
            });
            let [student, base] = lpips.transpose()?.unwrap_or_default();
            let gain = gain(&residual, &left, &self.latent.stats)?;
            Ok([gain, student, base])
        };
        let measured = self.ranks.shared_work(&self.held_out, measure)?;
        let validation = |((name, _), [gain, student, base]): (&HeldOut, [f64; 3])| Validation {
            name,
            gain,
            lpips: self.lpips.is_some().then_some([student, base]),
        };
        Ok(self.held_out.iter().zip(measured).map(validation).collect())
    }

    /// Returns some held-out images of each degradation, luma only: bicubic, averaged student,
    /// teacher if there is one, and ground truth.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub(super) fn held_out_samples(&self) -> Result<Vec<SampleRow>> {
        let student = self.model()?.student()?;
        let mut rows = Vec::new();
        let pictures = |held_out: &&HeldOut| held_out.1.motion.is_none();
        for (name, batch) in self.held_out.iter().filter(pictures) {
            let [base, residual] = self.latent.tensors(batch, self.patch, &Device::Cpu)?;
            let few = base.dim(0)?.min(SAMPLES);
            let (base, residual) = (base.narrow(0, 0, few)?, residual.narrow(0, 0, few)?);
            let mut columns = vec![
                ("bicubic", base.zeros_like()?),
                ("student", student.forward(&base, &self.condition(batch))?),
            ];
            if let Some(teacher) = &self.teacher {
                let base = base.to_device(&self.device)?;
                let noise = normals(&base, &mut StdRng::seed_from_u64(NOISE))?;
                let view = teacher.view(&base, &batch.condition())?;
                let sample = teacher.sample(&view, batch.scale, &noise)?;
                let sample = teacher.residual_back(&view, &sample)?;
                columns.push(("teacher", sample.to_device(&Device::Cpu)?));
            }
            columns.push(("truth", residual));
            let mut pictures = Vec::new();
            for (column, residual) in columns {
                pictures.push((column, self.pictures(&base, &residual)?));
            }
            for i in 0..few {
                let image = |(column, all): &(&str, Vec<Picture>)| {
                    let side = self.patch as u32;
                    let image = RgbImage::from_raw(side, side, all.get(i)?.rgb().to_vec())?;
                    Some((column.to_string(), image))
                };
                rows.push(SampleRow {
                    label: format!("{name} {}", i + 1),
                    images: pictures.iter().filter_map(image).collect(),
                });
            }
        }
        Ok(rows)
    }

    /// Returns the luma images of residuals over `base`.
    fn pictures(&self, base: &Tensor, residual: &Tensor) -> Result<Vec<Picture>> {
        let stats = &self.latent.stats;
        let of = |values: &[f32]| Tensor::new(values, base.device());
        let sum = base
            .broadcast_mul(&of(&stats.input_std)?)?
            .broadcast_add(&of(&stats.input_mean)?)?
            .add(&residual.broadcast_mul(&of(&stats.residual_std)?)?)?;
        let (r, side) = (self.latent.r, self.patch);
        let grid = Grid::new(self.latent.kind, r, side, side);
        let ones = vec![1.0; grid.channels];
        let picture = |i| {
            let latent = sum.get(i)?.flatten_all()?.to_vec1::<f32>()?;
            let mut luma = vec![0.0; side * side];
            shuffle_add(&latent, luma_slot(r), grid, &ones, &mut luma, side);
            let grey = luma.iter().flat_map(|v| [(v * 255.0).round() as u8; 3]);
            Picture::new(side, side, grey.collect())
        };
        (0..base.dim(0)?).map(picture).collect()
    }
}

/// Returns the mean LPIPS of luma images.
fn distance(lpips: &Lpips, pictures: &[Picture], truths: &[Picture]) -> Result<f64> {
    let mut sum = 0.0;
    for (picture, truth) in pictures.iter().zip(truths) {
        let [a, b] = [lpips.features(picture)?, lpips.features(truth)?];
        sum += lpips.distance(&a, &b)?;
    }
    Ok(sum / pictures.len().max(1) as f64)
}
