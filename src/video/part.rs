//! Parts of a file.

use std::{cmp::Ordering, time::Duration};

/// Tolerance of times, so that rounding by a container does not move a frame out of its part.
const ROUNDING: Duration = Duration::from_micros(1);

/// Range of times on the clock of a file's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Earliest time of a frame in the part.
    pub start: Duration,
    /// Time that all frames in the part precede; [`Duration::MAX`] for the end of the file.
    pub end: Duration,
}

impl Part {
    /// The whole file.
    pub const WHOLE: Self = Self {
        start: Duration::ZERO,
        end: Duration::MAX,
    };

    /// Returns where `time` is: before the part, in it (`Equal`) or behind it.
    pub(super) fn place(&self, time: Duration) -> Ordering {
        let time = time.saturating_add(ROUNDING);
        if time < self.start {
            Ordering::Less
        } else if time < self.end {
            Ordering::Equal
        } else {
            Ordering::Greater
        }
    }

    pub(super) fn has(&self, time: Duration) -> bool {
        self.place(time) == Ordering::Equal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjoining_parts_share_no_time_and_leave_none_out() {
        let at = Duration::from_nanos;
        let (first, second) = (
            Part {
                start: Duration::ZERO,
                end: at(1_000_000_000),
            },
            Part {
                start: at(1_000_000_000),
                end: Duration::MAX,
            },
        );
        for time in [0, 999_998_000, 999_999_999, 1_000_000_000, 1_000_000_001] {
            assert_ne!(first.has(at(time)), second.has(at(time)), "{time}");
        }
        assert!(second.has(at(999_999_999)));
        assert_eq!(second.place(at(999_000_000)), Ordering::Less);
        assert_eq!(first.place(at(1_000_000_000)), Ordering::Greater);
        assert!(Part::WHOLE.has(at(u64::MAX)));
    }
}
