//! Order in which a network computes the rows of a frame, and the buffers of the rows.
//!
//! Layers are fused: after four rows of the latent, every layer computes the four rows that these
//! allow, one row higher in each layer. Then the next four rows of the latent follow, down to the
//! end of the frame. Of each feature map only the rows that are still needed are retained: about
//! two rows for each layer and those in work, independent of the height of the frame. Their buffers
//! are then used again.
//!
//! Rows above and below the frame, as many as later layers read, are computed from the repeated
//! border of the latent. So no output depends on the end of a feature map.

use std::{collections::VecDeque, ops::Range};

use crate::{kernels::winograd::TILE, nn::lite::Role};

/// Index of a row buffer in its pool: that of the latent (stage 0) or that of the feature maps (all
/// others). The latent has its own pool because its pixels have another size: in a shared buffer,
/// columns of different blocks would overlap.
pub(super) type BufferIndex = u16;

/// Buffer that stays 0, for rows that no needed output depends on.
pub(super) const ZERO: BufferIndex = 0;

/// Rows that an operation reads.
pub(super) const READ: usize = TILE + 2;

/// Operation that computes four rows of a stage. Stage 0 is the latent, stage n the output of layer
/// n - 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Op {
    pub stage: usize,
    /// First row, in cells. Rows outside of the frame belong to the margin.
    pub y: isize,
    /// Rows y - 1 to y + 4 of the previous stage; unused for stage 0.
    pub input: [BufferIndex; READ],
    /// Rows y to y + 3 of the feature map that is added to the output.
    pub skip: Option<[BufferIndex; TILE]>,
    /// Rows of the output; unused for the last stage, whose rows are the residual.
    pub output: [BufferIndex; TILE],
}

/// Operations for a frame.
#[derive(Debug)]
pub(super) struct Program {
    pub ops: Vec<Op>,
    /// Ranges of `ops`. An operation reads rows that earlier steps wrote, and writes buffers that
    /// no operation of the same step reads.
    pub steps: Vec<Range<usize>>,
    /// Number of row buffers in each pool, including [`ZERO`].
    pub buffers: [usize; 2],
}

/// Returns the index of the pool of a stage's row buffers.
pub(super) fn pool(stage: usize) -> usize {
    stage.min(1)
}

/// Returns the number of cells beyond the frame that are needed of stage `stage` in a network of
/// `layers` layers.
pub(super) fn reach(layers: usize, stage: usize) -> usize {
    layers - stage
}

/// Returns the first band of a stage; band b begins at row 4 b + reach.
fn first_band(reach: usize) -> isize {
    -(reach.div_ceil(2) as isize)
}

/// Retained rows of a stage and their buffers.
#[derive(Default)]
struct RetainedRows(VecDeque<(isize, BufferIndex)>);

impl RetainedRows {
    /// Returns the buffers of `N` rows from `y` on.
    fn buffers<const N: usize>(&self, y: isize) -> [BufferIndex; N] {
        std::array::from_fn(|i| {
            let found = self.0.iter().find(|(row, _)| *row == y + i as isize);
            found.map_or(ZERO, |&(_, buffer)| buffer)
        })
    }

    /// Frees all buffers but those of the last two rows, which the next band needs.
    fn release(&mut self, free: &mut Vec<BufferIndex>) {
        while self.0.len() > 2 {
            free.extend(self.0.pop_front().map(|(_, buffer)| buffer));
        }
    }
}

impl Program {
    /// Creates the program of layers with `roles` on a grid of `height` cells, in steps of up to
    /// `bands` bands of one layer.
    pub fn new(roles: &[Role], height: usize, bands: usize) -> Self {
        let layers = roles.len();
        let mut retained: Vec<RetainedRows> =
            (0..=layers).map(|_| RetainedRows::default()).collect();
        let (mut free, mut buffers) = ([Vec::new(), Vec::new()], [ZERO + 1; 2]);
        let (mut ops, mut steps) = (Vec::new(), Vec::new());
        let end = height.div_ceil(TILE) as isize;
        let start = first_band(reach(layers, 0));
        for batch in (start..end).step_by(bands.max(1)) {
            for stage in 0..=layers {
                let margin = reach(layers, stage);
                let batch = batch.max(first_band(margin))..(batch + bands as isize).min(end);
                let begin = ops.len();
                for band in batch {
                    let y = TILE as isize * band + margin as isize;
                    let second = stage > 0 && roles[stage - 1] == Role::PairSecond;
                    let mut op = Op {
                        stage,
                        y,
                        input: [ZERO; READ],
                        skip: second.then(|| retained[stage - 2].buffers(y)),
                        output: [ZERO; TILE],
                    };
                    if stage > 0 {
                        op.input = retained[stage - 1].buffers(y - 1);
                    }
                    if stage < layers {
                        for (i, buffer) in op.output.iter_mut().enumerate() {
                            *buffer = free[pool(stage)].pop().unwrap_or_else(|| {
                                buffers[pool(stage)] += 1;
                                buffers[pool(stage)] - 1
                            });
                            retained[stage].0.push_back((y + i as isize, *buffer));
                        }
                    }
                    ops.push(op);
                }
                if ops.len() > begin {
                    steps.push(begin..ops.len());
                }
                // A pair's input is needed until its second layer has run.
                if stage > 0 && roles[stage - 1] != Role::PairFirst {
                    retained[stage - 1].release(&mut free[pool(stage - 1)]);
                }
                if stage > 1 && roles[stage - 1] == Role::PairSecond {
                    retained[stage - 2].release(&mut free[pool(stage - 2)]);
                }
            }
        }
        Self {
            ops,
            steps,
            buffers: buffers.map(usize::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn roles() -> impl Strategy<Value = Vec<Role>> {
        let pairs = prop::collection::vec(any::<bool>(), 0..12);
        pairs.prop_map(|pairs| {
            let mut roles = vec![Role::Chain];
            for pair in pairs {
                if pair {
                    roles.extend([Role::PairFirst, Role::PairSecond]);
                } else {
                    roles.push(Role::Chain);
                }
            }
            roles.push(Role::Chain);
            roles
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Runs the program on buffers that hold the name of their row: (stage, row).
        #[test]
        fn every_needed_row_is_computed_from_the_rows_that_define_it(
            roles in roles(), height in 1usize..70, bands in 1usize..5,
        ) {
            let layers = roles.len();
            let program = Program::new(&roles, height, bands);
            let mut buffers = program.buffers.map(|n| vec![None; n]);
            let mut done = vec![false; height];
            let needed = |stage: usize, y: isize| {
                let margin = reach(layers, stage) as isize;
                (-margin..height as isize + margin).contains(&y)
            };
            for step in &program.steps {
                let mut read = Vec::new();
                let mut written = Vec::new();
                for op in &program.ops[step.clone()] {
                    for i in 0..TILE as isize {
                        let y = op.y + i;
                        if !needed(op.stage, y) {
                            continue;
                        }
                        if op.stage > 0 {
                            for (k, &buffer) in op.input[i as usize..][..3].iter().enumerate() {
                                let want = Some((op.stage - 1, y - 1 + k as isize));
                                let found = buffers[pool(op.stage - 1)][usize::from(buffer)];
                                prop_assert_eq!(found, want);
                            }
                            if roles[op.stage - 1] == Role::PairSecond {
                                let skip = op.skip.unwrap()[i as usize];
                                let skip = buffers[pool(op.stage - 2)][usize::from(skip)];
                                prop_assert_eq!(skip, Some((op.stage - 2, y)));
                            }
                        }
                        if op.stage == layers {
                            prop_assert!(!done[y as usize]);
                            done[y as usize] = true;
                        }
                    }
                    if op.stage > 0 {
                        read.extend(op.input.map(|buffer| (pool(op.stage - 1), buffer)));
                        let skips = op.skip.iter().flatten();
                        read.extend(skips.map(|&buffer| (pool(op.stage - 2), buffer)));
                    }
                    if op.stage < layers {
                        for (i, &buffer) in op.output.iter().enumerate() {
                            let at = (pool(op.stage), buffer);
                            prop_assert!(buffer != ZERO && !written.contains(&at));
                            written.push(at);
                            let row = (op.stage, op.y + i as isize);
                            buffers[at.0][usize::from(buffer)] = Some(row);
                        }
                    }
                }
                let conflict = written.iter().any(|buffer| read.contains(buffer));
                prop_assert!(!conflict, "read and written in a step");
            }
            prop_assert!(done.iter().all(|&d| d));
            let max = (2 + TILE * bands) * 3 + 2 * layers + 2 * TILE * bands;
            let count = program.buffers[1];
            prop_assert!(count <= max, "{count} rows for {layers} layers");
        }
    }
}
