//! Tiles in rows of memory.

use std::ops::Range;

use super::sizes::TILE;

/// Input rows of neighbouring tiles, each from the first pixel that is read.
#[derive(Clone, Copy)]
pub(super) struct Input<const ROWS: usize> {
    pub rows: [*const f32; ROWS],
    /// Floats from one pixel to the next.
    pub step: usize,
    pub tiles: usize,
}

/// Output rows of neighbouring tiles, and rows that are added to them.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub rows: [*mut f32; TILE],
    pub skip: Option<[*const f32; TILE]>,
    /// Floats from one pixel to the next.
    pub step: usize,
    pub tiles: usize,
}

/// Rows of neighbouring tiles.
pub(super) trait Tiles {
    fn tiles(&self) -> usize;
}

impl<const ROWS: usize> Tiles for Input<ROWS> {
    fn tiles(&self) -> usize {
        self.tiles
    }
}

impl Tiles for Output {
    fn tiles(&self) -> usize {
        self.tiles
    }
}

/// A walk through all tiles of a list.
#[derive(Clone, Copy)]
pub(super) struct Walk<'a, T> {
    list: &'a [T],
    /// Tiles of the first item that are done.
    done: usize,
}

impl<'a, T: Tiles> Walk<'a, T> {
    pub fn new(list: &'a [T]) -> Self {
        Self { list, done: 0 }
    }

    /// Returns the next tiles of one item, at most `max`; `None` at the end or if `max` is 0.
    #[inline(always)]
    pub fn next(&mut self, max: usize) -> Option<(&'a T, Range<usize>)> {
        while self.list.first()?.tiles() == self.done {
            (self.list, self.done) = (&self.list[1..], 0);
        }
        let first = &self.list[0];
        let tiles = self.done..first.tiles().min(self.done + max);
        self.done = tiles.end;
        (!tiles.is_empty()).then_some((first, tiles))
    }
}
