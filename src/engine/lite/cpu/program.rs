//! The order in which a network runs over a frame, and where each row of its feature maps lies meanwhile.
//!
//! Layers are fused: four rows of the latent are made, then every layer computes the four rows that they allow, one
//! row further up in each layer, and so on down the frame. Of each feature map only the rows that are still needed are
//! kept, in buffers that are used again as soon as nothing needs them: about two rows for each layer and those in
//! work, whatever the height of the frame.
//!
//! Rows above the frame and below it are computed too, as many as a layer after it can see, from the latent's repeated
//! border: no output sees where the feature maps end.

use std::{collections::VecDeque, ops::Range};

use crate::{nn::lite::Role, ops::cpu::winograd::TILE};

/// Index of a row buffer among those of the latent (stage 0) or among those of the feature maps (all others). The two
/// never share a buffer: their pixels differ in size, and then the columns of different blocks would overlap in it.
pub(super) type Slot = u16;

/// The buffer that stays 0: rows that no needed output sees.
pub(super) const ZERO: Slot = 0;

/// Rows that a band's outputs read.
pub(super) const READ: usize = TILE + 2;

/// Four rows of one stage. Stage 0 is the latent, stage n the output of layer n - 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Op {
    pub stage: usize,
    /// The first row, in cells; rows outside of the frame are part of the margin.
    pub y: isize,
    /// The rows of the stage before it from y - 1 to y + 4; unused for stage 0.
    pub input: [Slot; READ],
    /// The rows y to y + 3 of the feature map that is added to the output.
    pub skip: Option<[Slot; TILE]>,
    /// Where the rows go; unused for the last stage, whose rows are the residual.
    pub output: [Slot; TILE],
}

/// What to run for each frame.
#[derive(Debug)]
pub(super) struct Program {
    pub ops: Vec<Op>,
    /// Ranges of `ops`: a step reads what steps before it wrote, and writes where nothing of the same step reads.
    pub steps: Vec<Range<usize>>,
    /// Row buffers in use of the latent and of the feature maps, [`ZERO`] among both.
    pub slots: [usize; 2],
}

/// Which of the two sets of row buffers the rows of a stage lie in.
pub(super) fn pool(stage: usize) -> usize {
    stage.min(1)
}

/// How many cells beyond the frame stage `stage` of a network of `layers` layers is needed.
pub(super) fn reach(layers: usize, stage: usize) -> usize {
    layers - stage
}

/// The first band of a stage; band b begins at row 4 b + reach.
fn first_band(reach: usize) -> isize {
    -(reach.div_ceil(2) as isize)
}

/// The rows of a stage that are kept.
#[derive(Default)]
struct Kept(VecDeque<(isize, Slot)>);

impl Kept {
    fn slots<const N: usize>(&self, y: isize) -> [Slot; N] {
        std::array::from_fn(|i| {
            let found = self.0.iter().find(|(row, _)| *row == y + i as isize);
            found.map_or(ZERO, |&(_, slot)| slot)
        })
    }

    /// Gives back all but the last two rows, which the next band needs.
    fn release(&mut self, free: &mut Vec<Slot>) {
        while self.0.len() > 2 {
            free.extend(self.0.pop_front().map(|(_, slot)| slot));
        }
    }
}

impl Program {
    /// Of layers with `roles` on a grid of `height` cells, in steps of up to `bands` bands of one layer.
    pub fn new(roles: &[Role], height: usize, bands: usize) -> Self {
        let layers = roles.len();
        let mut kept: Vec<Kept> = (0..=layers).map(|_| Kept::default()).collect();
        let (mut free, mut slots) = ([Vec::new(), Vec::new()], [ZERO + 1; 2]);
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
                        skip: second.then(|| kept[stage - 2].slots(y)),
                        output: [ZERO; TILE],
                    };
                    if stage > 0 {
                        op.input = kept[stage - 1].slots(y - 1);
                    }
                    if stage < layers {
                        for (i, slot) in op.output.iter_mut().enumerate() {
                            *slot = free[pool(stage)].pop().unwrap_or_else(|| {
                                slots[pool(stage)] += 1;
                                slots[pool(stage)] - 1
                            });
                            kept[stage].0.push_back((y + i as isize, *slot));
                        }
                    }
                    ops.push(op);
                }
                if ops.len() > begin {
                    steps.push(begin..ops.len());
                }
                // A pair's input is needed until its second layer has run.
                if stage > 0 && roles[stage - 1] != Role::PairFirst {
                    kept[stage - 1].release(&mut free[pool(stage - 1)]);
                }
                if stage > 1 && roles[stage - 1] == Role::PairSecond {
                    kept[stage - 2].release(&mut free[pool(stage - 2)]);
                }
            }
        }
        Self {
            ops,
            steps,
            slots: slots.map(usize::from),
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
                match pair {
                    true => roles.extend([Role::PairFirst, Role::PairSecond]),
                    false => roles.push(Role::Chain),
                }
            }
            roles.push(Role::Chain);
            roles
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Runs the program on rows that are names: (stage, row).
        #[test]
        fn every_needed_row_is_made_of_the_rows_it_is_defined_by(
            roles in roles(), height in 1usize..70, bands in 1usize..5,
        ) {
            let layers = roles.len();
            let program = Program::new(&roles, height, bands);
            let mut slots = program.slots.map(|n| vec![None; n]);
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
                            for (k, &slot) in op.input[i as usize..][..3].iter().enumerate() {
                                let want = Some((op.stage - 1, y - 1 + k as isize));
                                prop_assert_eq!(slots[pool(op.stage - 1)][usize::from(slot)], want);
                            }
                            if roles[op.stage - 1] == Role::PairSecond {
                                let skip = op.skip.unwrap()[i as usize];
                                let skip = slots[pool(op.stage - 2)][usize::from(skip)];
                                prop_assert_eq!(skip, Some((op.stage - 2, y)));
                            }
                        }
                        if op.stage == layers {
                            prop_assert!(!done[y as usize]);
                            done[y as usize] = true;
                        }
                    }
                    if op.stage > 0 {
                        read.extend(op.input.map(|slot| (pool(op.stage - 1), slot)));
                        read.extend(op.skip.iter().flatten().map(|&slot| (pool(op.stage - 2), slot)));
                    }
                    if op.stage < layers {
                        for (i, &slot) in op.output.iter().enumerate() {
                            let at = (pool(op.stage), slot);
                            prop_assert!(slot != ZERO && !written.contains(&at));
                            written.push(at);
                            slots[at.0][usize::from(slot)] = Some((op.stage, op.y + i as isize));
                        }
                    }
                }
                prop_assert!(!written.iter().any(|slot| read.contains(slot)), "read and written in a step");
            }
            prop_assert!(done.iter().all(|&d| d));
            let most = (2 + TILE * bands) * 3 + 2 * layers + 2 * TILE * bands;
            prop_assert!(program.slots[1] <= most, "{:?} rows for {layers} layers", program.slots);
        }
    }
}
