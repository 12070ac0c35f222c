//! Comparison of a written file with its source.

use std::time::Duration;

use super::survey::{Kind, Survey, Track};

/// Tolerance of a frame's time. Containers count in milliseconds or in ticks of the frame rate.
const TIME: Duration = Duration::from_millis(2);
/// Tolerance of the length of audio and of its start relative to the video: one or two packets.
const AUDIO: Duration = Duration::from_millis(60);
/// Samples of two packets of AAC.
const TWO_PACKETS: f64 = 2048.0;

/// Tolerance of the time between the first subtitle and the last.
const SUBTITLES: Duration = Duration::from_millis(10);

/// Returns the tolerance of the length and of the start of an audio track: at low rates, packets of
/// AAC and MP3 are longer.
pub(super) fn tolerance(track: &Track) -> Duration {
    let structure = track.caps.structure(0);
    let structure = structure.filter(|structure| structure.name() == "audio/mpeg");
    let rate = structure.and_then(|structure| structure.get::<i32>("rate").ok());
    let rate = rate.filter(|rate| *rate > 0);
    rate.map_or(AUDIO, |rate| {
        AUDIO.max(Duration::from_secs_f64(TWO_PACKETS / f64::from(rate)))
    })
}

/// Expected content of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    pub frames: u64,
    /// Time of the first and of the last frame.
    pub first: Duration,
    pub last: Duration,
    /// Start and length of each audio stream, on the clock of the frames.
    pub audio: Vec<(Duration, Duration)>,
    /// Number of cues of each stream of subtitles, and the start of the first and of the last.
    pub subtitles: Vec<(usize, Duration, Duration)>,
}

impl Expected {
    /// Counts a frame that is shown at `pts`.
    pub fn add(&mut self, pts: Duration) {
        if self.frames == 0 {
            (self.first, self.last) = (pts, pts);
        }
        self.frames += 1;
        self.first = self.first.min(pts);
        self.last = self.last.max(pts);
    }
}

/// Returns a line for each kind of HDR metadata of the video of `source` that `written` lacks.
/// Encoders and containers may state it.
pub(super) fn left_out(source: &Survey, written: &Survey) -> Vec<String> {
    const FIELDS: [(&str, &str); 2] = [
        ("mastering-display-info", "mastering display"),
        ("content-light-level", "content light level"),
    ];
    let has = |survey: &Survey, field: &str| {
        let main = survey.main_video();
        let track = main.and_then(|main| survey.tracks(Kind::Video).nth(main));
        let structure = track.and_then(|track| track.caps.structure(0));
        structure.is_some_and(|structure| structure.has_field(field))
    };
    let lost = FIELDS.iter();
    let lost = lost.filter(|(field, _)| has(source, field) && !has(written, field));
    lost.map(|(_, name)| {
        format!("its HDR metadata ({name}) is left out: neither encoder nor container state it")
    })
    .collect()
}

/// Returns the differences of the demuxed file `written` from `expected`, each with both values.
pub(super) fn differences(expected: &Expected, written: &Survey) -> Vec<String> {
    let mut found = Vec::new();
    let Some(video) = written.tracks(Kind::Video).next() else {
        return vec!["the file has no video".into()];
    };
    if video.packets != expected.frames {
        found.push(format!(
            "{} frames were to be written, {} are in the file",
            expected.frames, video.packets
        ));
    }
    let length = expected.last.saturating_sub(expected.first);
    let span = video.span();
    if span.abs_diff(length) > TIME {
        found.push(format!(
            "the time from the first frame to the last is {:.3} s, in the file {:.3} s",
            length.as_secs_f64(),
            span.as_secs_f64()
        ));
    }
    compare_subtitles(expected, written, &mut found);
    let tracks: Vec<_> = written.tracks(Kind::Audio).collect();
    if tracks.len() != expected.audio.len() {
        found.push(format!(
            "{} audio streams were to be written, {} are in the file",
            expected.audio.len(),
            tracks.len()
        ));
        return found;
    }
    for (n, (track, (start, length))) in tracks.into_iter().zip(&expected.audio).enumerate() {
        let tolerance = tolerance(track);
        if track.duration().abs_diff(*length) > tolerance {
            found.push(format!(
                "audio stream {} lasts {:.3} s, in the file {:.3} s",
                n + 1,
                length.as_secs_f64(),
                track.duration().as_secs_f64()
            ));
        }
        let offset = |audio: Duration, video: Duration| audio.as_secs_f64() - video.as_secs_f64();
        let expected = offset(*start, expected.first);
        let written = offset(start_of(track), start_of(video));
        if (expected - written).abs() > tolerance.as_secs_f64() {
            found.push(format!(
                "audio stream {} begins {expected:.3} s after the video, in the file {written:.3} s",
                n + 1
            ));
        }
    }
    found
}

fn compare_subtitles(expected: &Expected, written: &Survey, found: &mut Vec<String>) {
    let tracks: Vec<_> = written.tracks(Kind::Subtitles).collect();
    if tracks.len() != expected.subtitles.len() {
        found.push(format!(
            "{} streams of subtitles were to be written, {} are in the file",
            expected.subtitles.len(),
            tracks.len()
        ));
        return;
    }
    let streams = tracks.into_iter().zip(&expected.subtitles);
    for (n, (track, (cues, first, last))) in (1..).zip(streams) {
        if track.cues.len() != *cues {
            found.push(format!(
                "{cues} subtitles of stream {n} were to be written, {} are in the file",
                track.cues.len()
            ));
        }
        let length = last.saturating_sub(*first);
        if track.span().abs_diff(length) > SUBTITLES {
            found.push(format!(
                "the time from the first subtitle of stream {n} to the last is {:.3} s, in the \
                 file {:.3} s",
                length.as_secs_f64(),
                track.span().as_secs_f64()
            ));
        }
    }
}

fn start_of(track: &Track) -> Duration {
    track.first.map_or(Duration::ZERO, Duration::from)
}
