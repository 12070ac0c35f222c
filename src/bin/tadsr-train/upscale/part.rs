//! Part of a video.

use std::time::Duration;

/// Range of a video.
#[derive(Debug, clap::Args)]
pub struct Range {
    /// Start of the part of a video that is upscaled, in seconds or as HH:MM:SS.mmm [default: 0]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub start: Option<Duration>,
    /// Duration of the part of a video that is upscaled, in seconds or as HH:MM:SS.mmm [default: to
    /// the end]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
}

#[cfg(feature = "video")]
impl Range {
    /// Returns the part of the video; `None` for the whole video.
    pub fn part(&self) -> Option<tadsr::video::Part> {
        if self.start.is_none() && self.duration.is_none() {
            return None;
        }
        let start = self.start.unwrap_or_default();
        let end = self
            .duration
            .map_or(Duration::MAX, |d| start.saturating_add(d));
        Some(tadsr::video::Part { start, end })
    }
}

/// Parses seconds, MM:SS or HH:MM:SS, with or without a fraction.
fn time(text: &str) -> Result<Duration, String> {
    parse(text).ok_or_else(|| "seconds such as 12.5, or HH:MM:SS.mmm".into())
}

/// Parses a time above zero.
pub fn duration(text: &str) -> Result<Duration, String> {
    match time(text)? {
        Duration::ZERO => Err("more than 0 seconds".into()),
        duration => Ok(duration),
    }
}

fn parse(text: &str) -> Option<Duration> {
    let mut parts = text.rsplit(':');
    let seconds = parts.next()?;
    if !seconds.starts_with(|c: char| c.is_ascii_digit())
        || !seconds.chars().all(|c| c.is_ascii_digit() || c == '.')
    {
        return None;
    }
    let seconds = Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?;
    let whole = |part: &str| {
        let is_number = !part.is_empty() && part.chars().all(|c| c.is_ascii_digit());
        is_number.then(|| part.parse::<u32>().ok()).flatten()
    };
    let limit = Duration::from_secs(60);
    let Some(minutes) = parts.next() else {
        return Some(seconds);
    };
    let (minutes, hours) = (whole(minutes)?, parts.next());
    let hours = hours.map_or(Some(0), whole)?;
    let is_clock = seconds < limit && minutes < 60 && parts.next().is_none();
    let before = Duration::from_secs(3600 * u64::from(hours) + 60 * u64::from(minutes));
    is_clock.then_some(before + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_or_a_clock() {
        let millis = |text| time(text).map(|t| t.as_millis());
        assert_eq!(millis("0"), Ok(0));
        assert_eq!(millis("12.5"), Ok(12_500));
        assert_eq!(millis("90"), Ok(90_000));
        assert_eq!(millis("1:30"), Ok(90_000));
        assert_eq!(millis("01:02:03.250"), Ok(3_723_250));
        assert_eq!(time("0.04"), Ok(Duration::from_millis(40)));
        for wrong in [
            "", "-1", "1:60", "1:2:3:4", "61:00", "1:1.5:00", "nan", "inf", "1e3", ":5", "5:",
        ] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
        assert!(duration("0").is_err() && duration("00:00:00").is_err());
    }
}
