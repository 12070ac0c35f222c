//! Samples that the kernels compute in tiles (`kernels/student.cu`).

use super::params::{Component, NO_SLOT, Samples, Slot, Source};

/// Taps of both axes.
pub(super) const TAPS: usize = 4;
/// Samples in a row of a tile, and its rows.
pub(super) const SAMPLES: usize = 256;
pub(super) const ROWS: usize = 16;
/// Source samples in a group, and maximum number of groups in a row of a tile.
const GROUP: usize = 8;
const GROUPS: usize = 34;

/// Alternating components of a plane and side of a cell, in the order of the kernels' instances for
/// bytes. Those for words follow.
const INSTANCES: [(usize, u32); 3] = [(1, 2), (1, 4), (2, 2)];

/// Returns the components and the side of a cell of instance `tile`.
pub(super) fn instance(tile: u32) -> (usize, usize) {
    let (components, r) = INSTANCES[tile as usize % INSTANCES.len()];
    (components, r as usize)
}

/// Chooses the instance for samples of a plane of `components` components with cells of side `r`.
/// Rows of `width` samples begin with sample `left`; those outside of `starts`, the first source
/// samples, repeat its ends. Returns `None` if tiles do not fit.
fn choose(
    samples: &mut Samples,
    components: usize,
    r: u32,
    (left, width): (isize, usize),
    starts: &[u32],
) -> Option<u32> {
    let bytes = samples.bytes as usize;
    let taps = [samples.x_taps, samples.y_taps];
    if taps != [TAPS as u32; 2] || samples.step as usize != components * bytes {
        return None;
    }
    let instance = INSTANCES.iter().position(|&i| i == (components, r))?;
    let start = |x: isize| starts[x.clamp(0, starts.len() as isize - 1) as usize] as usize;
    let step = SAMPLES / components;
    let groups = (0..width).step_by(step).map(|x| {
        let x = left + x as isize;
        let first = components * start(x) / GROUP;
        let end = components * (start(x + step as isize - 1) + TAPS);
        end.div_ceil(GROUP) - first
    });
    let groups = groups.max().unwrap_or(0).max(2);
    if groups > GROUPS {
        return None;
    }
    samples.groups = groups as u32;
    samples.reciprocal = (1u64 << 32).div_ceil(groups as u64) as u32;
    Some((instance + INSTANCES.len() * (bytes - 1)) as u32)
}

/// Chooses tiles for the component `first` of a plane, together with `second` if there are two.
/// `starts` are those of its rows.
pub(super) fn component(
    first: &Component,
    second: Option<&Component>,
    slots: &[Slot],
    starts: &[u32],
) -> Option<Component> {
    let mut tiled = *first;
    let count = 1 + usize::from(second.is_some());
    tiled.slots[1] = second.map_or(NO_SLOT, |second| second.slots[0]);
    let gains = [first.gains, second.map_or([0.0; 2], |second| second.gains)];
    let side = |slot: u32| slots.get(slot as usize).map(|slot| slot.r);
    let sides = tiled.slots.map(side);
    let r = match (sides, count) {
        ([None, None], _) => 4 / count as u32,
        ([Some(r), None], 1) => r,
        ([Some(r), Some(other)], 2) if r == other => r,
        _ => return None,
    };
    if gains != [[0.0; 2]; 2] {
        return None;
    }
    let columns = (0, first.width as usize);
    tiled.tile = choose(&mut tiled.base, count, r, columns, starts)?;
    Some(tiled)
}

/// Chooses tiles for `first`, the only source of its plane of the latent, together with `second`
/// if two share the plane of the frame. The latent has `margin` cells on each side of `width`.
pub(super) fn source(
    first: &Source,
    second: Option<&Source>,
    slots: &[Slot],
    (margin, width): (usize, usize),
    starts: &[u32],
) -> Option<Source> {
    let mut tiled = *first;
    tiled.slots[1] = second.map_or(NO_SLOT, |second| second.slots[0]);
    if second.is_some_and(|second| second.weight != first.weight) {
        return None;
    }
    let r = slots[first.slots[0] as usize].r as usize;
    let columns = (-((margin * r) as isize), (width + 2 * margin) * r);
    let count = 1 + usize::from(second.is_some());
    tiled.tile = choose(&mut tiled.samples, count, r as u32, columns, starts)?;
    Some(tiled)
}
