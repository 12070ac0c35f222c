//! Survey of a file: its streams from the first packet to the last, without decoding them.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use gst::{ClockTime, PadProbeData, PadProbeReturn, PadProbeType, prelude::*};

use super::bus::{
    Bus, CONTAINER_ALPHA, CONTAINER_COLOURS, Demux, Heard, Running, discard, is_idle, is_subtitles,
    parse_file, refuse, start,
};
use super::{
    edits::{CHAPTERS, Edits, hidden},
    matroska,
    orientation::{Syntax, Turn},
    part::Part,
};
use crate::{Error, Result};

/// Packets of each stream that are stored to test a muxer.
const HEAD: usize = 16;
/// Pause without a packet after which the survey gives up.
const STALLED: Duration = Duration::from_secs(60);
/// Interval of checks for the end and for errors.
const POLL: ClockTime = ClockTime::from_mseconds(20);
/// Consecutive checks without a running thread after which no more data is expected.
const IDLE: u32 = 50;
/// Maximum difference between the times of a packet and of its frame.
const TURN_TOLERANCE: Duration = Duration::from_millis(1);
/// Maximum time by which a track may end before its edit list states.
const EDIT_TOLERANCE: Duration = Duration::from_millis(5);

/// Kind of an elementary stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Video,
    Audio,
    Subtitles,
    Other,
}

impl Kind {
    pub fn of(caps: &gst::CapsRef) -> Self {
        let name = caps.structure(0).map_or("", |s| s.name().as_str());
        if is_subtitles(name) {
            return Self::Subtitles;
        }
        match name.split('/').next() {
            Some("video" | "image") => Self::Video,
            Some("audio") => Self::Audio,
            _ => Self::Other,
        }
    }
}

/// A subtitle with the time for which it is shown.
#[derive(Clone, Debug)]
pub(super) struct Cue {
    /// Running time.
    pub start: ClockTime,
    /// `None` until the next cue.
    pub duration: Option<ClockTime>,
    pub data: gst::Buffer,
}

impl Cue {
    pub fn text(&self) -> String {
        let map = self.data.map_readable();
        map.map_or_else(
            |_| String::new(),
            |map| String::from_utf8_lossy(&map).into(),
        )
    }
}

/// An elementary stream of a file.
#[derive(Clone, Debug)]
pub(super) struct Track {
    pub kind: Kind,
    /// Number of the track in its file, if the container has numbers.
    id: Option<u32>,
    /// Caps of the first packet.
    pub caps: gst::Caps,
    /// Number of packets inside the segment, without headers.
    pub packets: u64,
    /// Number of packets that are not shown: those before the start of an edit list, and those that
    /// are shown before the first key frame and may refer to frames before it.
    pub preroll: u64,
    /// Number of these packets without a time.
    pub untimed: u64,
    /// Number of packets before the first that has a time, and their total duration: the start of a
    /// transport stream. Their times follow from that of the next packet.
    pub lead: (u64, ClockTime),
    /// Timestamp of the first packet that has one.
    pub timed: Option<ClockTime>,
    /// Timestamp of the first key frame.
    key: Option<ClockTime>,
    /// Running time of the first packet that is shown.
    pub first: Option<ClockTime>,
    /// Running time of the last packet that is shown.
    pub last: Option<ClockTime>,
    /// Running time at which the last packet ends.
    pub end: Option<ClockTime>,
    /// Running times of start and end of each packet that is shown. Video packets without a
    /// presentation time are left out.
    pub times: Vec<(ClockTime, ClockTime)>,
    /// Running times of the key frames of a video.
    pub keys: Vec<ClockTime>,
    /// True if the file marks the stream as one to play by default.
    pub selected: bool,
    /// The first packets, headers included.
    pub head: Vec<gst::Buffer>,
    /// All packets of subtitles that are shown.
    pub cues: Vec<Cue>,
    /// Events that subtitles need, such as a palette.
    pub events: Vec<gst::Event>,
    /// Turns that the packets of the video state, with the presentation time from which each is in
    /// force.
    pub turns: Vec<(ClockTime, Turn)>,
    /// Title, language and other tags of the stream.
    pub tags: gst::TagList,
    /// Elements of a Matroska file that mark the stream: see [`matroska::marks`].
    pub marks: Vec<u8>,
}

impl Track {
    /// Returns the time from the first packet to the end of the last.
    pub fn duration(&self) -> Duration {
        let (first, end) = (self.first.unwrap_or_default(), self.end.unwrap_or_default());
        Duration::from(end.saturating_sub(first))
    }

    /// Returns the time from the start of the first packet to that of the last.
    pub fn span(&self) -> Duration {
        let (first, last) = (
            self.first.unwrap_or_default(),
            self.last.unwrap_or_default(),
        );
        Duration::from(last.saturating_sub(first))
    }

    /// Returns the colorimetry that the container states.
    pub fn colours(&self) -> Option<String> {
        self.caps.structure(0)?.get(CONTAINER_COLOURS).ok()
    }

    /// Returns true if the stream has alpha that is not decoded.
    pub fn hides_alpha(&self) -> bool {
        let structure = self.caps.structure(0);
        structure.is_some_and(|s| s.get(CONTAINER_ALPHA) == Ok(true))
    }

    /// Returns a function that sets the times of the packets in `lead`.
    pub fn lead_times(&self) -> impl FnMut(&mut gst::Buffer) + Send + Sync + 'static {
        let mut next = self.timed.map(|time| time.saturating_sub(self.lead.1));
        move |buffer| {
            if buffer.pts().or(buffer.dts()).is_some() {
                next = None;
            } else if let Some(time) = next {
                next = Some(time + buffer.duration().unwrap_or_default());
                buffer.make_mut().set_pts(time);
            }
        }
    }

    /// Returns true if each packet of the video becomes a frame. In other streams some packets are
    /// fields, or frames that are only references.
    pub fn is_frame_by_frame(&self) -> bool {
        const CODECS: [&str; 9] = [
            "video/x-h264",
            "video/x-h265",
            "video/x-vp9",
            "video/x-av1",
            "video/x-ffv",
            "video/x-prores",
            "video/x-raw",
            "image/jpeg",
            "image/png",
        ];
        let Some(structure) = self.caps.structure(0) else {
            return false;
        };
        let mode = structure
            .get::<&str>("interlace-mode")
            .unwrap_or("progressive");
        CODECS.contains(&structure.name().as_str()) && mode == "progressive"
    }

    fn new(caps: gst::Caps, start: Option<&gst::event::StreamStart<gst::Event>>) -> Self {
        let flags = start.map_or(gst::StreamFlags::empty(), |event| event.stream_flags());
        // Behind the number Matroska's streams have an identifier.
        let id = start.and_then(|event| {
            let last = event.stream_id().rsplit('/').next()?;
            last.split(':').next()?.parse().ok()
        });
        Self {
            kind: Kind::of(&caps),
            id,
            caps,
            packets: 0,
            preroll: 0,
            untimed: 0,
            lead: (0, ClockTime::ZERO),
            timed: None,
            key: None,
            first: None,
            last: None,
            end: None,
            times: Vec::new(),
            keys: Vec::new(),
            selected: flags.contains(gst::StreamFlags::SELECT),
            head: Vec::new(),
            cues: Vec::new(),
            events: Vec::new(),
            turns: Vec::new(),
            tags: gst::TagList::new(),
            marks: Vec::new(),
        }
    }

    /// Reads the turn that a packet states. One without a message continues the turn of the last,
    /// except at a key frame.
    fn note_turn(
        &mut self,
        buffer: &gst::Buffer,
        segment: Option<&gst::FormattedSegment<ClockTime>>,
        is_key: bool,
    ) {
        let Some(syntax) = Syntax::of(&self.caps) else {
            return;
        };
        let Ok(packet) = buffer.map_readable() else {
            return;
        };
        let stated = syntax.turn(&packet);
        let Some(turn) = stated.or(is_key.then_some(Turn::default())) else {
            return;
        };
        let last = self.turns.last().map_or(Turn::default(), |(_, turn)| *turn);
        if turn != last {
            let time = segment
                .zip(buffer.pts())
                .and_then(|(s, pts)| s.to_running_time(pts));
            self.turns.push((time.unwrap_or_default(), turn));
        }
    }

    /// Returns the turn of the frame that is shown at `time`.
    pub fn turn_at(&self, time: Duration) -> Turn {
        let before = self.turns.iter().rev();
        let mut before =
            before.filter(|(start, _)| Duration::from(*start) <= time + TURN_TOLERANCE);
        before.next().map_or(Turn::default(), |(_, turn)| *turn)
    }

    /// Stores a packet of subtitles, from the start of the segment if it begins before.
    fn add_cue(
        &mut self,
        buffer: &gst::Buffer,
        segment: Option<&gst::FormattedSegment<ClockTime>>,
    ) {
        let is_blank = buffer.map_readable().is_ok_and(|map| {
            let is_blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
            map.iter().all(is_blank)
        });
        let time = buffer.pts().or(buffer.dts());
        let Some((segment, time)) = segment.zip(time).filter(|_| !is_blank) else {
            return;
        };
        let begin = segment.start().map_or(time, |start| start.max(time));
        let late = begin - time;
        let duration = buffer.duration();
        if late > ClockTime::ZERO && duration.is_none_or(|duration| duration <= late) {
            return;
        }
        let Some(start) = segment.to_running_time(begin) else {
            return;
        };
        let duration = duration.map(|duration| duration - late);
        self.show(start, start + duration.unwrap_or_default());
        self.cues.push(Cue {
            start,
            duration,
            data: buffer.clone(),
        });
    }

    fn add(&mut self, buffer: &gst::Buffer, segment: Option<&gst::FormattedSegment<ClockTime>>) {
        if self.head.len() < HEAD {
            self.head.push(buffer.clone());
        }
        if self.kind == Kind::Subtitles {
            return self.add_cue(buffer, segment);
        }
        let has = |flag| buffer.flags().contains(flag);
        // Key frames of H.264 have the flag, too.
        let is_header =
            has(gst::BufferFlags::HEADER) && (self.kind != Kind::Video || buffer.pts().is_none());
        if is_header || has(gst::BufferFlags::DECODE_ONLY) {
            return;
        }
        let is_key = !has(gst::BufferFlags::DELTA_UNIT);
        if self.kind == Kind::Video && self.packets + self.preroll == 0 && !is_key {
            // Decoding cannot start here.
            return;
        }
        self.note_turn(buffer, segment, is_key);
        let time = buffer.pts().or(buffer.dts());
        let Some((segment, time)) = segment.zip(time) else {
            self.packets += 1;
            self.untimed += 1;
            if self.timed.is_none() {
                self.lead.0 += 1;
                self.lead.1 += buffer.duration().unwrap_or_default();
            }
            return;
        };
        let is_first = self.timed.is_none();
        self.timed.get_or_insert(time);
        if self.kind == Kind::Video && time < *self.key.get_or_insert(time) {
            self.preroll += 1;
            return;
        }
        let duration = buffer.duration().unwrap_or_default();
        let Some(start) = segment.to_running_time(time) else {
            let before = segment
                .start()
                .is_some_and(|start| time + duration <= start);
            if before {
                self.preroll += 1;
            } else if segment.start().is_some_and(|start| time < start) {
                // The packet is partly shown.
                let end = time + duration - segment.start().unwrap_or(time);
                self.note_time(buffer, ClockTime::ZERO, end);
                self.show(ClockTime::ZERO, end);
            }
            return;
        };
        if is_first && self.lead.0 > 0 {
            let (packets, length) = self.lead;
            let begin = start.saturating_sub(length);
            let nth = |n| begin + length.mul_div_floor(n, packets).unwrap_or_default();
            self.times
                .extend((0..packets).map(|n| (nth(n), nth(n + 1))));
        }
        let lead = if is_first {
            self.lead.1
        } else {
            ClockTime::ZERO
        };
        if is_key && self.kind == Kind::Video {
            self.keys.push(start);
        }
        self.note_time(buffer, start, start + duration);
        self.show(start.saturating_sub(lead), start + duration);
    }

    fn note_time(&mut self, buffer: &gst::Buffer, start: ClockTime, end: ClockTime) {
        // Frames are shown in another order than they are decoded.
        if self.kind != Kind::Video || buffer.pts().is_some() {
            self.times.push((start, end));
        }
    }

    /// Returns the track with only the packets in `part`.
    fn within(&self, part: Part) -> Self {
        let mut track = Self {
            packets: 0,
            first: None,
            last: None,
            end: None,
            times: Vec::new(),
            cues: Vec::new(),
            ..self.clone()
        };
        for cue in &self.cues {
            let (start, duration) = (Duration::from(cue.start), cue.duration.map(Duration::from));
            let late = part.start.saturating_sub(start);
            let begin = start + late;
            let is_over = late > Duration::ZERO && duration.is_none_or(|d| d <= late);
            if is_over || !part.has(begin) {
                continue;
            }
            let time = |d: Duration| ClockTime::try_from(d).unwrap_or_default();
            let cue = Cue {
                start: time(begin),
                duration: duration.map(|d| time(d - late)),
                data: cue.data.clone(),
            };
            track.show(cue.start, cue.start + cue.duration.unwrap_or_default());
            track.cues.push(cue);
        }
        for &(start, end) in &self.times {
            if part.has(start.into()) {
                track.times.push((start, end));
                track.show(start, end);
            }
        }
        track
    }

    fn show(&mut self, start: ClockTime, end: ClockTime) {
        self.packets += 1;
        self.first = Some(self.first.map_or(start, |first| first.min(start)));
        self.last = Some(self.last.map_or(start, |last| last.max(start)));
        self.end = Some(self.end.map_or(end, |last| last.max(end)));
    }
}

/// Streams and metadata of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Survey {
    pub tracks: Vec<Track>,
    /// Title, artist and other tags of the whole file.
    pub tags: gst::TagList,
    pub chapters: Option<gst::Toc>,
    /// A line for each thing in an MP4 file that is not a stream here: see [`hidden`].
    pub hidden: Vec<&'static str>,
    /// Names of plugins that GStreamer lacks for some of the streams.
    pub missing: Vec<String>,
    /// Demuxing method with which all streams have times.
    pub demux: Demux,
    /// Part of the file that the packets of the tracks belong to; `None` for the whole file.
    pub part: Option<Part>,
    is_transport: bool,
}

impl Survey {
    /// Demuxes `path` to its end.
    ///
    /// # Errors
    /// [`Error::Video`] if GStreamer cannot demux the file.
    pub fn of(path: &Path) -> Result<Self> {
        super::init()?;
        let mut survey = Self::timed(path)?;
        for (id, marks) in matroska::marks(path) {
            let mut tracks = survey.tracks.iter_mut();
            if let Some(track) = tracks.find(|track| track.id == Some(id)) {
                track.marks = marks;
            }
        }
        Ok(survey)
    }

    /// Demuxes `path` to its end, by the method with which all streams have times.
    fn timed(path: &Path) -> Result<Self> {
        let mut survey = Self::demuxed(path, Demux::Plain)?;
        survey.hidden = hidden(path);
        if survey.chapters.is_some() {
            survey.hidden.retain(|line| *line != CHAPTERS);
        }
        let is_untimed = |track: &Track| track.untimed > track.packets / 2;
        if survey.is_transport && survey.tracks.iter().any(is_untimed) {
            let survey = Self::demuxed(path, Demux::TimedTransport(ClockTime::ZERO))?;
            let early = |track: &Track| Some(track.lead.1.saturating_sub(track.timed?));
            let shift = survey.tracks.iter().filter_map(early).max();
            let shift = shift.filter(|shift| *shift > ClockTime::ZERO);
            return shift.map_or(Ok(survey), |shift| {
                Self::demuxed(path, Demux::TimedTransport(shift))
            });
        }
        let edits = Edits::read(path);
        let is_short = |track: &Track| {
            let edit = edits.list.iter().find(|edit| Some(edit.track) == track.id);
            let end = track.end.map_or(Duration::ZERO, Duration::from);
            edit.is_some_and(|edit| edit.at + edit.length > end + EDIT_TOLERANCE)
        };
        if survey.tracks.iter().any(is_short) {
            let mut edited = Self::demuxed(path, Demux::Edited(Arc::new(edits)))?;
            edited.hidden.clone_from(&survey.hidden);
            // A file that is cut off ends early in any case.
            if edited.packets() > survey.packets() {
                return Ok(edited);
            }
        }
        Ok(survey)
    }

    fn demuxed(path: &Path, demux: Demux) -> Result<Self> {
        let failed = |reason: String| Error::video(path, reason);
        let shared = Arc::new(Mutex::new(Self {
            demux: demux.clone(),
            ..Self::default()
        }));
        let pipeline = build(path, &demux, &shared).map_err(failed)?;
        let running = Running(pipeline);
        let mut bus = Bus::of(&running.0)?;
        start(&running.0);
        let mut progress = (0, Instant::now());
        let mut idle = 0;
        loop {
            match bus.wait(POLL) {
                Some(Heard::End) => break,
                Some(Heard::Failure(failure)) => {
                    // Packets before the error count: a damaged file is upscaled up to there.
                    if lock(&shared).packets() == 0 {
                        return Err(failed(failure.reason));
                    }
                    break;
                }
                None => {}
            }
            idle = if is_idle(&running.0) { idle + 1 } else { 0 };
            if idle > IDLE {
                break;
            }
            let packets = lock(&shared).packets();
            if packets != progress.0 {
                progress = (packets, Instant::now());
            } else if progress.1.elapsed() > STALLED {
                let seconds = STALLED.as_secs();
                return Err(failed(format!("no packet could be read for {seconds} s")));
            }
        }
        let missing = bus.missing().to_vec();
        drop(running);
        let mut survey = lock(&shared).clone();
        survey.missing = missing;
        Ok(survey)
    }

    /// Returns the time on the clock of the file from which the times of an output count.
    pub fn origin(&self) -> Duration {
        self.part.map_or(Duration::ZERO, |part| part.start)
    }

    /// Returns the survey of a part of the file.
    pub fn within(&self, part: Part) -> Self {
        Self {
            tracks: self.tracks.iter().map(|t| t.within(part)).collect(),
            part: Some(part),
            ..self.clone()
        }
    }

    /// Returns true if the times of frames after a seek can be expected to be those of the survey.
    pub fn can_seek(&self) -> bool {
        self.demux == Demux::Plain && !self.is_transport
    }

    /// Returns true if the track has packets to copy. Every track of a whole file counts.
    pub fn is_used(&self, track: &Track) -> bool {
        self.part.is_none() || track.packets > 0
    }

    /// Returns the audio tracks that have packets to copy.
    pub fn audio(&self) -> impl Iterator<Item = &Track> {
        self.tracks(Kind::Audio).filter(|track| self.is_used(track))
    }

    /// Returns the tracks of `kind` in the order of the demuxer.
    pub fn tracks(&self, kind: Kind) -> impl Iterator<Item = &Track> {
        self.tracks.iter().filter(move |track| track.kind == kind)
    }

    /// Returns the index among the video tracks of the one to play: the largest picture among the
    /// tracks that the file marks. A single picture, such as a cover, ranks below films.
    pub fn main_video(&self) -> Option<usize> {
        let rank = |track: &Track| {
            let side = |field| {
                let structure = track.caps.structure(0);
                structure
                    .and_then(|s| s.get::<i32>(field).ok())
                    .unwrap_or(0)
            };
            let area = i64::from(side("width")) * i64::from(side("height"));
            (track.packets > 1, track.selected, area)
        };
        let tracks: Vec<_> = self.tracks(Kind::Video).map(rank).enumerate().collect();
        // `max_by_key` returns the last of equals.
        let best = tracks.into_iter().rev().max_by_key(|(_, rank)| *rank);
        best.map(|(index, _)| index)
    }

    /// Reads tags and chapters from an event of the track `index`.
    fn note(&mut self, event: &gst::EventRef, index: usize) {
        match event.view() {
            gst::EventView::Tag(tag) if tag.tag().scope() == gst::TagScope::Stream => {
                let track = &mut self.tracks[index];
                track.tags = track.tags.merge(tag.tag(), gst::TagMergeMode::Replace);
            }
            gst::EventView::CustomDownstream(_) | gst::EventView::CustomDownstreamSticky(_)
                if event.has_name("application/x-gst-dvd") =>
            {
                self.tracks[index].events.push(event.to_owned());
            }
            gst::EventView::Tag(tag) if tag.tag().scope() == gst::TagScope::Global => {
                self.tags = self.tags.merge(tag.tag(), gst::TagMergeMode::Keep);
            }
            gst::EventView::Toc(toc) => {
                let toc = toc.toc().0;
                if toc.scope() == gst::TocScope::Global {
                    self.chapters = Some(toc.to_owned());
                }
            }
            _ => {}
        }
    }

    fn packets(&self) -> u64 {
        self.tracks
            .iter()
            .map(|track| track.packets + track.preroll)
            .sum()
    }
}

/// Builds a parsebin with a sink on each of its pads that discards all data.
fn build(path: &Path, demux: &Demux, shared: &Arc<Mutex<Survey>>) -> Result<gst::Pipeline, String> {
    let pipeline = gst::Pipeline::new();
    let elements = parse_file(&pipeline, path, demux)?;
    let seen = shared.clone();
    pipeline.connect_deep_element_added(move |_, _, element| {
        let factory = element.factory();
        if factory.is_some_and(|factory| factory.name() == "tsdemux") {
            lock(&seen).is_transport = true;
        }
    });
    let (weak, shared) = (pipeline.downgrade(), shared.clone());
    elements[elements.len() - 1].connect_pad_added(move |_, pad| {
        let Some(pipeline) = weak.upgrade() else {
            return;
        };
        let caps = pad.current_caps().unwrap_or_else(|| pad.query_caps(None));
        let start = pad.sticky_event::<gst::event::StreamStart>(0);
        let index = {
            let mut survey = lock(&shared);
            survey.tracks.push(Track::new(caps, start.as_ref()));
            survey.tracks.len() - 1
        };
        pad.sticky_events_foreach(|event| {
            lock(&shared).note(event, index);
            std::ops::ControlFlow::Continue(gst::EventForeachAction::Keep)
        });
        let seen = shared.clone();
        let kinds = PadProbeType::BUFFER | PadProbeType::EVENT_DOWNSTREAM;
        pad.add_probe(kinds, move |pad, info| {
            match &info.data {
                Some(PadProbeData::Buffer(buffer)) => {
                    let segment = pad.sticky_event::<gst::event::Segment>(0);
                    let segment = segment.as_ref().and_then(|e| e.segment().downcast_ref());
                    let track = &mut lock(&seen).tracks[index];
                    if track.head.is_empty()
                        && let Some(caps) = pad.current_caps()
                    {
                        track.caps = caps;
                    }
                    track.add(buffer, segment);
                }
                Some(PadProbeData::Event(event)) => lock(&seen).note(event, index),
                _ => {}
            }
            PadProbeReturn::Ok
        });
        if let Err(reason) = discard(&pipeline, pad) {
            refuse(&pipeline, &reason);
        }
    });
    Ok(pipeline)
}

fn lock(survey: &Mutex<Survey>) -> MutexGuard<'_, Survey> {
    survey.lock().unwrap_or_else(PoisonError::into_inner)
}
