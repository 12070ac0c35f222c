//! Results of the kernels one by one, to find the first that is wrong.

use half::f16;

use super::{
    Context, Runner,
    params::{Conv, Frame},
    program::{Addresses, Kernel, launches},
};
use crate::{
    Result,
    cuda::{
        driver::{Address, Fault, Function, Launch},
        owned::{Owned, Pinned},
    },
    frame::FrameRef,
    ops::cuda::Params,
};

/// Feature map that a kernel has written.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Name of the kernel.
    pub kernel: &'static str,
    pub width: usize,
    pub height: usize,
    pub channels: usize,
    /// `[height, width, channels]`.
    pub values: Vec<f16>,
}

impl Stage {
    /// Returns x, y and channel of the first value that differs from that of `other` by more than
    /// `tolerance` plus this share of it, and the number of such values.
    pub fn difference(&self, other: &Self, tolerance: f32) -> Option<([usize; 3], usize)> {
        let far = |a: f16, b: f16| {
            let (a, b) = (a.to_f32(), b.to_f32());
            let difference = (a - b).abs();
            difference.is_nan() || difference > tolerance * (1.0 + b.abs())
        };
        let pairs = self.values.iter().zip(&other.values).enumerate();
        let mut wrong = pairs.filter(|(_, (a, b))| far(**a, **b)).map(|(at, _)| at);
        let at = wrong.next()?;
        let (channel, cell) = (at % self.channels, at / self.channels);
        let place = [cell % self.width, cell / self.width, channel];
        Some((place, 1 + wrong.count()))
    }
}

impl Context {
    /// Returns the kernel of this name in the source.
    pub fn kernel(&self, name: &str) -> Option<Function> {
        let kernel = Kernel::ALL
            .into_iter()
            .find(|kernel| kernel.name() == name)?;
        Some(kernel.function(self))
    }
}

impl Runner {
    /// Upscales `src`, waiting for each kernel, and returns what each wrote, except those that
    /// write the frame. A frame in bands returns the stages of its first band.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn stages(&mut self, src: &FrameRef, strength: f32) -> Result<Vec<Stage>> {
        let index = self.begin(src.info())?;
        let input = &mut self.flights[index].input;
        self.plan.fill_strength(strength, input.bytes_mut());
        self.plan.fill_input(src, input.bytes_mut());
        let stages = self.flush_on_failure(|runner| runner.run_stages(index))?;
        self.release();
        Ok(stages)
    }

    fn run_stages(&mut self, index: usize) -> Result<Vec<Stage>, Fault> {
        let (driver, flight, stream) = (&self.context.driver, &self.flights[index], *self.compute);
        let addresses = Addresses {
            constants: *self.constants,
            maps: [*self.maps[0], *self.maps[1], *self.maps[2]],
            input: *flight.device_input,
            output: *flight.device_output,
        };
        let input = &flight.input;
        // SAFETY: both sides are as long as the plan's input, and nothing else uses the buffers.
        unsafe { driver.upload(*flight.device_input, input.as_ptr(), input.len(), stream)? };
        let rows = self.plan.bands().next().map_or(0, |(_, rows)| rows);
        let mut stages = Vec::new();
        let mut launches = launches(&self.plan, &addresses).into_iter().peekable();
        while let Some(launch) = launches.next() {
            let output = match launch.kernel {
                Kernel::UnpackTiles | Kernel::Unpack => Frame::from_words(&launch.params).latent,
                Kernel::PackTiles | Kernel::Pack => break,
                _ => Conv::from_words(&launch.params).output,
            };
            // Two kernels may write the latent.
            let is_whole = launches
                .peek()
                .is_none_or(|next| next.kernel != Kernel::Unpack);
            let single = Launch {
                function: launch.kernel.function(&self.context),
                shape: launch.shape,
                params: launch.params,
            };
            // SAFETY: the parameters are those of the frame's graph, and the graph ends before the
            // allocations do.
            let graph = unsafe { driver.graph(&[single], stream)? };
            let graph = Owned::graph(driver, graph);
            driver.launch_graph(*graph, stream)?;
            if !is_whole {
                driver.synchronize(stream)?;
                continue;
            }
            let stage = stages.len();
            let (width, height) = self.plan.stage(stage, rows);
            let channels = match stage.checked_sub(1) {
                None => self.plan.channels,
                Some(layer) => self.plan.layers[layer].co,
            };
            let count = width * height * channels;
            let result = Pinned::new(driver, count * size_of::<f16>())?;
            // SAFETY: the kernel has written so many bytes there, and `result` is as long.
            unsafe { driver.download(result.as_ptr(), Address(output), result.len(), stream)? };
            driver.synchronize(stream)?;
            let halves = result.bytes().as_chunks::<2>().0.iter();
            stages.push(Stage {
                kernel: launch.kernel.name(),
                width,
                height,
                channels,
                values: halves.map(|&bytes| f16::from_le_bytes(bytes)).collect(),
            });
        }
        Ok(stages)
    }
}
