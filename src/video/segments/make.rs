//! Making of segments.

use std::{collections::VecDeque, ops::Range};

use tempfile::NamedTempFile;

use super::{Segments, encode::SegmentEncoder, file::SegmentWriter};
use crate::{
    Error, Result,
    frame::Frame,
    video::{End, Options, Reader, TimedFrame, transcode::check_kind},
};

/// Relation of a frame to the one that was passed before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// True if the history begins anew with this frame.
    pub restarts: bool,
    /// False for a frame that only makes up the history of the next one.
    pub is_written: bool,
}

/// Outcome of [`Segments::make`]; by default that of no segments.
#[derive(Debug, Default)]
pub struct Made {
    /// Frames written.
    pub frames: u64,
    /// Reason why there are no more frames, never [`End::Incomplete`].
    pub end: End,
    /// Index of the segment in which damage has ended the work, and its frames before.
    pub(super) rest: Option<(usize, NamedTempFile)>,
}

/// Segment that is being made.
enum Current<'a> {
    /// No frame has been encoded.
    Empty(Box<SegmentWriter>),
    Encoding(Box<SegmentEncoder<'a>>),
}

impl<'a> Current<'a> {
    /// Encodes `frame`. The first frame of a segment starts the encoder.
    fn push(
        self,
        frame: &TimedFrame,
        segments: &'a Segments,
        options: &'a Options,
    ) -> Result<Self> {
        let mut encoder = match self {
            Self::Encoding(encoder) => encoder,
            Self::Empty(file) => {
                let info = frame.frame.info();
                let stream = segments.plan.stream.with_size(info.width, info.height)?;
                let encoder = SegmentEncoder::start(*file, &segments.output, &stream, options)?;
                Box::new(encoder)
            }
        };
        encoder.push(frame)?;
        Ok(Self::Encoding(encoder))
    }

    /// As [`SegmentWriter::finish`].
    fn finish(self, is_whole: bool) -> Result<Option<NamedTempFile>> {
        match self {
            Self::Empty(file) => file.finish(is_whole),
            Self::Encoding(encoder) => encoder.finish(is_whole),
        }
    }
}

impl Segments {
    /// Makes the segments `range` of the frames of `input`, the file of the plan. `each` is called
    /// for every frame, one after the other, and for up to `history` frames before each segment.
    /// `options` are those of the output.
    ///
    /// Each finished segment is on the disk at once, and stays there if a later one fails.
    ///
    /// # Errors
    /// Those of `each` and of [`Writer`](crate::video::Writer).
    pub fn make(
        &self,
        input: &mut Reader,
        range: Range<usize>,
        history: usize,
        options: &Options,
        mut each: impl FnMut(&TimedFrame, Step) -> Result<Option<Frame>>,
    ) -> Result<Made> {
        if range.len() < self.plan.len() {
            input.set_part(self.plan.part(range.start, range.end, history))?;
        }
        let origin = self.plan.survey.origin();
        // Changes of the frames are reported once.
        let quiet = Options {
            notice: None,
            ..options.clone()
        };
        let stopped = |frames| Made {
            frames,
            end: End::Stopped,
            rest: None,
        };
        // The last frames before the next one.
        let mut last: VecDeque<TimedFrame> = VecDeque::new();
        let mut index = range.start;
        let begin = |index| {
            let file = SegmentWriter::create(&self.path(index))?;
            Ok::<_, Error>(Current::Empty(Box::new(file)))
        };
        let mut current = begin(index)?;
        let mut frames = 0;
        let end = loop {
            let frame = match input.next() {
                None => break End::Complete,
                Some(Ok(frame)) => frame,
                Some(Err(e)) => break End::Damaged(e),
            };
            if let Err(e) = check_kind(input, &self.plan.stream, &frame) {
                break End::Damaged(e);
            }
            while index + 1 < range.end && frame.pts >= self.plan.boundary(index + 1) {
                current.finish(true)?;
                index += 1;
                current = begin(index)?;
            }
            if frame.pts >= self.plan.boundary(index) {
                let is_first = matches!(current, Current::Empty(_));
                let mut step = Step {
                    restarts: is_first,
                    is_written: false,
                };
                for frame in last.iter().filter(|_| is_first) {
                    if each(frame, step)?.is_none() {
                        return Ok(stopped(frames));
                    }
                    step.restarts = false;
                }
                step.is_written = true;
                let Some(made) = each(&frame, step)? else {
                    return Ok(stopped(frames));
                };
                let made = TimedFrame {
                    frame: made,
                    pts: frame.pts.saturating_sub(origin),
                    duration: frame.duration,
                };
                let options = if index == range.start {
                    options
                } else {
                    &quiet
                };
                current = match current.push(&made, self, options) {
                    Err(Error::Cancelled) => return Ok(stopped(frames)),
                    pushed => pushed?,
                };
                frames += 1;
            }
            last.push_back(frame);
            if last.len() > history {
                last.pop_front();
            }
        };
        let is_whole = matches!(end, End::Complete);
        let rest = current.finish(is_whole)?.map(|rest| (index, rest));
        if is_whole {
            // Segments whose frames could not be decoded.
            for index in index + 1..range.end {
                begin(index)?.finish(true)?;
            }
        }
        Ok(Made { frames, end, rest })
    }
}
