//! Division of a video into segments.

use std::{sync::Arc, time::Duration};

use crate::video::{
    Part, Reader, StreamInfo,
    survey::{Survey, Track},
};

/// Part of a video that is encoded on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Time of the first frame on the clock of the file.
    pub start: Duration,
    /// Time of the first frame of the next segment, or the end of the video.
    pub end: Duration,
    /// Number of frames; `None` if the packets of the file do not tell.
    pub frames: Option<u64>,
}

/// Division of the frames of a [`Reader`] into segments.
#[derive(Clone)]
pub struct Plan {
    /// Survey of the part of the file that the reader had.
    pub(super) survey: Arc<Survey>,
    /// Properties of the first frame, which all frames have.
    pub(super) stream: StreamInfo,
    pub(super) track: Option<Track>,
    part: Part,
    /// Times of all frames, in order.
    times: Vec<Duration>,
    /// Index of the first frame of each segment.
    starts: Vec<usize>,
}

impl Plan {
    /// Divides the part of the video that `reader` is restricted to. A segment ends at the first
    /// key frame after the time `length`, or at any frame after twice that time.
    pub fn new(reader: &Reader, length: Duration) -> Self {
        let survey = reader.survey().clone();
        let part = survey.part.unwrap_or(Part::WHOLE);
        let track = reader.track().cloned();
        let (mut times, mut keys) = (Vec::new(), Vec::new());
        if let Some(track) = &track {
            times.extend(track.times.iter().map(|(start, _)| Duration::from(*start)));
            keys.extend(track.keys.iter().map(|key| Duration::from(*key)));
        }
        times.sort();
        keys.sort();
        Self {
            starts: starts(&times, &keys, length),
            survey,
            stream: reader.stream().clone(),
            track,
            part,
            times,
        }
    }

    /// Returns the number of segments, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "there is always a segment")]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Returns all segments in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        let track = self.track.as_ref();
        let end = track.and_then(|track| track.end);
        let end = end.map_or(Duration::ZERO, Duration::from);
        let is_counted = track.is_some_and(|t| t.is_frame_by_frame() && t.untimed == 0);
        (0..self.len()).map(move |index| {
            let first = self.starts[index];
            let next = self.starts.get(index + 1).copied();
            let time = |frame: usize| self.times.get(frame).copied();
            let frames = next.unwrap_or(self.times.len()) - first;
            Segment {
                start: time(first).unwrap_or_default(),
                end: next.and_then(time).unwrap_or(end),
                frames: is_counted.then_some(frames as u64),
            }
        })
    }

    /// Returns the time from which the frames of the segment `index` are shown. It lies between two
    /// frames, so that rounding does not move a frame to another segment. The first segment begins
    /// with the part, and the one behind the last where the part ends.
    pub(super) fn boundary(&self, index: usize) -> Duration {
        match self.starts.get(index) {
            Some(&first) => self.before(first),
            None => self.part.end,
        }
    }

    /// Returns the part of the file with the segments `first` to before `end`, and `history` frames
    /// before.
    pub(super) fn part(&self, first: usize, end: usize, history: usize) -> Part {
        Part {
            start: self.before(self.starts[first].saturating_sub(history)),
            end: self.boundary(end),
        }
    }

    /// Returns a time between the frame with this index and the one before.
    fn before(&self, frame: usize) -> Duration {
        match frame.checked_sub(1) {
            None => self.part.start,
            Some(last) => (self.times[last] + self.times[frame]) / 2,
        }
    }

    /// Returns the part of the file and its division, as text.
    pub(super) fn identity(&self) -> String {
        let mut hasher = crc32fast::Hasher::new();
        let starts = self.segments().map(|segment| segment.start);
        let times = starts.chain([self.part.start, self.part.end]);
        times.for_each(|time| hasher.update(&time.as_nanos().to_le_bytes()));
        format!("{}, checksum {:08x}", self.len(), hasher.finalize())
    }
}

/// Returns the index of the first frame of each segment.
fn starts(times: &[Duration], keys: &[Duration], length: Duration) -> Vec<usize> {
    let mut starts = vec![0];
    let mut begin = times.first().copied().unwrap_or_default();
    for (index, &time) in times.iter().enumerate() {
        let so_far = time - begin;
        let is_key = || keys.binary_search(&time).is_ok();
        // Frames of one time cannot be told apart.
        let is_new = || times[index - 1] < time;
        let is_long = so_far >= 2 * length;
        if so_far > Duration::ZERO && (is_long || so_far >= length && is_key()) && is_new() {
            starts.push(index);
            begin = time;
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_end_at_key_frames_or_else_at_twice_their_length() {
        let times: Vec<_> = (0..100).map(|i| Duration::from_millis(40 * i)).collect();
        let keys = |every: usize| times.iter().copied().step_by(every).collect::<Vec<_>>();
        let length = Duration::from_secs(1);
        assert_eq!(starts(&times, &keys(10), length), [0, 30, 60, 90]);
        assert_eq!(starts(&times, &keys(1), length), [0, 25, 50, 75]);
        assert_eq!(starts(&times, &keys(1000), length), [0, 50]);
        assert_eq!(starts(&times, &[], Duration::from_secs(4)), [0]);
        assert_eq!(starts(&[], &[], length), [0]);
        let same = [times[0], times[60], times[60], times[61]];
        assert_eq!(starts(&same, &[], length), [0, 1]);
    }
}
